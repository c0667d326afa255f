"""The command line of audio-visual fusion.

python -m models.av_fusion train --fusion attention --out runs/av-fusion
python -m models.av_fusion eval runs/av-fusion
python -m models.av_fusion predict runs/av-fusion --image seven.png --audio seven.wav
python -m models.av_fusion compare --out runs/av-fusion-compare
"""

from __future__ import annotations

import functools
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.table import Table

from models.av_fusion.compare import compare_runs
from models.av_fusion.data import PairDataConfig, load_data, log_mel
from models.av_fusion.evaluate import evaluate_run
from models.av_fusion.model import FUSIONS, PRESETS, Fusion, PresetName
from models.av_fusion.train import RATES, load_fusion, train_run
from models.common.cli import announce, bad_log, run_app
from models.common.console import console, say
from models.common.options import (
    MODEL_SIZE,
    Checkpoint,
    EvalOptions,
    Only,
    RunOptions,
    Smoothing,
    Top,
    Without,
    options,
)
from models.common.schedule import TrainConfig
from models.data.audio import read_audio
from models.data.pair_files import read_picture
from models.data.pairs import Noise
from models.data.sets import found_from_anywhere

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train, evaluate and compare audio-visual fusions.")

RateOption = Annotated[float | None, typer.Option(min=0, help="Learning rate; default: the fusion's own.")]
ExamplesOption = Annotated[int, typer.Option(min=1, help="Examples of a set, each with its own noise.")]
SweepOption = Annotated[int, typer.Option(min=1, help="Examples at each level of the robustness curves.")]

RUN, DATA, NOISE = RunOptions(Path("runs/av-fusion")), PairDataConfig(), Noise()
SCHEDULE, EVALUATION = TrainConfig(steps=300, warmup=30, ema=0.99), EvalOptions()


@app.command()
@options
def train(
    run: RunOptions = RUN,
    preset: Annotated[PresetName, MODEL_SIZE] = "tiny",
    fusion: Annotated[Fusion, typer.Option(help="How image and sound meet.")] = "attention",
    data: PairDataConfig = DATA,
    noise: Noise = NOISE,
    schedule: Annotated[TrainConfig, Without("lr")] = SCHEDULE,
    lr: RateOption = None,
    smoothing: Smoothing = 0.0,
) -> None:
    """Train a model; run the same command again to resume."""
    train_run(
        replace(PRESETS[preset], fusion=fusion),
        replace(data, source=found_from_anywhere(data.source, "digits", "synthetic"), noise=noise, seed=schedule.seed),
        replace(schedule, lr=RATES[fusion] if lr is None else lr),
        run.out,
        smoothing=smoothing,
        bad=bad_log(run.on_bad_data),
        resume=run.resume == "auto",
        cpu=run.cpu,
    )
    say(f"trained; next: python -m models.av_fusion eval {shlex.quote(str(run.out))}")


@app.command(name="eval")
@options
def eval_command(
    checkpoint: Checkpoint,
    evaluation: EvalOptions = EVALUATION,
    examples: ExamplesOption = 4000,
    sweep: SweepOption = 1000,
) -> None:
    """Accuracy, also without either modality and at every level of noise, with tables, a JSON report and pictures."""
    model, run, classes = load_fusion(checkpoint)
    bad = bad_log(evaluation.on_bad_data)
    splits = load_data(replace(run, source=evaluation.data) if evaluation.data else run, model.config, bad)
    announce(splits.notes, bad)
    if list(splits.train.classes) != classes:
        raise ValueError(
            f"--data {evaluation.data}: its classes are not those of the run, {', '.join(classes[:3])}, ..."
        )
    folder = evaluation.folder(checkpoint)
    evaluate_run(model, splits, run.noise, folder, validation=evaluation.validation, examples=examples, sweep=sweep)


@app.command()
def predict(
    checkpoint: Checkpoint,
    image: Annotated[Path | None, typer.Option(help="An image file.")] = None,
    audio: Annotated[Path | None, typer.Option(help="A sound file.")] = None,
    top: Top = 5,
) -> None:
    """The likeliest classes of an image, a sound, or both, and how much the model attends to each."""
    model, _, classes = load_fusion(checkpoint)
    config = model.config
    if image is None and audio is None:
        raise ValueError("give --image, --audio or both")
    for name, path in (("image", image), ("audio", audio)):
        if config.modalities == (name,) and path is None:
            raise ValueError(f"this model reads the modality {name} alone: give --{name}")
    # An absent modality is blank, and the model is told not to look at it.
    pixels = torch.zeros(config.channels, config.image_size, config.image_size, dtype=torch.uint8)
    wave = torch.zeros(config.samples)
    if image is not None:
        pixels = read_picture(image, config.image_size, config.channels)
    if audio is not None:
        clip, length = read_audio(audio, config.samples)
        wave = clip.roll((config.samples - length) // 2).float()
    present = torch.tensor([[image is not None, audio is not None]])
    seen = pixels[None] / 127.5 - 1, log_mel(config)(wave[None]), present
    with torch.no_grad():
        best = model(*seen)[0].softmax(-1).topk(min(top, len(classes)))
    table = Table(title=escape(", ".join(path.name for path in (image, audio) if path is not None)))
    table.add_column("probability", justify="right")
    table.add_column("class")
    for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        table.add_row(f"{probability:.3f}", escape(classes[index]))
    console.print(table)
    if config.fusion == "attention":
        on_image, on_audio, on_self = model.weights(*seen)[0].tolist()
        console.print(f"attention: image {on_image:.2f}, sound {on_audio:.2f}, class token {on_self:.2f}")


@app.command()
@options
def compare(
    out: Annotated[Path, typer.Option(help="Folder of the runs, the table and the pictures.")] = Path(
        "runs/av-fusion-compare"
    ),
    run: Annotated[RunOptions, Without("out")] = RUN,
    preset: Annotated[PresetName, MODEL_SIZE] = "tiny",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each fusion.")] = 5,
    data: PairDataConfig = DATA,
    noise: Noise = NOISE,
    schedule: Annotated[TrainConfig, Only("steps", "warmup", "weight_decay", "ema", "precision")] = SCHEDULE,
    lr: RateOption = None,
    smoothing: Smoothing = 0.0,
    evaluation: Annotated[EvalOptions, Only("validation")] = EVALUATION,
    examples: ExamplesOption = 4000,
    sweep: SweepOption = 1000,
) -> None:
    """Every fusion and both modalities alone, several seeds each: one table and the robustness curves.

    A run that is finished is not repeated.
    """
    compare_runs(
        PRESETS[preset],
        replace(data, source=found_from_anywhere(data.source, "digits", "synthetic"), noise=noise),
        schedule,
        out,
        rates=RATES if lr is None else dict.fromkeys(FUSIONS, lr),
        seeds=seeds,
        smoothing=smoothing,
        validation=evaluation.validation,
        examples=examples,
        sweep=sweep,
        bad=bad_log(run.on_bad_data),
        resume=run.resume == "auto",
        cpu=run.cpu,
    )


main = functools.partial(run_app, app)


if __name__ == "__main__":
    sys.exit(main())
