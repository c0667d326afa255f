"""Shards: what is written is read as the folder was, at any place, by any rank, and damage costs what it hits alone."""

from __future__ import annotations

import io
import os
import random
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from models.clip.__main__ import main as clip
from models.data.augment import Augment
from models.data.folder import load_folder
from models.data.sets import BadDataError, BadDataLog, ImageTextSet
from models.data.shards import index as index_module
from models.data.shards import write as write_module
from models.data.shards.__main__ import main
from models.data.shards.image_text import ShardPlan, load_shards, open_shard_data
from models.data.shards.index import IMAGE, TEXT, index_path, read_index
from models.data.shards.names import are_shards, shard_paths, split_of
from models.data.shards.order import Order
from models.data.shards.samples import open_shards
from models.data.shards.videos import load_shard_videos
from models.data.share import Share
from models.data.video_files import load_video_files
from models.timesformer.__main__ import main as timesformer
from tests.fuzz.damage import image, video
from tests.models.stopping import stop_before

SIDE, COUNT = 16, 24


def drawing(number: int, mode: str = "RGB") -> Image.Image:
    """A picture that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned images of every kind: turned by EXIF, 16-bit, transparent, of a format that shards do not take."""
    path = tmp_path_factory.mktemp("photos")
    odd = {"turned.jpg": image("exif.jpg"), "deep.png": image("grey-16.png"), "old.bmp": image("bmp")}
    for name, data in odd.items():
        (path / name).write_bytes(data)
    drawing(100, "RGBA").save(path / "clear.png")
    drawing(101).save(path / "small.webp", lossless=True)
    rows = [f"{name},what {name} shows,train,odd" for name in (*odd, "clear.png", "small.webp")]
    for number in range(COUNT):
        drawing(number).save(path / f"{number}.jpg")
        split = ("train", "train", "train", "test", "val", "train")[number % 6]
        rows.append(f'{number}.jpg,"a drawing, number {number}",{split},even')
    rows.append("3.jpg,another caption of it,test,even")
    (path / "captions.csv").write_text("image,caption,split,label\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in shards of 6."""
    out = tmp_path_factory.mktemp("made") / "shards"
    assert main(["write", str(folder), str(out), "--count", "6"]) == 0
    return out


def held(data: ImageTextSet | None) -> dict[tuple[str, ...], tuple[bytes, str]]:
    """Pixels and label of each image, by its captions."""
    assert data is not None
    found = {}
    for pixels, concept in zip(data.images, data.concept_ids.tolist(), strict=True):
        found[data.concepts[concept].texts] = pixels.numpy().tobytes(), data.concepts[concept].labels["label"]
    return found


def plan_of(
    source: Path | str, bad: BadDataLog | None = None, strength: float = 0.0, batch_size: int = 6, views: int = 1
) -> ShardPlan:
    bad = bad if bad is not None else BadDataLog("raise")
    samples = open_shard_data(str(source), bad).train

    def lengths(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[len(text), *text.encode()[-2:]] for text in texts])

    return ShardPlan(samples, lengths, Augment(SIDE, strength), bad, size=SIDE, batch_size=batch_size, views=views)


def make_tar(path: Path, members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            head = tarfile.TarInfo(name)
            head.size = len(data)
            tar.addfile(head, io.BytesIO(data))
    return path


def jpg(number: int) -> bytes:
    data = io.BytesIO()
    drawing(number).save(data, "PNG")
    return data.getvalue()


def pairs(count: int, first: int = 0) -> dict[str, bytes]:
    """The members of ``count`` samples; an image has a checksum, so that a flipped bit of it is seen."""
    found = {}
    for number in range(first, first + count):
        found |= {f"{number:03d}.png": jpg(number), f"{number:03d}.txt": f"number {number}".encode()}
    return found


# --- what is written is read


def test_shards_hold_what_the_folder_holds(folder: Path, shards: Path) -> None:
    from_files, bad = load_folder(folder, SIDE), BadDataLog("raise")
    from_shards = load_shards(str(shards), SIDE, bad)
    assert held(from_shards.train) == held(from_files.train)
    assert held(from_shards.tests["test"]) == held(from_files.tests["test"])
    assert held(from_shards.validation) == held(from_files.validation)
    assert from_shards.label_sets == from_files.label_sets
    few = load_shards(str(shards), SIDE, bad, most=3)
    assert len(few.train) == 3
    assert "train: 3 of 21 samples are read" in few.notes
    names = {path.name for path in shards.glob("*.tar")}
    assert names == {f"train-0000{i}.tar" for i in range(4)} | {"test-00000.tar", "validation-00000.tar"}
    found: Counter[str] = Counter()
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            found.update(name.partition(".")[2] for name in tar.getnames())
    assert found == {"jpg": COUNT + 1, "png": 3, "webp": 1, "txt": COUNT + 5, "json": COUNT + 5}, "files as they are"


def test_any_step_on_any_ranks_is_a_slice(shards: Path) -> None:
    whole = plan_of(shards, strength=1.0, views=2)
    batches = [whole(step) for step in range(8)]
    assert whole.steps_per_epoch == 3
    assert batches[0].images.shape == (2, 6, 3, SIDE, SIDE)
    for epoch in (batches[:3], batches[3:6]):
        seen = torch.cat([batch.concept_ids for batch in epoch])
        assert len(seen.unique()) == 18, "an epoch shows a sample once"
    assert not torch.equal(batches[0].concept_ids, batches[3].concept_ids)
    for ranks in (2, 4, 6):  # of 4 ranks two have a row more
        of_ranks = [plan_of(shards, strength=1.0, views=2) for _ in range(ranks)]
        parts = [plan(7, Share(rank, ranks)) for rank, plan in enumerate(of_ranks)]  # nothing but the step
        torch.testing.assert_close(torch.cat([part.images for part in parts], 1), batches[7].images)
        assert torch.equal(torch.cat([part.tokens for part in parts]), batches[7].tokens)
    halves = [Share(part=part, parts=2) for part in range(2)]  # one behind the other, as gradients are accumulated
    again = plan_of(shards, strength=1.0, views=2)
    reads: list[tuple[int, Share]] = []
    real = again._read
    again._read = lambda *of: reads.append(of) or real(*of)  # type: ignore[method-assign]
    for step in (6, 7):
        found = torch.cat([again(step, half).images for half in halves], 1)
        torch.testing.assert_close(found, batches[step].images)
    again(8, halves[0])
    assert reads[:5] == [(6, halves[0]), (6, halves[1]), (7, halves[0]), (7, halves[1]), (8, halves[0])], "none twice"
    with pytest.raises(ValueError, match="a batch of 6 rows has none for some of 7 ranks"):
        plan_of(shards)(0, Share(0, 7))
    with pytest.raises(ValueError, match="batch size 22 exceeds the 21 samples of an epoch"):
        plan_of(shards, batch_size=22)


def test_workers_have_the_batches_of_the_plan(shards: Path) -> None:
    share = Share(1, 2)
    loader = DataLoader(plan_of(shards), sampler=[(step, share) for step in range(5)], batch_size=None, num_workers=2)
    for step, batch in enumerate(loader):
        assert torch.equal(batch.images, plan_of(shards)(step, share).images)


def test_order_mixes_within_a_window_and_is_known_in_parts() -> None:
    of_shards = torch.arange(40).repeat_interleave(torch.arange(40) % 3 + 1)
    order = Order(of_shards, seed=3, window=4)
    whole = order(2, 0, len(of_shards))
    assert torch.equal(whole.sort().values, torch.arange(len(of_shards)))
    parts = [Order(of_shards, 3, 4)(2, first, min(first + 7, len(of_shards))) for first in range(0, len(of_shards), 7)]
    assert torch.equal(torch.cat(parts), whole)
    assert len(of_shards[whole[:20]].unique()) <= 16, "reads stay within a few files"
    assert not torch.equal(order(3, 0, 79), order(2, 0, 79))
    assert not torch.equal(Order(of_shards, 4, 4)(2, 0, 79), order(2, 0, 79))
    alone = Order(torch.zeros(50), 3)
    assert not torch.equal(alone(0, 0, 50), alone(1, 0, 50)), "one shard, too, has an order for each epoch"


def test_the_real_webdataset_reads_and_is_read(shards: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    pattern = str(shards / "train-{00000..00003}.tar")
    theirs = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("rgb8"))
    samples = open_shards(pattern, BadDataLog("raise"), media=IMAGE)["train"]
    ours = [parts for parts in samples.read(range(len(samples)), (TEXT,)) if isinstance(parts, dict)]
    assert [sample["txt"] for sample in theirs] == [parts[TEXT].decode() for parts in ours]
    assert all(({"jpg", "png", "webp"} & sample.keys()) for sample in theirs)
    with webdataset.ShardWriter(str(tmp_path / "theirs-%03d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            key = f"{'long/' * 30}{number:03d}"  # a name that takes a header of its own
            writer.write({"__key__": key, "png": jpg(number), "txt": f"number {number}", "cls": number % 2})
    found = load_shards(str(tmp_path / "theirs-{000..002}.tar"), SIDE, BadDataLog("raise"))
    read = [name for data in found.all_sets().values() for name in data.names()]
    assert sorted(read) == [f"number {i}" for i in range(10)]
    assert set(found.label_sets["label"]) == {"0", "1"}


# --- names


def test_names_of_shards(tmp_path: Path) -> None:
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b{1}.tar"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "c.tar").write_bytes(b"")

    def named(pattern: str) -> list[str]:
        return [path.name for path in shard_paths(f"{tmp_path}/{pattern}")]

    three = ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert named("a-{08..10}.tar") == named("a-{10,09,08}.tar") == named("a-*.tar") == three
    assert named("b{1}.tar") == ["b{1}.tar"], "a file of this very name"
    assert named("") == ["a-08.tar", "a-09.tar", "a-10.tar", "b{1}.tar", "c.tar"]
    assert are_shards(str(tmp_path))
    assert not are_shards(str(tmp_path.parent))
    (tmp_path / "captions.csv").touch()
    assert not are_shards(str(tmp_path)), "what is listed there counts"
    assert split_of(Path("imagenet-val-000003.tar")) == split_of(Path("val/x.tar")) == "validation"
    assert split_of(Path("laion-000003.tar")) == ""
    with pytest.raises(FileNotFoundError, match=r"there is no shard .*a-11\.tar"):
        named("a-{08..11}.tar")
    with pytest.raises(ValueError, match=r"\{1\.\.x\} is neither numbers"):
        named("a-{1..x}.tar")
    with pytest.raises(ValueError, match="more than 1,000,000 shards"):
        named("a-{0..99999999}.tar")


# --- the index


def test_an_index_is_made_once_and_anew_for_another_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = make_tar(tmp_path / "a.tar", pairs(3))
    first = read_index(shard)
    made: list[Path] = []
    real = index_module.make_index
    monkeypatch.setattr(index_module, "make_index", lambda path, file: made.append(path) or real(path, file))
    again = read_index(shard)
    assert not made
    assert torch.equal(again.places, first.places)
    assert [again.key(i) for i in range(3)] == ["000", "001", "002"]
    os.utime(shard, ns=(1, 1))
    assert len(read_index(shard)) == 3
    make_tar(shard, pairs(5))
    assert len(read_index(shard)) == 5
    assert len(made) == 2
    kept = index_path(shard)
    kept.write_bytes(kept.read_bytes()[:-3])
    assert len(read_index(shard)) == 5
    assert len(made) == 3
    monkeypatch.setattr(index_module, "write_cache", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    os.utime(shard, ns=(2, 2))
    assert len(read_index(shard)) == 5, "a folder that takes no file"


# --- damage


def test_a_shard_that_is_cut_gives_what_is_whole_in_it(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "whole.tar", pairs(6)).read_bytes()
    cut = tmp_path / "cut.tar"
    counts: list[int] = []
    refusals: list[str] = []
    within_texts = (found.start() + 3 for found in re.finditer(rb"number \d", whole))
    for size in sorted([*range(0, len(whole.rstrip(b"\0")), 512 - 3), *within_texts]):
        cut.write_bytes(whole[:size])
        bad = BadDataLog()
        try:
            samples = open_shards(str(cut), bad, media=IMAGE)
        except BadDataError as error:
            counts.append(0)
            refusals.append(str(error))
            continue
        assert str(cut) in bad.files
        assert re.search("breaks off|may be cut off", next(iter(bad.reasons)))
        for part in samples.values():
            read = part.read(range(len(part)), (IMAGE, TEXT))
            assert all(isinstance(parts, dict) and len(parts) == 2 for parts in read)
        counts.append(sum(map(len, samples.values())))
    assert counts == sorted(counts)
    assert set(counts) == set(range(6)), "the last sample is whole with the last byte alone"
    assert all(refusal.startswith(f"{cut}: no image with a caption in 1 shard(s)") for refusal in refusals)


def test_a_damaged_header_costs_one_member(tmp_path: Path) -> None:
    shard = make_tar(tmp_path / "train.tar", pairs(6))
    data = bytearray(shard.read_bytes())
    data[data.index(b"003.txt") + 150] ^= 4  # of the checksum
    shard.write_bytes(bytes(data))
    bad = BadDataLog()
    samples = open_shards(str(shard), bad, media=IMAGE)["train"]
    assert [samples.name(row)[-3:] for row in range(len(samples))] == ["000", "001", "002", "004", "005"]
    assert bad.files == [str(shard), f"{shard}/003"]
    assert [*bad.reasons][1] == "has no caption"
    assert re.match(r"has no readable header from byte \d+ to \d+", next(iter(bad.reasons)))


def test_damaged_samples_are_counted_and_the_next_good_one_stands_in(tmp_path: Path) -> None:
    members = pairs(4)
    members["001.png"] = members["001.png"][:-30]
    members["002.txt"] = b"\xff\xfe"
    members["003.json"] = b"{"
    make_tar(tmp_path / "train-0.tar", members)
    make_tar(tmp_path / "train-1.tar", {**pairs(2, 4), "006.png": b"no image", "006.txt": b"x", "007.png": jpg(7)})
    bad = BadDataLog()
    plan = plan_of(tmp_path, bad, batch_size=7)
    for step in range(3):
        batch = plan(step)
        # Of each row its own, or the next good one: 004 is row 4, and behind the last shard comes the first.
        expected = [{1: 4, 2: 4, 3: 4, 6: 0}.get(row, row) for row in plan.rows(step).tolist()]
        assert batch.concept_ids.tolist() == expected
    assert sorted(Path(file).name for file in bad.files) == ["001", "002", "003", "006", "007"], "each once"
    reasons = " ".join(bad.reasons)
    assert all(f"{what}" in reasons for what in ("not UTF-8", "not JSON", "not an image", "has no caption"))
    for ranks in (2, 3):
        of_ranks = [plan_of(tmp_path, BadDataLog(), batch_size=7)(1, Share(rank, ranks)) for rank in range(ranks)]
        assert torch.equal(torch.cat([part.images for part in of_ranks], 1), plan(1).images)
    with pytest.raises(BadDataError, match=r"007: has no caption.*--on-bad-data skip"):
        plan_of(tmp_path)


def test_nothing_but_damaged_samples(tmp_path: Path) -> None:
    make_tar(tmp_path / "train.tar", {"a.jpg": b"x", "a.txt": b"a", "b.jpg": b"x", "b.txt": b"b"})
    with pytest.raises(BadDataError, match=r"none of the 2 samples can be read; the last: .*not an image"):
        plan_of(tmp_path, BadDataLog(), batch_size=2)(0)


def test_flipped_bits_cost_what_they_hit(tmp_path: Path) -> None:
    choice = random.Random(0)
    whole = make_tar(tmp_path / "train.tar", pairs(6)).read_bytes()
    right = {f"number {number}": jpg(number) for number in range(6)}
    for case in range(60):
        data = bytearray(whole)
        data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
        shard = tmp_path / "train.tar"
        shard.write_bytes(bytes(data))
        os.utime(shard, ns=(case, case))
        bad = BadDataLog()
        samples = open_shards(str(shard), bad, media=IMAGE)["train"]
        read = [p for p in samples.read(range(len(samples)), (IMAGE, TEXT)) if isinstance(p, dict)]
        same = sum(right.get(parts[TEXT].decode(errors="replace")) == parts[IMAGE] for parts in read)
        assert same >= 5, f"case {case}: {bad.reasons}"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_odd_names(tmp_path: Path, form: int) -> None:
    keys = ["a b", "ünï/犬", "new\nline", "quote'\"[bold]", "../up", "long" * 60, "dir.with.dots/x", "\udcff\udcfe"]
    members = {}
    for number, key in enumerate(keys):
        members |= {f"{key}.PNG": jpg(number), f"{key}.txt": f"number {number}".encode()}
    others = {".hidden": b"", "notes": b"", "a b.seg.png": b"", "__meta__": b"", "._a b.png": b"x"}
    shard = make_tar(tmp_path / "train.tar", members | others, form)
    bad = BadDataLog("raise")
    samples = open_shards(str(shard), bad, media=IMAGE)["train"]
    read = samples.read(range(len(samples)), (TEXT,))
    assert [parts[TEXT].decode() for parts in read if isinstance(parts, dict)] == [f"number {i}" for i in range(8)]
    assert samples.name(0) == f"{shard}/a b"
    assert load_shards(str(shard), SIDE, bad).train.names()[5] == "number 5"


def test_empty_shards_and_files_that_are_no_shards(tmp_path: Path) -> None:
    make_tar(tmp_path / "train-0.tar", pairs(3))
    make_tar(tmp_path / "train-1.tar", {})
    (tmp_path / "train-2.tar").write_bytes(b"")
    (tmp_path / "train-3.tar").write_text("no tar file" * 100)
    with tarfile.open(tmp_path / "train-4.tar", "w:gz") as tar:
        tar.add(__file__)
    bad = BadDataLog()
    assert len(open_shards(str(tmp_path), bad, media=IMAGE)["train"]) == 3
    assert [Path(file).name for file in bad.files] == [f"train-{number}.tar" for number in range(1, 5)]
    reasons = list(bad.reasons)
    assert reasons[0] == "holds no image"
    assert reasons[1] == "is empty; holds no image"
    assert reasons[2].startswith("is no tar file; ")
    assert "unpack it" in reasons[3]


def test_shards_with_the_same_keys_and_fewer_shards_than_ranks(tmp_path: Path) -> None:
    make_tar(tmp_path / "a-train.tar", pairs(8))
    twice = {**pairs(8), "000.jpg": jpg(99)}
    make_tar(tmp_path / "b-train.tar", twice)
    bad = BadDataLog()
    plan = plan_of(tmp_path, bad, batch_size=16)
    assert plan(0).concept_ids.sort().values.tolist() == list(range(16)), "all sixteen"
    assert [*bad.reasons] == ["has two images of '000': the last one counts"]
    parts = [plan_of(tmp_path, BadDataLog(), batch_size=16)(0, Share(rank, 16)) for rank in range(16)]
    assert torch.equal(torch.cat([part.concept_ids for part in parts]), plan(0).concept_ids)
    alone = make_tar(tmp_path / "c.tar", pairs(40))
    by_hash = open_shards(str(alone), BadDataLog("raise"), media=IMAGE)
    assert set(by_hash) == {"train", "test"}, "no shard names a split"
    assert not {by_hash["train"].name(row) for row in range(len(by_hash["train"]))} & {by_hash["test"].name(0)}


def test_a_shard_that_shrinks_under_a_run(tmp_path: Path) -> None:
    shard = make_tar(tmp_path / "train.tar", pairs(4))
    bad = BadDataLog()
    plan = plan_of(tmp_path, bad, batch_size=4)
    shard.write_bytes(shard.read_bytes()[:4000])
    assert set(plan(0).concept_ids.tolist()) < set(range(4))
    assert "has become shorter" in next(iter(bad.reasons))


# --- writing


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_a_killed_write_goes_on_at_the_first_missing_shard(
    folder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, left = tmp_path / "out", write_module.checked_image, [14]

    def failing(path: Path) -> tuple[str, bytes]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(path)

    arguments = ["write", str(folder), str(out), "--count", "6"]
    with monkeypatch.context() as patch:
        patch.setattr("models.data.shards.__main__.checked_image", failing)
        assert main(arguments) == 130
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 1 <= len(before) <= 2
    assert not list(out.glob(".*.tmp"))
    (out / ".train-00002.tar.77.tmp").write_bytes(b"what a kill leaves")
    assert main(arguments) == 0
    assert contents(out) == contents(shards)
    assert all((out / name).stat().st_mtime_ns == when for name, when in before.items())
    assert not list(out.glob(".*.tmp"))


def test_writing_refuses_in_one_sentence(
    folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        assert main(["write", *arguments]) == 1
        return capsys.readouterr().out

    assert "holds shards of another list, or of other sizes" in said(str(folder), str(shards), "--count", "7")
    make_tar(tmp_path / "foreign.tar", pairs(1))
    assert "another program wrote" in said(str(folder), str(tmp_path))
    assert "no captions file" in said(str(tmp_path), str(tmp_path / "out"))
    assert "no video in it" in said(str(tmp_path), str(tmp_path / "out"), "--videos")


def test_writing_leaves_damaged_files_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing(1).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"x")
    (tmp_path / "captions.csv").write_text("image,caption\ngood.png,a\nbad.png,b\nnone.png,c\n")
    assert main(["write", str(tmp_path), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "bad.png: not an image" in printed
    assert "skipped 2 bad file(s)" in printed
    assert main(["index", str(tmp_path / "out")]) == 0
    assert "train: 1 samples" in capsys.readouterr().out
    assert main(["write", str(tmp_path), str(tmp_path / "strict"), "--on-bad-data", "raise"]) == 1


def test_shards_are_as_large_as_asked(tmp_path: Path) -> None:
    samples = [write_module.Sample(Path(str(i)), 10 + i % 3, "train", ()) for i in range(100)]
    of_size = write_module.parted(samples, count=1000, size=100)
    assert all(sum(sample.size for _, sample in own) <= 100 for own in of_size.values())
    assert sum(map(len, of_size.values())) == 100
    keys = [key for own in of_size.values() for key, _ in own]
    assert keys == [f"{number:08d}" for number in range(100)]


# --- training


def losses(run: Path) -> list[str]:
    return re.findall(r'"loss": ([^,]+)', (run / "history.jsonl").read_text())


def test_clip_trains_resumes_and_evaluates(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(run: str) -> int:
        arguments = ["--preset", "nano", "--batch-size", "8", "--steps", "4", "--checkpoint-every", "2", "--cpu"]
        return clip(["train", "--data", "shards/*.tar", "--out", str(tmp_path / run), *arguments])

    monkeypatch.chdir(shards.parent)
    assert train("whole") == 0
    stop_before(3, lambda: train("killed"))
    assert train("killed") == 0
    assert "resumed" in capsys.readouterr().out
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    monkeypatch.chdir(tmp_path)  # a run keeps the names of its shards absolute
    assert clip(["eval", "whole"]) == 0
    assert clip(["train", "--data", str(shards), "--text-encoder", "minilm", "--out", "frozen"]) == 1


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    for split, count in (("train", 4), ("test", 1)):
        for label in ("down", "up"):
            for number in range(count):
                path = root / split / label / f"{number}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(video("mp4"))
    return root


def test_videos_are_read_from_their_place(clips: Path, tmp_path: Path) -> None:
    out, bad = tmp_path / "shards", BadDataLog("raise")
    (clips / "train" / "up" / "cut.mp4").write_bytes(video("mp4")[:400])
    assert main(["write", str(clips), str(out), "--videos", "--count", "3"]) == 0
    splits = load_shard_videos(str(out), 16, 4, bad=bad)
    whole = load_video_files(clips, 16, 4)
    assert splits.train.classes == whole.train.classes == ["down", "up"]
    assert Counter(splits.train.labels.tolist()) == {0: 4, 1: 4}
    first = whole.train.clips([0], torch.Generator().manual_seed(1))[0]
    row = splits.train.labels.tolist().index(0)
    assert torch.equal(splits.train.clips([row], torch.Generator().manual_seed(1))[0], first)
    assert torch.equal(splits.tests["test"].views(0, 2), whole.tests["test"].views(0, 2))
    arguments = ["--preset", "nano", "--batch-size", "4", "--steps", "2", "--cpu", "--out", str(tmp_path / "run")]
    assert timesformer(["train", "--data", str(out), *arguments]) == 0
    shard = next(out.glob("train*.tar"))
    damaged = bytearray(shard.read_bytes())
    at = damaged.index(b"ftyp")
    damaged[at : at + 200] = bytes(200)
    shard.write_bytes(bytes(damaged))
    bad = BadDataLog()
    labels = load_shard_videos(str(out), 16, 4, bad=bad).train.clips(range(8), torch.Generator())[1]
    assert len(labels) == 8
    assert len(bad) == 1
    assert bad.files[0].startswith(str(shard))
