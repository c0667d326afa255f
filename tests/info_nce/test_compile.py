"""Every Triton kernel of info_nce compiled for GPUs that are not here: no spill, no excess, matrix units in use."""

from tests.compiling import check, each_form, gpu_bounds, registry

FORMS = registry.gpu_bounds("info_nce").cases()
HEAVIEST = set(gpu_bounds.heaviest(FORMS))


def is_plain(form) -> bool:
    """bf16; symmetric, without smoothing or groups, as users run it most; on one GPU with groups."""
    constants = dict(form.constants)
    if form.dtype != "bf16" or not form.has_dot:
        return False
    if constants.get("GROUPS", False):
        return form.gpu == "sm_90" and form in HEAVIEST
    return constants.get("SYMMETRIC", True) and not constants.get("SMOOTHED") and constants.get("SHARE", True)


@each_form([form for form in FORMS if form in HEAVIEST or is_plain(form)], is_plain)
def test_every_form(form):
    check(form)
