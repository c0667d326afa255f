"""Sound for models: WAV and other files read to one rate, and log-mel spectrograms by ``torch.stft``."""

from __future__ import annotations

import io
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.data.sets import BadDataError

FLOOR = 1e-4  # below the loudest place of a spectrogram: less counts as silence, where files hold no noise at all
RATE = 8000  # samples per second: a telephone's band, which is enough to tell words apart


def hertz_to_mel(hertz: Tensor) -> Tensor:
    """The mel scale of O'Shaughnessy 1987: 2595 log10(1 + f / 700)."""
    return 2595 * torch.log10(1 + hertz / 700)


def mel_to_hertz(mel: Tensor) -> Tensor:
    """The inverse of :func:`hertz_to_mel`."""
    return 700 * (10 ** (mel / 2595) - 1)


def mel_filters(bands: int, window: int, rate: int = RATE) -> Tensor:
    """Triangles that sum the bins of a spectrum to mel bands, [bands, window / 2 + 1].

    Their corners lie evenly on the mel scale from 0 to half the rate; each peaks at 1 where its neighbours begin.
    """
    top = hertz_to_mel(torch.tensor(rate / 2, dtype=torch.float64))
    corners = mel_to_hertz(torch.linspace(0, 1, bands + 2, dtype=torch.float64) * top)
    bins = torch.arange(window // 2 + 1, dtype=torch.float64) * rate / window
    low, peak, high = (corners[i : i + bands, None] for i in range(3))
    filters = torch.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)).clamp(min=0)
    if (empty := int((filters.sum(1) == 0).sum())) > 0:
        raise ValueError(
            f"{empty} of {bands} mel bands hold no bin of a window of {window} samples: choose fewer bands"
        )
    return filters.float()


class LogMel:
    """Waves [B, L] -> log-mel spectrograms [B, 1, bands, frames], each with mean 0 and deviation 1.

    Windows of ``window`` samples (Hann) every ``hop`` samples, centred; L / hop frames. How loud a clip is does not
    show; how much louder its word is than its noise does.
    """

    def __init__(self, bands: int, window: int, hop: int, rate: int = RATE) -> None:
        self.window, self.hop = window, hop
        self.filters = mel_filters(bands, window, rate)
        self.taper = torch.hann_window(window)

    def __call__(self, waves: Tensor) -> Tensor:
        """Take the spectrograms."""
        spectrum = torch.stft(waves, self.window, self.hop, window=self.taper, return_complex=True)
        # Frames before bins, as the transform left them in memory; no frame at the very end.
        real, imaginary = torch.view_as_real(spectrum.transpose(1, 2)[:, :-1]).square().unbind(-1)
        power = (real + imaginary) @ self.filters.T
        floor = FLOOR * power.amax((1, 2), keepdim=True).clamp(min=1e-30)
        level = torch.maximum(power, floor).log()
        deviation, mean = torch.std_mean(level, (1, 2), keepdim=True)
        return ((level - mean) / (deviation + 1e-3)).transpose(1, 2).unsqueeze(1)


def resample(waves: np.ndarray, before: int, after: int) -> np.ndarray:
    """Waves [..., n] at another rate; a filter takes away the frequencies that it cannot hold."""
    from scipy.signal import resample_poly

    if before == after:
        return waves
    shared = math.gcd(before, after)
    return resample_poly(waves, after // shared, before // shared, axis=-1)


def trim(wave: np.ndarray, floor: float = 0.01) -> np.ndarray:
    """The part between the first and the last sample louder than ``floor`` of the loudest."""
    loud = np.flatnonzero(np.abs(wave) > floor * np.abs(wave).max(initial=0))
    return wave[loud[0] : loud[-1] + 1] if len(loud) else wave[:0]


def fit_clip(wave: np.ndarray, samples: int) -> tuple[Tensor, int]:
    """A wave as int16 [samples], as loud as it can be, silence after it, and the length of its sound.

    Silence around the sound is cut; a sound that is too long keeps its middle.
    """
    sound = trim(wave)
    start = max(0, len(sound) - samples) // 2
    sound = sound[start : start + samples]
    if not len(sound):
        raise ValueError("holds no sound")
    clip = np.zeros(samples, np.int16)
    clip[: len(sound)] = np.round(sound / np.abs(sound).max() * 32767)
    return torch.from_numpy(clip), len(sound)


def mix(channels: np.ndarray) -> np.ndarray:
    """The mean of channels [n, C]; the loudest of them where they cancel one another, as in opposite phase."""
    mean, power = channels.mean(1), np.square(channels).mean(0)
    cancel = np.square(mean).mean() < 1e-3 * power.mean()
    return channels[:, power.argmax()] if cancel else mean


def fault_of_ogg(data: bytes) -> str | None:
    """What its own checksums and page numbers say against an OGG file; None if it is whole.

    Decoders pass over a bad page without a word.
    """
    at = data.find(b"OggS")
    expected: dict[int, int] = {}  # by stream: the number of its next page
    ended: dict[int, bool] = {}
    while at >= 0 and at + 27 <= len(data):
        size = 27 + data[at + 26] + sum(data[at + 27 : at + 27 + data[at + 26]])
        page = data[at : at + size]
        serial, number, checksum = (int.from_bytes(page[i : i + 4], "little") for i in (14, 18, 22))
        # The sum of zlib with the bits of each byte, and of the result, in the other order.
        mirrored = (page[:22] + bytes(4) + page[26:]).translate(_MIRRORED)
        found = ~zlib.crc32(mirrored, 0xFFFFFFFF) & 0xFFFFFFFF
        if len(page) < size or int(f"{found:032b}"[::-1], 2) != checksum or number != expected.get(serial, number):
            return "is damaged: a page is lost, cut or of another checksum"
        expected[serial], ended[serial] = number + 1, bool(page[5] & 4)
        at = data.find(b"OggS", at + size)
    return None if all(ended.values()) else "breaks off: the page that ends it is missing"


def fault_of_wav(data: bytes) -> str | None:
    """Where the header of a WAV file announces more samples than follow; None if they are there, or it does not say."""
    at = 12
    while data.startswith(b"RIFF") and at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name == b"data":
            there = len(data) - at - 8
            # A recorder that was stopped leaves 0 or nearly 2^31 or 2^32.
            return f"breaks off after {there} of {size} bytes of sound" if there < size < 0x7FFF_0000 else None
        at += 8 + size + size % 2
    return None


_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_FAULTS = {"OGG": fault_of_ogg, "WAV": fault_of_wav, "WAVEX": fault_of_wav}
RATES = range(1000, 384_001)  # samples a second that a file may have: to resample others takes gigabytes


def decode_audio(data: bytes) -> tuple[np.ndarray, int]:
    """The samples of a file's bytes, float64 [n, C], and how many a second has; a ValueError says what is wrong."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if (fault := _FAULTS.get(file.format, lambda _: None)(data)) is not None:
                raise ValueError(fault)
            if file.samplerate not in RATES:
                raise ValueError(f"has {file.samplerate} samples a second; {RATES[0]} to {RATES[-1]} can be read")
            parts = [np.zeros((0, file.channels))]
            # Part by part: a header may announce more samples than there is memory for.
            while len(part := file.read(1 << 16, dtype="float64", always_2d=True)):
                parts.append(part)
            return np.concatenate(parts), file.samplerate
    except soundfile.LibsndfileError as error:
        raise ValueError(error.error_string) from error


def read_audio(path: Path, samples: int, rate: int = RATE) -> tuple[Tensor, int]:
    """A sound file (WAV, FLAC, OGG, MP3) at ``rate``, its channels mixed, as :func:`fit_clip` gives it.

    Raises :class:`BadDataError` that names the file.
    """
    try:
        data = path.read_bytes()
        found, own = decode_audio(data)
        if not len(found):
            cut = data.startswith(b"RIFF") and len(data) > 1024
            raise ValueError("holds no sound" + (": its header gives the data a size of 0" if cut else ""))
        if not np.isfinite(found).all():
            raise ValueError("holds values that are not finite")
        return fit_clip(resample(mix(found), own, rate), samples)
    except (OSError, ValueError) as error:  # a ValueError, too, for a path with a NUL
        reason = "is not there" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or error
        raise BadDataError(f"{path}: {reason}") from error
