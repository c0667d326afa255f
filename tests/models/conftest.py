"""Shared by the model tests: a small synthetic data set and a nano model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from models.clip.model import PRESETS
from models.data import Splits
from models.data.config import DataConfig
from models.data.synthetic import load_synthetic


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps precision and device for the whole process: forget them after each test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def synthetic() -> Splits:
    """The synthetic splits at the nano model's size."""
    return load_synthetic(PRESETS["nano"].vision.image_size)


@pytest.fixture(scope="session")
def emoji_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the drawings of emoji lie once they are rendered, for all the tests that read them."""
    return tmp_path_factory.mktemp("emoji")


@pytest.fixture
def assert_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs a command that must fail with a message in one clear line."""

    def check(main: Callable[[list[str]], int], arguments: list[str], message: str) -> None:
        extra = ["--out", str(tmp_path / "out")] if arguments[0] in ("train", "compare") else []
        assert main([*arguments, *extra]) == 1
        printed = capsys.readouterr().out
        assert message in printed.replace("\n", " ")
        assert "Traceback" not in printed

    return check


@pytest.fixture
def nano_data() -> DataConfig:
    """Synthetic data in small batches."""
    return DataConfig(source="synthetic", stored_size=32, batch_size=32, variant_divisor=1)
