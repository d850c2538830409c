"""emojiworld: pictures of known objects with exact ground truth, made from a seed.

Real artwork with real names, alone and composed into scenes, written as ordinary WebDataset shards. `World` holds the
options, `build` writes the shards, `truth.py` says what the JSON beside each picture holds. Needs the packages of the extra
`demo`."""

from vlpfast.data.emojiworld.build import answer_names, build, class_names, describe
from vlpfast.data.emojiworld.captions import templates
from vlpfast.data.emojiworld.world import Split, World, default_splits

__all__ = ["Split", "World", "answer_names", "build", "class_names", "default_splits", "describe", "templates"]
