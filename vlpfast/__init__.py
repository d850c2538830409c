"""vlpfast: a performance-first training engine for vision-language pre-training."""

__version__ = "0.1.0"
