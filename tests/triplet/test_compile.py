"""Every Triton kernel of triplet compiled for GPUs that are not here: no spill, no excess, matrix units in use."""

from tests.compiling import check, each_form, registry

FORMS = registry.gpu_bounds("triplet").cases()


def is_plain(form) -> bool:
    """bf16, both directions; the products are info_nce's but for the dtype that they store."""
    plain = form.dtype == "bf16" and form.has_dot and form.kernel != "product_kernel"
    return plain and dict(form.constants).get("SYMMETRIC", True)


# All: under Triton 3.6 a form without semi-hard negatives spilled, and the heavier one with them did not.
@each_form(FORMS, is_plain)
def test_every_form(form):
    check(form)
