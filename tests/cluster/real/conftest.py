"""A store of each test's own, with a witness of all that it does."""

from collections.abc import Iterator

import pytest

from support.restarts import Restarts, restartable_valkey
from support.witness import Witness, witnessing


@pytest.fixture
def store() -> Iterator[Restarts]:
    """A Valkey that the test may kill."""
    with restartable_valkey() as made:
        yield made


@pytest.fixture
def witness(store: Restarts) -> Iterator[Witness]:
    """What sees all that it does."""
    with witnessing(store) as made:
        yield made
