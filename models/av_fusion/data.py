"""Which images and sounds a fusion trains on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.av_fusion.model import FusionConfig
from models.data.audio import LogMel
from models.data.pair_files import load_pair_files
from models.data.pairs import Noise, PairSplits
from models.data.sets import BadDataLog
from models.data.spoken_digits import load_spoken_digits, load_synthetic_pairs


@dataclass
class PairDataConfig:
    """Which images and sounds, and how training shows them; a field with a description is an option of the commands."""

    source: str = field(
        default="digits",
        metadata={"help": "'digits', 'synthetic', or a folder of classes or list of files.", "name": "--data"},
    )
    noise: Noise = field(default_factory=Noise)
    batch_size: int = field(default=128, metadata={"help": "Examples in a batch.", "min": 2})
    dropout: float = field(
        default=0.2, metadata={"help": "Share of examples that lack a modality.", "min": 0, "max": 1}
    )
    seed: int = 0
    cache_dir: str = "runs/cache"

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> PairDataConfig:
        """The config that :func:`dataclasses.asdict` made ``values`` from."""
        noise = Noise(**{name: tuple(span) for name, span in values["noise"].items()})
        return PairDataConfig(**{**values, "noise": noise})


def load_data(data: PairDataConfig, model: FusionConfig, bad: BadDataLog) -> PairSplits:
    """Read the data a config names, in the sizes that a model reads."""
    if data.source == "digits":
        return load_spoken_digits(model.image_size, model.samples, Path(data.cache_dir))
    if data.source == "synthetic":
        return load_synthetic_pairs(model.image_size, model.samples)
    path = Path(data.source)
    if not path.exists():
        raise FileNotFoundError(
            f"--data {data.source}: not 'digits', 'synthetic' or an existing folder or list of files"
        )
    return load_pair_files(path, model.image_size, model.samples, bad)


def log_mel(config: FusionConfig) -> LogMel:
    """What makes the spectrograms that a model reads."""
    return LogMel(config.bands, config.window, config.hop)
