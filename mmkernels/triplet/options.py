"""The arguments of triplet beside features."""

from typing import NamedTuple


class Options(NamedTuple):
    """In the order of the registered ops."""

    margin: float
    mining: str
    symmetric: bool
