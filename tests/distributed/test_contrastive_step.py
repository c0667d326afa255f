"""contrastive_step: the gradients of the joint batch, on one process and over ranks, in the memory of a part of it."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import mmkernels
from mmkernels.testing import peak_allocated
from tests.cpu_kernels import needs_library
from tests.distributed.spawn import results

ROWS, WIDTH = 48, 24


class Towers(nn.Module):
    """Two encoders with dropout, a scale and a bias, [] or, for FSDP2, [1]; `named` gives open_clip's mapping."""

    def __init__(self, hidden: int = 32, named: bool = False, scale_shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.Dropout(0.3), nn.Linear(hidden, 16)) for _ in "ab"
        )
        self.log_scale, self.bias = (nn.Parameter(torch.full(scale_shape, value)) for value in (2.0, -3.0))
        self.named, self.calls = named, 0

    def forward(self, images: Tensor, texts: Tensor) -> Any:
        self.calls += 1
        a, b = (F.normalize(tower(x), dim=1) for tower, x in zip(self.towers, (images, texts), strict=True))
        found = {"queries": a, "keys": b, "logit_scale": self.log_scale.exp(), "logit_bias": self.bias}
        return found if self.named else tuple(found.values())


def rows(count: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, WIDTH, generator=generator)
    return images, images.roll(1, 1) + 0.3 * torch.randn(count, WIDTH, generator=generator)


def towers(**options: Any) -> Towers:
    torch.manual_seed(1)
    return Towers(**options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def joint(model: Towers, batches: list[Any], loss: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """What contrastive_step replaces: the loss, the gradients, and the random state that is left behind."""
    found = [model(*batch) for batch in batches]
    images, texts, scales, biases = zip(*(x.values() if model.named else x for x in found), strict=True)
    value = loss(torch.cat(images), torch.cat(texts), scales[0], biases[0])
    value.backward()
    return value.detach(), gradients(model), torch.get_rng_state()


def info_nce(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return mmkernels.info_nce(queries, keys, scale) + 0.0 * bias.sum()


LOSSES = {"info_nce": info_nce, "siglip": mmkernels.siglip}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("count", [1, 2, 8])
def test_gradients_of_the_joint_batch(count, loss, autocast):
    batches = list(zip(*(x.chunk(count) for x in rows()), strict=True))
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    found = []
    for one_at_a_time in (False, True):
        model = towers(named=loss == "siglip")  # whose arguments have these names
        with context:
            if one_at_a_time:
                value = mmkernels.contrastive_step(model, iter(batches), LOSSES[loss])
                found.append((value, gradients(model), torch.get_rng_state()))
                assert model.calls == 2 * count - 1
            else:
                found.append(joint(model, batches, LOSSES[loss]))
    (expected, grads, state), (value, actual, state_after) = found
    assert not value.requires_grad
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    assert torch.equal(state, state_after)
    assert actual.keys() == grads.keys()
    assert actual["log_scale"].abs() > 1e-3
    for name, grad in grads.items():
        off = (actual[name] - grad).abs().max() / grad.abs().max().clamp_min(1e-6)
        assert off < (1e-2 if autocast else 1e-6), name


def test_a_loss_of_the_features_alone_uses_parameters_of_its_own():
    """A scale that the model does not return, and a head after the features, in front of the loss."""
    batches = list(zip(*(x.chunk(3) for x in rows()), strict=True))
    model, head = towers(), nn.Linear(16, 8)

    def loss(queries: Tensor, keys: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, str]:
        value = mmkernels.info_nce(head(queries), head(keys), model.log_scale.exp())
        return 8 * value, value.detach(), "as a GradScaler scales it"

    torch.manual_seed(2)
    total, value, text = mmkernels.contrastive_step(model, batches, loss)
    assert total == 8 * value
    assert text == "as a GradScaler scales it"
    actual = {**gradients(model), **{f"head.{name}": grad for name, grad in gradients(head).items()}}
    model.zero_grad()
    head.zero_grad()
    torch.manual_seed(2)
    _, expected, _ = joint(model, batches, lambda *features: loss(*features)[0])
    expected |= {f"head.{name}": grad for name, grad in gradients(head).items()}
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert (actual[name] - grad).abs().max() < 1e-6 * grad.abs().max(), name


def test_memory_is_that_of_one_micro_batch():
    """Activations of 128 rows are 1 MiB a tower; those of all 1,024 would be 8."""
    images, texts = rows(1024)
    model = towers(hidden=1024)
    parts = list(zip(images.split(128), texts.split(128), strict=True))
    for x in model.parameters():
        x.grad = torch.zeros_like(x)

    def one() -> None:
        joint(model, parts[:1], info_nce)

    def all_parts() -> None:
        mmkernels.contrastive_step(model, parts, info_nce)

    gradients(model)
    one_part, in_parts = (peak_allocated(step) for step in (one, all_parts))
    of_features = 1024 * 16 * 4
    # Both sides' features by micro-batch and joined, their gradients, and what info_nce takes.
    assert in_parts < one_part + 12 * of_features
    assert peak_allocated(lambda: joint(model, parts, info_nce)) > 4 * in_parts


def over_ranks(group: Any, rank: int, how: str) -> tuple[dict[str, Tensor], int, Tensor]:
    """The gradients, how often they met the other rank's, and the loss. Rank 0 has two micro-batches, rank 1 three
    (two under FSDP2)."""
    model = towers(scale_shape=(1,) if how == "FSDP2" else ())
    model.eval()  # no dropout: one process has no draws of two ranks
    images, texts = (x.split(ROWS // 2)[rank] for x in rows())
    batches = list(zip(*(x.chunk(2 + (rank if how != "FSDP2" else 0)) for x in (images, texts)), strict=True))
    meetings, of_sharded = [], CommDebugMode()
    wrapped: nn.Module
    if how == "FSDP2":
        for tower in model.towers:
            fully_shard(tower)
        wrapped = fully_shard(model)
    else:
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(
            None,
            lambda _, bucket: meetings.append(1) or allreduce_hook(group, bucket),  # type: ignore[func-returns-value]
        )

    def loss(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if how == "a scale of the loss":
            scale = model.log_scale.exp()
        value = mmkernels.info_nce(queries, keys, scale, process_group=group)
        return value + mmkernels.siglip(queries, keys, scale, bias, process_group=group)

    for _ in range(2):  # DDP finds at the next step what was left out of the last
        wrapped.zero_grad()
        meetings.clear()
        with of_sharded if how == "FSDP2" else contextlib.nullcontext():
            if how == "a function":
                value = mmkernels.contrastive_step(lambda *batch: wrapped(*batch), batches, loss, modules=[wrapped])
            else:
                value = mmkernels.contrastive_step(wrapped, batches, loss)
    if how == "FSDP2":
        reductions = [count for call, count in of_sharded.get_comm_counts().items() if "reduce_scatter" in str(call)]
        meetings += [1] * sum(reductions)
    grads = {name: getattr(x.grad, "full_tensor", x.grad.clone)() for name, x in model.named_parameters()}
    return grads, len(meetings), value


@needs_library
@pytest.mark.parametrize("how", ["DDP", "a function", "a scale of the loss", "FSDP2"])
def test_over_ranks(how):
    of_ranks = results((2,), over_ranks, how)
    model = towers(scale_shape=(1,) if how == "FSDP2" else ()).eval()
    value, expected, _ = joint(model, [rows()], lambda *features: info_nce(*features) + mmkernels.siglip(*features))
    torch.testing.assert_close(torch.stack([value for _, _, value in of_ranks]).mean(), value)
    for grads, meetings, _ in of_ranks:
        assert meetings == (3 if how == "FSDP2" else 1)  # FSDP2 reduces each tower, and the scale with the bias
        assert grads.keys() == expected.keys()
        for name, grad in expected.items():
            assert (grads[name] - grad).abs().max() < 2e-6 * grad.abs().max(), name


def test_wrong_calls_are_named():
    model, batches = towers(), [rows()]

    def step(model: Any = model, batches: Any = batches, loss: Any = info_nce) -> Any:
        return mmkernels.contrastive_step(model, batches, loss)

    with pytest.raises(ValueError, match="batches: expected at least one micro-batch"):
        step(batches=[])
    with pytest.raises(RuntimeError, match="gradients are off; call it outside of"), torch.no_grad():
        step()
    with pytest.raises(TypeError, match="model: expected a tensor, or a tuple or mapping of tensors, got str"):
        step(model=lambda *_: "features")
    with pytest.raises(ValueError, match="got 1 with and without rows; give each micro-batch two rows or more"):
        step(model=lambda a, _: (a, a[:, 0]), batches=[rows(3), rows(1)])
    with pytest.raises(TypeError, match=r"loss: expected a scalar tensor, or a tuple .* got dict; add up"):
        step(loss=lambda *_: {})
    with pytest.raises(ValueError, match=r"loss: expected one number, got shape \(48, 16\)"):
        step(loss=lambda queries, *_: queries)
    with pytest.raises(ValueError, match=r"loss: expected a number that depends on .* one without a gradient"):
        step(loss=lambda queries, *_: queries.detach().sum())
    with pytest.raises(ValueError, match="got several; return the sum of the losses"):
        step(loss=lambda queries, *_: (queries.sum(), queries.mean()))
