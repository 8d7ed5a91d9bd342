"""Run commands at the same time, each an argument; what they print comes one after another.

    python .ci/at_once.py mypy pyright

The exit status is 1 when one of them fails. Type checkers use one core each, and a machine has more.
"""

import shlex
import subprocess
import sys


def main(commands: list[str]) -> int:
    """Start all, and print what each said when it has ended."""
    running = [
        subprocess.Popen(shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    failed = 0
    for command, process in zip(commands, running, strict=True):
        said, _ = process.communicate()
        sys.stdout.write(f"{command}: exit status {process.returncode}\n{said}")
        failed |= process.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
