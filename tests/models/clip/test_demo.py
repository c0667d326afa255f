"""The demo: phases that end in time and are heard of, and what it says at the end."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models.clip import demo
from models.clip.__main__ import main
from models.clip.demo import Clock, Threads, compare_losses, conclusions, demo_configs, draw_styles
from models.clip.evaluate import clip_encoder, evaluate
from models.clip.model import CLIP, PRESETS, TextConfig
from models.common.schedule import TrainConfig
from models.data import Splits
from models.data.sets import BadDataLog
from tests.models.clip.conftest import WIDTH, WordSums


def test_demo_ends_in_time_and_says_what_came_out(
    words: WordSums, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "PAIRS", (64, 128))
    began = time.monotonic()
    assert main(["demo", "--data", "synthetic", "--budget", "0.1", "--out", "demo"]) == 0
    assert time.monotonic() - began < 30
    report = json.loads(Path("demo/report.json").read_text())
    assert report["steps"] > 1
    assert set(report["losses"]) == {"64", "128"}
    printed = capsys.readouterr().out
    phases = ("drawings", "text features", "training", "evaluation", "fused against eager loss", "pictures")
    starts = [printed.index(f"{phase}: at most ") for phase in phases]
    assert starts == sorted(starts)
    end = printed[printed.index("minutes in all\nReached") :]
    assert end.index("Reached: R@1 of ") < end.index("Saved by the fused loss at 128 pairs") < end.index("Pictures: ")
    assert "models.clip retrieve demo --text" in end
    for name in ("retrieval.png", "similarity.png", "curves.png"):
        assert f"demo/{name}" in end
        assert Path("demo", name).exists()
    assert main(["retrieve", "demo", "--text", "something red"]) == 0


def test_phase_is_announced_and_says_that_it_is_under_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "HEARTBEAT_SECONDS", 0.05)
    with Clock(60).phase("waiting", 7) as until:
        assert 6 < until - time.monotonic() <= 7
        time.sleep(0.3)
    lines = capsys.readouterr().out.splitlines()
    assert "waiting: at most 7 s" in lines[0]
    assert len([line for line in lines if line.endswith("s so far")]) >= 2
    assert "minutes in all" in lines[-1]


def test_training_gets_what_the_other_phases_leave() -> None:
    clock = Clock(100, began=time.monotonic() - 30)
    after = sum(clock.box(phase) for phase in demo.AFTER_TRAINING)
    assert clock.training == pytest.approx(100 - 30 - after, abs=0.5)
    assert Clock(100, began=time.monotonic() - 300).training == pytest.approx(5), "a few steps in any case"


def test_styles_that_are_not_needed_are_left_out_if_time_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[str] = []

    def draw(name: str, size: int, cache_dir: Path, bad: BadDataLog) -> dict[str, object]:
        drawn.append(name)
        return {}

    monkeypatch.setattr(demo, "load_style", draw)
    source = demo_configs("emoji")[2]
    assert draw_styles(source, time.monotonic() + 60) == source
    assert set(drawn) == {"twemoji", *source.styles}
    assert draw_styles(source, time.monotonic() - 1).styles == ("openmoji", "noto")
    assert "going on without the style openmoji-line" in capsys.readouterr().out


def test_losses_are_compared_in_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PAIRS", (64, 1024))
    found = compare_losses(32, time.monotonic() + 4)
    row = found[1024]
    assert row["fused_ms"] > 0
    assert row["eager_ms"] > 0
    assert row["eager_mib"] > 3 * 1024**2 * 4 / 2**20, "logits, softmaxes and gradients"
    assert row["fused_mib"] < row["eager_mib"]
    assert list(compare_losses(32, time.monotonic() - 1)) == [64]


def test_conclusions_name_the_better_baseline() -> None:
    way = {"model": {"r1": 0.5}, "pixels": {"r1": 0.2}, "pixels, unframed": {"r1": 0.3}, "chance": {"r1": 0.1}}
    retrieval = {"base": {"size": 10, "image to text": way, "text to image": way}}
    classes = {"category": {"classes": 9, "macro": 0.6, "chance": 0.111}}
    report = {"sets": {"new style": {"retrieval": retrieval, "zero_shot": classes}}}
    losses = {8: {"fused_ms": 1.0, "eager_ms": 1.0, "fused_mib": 1.0, "eager_mib": 1.0}}
    losses[9] = {"fused_ms": 1500.0, "eager_ms": 3000.0, "fused_mib": 5.0, "eager_mib": 1024.0}
    reached, saved = conclusions(report, losses, 384)
    assert "image to text 0.500 (nearest pixel 0.300), text to image 0.500 (nearest pixel 0.300)" in reached
    assert "9 category: macro 0.600 (chance 0.111)" in reached
    assert "at 9 pairs of 384 features: 1.50 s instead of 3.00, 5 MiB instead of 1024" in saved


def test_training_takes_the_threads_that_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    seconds = {1: 0.5, 2: 0.3}
    choose, trainer = Threads(3.0), SimpleNamespace(step=0, history=[], config=TrainConfig(minutes=5.0))

    def steps(number: int) -> list[int]:
        taken = []
        for _ in range(number):
            taken.append(counts[-1])
            trainer.step += 1
            trainer.history.append({"seconds": seconds[counts[-1]]})
            choose(trainer)  # type: ignore[arg-type]
        return taken

    assert steps(6) == [2, 2, 1, 2, 2, 2]
    assert choose.lost == 0
    choose.tried = -math.inf
    assert steps(4) == [2, 1, 2, 2], "the slower is tried again"
    seconds[2] = 20.0  # another job has taken a core
    assert steps(3) == [2, 1, 1]
    choose.tried = time.monotonic() - 100
    assert steps(3) == [1, 1, 1], "a trial that takes long comes seldom"
    assert trainer.config.minutes == 5
    choose.tried = -math.inf
    assert steps(4) == [1, 2, 1, 1]
    assert trainer.config.minutes == 8, "one thread was faster twice"
    choose.tried = -math.inf
    assert steps(4) == [1, 2, 1, 1]
    assert trainer.config.minutes == 8


def test_evaluation_begins_no_further_set_when_time_is_over(words: WordSums, synthetic: Splits) -> None:
    reader = words.reader(None)
    config = replace(PRESETS["nano"], embed_dim=WIDTH, text=TextConfig(frozen="minilm", width=WIDTH))
    encoder = clip_encoder(CLIP(config), reader)
    assert len(evaluate(encoder, synthetic, until=time.monotonic() + 600)["sets"]) == 2
    report = evaluate(encoder, synthetic, until=time.monotonic() - 1)
    assert list(report["sets"]) == ["new style (dotted)"], "the first is evaluated in any case"
    assert "not evaluated, for the time was over: unseen concepts" in report["notes"]


def test_two_comparisons_give_a_busy_machine_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    choose, trainer = Threads(3.0), SimpleNamespace(step=0, history=[], config=TrainConfig(minutes=5.0))
    for _ in range(8):
        trainer.step += 1
        trainer.history.append({"seconds": {1: 0.5, 2: 0.9}[counts[-1]]})
        choose(trainer)  # type: ignore[arg-type]
        if trainer.step == 3:
            assert trainer.config.minutes == 5
            choose.tried = -math.inf
    assert counts[1:] == [1, 1, 2, 1, 1, 1, 1]
    assert trainer.config.minutes == 8
