"""What a TimeSformer costs: parameters, multiply-adds, and the time and memory of a training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mmkernels.testing import peak_allocated
from models.common.training import Trainer
from models.timesformer.model import ATTENTION_TYPES, PRESETS, PresetName, TimeSformer, TimesformerConfig
from models.timesformer.train import VideoTask


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one view, and parameters with and without the classifier."""

    macs: int
    parameters: int
    without_head: int


def cost(config: TimesformerConfig) -> Cost:
    """Counted on the real model, run on fake tensors, by torch's own counter.

    The attention's formula is registered with its ops, which fake tensors of a CPU run wherever the kernels are built;
    elsewhere the reference runs, whose products come to the same count.
    """
    with FakeTensorMode(), torch.no_grad():
        model = TimeSformer(config).eval()
        video = torch.empty(1, config.num_frames, 3, config.image_size, config.image_size)
        with FlopCounterMode(display=False) as counter:
            model(video)
    parameters = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for p in model.head.parameters())
    return Cost(counter.get_total_flops() // 2, parameters, parameters - head)


def cost_table(presets: Sequence[PresetName] = tuple(PRESETS)) -> Table:
    """Parameters and multiply-adds of the presets with each attention."""
    table = Table(title="TimeSformer: what a view costs (a multiply-add is one MAC)")
    columns = ("preset", "input", "attention", "M parameters", "without head", "GMAC, one view", "TMAC, three crops")
    for column in columns:
        table.add_column(column, justify="left" if column in ("preset", "input", "attention") else "right")
    for name in presets:
        config = PRESETS[name]
        for attention in ATTENTION_TYPES:
            found = cost(replace(config, attention=attention))
            table.add_row(
                name,
                f"{config.num_frames} x {config.image_size} px",
                attention,
                f"{found.parameters / 1e6:.2f}",
                f"{found.without_head / 1e6:.2f}",
                f"{found.macs / 1e9:.3f}" if found.macs < 1e10 else f"{found.macs / 1e9:.1f}",
                f"{3 * found.macs / 1e12:.4f}" if found.macs < 1e10 else f"{3 * found.macs / 1e12:.2f}",
            )
        table.add_section()
    return table


def step_cost(trainer: Trainer) -> tuple[float, int]:
    """Seconds of a batch's forward and backward passes, the median of ten, and the bytes that they hold at most."""
    task = trainer.task
    assert isinstance(task, VideoTask)
    model, batch = trainer.raw_model.train(), task.batch(0).to(trainer.device)

    def forward_backward() -> None:
        with trainer.accelerator.autocast():
            loss, _ = task.loss(model, batch)
        loss.backward()

    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward()
        held = torch.cuda.max_memory_allocated() - before
    else:
        held = peak_allocated(forward_backward)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        forward_backward()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    model.zero_grad()
    return statistics.median(seconds), held
