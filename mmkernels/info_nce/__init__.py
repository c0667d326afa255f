"""Contrastive losses from one tile engine: no matrix of logits is stored, unless a CPU needs at most 64 MiB for it."""

from mmkernels.info_nce.api import info_nce

__all__ = ["info_nce"]
