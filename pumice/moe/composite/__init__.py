"""Members of an open family: see docs/moe.md."""
