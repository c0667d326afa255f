"""The registered ops, one of each a backend, and their fake kernels."""

import functools
from typing import Any

import torch
from torch import Tensor

from mmkernels.beam_search.reference import BeamCandidates, Beams, Progress, Rule

_library = torch.library.Library("mmkernels", "FRAGMENT")

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
# Backends with an op for it; the others run the reference, which waits for no device.
ADVANCES = ("cpu", "cuda")


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


for _backend in ("cpu", "triton", "cuda"):
    _library.define(f"beam_search_step_{_backend}{_STEP}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"mmkernels::beam_search_step_{_backend}", _step_fake, lib=_library)


def _advance_fake(*arguments: Tensor | int | bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, _, _, _, scores, _, numbers, _, _, flags, *_ = arguments
    assert isinstance(scores, Tensor)
    assert isinstance(numbers, Tensor)
    assert isinstance(flags, Tensor)
    return torch.empty_like(scores), torch.empty_like(numbers), torch.empty_like(numbers), torch.empty_like(flags)


for _backend in ADVANCES:
    _library.define(f"beam_search_advance_{_backend}{_ADVANCE}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"mmkernels::beam_search_advance_{_backend}", _advance_fake, lib=_library)


@functools.cache
def _triton() -> Any:
    """Triton is imported by the first call that runs it: importing mmkernels imports torch alone."""
    from mmkernels.beam_search import triton_kernels

    return triton_kernels


def _launch(*args: Any) -> tuple[Tensor, ...]:
    return _triton().beam_search_step(*args)


# The CPU key serves the interpreter.
for _key in ("CUDA", "CPU"):
    _library.impl("beam_search_step_triton", _launch, _key)


def beam_search_step(
    logits: Tensor,
    scores: Tensor,
    valid: Tensor | None,
    forbidden: Tensor | None,
    num_candidates: int,
    normalize: bool,
    mask_first: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The candidates of one step on the backend named."""
    step = getattr(torch.ops.mmkernels, f"beam_search_step_{backend}")
    return step(logits, scores, valid, forbidden, num_candidates, normalize, mask_first)


def beam_search_advance(
    found: BeamCandidates, progress: Progress, eos: Tensor, penalties: Tensor, rule: Rule, backend: str
) -> Beams:
    """The next beams on the backend named; `progress` is changed in place."""
    advance = getattr(torch.ops.mmkernels, f"beam_search_advance_{backend}")
    return Beams(*advance(*found, *progress, eos, penalties, *rule))
