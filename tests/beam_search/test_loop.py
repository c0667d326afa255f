"""beam_search against Hugging Face generate, CTranslate2, a spec of fairseq's rules, and exhaustive search."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch

import mmkernels
from mmkernels.beam_search import api
from mmkernels.beam_search import search as loop
from mmkernels.testing import features

transformers = pytest.importorskip("transformers")


def language_model(V=11, seed=0, scale=4.0):
    """A small random GPT-2 with sharp, distinct logits."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        # Positions that matter keep the tokens from repeating; EOS is likely enough to end hypotheses of all lengths.
        model.transformer.wpe.weight.copy_(torch.randn_like(model.transformer.wpe.weight))
        model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight) * scale / 8)
        model.transformer.ln_f.bias[0] = 4.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[2, 0] = 0.8
    return model


def stepper(model, prompts):
    """`step` over whole sequences: the state holds them, so nothing but the search can mix beams up."""
    calls = []

    def step(tokens, state):
        sequence = torch.cat([state, tokens[:, None]], 1)
        calls.append(len(tokens))
        return model(sequence).logits[:, -1], sequence

    return step, prompts[:, :-1], calls


def ours(model, prompts, **options):
    step, state, _ = stepper(model, prompts)
    options = {"bos_token_id": prompts[:, -1], "eos_token_id": 2, "pad_token_id": 0, "prompt": prompts} | options
    return mmkernels.beam_search(step, state, batch_size=len(prompts), **options)


def theirs(model, prompts, *, num_beams, max_length, num_return_sequences=1, **options):
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), num_beams=num_beams, max_new_tokens=max_length,
        num_return_sequences=num_return_sequences, do_sample=False, output_scores=True, return_dict_in_generate=True,
        **options,
    )  # fmt: skip
    B = len(prompts)
    return (
        out.sequences[:, prompts.shape[1] :].view(B, num_return_sequences, -1),
        out.sequences_scores.view(B, num_return_sequences),
        out,
    )


@torch.no_grad()
def next_log_probs(model, prompt, prefix):
    return model(torch.tensor([prompt.tolist() + list(prefix)])).logits[0, -1].log_softmax(-1).tolist()


PROMPTS = torch.tensor([[1, 4, 5], [1, 7, 3], [1, 9, 9], [1, 3, 10]])


def assert_equal_to(result, sequences, scores):
    for b, r in itertools.product(range(len(sequences)), range(sequences.shape[1])):
        n = result.lengths[b, r]
        assert torch.equal(result.sequences[b, r, :n], sequences[b, r, :n]), (b, r, result.sequences[b, r], sequences)
        # transformers takes a padding id of 0 for none and pads with EOS.
        assert torch.isin(sequences[b, r, n:], torch.tensor([0, 2, 5, 7])).all()
    torch.testing.assert_close(result.scores, scores, rtol=1e-5, atol=1e-5)


HF = [
    ({}, {}),
    ({"early_stopping": True}, {"early_stopping": True}),
    ({"early_stopping": "never"}, {"early_stopping": "never"}),
    ({"early_stopping": "never", "length_penalty": 2.0}, {"early_stopping": "never", "length_penalty": 2.0}),
    ({"length_penalty": 0.0}, {"length_penalty": 0.0}),
    ({"length_penalty": -1.0, "early_stopping": True}, {"length_penalty": -1.0, "early_stopping": True}),
    ({"eos_token_id": (2, 5, 7)}, {"eos_token_id": [2, 5, 7]}),
    ({"min_length": 5}, {"min_new_tokens": 5}),
    ({"forced_eos_token_id": 2}, {"forced_eos_token_id": 2}),
    ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    ({"no_repeat_ngram_size": 1, "early_stopping": True}, {"no_repeat_ngram_size": 1, "early_stopping": True}),
    ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
    ({"bad_words": [[4], [5, 6], [3, 3, 7], [2]]}, {"bad_words_ids": [[4], [5, 6], [3, 3, 7], [2]]}),
    (
        {"allowed_tokens": lambda b, tokens: [2, 3 + b, 8, int(tokens[-1] + 1) % 11]},
        {"prefix_allowed_tokens_fn": lambda b, tokens: [2, 3 + b, 8, int(tokens[-1] + 1) % 11]},
    ),
    ({"bad_words": [[4]], "renormalize": True}, {"bad_words_ids": [[4]], "renormalize_logits": True}),
    (
        {"repetition_penalty": 1.3, "renormalize": True, "min_length": 3},
        {"repetition_penalty": 1.3, "renormalize_logits": True, "min_new_tokens": 3},
    ),
]


@pytest.mark.parametrize(("options", "hf"), HF, ids=lambda o: "-".join(o) if isinstance(o, dict) else None)
@pytest.mark.parametrize("K", [2, 4])
def test_equal_to_hugging_face(options, hf, K):
    for seed in range(4):
        model = language_model(seed=seed)
        common = {"num_beams": K, "max_length": 8, "num_return_sequences": 2}
        sequences, scores, _ = theirs(model, PROMPTS, **common, **hf)
        assert_equal_to(ours(model, PROMPTS, **common, **options), sequences, scores)


def test_per_token_scores_are_hugging_faces_transition_scores():
    model = language_model(seed=3)
    _, _, out = theirs(model, PROMPTS, num_beams=3, max_length=7, num_return_sequences=3)
    result = ours(model, PROMPTS, num_beams=3, max_length=7, num_return_sequences=3)
    expected = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    width = result.token_scores.shape[-1]
    torch.testing.assert_close(result.token_scores.flatten(0, 1), expected[:, :width], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.token_scores.sum(-1), result.log_probs)
    torch.testing.assert_close(result.log_probs / result.lengths, result.scores)


def exhaustive(log_probs, V, T, eos, alpha):
    """The best hypothesis of all: log_probs(prefix) -> list of V."""
    best = (-math.inf, ())
    stack = [((), 0.0)]
    while stack:
        prefix, total = stack.pop()
        for token, value in enumerate(log_probs(prefix)):
            sequence, score = (*prefix, token), total + value
            if token == eos or len(sequence) == T:
                best = max(best, (score / len(sequence) ** alpha, sequence))
            else:
                stack.append((sequence, score))
    return best


@pytest.mark.parametrize("preset", ["hf", "ctranslate2"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_beam_that_holds_everything_finds_the_best_of_all(preset, alpha):
    V, T = 4, 4
    model = language_model(V=V, seed=5)
    options = {"early_stopping": "never"} if preset == "hf" else {"patience": 40.0}
    prompts = torch.tensor([[1, 3], [0, 1]])
    result = ours(model, prompts, num_beams=V**3, max_length=T, length_penalty=alpha, preset=preset, **options)

    for b, prompt in enumerate(prompts):
        score, sequence = exhaustive(functools.partial(next_log_probs, model, prompt), V, T, 2, alpha)
        assert result.sequences[b, 0, : result.lengths[b, 0]].tolist() == list(sequence)
        assert abs(result.scores[b, 0].item() - score) < 1e-5
        assert result.certified[b]


def fairseq(log_probs, V, K, T, eos, alpha):
    """fairseq's SequenceGenerator for one item, from its rules: [(score, tokens)], best first."""
    beams, finished = [((), 0.0)], []
    for t in range(T):
        candidates = []
        for beam, (prefix, total) in enumerate(beams):
            values = log_probs(prefix)
            for token in range(V):
                if t == T - 1 and token != eos:
                    continue
                candidates.append((total + values[token], -beam * V - token, (*prefix, token)))
        candidates.sort(reverse=True)
        candidates = candidates[: min(2 * K, K * V - 1)]
        for score, _, sequence in candidates[:K]:
            if sequence[-1] == eos and len(finished) < K:
                finished.append((score / (t + 1) ** alpha, sequence))
        beams = [(sequence, score) for score, _, sequence in candidates if sequence[-1] != eos][:K]
        if len(finished) >= K or not beams:
            break
    return sorted(finished, reverse=True)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("K", [1, 3, 5])
def test_fairseqs_rules(K, alpha):
    for seed in range(3):
        model = language_model(seed=seed, V=9)
        prompts = PROMPTS.clamp(max=8)
        result = ours(
            model, prompts, num_beams=K, max_length=6, length_penalty=alpha, preset="fairseq", num_return_sequences=K
        )
        for b, prompt in enumerate(prompts):
            expected = fairseq(functools.partial(next_log_probs, model, prompt), 9, K, 6, 2, alpha)
            assert result.valid[b].sum() == len(expected)
            for r, (score, sequence) in enumerate(expected):
                assert result.sequences[b, r, : result.lengths[b, r]].tolist() == list(sequence)
                assert abs(result.scores[b, r].item() - score) < 1e-5


@pytest.fixture(scope="module")
def ctranslate2_model(tmp_path_factory):
    """A GPT-2 and the same model in CTranslate2, tokens named after their ids."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("model")
    V = 11
    model = language_model(V=V, seed=1)
    names = {f"t{i}": i for i in range(V)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="t0")),
        bos_token="t1", eos_token="t2", unk_token="t0",
    )  # fmt: skip
    model.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    ctranslate2.converters.TransformersConverter(str(folder / "hf")).convert(str(folder / "ct2"))
    return model, ctranslate2.Generator(str(folder / "ct2"), device="cpu", intra_threads=1)


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"length_penalty": 0.0}, {"length_penalty": 0.0}),
        ({"length_penalty": 2.0, "patience": 2.0}, {"length_penalty": 2.0, "patience": 2.0}),
        ({"min_length": 4}, {"min_length": 4}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
        ({"bad_words": [[4], [6]]}, {"suppress_sequences": [["t4"], ["t6"]]}),
    ],
    ids=lambda o: "-".join(o) if isinstance(o, dict) else None,
)
@pytest.mark.parametrize("K", [2, 4])
def test_equal_to_ctranslate2(ctranslate2_model, options, theirs, K):
    model, generator = ctranslate2_model
    result = ours(model, PROMPTS, num_beams=K, max_length=8, num_return_sequences=2, preset="ctranslate2", **options)
    found = generator.generate_batch(
        [[f"t{i}" for i in prompt] for prompt in PROMPTS.tolist()],
        beam_size=K, max_length=8, num_hypotheses=2, include_prompt_in_result=False, return_scores=True,
        return_end_token=True, **{"length_penalty": 1.0} | theirs,
    )  # fmt: skip
    for b, one in enumerate(found):
        for r, ids in enumerate(one.sequences_ids):
            assert result.sequences[b, r, : result.lengths[b, r]].tolist() == ids, (b, r)
            assert abs(result.scores[b, r].item() - one.scores[r]) < 1e-4


def test_padding_id_0_is_honoured():
    result = ours(language_model(seed=1), PROMPTS, num_beams=3, max_length=8, num_return_sequences=3)
    past = torch.arange(result.sequences.shape[-1]) >= result.lengths[..., None]
    assert past.any()
    assert result.sequences[past].eq(0).all()


def test_the_first_step_is_not_expanded():
    step, state, calls = stepper(language_model(), PROMPTS)
    mmkernels.beam_search(
        step, state, batch_size=4, num_beams=3, bos_token_id=PROMPTS[:, -1], eos_token_id=2, max_length=4
    )
    assert calls[0] == 4
    assert set(calls[1:]) == {12}


def test_the_state_is_any_pytree_and_its_tensors_follow_the_beams():
    table = features(30, 30, seed=1) * 12

    def step(tokens, state):
        (history,), rest = state["past"], state["rest"]
        assert rest == "kept"
        seen.append(torch.cat([history, tokens[:, None]], 1))
        return table[tokens] + history.sum(1, keepdim=True).sin(), {"past": (seen[-1],), "rest": rest}

    seen = []
    start = {"past": (torch.zeros(2, 0, dtype=torch.int64),), "rest": "kept"}
    options = {"num_beams": 3, "bos_token_id": 1, "eos_token_id": (), "max_length": 6, "num_return_sequences": 3}
    result = mmkernels.beam_search(step, start, batch_size=2, **options)
    for b, r in itertools.product(range(2), range(3)):  # the last step's rows hold each hypothesis but its last token
        own = result.sequences[b, r, :-1].tolist()
        assert [1, *own] in seen[-1][3 * b : 3 * b + 3].tolist()


@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_a_state_without_a_row_for_each_token_is_refused(shape):
    table = features(30, 30, seed=1) * 12
    with pytest.raises(ValueError, match="state: expected tensors of 2 rows"):
        mmkernels.beam_search(
            lambda tokens, state: (table[tokens], state), torch.zeros(shape), batch_size=2, num_beams=3,
            bos_token_id=1, eos_token_id=2, max_length=4,
        )  # fmt: skip


@pytest.mark.parametrize("preset", ["hf", "fairseq", "ctranslate2"])
def test_an_item_is_the_same_in_every_batch(preset):
    """Logits from a table: the search alone decides."""
    table = features(40, 40, seed=1) * 12

    def step(tokens, state):
        return table[tokens] + state, state

    states = features(5, 40, seed=2) * 12
    options = {"num_beams": 4, "bos_token_id": 1, "eos_token_id": (2, 3), "max_length": 12, "num_return_sequences": 4}
    whole = mmkernels.beam_search(step, states, batch_size=5, preset=preset, **options)
    for b in range(5):
        one = mmkernels.beam_search(step, states[b : b + 1], batch_size=1, preset=preset, **options)
        assert torch.equal(one.scores[0], whole.scores[b])
        assert torch.equal(one.lengths[0], whole.lengths[b])
        n = one.sequences.shape[-1]
        assert torch.equal(one.sequences[0], whole.sequences[b, :, :n])
        assert torch.equal(one.certified[0], whole.certified[b])


def test_nan_and_dead_ends_are_named_and_harm_nobody():
    table = features(20, 20, seed=1) * 8

    def run(broken):
        def step(tokens, state):
            item, time = state[:, 0], state[:, 1]
            logits = table[tokens] + item[:, None]
            if broken:
                logits = torch.where(((item == 1) & (time == 2))[:, None], torch.nan, logits)
                logits = torch.where(((item == 3) & (time == 0))[:, None], -torch.inf, logits)
            return logits, torch.stack([item, time + 1], 1)

        state = torch.stack([torch.arange(4.0), torch.zeros(4)], 1)
        return mmkernels.beam_search(
            step, state, batch_size=4, num_beams=3, bos_token_id=1, eos_token_id=2, max_length=6, num_return_sequences=3
        )

    clean, result = run(False), run(True)
    assert clean.faults() == {}
    assert result.faults() == {1: "NaN or +inf among the logits", 3: "every continuation is forbidden"}
    for b in (0, 2):
        assert torch.equal(result.sequences[b], clean.sequences[b])
        assert torch.equal(result.scores[b], clean.scores[b])
    assert not result.valid[3].any()
    assert not result.certified[1]
    assert (result.scores[~result.valid] == -torch.inf).all()
    assert (result.lengths[~result.valid] == 0).all()
    assert not result.scores.isnan().any()


def test_dead_ended_constraints_give_no_duplicates():
    result = ours(
        language_model(), PROMPTS, num_beams=4, max_length=5, num_return_sequences=4, allowed_tokens=lambda b, t: [2]
    )
    assert result.valid.sum(1).tolist() == [1, 1, 1, 1]
    assert result.faults() == {}


def test_prefix_starts_every_hypothesis():
    prefix = torch.tensor([[4, 5], [-1, -1], [6, -1], [2, -1]])
    options = {"num_beams": 3, "max_length": 6, "num_return_sequences": 3}
    result, free = ours(language_model(), PROMPTS, prefix=prefix, **options), ours(language_model(), PROMPTS, **options)
    assert (result.sequences[0, :, :2] == torch.tensor([4, 5])).all()
    assert torch.equal(result.scores[1], free.scores[1])
    assert (result.sequences[2, :, 0] == 6).all()
    assert result.lengths[3].tolist() == [1, 0, 0]


def test_groups_are_diverse_and_one_group_alone_is_plain_search():
    options = {"num_beams": 4, "max_length": 6, "num_return_sequences": 4}
    model = language_model(seed=2)
    plain = ours(model, PROMPTS, num_beams=2, max_length=6, num_return_sequences=2)
    same = ours(model, PROMPTS, num_groups=2, **options)  # both groups find the same
    assert torch.equal(same.scores[:, ::2], plain.scores)
    assert torch.equal(same.scores[:, 1::2], plain.scores)
    diverse = ours(model, PROMPTS, num_groups=2, diversity_penalty=50.0, **options)
    first = diverse.sequences[:, :, 0]
    assert all(len(set(row.tolist())) > 1 for row in first)


def diverse(log_probs, V, K, G, T, eos, alpha, strength):
    """Vijayakumar et al.'s group search for one item, from its rules: [(score, tokens)], best first."""
    k = K // G
    beams, finished = [[((), 0.0)] for _ in range(G)], [[] for _ in range(G)]
    for t in range(T):
        taken = [0] * V
        for g in range(G):
            candidates = []
            for beam, (prefix, total) in enumerate(beams[g]):
                for token, value in enumerate(log_probs(prefix)):
                    candidates.append((total + value - strength * taken[token], -beam * V - token, (*prefix, token)))
            candidates = sorted(candidates, reverse=True)[: 2 * k]
            for score, _, sequence in candidates[:k]:
                if sequence[-1] == eos or t == T - 1:
                    finished[g].append((score / (t + 1) ** alpha, sequence))
            beams[g] = [(sequence, score) for score, _, sequence in candidates if sequence[-1] != eos][:k]
            for sequence, _ in beams[g]:
                taken[sequence[-1]] += 1
    return sorted((hypothesis for group in finished for hypothesis in sorted(group, reverse=True)[:k]), reverse=True)


@pytest.mark.parametrize(("K", "G"), [(4, 2), (6, 3), (3, 3)])
@pytest.mark.parametrize("strength", [0.7, 3.0])
def test_diverse_groups_follow_their_rules(K, G, strength):
    options = {"max_length": 5, "length_penalty": 0.8, "early_stopping": True, "patience": 100.0}
    for seed in range(3):
        model = language_model(seed=seed, V=9)
        prompts = PROMPTS.clamp(max=8)
        result = ours(
            model, prompts, num_beams=K, num_groups=G, diversity_penalty=strength, num_return_sequences=K, **options
        )
        for b, prompt in enumerate(prompts):
            expected = diverse(functools.partial(next_log_probs, model, prompt), 9, K, G, 5, 2, 0.8, strength)[:K]
            assert result.valid[b].sum() == len(expected)
            for r, (score, sequence) in enumerate(expected):
                assert abs(result.scores[b, r].item() - score) < 1e-5
                assert result.sequences[b, r, : result.lengths[b, r]].tolist() == list(sequence)


def test_wu_penalty():
    result = ours(language_model(), PROMPTS, num_beams=3, max_length=6, length_penalty=0.7, length_penalty_kind="wu")
    torch.testing.assert_close(result.scores, result.log_probs / ((5 + result.lengths) / 6) ** 0.7)


def test_the_certificate_never_lies_and_is_not_always_false():
    """Against the same search that may not stop early: hypotheses are only counted, and far more of them."""
    kept = 0
    for seed in range(12):
        model = language_model(seed=seed, scale=3.0)
        options = {"num_beams": 3, "max_length": 9, "length_penalty": 1.0, "num_return_sequences": 1}
        early = ours(model, PROMPTS, early_stopping=True, **options)
        full = ours(model, PROMPTS, early_stopping=True, patience=1000.0, **options)
        assert full.certified.all()
        better = full.scores[:, 0] > early.scores[:, 0] + 1e-6
        assert not (better & early.certified).any()
        kept += int(early.certified.sum())
    assert 0 < kept < 48


def test_an_empty_batch():
    options = {"num_beams": 3, "bos_token_id": 1, "eos_token_id": 2, "max_length": 4}
    result = mmkernels.beam_search(lambda tokens, state: (None, None), None, batch_size=0, **options)
    assert result.sequences.shape == (0, 1, 0)
    assert result.faults() == {}


def zeros(*shape, **options):
    """A model of constant logits."""
    return lambda tokens, state: (torch.zeros(*shape, **options), state)


def widens(tokens, state):
    """float32 for the two rows of the first step, float64 for the beams."""
    return torch.zeros(len(tokens), 9, dtype=torch.float32 if len(tokens) == 2 else torch.float64), state


def narrows(tokens, state):
    """A vocabulary of 9 for the two rows of the first step, of 8 for the beams."""
    return torch.zeros(len(tokens), 9 if len(tokens) == 2 else 8), state


@pytest.mark.parametrize(
    ("error", "message", "step", "processor"),
    [
        (TypeError, "step: expected a tensor, got list", lambda tokens, state: ([], state), None),
        (TypeError, r"step: expected a tuple \(logits, state\), got Tensor", lambda t, state: torch.zeros(2, 9), None),
        (TypeError, "step: expected a tuple .*, got tuple of 3", lambda t, state: (torch.zeros(2, 9), state, 0), None),
        (TypeError, "step: expected a tuple .*, got NoneType", lambda tokens, state: None, None),
        (TypeError, "step: expected a tuple .*, got dict", lambda t, s: {"logits": torch.zeros(2, 9), "s": s}, None),
        (ValueError, "step: expected 2 dimensions .*; of several positions return the last", zeros(2, 5, 9), None),
        (ValueError, "step: expected V >= 1, got 0", zeros(2, 0), None),
        (ValueError, "step: expected V = 9, as in the first step, got 8", narrows, None),
        (TypeError, "step: expected float32, .* got torch.int64", zeros(2, 9, dtype=torch.int64), None),
        (ValueError, r"step: expected 2 dimensions \[2, V\]", zeros(2, 1, 9), None),
        (ValueError, r"step: expected \[2, V\], one row for each of its tokens, got \(3, 9\)", zeros(3, 9), None),
        (ValueError, "step: expected device cpu, .* got meta; pass device='meta'", zeros(2, 9, device="meta"), None),
        (
            TypeError,
            "step: expected a dtype that fits scores of torch.float32, got torch.float64",
            widens,
            None,
        ),
        (ValueError, r"log_prob_processor: expected \[2, V\]", zeros(2, 9), lambda history, x: x[:1]),
        (ValueError, "log_prob_processor: expected V = 9, .* got 7", zeros(2, 9), lambda history, x: x[:, :7]),
        (TypeError, "log_prob_processor: expected a tensor, got NoneType", zeros(2, 9), lambda history, x: None),
        (TypeError, "log_prob_processor: expected a dtype that fits", zeros(2, 9), lambda history, x: x.double()),
    ],
)  # fmt: skip
def test_what_the_callers_functions_return_is_checked(error, message, step, processor):
    with pytest.raises(error, match=message):
        mmkernels.beam_search(
            step, None, batch_size=2, num_beams=3, bos_token_id=1, eos_token_id=2, max_length=4,
            log_prob_processor=processor, impl="reference",
        )  # fmt: skip


@dataclasses.dataclass
class Cache:
    """What holds the state of a model in an object that torch knows nothing of."""

    layers: list


@pytest.mark.parametrize(
    ("error", "message", "state"),
    [
        (ValueError, r"state: expected tensors of 2 rows, .* got shape \(6, 4\)", torch.zeros(6, 4)),
        (ValueError, "state: expected device cpu, where the search runs, got meta", torch.zeros(2, 4, device="meta")),
        (TypeError, "state: expected a pytree of tensors, got Cache, .*; pass `reorder`", Cache([torch.zeros(2)])),
        (TypeError, "state: expected a pytree of tensors, got Cache", [Cache([Cache([(torch.zeros(2), 0)])])]),
        (TypeError, "state: expected a pytree of tensors, got ndarray", {"past": torch.zeros(2, 4).numpy()}),
    ],
    ids=["another batch", "another device", "a dataclass", "a cache of layers", "an array"],
)
@pytest.mark.parametrize("when", ["given", "returned"])
def test_a_state_that_cannot_follow_its_beams_is_refused(error, message, state, when):
    options = {"batch_size": 2, "num_beams": 3, "bos_token_id": 1, "eos_token_id": 2, "max_length": 3, "device": "cpu"}
    table = features(9, 9, seed=1) * 12
    with pytest.raises(error, match=message):
        mmkernels.beam_search(lambda tokens, _: (table[tokens], state), state if when == "given" else None, **options)
    reordered = mmkernels.beam_search(
        lambda tokens, own: (table[tokens], own), state, reorder=lambda own, rows: own, **options
    )
    assert reordered.faults() == {}


def test_a_state_may_hold_what_has_no_rows():
    module, table = torch.nn.Linear(2, 2), features(9, 9, seed=1) * 12
    state = {"module": module, "name": "one", "nothing": None, "count": 3, "object": Cache([1, "two"])}

    def step(tokens, own):
        assert own == state
        return table[tokens], own

    options = {"batch_size": 2, "num_beams": 3, "bos_token_id": 1, "eos_token_id": 2, "max_length": 3}
    assert mmkernels.beam_search(step, state, **options).faults() == {}


def test_a_reorder_that_returns_nothing_is_refused():
    options = {"batch_size": 2, "num_beams": 3, "bos_token_id": 1, "eos_token_id": 2, "max_length": 3}
    with pytest.raises(TypeError, match="reorder: expected the state at these rows, got None; return"):
        mmkernels.beam_search(zeros(2, 9), "state", reorder=lambda state, rows: None, **options)


@pytest.mark.parametrize(
    ("error", "message", "chosen"),
    [
        (ValueError, "allowed_tokens: expected tokens of 0 to 8, got 9", [3, 9]),
        (ValueError, "allowed_tokens: expected tokens of 0 to 8, got -1", [3, -1]),
        (TypeError, "allowed_tokens: expected a sequence of token ids, got NoneType", None),
        (TypeError, "allowed_tokens: expected a sequence of token ids, got int", 4),
        (TypeError, "allowed_tokens: expected a sequence of token ids, got list", [3.0, 4.0]),
        (TypeError, "allowed_tokens: expected a sequence of token ids, got torch.bool", torch.ones(9) > 0),
    ],
)
def test_what_allowed_tokens_returns_is_checked(error, message, chosen):
    options = {"batch_size": 2, "num_beams": 3, "bos_token_id": 1, "eos_token_id": 2, "max_length": 3}
    with pytest.raises(error, match=message):
        mmkernels.beam_search(
            lambda tokens, state: (torch.zeros(len(tokens), 9), state), None,
            allowed_tokens=lambda item, tokens: [2, 3] if item == 0 else chosen, **options,
        )  # fmt: skip


def test_tokens_may_be_of_any_integer_type():
    def run(kind):
        return ours(
            language_model(), PROMPTS, num_beams=3, max_length=6, eos_token_id=kind([2, 5]), pad_token_id=kind(7),
            bad_words=kind([[4, 8], [3, 3]]), allowed_tokens=lambda item, tokens: kind([2, 4, 5, 6, 8]),
        )  # fmt: skip

    expected = run(lambda tokens: tokens)
    for kind in (torch.tensor, np.array, lambda tokens: iter(tokens) if isinstance(tokens, list) else tokens):
        assert torch.equal(run(kind).sequences, expected.sequences)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preset": "fairseq"},
        {"preset": "ctranslate2"},
        {"preset": "ctranslate2", "repetition_penalty": 1.5},
        {"repetition_penalty": 1.5},
        {"renormalize": True, "min_length": 2},
        {"forced_eos_token_id": 2, "max_length": 3},
        {"no_repeat_ngram_size": 2, "bad_words": [[4, 5]]},
        {"num_groups": 3, "diversity_penalty": 0.5},
        {"log_prob_processor": lambda tokens, x: x - 1},
        {"allowed_tokens": lambda item, tokens: [2, 5, 7, 9]},
        {"prefix": torch.tensor([[4, 5, 7]] * 4)},
    ],
    ids=lambda options: "-".join(options),
)
def test_nan_and_infinity_stop_their_item_whatever_the_options(options, value):
    """They stand at a token that every option allows, in the third step of item 1."""
    table = features(20, 20, seed=1) * 8
    table[:, 2] -= 8  # no item ends before
    options = {"max_length": 6, "num_return_sequences": 3} | options

    def run(broken):
        def step(tokens, state):
            item, time = state[:, 0], state[:, 1]
            logits = table[tokens] + item[:, None]
            logits[(item == 1) & (time == 2) & broken, [2, 7][options["max_length"] > 3]] = value
            return logits, torch.stack([item, time + 1], 1)

        state = torch.stack([torch.arange(4.0), torch.zeros(4)], 1)
        return mmkernels.beam_search(step, state, batch_size=4, num_beams=3, bos_token_id=1, eos_token_id=2, **options)

    clean, result = run(False), run(True)
    assert clean.faults() == {}
    assert result.faults() == {1: "NaN or +inf among the logits"}
    assert not result.certified[1]
    others = [0, 2, 3]
    assert torch.equal(result.scores[others], clean.scores[others])
    assert torch.equal(result.lengths[others], clean.lengths[others])
    assert not result.scores.isnan().any()
    assert not result.token_scores.isnan().any()


def test_hypotheses_of_minus_infinity_are_there():
    """Two logits that float32 cannot subtract: what follows scores -inf, and is no dead end."""
    table = torch.full((9, 9), -3e38)
    table[:, 3] = 3e38
    options = {"batch_size": 2, "num_beams": 3, "bos_token_id": 1, "eos_token_id": 2, "max_length": 3}
    result = mmkernels.beam_search(
        lambda tokens, state: (table[tokens], state), None, num_return_sequences=3, **options
    )
    assert result.faults() == {}
    assert result.valid.all()
    assert abs(result.scores[0, 0]) < 1e-6
    assert result.scores[0, 1:].eq(-torch.inf).all()
    assert not result.token_scores.isnan().any()


def test_a_step_checks_no_argument_of_the_public_call_again(monkeypatch):
    """The loop calls the registered op itself, on the implementation that the first logits chose."""
    asked, choose = [], loop._backends.choose
    monkeypatch.setattr(loop._backends, "choose", lambda *arguments: asked.append(arguments) or choose(*arguments))
    monkeypatch.setattr(api, "beam_search_step", None)
    result = ours(language_model(), PROMPTS, num_beams=3, max_length=5, early_stopping="never")
    assert result.steps == 5
    assert len(asked) == 1
