"""How a drawn call is judged: values and gradients against float64, whatever is needed, finite or not."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.testing import assert_within_budget, error_budget
from tests.fuzz.draw import Draw

Call = Callable[..., Tensor]  # call(impl, *tensors) -> the loss


class Leaf(NamedTuple):
    """A tensor that may need a gradient, and the size of the terms that this is a difference of."""

    name: str
    tensor: Tensor
    terms: float


def in_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def outputs_and_gradients(call: Call, impl: str, tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    """The loss, and the gradients that are needed under weights from 0.5 to 1.5."""
    own = [x.detach().requires_grad_(need) for x, need in zip(tensors, needed, strict=True)]
    loss = call(impl, *own)
    assert loss.requires_grad == any(needed)
    if not any(needed):
        return [loss]
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view_as(loss)
    grads = torch.autograd.grad((loss * weights).sum(), [x for x, need in zip(own, needed, strict=True) if need])
    return [loss.detach(), *grads]


def check_call(draw: Draw, call: Call, leaves: Sequence[Leaf], dtype: torch.dtype, terms: float = 0.0) -> None:
    """Some of the gradients, as the call is given: each within the budget that its size sets. ``terms`` is that of the
    loss, where it is a difference."""
    needed = [draw.chance(f"{leaf.name}: gradient", 0.6) for leaf in leaves]
    tensors = [leaf.tensor for leaf in leaves]
    exact = outputs_and_gradients(call, "reference", [in_double(x) for x in tensors], needed)
    eager = outputs_and_gradients(call, "reference", tensors, needed)
    actual = outputs_and_gradients(call, "cpu", tensors, needed)
    assert actual[0].dtype == torch.float32
    own = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
    assert all(x.dtype == leaf.tensor.dtype for x, leaf in zip(actual[1:], own, strict=True))
    assert actual[0].shape == exact[0].shape
    if actual[0].numel():  # of a scalar there is no root mean square
        largest, _ = error_budget(eager[0], exact[0], dtype, terms=terms)
        off = (actual[0].double() - exact[0]).abs().max().item()
        assert off <= largest, f"loss of the call: largest error {off:.3g}, budget {largest:.3g}"
    for leaf, a, b, c in zip(own, actual[1:], eager[1:], exact[1:], strict=True):
        coarser = max(dtype, leaf.tensor.dtype, key=lambda of: torch.finfo(of).eps)
        assert_within_budget(a, b, c, dtype=coarser, terms=leaf.terms, name=f"grad_{leaf.name} of the call")


def assert_no_wrong_number(
    actual: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype, terms: float = 0.0
) -> None:
    """Of inputs that are not finite: no loss is a number where float64 has none, none is another number, and gradients
    show what they cannot know. ``terms`` is the size of what a loss beside them is a difference of."""
    (loss, *grads), (eager_loss, *_), (exact_loss, *exact_grads) = actual, eager, exact
    finite = loss.isfinite()
    assert exact_loss[finite].isfinite().all(), f"numbers where float64 has none: {loss} is not {exact_loss}"
    both = finite & eager_loss.isfinite()
    if both.any():
        largest, _ = error_budget(eager_loss[both], exact_loss[both], dtype, terms=terms)
        off = (loss[both].double() - exact_loss[both]).abs().max().item()
        assert off <= largest, f"another number beside what is not finite: {off} off, budget {largest}"
    if not exact_loss.isfinite().all() and not all(x.isfinite().all() for x in exact_grads):
        assert not all(x.isfinite().all() for x in grads), (
            "all gradients are numbers, and float64 has some that are not"
        )
