"""MCP servers whose calls run as their caller: an adapter of ucm-middleware."""
