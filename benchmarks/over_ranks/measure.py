"""CPU seconds and memory of info_nce over 1, 2 and 4 ranks of gloo on one machine, and a fit of the model to them."""

import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

import mmkernels
from benchmarks.over_ranks.cost import PASSES
from mmkernels.testing import peak_allocated

# (outer, inner): a ring of all, a ring of pairs, and all gathered.
SHAPES = ((1, 1), (2, 1), (4, 1), (2, 2), (1, 4))
# (rows of a rank, features): small ones for what a step costs, large ones for products and bytes.
SIZES = ((64, 256), (256, 512), (1024, 512), (512, 2048))
CALLS = 2  # between two looks at the clock
TERMS = ("flop", "step", "exchange", "byte", "call")  # CPU seconds of each


def amounts(n: int, d: int, outer: int, inner: int, e: int = 4) -> list[float]:
    """How much of each term a rank has in forward and backward."""
    flop = sum(2.0 * of_pass.products * n * n * outer * inner * d for of_pass in PASSES)
    moved = outer - 1 + outer * (inner - 1)  # blocks that come, and as many parts that go
    sent = sum(moved * n * (of_pass.block(d, e) + of_pass.parts(d)) for of_pass in PASSES)
    exchanges = 2.0 * outer if inner > 1 else 0.0
    return [flop, 2.0 * (outer - 1), exchanges, sent, 1.0]


def fit(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The seconds of each term that fit the rows with the least squares of relative errors, none below 0."""
    a = np.array([amounts(row["n"], row["d"], row["outer"], row["inner"]) for row in rows])
    seconds = np.array([row["seconds"] for row in rows])
    used = list(range(len(TERMS)))
    while True:
        found, *_ = np.linalg.lstsq(a[:, used] / seconds[:, None], np.ones(len(rows)), rcond=None)
        if (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    return {term: float(found[used.index(i)]) if i in used else 0.0 for i, term in enumerate(TERMS)}


def fitted(terms: dict[str, float], n: int, d: int, outer: int, inner: int) -> float:
    """The model's CPU seconds of a rank."""
    return sum(terms[term] * amount for term, amount in zip(TERMS, amounts(n, d, outer, inner), strict=True))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _worker(rank: int, shape: tuple[int, int], store: str, seconds: float, out: Any) -> None:
    torch.set_num_threads(1)
    world = shape[0] * shape[1]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner"))
    group: Any = mesh if shape[1] > 1 else dist.group.WORLD
    for n, d in SIZES:
        generator = torch.Generator().manual_seed(rank)
        queries, keys = (F.normalize(torch.randn(n, d, generator=generator), dim=1).requires_grad_() for _ in range(2))
        scale = torch.tensor(20.0, requires_grad=True)
        call = _call_of(queries, keys, scale, group)
        call()
        spent: list[float] = []
        until = time.monotonic() + seconds
        while len(spent) < 3 or not _all_over(until):
            dist.barrier()
            before = _cpu_seconds()
            for _ in range(CALLS):
                call()
            spent.append((_cpu_seconds() - before) / CALLS)
        for x in (queries, keys, scale):
            x.grad = None
        found: list[Any] = [None] * world
        dist.all_gather_object(found, (float(np.median(spent)), peak_allocated(call)))
        if rank == 0:
            mean, held = float(np.mean([one for one, _ in found])), max(one for _, one in found)
            out.append({"n": n, "d": d, "outer": shape[0], "inner": shape[1], "seconds": mean, "bytes": held})
    dist.destroy_process_group()


def _call_of(queries: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor, group: Any) -> Callable[[], None]:
    def call() -> None:
        mmkernels.info_nce(queries, keys, scale, process_group=group).backward()

    return call


def _all_over(until: float) -> bool:
    """Whether the time is over on any rank: all must leave the loop in the same turn."""
    over = torch.tensor(float(time.monotonic() > until))
    dist.all_reduce(over, dist.ReduceOp.MAX)
    return bool(over)


def measure(shapes: Sequence[tuple[int, int]] = SHAPES, seconds: float = 0.3) -> list[dict[str, Any]]:
    """A row for each shape of the ranks and each size: CPU seconds of a rank (their mean) and bytes that it holds."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        for shape in shapes:
            out = manager.list()
            store = str(Path(folder) / f"{shape[0]}x{shape[1]}")
            mp.spawn(_worker, (shape, store, seconds, out), nprocs=shape[0] * shape[1])
            rows += out
    return rows
