"""The processes that train one model: who they are, what passes between them, how the model is spread over them.

torchrun starts the processes and tells each its rank. Without it there is one, and nothing here communicates.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from models.common.norms import norms_over_ranks
from models.common.schedule import TrainConfig
from models.common.sharding import shard, whole
from models.data.batches import generator_of
from models.data.share import Share

T = TypeVar("T")

# Until their first step has ended ranks may be minutes apart: they read data, compile, and make caches.
START_SECONDS = 1800
# How long a rank that lost another waits for word of the rest.
ROLL_CALL_SECONDS = 3.0


class LostRankError(RuntimeError):
    """Another process of the run ended or hangs; the message names it and says what to do."""


class Engine:
    """The ranks of a run, on top of accelerate."""

    def __init__(self, config: TrainConfig, run_dir: Path, *, cpu: bool = False, accumulate: int = 1) -> None:
        self.config = config
        self.scalars: frozenset[str] = frozenset()  # parameters that have shape [1] while a model is sharded
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        gpu = torch.cuda.is_available() and not cpu
        launched = self.world > 1 or "LOCAL_RANK" in os.environ
        if launched:
            _join(gpu, max(START_SECONDS, config.timeout))
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            cpu=cpu or (launched and not gpu),
            # Batches come from the task, not from a DataLoader that could end in the middle of an accumulation.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulate, sync_with_dataloader=False),
            log_with="tensorboard",
            project_dir=run_dir,
            # No buffer needs rank 0's word: the norms of all ranks count the same.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
        if self.accelerator.num_processes != self.world:
            raise RuntimeError(
                f"WORLD_SIZE says {self.world} processes, but accelerate counts {self.accelerator.num_processes}, so "
                "each would train a model of its own: start them by torchrun, with no other launcher's variables set"
            )

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.accelerator.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks; None where there is but one."""
        return dist.group.WORLD if self.world > 1 else None

    @property
    def sharded(self) -> bool:
        """Whether each rank holds but a part of the weights."""
        return self.world > 1 and self.config.sharding == "fsdp"

    @property
    def share(self) -> Share:
        """The part of each batch that is this rank's."""
        return Share(self.rank, self.world)

    def spread(self, model: nn.Module) -> None:
        """Make a model that every rank has built one over the ranks; its parameters may be others then."""
        if self.group is not None:
            norms_over_ranks(model, self.group)
            if self.sharded:
                self.scalars = shard(model, self.device, self.world, self.config.precision)
            self.draw_apart(0)

    def draw_apart(self, step: int) -> None:
        """Let each rank drop other units of its rows; rank 0 draws on as it would alone."""
        if not self.is_first:
            torch.manual_seed(generator_of(self.config.seed, 4, step, self.rank).initial_seed())

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """The model to call, and accelerate's optimiser."""
        # accelerate leaves a model for evaluation without DDP, which a sharded one must not have.
        prepared = self.accelerator.prepare_model(model, evaluation_mode=self.sharded)
        return prepared, self.accelerator.prepare_optimizer(optimizer)

    @contextlib.contextmanager
    def accumulate(self, model: nn.Module) -> Iterator[None]:
        """One batch of a step: the gradients of the last alone meet the other ranks, with those before."""
        with self.accelerator.accumulate(model):
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(self.accelerator.sync_gradients, recurse=False)
            yield

    def clip(self, model: nn.Module, largest: float) -> float:
        """Scale the gradient down to a norm of ``largest`` at most; the norm that it had."""
        norm = self.accelerator.clip_grad_norm_(model.parameters(), largest)
        return float(whole(norm)) if norm is not None else math.nan

    def first(self, function: Callable[[], T]) -> T:
        """What ``function`` gives on rank 0, on all ranks; its error is raised on all."""
        if self.world == 1:
            return function()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = function()
            except Exception as error:
                told[1] = error
        dist.broadcast_object_list(told)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def mean(self, numbers: Mapping[str, float]) -> tuple[dict[str, float], str]:
        """The means over ranks, and on which ranks one of the numbers is not finite, in words."""
        if self.world == 1:
            return dict(numbers), ""
        bad = not all(map(math.isfinite, numbers.values()))
        told = torch.tensor([*numbers.values(), bad, bad * self.rank], dtype=torch.float64, device=self.device)
        dist.all_reduce(told)
        *sums, count, rank = told.tolist()
        where = f" on rank {rank:.0f}" if count == 1 else f" on {count:.0f} of {self.world} ranks" if count else ""
        return {name: total / self.world for name, total in zip(numbers, sums, strict=True)}, where

    def largest(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The largest of all ranks, for each number."""
        if self.world == 1:
            return dict(numbers)
        told = torch.tensor([*numbers.values()], dtype=torch.float64, device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return dict(zip(numbers, told.tolist(), strict=True))

    def of_ranks(self, x: Tensor) -> Tensor | None:
        """The tensors of all ranks, [ranks, ...], on rank 0."""
        found: list[Any] | None = [None] * self.world if self.is_first else None
        dist.gather_object(x, found)
        return None if found is None else torch.stack(found)

    def hand_out(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of rank 0, one by one, on all ranks."""
        if self.world == 1:
            yield from tensors.items()
            return
        for name, shape, dtype in self.first(lambda: [(key, x.shape, x.dtype) for key, x in tensors.items()]):
            x = tensors[name].contiguous() if self.is_first else torch.empty(shape, dtype=dtype)
            dist.broadcast(x, 0)
            yield name, x

    def started(self) -> None:
        """The first step has ended everywhere: from now on a rank that is late by the timeout is lost."""
        if self.group is not None:
            dist.barrier()
            # torch 2.10 has this under another name alone.
            set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
            set_timeout(datetime.timedelta(seconds=self.config.timeout), self.group)

    @contextlib.contextmanager
    def watch(self, where: Callable[[], str]) -> Iterator[None]:
        """Tell the other ranks of an error in this block; if another rank is lost, say which, and what to do."""
        try:
            yield
        except Exception as error:
            if self.world == 1:
                raise
            lost = _is_lost(error)
            with contextlib.suppress(Exception):  # the store may have gone with its host
                _store().set(_note_of(self.rank), "" if lost else f"{type(error).__name__}: {error}")
            if not lost:
                raise
            raise LostRankError(
                f"rank {self.rank} of {self.world} lost {self._roll_call()} {where()} ({_first_line(error)}); see what "
                "that rank said last, and start all again with the same command: it goes on from the last checkpoint "
                "(torchrun --max-restarts does so by itself)"
            ) from error

    def _roll_call(self) -> str:
        """The ranks that raised an error of their own, or else those that give no sign."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        deadline, notes = time.monotonic() + ROLL_CALL_SECONDS, {}
        with contextlib.suppress(Exception):
            store = _store()
            while not store.check([_note_of(rank) for rank in others]) and time.monotonic() < deadline:
                time.sleep(0.05)
            notes = {rank: store.get(_note_of(rank)).decode() for rank in others if store.check([_note_of(rank)])}
        raised = [f"rank {rank}, which ended by {_first_line(note)}," for rank, note in notes.items() if note]
        silent = [f"rank {rank}, which gives no sign," for rank in others if rank not in notes]
        return " and ".join((raised or silent)[:8]) or "another rank"


def _join(gpu: bool, seconds: float) -> None:
    """Join the process group that torchrun describes."""
    if dist.is_initialized():
        return
    wanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in wanted if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is set, but not {', '.join(missing)}: start the processes by torchrun")
    if gpu:
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"process {local} of this machine has no GPU: run --nproc-per-node {count}, or --cpu")
        torch.cuda.set_device(local)
    dist.init_process_group("cuda:nccl,cpu:gloo" if gpu else "gloo", timeout=datetime.timedelta(seconds=seconds))


def leave() -> None:
    """Leave the process group, at the end of a run."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _note_of(rank: int) -> str:
    return f"models/error of rank {rank}"


def _is_lost(error: Exception) -> bool:
    """Whether an error says that another rank is lost, and not what went wrong here."""
    words = ("gloo", "NCCL", "lost rank", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0][:300]
