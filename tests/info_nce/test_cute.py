"""The CuTe kernel of info_nce: compiled for a Hopper that is not here, its PTX run on the CPU, its machine code read.

No GPU has run it. `nvidia-cutlass-dsl` must be installed.
"""

import functools
import struct

import pytest
import torch

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed")

import mmkernels
from benchmarks.info_nce import cute
from benchmarks.issue_model import sass
from mmkernels.info_nce import cute_kernels
from mmkernels.testing import assert_within_budget, features
from tests import ptx

BF16, FP16 = torch.bfloat16, torch.float16
_LOG2E = 1.4426950408889634
_PLACES = {1: 8, 8: 5}  # of the ring, by slices

built = functools.cache(cute.build)


@functools.cache
def kernel(slices: int, dtype: torch.dtype) -> ptx.Kernel:
    return ptx.Kernel(built(slices, str(dtype).removeprefix("torch.")).ptx)


def log_sum_exps(partials):
    m, z = partials.double()
    top = m.max(0).values
    return (top + torch.log2((z * torch.exp2(m - top)).sum(0))) / _LOG2E


def run(queries, keys, scale, targets, multiprocessors, seed=0):
    """(the rows' log-sum-exps, the columns', the positives' logits)"""
    (N, D), M = queries.shape, len(keys)
    share = cute_kernels.Share.of(N, M, multiprocessors)
    row_shape, col_shape = cute_kernels.partial_shapes(N, M, share)
    row_partials = torch.zeros(row_shape)
    row_partials[0] = -3.0e38
    col_partials, positives = torch.full(col_shape, float("nan")), torch.full((N,), float("nan"))
    memory = ptx.Memory()

    def tensor(x):
        sizes = x.shape[1:] if x.dim() == 3 else ()
        strides = x.stride()[:-1] if x.dim() == 3 else ()
        return struct.pack(f"<Q{len(sizes)}i{len(strides)}Q", memory.add(x), *sizes, *strides)

    tensors = (targets, torch.tensor([scale]), row_partials, col_partials, positives)
    numbers = (*share, N, M)
    params = {5 + i: tensor(x) for i, x in enumerate(tensors)}
    params |= {10 + i: struct.pack("<i", x) for i, x in enumerate(numbers)}
    maps = {0: ptx.Map(queries, cute_kernels.ROWS), 2: ptx.Map(keys, cute_kernels.COLS // cute_kernels.CLUSTER)}
    code = kernel(-(-D // cute_kernels.SLICE), queries.dtype)
    for cluster in range(share.clusters):
        ptx.Cluster(code, cluster, cute_kernels.CLUSTER, 12, params, maps, memory).run(seed + cluster)
    return log_sum_exps(row_partials), log_sum_exps(col_partials), positives.double() / _LOG2E


def check(N, M, D, dtype=BF16, scale=20.0, targets=None, multiprocessors=2, near=0.5, seed=0):
    queries = features(N, D, dtype, seed=seed)
    keys = features(M, D, dtype, seed=seed + 1, like=queries, mean_cosine=near)
    targets = torch.arange(N) if targets is None else targets
    exact = scale * queries.double() @ keys.double().T
    rough = scale * queries.float() @ keys.float().T
    own = torch.arange(N)
    results = run(queries, keys, scale, targets, multiprocessors, seed)
    for name, actual, of in (
        ("rows", results[0], lambda s: torch.logsumexp(s, 1)),
        ("columns", results[1], lambda s: torch.logsumexp(s, 0)),
        ("positives", results[2], lambda s: s[own, targets]),
    ):
        terms = exact.abs().max().item()
        assert_within_budget(actual, of(rough), of(exact), dtype=torch.float32, terms=terms, name=name)
    return results


@pytest.mark.parametrize(
    ("N", "M", "D", "multiprocessors"),
    [
        (1, 1, 8, 2),
        (129, 200, 40, 2),  # edges, and a slice with a tail
        (256, 640, 64, 4),  # rows shared by two clusters, tiles without a positive
        (700, 384, 64, 2),  # more pairs of blocks than clusters: columns are joined in memory
    ],
)
def test_sizes(N, M, D, multiprocessors):
    targets = torch.randint(M, (N,), generator=torch.Generator().manual_seed(1)) if N > M else None
    check(N, M, D, multiprocessors=multiprocessors, targets=targets)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"D": 512},  # slices are freed and filled again while a tile is made
        {"D": 512, "N": 400, "M": 300, "targets": torch.arange(400) % 300, "seed": 3},
        {"D": 64, "dtype": FP16},
        {"D": 64, "scale": 100.0, "near": 0.9},
        {"D": 64, "scale": -30.0},
        {"D": 64, "scale": 3000.0},  # sums of rows and columns below 2^-64 of the warp's
        {"D": 200, "multiprocessors": 6},
    ],
    ids=str,
)
def test_regimes(case):
    check(**{"N": 256, "M": 512, **case})


def test_the_order_of_warps_changes_no_bit():
    one, other = (torch.cat(check(200, 333, 64, multiprocessors=4, seed=0)) for _ in range(2))
    assert torch.equal(one, other)
    queries, keys = features(200, 64, BF16, seed=0), features(333, 64, BF16, seed=1)
    runs = [torch.cat(run(queries, keys, 20.0, torch.arange(200), 4, seed)) for seed in (0, 7)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("where", ["queries", "keys"])
def test_nan_stays(where):
    inputs = {"queries": features(130, 64, BF16, seed=0), "keys": features(260, 64, BF16, seed=1)}
    inputs[where][5, 7] = float("nan")
    rows, columns, _ = run(inputs["queries"], inputs["keys"], 20.0, torch.arange(130), 2)
    of_rows, of_columns = ([5], slice(None)) if where == "queries" else (slice(None), [5])
    assert rows[of_rows].isnan().all()
    assert columns[of_columns].isnan().all()


@pytest.mark.parametrize("slices", [1, 8])
def test_machine_code(slices):
    """No spills, and the product of a tile goes on while the other tile's statistics are made."""
    cubin = built(slices).cubin
    code = sass.read(cubin).instructions
    assert not [i for i in code if i.name in ("LDL", "STL")]
    products, waits = (sum(i.opcode.startswith(name) for i in code) for name in ("HGMMA", "WARPGROUP.DEPBAR"))
    assert products == 3 * 4 * slices  # of the first tile, and of two in turn
    assert waits <= 3 * slices  # ptxas waits after every one where it sees a hazard
    if slices == 8:
        prediction = cute.predict(cubin, slices, cute.places(slices))
        assert prediction.main.instructions <= 1016
        assert prediction.tflops >= 630


def test_places_are_the_kernels():
    assert {slices: cute_kernels.Forward(slices).stages for slices in _PLACES} == _PLACES
    assert {slices: cute.places(slices) for slices in _PLACES} == _PLACES


def test_it_is_refused_where_it_cannot_run():
    x = torch.zeros(4, 8, dtype=BF16)
    with pytest.raises(RuntimeError, match=r"impl='cute' cannot run(.|\n)*cute: no NVIDIA GPU is visible"):
        mmkernels.info_nce(x, x, 1.0, impl="cute")
    meta = x.to("meta")
    assert mmkernels.info_nce(meta, meta, 1.0, impl="cute").shape == ()
    for options, what in (
        ({"symmetric": False}, "symmetric=False"),
        ({"query_groups": torch.zeros(4).long().to("meta"), "key_groups": torch.zeros(4).long().to("meta")}, "groups"),
    ):
        with pytest.raises(RuntimeError, match=f"impl='cute' cannot take {what}"):
            mmkernels.info_nce(meta, meta, 1.0, impl="cute", **options)
    wide = torch.zeros(4, 513, dtype=BF16, device="meta")
    with pytest.raises(RuntimeError, match="513 features, more than 512"):
        mmkernels.info_nce(wide, wide, 1.0, impl="cute")
    with pytest.raises(RuntimeError, match="takes bfloat16 and float16"):
        mmkernels.info_nce(meta.float(), meta.float(), 1.0, impl="cute")
