"""The types of calls whose result depends on an argument: mypy checks this file, and nothing runs it."""

from torch import Tensor
from typing_extensions import assert_type  # `typing` has it from Python 3.11 on

from mmkernels import ClipLoss, DistillClipLoss, SigLipLoss, divided_attention


def attention(qkv: Tensor, wanted: bool) -> None:
    assert_type(divided_attention(qkv, num_frames=8, num_heads=12, axis="time"), Tensor)
    assert_type(divided_attention(qkv, num_frames=8, num_heads=12, axis="time", return_lse=False), Tensor)
    out, lse = divided_attention(qkv, num_frames=8, num_heads=12, axis="time", return_lse=True)
    assert_type(out, Tensor)
    assert_type(lse, Tensor)
    either = divided_attention(qkv, num_frames=8, num_heads=12, axis="time", return_lse=wanted)
    assert_type(either, Tensor | tuple[Tensor, Tensor])


def losses(features: Tensor, scale: Tensor, bias: Tensor, wanted: bool) -> None:
    assert_type(ClipLoss()(features, features, scale), Tensor)
    assert_type(ClipLoss()(features, features, scale, bias), Tensor)
    assert_type(ClipLoss()(features, features, scale, output_dict=True), dict[str, Tensor])
    assert_type(ClipLoss()(features, features, scale, output_dict=wanted), Tensor | dict[str, Tensor])
    assert_type(SigLipLoss()(features, features, scale, bias), Tensor)
    assert_type(SigLipLoss()(features, features, scale, bias, output_dict=True), dict[str, Tensor])
    contrastive, distilled = DistillClipLoss()(features, features, scale, features, features, scale)
    assert_type(contrastive, Tensor)
    assert_type(distilled, Tensor)
    both = DistillClipLoss()(features, features, scale, features, features, scale, output_dict=True)
    assert_type(both, dict[str, Tensor])
