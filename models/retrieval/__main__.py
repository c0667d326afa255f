"""The command line of the retrieval model.

python -m models.retrieval train --data emoji --out runs/retrieval
python -m models.retrieval eval runs/retrieval
python -m models.retrieval search "smiling cat" "lachende Katze" --run runs/retrieval --out found.png
python -m models.retrieval compare --out runs/compare
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
    PATIENCE,
    Checkpoint,
    EvalOptions,
    Only,
    RunOptions,
    Trained,
    options,
    split_commas,
)
from models.common.plots import contact_sheet
from models.common.schedule import TrainConfig
from models.retrieval.compare import compare_losses
from models.retrieval.data import RetrievalData, pick_languages
from models.retrieval.evaluate import best_images, evaluate_run, retriever_encoder
from models.retrieval.model import PRESETS, PresetName, RetrieverConfig, TextEncoderName
from models.retrieval.train import LossConfig, load_retriever, train_run

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train, compare and search by retrieval models.")

TextOption = Annotated[TextEncoderName, typer.Option(help="Text encoder.")]
EveryOption = Annotated[int, typer.Option(min=1, help="Steps between R@1 on the validation set, if there is one.")]

RUN, DATA, LOSS = RunOptions(Path("runs/retrieval")), RetrievalData(), LossConfig()
SCHEDULE = TrainConfig(lr=2e-3, warmup=60, precision="auto")
COMPARISON, EVALUATION = replace(SCHEDULE, steps=500), EvalOptions()


@app.command()
@options
def train(
    run: RunOptions = RUN,
    preset: Annotated[PresetName, MODEL_SIZE] = "small",
    text: TextOption = "gru",
    centred: Annotated[
        bool, typer.Option(help="A batch norm behind each projection, so that features start apart.")
    ] = RetrieverConfig.centred,
    loss: LossConfig = LOSS,
    data: RetrievalData = DATA,
    schedule: TrainConfig = SCHEDULE,
    evaluate_every: EveryOption = 100,
    patience: Annotated[int | None, PATIENCE] = None,
) -> None:
    """Train a model; run the same command again to resume."""
    config = replace(PRESETS[preset], text=text, centred=centred)
    train_run(
        config,
        data.settle(config.image_size, schedule.seed, warn),
        schedule,
        loss,
        run.out,
        evaluate_every=evaluate_every,
        patience=patience,
        bad=bad_log(run.on_bad_data),
        resume=run.resume == "auto",
        cpu=run.cpu,
    )
    say(f"trained; next: python -m models.retrieval eval {shlex.quote(str(run.out))}")


def other_data(run: RetrievalData, source: str, languages: str = "") -> RetrievalData:
    """The data of a run, or other data and languages read in the same way."""
    spoken = pick_languages(split_commas(languages)) if languages else run.languages
    return replace(run, source=source or run.source, languages=spoken)


@app.command(name="eval")
@options
def eval_command(
    checkpoint: Checkpoint,
    languages: Annotated[str, typer.Option(help="Other languages than the run was trained on, with commas.")] = "",
    evaluation: EvalOptions = EVALUATION,
) -> None:
    """Retrieval both ways and in each language on every test set, with tables, a JSON report and pictures."""
    model, tokens, run = load_retriever(checkpoint)
    bad = bad_log(evaluation.on_bad_data)
    splits = other_data(run, evaluation.data, languages).load(bad)
    announce(splits.notes, bad)
    folder = evaluation.folder(checkpoint)
    evaluate_run(retriever_encoder(model, tokens), splits, folder, validation=evaluation.validation)


@app.command()
@options
def search(
    queries: Annotated[list[str], typer.Argument(help="Texts in any of the languages that the run was trained on.")],
    run: Trained = Path("runs/retrieval"),
    evaluation: Annotated[EvalOptions, Only("data", "on_bad_data")] = EVALUATION,
    top: Annotated[int, typer.Option(min=1, help="Images for each query.")] = 8,
    variants: Annotated[bool, typer.Option("--variants", help="Search variants (skin tones), too.")] = False,
    out: Annotated[Path, typer.Option(help="Where the contact sheet goes.")] = Path("search.png"),
) -> None:
    """Find the best images for texts in the first test set, in a style that training never saw."""
    if blank := [query for query in queries if not query.strip()]:
        raise ValueError(f"a query must hold a word; got {blank[0]!r}")
    model, tokens, trained = load_retriever(run)
    bad = bad_log(evaluation.on_bad_data)
    splits = other_data(trained, evaluation.data).load(bad)
    announce([], bad)
    name, found = next(iter(splits.tests.items())) if splits.tests else ("train", splits.train)
    gallery = found.gallery(variants=variants)
    scores, rows = best_images(retriever_encoder(model, tokens), gallery, queries, top)
    sheet = []
    for query, own, picked in zip(queries, scores, rows, strict=True):
        part = gallery.select(picked)
        table = Table(title=escape(f"{query} in {len(gallery)} of {name}"))
        table.add_column("cosine", justify="right")
        table.add_column("caption of the image")
        for score, caption in zip(own.tolist(), part.names(), strict=True):
            table.add_row(f"{score:.3f}", escape(caption))
        console.print(table)
        sheet.append((query, part, own))
    contact_sheet(sheet, out)
    say(f"written: {out}")


@app.command()
@options
def compare(
    out: Annotated[Path, typer.Option(help="Folder of the runs, the table and the plot.")] = Path("runs/compare"),
    run: Annotated[RunOptions, Only("resume", "cpu")] = RUN,
    preset: Annotated[PresetName, MODEL_SIZE] = "small",
    text: TextOption = "gru",
    loss: Annotated[LossConfig, Only("margin")] = LOSS,
    mining_warmup: Annotated[
        int | None, typer.Option(min=1, help="Steps with all negatives first, of the run that has them; default: 1/4.")
    ] = None,
    data: RetrievalData = DATA,
    schedule: Annotated[TrainConfig, Only("steps", "lr", "warmup", "ema", "precision", "seed")] = COMPARISON,
    evaluate_every: EveryOption = 100,
) -> None:
    """Triplet with each mining, InfoNCE and SigLIP: the same encoders, batches, steps and seed.

    Run the same command again to resume; a finished run is not repeated. Where the data has a validation set
    the weights of each run are those that did best on it.
    """
    config = replace(PRESETS[preset], text=text)
    compare_losses(
        config,
        data.settle(config.image_size, schedule.seed, warn),
        replace(schedule, checkpoint_every=evaluate_every),
        out,
        margin=loss.margin,
        mining_warmup=mining_warmup,
        resume=run.resume == "auto",
        cpu=run.cpu,
    )


main = functools.partial(run_app, app)


if __name__ == "__main__":
    sys.exit(main())
