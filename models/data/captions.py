"""Captions for training, and CLIP's byte-pair tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from models.data.sets import Concept


class Tokenizer:
    """CLIP's BPE tokenizer; the ids are CLIP's own, padded with zeros to ``context_length``.

    A ``vocab_size`` below 49408 keeps that many of CLIP's merges, the most frequent ones: rarer words then split into
    more pieces, and a small model spends less on its embedding table.
    """

    def __init__(self, context_length: int = 77, vocab_size: int = 49408) -> None:
        if not 514 <= vocab_size <= 49408:
            raise ValueError(f"vocab_size must lie between 514 (bytes alone) and 49408 (CLIP's own); got {vocab_size}")
        if context_length < 3:
            raise ValueError(f"context_length must hold start, a token and end: at least 3; got {context_length}")
        self.context_length = context_length
        self.vocab_size = vocab_size
        self._bpe = SimpleTokenizer(context_length=context_length)
        if vocab_size < self._bpe.vocab_size:
            # Merges stand in order of frequency, and the vocabulary is 512 byte tokens, the merges, start and end.
            merges = vocab_size - 512 - 2
            self._bpe.bpe_ranks = {pair: rank for pair, rank in self._bpe.bpe_ranks.items() if rank < merges}
            self._bpe.encoder = {token: i for token, i in self._bpe.encoder.items() if i < 512 + merges}
            self._bpe.sot_token_id, self._bpe.eot_token_id = vocab_size - 2, vocab_size - 1

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids [n, context_length]; a text too long keeps its end token."""
        return self._bpe(list(texts))


def sample_caption(concept: Concept, generator: torch.Generator, keyword_share: float) -> str:
    """A caption to train on: mostly the name, and in ``keyword_share`` of the draws also some of the keywords."""
    choices = (concept.name, *concept.captions)
    caption = choices[int(torch.randint(len(choices), (), generator=generator))] if len(choices) > 1 else choices[0]
    if not concept.keywords or float(torch.rand((), generator=generator)) >= keyword_share:
        return caption
    order = torch.randperm(len(concept.keywords), generator=generator).tolist()[:2]
    words = [concept.keywords[i] for i in order]
    # Half of these captions leave the name out, so that a keyword alone learns to find its image.
    if float(torch.rand((), generator=generator)) < 0.5:
        return ", ".join(words)
    return ", ".join([caption, *words])
