"""A captioner of images, written by beam search. Run ``python -m models.captioning``."""
