"""The batch triplet loss: every pair of rows is compared, no matrix of similarities is stored."""

from mmkernels.triplet.api import triplet

__all__ = ["triplet"]
