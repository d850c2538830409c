"""The engine: configuration, stages, trainer, checkpoints."""
