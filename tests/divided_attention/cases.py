"""The cases that every implementation of divided_attention is held to, and the two oracles beside it."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mmkernels
from mmkernels.divided_attention.layout import AXES, CLS_MODES, TOKEN_ORDERS
from mmkernels.divided_attention.reference import philox
from mmkernels.testing import assert_within_budget
from tests.devices import Device, on_device
from tests.sums import sums_as_in

SEED = 0x1234_5678_9ABC_DEF0  # both halves of the generator's key are used


@dataclass(frozen=True)
class Case:
    positions: int
    frames: int
    axis: str
    cls_mode: str = "timesformer"
    token_order: str = "nt"
    batch: int = 2
    heads: int = 2
    head: int = 16
    mask: str = ""  # "ragged": clips end early; "holes": any frame may be absent; "empty": a clip has no frame at all
    scale: float | None = None
    dropout_p: float = 0.0
    amplitude: float = 1.0  # of queries and keys
    regime: str = ""

    def __str__(self) -> str:
        options = [self.axis, self.cls_mode, self.token_order, self.mask, self.dropout_p and "dropout"]
        return "-".join([self.regime or "plain", f"{self.positions}x{self.frames}x{self.head}", *filter(None, options)])

    @property
    def tokens(self) -> int:
        return (self.cls_mode != "none") + self.positions * self.frames

    @property
    def effective_scale(self) -> float:
        return self.head**-0.5 if self.scale is None else self.scale

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the call beside qkv and the mask."""
        return {
            "num_frames": self.frames,
            "num_heads": self.heads,
            "axis": self.axis,
            "cls_mode": self.cls_mode,
            "token_order": self.token_order,
            "scale": self.scale,
        }

    def inputs(self, dtype: torch.dtype) -> Tensor:
        """[B, L, 3 C]: normal values, the queries and keys times the amplitude."""
        generator = torch.Generator().manual_seed(self.positions * 1000 + self.frames)
        width = self.heads * self.head
        qkv = torch.randn(self.batch, self.tokens, 3 * width, generator=generator, dtype=torch.float64)
        qkv[..., : 2 * width] *= self.amplitude
        return qkv.to(dtype)

    def frame_mask(self) -> Tensor | None:
        if not self.mask:
            return None
        frames, clips = torch.arange(self.frames), torch.arange(self.batch)[:, None]
        if self.mask == "ragged":
            return frames < (self.frames - clips * 2).clamp(min=1)
        if self.mask == "holes":
            return (frames * 3 + clips * 5) % 4 != 0
        return (frames >= 0) & (clips != 1)


def _cases() -> list[Case]:
    cases = []
    for axis, mode, order in itertools.product(AXES, CLS_MODES, TOKEN_ORDERS):
        cases += [Case(5, 3, axis, mode, order), Case(6, 4, axis, mode, order, mask="ragged", regime="masked")]
    for axis, mode in itertools.product(AXES, CLS_MODES):
        cases += [
            Case(3, 5, axis, mode, mask="holes", regime="frames absent in the middle"),
            Case(4, 3, axis, mode, "tn", mask="empty", regime="a clip without a frame"),
            Case(4, 9, axis, mode, dropout_p=0.3, regime="dropout"),
            Case(1, 1, axis, mode, regime="one patch"),
            Case(1, 6, axis, mode, regime="one position"),
            Case(6, 1, axis, mode, "tn", regime="one frame"),
        ]
    # The length of a sequence: vectors and tiles, one less and one more, with the class token and without it.
    for length in (2, 7, 8, 9, 15, 16, 17, 31, 32, 33):
        cases += [
            Case(3, length, "time", regime="length"),
            Case(length, 2, "space", regime="length"),
            Case(length, 2, "space", "none", "tn", regime="length"),
        ]
    cases += [Case(3, length, "time", "paper", "tn", regime="length") for length in (7, 8, 15, 16)]
    cases += [Case(2, length, "time", "global_cls", regime="length") for length in (8, 16, 31)]
    # The head size, with an axis of short sequences and one of long ones.
    for head in (1, 3, 8, 15, 17, 24, 32, 40, 64, 72, 80, 96, 128):
        cases += [
            Case(3, 4, "time", head=head, regime="head size"),
            Case(18, 2, "space", head=head, regime="head size"),
        ]
    cases += [Case(19, 2, "space", heads=1, head=head, regime="largest head") for head in (200, 256)]
    cases += [
        Case(3, 8, "time", heads=1, regime="one head"),
        Case(3, 8, "time", heads=3, head=64, regime="odd heads"),
        Case(3, 4, "time", heads=5, head=16, regime="odd heads"),
        Case(196, 2, "space", heads=2, head=64, batch=1, regime="197 keys"),
        Case(40, 3, "space", scale=0.0, regime="scale 0"),
        Case(40, 3, "space", scale=-0.5, regime="negative scale"),
        Case(4, 8, "time", scale=0.0, regime="scale 0"),
        Case(4, 8, "time", scale=-0.5, regime="negative scale"),
        Case(40, 3, "space", amplitude=5.0, regime="sharp"),
        Case(4, 8, "time", amplitude=5.0, regime="sharp"),
        Case(20, 5, "joint", "global_cls", mask="holes", dropout_p=0.2, regime="joint, all at once"),
        Case(20, 5, "space", "paper", "tn", mask="holes", dropout_p=0.2, regime="all at once"),
        Case(20, 5, "time", "global_cls", "tn", mask="holes", dropout_p=0.2, regime="all at once"),
    ]
    return cases


CASES = _cases()


def run(qkv: Tensor, case: Case, impl: str, device: Device = "cpu") -> tuple[Tensor, ...]:
    """Output, log-sum-exps and the gradient to qkv, under weights that differ from entry to entry."""
    qkv = qkv.detach().requires_grad_()
    out, lse = on_device(mmkernels.divided_attention, device)(
        qkv, frame_mask=case.frame_mask(), dropout_p=case.dropout_p, dropout_seed=SEED, return_lse=True, impl=impl,
        **case.options,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out, qkv, weights_of(out))
    return out.detach(), lse, grad


def weights_of(out: Tensor) -> Tensor:
    """The gradient that arrives at the output: normal values, the same at any precision but for their rounding."""
    generator = torch.Generator().manual_seed(out.shape[1])
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)


def visible_rows(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row per query, the class token's first: its token [R], its sequence [R], who attends to whom [B, R, L], and
    the weights [B, L, R] with which rows make up the output tokens. Written from the definition, pair by pair."""
    has_cls = case.cls_mode != "none"
    where = {}  # token -> (position, frame)
    for n, t in itertools.product(range(case.positions), range(case.frames)):
        where[has_cls + (n * case.frames + t if case.token_order == "nt" else t * case.positions + n)] = (n, t)
    sequence_of = {token: {"time": n, "space": t, "joint": 0}[case.axis] for token, (n, t) in where.items()}
    sequences = sorted(set(sequence_of.values()))
    in_time = case.axis == "time" and case.cls_mode == "timesformer"
    cls_is_global = case.axis == "joint" or case.cls_mode == "global_cls"
    rows = []  # (token, sequence, the tokens it may attend to)
    if has_cls and not in_time:
        if cls_is_global:
            rows.append((0, 0, {0, *where}))
        else:
            rows += [(0, s, {0, *(k for k in where if sequence_of[k] == s)}) for s in sequences]
    for token in sorted(where):
        keys = {k for k in where if sequence_of[k] == sequence_of[token]}
        rows.append((token, sequence_of[token], keys | ({0} if has_cls and not in_time else set())))

    mask = case.frame_mask()
    visible = torch.zeros(case.batch, len(rows), case.tokens, dtype=torch.bool)
    weights = torch.zeros(case.batch, case.tokens, len(rows), dtype=torch.float64)
    for b in range(case.batch):
        real = {k for k, (_, t) in where.items() if mask is None or mask[b, t]} | ({0} if has_cls else set())
        for r, (token, _, keys) in enumerate(rows):
            # A sequence without a frame does not count for the class token's mean.
            if token in real and (token != 0 or not has_cls or cls_is_global or len(keys & real) > 1):
                visible[b, r, sorted(keys & real)] = True
                weights[b, token, r] = 1
    weights /= weights.sum(2, keepdim=True).clamp(min=1)
    return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows]), visible, weights


def run_eager(qkv: Tensor, case: Case) -> tuple[Tensor, ...]:
    """As `run`, but written anew: one dense mask of the pairs that attend, everything in the precision of qkv."""
    qkv = qkv.detach().requires_grad_()
    q, k, v = qkv.unflatten(-1, (3, case.heads, case.head)).permute(2, 0, 3, 1, 4)
    tokens, sequences, visible, weights = visible_rows(case)
    hidden = ~visible[:, None]
    nothing = hidden.all(-1, keepdim=True)
    scores = (case.effective_scale * (q[:, :, tokens] @ k.transpose(-1, -2))).masked_fill(hidden, float("-inf"))
    p = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    if case.dropout_p > 0:
        heads = torch.arange(case.batch * case.heads).view(case.batch, case.heads, 1, 1)
        counter = [torch.arange(case.tokens), tokens[:, None], heads, sequences[:, None]]
        kept = philox(torch.tensor([SEED]), counter) >= int(case.dropout_p * 2**32)
        p = torch.where(kept, p / (1 - case.dropout_p), 0.0)
    out = (weights[:, None].to(p.dtype) @ (p @ v)).transpose(1, 2).flatten(2)
    (grad,) = torch.autograd.grad(out, qkv, weights_of(out))
    return out.detach(), scores.detach().float().logsumexp(-1), grad


def check_case(case: Case, dtype: torch.dtype, impl: str, device: Device = "cpu") -> tuple[Tensor, ...]:
    """Hold the results on that device to their budgets, and return them."""
    qkv = case.inputs(dtype)
    with sums_as_in(impl):
        exact, eager = run(qkv.double(), case, "reference"), run_eager(qkv, case)
    actual = run(qkv, case, impl, device)
    assert_results(actual, eager, exact, qkv, case)
    return actual


def assert_results(
    actual: tuple[Tensor, ...],
    eager: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    qkv: Tensor,
    case: Case,
    terms: Mapping[str, float] | None = None,
) -> None:
    """Each within its budget.

    A score is a sum of products, and the gradients to queries and keys are differences of such sums: their size sets
    the band. They are accumulated in float32 whatever the inputs, so it is a band of float32. ``terms`` are sizes for
    cases for which these do not hold.
    """
    q, k, v = (part.unflatten(-1, (case.heads, case.head)).double() for part in qkv.chunk(3, -1))
    grad_out = weights_of(exact[0]).unflatten(-1, (case.heads, case.head))
    sums = 2.0**-24 / {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[qkv.dtype]

    def longest(x: Tensor) -> float:
        return x.norm(dim=-1).max().item()

    products = abs(case.effective_scale) * longest(grad_out) * longest(v) * sums
    infinite = exact[1] == float("-inf")
    assert torch.equal(actual[1] == float("-inf"), infinite), "lse: -inf for other rows"
    finite = [x[1].masked_fill(infinite, 0.0) for x in (actual, eager, exact)]
    sizes = {
        "out": 0.0,
        "lse": abs(case.effective_scale) * longest(q) * longest(k) * sums,
        "grad_q": products * k.abs().max().item(),
        "grad_k": products * q.abs().max().item(),
        "grad_v": 0.0,
    } | dict(terms or {})
    gradients = zip(*(x[2].chunk(3, -1) for x in (actual, eager, exact)), strict=True)
    results = [[x[0] for x in (actual, eager, exact)], finite, *gradients]
    for (name, size), parts in zip(sizes.items(), results, strict=True):
        assert_within_budget(*parts, dtype=qkv.dtype, terms=size, name=name)
