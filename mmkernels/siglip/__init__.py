"""The sigmoid loss over all pairs: no matrix of logits is ever stored."""

from mmkernels.siglip.api import siglip

__all__ = ["siglip"]
