"""The captioner: captions packed in a batch, sampled words, the loss, greedy and beam search, attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models.captioning.data import CaptionData, build_vocabulary
from models.captioning.model import END, PAD, PRESETS, START, UNKNOWN, Captioner, targets_of
from models.captioning.train import CaptionTask
from models.captioning.write import write_captions
from models.data import Splits, Vocabulary
from models.data.config import batch_plan

WORDS = 24


def _model(attention: bool = True, seed: int = 0) -> Captioner:
    torch.manual_seed(seed)
    model = Captioner(replace(PRESETS["nano"], attention=attention), WORDS)
    with torch.no_grad():
        # Wide logits: a fresh model says much the same whatever it sees, and a test could not fail.
        model.embedding.weight.mul_(8)
        model.head.weight.mul_(4)
    return model.eval()


def _images(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _tokens(lengths: list[int], seed: int = 2) -> torch.Tensor:
    """Captions whose predictions are ``lengths`` long: start, words, end, padding."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((len(lengths), max(lengths) + 1), Vocabulary.PAD)
    for row, length in zip(rows, lengths, strict=True):
        row[0], row[length] = Vocabulary.START, Vocabulary.END
        row[1:length] = torch.randint(4, WORDS, (length - 1,), generator=generator)
    return rows


@pytest.mark.parametrize("attention", [True, False])
def test_captions_that_have_ended_are_left_out(attention: bool) -> None:
    """The rows of a batch are those of each caption written for itself."""
    model, images, lengths = _model(attention), _images(4), [6, 4, 4, 1]
    tokens = _tokens(lengths)
    rows = model(images, tokens, lengths)
    assert len(rows) == sum(lengths)
    alone = [model(images[i : i + 1], tokens[i : i + 1], [lengths[i]]) for i in range(4)]
    expected = [alone[i][t] for t in range(6) for i in range(4) if t < lengths[i]]
    torch.testing.assert_close(rows, torch.stack(expected))
    right = [tokens[i, t + 1] for t in range(6) for i in range(4) if t < lengths[i]]
    assert torch.equal(targets_of(tokens, lengths), torch.stack(right))


def test_sampled_words_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, lengths = _model(), _images(64), [5] * 64
    tokens = _tokens(lengths)
    with torch.no_grad():
        model.bias[7] = 1e4  # all that it would write
    given: list[torch.Tensor] = []
    step = model.step

    def spy(words: torch.Tensor, *rest: object) -> object:
        given.append(words)
        return step(words, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "step", spy)
    model(images, tokens, lengths, 0.0)
    assert torch.equal(torch.stack(given, 1), tokens[:, :5])
    given.clear()
    model(images, tokens, lengths, 1.0)
    assert torch.equal(given[0], tokens[:, 0]), "a caption starts with its start"
    assert (torch.stack(given[1:]) == 7).all()
    given.clear()
    model(images, tokens, lengths, 0.25)
    assert 0.1 < (torch.stack(given[1:]) == 7).float().mean() < 0.45
    given.clear()
    with torch.no_grad():
        model.bias[7], model.bias[Vocabulary.END] = 0, 1e4
    model(images, tokens, lengths, 1.0)
    assert torch.equal(torch.stack(given, 1), tokens[:, :5]), "after the end no word could come"


def test_sampling_grows_with_the_steps_and_never_writes_special_words(synthetic: Splits) -> None:
    vocabulary = build_vocabulary(synthetic.train, 1)
    data = CaptionData(source="synthetic", batch_size=16, views=2, variant_divisor=1)
    task = CaptionTask(batch_plan(synthetic, data, vocabulary, 32), steps=100, sampling=0.5)
    assert [task.batch(i).sampling for i in (0, 50, 100, 200)] == [0, 0.25, 0.5, 0.5]
    batch = task.batch(3)
    assert batch.images.shape == (32, 3, 32, 32)
    assert batch.lengths == sorted(batch.lengths, reverse=True)
    assert batch.lengths == ((batch.tokens != Vocabulary.PAD).sum(1) - 1).tolist()
    # Each drawing still has its own caption: the images of a batch are in the order of its tokens.
    plan = task.plan(3)
    flat = {image.numpy().tobytes(): row for image, row in zip(plan.images[1], plan.tokens.tolist(), strict=True)}
    for image, row in zip(batch.images.contiguous(), batch.tokens.tolist(), strict=True):
        if (key := image.numpy().tobytes()) in flat:
            assert row == flat.pop(key)
    assert not flat
    logits = _model().logits(torch.randn(5, 32))
    assert logits[:, :3].isneginf().all()
    assert logits[:, 3:].isfinite().all()


def test_fused_loss_is_the_eager_one(synthetic: Splits) -> None:
    vocabulary = build_vocabulary(synthetic.train, 1)
    data = CaptionData(source="synthetic", batch_size=16, variant_divisor=1)
    plan = batch_plan(synthetic, data, vocabulary, 32)
    torch.manual_seed(0)
    model = Captioner(PRESETS["nano"], len(vocabulary))
    found = {}
    for name in ("fused", "eager"):
        task = CaptionTask(plan, 10, name, smoothing=0.1)  # type: ignore[arg-type]
        loss, logs = task.loss(model, task.batch(0))
        model.zero_grad()
        loss.backward()
        found[name] = loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert 0 <= float(logs["words"]) <= 1
    torch.testing.assert_close(found["fused"][0], found["eager"][0])
    assert found["fused"][1].keys() == dict(model.named_parameters()).keys(), "every parameter takes part"
    torch.testing.assert_close(found["fused"][1], found["eager"][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", [True, False])
def test_beams_score_what_the_model_says_of_their_captions(attention: bool) -> None:
    """Every hypothesis is scored again by itself: the state followed its beam, and the image its item."""
    model = _model(attention)
    images = _images(5)
    with torch.no_grad():
        encoded = model.encode(images)
        found = model.beam_search(encoded, beams=4, max_length=7, length_penalty=0.5)
        assert not found.faults()
        for item in range(5):
            length = int(found.lengths[item, 0])
            ids = found.sequences[item, 0, :length]
            tokens = torch.cat([torch.tensor([Vocabulary.START]), ids])
            logits = model.logits(model(images[item : item + 1], tokens[None], [length]))
            log_probs = F.log_softmax(logits, -1)[range(length), ids]
            torch.testing.assert_close(found.log_probs[item, 0], log_probs.sum(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.scores[item, 0], log_probs.sum() / length**0.5, rtol=1e-4, atol=1e-4)


def test_greedy_is_a_search_with_one_beam() -> None:
    model, images = _model(), _images(6)
    with torch.no_grad():
        model.bias[Vocabulary.END] += 3
        encoded = model.encode(images)
        own = model.greedy(encoded, 9)
        found = model.beam_search(encoded, 1, 9)
    assert found.lengths[:, 0].unique().numel() > 1, "captions of different lengths"
    for row, ids, length in zip(own, found.sequences[:, 0], found.lengths[:, 0].tolist(), strict=True):
        assert row[:length].tolist() == ids[:length].tolist()
        assert (row[length:] == Vocabulary.PAD).all()


def test_captions_do_not_depend_on_the_batch(synthetic: Splits) -> None:
    model, vocabulary = _model(), Vocabulary([f"w{i}" for i in range(WORDS - 4)], 8)
    images = synthetic.train.images[::60]
    for beams in (1, 3):
        whole = write_captions(model, vocabulary, images, beams=beams)
        parts = write_captions(model, vocabulary, images, beams=beams, batch=2)
        assert [w.text for w in whole] == [w.text for w in parts]
        assert len({w.text for w in whole}) > 1


def test_attention_looks_somewhere_at_every_word() -> None:
    model, images, tokens = _model(), _images(3), _tokens([4, 4, 4])
    encoded = model.encode(images)
    looks = model.looks(encoded, tokens[:, 1:])
    assert looks.shape == (3, 4, 8 * 8)
    torch.testing.assert_close(looks.sum(-1), torch.ones(3, 4))
    # What lies at a place where nobody looks does not matter; where all look it does.
    place = int(looks[0, 0].argmax())
    changed = encoded._replace(places=encoded.places.clone())
    changed.places[0, place] += 10
    state = model.begin(encoded)
    before, after = (model.step(tokens[:, 0], state, seen)[0] for seen in (encoded, changed))
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(before[1:], after[1:])
    plain = _model(attention=False)
    assert not any(name.startswith(("query", "gate", "places")) for name, _ in plain.named_parameters())


def test_nan_is_reported_and_odd_sizes_are_refused() -> None:
    vocabulary = Vocabulary([f"w{i}" for i in range(WORDS - 4)], 8)
    model = _model()
    with torch.no_grad():
        model.bias[9] = float("nan")
    with pytest.raises(FloatingPointError, match="the search stopped at 2 images"):
        write_captions(model, vocabulary, torch.zeros(2, 4, 32, 32, dtype=torch.uint8), beams=3)
    with pytest.raises(ValueError, match="image_size 36 is not a multiple of the encoder's stride, 8"):
        Captioner(replace(PRESETS["nano"], image_size=36), WORDS)


def test_ids_are_the_vocabularys() -> None:
    assert (PAD, START, UNKNOWN, END) == (Vocabulary.PAD, Vocabulary.START, Vocabulary.UNKNOWN, Vocabulary.END)
