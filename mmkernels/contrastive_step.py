"""One contrastive loss over micro-batches of which one at a time has its activations in memory."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmkernels._checks import without_autocast

Result = TypeVar("Result", Tensor, tuple[Any, ...])
_Encoded = dict[Any, Any]  # what the model returned, by name or by position


def contrastive_step(
    model: Callable[..., Any],
    batches: Iterable[Any],
    loss: Callable[..., Result],
    *,
    modules: Iterable[nn.Module] | None = None,
) -> Result:
    """The gradients of one loss over all micro-batches, with the activations of one at a time.

    Replaces::

        images, texts, scales = zip(*(model(*batch) for batch in batches))  # stores the activations of all
        value = loss(torch.cat(images), torch.cat(texts), scales[0])
        value.backward()

    by two passes over the micro-batches. The first keeps their features alone. Then comes one loss over all features
    (and, by its `process_group`, over those of all ranks). The second pass encodes again, under the random numbers of
    the first, and sends each micro-batch its share of the gradient. The gradients are those of the joint batch. The
    last micro-batch is encoded once: k of them take 2 k - 1 encodings, and a single one is a plain training step.

    Args:
        model: called with each micro-batch, `model(*batch)` if that is a tuple or a list. Returns a tensor, or a tuple
            or mapping of tensors, whose rows are joined over the micro-batches. A tensor without rows, [] or [1], is
            the same for all: a scale, a bias. open_clip's models return just that.
        batches: the micro-batches. Ranks may differ in their number, but not under FSDP2, whose ranks encode together.
        loss: called with what the model returned, joined; by keyword if that was a mapping. Returns the loss, [], or a
            tuple of the loss and what else the caller wants. It may use parameters of its own or of the model, and they
            get their gradients too. With a `GradScaler` it returns `scaler.scale(value), value.detach()`.
        modules: the DDP or FSDP2 modules, or what holds them, if `model` is a function that calls some. None: `model`.

    Returns:
        What `loss` returned, detached. The gradients are added to `.grad`, as `backward` adds them.

    Raises:
        TypeError, ValueError: no micro-batch, or a model or a loss that returns something else.
        RuntimeError: gradients are off.

    Under DDP and FSDP2 the last backward pass alone meets the other ranks; the gradients of the scale and of the loss's
    parameters go in there. Under autocast the model runs as given both times, and the backward passes run without.
    Dropout and drop-path repeat what they drew from torch's generators of the CPU and of the current device. Batch
    norm sees micro-batches, and counts all but the last of them twice.

    Source: Gao et al. 2021, GradCache (arXiv:2101.06983).
    """
    *others, last = _checked_batches(batches)
    if modules is None:
        modules = [model] if isinstance(model, nn.Module) else []
    parts = [part for module in modules for part in module.modules()]

    states: list[_RandomState] = []
    features: list[_Encoded] = []
    with _gradients_kept_here(parts, bool(others)):
        for batch in others:
            states.append(_RandomState.now())
            with torch.no_grad():
                features.append(_encode(model, batch))
        encoded = _encode(model, last)
    features.append(encoded)
    rows = {name: [len(part[name]) for part in features] for name, x in encoded.items() if _has_rows(x)}
    inputs = _joined(features)
    features.clear()
    result = loss(**inputs) if all(isinstance(name, str) for name in inputs) else loss(*inputs.values())
    grads = _gradients(result)
    of_inputs = {name: grads.pop(x) for name, x in inputs.items() if isinstance(x, Tensor) and x in grads}
    shares = {name: grad.split(rows[name]) for name, grad in of_inputs.items() if name in rows}

    def send_back(encoded: _Encoded, index: int, final: bool) -> None:
        pairs = [(encoded[name], of_parts[index]) for name, of_parts in shares.items()]
        if final:
            pairs += [(encoded[name], grad) for name, grad in of_inputs.items() if name not in shares]
            pairs += grads.items()
        if pairs:
            with without_autocast(pairs[0][0]):
                torch.autograd.backward([x for x, _ in pairs], [grad for _, grad in pairs])

    # The last micro-batch first, whose activations are still there.
    with _gradients_kept_here(parts, bool(others)):
        send_back(encoded, -1, not others)
    del encoded
    for index, (batch, state) in enumerate(zip(others, states, strict=True)):
        final = index == len(others) - 1
        with _gradients_kept_here(parts, not final):
            with state.replayed():
                again = _encode(model, batch)
            send_back(again, index, final)
    if isinstance(result, Tensor):
        return result.detach()
    value, *more = result
    return value.detach(), *more


def _checked_batches(batches: Iterable[Any]) -> list[Any]:
    batches = list(batches)
    if not batches:
        raise ValueError("batches: expected at least one micro-batch, got none")
    if not torch.is_grad_enabled():
        raise RuntimeError("mmkernels.contrastive_step: gradients are off; call it outside of torch.no_grad")
    return batches


def _encode(model: Callable[..., Any], batch: Any) -> _Encoded:
    # Older releases of torch give a cast that autocast made without a graph to a later call that needs one.
    torch.clear_autocast_cache()
    found = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    if isinstance(found, Tensor):
        found = (found,)
    if isinstance(found, Mapping):
        return dict(found)
    if isinstance(found, (tuple, list)):
        return dict(enumerate(found))
    raise TypeError(f"model: expected a tensor, or a tuple or mapping of tensors, got {type(found).__name__}")


def _has_rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and x.shape != (1,)


def _joined(parts: Sequence[_Encoded]) -> _Encoded:
    """What the loss is called with: leaves that require a gradient where the last micro-batch's tensors do."""
    last = parts[-1]
    for part in parts:
        for name in last.keys() | part.keys():
            if _has_rows(part.get(name)) != _has_rows(last.get(name)):
                raise ValueError(
                    f"model: expected the same outputs for every micro-batch, got {name!r} with and without rows; give "
                    "each micro-batch two rows or more"
                )
    joined: _Encoded = {}
    for name, x in last.items():
        if isinstance(x, Tensor):
            whole = torch.cat([part[name] for part in parts]) if _has_rows(x) and len(parts) > 1 else x
            joined[name] = whole.detach().requires_grad_(x.requires_grad)
        else:
            joined[name] = x
    return joined


def _gradients(result: Any) -> dict[Tensor, Tensor]:
    """The gradients of a loss to every leaf that it was made from, without adding them to `.grad`."""
    value, *more = result if isinstance(result, tuple) else (result,)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"loss: expected a scalar tensor, or a tuple that begins with one, got {type(value).__name__}; add up "
            "the losses of a mapping"
        )
    if value.numel() != 1:
        raise ValueError(f"loss: expected one number, got shape {tuple(value.shape)}; take the mean or the sum")
    if not value.requires_grad:
        raise ValueError("loss: expected a number that depends on features or parameters, got one without a gradient")
    if any(isinstance(x, Tensor) and x.requires_grad for x in more):
        raise ValueError(
            "loss: expected one tensor with a gradient, the first, got several; return the sum of the losses, and "
            "detach what is to be seen beside it"
        )
    leaves = _leaves(value)
    with without_autocast(value):
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return {leaf: grad for leaf, grad in zip(leaves, grads, strict=True) if grad is not None}


def _leaves(value: Tensor) -> list[Tensor]:
    """The tensors at the ends of a graph."""
    leaves, seen, ahead = [], set(), [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where torch adds a gradient to a leaf
            leaves.append(node.variable)
        ahead += [following for following, _ in node.next_functions]
    return leaves


@contextlib.contextmanager
def _gradients_kept_here(parts: Sequence[nn.Module], wanted: bool) -> Iterator[None]:
    """Where wanted, the backward passes of these modules do not meet other ranks."""
    with contextlib.ExitStack() as stack:
        for part in parts if wanted else ():
            if isinstance(part, DistributedDataParallel):
                stack.enter_context(part.no_sync())
            # FSDP2's modules have it; to import their class would take as long as all of mmkernels.
            elif (set_sync := getattr(part, "set_requires_gradient_sync", None)) is not None:
                set_sync(False, recurse=False)
                stack.callback(set_sync, True, recurse=False)
        yield


class _RandomState(NamedTuple):
    """Torch's generators of the CPU and of the current device."""

    cpu: Tensor
    device: Tensor | None

    @staticmethod
    def now() -> "_RandomState":
        on_device = torch.accelerator.is_available()
        return _RandomState(torch.get_rng_state(), torch.get_device_module().get_rng_state() if on_device else None)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.get_device_module().set_rng_state(self.device)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Within, what was drawn since is drawn again."""
        present = _RandomState.now()
        self.restore()
        try:
            yield
        finally:
            present.restore()
