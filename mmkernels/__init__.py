"""Fused kernels for multimodal models, behind plain PyTorch calls."""

from mmkernels.contrastive import info_nce
from mmkernels.integrations.open_clip import ClipLoss

__all__ = ["ClipLoss", "info_nce"]
__version__ = "0.1.0"
