"""Fused kernels for multimodal models, behind plain PyTorch calls."""

from mmkernels.beam_search import beam_search, beam_search_step
from mmkernels.contrastive_step import contrastive_step
from mmkernels.distillation import distillation
from mmkernels.divided_attention import divided_attention, divided_attention_maps
from mmkernels.info_nce import info_nce
from mmkernels.integrations.open_clip import ClipLoss, DistillClipLoss, SigLipLoss
from mmkernels.linear_cross_entropy import linear_cross_entropy
from mmkernels.retrieval import retrieval_ranks, retrieval_topk
from mmkernels.siglip import siglip
from mmkernels.triplet import triplet

__all__ = [
    "ClipLoss",
    "DistillClipLoss",
    "SigLipLoss",
    "beam_search",
    "beam_search_step",
    "contrastive_step",
    "distillation",
    "divided_attention",
    "divided_attention_maps",
    "info_nce",
    "linear_cross_entropy",
    "retrieval_ranks",
    "retrieval_topk",
    "siglip",
    "triplet",
]
__version__ = "0.1.0"
