"""Contrastive losses on one primitive: sums over all pairs of two sets of features, without their matrix of logits.

The rule behind every function here: the target pair never enters the sums over the matrix product. It is left out of them and
added beside them, so that a loss near zero keeps its full relative precision (subtracting it afterwards does not).
"""

from vlpfast.ops.contrastive.distill import distilled_contrastive_loss, pair_distill
from vlpfast.ops.contrastive.distributed import sharded_clip_loss, sharded_sigmoid_loss
from vlpfast.ops.contrastive.losses import clip_loss, debiased_contrastive_loss, lit_loss, matryoshka_loss, nt_xent_loss
from vlpfast.ops.contrastive.pair import KERNELS, pair_logsumexp
from vlpfast.ops.contrastive.sample import sample_hard_negatives
from vlpfast.ops.contrastive.softplus import pair_softplus, sigmoid_loss
from vlpfast.ops.contrastive.supervised import (
    group_contrastive_loss,
    local_global_loss,
    supcon_loss,
    supervised_contrastive_loss,
)

__all__ = [
    "KERNELS",
    "clip_loss",
    "debiased_contrastive_loss",
    "distilled_contrastive_loss",
    "group_contrastive_loss",
    "lit_loss",
    "local_global_loss",
    "matryoshka_loss",
    "nt_xent_loss",
    "pair_distill",
    "pair_logsumexp",
    "pair_softplus",
    "sample_hard_negatives",
    "sharded_clip_loss",
    "sharded_sigmoid_loss",
    "sigmoid_loss",
    "supcon_loss",
    "supervised_contrastive_loss",
]
