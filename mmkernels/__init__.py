"""Fused kernels for multimodal models, behind plain PyTorch calls."""

from mmkernels.beam_search import beam_search, beam_search_step
from mmkernels.contrastive import info_nce
from mmkernels.divided_attention import divided_attention, divided_attention_maps
from mmkernels.integrations.open_clip import ClipLoss
from mmkernels.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "ClipLoss",
    "beam_search",
    "beam_search_step",
    "divided_attention",
    "divided_attention_maps",
    "info_nce",
    "linear_cross_entropy",
]
__version__ = "0.1.0"
