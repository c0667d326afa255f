"""Cross-entropy of a linear layer's outputs.

The logits are not stored, unless a CPU needs for them at most 64 MiB, or no more than the weight and its gradient take.
"""

from mmkernels.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
