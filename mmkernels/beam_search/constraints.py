"""Which tokens may follow: masks over the vocabulary, from the options and the tokens so far."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_NO_TOKENS = (type(None), bool, float, str, list, tuple)


def repeated_ngrams(history: Tensor, size: int, vocabulary: int) -> Tensor | None:
    """Tokens that would complete an n-gram that occurred: [rows, V], from histories [rows, n]; None: none can."""
    if history.shape[1] < size:
        return None
    windows = history.unfold(1, size, 1)  # [rows, W, size]
    recent = history[:, None, history.shape[1] - size + 1 :]
    completes = (windows[:, :, :-1] == recent).all(-1)
    return _marked(torch.where(completes, windows[:, :, -1], vocabulary), vocabulary)


def occurred(history: Tensor, vocabulary: int) -> Tensor:
    """Tokens that occur in each history: [rows, V]."""
    return _marked(history, vocabulary)


def _marked(tokens: Tensor, vocabulary: int) -> Tensor:
    marks = torch.zeros(tokens.shape[0], vocabulary + 1, dtype=torch.bool, device=tokens.device)
    # Ids past the vocabulary (padding of a prompt, say) meet in a column that is dropped.
    return marks.scatter_(1, torch.where(tokens < 0, vocabulary, tokens).clamp(max=vocabulary), True)[:, :vocabulary]


def completed_words(history: Tensor, words: Sequence[Tensor], vocabulary: int) -> Tensor | None:
    """The last tokens of the multi-token words whose beginning ends the history: [rows, V]."""
    marks: Tensor | None = None
    for word in words:
        begun = len(word) - 1
        if history.shape[1] < begun:
            continue
        if marks is None:
            marks = torch.zeros(history.shape[0], vocabulary, dtype=torch.bool, device=history.device)
        marks[:, word[-1]] |= (history[:, history.shape[1] - begun :] == word[:-1]).all(1)
    return marks


def outside(allowed: Callable[[int, Tensor], Sequence[int]], history: Tensor, beams: int, vocabulary: int) -> Tensor:
    """Tokens that the function does not allow: [rows, V]; `beams` rows per item."""
    places = []
    for row, tokens in enumerate(history):
        chosen = _ids(allowed(row // beams, tokens))
        if chosen and not 0 <= min(chosen) <= max(chosen) < vocabulary:
            wrong = min(chosen) if min(chosen) < 0 else max(chosen)
            raise ValueError(f"allowed_tokens: expected tokens of 0 to {vocabulary - 1}, got {wrong}")
        first = row * vocabulary
        places += [first + token for token in chosen]
    marks = torch.ones(history.shape[0], vocabulary, dtype=torch.bool)
    marks.view(-1)[torch.tensor(places, dtype=torch.int64)] = False
    return marks.to(history.device)


def _ids(chosen: Any) -> list[int]:
    """What `allowed_tokens` returned, a sequence of whole numbers: a mask, say, would pass for tokens 0 and 1."""
    found = chosen.tolist() if hasattr(chosen, "tolist") else chosen
    ids: list[Any] = list(found) if isinstance(found, Iterable) else [None]
    if any(isinstance(token, _NO_TOKENS) for token in ids):
        kind = chosen.dtype if isinstance(chosen, Tensor) else type(chosen).__name__
        raise TypeError(f"allowed_tokens: expected a sequence of token ids, got {kind}")
    return ids
