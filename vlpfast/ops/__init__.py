"""Operators: tensors in, tensors out. One folder a family; `backends` says which implementations exist here and which is used."""

from vlpfast.ops import _lazy, _library, _schemas  # noqa: F401  (defines torch.ops.vlpfast.*, loads or lists their kernels)
