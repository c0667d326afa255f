"""TimeSformer: video on divided attention over time and space. Run ``python -m models.timesformer``."""
