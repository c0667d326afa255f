"""Run folders: nothing of a run is lost, mixed with another's or loaded damaged, and what is said can be read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor, nn

from models.captioning.train import load_captioner
from models.clip.__main__ import main
from models.clip.train import load_clip, train_run
from models.common import console as console_module
from models.common.checkpoint import (
    CheckpointError,
    checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
    step_path,
)
from models.common.cli import run_app
from models.common.plots import save_figure
from models.common.runs import clear_run, only_run, read_history, write_history
from models.common.schedule import TrainConfig
from models.common.signals import StoppedError
from models.common.state import differences
from models.common.training import Task, Trainer
from models.data.config import DataConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIG = TrainConfig(steps=6, checkpoint_every=2, warmup=0)


class Inputs:
    """A batch."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Inputs:
        """The same batch."""
        return self


class Norms(Task):
    """The norm of a linear layer's output: at the input 0 its gradient is NaN, though the loss is 0."""

    def __init__(self, zero_at: int = -1) -> None:
        self.zero_at = zero_at

    def batch(self, index: int) -> Inputs:
        """Ones, or zeros where the gradient is to be NaN."""
        return Inputs(torch.zeros(4, 3) if index == self.zero_at else torch.ones(4, 3))

    def loss(self, model: nn.Module, batch: Inputs) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The norm."""
        return torch.sqrt(model(batch.x).square().sum()), {}


def trainer(folder: Path, task: Task | None = None, config: TrainConfig = CONFIG) -> Trainer:
    """A run of a small linear layer."""
    torch.manual_seed(0)
    return Trainer(nn.Linear(3, 2, bias=False), task or Norms(), config, folder, cpu=True)


def test_a_gradient_that_is_no_number_takes_no_step(tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"the norm of the gradient became nan at step 3, and the step was not"
    ):
        trainer(tmp_path, Norms(zero_at=3)).fit()
    assert checkpoints(tmp_path) == [step_path(tmp_path, 2)]
    found = load_newest(tmp_path)
    assert found is not None
    assert found[0]["model/weight"].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, value: float) -> None:
    one = trainer(tmp_path)
    with torch.no_grad():
        one.raw_model.weight[0, 0] = value  # type: ignore[index, operator]
    with pytest.raises(FloatingPointError, match=r"the weights are not finite after step 0; nothing was saved"):
        one.save()
    assert not checkpoints(tmp_path)


def test_resume_passes_over_weights_that_are_not_finite(tmp_path: Path) -> None:
    trainer(tmp_path, config=replace(CONFIG, steps=4)).fit()
    tensors, metadata = load_checkpoint(step_path(tmp_path, 4))
    save_checkpoint(step_path(tmp_path, 4), tensors | {"model/weight": torch.full((2, 3), float("nan"))}, metadata)
    again = trainer(tmp_path)
    again.begin(resume=True)
    assert again.step == 2


def test_every_flipped_byte_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    path = tmp_path / "step-0000001.safetensors"
    tensors = {"model/w": torch.arange(6.0).reshape(2, 3), "model/b": torch.tensor(1, dtype=torch.bfloat16)}
    save_checkpoint(path, tensors, {"step": 1, "rate": 0.5})
    whole = path.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(bytes(damaged))
        try:
            found, metadata = load_checkpoint(path)
        except CheckpointError:
            continue
        assert metadata == {"step": 1, "rate": 0.5}, at
        assert all(torch.equal(found[name], value) for name, value in tensors.items()), at


def test_a_folder_holds_one_run_at_a_time(tmp_path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with only_run(tmp_path):
            entered.set()
            leave.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    entered.wait(60)
    one = trainer(tmp_path)
    for action in (one.fit, lambda: one.begin(resume=False), lambda: one.begin(resume=True)):
        with pytest.raises(
            CheckpointError, match=r"another process trains in .*: wait for it, or choose another --out"
        ):
            action()
    leave.set()
    other.join()
    one.fit()


def test_a_killed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    left = tmp_path / ".step-0000001.safetensors.123.tmp"
    left.write_bytes(b"half")
    trainer(tmp_path).fit()
    assert not left.exists()
    left.write_bytes(b"half")
    clear_run(tmp_path)
    assert not left.exists()


def test_a_kill_within_a_write_leaves_the_old_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores tell a resumed run which weights are the best so far: without them the next ones would be."""
    write_history([{"step": 1.0, "score": 0.5}], tmp_path, "validation.jsonl")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_history([{"step": 2.0, "score": 0.1}], tmp_path, "validation.jsonl")
    assert read_history(tmp_path, "validation.jsonl") == [{"step": 1.0, "score": 0.5}]
    clear_run(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StoppedError, match=r"stopped at step 3 of 6; saved .*step-0000003.safetensors") as stopped:
        trainer(tmp_path).fit(lambda one: os.kill(os.getpid(), number) if one.step == 3 else None)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before
    again = trainer(tmp_path)
    again.begin(resume=True)
    again.fit()
    assert [row["step"] for row in again.history] == list(range(6))


def test_ctrl_c_of_a_command(tmp_path: Path) -> None:
    options = "--data synthetic --preset nano --batch-size 32 --variant-divisor 1 --steps 100000 --cpu"
    command = [sys.executable, "-m", "models.clip", "train", "--out", str(tmp_path), *options.split()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    history = tmp_path / "history.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (history.is_file() and history.stat().st_size):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "run the same command again to resume" in said
    assert checkpoints(tmp_path)


def test_a_run_of_another_model_is_named(tmp_path: Path, nano_data: DataConfig) -> None:
    train_run("nano", nano_data, replace(CONFIG, steps=1), tmp_path, cpu=True)
    path = checkpoints(tmp_path)[0]
    with pytest.raises(
        CheckpointError, match=r"step-0000001.* is a checkpoint of models.clip, not of models.captioning"
    ):
        load_captioner(tmp_path)
    tensors, metadata = load_checkpoint(path)
    lacking = {key: value for key, value in metadata["model"].items() if key != "data"}
    save_checkpoint(path, tensors, metadata | {"model": lacking})
    with pytest.raises(CheckpointError, match=r"step-0000001.* lacks 'data' in its description"):
        load_clip(tmp_path)
    fewer = {name: value for name, value in tensors.items() if not name.endswith("logit_scale")}
    save_checkpoint(path, fewer, metadata)
    with pytest.raises(CheckpointError, match=r"step-0000001.* does not fit this model: .*Missing key.*logit_scale"):
        load_clip(tmp_path)
    save_checkpoint(path, tensors, {"step": 1})
    with pytest.raises(CheckpointError, match=r"step-0000001.* does not say which model it holds"):
        load_clip(tmp_path)


def test_differences_name_their_fields() -> None:
    here = {"data": {"size": 32, "names": ["a"]}, "loss": "fused"}
    assert differences(here, {"data": {"size": 64, "names": ["a"]}, "old": 1}) == [
        "data.size is 32, was 64",
        'loss is "fused", was null',
        "old is null, was 1",
    ]


def test_a_run_keeps_its_data_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    settled = DataConfig(source="mine").settle(32, 0, print)
    assert settled.source == str(tmp_path / "mine")
    assert DataConfig(source="synthetic").settle(32, 0, print).source == "synthetic"


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "/no/[such]/file"),
        OSError(28, "No space left on device"),
        ValueError("text with [brackets] and [/] $dollars$"),
    ],
)
def test_foreseeable_errors_are_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise error

    assert run_app(app, []) == 1
    assert capsys.readouterr().out == f"error: {error}\n"


def test_what_is_said_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console_module.say("a [red]caption[/] of [1, 2] \\[x]")
    console_module.warn("[/nothing]")
    assert capsys.readouterr().out == "a [red]caption[/] of [1, 2] \\[x]\n[/nothing]\n"


def test_pictures_make_their_folder_and_show_dollars(tmp_path: Path) -> None:
    figure = Figure()
    figure.suptitle("from $5 \\nothing$")  # a formula that matplotlib would refuse
    save_figure(figure, tmp_path / "new" / "folder" / "x.png")
    assert (tmp_path / "new" / "folder" / "x.png").stat().st_size > 1000


def test_wrong_options_end_with_their_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["train", "--steps", "many"], ["train", "--nothing"], ["eval"], ["retrieve", str(tmp_path)]):
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        assert len((printed.out + printed.err).splitlines()) < 20


def test_an_out_that_is_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = ["train", "--data", "synthetic", "--preset", "nano", "--steps", "1", "--batch-size", "8", "--cpu"]
    assert main([*arguments, "--out", str(tmp_path / "file")]) == 1
    printed = capsys.readouterr().out
    assert str(tmp_path / "file") in printed.replace("\n", "")
    assert "Traceback" not in printed
    assert (tmp_path / "file").read_text() == "mine"
