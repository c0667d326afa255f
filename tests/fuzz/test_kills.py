"""Killed runs go on to the weights of a run that nothing stopped."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("model", ["clip", "timesformer", "captioning", "retrieval", "av_fusion"])
def test_a_kill(model):
    """In a process of its own: one that has used threads must not fork."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.kills", "--models", model, "--kills", "1"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
