"""The guide to testing an app is what it says: its files are run as they stand there."""

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "test-your-app.md"


def test_the_files_of_the_guide_pass_as_they_are(pytester: pytest.Pytester) -> None:
    files = dict(re.findall(r'```python title="([^"]+)"\n(.*?)```', GUIDE.read_text(), re.DOTALL))
    assert set(files) == {"shop.py", "test_shop.py", "test_time.py", "conftest.py", "test_server.py"}
    for name, text in files.items():
        (pytester.path / name).write_text(text)
    options = ("-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function")
    result = pytester.runpytest_subprocess("--ucm-strict", "-W", "error", *options)
    result.assert_outcomes(passed=5)
