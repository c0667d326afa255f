"""Batched beam search: a fused step, and a loop that keeps a trellis instead of histories."""

from mmkernels.beam_search.api import beam_search, beam_search_step
from mmkernels.beam_search.search import BeamSearchResult
from mmkernels.beam_search.specification import BeamCandidates

__all__ = ["BeamCandidates", "BeamSearchResult", "beam_search", "beam_search_step"]
