"""The products of strips in Triton's interpreter, on CPU tensors: both gradients from dS, however it is cut.

tests/conftest.py runs this file in a process of its own, where the interpreter is chosen before Triton is imported.
Every tensor that the kernels read lies between guards of NaN, and every one they allocate starts as NaN.
"""

import pytest
import torch

from mmkernels._tiles import products
from mmkernels._tiles.triton import Chip, Tile
from tests.interpreting import guarded_allocations, guarded_rows

TILE = Tile(32, 32, 32, 4, 1)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
MIB = 1 << 20
H100, A10, MI300X = Chip(132, 50 * MIB), Chip(72, 6 * MIB), Chip(304, 4 * MIB)


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    yield from guarded_allocations(monkeypatch, launches=False)


class Problem:
    """dS, features, and what was asked of `fill`."""

    def __init__(self, N, M, D, dtype):
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(N, M, generator=generator).to(dtype)
        self.queries, self.keys = (guarded_rows(torch.randn(rows, D, generator=generator).to(dtype)) for rows in (N, M))
        self.asked = []

    def fill(self, strip, first_row, first_col):
        height, width = strip.shape
        assert strip.is_contiguous()
        assert height % 32 == width % 32 == 0
        self.asked.append((first_row, first_col, height, width))
        strip.zero_()
        part = self.logits[first_row : first_row + height, first_col : first_col + width]
        strip[: part.shape[0], : part.shape[1]] = part

    def run(self, of_queries=True, num_grad_keys=None, of_scale=False, sums=False, of_rows=False, dtype=None):
        (N, D), M = self.queries.shape, len(self.keys)
        dtype = dtype or self.queries.dtype
        grad_queries = self.queries.new_empty(N, D, dtype=dtype) if of_queries else None
        grad_keys = None if num_grad_keys is None else self.keys.new_empty(num_grad_keys, D, dtype=dtype)
        key_sums = self.keys.new_empty(M, dtype=FP32) if sums else None
        shares = products.gradients_of_both(
            self.fill, padded(self.queries), padded(self.keys), TILE, TILE, "ieee", torch.tensor(0.5),
            grad_queries, grad_keys, of_scale, key_sums, of_rows,
        )  # fmt: skip
        return grad_queries, grad_keys, shares.sum(), key_sums

    def check(self, of_queries=True, num_grad_keys=None, of_scale=False, sums=False, **options):
        results = self.run(of_queries, num_grad_keys, of_scale, sums, **options)
        grad_queries, grad_keys, grad_scale, key_sums = results
        logits, queries, keys = self.logits.double(), self.queries.double(), self.keys.double()
        close(grad_queries, 0.5 * logits @ keys)
        close(grad_keys, 0.5 * (logits.T @ queries)[:num_grad_keys])
        close(grad_scale if of_scale else None, (logits * (queries @ keys.T)).sum())
        close(key_sums, logits.sum(0))


def padded(x):
    """As mmkernels._tiles.launch.aligned pads: rows of whole multiples of 16."""
    copy = x.new_zeros(len(x), -(-x.shape[1] // 16) * 16)
    copy[:, : x.shape[1]] = x
    return guarded_rows(copy)


def close(actual, expected):
    """Within the rounding of the gradient's dtype: sums in float32 add less."""
    if actual is not None:
        atol = torch.finfo(actual.dtype).eps * expected.abs().max().item() + 1e-5 * expected.abs().mean().item()
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=max(atol, 1e-5))


def cut_in_strips(monkeypatch):
    monkeypatch.setattr(products, "_STRIP_BYTES", 1)
    monkeypatch.setattr(products, "_STRIP_ROWS", TILE.block_m)


@pytest.fixture(params=["whole", "strips", "strips and splits", "splits"])
def cut(request, monkeypatch):
    """How dS and the products are cut."""
    if "strips" in request.param:
        cut_in_strips(monkeypatch)
    monkeypatch.setattr(products, "_LEAST_STEPS", 1)
    programs = 100 if "splits" in request.param else 1
    monkeypatch.setattr(products, "chip_of", lambda device: Chip(programs, 32 << 20))
    return request.param


@pytest.mark.parametrize(("N", "M"), [(70, 40), (40, 70)])
def test_every_gradient(N, M, cut):
    problem = Problem(N, M, 16, FP32)
    problem.check(True, M, of_scale=True)
    problem.check(False, M, of_scale=True)
    problem.check(False, None, of_scale=True)
    problem.check(True, M, sums=True)
    problem.check(N > M, M, of_rows=True)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_half_precision(dtype, monkeypatch):
    """The sums of strips stay in float32 until the last, whatever the gradient's dtype; several tiles of features."""
    cut_in_strips(monkeypatch)
    Problem(40, 100, 33, dtype).check(True, 100, of_scale=True)
    Problem(100, 40, 33, dtype).check(True, 40, of_rows=True, dtype=FP32)


def test_the_same_bits_twice(monkeypatch):
    cut_in_strips(monkeypatch)
    problem = Problem(70, 40, 16, FP32)
    for one, two in zip(problem.run(True, 40, True), problem.run(True, 40, True), strict=True):
        assert one is two is None or torch.equal(one, two)


@pytest.mark.parametrize(("N", "M"), [(40, 100), (100, 70)])
def test_gradients_of_the_first_keys(N, M, cut):
    """A queue after the keys takes none; the scale's gradient is that of all."""
    problem = Problem(N, M, 16, FP32)
    problem.check(True, 50, of_scale=True)
    problem.asked.clear()
    problem.run(False, 50)
    assert all(first_col < 64 for _, first_col, _, _ in problem.asked), "a strip without a gradient was filled"


def test_a_strip_is_filled_once_for_both_gradients(cut):
    problem = Problem(70, 40, 16, FP32)
    problem.run(True, 40)
    covered = torch.zeros(96, 64)
    for first_row, first_col, height, width in problem.asked:
        covered[first_row : first_row + height, first_col : first_col + width] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("chip", [H100, A10, MI300X], ids=["H100", "A10", "MI300X"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_size_of_strips(chip, itemsize):
    for of_columns in (False, True):
        for rows, cols in (
            (1, 1),
            (256, 256),
            (2048, 2048),
            (2500, 4096),
            (32768, 32768),
            (256, 1 << 20),
            (1 << 18,) * 2,
        ):
            strips = products._strips(rows, cols, itemsize, of_columns, 128, chip)
            length, other = (cols, rows) if of_columns else (rows, cols)
            along, across = (strips.width, strips.height) if of_columns else (strips.height, strips.width)
            assert strips.of_columns == of_columns
            assert along % 128 == across % 128 == 0
            assert 0 <= across - other < 128
            assert 0 < along < length + 128
            assert along * across * itemsize <= max(products._STRIP_BYTES, 128 * across * itemsize)
            if along < length:  # deep enough to earn the sums over strips, or as large as a strip may be
                assert 2 * along > 2048 or 4 * along * across * itemsize > products._STRIP_BYTES
    if chip is H100 and itemsize == 2:
        assert products._strips(2048, 2048, 2, False, 128, chip).height == 2048
        assert products._strips(32768, 32768, 2, False, 128, chip).height == 2048


def test_splits_fill_the_multiprocessors():
    assert products._splits(32, 512, 132) == 4  # 2,048 rows of 512 features, a strip of 32,768
    assert products._splits(4, 4, 132) == 1  # too shallow
    assert products._splits(512, 32, 132) == 1  # there are enough programs
