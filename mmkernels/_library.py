"""How every op is registered with torch: its schema, its fake kernel, its FLOPs and, for Triton, its launcher."""

import functools
import hashlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmkernels._flops import register_flops

library = torch.library.Library("mmkernels", "FRAGMENT")
_compiled: list[str] = []  # the schemas that C++ implements
# The module of an op's package whose functions a backend in Python runs, and the devices of its tensors. On a CPU
# Triton's interpreter runs them.
_IN_PYTHON = {
    "triton": ("triton_kernels", ("CUDA", "CPU")),
    "chunked": ("chunked", ("CUDA", "CPU")),
    "cute": ("cute_kernels", ("CUDA",)),
}


def define(schema: str, *, compiled: bool) -> None:
    """Define an op; `compiled`: C++ implements it."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if compiled:
        _compiled.append(schema)


def fingerprint() -> str:
    """Stands for all schemas that C++ implements.

    setup.py writes it into the compiled library. A library with another one was built from other sources, and torch
    ends the process when it loads kernels whose arguments are not those of their schema.
    """
    return f"mmkernels-schemas-{hashlib.sha256(chr(10).join(sorted(_compiled)).encode()).hexdigest()}"


def register(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    package: str,
    backends: Sequence[str] = ("cpu", "triton"),
    flops: Callable[..., int] | None = None,
) -> dict[str, Any]:
    """Define one op for each backend, and how it runs under Triton. Returns {backend: the op}.

    Args:
        name: the op's name with {} in place of the backend: "info_nce_{}_forward".
        schema: arguments and results, in torch's schema language: "(Tensor x) -> Tensor".
        fake: the same call on tensors without data, for torch.compile: allocates what the op returns.
        package: the op's package. A backend's module there (`_IN_PYTHON`) has a function that is named as the op
            without the backend ("info_nce_forward") and takes the same arguments.
        backends: those that have the op. C++ registers the kernels of "cpu" and "cuda" when it is loaded.
        flops: the same call on shapes, for torch's FlopCounterMode; None: no matrix product stands in the eager lines.

    An autograd.Function calls the op: that costs 5.3 us per call on a CPU, and torch's own register_autograd 10.2 us.
    """
    for backend in backends:
        define(name.format(backend) + schema, compiled=backend in ("cpu", "cuda"))
        torch.library.register_fake(f"mmkernels::{name.format(backend)}", fake, lib=library)
        if flops is not None:
            register_flops(getattr(torch.ops.mmkernels, name.format(backend)), flops)

        if backend in _IN_PYTHON:
            module, keys = _IN_PYTHON[backend]
            for key in keys:
                library.impl(name.format(backend), _launch(f"{package}.{module}", name.replace("_{}", "")), key)
    return {backend: getattr(torch.ops.mmkernels, name.format(backend)).default for backend in backends}


def _launch(module: str, function: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        return getattr(_imported(module), function)(*args)

    return launch


def register_everywhere(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int] | None = None
) -> Any:
    """Define an op that is Python on every device. Returns the op; arguments as those of `register`."""
    define(name + schema, compiled=False)
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mmkernels::{name}", fake, lib=library)
    if flops is not None:
        register_flops(getattr(torch.ops.mmkernels, name), flops)
    return getattr(torch.ops.mmkernels, name).default


@functools.cache
def _imported(module: str) -> Any:
    # Triton is imported by the first call that runs it, so that importing mmkernels imports torch alone.
    return importlib.import_module(module)
