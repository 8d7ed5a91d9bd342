"""uvicorn, which listens at once: ``python -m adk_server PORT``. To import ADK takes longer than tests wait."""

import socket
import sys

if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listening:
        import uvicorn
        from adk_app import app

        uvicorn.Server(uvicorn.Config(app, access_log=False)).run(sockets=[listening])
