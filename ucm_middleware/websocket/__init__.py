"""WebSocket connections: what each may send, where its pages may come from, and how events reach it."""
