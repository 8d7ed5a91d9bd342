"""Which plugins are loaded, and from where. Nothing is that neither the application nor the deployment names."""

import logging
from collections.abc import Sequence
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, entry_points, version
from types import ModuleType
from typing import Final, cast

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ucm_middleware.dispatch import Hooks, Source
from ucm_middleware.environment import IsolatedEnvironment
from ucm_middleware.errors import ConfigurationError, PluginError
from ucm_middleware.hooks import PROJECT
from ucm_middleware.registration import register

logger = logging.getLogger(__name__)

ALLOWED: Final = "UCM_PLUGINS"
"""The environment variable with the names of the entry points to load, separated by commas."""

AUTOLOAD_OFF: Final = "UCM_DISABLE_PLUGIN_AUTOLOAD"
"""Set to anything, it makes ``UCM_PLUGINS`` load nothing; what the application names in code is loaded all the same."""

CORE: Final = "ucm-middleware"


def load_hooks(plugins: Sequence[object], environment: IsolatedEnvironment) -> Hooks:
    """What the plugins that the application or the environment names implement.

    Each of ``plugins`` is the name of an installed entry point, a module, or an object with hooks. Raises PluginError,
    which names the plugin, when one cannot be served, and ConfigurationError when ``plugins`` is no list of such.
    """
    wanted = _named_in_code(plugins)
    names = {item for item in wanted if isinstance(item, str)}
    wanted += [name for name in _allowed(environment) if name not in names]
    names.update(item for item in wanted if isinstance(item, str))
    if not wanted and not logger.isEnabledFor(logging.INFO):
        return register(())
    installed = list(entry_points(group=PROJECT))
    _tell_of_others([entry_point for entry_point in installed if entry_point.name not in names])
    return register([_load(item, installed) if isinstance(item, str) else _given(item) for item in wanted])


def _named_in_code(plugins: object) -> list[object]:
    if not isinstance(plugins, list | tuple):
        raise ConfigurationError(
            f"plugins must be a list of entry-point names, modules and objects, not a {type(plugins).__name__}"
        )
    found = list(cast("Sequence[object]", plugins))
    for item in found:
        if item is None or item == "" or isinstance(item, type):
            raise ConfigurationError(
                f"plugins holds {item!r}; give the name of an entry point, a module, or an instance with hooks"
            )
    return found


def _allowed(environment: IsolatedEnvironment) -> list[str]:
    if environment.get(AUTOLOAD_OFF):
        return []
    names = (name.strip() for name in environment.get(ALLOWED, "").split(","))
    return list(dict.fromkeys(name for name in names if name))


def _tell_of_others(others: Sequence[EntryPoint]) -> None:
    if others:
        logger.info(
            "installed and not loaded: %s; to load a plugin, name it in UserContextManager(plugins=[...]) or in %s",
            ", ".join(f"{entry_point.name} ({_label(entry_point.dist)})" for entry_point in others),
            ALLOWED,
        )


def _load(name: str, installed: Sequence[EntryPoint]) -> tuple[object, Source]:
    offers = [entry_point for entry_point in installed if entry_point.name == name]
    if not offers:
        _refuse_as_name(name)
        names = ", ".join(sorted({entry_point.name for entry_point in installed})) or "none"
        raise PluginError(
            name,
            None,
            f"no installed distribution has an entry point of this name in the group {PROJECT!r}",
            f"install the one that has, or correct the name in plugins= or {ALLOWED}; installed: {names}",
        )
    labels = ", ".join(_label(entry_point.dist) for entry_point in offers)
    source = Source(name, offers[0].module, labels)
    if len(offers) > 1:
        raise source.error("more than one distribution offers a plugin of this name", "uninstall all but one")
    _require_core(offers[0].dist, source)
    try:
        plugin = offers[0].load()
    except (Exception, SystemExit) as error:  # the server would end without a word of whose doing it is
        raise source.error(
            f"its entry point {offers[0].value!r} could not be imported: {type(error).__name__}: {error}",
            f"install what it needs, or take it out of plugins= and {ALLOWED}",
        ) from error
    return plugin, source


def _refuse_as_name(name: str) -> None:
    """Raise PluginError for a distribution of ours that is there, and has nothing that could be loaded by a name."""
    try:
        found = distribution(f"ucm-{name}")
    except PackageNotFoundError:
        return
    if not found.entry_points.select(group=PROJECT):
        raise PluginError(
            name,
            _label(found),
            "is installed, but is no plugin by name",
            f"give an object of its own, such as plugins=[SQLAlchemy(engine)], and take the name out of {ALLOWED}",
        )


def _given(plugin: object) -> tuple[object, Source]:
    if isinstance(plugin, ModuleType):
        return plugin, Source(plugin.__name__, plugin.__name__)
    kind = type(plugin)
    return plugin, Source(f"{kind.__module__}.{kind.__qualname__}", kind.__module__)


def _require_core(distribution: Distribution | None, source: Source) -> None:
    """Hold the plugin to what its own distribution requires: installers warn of a conflict, and go on."""
    for line in () if distribution is None else distribution.requires or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            raise source.error("its metadata has a requirement that cannot be read", "install it anew") from error
        if canonicalize_name(requirement.name) != CORE:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = version(CORE)
        if not requirement.specifier.contains(found):
            raise source.error(
                f"it requires {CORE}{requirement.specifier}, and {found} is installed",
                f"install a version of the plugin for {CORE} {found}, or the {CORE} that it requires",
            )


def _label(distribution: Distribution | None) -> str:
    return "of no distribution" if distribution is None else f"{distribution.name} {distribution.version}"
