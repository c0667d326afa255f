"""mmkernels.ClipLoss and SigLipLoss against the real open_clip classes: the same constructors, calls, losses and
gradients."""

import inspect

import pytest
import torch

import mmkernels
from mmkernels.testing import features

open_clip = pytest.importorskip("open_clip.loss")


def step(loss_class, n, bias=None, **call):
    images = features(n, 96, seed=1).requires_grad_()
    texts = features(n, 96, seed=2, like=images.detach(), mean_cosine=0.2).requires_grad_()
    scale = torch.tensor(2.5).exp().requires_grad_()
    leaves = [images, texts, scale]
    if bias is not None:
        bias = torch.tensor(bias, requires_grad=True)
        leaves.append(bias)
        call["logit_bias"] = bias
    loss = loss_class(cache_labels=True)(images, texts, scale, **call)
    value = loss["contrastive_loss"] if isinstance(loss, dict) else loss
    return loss, value, torch.autograd.grad(3 * value, leaves)


@pytest.mark.parametrize("n", [1, 2, 63, 300])
@pytest.mark.parametrize("bias", [None, -10.0])
@pytest.mark.parametrize("output_dict", [False, True])
def test_loss_and_gradients_are_open_clips(n, bias, output_dict):
    ours, value, grads = step(mmkernels.ClipLoss, n, bias, output_dict=output_dict)
    theirs, expected, expected_grads = step(open_clip.ClipLoss, n, bias, output_dict=output_dict)
    assert type(ours) is type(theirs)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=2e-6)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("n", [1, 2, 63, 300])
@pytest.mark.parametrize("output_dict", [False, True])
def test_sigmoid_loss_and_gradients_are_open_clips(n, output_dict):
    ours, value, grads = step(mmkernels.SigLipLoss, n, -10.0, output_dict=output_dict)
    theirs, expected, expected_grads = step(open_clip.SigLipLoss, n, -10.0, output_dict=output_dict)
    assert type(ours) is type(theirs)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=2e-6)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-6)


def test_sigmoid_loss_without_a_bias_is_open_clips():
    images, texts = features(40, 16, seed=1), features(40, 16, seed=2)
    expected = open_clip.SigLipLoss()(images, texts, 5.0, None)
    torch.testing.assert_close(mmkernels.SigLipLoss()(images, texts, 5.0, None), expected)


@pytest.mark.parametrize("n", [1, 2, 300])
@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("of_distillation", [1.0, 0.0])
def test_distillation_and_gradients_are_open_clips(n, output_dict, of_distillation):
    teacher = features(n, 48, seed=3), features(n, 48, seed=4), torch.tensor(30.0)
    results = []
    for loss_class in (mmkernels.DistillClipLoss, open_clip.DistillClipLoss):
        images, texts = (features(n, 96, seed=seed).requires_grad_() for seed in (1, 2))
        scale = torch.tensor(2.5).exp().requires_grad_()
        losses = loss_class()(images, texts, scale, *teacher, output_dict=output_dict)
        assert type(losses) is (dict if output_dict else tuple)
        contrastive, distilled = (losses["contrastive_loss"], losses["distill_loss"]) if output_dict else losses
        total = 2 * contrastive + of_distillation * distilled
        results.append((contrastive, distilled, *torch.autograd.grad(total, (images, texts, scale))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("loss", ["ClipLoss", "DistillClipLoss", "SigLipLoss"])
def test_same_constructor_and_call(loss):
    for name in ("__init__", "forward"):
        ours = inspect.signature(getattr(getattr(mmkernels, loss), name)).parameters
        theirs = inspect.signature(getattr(getattr(open_clip, loss), name)).parameters
        own = [(p.name, p.default) for p in ours.values() if p.name != "group"]
        assert own == [(p.name, p.default) for p in theirs.values()]
    ours, theirs = vars(getattr(mmkernels, loss)()), vars(getattr(open_clip, loss)())
    for name in ours.keys() & theirs.keys() - vars(torch.nn.Module()).keys():
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("loss", ["ClipLoss", "DistillClipLoss", "SigLipLoss"])
def test_state_dict_is_empty_like_open_clips(loss):
    assert getattr(mmkernels, loss)().state_dict() == getattr(open_clip, loss)().state_dict()


def test_a_dist_impl_that_is_not_there():
    with pytest.raises(ValueError, match="dist_impl: expected"):
        mmkernels.SigLipLoss(dist_impl="ring")


def test_nan_bias_shows():
    images = features(4, 8)
    assert mmkernels.ClipLoss()(images, images, 5.0, logit_bias=torch.tensor(float("nan"))).isnan()


@pytest.mark.parametrize(
    ("loss", "others"),
    [
        (mmkernels.ClipLoss(), (0.0,)),
        (mmkernels.DistillClipLoss(), (torch.zeros(4, 3), torch.zeros(5, 3), 1.0)),
        (mmkernels.SigLipLoss(), (0.0,)),
    ],
    ids=lambda x: "" if isinstance(x, tuple) else type(x).__name__,
)
def test_shapes_are_checked(loss, others):
    with pytest.raises(ValueError, match="text_features: expected the shape of image_features"):
        loss(torch.zeros(4, 8), torch.zeros(5, 8), 1.0, *others)


@pytest.mark.parametrize(
    ("base", "method"),
    [
        (mmkernels.ClipLoss, "get_ground_truth"),
        (mmkernels.ClipLoss, "get_logits"),
        (mmkernels.DistillClipLoss, "dist_loss"),
        (mmkernels.SigLipLoss, "_loss"),
    ],
)
def test_an_override_without_effect_is_refused(base, method):
    with pytest.raises(TypeError, match=rf"Own\.{method}: \w+ of mmkernels never calls {method}"):
        type("Own", (base,), {method: lambda self: None})
    own = type("Own", (base,), {"forward": lambda self: 1, method: lambda self: None})
    assert type("Further", (own,), {method: lambda self: None})()() == 1
