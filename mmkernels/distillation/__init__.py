"""A student's cross-entropy under a teacher's softmaxes, over tiles of both.

No matrix of logits is stored, unless a CPU needs at most 64 MiB for both.
"""

from mmkernels.distillation.api import distillation

__all__ = ["distillation"]
