"""Which implementation of an op can run here, and why another cannot: loads the compiled library, looks for Triton."""

import functools
import importlib
import importlib.util
import logging
import os
from pathlib import Path

import torch

from mmkernels._library import define, fingerprint

logger = logging.getLogger("mmkernels")

# Every op and its implementations, best first: the order in which impl="auto" tries those that are not _BY_NAME.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "info_nce": ("triton", "chunked", "cute", "cpu", "reference"),
    "distillation": ("triton", "cpu", "reference"),
    "divided_attention": ("triton", "cpu", "reference"),
    "siglip": ("triton", "cpu", "reference"),
    "linear_cross_entropy": ("triton", "cpu", "reference"),
    "triplet": ("triton", "cpu", "reference"),
    "retrieval_ranks": ("triton", "cpu", "reference"),
    "retrieval_topk": ("triton", "cpu", "reference"),
    "beam_search": ("cuda", "triton", "cpu", "reference"),
}

# Taken by those alone who ask for them.
_BY_NAME = frozenset(
    {
        "chunked",  # predicted to be slower than "triton"
        "cute",  # no GPU has run it
    }
)

# The instruction set that the CPU kernels run with; the environment variable MMKERNELS_CPU overrides the choice.
define("cpu_variant() -> str", compiled=True)

_REBUILD = "install mmkernels again, or in its repository run: pip install --no-build-isolation -e ."
_COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _load_library() -> str | None:
    """Load the compiled library; None once it is loaded, otherwise why it is not."""
    libraries = sorted(Path(__file__).parent.glob("_C*.so")) + sorted(Path(__file__).parent.glob("_C*.pyd"))
    if not libraries:
        return "the compiled library is missing: mmkernels was installed without a C++ compiler; reinstall with one"
    try:
        if fingerprint().encode() not in libraries[0].read_bytes():
            return f"{libraries[0]} was built from another version of the sources; {_REBUILD}"
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"the compiled library does not load ({error}); rebuild it against torch {torch.__version__}"
    return None


@functools.cache
def _library_lacks(op: str) -> str | None:
    """Why the library that is loaded has no kernels of the op; None if it has them."""
    kernels = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    if any(name.startswith(f"mmkernels::{op}") and "_cpu" in name for name in kernels):
        return None
    return f"the compiled library has no kernels of {op}; {_REBUILD}"


@functools.cache
def _cuda_unavailable() -> str | None:
    reason = _load_library()
    if reason is not None:
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key("mmkernels::beam_search_step_cuda", "CUDA"):
        return "the library was built without a CUDA toolkit; reinstall with nvcc of torch's CUDA release"
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"it needs compute capability 8.0, this GPU has {major}.{minor}"
    return None


def is_older_triton(version: str) -> bool:
    """Whether a Triton is 3.6 or 3.7, under which kernels take more registers than under later ones."""
    return tuple(map(int, version.split(".")[:2])) < (3, 8)


@functools.cache
def _triton_is_too_old() -> str | None:
    """Why this Triton cannot compile for the GPU; None if it can."""
    if torch.version.hip is not None or torch.cuda.get_device_capability()[0] != 10:
        return None
    version = importlib.import_module("triton").__version__
    if is_older_triton(version):
        # Some kernels do not compile for it, and others spill up to 2,032 bytes.
        return f"a GPU of compute capability 10 needs Triton 3.8 or newer (torch 2.14), this is {version}"
    return None


@functools.cache
def _cute_unavailable() -> str | None:
    if importlib.util.find_spec("cutlass") is None:
        return "the package nvidia-cutlass-dsl is not installed"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no NVIDIA GPU is visible to torch"
    if (found := torch.cuda.get_device_capability()) != (9, 0):
        return "it is written for compute capability 9.0, this GPU has {}.{}".format(*found)
    return unavailable("triton")  # which merges the statistics, and makes the gradients


def triton_interprets() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable(impl: str, op: str | None = None) -> str | None:
    """Why `impl` (of `op`) cannot run on this machine at all; None if it can."""
    if impl == "reference":
        return None
    if impl == "cpu":
        return _load_library() or (None if op is None else _library_lacks(op))
    if impl == "cuda":
        return _cuda_unavailable()
    if impl == "cute":
        return _cute_unavailable()
    if impl == "chunked":
        impl = "triton"  # whose kernels pass over the strips
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not triton_interprets():
        return "no GPU is visible to torch (TRITON_INTERPRET=1, set before the start, runs the kernels slowly on a CPU)"
    return None if triton_interprets() else _triton_is_too_old()


def refuses(op: str, impl: str, device_type: str, dtype: torch.dtype, limit: str | None = None) -> str | None:
    """Why `impl` of `op` cannot take tensors of this device and dtype here; None if it can.

    `limit`: why no compiled kernel can take this particular call, or None.
    """
    if impl == "reference":
        return None
    # A meta tensor goes to the fake kernel, whatever this machine has.
    reason = None if device_type == "meta" else unavailable(impl, op)
    if reason is not None or limit is not None:
        return reason or limit
    device = "cpu" if impl == "cpu" or (impl in ("triton", "chunked") and triton_interprets()) else "cuda"
    if device_type not in (device, "meta"):
        return f"it takes {device} tensors, and these are on {device_type}"
    if dtype not in _COMPILED_DTYPES:
        return f"it takes float32, bfloat16 and float16, and these are {dtype}"
    if impl in ("chunked", "cute") and dtype == torch.float32:
        return "it takes bfloat16 and float16, and these are torch.float32"
    return None


def choose(op: str, impl: str, device_type: str, dtype: torch.dtype, limit: str | None = None) -> str:
    """The implementation of `op` to run. "auto" takes the best that can; any other name runs or raises."""
    names = IMPLEMENTATIONS[op]
    if torch._C._are_functorch_transforms_active():
        limit = "torch.func can transform plain torch operations alone"
    if impl == "auto":
        return _choose_auto(op, device_type, dtype, limit)
    if impl not in names:
        raise ValueError(f"impl: expected 'auto' or one of {', '.join(map(repr, names))}, got {impl!r}")
    if refuses(op, impl, device_type, dtype, limit) is None:
        return impl
    reasons = "".join(f"\n  {name}: {refuses(op, name, device_type, dtype, limit) or 'can run'}" for name in names)
    raise RuntimeError(f"mmkernels.{op}: impl={impl!r} cannot run on {device_type} tensors of {dtype}:{reasons}")


# Compiled code takes the choice for a constant. torch.compiler.assume_constant_result sets this same mark, but imports
# torch._dynamo.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _choose_auto(op: str, device_type: str, dtype: torch.dtype, limit: str | None) -> str:
    # "auto" never takes the interpreter: it is far slower than the eager reference.
    names = [n for n in IMPLEMENTATIONS[op] if not (n in _BY_NAME or (n == "triton" and triton_interprets()))]
    chosen = next(name for name in names if refuses(op, name, device_type, dtype, limit) is None)
    logger.debug("%s on %s, %s: %s", op, device_type, dtype, chosen)
    compiled = {"cpu": "cpu", "cuda": "triton"}.get(device_type)
    if chosen == "reference" and compiled is not None and dtype in _COMPILED_DTYPES:
        reason = refuses(op, compiled, device_type, dtype, limit)
        logger.warning("%s on %s runs as the eager reference, for %s cannot: %s", op, device_type, compiled, reason)
    return chosen
