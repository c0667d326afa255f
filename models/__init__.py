"""Reference models that train and evaluate with mmkernels, run from the repository: ``python -m models.clip``."""
