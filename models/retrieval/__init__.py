"""Retrieval between images and captions in several languages. Run ``python -m models.retrieval``."""
