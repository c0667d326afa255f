"""Training: exact resume, checkpoints that survive, and a run that learns."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import models.common.checkpoint
import models.common.log
from models.clip.train import load_clip, train_run
from models.common.checkpoint import CheckpointError, checkpoints, load_checkpoint, load_newest, save_checkpoint
from models.common.runs import read_history
from models.common.schedule import TrainConfig, learning_rate
from models.common.state import WeightAverage
from models.data.config import DataConfig

ROOT = Path(__file__).resolve().parents[3]
CONFIG = TrainConfig(steps=12, lr=3e-3, warmup=3, checkpoint_every=4, keep=2, ema=0.9)


def _losses(folder: Path) -> list[tuple[float, float, float]]:
    return [(row["step"], row["loss"], row["scale"]) for row in read_history(folder)]


def _train_command(out: Path, *extra: str) -> list[str]:
    options = "--data synthetic --preset nano --batch-size 32 --variant-divisor 1 --steps 24 --checkpoint-every 3"
    return [sys.executable, "-m", "models.clip", "train", "--out", str(out), "--cpu", *options.split(), *extra]


def test_killed_run_resumes_with_the_same_losses(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            _train_command(out, "--ema", "0.9"), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
        )

    whole, process = run(tmp_path / "whole"), run(tmp_path / "killed")
    deadline = time.monotonic() + 300
    while not checkpoints(tmp_path / "killed") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = load_newest(tmp_path / "killed")
    assert reached is not None
    assert 3 <= reached[1]["step"] < 24
    assert run(tmp_path / "killed").wait(300) == 0
    assert whole.wait(300) == 0
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")
    final = [load_newest(tmp_path / name) for name in ("whole", "killed")]
    assert final[0] is not None
    assert final[1] is not None
    a, b = final[0][0], final[1][0]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_training_learns_the_synthetic_captions(tmp_path: Path, nano_data: DataConfig) -> None:
    config = replace(CONFIG, steps=200, lr=2e-3, warmup=10, checkpoint_every=1000)
    trainer, _ = train_run("nano", replace(nano_data, augment=0.2, keyword_share=0.0), config, tmp_path)
    # Features that know nothing give ln 32 at best.
    assert sum(row["loss"] for row in trainer.history[-10:]) / 10 < 0.7 * math.log(32)


def test_accumulated_batches_give_the_mean_gradient(tmp_path: Path, nano_data: DataConfig) -> None:
    trainer, _ = train_run("nano", nano_data, replace(CONFIG, steps=2, accumulate=2), tmp_path)
    assert trainer.step == 2
    assert len(trainer.history) == 2
    assert trainer.optimizer.optimizer.state[next(iter(trainer.raw_model.parameters()))]["step"] == 2


def test_learning_rate_warms_up_and_decays() -> None:
    config = TrainConfig(steps=100, lr=1.0, warmup=10, final_lr=0.1)
    assert learning_rate(config, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(config, 9, 0.0) == pytest.approx(1.0)
    assert learning_rate(config, 55, 0.5) == pytest.approx(0.55)
    assert learning_rate(config, 99, 1.0) == pytest.approx(0.1)


def test_time_budget_ends_the_run(tmp_path: Path, nano_data: DataConfig) -> None:
    trainer, _ = train_run(
        "nano", nano_data, replace(CONFIG, steps=10**6, minutes=0.02, checkpoint_every=10**6), tmp_path
    )
    assert 0 < trainer.step < 10**4
    assert trainer.progress() >= 1
    assert len(checkpoints(tmp_path)) == 1


def test_log_file_gets_a_line_in_time(
    tmp_path: Path, nano_data: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_run("nano", nano_data, replace(CONFIG, steps=3), tmp_path / "fast")
    assert "step 2/3" not in capsys.readouterr().out
    monkeypatch.setattr(models.common.log, "LINE_SECONDS", 0)
    train_run("nano", nano_data, replace(CONFIG, steps=3), tmp_path / "slow")
    assert "step 2/3" in capsys.readouterr().out


def test_weight_average_starts_fast_and_copies_counters() -> None:
    model = torch.nn.BatchNorm1d(2)
    average = WeightAverage(model, 0.999)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.num_batches_tracked.fill_(5)
    average.update(model)
    # (1 + 1) / (10 + 1) of the old value stays after the first update.
    torch.testing.assert_close(average.state["weight"], torch.full((2,), 2 - 2 / 11))
    assert int(average.state["num_batches_tracked"]) == 5


def test_truncated_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / f"step-000000{step}.safetensors", {"x": torch.full((1000,), step)}, {"step": step})
    newest = tmp_path / "step-0000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    messages: list[str] = []
    found = load_newest(tmp_path, messages.append)
    assert found is not None
    assert found[1] == {"step": 1}
    assert "step-0000002.safetensors is truncated or damaged" in messages[0]
    oldest = tmp_path / "step-0000001.safetensors"
    oldest.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"no good checkpoint .*step-0000002.*step-0000001.*--resume never"):
        load_newest(tmp_path, messages.append)
    assert load_newest(tmp_path / "none") is None


def test_training_resumes_past_a_truncated_checkpoint(tmp_path: Path, nano_data: DataConfig) -> None:
    train_run("nano", nano_data, replace(CONFIG, steps=8), tmp_path)
    newest = checkpoints(tmp_path)[0]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    trainer, _ = train_run("nano", nano_data, CONFIG, tmp_path)
    assert [row["step"] for row in trainer.history] == list(range(12))
    load_clip(tmp_path)


def test_foreign_and_missing_checkpoints_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other.safetensors is a safetensors file, but no checkpoint"):
        load_checkpoint(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="holds no checkpoint; train first"):
        load_clip(tmp_path / "..")


def test_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step-0000001.safetensors"
    save_checkpoint(path, {"x": torch.ones(10)}, {"step": 1})
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(models.common.checkpoint.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"could not save .*step-0000001.* \(No space left on device.*untouched"):
        save_checkpoint(path, {"x": torch.zeros(10)}, {"step": 2})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "the temporary file must go"


def test_disk_that_fills_up_in_the_middle_of_a_write(tmp_path: Path) -> None:
    """The kernel cuts the write short, as a full disk does: a limit on the size of files stands in for it."""
    path = tmp_path / "step-0000001.safetensors"
    save_checkpoint(path, {"x": torch.ones(10)}, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(CheckpointError, match=r"could not save .*do not fit.*untouched"):
            save_checkpoint(path, {"x": torch.zeros(100_000)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert load_checkpoint(path)[1] == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_history_ignores_a_line_cut_off_by_a_kill(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text(json.dumps({"step": 0.0}) + '\n{"step": 1.0, "lo')
    assert read_history(tmp_path) == [{"step": 0.0}]


def test_resume_refuses_another_model_or_data(tmp_path: Path, nano_data: DataConfig) -> None:
    train_run("nano", nano_data, replace(CONFIG, steps=2), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"step-0000002.* another configuration \(data.keyword_share is 0.9, was 0.3\); choose"
    ):
        train_run("nano", replace(nano_data, keyword_share=0.9), CONFIG, tmp_path)
    train_run("nano", replace(nano_data, keyword_share=0.9), replace(CONFIG, steps=1), tmp_path, resume=False)


def test_loss_that_is_no_number_stops_the_run(tmp_path: Path, nano_data: DataConfig) -> None:
    with pytest.raises(
        FloatingPointError, match=r"the loss became .* at step 1, and the step was not taken; resume with"
    ):
        train_run("nano", nano_data, replace(CONFIG, lr=float("inf")), tmp_path)
    assert not checkpoints(tmp_path), "nothing of it may be saved"
