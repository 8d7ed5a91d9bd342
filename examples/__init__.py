"""Runnable examples of ucm-middleware; README.md in this folder says what each one shows."""
