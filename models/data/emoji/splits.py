"""Emoji drawn by several hands: one caption, many images.

Captions are the Unicode names with keywords beside them. The split asks two honest questions: does the model know an
emoji in a drawing style that it never saw, and an emoji whose whole family it never saw?
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from models.data.emoji.catalogue import catalogue, combination_of, names_in
from models.data.emoji.styles import DEMO_STYLES, Drawing, load_style
from models.data.pixels import pixel_features
from models.data.sets import BadDataError, BadDataLog, Concept, ImageTextSet, Splits, hash_share

TEMPLATES = (
    "{}.",
    "a drawing of {}.",
    "an emoji of {}.",
    "{} symbol.",
    "an icon of {}.",
)


def _digest(drawing: Tensor) -> bytes:
    return hashlib.sha256(drawing.numpy().tobytes()).digest()


def near_copies(drawings: Mapping[str, Drawing], reference: Mapping[str, Drawing], threshold: float) -> set[str]:
    """Codes drawn all but alike in both styles: cosine of 32 x 32 centred pixels above ``threshold``."""
    shared = sorted(drawings.keys() & reference.keys())
    if not shared:
        return set()
    a = pixel_features(torch.stack([drawings[c].image for c in shared]), 32)
    b = pixel_features(torch.stack([reference[c].image for c in shared]), 32)
    return {code for code, cosine in zip(shared, (a * b).sum(1).tolist(), strict=True) if cosine > threshold}


def unseen_families(share: float, seed: int) -> set[str]:
    """Families held out of every training style: ``share`` of those in each subcategory group, picked by hash.

    A hash keeps the choice stable when a style or an emoji is added.
    """
    families = {e.family for e in catalogue()}

    def draw(family: str) -> float:
        return hash_share(f"{seed}:{family}")

    return {f for f in families if draw(f) < share}


def unseen_combinations(share: float, seed: int, held_families: set[str]) -> set[str]:
    """Codes of toned people held out of training, though each of their parts is met there with others.

    ``share`` of the combinations of activity, gender and tone, picked by hash; the activity of each occurs in training
    with its gender in another tone, and with its tone in another gender.
    """
    toned = {e.code: combination_of(e.code) for e in catalogue() if e.toned and e.family not in held_families}

    def draw(combination: tuple[str, str, str]) -> float:
        return hash_share(f"{seed}:{':'.join(combination)}")

    held = {combination for combination in toned.values() if draw(combination) < share}
    kept = set(toned.values()) - held
    by_gender = {(activity, gender) for activity, gender, _ in kept}
    by_tone = {(activity, tone) for activity, _, tone in kept}
    met = {(a, g, t) for a, g, t in held if (a, g) in by_gender and (a, t) in by_tone}
    return {code for code, combination in toned.items() if combination in met}


@dataclass
class EmojiConfig:
    """Which styles to train on and what to hold out; the defaults are the demo's."""

    train_styles: Sequence[str] = DEMO_STYLES
    validation_style: str | None = None
    test_style: str = "twemoji"
    size: int = 48
    unseen_share: float = 0.1
    unseen_combinations: float = 0.0  # share of activity x gender x skin tone to hold out
    near_copy: float = 0.97
    languages: Sequence[str] = ("en",)  # the names' languages; evaluation uses the first
    seed: int = 0
    cache_dir: Path = field(default_factory=lambda: Path("runs") / "cache")


def load_emoji(config: EmojiConfig, bad: BadDataLog | None = None) -> Splits:
    """Read the styles and split them: training, validation style, new style, unseen emoji (in old and new style)."""
    bad = bad if bad is not None else BadDataLog()
    if config.test_style in config.train_styles or config.test_style == config.validation_style:
        raise ValueError(f"the test style {config.test_style} must not be trained or validated on")
    if config.validation_style in config.train_styles:
        raise ValueError(f"the validation style {config.validation_style} must not be trained on")
    notes: list[str] = []
    entries = {e.code: e for e in catalogue()}
    index = {code: i for i, code in enumerate(entries)}
    held = unseen_families(config.unseen_share, config.seed)
    combined = unseen_combinations(config.unseen_combinations, config.seed, held)
    spoken = {language: names_in(language) for language in config.languages}
    if not spoken:
        raise ValueError("languages: expected one at least, such as 'en'; got none")
    concepts = [
        Concept(
            name=spoken[config.languages[0]][e.code],
            group=e.family,
            keywords=e.keywords if "en" in spoken else (),  # they are English
            names={language: names[e.code] for language, names in spoken.items() if e.code in names},
            variant=e.toned,
            labels={"category": e.category, "subcategory": e.subcategory},
        )
        for e in entries.values()
    ]
    names = [config.test_style, *([config.validation_style] if config.validation_style else []), *config.train_styles]
    drawings = {name: load_style(name, config.size, config.cache_dir, bad) for name in names}

    # No one can tell apart two emoji with one drawing: the first emoji that has it keeps it. The test style goes
    # first, so that a drawing it shares with a training style is dropped from training.
    seen: set[bytes] = set()
    for name in names:
        repeated = copied = 0
        copies = (
            set()
            if name == config.test_style
            else near_copies(drawings[name], drawings[config.test_style], config.near_copy)
        )
        for code in sorted(drawings[name], key=index.__getitem__):
            digest = _digest(drawings[name][code].image)
            if digest in seen:
                del drawings[name][code]
                repeated += 1
            elif code in copies:
                del drawings[name][code]
                copied += 1
            else:
                seen.add(digest)
        note = f"{name}: {len(drawings[name])} drawings kept, {repeated} repeated ones dropped"
        if name != config.test_style:
            note += f", {copied} near copies of {config.test_style} dropped"
        notes.append(note)

    def collect(styles: Sequence[str], keep: Callable[[str], bool]) -> ImageTextSet:
        picked = [
            (drawings[s][code], index[code], i)
            for i, s in enumerate(styles)
            for code in sorted(drawings[s], key=index.__getitem__)
            if keep(code)
        ]
        if not picked:
            raise BadDataError(f"no drawing is left for the styles {', '.join(styles)}")
        drawn, concept_ids, style_ids = zip(*picked, strict=True)
        images, plain = torch.stack([d.image for d in drawn]), torch.stack([d.plain for d in drawn])
        return ImageTextSet(images, torch.tensor(concept_ids), torch.tensor(style_ids), concepts, list(styles), plain)

    def is_held(code: str) -> bool:
        return entries[code].family in held

    train = collect(config.train_styles, lambda code: not is_held(code) and code not in combined)
    trained = {list(entries)[c] for c in train.concept_ids.unique().tolist()}
    first = config.train_styles[0]
    tests = {
        f"new style ({config.test_style})": collect([config.test_style], lambda code: code in trained),
        f"unseen emoji ({first})": collect([first], is_held),
        f"unseen emoji, new style ({config.test_style})": collect([config.test_style], is_held),
    }
    if combined:
        tests |= {
            f"unseen combinations ({first})": collect([first], combined.__contains__),
            f"unseen combinations, new style ({config.test_style})": collect(
                [config.test_style], combined.__contains__
            ),
        }
        notes.append(f"{len(combined)} combinations of activity, gender and skin tone held out of all training")
    validation = None
    if config.validation_style:
        validation = collect([config.validation_style], lambda code: code in trained)
    families = {entries[c].family for c in trained}
    notes.append(
        f"train: {len(train)} drawings of {len(trained)} emoji in {len(families)} families; "
        f"{len(held)} families held out of all training"
    )
    by_label: dict[str, dict[str, list[str]]] = {"category": {}, "subcategory": {}}
    for e in entries.values():
        own = e.subcategory.replace("-", " ")
        words = [e.category.lower(), *re.split(r" & ", e.category.lower())]
        by_category = by_label["category"].setdefault(e.category, list(dict.fromkeys(words)))
        if own not in by_category:
            by_category.append(own)
        by_label["subcategory"].setdefault(e.subcategory, [own])
    return Splits("emoji", train, tests, validation, by_label, TEMPLATES, 1000, notes)
