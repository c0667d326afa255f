"""Training over ranks is training in one process: the same losses, gradients and files for any number of ranks."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from models.clip.train import train_run as train_clip
from models.common.checkpoint import checkpoints, load_checkpoint, step_path
from models.common.runs import read_history
from models.common.schedule import TrainConfig
from models.data.config import DataConfig
from models.timesformer.data import VideoDataConfig
from models.timesformer.model import PRESETS
from models.timesformer.train import train_run as train_timesformer
from tests.distributed.spawn import results

# 3 ranks do not take the same number of rows each.
DATA = DataConfig(source="synthetic", stored_size=32, batch_size=32, variant_divisor=1)
VIDEOS = VideoDataConfig(size=16, num_frames=4, batch_size=8)
# Features of a fresh model lie side by side; centring them multiplies rounding, and at larger rates runs part.
CONFIG = TrainConfig(steps=20, lr=3e-6, warmup=2, ema=0.9, checkpoint_every=10)
RUNS = {
    "ddp": CONFIG,
    "accumulate": replace(CONFIG, steps=8, accumulate=3),
    "bf16": replace(CONFIG, steps=4, precision="bf16"),
    "timesformer": replace(CONFIG, lr=1e-3),
}
# The same, but each rank holds a part of the weights, and most have blocks that run again in the backward pass.
SHARDED = {
    f"fsdp {name}": replace(config, sharding="fsdp", checkpoint_activations=name != "ddp")
    for name, config in RUNS.items()
}


def train(root: Path, names: list[str]) -> None:
    """The runs of these names, one after the other, each in a folder of its own."""
    for name in names:
        config = (RUNS | SHARDED)[name]
        if name.endswith("timesformer"):
            train_timesformer(PRESETS["nano"], VIDEOS, config, root / name, cpu=True)
        else:
            train_clip("nano", DATA, config, root / name, cpu=True)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def train_rank(group: Any, rank: int, root: Path, names: list[str]) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"], "MASTER_ADDR": "localhost"}
    train(root, names)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    root = tmp_path_factory.mktemp("alone")
    train(root, list(RUNS))
    return root


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    root = tmp_path_factory.mktemp("together")
    results((2,), train_rank, root, [*RUNS, *SHARDED], seconds=120)
    return root


def column(folder: Path, name: str) -> torch.Tensor:
    return torch.tensor([row[name] for row in read_history(folder)], dtype=torch.float64)


def assert_same_run(found: Path, whole: Path, budget: float = 1e-5) -> None:
    for name, rtol in (("loss", budget), ("grad_norm", 200 * budget), ("lr", 0)):
        torch.testing.assert_close(
            column(found, name), column(whole, name), rtol=rtol, atol=0, msg=f"{name} {{}}".format
        )


@pytest.mark.parametrize("name", [*RUNS, *SHARDED])
def test_two_ranks_are_one_process(name, alone, together):
    assert_same_run(together / name, alone / name.removeprefix("fsdp "), 3e-3 if name.endswith("bf16") else 1e-5)


def test_the_temperature_of_sharded_bf16_is_exact(alone, together):
    scale = column(together / "fsdp bf16", "scale")
    assert scale[0] == column(alone / "bf16", "scale")[0]  # bfloat16 has 9.94 in the place of 10
    torch.testing.assert_close(scale, column(alone / "bf16", "scale"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["ddp", "fsdp ddp"])
def test_one_run_leaves_one_set_of_files(name, alone, together):
    assert {path.name for path in (together / name).iterdir()} == {path.name for path in (alone / "ddp").iterdir()}
    (ours, _), (theirs, _) = (load_checkpoint(step_path(root, 20)) for root in (together / name, alone / "ddp"))
    assert ours.keys() - theirs.keys() == {"rng/torch_of_ranks"}
    assert all(theirs[name].shape == ours[name].shape for name in theirs)
    first, second = ours["rng/torch_of_ranks"]
    assert torch.equal(first, ours["rng/torch"])
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("first", "then", "ranks"), [("fsdp ddp", "ddp", 1), ("fsdp ddp", "fsdp ddp", 3), ("ddp", "fsdp ddp", 3)]
)
def test_a_run_goes_on_with_another_number_of_ranks(first, then, ranks, tmp_path, alone, together):
    """A checkpoint of two ranks, resumed by one or three, who do not have equal shares of a batch."""
    folder = tmp_path / then
    shutil.copytree(together / first, folder)
    step_path(folder, 20).unlink()
    if ranks == 1:
        train(tmp_path, [then])
    else:
        results((ranks,), train_rank, tmp_path, [then])
    assert checkpoints(folder)[0] == step_path(folder, 20)
    assert_same_run(folder, alone / "ddp")
