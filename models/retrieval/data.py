"""Which images and captions a retrieval model trains on, and the tokens that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from models.data import ImageTextSet, Splits, Subwords
from models.data.config import DataConfig, load_data
from models.data.sets import BadDataLog
from models.retrieval.model import RetrieverConfig


@dataclass
class RetrievalData(DataConfig):
    """Which data a retrieval model trains on; the names of a concept in all languages are captions of it."""

    languages: tuple[str, ...] = field(
        default=("en", "de", "fr", "es"),
        metadata={"help": "Languages of the names, with commas (emoji, synthetic)."},
    )
    batch_size: int = field(default=512, metadata={"help": "Concepts in a batch.", "min": 2})
    views: int = field(default=1, metadata={"help": "Images of each concept in a batch.", "min": 1})
    texts: int = field(default=2, metadata={"help": "Captions of each concept in a batch.", "min": 1})
    variant_divisor: int = 20
    keyword_share: float = 0.4
    augment: float = 0.5

    def settle(self, image_size: int, seed: int, warn: Callable[[str], None]) -> RetrievalData:
        """The config of one run, with the languages by their codes too."""
        return replace(super().settle(image_size, seed, warn), languages=pick_languages(self.languages))

    def load(self, bad: BadDataLog) -> Splits:
        """Read the data."""
        return load_data(self, bad, languages=self.languages)


def pick_languages(chosen: Sequence[str]) -> tuple[str, ...]:
    """The codes in small letters, each once."""
    found = tuple(dict.fromkeys(code.lower() for code in chosen))
    if not found:
        raise ValueError("--languages: expected codes with commas between them, such as en,de,fr; got none")
    return found


def learn_tokens(data: ImageTextSet, config: RetrieverConfig) -> Subwords:
    """Tokens from the captions and keywords of a training set, in all its languages."""
    concepts = [data.concepts[c] for c in data.concept_ids.unique().tolist()]
    texts = (text for c in concepts for text in (*c.texts, *c.keywords))
    return Subwords.build(texts, vocab_size=config.vocab_size, max_tokens=config.max_tokens)
