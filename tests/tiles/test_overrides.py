"""Tiles that a file replaces: what it may say, what it says wrong, and that every choice of tiles asks for it."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from mmkernels import info
from mmkernels._tiles import configs, overrides
from mmkernels._tiles.triton import Tile
from mmkernels.beam_search import triton_kernels as beam_search
from mmkernels.divided_attention.triton_kernels import configs as attention
from mmkernels.info_nce import chunked
from mmkernels.retrieval import triton_kernels as retrieval

CPU = torch.device("cpu")
HALF, SINGLE = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch, tmp_path):
    """No file of the machine; what was read before and after is forgotten."""
    monkeypatch.delenv(overrides.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    overrides.forget()
    yield
    overrides.forget()


def named(monkeypatch, tmp_path, table) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    monkeypatch.setenv(overrides.VARIABLE, str(path))
    overrides.forget()


def on(op: str, kernel: str, precision: str = "half", **fields) -> dict:
    return {"interpreter": {op: {kernel: {precision: fields}}}}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("{", "no JSON"),
        ([1], r"expected an object by GPU, got \[1\]"),
        ({"sm_91": {}}, "unknown family 'sm_91': expected one of sm_80"),
        (on("infonce", "forward"), "interpreter: unknown op 'infonce': expected one of info_nce"),
        (on("linear_cross_entropy", "forward"), "'linear_cross_entropy', which takes info_nce's tiles"),
        (on("info_nce", "foward"), "interpreter > info_nce: unknown kernel 'foward': expected one of forward"),
        (on("retrieval", "topk", "tf32x3"), "retrieval > topk: unknown precision 'tf32x3': expected one of half, ieee"),
        (on("divided_attention", "whole_forward-head64", "ieee"), "unknown precision 'ieee': expected one of half"),
        (on("info_nce", "chunked", "all", num_stages=2), "unknown field 'num_stages': expected one of BLOCK_M"),
        (on("siglip", "pairs", BLOCK=64), "siglip > pairs > half: unknown field 'BLOCK': expected one of BLOCK_M"),
        (on("siglip", "pairs", BLOCK_M=96), "BLOCK_M: expected a power of two from 16 to 512, got 96"),
        (on("siglip", "pairs", BLOCK_M=8), "BLOCK_M: expected a power of two from 16 to 512, got 8"),
        (on("siglip", "pairs", num_warps="8"), 'num_warps: expected a power of two from 1 to 16, got "8"'),
        (on("siglip", "pairs", num_stages=True), "num_stages: expected a whole number from 1 to 8, got true"),
        (on("siglip", "pairs", maxnreg=512), "maxnreg: expected a whole number from 24 to 255, got 512"),
        ({"interpreter": {"siglip": {"pairs": 3}}}, "expected an object by precision, got 3"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(monkeypatch, tmp_path, table, said):
    named(monkeypatch, tmp_path, table)
    for _ in range(2):  # an error is no answer to remember
        with pytest.raises(ValueError, match=f"MMKERNELS_TILES: .*tiles.json: .*{said}"):
            configs.choose(HALF)


def test_a_file_that_is_not_there(monkeypatch):
    monkeypatch.setenv(overrides.VARIABLE, "/nowhere/tiles.json")
    with pytest.raises(ValueError, match=r"MMKERNELS_TILES: /nowhere/tiles.json: No such file"):
        configs.choose(HALF)


def test_every_choice_of_tiles_asks_for_the_file(monkeypatch, tmp_path):
    other = {"BLOCK_M": 64, "num_stages": 2}
    table: dict = {"interpreter": {}}
    for op, kernels in overrides.KERNELS.items():
        if op != "beam_search":
            fields = {"num_stages": 2} if op == "divided_attention" else other
            table["interpreter"][op] = {
                kernel: dict.fromkeys(overrides.precisions_of(op, kernel), fields) for kernel in kernels
            }
    table["interpreter"]["info_nce"]["chunked"] = {"all": {"BLOCK_M": 64}}
    table["interpreter"]["beam_search"] = {"step": {"all": {"BLOCK": 128}}}
    named(monkeypatch, tmp_path, table)
    for features in (HALF, SINGLE):
        config, _ = configs.choose(features)
        assert config == configs.Config(*[Tile(64, 32, 32, 4, 2)] * 6)
        assert configs.choose_distillation(features) == configs.DistillationConfig(*[Tile(64, 32, 32, 4, 2)] * 2)
        for op in ("siglip", "triplet"):
            assert configs.choose_tile(op, features)[0] == Tile(64, 32, 32, 4, 2)
        for head in attention.HEADS:
            for masked in (False, True):
                assert {tile.num_stages for tile in attention.choose(features, head, masked)} == {2}
            for kernel in attention.WHOLE:
                whole = attention.choose_whole(kernel, HALF, head, 197, 1.0)
                assert whole is not None
                assert whole["num_stages"] == 2

    assert chunked.tile_on(CPU) == chunked.StripTile(64, 32, 4)

    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **options: launched.append(options)

    for module, name in (
        (retrieval, "positives_kernel"), (retrieval, "ranks_kernel"), (retrieval, "topk_kernel"),
        (retrieval, "entries_kernel"), (beam_search, "scan_kernel"), (beam_search, "sum_kernel"),
        (beam_search, "merge_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Kernel())
    queries = torch.zeros(4, 16)
    retrieval.retrieval_ranks(queries, queries, None)
    retrieval._kept(queries, queries, 2)
    retrieval._kept(queries, queries, 40)
    retrieval._kept_of_strips(queries, queries, 2)
    assert len(launched) == 5
    assert all((of["BLOCK_M"], of["BLOCK_N"], of["num_stages"]) == (64, 32, 2) for of in launched)
    launched.clear()
    beam_search.beam_search_step(torch.zeros(2, 64), torch.zeros(1, 2), None, None, 4, True, False)
    assert launched[0]["BLOCK"] == 128


def test_fields_that_are_not_named_stay(monkeypatch, tmp_path):
    named(monkeypatch, tmp_path, on("info_nce", "grouped_forward", BLOCK_N=64))
    plain = configs.CONFIGS["interpreter"]["half"]
    config, _ = configs.choose(HALF)
    assert config == plain._replace(grouped_forward=plain.forward._replace(block_n=64))
    assert configs.choose(SINGLE)[0] == configs.CONFIGS["interpreter"]["ieee"]


def test_the_tables_have_the_kernels_that_a_file_may_name():
    assert overrides.KERNELS["info_nce"] == (*configs.Config._fields, "chunked")
    assert overrides.KERNELS["distillation"] == configs.DistillationConfig._fields
    assert {op for op, kernels in overrides.KERNELS.items() if "pairs" in kernels} == set(configs._OWN_TILES)
    assert set(overrides._OF_ATTENTION) == set(attention.Config._fields)
    assert set(overrides._WHOLE) == set(attention.WHOLE)
    assert overrides._HEADS == attention.HEADS
    assert set(overrides.FAMILIES) == set(configs.CONFIGS)
    assert set(overrides._OF_PRODUCTS.values()) == set(Tile._fields)
    assert set(overrides._OF_STEPS.values()) == set(beam_search.Tile._fields)


def test_heads_stay_whole_and_both_passes_pack_alike(monkeypatch, tmp_path):
    table = on("divided_attention", "forward-head64", BLOCK_K=32)
    named(monkeypatch, tmp_path, table)
    with pytest.raises(ValueError, match="forward-head64: BLOCK_K is the head's 64"):
        attention.choose(HALF, 64, False)
    assert attention.choose(HALF, 64, True) == attention.CONFIGS["interpreter"]["half", True][64]
    named(monkeypatch, tmp_path, on("divided_attention", "whole_backward-head64", BLOCK_N=256))
    with pytest.raises(ValueError, match="whole_backward-head64: BLOCK_N is a piece of at most 128 keys"):
        attention.choose_whole("whole_backward", HALF, 64, 197, 1.0)
    named(monkeypatch, tmp_path, on("divided_attention", "packed_forward-head64-masked", BLOCK_M=64, BLOCK_N=64))
    with pytest.raises(ValueError, match="BLOCK_M and BLOCK_N are 16, for both passes pack alike"):
        attention.choose(HALF, 64, True)


@pytest.fixture
def a_gpu(monkeypatch):
    """An RTX 4090, as torch tells of it."""
    properties = type("Properties", (), {"shared_memory_per_block_optin": 99 << 10})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return torch.device("cuda", 0)


def test_a_gpu_goes_before_its_family(monkeypatch, tmp_path, a_gpu):
    family = {"retrieval": {"topk": {"half": {"BLOCK_M": 16}}, "pairs": {"half": {"BLOCK_M": 32}}}}
    gpu = {"retrieval": {"topk": {"half": {"BLOCK_M": 128}}}}
    named(monkeypatch, tmp_path, {"sm_80": family, "NVIDIA GeForce RTX 4090": gpu, "NVIDIA L40S": family})
    tile = Tile(64, 64, 32, 8, 3)
    found = {k: overrides.tile_in_use(tile, "retrieval", k, "half", "sm_80", a_gpu) for k in ("topk", "pairs")}
    assert {kernel: of.block_m for kernel, of in found.items()} == {"topk": 128, "pairs": 32}


def test_a_tile_beyond_the_chips_shared_memory(monkeypatch, tmp_path, a_gpu):
    """Two copies of 128 x 64 and 256 x 64 are 98,304 bytes, which fit; three do not."""
    tile = Tile(128, 128, 64, 8, 3)
    named(monkeypatch, tmp_path, {"sm_80": {"siglip": {"pairs": {"half": {"BLOCK_N": 256}}}}})
    assert overrides.tile_in_use(tile, "siglip", "pairs", "half", "sm_80", a_gpu).block_n == 256
    named(monkeypatch, tmp_path, {"sm_80": {"siglip": {"pairs": {"half": {"BLOCK_N": 256, "num_stages": 4}}}}})
    with pytest.raises(ValueError, match=r"siglip > pairs > half: .* at least 147456 bytes of shared .* has 101376"):
        overrides.tile_in_use(tile, "siglip", "pairs", "half", "sm_80", a_gpu)


def test_measured_tiles_are_used_under_their_versions_alone(monkeypatch, caplog, a_gpu):
    tile = Tile(64, 64, 32, 8, 3)
    ours = ("retrieval", "topk", "half", "sm_80", a_gpu)
    assert overrides.tile_in_use(tile, *ours) == tile
    path = overrides.cache_of("NVIDIA GeForce RTX 4090")
    path.parent.mkdir(parents=True)
    rows = {"NVIDIA GeForce RTX 4090": {"retrieval": {"topk": {"half": {"num_warps": 4}}}}}
    path.write_text(json.dumps({"about": overrides.measured_under()} | rows))
    overrides.forget()
    assert overrides.tile_in_use(tile, *ours).num_warps == 4
    assert "NVIDIA GeForce RTX 4090: 1" in overrides.described(a_gpu)
    monkeypatch.setenv(overrides.VARIABLE, "")  # the tables alone
    overrides.forget()
    assert overrides.tile_in_use(tile, *ours) == tile
    assert overrides.described(a_gpu) == "of the package (MMKERNELS_TILES is empty)"
    monkeypatch.delenv(overrides.VARIABLE)
    path.write_text(json.dumps({"about": {"triton": "0.1"}} | rows))
    overrides.forget()
    assert overrides.tile_in_use(tile, *ours) == tile
    assert "run python -m benchmarks.gpu_check --tune again" in caplog.text


def test_replacing_is_undone():
    with overrides.replacing({("siglip", "pairs", "half"): {"BLOCK_N": 64}}):
        assert configs.choose_tile("siglip", HALF)[0].block_n == 64
    assert configs.choose_tile("siglip", HALF)[0].block_n == 32


def test_info_says_which_tiles(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["info"])
    info.main()
    assert "tiles of Triton's kernels: of the package\n" in capsys.readouterr().out
    named(monkeypatch, tmp_path, on("siglip", "pairs", BLOCK_M=64))
    info.main()
    assert "tiles.json (MMKERNELS_TILES): interpreter: 1\n" in capsys.readouterr().out
    named(monkeypatch, tmp_path, "{")
    monkeypatch.setattr(sys, "argv", ["info", "--json"])
    info.main()
    assert "no JSON" in json.loads(capsys.readouterr().out)["tiles"]


def test_nothing_is_read_at_import():
    code = "import mmkernels, mmkernels._tiles.configs"
    wrong = {**os.environ, overrides.VARIABLE: "/nowhere/tiles.json"}
    assert subprocess.run([sys.executable, "-c", code], env=wrong).returncode == 0
