"""Real distributions for tests of plugins: modules with their metadata, on a folder of sys.path."""

import importlib
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path


class Shelf:
    """A folder on sys.path into which distributions are installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: set[str] = set()

    def install(
        self,
        name: str,
        code: str,
        *,
        entry_points: Mapping[str, str] | None = None,
        version: str = "1.5",
        requires: Sequence[str] = (),
        group: str = "ucm_middleware",
    ) -> None:
        """Install the distribution ``name`` with one module, named likewise with underscores.

        Its entry point of the group has the module's name without ``ucm_`` unless ``entry_points`` gives others.
        """
        module = name.replace("-", "_")
        self.modules.add(module)
        (self.folder / f"{module}.py").write_text(textwrap.dedent(code))
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires), "", ""]))
        points = {module.removeprefix("ucm_"): module} if entry_points is None else entry_points
        declared = "\n".join(f"{point} = {value}" for point, value in points.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{declared}\n")
        (info / "top_level.txt").write_text(f"{module}\n")
        importlib.invalidate_caches()
