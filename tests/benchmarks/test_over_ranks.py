"""The cost over ranks: the model's sums, its fit, and the memory that was measured."""

import json

import pytest

for package in ("matplotlib", "rich", "triton"):
    pytest.importorskip(package)

from benchmarks.over_ranks import report
from benchmarks.over_ranks.cost import H100, hiding_rows, matrices_of, memory_of, time_of
from benchmarks.over_ranks.measure import SHAPES, SIZES, TERMS, amounts, fit, fitted
from benchmarks.report import NUMBERS, ROOT

MEASURED = json.loads((ROOT / NUMBERS / "over_ranks.json").read_text())["results"]


def test_products_are_the_same_in_every_schedule():
    for outer, inner in ((64, 1), (8, 8), (1, 64)):
        assert time_of(4096, 512, outer, inner).products == pytest.approx(4 * 2 * 4096 * 2**18 * 512 / H100.flops)


def test_a_ring_hides_its_transfers_from_some_rows_on():
    free = H100._replace(visit=0.0)
    for world, rate in ((8, H100.nvlink), (64, H100.nic)):
        rows = hiding_rows(rate)
        above, below = (time_of(round(factor * rows), 512, world, 1, free) for factor in (1.1, 0.9))
        assert above.exposed == pytest.approx(0, abs=1e-12)
        assert below.exposed > 0.05 * below.products


def test_steps_by_hand():
    """4,096 GPUs with 1,024 rows of 512: a block in 2 bytes forward and 2 + 4 backward through a card."""
    n, d = 1024, 512
    hops = n * (2 * d + 8) / 50e9 + n * (2 * d + 12 + 4 * d) / 50e9
    assert time_of(n, d, 4096, 1).total == pytest.approx(4096 * (hops + 2 * 60e-6))
    far = 4088 * n * (8 + 4 * d) / 50e9
    gather = 4095 * n * (2 * d + 2 * d + 12) / 400e9
    products = 4 * 2 * n * n * 4096 * d / 400e12
    latency = 2 * (60e-6 + 2 * 512 * 20e-6)
    assert time_of(n, d, 1, 4096).total == pytest.approx(products + gather + far + latency)


def test_a_fit_finds_the_terms_that_made_the_numbers():
    terms = dict(zip(TERMS, (1e-11, 2e-3, 3e-3, 1e-9, 5e-4), strict=True))
    sizes = [(n, d, *shape) for shape in SHAPES for n, d in SIZES]
    rows = [
        {"n": n, "d": d, "outer": outer, "inner": inner, "seconds": fitted(terms, n, d, outer, inner)}
        for n, d, outer, inner in sizes
    ]
    assert fit(rows) == pytest.approx(terms)
    without = dict(terms, byte=-1e-9)  # no time is negative
    rows = [row | {"seconds": fitted(without, *size)} for row, size in zip(rows, sizes, strict=True)]
    assert min(fit(rows).values()) == 0
    assert amounts(8, 4, 1, 1)[1:4] == [0, 0, 0]


def test_the_fit_and_the_memory_are_near_what_was_measured():
    terms = fit(MEASURED)
    large = [row for row in MEASURED if row["n"] * row["d"] >= 2**19]
    assert len(large) == 2 * len(SHAPES)
    for row in large:
        size = row["n"], row["d"], row["outer"], row["inner"]
        assert fitted(terms, *size) == pytest.approx(row["seconds"], rel=0.16)
        if row["outer"] * row["inner"] > 1:
            assert memory_of(*size, e=4) == pytest.approx(row["bytes"], rel=0.12)


def test_published_figures_follow_from_the_matrices():
    for world, published in report.PUBLISHED.items():
        for who in ("CLIP", "open_clip"):
            for total, stated in published[who].items():
                assert matrices_of(who, total // world, world) / 1e9 == pytest.approx(stated, rel=0.08, abs=0.2)
        for total, stated in published["Inf-CL"].items():
            assert memory_of(total // world, report.PUBLISHED_WIDTH, world, 1) / 1e9 < stated
