"""The registry of the benchmarks names every op, and every op's folder holds what the Protocols say."""

import inspect

import pytest

import mmkernels
from benchmarks import registry
from mmkernels._backends import IMPLEMENTATIONS

pytest.importorskip("triton")


def test_every_op_has_its_folder():
    assert set(IMPLEMENTATIONS) == set(registry.OPS)
    assert all(hasattr(mmkernels, name) for name in registry.OPS)


@pytest.mark.parametrize("name", registry.PARTS)
@pytest.mark.parametrize("folder", registry.FOLDERS)
def test_a_folder_holds_what_the_protocol_says(folder: str, name: str):
    """Protocol members by name; a function's parameters by theirs, and more only where they have defaults."""
    module, protocol = registry.part(folder, name), registry.PARTS[name]
    if name == "report":
        pytest.importorskip("matplotlib")
    assert isinstance(module, protocol)
    for function, asked in inspect.getmembers(protocol, inspect.isfunction):
        if function.startswith("_"):
            continue
        found = list(inspect.signature(getattr(module, function)).parameters.values())
        names = list(inspect.signature(asked).parameters)[1:]
        assert [parameter.name for parameter in found[: len(names)]] == names
        assert all(parameter.default is not parameter.empty for parameter in found[len(names) :])


@pytest.mark.parametrize("folder", registry.FOLDERS)
def test_bench_times_ours_beside_a_peer_in_every_cell(folder: str):
    pytest.importorskip("matplotlib")
    cells: dict[str, list[str]] = {}
    for case in registry.report(folder).bench_cases():
        cells.setdefault(case.cell, []).append(case.who)
    for cell, who in cells.items():
        assert "mmkernels" in who, cell
        assert len(set(who)) == len(who) > 1, cell


def test_a_folder_that_lacks_a_part_is_seen():
    assert not isinstance(registry.part("info_nce", "peers"), registry.PARTS["report"])
