"""Divided space-time attention where the tokens lie: nothing is rearranged, no probability is stored."""

from mmkernels.divided_attention.api import divided_attention, divided_attention_maps
from mmkernels.divided_attention.drop_path import drop_frames, drop_positions

__all__ = ["divided_attention", "divided_attention_maps", "drop_frames", "drop_positions"]
