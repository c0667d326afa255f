"""Divided attention in Triton: tokens are read and written where they lie, by one set of kernels for all layouts.

A sequence of `items` (the class token first, where it takes part, then patches) that fits a tile shares it with its
neighbours; a score counts where query and key are of one sequence. Longer ones are streamed: a program owns a block of
queries and walks over the keys with running maxima (backward: the queries' kernel, then the keys').

Traffic of a packed call, X = the bytes of an output: 3 X read and 1 X written forward, 4 X and 3 X backward (the tile
holds whole rows, so that maxima, sums and deltas are made anew from q, k, v and the gradient).

The class token is a row of every tile that it takes part in. What it takes from a group of sequences goes to partials
[B, groups, width] in float32, which one kernel adds in their order: no atomics, the same bits from run to run.

Beyond inputs and outputs, in bytes: the partials, 4 C B G forward and 12 C B G backward for G groups; 8 B H G for
a global class token; 12 B H rows backward for streamed sequences. A copy of qkv and of the gradient where rows do not
begin at multiples of 8 features or D is no multiple of 8.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from mmkernels._tiles.triton import LOG2E, on_device, round_up
from mmkernels.divided_attention.layout import APART, AVERAGED, GLOBAL, Layout
from mmkernels.divided_attention.triton_kernels import engine
from mmkernels.divided_attention.triton_kernels.backward import (
    cls_sums_kernel,
    grad_keys_kernel,
    grad_queries_kernel,
    packed_backward_kernel,
)
from mmkernels.divided_attention.triton_kernels.configs import (
    Config,
    choose,
    choose_whole,
    launch_options,
)
from mmkernels.divided_attention.triton_kernels.forward import forward_kernel, packed_forward_kernel
from mmkernels.divided_attention.triton_kernels.whole import whole_forward_kernel
from mmkernels.divided_attention.triton_kernels.whole_backward import whole_grad_keys_kernel, whole_grad_queries_kernel

MERGE_ROWS = 16  # partials that a step of merge_kernel adds
MERGE_WARPS = 4
CLS_BLOCK = 64  # keys that a step of cls_sums_kernel reads
CLS_WARPS = 4
_UNIT = int(engine.UNIT.value)


class Geometry(NamedTuple):
    """The numbers that the kernels take, in their order; see engine.py."""

    num_heads: int
    units: int
    num_sequences: int
    items: int
    pack: int
    groups: int
    reciprocal: int
    has_cls: int
    sequence_step: int
    patch_step: int
    frame_step: int
    num_frames: int

    def programs(self, batch: int, block: int) -> tuple[int]:
        """The grid, in one dimension: those of y and z end at 65,535."""
        return (batch * self.groups * triton.cdiv(self.pack * self.items, block) * self.num_heads,)


def divided_attention_forward(
    qkv: Tensor,  # [B, L, 3 C]
    frame_mask: Tensor | None,  # [B, T]
    seed: Tensor | None,  # [1]
    layout: Sequence[int],  # the numbers of a Layout
    num_heads: int,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out [B, L, C] and lse [B, H, rows]."""
    B, L, width = qkv.shape
    C = width // 3
    D = C // num_heads
    options = (frame_mask, seed, layout, num_heads, scale, dropout_p)
    if D % _UNIT:
        out, lse = divided_attention_forward(_padded(qkv, D), *options)
        return _narrowed(out, D), lse
    layout = Layout(*layout)
    extras = _Extras(qkv, frame_mask, seed, layout, dropout_p)
    config = choose(qkv, D, extras.masked)
    geometry, cls, packed = plan(layout, num_heads, D, config)
    parts = geometry.groups if cls else 0
    tile = config.packed_forward if packed else config.forward
    kernel = packed_forward_kernel if packed else forward_kernel
    whole = None if packed or extras.masked else choose_whole("whole_forward", qkv, D, geometry.items, scale)
    qkv = _readable(qkv)
    out = qkv.new_empty(B, L, C)
    lse = qkv.new_empty(B, num_heads, layout.num_rows, dtype=torch.float32)
    partials = qkv.new_empty(B, parts, C, dtype=torch.float32)
    tops = qkv.new_empty(B, num_heads, parts, dtype=torch.float32)
    sums = qkv.new_empty(B, num_heads, parts, dtype=torch.float32)
    wide = _is_wide(qkv, out)
    with on_device(qkv.device):
        if whole:
            whole_forward_kernel[geometry.programs(B, geometry.items)](
                qkv, out, lse, partials, tops, sums, *geometry, *_strides(qkv), scale * LOG2E.value, extras.cls_weight,
                CLS=cls, WIDE=wide, **whole,
            )  # fmt: skip
        else:
            kernel[geometry.programs(B, tile.block_m)](
                qkv, extras.frame_mask, extras.cls_weights, extras.seed, out, lse, partials, tops, sums,
                *geometry, *_strides(qkv), scale * LOG2E.value, extras.cls_weight, extras.threshold, extras.keep_scale,
                CLS=cls, MASKED=extras.masked, WIDE=wide, **launch_options(tile),
            )  # fmt: skip
        if layout.has_cls:
            _merge(partials, tops, sums, out, lse, geometry, cls == GLOBAL, scale)
    return out, lse


def divided_attention_backward(
    grad_out: Tensor,  # [B, L, C]
    qkv: Tensor,  # [B, L, 3 C]
    out: Tensor,  # [B, L, C]
    lse: Tensor,  # [B, H, rows]
    frame_mask: Tensor | None,  # [B, T]
    seed: Tensor | None,  # [1]
    layout: Sequence[int],  # the numbers of a Layout
    num_heads: int,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """grad_qkv [B, L, 3 C]."""
    B, L, width = qkv.shape
    D = width // 3 // num_heads
    options = (frame_mask, seed, layout, num_heads, scale, dropout_p)
    if D % _UNIT:
        grad_out, qkv, out = _padded(grad_out, D), _padded(qkv, D), _padded(out, D)
        return _narrowed(divided_attention_backward(grad_out, qkv, out, lse, *options), D)
    layout = Layout(*layout)
    extras = _Extras(qkv, frame_mask, seed, layout, dropout_p)
    config = choose(qkv, D, extras.masked)
    geometry, cls, packed = plan(layout, num_heads, D, config)
    grad_out, qkv, out, lse = _readable(grad_out), _readable(qkv), out.contiguous(), lse.contiguous()
    grad_qkv = qkv.new_empty(B, L, width)
    partials = qkv.new_empty(B, geometry.groups if cls else 0, width, dtype=torch.float32)
    form = {"CLS": cls, "MASKED": extras.masked, "WIDE": _is_wide(grad_out, qkv, grad_qkv)}
    numbers = (*geometry, *_strides(grad_out), *_strides(qkv), scale * LOG2E.value, scale)
    masks = (extras.frame_mask, extras.cls_weights, extras.seed)
    with on_device(qkv.device):
        sums = _cls_sums(qkv, lse, extras, geometry, scale) if cls == GLOBAL else lse  # else it is not read
        if packed:
            tile = config.packed_backward
            packed_backward_kernel[geometry.programs(B, tile.block_m)](
                grad_out, qkv, out, lse, sums, *masks, grad_qkv, partials,
                *numbers, extras.cls_weight, extras.threshold, extras.keep_scale,
                **form, **launch_options(tile),
            )  # fmt: skip
        else:
            rows = layout.num_sequences * geometry.items
            statistics = qkv.new_empty(3, B * num_heads * rows, dtype=torch.float32)
            # Without a class token the kernel of the queries would spill.
            fits = not extras.masked and cls != APART
            whole = choose_whole("whole_backward", qkv, D, geometry.items, scale) if fits else None
            if whole:
                grid = geometry.programs(B, geometry.items)
                form = {"CLS": cls, "WIDE": form["WIDE"]} | whole
                whole_grad_queries_kernel[grid](
                    grad_out, qkv, out, lse, sums, grad_qkv, partials, statistics, *numbers, extras.cls_weight, **form
                )
                whole_grad_keys_kernel[grid](grad_out, qkv, statistics, grad_qkv, partials, *numbers, **form)
            else:
                tile = config.grad_queries
                grad_queries_kernel[geometry.programs(B, tile.block_m)](
                    grad_out, qkv, out, lse, sums, *masks, grad_qkv, partials, statistics,
                    *numbers, extras.cls_weight, extras.threshold, extras.keep_scale,
                    **form, **launch_options(tile),
                )  # fmt: skip
                tile = config.grad_keys
                grad_keys_kernel[geometry.programs(B, tile.block_m)](
                    grad_out, qkv, extras.frame_mask, extras.seed, statistics, grad_qkv, partials,
                    *numbers, extras.threshold, extras.keep_scale,
                    **form, **launch_options(tile),
                )  # fmt: skip
        if layout.has_cls:
            _merge(partials, lse, lse, grad_qkv, lse, geometry, False, scale)
    return grad_qkv


class _Extras:
    """The frame mask, dropout and the shares of an averaged class token, as the kernels take them.

    A call with neither mask nor dropout runs kernels that know of neither (`masked` is False); all others run kernels
    that know of both.
    """

    def __init__(
        self, qkv: Tensor, frame_mask: Tensor | None, seed: Tensor | None, layout: Layout, dropout_p: float
    ) -> None:
        B, S, T = qkv.shape[0], layout.num_sequences, layout.num_frames
        self.masked = frame_mask is not None or dropout_p > 0
        self.frame_mask: Tensor | None = None
        self.cls_weights: Tensor | None = None  # [B, S]
        self.seed: Tensor | None = None
        self.cls_weight = 1.0 / S
        threshold = int(dropout_p * 2**32)
        self.threshold = threshold - 2**32 if threshold >= 2**31 else threshold  # the bits of an unsigned number
        self.keep_scale = 1.0 / (1.0 - dropout_p)
        if not self.masked:
            return
        if frame_mask is None:
            frame_mask = torch.ones(B, T, dtype=torch.bool, device=qkv.device)
        if seed is None:
            seed = torch.zeros(1, dtype=torch.int64, device=qkv.device)
        self.frame_mask, self.seed = frame_mask.contiguous().view(torch.uint8), seed
        # An averaged class token counts the sequences that hold a frame; a global one attends to itself without any.
        if layout.cls == GLOBAL:
            real = torch.ones(B, S, dtype=torch.bool, device=qkv.device)
        else:
            real = (frame_mask.any(1, keepdim=True) if layout.mixes_frames else frame_mask).expand(B, S)
        self.cls_weights = real.float() / real.sum(1, keepdim=True).clamp(min=1)


def plan(layout: Layout, num_heads: int, head_size: int, config: Config) -> tuple[Geometry, int, bool]:
    """The geometry of a call, what its class token does, and whether its sequences are packed."""
    # A global class token of one sequence has that sequence's row: nothing is merged.
    is_averaged = layout.cls == GLOBAL and layout.num_sequences == 1
    items = layout.items
    block = config.packed_forward.block_m
    packed = items <= block
    pack = min(block // items, layout.num_sequences) if packed else 1
    geometry = Geometry(
        num_heads, head_size // _UNIT, layout.num_sequences, items, pack, triton.cdiv(layout.num_sequences, pack),
        triton.cdiv(1 << engine.RECIPROCAL_BITS.value, items), layout.has_cls, layout.sequence_step, layout.patch_step,
        layout.frame_step, layout.num_frames,
    )  # fmt: skip
    return geometry, AVERAGED if is_averaged else layout.cls, packed


def _is_wide(*tensors: Tensor) -> bool:
    """Whether features of one clip lie further apart than 32 bits reach."""
    return any((x.size(1) - 1) * x.stride(1) + x.size(2) > 1 << 31 for x in tensors)


def _cls_sums(qkv: Tensor, lse: Tensor, extras: "_Extras", geometry: Geometry, scale: float) -> Tensor:
    """What the probabilities of a global class token, from its rounded log-sum-exp, sum to: [B, H]."""
    sums = qkv.new_empty(qkv.shape[0], geometry.num_heads, geometry.groups, dtype=torch.float32)
    cls_sums_kernel[(sums.numel(),)](
        qkv, lse, extras.frame_mask, sums, *geometry, *_strides(qkv), scale * LOG2E.value,
        MASKED=extras.masked, WIDE=_is_wide(qkv), BLOCK=CLS_BLOCK, HEAD=triton.next_power_of_2(geometry.units * _UNIT),
        num_warps=CLS_WARPS,
    )  # fmt: skip
    return sums.sum(2)


def _merge(
    partials: Tensor,
    tops: Tensor,
    sums: Tensor,
    out: Tensor,
    lse: Tensor,
    geometry: Geometry,
    weighted: bool,
    scale: float,
) -> None:
    """Fill the class token's row of out, [B, L, width], from the partials."""
    B, L, width = out.shape
    D = geometry.units * _UNIT
    heads = width // D
    engine.merge_kernel[(B * heads,)](
        partials, tops, sums, out, lse,
        partials.shape[1], heads, geometry.units, L, lse.shape[2], int(weighted), scale * LOG2E.value,
        ROWS=MERGE_ROWS, HEAD=triton.next_power_of_2(D), num_warps=MERGE_WARPS,
    )  # fmt: skip


def _readable(x: Tensor) -> Tensor:
    """x as the kernels read it: contiguous features, rows that begin at multiples of 8 of them; else a copy of it."""
    strides = _strides(x)
    aligned = x.stride(2) == 1 and all(
        stride * _UNIT == x.stride(i) for i, stride in enumerate(strides) if x.size(i) > 1
    )
    return x if aligned and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _strides(x: Tensor) -> tuple[int, int]:
    """The steps from clip to clip and from token to token, in units of 8 features."""
    return x.stride(0) // _UNIT, x.stride(1) // _UNIT


def _padded(x: Tensor, head_size: int) -> Tensor:
    """The same with zeros up to the next multiple of 8 features in each head."""
    padding = round_up(head_size, _UNIT) - head_size
    return F.pad(x.unflatten(-1, (-1, head_size)), (0, padding)).flatten(2)


def _narrowed(x: Tensor, head_size: int) -> Tensor:
    return x.unflatten(-1, (-1, round_up(head_size, _UNIT)))[..., :head_size].flatten(2)
