"""A right call of any op with one argument made wrong: a TypeError or a ValueError that names an argument."""

import re
from collections.abc import Callable
from typing import Any

import torch

import mmkernels
from mmkernels.testing import features
from tests.fuzz.draw import Draw

Wrong = dict[str, Callable[[Any], Any]]


def other_dtype(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float16 if x.dtype != torch.float16 else torch.float32)


TENSOR: Wrong = {
    "a list": lambda x: x.tolist(),
    "None": lambda x: None,
    "a word": lambda x: "x",
    "more dimensions": lambda x: x[None],
    "fewer dimensions": lambda x: x[0],
    "complex": lambda x: x.to(torch.complex64),
    "bool": lambda x: x > 0,
    "int64": lambda x: x.long(),
    "sparse": lambda x: x.to_sparse(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
}
# One of two tensors that must agree.
PAIR: Wrong = TENSOR | {
    "another dtype": other_dtype,
    "meta": lambda x: x.to("meta"),
    "fewer features": lambda x: x[:, :-1],
    "more features": lambda x: torch.cat([x, x], 1),
    "no row": lambda x: x[:0],
}
NUMBER: Wrong = {
    "a word": lambda x: "3",
    "None": lambda x: None,
    "a list": lambda x: [1.0],
    "complex": lambda x: 1j,
    "two": lambda x: torch.ones(2),
    "none at all": lambda x: torch.ones(0),
    "an integer tensor": lambda x: torch.tensor(3),
    "a complex tensor": lambda x: torch.tensor(1j),
    "meta": lambda x: torch.ones((), device="meta"),
}
INDICES: Wrong = {
    "a list": lambda x: x.tolist(),
    "int32": lambda x: x.int(),
    "float": lambda x: x.float(),
    "one less": lambda x: x[:-1],
    "one more": lambda x: torch.cat([x, x[:1]]),
    "more dimensions": lambda x: x[None],
    "meta": lambda x: x.to("meta"),
}
TARGETS: Wrong = INDICES | {
    "below 0": lambda x: torch.cat([x[:-1], torch.tensor([-1])]),
    "past the last": lambda x: torch.cat([x[:-1], torch.tensor([10**6])]),
    "the least": lambda x: torch.cat([x[:-1], torch.tensor([-(2**63)])]),
}
ROWS: Wrong = {
    "a list": lambda x: x.tolist(),
    "int64": lambda x: x.long(),
    "one less": lambda x: x[:-1],
    "more dimensions": lambda x: x[None],
    "meta": lambda x: x.to("meta"),
    "complex": lambda x: x.to(torch.complex64),
}
CHOICE: Wrong = {
    "a word": lambda x: "avg",
    "None": lambda x: None,
    "a number": lambda x: 3,
    "a list": lambda x: ["mean"],
}
SHARE: Wrong = {
    "NaN": lambda x: float("nan"),
    "below 0": lambda x: -0.1,
    "above 1": lambda x: 1.5,
    "None": lambda x: None,
    "a word": lambda x: "0.1",
    "a tensor": lambda x: torch.tensor(0.1),
    "complex": lambda x: 0.1j,
}
NOT_BELOW_0: Wrong = {name: SHARE[name] for name in ("NaN", "below 0", "None", "a word", "a tensor", "complex")} | {
    "infinite": lambda x: float("inf")
}
COUNT: Wrong = {
    "0": lambda x: 0,
    "below 0": lambda x: -3,
    "a float": lambda x: float(x),
    "a bool": lambda x: True,
    "None": lambda x: None,
    "a word": lambda x: "2",
    "a tensor": lambda x: torch.tensor(x),
}
MASK: Wrong = {
    "a list": lambda x: x.tolist(),
    "float": lambda x: x.float(),
    "int64": lambda x: x.long(),
    "another shape": lambda x: torch.cat([x, x]),
    "more dimensions": lambda x: x[None],
    "meta": lambda x: x.to("meta"),
}
FLAG: Wrong = {"a word": lambda x: "yes", "None": lambda x: None, "a number": lambda x: 2}


def of_pairs(draw: Draw, dtype: torch.dtype) -> dict[str, tuple[Any, Wrong]]:
    n = draw.size("N", 9, least=2)
    m, size = n + draw.random.randint(1, 4), draw.size("D", 9)
    draw.said |= {"M": m}
    return {"queries": (features(n, size, dtype, seed=1), PAIR), "keys": (features(m, size, dtype, seed=2), PAIR)}


def arguments(draw: Draw, op: str) -> dict[str, tuple[Any, Wrong]]:
    """The arguments of a right call, and how each may be wrong."""
    dtype = draw.dtype()
    some = of_pairs(draw, dtype)
    (n, size), m = some["queries"][0].shape, len(some["keys"][0])
    impl: tuple[str, Wrong] = draw.pick("impl", ["auto", "cpu", "reference"]), CHOICE
    common = {"reduction": ("mean", CHOICE), "impl": impl}
    weights = {"weights": (torch.ones(n), ROWS)}
    targets = torch.arange(n).flip(0)
    if op == "info_nce":
        groups = {"query_groups": (torch.arange(n) % 2, INDICES), "key_groups": (torch.arange(m) % 2, INDICES)}
        some |= {"logit_scale": (5.0, NUMBER), "label_smoothing": (0.1, SHARE), "targets": (targets, TARGETS)}
        some |= {"symmetric": (True, FLAG)}
        more = {
            "key_queue": (features(3, size, dtype, seed=3), PAIR),
            "query_queue": (features(2, size, dtype, seed=3), PAIR),
        }
        for name in ("None", "no row"):  # which it may be
            more = {
                queue: (x, {what: make for what, make in wrong.items() if what != name})
                for queue, (x, wrong) in more.items()
            }
        return some | common | weights | draw.pick("with", [{}, groups, more])
    if op == "distillation":
        some["keys"] = (some["keys"][0][:n], PAIR)
        teacher = {f"teacher_{name}": (features(n, 4, dtype, seed=4), PAIR) for name in ("queries", "keys")}
        some |= teacher | {"logit_scale": (5.0, NUMBER), "teacher_scale": (5.0, NUMBER), "symmetric": (True, FLAG)}
        return some | common | weights
    if op == "siglip":
        return some | {"logit_scale": (5.0, NUMBER), "logit_bias": (-5.0, NUMBER)} | common
    if op == "triplet":
        options = {"margin": (0.2, NOT_BELOW_0), "mining": ("all", CHOICE), "symmetric": (True, FLAG)}
        return some | options | common
    if op == "linear_cross_entropy":
        given = {"hidden": some["queries"], "weight": some["keys"], "bias": (torch.ones(m), ROWS)}
        ignore: Wrong = {"None": lambda x: None, "a float": lambda x: 1.0, "a word": lambda x: "1"}
        options = {"targets": (targets, TARGETS), "ignore_index": (-100, ignore), "label_smoothing": (0.1, SHARE)}
        return given | options | common
    if op == "retrieval_ranks":
        return some | {"targets": (targets, TARGETS), "impl": impl}
    if op == "retrieval_topk":
        return some | {"k": (2, COUNT | {"too many": lambda x: m + 1}), "impl": impl}
    if op in ("divided_attention", "divided_attention_maps"):
        frames, heads = draw.size("frames", 4, least=2), draw.size("heads", 3, least=2)
        qkv = features(2 * (1 + 3 * frames), 3 * heads * 5, dtype).view(2, 1 + 3 * frames, -1)
        given = {
            "qkv": (
                qkv,
                TENSOR
                | {
                    "a token more": lambda x: torch.cat([x, x[:, :1]], 1),
                    "a feature less": lambda x: x[..., 1:],
                    "no feature": lambda x: x[..., :0],
                },
            ),
            "num_frames": (frames, COUNT),
            "num_heads": (heads, COUNT),
            "axis": ("space", CHOICE),
            "cls_mode": ("timesformer", CHOICE),
            "token_order": ("nt", CHOICE),
            "scale": (0.5, {name: NUMBER[name] for name in ("a word", "a list", "complex", "two")}),
            "frame_mask": (torch.ones(2, frames, dtype=torch.bool), MASK),
        }
        if op == "divided_attention_maps":
            return given | {
                "tokens": (
                    torch.tensor([0, 2]),
                    {name: TARGETS[name] for name in TARGETS if not name.startswith("one ")},
                )
            }
        seed: Wrong = {
            "a word": lambda x: "1",
            "a float": lambda x: 1.5,
            "too many bits": lambda x: 2**63,
            "float": lambda x: torch.ones(1),
            "two": lambda x: torch.tensor([1, 2]),
        }
        given |= {"dropout_p": (0.1, SHARE | {"1": lambda x: 1.0}), "dropout_seed": (1, seed)}
        return given | {"return_lse": (False, FLAG), "impl": impl}
    B, K, vocabulary = 2, draw.size("K", 4, least=2), draw.size("V", 9, least=3)
    logits = features(B * K, vocabulary, dtype)
    return {
        "logits": (logits, TENSOR | {"meta": PAIR["meta"], "no row": PAIR["no row"], "no token": lambda x: x[:, :0]}),
        "scores": (
            torch.zeros(B, K),
            TENSOR
            | {
                "meta": PAIR["meta"],
                "no beam": lambda x: x[:, :0],
                "float16": lambda x: x.half(),
                "float64": lambda x: x.double(),
            },
        ),
        "valid": (torch.ones(B, K, dtype=torch.bool), MASK),
        "forbidden": (torch.zeros(vocabulary, dtype=torch.bool), MASK),
        "num_candidates": (K, {name: make for name, make in COUNT.items() if name != "None"}),
        "normalize": (True, FLAG),
        "mask_first": (False, FLAG),
        "impl": impl,
    }


OPS = (
    "info_nce", "distillation", "siglip", "triplet", "linear_cross_entropy", "retrieval_ranks", "retrieval_topk",
    "divided_attention", "divided_attention_maps", "beam_search_step",
)  # fmt: skip


def wrong_arguments(draw: Draw) -> None:
    op = draw.pick("op", OPS)
    right = arguments(draw, op)
    call, given = getattr(mmkernels, op), {name: value for name, (value, _) in right.items()}
    call(**given)
    name = draw.pick("argument", list(right))
    value, ways = right[name]
    wrong = ways[draw.pick("made", list(ways))](value)
    refusal = ""
    try:
        call(**given | {name: wrong})
    except (TypeError, ValueError) as error:
        refusal = str(error)
    assert refusal, f"{name} was taken"
    said = re.match(r"(\w+(?:, \w+)*): ", refusal)
    assert said, f"names no argument: {refusal}"
    assert set(said[1].split(", ")) <= set(right) | {"targets"}, f"names something else: {refusal}"
