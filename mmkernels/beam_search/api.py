"""The public calls: docstrings, validation, choice of implementation."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmkernels import _backends
from mmkernels._checks import (
    check_above_zero,
    check_choice,
    check_count,
    check_device,
    check_finite,
    check_flag,
    check_indices,
    check_int64,
    check_mask,
    check_matrix,
)
from mmkernels.beam_search import ops
from mmkernels.beam_search.search import BeamSearchResult, Options, search
from mmkernels.beam_search.specification import BeamCandidates

Impl = Literal["auto", "cuda", "triton", "cpu", "reference"]


def beam_search_step(
    logits: Tensor,
    scores: Tensor,
    *,
    valid: Tensor | None = None,
    forbidden: Tensor | None = None,
    num_candidates: int | None = None,
    normalize: bool = True,
    mask_first: bool = False,
    impl: Impl = "auto",
) -> BeamCandidates:
    """The best candidates of each item, from one read of the logits.

    Replaces::

        log_probs = torch.log_softmax(logits.float(), -1).view(B, K, V)     # [B K, V], written and read again
        totals = (scores[:, :, None] + log_probs).view(B, K * V)
        best, at = totals.topk(2 * K)                                       # in no defined order where scores tie
        beams, tokens = at // V, at % V

    Candidates come in one total order: the higher score; then the higher logit; then the lower beam * V + token. It
    is the same, bit for bit, on every implementation, in every batch and for any number of threads, and so are the
    scores: the sum of the softmax is exact and has no order (docs/beam_search.md).

    Args:
        logits: [B K, V], float32, bfloat16, float16 or float64 (reference only; scores are then float64).
        scores: [B, K], float32: the score of each beam so far.
        valid: [B, K], bool; beams that are False give no candidates, and their logits are not read.
        forbidden: [V] or [B K, V], bool; True forbids a token.
        num_candidates: C, how many to give; default 2 K.
        normalize: False takes `logits` for log-probabilities (or any scores) as they are.
        mask_first: True takes forbidden tokens out of the softmax, too, so that the rest sums to 1.
        impl: "auto" picks the best implementation that can run; a name runs that one or raises.

    Returns:
        BeamCandidates of scores, beams, tokens and valid, [B, C] each, and poisoned, [B]: items whose valid beams had
        a NaN or +inf among their logits; they have no candidates, the others are unharmed. Forbidden tokens and logits
        of -inf are no candidates: where fewer than C are left, valid is False.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes, devices or values.
        RuntimeError: the `impl` asked for cannot run here; the text lists every implementation with its reason.
    """
    check_matrix("logits", logits, "[B K, V]")
    check_matrix("scores", scores, "[B, K]")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if scores.dtype != dtype:
        raise TypeError(f"scores: expected {dtype} for logits of {logits.dtype}, got {scores.dtype}")
    B, K = scores.shape
    V = logits.shape[1]
    if logits.shape[0] != B * K:
        raise ValueError(f"logits: expected {B * K} rows for scores of shape {(B, K)}, got {logits.shape[0]}")
    if V == 0 or K == 0:
        raise ValueError(f"logits, scores: expected V >= 1 and K >= 1, got V = {V}, K = {K}")
    if num_candidates is None:
        num_candidates = 2 * K
    check_count("num_candidates", num_candidates, 1)
    check_flag("normalize", normalize)
    check_flag("mask_first", mask_first)
    check_device("scores", scores, "logits", logits)
    if valid is not None:
        check_mask("valid", valid, {"[B, K]": (B, K)}, "True for a beam that there is")
        check_device("valid", valid, "logits", logits)
    if forbidden is not None:
        check_mask("forbidden", forbidden, {"[V]": (V,), "[B K, V]": (B * K, V)}, "True for a forbidden token")
        check_device("forbidden", forbidden, "logits", logits)
        forbidden = forbidden.expand(B * K, V)
    chosen = _backends.choose("beam_search", impl, logits.device.type, logits.dtype)
    return ops.beam_search_step(logits, scores, valid, forbidden, num_candidates, normalize, mask_first, chosen)


def beam_search(
    step: Callable[[Tensor, Any], tuple[Tensor, Any]],
    state: Any,
    *,
    batch_size: int,
    num_beams: int,
    bos_token_id: int | Tensor,
    eos_token_id: int | Sequence[int],
    max_length: int,
    min_length: int = 0,
    pad_token_id: int | None = None,
    length_penalty: float = 1.0,
    length_penalty_kind: Literal["power", "wu"] = "power",
    early_stopping: bool | Literal["never"] = False,
    patience: float = 1.0,
    num_return_sequences: int = 1,
    preset: Literal["hf", "fairseq", "ctranslate2"] = "hf",
    renormalize: bool | None = None,
    forced_eos_token_id: int | None = None,
    no_repeat_ngram_size: int = 0,
    repetition_penalty: float = 1.0,
    bad_words: Sequence[Sequence[int]] = (),
    allowed_tokens: Callable[[int, Tensor], Sequence[int]] | None = None,
    prefix: Tensor | None = None,
    prompt: Tensor | None = None,
    num_groups: int = 1,
    diversity_penalty: float = 0.0,
    log_prob_processor: Callable[[Tensor, Tensor], Tensor] | None = None,
    reorder: Callable[[Any, Tensor], Any] | None = None,
    steps_between_checks: int = 8,
    device: torch.device | str | None = None,
    impl: Impl = "auto",
) -> BeamSearchResult:
    """Beam search over any model, all items of a batch at once, without a copy of the histories.

    Replaces the loop of ``model.generate(num_beams=K)``::

        def step(tokens, state):                    # tokens [rows]; state: any pytree of tensors [rows, ...]
            hidden = cell(embedding(tokens), state)
            return head(hidden), hidden             # logits [rows, V], the state to keep
        result = mmkernels.beam_search(step, hidden, batch_size=B, num_beams=5, bos_token_id=1, eos_token_id=2,
                                       max_length=20)
        result.sequences[:, 0]                      # [B, L], the best of each item, padded

    The first step runs on one row per item, [B], every other on [B K]: after each step the state's rows are gathered by
    the parents of the beams. What is the same for all beams of an item (an encoder's output) does not belong into the
    state: let `step` hold it, [B, ...], and view its rows as [B, K] (or [B, 1]).

    Args:
        step: (tokens [rows], int64; state) -> (logits [rows, V], state).
        state: a pytree; the first dimension of its tensors is B, later B K. Other leaves are handed on as they are.
        batch_size: B; 0 gives an empty result.
        num_beams: K.
        bos_token_id: the token before the first step; an int, or [B] of int64. It and `pad_token_id` may lie past V:
            `step` alone reads them.
        eos_token_id: the token or tokens that end a hypothesis; an empty sequence: none does.
        max_length: T, tokens of the longest hypothesis, EOS included, BOS and prompt not.
        min_length: EOS is forbidden to the first `min_length` tokens.
        pad_token_id: what follows a hypothesis in `sequences`; default: the first EOS (0 where there is none).
        length_penalty: alpha; a hypothesis of n tokens scores sum of log-probabilities / penalty(n).
        length_penalty_kind: "power", n ** alpha, or "wu", ((5 + n) / 6) ** alpha.
        early_stopping: for preset "hf". True: an item is done with K hypotheses. False: when the best running beam, if
            it ended at this length, would not beat the worst of K hypotheses. "never": the same at length T if alpha
            > 0.
        patience: with early_stopping=True and in the other presets: done with round(K * patience) hypotheses.
        num_return_sequences: R <= K, hypotheses returned for an item.
        preset: the rules to follow: Hugging Face transformers 5, fairseq, or CTranslate2 (docs/beam_search.md).
        renormalize: True normalises again after tokens are forbidden; default: for "ctranslate2" alone.
        forced_eos_token_id: the only token at position T ("fairseq" forces the first EOS anyway).
        no_repeat_ngram_size: n; no n tokens in a row occur twice in a hypothesis (prompt included). 0: no limit.
        repetition_penalty: tokens that occurred: log-probabilities (logits for "ctranslate2") below 0 are multiplied
            by it, others divided.
        bad_words: sequences of tokens that must not occur.
        allowed_tokens: (item, tokens so far) -> the tokens allowed next. Called for each beam; syncs with the host.
        prefix: [B, P], int64, P <= T, tokens that every hypothesis of an item starts with; entries below 0 force
            nothing.
        prompt: [B, P], int64, the tokens so far, BOS included, that count for repetitions, n-grams, bad words and
            `allowed_tokens`, not for lengths; default: BOS alone. "ctranslate2" counts what it generates alone.
        num_groups: G groups of K / G beams; each keeps its own hypotheses.
        diversity_penalty: what a token costs a later group for each earlier group that chose it in this step (Hamming
            diversity); 0 with one group.
        log_prob_processor: (tokens so far [rows, n], log-probabilities [rows, V]) -> log-probabilities, last of all.
        reorder: (state, rows [B K]) -> state, in place of the gather, for a state that is no pytree of tensors. An
            object that hides tensors (a cache, a dataclass) is refused without it.
        steps_between_checks: on a GPU the host asks once in so many steps whether all items are done.
        device: where the search runs if `bos_token_id` is an int; default: that of the first tensor in `state`, or the
            CPU.
        impl: for the step; "auto" picks the best implementation that can run; a name runs that one or raises.

    Returns:
        BeamSearchResult: sequences, scores, per-token scores, a certificate and faults by item.

    Raises:
        TypeError: an argument, or what one of the functions returned, of the wrong type.
        ValueError: an argument out of range, options that exclude each other, or a function that returned what does not
            fit. That a token is below V the first logits tell; on a GPU a device assertion says so of `prefix`.
        RuntimeError: the `impl` asked for cannot run here; the text lists every implementation with its reason.

    An item with NaN logits, or none of whose beams can go on, stops there and is named in `result.faults()`; the
    others are unharmed, and every item gets the same bits in any batch, as far as `step` gives them. Runs without
    gradients.

    Source: length penalty and pruning: Wu et al. 2016 (arXiv:1609.08144); patience: Kasai et al. 2022
    (arXiv:2204.05424); diverse groups: Vijayakumar et al. 2016 (arXiv:1610.02424).
    """
    if not callable(step):
        raise TypeError(f"step: expected a callable (tokens, state) -> (logits, state), got {type(step).__name__}")
    for name, function in (
        ("allowed_tokens", allowed_tokens),
        ("log_prob_processor", log_prob_processor),
        ("reorder", reorder),
    ):
        if function is not None and not callable(function):
            raise TypeError(f"{name}: expected a callable, got {type(function).__name__}")
    for name, value, least in (
        ("batch_size", batch_size, 0),
        ("num_beams", num_beams, 1),
        ("max_length", max_length, 1),
        ("min_length", min_length, 0),
        ("num_return_sequences", num_return_sequences, 1),
        ("no_repeat_ngram_size", no_repeat_ngram_size, 0),
        ("num_groups", num_groups, 1),
        ("steps_between_checks", steps_between_checks, 1),
    ):
        check_count(name, value, least)
    eos = _tokens("eos_token_id", eos_token_id, "; pass () where there is none")
    forced_eos = None if forced_eos_token_id is None else _token("forced_eos_token_id", forced_eos_token_id)
    pad = (eos[0] if eos else 0) if pad_token_id is None else _token("pad_token_id", pad_token_id)
    words = _words(bad_words)
    if num_return_sequences > num_beams:
        raise ValueError(f"num_return_sequences: expected at most num_beams = {num_beams}, got {num_return_sequences}")
    if num_beams % num_groups:
        raise ValueError(f"num_groups: expected a divisor of num_beams = {num_beams}, got {num_groups}")
    check_choice("preset", preset, ("hf", "fairseq", "ctranslate2"))
    check_choice("length_penalty_kind", length_penalty_kind, ("power", "wu"))
    check_choice("early_stopping", early_stopping, (True, False, "never"))
    if early_stopping != "never":
        check_flag("early_stopping", early_stopping)  # 1 == True
    if renormalize is not None:
        check_flag("renormalize", renormalize)
    if preset != "hf" and early_stopping is not False:
        raise ValueError(f"early_stopping: preset {preset!r} has its own rule; leave it out, got {early_stopping!r}")
    check_finite("length_penalty", length_penalty)
    check_above_zero("repetition_penalty", repetition_penalty)
    check_finite("diversity_penalty", diversity_penalty)
    if diversity_penalty and num_groups == 1:
        raise ValueError(f"diversity_penalty: expected 0 with one group, got {diversity_penalty}; pass num_groups")
    check_above_zero("patience", patience)
    if patience != 1 and preset == "hf" and early_stopping is not True:
        raise ValueError(
            f"patience: expected 1 where hypotheses are not counted, got {patience}; pass early_stopping=True"
        )
    if round(num_beams // num_groups * patience) == 0:
        raise ValueError(
            f"patience: expected a hypothesis or more of {num_beams // num_groups} beams, rounded, got {patience}"
        )
    if preset == "fairseq":
        if not eos:
            raise ValueError("eos_token_id: preset 'fairseq' forces it at max_length; pass one")
        forced_eos = eos[0] if forced_eos is None else forced_eos
    if min_length >= max_length and forced_eos is not None:
        raise ValueError(f"min_length: expected less than max_length = {max_length}, got {min_length}: EOS is forced")
    for name, tokens in (("prefix", prefix), ("prompt", prompt)):
        if tokens is None:
            continue
        check_int64(name, tokens)
        if tokens.ndim != 2 or tokens.shape[0] != batch_size:
            raise ValueError(f"{name}: expected shape [{batch_size}, P], got {tuple(tokens.shape)}")
    free = max_length if forced_eos is None else max_length - 1
    if prefix is not None and prefix.shape[1] > free:
        raise ValueError(
            f"prefix: expected at most the {free} tokens of a hypothesis that are not forced to be EOS, got "
            f"{prefix.shape[1]}; cut it, or raise max_length"
        )
    if isinstance(bos_token_id, Tensor) and bos_token_id.ndim > 0:
        check_indices("bos_token_id", bos_token_id, batch_size)
    else:
        bos_token_id = _token("bos_token_id", bos_token_id, "; pass an int, or an int64 tensor [B]")

    options = Options(
        batch_size=batch_size,
        num_beams=num_beams,
        bos_token_id=bos_token_id,
        eos=eos,
        max_length=max_length,
        min_length=min_length,
        pad_token_id=pad,
        length_penalty=float(length_penalty),
        length_penalty_kind=length_penalty_kind,
        early_stopping=early_stopping,
        patience=patience,
        num_return_sequences=num_return_sequences,
        preset=preset,
        renormalize=preset == "ctranslate2" if renormalize is None else renormalize,
        forced_eos=forced_eos,
        no_repeat_ngram_size=no_repeat_ngram_size,
        repetition_penalty=repetition_penalty,
        bad_words=words,
        allowed_tokens=allowed_tokens,
        prefix=prefix,
        prompt=prompt,
        num_groups=num_groups,
        diversity_penalty=diversity_penalty,
        log_prob_processor=log_prob_processor,
        reorder=reorder,
        steps_between_checks=steps_between_checks,
        device=device,
        impl=impl,
    )
    if not options.penalties_fit():
        raise ValueError(
            f"length_penalty: expected one by which float32 can divide {max_length} tokens, got {length_penalty}; "
            "pass one nearer to 0"
        )
    return search(step, state, options)


def _token(name: str, token: Any, remedy: str = "") -> int:
    """A token id as an int: a whole number, NumPy's or a tensor's too, and no bool."""
    if isinstance(token, Tensor) and token.ndim == 0:
        token = token.item()
    try:
        if isinstance(token, (bool, Tensor)):
            raise TypeError
        number = operator.index(token)
    except TypeError:
        raise TypeError(f"{name}: expected a token id, got {type(token).__name__}{remedy}") from None
    if number < 0:
        raise ValueError(f"{name}: expected a token id >= 0, got {number}{remedy}")
    return number


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes))


def _tokens(name: str, tokens: Any, remedy: str = "") -> tuple[int, ...]:
    """A token id, or a sequence of them."""
    if isinstance(tokens, Tensor):
        tokens = tokens.tolist()
    return tuple(_token(name, token, remedy) for token in (tokens if _is_sequence(tokens) else (tokens,)))


def _words(bad_words: Any) -> tuple[tuple[int, ...], ...]:
    if isinstance(bad_words, Tensor):
        bad_words = bad_words.tolist()
    if not _is_sequence(bad_words):
        raise TypeError(
            f"bad_words: expected a sequence of words, got {type(bad_words).__name__}; pass () where there is none"
        )
    words = []
    for word in bad_words:
        if not _is_sequence(word) or (isinstance(word, Tensor) and word.ndim == 0):
            raise TypeError(
                f"bad_words: expected a sequence of token ids for each word, got {word!r}; write [[{word!r}]] for one "
                "word of one token"
            )
        words.append(_tokens("bad_words", word))
        if not words[-1]:
            raise ValueError("bad_words: expected sequences of at least one token, got an empty one")
    return tuple(words)
