"""The sizes at which the CPU kernels of the losses over pairs have their edges, for the cases of each of these ops."""

from collections.abc import Callable
from typing import TypeVar

C = TypeVar("C")
TILE = 256  # the largest tile of the CPU kernels; 64 is the smallest panel


def edges(case: Callable[..., C]) -> list[C]:
    """Cases of N queries, M keys and D features."""
    return [
        case(2, 3, 3, regime="less than a vector"),
        case(63, 63, 64, regime="panel - 1"),
        case(64, 64, 64, regime="panel"),
        case(65, 65, 65, regime="panel + 1, odd D"),
        case(TILE - 1, TILE - 1, 96, regime="tile - 1"),
        case(TILE, TILE, 96, regime="tile"),
        case(TILE + 1, TILE + 1, 100, regime="tile + 1"),
        case(300, 700, 130, regime="more keys than queries"),
        case(130, 130, 513, regime="D past one L1 block"),
        case(70, 90, 2048, regime="widest D, lowest panel"),
        case(300, 320, 1024, regime="rows of 4 KiB are packed"),
    ]
