"""Tiles that replace those of the tables: the user's, of the file that MMKERNELS_TILES names, or the machine's, which
`python -m benchmarks.gpu_check --tune` measured and left in the user's cache.

A file is JSON: the name of a GPU as torch has it, or of a family (sm_80, sm_90, sm_100, gfx942, interpreter), then an
op, a kernel, a precision ("half": bf16 and fp16; "ieee" or "tf32x3": float32;
"all" for beam_search and info_nce's chunked), and what the tile has there.

    {"NVIDIA H200": {"retrieval": {"topk": {"half": {"BLOCK_N": 64, "num_warps": 4}}}}}

Fields that are not named stay as in the table; the row of a GPU goes before that of its family. The file is read at the
first launch and held to what is known of the kernels, whole: a wrong name or number is an error and has no effect on
what runs. MMKERNELS_TILES= (empty) keeps to the tables and reads no file.
"""

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

logger = logging.getLogger("mmkernels")

VARIABLE = "MMKERNELS_TILES"
ABOUT = "about"  # beside the GPUs: under what a file was measured
FAMILIES = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")

# What a tile may have, and the names of its fields in the tables.
_OF_PRODUCTS = {
    "BLOCK_M": "block_m", "BLOCK_N": "block_n", "BLOCK_K": "block_k", "num_warps": "num_warps",
    "num_stages": "num_stages", "maxnreg": "max_registers",
}  # fmt: skip
_OF_STRIPS = {"BLOCK_M": "block_m", "BLOCK_N": "block_n", "num_warps": "num_warps"}
_OF_STEPS = {"BLOCK": "block", "MAX_STEPS": "max_steps", "num_warps": "num_warps", "programs": "programs"}
# The least and the most of each field; the blocks and the warps are powers of two.
_RANGES = {
    "BLOCK_M": (16, 512), "BLOCK_N": (16, 512), "BLOCK_K": (16, 512), "num_warps": (1, 16), "num_stages": (1, 8),
    "maxnreg": (24, 255), "BLOCK": (128, 16384), "MAX_STEPS": (1, 64), "programs": (1, 32),
}  # fmt: skip
_POWERS = {"BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK", "num_warps"}

_HEADS = (32, 64, 128, 256)
_OF_ATTENTION = ("packed_forward", "packed_backward", "forward", "grad_queries", "grad_keys")
_LONGEST_PIECE = 128  # halved three times, it adds up to every multiple of 16
_WHOLE = ("whole_forward", "whole_backward")  # in half precision, without a mask, where the table has them


def of_head(kernel: str, head: int, masked: bool) -> str:
    """What a kernel of divided_attention is called in a file: it has a tile for each size of heads."""
    return f"{kernel}-head{head}" + ("-masked" if masked else "")


# The kernels of each op that have a tile of their own, as the tables have them. linear_cross_entropy takes info_nce's
# tiles, and the losses that store strips its product; "pairs" is every kernel of an op over tiles of similarities, and
# retrieval's "topk" is for lists of at most 16.
KERNELS: dict[str, tuple[str, ...]] = {
    "info_nce": (
        "forward", "grad_logits", "product", "heavier_grad_logits", "grouped_forward", "symmetric_forward", "chunked"
    ),
    "distillation": ("forward", "grad_logits"),
    "siglip": ("pairs",),
    "triplet": ("pairs",),
    "retrieval": ("pairs", "topk", "long_topk"),
    "divided_attention": (
        *(of_head(kernel, head, masked) for kernel in _OF_ATTENTION for head in _HEADS for masked in (False, True)),
        *(of_head(kernel, head, False) for kernel in _WHOLE for head in _HEADS),
    ),
    "beam_search": ("step",),
}  # fmt: skip
_PRECISIONS = {"beam_search": ("all",), "retrieval": ("half", "ieee"), "divided_attention": ("half", "ieee")}

Row = Mapping[str, "int | None"]
Rows = Mapping[tuple[str, str, str], Row]  # by op, kernel and precision
T = TypeVar("T", bound=Any)  # a NamedTuple: a tile, or several


class File(NamedTuple):
    """Where tiles come from."""

    path: Path
    why: str


def parse(text: str) -> dict[str, Rows]:
    """The rows of each GPU or family. A ValueError names what is wrong, and where."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from None
    return {
        gpu: {
            (op, kernel, precision): _row(row, (gpu, op, kernel, precision))
            for op, kernels in _pairs(ops, (gpu,), tuple(KERNELS), "op")
            for kernel, precisions in _pairs(kernels, (gpu, op), KERNELS[op], "kernel")
            for precision, row in _pairs(precisions, (gpu, op, kernel), precisions_of(op, kernel), "precision")
        }
        for gpu, ops in _pairs(found, (), None, "GPU")
        if gpu != ABOUT
    }


def precisions_of(op: str, kernel: str) -> tuple[str, ...]:
    if kernel == "chunked":
        return ("all",)
    if kernel.startswith("whole"):
        return ("half",)
    return _PRECISIONS.get(op, ("half", "tf32x3", "ieee"))


def _pairs(
    found: object, where: tuple[str, ...], names: tuple[str, ...] | None, what: str
) -> Iterator[tuple[str, object]]:
    """The names and values of an object of the file; names: those that it may have."""
    if not isinstance(found, dict):
        raise ValueError(f"{_place(where)}expected an object by {what}, got {json.dumps(found)[:40]}")
    for name, value in found.items():
        if names is not None and name not in names:
            extra = ", which takes info_nce's tiles" if name == "linear_cross_entropy" else ""
            raise ValueError(f"{_place(where)}unknown {what} {name!r}{extra}: expected one of {', '.join(names)}")
        if names is None and re.fullmatch(r"(sm|gfx)_?\d+\w?", name) and name not in FAMILIES:
            raise ValueError(f"unknown family {name!r}: expected one of {', '.join(FAMILIES)}, or the name of a GPU")
        yield name, value


def _fields_of(op: str, kernel: str) -> dict[str, str]:
    if op == "beam_search":
        return _OF_STEPS
    return _OF_STRIPS if kernel == "chunked" else _OF_PRODUCTS


def _row(row: object, where: tuple[str, str, str, str]) -> Row:
    fields = tuple(_fields_of(*where[1:3]))
    found: dict[str, int | None] = {}
    for name, value in _pairs(row, where, fields, "field"):
        low, high = _RANGES[name]
        if value is None and name == "maxnreg":
            found[name] = None
            continue
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or (name in _POWERS and value & (value - 1)):  # type: ignore[operator]
            kind = "a power of two" if name in _POWERS else "a whole number"
            raise ValueError(f"{_place(where)}{name}: expected {kind} from {low} to {high}, got {json.dumps(value)}")
        found[name] = value  # type: ignore[assignment]
    return found


def _place(where: tuple[str, ...]) -> str:
    return " > ".join(where) + ": " if where else ""


def cache_folder() -> Path:
    """Where measured tiles are."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "mmkernels" / "tiles"


def cache_of(gpu: str) -> Path:
    """The file of the tiles measured on a GPU of that name."""
    return cache_folder() / f"{re.sub(r'[^A-Za-z0-9._ -]', '_', gpu)}.json"


def measured_under() -> dict[str, str]:
    """The versions that measured tiles belong to. Other code, or another compiler, has other best tiles."""
    versions = {}
    for package in ("mmkernels", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def file_for(gpu: str) -> File | None:
    """Which file a GPU of that name takes its tiles from; None: the tables alone."""
    if (named := os.environ.get(VARIABLE)) is not None:
        return File(Path(named).expanduser(), VARIABLE) if named else None
    return File(path, "tuned") if gpu and (path := cache_of(gpu)).is_file() else None


def read(file: File) -> dict[str, Rows]:
    """The rows of a file, by GPU. An error names the file. Measured rows count under the versions they were measured
    under; under others there are none, and a warning says so."""
    try:
        text = file.path.read_text()
        rows = parse(text)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{file.why}: {file.path}: {said}") from None
    about = json.loads(text).get(ABOUT, {})
    if file.why == VARIABLE or about == measured_under():
        return rows
    logger.warning(
        "%s was measured under %s and is not used: run python -m benchmarks.gpu_check --tune again", file.path, about
    )
    return {}


_replaced: Mapping[tuple[str, str, str], Row] | None = None  # by `replacing`, in place of any file


@contextlib.contextmanager
def replacing(rows: Rows) -> Iterator[None]:
    """Take these rows in place of any file, as the tuner and tests do."""
    global _replaced
    before, _replaced = _replaced, rows
    forget()
    try:
        yield
    finally:
        _replaced = before
        forget()


def forget() -> None:
    """Read the file again at the next launch."""
    _rows_on.cache_clear()
    _changed.cache_clear()


def gpu_name(device: torch.device) -> str:
    """As torch has it; empty for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@functools.cache
def _rows_on(device: torch.device, family: str) -> Rows:
    """The rows that hold on a device."""
    if _replaced is not None:
        return _replaced
    name = gpu_name(device)
    file = file_for(name)
    if file is None:
        return {}
    found = read(file)
    rows = {**found.get(family, {}), **found.get(name, {})}
    logger.debug("%d tiles of %s (%s) are in use", len(rows), file.path, file.why)
    return rows


def has_rows(device: torch.device, family: str) -> bool:
    """Whether any tile is replaced on the device."""
    return bool(_rows_on(device, family))


def tile_in_use(tile: T, op: str, kernel: str, precision: str, family: str, device: torch.device) -> T:
    """The tile that a kernel takes on the device: the table's, or what replaces it."""
    rows = _rows_on(device, family)
    if not rows or (op, kernel, precision) not in rows:
        return tile
    return _changed(tile, op, kernel, precision, family, device)


def tiles_in_use(tiles: T, op: str, precision: str, family: str, device: torch.device) -> T:
    """The same of a tuple with a tile for each kernel. One that is None is taken to be that of the kernel whose name
    ends its own: grouped_forward is forward."""
    rows = _rows_on(device, family)
    if not rows:
        return tiles
    changes = {}
    for kernel, tile in tiles._asdict().items():
        if (op, kernel, precision) in rows:
            plain = tile or next(t for k, t in tiles._asdict().items() if t and kernel.endswith(k))
            changes[kernel] = _changed(plain, op, kernel, precision, family, device)
    return tiles._replace(**changes) if changes else tiles


@functools.cache
def _changed(tile: T, op: str, kernel: str, precision: str, family: str, device: torch.device) -> T:
    row = _rows_on(device, family)[op, kernel, precision]
    fields = _fields_of(op, kernel)
    changed = tile._replace(**{fields[name]: value for name, value in row.items()})
    if op == "divided_attention":
        _require_head(changed, tile, kernel)
    most = shared_memory_of(device, family)
    if most is not None and (taken := least_shared(changed, op, precision)) > most:
        raise ValueError(
            f"tiles: {op} > {kernel} > {precision}: {changed} takes at least {taken} bytes of shared memory, and a "
            f"block has {most} on this GPU; take smaller blocks or fewer stages"
        )
    return changed


def _require_head(changed: Any, tile: Any, kernel: str) -> None:
    """A program holds whole heads, and both passes pack alike."""
    if changed.block_k != tile.block_k:
        raise ValueError(f"tiles: divided_attention > {kernel}: BLOCK_K is the head's {tile.block_k}")
    if kernel.startswith("whole") and changed.block_n > _LONGEST_PIECE:
        raise ValueError(f"tiles: divided_attention > {kernel}: BLOCK_N is a piece of at most {_LONGEST_PIECE} keys")
    if kernel.startswith("packed") and (changed.block_m, changed.block_n) != (tile.block_m, tile.block_n):
        raise ValueError(
            f"tiles: divided_attention > {kernel}: BLOCK_M and BLOCK_N are {tile.block_m}, for both passes pack alike"
        )


def shared_memory_of(device: torch.device, family: str) -> int | None:
    """The most that a block may have, in bytes; None: no limit is known."""
    if device.type == "cpu":
        return None
    if family == "gfx942":
        return 64 << 10
    most: int | None = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    return most


def least_shared(tile: Any, op: str, precision: str) -> int:
    """Bytes that the copies of the loop over the depth take at the least; the compiler may take more."""
    if precision == "all":  # it has no such loop
        return 0
    element = 2 if precision == "half" else 4
    rows = min(tile.block_m, tile.block_n) if op == "divided_attention" else tile.block_m + tile.block_n
    return rows * tile.block_k * element * max(1, tile.num_stages - 1)


def described(device: torch.device | None) -> str:
    """One line on which tiles run on the device, for `python -m mmkernels.info`."""
    name = gpu_name(device) if device is not None else ""
    file = file_for(name)
    if file is None:
        return "of the package" + (f" ({VARIABLE} is empty)" if VARIABLE in os.environ else "")
    try:
        found = read(file)
    except ValueError as error:
        return f"none can be read: {error}"
    rows = ", ".join(f"{gpu}: {len(rows)}" for gpu, rows in found.items()) or "none"
    return f"of the package, but for the rows of {file.path} ({file.why}): {rows}"
