"""Hugging Face's TimeSformer on the fused attention: patched in place, undone by one call."""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.divided_attention import divided_attention


def drop_positions(like: Tensor, num_frames: int, p: float) -> Tensor:
    """Drop-path of TimeSformer's temporal step: weights [B, 1 + N T, 1] that drop a position in all frames.

    `like` is the residual [B, 1 + N T, C]; the class token, which has none in time, keeps weight 1. The random numbers
    are those that Hugging Face's TimesformerDropPath draws.
    """
    B, L = like.shape[:2]
    N = (L - 1) // num_frames
    keep = _keep((B * N, 1, 1), like, p).view(B, N) / (1 - p)
    return torch.cat([keep.new_ones(B, 1), keep.repeat_interleave(num_frames, 1)], 1)[..., None]


def drop_frames(like: Tensor, num_frames: int, p: float) -> tuple[Tensor, Tensor]:
    """Drop-path of TimeSformer's spatial step: which frames are kept [B, T], and weights [B, 1 + N T, 1].

    The reference drops the residual of a frame, its row of the class token with it, before the class token is averaged
    over all T frames. With the kept frames as `frame_mask`, divided_attention gives the class token's mean over those;
    times kept / (T (1 - p)) it is the mean over all, the dropped ones counted as 0. The projection between is linear,
    so the weights may follow it.
    """
    B, L = like.shape[:2]
    keep = _keep((B * num_frames, 1, 1), like, p).view(B, num_frames)
    weights = keep / (1 - p)
    cls, patches = weights.mean(1, keepdim=True), weights.repeat(1, (L - 1) // num_frames)
    return keep.bool(), torch.cat([cls, patches], 1)[..., None]


def _keep(shape: tuple[int, ...], like: Tensor, p: float) -> Tensor:
    return torch.floor(torch.rand(shape, dtype=like.dtype, device=like.device) + (1 - p))


def _attend(layer: Any, attention: Any, x: Tensor, num_frames: int, axis: Any, kept: Tensor | None = None) -> Tensor:
    """A TimeSformerAttention on the op."""
    inner, output = attention.attention, attention.output
    if layer.training and output.dropout.p:
        raise ValueError(
            f"hidden_dropout_prob: expected 0 in training, got {output.dropout.p}: the op averages the class token "
            "over frames before the dropout; set it to 0, or undo the patch"
        )
    y = divided_attention(
        inner.qkv(x),
        num_frames=num_frames,
        num_heads=inner.num_heads,
        axis=axis,
        frame_mask=kept,
        scale=inner.scale,
        dropout_p=inner.attn_drop.p if layer.training else 0.0,
        impl=layer._mmkernels_impl,
    )
    assert isinstance(y, Tensor)
    return output(y)


def _layer_forward(layer: Any, x: Tensor) -> Tensor:
    """A TimesformerLayer, x [B, 1 + N T, C] (space-only: [B T, 1 + N, C]) -> the same shape."""
    p = getattr(layer.drop_path, "drop_prob", 0.0) if layer.training else 0.0
    if layer.attention_type == "divided_space_time":
        T = layer.config.num_frames
        y = _attend(layer, layer.temporal_attention, layer.temporal_layernorm(x), T, "time")
        if p:
            y = y * drop_positions(y, T, p)
        x = torch.cat([x[:, :1], x[:, 1:] + layer.temporal_dense(y)[:, 1:]], 1)
        if p:
            kept, weights = drop_frames(x, T, p)
            x = x + weights * _attend(layer, layer.attention, layer.layernorm_before(x), T, "space", kept)
        else:
            x = x + _attend(layer, layer.attention, layer.layernorm_before(x), T, "space")
    else:
        x = x + layer.drop_path(_attend(layer, layer.attention, layer.layernorm_before(x), 1, "joint"))
    return x + layer.drop_path(layer.output(layer.intermediate(layer.layernorm_after(x))))


@functools.cache
def _patched_class(layer_class: Any) -> type:
    """A subclass of a TimesformerLayer class that runs on the op.

    Under its own name: placement rules name layers by their class. transformers wraps the `forward` of every subclass
    for gradient checkpointing by itself.
    """

    def forward(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        if output_attentions:  # the original layer, which holds all probabilities
            return layer_class.forward(self, hidden_states, output_attentions)
        return (_layer_forward(self, hidden_states),)

    return type(layer_class.__name__, (layer_class,), {"forward": forward, "_mmkernels_original": layer_class})


def _check_frames(embeddings: Any, arguments: tuple[Any, ...], config: Any) -> None:
    """Refuse clips of another length than the layers would take them for."""
    frames = arguments[0].shape[1]
    if frames != config.num_frames:
        raise ValueError(
            f"pixel_values: expected config.num_frames = {config.num_frames} frames, got {frames}, which the layers "
            f"would take for other positions; set model.config.num_frames = {frames} (the time embeddings are "
            "interpolated)"
        )


class TimesformerPatch:
    """What :func:`patch_timesformer` did to a model; `undo()`, or leaving a `with` block, takes it back."""

    def __init__(self, layers: list[Any], hooks: list[Any]) -> None:
        self._layers, self._hooks = layers, hooks

    def undo(self) -> None:
        """Give the model its own layers back. A second call does nothing."""
        for layer in self._layers:
            layer.__class__ = layer._mmkernels_original
            del layer._mmkernels_impl
        for hook in self._hooks:
            hook.remove()
        self._layers, self._hooks = [], []

    def __enter__(self) -> TimesformerPatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def patch_timesformer(model: nn.Module, *, impl: str = "auto") -> TimesformerPatch:
    """Run a Hugging Face TimeSformer on :func:`mmkernels.divided_attention`, in place.

    Replaces the rearranges, the repeated class token and the stored probabilities of every layer::

        model = TimesformerForVideoClassification.from_pretrained("facebook/timesformer-base-finetuned-k400")
        patch_timesformer(model)                # or: with patch_timesformer(model): ...
        logits = model(pixel_values).logits     # the same to rounding, and so are gradients

    Modules, parameters and state dict stay as they are. All three attention types run; drop-path draws the random
    numbers of the original, in its order. Attention dropout drops by the op's own generator: with the same
    probability, not the same entries. With output_attentions=True the original layers run.

    In the original, a clip of other than `config.num_frames` frames gets silently wrong logits from divided attention;
    here it raises ValueError, which names the remedy.

    Args:
        model: TimesformerModel, TimesformerForVideoClassification, or a module that holds one.
        impl: see :func:`mmkernels.divided_attention`.

    Returns:
        A handle: `undo()` takes the patch back, and so does leaving it as a context manager.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        TypeError: there is no TimeSformer in `model`.
        ValueError: `model` is patched already; when called in training, hidden_dropout_prob > 0.
    """
    from transformers.models.timesformer.modeling_timesformer import TimesformerLayer, TimesformerModel

    layers: list[Any] = [module for module in model.modules() if isinstance(module, TimesformerLayer)]
    if not layers:
        raise TypeError(
            f"model: expected a TimesformerModel, TimesformerForVideoClassification or a module that holds one, "
            f"got {type(model).__name__}"
        )
    if any(hasattr(layer, "_mmkernels_original") for layer in layers):
        raise ValueError("model: is patched already; undo that patch first")
    hooks = [
        module.embeddings.register_forward_pre_hook(functools.partial(_check_frames, config=module.config))
        for module in model.modules()
        if isinstance(module, TimesformerModel) and module.config.attention_type == "divided_space_time"
    ]
    for layer in layers:
        layer._mmkernels_impl = impl
        layer.__class__ = _patched_class(layer.__class__)
    return TimesformerPatch(layers, hooks)
