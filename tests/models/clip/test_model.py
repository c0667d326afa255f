"""The CLIP model against open_clip, its export, and its loss."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch

from models.clip.export import export_model
from models.clip.model import CLIP, PRESETS, trim_padding
from models.clip.open_clip import from_open_clip, to_open_clip
from models.clip.train import ClipTask, eager_info_nce
from models.common.layers import attend
from models.data import Batch, Tokenizer


@pytest.fixture(scope="module")
def peer() -> torch.nn.Module:
    """open_clip's ViT-B-32 with random weights; its zero-initialised biases are filled, so that each is tested."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32", pretrained=None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def test_open_clip_state_dict_gives_the_same_features(peer: torch.nn.Module) -> None:
    ours = from_open_clip(peer.state_dict()).eval()
    images = torch.randn(2, 3, 224, 224)
    texts = ["a photo of a cat", "two dogs on a red sofa", "!"]
    tokens = open_clip.get_tokenizer("ViT-B-32")(texts)
    assert torch.equal(Tokenizer()(texts), tokens)
    with torch.no_grad():
        expected_images, expected_texts, scale = peer(images, tokens)
        found_images, found_texts, found_scale = ours(images, trim_padding(tokens))
    # Unit vectors of 512 entries after 12 layers: float32 rounding stays well below 1e-5.
    torch.testing.assert_close(found_images, expected_images, rtol=0, atol=2e-6)
    torch.testing.assert_close(found_texts, expected_texts, rtol=0, atol=2e-6)
    torch.testing.assert_close(found_scale, scale)


def test_saves_back_to_open_clip(peer: torch.nn.Module) -> None:
    state = peer.state_dict()
    back = to_open_clip(from_open_clip(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    open_clip.create_model("ViT-B-32", pretrained=None).load_state_dict(back)


def test_from_open_clip_names_what_is_wrong(peer: torch.nn.Module) -> None:
    state = dict(peer.state_dict())
    del state["ln_final.weight"]
    with pytest.raises(ValueError, match=r"1 missing \['ln_final.weight'\]"):
        from_open_clip(state)
    with pytest.raises(ValueError, match=r"ln_final.weight: expected the shape \(512,\), got \(3,\)"):
        from_open_clip(peer.state_dict() | {"ln_final.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="no convolutional stem"):
        to_open_clip(CLIP(PRESETS["nano"]))


def test_text_encoder_is_causal_and_reads_the_end_token() -> None:
    model = CLIP(PRESETS["nano"]).eval()
    tokens = Tokenizer(24, 2048)(["a red circle", "a red circle at the top of a large blue square"])
    with torch.no_grad():
        whole = model.encode_text(tokens)
        trimmed = model.encode_text(trim_padding(tokens[:1]))
        after_end = tokens.clone()
        after_end[0, -1] = 7  # beyond the end token
        before_end = tokens.clone()
        before_end[0, 1] += 1
        torch.testing.assert_close(trimmed, whole[:1], rtol=0, atol=1e-6)
        torch.testing.assert_close(model.encode_text(after_end), whole, rtol=0, atol=1e-6)
        assert (model.encode_text(before_end)[0] - whole[0]).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_short_attention_in_bf16_agrees_with_torch(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 17, 16, dtype=torch.bfloat16) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    torchs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    error, peer_error = (attend(q, k, v, causal=causal) - exact).abs().max(), (torchs - exact).abs().max()
    assert error <= 2 * peer_error + 2**-8


def test_small_vocabulary_keeps_common_words_whole() -> None:
    small, full = Tokenizer(16, 4096), Tokenizer(16)
    text = ["a face with tears of joy"]
    ids = small(text)
    assert int(ids.max()) == 4095
    assert max(small._bpe.encoder.values()) == 4093, "the last two ids are start and end"
    assert small._bpe.decode(ids[0, 1 : int(ids.argmax())].tolist()).strip() == text[0]
    common = full(["the face"])[0]
    assert torch.equal(small(["the face"])[0, 1:3], common[1:3])
    with pytest.raises(ValueError, match="vocab_size"):
        Tokenizer(16, 100)


def test_fused_and_eager_losses_agree() -> None:
    torch.manual_seed(0)
    views = torch.nn.functional.normalize(torch.randn(3, 40, 24), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(40, 24), dim=-1)
    results = []
    for name in ("fused", "eager"):
        inputs = [
            views.clone().requires_grad_(),
            texts.clone().requires_grad_(),
            torch.tensor(30.0, requires_grad=True),
        ]
        loss = ClipTask(None, name, image_weight=0.5).losses(*inputs)  # type: ignore[arg-type]
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    for fused, eager in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-6)


def test_loss_pairs_every_view_with_its_caption() -> None:
    features = torch.nn.functional.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    scale = torch.tensor(100.0)
    task = ClipTask(None, "eager")  # type: ignore[arg-type]
    assert task.losses(torch.stack([features, features]), features, scale) < 0.01
    assert task.losses(torch.stack([features, features.roll(1, 0)]), features, scale) > 1
    assert eager_info_nce(features, features, torch.tensor(0.0)) == pytest.approx(math.log(8))


def test_batches_in_parts_by_length_keep_their_pairs() -> None:
    """Sorting and cutting the captions changes nothing but the time: the same loss as of the batch as it came."""
    torch.manual_seed(0)
    model = CLIP(PRESETS["nano"]).eval()
    words = [
        "sun",
        "a cat with a wry smile and hearts for eyes",
        "dog",
        "flag of a far country",
        "ten red apples",
        "ox",
    ]
    tokens, images = Tokenizer(24, 2048)(words), torch.randn(2, 6, 3, 32, 32)
    task = ClipTask(SimpleNamespace(batch_size=6), "eager")  # type: ignore[arg-type]
    loss, _ = task.loss(model, Batch(images, tokens, torch.arange(6)))
    plain, texts, scale = model(images.flatten(0, 1), tokens)
    torch.testing.assert_close(loss, task.losses(plain.unflatten(0, (2, 6)), texts, scale))
    assert not torch.isclose(loss, task.losses(plain.unflatten(0, (2, 6)), texts.roll(1, 0), scale))


def test_temperature_is_clamped() -> None:
    model = CLIP(PRESETS["nano"])
    for value, clamped in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        torch.nn.init.constant_(model.logit_scale, value)
        model.clamp_scale()
        assert model.logit_scale.item() == pytest.approx(clamped)


def test_export_agrees_with_eager_at_other_batch_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "deep" / "clip.pt2"
    assert export_model(CLIP(PRESETS["nano"]), path) < 1e-5
    program = torch.export.load(path).module()
    images, tokens = torch.randn(7, 3, 32, 32), Tokenizer(24, 2048)(["one"])
    assert [tuple(x.shape) for x in program(images, tokens)] == [(7, 32), (1, 32), ()]
