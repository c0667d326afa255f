"""Contrastive losses from one tile engine: no matrix of logits is ever stored."""

from mmkernels.info_nce.api import info_nce

__all__ = ["info_nce"]
