"""What is installed under a name is never chosen by chance."""

from pathlib import Path

import pytest

from support.distributions import Shelf
from ucm_middleware.errors import ConfigurationError
from ucm_middleware.installed import sole

GROUP = "ucm_middleware.cluster"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.syspath_prepend(tmp_path)
    return Shelf(tmp_path)


def test_none_where_nobody_offers_it() -> None:
    assert sole(GROUP, "attic") is None


def test_the_one_that_offers_it(shelf: Shelf) -> None:
    shelf.install("ucm-attic", "open_store = print", group=GROUP, entry_points={"attic": "ucm_attic:open_store"})
    found = sole(GROUP, "attic")
    assert found is not None
    assert found.value == "ucm_attic:open_store"


def test_two_that_offer_it_are_named(shelf: Shelf) -> None:
    for name in ("ucm-attic", "not-ucm-attic"):
        shelf.install(name, "", group=GROUP, entry_points={"attic": f"{name.replace('-', '_')}:open_store"})
    with pytest.raises(ConfigurationError, match="not-ucm-attic, ucm-attic; uninstall all but one"):
        sole(GROUP, "attic")
