"""The choices of one case, all from its seed, and what was chosen, for the message of a failure."""

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmkernels.testing import features
from tests.cpu_kernels import DTYPES

T = TypeVar("T")
# Vectors, panels and tiles, one less and one more, and primes between them.
EDGES = (2, 3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 65, 97, 127, 128, 129, 255, 256, 257)
NOT_FINITE = (torch.nan, torch.inf, -torch.inf)


class Draw:
    """What a seed chooses; ``said`` holds the choices by name."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.said: dict[str, Any] = {}

    def generator(self) -> torch.Generator:
        """Of numbers that no other part of the case draws."""
        return torch.Generator().manual_seed(self.random.getrandbits(62))

    def pick(self, name: str, choices: Sequence[T]) -> T:
        self.said[name] = found = self.random.choice(choices)
        return found

    def chance(self, name: str, share: float) -> bool:
        found = self.random.random() < share
        if found:
            self.said[name] = True
        return found

    def size(self, name: str, most: int, least: int = 1) -> int:
        """A size at an edge, or any; small ones more often."""
        limit = most if self.random.random() < 0.3 else max(least, min(most, 40))
        edges = [size for size in EDGES if least <= size <= limit]
        if edges and self.random.random() < 0.6:
            found = self.random.choice(edges)
        else:
            found = self.random.randint(least, limit)
        self.said[name] = found
        return found

    def dtype(self) -> torch.dtype:
        return self.pick("dtype", DTYPES)

    def rows(
        self,
        name: str,
        rows: int,
        size: int,
        dtype: torch.dtype,
        *,
        like: Tensor | None = None,
        near: float = 0.0,
        length: float = 1.0,
    ) -> Tensor:
        """Features [rows, size], of one length or not, in any layout of memory."""
        seed = self.random.getrandbits(31)
        x = length * features(rows, size, torch.float64, seed=seed, like=like, mean_cosine=near)
        kind = self.pick(f"{name}: values", ["unit"] * 8 + ["long", "short", "zero rows", "equal rows", "sparse"])
        if kind == "long":
            x = 4 * x
        elif kind == "short":
            x = x / 1024
        elif kind == "zero rows":
            x[:: self.random.randint(1, 3)] = 0
        elif kind == "equal rows":
            x[:] = x[self.random.randrange(rows)].clone() if rows else x
        elif kind == "sparse":
            x = x * (torch.rand(x.shape, generator=self.generator()) < 0.2)
        return self.laid(name, x.to(dtype))

    def laid(self, name: str, x: Tensor) -> Tensor:
        """The same numbers, [..., rows, size], in another layout of memory; NaN lies between and around them."""
        *batch, rows, size = x.shape
        kind = self.pick(f"{name}: layout", ["plain"] * 4 + ["transposed", "inside", "steps", "unaligned", "expanded"])
        if kind == "transposed":
            return x.mT.contiguous().mT
        if kind == "expanded" and rows:
            return x[..., :1, :].contiguous().expand(*batch, rows, size)
        if kind in ("plain", "expanded"):
            return x
        step = 1 if kind != "steps" else self.random.randint(2, 3)
        before = 1 if kind == "unaligned" else self.random.randint(0, 9)
        wide = torch.full((*batch, rows * step + 2, before + size * step + 3), torch.nan, dtype=x.dtype)
        found = wide[..., 1 : 1 + rows * step : step, before : before + size * step : step]
        found.copy_(x)
        return found

    def has_equal_terms(self) -> bool:
        """Whether many terms of a sum may be equal: rows of equal features, or rows of one, which are 1 and -1."""
        kinds = {"equal rows", "zero rows", "sparse", "expanded"} & {str(value) for value in self.said.values()}
        return bool(kinds) or self.said.get("D") == 1

    def alike(self, count: int) -> float:
        """By how much the rounding errors of a sum of ``count`` terms may exceed those of the ops' own cases: of many
        cases the largest error lies further out, and terms that are alike err alike."""
        return 2 * count**0.5 if self.has_equal_terms() else 2.0

    def of_equal_terms(self, count: int) -> float:
        """To what the band of a sum of ``count`` terms that may be equal is relative, as a multiple of their sum.

        While the sum lies between two powers of 2, every addition of the same term is off by the same amount: errors
        add up and do not cancel. An addition in float32 is off by 2^-24 of the sum so far at most, i terms of
        ``count``, all of them by ``count`` / 2 times 2^-24 of the whole sum; a band is 2^3 such units wide.
        """
        return count / 16 if self.has_equal_terms() else 0.0

    def plant(self, name: str, x: Tensor, kinds: Sequence[float] = NOT_FINITE) -> Tensor:
        """A copy with up to three values that are not finite."""
        planted = x.detach().clone()
        for _ in range(self.random.randint(1, 3)):
            index = tuple(self.random.randrange(side) for side in planted.shape)
            planted[index] = self.random.choice(kinds)
        self.said[name] = f"not finite at {(~planted.isfinite()).nonzero().tolist()[:3]}"
        return planted
