"""The command line of the captioner.

python -m models.captioning train --data emoji --out runs/captioning
python -m models.captioning eval runs/captioning
python -m models.captioning caption picture.png --run runs/captioning
"""

from __future__ import annotations

import functools
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from models.captioning.data import CaptionData
from models.captioning.evaluate import evaluate_run
from models.captioning.model import PRESETS, PresetName
from models.captioning.train import LossName, load_captioner, train_run
from models.captioning.write import draw_looks, write_captions
from models.common.cli import announce, bad_log, run_app
from models.common.console import say, warn
from models.common.options import (
    LOSS,
    MODEL_SIZE,
    PATIENCE,
    Checkpoint,
    EvalOptions,
    RunOptions,
    Smoothing,
    Trained,
    Without,
    options,
)
from models.common.schedule import TrainConfig
from models.data.sets import found_from_anywhere, read_image

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train and evaluate a captioner; caption images.")

PenaltyOption = Annotated[float, typer.Option(help="Length penalty of the search.")]

RUN, DATA = RunOptions(Path("runs/captioning")), CaptionData()
SCHEDULE, EVALUATION = TrainConfig(lr=2e-3, precision="auto"), EvalOptions()


@app.command()
@options
def train(
    run: RunOptions = RUN,
    preset: Annotated[PresetName, MODEL_SIZE] = "small",
    attention: Annotated[bool, typer.Option(help="Look at the map at each word, or know its summary alone.")] = True,
    data: Annotated[CaptionData, Without("keyword_share")] = DATA,
    images: Annotated[Path | None, typer.Option(help="Where the images lie, if not beside the captions.")] = None,
    schedule: TrainConfig = SCHEDULE,
    sampling: Annotated[
        float, typer.Option(min=0, max=1, help="Share of words before that the model wrote itself, at the end.")
    ] = 0.25,
    smoothing: Smoothing = 0.1,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between CIDEr on the validation set.")] = 200,
    patience: Annotated[int, PATIENCE] = 5,
    loss: Annotated[LossName, LOSS] = "fused",
) -> None:
    """Train until CIDEr on the validation set gets no better; run the same command again to resume."""
    config = replace(PRESETS[preset], attention=attention)
    source = data.settle(config.image_size, schedule.seed, warn)
    train_run(
        config,
        replace(source, images=found_from_anywhere(str(images)) if images is not None else None),
        schedule,
        run.out,
        loss=loss,
        sampling=sampling,
        smoothing=smoothing,
        evaluate_every=evaluate_every,
        patience=patience,
        bad=bad_log(run.on_bad_data),
        resume=run.resume == "auto",
        cpu=run.cpu,
    )
    say(f"trained; next: python -m models.captioning eval {shlex.quote(str(run.out))}")


@app.command(name="eval")
@options
def eval_command(
    checkpoint: Checkpoint,
    images: Annotated[Path | None, typer.Option(help="Where the images of that data lie.")] = None,
    length_penalty: PenaltyOption = 1.0,
    evaluation: EvalOptions = EVALUATION,
) -> None:
    """BLEU, CIDEr, time and certificates of greedy and beam search on every test set; a JSON report and pictures."""
    model, vocabulary, run = load_captioner(checkpoint)
    if evaluation.data:
        run = replace(run, source=evaluation.data, images=str(images) if images is not None else None)
    bad = bad_log(evaluation.on_bad_data)
    splits = run.load(bad)
    announce(splits.notes, bad)
    folder = evaluation.folder(checkpoint)
    evaluate_run(model, vocabulary, splits, folder, validation=evaluation.validation, length_penalty=length_penalty)


@app.command(name="caption")
def caption_command(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    run: Trained = Path("runs/captioning"),
    beams: Annotated[int, typer.Option(min=1, help="1: greedy.")] = 5,
    length_penalty: PenaltyOption = 1.0,
    out: Annotated[Path | None, typer.Option(help="Save a picture of where the model looks at each word.")] = None,
) -> None:
    """Caption an image."""
    model, vocabulary, _ = load_captioner(run)
    pixels = read_image(image, model.config.image_size)
    written = write_captions(model, vocabulary, pixels.unsqueeze(0), beams=beams, length_penalty=length_penalty)[0]
    say(written.text)
    if out is not None:
        draw_looks(model, vocabulary, [pixels], [written], out)
        say(f"written: {out}")


main = functools.partial(run_app, app)


if __name__ == "__main__":
    sys.exit(main())
