"""Runs a function on several ranks of a gloo group, each a process of its own that a test can lose."""

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mmkernels", "mmkernels.integrations.open_clip", "torch.distributed.device_mesh"])


class Lost(NamedTuple):
    """A rank that ended without a result."""

    exit_code: int | None


def on_ranks(
    shape: tuple[int, ...],
    function: Callable[..., Any],
    *arguments: Any,
    seconds: float = 60,
    timeout: float = 30,
    context: Any = CONTEXT,
) -> list[Any]:
    """function(group, rank, *arguments) on each rank of a group, or of a mesh of two dimensions; what each returned.

    An exception is returned in its place, and Lost where the process ended or was still there after `seconds`. No
    process is left. ``timeout`` is that of the group, in seconds. A ``context`` that spawns takes this process's
    environment over.
    """
    world = int(torch.tensor(shape).prod())
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(world):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run,
                args=(theirs, rank, shape, timeout, f"file://{Path(folder) / 'store'}", function, arguments),
            )
            process.start()
            theirs.close()
            ends.append(mine)
            processes.append(process)
        deadline = time.monotonic() + seconds
        try:
            return [_result(end, process, deadline) for end, process in zip(ends, processes, strict=True)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def results(*arguments: Any, **options: Any) -> list[Any]:
    """Those of on_ranks; fails if there is none of a rank."""
    found = on_ranks(*arguments, **options)
    for rank, result in enumerate(found):
        assert not isinstance(result, (Exception, Lost)), f"rank {rank}: {result!r}\n{getattr(result, 'text', '')}"
    return found


def _result(end: Connection, process: Any, deadline: float) -> Any:
    if end.poll(max(0.0, deadline - time.monotonic())):
        try:
            return pickle.loads(end.recv_bytes())
        except EOFError:
            process.join()
    return Lost(process.exitcode)


def _run(
    end: Connection, rank: int, shape: tuple[int, ...], timeout: float, store: str, function: Any, arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(int(torch.tensor(shape).prod()))}
    try:
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=int(os.environ["WORLD_SIZE"]),
            timeout=datetime.timedelta(seconds=timeout),
        )  # fmt: skip
        group: Any = dist.group.WORLD
        if len(shape) > 1:
            group = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner"))
        result = function(group, rank, *arguments)
    except Exception as error:
        error.text = traceback.format_exc()  # type: ignore[attr-defined]
        result = error
    end.send_bytes(pickle.dumps(result))  # torch would share its memory, which ends with this process
    end.close()
    dist.destroy_process_group()
