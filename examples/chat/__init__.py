"""A chat: users in browser tabs, who talk to one agent. See the README."""
