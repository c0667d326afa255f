"""The checks of arguments that ops share: each names the argument, what was expected, what came and the remedy."""

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_matrix(name: str, matrix: Tensor, shape: str = "[rows, D]", remedy: str = "") -> None:
    """A tensor of two dimensions in a dtype that the ops take."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(matrix).__name__}")
    if matrix.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {matrix.dtype}")
    if matrix.ndim != 2:
        raise ValueError(f"{name}: expected 2 dimensions {shape}, got shape {tuple(matrix.shape)}{remedy}")


def check_pairs(queries: Tensor, keys: Tensor) -> None:
    """Rows of features [N, D] and [M, D] on one device, none of the sizes 0."""
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
        if number.numel() != 1:
            raise ValueError(f"{name}: expected one element, got shape {tuple(number.shape)}")
        if not number.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {number.dtype}")
        if number.device != device and number.device.type != "cpu":
            raise ValueError(f"{name}: expected device {device} or cpu, got {number.device}")
    elif not isinstance(number, (int, float)):
        raise TypeError(f"{name}: expected a float or a tensor of one element, got {type(number).__name__}")


def check_indices(name: str, indices: Tensor, length: int) -> None:
    """An int64 tensor [length]; what its values may be is the op's own matter."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name}: expected an int64 tensor, got {type(indices).__name__}")
    if indices.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {indices.dtype}; use {name}.long()")
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


def in_one_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where it is on and they are not float64; otherwise as they are, of one dtype."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        return x.to(dtype), other.to(dtype)
    if x.dtype != other.dtype:
        raise TypeError(f"{other_name}: expected the dtype of {name}, {x.dtype}, got {other.dtype}; cast one of them")
    return x, other


def as_scalar(number: Tensor | float, features: Tensor) -> Tensor:
    """The number as a tensor [] beside the features: float32, or float64 as they are."""
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    if isinstance(number, Tensor):
        return number.reshape(()).to(features.device, dtype)
    return torch.full((), number, dtype=dtype, device=features.device)
