"""What a checkpoint holds of a run: weights, their average, the optimiser's moments, the random states of all ranks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.common.engine import Engine
from models.common.sharding import local, placed, whole


class WeightAverage:
    """An exponential moving average of parameters and buffers, which forgets faster at the start."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards the model's present weights."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = [(self.state[name], value) for name, value in model.state_dict().items()]
        floating = [(a, b) for a, b in pairs if a.is_floating_point()]
        torch._foreach_lerp_([local(a) for a, _ in floating], [local(b) for _, b in floating], weight)
        for a, b in pairs:
            if not a.is_floating_point():
                a.copy_(b)


@dataclass
class TrainState:
    """What changes as a run goes on."""

    engine: Engine
    model: nn.Module
    average: WeightAverage | None
    optimizer: torch.optim.Optimizer

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, on rank 0; the others hand in their random states, and get none."""
        found: dict[str, Tensor] = {}
        for key, x in self._named():
            x = self.whole(key.rpartition("/")[2], x.detach())
            if self.engine.is_first:
                found[key] = x.cpu()
        for name, state in _random_states().items():
            of_ranks = self.engine.of_ranks(state) if self.engine.group is not None else None
            if self.engine.is_first:
                found[f"rng/{name}"] = state
            if of_ranks is not None:
                found[f"rng/{name}_of_ranks"] = of_ranks
        return found

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for name, x in self.model.state_dict().items():
            yield f"model/{name}", x
        if self.average is not None:
            for name, x in self.average.state.items():
                yield f"average/{name}", x
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            for field, x in state.items():
                yield f"optimizer/{field}/{names[parameter]}", x

    def whole(self, name: str, x: Tensor) -> Tensor:
        """What a parameter has or is, as one process holds it; all ranks must call it."""
        x = whole(x)
        return x.squeeze() if name in self.engine.scalars else x

    def metadata(self) -> dict[str, Any]:
        """What is no tensor: the state of Python's and of numpy's generator, how often the average was updated."""
        scaler = self.engine.accelerator.scaler
        return {
            "rng": _other_random_states(),
            "updates": self.average.updates if self.average is not None else 0,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def restore(self, tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Go back to a checkpoint that rank 0 has read, on any number of ranks."""
        weights: dict[str, Tensor] = {}
        random_states: dict[str, Tensor] = {}
        averaged = False
        parameters, state = dict(self.model.named_parameters()), self.model.state_dict()
        for key, x in self.engine.hand_out(tensors):
            head, _, rest = key.partition("/")
            if head == "model":
                weights[rest] = placed(x, state[rest]) if rest in state else x
            elif head == "average" and self.average is not None:
                self.average.state[rest].copy_(placed(x, self.average.state[rest]))
                averaged = True
            elif head == "optimizer":
                field, _, name = rest.partition("/")
                # AdamW keeps its step counter on the CPU and the moments beside the parameter.
                self.optimizer.state[parameters[name]][field] = x if field == "step" else placed(x, parameters[name])
            elif head == "rng":
                random_states[rest] = x
        self.model.load_state_dict(weights)
        if self.average is not None and averaged:
            self.average.updates = metadata["updates"]
        scaler = self.engine.accelerator.scaler
        if metadata["scaler"] is not None and scaler is not None:
            scaler.load_state_dict(metadata["scaler"])
        self._restore_random(random_states, metadata)

    def _restore_random(self, states: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Every rank's generator where it was; where there are as many ranks no more, others than rank 0 draw anew."""
        rank, world = self.engine.rank, self.engine.world
        of_ranks = {name: states.get(f"{name}_of_ranks") for name in ("torch", "cuda")}
        alike = {name: x is not None and len(x) == world for name, x in of_ranks.items()}
        own = {name: x[rank] if alike[name] and x is not None else states.get(name) for name, x in of_ranks.items()}
        if own["torch"] is not None:
            torch.set_rng_state(own["torch"])
        if own["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])
        if not alike["torch"]:
            self.engine.draw_apart(metadata["step"])
        _restore_others(metadata["rng"])


def _random_states() -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _other_random_states() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, gauss_next = random.getstate()
    numpy_state = [name, np.asarray(keys).tolist(), position, has_gauss, gauss]
    return {"python": [version, list(internal), gauss_next], "numpy": numpy_state}


def _restore_others(state: Mapping[str, Any]) -> None:
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))  # noqa: NPY002


def differences(here: Mapping[str, Any], there: Mapping[str, Any], above: str = "") -> list[str]:
    """Where two descriptions differ, by the name of the field: "data.batch_size is 64, was 32"."""
    found = []
    for key in sorted(here.keys() | there.keys()):
        one, other = here.get(key), there.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{above}{key}.")
        elif one != other:
            found.append(f"{above}{key} is {_short(one)}, was {_short(other)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
