"""Follows pages as a reader does: saves the files, starts the server, types the commands, compares what comes out."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import httpx

from docs_site.markdown import blocks
from ucm_middleware.testing import Server, start_server
from ucm_middleware.testing.waiting import PATIENCE

_HERE: Final = "http://127.0.0.1:8000"
"""The address that the pages name; the server of a test has another port."""


class Reader:
    """Somebody who goes through pages in one folder, and ends their server and programs after each page."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._page = ExitStack()
        self._server: Server | None = None
        self._windows: list[Window] = []

    def save(self, page: str) -> None:
        """Save the files of a page, as somebody has who was through it."""
        for block in blocks(page):
            if block.title:
                (self._folder / block.title).write_text(block.text)

    def follow(self, page: str) -> int:
        """Do what a page says, from the top down. Returns how many commands were typed.

        Raises AssertionError for any surprise.
        """
        typed, windows = 0, iter(self._windows)
        with self._page:
            for block in blocks(page):
                if block.title:
                    (self._folder / block.title).write_text(block.text)
                elif block.language == "console":
                    for command, expected in _typed(block.text):
                        self._type(command, expected)
                        typed += 1
                elif block.language == "text":
                    # What the windows show next, in the order in which they were opened.
                    next(windows).expect(block.text.splitlines())
        self._server = None
        self._windows.clear()
        return typed

    def _type(self, command: str, expected: list[str]) -> None:
        program, *arguments = shlex.split(command)
        if program == "curl":
            _compare(command, _curl(arguments, self._running()).splitlines(), expected)
        elif program == "python":
            script = (self._folder / arguments[0]).read_text().replace(":8000", f":{self._running().port}")
            window = self._page.enter_context(Window([sys.executable, "-c", script, *arguments[1:]], self._folder))
            self._windows.append(window)
            window.expect(expected)
        elif program == "pytest":
            # The plugins that happen to be installed here besides are not the reader's.
            options = ["-p", "no:cacheprovider", "-p", "no:asyncio", "-p", "no:randomly"]
            _compare(command, self._run([sys.executable, "-m", "pytest", *options, *arguments]), expected)
        else:
            self._running()
            _compare(command, self._run([str(Path(sys.executable).with_name(program)), *arguments]), expected)

    def _running(self) -> Server:
        if self._server is None:
            self._server = self._page.enter_context(start_server("app:app", app_dir=self._folder))
        return self._server

    def _run(self, command: list[str]) -> list[str]:
        done = subprocess.run(
            command, cwd=self._folder, stdout=subprocess.PIPE, text=True, timeout=2 * PATIENCE, check=False
        )
        return done.stdout.splitlines()


class Window:
    """A program that goes on until it is closed."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self._command = command
        self._process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)

    def expect(self, lines: list[str]) -> None:
        """AssertionError unless these are the next lines that it writes; the timeout of the test ends the waiting."""
        assert self._process.stdout is not None
        found = [self._process.stdout.readline().rstrip("\n") for _ in lines]
        _compare(shlex.join(self._command[3:]), found, lines)

    def __enter__(self) -> "Window":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def _typed(text: str) -> Iterator[tuple[str, list[str]]]:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *expected = part.splitlines()
        yield command, expected


def _compare(command: str, found: list[str], expected: list[str]) -> None:
    """A sign of omission stands for anything, over lines too."""
    pattern = "".join(".*" if part == "…" else re.escape(part) for part in re.split("(…)", "\n".join(expected)))
    assert re.fullmatch(pattern, "\n".join(found), re.DOTALL), f"{command} wrote {found}, and the page says {expected}"


def _curl(arguments: list[str], server: Server) -> str:
    method, headers, body, url = "GET", dict[str, str](), None, ""
    words = iter(arguments)
    for word in words:
        match word:
            case "-s":
                pass
            case "-X":
                method = next(words)
            case "-H":
                name, _, value = next(words).partition(": ")
                headers[name] = value
            case "--json":
                method, body = "POST", next(words)
                headers["Content-Type"] = "application/json"
            case _:
                assert word.startswith(_HERE), f"curl is given {word}"
                url = word.replace(_HERE, server.url)
    return httpx.request(method, url, headers=headers, content=body, trust_env=False).text
