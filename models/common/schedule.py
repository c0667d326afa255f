"""How long a run trains, how fast, and in which precision."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

Precision = Literal["auto", "no", "bf16", "fp16"]
Sharding = Literal["none", "fsdp"]


@dataclass
class TrainConfig:
    """How to train; a field with a description is an option of every command that trains.

    ``minutes`` ends the run in time whatever the machine: the learning rate then follows the share of the time that is
    gone, where that is larger than the share of the steps. Leave it at None for a run that must repeat exactly.
    """

    steps: int = field(default=1000, metadata={"help": "Optimiser steps.", "min": 1})
    minutes: float | None = field(
        default=None, metadata={"help": "End in this time, the decay of the rate fitted to it."}
    )
    accumulate: int = field(default=1, metadata={"help": "Batches of an optimiser step.", "min": 1})
    lr: float = field(default=1e-3, metadata={"help": "Largest learning rate.", "min": 0})
    final_lr: float = 0.01  # the share of lr at the end
    warmup: int = field(default=50, metadata={"help": "Steps in which the learning rate rises.", "min": 0})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of the matrices.", "min": 0})
    beta2: float = 0.98
    clip: float = field(default=1.0, metadata={"help": "Largest norm of the gradient.", "min": 0})
    ema: float = field(default=0.0, metadata={"help": "Decay of the weight average; 0: none.", "min": 0, "max": 1})
    precision: Precision = field(default="no", metadata={"help": "Mixed precision."})
    sharding: Sharding = field(
        default="none", metadata={"help": "What the ranks hold: all weights each (DDP), or a part each (FSDP2)."}
    )
    checkpoint_activations: bool = field(
        default=False,
        metadata={"help": "Compute Transformer blocks again in the backward pass.", "name": "--checkpoint-activations"},
    )
    checkpoint_every: int = field(default=200, metadata={"help": "Steps between checkpoints.", "min": 1})
    keep: int = 2
    log_every: int = 10
    seed: int = field(default=0, metadata={"help": "Seed of weights and batches."})
    timeout: float = field(
        default=600, metadata={"help": "Seconds after which a process that waits for another gives up.", "min": 1}
    )


def pick_precision(choice: Precision) -> Literal["no", "bf16", "fp16"]:
    """The precision of a run; "auto" is bf16 where the processor multiplies it in hardware, else full precision."""
    if choice != "auto":
        return choice
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "no"


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Linear warm-up over ``warmup`` steps, then half a cosine over ``progress`` from 0 to 1."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * warm * (config.final_lr + (1 - config.final_lr) * cosine)
