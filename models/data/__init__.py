"""The models' data: captioned images, video clips, images with sounds; the names below are of captioned images."""

from models.data.batches import Batch, BatchPlan
from models.data.captions import Subwords, Tokenizer, Vocabulary
from models.data.sets import BadDataError, BadDataPolicy, Concept, ImageTextSet, Splits

__all__ = [
    "BadDataError",
    "BadDataPolicy",
    "Batch",
    "BatchPlan",
    "Concept",
    "ImageTextSet",
    "Splits",
    "Subwords",
    "Tokenizer",
    "Vocabulary",
]
