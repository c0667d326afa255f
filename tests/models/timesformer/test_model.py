"""TimeSformer against Hugging Face's, its embeddings at other sizes, drop-path against an eager formulation, FLOPs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels.testing import assert_within_budget
from models.common.layers import checkpoint_activations
from models.timesformer.hugging_face import (
    config_from_hugging_face,
    from_hugging_face,
    hugging_face_config,
    to_hugging_face,
)
from models.timesformer.model import PRESETS, Block, TimeSformer, TimesformerConfig

SMALL = TimesformerConfig(image_size=32, patch_size=8, num_frames=3, width=48, layers=2, heads=3, classes=5)


def clips(frames: int = 3, side: int = 32, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, frames, 3, side, side, generator=torch.Generator().manual_seed(seed))


def perturbed(model: Any, seed: int = 0) -> Any:
    """The model with noise on every parameter: none is left at a start of zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def hugging_face(attention: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.TimesformerConfig(**hugging_face_config(replace(SMALL, attention=attention)), **options)
    return perturbed(transformers.TimesformerForVideoClassification(config).eval())


@torch.no_grad()
def expected_logits(model: Any, videos: Tensor) -> Tensor:
    """Hugging Face's logits; of its space-only model, which has a row for each frame, those of the mean of frames."""
    outputs = model(videos, output_hidden_states=True)
    if model.config.attention_type != "space_only":
        return outputs.logits
    assert len(outputs.logits) == videos.shape[0] * videos.shape[1]
    frames = outputs.hidden_states[-1].unflatten(0, videos.shape[:2])
    return model.classifier(model.timesformer.layernorm(frames.mean(1))[:, 0])


@pytest.mark.parametrize("attention", ["divided", "joint", "space"])
@pytest.mark.parametrize(("frames", "side"), [(3, 32), (4, 32), (6, 48), (1, 32)])
def test_logits_are_hugging_faces(attention: str, frames: int, side: int) -> None:
    theirs = hugging_face(attention)
    config = config_from_hugging_face(theirs.config)
    assert config == replace(SMALL, attention=attention)  # type: ignore[arg-type]
    model = from_hugging_face(theirs.state_dict(), config).eval()
    # Theirs takes another length or size only once its config says so.
    theirs.config.num_frames, theirs.config.image_size = frames, side
    videos = clips(frames, side)
    with torch.no_grad():
        ours = model(videos)
    assert_within_budget(ours, expected_logits(theirs, videos), expected_logits(theirs.double(), videos.double()))


def test_space_only_on_one_frame_is_hugging_faces_row_of_that_frame() -> None:
    theirs = hugging_face("space")
    model = from_hugging_face(theirs.state_dict(), config_from_hugging_face(theirs.config)).eval()
    videos = clips()
    with torch.no_grad():
        rows = torch.cat([model(videos[:, t : t + 1]) for t in range(3)], 1).view(-1, 5)
        torch.testing.assert_close(rows, theirs(videos).logits)


@pytest.mark.parametrize("attention", ["divided", "joint", "space"])
def test_weights_go_there_and_back(attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = perturbed(TimeSformer(replace(SMALL, attention=attention)).eval())  # type: ignore[arg-type]
    state = to_hugging_face(model)
    theirs = transformers.TimesformerForVideoClassification(
        transformers.TimesformerConfig(**hugging_face_config(model.config))
    ).eval()
    theirs.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(clips()), expected_logits(theirs, clips()))
    again = from_hugging_face(theirs.state_dict(), model.config).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_foreign_weights_and_configs_are_refused() -> None:
    theirs = hugging_face("divided")
    state = dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"classifier.weight: expected the shape \(9, 48\), got \(5, 48\)"):
        from_hugging_face(state, replace(SMALL, classes=9))
    with pytest.raises(ValueError, match="16 extra"):
        from_hugging_face(state, replace(SMALL, attention="joint", layers=2))
    with pytest.raises(ValueError, match="2 missing"):
        from_hugging_face({k: v for k, v in state.items() if "classifier" not in k}, SMALL)
    theirs.config.hidden_dropout_prob = 0.1
    with pytest.raises(ValueError, match=r"hidden_dropout_prob: this model has none, and the config says 0.1"):
        config_from_hugging_face(theirs.config)
    with pytest.raises(ValueError, match="no convolutional stem"):
        to_hugging_face(TimeSformer(replace(SMALL, stem=(8, 16, 16))))


def eager_training_step(block: Block, x: Tensor, num_frames: int, draws: list[Tensor]) -> Tensor:
    """A divided block in the authors' formulation: positions, then frames, are batches, each with its own drop-path."""
    B, _, C = x.shape
    N = (x.shape[1] - 1) // num_frames

    def attend(module: Any, y: Tensor) -> Tensor:
        q, k, v = module.qkv(y).unflatten(-1, (3, module.heads, -1)).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return module.proj(y.transpose(1, 2).flatten(2))

    cls, patches = x[:, :1], x[:, 1:]
    y = attend(block.time_attn, block.ln_time(patches.reshape(B * N, num_frames, C))) * draws[0]
    patches = patches + block.time_fc(y).reshape(B, -1, C)
    frames = patches.reshape(B, N, num_frames, C).transpose(1, 2).reshape(B * num_frames, N, C)
    frames = torch.cat([cls.repeat_interleave(num_frames, 0), frames], 1)
    y = (attend(block.attn, block.ln_1(frames)) * draws[1]).view(B, num_frames, 1 + N, C)
    residual = torch.cat([y[:, :, 0].mean(1, keepdim=True), y[:, :, 1:].transpose(1, 2).reshape(B, -1, C)], 1)
    x = torch.cat([cls, patches], 1) + residual
    return x + block.mlp(block.ln_2(x)) * draws[2]


def test_drop_path_has_the_granularity_of_the_reference() -> None:
    B, N, T, p = 6, 6, 3, 0.5
    block = perturbed(Block(SMALL, p).train())
    x = torch.randn(B, 1 + N * T, 48, requires_grad=True)
    torch.manual_seed(7)
    draws = [torch.floor(torch.rand(n, 1, 1) + 1 - p) / (1 - p) for n in (B * N, B * T, B)]
    assert all(0 < int((draw == 0).sum()) < draw.numel() for draw in draws), "something is dropped, and something kept"

    def run(ours: bool, dtype: torch.dtype) -> list[Tensor]:
        module, y = block.to(dtype), x.detach().to(dtype).requires_grad_()
        torch.manual_seed(7)
        out = module(y, T) if ours else eager_training_step(module, y, T, [draw.to(dtype) for draw in draws])
        return [out, *torch.autograd.grad(out.square().sum(), [y, *module.parameters()])]

    exact = run(False, torch.float64)
    names = ["out", "x", *(name for name, _ in block.named_parameters())]
    for name, ours, eager, truth in zip(names, run(True, torch.float32), run(False, torch.float32), exact, strict=True):
        terms = exact[0].abs().max().item() * len(x) * x.shape[1] if name.endswith("bias") else 0.0
        assert_within_budget(ours, eager, truth, terms=terms, name=name)


@pytest.mark.parametrize("attention", ["divided", "joint", "space"])
def test_frames_meet_only_where_the_attention_lets_them(attention: str) -> None:
    model = perturbed(TimeSformer(replace(SMALL, attention=attention)).eval())  # type: ignore[arg-type]
    videos = clips(batch=1).requires_grad_()
    x = model.embed(videos)
    for block in model.blocks:
        x = block(x, 3)
    # A patch of the last frame: the last token in either order.
    (gradient,) = torch.autograd.grad(x[-1, -1].sum(), videos)
    reached = gradient.abs().amax((0, 2, 3, 4)) > 0
    assert reached.tolist() == ([False, False, True] if attention == "space" else [True, True, True])


@pytest.mark.parametrize("attention", ["divided", "joint", "space"])
def test_rollout_shares_out_the_clip(attention: str) -> None:
    model = perturbed(TimeSformer(replace(SMALL, attention=attention)).eval())  # type: ignore[arg-type]
    shares = model.rollout(clips(batch=2))
    assert shares.shape == (2, 3, 4, 4)
    torch.testing.assert_close(shares.sum((1, 2, 3)), torch.ones(2))
    assert (shares > 0).all()


def test_rollout_finds_the_patch_whose_key_answers_the_class_token() -> None:
    """One block whose class token's query is the key of a single patch: position 5 in frame 2."""
    config = replace(SMALL, layers=1, heads=1, attention="joint")
    model = TimeSformer(config).eval()
    with torch.no_grad():
        model.conv1.weight.zero_()  # type: ignore[union-attr, operator]
        model.conv1.bias.zero_()  # type: ignore[union-attr, operator]
        model.positional_embedding.zero_()
        model.time_embedding.zero_()
        model.class_embedding.copy_(torch.randn(48))
        model.positional_embedding[1 + 5, 0], model.time_embedding[2, 0] = 1.0, 1.0
        model.time_embedding[2, 1] = -1.0
        qkv = model.blocks[0].attn.qkv  # type: ignore[union-attr]
        x = model.blocks[0].ln_1(model.embed(clips()))  # type: ignore[operator]
        goal = x[0, 1 + 5 * 3 + 2]
        qkv.weight.zero_()  # type: ignore[union-attr, operator]
        # Every query is the patch sought, and a key is its token.
        qkv.bias[:48] = 4 * goal  # type: ignore[union-attr, index]
        qkv.weight[48:96] = torch.eye(48)  # type: ignore[union-attr, index]
    shares = model.rollout(clips())
    assert int(shares[0].argmax()) == 2 * 16 + 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "both"}, "attention must be one of space, joint, divided; got 'both'"),
        ({"image_size": 30}, "image_size 30 is not a multiple of the 8 pixels of a token"),
        ({"heads": 5}, "width 48 is not a multiple of the 5 heads"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimeSformer(replace(SMALL, **change))


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 3, 1, 32, 32), (1, 3, 3, 30, 32)])
def test_impossible_videos_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="videos: expected"):
        TimeSformer(SMALL)(torch.zeros(shape))


def test_convolutional_stem_stands_in_for_patches() -> None:
    model = TimeSformer(replace(SMALL, stem=(8, 16, 16))).eval()
    assert model(clips()).shape == (2, 5)
    assert model.embed(clips()).shape == (2, 1 + 16 * 3, 48)


def test_presets_hold_what_they_promise() -> None:
    with torch.device("meta"):
        base = TimeSformer(PRESETS["base"])
    assert sum(p.numel() for p in base.parameters()) / 1e6 == pytest.approx(121.6, abs=0.05)
    assert sum(p.numel() for p in base.parameters()) - 769 * 400 == pytest.approx(121.3e6, abs=0.05e6)


def test_checkpointed_blocks_run_again_and_drop_the_same():
    config = replace(PRESETS["nano"], drop_path=0.5, attention_dropout=0.5)
    found, runs = [], []
    for again in (False, True):
        torch.manual_seed(0)
        model = TimeSformer(config).train()
        if again:
            checkpoint_activations(model)
        for block in model.blocks:
            block.ln_1.register_forward_hook(lambda *_, again=again: runs.append(again))
        model(torch.randn(4, config.num_frames, 3, config.image_size, config.image_size)).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert (runs.count(False), runs.count(True)) == (config.layers, 2 * config.layers)
    torch.testing.assert_close(*found, rtol=0, atol=0)
