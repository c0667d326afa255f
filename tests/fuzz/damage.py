"""Small valid files of every kind that models/data reads, and ways to damage them."""

import io
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image

RATE = 8000
IMAGES = {
    "png": ("PNG", {}),
    "grey-16.png": ("PNG", {}),
    "palette.png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 90}),
    "progressive.jpg": ("JPEG", {"progressive": True}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "webp": ("WEBP", {}),
    "lossless.webp": ("WEBP", {"lossless": True}),
    "tif": ("TIFF", {}),
    "deflate.tif": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}),
    "avif": ("AVIF", {}),
    "dds": ("DDS", {}),
    "ico": ("ICO", {}),
    "icns": ("ICNS", {}),
    "jp2": ("JPEG2000", {}),
    "tga": ("TGA", {"compression": "tga_rle"}),
    "ppm": ("PPM", {}),
    "pcx": ("PCX", {}),
    "sgi": ("SGI", {}),
    "qoi": ("QOI", {}),
    "exif.jpg": ("JPEG", {}),
}  # fmt: skip
SOUNDS = {
    "wav": ("WAV", "PCM_16"),
    "float.wav": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus.ogg": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
VIDEOS = {
    "mp4": "mpeg4",
    "avi": "mpeg4",
    "mkv": "mpeg4",
    "mov": "mjpeg",
    "mpg": "mpeg2video",
    "ts": "mpeg2video",
    "webm": "libvpx-vp9",
}
ROWS = 12  # of a list


def picture(width: int = 24, height: int = 20) -> Image.Image:
    """A smooth picture with an edge, in colours."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([9 * x, 11 * y, 120 + 60 * (x > y)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


@cache
def image(kind: str) -> bytes:
    name, options = IMAGES[kind]
    found: Image.Image = picture()
    if kind == "grey-16.png":
        found = Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 130)
    elif kind == "palette.png":
        found = found.quantize(16)
    elif kind == "exif.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif}
    elif kind == "icns":
        found = found.resize((16, 16))
    data = io.BytesIO()
    found.save(data, name, **options)
    return data.getvalue()


@cache
def sound(kind: str) -> bytes:
    container, subtype = SOUNDS[kind]
    time = np.arange(6000) / RATE
    wave = 0.5 * np.sin(2 * np.pi * (300 + 400 * time) * time)
    data = io.BytesIO()
    soundfile.write(data, np.stack([wave, 0.3 * wave[::-1]], 1), RATE, subtype, format=container)
    return data.getvalue()


@cache
def video(kind: str) -> bytes:
    data = io.BytesIO()
    container_format = {"mkv": "matroska", "ts": "mpegts", "mpg": "mpeg"}.get(kind, kind)
    with av.open(data, "w", format=container_format) as container:
        stream = container.add_stream(VIDEOS[kind], rate=25)
        stream.width, stream.height = 48, 32
        stream.pix_fmt = "yuvj420p" if VIDEOS[kind] == "mjpeg" else "yuv420p"
        for shift in range(12):
            pixels = np.roll(np.asarray(picture(48, 32)), 3 * shift, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return data.getvalue()


# --- lists: row i has a caption, a label or a name that no other row has

CAPTIONS = [
    *(
        "a red square",
        "a dog, a cat",
        'says "no"',
        "ein schöner Hund",
        "two lines\nof text",
        "犬と猫",
        'ends with a quote"',
        "",
    ),
    *("  blanks  ", "semi; colon | pipe\ttab", "a sign \u2028 inside", "नमस्ते दुनिया"),
]
SPLITS = ("train", "test", "validation", "train")


def quoted(field: str, mark: str) -> str:
    special = any(sign in field for sign in (mark, '"', "\n"))
    return '"' + field.replace('"', '""') + '"' if special else field


def table(columns: list[str], rows: list[list[str]], mark: str) -> list[str]:
    """The records of a CSV file, the header first."""
    return [mark.join(quoted(field, mark) for field in row) + "\n" for row in [columns, *rows]]


def caption(i: int) -> str:
    return f"{CAPTIONS[i % len(CAPTIONS)]} number {i}"


@cache
def records(kind: str) -> list[str]:
    """The records of a list of one kind: one row each, where ``damaged_list`` says so."""
    each = range(ROWS)
    of_images = [[f"{i}.png", caption(i), SPLITS[i % 4], "even" if i % 2 == 0 else "odd"] for i in each]
    objects = [dict(zip(("image", "caption", "split", "label"), row, strict=True)) for row in of_images]
    if kind in ("captions.csv", "captions.tsv", "semicolons.csv"):
        mark = {"captions.csv": ",", "captions.tsv": "\t", "semicolons.csv": ";"}[kind]
        return table(["image", "caption", "split", "label"], of_images, mark)
    if kind == "captions.jsonl":
        return [json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(objects)]
    if kind == "array.json":
        return [
            "[\n",
            *(json.dumps(row) + ("," if i < ROWS - 1 else "") + "\n" for i, row in enumerate(objects)),
            "]\n",
        ]
    if kind == "coco.json":
        files = [{"id": i, "file_name": f"{i}.png"} for i in each]
        annotations = [{"id": 100 + i, "image_id": i, "caption": caption(i)} for i in each]
        return [
            f'{{"images": {json.dumps(files)}, "annotations": [\n',
            *(json.dumps(row) + ("," if i < ROWS - 1 else "") + "\n" for i, row in enumerate(annotations)),
            "]}\n",
        ]
    if kind == "karpathy.json":
        images = [{"filename": f"{i}.png", "split": "train", "sentences": [{"raw": caption(i)}]} for i in each]
        return [
            '{"images": [\n',
            *(json.dumps(row) + ("," if i < ROWS - 1 else "") + "\n" for i, row in enumerate(images)),
            "]}\n",
        ]
    if kind == "kinetics.csv":
        rows = [[f"label, {i}", f"video{i:06d}", str(i), str(i + 10), SPLITS[i % 4]] for i in each]
        return table(["label", "youtube_id", "time_start", "time_end", "split"], rows, ",")
    if kind == "videos.csv":
        return table(["path", "label"], [[f"{i}.mp4", f"label, {i}"] for i in each], ",")
    if kind == "videos.txt":
        return [f"{i}.mp4 {i}\n" for i in each]
    if kind == "pairs.csv":
        return table(["image", "audio", "label"], [[f"{i}.png", f"{i}.wav", f"label {i}"] for i in each], ",")
    raise ValueError(kind)


CAPTION_LISTS = (
    "captions.csv",
    "captions.tsv",
    "semicolons.csv",
    "captions.jsonl",
    "array.json",
    "coco.json",
    "karpathy.json",
)
VIDEO_LISTS = ("kinetics.csv", "videos.csv", "videos.txt")


# --- damage


def flipped(random: random.Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        found[random.randrange(len(found))] ^= 1 << random.randrange(8)
    return bytes(found)


def chunk(random: random.Random, data: bytes) -> tuple[int, int]:
    start = random.randrange(len(data))
    return start, min(len(data), start + random.choice((1, 2, 4, 16, 64, 300)))


def cut(random: random.Random, data: bytes) -> bytes:
    return data[: random.randrange(len(data))]


def without(random: random.Random, data: bytes) -> bytes:
    start, end = chunk(random, data)
    return data[:start] + data[end:]


def twice(random: random.Random, data: bytes) -> bytes:
    start, end = chunk(random, data)
    return data[:end] + data[start:end] * random.choice((1, 1, 3, 200)) + data[end:]


def inserted(random: random.Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.randbytes(random.choice((1, 4, 50))) + data[at:]


def exchanged(random: random.Random, data: bytes) -> bytes:
    (a, b), (c, d) = sorted((chunk(random, data), chunk(random, data)))
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def overwritten(random: random.Random, data: bytes) -> bytes:
    """With zeros, ones or a huge number where sizes stand: mostly near the head."""
    near = min(len(data), random.choice((32, 128, len(data))))
    at, width = random.randrange(near), random.choice((1, 2, 4, 8))
    fill = random.choice((bytes(8), b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\xff" * 3 + b"\x7f" * 5, b"\x00\x01" * 4))
    return data[:at] + fill[:width] + data[at + width :]


def garbage(random: random.Random, data: bytes) -> bytes:
    return random.randbytes(random.choice((0, 1, 20, 1000)))


WAYS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(flipped, flipped, flipped, overwritten, overwritten, cut, without, twice, inserted, exchanged, garbage),
)


def damaged(random: random.Random, data: bytes) -> tuple[bytes, str]:
    """The bytes after one or two kinds of damage, and their names."""
    names = []
    for _ in range(random.choice((1, 1, 1, 2))):
        way = random.choice(WAYS)
        names.append(way.__name__)
        data = way(random, data) if data else data
    return data, ", ".join(names)


def other_encoding(random: random.Random, text: str) -> bytes:
    encoding = random.choice(("utf-16", "utf-16-le", "latin-1", "cp1252", "utf-8-sig", "utf-32", "shift-jis"))
    return text.encode(encoding, "replace")


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path
