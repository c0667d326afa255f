"""open_clip's losses on the fused kernels: the same constructors and calls."""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from mmkernels.distillation.api import distillation_losses
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
    effect. World size 1; more ranks raise NotImplementedError.

    Raises:
        NotImplementedError: world_size > 1 or use_horovod.
        TypeError: a subclass overrides get_ground_truth or get_logits, which are never called here.
    """

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
    ) -> None:
        super().__init__()
        if world_size > 1 or use_horovod:
            raise NotImplementedError(
                f"world_size: expected 1 (and no Horovod), got {world_size}; features of other ranks are not "
                "implemented yet"
            )
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
        loss = info_nce(image_features, text_features, logit_scale)
        if logit_bias is not None:
            # A softmax does not see a constant added to every logit. The term keeps the bias in the graph, with the
            # gradient 0 that the eager loss gives it, and lets a NaN through.
            loss = loss + 0.0 * (logit_bias.sum() if isinstance(logit_bias, torch.Tensor) else logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

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

    The constructor and the call are open_clip's. There are no labels to hold, so `cache_labels` has no effect. World
    size 1; more ranks raise NotImplementedError, whatever `dist_impl`.

    Raises:
        NotImplementedError: world_size > 1.
        ValueError: a `dist_impl` that open_clip does not have.
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
    ) -> None:
        super().__init__()
        if world_size > 1:
            raise NotImplementedError(
                f"world_size: expected 1, got {world_size}; features of other ranks are not implemented yet"
            )
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
        loss = siglip(image_features, text_features, logit_scale, 0.0 if logit_bias is None else logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    if TYPE_CHECKING:
        __call__ = forward


def _check_shapes(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.shape != text_features.shape:
        raise ValueError(
            f"text_features: expected the shape of image_features, {tuple(image_features.shape)}, "
            f"got {tuple(text_features.shape)}"
        )
