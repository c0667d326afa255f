"""How a step of beam search is called, and what it refuses: the spec that tests/contract.py holds it to."""

import torch

import mmkernels
from tests.beam_search.cases import Case, of
from tests.contract import Call, Spec

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
        "impl: expected": (ValueError, (logits, scores), {"impl": "gpu"}),
    }


BEAM_SEARCH = Spec(
    "beam_search", CALLS, step, bad_inputs, differentiable=False, autocast=False, traced="logits: expected 6 rows"
)
