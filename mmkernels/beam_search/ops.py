"""The registered ops, one of each per backend, their fake kernels, and the calls that pick one of them."""

import torch
from torch import Tensor

from mmkernels._library import register
from mmkernels.beam_search import reference
from mmkernels.beam_search.specification import BeamCandidates, Beams, Progress, Rule

# logits [B K, V]; scores [B, K]; valid [B, K] bool; forbidden [B K, V] bool, rows of any stride.
# The candidates of each item, [B, C]; which items met a NaN or an infinity among their logits, [B].
_STEP = (
    "(Tensor logits, Tensor scores, Tensor? valid, Tensor? forbidden, int num_candidates, bool normalize,"
    " bool mask_first) -> (Tensor scores, Tensor beams, Tensor tokens, Tensor valid, Tensor poisoned)"
)
# The candidates of N items, [N, C]; eos [E]; penalties [max_length + 1]; what the search knows, changed in place.
# The next beams, [N, k].
_ADVANCE = (
    "(Tensor scores, Tensor beams, Tensor tokens, Tensor valid, Tensor poisoned,"
    " Tensor(a!) best_scores, Tensor(b!) best_log_probs, Tensor(c!) best_times, Tensor(d!) best_beams,"
    " Tensor(e!) best_tokens, Tensor(f!) best_valid, Tensor(g!) counts, Tensor(h!) faults, Tensor(i!) done,"
    " Tensor(j!) missed, Tensor(k!) top_ended, Tensor eos, Tensor penalties, int step, int max_length, int stop,"
    " int bound_length, int target, int num_return, bool cuts, bool first_come)"
    " -> (Tensor scores, Tensor parents, Tensor tokens, Tensor valid)"
)


def _step_fake(
    logits: Tensor,
    scores: Tensor,
    valid: Tensor | None,
    forbidden: Tensor | None,
    num_candidates: int,
    normalize: bool,
    mask_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (scores.shape[0], num_candidates)
    return (
        scores.new_empty(shape),
        scores.new_empty(shape, dtype=torch.int64),
        scores.new_empty(shape, dtype=torch.int64),
        scores.new_empty(shape, dtype=torch.bool),
        scores.new_empty(shape[:1], dtype=torch.bool),
    )


def _advance_fake(*arguments: Tensor | int | bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, _, _, _, scores, _, numbers, _, _, flags, *_ = arguments
    assert isinstance(scores, Tensor)
    assert isinstance(numbers, Tensor)
    assert isinstance(flags, Tensor)
    return torch.empty_like(scores), torch.empty_like(numbers), torch.empty_like(numbers), torch.empty_like(flags)


_step = register("beam_search_step_{}", _STEP, _step_fake, __package__, ("cpu", "triton", "cuda"))
# `advance` has no Triton form: the reference runs instead, and waits for no device either.
_advance = register("beam_search_advance_{}", _ADVANCE, _advance_fake, __package__, ("cpu", "cuda"))


def beam_search_step(
    logits: Tensor,
    scores: Tensor,
    valid: Tensor | None,
    forbidden: Tensor | None,
    num_candidates: int,
    normalize: bool,
    mask_first: bool,
    backend: str,
) -> BeamCandidates:
    """The candidates of one step on the backend named, "reference" included."""
    if backend == "reference":
        return reference.beam_search_step(logits, scores, valid, forbidden, num_candidates, normalize, mask_first)
    return BeamCandidates(*_step[backend](logits, scores, valid, forbidden, num_candidates, normalize, mask_first))


def beam_search_advance(
    found: BeamCandidates, progress: Progress, eos: Tensor, penalties: Tensor, rule: Rule, backend: str
) -> Beams:
    """The next beams on the backend named, or else by the reference; changes `progress` in place."""
    if backend not in _advance:
        return reference.beam_search_advance(found, progress, eos, penalties, rule)
    return Beams(*_advance[backend](*found, *progress, eos, penalties, *rule))
