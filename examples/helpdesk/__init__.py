"""A small help desk, and a demonstration that drives it as three users at once."""
