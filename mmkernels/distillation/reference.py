"""Eager, obviously right, on any device: the oracle of the tests."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._checks import without_autocast
from mmkernels.distillation.options import Options


def distillation(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    options: Options,
) -> tuple[Tensor, Tensor]:  # [N], [N]
    """The losses of each query: under the teacher's softmax, and against the key of its number (NaN if there is none).

    They come from the full matrices of logits in the dtype of `scale` (float32 or float64).
    """
    teacher_queries, teacher_keys, teacher_scale, symmetric = options
    with without_autocast(queries):  # autocast would multiply in half precision
        logits = scale * queries.to(scale.dtype) @ keys.to(scale.dtype).T  # [N, M]
        with torch.no_grad():
            teacher = teacher_scale * teacher_queries.to(scale.dtype) @ teacher_keys.to(scale.dtype).T
    matches = min(logits.shape)
    own = torch.arange(matches, device=queries.device)
    distilled = F.cross_entropy(logits, teacher.softmax(1), reduction="none")
    matched = F.pad(
        F.cross_entropy(logits[:matches], own, reduction="none"), (0, len(queries) - matches), value=math.nan
    )
    if not symmetric:
        return distilled, matched
    distilled = (distilled + F.cross_entropy(logits.T, teacher.T.softmax(1), reduction="none")) / 2
    return distilled, (matched + F.cross_entropy(logits.T, own, reduction="none")) / 2
