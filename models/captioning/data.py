"""Which images and captions a captioner trains on, and the words that it may write."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from models.data import ImageTextSet, Splits, Vocabulary
from models.data.config import DataConfig, load_data
from models.data.sets import BadDataLog, hold_out_validation


@dataclass
class CaptionData(DataConfig):
    """Which data a captioner trains on."""

    source: str = field(
        default="emoji",
        metadata={"help": "'emoji', 'synthetic', a folder with captions, or COCO's JSON.", "name": "--data"},
    )
    views: int = 1
    keyword_share: float = 0.0
    augment: float = 0.5
    unseen_combinations: float = field(
        default=0.15,
        metadata={"help": "Share of activity x gender x skin tone held out (emoji).", "min": 0, "max": 0.9},
    )
    validation_share: float = 0.1  # share of the training captions that validates, if the data has no validation set
    min_count: int = field(default=1, metadata={"help": "A word that occurs less often is unknown.", "min": 1})
    images: str | None = None

    def load(self, bad: BadDataLog) -> Splits:
        """Read the data; there is always a validation set."""
        images = Path(self.images) if self.images is not None else None
        splits = load_data(self, bad, unseen_combinations=self.unseen_combinations, images=images)
        return splits if splits.validation is not None else hold_out_validation(splits, self.validation_share)


def build_vocabulary(data: ImageTextSet, min_count: int) -> Vocabulary:
    """The words of the captions of a training set."""
    concepts = [data.concepts[c] for c in data.concept_ids.unique().tolist()]
    return Vocabulary.build((text for c in concepts for text in (c.name, *c.captions)), min_count=min_count)
