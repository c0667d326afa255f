"""The arguments of triplet beside features."""

from typing import NamedTuple


class Options(NamedTuple):
    """The order is that of the registered ops."""

    margin: float
    mining: str
    symmetric: bool
