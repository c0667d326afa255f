"""Fusion of images and sounds, either of them noisy. Run ``python -m models.av_fusion``."""
