"""The command line of TimeSformer.

python -m models.timesformer train --data digits --out runs/timesformer
python -m models.timesformer eval runs/timesformer
python -m models.timesformer predict runs/timesformer clip.mp4
python -m models.timesformer flops
python -m models.timesformer ablation --data digits
"""

from __future__ import annotations

import functools
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from models.common.cli import announce, bad_log, run_app
from models.common.console import console, say, warn
from models.common.options import (
    MODEL_SIZE,
    Checkpoint,
    Compile,
    EvalOptions,
    Only,
    RunOptions,
    Smoothing,
    Top,
    Without,
    options,
)
from models.common.schedule import TrainConfig
from models.data.sets import found_from_anywhere
from models.data.video_files import clips_of_file
from models.timesformer.ablation import compare_attention
from models.timesformer.cost import cost_table
from models.timesformer.data import VideoDataConfig, load_data
from models.timesformer.evaluate import Views, draw_attention, evaluate_run, predict_views
from models.timesformer.model import PRESETS, AttentionType, PresetName, TimesformerConfig
from models.timesformer.train import load_timesformer, train_run

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train, evaluate and measure TimeSformer.")

AugmentOption = Annotated[
    float | None,
    typer.Option(min=0, help="Strength of the augmentation; default: 0 for digits, which are drawn, else 1."),
]
ClipsOption = Annotated[int, typer.Option(min=1, help="Clips of a video file, spread over it.")]
CropsOption = Annotated[int, typer.Option(min=1, help="Crops of each clip, where frames are not square.")]

RUN, DATA, SCHEDULE = RunOptions(Path("runs/timesformer")), VideoDataConfig(), TrainConfig(precision="auto")
EVALUATION = EvalOptions()


def settle(data: VideoDataConfig, model: TimesformerConfig, augment: float | None, seed: int) -> VideoDataConfig:
    """The data of one run: clips in the model's size, and digits as they are unless ``augment`` says otherwise.

    The torus of the digits has no edge to move over.
    """
    strength = (0.0 if data.source == "digits" else 1.0) if augment is None else augment
    source = found_from_anywhere(data.source, "digits", "kanji")
    return replace(data, source=source, size=model.image_size, num_frames=model.num_frames, augment=strength, seed=seed)


@app.command()
@options
def train(
    run: RunOptions = RUN,
    preset: Annotated[PresetName, MODEL_SIZE] = "tiny",
    attention: Annotated[AttentionType, typer.Option(help="What attends to what.")] = "divided",
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a clip; default: the preset's.")] = None,
    drop_path: Annotated[float | None, typer.Option(min=0, max=0.9, help="Of the last block.")] = None,
    data: VideoDataConfig = DATA,
    augment: AugmentOption = None,
    schedule: TrainConfig = SCHEDULE,
    smoothing: Smoothing = 0.0,
    compile_model: Compile = False,
) -> None:
    """Train a model; run the same command again to resume."""
    model = replace(PRESETS[preset], attention=attention)
    if frames is not None:
        model = replace(model, num_frames=frames)
    if drop_path is not None:
        model = replace(model, drop_path=drop_path)
    train_run(
        model,
        settle(data, model, augment, schedule.seed),
        schedule,
        run.out,
        smoothing=smoothing,
        bad=bad_log(run.on_bad_data),
        resume=run.resume == "auto",
        compile_model=compile_model,
        cpu=run.cpu,
    )
    say(f"trained; next: python -m models.timesformer eval {shlex.quote(str(run.out))}")


@app.command(name="eval")
@options
def eval_command(
    checkpoint: Checkpoint, clips: ClipsOption = 1, crops: CropsOption = 3, evaluation: EvalOptions = EVALUATION
) -> None:
    """Accuracy on every test set beside its baselines, with tables, a JSON report and pictures."""
    model, run, classes = load_timesformer(checkpoint)
    bad = bad_log(evaluation.on_bad_data)
    splits = load_data(replace(run, source=evaluation.data) if evaluation.data else run, bad)
    announce(splits.notes, bad)
    if list(splits.train.classes) != classes:
        raise ValueError(
            f"--data {evaluation.data}: its classes are not those of the run, {', '.join(classes[:3])}, ..."
        )
    folder = evaluation.folder(checkpoint)
    evaluate_run(model, splits, folder, clips=clips, crops=crops, validation=evaluation.validation, bad=bad)
    if len(bad):
        warn(bad.summary())


@app.command()
def predict(
    checkpoint: Checkpoint,
    video: Annotated[Path, typer.Argument(help="A video file.")],
    clips: ClipsOption = 3,
    crops: CropsOption = 3,
    top: Top = 5,
    out: Annotated[Path | None, typer.Option(help="Save the attention on the first clip as a picture.")] = None,
) -> None:
    """The likeliest classes of a video file, from the mean over clips and crops."""
    model, run, classes = load_timesformer(checkpoint)
    if not video.is_file():
        raise FileNotFoundError(f"there is no video {video}")
    taken = clips_of_file(video, run.num_frames, run.size, clips, sampling=run.sampling, stride=run.stride)
    best = predict_views(model, taken, Views(clips, crops)).topk(min(top, len(classes)))
    table = Table(title=escape(f"{video.name}: {clips} clip(s) x {crops} crop(s)"))
    table.add_column("probability", justify="right")
    table.add_column("class")
    for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        table.add_row(f"{probability:.3f}", escape(classes[index]))
    console.print(table)
    if out is not None:
        draw_attention(model, taken[0], classes, out)
        say(f"written: {out}")


@app.command()
def flops() -> None:
    """Parameters and multiply-adds of every preset, counted on the real model by torch's own counter."""
    console.print(cost_table())
    console.print(
        "[dim]Hugging Face's base model does 195.83 GMAC a view: it projects the class token once for each frame, "
        "here it is projected once",
        highlight=False,
    )


@app.command()
@options
def ablation(
    out: Annotated[Path, typer.Option(help="Folder of the three runs and the table.")] = Path("runs/ablation"),
    run: Annotated[RunOptions, Only("resume", "cpu")] = RUN,
    preset: Annotated[PresetName, MODEL_SIZE] = "tiny",
    data: Annotated[VideoDataConfig, Without("sampling", "stride")] = DATA,
    augment: AugmentOption = None,
    schedule: Annotated[TrainConfig, Only("steps", "lr", "warmup", "ema", "precision", "seed")] = SCHEDULE,
) -> None:
    """The paper's comparison: space alone, joint and divided attention, after equal steps on the same clips."""
    config = PRESETS[preset]
    compare_attention(
        config,
        settle(data, config, augment, schedule.seed),
        schedule,
        out,
        title=f"{preset} on {data.source}",
        resume=run.resume == "auto",
        cpu=run.cpu,
    )


main = functools.partial(run_app, app)


if __name__ == "__main__":
    sys.exit(main())
