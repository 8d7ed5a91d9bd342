"""The part of a matrix that runs where UCM_TEST_MATRICES asks for one: fixed, of every test, and told."""

from itertools import product

import pytest

from support.matrices import part_of, step_of

MODULE = """
    import pytest

    @pytest.mark.matrix
    @pytest.mark.parametrize("number", range(12))
    def test_large(number): pass

    @pytest.mark.matrix
    @pytest.mark.parametrize("number", range(3))
    def test_small(number): pass

    @pytest.mark.parametrize("number", range(4))
    def test_other(number): pass
"""


@pytest.mark.parametrize(("given", "passed"), [(None, [*range(12)]), ("1", [*range(12)]), ("5", [0, 5, 10])])
def test_each_so_many_th_case_of_each_matrix_runs(
    pytester: pytest.Pytester, given: str | None, passed: list[int]
) -> None:
    pytester.makeini("[pytest]\nmarkers = matrix\nasyncio_default_fixture_loop_scope = function")
    kept = part_of(pytester.getitems(MODULE), step_of(given))
    of_others = [f"test_other[{number}]" for number in range(4)]
    of_small = [f"test_small[{number}]" for number in passed if number < 3]
    assert sorted(item.name for item in kept) == sorted([f"test_large[{n}]" for n in passed] + of_small + of_others)


@pytest.mark.parametrize("given", ["", "0", "-1", "half", "1.5"])
def test_what_is_no_number_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="UCM_TEST_MATRICES"):
        step_of(given)


@pytest.mark.parametrize(("step", "says"), [(1, "in full"), (5, "one case in 5; the others are left out")])
def test_the_header_says_what_runs(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, step: int, says: str
) -> None:
    monkeypatch.setattr("support.matrices.STEP", step)
    config = request.config
    told = config.hook.pytest_report_header(config=config, start_path=config.rootpath)
    assert [line for lines in told if isinstance(lines, list) for line in lines if line.startswith("matrices")] == [
        f"matrices: {says}"
    ]


def test_the_part_that_tox_asks_for_has_every_kind_of_cancel_moment_and_resource() -> None:
    from test_cancellation_matrix import CANCELS, EXIT_MOMENTS, HANDLER_MOMENTS, HOSTS, RESOURCES, cases

    part = [case.values for case in cases(CANCELS, HOSTS, HANDLER_MOMENTS + EXIT_MOMENTS)[::5]]
    assert {(cancel, host) for cancel, host, _, _ in part} == set(product(CANCELS, HOSTS))
    assert {(cancel, enter) for cancel, _, enter, _ in part} == set(product(CANCELS, RESOURCES.values()))
    assert {moment for *_, moment in part} == {*HANDLER_MOMENTS, *EXIT_MOMENTS}
