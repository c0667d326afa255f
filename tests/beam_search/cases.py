"""The cases of the step of beam search, for every implementation: parity is equality of all bits."""

import dataclasses

import torch

import mmkernels
from tests.devices import on_device

INF = torch.inf


@dataclasses.dataclass(frozen=True)
class Case:
    B: int
    K: int
    V: int
    kind: str = "normal"
    candidates: int | None = None
    options: tuple = ()

    def __str__(self):
        return "-".join(map(str, (self.B, self.K, self.V, self.kind, self.candidates, *dict(self.options))))

    def inputs(self, dtype):
        g = torch.Generator().manual_seed(self.B * 1000 + self.K * 100 + self.V)
        B, K, V = self.B, self.K, self.V
        logits = torch.randn(B * K, V, generator=g) * 4
        scores = -torch.rand(B, K, generator=g) * 10
        if self.kind == "ascending":
            logits = torch.linspace(-20, 20, V).expand(B * K, V).clone()
        elif self.kind == "descending":
            logits = torch.linspace(20, -20, V).expand(B * K, V).clone()
        elif self.kind == "equal":
            logits, scores = torch.ones(B * K, V), torch.zeros(B, K)
        elif self.kind == "ties":  # few values, all beams alike
            logits = torch.randint(-2, 3, (V,), generator=g).float().expand(B * K, V).clone()
            scores = torch.randint(-1, 1, (B, K), generator=g).float()
        elif self.kind == "near":  # different logits that round to one score
            logits = torch.randint(0, 4, (B * K, V), generator=g) * 2.0**-20
            scores = torch.full((B, K), -1000.0)
        elif self.kind == "nothing":
            logits = torch.full((B * K, V), -INF)
        elif self.kind == "few":  # most of each row is -inf
            logits[torch.rand(B * K, V, generator=g) < 0.97] = -INF
        elif self.kind == "comb":  # the best are equal and lie a power of two apart
            logits = torch.full((B * K, V), -1.0)
            logits[:, 7::128] = 3.0
        elif self.kind == "large":
            logits = logits * 1e4
        elif self.kind == "nan":
            logits[::3, V // 2] = torch.nan
        elif self.kind == "infinite":
            logits[::3, V - 1] = INF
        elif self.kind == "nan and nothing":
            logits = torch.full((B * K, V), -INF)
            logits[0, 0] = torch.nan
        elif self.kind == "nan score":
            scores[0, K - 1] = torch.nan
        elif self.kind == "infinite score":
            scores[0, K - 1] = INF
        elif self.kind == "no score":  # all that follows scores -inf, and is there
            scores[0, 0], scores[1] = -INF, -INF
        elif self.kind == "every kind":  # each poisons its item; the last is not poisoned
            logits[0, V - 1] = -torch.tensor(torch.nan)  # with its sign
            logits[K] = -INF
            logits[K, 0] = INF
            logits[2 * K - 1, : V // 2] = torch.nan
            logits[2 * K :, ::2] = -INF
        elif self.kind == "far apart":  # the lower logits and some sums pass float32's range
            logits, scores = 3e38 * logits.sign(), 3e38 * (scores + 5).sign()
        options = dict(self.options)
        if options.get("valid") == "some":
            options["valid"] = torch.rand(B, K, generator=g) < 0.6
        if options.get("forbidden") == "tokens":
            options["forbidden"] = torch.rand(V, generator=g) < 0.5
        if options.get("forbidden") == "rows":
            options["forbidden"] = torch.rand(B * K, V, generator=g) < 0.9
        if self.kind == "nan where forbidden":
            logits[options["forbidden"].expand(B * K, V)] = torch.nan
        if self.kind == "infinite where forbidden":
            logits[options["forbidden"].expand(B * K, V)] = INF
        if self.kind == "nan in absent beams":
            logits[~options["valid"].flatten()], scores[~options["valid"]] = torch.nan, INF
        return logits.to(dtype), scores, options | {"num_candidates": self.candidates}


def of(**options):
    return tuple(options.items())


# What NaN and infinities mean.
NOT_FINITE = [
    *(
        Case(3, 4, V, kind)
        for kind in (
            "nothing", "nan", "infinite", "nan and nothing", "nan score", "infinite score", "no score", "every kind",
            "far apart",
        )
        for V in (9, 700)
    ),
    *(
        Case(3, 4, 300, kind, options=of(normalize=False))
        for kind in ("nan", "infinite", "infinite score", "no score", "every kind", "far apart")
    ),
    *(
        Case(3, 4, 300, kind, options=of(forbidden=forbidden, **options))
        for kind in ("nan where forbidden", "infinite where forbidden")
        for forbidden in ("tokens", "rows")
        for options in ({}, {"mask_first": True}, {"normalize": False})
    ),
    Case(4, 3, 300, "nan in absent beams", options=of(valid="some")),
    Case(4, 3, 300, "nan in absent beams", options=of(valid="some", normalize=False)),
]  # fmt: skip
CASES = [
    *NOT_FINITE,
    *(Case(3, 4, V) for V in (1, 2, 3, 15, 16, 17, 255, 256, 257, 1000, 5003)),
    *(Case(2, K, 300) for K in (1, 2, 7, 300)),
    Case(0, 3, 50),
    Case(1, 1, 1, candidates=9),
    Case(2, 5, 3, candidates=40),
    Case(2, 6, 40000),
    Case(2, 2, 300, candidates=1),
    Case(1, 2, 1500, "comb"),
    *(
        Case(3, 4, V, kind)
        for kind in (
            "ascending", "descending", "equal", "ties", "near", "few", "large",
        )
        for V in (9, 700)
    ),
    *(
        Case(4, 3, 530, kind, options=of(**options))
        for kind in ("normal", "ties", "nan")
        for options in (
            {"valid": "some"},
            {"forbidden": "tokens"},
            {"forbidden": "tokens", "mask_first": True},
            {"forbidden": "rows", "valid": "some"},
            {"forbidden": "rows", "mask_first": True},
            {"normalize": False},
            {"normalize": False, "valid": "some"},
            {"normalize": False, "forbidden": "rows"},
        )
    ),
]  # fmt: skip


def assert_same(actual, expected):
    for name, a, e in zip(expected._fields, actual, expected, strict=True):
        assert a.dtype == e.dtype, name
        assert torch.equal(a, e), f"{name}: {a} is not {e}"


def check_case(case, dtype, impl, device="cpu", step=mmkernels.beam_search_step):
    """Hold the result of the step on that device to the bits of the reference, and return it."""
    logits, scores, options = case.inputs(dtype)
    expected = mmkernels.beam_search_step(logits, scores, **options, impl="reference")
    actual = on_device(step, device)(logits, scores, **options, impl=impl)
    assert_same(actual, expected)
    return actual
