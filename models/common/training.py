"""The training loop that the reference models share, on top of accelerate.

A model brings a *task*: its batches as a function of the step, and its loss. The loop does the rest: mixed precision,
warm-up and cosine decay, clipping, accumulation, an average of the weights, logs, and checkpoints from which a killed
run goes on with the very same losses. Over several processes all take each step together (``engine.py``); the files are
rank 0's.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from models.common.checkpoint import (
    CheckpointError,
    all_finite,
    load_newest,
    prune,
    remove_temporaries,
    save_checkpoint,
    step_path,
)
from models.common.console import say, warn
from models.common.engine import Engine
from models.common.layers import checkpoint_activations
from models.common.log import RunLog
from models.common.runs import clear_run, only_run, read_history, write_history
from models.common.schedule import TrainConfig, learning_rate, pick_precision
from models.common.signals import StoppedError, signals_noted
from models.common.state import TrainState, WeightAverage, differences


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors instead of giving it back to the system after every use.

    A CPU training step allocates the same large tensors again and again, and having them zeroed by the kernel each time
    took a third of the step. Other C libraries are left as they are.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GiB at the top of the heap
        libc.mallopt(-2, 2**26)  # M_TOP_PAD: grow in steps of 64 MiB


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of a GPU what torch allocated, else its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; biases, norms, embeddings of position and other vectors without."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.dim() < 2 or "embedding" in name
            (plain if vector else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


class Batch(Protocol):
    """A batch of any kind."""

    def to(self, device: torch.device) -> Any:
        """The same batch on ``device``."""


class Task(ABC):
    """What a model brings to the loop."""

    # Examples of an optimiser step on all ranks, for the log.
    samples: int = 0
    # Whether the batches of a step have one loss over all of them, as `joint_gradients` makes it, or each its own.
    joint: bool = False

    @abstractmethod
    def batch(self, index: int) -> Batch:
        """The batch number ``index``: a function of the number alone, so that a resumed run sees the same data."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss to minimise and further numbers to log; the mean over ranks is that of the whole batch."""

    def joint_gradients(
        self, model: nn.Module, batches: list[Any], scaled: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor | float]:
        """Add the gradients of one loss over the batches of a step, after ``scaled``; the numbers to log."""
        raise NotImplementedError

    def divide(self, engine: Engine) -> None:
        """The loop calls this first where there are several ranks: batches are then this rank's share of each."""
        raise NotImplementedError("this model trains in one process; models.clip and models.timesformer over several")

    def after_step(self, model: nn.Module) -> None:  # noqa: B027
        """The loop calls this after each optimiser step; a task may clamp parameters here."""

    def param_groups(self, model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
        """Parameter groups for AdamW: decay on matrices alone; ``lr_scale`` in a group multiplies its learning rate."""
        return decay_groups(model, config.weight_decay)


class Trainer:
    """Trains one model in one run folder: checkpoints, ``history.jsonl`` and TensorBoard logs lie there."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: TrainConfig,
        run_dir: Path,
        *,
        model_config: dict[str, Any] | None = None,
        compile_model: bool = False,
        cpu: bool = False,
    ) -> None:
        config = replace(config, precision=pick_precision(config.precision))
        self.task, self.config, self.run_dir = task, config, run_dir
        self.model_config = model_config or {}
        keep_freed_memory()
        self.joint = task.joint and config.accumulate > 1
        self.engine = Engine(config, run_dir, cpu=cpu, accumulate=1 if self.joint else config.accumulate)
        self.engine.first(lambda: run_dir.mkdir(parents=True, exist_ok=True))
        if self.engine.world > 1:
            task.divide(self.engine)
        if config.checkpoint_activations:
            checkpoint_activations(model)
        self.engine.spread(model)
        groups = task.param_groups(model, config)
        for group in groups:
            group.setdefault("lr_scale", 1.0)
        fused = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), eps=1e-6, fused=fused)
        self.raw_model = model
        self.average = WeightAverage(model, config.ema) if config.ema > 0 else None
        self.model: Any
        self.model, self.optimizer = self.engine.prepare(model, optimizer)
        if self.average is not None:
            self.average.state = {k: v.to(self.device) for k, v in self.average.state.items()}
        self.state = TrainState(self.engine, model, self.average, self.optimizer.optimizer)
        if compile_model:
            self.model = torch.compile(self.model)
        self.step = 0
        self.saved = -1  # the step of the newest checkpoint
        self.stop = False  # set by `on_step` of :meth:`fit`: this step is the last
        self.signal = 0  # the signal that asked for an end
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []

    @property
    def accelerator(self) -> Accelerator:
        """What runs mixed precision and DDP."""
        return self.engine.accelerator

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.engine.device

    def save(self) -> Path:
        """Write a checkpoint of the present step and delete the oldest ones; all ranks must call it."""
        path, tensors = step_path(self.run_dir, self.step), self.state.tensors()
        metadata = self.state.metadata() | {
            "step": self.step,
            "seconds": self.seconds,
            "train": asdict(self.config),
            "model": self.model_config,
        }

        def write() -> None:
            if not all_finite(tensors):
                raise FloatingPointError(
                    f"the weights are not finite after step {self.step}; nothing was saved. Resume with a lower --lr "
                    "or --precision no"
                )
            save_checkpoint(path, tensors, metadata)
            prune(self.run_dir, self.config.keep)

        self.engine.first(write)
        self.saved = self.step
        return path

    @contextlib.contextmanager
    def _alone(self, doing: Callable[[], str]) -> Iterator[None]:
        """Hold the run folder, by rank 0, and watch over the ranks."""
        with self.engine.watch(doing), contextlib.ExitStack() as held:
            self.engine.first(lambda: held.enter_context(only_run(self.run_dir)))
            yield

    def begin(self, resume: bool) -> None:
        """Go on where the run folder's checkpoints end, or clear the folder and start anew."""
        with self._alone(lambda: "before the first step"):
            if resume:
                self.resume()
            else:
                self.engine.first(lambda: clear_run(self.run_dir))

    def resume(self) -> bool:
        """Go on from the newest good checkpoint of the run folder; False if there is none yet."""
        tensors: dict[str, Tensor] = {}

        def read() -> tuple[dict[str, Any], Path] | None:
            found = load_newest(self.run_dir, warn)
            if found is None:
                return None
            tensors.update(found[0])
            self._require_same_model(found[1], found[2])
            return found[1:]

        found = self.engine.first(read)
        if found is None:
            return False
        metadata, path = found
        self.state.restore(tensors, metadata)
        self.step, self.seconds, self.saved = metadata["step"], metadata["seconds"], metadata["step"]
        self.history = [row for row in read_history(self.run_dir) if row["step"] < self.step]
        # Rows beyond the checkpoint belong to steps that will be taken again.
        self.engine.first(lambda: write_history(self.history, self.run_dir))
        say(f"resumed from {path} at step {self.step}")
        return True

    def _require_same_model(self, metadata: Mapping[str, Any], path: Path) -> None:
        here = json.loads(json.dumps(self.model_config))  # as JSON gives it back: tuples are lists there
        there = {"name": here.get("name")} | metadata["model"]  # runs of earlier versions have no name
        if changed := differences(here, there):
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise CheckpointError(
                f"{path} was trained with another configuration ({'; '.join(changed[:5])}{more}); choose another "
                "--out, give the options of that run, or start anew with --resume never"
            )

    def progress(self) -> float:
        """How far the run is, 0 to 1."""
        share = self.step / self.config.steps
        if self.config.minutes is not None:
            share = max(share, self.seconds / (60 * self.config.minutes))
        return share

    def train_step(self) -> dict[str, float]:
        """One optimiser step, over as many batches as are accumulated."""
        rate = learning_rate(self.config, self.step, self.progress())
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        first = self.step * self.config.accumulate
        batches = (self.task.batch(first + micro).to(self.device) for micro in range(self.config.accumulate))
        logs = self._joint_gradients(batches) if self.joint else self._mean_gradients(batches)
        logs, where = self.engine.mean(logs)
        logs["grad_norm"] = self.engine.clip(self.model, self.config.clip)  # the same on all ranks
        self._require_finite(logs, where)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.task.after_step(self.raw_model)
        if self.average is not None:
            self.average.update(self.raw_model)
        return logs | {"lr": rate}

    def _mean_gradients(self, batches: Iterator[Any]) -> dict[str, float]:
        """Every batch has a loss of its own; their mean counts."""
        logs: dict[str, float] = {}
        for batch in batches:
            with self.engine.accumulate(self.model):
                with self.accelerator.autocast():
                    loss, numbers = self.task.loss(self.model, batch)
                self.accelerator.backward(loss)
                for key, value in ({"loss": loss} | numbers).items():
                    number = float(value.detach() if isinstance(value, Tensor) else value)
                    logs[key] = logs.get(key, 0.0) + number / self.config.accumulate
        return logs

    def _joint_gradients(self, batches: Iterator[Any]) -> dict[str, float]:
        """One loss over all batches."""
        scaler = self.accelerator.scaler
        with self.accelerator.autocast():
            numbers = self.task.joint_gradients(self.model, list(batches), scaler.scale if scaler else lambda x: x)
        return {key: float(value) for key, value in numbers.items()}

    def _require_finite(self, logs: Mapping[str, float], where: str) -> None:
        """Stop before a step that would make the weights NaN; the scaler of fp16 leaves out such steps itself."""
        scaled = self.accelerator.scaler is not None
        for name, what in (("loss", "the loss"), ("grad_norm", "the norm of the gradient")):
            if not math.isfinite(logs[name]) and not (scaled and name == "grad_norm"):
                raise FloatingPointError(
                    f"{what} became {logs[name]} at step {self.step}{where}, and the step was not taken; resume with a "
                    "lower --lr or --precision no"
                )

    def fit(self, on_step: Callable[[Trainer], None] | None = None) -> None:
        """Train until the steps or the minutes are over, saving as configured and once at the end.

        Ctrl-C ends it after the step that is under way, with a checkpoint and a :class:`StoppedError`.
        """
        with signals_noted() as signals, self._alone(lambda: f"at step {self.step}"):
            self.engine.first(lambda: remove_temporaries(self.run_dir))
            self._fit(on_step, signals)
        if self.signal:
            where = f"stopped at step {self.step} of {self.config.steps}; saved {step_path(self.run_dir, self.step)}"
            raise StoppedError(where, 128 + self.signal)

    def _goes_on(self, signals: list[int]) -> bool:
        """Whether to take another step: all ranks or none, by the clock of rank 0 and the signals of any."""
        seconds = self.seconds if self.engine.is_first else 0.0
        told = self.engine.largest({"seconds": seconds, "stop": self.stop, "signal": signals[0] if signals else 0})
        self.seconds, self.stop, self.signal = told["seconds"], bool(told["stop"]), int(told["signal"])
        return not (self.stop or self.signal) and self.step < self.config.steps and self.progress() < 1

    def _fit(self, on_step: Callable[[Trainer], None] | None, signals: list[int]) -> None:
        self.accelerator.init_trackers("tensorboard")
        self.model.train()
        with contextlib.ExitStack() as files:
            log = (
                RunLog(self.run_dir, self.config.steps, self.step, self.config.log_every)
                if self.engine.is_first
                else None
            )
            if log is not None:
                files.enter_context(log)
            first = self.step
            while self._goes_on(signals):
                began = time.perf_counter()
                row = {"step": float(self.step)} | self.train_step()
                self.step += 1
                took = time.perf_counter() - began
                self.seconds += took
                row |= {"seconds": took, "memory_mib": peak_memory(self.device) / 2**20}
                if self.task.samples:
                    row["samples/s"] = self.task.samples / took
                self.history.append(row)
                if log is not None:
                    log.row(row, self.step, self.progress())
                if self.step % self.config.log_every == 0:
                    self.accelerator.log({f"train/{k}": v for k, v in row.items() if k != "step"}, step=self.step)
                if self.step == first + 1:
                    self.engine.started()
                if on_step is not None:
                    on_step(self)
                if self.step % self.config.checkpoint_every == 0:
                    if log is not None:
                        log.flush()
                    self.save()
        if self.saved != self.step:
            self.save()
        for tracker in self.accelerator.trackers:  # accelerate's end_training would leave the group, too
            tracker.finish()

    def weights(self) -> dict[str, Tensor]:
        """The state dict to evaluate and export: the averaged weights where there are any; all ranks must call it."""
        state = self.average.state if self.average is not None else self.raw_model.state_dict()
        return {name: self.state.whole(name, value.detach()).clone() for name, value in state.items()}
