"""Coloured shapes with captions: the interface of the real data, made in a second, for smoke tests and benchmarks."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from models.data.sets import Concept, ImageTextSet, Splits

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 20),
    "yellow": (250, 205, 40),
    "green": (40, 160, 70),
    "blue": (40, 90, 210),
    "purple": (130, 60, 180),
    "brown": (120, 75, 40),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "bar", "half moon")
PLACES = {
    "in the middle": (0.5, 0.5),
    "at the top": (0.5, 0.28),
    "at the bottom": (0.5, 0.72),
    "on the left": (0.28, 0.5),
    "on the right": (0.72, 0.5),
}
STYLES = ("filled", "outlined", "dotted")
# The same words in other languages, in the order of those above, and how a caption is put together from them.
WORDS = {
    "de": (
        "{shape} in {colour} {place}",
        ("rot", "orange", "gelb", "grün", "blau", "lila", "braun", "schwarz"),
        ("kreis", "quadrat", "dreieck", "raute", "kreuz", "ring", "balken", "halbmond"),
        ("in der mitte", "oben", "unten", "links", "rechts"),
    ),
    "fr": (
        "{shape} en {colour} {place}",
        ("rouge", "orange", "jaune", "vert", "bleu", "violet", "marron", "noir"),
        ("cercle", "carré", "triangle", "losange", "croix", "anneau", "barre", "demi-lune"),
        ("au milieu", "en haut", "en bas", "à gauche", "à droite"),
    ),
    "es": (
        "{shape} en {colour} {place}",
        ("rojo", "naranja", "amarillo", "verde", "azul", "morado", "marrón", "negro"),
        ("círculo", "cuadrado", "triángulo", "rombo", "cruz", "anillo", "barra", "media luna"),
        ("en el centro", "arriba", "abajo", "a la izquierda", "a la derecha"),
    ),
}


def _draw(shape: str, colour: tuple[int, int, int], place: tuple[float, float], style: str, side: int) -> Image.Image:
    big = 4 * side  # drawn large and scaled down: smooth edges
    x, y, r = place[0] * big, place[1] * big, 0.2 * big
    mask = Image.new("L", (big, big))
    pen = ImageDraw.Draw(mask)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=255)
    elif shape == "diamond":
        pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=255)
    elif shape == "cross":
        pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=255)
        pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=255)
    elif shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        pen.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=0)
    elif shape == "bar":
        pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=255)
    else:
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        pen.ellipse((x - r / 4, y - r, x + 1.75 * r, y + r), fill=0)
    alpha = np.array(mask)
    if style == "outlined":
        pen_width = max(1, big // 40)
        shifts = itertools.product((-pen_width, 0, pen_width), repeat=2)
        inside = np.minimum.reduce([np.roll(alpha, shift, (0, 1)) for shift in shifts])
        alpha = alpha - inside
    elif style == "dotted":
        rows, columns = np.indices(alpha.shape) // max(1, big // 24)
        alpha = np.where((rows + columns) % 2 == 0, alpha, 0).astype(np.uint8)
    image = Image.new("RGBA", (big, big), (*colour, 0))
    image.putalpha(Image.fromarray(alpha))
    return image.convert("RGBa").resize((side, side), Image.Resampling.BOX).convert("RGBA")


def _caption(language: str, colour: str, shape: str, place: str) -> str:
    if language == "en":
        return f"{'an' if colour == 'orange' else 'a'} {colour} {shape} {place}"
    pattern, colours, shapes, places = WORDS[language]
    return pattern.format(
        colour=colours[list(COLOURS).index(colour)],
        shape=shapes[SHAPES.index(shape)],
        place=places[list(PLACES).index(place)],
    )


def load_synthetic(size: int = 32, seed: int = 0, languages: Sequence[str] = ("en",)) -> Splits:
    """320 captions ("a red circle at the top") in three styles: the third is the new style, a tenth is unseen."""
    if not languages or (unknown := [language for language in languages if language not in ("en", *WORDS)]):
        wrong = repr(unknown[0]) if languages else "none"
        raise ValueError(f"languages: expected some of en, {', '.join(WORDS)} for synthetic data; got {wrong}")
    concepts, images, styles = [], {}, STYLES
    for colour, shape, (place, where) in itertools.product(COLOURS, SHAPES, PLACES.items()):
        names = {language: _caption(language, colour, shape, place) for language in languages}
        concepts.append(
            Concept(
                names[languages[0]],
                group=_caption("en", colour, shape, place),
                keywords=(colour, shape) if "en" in names else (),
                labels={"shape": shape, "colour": colour},
                names=names,
            )
        )
        for style in styles:
            drawn = _draw(shape, COLOURS[colour], where, style, size)
            images[len(concepts) - 1, style] = torch.from_numpy(np.array(drawn)).permute(2, 0, 1)
    held = {i for i, c in enumerate(concepts) if hashlib.sha256(f"{seed}:{c.group}".encode()).digest()[0] < 26}

    def collect(names: tuple[str, ...], unseen: bool) -> ImageTextSet:
        keys = [(i, s) for s in names for i in range(len(concepts)) if (i in held) == unseen]
        return ImageTextSet(
            torch.stack([images[key] for key in keys]),
            torch.tensor([i for i, _ in keys]),
            torch.tensor([names.index(s) for _, s in keys]),
            concepts,
            list(names),
        )

    label_sets = {"shape": {s: [s] for s in SHAPES}, "colour": {c: [c] for c in COLOURS}}
    tests = {"new style (dotted)": collect(styles[2:], False), "unseen concepts": collect(styles[:1], True)}
    notes = [f"{len(concepts)} synthetic captions, {len(held)} of them held out of training"]
    return Splits("synthetic", collect(styles[:2], False), tests, None, label_sets, ("{}.", "a {}."), 200, notes)
