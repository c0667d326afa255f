"""A training step of TimeSformer-B on this CPU: the op against Hugging Face's model, time and peak memory.

python -m benchmarks.divided_attention.timesformer_step [--batch 1] [--bf16] [--seconds 60]
"""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, cast

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: the profiler's own notes

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.harness.timing import interleaved, median
from mmkernels import _backends
from mmkernels.integrations.transformers import patch_timesformer
from mmkernels.testing import peak_allocated
from models.timesformer.hugging_face import config_from_hugging_face, from_hugging_face, hugging_face_config
from models.timesformer.model import PRESETS, PresetName


def step_of(forward: Callable[[Tensor], Tensor], model: nn.Module, videos: Tensor, bf16: bool) -> Callable[[], Any]:
    """Forward, cross-entropy and backward of all parameters."""
    parameters = list(model.parameters())
    labels = torch.arange(len(videos))

    def step() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(forward(videos).float(), labels)
        return torch.autograd.grad(loss, parameters)

    return step


def main(
    batch: Annotated[int, typer.Option(min=1, help="clips in a step")] = 1,
    bf16: Annotated[bool, typer.Option("--bf16", help="under autocast to bfloat16")] = False,
    seconds: Annotated[float, typer.Option(help="time spent, beyond the least number of rounds")] = 60.0,
    preset: Annotated[str, typer.Option(help="size of the model")] = "base",
) -> None:
    """Compare a training step on the op with the same weights in Hugging Face's model, by turns in one process."""
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    torch.manual_seed(0)
    config = PRESETS[cast(PresetName, preset)]
    eager, patched = (
        TimesformerForVideoClassification(TimesformerConfig(**hugging_face_config(config))).train() for _ in range(2)
    )
    patched.load_state_dict(eager.state_dict())
    patch_timesformer(patched)
    own = from_hugging_face(eager.state_dict(), config_from_hugging_face(eager.config)).train()
    side = config.image_size
    videos = torch.randn(batch, config.num_frames, 3, side, side)
    names = {
        "Hugging Face": step_of(lambda x: eager(x).logits, eager, videos, bf16),
        "Hugging Face, patch_timesformer": step_of(lambda x: patched(x).logits, patched, videos, bf16),
        "models.timesformer": step_of(own, own, videos, bf16),
    }
    times = interleaved(names, seconds=seconds)
    gradients = sum(p.nbytes for p in eager.parameters())
    peaks = {name: peak_allocated(step) - gradients for name, step in names.items()}
    chosen = _backends.choose("divided_attention", "auto", "cpu", torch.bfloat16 if bf16 else torch.float32)
    table = Table(
        title=f"Training step (forward + backward), TimeSformer {preset}, {config.num_frames} x {side} px, B={batch}, "
        f"{'bfloat16 autocast' if bf16 else 'float32'}, CPU, {torch.get_num_threads()} threads, kernels: {chosen}"
    )
    for column in ("model", "median s", "x Hugging Face", "MiB beyond gradients", "share"):
        table.add_column(column, justify="left" if column == "model" else "right")
    base, most = median(times["Hugging Face"]), peaks["Hugging Face"]
    for name in names:
        seconds_of = median(times[name])
        table.add_row(
            name,
            f"{seconds_of:.2f}",
            f"{base / seconds_of:.2f}",
            f"{peaks[name] / 2**20:.0f}",
            f"{peaks[name] / most:.0%}",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    typer.run(main)
