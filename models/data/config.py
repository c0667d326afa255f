"""Which image-text data a run trains on, and how it is shown in training: what the image-text models share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from models.data.augment import Augment
from models.data.batches import BatchPlan
from models.data.emoji.splits import EmojiConfig, load_emoji
from models.data.emoji.styles import NPM_STYLES, all_train_styles
from models.data.folder import load_folder
from models.data.sets import BadDataLog, Splits, found_from_anywhere
from models.data.shards.image_text import ShardData, ShardPlan, load_shards, open_shard_data
from models.data.shards.names import are_shards
from models.data.synthetic import load_synthetic

Config = TypeVar("Config", bound="DataConfig")


@dataclass
class DataConfig:
    """Which data, and how training shows it; a field with a description is an option of the commands."""

    source: str = field(
        default="emoji",
        metadata={"help": "'emoji', 'synthetic', a folder with a captions file, or shards.", "name": "--data"},
    )
    styles: tuple[str, ...] = field(
        default=("openmoji", "openmoji-flat", "openmoji-line", "noto"),
        metadata={"help": "Styles to train on, with commas, or 'all' (emoji)."},
    )
    validation_style: str | None = field(
        default=None, metadata={"help": "Style kept out of training, to stop and to choose by (emoji)."}
    )
    stored_size: int = 48  # the side at which images are kept; augmentation samples from it
    batch_size: int = field(default=256, metadata={"help": "Captions in a batch.", "min": 2})
    views: int = field(default=2, metadata={"help": "Images of each caption in a batch.", "min": 1})
    variant_divisor: int = field(default=5, metadata={"help": "One in so many variants an epoch.", "min": 1})
    keyword_share: float = field(default=0.3, metadata={"help": "Share of captions with keywords.", "min": 0, "max": 1})
    fixed_captions: int = 0  # how many captions an image's concept has at most, drawn once; 0: new ones at every step
    augment: float = field(default=1.0, metadata={"help": "Strength of the augmentation.", "min": 0})
    seed: int = 0
    cache_dir: str = "runs/cache"

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """The config that :func:`dataclasses.asdict` made ``values`` from (JSON's lists become tuples again)."""
        restored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**restored)

    def settle(self: Config, image_size: int, seed: int, warn: Callable[[str], None]) -> Config:
        """The config of one run: the images' side, the seed, and the styles by name where they were "all"."""
        styles = pick_styles(self.styles, self.validation_style, warn) if self.source == "emoji" else ()
        return replace(
            self,
            source=found_from_anywhere(self.source, "emoji", "synthetic"),
            styles=styles,
            validation_style=self.validation_style or None,
            stored_size=image_size,
            seed=seed,
        )


def load_data(
    config: DataConfig,
    bad: BadDataLog,
    *,
    unseen_combinations: float = 0.0,
    images: Path | None = None,
    languages: Sequence[str] = ("en",),
) -> Splits:
    """Read the data a config names.

    ``unseen_combinations`` is the share of the emoji's combinations of activity, gender and skin tone to hold out;
    ``images`` is the folder of the files that a captions file names, if they do not lie beside it; ``languages`` are
    those of the names of emoji and synthetic shapes, the first for evaluation (a captions file says its own).
    """
    if config.source == "emoji":
        return load_emoji(
            EmojiConfig(
                train_styles=config.styles,
                validation_style=config.validation_style,
                size=config.stored_size,
                unseen_combinations=unseen_combinations,
                languages=languages,
                cache_dir=Path(config.cache_dir),
            ),
            bad,
        )
    if config.source == "synthetic":
        return load_synthetic(config.stored_size, languages=languages)
    if are_shards(config.source):
        return load_shards(config.source, config.stored_size, bad)
    path = Path(config.source)
    if not path.exists():
        raise FileNotFoundError(
            f"--data {config.source}: not 'emoji', 'synthetic' or an existing folder, captions file or shard"
        )
    return load_folder(path, config.stored_size, bad, images=images)


def open_data(config: DataConfig, bad: BadDataLog) -> Splits | ShardData:
    """What a model trains on that reads shards as training goes: they stay where they are, other data are read."""
    return open_shard_data(config.source, bad) if are_shards(config.source) else load_data(config, bad)


def shard_plan(
    data: ShardData,
    config: DataConfig,
    tokenizer: Callable[[Sequence[str]], Tensor],
    image_size: int,
    bad: BadDataLog,
) -> ShardPlan:
    """The training batches of shards."""
    return ShardPlan(
        data.train,
        tokenizer,
        Augment(image_size, config.augment),
        bad,
        size=config.stored_size,
        batch_size=config.batch_size,
        views=config.views,
        seed=config.seed,
    )


def batch_plan(
    splits: Splits, config: DataConfig, tokenizer: Callable[[Sequence[str]], Tensor], image_size: int, *, texts: int = 1
) -> BatchPlan:
    """The training batches of a data set for a model that sees images of ``image_size``, ``texts`` captions of each."""
    return BatchPlan(
        splits.train,
        tokenizer,
        Augment(image_size, config.augment),
        batch_size=config.batch_size,
        views=config.views,
        texts=texts,
        variant_divisor=config.variant_divisor,
        keyword_share=config.keyword_share,
        fixed_captions=config.fixed_captions,
        seed=config.seed,
    )


def pick_styles(
    chosen: Sequence[str], validation_style: str | None = None, warn: Callable[[str], None] | None = None
) -> tuple[str, ...]:
    """The styles to train on; "all" stands for every style that can be had here, but for the validation style."""
    if tuple(chosen) != ("all",):
        return tuple(chosen)
    found = all_train_styles(Path(DataConfig.cache_dir))
    if warn is not None and (missing := [name for name in NPM_STYLES if name not in found]):
        warn(f"npm is not on this machine: going on without the styles {', '.join(missing)}")
    return tuple(name for name in found if name != validation_style)
