"""Losses over ranks beside open_clip's, in the same processes by turns: seconds, memory, bytes sent, the ring's share.

python -m benchmarks.over_ranks.open_clip [--loss info_nce | siglip] [--ranks 2] [--rows 8192] [--rounds 3]

Each rank is a process of its own on this machine, joined by gloo. One rank measures the losses of one process.
"""

import contextlib
import functools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: the profiler's own notes

import torch
import torch.distributed as dist
import typer
from torch import Tensor

import mmkernels
from mmkernels.info_nce import ops as info_nce_ops
from mmkernels.siglip import ops as siglip_ops
from mmkernels.testing import features, peak_allocated

SIZE = 512  # features
NUMBERS = {"info_nce": (20.0,), "siglip": (10.0, -10.0)}  # the scale, the bias
Row = dict[str, Any]


def losses_of(name: str, rank: int, ranks: int) -> dict[str, Callable[..., Tensor]]:
    """Ours, and open_clip's in the mode that gives the gradient of the joint batch."""
    from open_clip.loss import ClipLoss, SigLipLoss

    group = dist.group.WORLD if ranks > 1 else None
    if name == "info_nce":
        ours = functools.partial(mmkernels.info_nce, process_group=group)
        return {"mmkernels": ours, "open_clip": ClipLoss(True, True, rank=rank, world_size=ranks)}
    ours = functools.partial(mmkernels.siglip, process_group=group)
    return {"mmkernels": ours, "open_clip": SigLipLoss(rank=rank, world_size=ranks)}


@contextlib.contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds of the calling thread in the products of blocks, and bytes that it sends to other ranks."""
    spent = {"products": 0.0, "sent": 0}
    send = dist.batch_isend_irecv
    tables = (info_nce_ops.forward, info_nce_ops.block_backward, siglip_ops.losses, siglip_ops.gradients_of)
    products = [(table, table["cpu"]) for table in tables]

    def timed(function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.thread_time()
        try:
            return function(*arguments)
        finally:
            spent["products"] += time.thread_time() - start

    def counted(p2p_op_list: list[dist.P2POp]) -> list[dist.Work]:
        spent["sent"] += sum(one.tensor.nbytes for one in p2p_op_list if one.op is dist.isend)
        return send(p2p_op_list)

    for table, function in products:
        table["cpu"] = functools.partial(timed, function)
    dist.batch_isend_irecv = counted
    try:
        yield spent
    finally:
        dist.batch_isend_irecv = send
        for table, function in products:
            table["cpu"] = function


def measure(name: str, rank: int, ranks: int, rows: int, rounds: int, memory: bool) -> dict[str, Row]:
    """Of each loss, forward and backward: medians of CPU seconds and seconds on this rank; bytes held, if asked for."""

    def leaves_of(count: int) -> list[Tensor]:
        leaves = [features(count, SIZE, seed=2 * rank + side).requires_grad_() for side in (1, 2)]
        return leaves + [torch.tensor(number, requires_grad=True) for number in NUMBERS[name]]

    def step(loss: Callable[..., Tensor], leaves: list[Tensor]) -> None:
        torch.autograd.grad(loss(*leaves), leaves)

    losses, leaves = losses_of(name, rank, ranks), leaves_of(rows)
    found: dict[str, Row] = {}
    times: dict[str, list[tuple[float, float, float]]] = {who: [] for who in losses}
    for loss in losses.values():
        step(loss, leaves_of(256))
    for _ in range(rounds):
        for who, loss in losses.items():
            if ranks > 1:
                dist.barrier()
            with watched() as spent:
                cpu, wall = time.process_time(), time.perf_counter()
                step(loss, leaves)
                times[who].append((time.process_time() - cpu, time.perf_counter() - wall, spent["products"]))
            found[who] = {"sent": spent["sent"]}
    for who, of_rounds in times.items():
        cpu, wall, products = map(statistics.median, zip(*of_rounds, strict=True))
        found[who] |= {"cpu": cpu, "wall": wall, "ring": 1 - products / cpu}
    if memory:
        for who, loss in losses.items():
            peak = peak_allocated(functools.partial(step, loss, leaves))
            found[who]["peak"] = peak - sum(leaf.nbytes for leaf in leaves)  # the gradients are the caller's
    return found


def run_rank(end: Any, rank: int, ranks: int, threads: int, store: str, *what: Any) -> None:
    torch.set_num_threads(threads)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    name, *sizes = what
    end.send(measure(name, rank, ranks, *sizes))
    if ranks > 1:
        dist.destroy_process_group()


def of_ranks(ranks: int, threads: int, *what: Any) -> list[dict[str, Row]]:
    """What each rank measured."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(ranks):
            mine, theirs = context.Pipe(duplex=False)
            arguments = (theirs, rank, ranks, threads, f"file://{Path(folder) / 'store'}", *what)
            processes.append(context.Process(target=run_rank, args=arguments))
            processes[-1].start()
            theirs.close()
            ends.append(mine)
        try:
            return [end.recv() for end in ends]
        finally:
            for process in processes:
                process.join()


def bytes_sent(name: str, ranks: int, rows: int) -> int:
    """By the formulas of docs/distributed.md, in float32."""
    keys = rows * SIZE * 4
    statistics_of_keys = rows * (8 + 12) if name == "info_nce" else 0
    return (ranks - 1) * ((3 if name == "info_nce" else 2) * keys + statistics_of_keys)


def main(
    loss: Annotated[str, typer.Option(help="info_nce or siglip.")] = "info_nce",
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    rows: Annotated[int, typer.Option(help="Of each rank.", min=1)] = 8192,
    threads: Annotated[int, typer.Option(help="Of each rank.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    memory: Annotated[bool, typer.Option(help="Record memory too, by one more call of each.")] = True,
) -> None:
    """Measure one loss and print a table."""
    found = of_ranks(ranks, threads, loss, rows, rounds, memory)
    print(f"{loss}, {ranks} ranks x {threads} threads, {rows} rows each, {SIZE} float32 features")
    print("| | CPU s a rank | s | MiB held | MiB sent | CPU time beside the products |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    means = {
        who: {key: statistics.mean(part[who][key] for part in found) for key in row} for who, row in found[0].items()
    }
    for who, row in means.items():
        held = f"{row['peak'] / 2**20:.1f}" if memory else ""
        of_ring = who == "mmkernels" and ranks > 1
        sent, ring = (f"{row['sent'] / 2**20:.2f}", f"{row['ring']:.1%}") if of_ring else ("", "")
        print(f"| {who} | {row['cpu']:.2f} | {row['wall']:.2f} | {held} | {sent} | {ring} |")
    ours, theirs = means["mmkernels"], means["open_clip"]
    print(
        f"times faster: {theirs['cpu'] / ours['cpu']:.2f} in CPU time, {theirs['wall'] / ours['wall']:.2f} by the clock"
    )
    print(f"sent by the formulas of docs/distributed.md: {bytes_sent(loss, ranks, rows) / 2**20:.2f} MiB")


if __name__ == "__main__":
    typer.run(main)
