"""Captions for training; CLIP's byte-pair tokenizer, one learned from captions, and a vocabulary of whole words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import regex
import tokenizers
import torch
from tokenizers import normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
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
        from open_clip.tokenizer import SimpleTokenizer  # seconds of imports, for CLIP alone

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


class Subwords:
    """Byte-pair tokens learned from captions, in whatever languages these are written.

    Frequent words of each language become one token, rarer ones are put together from pieces, and what is left is
    bytes: no text is unknown. Upper case is lowered. Ids 0 and 1 are padding and the end.
    """

    PAD, END = range(2)
    SPECIAL = ("<pad>", "<end>")

    def __init__(self, state: str, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must hold the end at least; got {max_tokens}")
        self.state = state  # JSON of the tokenizers library
        self.max_tokens = max_tokens
        self._bpe = tokenizers.Tokenizer.from_str(state)

    @staticmethod
    def build(texts: Iterable[str], *, vocab_size: int = 8192, max_tokens: int = 32) -> Subwords:
        """Learn at most ``vocab_size`` tokens from texts."""
        bytes_alone = len(Subwords.SPECIAL) + 256
        if vocab_size < bytes_alone:
            raise ValueError(f"vocab_size must be at least {bytes_alone} (bytes alone); got {vocab_size}")
        bpe = tokenizers.Tokenizer(BPE())
        bpe.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(Subwords.SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        return Subwords(bpe.to_str(), max_tokens)

    def __len__(self) -> int:
        return self._bpe.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Ids [n, L]: at most ``max_tokens`` with the end, padding to the longest of the texts."""
        found = self._bpe.encode_batch(list(texts), add_special_tokens=False)
        rows = [torch.tensor([*one.ids[: self.max_tokens - 1], self.END]) for one in found]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.PAD)


# A word keeps its inner hyphens and apostrophes; every other sign stands for itself, with its marks and the signs that
# are joined to it. To the module regex vowel signs and accents (Unicode's marks) are letters of a word; to re, not.
_TOKENS = regex.compile(r"\w+(?:[\u2019'.&-]\w+)*|[^\w\s]\p{M}*(?:\u200d[^\w\s]\p{M}*)*")


def caption_words(text: str) -> list[str]:
    """The words of a caption, in lower case, without punctuation: what captions are compared by."""
    return [token for token in _TOKENS.findall(text.lower()) if token[0].isalnum() or token[0] == "_"]


class Vocabulary:
    """Whole words and punctuation marks as tokens, as captioning models have them.

    Ids 0 to 3 are padding, the start, words that are not known, and the end.
    """

    PAD, START, UNKNOWN, END = range(4)
    SPECIAL = ("<pad>", "<start>", "<unknown>", "<end>")

    def __init__(self, tokens: Sequence[str], max_length: int) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must hold a token at least; got {max_length}")
        self.tokens = list(tokens)
        self.max_length = max_length
        self._ids = {token: i for i, token in enumerate(self.tokens, len(self.SPECIAL))}

    @staticmethod
    def build(texts: Iterable[str], *, min_count: int = 1, max_length: int = 24) -> Vocabulary:
        """The tokens that occur at least ``min_count`` times, the most frequent first."""
        counts = Counter(token for text in texts for token in _TOKENS.findall(text.lower()))
        kept = [token for token, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
        kept = [token for token in kept if counts[token] >= min_count]
        if not kept:
            raise ValueError(f"no word occurs {min_count} times in the captions: choose a smaller --min-count")
        return Vocabulary(kept, max_length)

    def __len__(self) -> int:
        return len(self.SPECIAL) + len(self.tokens)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Ids [n, L]: start, at most ``max_length`` tokens, end, padding to the longest of the texts."""
        rows = []
        for text in texts:
            own = [self._ids.get(token, self.UNKNOWN) for token in _TOKENS.findall(text.lower())[: self.max_length]]
            rows.append(torch.tensor([self.START, *own, self.END]))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.PAD)

    def split(self, ids: Iterable[int]) -> list[str]:
        """The tokens of ids up to the first end; padding and start are left out."""
        found = []
        for i in ids:
            if i == self.END:
                break
            if i == self.UNKNOWN:
                found.append(self.SPECIAL[i])
            elif i >= len(self.SPECIAL):
                found.append(self.tokens[i - len(self.SPECIAL)])
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; closing punctuation stands at the word before it, opening at the one after."""
        text = " ".join(self.split(ids))
        text = re.sub(r" ([:;,.!?%)\]”])", r"\1", text)
        return re.sub(r"([(\[“#]) ", r"\1", text)


def sample_caption(concept: Concept, generator: torch.Generator, keyword_share: float) -> str:
    """A caption to train on: mostly the name, and in ``keyword_share`` of the draws also some of the keywords."""
    choices = concept.texts
    caption = choices[int(torch.randint(len(choices), (), generator=generator))] if len(choices) > 1 else choices[0]
    if not concept.keywords or float(torch.rand((), generator=generator)) >= keyword_share:
        return caption
    order = torch.randperm(len(concept.keywords), generator=generator).tolist()[:2]
    words = [concept.keywords[i] for i in order]
    # Half of these captions leave the name out, so that a keyword alone learns to find its image.
    if float(torch.rand((), generator=generator)) < 0.5:
        return ", ".join(words)
    return ", ".join([caption, *words])
