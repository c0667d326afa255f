"""A rank that is lost, or has an error, ends the run on all ranks, with a message that names it."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.common import training
from models.common.engine import Engine, LostRankError
from models.common.schedule import TrainConfig
from models.common.training import Task, Trainer
from tests.distributed.spawn import Lost, on_ranks


class Rows:
    """A batch."""

    def to(self, device: torch.device) -> "Rows":
        return self


class Faulty(Task):
    """A mean of a linear layer; rank 1 does `fault` at its fourth step."""

    def __init__(self, rank: int, fault: str) -> None:
        self.rank, self.fault = rank, fault

    def divide(self, engine: Engine) -> None:
        pass

    def batch(self, index: int) -> Rows:
        self.index = index
        return Rows()

    def loss(self, model: nn.Module, batch: Rows) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss = model(torch.ones(2, 3)).square().mean()
        if self.rank == 1 and self.index == 3:
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "error":
                raise ValueError("no such row")
            if self.fault == "nan":
                loss = loss * float("nan")
        return loss, {}


def full_disk(*_: Any) -> None:
    raise training.CheckpointError("no space")


def train_rank(group: Any, rank: int, folder: Path, fault: str) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    if fault == "disk" and rank == 0:
        training.save_checkpoint = full_disk
    torch.manual_seed(0)
    config = TrainConfig(steps=6, warmup=0, checkpoint_every=2, timeout=20)
    Trainer(nn.Linear(3, 2), Faulty(rank, fault), config, folder, cpu=True).fit()


@pytest.mark.parametrize(
    ("fault", "kinds", "message"),
    [
        ("killed", (LostRankError, Lost), "rank 0 of 2 lost rank 1, which gives no sign, at step 3"),
        ("error", (LostRankError, ValueError), "lost rank 1, which ended by ValueError: no such row, at step 3"),
        ("nan", (FloatingPointError, FloatingPointError), "the loss became nan at step 3 on rank 1"),
        ("disk", (training.CheckpointError, training.CheckpointError), "no space"),
    ],
)
def test_all_ranks_end(fault, kinds, message, tmp_path):
    found = on_ranks((2,), train_rank, tmp_path, fault)
    assert tuple(type(one) for one in found) == kinds, [getattr(one, "text", one) for one in found]
    assert message in str(found[0])
    assert fault != "killed" or "start all again with the same command" in str(found[0])
