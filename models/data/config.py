"""Which image-text data a run trains on, and how it is shown in training: what the image-text models share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from models.data.augment import Augment
from models.data.batches import BatchPlan
from models.data.sets import BadDataLog, Splits
from models.training import console

Config = TypeVar("Config", bound="DataConfig")


@dataclass
class DataConfig:
    """Which data, and how it is shown in training."""

    source: str = "emoji"  # "emoji", "synthetic", or the path of a folder or captions file
    styles: tuple[str, ...] = ("openmoji", "openmoji-flat", "openmoji-line", "noto")
    validation_style: str | None = None
    stored_size: int = 48  # the side at which images are kept; augmentation samples from it
    batch_size: int = 256
    views: int = 2
    variant_divisor: int = 5
    keyword_share: float = 0.3
    augment: float = 1.0
    seed: int = 0
    cache_dir: str = "runs/cache"

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """The config that :func:`dataclasses.asdict` made ``values`` from (JSON's lists become tuples again)."""
        restored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**restored)


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
    ``images`` is where the files lie that a captions file names, if not beside it; ``languages`` are those of the names
    of emoji and synthetic shapes, the first for evaluation (a captions file says its own).
    """
    if config.source == "emoji":
        from models.data.emoji import EmojiConfig, load_emoji

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
        from models.data.synthetic import load_synthetic

        return load_synthetic(config.stored_size, languages=languages)
    from models.data.folder import load_folder

    path = Path(config.source)
    if not path.exists():
        raise FileNotFoundError(
            f"--data {config.source}: not 'emoji', 'synthetic' or an existing folder or captions file"
        )
    return load_folder(path, config.stored_size, bad, images=images)


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
        seed=config.seed,
    )


def pick_styles(choice: str, validation_style: str = "") -> tuple[str, ...]:
    """The styles a list with commas names; "all" is every style that can be had here, but for the validation style."""
    if choice != "all":
        return tuple(name.strip() for name in choice.split(",") if name.strip())
    from models.data.emoji import NPM_STYLES, all_train_styles

    found = all_train_styles(Path(DataConfig.cache_dir))
    if missing := [name for name in NPM_STYLES if name not in found]:
        console.print(f"[yellow]npm is not on this machine: going on without the styles {', '.join(missing)}")
    return tuple(name for name in found if name != validation_style)
