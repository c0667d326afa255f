"""Sound for models: WAV and other files read to one rate, and log-mel spectrograms by ``torch.stft``."""

from __future__ import annotations

import math
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


def read_audio(path: Path, samples: int, rate: int = RATE) -> tuple[Tensor, int]:
    """A sound file (WAV, FLAC, OGG, MP3) at ``rate``, its channels mixed, as :func:`fit_clip` gives it.

    Raises :class:`BadDataError` that names the file.
    """
    import soundfile

    try:
        data, own = soundfile.read(path, dtype="float64", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        reason = "is not there" if not path.exists() else getattr(error, "error_string", None) or str(error)
        raise BadDataError(f"{path}: {reason}") from error
    if not len(data):
        cut = path.suffix.lower() == ".wav" and path.stat().st_size > 1024
        raise BadDataError(f"{path}: holds no sound" + (": its header gives the data a size of 0" if cut else ""))
    if not np.isfinite(data).all():
        raise BadDataError(f"{path}: holds values that are not finite")
    try:
        return fit_clip(resample(mix(data), own, rate), samples)
    except ValueError as error:
        raise BadDataError(f"{path}: {error}") from error
