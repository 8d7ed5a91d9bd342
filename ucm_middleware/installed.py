"""What is installed under the name of an entry point."""

from importlib.metadata import EntryPoint, entry_points

from ucm_middleware.errors import ConfigurationError


def sole(group: str, name: str) -> EntryPoint | None:
    """The one entry point of this name in a group; None where there is none.

    Raises ConfigurationError where more than one distribution has it: which one came first would be chance.
    """
    found = list(entry_points(group=group, name=name))
    if len(found) > 1:
        owners = ", ".join(sorted("no distribution" if one.dist is None else one.dist.name for one in found))
        raise ConfigurationError(f"{name!r} is offered in {group!r} by more than one: {owners}; uninstall all but one")
    return found[0] if found else None
