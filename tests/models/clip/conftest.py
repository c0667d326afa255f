"""A small frozen text encoder in the place of the real one, whose weights are 90 MB."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.clip.text import FROZEN, Encode, FrozenText

WIDTH = 24


class WordSums:
    """The sum of a random vector for each word: texts with common words are near. Counts what it reads."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.loads = 0

    def load(self) -> Encode:
        self.loads += 1
        return self.encode

    def encode(self, texts: Sequence[str]) -> Tensor:
        self.read += texts
        return torch.stack([torch.stack([self.vector(word) for word in text.split()]).sum(0) for text in texts])

    @staticmethod
    def vector(word: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(word.strip(".,").encode()).digest()[:7], "big")
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))

    def reader(self, cache_dir: Path | None, sha256: str = "0" * 64) -> FrozenText:
        return FrozenText("minilm", sha256, WIDTH, self.load, cache_dir)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> WordSums:
    """``--text-encoder minilm`` is this encoder; caches of the default data go below the test's folder."""
    encoder = WordSums()
    monkeypatch.setitem(FROZEN, "minilm", encoder.reader)
    monkeypatch.chdir(tmp_path)
    return encoder
