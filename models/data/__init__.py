"""Image-text data behind one interface: emoji drawings, a user's own folder, synthetic shapes."""

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
