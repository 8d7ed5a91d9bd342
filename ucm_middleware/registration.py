"""Registering plugins with pluggy, and the checks that each must pass before anything is served.

pluggy holds the specifications and the order. What it would accept and the dispatcher would not honour is refused.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Final

import pluggy

from ucm_middleware import hooks
from ucm_middleware.dispatch import Hooks, Implementation, Source
from ucm_middleware.errors import PluginError
from ucm_middleware.hooks import API_VERSION, PROJECT

HOOKS: Final = tuple(f"ucm_{field.name}" for field in fields(Hooks))

AWAITED: Final = frozenset({"ucm_identify"})
"""The hooks whose implementations may be asynchronous."""


def register(plugins: Sequence[tuple[object, Source]]) -> Hooks:
    """What these plugins implement, those of the first one first. Raises PluginError for one that cannot be served."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hooks)
    sources: dict[str, Source] = {}
    for position, (plugin, source) in reversed(list(enumerate(plugins))):  # pluggy calls the last registered first
        name = f"{source.plugin} ({position})"  # two instances of one class may both be plugins
        sources[name] = source
        try:
            _register_one(manager, plugin, name, source)
        except PluginError:
            raise
        except pluggy.PluginValidationError as error:
            raise source.error(" ".join(str(error).split()), "correct the implementation") from error
        except Exception as error:  # the plugin's own code: a property, __dir__, __eq__
            problem = f"looking at its hooks raised {type(error).__name__}: {error}"
            raise source.error(problem, "correct it so that it can be registered") from error
    manager.check_pending()
    return Hooks.of(
        {
            hook: tuple(
                _implementation(hook, implementation, sources[implementation.plugin_name])
                for implementation in reversed(_caller(manager, hook).get_hookimpls())
            )
            for hook in HOOKS
        }
    )


def _register_one(manager: pluggy.PluginManager, plugin: object, name: str, source: Source) -> None:
    if plugin is None or isinstance(plugin, type):
        raise source.error(f"it is {plugin!r}", "a plugin is a module or an instance")
    if manager.is_registered(plugin):
        raise source.error("it is given twice, or equals another plugin", "give it once")
    _check_version(getattr(plugin, "UCM_HOOK_API", API_VERSION), source)
    marked = [_check_options(manager, plugin, attribute, source) for attribute in dir(plugin)]
    if not any(marked):
        raise source.error("it implements no hook", "put @hookimpl from ucm_middleware on its functions")
    manager.register(plugin, name)


def _check_version(declared: object, source: Source) -> None:
    if not isinstance(declared, int) or isinstance(declared, bool):
        raise source.error(f"its UCM_HOOK_API is {declared!r}", f"it is a whole number; this version is {API_VERSION}")
    if declared < API_VERSION:
        raise source.error(
            f"it is too old: written for version {declared} of the hooks, and this is version {API_VERSION}",
            "upgrade the plugin",
        )
    if declared > API_VERSION:
        raise source.error(
            f"it is too new: written for version {declared} of the hooks, and this is version {API_VERSION}",
            "upgrade ucm-middleware",
        )


def _check_options(manager: pluggy.PluginManager, plugin: object, attribute: str, source: Source) -> bool:
    """Whether this attribute of a plugin implements a hook. What pluggy would pass over in silence is refused."""
    options = manager.parse_hookimpl_opts(plugin, attribute)
    if options is None:
        if attribute in HOOKS:
            raise source.error(
                f"its {attribute} is not a function with @hookimpl, so it would never be called",
                "put @hookimpl from ucm_middleware on it",
            )
        return False
    hook = options.get("specname") or attribute
    if hook not in HOOKS:
        if options.get("optionalhook"):
            return True
        raise source.error(
            f"its {attribute} implements {hook}, which is no hook",
            f"correct the name, or mark it optionalhook if a later version has it; the hooks are {', '.join(HOOKS)}",
        )
    if options.get("wrapper") or options.get("hookwrapper"):
        raise source.error(
            f"its {attribute} is a wrapper, and hooks are not called through wrappers here",
            "implement the hook itself; the ucm_around_ hooks are there to wrap",
        )
    return True


def _implementation(hook: str, implementation: pluggy.HookImpl, source: Source) -> Implementation:
    function = implementation.function
    _check_function(hook, function, source)
    arguments = _arguments(hook)
    by_position = [arguments.index(name) for name in implementation.argnames]
    by_name = {name: arguments.index(name) for name in implementation.kwargnames if name in arguments}
    return Implementation(hook, source, _adapted(function, by_position, by_name, len(arguments)))


def _check_function(hook: str, function: Callable[..., object], source: Source) -> None:
    """Refuse what would never do what it says: a coroutine that nobody awaits, an argument that nobody gives."""
    around = hook.startswith("ucm_around_")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        remedy = "decorate it with contextlib.asynccontextmanager" if around else "return instead of yielding"
        raise source.error(f"its {hook} is a generator", remedy)
    if inspect.iscoroutinefunction(function) and hook not in AWAITED:
        what = "returns an asynchronous context manager, and" if around else "is called where nothing can wait, and"
        raise source.error(f"its {hook} is a coroutine function", f"this hook {what} is declared with def")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.KEYWORD_ONLY):
            raise source.error(
                f"its {hook} takes {parameter}, which is never given",
                f"name, as ordinary arguments, those it wants of: {', '.join(_arguments(hook))}",
            )


def _adapted(
    function: Callable[..., object], by_position: list[int], by_name: dict[str, int], count: int
) -> Callable[..., object]:
    """The function as one that takes all arguments of its hook in order, and passes on those that it names."""
    if by_position == list(range(count)):
        return function
    if not by_name:
        return lambda *values: function(*[values[index] for index in by_position])
    return lambda *values: function(
        *[values[index] for index in by_position], **{name: values[index] for name, index in by_name.items()}
    )


def _arguments(hook: str) -> list[str]:
    return list(inspect.signature(getattr(hooks, hook)).parameters)


def _caller(manager: pluggy.PluginManager, hook: str) -> pluggy.HookCaller:
    caller: pluggy.HookCaller = getattr(manager.hook, hook)
    return caller
