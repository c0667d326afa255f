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


def train(root: Path, names: list[str]) -> None:
    """The runs of these names, one after the other, each in a folder of its own."""
    for name in names:
        if name == "timesformer":
            train_timesformer(PRESETS["nano"], VIDEOS, RUNS[name], root / name, cpu=True)
        else:
            train_clip("nano", DATA, RUNS[name], root / name, cpu=True)
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
    results((2,), train_rank, root, list(RUNS))
    return root


def column(folder: Path, name: str) -> torch.Tensor:
    return torch.tensor([row[name] for row in read_history(folder)], dtype=torch.float64)


def assert_same_run(found: Path, whole: Path, budget: float = 1e-5) -> None:
    for name, rtol in (("loss", budget), ("grad_norm", 200 * budget), ("lr", 0)):
        torch.testing.assert_close(
            column(found, name), column(whole, name), rtol=rtol, atol=0, msg=f"{name} {{}}".format
        )


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one_process(name, alone, together):
    assert_same_run(together / name, alone / name, 3e-3 if name == "bf16" else 1e-5)


def test_one_run_leaves_one_set_of_files(alone, together):
    assert {path.name for path in (together / "ddp").iterdir()} == {path.name for path in (alone / "ddp").iterdir()}
    (ours, _), (theirs, _) = (load_checkpoint(step_path(root / "ddp", 20)) for root in (together, alone))
    assert ours.keys() - theirs.keys() == {"rng/torch_of_ranks"}
    assert all(theirs[name].shape == ours[name].shape for name in theirs)
    first, second = ours["rng/torch_of_ranks"]
    assert torch.equal(first, ours["rng/torch"])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_goes_on_with_another_number_of_ranks(ranks, tmp_path, alone, together):
    """A checkpoint of two ranks, resumed by one or three, who do not have equal shares of a batch."""
    shutil.copytree(together / "ddp", tmp_path / "ddp")
    step_path(tmp_path / "ddp", 20).unlink()
    if ranks == 1:
        train(tmp_path, ["ddp"])
    else:
        results((ranks,), train_rank, tmp_path, ["ddp"])
    assert checkpoints(tmp_path / "ddp")[0] == step_path(tmp_path / "ddp", 20)
    assert_same_run(tmp_path / "ddp", alone / "ddp")
