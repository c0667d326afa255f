"""Inputs and the error budget of the tests, for users' own tests too."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# The unit roundoff of each dtype.
_ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

# How far 2^x of a GPU's unit may be off, of itself: what PTX allows ex2.approx.
EXP2_ERROR = 2.0**-22


def features(
    rows: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    like: Tensor | None = None,
    mean_cosine: float = 0.0,
) -> Tensor:
    """Rows of unit length, [rows, size], from a generator of their own.

    With `like`, row i is drawn near row i of it (mod its length); `mean_cosine` sets how near: 1 copies it, -1 turns
    it round.
    """
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(rows, size, generator=generator, dtype=torch.float64), dim=1)
    if like is not None:
        anchor = like.double()[torch.arange(rows) % like.shape[0]]
        x = F.normalize(mean_cosine * anchor + math.sqrt(1 - mean_cosine**2) * x, dim=1)
    return x.to(dtype)


def error_budget(
    eager: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    *,
    terms: float = 0.0,
    bits: float = 3.0,
    arithmetic: float = 0.0,
) -> tuple[float, float]:
    """How far an implementation may be off: (largest error, root mean square error).

    Twice the error of eager in the same precision plus a rounding band: 2^bits units of roundoff of the largest
    exact value, half of that for the root mean square. Where the result is a difference of larger terms, `terms` is
    their size, and the band is relative to it. `arithmetic` is added: what the units of the implementation's device may
    be off where eager's here are not, as 2^x by EXP2_ERROR.
    """
    exact = exact.double()
    off = eager.double() - exact
    # Below the normal numbers of a dtype the units stay as large as there.
    size = max(exact.abs().max().item(), terms, torch.finfo(dtype).smallest_normal)
    band = 2**bits * _ROUNDING[dtype] * size + arithmetic
    return 2 * off.abs().max().item() + band, 2 * off.square().mean().sqrt().item() + band / 2


def assert_within_budget(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    dtype: torch.dtype | None = None,
    terms: float = 0.0,
    arithmetic: float = 0.0,
    name: str = "result",
) -> None:
    """Raise AssertionError unless `actual` is finite and within the error budget around `exact`.

    Args:
        actual: the result of the implementation under test.
        eager: the result of eager PyTorch for the same inputs in the same precision.
        exact: the result in float64 for the same inputs.
        dtype: the precision of the computation; default: the dtype of `actual`.
        terms: the size of the terms that the result is a difference of, if they are larger than it.
        arithmetic: what the units of the implementation's device may be off where eager's here are not.
        name: names the tensor in the message.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    if actual.numel() == 0:
        return
    largest, rms = error_budget(eager, exact, dtype or actual.dtype, terms=terms, arithmetic=arithmetic)
    off = actual.double() - exact.double()
    got, got_rms = off.abs().max().item(), off.square().mean().sqrt().item()
    assert got <= largest, f"{name}: largest error {got:.3g}, budget {largest:.3g}"
    assert got_rms <= rms, f"{name}: root mean square error {got_rms:.3g}, budget {rms:.3g}"


def peak_allocated(function: Callable[[], Any]) -> int:
    """Bytes that torch holds at most at one time of what it allocates on the CPU while `function` runs.

    Exact: read from torch's own records of allocations, not from the size of the process. What `function` returns
    counts as held.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = function()
    del kept
    in_use = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            in_use += event.nbytes()
            peak = max(peak, in_use)
    return peak
