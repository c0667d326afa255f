"""The registered ops, one pair a backend, their fake kernels, and the autograd.Function around them."""

import functools
from typing import Any

import torch
from torch import Tensor

from mmkernels._autograd import refuse_second_derivatives

_library = torch.library.Library("mmkernels", "FRAGMENT")

# losses [N]; row_lse [2, N], col_lse [2, M] ([2, 0] if not symmetric), each the rounded value and what rounding took
# off; float32
_FORWARD = (
    "(Tensor queries, Tensor keys, Tensor scale, Tensor? targets, bool symmetric, float label_smoothing)"
    " -> (Tensor losses, Tensor row_lse, Tensor col_lse)"
)
# One gradient for each true entry of output_mask (queries, keys, scale), an empty tensor for each false one.
_BACKWARD = (
    "(Tensor grad_losses, Tensor queries, Tensor keys, Tensor scale, Tensor? targets, Tensor row_lse, Tensor col_lse,"
    " bool symmetric, float label_smoothing, bool[3] output_mask)"
    " -> (Tensor grad_queries, Tensor grad_keys, Tensor grad_scale)"
)


def _forward_fake(
    queries: Tensor, keys: Tensor, scale: Tensor, targets: Tensor | None, symmetric: bool, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    num_queries, num_keys = queries.shape[0], keys.shape[0] if symmetric else 0
    return scale.new_empty(num_queries), scale.new_empty(2, num_queries), scale.new_empty(2, num_keys)


def _backward_fake(
    grad_losses: Tensor,
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    targets: Tensor | None,
    row_lse: Tensor,
    col_lse: Tensor,
    symmetric: bool,
    label_smoothing: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        queries.new_empty(queries.shape if output_mask[0] else 0),
        keys.new_empty(keys.shape if output_mask[1] else 0),
        scale.new_empty(() if output_mask[2] else 0),
    )


for _backend in ("cpu", "triton"):
    _library.define(f"info_nce_{_backend}_forward{_FORWARD}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.define(f"info_nce_{_backend}_backward{_BACKWARD}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"mmkernels::info_nce_{_backend}_forward", _forward_fake, lib=_library)
    torch.library.register_fake(f"mmkernels::info_nce_{_backend}_backward", _backward_fake, lib=_library)


@functools.cache
def _triton() -> Any:
    """Triton is imported by the first call that runs it: importing mmkernels imports torch alone."""
    from mmkernels.contrastive import triton_kernels

    return triton_kernels


for _pass in ("forward", "backward"):

    def _launch(*args: Any, _name: str = f"info_nce_{_pass}") -> tuple[Tensor, Tensor, Tensor]:
        return getattr(_triton(), _name)(*args)

    # The CPU key serves the interpreter.
    for _key in ("CUDA", "CPU"):
        _library.impl(f"info_nce_triton_{_pass}", _launch, _key)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        targets: Tensor | None,
        symmetric: bool,
        label_smoothing: float,
        backend: str,
    ) -> Tensor:
        forward = getattr(torch.ops.mmkernels, f"info_nce_{backend}_forward")
        losses, row_lse, col_lse = forward(queries, keys, scale, targets, symmetric, label_smoothing)
        ctx.save_for_backward(queries, keys, scale, targets, row_lse, col_lse)
        ctx.symmetric, ctx.label_smoothing, ctx.backend = symmetric, label_smoothing, backend
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, scale, targets, row_lse, col_lse = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        backward = getattr(torch.ops.mmkernels, f"info_nce_{ctx.backend}_backward")
        with torch.no_grad():
            grads = backward(
                grad_losses,
                queries,
                keys,
                scale,
                targets,
                row_lse,
                col_lse,
                ctx.symmetric,
                ctx.label_smoothing,
                mask,
            )
        if torch.is_grad_enabled():  # create_graph=True
            grads = refuse_second_derivatives("info_nce", grads, grad_losses, queries, keys, scale)
        return *(grad if needed else None for grad, needed in zip(grads, mask, strict=True)), None, None, None, None


def info_nce(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    targets: Tensor | None,
    symmetric: bool,
    label_smoothing: float,
    backend: str,
) -> Tensor:
    """The loss of every query, [N] float32, on the backend named; differentiable."""
    return _InfoNCE.apply(queries, keys, scale, targets, symmetric, label_smoothing, backend)
