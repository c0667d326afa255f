"""Every Triton kernel of siglip that info_nce does not have, compiled for GPUs that are not here."""

from tests.compiling import check, each_form, registry


def is_plain(form) -> bool:
    """bf16, the pass that makes all."""
    constants = dict(form.constants)
    return form.dtype == "bf16" and constants["LOSSES"] and constants["SUMS"] and constants.get("STORE", True)


@each_form(registry.gpu_bounds("siglip").cases(), is_plain)
def test_every_form(form):
    check(form)
