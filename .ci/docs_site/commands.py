"""The reference of the command line, from the commands themselves."""

from typing import Any, Final

MARK: Final = "<!-- the commands: put here from their own help when the site is built -->"
"""The line of a page in whose place they come."""


def commands() -> str:
    """Every command of ``ucm`` that is installed, those of adapters included, as Markdown."""
    from typer.main import get_command

    from ucm_middleware.cli.app import make_app

    command = get_command(make_app())
    context = command.make_context("ucm", [], resilient_parsing=True)
    return "\n\n".join(_described(command, "ucm", context))


def _described(command: Any, name: str, context: Any) -> list[str]:
    if hasattr(command, "list_commands"):
        parts = [] if name == "ucm" else [f"## {name}", command.help]
        for below in command.list_commands(context):
            parts += _described(command.get_command(context, below), f"{name} {below}", context)
        return parts
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join([name, *(["[OPTIONS]"] if options else []), *(_word(argument) for argument in arguments)])
    rows = [_row(f"`{_word(argument)}`", argument.help) for argument in arguments]
    rows += [_row(", ".join(f"`{word}`" for word in option.opts), option.help) for option in options]
    table = ["| given | what it is |\n|---|---|\n" + "\n".join(rows)] if rows else []
    return [f"### {name}", f"```text\n{usage}\n```", command.help or "", *table]


def _word(argument: Any) -> str:
    word = str(argument.metavar or argument.name.upper())
    return word if argument.required else f"[{word}]"


def _row(words: str, text: str | None) -> str:
    return f"| {words} | {(text or '').replace('|', chr(92) + '|')} |"
