"""The one schedule of all losses over ranks: blocks of rows go round, and what others made of them comes home."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from mmkernels.distributed.ranks import Pending, Ranks

Tensors = tuple[Tensor, ...]

_BLOCK, _PARTS = 0, 16  # tags


class Chunk(NamedTuple):
    """Blocks of an inner circle, joined."""

    tensors: Tensors  # each [rows of the blocks, ...]
    own: slice | None  # which rows are this rank's; None: none are


def tour(
    ranks: Ranks,
    block: Tensors,  # each [own rows, ...]
    rows: Sequence[int],  # of every rank
    visit: Callable[[Chunk], Tensors],
    join: Callable[[Tensors, Tensors], Tensors],
) -> tuple[Tensors, Tensors | None]:
    """Bring the blocks of all ranks to each, and the parts that `visit` made of them home.

    `visit` returns tensors with a row for each row of the chunk. Returns the parts of this rank's rows that it made
    itself, and those of all others, joined in an order that does not change (None: there is no other).

        rank o, step t: holds the block of rank o - t, and sends it on before it visits it: the product hides the way
                        joins what came from rank o - 1 for that block with its own part, and sends it on after it
    """
    outer, inner = ranks.outer, ranks.inner
    width = ranks.inner_size
    rows_of = [rows[first : first + width] for first in range(0, len(rows), width)]
    own: Tensors = ()
    travelling: Pending | None = None
    for step in range(outer.size):
        what = f"passed blocks on in step {step + 1} of {outer.size}"
        here = rows_of[(outer.rank - step) % outer.size]
        before = rows_of[(outer.rank - step - 1) % outer.size][ranks.inner_rank]
        coming = None
        if step + 1 < outer.size:
            coming = outer.shift(block, [(before, *x.shape[1:]) for x in block], what, _BLOCK)
        first = sum(here[: ranks.inner_rank])
        own_rows = slice(first, first + here[ranks.inner_rank])
        chunk = block if inner is None else tuple(inner.gather(x, here, what) for x in block)
        parts = visit(Chunk(chunk, own_rows if step == 0 else None))
        arrived = _home(ranks, parts, here, what)
        if step == 0:
            own = arrived.pop(ranks.inner_rank)
        if travelling is not None:
            arrived.insert(0, travelling.wait())
            travelling = None
        joined: Tensors | None = None
        for part in arrived:
            joined = part if joined is None else join(joined, part)
        if outer.size > 1 and joined is not None:
            travelling = outer.shift(joined, [(before, *x.shape[1:]) for x in joined], what, _PARTS)
        if coming is not None:
            block = coming.wait()
    return own, joined if travelling is None else travelling.wait()


def summed_tour(ranks: Ranks, block: Tensors, rows: Sequence[int], visit: Callable[[Chunk], Tensors]) -> Tensors:
    """What all ranks have made of this rank's rows, added up."""

    def add(a: Tensors, b: Tensors) -> Tensors:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    own, others = tour(ranks, block, rows, visit, add)
    return own if others is None else add(own, others)


def _home(ranks: Ranks, parts: Tensors, rows: Sequence[int], what: str) -> list[Tensors]:
    """What each rank of the inner circle has made of this rank's rows."""
    if ranks.inner is None:
        return [parts]
    return list(zip(*(ranks.inner.home(x, rows, what) for x in parts), strict=True)) or [()] * ranks.inner_size
