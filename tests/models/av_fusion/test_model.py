"""Audio-visual fusion: every way uses both sides, absent sides count for nothing, the attention is the op's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from mmkernels.testing import assert_within_budget
from models.av_fusion.model import (
    FUSIONS,
    PRESETS,
    AttentionFusion,
    AVFusion,
    Fusion,
    FusionConfig,
    LateFusion,
    count_parameters,
)

NANO = PRESETS["nano"]
BOTH: tuple[Fusion, ...] = ("early", "late", "weighted", "attention")


def build(fusion: Fusion, seed: int = 0, **changes: Any) -> AVFusion:
    """A model none of whose parameters stands at its start of zero or one."""
    torch.manual_seed(seed)
    model = AVFusion(replace(NANO, fusion=fusion, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def inputs(batch: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 1, 16, 16, generator=generator), torch.randn(batch, 1, 16, 16, generator=generator)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_logits_of_every_fusion(fusion: Fusion) -> None:
    model = build(fusion, classes=7)
    images, spectrograms = inputs()
    logits = model(images, spectrograms)
    assert logits.shape == (5, 7)
    assert logits.isfinite().all()
    alone = torch.cat([model(images[i : i + 1], spectrograms[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(logits, alone)


@pytest.mark.parametrize("preset", ["nano", "tiny", "small"])
def test_the_ways_to_fuse_have_as_many_parameters(preset: str) -> None:
    counts = [count_parameters(AVFusion(replace(PRESETS[preset], fusion=fusion))) for fusion in BOTH]
    assert max(counts) < 1.03 * min(counts)
    config = PRESETS[preset]
    assert FusionConfig.from_dict({**vars(config), "widths": list(config.widths)}) == config


def test_tokens_are_places_of_the_image_and_moments_of_the_sound() -> None:
    model = build("early")
    images, spectrograms = (x.requires_grad_() for x in inputs(1))
    (of_image, of_sound), _ = model._tokens(images, spectrograms, None)
    assert of_image.shape == of_sound.shape == (1, NANO.tokens, NANO.widths[-1])
    # The first token sees the top left of the image and the beginning of the sound, the last the other end: two stages
    # see the lines 4 i - 3 to 4 i + 3.
    for token, unseen in ((0, slice(8, 16)), (NANO.tokens - 1, slice(0, 5))):
        down, across = (
            torch.autograd.grad(of_image[0, token].sum(), images, retain_graph=True)[0].abs().sum((0, 1, axis))
            for axis in (3, 2)
        )
        over_time = torch.autograd.grad(of_sound[0, token].sum(), spectrograms, retain_graph=True)[0].abs()
        for line in (down, across, over_time.sum((0, 1, 2))):
            assert line.sum() > 0
            assert line[unseen].sum() == 0


@pytest.mark.parametrize("fusion", BOTH)
def test_a_fusion_reads_both(fusion: Fusion) -> None:
    model = build(fusion)
    given = [x.requires_grad_() for x in inputs()]
    for gradient in torch.autograd.grad(model(*given).square().sum(), given):
        assert (gradient.abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("fusion", BOTH)
def test_an_absent_modality_counts_for_nothing(fusion: Fusion) -> None:
    model = build(fusion)
    (images, spectrograms), (other_images, other_spectrograms) = inputs(), inputs(seed=1)
    present = torch.tensor([[True, False], [False, True], [True, True], [True, False], [False, True]])
    found = model(images, spectrograms, present)
    assert found.isfinite().all()
    swapped = model(
        torch.where(present[:, :1, None, None], images, other_images),
        torch.where(present[:, 1:, None, None], spectrograms, other_spectrograms),
        present,
    )
    torch.testing.assert_close(found, swapped)
    whole = model(images, spectrograms)
    assert torch.allclose(found[2], whole[2], atol=1e-6)
    assert not torch.isclose(found[[0, 1, 3, 4]], whole[[0, 1, 3, 4]], atol=1e-4).all(1).any()


def test_a_model_of_one_modality_needs_no_other() -> None:
    images, spectrograms = inputs()
    torch.testing.assert_close(build("image")(images, None), build("image")(images, spectrograms))
    audio = build("audio")
    absent = torch.tensor([[True, False]]).expand(5, -1)
    torch.testing.assert_close(audio(None, spectrograms, absent), audio(None, spectrograms))
    with pytest.raises(ValueError, match="this model reads the modality audio, which was not given"):
        audio(images, None)


def test_late_fusion_is_its_formula() -> None:
    images, spectrograms = inputs()
    for fusion in ("late", "weighted"):
        model = build(fusion)  # type: ignore[arg-type]
        late = model.fusion
        assert isinstance(late, LateFusion)
        tokens, _ = model._tokens(images, spectrograms, None)
        p, q = (head(x.flatten(1)).softmax(-1) for head, x in zip(late.heads, tokens, strict=True))
        if fusion == "late":
            expected = (p + q) / 2
        else:
            assert late.log_weights is not None
            a, b = late.log_weights.exp()
            expected = p**a * q**b
            expected = expected / expected.sum(1, keepdim=True)
        torch.testing.assert_close(model(images, spectrograms).softmax(-1), expected)
        only = model(images, spectrograms, torch.tensor([[True, False]]).expand(5, -1)).argmax(1)
        assert torch.equal(only, p.argmax(1))


def eager_attention(fusion: AttentionFusion, x: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """What the class token reads of tokens [B, 1 + 2 N, C], and its probabilities, [B, H, 1 + 2 N]."""
    q, k, v = fusion.attn.qkv(x).unflatten(-1, (3, fusion.attn.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (q[:, :, :1] @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    tokens = (x.shape[1] - 1) // 2
    seen = torch.cat([torch.ones_like(present[:, :1]), present.repeat(1, tokens)], 1)
    shares = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    return fusion.attn.proj((shares @ v).transpose(1, 2).flatten(2))[:, 0], shares[:, :, 0]


def test_attention_is_eager_attention_over_the_present_tokens() -> None:
    present = torch.tensor([[True, True], [True, False], [False, True], [True, True], [True, False]])
    found, shares = [], []
    for dtype in (torch.float32, torch.float64):
        model = build("attention").to(dtype)
        fusion = model.fusion
        assert isinstance(fusion, AttentionFusion)
        tokens, _ = model._tokens(*(x.to(dtype) for x in inputs()), None)
        x = fusion.ln_1(fusion.embed(tokens))
        eager, probabilities = eager_attention(fusion, x, present)
        found += [fusion.attn(x, present)[:, 0], eager]
        shares += [fusion.weights(tokens, present), probabilities.mean(1)]
    assert_within_budget(found[0], found[1], found[3])
    weights, probabilities = shares[2], shares[3]
    torch.testing.assert_close(weights[:, 0], probabilities[:, 1::2].sum(1))
    torch.testing.assert_close(weights[:, 1], probabilities[:, 2::2].sum(1))
    torch.testing.assert_close(weights[:, 2], probabilities[:, 0])


def test_attention_weights_sum_to_one_and_skip_what_is_absent() -> None:
    model = build("attention")
    present = torch.tensor([[True, True], [True, False], [False, True], [True, True], [False, True]])
    weights = model.weights(*inputs(), present)
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    assert torch.equal(weights[:, :2] > 0, present)
    with pytest.raises(ValueError, match="a model with early fusion has no attention weights"):
        build("early").weights(*inputs())


def test_the_model_runs_on_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    op = mmkernels.divided_attention

    def watched(qkv: Tensor, **options: Any) -> Any:
        calls.append({"shape": tuple(qkv.shape)} | options)
        return op(qkv, **options)

    monkeypatch.setattr(mmkernels, "divided_attention", watched)
    model = build("attention")
    present = torch.tensor([[True, False]]).expand(5, -1)
    model(*inputs(), present)
    assert len(calls) == 1
    assert calls[0]["shape"] == (5, 1 + 2 * NANO.tokens, 3 * NANO.widths[-1])
    assert (calls[0]["num_frames"], calls[0]["axis"]) == (2, "joint")
    assert torch.equal(calls[0]["frame_mask"], present)
    for fusion in ("early", "late", "weighted", "image"):
        build(fusion)(*inputs())  # type: ignore[arg-type]
    assert len(calls) == 1


def test_every_implementation_gives_the_references_loss_and_gradients() -> None:
    present = torch.tensor([[True, True], [True, False], [False, True], [True, True], [True, True]])
    labels = torch.arange(5)

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        model = build("attention", impl=impl).to(dtype)
        loss = F.cross_entropy(model(*(x.to(dtype) for x in inputs()), present), labels)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    exact = run("reference", torch.float64)
    largest = max(float(gradient.abs().max()) for gradient in exact)
    for ours, eager, truth in zip(run("auto", torch.float32), run("reference", torch.float32), exact, strict=True):
        assert_within_budget(ours, eager, truth, terms=largest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion": "middle"}, "fusion must be one of image, audio, early, late, weighted, attention; got 'middle'"),
        ({"tokens": 5}, "tokens: expected a square number, got 5"),
        ({"heads": 5}, "width 16 is not a multiple of the 5 heads"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AVFusion(replace(NANO, **change))


def test_impossible_inputs_are_refused() -> None:
    model, (images, spectrograms) = build("attention"), inputs()
    with pytest.raises(ValueError, match=r"image: expected shape \[B, 1, H, W\], got \(5, 3, 16, 16\)"):
        model(images.expand(-1, 3, -1, -1), spectrograms)
    with pytest.raises(ValueError, match=r"audio: expected shape \[B, 1, H, W\], got \(5, 16, 16\)"):
        model(images, spectrograms[:, 0])
    with pytest.raises(ValueError, match=r"present: expected bool \[B, 2\] = \(5, 2\), got torch.float32 \(5, 2\)"):
        model(images, spectrograms, torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"present: expected bool \[B, 2\] = \(5, 2\), got torch.bool \(2,\)"):
        model(images, spectrograms, torch.ones(2, dtype=torch.bool))
