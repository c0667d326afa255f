"""Training batches as a pure function of (seed, step): what makes a resumed run see the same data in the same order."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.data.augment import Augment
from models.data.captions import sample_caption
from models.data.sets import Concept, ImageTextSet
from models.data.share import ALL, Draws, Share


def generator_of(seed: int, *key: int) -> torch.Generator:
    """A generator for each (seed, purpose, index): nothing depends on what was drawn before."""
    state = seed
    for part in key:
        state = (state * 6364136223846793005 + part * 1442695040888963407 + 1013904223) % 2**63
    return torch.Generator().manual_seed(state)


@dataclass
class Batch:
    """``images`` [V, B, 3, S, S] (V views of each concept), ``tokens`` [T B, L] (T texts), ``concept_ids`` [B].

    Where a frozen encoder takes the place of a tokenizer, ``tokens`` are its features.
    """

    images: Tensor
    tokens: Tensor
    concept_ids: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        return Batch(self.images.to(device), self.tokens.to(device), self.concept_ids.to(device))


class BatchPlan:
    """Draws batches in which every concept occurs once, each with ``views`` different images of it where it has them.

    Two concepts that share a caption never meet in a batch, for the loss would take each for a wrong answer of the
    other's. Where they are so many that they do not fit in as many batches, some wait for another epoch. A caption that
    more concepts have than an epoch has batches tells none of them apart and is not trained on, unless it is a name.

    Each also has ``texts`` captions, drawn one by one; the tokens of a batch hold the first of every concept, then the
    second, and so on. ``fixed_captions`` bounds how many different ones a concept ever has (:meth:`captions`), for
    encoders that read each text once.

    An epoch is one pass over the concepts in a fresh order; of a group's variants (the skin tones of an emoji) one in
    ``variant_divisor`` takes part in each epoch, another one each time, so that they do not crowd out the rest.
    """

    def __init__(
        self,
        data: ImageTextSet,
        tokenizer: Callable[[Sequence[str]], Tensor],
        augment: Augment,
        *,
        batch_size: int,
        views: int = 1,
        texts: int = 1,
        variant_divisor: int = 1,
        keyword_share: float = 0.0,
        fixed_captions: int = 0,
        seed: int = 0,
    ) -> None:
        self.data, self.tokenizer, self.augment = data, tokenizer, augment
        self.batch_size, self.views, self.texts, self.seed = batch_size, views, texts, seed
        self.variant_divisor, self.keyword_share = variant_divisor, keyword_share
        self.fixed_captions = fixed_captions
        self.rows = data.rows_by_concept()
        self._plain = [c for c in self.rows if not data.concepts[c].variant]
        self._variants = [c for c in self.rows if data.concepts[c].variant]
        self._epoch: tuple[int, list[list[int]]] | None = None
        concepts = len(self._plain) + len(self._variants) // variant_divisor
        names = Counter(data.concepts[concept].name for concept in self.rows)
        self.steps_per_epoch = concepts // batch_size
        # A name is in each batch at most once.
        while sum(min(n, self.steps_per_epoch) for n in names.values()) < self.steps_per_epoch * batch_size:
            self.steps_per_epoch -= 1
        if self.steps_per_epoch == 0:
            most = min(concepts, len(names))
            raise ValueError(f"batch size {batch_size} exceeds the {most} captions of an epoch: choose a smaller")
        counts = Counter(text for concept in self.rows for text in data.concepts[concept].texts)
        vague = {text for text, count in counts.items() if count > self.steps_per_epoch}
        self._named = {concept: self._without(data.concepts[concept], vague) for concept in self.rows}
        # How many concepts have each caption that a concept shares with others.
        self._shared = {
            concept: {text: counts[text] for text in named.texts if counts[text] > 1}
            for concept, named in self._named.items()
        }
        if min(map(len, self._batches(0))) < min(2, batch_size):
            raise ValueError(
                f"the captions are shared so often that of {batch_size} concepts only one fits in a batch: give images "
                "captions of their own"
            )

    @staticmethod
    def _without(concept: Concept, texts: set[str]) -> Concept:
        """A concept without captions that more concepts have than there are batches to part them; it keeps its name."""
        if texts.isdisjoint(concept.texts):
            return concept
        kept = tuple(text for text in concept.captions if text not in texts)
        names = {code: text for code, text in concept.names.items() if text not in texts}
        return replace(concept, captions=kept, names=names)

    def _batches(self, epoch: int) -> list[list[int]]:
        """The concepts of each batch of an epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            variants = self._variants
            if self.variant_divisor > 1 and variants:
                # Rounds of `variant_divisor` epochs visit every variant once.
                cycle, part = divmod(epoch, self.variant_divisor)
                shuffled = torch.randperm(len(variants), generator=generator_of(self.seed, 0, cycle)).tolist()
                variants = [variants[i] for i in shuffled[part :: self.variant_divisor]]
            concepts = self._plain + variants
            order = torch.randperm(len(concepts), generator=generator_of(self.seed, 1, epoch)).tolist()
            self._epoch = epoch, self._part([concepts[i] for i in order])
        return self._epoch[1]

    def _part(self, concepts: list[int]) -> list[list[int]]:
        """Batches of concepts in their order; those that share captions come first, each in the emptiest that may."""
        steps, size = self.steps_per_epoch, self.batch_size
        tied = [concept for concept in concepts if self._shared[concept]]
        batches: list[list[int]] = [[] for _ in range(steps)]
        taken: list[set[str]] = [set() for _ in range(steps)]
        # Those of one caption side by side, the most frequent captions first: so each is dealt out over the batches.
        tied.sort(key=lambda concept: min((-count, text) for text, count in self._shared[concept].items()))
        room = [(0, step) for step in range(steps)]  # a heap: the emptiest first
        for concept in tied:
            passed = []
            while room and not taken[room[0][1]].isdisjoint(self._shared[concept]):
                passed.append(heapq.heappop(room))
            if room:
                held, step = heapq.heappop(room)
                batches[step].append(concept)
                taken[step].update(self._shared[concept])
                if held + 1 < size:
                    passed.append((held + 1, step))
            for entry in passed:
                heapq.heappush(room, entry)
        rest = iter(concept for concept in concepts if not self._shared[concept])
        return [own + list(itertools.islice(rest, size - len(own))) for own in batches]

    def _draw(self, concept: int, generator: torch.Generator) -> str:
        """A caption of a concept: any, or one of the fixed ones."""
        if not self.fixed_captions:
            return sample_caption(self._named[concept], generator, self.keyword_share)
        return self._fixed(concept, int(torch.randint(self.fixed_captions, (), generator=generator)))

    def _fixed(self, concept: int, number: int) -> str:
        """The fixed caption of a number; those with keywords are the last ``keyword_share`` of them."""
        with_keywords = number >= round((1 - self.keyword_share) * self.fixed_captions)
        generator = generator_of(self.seed, 3, concept, number)
        return sample_caption(self._named[concept], generator, float(with_keywords))

    def captions(self) -> list[str]:
        """Every caption that a batch may hold, where they are fixed: the first of every concept, then the second..."""
        numbers = itertools.product(range(self.fixed_captions), self.rows)
        return list(dict.fromkeys(self._fixed(concept, number) for number, concept in numbers))

    def __call__(self, step: int, share: Share = ALL) -> Batch:
        """The batch of one step, or a rank's share of its concepts."""
        epoch, index = divmod(step, self.steps_per_epoch)
        concepts = self._batches(epoch)[index]
        generator = generator_of(self.seed, 2, step)
        rows: list[list[int]] = []
        captions: list[list[str]] = []
        for concept in concepts:
            own = self.rows[concept]
            order = torch.randperm(len(own), generator=generator).tolist()
            rows.append([own[order[view % len(own)]] for view in range(self.views)])
            captions.append([self._draw(concept, generator) for _ in range(self.texts)])
        part = share.rows(len(concepts))
        flat = torch.tensor(rows)[part].T.reshape(-1)  # view after view
        places = torch.arange(self.views * len(concepts)).view(self.views, -1)[:, part].reshape(-1)
        images = self.augment(self.data.images[flat], Draws(generator, self.views * len(concepts), places))
        tokens = self.tokenizer([own[text] for text in range(self.texts) for own in captions[part]])
        return Batch(images.unflatten(0, (self.views, -1)), tokens, torch.tensor(concepts[part]))
