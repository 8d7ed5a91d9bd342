"""Check the installed wheel and lay out the test suite in the working directory, away from the source of the package.

Usage: python wheel_suite.py CHECKOUT
"""

import pkgutil
import shutil
import sys
import sysconfig
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

FOLDERS = ("tests", "examples", "benchmarks", "docs")
FILES = ("pyproject.toml", "README.md")


def check_wheel() -> None:
    """Exit with a message unless ucm_middleware is imported from site-packages, is typed, and came alone."""
    import ucm_middleware

    site_packages = Path(sysconfig.get_path("purelib")).resolve()
    package = Path(ucm_middleware.__file__).resolve().parent
    if package.parent != site_packages:
        sys.exit(f"ucm_middleware is imported from {package}, expected it in {site_packages}")
    if not (package / "py.typed").is_file():
        sys.exit(f"{package} has no py.typed: type checkers would ignore the annotations")
    for module in pkgutil.walk_packages(ucm_middleware.__path__, "ucm_middleware."):
        import_module(module.name)
    installed = distribution("ucm-middleware")
    plugin = {"_ucm_middleware_pytest.py", "__pycache__"}  # beside the package; the module says why
    own = {"ucm_middleware", *plugin, f"ucm_middleware-{installed.version}.dist-info"}
    # The command stands where commands do, outside of site-packages.
    strangers = {file.parts[0] for file in installed.files or () if file.name not in {"ucm", "ucm.exe"}} - own
    if strangers:
        sys.exit(
            f"the wheel installs {sorted(strangers)} beside ucm_middleware and its pytest plugin, expected nothing else"
        )


def copy_suite(checkout: Path) -> None:
    """Copy the tests, what they read and their configuration into the working directory, over any earlier copy."""
    for name in FOLDERS:
        shutil.rmtree(name, ignore_errors=True)
        shutil.copytree(checkout / name, name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(checkout / name, name)


check_wheel()
copy_suite(Path(sys.argv[1]))
