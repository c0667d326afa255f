"""Damaged files for every reader of models/data: each is read, or refused by a BadDataError that names it::

    python -m tests.fuzz.files --cases 10000 --seed 0
    python -m tests.fuzz.files --seed 4711 --keep /tmp/kept      # one of them again; the damaged file stays

Nothing else may come of one: no other exception, no crash, no hang, no gigabytes. And nothing is silently wrong where
that can be decided: a format with checksums gives the pixels and samples that it had, and the rows of a list beside the
damaged one are read as before.
"""

import argparse
import faulthandler
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from models.data.audio import read_audio
from models.data.folder import CAPTION_COLUMNS, IMAGE_COLUMNS, load_folder
from models.data.pair_files import load_pair_files
from models.data.rows import lines_of, read_rows
from models.data.sets import BadDataError, BadDataLog, read_image
from models.data.video_files import clips_of_file, list_file, load_video_files
from tests.fuzz.damage import (
    CAPTION_LISTS,
    IMAGES,
    ROWS,
    SOUNDS,
    VIDEO_LISTS,
    VIDEOS,
    damaged,
    image,
    other_encoding,
    records,
    sound,
    video,
    write,
)

SIDE, SAMPLES = 16, 2048
HANG = 600  # seconds; a case takes some milliseconds
SLOW, LARGE = 10.0, 400  # seconds of CPU time and MiB that no damaged file of a few kilobytes may take
LIMIT = 3 << 30  # bytes that the process may allocate beside what it has at the start

Say = Callable[[str], None]
T = TypeVar("T")


def attempt(read: Callable[[Path], T], path: Path) -> T | BadDataError:
    """What a reader gives, or the one error that it may raise, which names the file."""
    try:
        return read(path)
    except BadDataError as error:
        refusal = error
    assert str(path) in str(refusal), f"does not name the file: {refusal}"
    return refusal


def equal_or_refused(read: Callable[[Path], torch.Tensor], path: Path, whole: torch.Tensor | None) -> None:
    """What a reader gives of a damaged file is what it gave of the whole one, where this is given."""
    found = attempt(read, path)
    equal = isinstance(found, BadDataError) or whole is None or torch.equal(found, whole)
    assert equal, "other data than the whole file has, and no word of it"


def a_picture(path: Path) -> torch.Tensor:
    found = read_image(path, SIDE)
    assert (found.dtype, found.shape) == (torch.uint8, (4, SIDE, SIDE))
    return found


def a_sound(path: Path) -> torch.Tensor:
    clip, length = read_audio(path, SAMPLES)
    assert (clip.dtype, clip.shape) == (torch.int16, (SAMPLES,))
    assert 0 < length <= SAMPLES
    return torch.cat([clip, torch.tensor([length], dtype=torch.int16)])


def a_video(path: Path) -> torch.Tensor:
    found = clips_of_file(path, 4, SIDE, 2)
    assert found.dtype == torch.uint8
    assert found.shape[:3] == (2, 4, 3)
    assert min(found.shape[3:]) == SIDE
    return found


def head_of_flac(data: bytes) -> int:
    """Bytes before the first frame: they have no checksum."""
    at, last = 4, False
    while not last:
        last = data[at] >= 128
        at += 4 + int.from_bytes(data[at + 1 : at + 4], "big")
    return at


def image_case(choice: random.Random, folder: Path, say: Say) -> None:
    kind = choice.choice(list(IMAGES))
    data, ways = damaged(choice, image(kind))
    say(f"{kind}: {ways}")
    whole = a_picture(write(folder, f"whole.{kind}", image(kind))) if kind.endswith("png") else None
    equal_or_refused(a_picture, write(folder, f"damaged.{kind}", data), whole)


def sound_case(choice: random.Random, folder: Path, say: Say) -> None:
    kind = choice.choice(list(SOUNDS))
    original = sound(kind)
    data, ways = damaged(choice, original)
    say(f"{kind}: {ways}")
    head = head_of_flac(original) if kind == "flac" else 0
    checked = kind.endswith("ogg") or (kind == "flac" and data[:head] == original[:head])
    whole = a_sound(write(folder, f"whole.{kind}", original)) if checked else None
    equal_or_refused(a_sound, write(folder, f"damaged.{kind}", data), whole)


def video_case(choice: random.Random, folder: Path, say: Say) -> None:
    kind = choice.choice(list(VIDEOS))
    data, ways = damaged(choice, video(kind))
    say(f"{kind}: {ways}")
    equal_or_refused(a_video, write(folder, f"damaged.{kind}", data), None)


def damaged_list(choice: random.Random, kind: str, say: Say) -> tuple[bytes, set[int] | None]:
    """The bytes of a list, and the records that are as they were; None where the damage may be anywhere."""
    lines = [record.encode() for record in records(kind)]
    way = choice.choice(("one record", "one record", "one record", "anywhere", "encoding"))
    if way == "one record":
        at = choice.randrange(1, len(lines) - 1)  # the first may be a header, the last close an array
        ends = lines[at].endswith(b"\n")
        lines[at], ways = damaged(choice, lines[at].removesuffix(b"\n"))
        lines[at] += b"\n" * ends
        say(f"{kind}: record {at}, {ways}")
        return b"".join(lines), set(range(len(lines))) - {at}
    if way == "encoding":
        say(f"{kind}: another encoding")
        return other_encoding(choice, "".join(records(kind))), None
    data, ways = damaged(choice, b"".join(lines))
    say(f"{kind}: {ways}")
    return data, None


def is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return False
    return True


def caption_case(choice: random.Random, folder: Path, say: Say) -> None:
    kind = choice.choice(CAPTION_LISTS)
    for i in range(ROWS):
        write(folder, f"{i}.png", image("png"))
    needed = (IMAGE_COLUMNS, CAPTION_COLUMNS)

    def rows_of(path: Path, bad: BadDataLog) -> list[tuple[int, dict[str, str]]]:
        return list(read_rows(path, bad, needed, lists=CAPTION_COLUMNS))

    whole = rows_of(write(folder, f"whole-{kind}", "".join(records(kind)).encode()), BadDataLog("raise"))
    assert len(whole) == ROWS
    data, kept = damaged_list(choice, kind, say)
    path, bad = write(folder, kind, data), BadDataLog()
    found = attempt(lambda path: rows_of(path, bad), path)
    if isinstance(found, BadDataError):
        assert kept is None or "sv" not in kind or not is_text(data), f"one bad row refuses the list: {found}"
        return
    first = 0 if kind == "captions.jsonl" else 1
    for record in (kept or set()) & set(range(first, ROWS + first)):
        assert whole[record - first][1] in [row for _, row in found], f"row {record} is another: {found}"
    if kind.endswith("sv"):
        lines = sum(1 for line in lines_of(data.decode("utf-8-sig")) if line.strip()) - 1
        spanned = sum(value.count("\n") for _, row in found for value in row.values())
        surplus = spanned and any("fields for" in reason for reason in bad.reasons)
        assert len(found) + len(bad) + spanned >= lines or surplus, f"{lines} lines, {len(found)} rows, {len(bad)} bad"
    splits = attempt(lambda path: load_folder(path, SIDE, BadDataLog()), path)
    if not isinstance(splits, BadDataError):
        assert sum(map(len, splits.all_sets().values())) == len(splits.train.concepts)


def pair_case(choice: random.Random, folder: Path, say: Say) -> None:
    kind = "pairs.csv"
    for i in range(ROWS):
        write(folder, f"{i}.png", image("png"))
        write(folder, f"{i}.wav", sound("wav"))
    data, kept = damaged_list(choice, kind, say)
    path, bad = write(folder, kind, data), BadDataLog()
    splits = attempt(lambda path: load_pair_files(path, SIDE, SAMPLES, bad), path)
    if isinstance(splits, BadDataError):
        assert kept is None or not is_text(data), f"one bad row refuses the list: {splits}"
        return
    sets = [found for found in (splits.train, splits.validation, *splits.tests.values()) if found is not None]
    labels = [found.classes[label] for found in sets for label in found.labels.tolist()]
    if kept is not None:
        missing = {f"label {record - 1}" for record in kept - {0}} - set(labels)
        assert not missing, f"rows are lost: {missing}"


def video_list_case(choice: random.Random, folder: Path, say: Say) -> None:
    kind = choice.choice(VIDEO_LISTS)
    for i in range(ROWS):
        write(folder, f"{i}.mp4", b"x")
        write(folder, f"video{i:06d}_{i:06d}_{i + 10:06d}.mp4", b"x")
    whole = list_file(write(folder, f"whole-{kind}", "".join(records(kind)).encode()), BadDataLog("raise"))
    assert len(whole) == ROWS
    assert all(path.is_file() for path, *_ in whole)
    data, kept = damaged_list(choice, kind, say)
    path, bad = write(folder, kind, data), BadDataLog()
    found = attempt(lambda path: list_file(path, bad), path)
    if isinstance(found, BadDataError):
        assert kept is None or not is_text(data), f"one bad row refuses the list: {found}"
        return
    first = 0 if kind == "videos.txt" else 1
    for record in (kept or set()) & set(range(first, ROWS + first)):
        assert whole[record - first] in found, f"row {record} is another: {found}"
    attempt(lambda path: load_video_files(path, SIDE, 4, bad=BadDataLog()), path)


CASES: tuple[Callable[[random.Random, Path, Say], None], ...] = (
    *(image_case, image_case, image_case, sound_case, video_case, caption_case, pair_case, video_list_case),
)


def run_case(seed: int, folder: Path) -> str | None:
    """Read one damaged file; a text says what is wrong, None that all is right."""
    choice, said = random.Random(seed), []
    case = choice.choice(CASES)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong = ""
    try:
        case(choice, folder, said.append)
    except Exception:
        wrong = traceback.format_exc(limit=-5)
    took, grown = time.process_time() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    if took > SLOW:
        wrong += f"took {took:.0f} s\n"
    if grown > LARGE:
        wrong += f"took {grown} MiB\n"
    return f"case {seed}: {case.__name__}, {'; '.join(said)}\n{wrong}" if wrong else None


def run_here(seeds: range, keep: Path | None = None) -> int:
    """Read the damaged files in this process, and say on stdout what begins and what is wrong; how many are wrong."""
    warnings.simplefilter("ignore")
    faulthandler.enable()
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        limit = resource.getrlimit(resource.RLIMIT_DATA)
        in_use = int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (in_use + LIMIT, limit[1]))
        try:
            for seed in seeds:
                print(f"at {seed}", flush=True)
                faulthandler.dump_traceback_later(HANG, exit=True)
                wrong = run_case(seed, folder)
                faulthandler.cancel_dump_traceback_later()
                if wrong is not None:
                    failed += 1
                    print(wrong, flush=True)
                if keep is None:
                    shutil.rmtree(folder)
                    folder.mkdir()
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, limit)
    print("done", flush=True)
    return failed


def run_apart(seeds: range) -> list[str]:
    """Read the damaged files in a process of their own, and in a new one after each crash or hang: what is wrong."""
    wrong: list[str] = []
    while len(seeds):
        command = ["--here", "--seed", str(seeds.start), "--cases", str(len(seeds))]
        process = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.files", *command],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        at, done = None, False
        for line in process.stdout.splitlines():
            if line.startswith("at "):
                at = int(line[3:])
            elif line == "done":
                done = True
            elif line.startswith("case "):
                wrong.append(line)
            elif wrong:
                wrong[-1] += f"\n{line}"
        if done:
            return wrong
        if at is None:
            raise RuntimeError(f"the process does not start: {process.stderr}")
        wrong.append(f"case {at}: the process ended with {process.returncode}\n{process.stderr[-3000:]}")
        seeds = range(at + 1, seeds.stop)
    return wrong


def main() -> int:
    """Run what the command line asks for; 1 if a file is not read as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.files", description=__doc__.partition("::")[0])
    parser.add_argument("--cases", type=int, default=1, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="the number of the first")
    parser.add_argument("--keep", type=Path, help="leave the files of the case in this folder")
    parser.add_argument("--here", action="store_true", help="in this process, which a crash ends")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.cases)
    if options.here or options.keep:
        return run_here(seeds, options.keep) > 0
    wrong = run_apart(seeds)
    print(*wrong, sep="\n")
    print(f"{len(seeds)} damaged files, {len(wrong)} wrong")
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main())
