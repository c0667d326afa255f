"""The training loop that the reference models share, on top of accelerate.

A model brings a *task*: its batches as a function of the step, and its loss. The loop does the rest: mixed precision,
warm-up and cosine decay, clipping, accumulation, an average of the weights, logs, and checkpoints from which a killed
run goes on with the very same losses.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import random
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
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
from models.common.console import console, say, warn
from models.common.runs import BEST, clear_run, only_run, read_history, write_history

Precision = Literal["auto", "no", "bf16", "fp16"]


@dataclass
class TrainConfig:
    """How to train; a field with a description is an option of every command that trains.

    ``minutes`` ends the run in time whatever the machine: the learning rate then follows the share of the time that is
    gone, where that is larger than the share of the steps. Leave it at None for a run that must repeat exactly.
    """

    steps: int = field(default=1000, metadata={"help": "Optimiser steps.", "min": 1})
    minutes: float | None = field(
        default=None, metadata={"help": "End in this time, the decay of the rate fitted to it."}
    )
    accumulate: int = field(default=1, metadata={"help": "Batches of an optimiser step.", "min": 1})
    lr: float = field(default=1e-3, metadata={"help": "Largest learning rate.", "min": 0})
    final_lr: float = 0.01  # the share of lr at the end
    warmup: int = field(default=50, metadata={"help": "Steps in which the learning rate rises.", "min": 0})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of the matrices.", "min": 0})
    beta2: float = 0.98
    clip: float = field(default=1.0, metadata={"help": "Largest norm of the gradient.", "min": 0})
    ema: float = field(default=0.0, metadata={"help": "Decay of the weight average; 0: none.", "min": 0, "max": 1})
    precision: Precision = field(default="no", metadata={"help": "Mixed precision."})
    checkpoint_every: int = field(default=200, metadata={"help": "Steps between checkpoints.", "min": 1})
    keep: int = 2
    log_every: int = 10
    seed: int = field(default=0, metadata={"help": "Seed of weights and batches."})


def pick_precision(choice: Precision) -> Literal["no", "bf16", "fp16"]:
    """The precision of a run; "auto" is bf16 where the processor multiplies it in hardware, else full precision."""
    if choice != "auto":
        return choice
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "no"


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


# A log file gets a line of progress after so many seconds at the latest, if a step takes no longer.
LINE_SECONDS = 15

# Columns of the history that the progress line leaves out.
_UNSHOWN = ("step", "grad_norm", "lr", "seconds")


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

    @abstractmethod
    def batch(self, index: int) -> Batch:
        """The batch number ``index``: a function of the number alone, so that a resumed run sees the same data."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss to minimise and further numbers to log."""

    def after_step(self, model: nn.Module) -> None:  # noqa: B027
        """The loop calls this after each optimiser step; a task may clamp parameters here."""

    def param_groups(self, model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
        """Parameter groups for AdamW: decay on matrices alone; ``lr_scale`` in a group multiplies its learning rate."""
        return decay_groups(model, config.weight_decay)


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Linear warm-up over ``warmup`` steps, then half a cosine over ``progress`` from 0 to 1."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * warm * (config.final_lr + (1 - config.final_lr) * cosine)


class WeightAverage:
    """An exponential moving average of parameters and buffers, which forgets faster at the start."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards the model's present weights."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = [(self.state[name], value) for name, value in model.state_dict().items()]
        floating = [(a, b) for a, b in pairs if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floating], [b for _, b in floating], weight)
        for a, b in pairs:
            if not a.is_floating_point():
                a.copy_(b)


def _rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"rng/torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, gauss_next = random.getstate()
    numpy_state = [name, np.asarray(keys).tolist(), position, has_gauss, gauss]
    return tensors, {"python": [version, list(internal), gauss_next], "numpy": numpy_state}


def _restore_rng(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["rng/torch"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))  # noqa: NPY002


class StoppedError(Exception):
    """Ctrl-C or a request to end stopped a run, after it had saved; ``code`` is what a shell expects then."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Within this context Ctrl-C and SIGTERM are noted in the list; a second one acts as always."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted  # signals are the main thread's
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: object) -> None:
        noted.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def differences(here: Mapping[str, Any], there: Mapping[str, Any], above: str = "") -> list[str]:
    """Where two descriptions differ, by the name of the field: "data.batch_size is 64, was 32"."""
    found = []
    for key in sorted(here.keys() | there.keys()):
        one, other = here.get(key), there.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{above}{key}.")
        elif one != other:
            found.append(f"{above}{key} is {_short(one)}, was {_short(other)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
        run_dir.mkdir(parents=True, exist_ok=True)
        keep_freed_memory()
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            cpu=cpu,
            # Batches come from the task, not from a DataLoader that could end in the middle of an accumulation.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.accumulate, sync_with_dataloader=False
            ),
            log_with="tensorboard",
            project_dir=run_dir,
        )
        if self.accelerator.num_processes > 1:
            raise NotImplementedError("training over several processes awaits the loss over a process group; run one")
        groups = task.param_groups(model, config)
        for group in groups:
            group.setdefault("lr_scale", 1.0)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), eps=1e-6)
        self.raw_model = model
        self.average = WeightAverage(model, config.ema) if config.ema > 0 else None
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if self.average is not None:
            self.average.state = {k: v.to(self.accelerator.device) for k, v in self.average.state.items()}
        if compile_model:
            self.model = torch.compile(self.model)
        self.step = 0
        self.stop = False  # set by `on_step` of :meth:`fit`: this step is the last
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []

    @property
    def device(self) -> torch.device:
        """The device that accelerate chose."""
        return self.accelerator.device

    def _names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.raw_model.named_parameters()}

    def save(self) -> Path:
        """Write a checkpoint of the present step and delete the oldest ones."""
        tensors, rng = _rng_state()
        tensors |= {f"model/{name}": value for name, value in self.raw_model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average/{name}": value for name, value in self.average.state.items()}
        names = self._names()
        inner = self.optimizer.optimizer
        for parameter, state in inner.state.items():
            tensors |= {f"optimizer/{key}/{names[id(parameter)]}": value for key, value in state.items()}
        if not all_finite(tensors):
            raise FloatingPointError(
                f"the weights are not finite after step {self.step}; nothing was saved. Resume with a lower --lr or "
                "--precision no"
            )
        metadata = {
            "step": self.step,
            "seconds": self.seconds,
            "rng": rng,
            "train": asdict(self.config),
            "model": self.model_config,
            "updates": self.average.updates if self.average is not None else 0,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
        }
        path = step_path(self.run_dir, self.step)
        save_checkpoint(path, tensors, metadata)
        prune(self.run_dir, self.config.keep)
        return path

    def begin(self, resume: bool) -> None:
        """Go on where the run folder's checkpoints end, or clear the folder and start anew."""
        with only_run(self.run_dir):
            if resume:
                self.resume()
            else:
                clear_run(self.run_dir)

    def resume(self) -> bool:
        """Go on from the newest good checkpoint of the run folder; False if there is none yet."""
        found = load_newest(self.run_dir, warn)
        if found is None:
            return False
        tensors, metadata, path = found
        here = json.loads(json.dumps(self.model_config))  # as JSON gives it back: tuples are lists there
        there = {"name": here.get("name")} | metadata["model"]  # runs of earlier versions have no name
        if changed := differences(here, there):
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise CheckpointError(
                f"{path} was trained with another configuration ({'; '.join(changed[:5])}{more}); choose another "
                "--out, give the options of that run, or start anew with --resume never"
            )
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}, "rng": {}}
        for key, value in tensors.items():
            head, _, rest = key.partition("/")
            groups[head][rest] = value
        self.raw_model.load_state_dict(groups["model"])
        if self.average is not None and groups["average"]:
            for name, value in groups["average"].items():
                self.average.state[name].copy_(value)
            self.average.updates = metadata["updates"]
        by_name = dict(self.raw_model.named_parameters())
        inner = self.optimizer.optimizer
        for key, value in groups["optimizer"].items():
            field, _, name = key.partition("/")
            # AdamW keeps its step counter on the CPU and the moments beside the parameter.
            device = "cpu" if field == "step" else by_name[name].device
            inner.state[by_name[name]][field] = value.to(device)
        if metadata["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(metadata["scaler"])
        _restore_rng({f"rng/{k}": v for k, v in groups["rng"].items()}, metadata["rng"])
        self.step, self.seconds = metadata["step"], metadata["seconds"]
        self.history = [row for row in read_history(self.run_dir) if row["step"] < self.step]
        # Rows beyond the checkpoint belong to steps that will be taken again.
        write_history(self.history, self.run_dir)
        say(f"resumed from {path} at step {self.step}")
        return True

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
        logs: dict[str, float] = {}
        for micro in range(self.config.accumulate):
            batch = self.task.batch(self.step * self.config.accumulate + micro).to(self.device)
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss, numbers = self.task.loss(self.model, batch)
                self.accelerator.backward(loss)
                for key, value in ({"loss": loss} | numbers).items():
                    number = float(value.detach() if isinstance(value, Tensor) else value)
                    logs[key] = logs.get(key, 0.0) + number / self.config.accumulate
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
                    logs["grad_norm"] = float(norm) if norm is not None else float("nan")
                    self._require_finite(logs)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.task.after_step(self.raw_model)
        if self.average is not None:
            self.average.update(self.raw_model)
        return logs | {"lr": rate}

    def _require_finite(self, logs: Mapping[str, float]) -> None:
        """Stop before a step that would make the weights NaN; the scaler of fp16 leaves out such steps itself."""
        scaled = self.accelerator.scaler is not None
        for name, what in (("loss", "the loss"), ("grad_norm", "the norm of the gradient")):
            if not math.isfinite(logs[name]) and not (scaled and name == "grad_norm"):
                raise FloatingPointError(
                    f"{what} became {logs[name]} at step {self.step}, and the step was not taken; resume with a lower "
                    "--lr or --precision no"
                )

    def fit(self, on_step: Callable[[Trainer], None] | None = None) -> None:
        """Train until the steps or the minutes are over, saving as configured and once at the end.

        Ctrl-C ends it after the step that is under way, with a checkpoint and a :class:`StoppedError`.
        """
        with only_run(self.run_dir), _signals_noted() as signals:
            remove_temporaries(self.run_dir)
            self._fit(on_step, signals)
        if signals:
            where = f"stopped at step {self.step} of {self.config.steps}; saved {step_path(self.run_dir, self.step)}"
            raise StoppedError(where, 128 + signals[0])

    def _fit(self, on_step: Callable[[Trainer], None] | None, signals: list[int]) -> None:
        self.accelerator.init_trackers("tensorboard")
        columns = (
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        history = open(self.run_dir / "history.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.model.train()
        # A terminal gets a moving bar; a log file gets a line now and then, and on a slow machine in time too.
        quiet = not console.is_terminal
        said = -math.inf
        with history, Progress(*columns, console=console, disable=quiet) as bar:
            job = bar.add_task("training", total=self.config.steps, completed=self.step, note="")
            while not (self.stop or signals) and self.step < self.config.steps and self.progress() < 1:
                began = time.perf_counter()
                row = {"step": float(self.step)} | self.train_step()
                self.step += 1
                took = time.perf_counter() - began
                self.seconds += took
                row["seconds"] = took
                self.history.append(row)
                history.write(json.dumps(row) + "\n")
                shown = [f"{key} {value:.3f}" for key, value in row.items() if key not in _UNSHOWN]
                note = "  ".join([*shown, f"{took:.2f} s/step"])
                bar.update(job, completed=self.step, note=note)
                if self.step % self.config.log_every == 0:
                    history.flush()
                    self.accelerator.log({f"train/{k}": v for k, v in row.items() if k != "step"}, step=self.step)
                now = time.monotonic()
                if quiet and (self.step % (10 * self.config.log_every) == 0 or now - said >= LINE_SECONDS):
                    said = now
                    console.print(f"step {self.step}/{self.config.steps}  {100 * self.progress():.0f} %  {note}")
                if on_step is not None:
                    on_step(self)
                if self.step % self.config.checkpoint_every == 0:
                    history.flush()
                    self.save()
        if self.step % self.config.checkpoint_every or not step_path(self.run_dir, self.step).exists():
            self.save()
        self.accelerator.end_training()

    def weights(self) -> dict[str, Tensor]:
        """The state dict to evaluate and export: the averaged weights where there are any."""
        state = self.average.state if self.average is not None else self.raw_model.state_dict()
        return {name: value.detach().clone() for name, value in state.items()}


@dataclass
class EarlyStopping:
    """Scores the weights to evaluate now and then, keeps the best, and ends a run that gets no better.

    Called after each step (``on_step`` of :meth:`Trainer.fit`). Scores lie in ``validation.jsonl``, the best weights in
    ``best.safetensors``, so that a resumed run goes on with both.
    """

    score: Callable[[dict[str, Tensor]], float]  # scores a state dict; higher is better
    every: int
    patience: int  # evaluations without a better score that end the run

    def start(self, trainer: Trainer) -> None:
        """Read the scores of a resumed run; those beyond its checkpoint will be computed again."""
        self.rows = [row for row in read_history(trainer.run_dir, "validation.jsonl") if row["step"] <= trainer.step]
        trainer.stop = self._over()

    def _over(self) -> bool:
        scores = [row["score"] for row in self.rows]
        return bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= self.patience

    def __call__(self, trainer: Trainer) -> None:
        """Evaluate, if it is time."""
        last = trainer.step >= trainer.config.steps or trainer.progress() >= 1
        if trainer.step % self.every and not last:
            return
        weights = trainer.weights()
        value = self.score(weights)
        best = max((row["score"] for row in self.rows), default=-math.inf)
        if value > best:
            described = {"step": trainer.step, "score": value, "model": trainer.model_config}
            tensors = {f"model/{name}": tensor for name, tensor in weights.items()}
            save_checkpoint(trainer.run_dir / BEST, tensors, described)
        self.rows.append({"step": trainer.step, "score": value})
        write_history(self.rows, trainer.run_dir, "validation.jsonl")
        trainer.stop = self._over()
        note = ", the best so far" if value > best else f" (best {best:.3f})"
        console.print(f"step {trainer.step}: validation {value:.3f}{note}{'; stopped' if trainer.stop else ''}")
