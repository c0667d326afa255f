"""The Triton kernels of divided_attention compiled for GPUs that are not here: no spill, no excess, matrix units."""

import dataclasses
import itertools

from mmkernels.divided_attention.layout import AVERAGED, GLOBAL
from mmkernels.divided_attention.triton_kernels.configs import MOST_KEYS
from tests.compiling import check, each_form, gpu_bounds, registry

OP = registry.gpu_bounds("divided_attention")
FORMS = OP.cases()
HEAVIEST = set(gpu_bounds.heaviest(FORMS))


def head_of(form) -> int:
    constants = dict(form.constants)
    return constants.get("BLOCK_K", constants.get("HEAD"))


def is_plain(form) -> bool:
    """What TimeSformer runs: bf16, heads of 64, neither mask nor dropout."""
    return OP.is_main(form) and form.dtype == "bf16" and form.has_dot


def is_compiled(form) -> bool:
    """The heaviest form of each tile. fp16 takes what bf16 does, with instructions of other names: a sample of it."""
    constants = dict(form.constants)
    if OP.keys_of(form) not in (0, MOST_KEYS):
        return False
    if constants.get("WIDE"):  # with other addresses: a sample
        largest = constants.get("MASKED", True) and constants.get("CLS", GLOBAL) == GLOBAL
        return form.dtype == "bf16" and head_of(form) == 64 and largest
    if (
        form.kernel.endswith("grad_queries") and constants["CLS"] == AVERAGED
    ):  # has a pass of its own, which GLOBAL has not
        constants["CLS"] = GLOBAL
        form = dataclasses.replace(form, constants=tuple(constants.items()))
    if form.dtype == "fp16":
        sampled = form.kernel in ("packed_backward", "grad_keys", "merge") and head_of(form) == 128
        return sampled and constants.get("CLS", GLOBAL) == GLOBAL and constants.get("MASKED", True)
    return form in HEAVIEST or is_plain(form)


@each_form(filter(is_compiled, FORMS), is_plain)
def test_every_form(form):
    check(form)


def test_forms_follow_the_launchers():
    """A form that the launchers ask for and the list lacks would ship unseen."""
    from mmkernels.divided_attention.triton_kernels import configs

    forms = [form for form in FORMS if form.gpu == "sm_90"]
    for (precision, masked), table in configs.CONFIGS["sm_90"].items():
        for tiles in table.values():
            for name, tile in tiles._asdict().items():
                asked = configs.launch_options(tile) | {"MASKED": masked}
                listed = [
                    dict(form.constants) | {"num_warps": form.num_warps, "num_stages": form.num_stages}
                    for form in forms
                    if (form.kernel, form.precision) == (name, precision)
                ]
                assert any(asked.items() <= options.items() for options in listed), (name, asked)
    kernels = {form.kernel for form in forms}
    tables = {name: configs.WHOLE[line] for name, line in OP.WHOLE_LINES.items() if "sm_90" in configs.WHOLE[line]}
    assert kernels == {*configs.Config._fields, *tables, "cls_sums", "merge"}
    for name, table in tables.items():
        listed = [
            dict(form.constants) | {"num_warps": form.num_warps, "num_stages": form.num_stages}
            for form in forms
            if form.kernel == name
        ]
        for tile, items in itertools.product(table["sm_90"].values(), range(65, configs.MOST_KEYS + 1)):
            asked = configs.whole_options(tile, items)
            assert any(asked.items() <= options.items() for options in listed), items


def test_packed_tiles_fit_together():
    """A packed tile is square, and both passes split sequences into the same groups."""
    from mmkernels.divided_attention.triton_kernels import configs

    for tables in configs.CONFIGS.values():
        for table in tables.values():
            for tiles in table.values():
                forward, backward = tiles.packed_forward, tiles.packed_backward
                assert forward.block_m == forward.block_n == backward.block_m == backward.block_n
