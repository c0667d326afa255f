"""How the kernels over pairs are launched: the features as they read them, their options, and the blocks they walk."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from mmkernels._tiles.triton import Tile, cdiv, chip_of, round_up

# The compiler must round scale * q.k before a maximum is subtracted from it. Fused into one operation, the largest
# logit minus itself would not be zero, and a loss near zero at a large scale would be noise. Dots stay fused.
NO_FUSION = {"enable_fp_fusion": False}
MERGE_STEP = 16  # depth of a step of the kernels without a dot product
MERGE_BLOCK = 128  # entries that one of their programs takes
MAX_PARTIALS = 32  # partial results of a row or a column
# Whether a compiled form can be launched apart from its kernel. The interpreter has none, and on AMD a form depends on
# the sizes of tensors, too.
HAS_FORMS = not triton.knobs.runtime.interpret and torch.version.hip is None


def compiler_options(tile: Tile | None) -> dict[str, int]:
    """What the compiler is told beside the constants, the warps and the stages."""
    options: dict[str, int] = dict(NO_FUSION)
    if tile is not None and tile.max_registers is not None:
        options["maxnreg"] = tile.max_registers
    return options


@functools.cache
def launch_options(tile: Tile) -> dict[str, int]:
    """What every kernel of a tile is launched with. The dictionary is shared: nobody may change it."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **compiler_options(tile),
    }


class Launch(NamedTuple):
    """A launch that was made: of which compiled form, on which grid, with which arguments and constants."""

    form: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


class _Notes(threading.local):
    launches: list[Launch | None] | None = None  # of this thread, while noted_launches has them noted


_notes = _Notes()


@contextlib.contextmanager
def noted_launches() -> Iterator[list[Launch | None]]:
    """The launches that this thread makes meanwhile; None for one without a form."""
    before, _notes.launches = _notes.launches, []
    try:
        yield _notes.launches
    finally:
        _notes.launches = before


class Launcher:
    """A kernel with its constants: launcher(grid, *arguments) is kernel[grid](*arguments, **constants).

    Triton binds, prints and looks up all arguments at every launch, which takes longer than the launch itself. Here a
    form that was launched before is found by what its choice depends on: dtypes, addresses and sizes in multiples of
    16, and sizes of 1. The first argument is a tensor, no integer is negative, and constants are the last parameters.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self.kernel, self.constants = kernel, constants
        self.values = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self.forms: dict[tuple[Any, ...], Any] = {}
        self.has_forms = HAS_FORMS and isinstance(kernel, JITFunction)

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        addresses = largest = 0
        key: list[Any] = [arguments[0].get_device()]
        for argument in arguments:
            if isinstance(argument, Tensor):
                key.append(argument.dtype)
                addresses |= argument.data_ptr()
            elif isinstance(argument, int):
                key.append(2 if argument == 1 else argument & 15 == 0)
                largest |= argument
        form = None
        if not self.has_forms or addresses & 15 or largest >> 31:
            self.kernel[grid](*arguments, **self.constants)
        elif (form := self.forms.get(kinds := tuple(key))) is not None:
            form[(*grid, 1, 1)[:3]](*arguments, *self.values)
        elif (form := self.kernel[grid](*arguments, **self.constants)) is not None:
            self.forms[kinds] = form
        if _notes.launches is not None:
            made = None if form is None else Launch(form, (*grid, 1, 1)[:3], (*arguments, *self.values))
            _notes.launches.append(made)


@functools.cache
def launcher(kernel: Any, tile: Tile | None = None, **constants: Any) -> Launcher:
    """The launcher of a kernel over tiles, or of one without a product; the same one for the same constants."""
    return Launcher(kernel, constants | (NO_FUSION if tile is None else launch_options(tile)))


def aligned(features: Tensor) -> Tensor:
    """The features as the kernels are compiled for them: contiguous rows that start at multiples of 16 bytes.

    Any other layout is copied once, with zeros up to the next multiple of 16 features.
    """
    rows, D = features.shape
    if features.stride(1) == 1 and D % 16 == 0 and features.stride(0) % 16 == 0 and features.data_ptr() % 16 == 0:
        return features
    copy = features.new_zeros(rows, round_up(D, 16))
    copy[:, :D] = features
    return copy


class Walk(NamedTuple):
    """Which tiles of the logits a program owns: those of a group of rows and a split of the columns."""

    tiles_per_group: int
    tiles_per_split: int
    groups: int
    splits: int


def walk_over(num_rows: int, num_cols: int, tile: Tile) -> Walk:
    """Blocks as small as MAX_PARTIALS partial results of each row and each column allow."""
    row_tiles, col_tiles = cdiv(num_rows, tile.block_m), cdiv(num_cols, tile.block_n)
    tiles_per_group, tiles_per_split = cdiv(row_tiles, MAX_PARTIALS), cdiv(col_tiles, MAX_PARTIALS)
    return Walk(
        tiles_per_group,
        tiles_per_split,
        cdiv(row_tiles, tiles_per_group),
        cdiv(col_tiles, tiles_per_split),
    )


_MOST_TILES = 32  # below one another in a block: the kernels keep a bit for each
_TOP = 0.6  # what the head and the foot of a column of tiles take, in tiles: predicted for sm_90
_PROCESSORS = 132  # where there is no GPU: as many as an H100 has


def walk_down_columns(num_rows: int, num_cols: int, tile: Tile, device: torch.device) -> Walk:
    """Blocks as the kernels take them that walk down one column of tiles after the other: as high as can be, while all
    multiprocessors have about as much to do. A row and a column have MAX_PARTIALS partial results at most, and more
    only past 32 blocks of 32 tiles."""
    processors = chip_of(device).multiprocessors if device.type == "cuda" else _PROCESSORS
    return _best_walk(cdiv(num_rows, tile.block_m), cdiv(num_cols, tile.block_n), processors, MAX_PARTIALS)


@functools.lru_cache(maxsize=1024)
def _best_walk(row_tiles: int, col_tiles: int, processors: int, most: int) -> Walk:
    def shape(height: int, width: int) -> Walk:
        return Walk(height, width, cdiv(row_tiles, height), cdiv(col_tiles, width))

    def cost(walk: Walk) -> tuple[float, int]:
        rounds = cdiv(walk.groups * walk.splits, processors)
        return rounds * walk.tiles_per_split * (walk.tiles_per_group + _TOP), walk.groups + walk.splits

    lowest, narrowest = cdiv(row_tiles, most), cdiv(col_tiles, most)
    heights = range(min(lowest, _MOST_TILES), min(row_tiles, _MOST_TILES) + 1)
    widths = range(narrowest, min(col_tiles, 4 * narrowest) + 1)
    return min((shape(height, width) for height in heights for width in widths), key=cost)
