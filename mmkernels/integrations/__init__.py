"""Drop-ins for what users already run."""
