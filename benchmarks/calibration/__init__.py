"""Kernels whose speed on a GPU is published, for the model of gpu_bounds to be held against."""
