"""Data: honest splits, batches, a user's folder, bad files."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.common.options import split_commas
from models.data import BadDataError, BatchPlan, Splits, Tokenizer
from models.data.augment import MEAN, STD, Augment, prepare
from models.data.captions import sample_caption
from models.data.config import pick_styles
from models.data.emoji import styles as emoji_styles
from models.data.emoji.catalogue import catalogue, code_of, family_of
from models.data.emoji.splits import EmojiConfig, load_emoji, near_copies, unseen_families
from models.data.emoji.styles import DEMO_STYLES, Drawing, load_style
from models.data.folder import load_folder
from models.data.sets import BadDataLog, Concept, ImageTextSet, decode_image, fit_square, open_image
from models.data.synthetic import load_synthetic


@pytest.fixture(scope="module")
def emoji(emoji_cache: Path) -> Splits:
    """The real emoji in three styles, small."""
    config = EmojiConfig(train_styles=("openmoji", "noto"), size=16, near_copy=0.97, cache_dir=emoji_cache)
    return load_emoji(config)


def _digests(data: ImageTextSet) -> list[str]:
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in data.images]


def test_emoji_splits_share_no_drawing(emoji: Splits) -> None:
    seen: set[str] = set()
    for data in emoji.all_sets().values():
        digests = _digests(data)
        assert len(set(digests)) == len(digests)
        assert not seen & set(digests)
        seen |= set(digests)


def test_emoji_unseen_families_and_captions_stay_out_of_training(emoji: Splits) -> None:
    concepts = emoji.train.concepts
    trained = set(emoji.train.concept_ids.tolist())
    families = {concepts[c].group for c in trained}
    captions = {concepts[c].name for c in trained}
    unseen = [data for name, data in emoji.tests.items() if name.startswith("unseen")]
    assert len(unseen) == 2
    for data in unseen:
        assert len(data.gallery(variants=False)) > 100
        for c in data.concept_ids.tolist():
            assert concepts[c].group not in families
            assert concepts[c].name not in captions


def test_emoji_new_style_is_never_trained_on(emoji: Splits) -> None:
    assert "twemoji" not in emoji.train.styles
    new = next(data for name, data in emoji.tests.items() if name.startswith("new style"))
    assert new.styles == ["twemoji"]
    assert set(new.concept_ids.tolist()) <= set(emoji.train.concept_ids.tolist())
    gallery = new.gallery(limit=emoji.gallery_limit, variants=False)
    assert len(gallery) == 1000
    assert len(set(gallery.names())) == 1000
    assert not any("skin tone" in name for name in gallery.names())
    for wrong in ({"train_styles": ("twemoji",)}, {"validation_style": "twemoji"}, {"validation_style": "openmoji"}):
        with pytest.raises(ValueError, match="must not be trained"):
            load_emoji(EmojiConfig(**wrong))  # type: ignore[arg-type]


def test_families_join_tones_genders_and_directions() -> None:
    runners = ["🏃", "🏃🏽", "🏃‍♀️", "🏃🏿‍♂️", "🏃‍♀️‍➡️"]
    assert len({family_of(c) for c in runners}) == 1
    assert family_of("👩🏻‍🌾") == family_of("👨‍🌾") == family_of("🧑‍🌾") != family_of("🧑‍🍳")
    assert family_of("👩‍🦰") == family_of("🧑")
    held, other = unseen_families(0.1, 0), unseen_families(0.1, 1)
    assert held != other
    families = {e.family for e in catalogue()}
    assert 0.06 < len(held) / len(families) < 0.14


def test_catalogue_has_unicode_names_and_classes() -> None:
    entries = catalogue()
    assert len(entries) == len({e.code for e in entries}) == len({e.name for e in entries})
    assert len({e.category for e in entries}) == 9
    assert len({e.subcategory for e in entries}) == 98
    assert code_of("U+1F468-U+200D-U+1F33E") == code_of("👨‍🌾") == "1f468-200d-1f33e"
    assert code_of("0023-FE0F-20E3") == code_of("#️⃣")
    grinning = next(e for e in entries if e.code == "1f600")
    assert grinning.name == "grinning face"
    assert "happy" in grinning.keywords
    assert not any(":" in k for k in grinning.keywords)


def test_near_copies_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 4, 32, 32), generator=generator, dtype=torch.uint8)
    images[:, 3] = 255
    almost = images.clone()
    almost[0, 0, 0, 0] ^= 4
    almost[1] = almost[2]
    style = {code: Drawing(image, image) for code, image in zip("abc", almost, strict=True)}
    reference = {code: Drawing(image, image) for code, image in zip("abc", images, strict=True)}
    assert near_copies(style, reference, 0.97) == {"a", "c"}


def test_corrupt_drawing_is_named_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    art = tmp_path / "art" / "assets" / "72x72"
    art.mkdir(parents=True)
    Image.new("RGBA", (72, 72), (255, 0, 0, 255)).save(art / "1f600.png")
    (art / "1f601.png").write_bytes((art / "1f600.png").read_bytes()[:60])
    (art / "1f602.png").write_bytes(b"no picture")
    monkeypatch.setattr(emoji_styles, "_package_dir", lambda *_: tmp_path / "art")
    messages: list[str] = []
    bad = BadDataLog(warn=messages.append)
    drawings = load_style("twemoji", 16, tmp_path / "cache", bad)
    assert list(drawings) == ["1f600"]
    assert len(bad) == 2
    assert "1f601.png: cannot be decoded" in messages[0]
    assert "1f602.png: not an image" in messages[1]
    assert bad.summary().startswith("skipped 2 bad file(s): ")
    assert not (tmp_path / "cache").exists(), "a cache would hide the bad files from the next run"
    with pytest.raises(BadDataError, match=r"1f601.png: cannot be decoded.*--on-bad-data skip"):
        load_style("twemoji", 16, tmp_path / "cache", BadDataLog("raise"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-5],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data.replace(b"1f600", b"1f601"),
        lambda data: data.replace(b"sha256", b"sha257"),
    ],
    ids=["cut", "a bit of a pixel", "a bit of a code", "no checksum"],
)
def test_damaged_cache_is_made_again(
    damage: Callable[[bytes], bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    art = tmp_path / "art" / "assets" / "72x72"
    art.mkdir(parents=True)
    Image.new("RGBA", (72, 72), (255, 0, 0, 255)).save(art / "1f600.png")
    monkeypatch.setattr(emoji_styles, "_package_dir", lambda *_: tmp_path / "art")
    first = load_style("twemoji", 16, tmp_path / "cache", BadDataLog())
    cached = next((tmp_path / "cache").iterdir())
    whole = cached.read_bytes()
    cached.write_bytes(damage(whole))
    again = load_style("twemoji", 16, tmp_path / "cache", BadDataLog())
    assert re.match(rf"cache {re.escape(str(cached))} is not used \(.*\); it is made anew\n", capsys.readouterr().out)
    assert again.keys() == first.keys()
    assert torch.equal(first["1f600"].image, again["1f600"].image)
    assert torch.equal(first["1f600"].plain, again["1f600"].plain)
    load_style("twemoji", 16, tmp_path / "cache", BadDataLog())
    assert capsys.readouterr().out == "", "the cache is whole again"


def test_batches_are_a_function_of_the_step(synthetic: Splits) -> None:
    def plan(seed: int = 0) -> BatchPlan:
        return BatchPlan(
            synthetic.train, Tokenizer(24, 2048), Augment(32), batch_size=40, views=2, keyword_share=0.5, seed=seed
        )

    one, other = plan(), plan()
    for step in (0, 1, 11):
        one(step)
    a, b, c = one(8), other(8), plan(1)(8)
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.tokens, b.tokens)
    assert not torch.equal(a.concept_ids, c.concept_ids)
    assert a.images.shape == (2, 40, 3, 32, 32)
    epoch = torch.cat([one(step).concept_ids for step in range(one.steps_per_epoch)])
    assert len(epoch.unique()) == len(epoch), "an epoch shows a concept once"
    with pytest.raises(ValueError, match="batch size 4000 exceeds the"):
        BatchPlan(synthetic.train, Tokenizer(24, 2048), Augment(32), batch_size=4000)


def test_views_show_different_drawings_of_the_right_concept(synthetic: Splits) -> None:
    plan = BatchPlan(synthetic.train, Tokenizer(24, 2048), Augment(32, 0.0), batch_size=30, views=2)
    batch = plan(3)
    for i, concept in enumerate(batch.concept_ids.tolist()):
        drawn = {prepare(synthetic.train.images[r : r + 1], 32).numpy().tobytes() for r in plan.rows[concept]}
        shown = {
            view[i : i + 1].contiguous(memory_format=torch.channels_last).numpy().tobytes() for view in batch.images
        }
        assert shown == drawn


def test_variants_take_turns(synthetic: Splits) -> None:
    concepts = [Concept(f"c{i}", f"g{i}", variant=i >= 10) for i in range(30)]
    data = ImageTextSet(
        torch.zeros(30, 4, 8, 8, dtype=torch.uint8),
        torch.arange(30),
        torch.zeros(30, dtype=torch.long),
        concepts,
        ["s"],
    )
    plan = BatchPlan(data, Tokenizer(8, 2048), Augment(8, 0.0), batch_size=14, variant_divisor=5)
    seen = torch.cat([plan(step).concept_ids for step in range(5)])
    counts = torch.bincount(seen, minlength=30)
    assert counts[:10].tolist() == [5] * 10
    assert counts[10:].tolist() == [1] * 20


def test_captions_mix_names_and_keywords() -> None:
    concept = Concept("red apple", "g", keywords=("fruit", "food"))
    generator = torch.Generator().manual_seed(0)
    plain = {sample_caption(concept, generator, 0.0) for _ in range(20)}
    mixed = {sample_caption(concept, generator, 1.0) for _ in range(60)}
    assert plain == {"red apple"}
    assert mixed <= {"red apple, fruit, food", "red apple, food, fruit", "fruit, food", "food, fruit"}
    assert len(mixed) > 2


def test_augmentation_of_strength_0_is_evaluation() -> None:
    images = torch.randint(0, 256, (4, 4, 20, 20), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(Augment(16, 0.0)(images, generator), prepare(images, 16))
    out = Augment(16, 1.0)(images, generator)
    assert out.shape == (4, 3, 16, 16)
    assert out.isfinite().all()


def test_prepare_lays_transparent_pixels_on_white() -> None:
    images = torch.zeros(1, 4, 8, 8, dtype=torch.uint8)
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(prepare(images, 8)[0, :, 3, 3], white)


def test_frame_cuts_transparent_borders_and_centres() -> None:
    image = Image.new("RGBA", (100, 100))
    image.paste((255, 0, 0, 255), (10, 20, 30, 60))
    framed = fit_square(image, 40, margin=0.0)
    alpha = framed[3] > 128
    assert alpha.any(1).all(), "the longer side fills the frame"
    assert alpha.any(0).nonzero().flatten().tolist() == list(range(10, 30))
    opaque = fit_square(Image.new("RGBA", (60, 30), (1, 2, 3, 255)), 10)
    assert opaque.shape == (4, 10, 10)
    assert (opaque[3] == 255).all()


@pytest.mark.parametrize("size", [(20_000, 2), (3, 20_000)])
def test_the_square_round_a_long_thin_drawing_is_bounded(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    new = Image.new

    def watched(mode: str, size: tuple[int, int], *color: object) -> Image.Image:
        made.append(size[0] * size[1])
        return new(mode, size, *color) if made[-1] < 2**25 else new(mode, (1, 1))

    monkeypatch.setattr(Image, "new", watched)
    framed = fit_square(new("RGBA", size, (255, 0, 0, 128)), 32)
    assert max(made) < 2**25
    assert framed[3].any()
    assert framed[3, 0, 0] == 0


def _folder(path: Path, rows: list[dict[str, str]], kind: str) -> Path:
    path.mkdir(exist_ok=True)
    for i in range(6):
        Image.new("RGB", (40, 30), (40 * i, 10, 200)).save(path / f"{i}.jpg")
    (path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    if kind == "csv":
        with open(path / "captions.csv", "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["image", "caption", "split", "label"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        (path / "captions.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


ROWS = [
    {"image": "0.jpg", "caption": "a, zero", "split": "train", "label": "even"},
    {"image": "0.jpg", "caption": "nought", "split": "train", "label": "even"},
    {"image": "1.jpg", "caption": "one", "split": "train", "label": "odd"},
    {"image": "2.jpg", "caption": "a, zero", "split": "train", "label": "even"},
    {"image": "3.jpg", "caption": "three", "split": "test", "label": "odd"},
    {"image": "4.jpg", "caption": "four", "split": "val", "label": "even"},
]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_folder_with_captions(tmp_path: Path, kind: str) -> None:
    splits = load_folder(_folder(tmp_path / "data", ROWS, kind), 16)
    assert len(splits.train) == 3
    # Every image is a concept; its name is a caption that no other image has, where it has one.
    assert [splits.train.concepts[c].texts for c in splits.train.concept_ids.tolist()] == [
        ("nought", "a, zero"),
        ("one",),
        ("a, zero",),
    ]
    assert splits.tests["test"].names() == ["three"]
    assert splits.validation is not None
    assert splits.validation.names() == ["four"]
    assert splits.label_sets == {"label": {"even": ["even"], "odd": ["odd"]}}


def test_folder_names_bad_rows_and_files(tmp_path: Path) -> None:
    extra = [
        {"image": "cut.png", "caption": "cut", "split": "train", "label": "x"},
        {"image": "absent.png", "caption": "absent", "split": "train", "label": "x"},
        {"image": "", "caption": "no file", "split": "train", "label": "x"},
        {"image": "5.jpg", "caption": " ", "split": "train", "label": "x"},
    ]
    folder = _folder(tmp_path / "data", [*ROWS, *extra], "csv")
    messages: list[str] = []
    splits = load_folder(folder, 16, BadDataLog(warn=messages.append))
    assert len(splits.train) == 3
    assert [m.split("data/")[1] for m in messages] == [
        "cut.png: not an image",
        "absent.png: No such file or directory",
        "captions.csv, line 10: names no image "
        "(looked for the columns image, file, file_name, filename, filepath, path)",
        "captions.csv, line 11: has no caption (looked for the columns caption, text, title)",
    ]
    with pytest.raises(BadDataError, match=r"cut.png: not an image"):
        load_folder(folder, 16, BadDataLog("raise"))


def test_a_png_with_a_wrong_byte_is_never_read_as_another_image(tmp_path: Path) -> None:
    pixels = 5 * np.add.outer(np.arange(20), np.arange(24)).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    whole = open_image(data.getvalue(), name="whole.png").tobytes()
    for at, bit in itertools.product(range(8, len(data.getvalue())), range(8)):
        damaged = bytearray(data.getvalue())
        damaged[at] ^= 1 << bit
        try:
            found = open_image(bytes(damaged), name="damaged.png").tobytes()
        except BadDataError:
            continue
        assert found == whole, (at, bit)


def test_names_that_no_file_can_have_are_bad_rows(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "image": "a\0.jpg"}, {**ROWS[0], "image": "x" * 5000 + ".jpg"}, *ROWS]
    messages: list[str] = []
    splits = load_folder(_folder(tmp_path / "data", rows, "jsonl"), 16, BadDataLog(warn=messages.append))
    assert len(splits.train) == 3
    assert [m.rpartition(": ")[2] for m in messages] == ["embedded null byte", "File name too long"]


def test_folder_errors_say_where(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no captions file: expected one of captions.csv"):
        load_folder(tmp_path, 16)
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png", "caption": "a"}\n{"image": \n')
    with pytest.raises(BadDataError, match=r"captions.jsonl, line 2: not JSON"):
        load_folder(tmp_path, 16)
    (tmp_path / "captions.jsonl").write_text("[1]\n")
    with pytest.raises(BadDataError, match=r"line 1: expected an object, got list"):
        load_folder(tmp_path, 16)
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png", "caption": "a"}\n')
    with pytest.raises(BadDataError, match=r"no usable image and caption in it \(skipped 1 bad file"):
        load_folder(tmp_path, 16)
    folder = _folder(tmp_path / "data", [{**ROWS[0], "split": "dev"}], "csv")
    with pytest.raises(BadDataError, match=r"unknown split 'dev'"):
        load_folder(folder, 16)


def test_folder_without_split_holds_groups_out(tmp_path: Path) -> None:
    rows = [{"image": f"{i % 6}.jpg", "caption": f"caption {i}"} for i in range(6)]
    splits = load_folder(_folder(tmp_path / "data", rows, "jsonl"), 16, test_share=0.5)
    train = {splits.train.concepts[c].name for c in splits.train.concept_ids.tolist()}
    test = set(splits.tests["test"].names())
    assert train
    assert test
    assert not train & test


def test_images_of_one_caption_keep_their_own_captions_and_labels(tmp_path: Path) -> None:
    rows = [
        {"image": "0.jpg", "caption": "my pet", "label": "cat", "split": "test"},
        {"image": "0.jpg", "caption": "a cat", "label": "cat", "split": "test"},
        {"image": "1.jpg", "caption": "my pet", "label": "dog", "split": "test"},
        {"image": "2.jpg", "caption": "my pet", "label": "dog", "split": "test"},
        {"image": "3.jpg", "caption": "a bird", "label": "bird", "split": "train"},
    ]
    test = load_folder(_folder(tmp_path / "data", rows, "csv"), 16).tests["test"]
    assert test.names() == ["a cat", "my pet", "my pet"]
    assert test.labels("label") == ["cat", "dog", "dog"]
    gallery = test.gallery()
    assert gallery.names() == ["a cat", "my pet"], "nothing tells the second from the third"


def test_images_of_one_first_caption_stay_in_one_split(tmp_path: Path) -> None:
    rows = [{"image": f"{i}.jpg", "caption": caption} for i in range(6) for caption in ("the same", f"caption {i}")]
    rows = [row for row in rows if row["caption"] != "the same" or row["image"] in ("0.jpg", "5.jpg")]
    for share in (0.2, 0.5, 0.8):
        splits = load_folder(_folder(tmp_path / "data", rows, "jsonl"), 16, test_share=share)
        together = [{"caption 0", "caption 5"} <= set(part.names()) for part in splits.all_sets().values()]
        assert any(together)


def test_rows_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    rows = [*ROWS, {"image": "./0.jpg", "caption": "nil", "split": "test", "label": "even"}]
    messages: list[str] = []
    load_folder(_folder(tmp_path / "data", rows, "csv"), 16, BadDataLog(warn=messages.append))
    assert [m.split("data/")[1] for m in messages] == [
        "captions.csv, line 8: gives the image the split 'test', and a line before it 'train'"
    ]


def _tied(captions: list[tuple[str, ...]]) -> ImageTextSet:
    ids = torch.arange(len(captions))
    concepts = [Concept(own[0], own[0], captions=own[1:]) for own in captions]
    return ImageTextSet(torch.zeros(len(ids), 4, 8, 8, dtype=torch.uint8), ids, torch.zeros_like(ids), concepts, ["x"])


@pytest.mark.parametrize(
    ("captions", "size", "steps"),
    [
        ([(f"one of {i % 10}",) for i in range(1000)], 8, 125),  # ten names
        ([("rare", "shared"), ("other", "shared"), ("third",), ("fourth",)], 2, 2),
        ([(f"{i}", f"pair {i // 2}") for i in range(64)], 16, 4),
        ([(f"{i}", f"one {i // 2}", f"other {i * 7 % 64 // 2}") for i in range(64)], 16, 4),
    ],
)
def test_no_batch_holds_two_concepts_of_one_caption(captions: list[tuple[str, ...]], size: int, steps: int) -> None:
    data = _tied(captions)
    plan = BatchPlan(data, lambda texts: torch.zeros(len(texts), 1), Augment(8, 0.0), batch_size=size)
    assert plan.steps_per_epoch == steps
    for step in range(2 * steps):
        texts = [text for c in plan(step).concept_ids.tolist() for text in data.concepts[c].texts]
        assert len(texts) == len(set(texts))
        assert len(plan(step).concept_ids) == size


def test_a_caption_of_too_many_concepts_is_not_trained_on() -> None:
    """Batches of one concept each would be all that keeps 64 images apart which share a caption."""
    seen: list[str] = []
    data = _tied([(f"name {i}", "a photo") for i in range(64)])
    plan = BatchPlan(
        data, lambda texts: torch.tensor([seen.append(t) or 0 for t in texts]), Augment(8, 0), batch_size=16
    )
    assert [len(plan(step).concept_ids) for step in range(4)] == [16] * 4
    assert sorted(seen) == sorted(f"name {i}" for i in range(64))


def test_a_batch_larger_than_the_names_is_refused() -> None:
    with pytest.raises(ValueError, match="batch size 8 exceeds the 4 captions of an epoch"):
        BatchPlan(_tied([(f"one of {i % 4}",) for i in range(64)]), lambda texts: texts, Augment(8, 0.0), batch_size=8)


def test_image_set_checks_what_it_gets() -> None:
    images, ids = torch.zeros(2, 4, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"uint8 \[n, 4, S, S\]; got torch.float32"):
        ImageTextSet(images.float(), ids, ids, [], [])
    with pytest.raises(ValueError, match="every image needs a concept and a style: 2 images, 1 concepts"):
        ImageTextSet(images, ids[:1], ids, [], [])
    with pytest.raises(ValueError, match="'skip' or 'raise'"):
        BadDataLog("ignore")  # type: ignore[arg-type]
    with pytest.raises(BadDataError, match=r"x\.png: not an image"):
        decode_image(b"", 8, name="x.png")


def test_synthetic_drawings_differ_and_unseen_stay_out() -> None:
    splits = load_synthetic(32)
    trained = set(splits.train.concept_ids.tolist())
    assert not trained & set(splits.tests["unseen concepts"].concept_ids.tolist())
    for data in splits.all_sets().values():
        digests = _digests(data)
        assert len(set(digests)) == len(digests)
        assert (data.images[:, 3] > 0).flatten(1).any(1).all()


def _icon_set(cache: Path) -> None:
    """A fetched npm package with four icons, as Iconify lays it out."""
    folder = cache / "npm" / "iconify-json-fxemoji" / "package"
    folder.mkdir(parents=True)
    dot = {"body": '<circle cx="256" cy="256" r="200" fill="#f00"/>'}
    icons = {"grinningface": dot, "beer-mug": dot, "no-such-thing": dot, "sign": dot}
    aliases = {"dog-face": {"parent": "sign"}, "cat-face": {"parent": "no-such-thing", "hFlip": True}}
    (folder / "icons.json").write_text(json.dumps({"icons": icons, "aliases": aliases, "width": 512, "height": 512}))
    (folder / "package.json").write_text(json.dumps({"version": "1.2.3"}))


def test_icon_sets_are_matched_by_name_and_alias(tmp_path: Path) -> None:
    _icon_set(tmp_path)
    drawings = load_style("fxemoji", 16, tmp_path, BadDataLog())
    # A mirrored alias is another picture and names nothing.
    assert sorted(drawings) == ["1f37a", "1f436", "1f600"]
    image = drawings["1f600"].image
    assert image[:, 8, 8].tolist() == [255, 0, 0, 255]
    assert (tmp_path / "emoji-fxemoji-1.2.3-16.safetensors").is_file()


def test_styles_from_npm_are_left_out_where_npm_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.chdir(tmp_path)
    messages: list[str] = []
    assert pick_styles(("all",), warn=messages.append) == DEMO_STYLES
    assert "npm is not on this machine" in messages[0]
    with pytest.raises(FileNotFoundError, match=r"@iconify-json/fxemoji is fetched by npm, which is not"):
        load_style("fxemoji", 16, tmp_path, BadDataLog())
    _icon_set(tmp_path / "runs" / "cache")
    assert pick_styles(("all",)) == (*DEMO_STYLES, "fxemoji")
    assert pick_styles(("all",), "noto") == ("openmoji", "openmoji-flat", "openmoji-line", "fxemoji")
    assert pick_styles(split_commas("noto, openmoji")) == ("noto", "openmoji")


def test_photos_are_turned_as_viewers_turn_them() -> None:
    upright = Image.new("RGB", (32, 32), "black")
    upright.paste((255, 255, 255), (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", quality=95, exif=exif.tobytes())
    pixels = decode_image(file.getvalue(), 32, name="photo.jpg")[0].float()
    assert pixels[:14].min() > 200
    assert pixels[18:].max() < 50


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_shades(kind: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1))
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, kind)
    pixels = decode_image(file.getvalue(), 32, name="depth")[0].float()
    assert (pixels - torch.from_numpy(ramp / 257).float()).abs().max() <= 2


def test_pixels_without_a_known_white_are_refused() -> None:
    for values in (np.linspace(0, 1, 64, dtype=np.float32), np.linspace(0, 1 << 20, 64).astype(np.int32)):
        file = io.BytesIO()
        Image.fromarray(values.reshape(8, 8)).save(file, "TIFF")
        with pytest.raises(BadDataError, match=r"x\.tif: cannot be decoded \(its . pixels have no known white"):
            decode_image(file.getvalue(), 8, name="x.tif")


@pytest.mark.parametrize("kind", ["AVIF", "DDS", "PNG", "WEBP"])
def test_damaged_images_are_named(kind: str) -> None:
    whole = io.BytesIO()
    noise = torch.randint(256, (24, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(whole, kind)
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        data = bytearray(whole.getvalue())
        for at in generator.integers(min(len(data), 256), size=3):
            data[at] = generator.integers(256)
        try:
            decode_image(bytes(data), 8, name="x")
        except BadDataError as error:
            refused += str(error).startswith("x: ")
    assert refused > 10
