"""The encoders, the losses that train them, and the numbers of evaluation against what they mean."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

from models.common.gallery import Baselines, Encoder, evaluate_galleries, pick_sets, retrieval
from models.common.metrics import PixelBaseline, Retrieval, ranks_of_scores
from models.data import Concept, ImageTextSet, Splits, Subwords
from models.data.config import batch_plan
from models.data.synthetic import load_synthetic
from models.retrieval.data import RetrievalData, learn_tokens
from models.retrieval.evaluate import (
    best_images,
    keyword_queries,
    retriever_encoder,
    search_precision,
    spoken_retrieval,
)
from models.retrieval.model import PAD, PRESETS, TEXT_ENCODERS, Retriever
from models.retrieval.train import LossConfig, RetrievalTask

NANO = PRESETS["nano"]
LOSSES = [LossConfig(mining=mining) for mining in ("all", "hardest", "semi_hard")]  # type: ignore[arg-type]
LOSSES += [LossConfig("info_nce"), LossConfig("siglip")]


@pytest.fixture(scope="module")
def spoken() -> Splits:
    """Synthetic data in two languages."""
    return load_synthetic(32, languages=("en", "de"))


@pytest.fixture(scope="module")
def tokens(spoken: Splits) -> Subwords:
    """The tokens of its captions."""
    return learn_tokens(spoken.train, NANO)


def _model(tokens: Subwords, loss: LossConfig = LOSSES[0], **changes: object) -> Retriever:
    torch.manual_seed(0)
    return Retriever(replace(NANO, **changes), len(tokens), loss.name)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", list(TEXT_ENCODERS))
def test_features_are_unit_vectors_and_padding_changes_nothing(text: str, tokens: Subwords) -> None:
    model = _model(tokens, text=text).eval()
    captions = [
        "a red circle",
        "kreis in blau in der mitte",
        "",
        "circle red a",
        "ring",
        "a blue bar at the top",
        "a",
        "x",
    ]
    ids = tokens(captions)
    images, texts = model(torch.randn(3, 3, 32, 32), ids)
    assert images.shape == (3, 32)
    assert texts.shape == (8, 32)
    for features in (images, texts):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(features)))
    padded = F.pad(ids, (0, 5), value=Subwords.PAD)
    torch.testing.assert_close(model.encode_text(padded), texts)
    alone = torch.cat([model.encode_text(tokens([caption])) for caption in captions])
    torch.testing.assert_close(alone, texts)
    # A bag does not know the order of words, the others do.
    same = torch.allclose(texts[0], texts[3], atol=1e-5)
    assert same == (text == "bag")


@pytest.mark.parametrize("text", list(TEXT_ENCODERS))
def test_every_parameter_learns(text: str, spoken: Splits, tokens: Subwords) -> None:
    loss = LossConfig("siglip")
    model = _model(tokens, loss, text=text)
    data = RetrievalData(source="synthetic", stored_size=32, batch_size=16, variant_divisor=1)
    task = RetrievalTask(batch_plan(spoken, data, tokens, 32, texts=2), loss)
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = task.loss(model, task.batch(0))
    value.backward()
    assert value.dtype == torch.float32
    for name, parameter in model.named_parameters():
        # The last batch norm of a residual starts at 0, but its own gradient does not.
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_padding_is_the_tokenizers() -> None:
    assert PAD == Subwords.PAD


def test_image_size_must_fit_the_stages(tokens: Subwords) -> None:
    with pytest.raises(ValueError, match="image_size 36 is not a multiple of the encoder's stride, 8"):
        _model(tokens, image_size=36)


def test_encoders_start_alike_whatever_the_loss(tokens: Subwords) -> None:
    first = _model(tokens).state_dict()
    for loss in LOSSES[1:]:
        other = _model(tokens, loss).state_dict()
        assert all(torch.equal(other[name], value) for name, value in first.items())
        learned = {"triplet": set(), "info_nce": {"logit_scale"}, "siglip": {"logit_scale", "logit_bias"}}
        assert other.keys() - first.keys() == learned[loss.name]


def _eager(loss: LossConfig, images: torch.Tensor, texts: torch.Tensor, model: Retriever) -> torch.Tensor:
    """What each loss says, in its paper's words, row by row."""
    s = images @ texts.T
    n = len(s)
    if loss.name == "info_nce":
        assert model.logit_scale is not None
        logits = s * model.logit_scale.exp()
        return (F.cross_entropy(logits, torch.arange(n)) + F.cross_entropy(logits.T, torch.arange(n))) / 2
    if loss.name == "siglip":
        assert model.logit_scale is not None
        assert model.logit_bias is not None
        signs = 2 * torch.eye(n) - 1
        return -F.logsigmoid(signs * (s * model.logit_scale.exp() + model.logit_bias)).sum() / n
    total = torch.zeros(())
    for scores in (s, s.T):
        for i in range(n):
            right = scores[i, i]
            wrong = torch.stack([scores[i, j] for j in range(n) if j != i])
            cost = (wrong - right + loss.margin).clamp(min=0)
            if loss.mining == "all":
                total = total + cost.sum()
            elif loss.mining == "hardest":
                total = total + cost.max()
            else:
                near = cost[(wrong < right) & (wrong > right - loss.margin)]
                total = total + (near.max() if len(near) else 0)
    return total / (2 * n)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.name}-{loss.mining}")
def test_loss_of_a_batch_is_the_mean_over_drawings_and_captions(
    loss: LossConfig, spoken: Splits, tokens: Subwords
) -> None:
    data = RetrievalData(source="synthetic", stored_size=32, batch_size=12, views=2, variant_divisor=1)
    task = RetrievalTask(batch_plan(spoken, data, tokens, 32, texts=3), loss)
    model = _model(tokens, loss)
    batch = task.batch(0)
    value, logged = task.loss(model.eval(), batch)
    images = model.encode_image(batch.data.images.flatten(0, 1)).view(2, 12, -1)
    texts = model.encode_text(batch.data.tokens).view(3, 12, -1)
    expected = torch.stack([_eager(loss, i, t, model) for i in images for t in texts]).mean()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    ranks = ranks_of_scores(images[0] @ texts[0].T)
    assert float(logged["r1"]) == pytest.approx(float((ranks == 0).float().mean()))


def test_mining_warms_up_by_optimiser_steps(spoken: Splits, tokens: Subwords) -> None:
    data = RetrievalData(source="synthetic", stored_size=32, batch_size=8, variant_divisor=1)
    loss = LossConfig(mining="hardest", mining_warmup=2)
    task = RetrievalTask(batch_plan(spoken, data, tokens, 32), loss, accumulate=2)
    assert [task.batch(i).mining for i in range(6)] == ["all"] * 4 + ["hardest"] * 2


def test_both_directions_and_baselines_against_sorted_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(60, 8, generator=generator), dim=-1) for _ in range(2))
    baseline = torch.randn(60, 60, generator=generator)
    found = retrieval(images, texts, {"other": baseline})
    for way, scores, other in (
        ("image to text", images @ texts.T, baseline),
        ("text to image", texts @ images.T, baseline.T),
    ):
        for who, own in (("model", scores), ("other", other)):
            ranks = [row.argsort(descending=True).tolist().index(i) for i, row in enumerate(own)]
            assert found[way][who] == asdict(Retrieval.from_ranks(torch.tensor(ranks)))
        assert found[way]["chance"]["r5"] == pytest.approx(5 / 60)
    assert found["image to text"]["model"] != found["text to image"]["model"]


class _Lookup:
    """Stands in for a model: an image's feature is its first pixel's place, a text's is what the table says."""

    def __init__(self, table: dict[int, int], size: int) -> None:
        self.table, self.size = table, size

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return F.one_hot(images[:, 0, 0, 0].argsort().argsort(), self.size).float()

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack([F.one_hot(torch.tensor(self.table[int(t)]), self.size).float() for t in tokens[:, 0]])

    def parameters(self) -> object:
        return iter([torch.nn.Parameter(torch.zeros(1))])

    def eval(self) -> None:
        pass


def _shades(count: int) -> tuple[ImageTextSet, Encoder]:
    """Grey squares; English names are right, German ones are exchanged in pairs, and the first pair has none."""
    images = torch.full((count, 4, 8, 8), 255, dtype=torch.uint8)
    images[:, :3] = (torch.arange(count) * 10).to(torch.uint8).view(-1, 1, 1, 1)
    german = [i ^ 1 for i in range(count)]
    concepts = [
        Concept(f"{i}", f"{i}", variant=i >= 6, names={"en": f"{i}"} | ({"de": f"{100 + german[i]}"} if i > 1 else {}))
        for i in range(count)
    ]
    data = ImageTextSet(images, torch.arange(count), torch.zeros(count), concepts, ["grey"])
    table = {i: i for i in range(count)} | {100 + i: i for i in range(count)}
    model = _Lookup(table, count)
    return data, Encoder(model, lambda texts: torch.tensor([[int(t)] for t in texts]), 8)  # type: ignore[arg-type]


def test_each_language_has_its_own_numbers() -> None:
    data, encoder = _shades(8)
    found = spoken_retrieval(encoder, data)
    assert {language: entry["size"] for language, entry in found.items()} == {"en": 8, "de": 6}
    assert found["en"]["ways"]["text to image"]["model"]["r1"] == 1
    assert found["de"]["ways"]["text to image"]["model"]["r1"] == 0
    nameless = [replace(c, names={}) for c in data.concepts]
    assert list(spoken_retrieval(encoder, replace(data, concepts=nameless))) == [""]


def test_galleries_leave_variants_out_and_keep_rows_and_baselines_together() -> None:
    data, encoder = _shades(8)

    class Exact:
        def scores(self, own: ImageTextSet) -> dict[str, torch.Tensor]:
            return {"pixels": torch.eye(len(own))}

    images, texts = encoder.images(data.images), encoder.texts(data.names())
    found = evaluate_galleries(data, 4, images, texts, Exact())  # type: ignore[arg-type]
    assert {kind: entry["size"] for kind, entry in found.items()} == {"base": 4, "full": 8}
    for entry in found.values():
        for who in ("model", "pixels"):
            assert entry["image to text"][who]["r1"] == 1
    assert found["base"]["image to text"]["chance"]["r1"] == 0.25


def test_search_finds_what_a_text_names() -> None:
    data, encoder = _shades(6)
    scores, rows = best_images(encoder, data, ["3", "5"], 2)
    assert rows[:, 0].tolist() == [3, 5]
    assert scores[:, 0].tolist() == [1, 1]
    assert best_images(encoder, data, ["3"], 99)[0].shape == (1, 6), "no more than there are"


def test_searches_by_keywords_count_the_images_that_have_them_all() -> None:
    rows_of = {"low": range(6), "mid": range(1, 7), "many": range(30)}
    concepts = [Concept(str(i), str(i), tuple(k for k, rows in rows_of.items() if i in rows)) for i in range(60)]
    images = torch.zeros(60, 4, 8, 8, dtype=torch.uint8)
    data = ImageTextSet(images, torch.arange(60), torch.zeros(60), concepts, ["grey"])
    queries = keyword_queries(data)
    assert queries["one keyword"] == {"low": list(range(6)), "mid": list(range(1, 7))}, "a tenth of the rows at most"
    pairs = {"low many": list(range(6)), "low mid": list(range(1, 6)), "many mid": list(range(1, 7))}
    assert queries["two keywords"] == pairs

    class FirstFive:
        """Finds images 0 to 4 whatever is asked for."""

        def images(self, images: torch.Tensor) -> torch.Tensor:
            return torch.eye(len(images))

        def texts(self, texts: list[str]) -> torch.Tensor:
            return (torch.arange(60) < 5).float().expand(len(texts), 60)

    found = search_precision(FirstFive(), data)  # type: ignore[arg-type]
    assert found["one keyword"] == pytest.approx({"queries": 2, "first": 0.5, "top": 0.9, "chance": 0.1})
    assert found["two keywords"] == pytest.approx({"queries": 3, "first": 1 / 3, "top": 2.6 / 3, "chance": 17 / 180})
    nameless = replace(data, concepts=[replace(c, keywords=()) for c in concepts])
    assert search_precision(FirstFive(), nameless) == {}  # type: ignore[arg-type]


def test_pixel_baseline_of_a_set_is_beside_the_model(spoken: Splits, tokens: Subwords) -> None:
    data = spoken.tests["new style (dotted)"].gallery(limit=20)
    scores = Baselines(spoken.train).scores(data)
    train = spoken.train
    expected = PixelBaseline(train.images, train.concept_ids, [c.name for c in train.concepts])
    assert list(scores) == ["pixels"], "synthetic drawings have no unframed version"
    torch.testing.assert_close(scores["pixels"], expected.scores(data.images, data.concept_ids, data.names()))
    assert retriever_encoder(_model(tokens), tokens).images(data.images).shape == (20, 32)
    with pytest.raises(ValueError, match="no validation set"):
        pick_sets(spoken, validation=True)
    with pytest.raises(ValueError, match="no test set"):
        pick_sets(replace(spoken, tests={}), validation=False)
