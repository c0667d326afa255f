"""What a test's calls have asked the ops for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def op_calls() -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """Every op of mmkernels that runs in this context, with its arguments."""
    found: list[tuple[Any, tuple[Any, ...]]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            if function.namespace == "mmkernels":
                found.append((function, arguments))
            return function(*arguments, **(options or {}))

    with Record():
        yield found


@contextmanager
def last_arguments() -> Iterator[list[Any]]:
    """The last argument of every op of mmkernels that runs in this context; filled at its end."""
    found: list[Any] = []
    with op_calls() as calls:
        yield found
    found += [arguments[-1] for _, arguments in calls]


@contextmanager
def output_masks() -> Iterator[list[list[bool]]]:
    """The output_mask of every op of mmkernels that makes gradients in this context."""
    masks: list[list[bool]] = []
    with last_arguments() as found:
        yield masks
    masks += [list(argument) for argument in found if isinstance(argument, list)]
