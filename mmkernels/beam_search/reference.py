"""Eager, obviously right, on any device: the oracle of the tests.

Every backend gives the same bits. What would depend on the order of a sum, or on whose exp and log run, is therefore
written down here operation by operation: each one is rounded to float32 (float64 where it says so) by itself, nothing
is contracted, and the sum of a softmax is exact, so that it has no order. csrc/beam_search follows line by line.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LOG2E = 1.44269504088896341
LN2 = 0.6931471805599453
SQRT_HALF = 0.7071067811865476
# 2^f = 1 + f P(f) for |f| <= 1/2, to 1.1e-7; highest power first.
EXP2 = (0.00132647273, 0.00967151299, 0.0555073358, 0.240222424, 0.693147004)
# log((1 + z) / (1 - z)) = 2 z P(z^2), to 1e-13 for |z| <= 0.172.
LOG = tuple(1 / n for n in (15, 13, 11, 9, 7, 5, 3, 1))
# Below this a power of 2 is zero in the sum of any row of less than 2^31 entries.
LOWEST = -100.0
# Adding it rounds to a whole number, which then lies, 127 above itself, in the low bits.
WHOLE = 1.5 * 2.0**23 + 127
# A softmax's terms are added in float32 where they are COLUMNS apart in a block of ROWS x COLUMNS, and then exactly.
ROWS, COLUMNS = 8, 16


class BeamCandidates(NamedTuple):
    """The best candidates of each item, best first; `valid` is False past the last there is."""

    scores: Tensor  # [B, C], float32; -inf where not valid
    beams: Tensor  # [B, C], int64; 0 where not valid
    tokens: Tensor  # [B, C], int64; 0 where not valid
    valid: Tensor  # [B, C], bool
    poisoned: Tensor  # [B], bool: NaN or +inf among the item's logits or scores; it has no candidate then


class Progress(NamedTuple):
    """What the search knows of N items of k beams: their best k hypotheses, best first, and how far they are.

    A hypothesis is where it ends: candidate `tokens`, after beam `beams`, in step `times`.
    """

    scores: Tensor  # [N, k]: sum of log-probabilities / length penalty; -inf where not valid
    log_probs: Tensor  # [N, k]
    times: Tensor  # [N, k], int64
    beams: Tensor  # [N, k], int64
    tokens: Tensor  # [N, k], int64
    valid: Tensor  # [N, k], bool
    counts: Tensor  # [N], int64: hypotheses found, also those that are no longer among the best k
    fault: Tensor  # [N], int64: 0, POISONED or DEAD
    done: Tensor  # [N], bool
    missed: Tensor  # [N]: the most that a hypothesis could have scored that stopping cut off; -inf: nothing
    top_ended: Tensor  # [N], bool: the best candidate of some step ended

    @staticmethod
    def none(items: int, beams: int, like: Tensor) -> "Progress":
        """Nothing found yet; floats of the dtype and device of `like`."""
        no_score, zeros = like.new_full((items, beams), -torch.inf), like.new_zeros(items, beams, dtype=torch.int64)
        no, zero = zeros.bool(), zeros.new_zeros(items)
        hypotheses = [no_score, no_score, zeros, zeros, zeros, no]
        items_only = [zero, zero, zero.bool(), no_score.new_full((items,), -torch.inf), zero.bool()]
        return Progress(*(part.clone() for part in hypotheses + items_only))


POISONED, DEAD = 1, 2
BOUND, COUNT, COUNT_OR_TOP = 0, 1, 2


class Rule(NamedTuple):
    """The rules of one step, plain numbers."""

    step: int  # 0 is the first
    max_length: int
    stop: int  # BOUND: k hypotheses that no beam beats at bound_length; COUNT: `target` of them; COUNT_OR_TOP: or
    # num_return of them once the best candidate ended
    bound_length: int
    target: int
    num_return: int
    cuts: bool  # a beam at max_length becomes a hypothesis
    first_come: bool  # at most `target` hypotheses are taken, the first


class Beams(NamedTuple):
    """The beams of the next step; 0 and -inf where not valid."""

    scores: Tensor  # [N, k]
    parents: Tensor  # [N, k], int64
    tokens: Tensor  # [N, k], int64
    valid: Tensor  # [N, k], bool


def quantum_bits(vocabulary: int) -> int:
    """The parts of a softmax's sum are multiples of 2^-n: so many that the sum of all fits in float64's 53 bits."""
    return 52 - (vocabulary - 1).bit_length()


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
    wrong = (x.isnan() | (x == torch.inf)).any(-1).view(B, K) | scores.isnan() | (scores == torch.inf)
    possible = (x > -torch.inf).view(B, K, V)
    if forbidden is not None:
        possible = possible & ~forbidden.view(B, K, V)
    if valid is not None:
        wrong, possible = wrong & valid, possible & valid[:, :, None]
    poisoned = wrong.any(-1)
    possible = (possible & ~poisoned[:, None, None]).view(B, K * V)

    totals = (scores[:, :, None] + log_probs.view(B, K, V)).view(B, K * V)
    totals = torch.where(possible, totals, -torch.inf)
    # Stable sorts, the last criterion first.
    order = torch.where(possible, x.reshape(B, K * V), -torch.inf).sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, totals.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    # A possible candidate may still score -inf: those that are not come last.
    order = order.gather(1, (~possible.gather(1, order)).int().sort(dim=1, stable=True).indices)
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
    """From candidates to hypotheses, which go into `progress` in place, and to the next beams.

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
    best = both[0].sort(dim=1, descending=True, stable=True).indices[:, :k]
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
