"""Build the site: ``python -m docs_site`` in the root of the repository.

It is written to build/site, from pages that are laid out in build/docs. Exit status 1 for a link that leads nowhere, a
name that the reference cannot find, or anything that a page would load from another host.
"""

import subprocess
import sys
from pathlib import Path

from docs_site.check import check_site
from docs_site.layout import DeadLinkError, lay_out


def main(root: Path) -> int:
    """Lay the pages out, build them and check what was built."""
    try:
        pages = lay_out(root, root / "build" / "docs")
    except DeadLinkError as error:
        sys.stderr.write(f"links that lead nowhere:\n{error}\n")
        return 1
    built = subprocess.run([sys.executable, "-m", "zensical", "build", "--clean", "--strict"], cwd=root, check=False)
    if built.returncode:
        return 1
    report = check_site((root / "build" / "site").resolve())
    sys.stdout.write(f"{pages} pages, {report.links} links. To other sites, not looked up:\n")
    sys.stdout.writelines(f"  {link}\n" for link in sorted(report.external))
    sys.stderr.writelines(f"{problem}\n" for problem in report.problems)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main(Path.cwd()))
