"""Training and comparing fusions: learns, goes on with the same losses, repeats no finished run, clear errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import models.av_fusion.__main__ as command_line
import models.av_fusion.compare as comparison
from models.av_fusion.__main__ import main
from models.av_fusion.data import PairDataConfig
from models.av_fusion.evaluate import LABELS, SWEEPS, DrawnSet, evaluate, predict_batch
from models.av_fusion.model import FUSIONS, PRESETS
from models.av_fusion.train import RATES, FusionTask, load_fusion, train_run
from models.common.checkpoint import CheckpointError, load_newest
from models.common.runs import read_history
from models.common.schedule import TrainConfig
from models.data.audio import RATE
from models.data.pairs import Noise
from models.data.spoken_digits import load_synthetic_pairs
from tests.models.stopping import stop_before

NANO = PRESETS["nano"]
NOISE = Noise((0.0, 20.0), (0.0, 0.5), (0.0, 0.2))
DATA = PairDataConfig(source="synthetic", noise=NOISE, batch_size=32, dropout=0.3)
CONFIG = TrainConfig(steps=8, lr=5e-3, warmup=2, checkpoint_every=4, ema=0.9)
TRAIN = "--data synthetic --preset nano --batch-size 32 --lr 0.005 --warmup 10 --ema 0.95 --cpu"
EASY = "--snr 0 20 --sigma 0 0.5 --hidden 0 0.2"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of attention on synthetic data."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    assert main(["train", "--out", str(out), "--steps", "120", *TRAIN.split(), *EASY.split()]) == 0
    return out


def test_training_learns_voices_and_images_it_never_saw(run: Path) -> None:
    rows = read_history(run)
    assert len(rows) == 120
    first, last = (sum(row["loss"] for row in part) / 10 for part in (rows[:10], rows[-10:]))
    assert first > 1.8
    assert last < 0.7 * first
    model, data, classes = load_fusion(run)
    assert data.noise == NOISE
    assert classes[7] == "seven"
    splits = load_synthetic_pairs(16, 2048)
    clean = DrawnSet.draw(splits.tests["synthetic"], model.config, Noise((30, 30), (0, 0), (0, 0)), 400, 10)
    entry, found = evaluate(model, clean)
    assert entry["accuracy"] > 0.6, "chance is 0.1"
    torch.testing.assert_close(found.exp().sum(1), torch.ones(400))
    for name in ("image", "audio"):
        assert 0.15 < entry[f"without {name}"] < entry["accuracy"]


def test_stopped_run_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    train_run(NANO, DATA, CONFIG, tmp_path / "whole", cpu=True)

    stop_before(6, lambda: train_run(NANO, DATA, CONFIG, tmp_path / "stopped", cpu=True))
    train_run(NANO, DATA, CONFIG, tmp_path / "stopped", cpu=True)
    whole, stopped = (
        [(row["step"], row["loss"], row["accuracy"]) for row in read_history(tmp_path / name)]
        for name in ("whole", "stopped")
    )
    assert whole == stopped
    assert len(whole) == 8
    a, b = (load_newest(tmp_path / name) for name in ("whole", "stopped"))
    assert a is not None
    assert b is not None
    assert all(torch.equal(value, b[0][name]) for name, value in a[0].items())
    with pytest.raises(
        CheckpointError, match=r"another configuration \(av_fusion.fusion is \"late\", was \"attention\"\)"
    ):
        train_run(replace(NANO, fusion="late"), DATA, CONFIG, tmp_path / "whole", cpu=True)


def test_eval_writes_report_and_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--examples", "200", "--sweep", "40"]) == 0
    report = json.loads((run / "report.json").read_text())
    entry = report["sets"]["synthetic"]
    assert report["fusion"] == "attention"
    assert (entry["examples"], entry["chance"], entry["majority"]) == (200, 0.1, 0.1)
    assert sum(entry["weights"]) == pytest.approx(1)
    for name, levels in SWEEPS.items():
        assert [point["level"] for point in entry["sweeps"][name]] == list(levels)
        assert all(sum(point["weights"]) == pytest.approx(1) for point in entry["sweeps"][name])
    for name in ("curves.png", "confusion.png", "robustness.png", "weights.png", "examples.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 300
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("without the image", "always the largest class", "Mean attention", *LABELS.values()):
        assert words in printed
    folder = run / "validation"
    assert main(["eval", str(run), "--validation", "--out", str(folder), "--examples", "50", "--sweep", "10"]) == 0
    assert set(json.loads((folder / "report.json").read_text())["sets"]) == {"validation"}


def test_predict_from_both_or_either(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = load_synthetic_pairs(16, 2048).tests["synthetic"]
    row = int((data.labels == 4).nonzero()[0])
    clip = int((data.clip_groups == 4).nonzero()[0])
    Image.fromarray(data.images[row, 0].numpy()).save(tmp_path / "four.png")
    soundfile.write(tmp_path / "four.wav", data.clips[clip].numpy(), RATE)
    image, sound = ["--image", str(tmp_path / "four.png")], ["--audio", str(tmp_path / "four.wav")]
    assert main(["predict", str(run), *image, *sound]) == 0
    assert "│ four" in capsys.readouterr().out.split("├")[0].split("┡")[1].split("\n")[1]
    assert main(["predict", str(run), *sound, "--top", "3"]) == 0
    assert "attention: image 0.00" in capsys.readouterr().out
    assert main(["predict", str(run), *image]) == 0
    assert "sound 0.00" in capsys.readouterr().out
    assert main(["predict", str(run)]) == 1
    assert "give --image, --audio or both" in capsys.readouterr().out
    assert main(["predict", str(run), "--audio", str(tmp_path / "none.wav")]) == 1
    assert "none.wav: is not there" in capsys.readouterr().out.replace("\n", "")


def test_files_train_and_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "pairs"
    for split, count in (("train", 4), ("test", 2)):
        for label, hertz in (("low", 400), ("high", 1600)):
            for i in range(count):
                folder = root / split / label
                folder.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (20, 20), (90 * i % 255, 30, 200)).save(folder / f"{i}.png")
                soundfile.write(folder / f"{i}.wav", np.sin(np.arange(2000) * hertz * 2 * np.pi / RATE), RATE)
    (root / "train" / "low" / "0.wav").write_text("x")
    options = ["--data", str(root), "--out", str(tmp_path / "run"), "--preset", "nano", "--batch-size", "4", "--cpu"]
    assert main(["train", "--steps", "2", *options]) == 0
    assert "skipped 1 bad file(s)" in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "run"), "--examples", "8", "--sweep", "4"]) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["sets"]["test"]["majority"] == 0.5
    assert main(["train", "--steps", "2", *options, "--on-bad-data", "raise", "--resume", "never"]) == 1
    assert "0.wav: Format not recognised" in capsys.readouterr().out.replace("\n", " ")
    assert main(["eval", str(tmp_path / "run"), "--data", "synthetic"]) == 1
    assert "its classes are not those of the run" in capsys.readouterr().out


def test_compare_trains_each_once_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_rates = TRAIN.replace("--lr 0.005 ", "")
    options = f"compare --seeds 2 --steps 2 --examples 60 --sweep 10 {own_rates} {EASY} --out {tmp_path}".split()
    assert main(options) == 0
    rates = [read_history(tmp_path / f"{fusion}-1")[0]["lr"] / RATES[fusion] for fusion in FUSIONS]
    assert rates == pytest.approx([rates[0]] * len(FUSIONS)), "each its own, at the same step of the warm-up"
    report = json.loads((tmp_path / "compare.json").read_text())
    extra = ["both alone, averaged", "both alone, multiplied"]
    assert list(report["runs"]) == [*FUSIONS, *extra]
    assert all(len(runs) == 2 for runs in report["runs"].values())
    counts = [report["runs"][fusion][0]["parameters"] for fusion in ("early", "late", "weighted", "attention")]
    assert max(counts) < 1.03 * min(counts)
    for name in ("robustness.png", "weights.png", "examples.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300
    printed = capsys.readouterr().out
    assert all(f"│ {who}" in printed for who in report["runs"])
    # All is done: nothing is trained again. A run that is not finished is trained, and it alone.
    trained: list[Path] = []
    real = train_run

    def watched(*args: object, **kwargs: object) -> object:
        trained.append(args[3])  # type: ignore[arg-type]
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(comparison, "train_run", watched)
    assert main(options) == 0
    assert not trained
    (tmp_path / "late-1" / "result.json").unlink()
    assert main(options) == 0
    assert [path.name for path in trained] == ["late-1"]
    assert json.loads((tmp_path / "compare.json").read_text())["runs"] == report["runs"]


def test_every_fusion_sees_the_same_examples(tmp_path: Path) -> None:
    seen = {}
    loss = FusionTask.loss

    def watched(self: FusionTask, model: torch.nn.Module, batch: object) -> object:
        seen.setdefault(name, []).append(batch)
        return loss(self, model, batch)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusionTask, "loss", watched)
        for name in ("image", "early", "attention"):
            model = replace(NANO, fusion=name)  # type: ignore[arg-type]
            train_run(model, DATA, replace(CONFIG, steps=2), tmp_path / name, cpu=True)
    for a, b, c in zip(*seen.values(), strict=True):
        for field in ("images", "spectrograms", "labels"):
            assert torch.equal(getattr(a, field), getattr(b, field))
            assert torch.equal(getattr(b, field), getattr(c, field))
        assert torch.equal(b.present, c.present)
        assert a.present.all()


def test_predictions_do_not_depend_on_the_batch(run: Path) -> None:
    model, _, _ = load_fusion(run)
    data = load_synthetic_pairs(16, 2048).tests["synthetic"]
    batch = DrawnSet.draw(data, model.config, NOISE, 30, 1).standard
    torch.testing.assert_close(predict_batch(model, batch, size=7), predict_batch(model, batch))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "no/such/folder"], "--data no/such/folder: not 'digits', 'synthetic' or an existing"),
        (
            ["train", "--data", "synthetic", "--preset", "nano", "--batch-size", "9999"],
            "batch size 9999 exceeds the 400",
        ),
        (["train", "--data", "synthetic", "--snr", "6", "0"], "snr: expected a range from low to high, got 6.0 to 0.0"),
        (["eval", "no/such/run"], "there is no checkpoint no/such/run"),
        (["predict", "no/such/run", "--image", "x.png"], "there is no checkpoint no/such/run"),
    ],
)
def test_errors_are_one_clear_line(arguments: list[str], message: str, assert_refused: Callable[..., None]) -> None:
    assert_refused(main, arguments, message)


def test_each_fusion_has_its_own_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, float] = {}
    monkeypatch.setattr(
        command_line, "train_run", lambda model, _, train, *__, **___: seen.update({model.fusion: train.lr})
    )
    for fusion in FUSIONS:
        assert main(["train", "--fusion", fusion, "--out", str(tmp_path)]) == 0
    assert seen == RATES
    assert main(["train", "--fusion", "early", "--lr", "0.1", "--out", str(tmp_path)]) == 0
    assert seen["early"] == 0.1
    rates: list[dict[str, float]] = []
    monkeypatch.setattr(command_line, "compare_runs", lambda *_, **options: rates.append(options["rates"]))
    for options in ([], ["--lr", "0.1"]):
        assert main(["compare", "--out", str(tmp_path), *options]) == 0
    assert rates == [RATES, dict.fromkeys(FUSIONS, 0.1)]
