"""open_clip's losses on the fused kernels: the same constructors and calls."""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from mmkernels.distillation.api import distillation_losses
from mmkernels.distributed.ranks import group_of
from mmkernels.distributed.total import total
from mmkernels.info_nce import info_nce
from mmkernels.siglip import siglip


def _refuse_overrides(subclass: Any, base: str, methods: tuple[str, ...]) -> None:
    """Refuse a subclass whose override would have no effect, because only open_clip's own forward calls the method."""
    if subclass.forward.__module__ != __name__:
        return  # a forward of its own may call what it wants
    for name in methods:
        if hasattr(subclass, name):
            raise TypeError(
                f"{subclass.__name__}.{name}: {base} of mmkernels never calls {name}, so the override would have no "
                "effect; derive from open_clip's class, or write a forward (mmkernels.info_nce takes targets)"
            )


class ClipLoss(nn.Module):
    """CLIP's symmetric loss in constant memory per row.

    Replaces::

        from open_clip.loss import ClipLoss      # by: from mmkernels import ClipLoss
        loss = ClipLoss()(image_features, text_features, logit_scale)

    The constructor and the call are open_clip's. There are no logits to hold labels for, so `cache_labels` has no
    effect. With world_size > 1 blocks of features pass round the ranks (`info_nce`'s process_group), and no rank holds
    all. Loss and gradients, after DDP's mean over ranks, are open_clip's: the whole gradient with `gather_with_grad`,
    the part of it that open_clip computes without.

    Args:
        group: the ranks, a `ProcessGroup` or a `DeviceMesh`; None: all.

    Raises:
        NotImplementedError: use_horovod.
        ValueError: rank or world_size that are not the group's.
        TypeError: a subclass overrides get_ground_truth or get_logits, which are never called here.
    """

    _takes_ranks = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _refuse_overrides(cls, "ClipLoss", ("get_ground_truth", "get_logits", "dist_loss"))

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        group: ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise NotImplementedError("use_horovod: expected False, as torch.distributed connects the ranks")
        if not self._takes_ranks and (world_size > 1 or group is not None):
            raise NotImplementedError(
                f"world_size: expected 1, got {world_size}, as a teacher's softmaxes are not computed over ranks yet"
            )
        self.group = _group_of(rank, world_size, group)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = ..., output_dict: Literal[False] = ...
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = ..., *, output_dict: Literal[True]
    ) -> dict[str, Tensor]: ...  # fmt: skip
    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = ..., output_dict: bool = ...
    ) -> Tensor | dict[str, Tensor]: ...  # fmt: skip
    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The mean loss, float32, or {"contrastive_loss": loss} for output_dict=True."""
        _check_shapes(image_features, text_features)
        if self.group is None:
            loss = info_nce(image_features, text_features, logit_scale)
        else:
            loss = self._over_ranks(image_features, text_features, logit_scale, self.group)
        if logit_bias is not None:
            # A softmax does not see a constant added to every logit. The term keeps the bias in the graph, with the
            # gradient 0 that the eager loss gives it, and lets a NaN through.
            loss = loss + 0.0 * (logit_bias.sum() if isinstance(logit_bias, torch.Tensor) else logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _over_ranks(
        self, images: Tensor, texts: Tensor, logit_scale: Tensor | float, group: ProcessGroup | DeviceMesh
    ) -> Tensor:
        over: dict[str, Any] = {"process_group": group}
        if self.local_loss and not self.gather_with_grad:
            # What was gathered has no gradient, the own features among it either.
            rows = info_nce(images, texts.detach(), logit_scale, symmetric=False, **over)
            return (rows + info_nce(texts, images.detach(), logit_scale, symmetric=False, **over)) / 2
        if not self.gather_with_grad:
            # Every rank has the joint loss, and a gradient to its own features alone: DDP's mean makes 1 / W of it.
            images, texts = (_Share.apply(x, self.world_size) for x in (images, texts))
        loss = info_nce(images, texts, logit_scale, **over)
        if self.local_loss:
            return loss
        ranks = group_of(group)
        return loss + (total(loss.detach(), ranks) / ranks.size - loss).detach()  # the joint value, the own gradient

    if TYPE_CHECKING:
        __call__ = forward  # torch's own returns Any


class DistillClipLoss(ClipLoss):
    """CLIP's loss and that of a student under a teacher's softmaxes, from one pass over the tiles of both.

    Replaces::

        from open_clip.loss import DistillClipLoss    # by: from mmkernels import DistillClipLoss
        loss = DistillClipLoss()
        contrastive_loss, distill_loss = loss(
            image_features, text_features, logit_scale, dist_image_features, dist_text_features, dist_logit_scale
        )

    The constructor and the call are open_clip's; the teacher gets no gradient. World size 1.
    """

    _takes_ranks = False

    @overload  # type: ignore[override]
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, dist_image_features: Tensor,
        dist_text_features: Tensor, dist_logit_scale: Tensor | float, output_dict: Literal[False] = ...
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, dist_image_features: Tensor,
        dist_text_features: Tensor, dist_logit_scale: Tensor | float, *, output_dict: Literal[True]
    ) -> dict[str, Tensor]: ...  # fmt: skip
    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, dist_image_features: Tensor,
        dist_text_features: Tensor, dist_logit_scale: Tensor | float, output_dict: bool = ...
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]: ...  # fmt: skip
    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,
        dist_image_features: Tensor,  # [N, D']
        dist_text_features: Tensor,  # [N, D']
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Both mean losses, float32, as a tuple or as {"contrastive_loss": ..., "distill_loss": ...}."""
        _check_shapes(image_features, text_features)
        distilled, matched = distillation_losses(
            image_features, text_features, logit_scale, dist_image_features, dist_text_features, dist_logit_scale
        )
        contrastive_loss, distill_loss = matched.mean(), distilled.mean()
        if output_dict:
            return {"contrastive_loss": contrastive_loss, "distill_loss": distill_loss}
        return contrastive_loss, distill_loss

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]


class SigLipLoss(nn.Module):
    """SigLIP's sigmoid loss in constant memory per row.

    Replaces::

        from open_clip.loss import SigLipLoss    # by: from mmkernels import SigLipLoss
        loss = SigLipLoss()(image_features, text_features, logit_scale, logit_bias)

    The constructor and the call are open_clip's. There are no labels to hold, so `cache_labels` has no effect. With
    world_size > 1 blocks of features pass round the ranks (`siglip`'s process_group), whatever `dist_impl`: open_clip's
    four give the same loss and gradients.

    Args:
        group: the ranks, a `ProcessGroup` or a `DeviceMesh`; None: all.

    Raises:
        ValueError: a `dist_impl` that open_clip does not have; rank or world_size that are not the group's.
        TypeError: a subclass overrides get_ground_truth, get_logits or _loss, which are never called here.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _refuse_overrides(cls, "SigLipLoss", ("get_ground_truth", "get_logits", "_loss"))

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        group: ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        self.group = _group_of(rank, world_size, group)
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl: expected 'bidir', 'shift', 'reduce', 'gather' or None, got {dist_impl!r}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"

    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None, output_dict: Literal[False] = ...
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None, *, output_dict: Literal[True]
    ) -> dict[str, Tensor]: ...  # fmt: skip
    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None, output_dict: bool = ...
    ) -> Tensor | dict[str, Tensor]: ...  # fmt: skip
    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The sum over all pairs divided by N, float32, or {"contrastive_loss": loss} for output_dict=True."""
        _check_shapes(image_features, text_features)
        bias = 0.0 if logit_bias is None else logit_bias
        loss = siglip(image_features, text_features, logit_scale, bias, process_group=self.group)
        return {"contrastive_loss": loss} if output_dict else loss

    if TYPE_CHECKING:
        __call__ = forward


def _group_of(rank: int, world_size: int, group: ProcessGroup | DeviceMesh | None) -> ProcessGroup | DeviceMesh | None:
    """The ranks of a loss, which are as many as its constructor says; None: this process alone."""
    if world_size == 1 and group is None:
        return None
    if not dist.is_initialized():
        raise ValueError(
            f"world_size: expected 1 without a process group, got {world_size}; call "
            "torch.distributed.init_process_group first"
        )
    group = dist.group.WORLD if group is None else group
    assert group is not None
    ranks = group_of(group)
    if (ranks.rank, ranks.size) != (rank, world_size):
        raise ValueError(
            f"rank, world_size: expected {ranks.rank} and {ranks.size}, those of the group, got {rank} and {world_size}"
        )
    return group


class _Share(torch.autograd.Function):
    """A tensor whose gradient is divided."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: int) -> Tensor:
        ctx.parts = parts
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.parts, None


def _check_shapes(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.shape != text_features.shape:
        raise ValueError(
            f"text_features: expected the shape of image_features, {tuple(image_features.shape)}, "
            f"got {tuple(text_features.shape)}"
        )
