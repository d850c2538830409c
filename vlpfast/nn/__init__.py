"""Blocks that models are made of. They know nothing of training, data or losses."""
