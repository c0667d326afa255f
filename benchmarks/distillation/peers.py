"""What users run today for distillation: calls (queries, keys, scale, the teacher's) -> loss."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels

# The packages whose versions a report writes beside its numbers; torch is always there.
PACKAGES = ("open-clip-torch",)


def eager_distillation(
    queries: Tensor, keys: Tensor, scale: Tensor, teacher_queries: Tensor, teacher_keys: Tensor, teacher_scale: Tensor
) -> Tensor:
    """The logits of student and teacher once, both cross-entropies from them: 4 G in all."""
    logits = scale * queries @ keys.T
    with torch.no_grad():
        teacher = teacher_scale * teacher_queries @ teacher_keys.T
        rows, columns = teacher.softmax(1), teacher.T.softmax(1)
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns)) / 2


def distillation_losses(impl: str = "auto") -> dict[str, Callable[..., Tensor]]:
    """The fused loss first, then its peers: calls (queries, keys, scale, the teacher's) -> loss. Last come our
    DistillClipLoss and open_clip's, whose loss includes CLIP's."""

    losses: dict[str, Callable[..., Tensor]] = {
        "mmkernels": functools.partial(mmkernels.distillation, impl=impl),  # type: ignore[arg-type]
        "eager": eager_distillation,
        "torch.compile": torch.compile(eager_distillation, dynamic=False),
        "mmkernels DistillClipLoss": lambda *features: sum(mmkernels.DistillClipLoss()(*features)),
    }
    try:
        from open_clip.loss import DistillClipLoss
    except ImportError:
        return losses
    losses["open_clip DistillClipLoss"] = lambda *features: sum(DistillClipLoss()(*features))
    return losses
