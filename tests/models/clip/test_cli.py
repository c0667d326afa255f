"""The command line from training to export, its reports and pictures, its errors; and the metrics behind them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from models.clip.__main__ import main
from models.common.metrics import PixelBaseline, Retrieval, accuracy, ranks_of_scores

TRAIN = ["--data", "synthetic", "--preset", "nano", "--batch-size", "48", "--lr", "0.003", "--warmup", "5", "--cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on synthetic data."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    assert main(["train", "--out", str(out), "--steps", "200", *TRAIN]) == 0
    return out


def test_eval_writes_report_and_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    assert set(report["sets"]) == {"new style (dotted)", "unseen concepts"}
    entry = report["sets"]["new style (dotted)"]
    found = next(iter(entry["retrieval"].values()))
    n = found["size"]
    assert found["image to text"]["chance"]["r5"] == pytest.approx(5 / n)
    model, chance = (found["image to text"][name]["median_rank"] for name in ("model", "chance"))
    assert model < 0.6 * chance, "two hundred steps must beat chance"
    assert set(entry["zero_shot"]) == {"shape", "colour"}
    assert entry["zero_shot"]["colour"]["majority"] < 0.3
    for name in ("curves.png", "similarity.png", "retrieval.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 300
    printed = capsys.readouterr().out
    assert "Retrieval" in printed
    assert "Zero-shot" in printed


def test_retrieve_by_text_and_by_image(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retrieve", str(run), "--text", "a red circle", "--top", "3", "--out", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").exists()
    Image.new("RGB", (50, 50), (0, 0, 255)).save(tmp_path / "query.png")
    assert main(["retrieve", str(run), "--image", str(tmp_path / "query.png")]) == 0
    assert "cosine" in capsys.readouterr().out


def test_export_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), str(tmp_path / "clip.pt2")]) == 0
    assert (tmp_path / "clip.pt2").stat().st_size > 10_000
    assert "largest difference from eager" in capsys.readouterr().out


def test_users_folder_trains_and_evaluates(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = []
    for i in range(40):
        Image.new("RGB", (32, 32), (6 * i, 255 - 6 * i, 128)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,shade {i},{'test' if i % 4 == 0 else 'train'}")
    (folder / "broken.png").write_bytes(b"x")
    lines.append("broken.png,broken,train")
    (folder / "captions.csv").write_text("image,caption,split\n" + "\n".join(lines))
    options = ["--data", str(folder), "--out", str(tmp_path / "run"), "--preset", "nano", "--batch-size", "15", "--cpu"]
    assert main(["train", "--steps", "2", *options]) == 0
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert main(["train", "--steps", "2", *options, "--on-bad-data", "raise", "--resume", "never"]) == 1


def test_bad_data_stops_the_run_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "captions.csv").write_text("image,caption\na.png,a\n")
    assert main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--on-bad-data", "raise"]) == 1
    assert "a.png: not an image" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "no/such/folder"], "--data no/such/folder: not 'emoji', 'synthetic' or an existing"),
        (["train", "--data", "synthetic", "--preset", "nano", "--batch-size", "9999"], "batch size 9999 exceeds"),
        (["train", "--styles", "crayon"], "no drawing style 'crayon'; there are openmoji"),
        (["train", "--styles", "twemoji"], "test style twemoji must not be trained"),
        (["eval", "no/such/run"], "there is no checkpoint no/such/run"),
        (["retrieve", "no/such/run", "--text", "x"], "there is no checkpoint no/such/run"),
    ],
)
def test_errors_are_one_clear_line(arguments: list[str], message: str, assert_refused: Callable[..., None]) -> None:
    assert_refused(main, arguments, message)


def test_eval_refuses_a_missing_validation_set(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--validation"]) == 1
    assert "no validation set" in capsys.readouterr().out


def test_ranks_and_recalls() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [5.0, 4.0, 9.0], [7.0, 7.0, 7.0]])
    ranks = ranks_of_scores(scores)
    # Row 2: a tie at a lower index goes before.
    assert ranks.tolist() == [0, 2, 2]
    found = Retrieval.from_ranks(ranks)
    assert (found.r1, found.r5, found.median_rank) == (pytest.approx(1 / 3), 1.0, 3.0)
    assert Retrieval.chance(1000).r10 == pytest.approx(0.01)
    random = Retrieval.from_ranks(ranks_of_scores(torch.randn(800, 800, generator=torch.Generator().manual_seed(0))))
    assert random.median_rank == pytest.approx(Retrieval.chance(800).median_rank, rel=0.1)


def test_accuracy_counts_classes_that_occur() -> None:
    truth = torch.tensor([0, 0, 0, 1])
    found = accuracy(torch.tensor([0, 0, 0, 0]), truth, 3)
    assert (found.micro, found.macro, found.majority, found.classes, found.chance) == (0.75, 0.5, 0.75, 2, 0.5)


def test_pixel_baseline_finds_the_alike_and_stands_in_for_unseen_captions() -> None:
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 256, (3, 4, 32, 32), generator=generator, dtype=torch.uint8)
    train[:, 3] = 255
    names = ["red apple", "green pear", "blue boat", "blue ship sails"]
    baseline = PixelBaseline(train, torch.tensor([0, 1, 2]), names)
    test = train[[2, 0]]
    scores = baseline.scores(test, torch.tensor([2, 0]), ["blue boat", "red apple"])
    assert scores.argmax(1).tolist() == [0, 1]
    assert baseline.nearest_concepts(test) == [2, 0]
    # Caption 3 was never trained: "blue boat" shares most words with it.
    unseen = baseline.scores(test, torch.tensor([3, 0]), ["blue ship sails", "red apple"])
    torch.testing.assert_close(unseen[:, 0], scores[:, 0])
