"""The report of a run: on the terminal, and in the files that are asked for."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ucm_middleware.errors import ConfigurationError

if TYPE_CHECKING:
    from ucm_middleware.certify.certifying import Options, Result
    from ucm_middleware.certify.report.baseline import Baseline
    from ucm_middleware.certify.report.reporting import Report


@dataclass(frozen=True, slots=True)
class Wanted:
    """The files that are asked for; ``update`` adds what is found to the baseline."""

    json: Path | None
    junit: Path | None
    html: Path | None
    baseline: Path | None
    update: bool

    def known(self) -> "Baseline | None":
        """What the baseline knows. Raises ConfigurationError for one that cannot be read; to be written it may lack."""
        from ucm_middleware.certify.report.baseline import read_baseline

        if self.baseline is None:
            if self.update:
                raise ConfigurationError("--update-baseline needs --baseline FILE, which it writes")
            return None
        return None if self.update and not self.baseline.exists() else read_baseline(self.baseline)

    def check(self) -> None:
        """Raises ConfigurationError for a file that cannot be written, before a run that would be for nothing."""
        for path in (self.json, self.junit, self.html, self.baseline if self.update else None):
            if path is not None:
                _check_writable(path)


def report_of(results: "list[Result]", users: str | None, known: "Baseline | None") -> "Report":
    """Of one run, or of one without the package and one with it."""
    from ucm_middleware.certify.report.reporting import make_report

    options = results[0].options
    again = _command(options, users, with_ucm=len(results) > 1)
    return make_report(results[0], *results[1:], command=again, baseline=known)


def write_all(report: "Report", wanted: Wanted) -> None:
    """Print it, and write the files. Raises ConfigurationError for one that cannot be written."""
    from ucm_middleware.certify.report.as_json import as_json
    from ucm_middleware.certify.report.as_junit import as_junit
    from ucm_middleware.certify.report.baseline import write_baseline
    from ucm_middleware.certify.report.html import as_html
    from ucm_middleware.cli.certify.text import show

    show(report)
    for path, form in ((wanted.json, as_json), (wanted.junit, as_junit), (wanted.html, as_html)):
        if path is not None:
            _write(path, form(report))
    if wanted.update and wanted.baseline is not None:
        found = [finding for run in report.runs for finding in run.findings]
        write_baseline(wanted.baseline, report.baseline.with_all(found))


def _check_writable(path: Path) -> None:
    if not path.parent.is_dir():
        raise ConfigurationError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigurationError(f"{path} cannot be written: it is a folder, or may not be changed")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from None


def _command(options: "Options", users: str | None, *, with_ucm: bool) -> tuple[str, ...]:
    """The words that take the same steps again."""
    words = ["ucm", "certify", options.app, "--seed", str(options.seed), "--server", options.kind]
    words += ["--seconds", f"{options.seconds:g}"]
    if users is not None:
        words += ["--users", users]
    if options.app_dir != Path.cwd():
        words += ["--app-dir", str(options.app_dir)]
    if options.factory:
        words.append("--factory")
    if options.schema is not None:
        words += ["--schema", options.schema]
    if options.database is not None:
        words += ["--database-variable", options.database]
    for route in options.skip:
        words += ["--skip", route]
    if with_ucm:
        words.append("--with-ucm")
    return tuple(words)
