"""Words spoken by espeak-ng (package ``espeakng-loader``, GPL-3), called through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

# Language names of espeak-ng; any of its voices speaks with any of them.
ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc", "en-gb-x-gbclan", "en-gb-x-gbcwmd")

# Numbers of its C interface, speak_lib.h.
_RETRIEVAL, _UTF8, _RATE, _PITCH = 2, 1, 1, 3


class Espeak:
    """The one synthesiser of a process; use :func:`espeak`."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "spoken digits need the package espeakng-loader: pip install espeakng-loader"
            ) from error
        self.data = Path(espeakng_loader.get_data_path())
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.rate = self.library.espeak_Initialize(_RETRIEVAL, 0, str(self.data).encode(), 0)
        if self.rate <= 0:
            raise OSError(f"espeak-ng does not start with the data in {self.data}")
        self.voices = sorted(path.name for path in (self.data / "voices" / "!v").iterdir())
        self.parts: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = kind(self._take)  # kept: the library holds only its address
        self.library.espeak_SetSynthCallback(self.callback)

    def _take(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _: int) -> int:
        if count > 0 and samples:
            self.parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, accent: str, words_a_minute: int, pitch: int) -> np.ndarray:
        """The samples, int16 [n], at ``rate``; pitch goes from 0 to 100."""
        self.parts.clear()
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # some voices breathe at random
        # The library refuses an accent that it does not know, but silently replaces an unknown voice by another.
        if voice not in self.voices or self.library.espeak_SetVoiceByName(f"{accent}+{voice}".encode()):
            raise ValueError(f"espeak-ng has no voice {voice!r} of {accent!r}")
        self.library.espeak_SetParameter(_RATE, words_a_minute, 0)
        self.library.espeak_SetParameter(_PITCH, pitch, 0)
        data = text.encode()
        if self.library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, _UTF8, None, None):
            raise OSError(f"espeak-ng cannot say {text!r}")
        self.library.espeak_Synchronize()
        return np.concatenate(self.parts) if self.parts else np.zeros(0, np.int16)


@cache
def espeak() -> Espeak:
    """The synthesiser, started once."""
    return Espeak()


def families(voices: Sequence[str]) -> dict[str, str]:
    """The family of each voice: its name without numbers at the end, in small letters.

    Voices of one family (klatt to klatt6, robosoft to robosoft8) are variants of one another.
    """
    return {voice: voice.rstrip("0123456789").lower() for voice in voices}
