"""Instructions that a refusal takes for a foreign record, and for none: by them nobody can tell the two apart.

    python benchmarks/key_denial.py

needs valgrind, and fails when the two differ by more than 1%. A run with more refusals less a run with fewer leaves the
refusals alone, without the start of the interpreter. A refusal writes an audit record; the ledger is in memory.
"""

import os
import re
import subprocess
import sys

from ucm_middleware import CrossUserAccessError, UserContextManager, managed_user_context

FEW, MORE = 200, 1200


def refuse(case: str, times: int) -> None:
    manager = UserContextManager(secret="q7Vd0mXo3RkT9yLw2ZsB5uHc8PfJ1nGa4EeIx6")
    bobs = manager.create_isolated_context("bob").derive_key("thread", "t-1")
    found = {"foreign": bobs, "missing": None}[case]
    with managed_user_context(manager.create_isolated_context("alice")) as context:
        for _ in range(times):
            try:
                context.check_key("thread", "t-1", found)
            except CrossUserAccessError:
                continue
            raise AssertionError("a record that is not alice's was let through")


def instructions(case: str, times: int) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, __file__, case]
    env = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run([*command, str(times)], env=env, capture_output=True, text=True, check=True)
    counted = re.search(r"Collected : (\d+)", done.stderr)
    if counted is None:
        raise RuntimeError(f"valgrind counted nothing:\n{done.stderr}")
    return int(counted[1])


def main() -> int:
    each = {
        case: (instructions(case, MORE) - instructions(case, FEW)) / (MORE - FEW) for case in ("foreign", "missing")
    }
    apart = abs(each["foreign"] / each["missing"] - 1)
    sys.stdout.write(
        f"foreign {each['foreign']:.0f}, missing {each['missing']:.0f} instructions a refusal: {apart:.2%} apart\n"
    )
    return int(apart > 0.01)


if __name__ == "__main__":
    if sys.argv[1:]:
        refuse(sys.argv[1], int(sys.argv[2]))
    else:
        sys.exit(main())
