"""The documentation's site: its pages laid out, built by zensical, and every link of it checked."""
