"""Hugging Face's weights and configs: state dicts pass to and from ``TimesformerForVideoClassification``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.timesformer.model import PRESETS, TimeSformer, TimesformerConfig

_HF_ATTENTION = {"divided": "divided_space_time", "joint": "joint_space_time", "space": "space_only"}
_HF_STEM = {
    "conv1": "timesformer.embeddings.patch_embeddings.projection",
    "class_embedding": "timesformer.embeddings.cls_token",
    "positional_embedding": "timesformer.embeddings.position_embeddings",
    "time_embedding": "timesformer.embeddings.time_embeddings",
    "ln_post": "timesformer.layernorm",
    "head": "classifier",
}
_HF_BLOCK = {
    "ln_time": "temporal_layernorm",
    "time_attn.qkv": "temporal_attention.attention.qkv",
    "time_attn.proj": "temporal_attention.output.dense",
    "time_fc": "temporal_dense",
    "ln_1": "layernorm_before",
    "attn.qkv": "attention.attention.qkv",
    "attn.proj": "attention.output.dense",
    "ln_2": "layernorm_after",
    "mlp.c_fc": "intermediate.dense",
    "mlp.c_proj": "output.dense",
}


def _hugging_face_name(name: str) -> str:
    if name in _HF_STEM:
        return _HF_STEM[name]
    module, _, leaf = name.rpartition(".")
    if module in _HF_STEM:
        return f"{_HF_STEM[module]}.{leaf}"
    _, number, inner = module.split(".", 2)
    return f"timesformer.encoder.layer.{number}.{_HF_BLOCK[inner]}.{leaf}"


def config_from_hugging_face(config: Any) -> TimesformerConfig:
    """The config of a ``transformers.TimesformerConfig``; what this model does not have is refused."""
    if config.hidden_act != "gelu":
        raise ValueError(f"hidden_act: this model has 'gelu', and the config says {config.hidden_act!r}")
    if config.hidden_dropout_prob:
        raise ValueError(
            f"hidden_dropout_prob: this model has none, and the config says {config.hidden_dropout_prob}; set it to 0 "
            "if you load the weights for inference"
        )
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(config, name), int):
            raise ValueError(f"{name}: expected an int (square frames and patches), got {getattr(config, name)}")
    return TimesformerConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_frames=config.num_frames,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        classes=config.num_labels,
        attention={theirs: own for own, theirs in _HF_ATTENTION.items()}[config.attention_type],  # type: ignore[arg-type]
        qkv_bias=config.qkv_bias,
        drop_path=config.drop_path_rate,
        attention_dropout=config.attention_probs_dropout_prob,
        eps=config.layer_norm_eps,
    )


def hugging_face_config(config: TimesformerConfig) -> dict[str, Any]:
    """The arguments of ``transformers.TimesformerConfig`` for a model of ``config``.

    The rate of drop-path is left out, for transformers 5 takes no fraction there.
    """
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_frames": config.num_frames,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "num_labels": config.classes,
        "attention_type": _HF_ATTENTION[config.attention],
        "qkv_bias": config.qkv_bias,
        "attention_probs_dropout_prob": config.attention_dropout,
        "layer_norm_eps": config.eps,
    }


def from_hugging_face(state: Mapping[str, Tensor], config: TimesformerConfig = PRESETS["base"]) -> TimeSformer:
    """A model with the weights of a state dict of Hugging Face's ``TimesformerForVideoClassification``.

    Its logits are that model's, with one exception: a space-only model there gives one row of logits for every frame
    and never averages them. Here, as in the authors' code, the frames' features are averaged before the last norm, and
    a clip has one row.
    """
    model = TimeSformer(config)
    own = model.state_dict()
    theirs = {_hugging_face_name(name): name for name in own}
    missing, extra = sorted(theirs.keys() - state.keys()), sorted(state.keys() - theirs.keys())
    if missing or extra:
        raise ValueError(
            f"not a state dict of this model: {len(missing)} missing {missing[:3]}, {len(extra)} extra {extra[:3]}"
        )
    loaded = {}
    for name, mine in theirs.items():
        value = state[name].squeeze(0) if "embedding" in mine else state[name]
        loaded[mine] = value.view(own[mine].shape) if value.numel() == own[mine].numel() else value
        if loaded[mine].shape != own[mine].shape:
            raise ValueError(f"{name}: expected the shape {tuple(own[mine].shape)}, got {tuple(value.shape)}")
    model.load_state_dict(loaded)
    return model


def to_hugging_face(model: TimeSformer) -> dict[str, Tensor]:
    """The state dict under Hugging Face's names; a convolutional stem has no counterpart there and is refused."""
    if model.config.stem:
        raise ValueError("Hugging Face's TimeSformer has no convolutional stem: only models with patches can be saved")
    batched = {"class_embedding": (1, 1, -1), "positional_embedding": (1, -1), "time_embedding": (1, -1)}
    state = {}
    for name, value in model.state_dict().items():
        if name in batched:
            value = value[None, None] if name == "class_embedding" else value[None]
        state[_hugging_face_name(name)] = value
    return state
