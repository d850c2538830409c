"""Late interaction: scores of pairs of token sets by the largest product of each token with the other set's."""

from vlpfast.ops.maxsim.maxsim import KERNELS, maxsim

__all__ = ["KERNELS", "maxsim"]
