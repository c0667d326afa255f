"""The paper's comparison of what attends to what, each trained for equal steps on the same clips."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from models.common.console import console
from models.common.schedule import TrainConfig
from models.timesformer.cost import cost, step_cost
from models.timesformer.data import VideoDataConfig
from models.timesformer.evaluate import Scores, predict_set
from models.timesformer.model import ATTENTION_TYPES, TimeSformer, TimesformerConfig
from models.timesformer.train import train_run


def compare_attention(
    model_config: TimesformerConfig,
    data: VideoDataConfig,
    train: TrainConfig,
    out: Path,
    *,
    title: str,
    resume: bool = True,
    cpu: bool = False,
) -> None:
    """Train a model with each attention, print one table, and write ``ablation.json`` to ``out``."""
    columns = ("attention", "M parameters", "top-1", "top-5", "GMAC a clip", "ms a batch", "MiB a batch")
    table = Table(title=f"{title}, {train.steps} steps of {data.batch_size} clips, test set")
    for column in columns:
        table.add_column(column, justify="left" if column == "attention" else "right")
    rows = []
    for attention in ATTENTION_TYPES:
        console.rule(f"{attention} attention")
        config = replace(model_config, attention=attention)
        trainer, splits = train_run(config, data, train, out / attention, resume=resume, cpu=cpu)
        model = trainer.raw_model
        assert isinstance(model, TimeSformer)
        seconds, held = step_cost(trainer)
        model.load_state_dict(trainer.weights())
        scores = Scores.of(*predict_set(model, next(iter(splits.tests.values()))))
        found = cost(model.config)
        rows.append(
            {"attention": attention, "parameters": found.parameters, "top1": scores.top1, "top5": scores.top5}
            | {"macs": found.macs, "seconds": seconds, "bytes": held}
        )
        table.add_row(
            attention,
            f"{found.parameters / 1e6:.2f}",
            f"{scores.top1:.3f}",
            f"{scores.top5:.3f}",
            f"{found.macs / 1e9:.3f}",
            f"{1e3 * seconds:.0f}",
            f"{held / 2**20:.0f}",
        )
    (out / "ablation.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    console.print(table)
