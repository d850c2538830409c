"""Late interaction: scores of pairs of token sets by the largest product of each token with the other set's."""

from vlpfast.ops.maxsim.distributed import sharded_filip_loss, sharded_maxsim_sigmoid_loss, sharded_query_loss
from vlpfast.ops.maxsim.int8 import maxsim_int8, quantize_tokens
from vlpfast.ops.maxsim.losses import filip_loss, maxsim_sigmoid_loss, score_contrastive_loss, token_filter
from vlpfast.ops.maxsim.maxsim import KERNELS, maxsim
from vlpfast.ops.maxsim.reducers import assignment_sim, attention_sim, topk_mean_sim, xtr_sim
from vlpfast.ops.maxsim.topk import maxsim_topk

__all__ = [
    "KERNELS",
    "assignment_sim",
    "attention_sim",
    "filip_loss",
    "maxsim",
    "maxsim_int8",
    "maxsim_sigmoid_loss",
    "maxsim_topk",
    "quantize_tokens",
    "score_contrastive_loss",
    "sharded_filip_loss",
    "sharded_maxsim_sigmoid_loss",
    "sharded_query_loss",
    "token_filter",
    "topk_mean_sim",
    "xtr_sim",
]
