"""What each transaction of a connection is told, in one process."""

import pytest
from django_notebook import bodies, try_everything, write

from ucm_middleware import ContextNotFoundError, UserContextManager, managed_user_context

manager = UserContextManager()


def as_user(user_id: str) -> managed_user_context:
    return managed_user_context(manager.create_isolated_context(user_id))


@pytest.mark.usefixtures("notebook")
def test_smoke() -> None:
    with as_user("alice"):
        write("hers")
        assert bodies() == ["hers"]
    with as_user("bob"):
        assert bodies() == []
    with pytest.raises(ContextNotFoundError):
        bodies()
    with as_user("carol"):
        print(try_everything())
