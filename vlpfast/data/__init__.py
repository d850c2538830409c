"""From WebDataset shards to batches. DALI and tokenizers are loaded when they are used."""

from vlpfast.data.loader import make_loader
from vlpfast.data.shards import ShardSet, ShardWriter
from vlpfast.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = ["ShardSet", "ShardWriter", "load_tokenizer", "make_loader", "train_tokenizer"]
