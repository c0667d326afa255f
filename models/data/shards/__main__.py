"""The command line of shards.

python -m models.data.shards write captions.csv shards
python -m models.data.shards write videos shards --videos --size 512
python -m models.data.shards index "shards/train-{00000..00012}.tar"
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Annotated

import typer

from models.common.cli import bad_log, run_app
from models.common.console import say, warn
from models.common.options import ON_BAD_DATA
from models.data.sets import BadDataPolicy
from models.data.shards.index import IMAGE, VIDEO
from models.data.shards.samples import open_shards
from models.data.shards.write import checked_image, checked_video, list_clips, list_images, write_shards

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Write and index shards of samples.")

Policy = Annotated[BadDataPolicy, typer.Option(help=ON_BAD_DATA["help"])]
Videos = Annotated[bool, typer.Option("--videos", help="Of videos with classes, not of images with captions.")]


@app.command()
def write(
    source: Annotated[Path, typer.Argument(help="A captions file or its folder; with --videos classes or a list.")],
    out: Annotated[Path, typer.Argument(help="Folder of the shards.")],
    videos: Videos = False,
    count: Annotated[int, typer.Option(min=1, help="Samples of a shard at most.")] = 10_000,
    size: Annotated[int, typer.Option(min=1, help="MiB of a shard, about.")] = 256,
    images: Annotated[Path | None, typer.Option(help="Folder of the images, if not beside the captions.")] = None,
    on_bad_data: Policy = "skip",
) -> None:
    """Write shards; run the same command again to go on at the first one that is missing."""
    bad = bad_log(on_bad_data)
    samples = list_clips(source, bad) if videos else list_images(source, bad, images)
    check = checked_video if videos else checked_image
    shards = write_shards(samples, out, check, bad, count=count, size=size << 20)
    if len(bad):
        warn(bad.summary())
    say(f"{len(shards)} shards; next: python -m models.{'timesformer' if videos else 'clip'} train --data {out}")


@app.command()
def index(
    source: Annotated[str, typer.Argument(help="Shards: a folder, a pattern, or names with braces.")],
    videos: Videos = False,
    on_bad_data: Policy = "skip",
) -> None:
    """Make the index of every shard that has none, and count the samples of each split."""
    bad = bad_log(on_bad_data)
    for split, samples in open_shards(source, bad, media=VIDEO if videos else IMAGE).items():
        say(f"{split}: {len(samples)} samples")
    if len(bad):
        warn(bad.summary())


main = functools.partial(run_app, app)


if __name__ == "__main__":
    sys.exit(main())
