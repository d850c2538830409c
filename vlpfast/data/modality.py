"""What a loader asks of everything that it can put into a batch beside captions: pictures, clips, sounds, volumes, points."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor


class Draws(NamedTuple):
    """What the random choices of a batch may depend on, and nothing else may: a resumed run then sees the same. All of them are
    order.uniform(seed, epoch, index, number of the draw), or come from a generator seeded with these."""

    seed: int
    epoch: int
    index: np.ndarray  # int64 [B] position of each sample in its source
    train: bool  # False: no random choice at all


class Modality(Protocol):
    """One modality of a batch, made from one member of each sample. `members`: extensions, the first that a sample has counts.

    Made, used and closed in the thread that works ahead, once for each iteration; an object that was closed is not used again.
    Where it has an attribute `groups` it is made from several members of each sample, one of each group of extensions: `content`
    then is the list of them.
    """

    members: tuple[str, ...]

    def inspect(self, content: np.ndarray | None, record: dict[str, Any]) -> Any:
        """content: uint8 bytes of the member, None if the sample has none; record: the sample's JSON, {} if it has none -> what
        planning needs of it (size, duration, frames). Cheap. Raises DamagedSample with the reason."""
        ...

    def submit(self, contents: list[np.ndarray], infos: list[Any], records: list[dict[str, Any]], draws: Draws) -> dict[str, Any]:
        """Starts the work on a batch; several may be in flight, first in, first out. infos: what inspect() told.

        -> the fields that are known at once; they stay on the host."""
        ...

    def receive(self) -> dict[str, Tensor]:
        """The other fields of the oldest batch; the loader moves them to its device. Raises DamagedBatch when samples turn out
        damaged: the loader leaves them out, calls reset(), fills the batch up and submits anew."""
        ...

    def reset(self) -> None:
        """Forgets what was submitted."""
        ...

    def close(self) -> None: ...
