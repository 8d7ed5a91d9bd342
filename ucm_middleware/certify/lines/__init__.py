"""Connections to the server, which do what no client library would: pipeline, drop, stall, share among users."""
