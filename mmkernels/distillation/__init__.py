"""A student's cross-entropy under a teacher's softmaxes, over tiles of both: no matrix of logits is ever stored."""

from mmkernels.distillation.api import distillation

__all__ = ["distillation"]
