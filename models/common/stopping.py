"""Early stopping: a run that gets no better ends, and its best weights stay."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from models.common.checkpoint import save_checkpoint
from models.common.console import console
from models.common.runs import BEST, read_history, write_history
from models.common.training import Trainer


@dataclass
class EarlyStopping:
    """Scores the weights to evaluate now and then, keeps the best, and ends a run that gets no better.

    Called after each step (``on_step`` of :meth:`Trainer.fit`). Scores lie in ``validation.jsonl``, the best weights in
    ``best.safetensors``, so that a resumed run goes on with both.
    """

    score: Callable[[dict[str, Tensor]], float]  # scores a state dict; higher is better
    every: int
    patience: int  # evaluations without a better score that end the run

    def start(self, trainer: Trainer) -> None:
        """Read the scores of a resumed run; those beyond its checkpoint will be computed again."""
        self.rows = [row for row in read_history(trainer.run_dir, "validation.jsonl") if row["step"] <= trainer.step]
        trainer.stop = self._over()

    def _over(self) -> bool:
        scores = [row["score"] for row in self.rows]
        return bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= self.patience

    def __call__(self, trainer: Trainer) -> None:
        """Evaluate, if it is time."""
        last = trainer.step >= trainer.config.steps or trainer.progress() >= 1
        if trainer.step % self.every and not last:
            return
        weights = trainer.weights()
        value = self.score(weights)
        best = max((row["score"] for row in self.rows), default=-math.inf)
        if value > best:
            described = {"step": trainer.step, "score": value, "model": trainer.model_config}
            tensors = {f"model/{name}": tensor for name, tensor in weights.items()}
            save_checkpoint(trainer.run_dir / BEST, tensors, described)
        self.rows.append({"step": trainer.step, "score": value})
        write_history(self.rows, trainer.run_dir, "validation.jsonl")
        trainer.stop = self._over()
        note = ", the best so far" if value > best else f" (best {best:.3f})"
        console.print(f"step {trainer.step}: validation {value:.3f}{note}{'; stopped' if trainer.stop else ''}")
