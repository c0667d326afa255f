"""The registered ops, one pair per backend, and their fake kernels. Nothing here is differentiable."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels._flops import product
from mmkernels._library import library, register
from mmkernels.retrieval import reference

# ranks [N], int64
_RANKS = "(Tensor queries, Tensor keys, Tensor? targets) -> Tensor ranks"
# scores [N, k], float32 (float64 for float64 inputs); indices [N, k], int64
_TOPK = "(Tensor queries, Tensor keys, SymInt k) -> (Tensor scores, Tensor indices)"


def _ranks_fake(queries: Tensor, keys: Tensor, targets: Tensor | None) -> Tensor:
    return queries.new_empty(queries.shape[0], dtype=torch.int64)


def _topk_fake(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    return queries.new_empty(shape, dtype=dtype), queries.new_empty(shape, dtype=torch.int64)


def _flops(queries: Sequence[int], keys: Sequence[int], _: Any) -> int:
    return product(queries, keys)


# The reference is an op, too: its sizes depend on the values, so that compiled code can only call it whole.
_BACKENDS = ("cpu", "triton", "reference")
_ranks = register("retrieval_ranks_{}", _RANKS, _ranks_fake, __package__, _BACKENDS, _flops)
_topk = register("retrieval_topk_{}", _TOPK, _topk_fake, __package__, _BACKENDS, _flops)
library.impl("retrieval_ranks_reference", reference.retrieval_ranks, "CompositeExplicitAutograd")
library.impl("retrieval_topk_reference", reference.retrieval_topk, "CompositeExplicitAutograd")


def retrieval_ranks(queries: Tensor, keys: Tensor, targets: Tensor | None, backend: str) -> Tensor:
    """The rank of each query's target, [N] int64, on the backend named."""
    return _ranks[backend](queries, keys, targets)


def retrieval_topk(queries: Tensor, keys: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """Scores and indices of each query's k best keys, [N, k] each, on the backend named."""
    return _topk[backend](queries, keys, k)
