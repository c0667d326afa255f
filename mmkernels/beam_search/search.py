"""The loop around the step: a trellis of tokens and parents, finished hypotheses by reference into it, one backtrack.

Nothing here waits for the device but the check of the done flags, and nothing copies a history unless a constraint
reads it. Beams and hypotheses that do not exist are marked by a bit, never by a score.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mmkernels import _backends
from mmkernels._checks import check_matrix
from mmkernels.beam_search import constraints, ops
from mmkernels.beam_search.reference import continuing, ends, log_softmax
from mmkernels.beam_search.specification import (
    BOUND,
    COUNT,
    COUNT_OR_TOP,
    POISONED,
    BeamCandidates,
    Beams,
    Progress,
    Rule,
)

_FAULTS = ("", "NaN or +inf among the logits", "every continuation is forbidden")


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`mmkernels.beam_search`, checked."""

    batch_size: int
    num_beams: int
    bos_token_id: int | Tensor
    eos: tuple[int, ...]
    max_length: int
    min_length: int
    pad_token_id: int
    length_penalty: float
    length_penalty_kind: str
    early_stopping: bool | Literal["never"]
    patience: float
    num_return_sequences: int
    preset: str
    renormalize: bool
    forced_eos: int | None
    no_repeat_ngram_size: int
    repetition_penalty: float
    bad_words: tuple[tuple[int, ...], ...]
    allowed_tokens: Callable[[int, Tensor], Any] | None
    prefix: Tensor | None
    prompt: Tensor | None
    num_groups: int
    diversity_penalty: float
    log_prob_processor: Callable[[Tensor, Tensor], Tensor] | None
    reorder: Callable[[Any, Tensor], Any] | None
    steps_between_checks: int
    device: torch.device | str | None
    impl: str

    def penalty(self, length: int) -> float:
        """What the score of a hypothesis of this length is divided by."""
        base = length if self.length_penalty_kind == "power" else (5 + length) / 6
        return base**self.length_penalty

    def penalties_fit(self) -> bool:
        """Whether float32 holds what scores are divided by: the first penalty is 1, the last the farthest from it."""
        limits = torch.finfo(torch.float32)
        try:
            return limits.tiny <= self.penalty(self.max_length) <= limits.max
        except OverflowError:
            return False


@dataclass(frozen=True)
class BeamSearchResult:
    """The hypotheses of each item, best first.

    Attributes:
        sequences: [B, R, L], int64: tokens with EOS, without BOS, then padding. L is the longest hypothesis here.
        lengths: [B, R], int64: tokens of each hypothesis, EOS included; 0 where there is none.
        scores: [B, R], float32: sum of log-probabilities / length penalty; -inf where there is no hypothesis.
        log_probs: [B, R], float32: the sum.
        token_scores: [B, R, L], float32: what each token added to it; 0 past the end.
        beams: [B, R, L], int64: which beam each token continued; 0 past the end.
        valid: [B, R], bool: whether there is such a hypothesis.
        certified: [B], bool: True if no hypothesis that the beams at the stop could have grown into would score
            above the R returned: stopping early missed nothing of this beam. False where it may have, after NaN, and
            where a `log_prob_processor` or a negative `diversity_penalty`, whose sums may rise, was cut short.
        fault: [B], int64: 0, or the number of what stopped the item (:meth:`faults`).
        steps: how often `step` was called.
    """

    sequences: Tensor
    lengths: Tensor
    scores: Tensor
    log_probs: Tensor
    token_scores: Tensor
    beams: Tensor
    valid: Tensor
    certified: Tensor
    fault: Tensor
    steps: int

    def faults(self) -> dict[int, str]:
        """{item: what stopped it} of the items that did not end by the rules; empty where all did."""
        return {item: _FAULTS[code] for item, code in enumerate(self.fault.tolist()) if code}


def check_rows(leaf: Tensor, expected: int) -> None:
    if leaf.ndim == 0 or leaf.shape[0] != expected:
        raise ValueError(
            f"state: expected tensors of {expected} rows, one for each of `tokens`, got shape {tuple(leaf.shape)}; "
            "let `step` hold what all rows share"
        )


def gathered(leaf: Any, rows: Tensor, expected: int) -> Any:
    """A leaf of the state at these of its `expected` rows; what is no tensor stays."""
    if not isinstance(leaf, Tensor):
        return leaf
    check_rows(leaf, expected)
    return leaf.index_select(0, rows)


def hides_tensors(value: Any, depth: int = 3) -> bool:
    """Whether an object that is no pytree holds tensors or arrays, as a cache or a dataclass does."""
    dimensions: Any = getattr(value, "ndim", None)
    if isinstance(value, Tensor) or dimensions:
        return True
    if depth == 0 or isinstance(value, (type, nn.Module)):  # a module's are weights
        return False
    names: Iterable[str] = getattr(value, "__dict__", ()) or getattr(type(value), "__slots__", ())
    members = [getattr(value, name, None) for name in names]
    return any(hides_tensors(leaf, depth - 1) for leaf in pytree.tree_leaves(members))


def check_state(state: Any, rows: int, device: torch.device) -> None:
    """All that the search has to reorder is a tensor with a row for each token, on its device."""
    for leaf in pytree.tree_leaves(state):
        if isinstance(leaf, Tensor):
            check_rows(leaf, rows)
            if leaf.device != device:
                raise ValueError(
                    f"state: expected device {device}, where the search runs, got {leaf.device}; move it, or pass "
                    "`device`"
                )
        elif hides_tensors(leaf):
            raise TypeError(
                f"state: expected a pytree of tensors, got {type(leaf).__name__}, which holds some that would not "
                "follow their beams; pass `reorder`, or hand them over in a tuple or dict"
            )


def require(legal: Tensor, message: str, tokens: Tensor) -> None:
    """Raise if a token is not legal: at once on a CPU, through a device assertion on a GPU."""
    if legal.is_cuda:
        torch._assert_async(legal.all(), f"mmkernels.beam_search: {message}")
    elif not legal.all():
        raise ValueError(f"{message}, got {tokens[~legal][0]}")


class _Search:
    """N = B G items of k = K / G beams each."""

    def __init__(self, options: Options, device: torch.device) -> None:
        o = self.o = options
        self.k = o.num_beams // o.num_groups
        self.eos = torch.tensor(o.eos, dtype=torch.int64, device=device)
        self.device = self.eos.device  # with its index, as the tensors of `step` have it
        self.backend = ""
        self.scores_dtype: torch.dtype | None = None  # the first logits decide
        self.vocabulary: int | None = None  # the first logits tell it
        # More hypotheses than there can be are never reached.
        self.target = min(round(self.k * o.patience), self.k * o.max_length + 1)
        self.cuts = o.preset != "fairseq"  # what runs at max_length becomes a hypothesis
        # These move to the device once: a copy in a step would wait for it.
        self.words = [torch.tensor(word, device=device) for word in o.bad_words if len(word) > 1]
        single = [word[0] for word in o.bad_words if len(word) == 1]
        self.single = torch.tensor(single, dtype=torch.int64, device=device)
        self.prefix = None if o.prefix is None else o.prefix.to(device)
        self.history: Tensor | None = None  # [B, G, k, n], where an option reads it
        if (
            o.no_repeat_ngram_size
            or o.repetition_penalty != 1
            or self.words
            or o.allowed_tokens is not None
            or o.log_prob_processor is not None
        ):
            start = self.first_tokens()[:, None] if o.prompt is None else o.prompt.to(device)
            if o.preset == "ctranslate2":  # counts what it generates alone
                start = start[:, :0]
            self.history = start[:, None, None].expand(-1, o.num_groups, 1, -1)

    def first_tokens(self) -> Tensor:
        bos = self.o.bos_token_id
        if isinstance(bos, Tensor):
            require(bos >= 0, "bos_token_id: expected token ids >= 0", bos)
            return bos.to(self.device)
        return torch.full((self.o.batch_size,), bos, dtype=torch.int64, device=self.device)

    def candidates_wanted(self, vocabulary: int) -> int:
        o, k = self.o, self.k
        if o.preset == "hf":
            return max(2, 1 + len(o.eos)) * k
        if o.preset == "fairseq":
            return max(k, min(2 * k, k * vocabulary - 1))
        return max(2, 1 + len(o.eos)) * k

    def masks(self, history: Tensor | None, t: int, rows: int, vocabulary: int) -> Tensor | None:
        """Tokens forbidden at step t, [V] or [rows, V]; None: none is."""
        o = self.o

        def none() -> Tensor:
            return torch.zeros(vocabulary, dtype=torch.bool, device=self.device)

        if o.forced_eos is not None and t == o.max_length - 1:
            others = ~none()
            others[o.forced_eos] = False
            return others
        parts: list[Tensor | None] = []
        if len(self.single) or (t < o.min_length and o.eos):
            mask = none().index_fill_(0, self.single, True)
            if o.preset == "hf":  # transformers does not take EOS for a bad word
                mask.index_fill_(0, self.eos, False)
            if t < o.min_length:
                mask.index_fill_(0, self.eos, True)
            parts.append(mask)
        if history is not None:
            if o.no_repeat_ngram_size:
                parts.append(constraints.repeated_ngrams(history, o.no_repeat_ngram_size, vocabulary))
            if self.words:
                parts.append(constraints.completed_words(history, self.words, vocabulary))
            if o.allowed_tokens is not None:
                parts.append(constraints.outside(o.allowed_tokens, history, rows // o.batch_size, vocabulary))
        forbidden: Tensor | None = None
        for part in parts:
            forbidden = part if forbidden is None else forbidden if part is None else forbidden | part
        if self.prefix is not None and t < self.prefix.shape[1]:
            wanted = self.prefix[:, t].repeat_interleave(rows // o.batch_size)[:, None]
            others = torch.arange(vocabulary, device=self.device) != wanted
            forbidden = torch.where(wanted >= 0, others, none() if forbidden is None else forbidden)
        return forbidden

    def candidates(
        self, logits: Tensor, scores: Tensor, valid: Tensor | None, g: int, t: int, taken: Tensor | None
    ) -> BeamCandidates:
        """One group's candidates; `taken` [B, V] counts the tokens that the groups before chose in this step."""
        o, rows, V = self.o, logits.shape[0], logits.shape[1]
        history = None if self.history is None else self.history[:, g].flatten(0, 1)
        forbidden = self.masks(history, t, rows, V)
        forced = o.forced_eos is not None and t == o.max_length - 1
        wanted = self.candidates_wanted(V)
        penalised = o.repetition_penalty != 1
        if not (penalised or o.log_prob_processor or taken is not None or (forced and o.preset == "hf")):
            if forbidden is not None:
                forbidden = forbidden.expand(rows, V)
            return ops.beam_search_step(logits, scores, valid, forbidden, wanted, True, o.renormalize, self.backend)
        # The options that edit log-probabilities need them as a tensor.
        edits_logits = o.preset == "ctranslate2"
        x = logits if logits.dtype == torch.float64 else logits.float()
        if not edits_logits:
            x = log_softmax(x)
        if penalised and history is not None:
            scaled = torch.where(x < 0, x * o.repetition_penalty, x / o.repetition_penalty)
            x = torch.where(constraints.occurred(history, V), scaled, x)
        if forbidden is not None:
            x = torch.where(forbidden, -torch.inf, x)
        if forced and o.preset == "hf":  # at no cost; NaN and +inf still show
            assert o.forced_eos is not None
            x = torch.full_like(x, -torch.inf)
            x[:, o.forced_eos] = torch.where((logits < torch.inf).all(-1), 0.0, torch.nan).to(x.dtype)
        if edits_logits:
            x = log_softmax(x)
        if o.log_prob_processor is not None:
            x = o.log_prob_processor(history, x)  # type: ignore[arg-type]
            self.check_logits("log_prob_processor", x, rows)
        if o.renormalize and not edits_logits:
            x = log_softmax(x)
        if taken is not None:
            x = x - o.diversity_penalty * taken.repeat_interleave(rows // o.batch_size, 0)
        return ops.beam_search_step(x, scores, valid, None, wanted, False, False, self.backend)

    def step_groups(self, logits: Tensor, scores: Tensor, valid: Tensor | None, t: int) -> BeamCandidates:
        """The candidates of all groups, [N, C]."""
        o, B, G, V = self.o, self.o.batch_size, self.o.num_groups, logits.shape[1]
        if G == 1:
            return self.candidates(logits, scores, valid, 0, t, None)
        groups = logits.view(B, -1, scores.shape[1], V) if t else logits[:, None, None].expand(B, G, 1, V)
        scores = scores.view(B, G, -1)
        taken = torch.zeros(B, V, dtype=scores.dtype, device=self.device) if o.diversity_penalty else None
        found = []
        for g in range(G):
            of_group = None if valid is None else valid.view(B, G, -1)[:, g].contiguous()
            one = self.candidates(
                groups[:, g].reshape(-1, V), scores[:, g].contiguous(), of_group, g, t, taken if g else None
            )
            found.append(one)
            if taken is not None:
                columns, goes_on = continuing(one, ends(one, self.eos, False), self.k)
                taken.scatter_add_(1, one.tokens.gather(1, columns), goes_on.to(taken.dtype))
        return BeamCandidates(*(torch.stack(parts, 1).flatten(0, 1) for parts in zip(*found, strict=True)))

    def run(self, step: Callable[[Tensor, Any], tuple[Tensor, Any]], state: Any) -> BeamSearchResult:
        o, k, B, G, T = self.o, self.k, self.o.batch_size, self.o.num_groups, self.o.max_length
        N = B * G
        tokens = self.first_tokens()
        items = torch.arange(N, device=self.device)
        trellis: list[Beams] = []
        valid: Tensor | None = None
        if o.reorder is None:
            check_state(state, B, self.device)
        for t in range(T):
            made = step(tokens, state)
            if not isinstance(made, (tuple, list)) or len(made) != 2:
                size = f" of {len(made)}" if isinstance(made, (tuple, list)) else ""
                raise TypeError(f"step: expected a tuple (logits, state), got {type(made).__name__}{size}")
            logits, state = made
            self.check_logits("step", logits, B if t == 0 else B * o.num_beams)
            if t == 0:
                if o.reorder is None:
                    check_state(state, B, self.device)
                # Every step runs where the first does: only float64 would choose anew, and check_logits refuses it.
                self.backend = _backends.choose("beam_search", o.impl, logits.device.type, logits.dtype)
                self.scores_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
                scores = torch.zeros(N, 1, dtype=self.scores_dtype, device=self.device)
                progress = Progress.none(N, k, scores)
                penalties = scores.new_tensor([1.0, *(o.penalty(n) for n in range(1, T + 1))])
            found = self.step_groups(logits, scores, valid, t)
            scores, parents, tokens, valid = beams = ops.beam_search_advance(
                found, progress, self.eos, penalties, self.rule(t), self.backend
            )
            trellis.append(beams)
            if t == T - 1 or self.all_done(progress.done, t):
                break
            rows = (items[:, None] // G if t == 0 else items[:, None] * k + parents).expand(N, k).reshape(-1)
            if o.reorder is not None:
                given, state = state, o.reorder(state, rows)
                if state is None and given is not None:
                    raise TypeError("reorder: expected the state at these rows, got None; return what it reordered")
            else:
                state = pytree.tree_map(functools.partial(gathered, rows=rows, expected=len(logits)), state)
            if self.history is not None:
                at = parents.view(B, G, k, 1).expand(-1, -1, -1, self.history.shape[-1])
                self.history = torch.cat([self.history.gather(2, at), tokens.view(B, G, k, 1)], -1)
            tokens = tokens.view(-1)
        return self.result(progress, trellis)

    def rule(self, t: int) -> Rule:
        """The preset's rules at step t."""
        o = self.o
        stop = COUNT
        if o.preset == "hf" and o.early_stopping is not True:
            stop = BOUND
        elif o.preset == "ctranslate2" and o.length_penalty == 0:
            stop = COUNT_OR_TOP
        at_the_end = o.early_stopping == "never" and o.length_penalty > 0
        return Rule(
            step=t,
            max_length=o.max_length,
            stop=stop,
            bound_length=o.max_length if at_the_end else t + 1,
            target=self.target,
            num_return=o.num_return_sequences,
            cuts=self.cuts,
            first_come=o.preset == "fairseq",
        )

    def check_logits(self, source: str, x: Tensor, rows: int) -> None:
        """What the caller's function `source` returned: the loop made every other tensor itself."""
        check_matrix(source, x, f"[{rows}, V]", "; of several positions return the last, logits[:, -1]")
        if x.shape[0] != rows:
            raise ValueError(f"{source}: expected [{rows}, V], one row for each of its tokens, got {tuple(x.shape)}")
        if x.shape[1] != self.vocabulary:
            self.check_vocabulary(source, x.shape[1])
        if x.device != self.device:
            raise ValueError(
                f"{source}: expected device {self.device}, where the search runs, got {x.device}; "
                f"pass device={str(x.device)!r}"
            )
        if self.scores_dtype is not None and (x.dtype == torch.float64) != (self.scores_dtype == torch.float64):
            raise TypeError(f"{source}: expected a dtype that fits scores of {self.scores_dtype}, got {x.dtype}")

    def check_vocabulary(self, source: str, V: int) -> None:
        """The first logits tell V: no token of an option may lie past it. It stays the same from then on."""
        o = self.o
        if self.vocabulary is not None:
            raise ValueError(f"{source}: expected V = {self.vocabulary}, as in the first step, got {V}")
        if V == 0:
            raise ValueError(f"{source}: expected V >= 1, got 0")
        for name, tokens in (
            ("eos_token_id", o.eos),
            ("forced_eos_token_id", () if o.forced_eos is None else (o.forced_eos,)),
            ("bad_words", tuple(token for word in o.bad_words for token in word)),
        ):
            if max(tokens, default=0) >= V:
                raise ValueError(f"{name}: expected tokens below V = {V}, got {max(tokens)}")
        if self.prefix is not None:
            require(self.prefix < V, f"prefix: expected tokens below V = {V}", self.prefix)
        self.vocabulary = V

    def all_done(self, done: Tensor, t: int) -> bool:
        """The only wait for the device."""
        if done.device.type != "cpu" and (t + 1) % self.o.steps_between_checks:
            return False
        return bool(done.all())

    def result(self, finished: Progress, trellis: list[Beams]) -> BeamSearchResult:
        """One walk back through the trellis for all hypotheses; then the groups' hypotheses are pooled."""
        o, B, R = self.o, self.o.batch_size, self.o.num_return_sequences
        steps = len(trellis)
        times = torch.arange(steps, device=self.device)[:, None, None]
        here, inside = finished.valid & (finished.times >= times), finished.valid & (finished.times > times)
        # The walk itself: which beam a hypothesis is in after each step, and which it came from. It ends in a
        # candidate, which need not have become a beam; before its end it runs along beams.
        beam, after, before = finished.beams, [], []
        for made, goes_on in zip(reversed(trellis), inside.flip(0), strict=True):
            after.append(beam)
            beam = torch.where(goes_on, made.parents.gather(1, beam), beam)
            before.append(beam)
        own, parents = torch.stack(after[::-1]), torch.stack(before[::-1])  # [steps, N, k]
        tokens = torch.where(inside, torch.stack([made.tokens for made in trellis]).gather(2, own), finished.tokens)
        scores = torch.stack([made.scores for made in trellis])
        sums = torch.where(inside, scores.gather(2, own), finished.log_probs)
        earlier = torch.cat([torch.zeros_like(sums[:1]), scores[:-1].gather(2, parents[1:])])
        added = torch.where(sums == earlier, 0.0, sums - earlier)  # -inf stays -inf
        sequences, beams, token_scores = (
            torch.where(here, part, fill).movedim(0, -1)  # [N, k, steps]
            for part, fill in ((tokens, o.pad_token_id), (parents, 0), (added, 0.0))
        )
        lengths = torch.where(finished.valid, finished.times + 1, 0)

        def pooled(x: Tensor) -> Tensor:
            return x.view(B, -1, *x.shape[2:])

        falling = torch.where(finished.valid, -finished.scores, torch.nan)  # NaN, where there is none, comes last
        order = pooled(falling).sort(dim=1, stable=True).indices[:, :R]
        longest = int(lengths.max()) if lengths.numel() else 0

        def chosen(x: Tensor) -> Tensor:
            x = pooled(x)
            return x.gather(1, order) if x.ndim == 2 else x[torch.arange(B, device=x.device)[:, None], order, :longest]

        scores, valid = chosen(finished.scores), chosen(finished.valid)
        missed, fault = finished.missed.view(B, -1).amax(1), finished.fault.view(B, -1).amax(1)
        may_rise = o.log_prob_processor is not None or o.diversity_penalty < 0
        certified = (missed == -torch.inf) | ((missed <= scores[:, -1]) & (not may_rise))
        return BeamSearchResult(
            sequences=chosen(sequences),
            lengths=chosen(lengths),
            scores=scores,
            log_probs=torch.where(valid, chosen(finished.log_probs), -torch.inf),
            token_scores=chosen(token_scores),
            beams=chosen(beams),
            valid=valid,
            certified=certified & (fault != POISONED),
            fault=fault,
            steps=steps,
        )


def search(step: Callable[[Tensor, Any], tuple[Tensor, Any]], state: Any, options: Options) -> BeamSearchResult:
    """Beam search with checked options."""
    device = options.device
    if device is None and isinstance(options.bos_token_id, Tensor):
        device = options.bos_token_id.device
    if device is None:
        tensors = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
        device = tensors[0].device if tensors else "cpu"
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError("device: expected one with data, for the search follows the scores; got meta")
    if options.batch_size == 0:
        R = options.num_return_sequences
        numbers, flags = torch.zeros(0, R, dtype=torch.int64, device=device), torch.zeros(0, R, device=device) > 0
        floats, long = torch.zeros(0, R, device=device), numbers[:, :, None][:, :, :0]
        return BeamSearchResult(
            long, numbers, floats, floats, floats[:, :, None][:, :, :0], long, flags, flags[:, 0], numbers[:, 0], 0
        )
    with torch.no_grad():
        return _Search(options, device).run(step, state)
