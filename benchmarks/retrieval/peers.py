"""What users run today for retrieval: calls (queries, keys, targets) -> ranks or recall; calls (queries, keys, k)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mmkernels

# The packages whose versions a report writes beside its numbers; torch is always there.
PACKAGES = ("faiss-cpu", "torchmetrics")

Ranks = Callable[[Tensor, Tensor, Tensor], Tensor]
Search = Callable[[Tensor, Tensor, int], Any]


def argsort(queries: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
    """open_clip's evaluation: the whole matrix sorted, the target looked up in it."""
    order = torch.argsort(queries @ keys.T, dim=1, descending=True)
    return torch.where(order == targets[:, None])[1]


def counted(queries: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
    """The whole matrix, compared with each query's target: ties are not counted."""
    scores = queries @ keys.T
    return (scores > scores.gather(1, targets[:, None])).sum(1)


def rankers(impl: str = "auto") -> dict[str, Ranks]:
    """The fused call first, then its peers."""
    return {
        "mmkernels": lambda queries, keys, targets: mmkernels.retrieval_ranks(queries, keys, targets, impl=impl),  # type: ignore[arg-type]
        "argsort": argsort,
        "(scores > positive).sum": counted,
        "torch.compile of the sum": torch.compile(counted, dynamic=False),
    }


def torchmetrics_recalls(at: int = 10) -> dict[str, Ranks]:
    """Recall at one K as torchmetrics has it, from a whole matrix of scores; no ranks."""
    from torchmetrics.functional.classification import multiclass_recall
    from torchmetrics.retrieval import RetrievalRecall

    def retrieval_recall(queries: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
        scores = queries @ keys.T
        metric = RetrievalRecall(top_k=at)
        positive = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, targets[:, None], True)
        indexes = torch.arange(len(scores))[:, None].expand_as(scores)
        metric.update(scores.flatten().float(), positive.flatten(), indexes=indexes.flatten())
        return metric.compute()

    def top_k_recall(queries: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
        return multiclass_recall(queries @ keys.T, targets, num_classes=len(keys), average="micro", top_k=at)

    return {
        f"torchmetrics RetrievalRecall(top_k={at})": retrieval_recall,
        f"torchmetrics multiclass_recall(top_k={at})": top_k_recall,
    }


def topk(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk of the whole matrix."""
    return tuple((queries @ keys.T).topk(k, dim=1))  # type: ignore[return-value]


def searches(impl: str = "auto") -> dict[str, Search]:
    """The fused call first, then its peers: those that are installed. faiss takes float32."""
    found: dict[str, Search] = {
        "mmkernels": lambda queries, keys, k: mmkernels.retrieval_topk(queries, keys, k, impl=impl),  # type: ignore[arg-type]
        "torch.topk": topk,
        "torch.compile of it": torch.compile(topk, dynamic=False),
    }
    try:
        import faiss
    except ImportError:
        return found

    def flat(queries: Tensor, keys: Tensor, k: int) -> Any:
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(keys.shape[1])
        index.add(keys.numpy())
        return index.search(queries.numpy(), k)

    found["faiss IndexFlatIP"] = flat
    return found
