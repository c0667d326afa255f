"""Damaged files are read or refused by name."""

import pytest

from tests.fuzz.files import run_apart, run_case


def test_a_few_damaged_files(tmp_path):
    assert [wrong for seed in range(40) if (wrong := run_case(seed, tmp_path))] == []


@pytest.mark.slow
def test_many_damaged_files():
    assert run_apart(range(1_000_000, 1_000_300)) == []
