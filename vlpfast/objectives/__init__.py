"""Losses with state, and losses of several operators: between nn and hosts."""
