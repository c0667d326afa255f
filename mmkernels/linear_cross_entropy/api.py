"""The public call: docstring, validation, autocast, choice of implementation."""

from typing import Literal

import torch
from torch import Tensor

from mmkernels import _backends
from mmkernels._checks import (
    check_dense,
    check_device,
    check_indices,
    check_label_smoothing,
    check_matrix,
    check_reduction,
    in_one_dtype,
)
from mmkernels._reduction import reduced
from mmkernels.linear_cross_entropy import ops, reference
from mmkernels.linear_cross_entropy.options import Options


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["none", "mean", "sum"] = "mean",
    impl: Literal["auto", "triton", "cpu", "reference"] = "auto",
) -> Tensor:
    """Cross-entropy of a linear layer's outputs, as of a language model's last layer.

    Replaces::

        logits = F.linear(hidden, weight, bias)                    # [N, V], stored for the backward pass
        loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing)

    by passes over tiles of the logits; nothing of size N x V is stored, forward or backward.

    Args:
        hidden: [N, D], float32, bfloat16, float16 (accumulated in float32) or float64 (reference only). N may be 0.
        weight: [V, D], dtype and device of `hidden`; may be tied to an embedding.
        targets: [N], int64, the class of each row, or `ignore_index`.
        bias: [V], any floating dtype; used and differentiated in float32.
        ignore_index: rows with this target have loss 0 and no gradient, and "mean" does not count them.
        label_smoothing: in [0, 1], the share of the target that is spread evenly over all classes.
        reduction: "mean" over the rows that are not ignored (NaN if there is none, as torch has it), "sum", or
            "none" for one loss per row, [N].
        impl: "auto" picks the best implementation that can run; a name runs that one or raises.

    Returns:
        The loss: a scalar, or [N] for reduction="none"; float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes, devices or values; targets out of range.
        RuntimeError: the `impl` asked for cannot run here; the text lists every implementation with its reason.

    Gradients flow to `hidden`, `weight` and `bias`; each is computed only if it is needed. The gradient is itself not
    differentiable (impl="reference" is). Results are the same bits from run to run. NaN in, NaN out; on a CPU an
    ignored row is not even read. Under autocast hidden and weight are cast to its dtype; logits, sums and statistics
    stay float32.

    Source: Wijmans et al. 2024 (cut cross-entropy, arXiv:2411.09009), without its gradient filter: the gradients here
    are exact.
    """
    _check(hidden, weight, targets, bias, ignore_index, label_smoothing, reduction)
    hidden, weight = in_one_dtype("hidden", hidden, "weight", weight)
    chosen = _backends.choose("linear_cross_entropy", impl, hidden.device.type, hidden.dtype)
    if bias is not None:
        bias = bias.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)

    options = Options(ignore_index, label_smoothing)
    if chosen == "reference":
        losses = reference.linear_cross_entropy(hidden, weight, bias, targets, options)
    else:
        losses = ops.linear_cross_entropy(hidden, weight, bias, targets, options, chosen)
    if reduction == "mean":
        return losses.sum() / (targets != ignore_index).sum()
    return reduced(losses, reduction)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> None:
    check_matrix("hidden", hidden, "[N, D]", "; flatten the rows with hidden.flatten(0, -2)")
    check_matrix("weight", weight, "[V, D]")
    if hidden.shape[1] == 0:
        raise ValueError(f"hidden: expected D >= 1, got shape {tuple(hidden.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one class, got shape {tuple(weight.shape)}")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: expected D = {hidden.shape[1]} as in hidden, got {weight.shape[1]}")
    check_indices("targets", targets, hidden.shape[0])
    others = {"weight": weight, "targets": targets}
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"bias: expected a tensor or None, got {type(bias).__name__}")
        check_dense("bias", bias)
        if not bias.is_floating_point():
            raise TypeError(f"bias: expected a floating-point tensor, got {bias.dtype}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected shape ({weight.shape[0]},), one value a class, got {tuple(bias.shape)}")
        others["bias"] = bias
    for name, other in others.items():
        check_device(name, other, "hidden", hidden)

    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    check_label_smoothing(label_smoothing)
    check_reduction(reduction)
