"""Eager, obviously right, on any device: the oracle of the tests, and the arithmetic that all backends follow."""

import torch
from torch import Tensor

from mmkernels.beam_search.specification import (
    BOUND,
    COLUMNS,
    COUNT_OR_TOP,
    DEAD,
    EXP2,
    LN2,
    LOG,
    LOG2E,
    LOWEST,
    POISONED,
    ROWS,
    SQRT_HALF,
    WHOLE,
    BeamCandidates,
    Beams,
    Progress,
    Rule,
    quantum_bits,
)


def exponentials(x: Tensor) -> Tensor:
    """e^x for x <= 0 in float32."""
    y = x * LOG2E
    y = torch.where(y < LOWEST, LOWEST, y)
    n = (y + WHOLE) - WHOLE
    f = y - n
    p = torch.full_like(f, EXP2[0])
    for c in EXP2[1:]:
        p = p * f
        p = p + c
    p = p * f
    p = p + 1.0
    power = torch.where(n.isnan(), 0.0, n).to(torch.int32)  # a NaN stays one in p
    return p * ((power + 127) << 23).view(torch.float32)


def log_sums(largest: Tensor, x: Tensor) -> Tensor:
    """log of the sum of e^(x - largest) over the last dimension, float32."""
    V = x.shape[-1]
    e = torch.nn.functional.pad(exponentials(x - largest), (0, -V % (ROWS * COLUMNS)))
    e = e.unflatten(-1, (-1, ROWS, COLUMNS))
    while e.shape[-2] > 1:  # neighbours, then neighbouring sums
        e = e[..., ::2, :] + e[..., 1::2, :]
    # Adding and taking off 1.5 x 2^23 quanta leaves a multiple of the quantum.
    shift = 1.5 * 2.0 ** (23 - quantum_bits(V))
    sums = ((e + shift) - shift).double().sum((-3, -2, -1))[..., None]
    mantissa, exponent = torch.frexp(sums)
    small = mantissa < SQRT_HALF
    mantissa = torch.where(small, mantissa + mantissa, mantissa)
    exponent = torch.where(small, exponent - 1, exponent).double()
    z = (mantissa - 1.0) / (mantissa + 1.0)
    w = z * z
    p = torch.full_like(w, LOG[0])
    for c in LOG[1:]:
        p = p * w
        p = p + c
    return (exponent * LN2 + (z + z) * p).float()


def log_softmax(x: Tensor) -> Tensor:
    """Rows of log-probabilities in float32 (float64 stays), the same bits in every batch; NaN if a row has one.

    A row of -inf stays one.
    """
    if x.dtype == torch.float64:
        return torch.where((x == -torch.inf).all(-1, keepdim=True), -torch.inf, torch.log_softmax(x, -1))
    x = x.float()
    largest = x.amax(-1, keepdim=True)
    return torch.where(largest == -torch.inf, largest, (x - largest) - log_sums(largest, x))


def beam_search_step(
    logits: Tensor,  # [B K, V]
    scores: Tensor,  # [B, K]
    valid: Tensor | None,  # [B, K]
    forbidden: Tensor | None,  # [B K, V]
    num_candidates: int,
    normalize: bool,
    mask_first: bool,
) -> BeamCandidates:
    """The best candidates of each item by sorting all: higher score, then higher logit, then lower beam V + token."""
    B, K = scores.shape
    V = logits.shape[-1]
    x = logits if logits.dtype == torch.float64 else logits.float()
    if forbidden is not None and (mask_first or not normalize):
        x = torch.where(forbidden, -torch.inf, x)
    log_probs = log_softmax(x) if normalize else x
    wrong = (x.isnan() | (x == torch.inf)).any(-1).reshape(B, K) | scores.isnan() | (scores == torch.inf)
    possible = (x > -torch.inf).reshape(B, K, V)
    if forbidden is not None:
        possible = possible & ~forbidden.reshape(B, K, V)
    if valid is not None:
        wrong, possible = wrong & valid, possible & valid[:, :, None]
    poisoned = wrong.any(-1)
    possible = (possible & ~poisoned[:, None, None]).reshape(B, K * V)

    totals = (scores[:, :, None] + log_probs.reshape(B, K, V)).reshape(B, K * V)
    totals = torch.where(possible, totals, -torch.inf)
    # Stable sorts, the last criterion first. What is not possible has a logit of -inf there, and stands behind those
    # that are, even where these score -inf, too.
    order = torch.where(possible, x.reshape(B, K * V), -torch.inf).sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, totals.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    order = order[:, :num_candidates]
    found = possible.gather(1, order)
    columns = (
        torch.where(found, totals.gather(1, order), -torch.inf),
        torch.where(found, order // max(V, 1), 0),
        torch.where(found, order % max(V, 1), 0),
        found,
    )
    missing = num_candidates - order.shape[1]
    if missing > 0:  # fewer than K V there are not
        fills = (-torch.inf, 0, 0, False)
        columns = tuple(  # type: ignore[assignment]
            torch.cat([c, c.new_full((B, missing), fill)], 1) for c, fill in zip(columns, fills, strict=True)
        )
    return BeamCandidates(*columns, poisoned)


def ends(candidates: BeamCandidates, eos: Tensor, cut: bool) -> Tensor:
    """Which candidates end here: EOS, or the length is reached."""
    return candidates.valid if cut else candidates.valid & (candidates.tokens[..., None] == eos).any(-1)


def continuing(candidates: BeamCandidates, ending: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best candidates that do not end: their columns and whether there are so many, [N, k]."""
    goes_on = candidates.valid & ~ending
    columns = (~goes_on).int().sort(dim=-1, stable=True).indices[..., :k]
    return columns, goes_on.gather(-1, columns)


def beam_search_advance(found: BeamCandidates, progress: Progress, eos: Tensor, penalties: Tensor, rule: Rule) -> Beams:
    """Turn candidates into hypotheses, which go into `progress` in place, and into the next beams.

    penalties[n], n <= max_length, is what a hypothesis of n tokens is divided by.
    """
    now, k, last = progress, progress.scores.shape[1], rule.step == rule.max_length - 1
    ending = ends(found, eos, rule.cuts and last)
    columns, goes_on = continuing(found, ending, k)

    # Hypotheses: the best of old and new; of equal scores the earlier, then the higher candidate.
    new = ending & (torch.arange(ending.shape[1], device=ending.device) < k) & ~now.done[:, None]
    accepted = new & (now.counts[:, None] + new.cumsum(1) <= rule.target) if rule.first_come else new
    totals = found.scores / penalties[rule.step + 1]
    dropped = torch.where(new & ~accepted, totals, -torch.inf).amax(1)
    count = now.counts + accepted.sum(1)
    ended = (
        torch.where(accepted, totals, -torch.inf),
        found.scores,
        torch.full_like(found.beams, rule.step),
        found.beams,
        found.tokens,
        accepted,
    )
    both = [torch.cat(pair, 1) for pair in zip(now[:6], ended, strict=True)]
    # A NaN is the last of a rising order: what is no hypothesis stands behind one of -inf.
    best = torch.where(both[5], -both[0], torch.nan).sort(dim=1, stable=True).indices[:, :k]
    hypotheses = [column.gather(1, best) for column in both]

    # Which items are done, and what those that stop here could have missed.
    scores = torch.where(goes_on, found.scores.gather(1, columns), -torch.inf)
    top = scores[:, 0]
    top_ended = now.top_ended | new[:, 0]
    if rule.stop == BOUND:
        stops = (count >= k) & (top / penalties[rule.bound_length] <= hypotheses[0][:, -1])
    else:
        stops = count >= rule.target
        if rule.stop == COUNT_OR_TOP:
            stops = stops | (top_ended & (count >= rule.num_return))
    stops = (stops | found.poisoned | ~goes_on[:, 0] | last) & ~now.done
    missed = dropped
    if not last:
        missed = torch.maximum(missed, top / penalties[rule.step + 2])
        missed = torch.maximum(missed, top / penalties[rule.max_length])
    dead = ~found.valid.any(1) & (now.fault == 0)
    fault = torch.where(found.poisoned, POISONED, torch.where(dead, DEAD, now.fault))
    done = now.done | stops
    after = (
        *hypotheses,
        count,
        torch.where(now.done, now.fault, fault),
        done,
        torch.where(stops, missed, now.missed),
        top_ended,
    )
    for old, value in zip(now, after, strict=True):
        old.copy_(value)
    return Beams(
        scores,
        torch.where(goes_on, found.beams.gather(1, columns), 0),
        torch.where(goes_on, found.tokens.gather(1, columns), 0),
        goes_on & ~done[:, None],
    )
