"""siglip over ranks: the numbers of the joint batch, and the same error on all ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mmkernels
from tests.cpu_kernels import needs_library
from tests.distributed.spawn import results
from tests.distributed.test_info_nce import DTYPES, SHAPES, Joint
from tests.siglip.cases import assert_results, run, run_eager

REDUCTIONS = ("none", "mean", "sum")


def call(group: Any, rank: int, dtype: torch.dtype, reduction: str, impl: str) -> tuple[Tensor, ...]:
    queries, keys, _, weights = Joint(torch.distributed.get_world_size(), dtype).of_rank(rank)
    number = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [queries.clone().requires_grad_(), keys.clone().requires_grad_()]
    leaves += [torch.tensor(value, dtype=number, requires_grad=True) for value in (10.0, -3.0)]
    loss = mmkernels.siglip(*leaves, reduction=reduction, process_group=group, impl=impl)
    total = (loss * weights).sum() if reduction == "none" else 0.75 * loss
    return loss.detach(), *torch.autograd.grad(total, leaves)


def every_case(group: Any, rank: int, dtypes: list[torch.dtype], impl: str) -> list[tuple[Tensor, ...]]:
    return [call(group, rank, dtype, reduction, impl) for dtype in dtypes for reduction in REDUCTIONS]


def rotated(joint: Joint) -> Tensor:
    """The keys of the joint batch with the matches in front, where one process has them."""
    rest = torch.ones(len(joint.keys), dtype=torch.bool)
    rest[joint.targets] = False
    return torch.cat([joint.targets, rest.nonzero()[:, 0]])


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_of_the_joint_batch(shape, monkeypatch):
    of_ranks = results(shape, every_case, DTYPES, "cpu")
    monkeypatch.setattr("tests.siglip.cases.row_weights", lambda rows: torch.linspace(0.5, 1.5, rows))
    found = iter(zip(*of_ranks, strict=True))
    for dtype in DTYPES:
        joint = Joint(len(of_ranks), dtype)
        order = rotated(joint)
        inputs = joint.queries, joint.keys[order], 10.0, -3.0
        for reduction in REDUCTIONS:
            loss, queries, keys, scale, bias = zip(*next(found), strict=True)
            share = len(of_ranks) if reduction == "mean" else 1  # DDP's mean over ranks
            actual = [
                torch.cat(loss) if reduction == "none" else torch.stack(loss).sum() / share,
                torch.cat(queries) / share,
                torch.cat(keys)[order] / share,
                torch.stack(scale).sum() / share,
                torch.stack(bias).sum() / share,
            ]
            exact = run(inputs[0].double(), inputs[1].double(), *inputs[2:], "reference", reduction)
            eager = run_eager(*inputs, reduction)
            assert_results(tuple(actual), eager, exact, *inputs, reduction)


def test_the_reference_is_that_of_one_process(monkeypatch):
    of_ranks = results((3,), every_case, [torch.float64], "reference")
    monkeypatch.setattr("tests.siglip.cases.row_weights", lambda rows: torch.linspace(0.5, 1.5, rows))
    joint = Joint(3, torch.float64)
    order = rotated(joint)
    losses, queries, keys, *_ = zip(*next(iter(zip(*of_ranks, strict=True))), strict=True)
    exact = run(joint.queries, joint.keys[order], 10.0, -3.0, "reference")
    for a, b in zip((torch.cat(losses), torch.cat(queries), torch.cat(keys)[order]), exact, strict=False):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def wrong(group: Any, rank: int) -> list[str]:
    queries, keys = torch.ones(4, 8, requires_grad=True), torch.ones(6, 8, requires_grad=True)
    texts = []
    with pytest.raises(ValueError, match="keys: expected D = 8") as error:
        mmkernels.siglip(queries, keys[:, :5] if rank else keys, 10.0, process_group=group)
    texts.append(str(error.value))
    with pytest.raises(ValueError, match="reduction == 'none' to be the same") as error:
        mmkernels.siglip(queries, keys, 10.0, process_group=group, reduction="none" if rank else "sum")
    texts.append(str(error.value))
    loss = mmkernels.siglip(queries, keys, 10.0, process_group=group)
    with pytest.raises(ValueError, match="the gradient that reaches siglip's loss to be the same") as error:
        (loss * (1 + rank)).backward()
    texts.append(str(error.value))
    return texts


@needs_library
def test_an_error_is_raised_on_all_ranks():
    first, second = results((2,), wrong)
    assert first[0].startswith("rank 1: ")
    assert first[1:] == second[1:]
