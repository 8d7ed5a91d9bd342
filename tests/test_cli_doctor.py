"""``ucm doctor`` finds the doctors that adapters bring along, and says how to get one that is not there."""

import sys
from importlib.metadata import EntryPoint, EntryPoints
from types import ModuleType

import pytest
from typer.testing import CliRunner, Result

from ucm_middleware.cli import doctor
from ucm_middleware.cli.app import make_app


def ucm(*arguments: str) -> Result:
    """The command, in this process."""
    result = CliRunner().invoke(make_app(), arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def install(patch: pytest.MonkeyPatch, **doctors: str) -> None:
    """Let these entry points be there, and no others."""
    found = EntryPoints(EntryPoint(name, value, doctor.GROUP) for name, value in doctors.items())

    def entry_points(*, group: str) -> EntryPoints:
        return found.select(group=group)

    patch.setattr(doctor, "entry_points", entry_points)


def test_a_doctor_is_called_with_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def knee(patient: str, strict: bool = False) -> None:
        """Examine a knee."""
        print(f"{patient} {strict}")

    module = ModuleType("knees")
    module.__dict__["knee"] = knee
    monkeypatch.setitem(sys.modules, "knees", module)
    install(monkeypatch, knee="knees:knee")
    assert ucm("doctor", "knee", "ann", "--strict").output == "ann True\n"
    assert "Examine a knee." in ucm("doctor", "--help").output
    assert "Examine a knee." in ucm("doctor", "knee", "--help").output


def test_a_doctor_that_is_not_installed_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    result = ucm("doctor", "postgres", "postgresql://ann:hunter2@localhost/shop")
    assert result.exit_code == 2
    assert result.stderr == "there is no doctor called postgres here: pip install 'ucm-postgres[doctor]'\n"
    assert "postgres comes with ucm-postgres" in " ".join(ucm("doctor", "--help").output.split())


def test_a_doctor_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    result = ucm("doctor", "feet")
    assert result.exit_code == 2
    assert "No such command 'feet'" in result.stderr


def test_a_doctor_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, knee="no_such_module:knee")
    result = ucm("doctor", "knee", "ann")
    assert result.exit_code == 2
    assert result.stderr == "the doctor called knee cannot be imported (No module named 'no_such_module')\n"


def test_none_is_imported_for_other_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, knee="no_such_module:knee")
    assert ucm("--help").exit_code == 0
    assert ucm("audit", "--help").exit_code == 0
