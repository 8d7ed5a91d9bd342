"""JSON values as type checkers understand them: lists of anything, and objects with texts for names."""

from typing import Any, TypeGuard


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether it is a list."""
    return isinstance(value, list)


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether it is an object, whose names JSON lets be texts alone."""
    return isinstance(value, dict)
