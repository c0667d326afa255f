"""Options of the command line, made from the fields of dataclasses: a value is described once, where it is declared.

A field that has a "help" in its metadata is an option; the metadata may also hold "min", "max" and "name" (the
option's spelling, where it is not the field's name)::

    @dataclass
    class TrainConfig:
        steps: int = field(default=1000, metadata={"help": "Optimiser steps.", "min": 1})

    @app.command()
    @options
    def train(schedule: TrainConfig = TrainConfig(steps=300)) -> None: ...

This command has an option ``--steps`` with the default 300, and its function receives a whole TrainConfig.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from models.data.sets import BadDataPolicy

ON_BAD_DATA = {"help": "Skip files that cannot be read, with a count, or stop."}
MODEL_SIZE = typer.Option(help="Model size.")
LOSS = typer.Option(help="Implementation of the loss.")
PATIENCE = typer.Option(min=1, help="Stop after so many evaluations without a better score.")
_TRAINED = "A run folder or a checkpoint file."
Checkpoint = Annotated[Path, typer.Argument(help=_TRAINED)]
Trained = Annotated[Path, typer.Option(help=_TRAINED)]
Smoothing = Annotated[float, typer.Option(min=0, max=1, help="Label smoothing.")]
Compile = Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")]
Top = Annotated[int, typer.Option(min=1, help="How many to show.")]


@dataclass(frozen=True)
class RunOptions:
    """Where a training run lies, and how it starts."""

    out: Path = field(metadata={"help": "Run folder: checkpoints, logs, pictures."})
    on_bad_data: BadDataPolicy = field(default="skip", metadata=ON_BAD_DATA)
    resume: Literal["auto", "never"] = field(
        default="auto", metadata={"help": "Go on from the run folder's checkpoints, or not."}
    )
    cpu: bool = field(default=False, metadata={"help": "Use the CPU even where there is a GPU.", "name": "--cpu"})


@dataclass(frozen=True)
class EvalOptions:
    """What a run is evaluated on, and where its report goes."""

    data: str = field(default="", metadata={"help": "Evaluate on other data than the run was trained on."})
    out: Path | None = field(default=None, metadata={"help": "Where report and pictures go; default: the run folder."})
    validation: bool = field(
        default=False, metadata={"help": "The validation set, not the test sets.", "name": "--validation"}
    )
    on_bad_data: BadDataPolicy = field(default="skip", metadata=ON_BAD_DATA)

    def folder(self, checkpoint: Path) -> Path:
        """The folder of the report: ``out``, or the run's own."""
        return self.out or (checkpoint if checkpoint.is_dir() else checkpoint.parent)


class Only:
    """The fields that are options of a command, named in an annotation: ``Annotated[TrainConfig, Only("lr")]``."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def keeps(self, name: str) -> bool:
        """Whether a field is an option."""
        return name in self.names


class Without(Only):
    """The fields that are no options of a command, named in an annotation."""

    def keeps(self, name: str) -> bool:
        """Whether a field is an option."""
        return name not in self.names


def split_commas(text: str) -> tuple[str, ...]:
    """The words of a list with commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def options(command: Callable[..., None]) -> Callable[..., None]:
    """The same command, with an option for each described field of every parameter whose type is a dataclass.

    The parameter's default holds the defaults of the options, and keeps the fields that are no options. A tuple of
    texts is one text with commas.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    read: dict[str, Callable[[Any], Any]] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if not (isinstance(kind, type) and is_dataclass(kind)):
            parameters.append(parameter.replace(annotation=hint))
            continue
        selection = next((extra for extra in extras if isinstance(extra, Only)), Without())
        described = dict(_described(kind))
        if unknown := [name for name in selection.names if name not in described]:
            raise ValueError(f"{kind.__name__} has no described field {', '.join(unknown)}")
        chosen = {name: metadata for name, metadata in described.items() if selection.keeps(name)}
        groups[parameter.name] = parameter.default, list(chosen)
        kinds = get_type_hints(kind)
        for name, metadata in chosen.items():
            value, own_kind = getattr(parameter.default, name), kinds[name]
            if own_kind == tuple[str, ...]:
                value, own_kind, read[name] = ",".join(value), str, split_commas
            annotation = Annotated[own_kind, _option(metadata)]  # type: ignore[valid-type]
            parameters.append(parameter.replace(name=name, default=value, annotation=annotation))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        values = {name: read[name](value) if name in read else value for name, value in given.items()}
        whole = {
            group: replace(default, **{name: values.pop(name) for name in names})
            for group, (default, names) in groups.items()
        }
        command(**whole, **values)

    # typer reads the options from these two.
    signature = inspect.Signature([parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _described(kind: type) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The fields of a dataclass that are options; a subclass that changes a default keeps the description."""
    for own in fields(kind):
        inherited = (vars(base).get("__dataclass_fields__", {}).get(own.name) for base in kind.__mro__)
        metadata = next((found.metadata for found in inherited if found and "help" in found.metadata), None)
        if metadata is not None:
            yield own.name, metadata


def _option(metadata: Mapping[str, Any]) -> Any:
    names = (metadata["name"],) if "name" in metadata else ()
    limits = {key: metadata[key] for key in ("min", "max") if key in metadata}
    return typer.Option(*names, help=metadata["help"], **limits)
