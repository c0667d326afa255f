"""One drawn case after another: each from its number alone, on one thread or two, with NaN in fresh memory."""

import traceback
from collections.abc import Callable, Iterable, Iterator

import torch

from tests.fuzz import losses, others
from tests.fuzz.draw import Draw
from tests.fuzz.wrong_arguments import wrong_arguments

# Each kind of case as often as it stands here.
KINDS: tuple[Callable[[Draw], None], ...] = (
    losses.info_nce,
    losses.info_nce,
    losses.distillation,
    losses.siglip,
    losses.triplet,
    losses.triplet,
    losses.linear_cross_entropy,
    losses.linear_cross_entropy,
    others.divided_attention,
    others.divided_attention,
    others.divided_attention_maps,
    others.retrieval,
    others.beam_search_step,
    others.beam_search,
    wrong_arguments,
    wrong_arguments,
)


def run_case(seed: int) -> str | None:
    """Run one case; a text says what was drawn and what is wrong, None that all is right."""
    draw = Draw(seed)
    kind = draw.random.choice(KINDS)
    torch.set_num_threads(draw.pick("threads", [1, 2]))
    torch.manual_seed(seed)
    try:
        kind(draw)
    except Exception:
        said = ", ".join(f"{name} = {value}" for name, value in draw.said.items())
        return f"case {seed}: {kind.__name__} with {said}\n{traceback.format_exc(limit=-4)}"
    return None


def run_cases(seeds: Iterable[int]) -> Iterator[str]:
    """What is wrong with each case that fails. Changes the number of threads and torch's determinism."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for seed in seeds:
        if (wrong := run_case(seed)) is not None:
            yield wrong
