"""Which kinds of server the tests run on, where a variable picks some."""

import pytest

from support.servers import ALL_SERVER_KINDS, chosen_kinds


def test_without_the_variable_they_are_all() -> None:
    assert chosen_kinds(None) == ALL_SERVER_KINDS


def test_some_are_picked_by_name() -> None:
    assert chosen_kinds("granian uvicorn-h11") == ("uvicorn-h11", "granian")


@pytest.mark.parametrize("names", ["uvicorn", "granian,hypercorn", "granian gunicorn", "", " "])
def test_a_wrong_name_does_not_leave_tests_out(names: str) -> None:
    with pytest.raises(ValueError, match=r"must name some of uvicorn-h11, .*, not '"):
        chosen_kinds(names)
