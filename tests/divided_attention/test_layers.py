"""divided_attention in the place of other people's attention layers: Hugging Face's and lucidrains'."""

import copy

import pytest
import torch
from torch import Tensor, nn

import mmkernels
from mmkernels.testing import assert_within_budget
from tests.cpu_kernels import needs_library

WIDTH, HEADS = 48, 3


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / WIDTH**0.5)
    return module.eval()


def tokens_of(positions: int, frames: int) -> Tensor:
    return torch.randn(2, 1 + positions * frames, WIDTH, generator=torch.Generator().manual_seed(positions))


def with_gradients(call, x: Tensor, module: nn.Module) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = call(x, module)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()])]


def compare(ours, theirs, module: nn.Module, x: Tensor) -> None:
    exact = with_gradients(theirs, x.double(), copy.deepcopy(module).double())
    eager, actual = with_gradients(theirs, x, module), with_gradients(ours, x, module)
    names = ["out", "x", *(name for name, _ in module.named_parameters())]
    for name, a, b, c in zip(names, actual, eager, exact, strict=True):
        # A key's bias shifts all scores of a row alike: its gradient is 0, made of terms as large as the value's.
        terms = c.abs().max().item() if "qkv" in name else 0.0
        assert_within_budget(a, b, c, terms=terms, name=name)


@pytest.mark.parametrize("axis", ["time", "space"])
@pytest.mark.parametrize(("positions", "frames"), [(9, 4), (4, 1), (1, 5), (20, 17)])
@needs_library
def test_lucidrains_attention(axis, positions, frames):
    """The class token attends to all tokens, patches lie frame by frame."""
    lucidrains = pytest.importorskip("timesformer_pytorch.timesformer_pytorch")
    torch.manual_seed(0)
    module = randomised(lucidrains.Attention(WIDTH, dim_head=WIDTH // HEADS, heads=HEADS))
    way = {"time": ("b (f n) d", "(b n) f d", {"n": positions}), "space": ("b (f n) d", "(b f) n d", {"f": frames})}
    source, target, sizes = way[axis]

    def theirs(x: Tensor, module: nn.Module) -> Tensor:
        return module(x, source, target, **sizes)

    def ours(x: Tensor, module: nn.Module) -> Tensor:
        y = mmkernels.divided_attention(
            module.to_qkv(x), num_frames=frames, num_heads=HEADS, axis=axis, cls_mode="global_cls", token_order="tn",
            impl="cpu",
        )  # fmt: skip
        return module.to_out(y)

    compare(ours, theirs, module, tokens_of(positions, frames))


@pytest.mark.parametrize(("width", "positions", "frames"), [(3, 9, 3), (2, 4, 1), (1, 1, 5), (4, 20, 17)])
@needs_library
def test_hugging_face_layer(width, positions, frames):
    """A whole TimesformerLayer, for clips of the length that it was configured for and of others."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.timesformer import modeling_timesformer as modeling

    torch.manual_seed(0)
    config = transformers.TimesformerConfig(
        image_size=8 * width, patch_size=8, num_frames=frames, hidden_size=WIDTH, num_hidden_layers=1,
        num_attention_heads=HEADS, intermediate_size=2 * WIDTH,
    )  # fmt: skip
    module = randomised(modeling.TimesformerLayer(config, 0))

    def theirs(x: Tensor, module: nn.Module) -> Tensor:
        return module(x)[0]

    def attend(x: Tensor, layer: nn.Module, axis: str) -> Tensor:
        y = mmkernels.divided_attention(
            layer.attention.qkv(x), num_frames=frames, num_heads=HEADS, axis=axis, impl="cpu"
        )
        return layer.output.dense(y)

    def ours(x: Tensor, module: nn.Module) -> Tensor:
        time = attend(module.temporal_layernorm(x), module.temporal_attention, "time")[:, 1:]
        patches = x[:, 1:] + module.temporal_dense(time)
        x = torch.cat([x[:, :1], patches], 1)
        x = x + attend(module.layernorm_before(x), module.attention, "space")
        return x + module.output(module.intermediate(module.layernorm_after(x)))

    compare(ours, theirs, module, tokens_of(positions, frames))
