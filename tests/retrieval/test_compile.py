"""Every Triton kernel of retrieval, compiled for GPUs that are not here."""

from tests.compiling import check, each_form, gpu_bounds, registry

FORMS = registry.gpu_bounds("retrieval").cases()
HEAVIEST = set(gpu_bounds.heaviest(FORMS))


def is_plain(form) -> bool:
    return form.dtype == "bf16" and form.kernel in ("ranks_kernel", "topk_kernel") and form in HEAVIEST


@each_form(FORMS, is_plain)
def test_every_form(form):
    check(form)
