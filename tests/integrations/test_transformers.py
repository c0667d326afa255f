"""patch_timesformer against the real transformers model: outputs, gradients, drop-path, undoing, and refusals."""

import copy
import io
import subprocess
import sys

import pytest
import torch

from mmkernels.integrations.transformers import patch_timesformer
from mmkernels.testing import assert_within_budget

transformers = pytest.importorskip("transformers")
from transformers.models.timesformer import modeling_timesformer as modeling

ATTENTION_TYPES = ["divided_space_time", "joint_space_time", "space_only"]


def hugging_face(attention_type="divided_space_time", *, classifier=True, seed=0, drop_path=0.0, **options):
    """A small random model whose biases and embeddings are random too; drop-path rises to its rate over the layers."""
    torch.manual_seed(seed)
    config = transformers.TimesformerConfig(
        image_size=32, patch_size=8, num_frames=3, hidden_size=48, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=96, num_labels=7, attention_type=attention_type, **options,
    )  # fmt: skip
    kind = transformers.TimesformerForVideoClassification if classifier else transformers.TimesformerModel
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    # transformers 5 takes no fraction for config.drop_path_rate.
    layers = (model.timesformer if classifier else model).encoder.layer
    for i, layer in enumerate(layers):
        layer.drop_path = modeling.TimesformerDropPath(drop_path * i / (len(layers) - 1))
    return model


def videos(frames=3, side=32, batch=2, seed=1):
    return torch.randn(batch, frames, 3, side, side, generator=torch.Generator().manual_seed(seed))


def results(model, pixel_values, seed=0):
    """Logits and the gradients of all parameters."""
    torch.manual_seed(seed)
    logits = model(pixel_values).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    return [logits, *torch.autograd.grad((logits * weights).sum(), list(model.parameters()))]


def compare(model, pixel_values, seed=0):
    """Patched float32 against the original in float32 and float64."""
    eager = results(model, pixel_values, seed)
    exact = results(copy.deepcopy(model).double(), pixel_values.double(), seed)
    with patch_timesformer(model):
        ours = results(model, pixel_values, seed)
    names = ["logits", *(name for name, _ in model.named_parameters())]
    for name, a, b, c in zip(names, ours, eager, exact, strict=True):
        # A key's bias shifts all scores of a row alike: its gradient is 0, made of terms as large as the value's.
        terms = max(1.0, exact[0].abs().max().item()) if name.endswith("qkv.bias") else 0.0
        assert_within_budget(a, b, c, terms=terms, name=name)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_logits_and_gradients_are_the_originals(attention_type):
    compare(hugging_face(attention_type), videos())


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_training_with_drop_path_draws_the_originals_numbers(attention_type):
    model = hugging_face(attention_type, drop_path=0.6).train()
    pixel_values = videos(batch=4)
    eager = results(model, pixel_values, seed=5)
    with patch_timesformer(model):
        ours, other = (results(model, pixel_values, seed) for seed in (5, 6))
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    assert (ours[0] - other[0]).abs().max() > 0.01, "another seed must drop other paths"


@pytest.mark.parametrize(("frames", "side"), [(5, 32), (1, 32), (3, 48)])
def test_other_lengths_and_sizes(frames, side):
    model = hugging_face()
    # The original takes them once the config says so: it reads both at each call.
    model.config.num_frames, model.config.image_size = frames, side
    compare(model, videos(frames, side))


def test_wrong_number_of_frames_is_refused_and_the_remedy_works():
    model = hugging_face()
    with patch_timesformer(model):
        with pytest.raises(ValueError, match=r"expected config.num_frames = 3 frames, got 6, .*num_frames = 6"):
            model(videos(6))
        model.config.num_frames = 6
        given = model(videos(6)).logits
    torch.testing.assert_close(given, model(videos(6)).logits)


def test_any_length_where_the_original_takes_it():
    for attention_type in ATTENTION_TYPES[1:]:
        model = hugging_face(attention_type)
        with torch.no_grad():
            expected = model(videos(5)).logits
            with patch_timesformer(model):
                torch.testing.assert_close(model(videos(5)).logits, expected)


def test_undo_restores_the_very_layers():
    model = hugging_face(classifier=False)
    before = [type(module) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(videos()).last_hidden_state
    patch = patch_timesformer(model)
    assert [type(module) for module in model.modules()] != before
    assert list(model.state_dict()) == list(state)
    torch.testing.assert_close(model(videos()).last_hidden_state, expected)
    with pytest.raises(ValueError, match="patched already"):
        patch_timesformer(model)
    patch.undo()
    patch.undo()
    assert [type(module) for module in model.modules()] == before
    assert not model.embeddings._forward_pre_hooks
    assert torch.equal(model(videos()).last_hidden_state, expected)


def test_a_patched_model_is_copied_saved_and_loaded():
    model, file = hugging_face(), io.BytesIO()
    patch_timesformer(model)
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        expected = model(videos()).logits
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(videos()).logits, expected)
            assert type(other.timesformer.encoder.layer[0]) is type(model.timesformer.encoder.layer[0])


def test_attentions_come_from_the_original_layers():
    model = hugging_face()
    expected = model(videos(), output_attentions=True, output_hidden_states=True)
    with patch_timesformer(model):
        given = model(videos(), output_attentions=True, output_hidden_states=True)
        plain = model(videos(), output_hidden_states=True)
    assert [a.shape for a in given.attentions] == [(6, 3, 17, 17)] * 3
    for a, b in zip(given.attentions, expected.attentions, strict=True):
        assert torch.equal(a, b)
    assert len(plain.hidden_states) == 4
    for a, b in zip(plain.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_checkpointing_goes_on():
    model = hugging_face(drop_path=0.3).train()
    with patch_timesformer(model):
        whole = results(model, videos(), seed=4)
        model.gradient_checkpointing_enable()
        calls = []
        inner = model.timesformer.encoder.layer[0]._gradient_checkpointing_func
        for layer in model.timesformer.encoder.layer:
            layer._gradient_checkpointing_func = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
        again = results(model, videos(), seed=4)
    assert len(calls) == 3
    for a, b in zip(again, whole, strict=True):
        torch.testing.assert_close(a, b)


def test_attention_dropout_drops_in_training_alone():
    model = hugging_face(attention_probs_dropout_prob=0.4)
    with torch.no_grad(), patch_timesformer(model):
        torch.testing.assert_close(model(videos()).logits, model(videos()).logits, rtol=0, atol=0)
        expected = model(videos()).logits
        model.train()
        torch.manual_seed(0)
        drawn = torch.stack([model(videos()).logits for _ in range(2)])
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3
    assert (drawn[0] - expected).abs().max() > 1e-3


def test_hidden_dropout_in_training_is_refused():
    model = hugging_face(hidden_dropout_prob=0.1)
    with patch_timesformer(model):
        model(videos())
        with pytest.raises(ValueError, match=r"hidden_dropout_prob: expected 0 in training, got 0.1"):
            model.train()(videos())


def test_another_model_is_refused():
    with pytest.raises(TypeError, match=r"model: expected a TimesformerModel.* got Linear"):
        patch_timesformer(torch.nn.Linear(2, 2))


def test_importing_mmkernels_leaves_transformers_alone():
    code = "import sys, mmkernels, mmkernels.integrations.transformers; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
