"""The same servers on standard input and output, for the one user that the environment names."""

import asyncio
import os
from typing import Any

from apps_fast import fast_server
from apps_sdk import sdk_server

from ucm_middleware import UserContextManager
from ucm_middleware_mcp import MCP

mcp = MCP()
manager = UserContextManager(plugins=[mcp])
kind = os.environ["NOTES_FRAMEWORK"]
made: Any = fast_server(guarded=True, by_token=False) if kind == "fastmcp" else sdk_server(guarded=True, by_token=False)
asyncio.run(mcp.run_stdio(made._lowlevel_server if kind == "lowlevel" else made, manager))
