"""open_clip's weights: state dicts pass between its ViT and this model under the same names."""

from __future__ import annotations

from torch import Tensor

from models.clip.model import CLIP, PRESETS, ClipConfig


def from_open_clip(state: dict[str, Tensor], config: ClipConfig = PRESETS["vit-b-32"]) -> CLIP:
    """A model with the weights of an open_clip state dict (``open_clip.create_model("ViT-B-32").state_dict()``)."""
    model = CLIP(config)
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys() - {"attn_mask"})
    if missing or extra:
        raise ValueError(
            f"not a state dict of this model: {len(missing)} missing {missing[:3]}, {len(extra)} extra {extra[:3]}"
        )
    for name, value in own.items():
        if state[name].shape != value.shape:
            raise ValueError(f"{name}: expected the shape {tuple(value.shape)}, got {tuple(state[name].shape)}")
    model.load_state_dict({name: state[name] for name in own})
    return model


def to_open_clip(model: CLIP) -> dict[str, Tensor]:
    """The state dict under open_clip's names; what has no counterpart there (a stem, frozen text) is refused."""
    if model.config.vision.stem:
        raise ValueError("open_clip's ViT has no convolutional stem: only models with patches can be saved to it")
    if model.config.text.frozen:
        raise ValueError(f"open_clip's model holds its text encoder; {model.config.text.frozen} is not in this one")
    return model.state_dict()
