"""Videos in shards, each read from its place in the tar file as if it were a file of its own."""

from __future__ import annotations

import functools

from models.data.sets import BadDataLog
from models.data.shards.index import VIDEO
from models.data.shards.samples import open_shards
from models.data.video import VideoSplits
from models.data.video_files import Sampling, VideoFile, VideoFiles, splits_of_videos


def load_shard_videos(
    source: str,
    size: int,
    num_frames: int,
    *,
    sampling: Sampling = "uniform",
    stride: int = 8,
    bad: BadDataLog | None = None,
) -> VideoSplits:
    """The videos of shards, as :func:`models.data.video_files.load_video_files` has those of a folder."""
    bad = bad if bad is not None else BadDataLog()
    entries: list[tuple[VideoFile, str, str]] = []
    for split, samples in open_shards(source, bad, media=VIDEO, validation=0.1).items():
        for row, (shard, sample) in enumerate(samples.places.tolist()):
            part = samples.part(row, VIDEO)
            assert part is not None
            entries.append((part, samples.indices[shard].labels[sample], split))
    read = functools.partial(VideoFiles, size=size, num_frames=num_frames, sampling=sampling, stride=stride, bad=bad)
    return splits_of_videos(source, entries, read)
