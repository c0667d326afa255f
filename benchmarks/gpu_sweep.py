"""Other tiles for a compiled form: what a sweep tries, and which of them may ship, by predicted time."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.harness.gpu_forms import Case

# What a sweep tries unless it is told other values.
TILES: Mapping[str, Sequence[Any]] = {
    "BLOCK_M": (64, 128), "BLOCK_N": (64, 128, 256), "num_warps": (4, 8), "num_stages": (3, 4),
}  # fmt: skip
_MOST_SUMS = 128  # entries of a tile that a thread holds; of its 255 registers others are addresses and statistics
_OF_LAUNCH = ("num_warps", "num_stages")


def values(pairs: Iterable[str]) -> dict[str, list[Any]]:
    """NAME=VALUE[,VALUE] of a command line, as the constants have them."""
    words = {"True": True, "False": False}
    named = (pair.partition("=") for pair in pairs)
    return {
        name: [words.get(value, int(value) if value.lstrip("-").isdigit() else value) for value in listed.split(",")]
        for name, _, listed in named
    }


def variants(case: Case, changes: Mapping[str, Sequence[Any]]) -> Iterator[Case]:
    """The form with every combination of other constants, warps and stages that a thread can hold."""
    own = {name for name, _ in case.constants}.union(_OF_LAUNCH)
    changes = {name: listed for name, listed in changes.items() if name in own}
    for combination in itertools.product(*changes.values()):
        chosen = dict(zip(changes, combination, strict=True))
        constants = {name: chosen.get(name, value) for name, value in case.constants}
        launch = {name: chosen[name] for name in _OF_LAUNCH if name in chosen}
        variant = dataclasses.replace(case, constants=tuple(constants.items()), **launch)
        sums = constants.get("BLOCK_M", 1) * constants.get("BLOCK_N", 1) / (32 * variant.num_warps)
        if sums <= _MOST_SUMS or not changes:
            yield variant
