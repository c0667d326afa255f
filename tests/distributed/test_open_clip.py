"""ClipLoss and SigLipLoss over ranks beside open_clip's own classes, in the same processes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import mmkernels
from mmkernels.testing import features
from tests.cpu_kernels import needs_library
from tests.distributed.spawn import results

open_clip_loss = pytest.importorskip("open_clip.loss")
ROWS, SIZE = 24, 32


def after_ddp(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The loss, and the gradients as DDP's mean over ranks leaves them. A rank's features stand for its own towers, to
    whose gradient no other rank adds."""
    grads = [grad.clone() for grad in torch.autograd.grad(loss, leaves)]
    for grad in grads[2:]:
        dist.all_reduce(grad)
    return [loss.detach(), *(grad / dist.get_world_size() for grad in grads)]


def both(group: Any, rank: int, name: str, options: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    world = dist.get_world_size()
    images, texts = (features(world * ROWS, SIZE, seed=seed).split(ROWS)[rank] for seed in (1, 2))
    numbers = [torch.tensor(10.0), torch.tensor(-3.0)][: 2 if name == "SigLipLoss" else 1]
    found = []
    for module, more in ((open_clip_loss, {}), (mmkernels, {"group": group})):
        leaves = [x.clone().requires_grad_() for x in (images, texts, *numbers)]
        loss = getattr(module, name)(rank=rank, world_size=world, **options, **more)(*leaves)
        found.append(after_ddp(loss, leaves))
    return list(zip(*found, strict=True))


def compare(shape: tuple[int, ...], name: str, options: dict[str, Any]) -> None:
    for pairs in results(shape, both, name, options):
        for index, (theirs, ours) in enumerate(pairs):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-5, atol=1e-7, msg=lambda text, index=index: f"{index} {text}"
            )


@needs_library
@pytest.mark.parametrize("gather_with_grad", [False, True])
@pytest.mark.parametrize("local_loss", [False, True])
def test_clip_loss(local_loss, gather_with_grad):
    compare((3,), "ClipLoss", {"local_loss": local_loss, "gather_with_grad": gather_with_grad})


@needs_library
def test_clip_loss_on_a_mesh():
    compare((2, 2), "ClipLoss", {"local_loss": True, "gather_with_grad": True})


@needs_library
@pytest.mark.parametrize("dist_impl", ["bidir", "shift", "reduce", "gather"])
def test_siglip_loss(dist_impl):
    compare((3,), "SigLipLoss", {"dist_impl": dist_impl})


def other_sizes(group: Any, rank: int) -> str:
    with pytest.raises(ValueError, match="rank, world_size: expected") as error:
        mmkernels.ClipLoss(rank=rank, world_size=5)
    return str(error.value)


def test_the_sizes_are_those_of_the_group():
    first, second = results((2,), other_sizes)
    assert first.endswith("expected 0 and 2, those of the group, got 0 and 5")
    assert second.endswith("expected 1 and 2, those of the group, got 1 and 5")


def test_no_group_and_what_is_not_there_yet():
    with pytest.raises(ValueError, match="expected 1 without a process group, got 2"):
        mmkernels.ClipLoss(world_size=2)
    with pytest.raises(ValueError, match="expected 1 without a process group, got 2"):
        mmkernels.SigLipLoss(world_size=2)
    with pytest.raises(NotImplementedError, match="world_size: expected 1, got 2, as a teacher"):
        mmkernels.DistillClipLoss(world_size=2)
    with pytest.raises(NotImplementedError, match="use_horovod: expected False"):
        mmkernels.ClipLoss(use_horovod=True)
