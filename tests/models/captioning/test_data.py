"""Captions as data: vocabulary, COCO's files, combinations held out of the emoji, validation; and caption metrics."""

from __future__ import annotations

import json
import math
import unicodedata
from pathlib import Path

import pytest
from PIL import Image
from pycocoevalcap.bleu.bleu_scorer import BleuScorer

from models.captioning.scores import caption_scores, cider_of_each
from models.data import BadDataError, Splits, Vocabulary
from models.data.captions import caption_words
from models.data.emoji.catalogue import catalogue, combination_of
from models.data.emoji.splits import EmojiConfig, load_emoji, unseen_combinations
from models.data.folder import load_folder
from models.data.sets import BadDataLog, hold_out_validation


def test_vocabulary_there_and_back() -> None:
    texts = [
        "man running: dark skin tone",
        "flag: côte d\u2019ivoire",
        "o button (blood type)",
        "a dog, a cat.",
        "u-turn",
    ]
    vocabulary = Vocabulary.build(texts)
    ids = vocabulary(texts)
    assert ids.shape == (5, 8)
    assert (ids[:, 0] == Vocabulary.START).all()
    assert ids[4].tolist() == [Vocabulary.START, vocabulary([texts[4]])[0, 1], Vocabulary.END, *[Vocabulary.PAD] * 5]
    assert [vocabulary.decode(row[1:].tolist()) for row in ids] == texts
    assert len(vocabulary) == int(ids.max()) + 1
    assert vocabulary.decode([Vocabulary.END, 5]) == ""
    assert vocabulary(["A Dog"]).tolist() == vocabulary(["a dog"]).tolist()


def test_vocabulary_keeps_frequent_words_and_cuts_long_texts() -> None:
    vocabulary = Vocabulary.build(["a b c", "a b", "a"], min_count=2, max_length=2)
    assert vocabulary.tokens == ["a", "b"]
    ids = vocabulary(["c a b"])[0].tolist()
    assert ids == [Vocabulary.START, Vocabulary.UNKNOWN, 4, Vocabulary.END]
    assert vocabulary.decode(ids) == "<unknown> a"
    with pytest.raises(ValueError, match="no word occurs 9 times"):
        Vocabulary.build(["a"], min_count=9)
    with pytest.raises(ValueError, match="max_length must hold a token"):
        Vocabulary(["a"], 0)


def test_unseen_combinations_are_unseen_but_their_parts_are_not() -> None:
    activity, gender, tone = combination_of("1f3c3-1f3fd-200d-2640")
    assert (gender, tone) == ("♀", "🏽")
    assert combination_of("1f3c3-1f3fd-200d-2642") == (activity, "♂", "🏽")
    held = unseen_combinations(0.15, 0, set())
    toned = [e for e in catalogue() if e.toned]
    assert 0.05 * len(toned) < len(held) < 0.2 * len(toned)
    assert held == unseen_combinations(0.15, 0, set()) != unseen_combinations(0.15, 1, set())
    kept = [combination_of(e.code) for e in toned if e.code not in held]
    assert not {combination_of(code) for code in held} & set(kept)
    for code in held:
        activity, gender, tone = combination_of(code)
        assert any(a == activity and g == gender for a, g, _ in kept)
        assert any(a == activity and t == tone for a, _, t in kept)
    assert not unseen_combinations(0.0, 0, set())


def test_emoji_with_combinations_held_out(emoji_cache: Path) -> None:
    splits = load_emoji(EmojiConfig(train_styles=("noto",), size=16, unseen_combinations=0.15, cache_dir=emoji_cache))
    trained = set(splits.train.concept_ids.tolist())
    tests = {name: set(data.concept_ids.tolist()) for name, data in splits.tests.items()}
    unseen = [ids for name, ids in tests.items() if name.startswith("unseen combinations")]
    assert len(unseen) == 2
    concepts = splits.train.concepts
    groups = {concepts[c].group for c in trained}
    for ids in unseen:
        assert len(ids) > 100
        assert not ids & trained
        assert {concepts[c].group for c in ids} <= groups
        assert all("skin tone" in concepts[c].name for c in ids)
    assert any("combinations of activity, gender and skin tone held out" in note for note in splits.notes)


def test_validation_is_held_out_by_group(synthetic: Splits) -> None:
    assert synthetic.validation is None
    splits = hold_out_validation(synthetic, 0.2)
    assert splits.validation is not None
    own, trained = (set(data.concept_ids.tolist()) for data in (splits.validation, splits.train))
    assert not own & trained
    assert len(splits.validation) + len(splits.train) == len(synthetic.train)
    assert 0.1 < len(splits.validation) / len(synthetic.train) < 0.3
    with pytest.raises(ValueError, match="too few to hold"):
        hold_out_validation(splits, 0.0)


def _coco(images: list[tuple[int, str]], annotations: list[tuple[int, str]]) -> str:
    return json.dumps(
        {
            "info": {"year": 2017},
            "images": [{"id": i, "file_name": name, "height": 8, "width": 8} for i, name in images],
            "annotations": [{"id": n, "image_id": i, "caption": caption} for n, (i, caption) in enumerate(annotations)],
        }
    )


def test_coco_captions_with_a_broken_and_a_missing_file(tmp_path: Path) -> None:
    """As unpacked from COCO's archives: annotations/captions_val2017.json beside val2017."""
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for i in range(40):
        Image.new("RGB", (12, 8), (6 * i, 0, 0)).save(tmp_path / "val2017" / f"{i:012}.jpg")
    (tmp_path / "val2017" / "000000000003.jpg").write_bytes(b"no jpeg")
    listed = [(i, f"{i:012}.jpg") for i in range(41)]
    captions = [(i, f"shade {i} of red\n") for i in range(41)]
    captions += [(i, f"a red of shade {i}") for i in range(40)] + [(999, "an image that is not listed")]
    path = tmp_path / "annotations" / "captions_val2017.json"
    path.write_text(_coco(listed, captions), encoding="utf-8")
    messages: list[str] = []
    bad = BadDataLog(warn=messages.append)
    splits = load_folder(path, 16, bad)
    data = splits.all_sets().values()
    assert sum(len(d) for d in data) == 39
    texts = {(c.name, *c.captions) for c in splits.train.concepts}
    assert ("shade 5 of red", "a red of shade 5") in texts
    assert len(texts) == 39
    assert any("000000000003.jpg: not an image" in m for m in messages)
    assert any("000000000040.jpg: No such file" in m for m in messages)
    assert any("line 82: names no image" in m for m in messages)
    assert len(bad) == 3
    with pytest.raises(BadDataError, match=r"000000000003.jpg: not an image"):
        load_folder(path, 16, BadDataLog("raise"))


def test_coco_captions_elsewhere_and_malformed(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "lists").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(tmp_path / "pictures" / f"{i}.png")
    path = tmp_path / "lists" / "captions.json"
    path.write_text(_coco([(i, f"{i}.png") for i in range(3)], [(i, f"shade {i}") for i in range(3)]))
    with pytest.raises(BadDataError, match="no usable image and caption"):
        load_folder(path, 8)
    found = load_folder(path.parent, 8, images=tmp_path / "pictures", test_share=0)
    assert sorted(found.train.names()) == ["shade 0", "shade 1", "shade 2"]
    with pytest.raises(FileNotFoundError, match=r"--images .*nowhere: no such folder"):
        load_folder(path, 8, images=tmp_path / "nowhere")
    path.write_text('{"annotations": [{"image_id": 1}], "images": []}')
    with pytest.raises(BadDataError, match=r"captions.json: not COCO captions: expected images with id and file_name"):
        load_folder(path, 8)
    # JSON lines under this name are read as before.
    (tmp_path / "pictures" / "captions.json").write_text('{"image": "0.png", "caption": "dark"}\n')
    assert load_folder(tmp_path / "pictures", 8, test_share=0).train.names() == ["dark"]


REFERENCES = [
    ["a man riding a horse on the beach", "man on a horse by the sea"],
    ["two dogs play with a red ball", "dogs and a ball"],
    ["a plate of food: rice, beans and meat"],
    ["woman running: dark skin tone"],
]
TEXTS = ["a man on a horse by the sea", "two dogs play in the snow", "a plate of rice and beans", "man running"]


def test_caption_scores_against_the_scorer_of_coco() -> None:
    found = caption_scores(TEXTS, REFERENCES)
    scorer = BleuScorer(n=4)
    for text, own in zip(TEXTS, REFERENCES, strict=True):
        scorer += " ".join(caption_words(text)), [" ".join(caption_words(other)) for other in own]
    expected, _ = scorer.compute_score(option="closest", verbose=0)
    assert [found.bleu1, found.bleu2, found.bleu3, found.bleu4] == pytest.approx(expected, rel=1e-4)
    assert 0.1 < found.bleu4 < found.bleu1 < 1
    each = cider_of_each(TEXTS, REFERENCES)
    assert found.cider == pytest.approx(sum(each) / 4)
    assert each[0] == max(each)
    assert found.exact == 0


def test_caption_scores_of_the_right_and_the_wrong() -> None:
    right = [own[-1] for own in REFERENCES]
    found = caption_scores([text.upper().replace(":", "").replace(",", " ;") for text in right], REFERENCES)
    assert found.exact == 1, "case and punctuation do not count"
    assert (found.bleu1, found.bleu4) == (pytest.approx(1), pytest.approx(1))
    single = caption_scores(right, [[text] for text in right])
    assert single.cider == pytest.approx(10)
    wrong = caption_scores(right[1:] + right[:1], [[text] for text in right])
    assert wrong.cider < 1
    assert wrong.exact == 0
    silent = caption_scores([""] * 4, REFERENCES)
    assert (silent.bleu1, silent.cider, silent.exact) == (0, 0, 0)
    with pytest.raises(ValueError, match="every caption needs its references: 1 captions, 4 references"):
        cider_of_each(["a"], REFERENCES)


def test_words_of_captions() -> None:
    assert caption_words("Woman: medium-dark skin tone, man\u2019s hat (2)!") == [
        "woman",
        "medium-dark",
        "skin",
        "tone",
        "man\u2019s",
        "hat",
        "2",
    ]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("लाल गेंद से खेलती लड़की", 5),
        ("একটি ছেলে মাঠে দৌড়ায়", 4),
        ("ஒரு சிறுவன் ஓடுகிறான்", 3),
        (unicodedata.normalize("NFD", "un café fermé"), 3),
        ("می\u200cخواهم بروم", 2),  # noqa: RUF001
        ("rock ❤\ufe0f 👩\u200d🚀", 1),
    ],
)
def test_words_of_every_script_are_whole(text: str, count: int) -> None:
    vocabulary = Vocabulary.build([text])
    assert vocabulary.decode(vocabulary([text])[0].tolist()) == text
    assert len(caption_words(text)) == count


def test_cider_of_one_image_is_no_score() -> None:
    one = caption_scores(["a dog runs on the beach"], [["a dog runs on the beach"]])
    assert one.bleu4 == 1
    assert math.isnan(one.cider)
