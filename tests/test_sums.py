"""The products of eager code beside a GPU kernel (tests/sums.py): each sum is a loop over k."""

import torch
import torch.nn.functional as F

from tests.sums import sums_as_in

D = 4096
# Each 1 is lost where it is added to 2^24 alone, and none where some are added up first, as in a library's blocks.
TERMS = torch.cat([torch.tensor([2.0**24]), torch.ones(D - 2), torch.tensor([-(2.0**24)])])
ROWS, ONES = TERMS.expand(64, D), torch.ones(D, 64)  # a library adds small products in the order of k, too


def gradient(impl):
    """Of a product whose backward pass adds up TERMS."""
    left = torch.ones(1, 5, requires_grad=True)
    with sums_as_in(impl):
        (left @ torch.ones(5, D) * TERMS).sum().backward()
    return left.grad


def test_products_of_every_kind_add_in_the_order_of_k():
    assert (gradient("triton") == 0).all()
    with sums_as_in("triton"):
        assert (ROWS @ ONES == 0).all()
        assert (F.linear(ROWS, ONES.T, torch.full((64,), 0.25)) == 0.25).all()
        assert (ROWS.expand(2, 64, D) @ ONES.expand(2, D, 64) == 0).all()


def test_float64_and_the_other_implementations_are_left_alone():
    assert (gradient("cpu") != 0).all()
    with sums_as_in("triton"):
        assert (ROWS.double() @ ONES.double() == D - 2).all()
