"""The checks of arguments that ops share. Each message names the argument, what was expected, what came, the remedy."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPE_NAMES = "float32, bfloat16, float16 or float64"


def check_dense(name: str, tensor: Tensor) -> None:
    """No sparse or nested tensor."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}; use {name}.to_dense()")


def check_features(name: str, features: Tensor, ndim: int, shape: str, remedy: str = "") -> None:
    """A tensor of `ndim` dimensions in a dtype that the ops take; `shape` names the dimensions."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(features).__name__}")
    check_dense(name, features)
    if features.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected {_DTYPE_NAMES}, got {features.dtype}")
    if features.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions {shape}, got shape {tuple(features.shape)}{remedy}")


def check_matrix(name: str, matrix: Tensor, shape: str = "[rows, D]", remedy: str = "") -> None:
    """A tensor of two dimensions in a dtype that the ops take."""
    check_features(name, matrix, 2, shape, remedy)


def check_count(name: str, count: int, least: int) -> None:
    """An int (a symbolic one while torch.compile traces) of at least `least`."""
    if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(count).__name__}")
    if count < least:
        raise ValueError(f"{name}: expected at least {least}, got {count}")


def check_flag(name: str, flag: bool) -> None:
    """True or False."""
    if not isinstance(flag, bool):
        raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")


def check_choice(name: str, value: object, known: Sequence[object]) -> None:
    """One of the known values."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")


def check_mask(name: str, mask: Tensor, shapes: Mapping[str, tuple[int, ...]], meaning: str) -> None:
    """A bool tensor of one of the shapes, {"[B, T]": (2, 8)}; `meaning` says what True stands for."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a bool tensor, got {type(mask).__name__}")
    check_dense(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool, {meaning}, got {mask.dtype}; use {name}.bool()")
    if mask.shape not in shapes.values():
        expected = " or ".join(f"{dimensions} = {shape}" for dimensions, shape in shapes.items())
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(mask.shape)}")


def check_share(name: str, share: float) -> None:
    """A float in [0, 1)."""
    if not isinstance(share, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(share).__name__}")
    if not 0.0 <= share < 1.0:
        raise ValueError(f"{name}: expected a value in [0, 1), got {share}")


def check_finite(name: str, number: float) -> None:
    """A float that is neither NaN nor infinite."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(number).__name__}")
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")


def check_above_zero(name: str, number: float) -> None:
    """A finite float above 0."""
    check_finite(name, number)
    if not number > 0:
        raise ValueError(f"{name}: expected a value above 0, got {number}")


def check_pairs(queries: Tensor, keys: Tensor) -> None:
    """Rows of features [N, D] and [M, D] on one device, none of the sizes 0."""
    if isinstance(queries, Tensor) and isinstance(keys, Tensor) and queries.ndim == 2 and keys.ndim == 2:
        (rows, features), (other_rows, other_features) = queries.shape, keys.shape
        known = queries.dtype in _DTYPES and keys.dtype in _DTYPES and queries.device == keys.device
        known = known and queries.layout == keys.layout == torch.strided
        if known and features == other_features and rows > 0 and other_rows > 0 and features > 0:
            return
    _name_fault_of_pairs(queries, keys)


def _name_fault_of_pairs(queries: Tensor, keys: Tensor) -> None:
    """Raises for the first thing that is wrong; check_pairs saves good pairs the walk: 1 us of a call of 25."""
    for name, features in (("queries", queries), ("keys", keys)):
        check_matrix(name, features)
        if features.shape[0] == 0:
            raise ValueError(
                f"{name}: expected at least one row, got shape {tuple(features.shape)}; skip empty batches"
            )
        if features.shape[1] == 0:
            raise ValueError(f"{name}: expected D >= 1, got shape {tuple(features.shape)}")
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"keys: expected D = {queries.shape[1]} as in queries, got {keys.shape[1]}; project both to one size"
        )
    check_device("keys", keys, "queries", queries)


def check_matches(queries: Tensor, keys: Tensor) -> None:
    """A key for every query: key i for query i."""
    if queries.shape[0] > keys.shape[0]:
        raise ValueError(
            f"keys: expected at least N = {queries.shape[0]} rows, key i for query i, got {keys.shape[0]}; "
            "exchange queries and keys, or drop the queries without a match"
        )


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: expected device {other.device} as of {other_name}, got {tensor.device}; move one of them"
        )


def check_number(name: str, number: Tensor | float, device: torch.device) -> None:
    """A float, or a floating-point tensor of one element on the device or on the CPU."""
    if isinstance(number, Tensor):
        check_dense(name, number)
        if number.numel() != 1:
            raise ValueError(f"{name}: expected one element, got shape {tuple(number.shape)}")
        if not number.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {number.dtype}")
        if number.device != device and number.device.type != "cpu":
            raise ValueError(f"{name}: expected device {device} or cpu, got {number.device}")
    elif not isinstance(number, (int, float)):
        raise TypeError(f"{name}: expected a float or a tensor of one element, got {type(number).__name__}")


def check_int64(name: str, indices: Tensor) -> None:
    """An int64 tensor of any shape."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name}: expected an int64 tensor, got {type(indices).__name__}")
    check_dense(name, indices)
    if indices.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {indices.dtype}; use {name}.long()")


def check_indices(name: str, indices: Tensor, length: int) -> None:
    """An int64 tensor [length]; each op checks the values itself."""
    check_int64(name, indices)
    if indices.shape != (length,):
        raise ValueError(f"{name}: expected shape ({length},), got {tuple(indices.shape)}")


def check_target_tensor(queries: Tensor, keys: Tensor, targets: Tensor | None) -> None:
    """An int64 tensor [N], the key of each query; None: key i for query i."""
    if targets is not None:
        check_indices("targets", targets, queries.shape[0])
        check_device("targets", targets, "queries", queries)
    elif queries.shape[0] > keys.shape[0]:
        raise ValueError(
            f"targets: {queries.shape[0]} queries and {keys.shape[0]} keys do not match one to one; "
            "pass targets [N], the index of the key of each query"
        )


def check_label_smoothing(label_smoothing: float) -> None:
    if not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing: expected a float, got {type(label_smoothing).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a value in [0, 1], got {label_smoothing}")


def check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")


def check_weights(queries: Tensor, weights: Tensor | None) -> None:
    """A floating-point tensor [N], one weight for each query's loss; None: all weigh the same."""
    if weights is None:
        return
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights: expected a floating-point tensor, got {type(weights).__name__}")
    check_dense("weights", weights)
    if not weights.is_floating_point():
        raise TypeError(f"weights: expected a floating-point tensor, got {weights.dtype}; use weights.float()")
    if weights.shape != queries.shape[:1]:
        raise ValueError(f"weights: expected shape ({queries.shape[0]},), got {tuple(weights.shape)}")
    check_device("weights", weights, "queries", queries)


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for `x`; never for a meta tensor, whose device torch's own question does not know."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Within it the products of float32 tensors stay float32 on the device of `x`."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def in_autocast_dtype(x: Tensor) -> Tensor:
    """Cast to autocast's dtype where it is on and `x` is not float64; else unchanged."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if is_autocast(x) else x


def in_one_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both cast to autocast's dtype where it is on and they are not float64; else unchanged, and they must agree."""
    if is_autocast(x):
        x = in_autocast_dtype(x)
        return x, other.to(x.dtype)
    if x.dtype != other.dtype:
        raise TypeError(f"{other_name}: expected the dtype of {name}, {x.dtype}, got {other.dtype}; cast one of them")
    return x, other


def as_scalar(number: Tensor | float, features: Tensor) -> Tensor:
    """The number as a tensor [] on the features' device: float64 if they are, else float32."""
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    if isinstance(number, Tensor):
        if number.ndim == 0 and number.dtype == dtype and number.device == features.device:
            return number
        return number.reshape(()).to(features.device, dtype)
    return torch.full((), number, dtype=dtype, device=features.device)


def check_targets(targets: Tensor, count: int, of: str, ignore_index: int | None = None) -> None:
    """Raise ValueError if a target is neither one of the `count` rows nor ignored. Waits for the device."""
    if torch.compiler.is_compiling() or targets.is_meta:
        return  # there are no values to see; the indexing itself fails at run time
    if ignore_index is not None:
        targets = targets[targets != ignore_index]
    if targets.numel() == 0:
        return
    low, high = (int(bound) for bound in targets.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"{expected_targets(count, of, ignore_index)}, got {low if low < 0 else high}")


def require_targets(op: str, targets: Tensor, count: int, of: str, ignore_index: int | None = None) -> None:
    """Raise if a target is out of range: at once on a CPU, through a device assertion on a GPU."""
    if not targets.is_cuda:
        check_targets(targets, count, of, ignore_index)
        return
    legal = (targets >= 0) & (targets < count)
    if ignore_index is not None:
        legal |= targets == ignore_index
    torch._assert_async(legal.all(), f"mmkernels.{op}: {expected_targets(count, of, ignore_index)}")


def expected_targets(count: int, of: str, ignore_index: int | None = None) -> str:
    """The part of a message that says what targets must be."""
    ignored = "" if ignore_index is None else f", or ignore_index={ignore_index}"
    return f"targets: expected indices of the {count} {of}, 0 to {count - 1}{ignored}"
