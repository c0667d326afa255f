"""CLIP: images and captions in one space, trained by InfoNCE on drawings of emoji. Run ``python -m models.clip``."""
