"""Linear cross-entropy in Triton: the cross-entropy of info_nce's rows, with a bias.

Ignored rows are computed and then set to 0, so that the host never waits to learn which they are.
"""

import torch
from torch import Tensor

from mmkernels._checks import require_targets
from mmkernels.info_nce.triton_kernels import CrossEntropy, cross_entropy_backward, cross_entropy_forward

_NO_TARGET = -1


def linear_cross_entropy_forward(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    ignore_index: int,
    label_smoothing: float,
    keep_products: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses [N], 0 where a row is ignored, and the log-sum-exps [2, N], in base 2; no products are kept."""
    if keep_products:
        raise NotImplementedError("keep_products: expected False, the Triton kernels make the products again")
    one = hidden.new_ones((), dtype=torch.float32)
    no_products = one.new_empty(0, weight.shape[0])
    if hidden.shape[0] == 0:
        return one.new_empty(0), one.new_empty(2, 0), no_products
    require_targets("linear_cross_entropy", targets, weight.shape[0], "rows of weight", ignore_index)
    ignored = targets == ignore_index
    counted = targets.masked_fill(ignored, _NO_TARGET)
    bias = None if bias is None else bias.contiguous()
    of = CrossEntropy(hidden, weight, one, bias, counted, None, False, label_smoothing)
    losses, lse, _ = cross_entropy_forward(of)
    return losses.masked_fill_(ignored, 0.0), lse, no_products


def linear_cross_entropy_backward(
    grad_losses: Tensor,  # [N]
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    lse: Tensor,  # [2, N]
    products: Tensor,  # [0, V]
    ignore_index: int,
    label_smoothing: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; an empty tensor for each false entry of output_mask."""
    if hidden.shape[0] == 0:
        shapes = ((hidden, hidden.shape), (weight, weight.shape), (lse, weight.shape[:1]))
        zeros = [x.new_zeros(shape if wanted else 0) for (x, shape), wanted in zip(shapes, output_mask, strict=True)]
        return zeros[0], zeros[1], zeros[2]
    ignored = targets == ignore_index
    # The upstream gradient of a mean over no row is infinite.
    grads = grad_losses.masked_fill(ignored, 0.0)
    counted = targets.masked_fill(ignored, _NO_TARGET)
    bias = None if bias is None else bias.contiguous()
    one, columns = lse.new_ones(()), lse.new_empty(2, 0)
    of_hidden, of_weight, of_bias = output_mask
    of = CrossEntropy(hidden, weight, one, bias, counted, None, False, label_smoothing)
    mask = [of_hidden, of_weight, False, of_bias]
    grad_hidden, grad_weight, _, grad_bias = cross_entropy_backward(of, grads, lse, columns, mask)
    return grad_hidden, grad_weight, grad_bias
