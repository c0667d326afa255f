"""Training with each loss, exact resume, the comparison, search in several languages, and clear errors."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from models.common.checkpoint import checkpoints, load_newest
from models.common.runs import read_history
from models.common.schedule import TrainConfig
from models.common.training import Trainer
from models.data import Splits
from models.data.synthetic import load_synthetic
from models.retrieval.__main__ import main
from models.retrieval.data import RetrievalData
from models.retrieval.model import PRESETS
from models.retrieval.train import LossConfig, load_retriever, train_run
from tests.models.stopping import stop_before

TRAIN = "--data synthetic --preset nano --variant-divisor 1 --augment 0.2 --cpu --precision no"
DATA = RetrievalData(
    source="synthetic", stored_size=32, batch_size=32, variant_divisor=1, augment=0.0, languages=("en", "de")
)


@pytest.fixture(scope="module")
def spoken() -> Splits:
    """Synthetic data in two languages."""
    return load_synthetic(32, languages=DATA.languages)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on synthetic data."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    options = "--batch-size 64 --steps 120 --lr 0.01 --warmup 5 --mining all --text bag"
    assert main(["train", "--out", str(out), *TRAIN.split(), *options.split()]) == 0
    return out


@pytest.mark.parametrize(
    "loss",
    [LossConfig(mining="all"), LossConfig(mining="semi_hard"), LossConfig("info_nce"), LossConfig("siglip")],
    ids=lambda loss: f"{loss.name}-{loss.mining}",
)
def test_each_loss_learns(loss: LossConfig, spoken: Splits, tmp_path: Path) -> None:
    config = TrainConfig(steps=50, lr=1e-2, warmup=5, checkpoint_every=1000)
    trainer, _ = train_run(PRESETS["nano"], DATA, config, loss, tmp_path, splits=spoken, cpu=True)
    first, last = trainer.history[:5], trainer.history[-10:]
    assert sum(row["loss"] for row in last) / 10 < 0.8 * sum(row["loss"] for row in first) / 5
    assert sum(row["r1"] for row in last) / 10 > 4 / 32, "four times chance"


def test_hardest_negatives_collapse_unless_warmed_up_or_centred(spoken: Splits, tmp_path: Path) -> None:
    """From random weights all features become one, and the loss stays at the margin: VSE++'s collapse."""
    config = TrainConfig(steps=70, lr=1e-2, warmup=5, checkpoint_every=1000)

    def end(centred: bool, warmup: int) -> tuple[float, float]:
        loss = LossConfig(mining="hardest", mining_warmup=warmup)
        model = replace(PRESETS["nano"], centred=centred)
        trainer, _ = train_run(model, DATA, config, loss, tmp_path / f"{centred}-{warmup}", splits=spoken, cpu=True)
        last = trainer.history[-10:]
        return sum(row["loss"] for row in last) / 10, sum(row["r1"] for row in last) / 10

    loss, found = end(centred=False, warmup=0)
    assert loss == pytest.approx(LossConfig.margin, abs=0.01)
    assert found < 0.15
    assert end(centred=False, warmup=50)[1] > 0.3
    assert end(centred=True, warmup=0)[1] > 0.3


def test_stopped_run_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    """Across the switch from all negatives to the hardest."""
    options = "--batch-size 24 --steps 24 --checkpoint-every 4 --mining hardest --mining-warmup 12 --ema 0.9"

    def train(name: str) -> int:
        return main(["train", "--out", str(tmp_path / name), *TRAIN.split(), *options.split()])

    assert train("whole") == 0
    stop_before(10, lambda: train("stopped"))
    assert checkpoints(tmp_path / "stopped")[0].stem == "step-0000008"
    assert train("stopped") == 0
    a, b = ([(r["step"], r["loss"], r["r1"]) for r in read_history(tmp_path / name)] for name in ("whole", "stopped"))
    assert a == b
    assert len(a) == 24
    found = [load_newest(tmp_path / name) for name in ("whole", "stopped")]
    assert found[0] is not None
    assert found[1] is not None
    c, d = found[0][0], found[1][0]
    assert c.keys() == d.keys()
    assert all(torch.equal(c[name], d[name]) for name in c)


def test_eval_writes_report_and_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    entry = report["sets"]["new style (dotted)"]
    assert set(entry["languages"]) == {"en", "de", "fr", "es"}
    for language, found in entry["languages"].items():
        for way, by in found["ways"].items():
            assert by["model"]["r10"] > 4 * by["chance"]["r10"], (language, way)
    assert set(entry["retrieval"]) == {"base", "full"}
    assert set(entry["retrieval"]["full"]["image to text"]) == {"model", "pixels", "chance"}
    for name in ("curves.png", "similarity.png", "retrieval.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 300
    printed = capsys.readouterr().out
    assert "Base gallery in each language" in printed
    assert main(["eval", str(run), "--validation"]) == 1
    assert "no validation set" in capsys.readouterr().out


def test_search_in_each_language(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found" / "sheet.png"
    queries = ["a blue square at the top", "Quadrat in Blau oben", "carré en bleu en haut", "cuadrado en azul arriba"]
    assert main(["search", *queries, "--run", str(run), "--top", "10", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    assert all(query in printed.replace("\n", " ") for query in queries)
    tables = printed.split("caption of the image")[1:]
    assert len(tables) == 4
    for table, query in zip(tables, queries, strict=True):
        assert table.count("at the top") >= 6, f"{query}: a fifth of the images are there"
    with Image.open(path) as picture:
        assert picture.width > 8 * 100
        assert picture.height > 4 * 2 * 100, "four queries of two rows each"


def test_compare_tells_the_losses_apart_and_repeats_no_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: RetrievalData, bad: object) -> Splits:
        splits = load_synthetic(self.stored_size, languages=self.languages)
        splits.validation = splits.tests["unseen concepts"]
        return splits

    monkeypatch.setattr(RetrievalData, "load", load)
    options = "--batch-size 32 --steps 4 --evaluate-every 2 --mining-warmup 2 --languages en,de"
    command = ["compare", "--out", str(tmp_path), *TRAIN.split(), *options.split()]
    assert main(command) == 0
    rows = json.loads((tmp_path / "compare.json").read_text())
    names = ["triplet, all", "triplet, semi-hard", "triplet, hardest", "triplet, all then hardest", "InfoNCE", "SigLIP"]
    assert [row["loss"] for row in rows] == names
    first = [read_history(tmp_path / "triplet-all")[0], read_history(tmp_path / "triplet-all-then-hardest")[0]]
    assert first[0]["loss"] == first[1]["loss"], "the same weights and the same batch"
    assert first[0]["r1"] == read_history(tmp_path / "siglip")[0]["r1"]
    for row in rows:
        assert set(row["sets"]) == {"validation", "new style (dotted)", "unseen concepts"}
        assert [score["step"] for score in row["scores"]] == [2, 4]
    with Image.open(tmp_path / "compare.png") as picture:
        assert min(picture.size) > 300
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)

    def refuse(self: Trainer) -> dict[str, float]:
        raise AssertionError("a finished run took another step")

    monkeypatch.setattr(Trainer, "train_step", refuse)
    assert main(command) == 0
    again = json.loads((tmp_path / "compare.json").read_text())
    assert [row["sets"] for row in again] == [row["sets"] for row in rows]


def test_own_folder_trains_evaluates_searches_and_counts_the_broken_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for i in range(40):
        colour = (i * 6, 255 - i * 6, i * 3)
        Image.new("RGB", (20, 16), colour).save(tmp_path / f"{i}.jpg")
        rows += [(f"{i}.jpg", f"picture number {i}", "en"), (f"{i}.jpg", f"bild nummer {i}", "de")]
    (tmp_path / "7.jpg").write_bytes(b"cut off")
    with open(tmp_path / "captions.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption", "language"), *rows])
    out = tmp_path / "run"
    options = ["--data", str(tmp_path), "--preset", "nano", "--batch-size", "8", "--steps", "2", "--cpu"]
    assert main(["train", "--out", str(out), *options]) == 0
    assert "skipped 1 bad file(s)" in capsys.readouterr().out
    assert main(["eval", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert set(report["sets"]["test"]["languages"]) == {"en", "de"}
    assert main(["search", "bild nummer 3", "--run", str(out), "--out", str(tmp_path / "sheet.png")]) == 0
    assert (tmp_path / "sheet.png").exists()
    assert main(["train", "--out", str(out), *options, "--resume", "never", "--on-bad-data", "raise"]) == 1
    assert "7.jpg: not an image" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "no/such/folder"], "--data no/such/folder: not 'emoji', 'synthetic' or an existing"),
        (["train", "--data", "synthetic", "--preset", "nano", "--batch-size", "999"], "batch size 999 exceeds"),
        (["train", "--data", "synthetic", "--languages", "en,xx"], "expected some of en, de, fr, es"),
        (["train", "--languages", "klingon"], "no emoji names in the language 'klingon'"),
        (["train", "--languages", ","], "expected codes with commas between them"),
        (["train", "--styles", "noto", "--validation-style", "twemoji"], "must not be trained or validated on"),
        (["compare", "--data", "no/such/folder"], "--data no/such/folder: not 'emoji'"),
        (["eval", "no/such/run"], "there is no checkpoint no/such/run"),
        (["search", "cat", "--run", "no/such/run"], "there is no checkpoint no/such/run"),
        (["search", " "], "a query must hold a word"),
    ],
)
def test_errors_are_one_clear_line(arguments: list[str], message: str, assert_refused: Callable[..., None]) -> None:
    assert_refused(main, arguments, message)


def test_resume_refuses_another_loss(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["train", "--out", str(run), *TRAIN.split(), "--batch-size", "64", "--text", "bag", "--mining", "hardest"])
        == 1
    )
    assert "another configuration (loss." in capsys.readouterr().out.replace("\n", " ")


def test_the_model_of_a_run_is_what_was_trained(run: Path) -> None:
    model, tokens, data = load_retriever(run)
    assert model.config.text == "bag"
    assert data.languages == ("en", "de", "fr", "es")
    assert model.logit_scale is None
    assert len(tokens) <= model.config.vocab_size
