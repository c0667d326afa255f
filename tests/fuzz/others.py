"""Drawn calls of what is no loss: divided_attention and its maps, retrieval, a step of beam search, whole searches."""

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

import mmkernels
from mmkernels.beam_search import BeamSearchResult
from mmkernels.divided_attention.layout import AXES, CLS_MODES, TOKEN_ORDERS
from mmkernels.testing import assert_within_budget, features
from tests.beam_search import cases as beam_search_cases
from tests.divided_attention import cases as divided_attention_cases
from tests.fuzz.draw import NOT_FINITE, Draw
from tests.retrieval import cases as retrieval_cases


@dataclasses.dataclass(frozen=True)
class Clips(divided_attention_cases.Case):
    """A case whose numbers and absent frames are drawn."""

    qkv: Tensor | None = None
    present: Tensor | None = None

    def frame_mask(self) -> Tensor | None:
        return self.present


def clips(draw: Draw) -> Clips:
    """Any layout of few tokens, on the schedules of short and of long sequences."""
    dtype, axis = draw.dtype(), draw.pick("axis", AXES)
    frames = draw.size("frames", 33)
    positions = draw.size("positions", max(1, 70 // frames))
    batch, heads, head = draw.size("batch", 3), draw.size("heads", 4), draw.size("head", 72)
    if draw.chance("large head", 0.05):
        head = draw.pick("head", [96, 128, 200, 256])
    mode = draw.pick("cls_mode", CLS_MODES)
    case = Clips(
        positions,
        frames,
        axis,
        mode,
        draw.pick("token_order", TOKEN_ORDERS),
        batch=batch,
        heads=heads,
        head=head,
        scale=draw.pick("scale", [None, None, 0.0, -0.5, 1.0, 0.125]),
        dropout_p=draw.pick("dropout_p", [0.0, 0.0, 0.1, 0.5, 0.99]),
    )
    width = heads * head
    qkv = torch.randn(batch, case.tokens, 3 * width, generator=draw.generator(), dtype=torch.float64)
    qkv[..., : 2 * width] *= draw.pick("amplitude", [1.0, 1.0, 0.01, 5.0])
    present = None
    if draw.chance("frame_mask", 0.5):
        present = torch.rand(batch, frames, generator=draw.generator()) < draw.pick(
            "share of frames", [0.0, 0.3, 0.7, 0.95]
        )
        if draw.chance("mask: transposed", 0.3):
            present = present.T.contiguous().T
    return dataclasses.replace(case, qkv=draw.laid("qkv", qkv.to(dtype)), present=present)


def divided_attention(draw: Draw) -> None:
    case = clips(draw)
    qkv, cases = case.qkv, divided_attention_cases
    assert qkv is not None
    actual = cases.run(qkv, case, "cpu")
    exact, eager = cases.run(qkv.double(), case, "reference"), cases.run_eager(qkv, case)
    cases.assert_results(actual, eager, exact, qkv, case, sizes_of_terms(draw, case, exact[0]))
    if case.present is not None and not case.present.all():
        # What an absent frame holds is not read.
        absent = hidden_tokens(case)
        poisoned = qkv.clone().masked_fill_(absent[..., None], draw.pick("absent frames hold", NOT_FINITE))
        for name, a, b in zip(("out", "lse", "grad"), actual, cases.run(poisoned, case, "cpu"), strict=True):
            assert torch.equal(a, b), f"{name} depends on what an absent frame holds"
    if draw.chance("without gradient", 0.2):
        out = mmkernels.divided_attention(
            qkv, frame_mask=case.present, dropout_p=case.dropout_p, dropout_seed=cases.SEED, impl="cpu", **case.options
        )
        assert isinstance(out, Tensor)
        assert torch.equal(out, actual[0])
    if draw.chance("planted", 0.2):
        planted = draw.plant("qkv", qkv)
        out, lse, grad = cases.run(planted, case, "cpu")
        exact = cases.run(planted.double(), case, "reference")
        for name, a, b in (("out", out, exact[0]), ("lse", lse, exact[1])):
            assert not (b.isnan() & a.isfinite()).any(), f"{name}: numbers where float64 has none"
        assert grad.isfinite().all() <= exact[2].isfinite().all(), "all gradients are numbers"


def sizes_of_terms(draw: Draw, case: Clips, out: Tensor) -> dict[str, float]:
    """Of scores of any size, which are relative errors of the probabilities, and of rows of a single key, whose
    gradients are 0: in them the rounding of the output shows."""
    assert case.qkv is not None
    q, k, v = (
        x.double().norm(dim=-1).max().item() for x in case.qkv.unflatten(-1, (3, case.heads, case.head)).unbind(2)
    )
    grad = divided_attention_cases.weights_of(out).unflatten(-1, (case.heads, case.head)).norm(dim=-1).max().item()
    kept = 1 / (1 - case.dropout_p)
    relative = 1 + abs(case.effective_scale) * q * k  # in units of float32
    in_float32 = {torch.float32: 1.0, torch.float16: 2.0**-13, torch.bfloat16: 2.0**-16}[case.qkv.dtype] * relative
    products = abs(case.effective_scale) * kept * grad * v * max(1.0, in_float32)
    alike = draw.alike(case.tokens)
    return {
        "out": alike * kept * v * in_float32,
        "lse": alike * in_float32,
        "grad_q": alike * products * k,
        "grad_k": alike * products * q,
        "grad_v": alike * kept * grad * in_float32,
    }


def hidden_tokens(case: Clips) -> Tensor:
    """Which tokens are of absent frames, [B, L]."""
    assert case.present is not None
    index = torch.arange(case.positions * case.frames)
    frame = index % case.frames if case.token_order == "nt" else index // case.positions
    absent = ~case.present[:, frame]
    return absent if case.cls_mode == "none" else torch.nn.functional.pad(absent, (1, 0))


def divided_attention_maps(draw: Draw) -> None:
    """The maps times the values are the output at the tokens; a row sums to 1, or is 0."""
    case = dataclasses.replace(clips(draw), dropout_p=0.0)
    qkv = case.qkv
    assert qkv is not None
    tokens = torch.randint(case.tokens, (draw.size("Q", 9, least=0),), generator=draw.generator())
    found, exact = (
        mmkernels.divided_attention_maps(x, tokens, frame_mask=case.present, **case.options)
        for x in (qkv, qkv.double())
    )
    eager = mmkernels.divided_attention_maps(qkv.float(), tokens, frame_mask=case.present, **case.options)
    q, k = (x.double().norm(dim=-1).max().item() for x in qkv.unflatten(-1, (3, case.heads, case.head)).unbind(2)[:2])
    # An error of the score is a relative one of the probability.
    assert_within_budget(
        found, eager, exact, dtype=torch.float32, terms=1 + abs(case.effective_scale) * q * k, name="maps"
    )
    assert ((exact.sum(-1) - 1).abs().minimum(exact.abs().sum(-1)) < 1e-12).all()
    out = mmkernels.divided_attention(qkv.double(), frame_mask=case.present, **case.options)
    assert isinstance(out, Tensor)
    v = qkv.double().unflatten(-1, (3, case.heads, case.head))[:, :, 2].transpose(1, 2)
    torch.testing.assert_close((exact @ v).transpose(1, 2).flatten(2), out[:, tokens], rtol=1e-9, atol=1e-11)


def retrieval(draw: Draw) -> None:
    """Scores that are exact in every order of the sums: ranks and the best keys must be the reference's, ties, NaN and
    infinities included. Then scores of any kind."""
    dtype, n, m, size = draw.dtype(), draw.size("N", 260), draw.size("M", 600), draw.size("D", 140)
    queries, keys, scores = retrieval_cases.whole_numbers(n, m, size, dtype, seed=draw.random.getrandbits(31))
    if draw.chance("copies", 0.3):
        place = torch.randint(draw.size("distinct", m), (m,), generator=draw.generator())
        keys, scores = keys[place], scores[:, place]
    if draw.chance("planted", 0.3):
        queries, keys = (
            (draw.plant("queries", queries), keys)
            if draw.chance("in queries", 0.5)
            else (queries, draw.plant("keys", keys))
        )
        # Products of two numbers at a time: no kernel of a matrix product has its own way with what is not finite.
        scores = sum((queries[:, None, i].float() * keys[None, :, i].float() for i in range(size)), torch.zeros(n, m))
    queries, keys = draw.laid("queries", queries), draw.laid("keys", keys)
    if draw.said["queries: layout"] == "expanded":
        scores = scores[:1].expand(n, m)
    if draw.said["keys: layout"] == "expanded":
        scores = scores[:, :1].expand(n, m)
    targets = torch.randint(m, (n,), generator=draw.generator())
    if draw.chance("targets: steps", 0.3):
        targets = targets.repeat_interleave(2)[::2]
    retrieval_cases.check_order(queries, keys, scores, targets, "cpu")
    if draw.chance("any scores", 0.3):
        case = retrieval_cases.Case(
            n, m, size, distinct=draw.size("distinct", m), scale=draw.pick("scale", [1.0, 0.0, 1e4, 1e-3])
        )
        retrieval_cases.check_case(case, dtype, "cpu")


KINDS = (
    "normal", "ascending", "descending", "equal", "ties", "near", "nothing", "few", "large", "nan", "infinite",
    "nan and nothing", "nan score",
)  # fmt: skip


def beam_search_step(draw: Draw) -> None:
    """The bits of the reference, whatever is asked."""
    vocabulary = draw.size("V", 1200)
    options: dict[str, Any] = {}
    if draw.chance("valid", 0.3):
        options["valid"] = "some"
    if draw.chance("forbidden", 0.4):
        options["forbidden"] = draw.pick("forbidden", ["tokens", "rows"])
    for name, share in (("mask_first", 0.3), ("normalize", 0.3)):
        if draw.chance(name, share):
            options[name] = name == "mask_first"
    B, K = draw.size("B", 5, least=0), draw.size("K", 12)
    wanted = draw.pick("candidates", [None, 1, K, 2 * K, 3 * K, K * vocabulary + 3])
    case = beam_search_cases.Case(B, K, vocabulary, draw.pick("kind", KINDS), wanted, beam_search_cases.of(**options))
    if case.kind in ("nan and nothing", "nan score") and B == 0:
        return  # they write into the first item
    dtype = draw.dtype()
    logits, scores, given = case.inputs(dtype)
    logits, scores = draw.laid("logits", logits), draw.laid("scores", scores)
    if (
        draw.chance("forbidden: transposed", 0.2)
        and given.get("forbidden") is not None
        and given["forbidden"].ndim == 2
    ):
        given["forbidden"] = given["forbidden"].T.contiguous().T
    expected = mmkernels.beam_search_step(logits, scores, **given, impl="reference")
    beam_search_cases.assert_same(mmkernels.beam_search_step(logits, scores, **given, impl="cpu"), expected)


def beam_search(draw: Draw) -> None:
    """A whole search over logits from a table: the result of the reference, and hypotheses that keep the rules."""
    B, groups, T = draw.size("B", 3, least=0), draw.pick("num_groups", [1, 1, 1, 2, 3]), draw.size("T", 9)
    K, vocabulary = groups * draw.size("beams of a group", 4), draw.size("V", 30, least=3)
    table = features(vocabulary, vocabulary, seed=draw.random.getrandbits(31)) * draw.pick("sharpness", [0.0, 1.0, 8.0])
    if draw.chance("ties", 0.2):
        table = table.round()
    table = table.to(draw.dtype())
    if draw.chance("forbidden logits", 0.2):
        table[torch.rand(table.shape, generator=draw.generator()) < 0.3] = -torch.inf
    if draw.chance("not finite", 0.1):
        table = draw.plant("table", table)
    preset = draw.pick("preset", ["hf", "hf", "fairseq", "ctranslate2"])
    options: dict[str, Any] = {
        "preset": preset,
        "num_beams": K,
        "num_groups": groups,
        "num_return_sequences": draw.size("R", K),
        "max_length": T,
        "eos_token_id": draw.pick("eos", [0, 2, (0, 2)] + [()] * (preset != "fairseq")),
        "length_penalty": draw.pick("length_penalty", [1.0, 0.0, 2.0, -1.0, 0.6]),
        "length_penalty_kind": draw.pick("length_penalty_kind", ["power", "wu"]),
        "pad_token_id": draw.pick("pad", [None, 0, 1]),
        "bos_token_id": draw.pick("bos", [1, torch.randint(vocabulary, (B,), generator=draw.generator())]),
    }
    if T > 1 and draw.chance("min_length", 0.3):
        options["min_length"] = draw.random.randrange(T)
    if preset == "hf" and draw.chance("early_stopping", 0.5):
        options["early_stopping"] = draw.pick("early_stopping", [True, "never"])
    if preset != "hf" or options.get("early_stopping") is True:
        options["patience"] = draw.pick("patience", [1.0, 2.0, 0.7])
    if draw.chance("no_repeat_ngram_size", 0.3):
        options["no_repeat_ngram_size"] = draw.pick("n-gram", [1, 2, 3])
    if draw.chance("repetition_penalty", 0.2):
        options["repetition_penalty"] = draw.pick("repetition", [1.3, 0.7])
    if draw.chance("bad_words", 0.2):
        options["bad_words"] = [
            [draw.random.randrange(vocabulary) for _ in range(draw.random.randint(1, 3))] for _ in range(2)
        ]
        draw.said["bad_words"] = options["bad_words"]
    if groups > 1:
        options["diversity_penalty"] = draw.pick("diversity_penalty", [0.0, 0.5, 3.0])
    if options["eos_token_id"] != () and draw.chance("forced_eos_token_id", 0.2):
        options["forced_eos_token_id"] = draw.pick("forced", [0, 2])
    if draw.chance("prefix", 0.2):
        longest = T - (preset == "fairseq" or "forced_eos_token_id" in options)
        length = draw.random.randint(0, longest)
        options["prefix"] = torch.randint(-1, vocabulary, (B, length), generator=draw.generator())
    if draw.chance("prompt", 0.2):
        options["prompt"] = torch.randint(vocabulary, (B, draw.random.randint(1, 4)), generator=draw.generator())
    if draw.chance("renormalize", 0.2):
        options["renormalize"] = draw.pick("renormalize", [True, False])

    def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return table[tokens], state

    cpu, reference = (
        mmkernels.beam_search(step, torch.zeros(B, 1), batch_size=B, impl=impl, **options)
        for impl in ("cpu", "reference")
    )
    for field in dataclasses.fields(reference):
        a, b = getattr(cpu, field.name), getattr(reference, field.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, f"{field.name}: {a} is not {b}"
    keeps_the_rules(cpu, options)


def keeps_the_rules(result: BeamSearchResult, options: dict[str, Any]) -> None:
    """What must hold of every hypothesis, whatever the logits."""
    eos = options["eos_token_id"]
    eos = set(eos) if isinstance(eos, tuple) else {eos}
    pad = options["pad_token_id"]
    pad = min(eos, default=0) if pad is None else pad
    n = options.get("no_repeat_ngram_size", 0)
    B, R, _ = result.sequences.shape
    for b, r in itertools.product(range(B), range(R)):
        length = int(result.lengths[b, r])
        tokens, rest = result.sequences[b, r, :length].tolist(), result.sequences[b, r, length:].tolist()
        assert bool(result.valid[b, r]) == (length > 0)
        assert length <= options["max_length"]
        assert set(rest) <= {pad}
        assert not eos & set(tokens[:-1]), "a hypothesis goes on after EOS"
        if length:
            total = result.token_scores[b, r].double().sum()
            base = length if options["length_penalty_kind"] == "power" else (5 + length) / 6
            torch.testing.assert_close(total.float(), result.log_probs[b, r], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                result.log_probs[b, r].double() / base ** options["length_penalty"],
                result.scores[b, r].double(),
                rtol=1e-5,
                atol=1e-6,
            )
            if "prefix" not in options:
                assert length > options.get("min_length", 0) or tokens[-1] not in eos
                for word in options.get("bad_words", ()) if options["preset"] != "hf" else ():
                    found = any(tokens[i : i + len(word)] == word for i in range(length))
                    assert not found or length == options["max_length"], f"the bad word {word} in {tokens}"
                grams = [tuple(tokens[i : i + n]) for i in range(length - n + 1)] if n else []
                assert len(set(grams)) == len(grams) or length == options["max_length"], (
                    f"an {n}-gram twice in {tokens}"
                )
    of_item = [
        [tuple(result.sequences[b, r, : result.lengths[b, r]].tolist()) for r in range(R) if result.valid[b, r]]
        for b in range(B)
    ]
    if options["num_groups"] == 1:
        assert all(len(set(found)) == len(found) for found in of_item), "a hypothesis twice"
    assert (result.scores[:, :-1] >= result.scores[:, 1:]).all()
