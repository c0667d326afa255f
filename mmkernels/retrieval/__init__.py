"""Exact ranks and best keys of each query; the scores are never stored."""

from mmkernels.retrieval.api import retrieval_ranks, retrieval_topk

__all__ = ["retrieval_ranks", "retrieval_topk"]
