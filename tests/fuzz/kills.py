"""Kills at random moments: the same command, again and again, ends with the weights of a run that nothing stopped::

    python -m tests.fuzz.kills --kills 25 --seed 0      # of each of the five models
    python -m tests.fuzz.kills --models clip --kills 100

A run is a process that this one forks, so that a life costs no imports. It is killed by SIGKILL at a random moment, a
quarter of the times before its first checkpoint, and started again with the same command in the same folder. Moments
are counted in checkpoints and parts of a step: on a machine whose load changes, seconds would miss the run. After each
kill every checkpoint in the folder can be read; a run that ends leaves no temporary file, the losses of the whole run,
and its weights to the bit; the next kill meets a new run.
"""

import argparse
import importlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# One thread: a fork has no other, and sums keep their order.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from models.common.checkpoint import CheckpointError, checkpoints, load_checkpoint
from models.common.runs import BEST, read_history

SMALL = "--preset nano --cpu --precision no --ema 0.9 --warmup 2"
COMMANDS = {
    "clip": "--data synthetic --batch-size 16 --variant-divisor 1 --steps 24 --checkpoint-every 1",
    "timesformer": "--data digits --batch-size 8 --steps 24 --checkpoint-every 1 --drop-path 0.2",
    "captioning": "--data synthetic --batch-size 16 --variant-divisor 1 --steps 18 --checkpoint-every 1 "
    "--evaluate-every 3",
    "retrieval": "--data synthetic --batch-size 16 --variant-divisor 1 --steps 24 --checkpoint-every 1 "
    "--mining hardest --mining-warmup 10",
    "av_fusion": "--data synthetic --batch-size 16 --steps 24 --checkpoint-every 1",
}
WAIT = 600  # seconds for one life
LIFE = 12  # the most checkpoints of a life before its kill: half of a run


@dataclass
class Found:
    """What a model's kills gave."""

    kills: int = 0
    finished: int = 0  # runs that came to their end, each compared with the whole one
    resumed: int = 0  # lives that went on from a checkpoint


def live(main: Callable[[list[str]], int], arguments: list[str], log: Path) -> None:
    """The child: the command line, with what it says in a file."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


def begin(model: str, folder: Path) -> multiprocessing.Process:
    """The training command of a model in a new process."""
    main = importlib.import_module(f"models.{model}.__main__").main
    arguments = ["train", "--out", str(folder), *COMMANDS[model].split(), *SMALL.split()]
    process = multiprocessing.get_context("fork").Process(target=live, args=(main, arguments, log_of(folder)))
    process.start()
    return process


def log_of(folder: Path) -> Path:
    return folder.with_suffix(".log")


def until_checkpoint(process: multiprocessing.Process, folder: Path, before: Sequence[Path]) -> float:
    """The seconds until a run has written a checkpoint that it had not before, or ended."""
    began = time.monotonic()
    while process.is_alive() and set(checkpoints(folder)) <= set(before):
        time.sleep(0.005)
    return time.monotonic() - began


def finish(process: multiprocessing.Process, folder: Path) -> None:
    process.join(WAIT)
    assert process.exitcode == 0, f"ended with {process.exitcode}: {log_of(folder).read_text()[-3000:]}"


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in read_history(folder)]


def check_whole(folder: Path) -> None:
    """Every file that bears a checkpoint's name is one."""
    for path in [*checkpoints(folder), *folder.glob(BEST)]:
        load_checkpoint(path)


def check_equal(killed: Path, whole: Path) -> None:
    """The files, the losses, the scores, and every bit of the last checkpoints and of the best weights."""
    names = [sorted(path.name for path in folder.iterdir() if path.name != "tensorboard") for folder in (killed, whole)]
    assert names[0] == names[1], f"files left behind: {names[0]}, and of the whole run {names[1]}"
    assert losses(killed) == losses(whole), "other losses"
    assert read_history(killed, "validation.jsonl") == read_history(whole, "validation.jsonl"), "other scores"
    for name in names[1]:
        if not name.endswith(".safetensors"):
            continue
        (a, _), (b, _) = load_checkpoint(killed / name), load_checkpoint(whole / name)
        assert a.keys() == b.keys(), f"{name}: other tensors"
        wrong = [key for key in b if not torch.equal(a[key], b[key])]
        assert not wrong, f"{name}: other numbers in {wrong[:5]}"


def kill_and_resume(model: str, kills: int, seed: int, root: Path) -> Found:
    """Kill the runs of a model ``kills`` times; an AssertionError says what went wrong after which moment."""
    choice, found = random.Random(f"{model} {seed}"), Found()
    whole = root / f"{model}-whole"
    process = begin(model, whole)
    start = until_checkpoint(process, whole, [])
    step = until_checkpoint(process, whole, checkpoints(whole))
    finish(process, whole)
    folder = root / f"{model}-1"
    while found.kills < kills or folder.exists():
        before = checkpoints(folder)
        process = begin(model, folder)
        if found.kills == kills:
            wait = WAIT
        elif choice.random() < 0.25:
            wait = choice.uniform(0, start)
        else:
            start = until_checkpoint(process, folder, before)
            for _ in range(choice.randrange(LIFE)):
                step = until_checkpoint(process, folder, checkpoints(folder))
            wait = choice.uniform(0, step)
        process.join(wait)
        if process.exitcode is None:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        said = log_of(folder).read_text()
        assert "trying the one before it" not in said, said
        if process.exitcode == 0:
            check_equal(folder, whole)
            found.finished += 1
            found.resumed += said.count("resumed from")
            folder = root / f"{model}-{found.finished + 1}"
            continue
        assert process.exitcode == -signal.SIGKILL, f"ended with {process.exitcode}: {said[-3000:]}"
        found.kills += 1
        try:
            check_whole(folder)
        except CheckpointError as error:
            raise AssertionError(f"kill {found.kills} after {wait:.3f} s: {error}") from error
    return found


def main() -> int:
    """Run what the command line asks for; an error of the first run that did not go on as it should."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kills", description=__doc__.partition("::")[0])
    parser.add_argument("--models", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--kills", type=int, default=25, help="how many of each model")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    for model in options.models:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = kill_and_resume(model, options.kills, options.seed, Path(folder))
        print(
            f"{model}: {found.kills} kills, {found.resumed} lives that resumed, {found.finished} runs to the end, each "
            f"equal to the whole one ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
