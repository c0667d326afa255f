"""Where a case runs: cases and oracles are CPU tensors, and the call under test may have them on another device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Device = torch.device | str


def on_device(call: Callable[..., Any], device: Device) -> Callable[..., Any]:
    """The call with its tensors on the device: arguments go there; results, and through them gradients, come back."""

    def there_and_back(*arguments: Any, **options: Any) -> Any:
        arguments, options = tree_map_only(Tensor, lambda x: x.to(device), (arguments, options))
        return tree_map_only(Tensor, lambda x: x.cpu(), call(*arguments, **options))

    return there_and_back
