"""One app of the gallery, which the environment chooses; see `support.gallery`."""

import os
from importlib import import_module

from starlette.types import ASGIApp

from examples.gallery import GALLERY
from ucm_middleware import UserContextManager


def make() -> ASGIApp:
    bug = next(bug for bug in GALLERY if bug.name == os.environ["GALLERY_BUG"])
    manager = UserContextManager() if "GALLERY_MANAGED" in os.environ else None
    app: ASGIApp = import_module(bug.module).create_app(planted="GALLERY_PLANTED" in os.environ, manager=manager)
    return app
