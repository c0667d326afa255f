"""Audio-visual data: spectrograms by formula, sounds from files, noise as stated, voices and images held apart."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from models.data import spoken_digits
from models.data.audio import RATE, LogMel, fit_clip, hertz_to_mel, mel_filters, mel_to_hertz, read_audio, resample
from models.data.batches import generator_of
from models.data.pair_files import load_pair_files, read_picture
from models.data.pairs import Noise, PairPlan, PairSet, draw_pairs, fixed_pairs, noisy_images, noisy_waves
from models.data.sets import BadDataError, BadDataLog
from models.data.speech import espeak, families
from models.data.spoken_digits import SETS, TAKES, WORDS, load_spoken_digits, load_synthetic_pairs, split_voices

MEL = LogMel(16, 256, 128)


def tone(hertz: float, seconds: float = 0.3, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


# --- sound


def test_mel_filters_are_the_triangles_of_their_formula() -> None:
    bands, window = 16, 256
    mels = [2595 * math.log10(1 + RATE / 2 / 700) * i / (bands + 1) for i in range(bands + 2)]
    corners = [700 * (10 ** (mel / 2595) - 1) for mel in mels]
    expected = np.zeros((bands, window // 2 + 1))
    for band in range(bands):
        low, peak, high = corners[band : band + 3]
        for k in range(window // 2 + 1):
            hertz = k * RATE / window
            if low < hertz <= peak:
                expected[band, k] = (hertz - low) / (peak - low)
            elif peak < hertz < high:
                expected[band, k] = (high - hertz) / (high - peak)
    np.testing.assert_allclose(mel_filters(bands, window), expected, atol=1e-6)
    f = torch.tensor([0.0, 440.0, 4000.0])
    torch.testing.assert_close(mel_to_hertz(hertz_to_mel(f)), f)
    with pytest.raises(ValueError, match=r"of 64 mel bands hold no bin of a window of 64 samples: choose fewer bands"):
        mel_filters(64, 64)


def test_a_tone_lies_in_its_band_and_loudness_does_not_show() -> None:
    waves = torch.from_numpy(np.stack([tone(hertz, 0.512) for hertz in (300, 1000, 3000)])).float()
    found = MEL(waves)
    assert found.shape == (3, 1, 16, 32)
    filters = mel_filters(16, 256)
    for row, hertz in zip(found[:, 0], (300, 1000, 3000), strict=True):
        assert int(row[:, 4:-4].mean(1).argmax()) == int(filters[:, round(hertz * 256 / RATE)].argmax())
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std((1, 2, 3)), torch.ones(3), atol=1e-2, rtol=0)
    torch.testing.assert_close(MEL(10 * waves), MEL(waves), atol=1e-3, rtol=0)
    assert MEL(torch.zeros(1, 2048)).isfinite().all()


def test_spectrogram_is_the_power_of_windowed_frames() -> None:
    wave = torch.randn(1, 1024, generator=generator_of(1)) * torch.linspace(1, 1e-3, 1024)  # down to silence
    padded = np.pad(wave[0].numpy(), 128, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
    frames = np.stack([padded[128 * t : 128 * t + 256] * window for t in range(8)])
    power = np.abs(np.fft.rfft(frames)) ** 2 @ mel_filters(16, 256).numpy().T
    level = np.log(np.maximum(power, 1e-4 * power.max())).T
    expected = (level - level.mean()) / (level.std(ddof=1) + 1e-3)
    np.testing.assert_allclose(MEL(wave)[0, 0], expected, atol=1e-4)


def test_resampling_keeps_what_fits_and_drops_the_rest() -> None:
    low, high = (resample(tone(hertz, 1, 22050), 22050, RATE) for hertz in (500, 6000))
    assert len(low) == RATE
    spectrum = np.abs(np.fft.rfft(low))
    assert spectrum.argmax() == 500
    assert np.abs(high[500:-500]).max() < 1e-3, "above half the rate: it would come back as another tone"


def test_clips_are_cut_and_scaled() -> None:
    sound = np.concatenate([np.zeros(50), 0.25 * np.ones(100), np.zeros(70)])
    clip, length = fit_clip(sound, 120)
    assert (length, clip.dtype, clip.shape) == (100, torch.int16, (120,))
    assert clip[:100].tolist() == [32767] * 100
    assert clip[100:].tolist() == [0] * 20
    clip, length = fit_clip(np.arange(1, 201) / 200, 50)
    assert length == 50
    # From 2 on the ramp is loud enough; its middle starts at 2 + (199 - 50) // 2.
    assert int(clip[0]) == round(32767 * 77 / 126)
    with pytest.raises(ValueError, match="holds no sound"):
        fit_clip(np.zeros(10), 50)


def test_sound_files_of_any_rate_and_channels(tmp_path: Path) -> None:
    for name, rate in (("a.wav", 22050), ("b.flac", 16000), ("c.ogg", 8000)):
        soundfile.write(tmp_path / name, np.stack([tone(600, rate=rate), np.zeros(int(0.3 * rate))], 1), rate)
        clip, length = read_audio(tmp_path / name, 4096)
        assert abs(length - 0.3 * RATE) < 40
        spectrum = torch.fft.rfft(clip[:2000].float()).abs()
        assert abs(int(spectrum.argmax()) * RATE / 2000 - 600) < 5


def test_channels_of_opposite_phase_are_heard(tmp_path: Path) -> None:
    wave = tone(440)
    soundfile.write(tmp_path / "one.wav", wave, RATE)
    soundfile.write(tmp_path / "two.wav", np.stack([wave, -wave], 1), RATE)
    one, two = (read_audio(tmp_path / name, 2 * RATE)[0] for name in ("one.wav", "two.wav"))
    assert (one - two).abs().max() <= 1


def test_a_recording_that_was_cut_off_is_named(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "cut.wav", tone(440), RATE, "PCM_16")
    data = bytearray((tmp_path / "cut.wav").read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = bytes(4)
    (tmp_path / "cut.wav").write_bytes(bytes(data))
    with pytest.raises(BadDataError, match=r"cut\.wav: holds no sound: its header gives the data a size of 0"):
        read_audio(tmp_path / "cut.wav", RATE)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_every_flipped_byte_and_every_cut_of_an_ogg_file_is_found(tmp_path: Path, subtype: str) -> None:
    whole, path = tmp_path / "whole.ogg", tmp_path / "damaged.ogg"
    soundfile.write(whole, tone(440, 2), RATE, subtype, format="OGG")
    data = whole.read_bytes()
    expected = read_audio(whole, 2 * RATE)[0]
    for at in range(0, len(data), 7):
        damaged = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], data[:at], data[:at] + data[at + 1 :]]
        for changed in damaged:
            path.write_bytes(changed)
            with pytest.raises(BadDataError, match=r"damaged\.ogg: "):
                read_audio(path, 2 * RATE)
    path.write_bytes(data + b"TAG" + bytes(125))  # what a tagger appends is no damage
    assert torch.equal(read_audio(path, 2 * RATE)[0], expected)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_every_lost_page_of_an_ogg_file_is_found(tmp_path: Path, subtype: str) -> None:
    """What is left has its checksums: the numbers of the pages tell, and the mark of the last one."""
    whole, path = tmp_path / "whole.ogg", tmp_path / "damaged.ogg"
    soundfile.write(whole, tone(440, 8), RATE, subtype, format="OGG")
    data = whole.read_bytes()
    pages = [*(page.start() for page in re.finditer(b"OggS", data)), len(data)]
    assert len(pages) > 4, "two pages of sound at least"
    for start, end in itertools.pairwise(pages):
        for changed in (data[:start], data[:start] + data[end:]):
            path.write_bytes(changed)
            with pytest.raises(BadDataError, match=r"damaged\.ogg: "):
                read_audio(path, 8 * RATE)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_wav_file_that_breaks_off_is_named(tmp_path: Path, channels: int) -> None:
    path = tmp_path / "cut.wav"
    soundfile.write(path, np.stack([tone(440)] * channels, 1), RATE, "PCM_16")
    data = path.read_bytes()
    path.write_bytes(data[:-1001])
    size = 2 * channels * len(tone(440))
    with pytest.raises(BadDataError, match=rf"cut\.wav: breaks off after {size - 1001} of {size} bytes of sound"):
        read_audio(path, RATE)
    at = data.index(b"data") + 4
    for unfinished in (0x7FFF_FFFF, 0xFFFF_FFFF):  # what a recorder writes that cannot seek
        path.write_bytes(data[:at] + unfinished.to_bytes(4, "little") + data[at + 4 :])
        assert read_audio(path, RATE)[1] > 2000


@pytest.mark.parametrize("rate", [1, 999, 384_001, 2**31 - 1])
def test_a_rate_that_no_sound_has_is_named(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "odd.wav", tone(440), rate)
    with pytest.raises(BadDataError, match=rf"odd\.wav: has {rate} samples a second; 1000 to 384000 can be read"):
        read_audio(tmp_path / "odd.wav", RATE)


def test_a_header_that_announces_more_than_memory_holds(tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    soundfile.write(path, tone(440), RATE, "PCM_16")
    data = bytearray(path.read_bytes())
    data[21] |= 0x0F  # with the four bytes behind it the number of samples, 36 bits
    data[22:26] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(data))
    with pytest.raises(BadDataError, match=r"long\.flac: "):
        read_audio(path, RATE)


def test_bad_sound_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    soundfile.write(tmp_path / "silent.wav", np.zeros(1000), RATE)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(1000, np.nan), RATE, subtype="FLOAT")
    for name, reason in {
        "text.wav": "Format not recognised",
        "silent.wav": "holds no sound",
        "empty.wav": "holds no sound",
        "nan.wav": "holds values that are not finite",
        "absent.wav": "is not there",
    }.items():
        with pytest.raises(BadDataError, match=rf"{name}: {reason}"):
            read_audio(tmp_path / name, 2048)


# --- noise


def test_sounds_have_the_ratio_asked_for() -> None:
    lengths = torch.tensor([4000, 2000, 8192, 3000])
    clips = torch.zeros(4, 8192, dtype=torch.int16)
    for i, length in enumerate(lengths.tolist()):
        clips[i, :length] = torch.from_numpy(20000 * tone(500 + 300 * i, length / RATE)).to(torch.int16)
    snr = torch.tensor([0.0, 20.0, -10.0, 6.0])
    noisy = noisy_waves(clips, lengths, snr, generator_of(5))
    clean = noisy_waves(clips, lengths, torch.full((4,), 300.0), generator_of(5))
    noise = (noisy - clean).square().mean(1)
    power = clean.square().sum(1) / lengths
    torch.testing.assert_close(10 * torch.log10(power / noise), snr, atol=0.2, rtol=0)
    for row, length in zip(clean, lengths.tolist(), strict=True):
        sounding = (row.abs() > 1e-3).nonzero()
        assert int(sounding[-1] - sounding[0]) < length, "moved as a whole"
    starts = noisy_waves(clips[:1].expand(64, -1), lengths[:1].expand(64), torch.full((64,), 300.0), generator_of(6))
    assert len({int((row.abs() > 1e-3).nonzero()[0]) for row in starts}) > 40


def test_images_have_the_noise_and_the_square_asked_for() -> None:
    images = torch.randint(0, 256, (6, 1, 40, 40), dtype=torch.uint8, generator=generator_of(0))
    hidden, sigma = torch.tensor([0.0, 0.1, 0.25, 0.5, 1.0, 0.25]), torch.tensor([0, 0, 0, 0, 0, 0.5])
    clean = images.float() / 255
    found = noisy_images(images, sigma, hidden, generator_of(3))
    covered = (found != clean).float().mean((1, 2, 3))[:5]
    torch.testing.assert_close(covered, hidden[:5], atol=0.04, rtol=0)
    assert torch.equal(found[0], clean[0])
    square = found[3][found[3] != clean[3]]
    assert len(square.unique()) == 1, "one grey"
    still = noisy_images(images, torch.zeros(6), hidden, generator_of(3))
    assert abs(float((found[5] - still[5]).std()) - 0.5) < 0.04


def test_levels_are_drawn_for_each_example_and_side_on_its_own() -> None:
    data = load_synthetic_pairs(16, 2048).train
    noise = Noise((-10.0, 10.0), (0.2, 0.8), (0.0, 0.4))
    batch = fixed_pairs(data, 2000, noise, MEL)
    for value, (low, high) in ((batch.snr, noise.snr), (batch.sigma, noise.sigma), (batch.hidden, noise.hidden)):
        assert low <= value.min() < low + 0.05 * (high - low)
        assert high >= value.max() > high - 0.05 * (high - low)
    levels = torch.stack([batch.snr, batch.sigma, batch.hidden, batch.labels.float()])
    assert (torch.corrcoef(levels) - torch.eye(4)).abs().max() < 0.1
    still = noise.fixed(snr=3.0)
    assert fixed_pairs(data, 50, still, MEL).snr.unique().tolist() == [3.0]
    assert still.sigma == noise.sigma


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ({"snr": (3.0, -3.0)}, "snr: expected a range from low to high, got 3.0 to -3.0"),
        ({"sigma": (-1.0, 1.0)}, "sigma: expected deviations of 0 or more, got -1.0"),
        ({"hidden": (0.0, 1.5)}, "hidden: expected shares from 0 to 1, got 0.0 to 1.5"),
        ({"snr": (math.nan, 1.0)}, "snr: expected a range"),
    ],
)
def test_impossible_noise_is_refused(levels: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Noise(**levels)


# --- sets and batches


def test_an_image_goes_with_any_sound_of_its_group() -> None:
    data = load_synthetic_pairs(16, 2048).train
    rows = torch.arange(400)
    partners = data.partners(rows, generator_of(0))
    assert torch.equal(data.clip_groups[partners], data.groups[rows])
    many = torch.cat([data.partners(torch.zeros(500, dtype=torch.long), generator_of(i)) for i in range(2)])
    assert set(many.tolist()) == set((data.clip_groups == data.groups[0]).nonzero().flatten().tolist())


def test_impossible_sets_are_refused() -> None:
    good = vars(load_synthetic_pairs(16, 2048).tests["synthetic"])
    fields = {name: value for name, value in good.items() if not name.startswith("_")}
    with pytest.raises(ValueError, match="every image needs a sound of its group"):
        PairSet(**fields | {"groups": fields["groups"] + 1})
    with pytest.raises(ValueError, match=r"clips must be int16 \[m, L\]; got torch.float32"):
        PairSet(**fields | {"clips": fields["clips"].float()})
    with pytest.raises(ValueError, match=r"images must be uint8 \[n, C, S, S\]"):
        PairSet(**fields | {"images": fields["images"][:, 0]})
    with pytest.raises(ValueError, match="200 images need as many labels and groups; got 3, 200"):
        PairSet(**fields | {"labels": fields["labels"][:3]})


def test_batches_are_a_function_of_the_step_and_some_lack_a_modality() -> None:
    data = load_synthetic_pairs(16, 2048).train
    plan = PairPlan(data, Noise(), MEL, batch_size=100, dropout=0.4, seed=3)
    assert plan.steps_per_epoch == 4
    first = plan(6)
    plan(1)
    again = plan(6)
    assert all(torch.equal(value, vars(again)[name]) for name, value in vars(first).items())
    assert not torch.equal(first.images, plan(7).images)
    present = torch.cat([plan(step).present for step in range(12)])
    assert present.any(1).all(), "none lacks both"
    torch.testing.assert_close((~present).float().mean(0), torch.tensor([0.2, 0.2]), atol=0.04, rtol=0)
    whole = PairPlan(data, Noise(), MEL, batch_size=100, dropout=0.0, seed=3)(6)
    assert whole.present.all()
    assert torch.equal(whole.images, first.images), "the same examples with and without"
    with pytest.raises(ValueError, match="batch size 401 exceeds the 400 images"):
        PairPlan(data, Noise(), MEL, batch_size=401)


def test_synthetic_pairs_can_be_told_by_either_side() -> None:
    splits = load_synthetic_pairs(16, 2048)
    train, test = splits.train, splits.tests["synthetic"]
    assert not set(train.voices) & set(test.voices)
    clean = Noise((60.0, 60.0), (0.0, 0.0), (0.0, 0.0))
    known, asked = (fixed_pairs(data, len(data), clean, MEL) for data in (train, test))
    for value in ("images", "spectrograms"):
        a, b = vars(known)[value].flatten(1), vars(asked)[value].flatten(1)
        if value == "spectrograms":
            a, b = (vars(x)[value].mean(3).flatten(1) for x in (known, asked))
        found = known.labels[torch.cdist(b, a).argmin(1)]
        assert (found == asked.labels).double().mean() > 0.5, "chance is 0.1"
    assert splits.notes[-1] == "synthetic: 200 images, 150 sounds of 5 voices, chance 0.100, largest class 0.100"


# --- spoken digits


def test_no_voice_and_no_variant_of_one_is_in_two_sets() -> None:
    voices = espeak().voices
    assert len(voices) == 104
    places, family = split_voices(voices), families(voices)
    of = {name: {family[voice] for voice in voices if places[voice] == name} for name in SETS}
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not of[a] & of[b]
    counts = {name: list(places.values()).count(name) for name in SETS}
    assert counts == {"train": 62, "validation": 16, "test": 26}
    assert family["klatt6"] == family["klatt"]


def test_espeak_says_the_word_asked_for() -> None:
    speaker = espeak()
    seven, one = (speaker.say(word, "f2", "en", 160, 50) for word in ("seven", "one"))
    assert seven.dtype == np.int16
    assert 0.3 < len(seven) / speaker.rate < 1
    assert len(seven) > len(one)
    slow = speaker.say("seven", "f2", "en", 100, 50)
    assert len(slow) > len(seven)
    with pytest.raises(ValueError, match="espeak-ng has no voice 'nobody' of 'en'"):
        speaker.say("seven", "nobody", "en", 160, 50)
    with pytest.raises(ValueError, match="espeak-ng has no voice 'f2' of 'elvish'"):
        speaker.say("seven", "f2", "elvish", 160, 50)


def test_spoken_digits_are_cached_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speak = spoken_digits.spoken_words
    monkeypatch.setattr(spoken_digits, "spoken_words", lambda samples, cache: speak(samples, cache, voices=8))
    splits = load_spoken_digits(28, 6144, tmp_path)
    sets = [splits.train, splits.validation, splits.tests["digits"]]
    assert [len(data) for data in sets if data is not None] == [3500, 500, 1000]
    pictures = [{image.numpy().tobytes() for image in data.images} for data in sets if data is not None]
    sounds = [{clip.numpy().tobytes() for clip in data.clips} for data in sets if data is not None]
    voices = [set(data.voices) for data in sets if data is not None]
    for kind in (pictures, sounds, voices):
        assert all(kind)
        assert not kind[0] & kind[1]
        assert not kind[0] & kind[2]
        assert not kind[1] & kind[2]
    assert sum(map(len, voices)) == 8
    for data in sets:
        assert data is not None
        assert torch.bincount(data.clip_groups).tolist() == [len(set(data.voices)) * TAKES] * 10
    assert "chance 0.100" in splits.notes[1]
    assert "largest class" in splits.notes[3]
    # Again from the cache, without a word spoken; a damaged cache is made again.
    monkeypatch.setattr(spoken_digits, "espeak", lambda: pytest.fail("spoken again"))
    assert torch.equal(load_spoken_digits(28, 6144, tmp_path).train.clips, splits.train.clips)
    monkeypatch.undo()
    path = next(tmp_path.glob("spoken-digits-*"))
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    clips, lengths, names = speak(6144, tmp_path, voices=8)
    assert (len(clips), len(lengths), len(names)) == (8 * 10 * TAKES, 8 * 10 * TAKES, 8)
    assert path.stat().st_size == len(whole)
    with pytest.raises(ValueError, match="has images of 28 pixels per side, and the model reads 16"):
        load_spoken_digits(16, 6144, tmp_path)


# --- files


def write_pair(path: Path, hertz: float, colour: tuple[int, int, int] = (200, 30, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 24), colour).save(path.with_suffix(".png"))
    soundfile.write(path.with_suffix(".wav"), tone(hertz, 0.2), RATE)


def test_folder_of_pairs_names_and_counts_what_is_bad(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 2)):
        for label, hertz in (("low", 400), ("high", 1600)):
            for i in range(count):
                write_pair(tmp_path / split / label / f"{i}.png", hertz + 10 * i)
    low = tmp_path / "train" / "low"
    (low / "0.wav").write_text("no sound")
    (low / "1.png").write_text("no image")
    Image.new("RGB", (8, 8)).save(low / "alone.png")
    soundfile.write(low / "lonely.wav", tone(300), RATE)
    messages: list[str] = []
    bad = BadDataLog(warn=messages.append)
    splits = load_pair_files(tmp_path, 16, 2048, bad)
    assert splits.train.classes == ["high", "low"]
    assert (len(splits.train), len(splits.tests["test"]), splits.validation) == (6, 4, None)
    assert splits.train.images.shape == (6, 3, 16, 16)
    assert sorted(Path(name).name for name in bad.files) == ["0.wav", "1.png", "alone.png", "lonely.wav"]
    assert "has no sound beside it" in next(m for m in messages if "alone.png" in m)
    assert "has no image beside it" in next(m for m in messages if "lonely.wav" in m)
    # A pair stays a pair.
    rows = torch.arange(6)
    assert torch.equal(splits.train.partners(rows, generator_of(0)), rows)
    batch = draw_pairs(splits.train, rows, Noise((60.0, 60.0), (0.0, 0.0), (0.0, 0.0)), MEL, generator_of(0))
    assert batch.images.shape == (6, 3, 16, 16)
    torch.testing.assert_close(batch.images[0, :, 0, 0], torch.tensor([200, 30, 30]) / 127.5 - 1)
    with pytest.raises(BadDataError, match=r"alone.png: has no sound beside it"):
        load_pair_files(tmp_path, 16, 2048, BadDataLog("raise"))


def test_list_of_pairs_keeps_speakers_together(tmp_path: Path) -> None:
    lines = ["image,audio,label,speaker"]
    for i in range(60):
        write_pair(tmp_path / "files" / f"{i}.png", 400 + 20 * i)
        lines.append(f"files/{i}.png,files/{i}.wav,{'even' if i % 2 == 0 else 'odd'},speaker {i % 20}")
    lines.append("files/0.png,,even,speaker 0")
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(lines) + "\n")
    bad = BadDataLog()
    splits = load_pair_files(table, 16, 2048, bad)
    assert bad.files == [f"{table}, line 62"]
    sets = [splits.train, splits.validation, *splits.tests.values()]
    voices = [set(data.voices) for data in sets if data is not None]
    assert sum(map(len, voices)) == len(set().union(*voices)) == 20
    assert sum(len(data) for data in sets if data is not None) == 60
    table.write_text("image,audio,label,split\nfiles/0.png,files/0.wav,a,exam\n")
    with pytest.raises(BadDataError, match="unknown split 'exam'"):
        load_pair_files(table, 16, 2048)
    table.write_text("image,audio,label,split\nfiles/0.png,files/0.wav,a,test\n")
    with pytest.raises(BadDataError, match="no pair is for training"):
        load_pair_files(table, 16, 2048)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadDataError, match="no pair in it"):
        load_pair_files(tmp_path / "empty", 16, 2048)


def test_pictures_in_colour_and_grey(tmp_path: Path) -> None:
    Image.new("RGBA", (10, 10), (90, 60, 30, 255)).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png", 4)[:, 0, 0].tolist() == [90, 60, 30]
    assert read_picture(tmp_path / "x.png", 4, channels=1)[:, 0, 0].tolist() == [60]
    assert WORDS[7] == "seven"
