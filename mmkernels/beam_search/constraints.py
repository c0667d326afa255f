"""Which tokens may follow: masks over the vocabulary, from the options and the tokens so far."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
    chosen = [_ids(allowed(row // beams, tokens)) for row, tokens in enumerate(history)]
    tokens = torch.cat(chosen)
    wrong = (tokens < 0) | (tokens >= vocabulary)
    if wrong.any():
        raise ValueError(f"allowed_tokens: expected tokens of 0 to {vocabulary - 1}, got {tokens[wrong][0]}")
    rows = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(ids) for ids in chosen]))
    marks = torch.ones(len(chosen), vocabulary, dtype=torch.bool)
    marks[rows, tokens] = False
    return marks.to(history.device)


def _ids(chosen: Sequence[int]) -> Tensor:
    """What `allowed_tokens` returned, as int64 on the CPU; nothing else is cast: a mask would become tokens 0 and 1."""
    try:
        ids = torch.as_tensor(chosen, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(())
    if ids.ndim != 1 or (len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool)):
        kind = f"{chosen.dtype}" if isinstance(chosen, Tensor) else type(chosen).__name__
        raise TypeError(f"allowed_tokens: expected a sequence of token ids, got {kind}")
    return ids.long()
