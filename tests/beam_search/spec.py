"""How beam search and a step of it are called, and what they refuse: the specs that tests/contract.py holds them to."""

import torch

import mmkernels
from tests.beam_search.cases import Case, of
from tests.contract import Call, Memory, Spec

step = mmkernels.beam_search_step


def call(**options):
    """Logits [6, n], no differentiable tensor; the scores [2, 3] and the masks that the options ask for."""

    def make(dtype, n):
        logits, scores, given = Case(2, 3, n, options=of(**options)).inputs(dtype)
        scores = scores.double() if dtype == torch.float64 else scores
        return [logits], [scores, *(given[name] for name in ("valid", "forbidden") if name in given)]

    def run(impl, logits, scores, *masks):
        names = [name for name in ("valid", "forbidden") if name in options]
        plain = {name: value for name, value in options.items() if name not in names}
        return step(logits, scores, **dict(zip(names, masks, strict=True)), **plain, impl=impl)

    return Call(make, run)


CALLS = {
    "plain": call(),
    "masks": call(valid="some", forbidden="rows", mask_first=True),
    "scores as they are": call(normalize=False, forbidden="tokens"),
}


def bad_inputs():
    logits, scores = torch.zeros(6, 4), torch.zeros(2, 3)
    return {
        "logits: expected a tensor": (TypeError, ([1.0], scores), {}),
        "logits: expected float32": (TypeError, (logits.long(), scores), {}),
        "scores: expected torch.float32": (TypeError, (logits, scores.half()), {}),
        "scores: expected 2 dimensions": (ValueError, (logits, scores[0]), {}),
        "logits: expected 6 rows": (ValueError, (logits[:5], scores), {}),
        "expected V >= 1": (ValueError, (logits[:, :0], scores), {}),
        "num_candidates: expected": (ValueError, (logits, scores), {"num_candidates": 0}),
        "valid: expected bool, True for a beam that there is, got torch.float32": (
            TypeError,
            (logits, scores),
            {"valid": torch.ones(2, 3)},
        ),
        "forbidden: expected shape": (ValueError, (logits, scores), {"forbidden": torch.zeros(5) > 0}),
        "scores: expected device": (ValueError, (logits.to("meta"), scores), {}),
        "normalize: expected a bool, got str": (TypeError, (logits, scores), {"normalize": "no"}),
        "mask_first: expected a bool, got Tensor": (TypeError, (logits, scores), {"mask_first": torch.ones(4) > 0}),
        "impl: expected": (ValueError, (logits, scores), {"impl": "gpu"}),
    }


def vocabulary(dtype, n):
    """Logits [40, n] and the scores of 8 items with 5 beams."""
    logits, scores, _ = Case(8, 5, n).inputs(dtype)
    return [logits], [scores]


def log_probabilities(tensors):
    return 4 * tensors[0].numel()


BEAM_SEARCH_STEP = Spec(
    CALLS,
    step,
    bad_inputs,
    memory={
        "a vocabulary": Memory(
            Call(vocabulary, CALLS["plain"].run), 32_000, lambda tensors, scratch: 0, log_probabilities
        )
    },
    differentiable=False,
    autocast=False,
    traced="logits: expected 6 rows",
)


def loop(B, K, T):
    """A search over logits [T, B K, n] that follow from the step alone."""

    def make(dtype, n):
        generator = torch.Generator().manual_seed(n)
        return [(4 * torch.randn(T, B * K, n, generator=generator)).to(dtype)], []

    def run(impl, logits):
        def model(tokens, position):
            return logits[position, : len(tokens)], position + 1

        result = mmkernels.beam_search(
            model, 0, batch_size=B, num_beams=K, bos_token_id=1, eos_token_id=2, max_length=T, impl=impl
        )
        return result.sequences, result.scores

    return Call(make, run)


def bad_searches():
    good = {"batch_size": 4, "num_beams": 3, "bos_token_id": 1, "eos_token_id": 2, "max_length": 5}
    wrong = {
        "num_return_sequences: expected at most": (ValueError, {"num_return_sequences": 4}),
        "num_groups: expected a divisor": (ValueError, {"num_groups": 2}),
        "preset: expected": (ValueError, {"preset": "t5"}),
        "early_stopping: expected one of True, False, 'never'": (ValueError, {"early_stopping": "always"}),
        "early_stopping: preset 'fairseq'": (ValueError, {"preset": "fairseq", "early_stopping": True}),
        "patience: expected": (ValueError, {"patience": 2.0}),
        "max_length: expected at least 1": (ValueError, {"max_length": 0}),
        "num_beams: expected an int": (TypeError, {"num_beams": 3.0}),
        "eos_token_id: expected tokens below V = 11": (ValueError, {"eos_token_id": 11}),
        "bad_words: expected sequences": (ValueError, {"bad_words": [[]]}),
        "prefix: expected int64, got torch.float32": (TypeError, {"prefix": torch.zeros(4, 2)}),
        "prompt: expected shape": (ValueError, {"prompt": torch.zeros(2, 2, dtype=torch.int64)}),
        "eos_token_id: preset 'fairseq'": (ValueError, {"preset": "fairseq", "eos_token_id": ()}),
        "impl: expected": (ValueError, {"impl": "gpu"}),
        # Tokens that are none.
        "eos_token_id: expected a token id, got NoneType; pass ()": (TypeError, {"eos_token_id": None}),
        "eos_token_id: expected a token id, got str": (TypeError, {"eos_token_id": "2"}),
        "eos_token_id: expected a token id, got float": (TypeError, {"eos_token_id": [2, 3.0]}),
        "eos_token_id: expected a token id, got bool": (TypeError, {"eos_token_id": True}),
        "eos_token_id: expected a token id >= 0, got -1": (ValueError, {"eos_token_id": torch.tensor([2, -1])}),
        "bos_token_id: expected a token id >= 0, got -1": (ValueError, {"bos_token_id": -1}),
        "bos_token_id: expected a token id, got list": (TypeError, {"bos_token_id": [1, 1, 1, 1]}),
        "bos_token_id: expected token ids >= 0, got -3": (ValueError, {"bos_token_id": torch.tensor([1, 1, -3, 1])}),
        "pad_token_id: expected a token id >= 0, got -100": (ValueError, {"pad_token_id": -100}),
        "pad_token_id: expected a token id, got float": (TypeError, {"pad_token_id": 0.0}),
        "forced_eos_token_id: expected a token id >= 0, got -2": (ValueError, {"forced_eos_token_id": -2}),
        "forced_eos_token_id: expected tokens below V = 11, got 12": (ValueError, {"forced_eos_token_id": 12}),
        "bad_words: expected a sequence of token ids for each word, got 4": (TypeError, {"bad_words": [4, 5]}),
        "bad_words: expected a sequence of token ids for each word, got 'the'": (TypeError, {"bad_words": ["the"]}),
        "bad_words: expected a sequence of words, got NoneType": (TypeError, {"bad_words": None}),
        "bad_words: expected a token id, got str": (TypeError, {"bad_words": [["the"]]}),
        "bad_words: expected a token id >= 0, got -4": (ValueError, {"bad_words": [[4], [5, -4]]}),
        "bad_words: expected tokens below V = 11, got 11": (ValueError, {"bad_words": [[4], [11, 5]]}),
        "prefix: expected tokens below V = 11, got 13": (ValueError, {"prefix": torch.tensor([[4], [13], [-1], [5]])}),
        "prefix: expected at most the 5 tokens": (ValueError, {"prefix": torch.full((4, 6), 3)}),
        "prefix: expected at most the 4 tokens": (
            ValueError,
            {"prefix": torch.full((4, 5), 3), "forced_eos_token_id": 2},
        ),
        # Numbers that no search can follow.
        "num_beams: expected at least 1, got 0": (ValueError, {"num_beams": 0}),
        "min_length: expected at least 0, got -1": (ValueError, {"min_length": -1}),
        "length_penalty: expected a finite number, got nan": (ValueError, {"length_penalty": float("nan")}),
        "length_penalty: expected a float, got NoneType": (TypeError, {"length_penalty": None}),
        "length_penalty: expected one by which float32 can divide 5 tokens": (ValueError, {"length_penalty": 56}),
        "length_penalty: .* got -1000; pass one nearer to 0": (ValueError, {"length_penalty": -1000}),
        "repetition_penalty: expected a finite number, got inf": (ValueError, {"repetition_penalty": float("inf")}),
        "repetition_penalty: expected a value above 0, got -1.0": (ValueError, {"repetition_penalty": -1.0}),
        "diversity_penalty: expected a finite number, got nan": (
            ValueError,
            {"num_groups": 3, "diversity_penalty": float("nan")},
        ),
        "diversity_penalty: expected 0 with one group, got 0.5": (ValueError, {"diversity_penalty": 0.5}),
        "patience: expected a finite number, got nan": (
            ValueError,
            {"early_stopping": True, "patience": float("nan")},
        ),
        "patience: expected a hypothesis or more of 3 beams": (
            ValueError,
            {"early_stopping": True, "patience": 0.1},
        ),
        "early_stopping: expected a bool, got int": (TypeError, {"early_stopping": 1}),
        "renormalize: expected a bool, got str": (TypeError, {"renormalize": "no"}),
        "reorder: expected a callable, got str": (TypeError, {"reorder": "rows"}),
        "device: expected one with data": (ValueError, {"device": "meta"}),
    }

    def model(tokens, state):
        return torch.zeros(len(tokens), 11), state

    return {words: (error, (model, None), good | options) for words, (error, options) in wrong.items()}


BEAM_SEARCH = Spec(
    {"loop": loop(2, 3, 3)},
    mmkernels.beam_search,
    bad_searches,
    memory={
        # Tokens, parents and scores of every step: 128 bytes for each beam and step.
        "a vocabulary": Memory(
            loop(8, 5, 30), 2000, lambda tensors, scratch: 128 * 30 * 40, lambda tensors: 4 * tensors[0][0].numel()
        )
    },
    differentiable=False,
    autocast=False,
    one_graph=False,  # the host asks after each step whether all items are done
    traced="num_groups: expected a divisor",
)
