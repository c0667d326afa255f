"""Training a captioner: learns, stops early, goes on where it was killed; and the command line on all kinds of data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from models.captioning import train as captioning
from models.captioning.__main__ import main
from models.captioning.data import CaptionData
from models.captioning.model import PRESETS
from models.captioning.scores import caption_scores
from models.captioning.train import load_captioner, train_run
from models.captioning.write import references, write_captions
from models.common.checkpoint import checkpoints, load_checkpoint
from models.common.runs import BEST, read_history
from models.common.schedule import TrainConfig
from models.common.stopping import EarlyStopping
from models.common.training import Trainer
from models.data.sets import BadDataLog
from models.data.synthetic import load_synthetic
from tests.models.stopping import stop_before

TRAIN = "--data synthetic --preset nano --batch-size 48 --variant-divisor 1 --augment 0.2 --cpu --precision no"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on synthetic data."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    options = "--steps 240 --lr 0.005 --warmup 10 --ema 0.9 --evaluate-every 60 --smoothing 0"
    assert main(["train", "--out", str(out), *TRAIN.split(), *options.split()]) == 0
    return out


def test_training_learns_what_it_never_saw(run: Path) -> None:
    model, vocabulary, data = load_captioner(run)
    splits = data.load(BadDataLog())
    assert splits.validation is not None
    texts = [w.text for w in write_captions(model, vocabulary, splits.validation.images, beams=3)]
    found = caption_scores(texts, references(splits.validation))
    # Combinations of colour, shape and place that are in no training caption.
    assert not set(splits.validation.names()) & set(splits.train.names())
    assert found.bleu4 > 0.3
    assert found.cider > 2
    rows = read_history(run, "validation.jsonl")
    assert [row["step"] for row in rows] == [60, 120, 180, 240]
    best = max(rows, key=lambda row: row["score"])
    _, described = load_checkpoint(run / BEST)
    assert (described["step"], described["score"]) == (best["step"], best["score"])


def test_eval_writes_report_and_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    assert set(report["sets"]) == {"new style (dotted)", "unseen concepts"}
    for name, entry in report["sets"].items():
        found = entry["all"]["by"]
        beams = ["2 beams", "3 beams", "5 beams", "10 beams"] if name.startswith("new") else ["5 beams"]
        assert list(found) == ["greedy", *beams, "nearest image"]
        assert found["greedy"]["cider"] > 0.5
        for who, value in found.items():
            assert ("ms_per_image" in value) == (who != "nearest image")
            assert ("certified" in value) == who.endswith("beams")
            assert 0 <= value.get("certified", 0) <= 1
    # The caption of the nearest training image is never that of an unseen concept.
    assert report["sets"]["unseen concepts"]["all"]["by"]["nearest image"]["exact"] == 0
    for name in ("curves.png", "captions.png", "attention.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 300
    printed = capsys.readouterr().out
    assert "certified" in printed
    assert main(["eval", str(run), "--validation", "--out", str(run / "validation")]) == 0
    assert set(json.loads((run / "validation" / "report.json").read_text())["sets"]) == {"validation"}


def test_caption_an_image(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = load_synthetic(32).train.images[0]
    drawn = Image.fromarray(image.permute(1, 2, 0).numpy(), "RGBA")
    # On white: the transparent border of a drawing would be cut, and with it the place.
    Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).save(tmp_path / "red.png")
    path = tmp_path / "looks.png"
    assert main(["caption", str(tmp_path / "red.png"), "--run", str(run), "--out", str(path)]) == 0
    assert "circle in the middle" in capsys.readouterr().out
    with Image.open(path) as picture:
        assert min(picture.size) > 100
    assert main(["caption", str(tmp_path / "red.png"), "--run", str(run), "--beams", "1"]) == 0
    (tmp_path / "broken.png").write_bytes(b"x")
    assert main(["caption", str(tmp_path / "broken.png"), "--run", str(run)]) == 1
    assert "broken.png: not an image" in capsys.readouterr().out.replace("\n", "")
    assert main(["caption", str(tmp_path / "absent.png"), "--run", str(run)]) == 1
    assert "absent.png: No such file" in capsys.readouterr().out.replace("\n", "")


def test_without_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *TRAIN.split(), "--no-attention", "--steps", "3"]) == 0
    assert main(["eval", str(out)]) == 0
    assert not (out / "attention.png").exists()
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    assert main(["caption", str(tmp_path / "x.png"), "--run", str(out), "--out", str(tmp_path / "y.png")]) == 1
    assert "trained without attention" in capsys.readouterr().out


def test_stopped_run_goes_on_with_the_same_losses_scores_and_weights(tmp_path: Path) -> None:
    """With dropout and sampled words: their random numbers go on where they were."""
    options = "--steps 30 --checkpoint-every 4 --evaluate-every 7 --ema 0.9 --sampling 0.9"

    def train(name: str) -> int:
        return main(["train", "--out", str(tmp_path / name), *TRAIN.split(), *options.split()])

    assert train("whole") == 0
    stop_before(18, lambda: train("stopped"))
    assert checkpoints(tmp_path / "stopped")[0].stem == "step-0000016"
    assert train("stopped") == 0
    a, b = ([(r["step"], r["loss"]) for r in read_history(tmp_path / name)] for name in ("whole", "stopped"))
    assert a == b
    assert len(a) == 30
    a, b = (read_history(tmp_path / name, "validation.jsonl") for name in ("whole", "stopped"))
    assert a == b
    assert [row["step"] for row in a] == [7, 14, 21, 28, 30]
    c, d = (load_checkpoint(tmp_path / name / BEST)[0] for name in ("whole", "stopped"))
    assert all(torch.equal(c[name], d[name]) for name in c)


def test_early_stopping_keeps_the_best_and_stays_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([1.0, 3.0, 2.0, 3.0, 0.5, 9.0])
    seen: list[dict[str, torch.Tensor]] = []

    def score(weights: dict[str, torch.Tensor]) -> float:
        seen.append(weights)
        return next(scores)

    monkeypatch.setattr(captioning, "validation_score", lambda *_: score)
    data = CaptionData(source="synthetic", stored_size=32, batch_size=32, variant_divisor=1)
    config = TrainConfig(steps=100, checkpoint_every=1000)

    def train(resume: bool = True) -> Trainer:
        return train_run(PRESETS["nano"], data, config, tmp_path, evaluate_every=2, patience=3, resume=resume)[0]

    assert train().step == 10, "three evaluations after the best of 4"
    tensors, described = load_checkpoint(tmp_path / BEST)
    assert described["step"] == 4
    assert torch.equal(tensors["model/bias"], seen[1]["bias"])
    assert torch.equal(load_captioner(tmp_path)[0].bias, seen[1]["bias"])
    assert train().step == 10, "the same command does not go on"
    assert next(scores) == 9.0, "nor evaluate"
    scores = iter([1.0] * 4)
    assert train(resume=False).step == 8
    assert load_checkpoint(tmp_path / BEST)[1]["step"] == 2


def test_early_stopping_forgets_what_a_resumed_run_will_find_again(tmp_path: Path) -> None:
    rows = [{"step": 5, "score": 1.0}, {"step": 10, "score": 2.0}, {"step": 15, "score": 1.5}]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Stopped:
        run_dir, step, stop = tmp_path, 10, True

    stopping = EarlyStopping(lambda _: 0.0, every=5, patience=1)
    trainer = Stopped()
    stopping.start(trainer)  # type: ignore[arg-type]
    assert stopping.rows == rows[:2]
    assert not trainer.stop
    trainer.step = 15
    stopping.start(trainer)  # type: ignore[arg-type]
    assert trainer.stop


def test_coco_file_trains_evaluates_and_counts_the_broken_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    colours = {"red": (200, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 200)}
    images, annotations = [], []
    for i in range(60):
        name, value = list(colours.items())[i % 3]
        Image.new("RGB", (20, 16), value).save(tmp_path / "images" / f"{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg"})
        for text in (f"A {name} picture, number {i}.", f"a picture all in {name}"):
            annotations.append({"id": len(annotations), "image_id": i, "caption": text})
    (tmp_path / "images" / "7.jpg").write_bytes(b"cut off")
    path = tmp_path / "captions_train.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    out = tmp_path / "run"
    options = ["--out", str(out), "--data", str(path), "--images", str(tmp_path / "images"), "--preset", "nano"]
    options += ["--batch-size", "8", "--steps", "3", "--min-count", "2", "--cpu"]
    assert main(["train", *options]) == 0
    assert "skipped 1 bad file(s)" in capsys.readouterr().out
    assert main(["eval", str(out)]) == 0
    _, vocabulary, _ = load_captioner(out)
    assert "picture" in vocabulary.tokens
    assert "17" not in vocabulary.tokens, "it occurs once"
    assert main(["train", *options, "--on-bad-data", "raise", "--resume", "never"]) == 1
    assert "7.jpg: not an image" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "no/such/file.json"], "--data no/such/file.json: not 'emoji', 'synthetic' or an existing"),
        (["train", "--data", "synthetic", "--preset", "nano", "--batch-size", "999"], "batch size 999 exceeds"),
        (["train", "--data", "synthetic", "--min-count", "9999"], "choose a smaller --min-count"),
        (["train", "--styles", "noto", "--validation-style", "twemoji"], "must not be trained or validated on"),
        (["eval", "no/such/run"], "there is no checkpoint no/such/run"),
        (["caption", "x.png", "--run", "no/such/run"], "there is no checkpoint no/such/run"),
    ],
)
def test_errors_are_one_clear_line(arguments: list[str], message: str, assert_refused: Callable[..., None]) -> None:
    assert_refused(main, arguments, message)


def test_resume_refuses_another_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(run), *TRAIN.split(), "--sampling", "0.1", "--steps", "1"]) == 1
    assert "was trained with another" in capsys.readouterr().out.replace("\n", " ")
