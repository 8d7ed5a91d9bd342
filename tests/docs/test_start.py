"""The first program of README.md is whole: it runs as it stands there."""

from pathlib import Path

import httpx

from docs_site.markdown import blocks
from ucm_middleware.testing import start_server

README = Path(__file__).parents[2] / "README.md"


def test_the_program_that_one_starts_with(tmp_path: Path) -> None:
    [program] = [block for block in blocks(README.read_text()) if block.title == "main.py"]
    (tmp_path / "main.py").write_text(program.text)
    with start_server("main:app", app_dir=tmp_path, env={"UCM_ENVIRONMENT": None}) as server:

        def ask(**headers: str) -> httpx.Response:
            return httpx.get(f"{server.url}/whoami", headers=headers, trust_env=False)

        answer = ask(Authorization="Bearer token-of-alice").json()
        assert answer["user"] == "alice"
        assert answer["request"].startswith("request_")
        assert ask(Authorization="Bearer token-of-carol").status_code == 401
        assert ask().status_code == 401
