"""Replacements for ops of other code bases, under their names (none yet); imports ops alone."""
