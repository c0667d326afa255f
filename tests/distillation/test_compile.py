"""Every Triton kernel of distillation compiled for GPUs that are not here: no spill, no excess, matrix units in use."""

from tests.compiling import check, each_form, gpu_bounds, registry

OP = registry.gpu_bounds("distillation")
FORMS = OP.cases()
HEAVIEST = set(gpu_bounds.heaviest(FORMS))


def is_plain(form) -> bool:
    return form.dtype == "bf16" and OP.is_main(form)


@each_form([form for form in FORMS if form in HEAVIEST or is_plain(form)], is_plain)
def test_every_form(form):
    check(form)
