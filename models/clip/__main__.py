"""The command line of CLIP.

python -m models.clip train --data emoji --out runs/clip
python -m models.clip eval runs/clip
python -m models.clip retrieve runs/clip --text "a cat with a wry smile"
python -m models.clip export runs/clip clip.pt2
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

from models.clip.demo import run_demo
from models.clip.evaluate import clip_encoder, evaluate_run, search
from models.clip.export import export_model
from models.clip.model import PRESETS, PresetName
from models.clip.text import TextEncoderName
from models.clip.train import LossName, load_clip, train_run
from models.common.cli import announce, bad_log, run_app
from models.common.console import console, say, warn
from models.common.options import LOSS, MODEL_SIZE, Checkpoint, Compile, EvalOptions, Only, RunOptions, Top, options
from models.common.plots import contact_sheet
from models.common.schedule import TrainConfig
from models.data.config import DataConfig, load_data
from models.data.sets import BadDataLog, read_image

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train, evaluate, search and export CLIP.")

RUN, DATA, SCHEDULE = RunOptions(Path("runs/clip")), DataConfig(), TrainConfig(precision="auto")
EVALUATION = EvalOptions()


@app.command()
@options
def train(
    run: RunOptions = RUN,
    preset: Annotated[PresetName, MODEL_SIZE] = "tiny",
    text_encoder: Annotated[
        TextEncoderName, typer.Option(help="Train one, or all-MiniLM-L6-v2 as it is (frozen).")
    ] = "trained",
    data: DataConfig = DATA,
    schedule: TrainConfig = SCHEDULE,
    image_weight: Annotated[float, typer.Option(min=0, help="Weight of the loss between two views.")] = 0.0,
    scale_lr: Annotated[float, typer.Option(min=0, help="Learning rate of the temperature, as a multiple.")] = 1.0,
    loss: Annotated[LossName, LOSS] = "fused",
    compile_model: Compile = False,
) -> None:
    """Train a model; run the same command again to resume."""
    train_run(
        preset,
        data.settle(PRESETS[preset].vision.image_size, schedule.seed, warn),
        schedule,
        run.out,
        text_encoder=text_encoder,
        loss=loss,
        image_weight=image_weight,
        scale_lr=scale_lr,
        bad=bad_log(run.on_bad_data),
        resume=run.resume == "auto",
        compile_model=compile_model,
        cpu=run.cpu,
    )
    say(f"trained; next: python -m models.clip eval {shlex.quote(str(run.out))}")


def other_data(run: DataConfig, source: str) -> DataConfig:
    """The data of a run, or other data read in the same way."""
    return replace(run, source=source) if source else run


@app.command(name="eval")
@options
def eval_command(checkpoint: Checkpoint, evaluation: EvalOptions = EVALUATION) -> None:
    """Zero-shot accuracy and retrieval on every test set, with tables, a JSON report and pictures."""
    model, run, reader = load_clip(checkpoint)
    bad = bad_log(evaluation.on_bad_data)
    splits = load_data(other_data(run, evaluation.data), bad)
    announce(splits.notes, bad)
    folder = evaluation.folder(checkpoint)
    encoder = clip_encoder(model, reader)
    evaluate_run(encoder, splits, folder, validation=evaluation.validation, batch_size=run.batch_size)


@app.command()
@options
def retrieve(
    checkpoint: Checkpoint,
    text: Annotated[str, typer.Option(help="Find images for this text.")] = "",
    image: Annotated[Path | None, typer.Option(help="Find captions for this image file.")] = None,
    evaluation: Annotated[EvalOptions, Only("data")] = EVALUATION,
    top: Top = 5,
    out: Annotated[Path | None, typer.Option(help="Save the images found as a picture.")] = None,
) -> None:
    """Search the first test set's images by a text, or its captions by an image."""
    if bool(text) == (image is not None):
        raise typer.BadParameter("give either --text or --image")
    model, run, reader = load_clip(checkpoint)
    splits = load_data(other_data(run, evaluation.data), BadDataLog())
    name, found = next(iter(splits.tests.items())) if splits.tests else ("train", splits.train)
    gallery = found.gallery()
    encoder = clip_encoder(model, reader)
    if image is not None:
        pixels = read_image(image, gallery.size)
        scores = encoder.texts(gallery.names()) @ encoder.images(pixels.unsqueeze(0))[0]
    else:
        scores = search(encoder, splits.train, gallery.images, [text])[0]
    best = scores.topk(min(top, len(gallery)))
    table = Table(title=escape(f"{text or image} in {len(gallery)} of {name}"))
    table.add_column("cosine", justify="right")
    table.add_column("caption of the image" if text else "caption")
    names = gallery.names()
    for score, row in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        table.add_row(f"{score:.3f}", escape(names[row]))
    console.print(table)
    if out is not None and text:
        contact_sheet([(text, gallery.select(best.indices), best.values)], out)
        say(f"written: {out}")


@app.command()
def export(checkpoint: Checkpoint, path: Annotated[Path, typer.Argument(help="Where to save, e.g. clip.pt2.")]) -> None:
    """Save a torch.export program of both encoders, checked against eager."""
    model, *_ = load_clip(checkpoint)
    error = export_model(model, path)
    if error > 1e-4:
        raise RuntimeError(f"{path}: the exported program differs from eager by {error:.1e}; it should not be used")
    say(f"written: {path}; largest difference from eager {error:.1e}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    budget: Annotated[
        float, typer.Option(min=0.1, help="Minutes for everything; a third more beside other jobs.")
    ] = 9.5,
    data: Annotated[str, typer.Option(help="'emoji' or, for a quick look, 'synthetic'.")] = "emoji",
) -> None:
    """Build, train and evaluate a small CLIP within the budget, and compare the fused loss with the eager one."""
    run_demo(out, budget, data)


main = functools.partial(run_app, app)


if __name__ == "__main__":
    sys.exit(main())
