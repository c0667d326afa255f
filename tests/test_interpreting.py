"""The interpreter's dot product as the tests run it (tests/interpreting.py): its order, and that kernels take it."""

import numpy as np
import pytest
import torch

from tests.interpreting import INTERPRETED, product_in_order, run_interpreted

triton = pytest.importorskip("triton")

if not INTERPRETED:

    def test_the_dot_product_in_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    import triton.language as tl

    @triton.jit
    def _dot_kernel(x, y, out, SIZE: tl.constexpr):
        tile = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        acc = tl.dot(tl.load(x + tile), tl.load(y + tile), tl.full((SIZE, SIZE), 1.0, tl.float32))
        tl.store(out + tile, acc)

    @triton.jit
    def _sum_kernel(x, y, out):
        tl.store(out, tl.load(x) + tl.load(y))

    def test_a_sum_that_overflows_is_refused():
        largest = torch.tensor([2**31 - 1], dtype=torch.int32)
        out = torch.zeros_like(largest)
        _sum_kernel[(1,)](largest, torch.zeros_like(largest), out)
        assert torch.equal(out, largest)
        with pytest.raises(triton.runtime.errors.InterpreterError, match="int32 overflows"):
            _sum_kernel[(1,)](largest, torch.ones_like(largest), out)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
    def test_a_kernel_adds_in_the_order_of_k(dtype):
        """Each element has the bits of a loop over k. numpy's product, which differs with the processor, is not
        called: it fails here."""
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(16, 16, generator=generator).to(dtype) for _ in range(2))
        out = torch.empty(16, 16)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np, "matmul", None)
            _dot_kernel[(1,)](x, y, out, SIZE=16)
        for row in range(16):
            for column in range(16):
                total = np.float32(1)
                for k in range(16):
                    total += np.float32(x[row, k]) * np.float32(y[k, column])
                assert out[row, column].item() == total

    def test_an_order_that_shows():
        """Another order would keep the 1 or the accumulator's 0.25, and a fused multiply-add the last 2^-24."""
        x = np.float32([[2.0**24, 1.0, -(2.0**24), -1 - 2.0**-11, 1 + 2.0**-12]])
        y = np.float32([[1.0], [1.0], [1.0], [1.0], [1 + 2.0**-12]])
        assert product_in_order(x, y, np.float32([[0.25]])) == 0

    def test_the_place_in_a_tile_does_not_matter():
        generator = np.random.default_rng(0)
        x, y = (generator.standard_normal(shape, np.float32) for shape in ((33, 48), (48, 31)))
        whole = product_in_order(x, y, np.zeros((33, 31), np.float32))
        for row in (0, 7, 32):
            alone = product_in_order(x[row:][:1], y, np.zeros((1, 31), np.float32))
            assert np.array_equal(whole[row:][:1], alone)
