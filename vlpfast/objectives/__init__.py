"""Losses with state, and losses of several operators (none yet): between nn and hosts."""
