"""Which videos TimeSformer trains on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.data.digits import load_digits
from models.data.kanji import load_kanji
from models.data.sets import BadDataLog
from models.data.shards.names import are_shards
from models.data.shards.videos import load_shard_videos
from models.data.video import VideoSplits
from models.data.video_files import Sampling, load_video_files


@dataclass
class VideoDataConfig:
    """Which videos, and how training takes clips from them; a field with a description is an option of the commands."""

    source: str = field(
        default="digits",
        metadata={"help": "'digits', 'kanji', a folder of classes, a list of files, or shards.", "name": "--data"},
    )
    size: int = 32  # the side of a clip in pixels
    num_frames: int = 8
    batch_size: int = field(default=64, metadata={"help": "Clips in a batch.", "min": 1})
    augment: float = 0.0
    sampling: Sampling = field(default="uniform", metadata={"help": "Clips of video files."})
    stride: int = field(default=8, metadata={"help": "Frames between two of a dense clip.", "min": 1})
    seed: int = 0


def load_data(config: VideoDataConfig, bad: BadDataLog) -> VideoSplits:
    """Read the data a config names."""
    if config.source == "digits":
        return load_digits(config.size, config.num_frames, seed=config.seed)
    if config.source == "kanji":
        return load_kanji(config.size, config.num_frames, bad)
    how: dict[str, Any] = {"sampling": config.sampling, "stride": config.stride, "bad": bad}
    if are_shards(config.source):
        return load_shard_videos(config.source, config.size, config.num_frames, **how)
    path = Path(config.source)
    if not path.exists():
        raise FileNotFoundError(
            f"--data {config.source}: not 'digits', 'kanji' or an existing folder, list of files or shard"
        )
    return load_video_files(path, config.size, config.num_frames, **how)
