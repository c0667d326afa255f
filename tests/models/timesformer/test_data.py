"""Video data: digits whose class no frame shows, kanji by stroke, real files that the test encodes, broken ones too."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from models.data import kanji as kanji_module
from models.data.batches import generator_of
from models.data.digits import CLASSES, MovingDigits, load_digits, velocities
from models.data.kanji import curve_points, draw_strokes, kanji_files, load_kanji, read_kanji
from models.data.sets import BadDataError, BadDataLog
from models.data.video import ClipAugment, ClipPlan, TensorVideos, crops, normalise, prepare
from models.data.video_files import (
    VideoFiles,
    at_even_times,
    clips_of_file,
    frame_indices,
    frame_times,
    load_video_files,
    read_frames,
)
from models.timesformer.evaluate import change_frames, phase_correlation


def encode(path: Path, frames: int = 40, width: int = 48, height: int = 32, **options: str) -> Path:
    """A video whose frame t is of the grey 6 t (mod 240), with a red left edge."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 2_000_000
        for t in range(frames):
            image = np.full((height, width, 3), 6 * t % 240, dtype=np.uint8)
            image[:, :8] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def grey(frames: torch.Tensor) -> list[int]:
    """Which frame each is, from its grey in the middle."""
    height, width = frames.shape[-2:]
    middle = frames[..., height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4].float()
    return (middle.mean((-3, -2, -1)) / 6).round().long().flatten().tolist()


# --- digits


def test_digits_move_as_their_class_says() -> None:
    splits = load_digits(32, 8, test_clips=256)
    test = splits.tests["digits"]
    assert isinstance(test, TensorVideos)
    assert test.videos.shape == (256, 8, 1, 32, 32)
    found = phase_correlation(test.videos, velocities())
    direction = torch.tensor(splits.factors["direction"])
    assert (direction[found] == direction[test.labels]).double().mean() > 0.9, "chance is an eighth"
    assert len(splits.train) == 1197 * len(CLASSES)


def test_a_single_frame_of_digits_tells_nothing() -> None:
    splits = load_digits(16, 4, test_clips=1024)
    test = splits.tests["digits"]
    assert isinstance(test, TensorVideos)
    rows = torch.randperm(len(splits.train), generator=generator_of(1))[:2048].tolist()
    videos, labels = splits.train.clips(rows, generator_of(2))
    direction = torch.tensor(splits.factors["direction"])
    model = LogisticRegression(max_iter=50).fit(videos[:, 2].flatten(1).numpy() / 255, direction[labels].numpy())
    right = model.predict(test.videos[:, 2].flatten(1).numpy() / 255) == direction[test.labels].numpy()
    assert abs(right.mean() - 1 / 8) < 4 * (1 / 8 * 7 / 8 / 1024) ** 0.5


def test_digits_wrap_round_the_torus() -> None:
    image = torch.zeros(1, 8, 8)
    image[0, 2:6, 2:6] = 1
    drawn = MovingDigits(image, 16)._draw(image, torch.tensor([[[0.0, 0.0], [8.0, 8.0]]]))[0]
    torch.testing.assert_close(drawn[0].roll((8, 8), (0, 1)), drawn[1])
    assert drawn[0, 0, 0] == 1
    assert drawn[0, 8, 8] == 0


def test_digits_of_the_sets_differ_and_draws_repeat() -> None:
    splits = load_digits(16, 4, test_clips=64)
    train = splits.train
    assert isinstance(train, MovingDigits)
    first, second = (train.clips([5, 70], generator_of(4))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, train.clips([5, 70], generator_of(5))[0])
    assert torch.equal(train.views(7, 1), train.views(7, 1))
    assert train.clips([5, 70], generator_of(4))[1].tolist() == [5, 6]


# --- kanji


def test_path_of_a_stroke() -> None:
    points = curve_points("M0,0c0,10,10,10,10,0S20-10,20,0", steps=2)
    # The halves of both curves, the second mirrored at their joint.
    np.testing.assert_allclose(points, [[0, 0], [5, 7.5], [10, 0], [15, -7.5], [20, 0]])
    np.testing.assert_allclose(curve_points("M1,2C1,4 3,4 3,2", 1), [[1, 2], [3, 2]])
    with pytest.raises(ValueError, match="cannot read the path at 'L'"):
        curve_points("M0,0L3,4")


def test_kanji_grow_stroke_by_stroke() -> None:
    by_name = {path.stem: path for path in kanji_files()}
    radical, strokes = read_kanji(by_name["06797"])  # 林: tree beside tree
    assert radical == "木"
    assert len(strokes) == 8
    frames = draw_strokes(strokes, 32, 8).float() / 255
    ink = frames.sum((1, 2, 3))
    assert (ink.diff() > 0).all()
    assert (frames.diff(dim=0) >= 0).all(), "ink stays"
    # The left tree comes first, and has four of nine parts of the ink.
    assert frames[2, 0, :, 17:].sum() < 0.02 * frames[2].sum()
    assert frames[7, 0, :, 16:].sum() > 0.4 * frames[7].sum()


def test_no_kanji_is_in_two_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = kanji_files()
    broken = tmp_path / "05fff.svg"
    broken.write_text("<svg")
    monkeypatch.setattr(kanji_module, "kanji_files", lambda: [*files[::8], broken])
    bad = BadDataLog()
    splits = load_kanji(16, 4, bad)
    assert bad.files == [str(broken)]
    assert len(splits.train.classes) == 20
    sets = [splits.train, splits.validation, *splits.tests.values()]
    sizes = [len(data) for data in sets if data is not None]
    assert sizes[0] > 3 * sizes[1] > 0
    assert sizes[2] > 10
    seen = [{clip.numpy().tobytes() for clip in data.videos} for data in sets]  # type: ignore[union-attr]
    assert not seen[0] & seen[2]
    assert not seen[0] & seen[1]


# --- files


def test_frames_are_counted_and_read_by_index(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mkv", "c.avi"):
        path = encode(tmp_path / name)
        assert len(frame_times(path)) - 1 == 40, "also where the container does not say"
        frames = read_frames(path, [30, 2, 2, 39])
        assert frames.shape == (4, 3, 32, 48)
        assert grey(frames) == [30, 2, 2, 39]
    assert read_frames(path, [0], 16).shape == (1, 3, 16, 24)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"sampling": "uniform"}, [5, 15, 25, 35]),
        ({"sampling": "uniform", "clip": 0, "clips": 2}, [2, 12, 22, 32]),
        ({"sampling": "uniform", "clip": 1, "clips": 2}, [7, 17, 27, 37]),
        ({"sampling": "dense", "stride": 4}, [13, 17, 21, 25]),
        ({"sampling": "dense", "stride": 4, "clip": 0, "clips": 3}, [0, 4, 8, 12]),
        ({"sampling": "dense", "stride": 4, "clip": 2, "clips": 3}, [27, 31, 35, 39]),
        ({"sampling": "dense", "stride": 20}, [0, 20, 39, 39]),
    ],
)
def test_sampling_of_frames(arguments: dict, expected: list[int]) -> None:
    assert frame_indices(40, 4, **arguments) == expected


def test_random_sampling_stays_in_its_parts() -> None:
    drawn = [frame_indices(40, 4, "uniform", generator=generator_of(i)) for i in range(50)]
    assert all(10 * t <= frame < 10 * (t + 1) for clip in drawn for t, frame in enumerate(clip))
    assert len({tuple(clip) for clip in drawn}) > 40
    starts = {frame_indices(40, 4, "dense", stride=4, generator=generator_of(i))[0] for i in range(400)}
    assert (min(starts), max(starts)) == (0, 27)
    assert frame_indices(3, 8, "uniform") == [0, 0, 0, 1, 1, 2, 2, 2], "a video shorter than a clip repeats frames"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes in training and test, with a text file and a truncated video among the good ones."""
    root = tmp_path / "videos"
    for split, count in (("train", 4), ("test", 2)):
        for label in ("down", "up"):
            for i in range(count):
                encode(root / split / label / f"{i}.mp4", frames=20)
    # Its table of contents stands at the start and promises 60 frames.
    cut = encode(root / "train" / "up" / "cut.mp4", frames=60, movflags="faststart")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (root / "train" / "up" / "text.mp4").write_text("this is no video")
    (root / "train" / "up" / "notes.txt").write_text("neither is this, and its name says so")
    return root


def test_folder_of_classes(folder: Path) -> None:
    bad = BadDataLog()
    splits = load_video_files(folder, 24, 4, bad=bad)
    assert splits.train.classes == ["down", "up"]
    assert (len(splits.train), len(splits.tests["test"]), splits.validation) == (10, 4, None)
    videos, labels = splits.train.clips(range(4), generator_of(0))
    assert videos.shape == (4, 4, 3, 24, 24)
    assert videos.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0, 0]
    again, _ = splits.train.clips(range(4), generator_of(0))
    assert torch.equal(videos, again), "the same generator, the same clips"
    views = splits.tests["test"].views(0, 3)
    assert views.shape == (3, 4, 3, 24, 36)
    # Uniform, three clips: a sixth, a half, five sixths into each quarter of twenty frames.
    assert grey(views) == [0, 5, 10, 15, 2, 7, 12, 17, 4, 9, 14, 19]
    assert not len(bad)


def test_broken_files_are_named_counted_and_replaced(folder: Path) -> None:
    messages: list[str] = []
    bad = BadDataLog(warn=messages.append)
    train = load_video_files(folder, 24, 4, bad=bad).train
    assert isinstance(train, VideoFiles)
    for _ in range(2):
        videos, labels = train.clips(range(10), generator_of(3))
    assert len(videos) == 10
    assert sorted(Path(name).name for name in bad.files) == ["cut.mp4", "text.mp4"], "each is reported once"
    assert "cannot be opened" in next(m for m in messages if "text.mp4" in m)
    assert "breaks off after" in next(m for m in messages if "cut.mp4" in m)
    # The next good one stands in, with its own label: after the last file comes the first, a "down".
    assert labels.tolist() == [0] * 4 + [1] * 4 + [0, 0]
    with pytest.raises(BadDataError, match=r"cut.mp4: breaks off"):
        load_video_files(folder, 24, 4, bad=BadDataLog("raise")).train.clips(range(10), generator_of(3))


def test_nothing_but_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("x.mp4", "y.mp4"):
        (tmp_path / "a" / name).write_bytes(b"nothing")
    data = VideoFiles(sorted((tmp_path / "a").iterdir()), torch.tensor([0, 0]), ["a"], 16, 4)
    with pytest.raises(BadDataError, match=r"none of the 2 videos can be read: skipped 2 bad file"):
        data.clips([0], generator_of(0))


def test_lists_of_files(tmp_path: Path) -> None:
    encode(tmp_path / "v" / "one.mp4", 8)
    encode(tmp_path / "v" / "two, or three.mp4", 8)
    table = tmp_path / "videos.csv"
    table.write_text(
        'path,label,split\nv/one.mp4,jump,train\n"v/two, or three.mp4",run,val\nv/none.mp4,run,train\n,x,\n'
    )
    bad = BadDataLog()
    splits = load_video_files(table, 16, 4, bad=bad)
    assert splits.train.classes == ["jump", "run"]
    assert splits.validation is not None
    assert splits.validation.labels.tolist() == [1]
    assert splits.tests["validation"] is splits.validation, "Kinetics has labels for it alone"
    assert bad.files == [f"{table}, line 5", str(tmp_path / "v" / "none.mp4")]
    plain = tmp_path / "train.txt"
    for line in ("v/one.mp4 7", "v/one.mp4,7"):
        plain.write_text(f"{line}\nonly-a-path\n")
        bad = BadDataLog()
        entries = load_video_files(plain, 16, 4, bad=bad)
        assert entries.train.classes == ["7"]
        assert len(bad) == 1
    table.write_text("path,label,split\nv/one.mp4,jump,exam\n")
    with pytest.raises(BadDataError, match="unknown split 'exam'"):
        load_video_files(table, 16, 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadDataError, match="no video in it"):
        load_video_files(tmp_path / "empty", 16, 4)


def test_videos_are_turned_as_players_turn_them(tmp_path: Path) -> None:
    path = tmp_path / "phone.mp4"
    stored = np.zeros((48, 96, 3), np.uint8)
    stored[:, :48] = 255  # white on the left
    _encode_at(path, [stored] * 4, [0.1 * i for i in range(4)])
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # of the track's header: here a turn by 90 degrees clockwise
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(bytes(data))
    frames = read_frames(path, [0, 1])
    assert frames.shape == (2, 3, 96, 48)
    assert frames[:, :, :40].float().mean() > 200
    assert frames[:, :, 56:].float().mean() < 50


def test_a_clip_spreads_over_the_time_of_a_changing_rate(tmp_path: Path) -> None:
    # One second at 60 frames a second, then nine at 4; the brightness of a frame says when it is shown.
    times = [i / 60 for i in range(60)] + [1 + i / 4 for i in range(36)]
    path = tmp_path / "screen.mp4"
    _encode_at(path, [np.full((32, 32, 3), round(25 * time), np.uint8) for time in times], times)
    seen = clips_of_file(path, 8, 32, 1)[0].float().mean((1, 2, 3)) / 25
    np.testing.assert_allclose(seen, [(i + 0.5) * 10 / 8 for i in range(8)], atol=0.5)


def _encode_at(path: Path, frames: list[np.ndarray], times: list[float]) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=60, options={"qscale": "1"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 60)
        for pixels, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(60 * time), Fraction(1, 60)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


@pytest.mark.parametrize("rate", [(1, 25), (1001, 30000), (1, 1)])
def test_frames_of_a_constant_rate_are_taken_by_number(rate: tuple[int, int]) -> None:
    rounded = [round(1000 * i * rate[0] / rate[1]) / 1000 for i in range(301)]  # to milliseconds, as Matroska has them
    assert at_even_times(rounded, range(300)) == list(range(300))


@pytest.mark.parametrize(
    ("lines", "classes"),
    [
        ('"path","label","split"\n"a.mp4","jump","train"\n"b, c.mp4","run","train"\n', ["jump", "run"]),
        ("path\tlabel\tsplit\na.mp4\tjump\ttrain\nb, c.mp4\trun\ttrain\n", ["jump", "run"]),
        ('a.mp4,"one, then two"\n"b, c.mp4",run\n', ["one, then two", "run"]),
        ("a.mp4,one, then two\nb, c.mp4 3\n", ["3", "one, then two"]),
        ("a.mp4\tone, then two\nb, c.mp4\t3\n", ["3", "one, then two"]),
    ],
)
def test_lists_with_commas_quotes_and_tabs(tmp_path: Path, lines: str, classes: list[str]) -> None:
    for name in ("a.mp4", "b, c.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "list.csv").write_text(lines)
    splits = load_video_files(tmp_path / "list.csv", 16, 4)
    assert list(splits.train.classes) == classes
    assert splits.notes[0].endswith("list.csv: 2 videos of 2 classes")


@pytest.mark.parametrize("name", ["a\0.mp4", "x" * 5000 + ".mp4", "," * 100_000])
@pytest.mark.parametrize("header", ["", "path,label\n", "label,youtube_id,time_start,time_end\n"])
def test_names_that_no_file_can_have_are_bad_rows(tmp_path: Path, header: str, name: str) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "a_000001_000002.mp4").write_bytes(b"x")
    rows = ["jump,a,1,2", f"jump,{name},1,2"] if "youtube" in header else ["a.mp4,jump", f"{name},jump"]
    (tmp_path / "list.csv").write_text(header + "\n".join(rows) + "\n")
    bad = BadDataLog()
    train = load_video_files(tmp_path / "list.csv", 16, 4, bad=bad).train
    assert len(train) == 1
    assert len(bad) == 1


@pytest.mark.parametrize("place", ["", "train", "abseiling"])
def test_lists_of_kinetics(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "0347ZoDXyP0_000095_000105.mp4").write_bytes(b"x")
    (tmp_path / "train.csv").write_text(
        "label,youtube_id,time_start,time_end,split\nabseiling,0347ZoDXyP0,95,105,train\n"
    )
    train = load_video_files(tmp_path / "train.csv", 16, 4).train
    assert isinstance(train, VideoFiles)
    assert train.paths == [tmp_path / place / "0347ZoDXyP0_000095_000105.mp4"]


def test_clips_of_a_file_at_its_short_side(tmp_path: Path) -> None:
    path = encode(tmp_path / "tall.mp4", 12, width=32, height=64)
    assert clips_of_file(path, 3, 16, 2).shape == (2, 3, 3, 32, 16)


# --- batches, crops, augmentation


def test_crops_are_spread_along_the_longer_side() -> None:
    wide = torch.arange(10).expand(2, 1, 4, 10)
    assert crops(wide, 3)[:, 0, 0, 0].tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert crops(wide, 1)[0, 0, 0, 0].tolist() == [3, 4, 5, 6]
    tall = wide.transpose(-1, -2)
    assert torch.equal(crops(tall, 3), crops(wide, 3).transpose(-1, -2))
    assert len(crops(torch.zeros(1, 3, 8, 8), 3)) == 1


def test_preparation_normalises_and_scales() -> None:
    clip = torch.full((2, 3, 1, 8, 8), 255, dtype=torch.uint8)
    out = prepare(clip, 4)
    assert out.shape == (2, 3, 3, 4, 4)
    torch.testing.assert_close(out, torch.full_like(out, (1 - 0.45) / 0.225))
    assert normalise(torch.zeros(1, 8, 8)).shape == (3, 8, 8)


def test_augmentation_is_the_same_for_all_frames_and_keeps_directions() -> None:
    splits = load_digits(32, 8, test_clips=512)
    test = splits.tests["digits"]
    assert isinstance(test, TensorVideos)
    still = test.videos[:4, :1].expand(-1, 8, -1, -1, -1)
    out = ClipAugment(32, 1.0)(still, generator_of(0))
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert not torch.allclose(out[0, 0], prepare(still, 32)[0, 0], atol=0.1)
    moving = ClipAugment(32, 1.0)(test.videos, generator_of(0))[:, :, :1]
    grey = ((moving - moving.amin((1, 2, 3, 4), keepdim=True)) * 60).clamp(0, 255).to(torch.uint8)
    direction = torch.tensor(splits.factors["direction"])
    found = direction[phase_correlation(grey, velocities())]
    # Nothing like a mirror: that would turn six of the eight directions into another. Edges cost a little.
    assert (found == direction[test.labels]).double().mean() > 0.7
    assert torch.equal(ClipAugment(32, 0.0)(test.videos[:2], generator_of(0)), prepare(test.videos[:2], 32))


def test_batches_are_a_function_of_the_step() -> None:
    data = TensorVideos(
        torch.arange(10).view(10, 1, 1, 1, 1).expand(-1, 2, 1, 4, 4).to(torch.uint8), torch.arange(10), []
    )
    plan = ClipPlan(data, ClipAugment(4, 0.0), batch_size=3, seed=1)
    assert plan.steps_per_epoch == 3
    order = [plan(step).labels.tolist() for step in range(6)]
    assert [plan(step).labels.tolist() for step in (4, 1)] == [order[4], order[1]]
    for epoch in (order[:3], order[3:]):
        assert len({row for batch in epoch for row in batch}) == 9
    assert order[:3] != order[3:]
    with pytest.raises(ValueError, match="batch size 11 exceeds the 10 videos"):
        ClipPlan(data, ClipAugment(4), batch_size=11)


def test_frames_changed_for_evaluation() -> None:
    clip = torch.arange(8).view(1, 8, 1, 1, 1).expand(3, -1, 1, 2, 2)
    mixed = change_frames(clip, "shuffled", generator_of(0))[..., 0, 0, 0]
    assert (mixed.sort(1).values == torch.arange(8)).all()
    assert len({tuple(row) for row in mixed.tolist()}) == 3, "an order of its own for each clip"
    assert change_frames(clip, "one alone", generator_of(0)).unique().tolist() == [4]
    assert change_frames(clip, "in order", generator_of(0)) is clip
