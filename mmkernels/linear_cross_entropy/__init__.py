"""Cross-entropy of a linear layer's outputs: the logits are never stored."""

from mmkernels.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
