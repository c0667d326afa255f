"""What the check on a GPU runs for divided attention: the cases of the tests, and TimeSformer's steps by its peers."""

import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.divided_attention.peers import Attention, attentions, space_attention, time_attention
from benchmarks.harness.gpu_runs import Contest
from mmkernels.divided_attention.layout import layout_of
from tests.divided_attention import cases

NOTE = (
    "Memory: the most beyond inputs and gradients. GB/s: the least traffic, 4 outputs forward and 12 with the backward "
    "pass, over the time; TFLOP/s: two products over all pairs forward, seven in all."
)
HEADS, HEAD = 12, 64
CASES = cases.CASES


def check(case: cases.Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return cases.check_case(case, dtype, "triton", device)


class Size(NamedTuple):
    B: int
    T: int
    N: int
    axis: Literal["time", "space"]
    passes: Literal["forward", "both"]


def sizes(*clips: tuple[int, int, int]) -> list[Size]:
    axes: tuple[Literal["time", "space"], ...] = ("time", "space")
    passes: tuple[Literal["forward", "both"], ...] = ("forward", "both")
    return [Size(*clip, axis, which) for clip in clips for axis in axes for which in passes]


SIZES = sizes((1, 8, 196), (8, 8, 196), (32, 8, 196), (2, 96, 196), (2, 16, 784))
QUICK = sizes((8, 8, 196), (1, 96, 196))


def contest(size: Size, dtype: torch.dtype, device: torch.device) -> Contest:
    """TimeSformer's steps, 12 heads of 64."""
    B, T, N, axis, passes = size
    tokens, width = 1 + T * N, HEADS * HEAD
    qkv = torch.randn(B, tokens, 3 * width, device=device, dtype=dtype).requires_grad_()
    backward = passes == "both"
    outputs, products = (12, 7) if backward else (4, 2)
    traffic = outputs * B * tokens * width * qkv.element_size()
    flops = products * 2 * B * layout_of(tokens, T, axis, "timesformer", "nt").pairs * width

    def figures(seconds: float) -> dict[str, float]:
        return {"GB/s": traffic / seconds / 1e9, "TFLOP/s": flops / seconds / 1e12}

    calls = attentions(axis, T, HEADS, impl="triton") | gpu_attentions(axis, T)
    peers = {name: functools.partial(call, qkv) for name, call in calls.items()}
    return Contest(peers, [qkv], figures, backward)


def gpu_attentions(axis: Literal["time", "space"], frames: int) -> dict[str, Attention]:
    """Peers that run on a GPU alone: flash-attention with TimeSformer's rearranges, if it is installed."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return {}
    step = time_attention if axis == "time" else space_attention

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # it takes the heads after the tokens
        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return {"flash-attn": lambda qkv: step(qkv, flash, frames, HEADS)}
