"""Sums over ranks of rows that have ids: each rank gets those of its own ids."""

import torch
from torch import Tensor

from mmkernels.distributed.ranks import Ranks
from mmkernels.distributed.tour import Chunk, Tensors, summed_tour


def sum_by_index(values: Tensor, index: Tensor, count: int) -> Tensor:
    """[count, C]: the sums of the rows of values [n, C] by their index; the same bits from run to run on a GPU, too."""
    return torch.ops.aten.embedding_dense_backward(values, index, count, -1, False)


def sums_by_id(ids: Tensor, values: Tensor, ranks: Ranks) -> Tensor:
    """[n, C] float32: for each own id [n] the sum of the values [n, C] that all ranks have for it.

    The ids of a rank go round; each rank adds its sums for them, and they come home.
    """
    known, places = ids.unique(return_inverse=True)
    table = sum_by_index(values, places, len(known)).float()

    def visit(chunk: Chunk) -> Tensors:
        (asked,) = chunk.tensors
        at = torch.searchsorted(known, asked).clamp(max=len(known) - 1)
        return (torch.where((known[at] == asked)[:, None], table[at], 0.0),)

    counts = ranks.gather_equal(torch.tensor(len(known), device=ids.device)).tolist()
    (sums,) = summed_tour(ranks, (known,), counts, visit)
    return sums[places]
