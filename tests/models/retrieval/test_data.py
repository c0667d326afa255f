"""What retrieval trains on: names in several languages, tokens learned from them, several captions of a concept."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image

from models.common.options import split_commas
from models.data import BatchPlan, Concept, ImageTextSet, Subwords
from models.data.augment import Augment
from models.data.batches import generator_of
from models.data.captions import sample_caption
from models.data.emoji.catalogue import catalogue, code_of, names_in
from models.data.folder import load_folder
from models.data.synthetic import load_synthetic
from models.retrieval.data import RetrievalData, pick_languages
from models.retrieval.train import LossConfig

TEXTS = ["a grinning cat", "eine grinsende Katze", "un chat qui sourit", "a cat", "die Katze", "le chat"] * 3


def test_emoji_have_names_in_each_language() -> None:
    cat = code_of("😺")
    names = {language: names_in(language)[cat] for language in ("en", "de", "fr", "es", "ja")}
    assert names["en"] == next(e.name for e in catalogue() if e.code == cat)
    assert names["de"] == "grinsende katze"
    assert names["fr"] == "chat qui sourit"
    assert len(set(names.values())) == 5
    for language in ("de", "fr", "es"):
        found = names_in(language)
        assert len(found) == len(set(found.values())) == len(catalogue()), "every emoji has a name of its own"
        assert not any(":" in name[:1] + name[-1:] or "_" in name for name in found.values())
    with pytest.raises(ValueError, match=r"no emoji names in the language 'xx'; there are ar, de, en"):
        names_in("xx")


def test_synthetic_names_and_the_language_of_evaluation() -> None:
    english, both = load_synthetic(16), load_synthetic(16, languages=("de", "en"))
    assert english.train.languages() == ["en"]
    assert both.train.languages() == ["de", "en"]
    assert both.train.names("en") == english.train.names() == english.train.names("en")
    assert both.train.names() == both.train.names("de") != both.train.names("en")
    assert "kreis in rot oben" in both.train.names()
    assert torch.equal(both.train.images, english.train.images), "the same concepts are held out"
    assert load_synthetic(16, languages=("fr",)).train.concepts[0].keywords == (), "keywords are English"
    for wrong, named in ((("en", "xx"), "'xx'"), ((), "none")):
        with pytest.raises(ValueError, match=f"languages: expected some of en, de, fr, es .*got {named}"):
            load_synthetic(16, languages=wrong)


def test_names_in_every_language_are_captions_to_train_on() -> None:
    concept = Concept("cat", "cat", captions=("a cat",), names={"en": "cat", "de": "katze", "fr": "chat"})
    assert concept.texts == ("cat", "a cat", "katze", "chat")
    generator = generator_of(0, 1)
    drawn = [sample_caption(concept, generator, 0.0) for _ in range(200)]
    assert all(35 < drawn.count(text) < 65 for text in concept.texts)


def test_batch_holds_several_captions_of_each_concept() -> None:
    data = load_synthetic(16, languages=("en", "de")).train
    seen: list[list[str]] = []

    def tokens(texts: list[str]) -> torch.Tensor:
        seen.append(texts)
        return torch.arange(len(texts)).unsqueeze(1)

    batch = BatchPlan(data, tokens, Augment(16, 0.0), batch_size=8, views=2, texts=3, seed=1)(0)  # type: ignore[arg-type]
    assert batch.images.shape == (2, 8, 3, 16, 16)
    assert batch.tokens.shape == (24, 1)
    own = [set(data.concepts[c].texts) for c in batch.concept_ids.tolist()]
    for text in range(3):
        assert all(caption in names for caption, names in zip(seen[0][8 * text : 8 * text + 8], own, strict=True))
    assert seen[0][:8] != seen[0][8:16]


def test_subwords_leave_nothing_unknown_and_say_where_a_text_ends() -> None:
    subwords = Subwords.build(TEXTS, vocab_size=320, max_tokens=8)
    ids = subwords(["a cat", "", "Die KATZE", "die katze", "猫 = кот"])
    lengths = (ids != Subwords.PAD).sum(1)
    assert ids.shape == (5, 8)
    assert [int(row[n - 1]) for row, n in zip(ids, lengths, strict=True)] == [Subwords.END] * 5
    assert lengths.tolist() == [3, 1, 3, 3, 8], "words that occur are one token, no text is empty, long ones are cut"
    assert torch.equal(ids[2], ids[3]), "upper case is lowered"
    assert not torch.equal(subwords(["猫"]), subwords(["犬"])), "characters never seen are told apart"
    again = Subwords(subwords.state, 8)
    assert torch.equal(again(["a cat", "", "Die KATZE", "die katze", "猫 = кот"]), ids)
    assert Subwords.build(TEXTS, vocab_size=320, max_tokens=8).state == subwords.state
    assert len(subwords) <= 320
    with pytest.raises(ValueError, match="vocab_size must be at least 258"):
        Subwords.build(TEXTS, vocab_size=257)
    with pytest.raises(ValueError, match="max_tokens must hold the end"):
        Subwords(subwords.state, 0)


def test_folder_with_a_column_of_languages(tmp_path: Path) -> None:
    rows = []
    for i, (english, german) in enumerate([("red", "rot"), ("green", "grün"), ("blue", "blau")]):
        Image.new("RGB", (8, 8), english).save(tmp_path / f"{i}.png")
        rows += [(f"{i}.png", english, "en"), (f"{i}.png", german, "de"), (f"{i}.png", f"{english} again", "en")]
    rows.append(("2.png", "no language", ""))
    with open(tmp_path / "captions.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption", "language"), *rows])
    concepts = load_folder(tmp_path, 8, test_share=0.0).train.concepts
    assert [c.name for c in concepts] == ["red", "green", "blue"]
    assert concepts[1].names == {"en": "green", "de": "grün"}
    assert concepts[2].texts == ("blue", "blau", "blue again", "no language")


def test_languages_of_a_set_and_their_names() -> None:
    concepts = [Concept("a", "a", names={"en": "a", "de": "ä"}), Concept("b", "b", names={"fr": "b"})]
    images = torch.zeros(2, 4, 4, 4, dtype=torch.uint8)
    data = ImageTextSet(images, torch.tensor([1, 0]), torch.zeros(2), concepts, ["x"])
    assert data.languages() == ["fr", "en", "de"]
    assert data.select(torch.tensor([1])).names("de") == ["ä"]


def test_configs_come_back_from_json() -> None:
    import json
    from dataclasses import asdict

    data = RetrievalData(languages=("de",), styles=("noto",))
    assert RetrievalData.from_dict(json.loads(json.dumps(asdict(data)))) == data
    assert pick_languages(split_commas(" EN, de,en")) == ("en", "de")
    with pytest.raises(ValueError, match="--languages: expected codes"):
        pick_languages(split_commas(","))
    mined = LossConfig(mining="hardest", mining_warmup=2)
    assert [mined.mining_at(step) for step in range(4)] == ["all", "all", "hardest", "hardest"]
