"""SigLIP over ranks: each brings its own rows, and the loss is that of the joined batch.

Blocks of keys visit all ranks (mmkernels.distributed.tour). No pair's loss depends on another's, so one trip gives
losses and gradients together: each rank adds up its own queries' losses and gradients, and the gradients that all
ranks make of a key come home. No rank holds the features of all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels._autograd import refuse_second_derivatives
from mmkernels._flops import gradients, product
from mmkernels._library import register_everywhere
from mmkernels.distributed.gathered import GatheredRows
from mmkernels.distributed.ranks import Group, alike_op, ranks_by_name
from mmkernels.distributed.tour import Chunk, Tensors, summed_tour
from mmkernels.siglip import ops, reference


def ring_losses(
    queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, rows: Tensor, outer: str, inner: str, backend: str
) -> Tensor:
    """One loss per own query, [n] float32."""
    losses = scale.new_zeros(len(queries), dtype=torch.float64)

    def visit(chunk: Chunk) -> Tensors:
        (block,) = chunk.tensors
        losses.add_(ops.losses[backend](queries, block, scale, bias, _offset(chunk)))
        return ()

    summed_tour(ranks_by_name(outer, inner), (keys,), rows[1].tolist(), visit)
    return losses.float()


def ring_gradients(
    weights: Tensor,  # [n]
    queries: Tensor,  # [n, D]
    keys: Tensor,  # [m, D]
    scale: Tensor,
    bias: Tensor,
    rows: Tensor,  # [2, ranks]
    outer: str,
    inner: str,
    backend: str,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """The own losses [n], and the gradients of the sum over ranks of weights[i] losses[i] to queries, keys, scale and
    bias, float32; an empty tensor for each false entry of output_mask."""
    losses = scale.new_zeros(len(queries), dtype=torch.float64)
    grad_queries = queries.new_zeros(queries.shape if output_mask[0] else 0, dtype=torch.float32)
    numbers = scale.new_zeros(2, dtype=torch.float64)

    def visit(chunk: Chunk) -> Tensors:
        (block,) = chunk.tensors
        found, of_queries, of_keys, of_scale, of_bias = ops.gradients_of[backend](
            weights, queries, block, scale, bias, True, _offset(chunk), True, output_mask
        )
        losses.add_(found)
        grad_queries.add_(of_queries)
        for total, share, wanted in zip(numbers, (of_scale, of_bias), output_mask[2:], strict=True):
            if wanted:
                total.add_(share)
        return (of_keys,) if output_mask[1] else ()  # all ranks want them or none

    parts = summed_tour(ranks_by_name(outer, inner), (keys,), rows[1].tolist(), visit)
    (grad_keys,) = parts or (queries.new_empty(0, dtype=torch.float32),)
    grads = zip((grad_queries, grad_keys, *numbers.float()), output_mask, strict=True)
    return losses.float(), *(x.clone() if wanted else scale.new_empty(0) for x, wanted in grads)


def _offset(chunk: Chunk) -> int:
    """Which key matches query 0; past the end of the chunk, if the own keys are not in it."""
    return len(chunk.tensors[0]) if chunk.own is None else chunk.own.start


def _losses_fake(queries: Tensor, _: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    return scale.new_empty(len(queries))


def _gradients_fake(
    _: Tensor, queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    inputs = zip((queries, keys, scale, bias), rest[-1], strict=True)
    return scale.new_empty(len(queries)), *(scale.new_empty(x.shape if wanted else 0) for x, wanted in inputs)


def _losses_flops(queries: Sequence[int], keys: Sequence[int], *rest: Any) -> int:
    return ranks_by_name(*rest[-3:-1]).size * product(queries, keys)  # as if all ranks had as many rows


def _gradients_flops(_: Any, queries: Sequence[int], keys: Sequence[int], *rest: Any) -> int:
    size = ranks_by_name(*rest[-4:-2]).size
    return size * (product(queries, keys) + gradients(queries, keys, *rest[-1][:3]))


_OF = "Tensor queries, Tensor keys, Tensor scale, Tensor bias, Tensor rows, str outer, str inner, str backend"
_losses = register_everywhere(
    "siglip_ring_losses", f"({_OF}) -> Tensor", ring_losses, _losses_fake, _losses_flops
)  # fmt: skip
_gradients = register_everywhere(
    "siglip_ring_gradients",
    f"(Tensor weights, {_OF}, bool[4] output_mask)"
    " -> (Tensor losses, Tensor grad_queries, Tensor grad_keys, Tensor grad_scale, Tensor grad_bias)",
    ring_gradients, _gradients_fake, _gradients_flops,
)  # fmt: skip


class _RingSigLip(torch.autograd.Function):
    """One loss per own query. The weight of each is known only in the backward pass, which makes a trip of its own."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, rows: Tensor, *options: str
    ) -> Tensor:
        ctx.save_for_backward(queries, keys, scale, bias, rows)
        ctx.options = options
        return _losses(queries, keys, scale, bias, rows, *options)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        saved, mask = ctx.saved_tensors, list(ctx.needs_input_grad[:4])
        with torch.no_grad():
            grads = _in_dtypes(_gradients(grad_losses, *saved, *ctx.options, mask)[1:], saved[:4])
        if torch.is_grad_enabled():  # create_graph=True
            grads = refuse_second_derivatives("siglip", grads, grad_losses, *saved[:4])
        return *(grad if needed else None for grad, needed in zip(grads, mask, strict=True)), *(None,) * 4


class _RingSigLipOfAll(torch.autograd.Function):
    """The sum of the own losses, with the gradients from the same trip.

    The gradients of a key are summed over ranks before it is known what each rank's loss will weigh in the end. It
    must be the same, and the backward pass sees to it.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, rows: Tensor, mask: list[bool],
        *options: str,
    ) -> Tensor:  # fmt: skip
        weights = scale.new_ones(len(queries))
        losses, *grads = _gradients(weights, queries, keys, scale, bias, rows, *options, mask)
        ctx.save_for_backward(queries, keys, scale, bias, *grads)
        ctx.names = options[:2]
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, queries, keys, scale, bias = ctx.saved_tensors
        mask = ctx.needs_input_grad[:4]
        with torch.no_grad():
            factor = alike_op(grad_loss, "the gradient that reaches siglip's loss", *ctx.names)
            grads = _in_dtypes([x * factor for x in (queries, keys, scale, bias)], inputs)
        if torch.is_grad_enabled():  # create_graph=True
            grads = refuse_second_derivatives("siglip", grads, grad_loss, *inputs)
        return *(grad if needed else None for grad, needed in zip(grads, mask, strict=True)), *(None,) * 5


def _in_dtypes(grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))


def siglip(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor,
    one_by_one: bool,
    rows: Tensor,
    group: Group,
    backend: str,
) -> Tensor:
    """One loss per own query, [n], if they are wanted one by one; their sum, []; float32 and differentiable."""
    inputs, options = (queries, keys, scale, bias), (group.outer, group.inner, backend)
    mask = [torch.is_grad_enabled() and x.requires_grad for x in inputs]
    if any(mask) and not one_by_one:
        return _RingSigLipOfAll.apply(*inputs, rows, mask, *options)
    losses = _RingSigLip.apply(*inputs, rows, *options)
    return losses if one_by_one else losses.sum()


def reference_over_ranks(
    queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, rows: Tensor, group: Group
) -> Tensor:
    """One loss per own query, [n], from the logits of the own queries and the keys of all ranks."""
    of_ranks = rows[1].tolist()
    first = sum(of_ranks[: group.rank])
    all_keys = GatheredRows.apply(keys, of_ranks, group.ranks)
    # The own keys come first, where the reference looks for the matches.
    order = [all_keys[first : first + len(keys)], all_keys[:first], all_keys[first + len(keys) :]]
    return reference.siglip(queries, torch.cat(order), scale, bias)
