"""Which gradients a test's calls have asked the ops for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def output_masks() -> Iterator[list[list[bool]]]:
    """The output_mask, the last argument, of every op of mmkernels that makes gradients in this context."""
    masks: list[list[bool]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            if function.namespace == "mmkernels" and isinstance(arguments[-1], list):
                masks.append(list(arguments[-1]))
            return function(*arguments, **(options or {}))

    with Record():
        yield masks
