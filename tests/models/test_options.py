"""Options made from dataclass fields: what the function receives, what the help says, and how a wrong option ends."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import typer

from models.common.cli import run_app
from models.common.options import Only, Without, options


@dataclass(frozen=True)
class Kitchen:
    """A dataclass with every kind of field."""

    cups: int = field(default=2, metadata={"help": "Cups on the table.", "min": 1})
    tea: Literal["green", "black"] = field(default="green", metadata={"help": "Kind of tea."})
    guests: tuple[str, ...] = field(default=("Ann",), metadata={"help": "Guests, with commas.", "name": "--with"})
    sugar: bool = field(default=False, metadata={"help": "Serve sugar.", "name": "--sugar"})
    secret: int = 7


@dataclass(frozen=True)
class LargeKitchen(Kitchen):
    """A subclass that changes a default and keeps the description."""

    cups: int = 9


DEFAULT, LARGE = Kitchen(cups=3, secret=8), LargeKitchen()


def run(command: object, *arguments: str) -> int:
    app = typer.Typer(add_completion=False)
    app.command()(options(command))  # type: ignore[arg-type]
    return run_app(app, arguments)


def test_the_function_receives_the_whole_dataclass() -> None:
    seen: list[tuple[Kitchen, int]] = []

    def serve(kitchen: Kitchen = DEFAULT, spoons: Annotated[int, typer.Option()] = 1) -> None:
        seen.append((kitchen, spoons))

    assert run(serve) == 0
    assert run(serve, "--cups", "5", "--tea", "black", "--with", "Bob, Eve,", "--sugar", "--spoons", "4") == 0
    assert seen == [(DEFAULT, 1), (Kitchen(5, "black", ("Bob", "Eve"), True, secret=8), 4)]


def test_help_holds_the_descriptions_and_the_commands_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(kitchen: LargeKitchen = LARGE) -> None: ...

    monkeypatch.setenv("COLUMNS", "200")
    assert run(serve, "--help") == 0
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    for words in ("Cups on the table. [default: 9]", "[default: green]", "Guests, with commas. [default: Ann]"):
        assert words in printed
    assert "--no-sugar" not in printed
    assert "secret" not in printed


@pytest.mark.parametrize("model", ["av_fusion", "captioning", "clip", "retrieval", "timesformer"])
def test_every_option_of_a_model_says_what_it_is(model: str) -> None:
    commands = typer.main.get_command(importlib.import_module(f"models.{model}.__main__").app)
    silent = [
        f"{name} {option.name}"
        for name, command in commands.commands.items()  # type: ignore[attr-defined]
        for option in command.params
        if not option.help
    ]
    assert not silent


def test_a_command_may_have_some_of_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    def only(kitchen: Annotated[Kitchen, Only("tea")] = DEFAULT) -> None:
        assert kitchen.cups == 3

    def without(kitchen: Annotated[Kitchen, Without("tea")] = DEFAULT) -> None: ...

    assert run(only, "--tea", "black") == 0
    assert run(only, "--cups", "4") == 2
    assert run(without, "--cups", "4") == 0
    assert run(without, "--tea", "black") == 2
    assert "Traceback" not in capsys.readouterr().err

    def wrong(kitchen: Annotated[Kitchen, Only("coffee")] = DEFAULT) -> None: ...

    with pytest.raises(ValueError, match="Kitchen has no described field coffee"):
        options(wrong)


@pytest.mark.parametrize("arguments", [("--cups", "0"), ("--tea", "red"), ("--milk",)])
def test_a_wrong_option_ends_with_a_message(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    def serve(kitchen: Kitchen = DEFAULT) -> None:
        raise AssertionError("the command must not run")

    assert run(serve, *arguments) == 2
    printed = "".join(capsys.readouterr())
    assert arguments[0] in printed
    assert "Traceback" not in printed
