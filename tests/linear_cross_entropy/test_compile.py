"""Every Triton kernel of linear_cross_entropy that info_nce does not have, compiled for GPUs that are not here."""

from tests.compiling import check, each_form, gpu_bounds, registry

FORMS = registry.gpu_bounds("linear_cross_entropy").cases()
HEAVIEST = set(gpu_bounds.heaviest(FORMS))


def is_plain(form) -> bool:
    """bf16, without smoothing."""
    return form.dtype == "bf16" and form.has_dot and not dict(form.constants).get("SMOOTHED")


@each_form([form for form in FORMS if form in HEAVIEST or is_plain(form)], is_plain)
def test_every_form(form):
    check(form)
