"""A training run that stops where no checkpoint is, as a killed one does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from models.common.training import Trainer


class StopError(Exception):
    """What stands in for the kill."""


def stop_before(step: int, train: Callable[[], object]) -> None:
    """Call ``train``, and end it before it takes ``step``; torch's generator is left in another state than it had."""
    real = Trainer.train_step

    def watched(trainer: Trainer) -> dict[str, float]:
        if trainer.step == step:
            raise StopError
        return real(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", watched)
        with pytest.raises(StopError):
            train()
    torch.manual_seed(1234)
