"""The registered ops, one pair a backend, and their fake kernels. Nothing here is differentiable."""

import functools
from typing import Any

import torch
from torch import Tensor

from mmkernels.retrieval import reference

_library = torch.library.Library("mmkernels", "FRAGMENT")

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


# The reference, too: its sizes depend on the values, and compiled code takes it whole.
for _backend in ("cpu", "triton", "reference"):
    _library.define(f"retrieval_ranks_{_backend}{_RANKS}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.define(f"retrieval_topk_{_backend}{_TOPK}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"mmkernels::retrieval_ranks_{_backend}", _ranks_fake, lib=_library)
    torch.library.register_fake(f"mmkernels::retrieval_topk_{_backend}", _topk_fake, lib=_library)

_library.impl("retrieval_ranks_reference", reference.retrieval_ranks, "CompositeExplicitAutograd")
_library.impl("retrieval_topk_reference", reference.retrieval_topk, "CompositeExplicitAutograd")


@functools.cache
def _triton() -> Any:
    """Triton is imported by the first call that runs it: importing mmkernels imports torch alone."""
    from mmkernels.retrieval import triton_kernels

    return triton_kernels


for _name in ("ranks", "topk"):

    def _launch(*args: Any, _name: str = f"retrieval_{_name}") -> Any:
        return getattr(_triton(), _name)(*args)

    # The CPU key serves the interpreter.
    for _key in ("CUDA", "CPU"):
        _library.impl(f"retrieval_{_name}_triton", _launch, _key)


def retrieval_ranks(queries: Tensor, keys: Tensor, targets: Tensor | None, backend: str) -> Tensor:
    """The rank of every query's target, [N] int64, on the backend named."""
    return getattr(torch.ops.mmkernels, f"retrieval_ranks_{backend}")(queries, keys, targets)


def retrieval_topk(queries: Tensor, keys: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """Scores and indices of every query's k best keys, [N, k] each, on the backend named."""
    return getattr(torch.ops.mmkernels, f"retrieval_topk_{backend}")(queries, keys, k)
