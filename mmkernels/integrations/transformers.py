"""Hugging Face's models on the fused ops: TimeSformer's attention, patched in place; beam search for `generate`."""

from __future__ import annotations

import functools
import logging
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.beam_search import beam_search as search_beams
from mmkernels.divided_attention import divided_attention, drop_frames, drop_positions

logger = logging.getLogger("mmkernels")


def _attend(layer: Any, attention: Any, x: Tensor, num_frames: int, axis: Any, kept: Tensor | None = None) -> Tensor:
    """A TimeSformerAttention on the op."""
    inner, output = attention.attention, attention.output
    if layer.training and output.dropout.p:
        raise ValueError(
            f"hidden_dropout_prob: expected 0 in training, got {output.dropout.p}: the op averages the class token "
            "over frames before the dropout; set it to 0, or undo the patch"
        )
    y = divided_attention(
        inner.qkv(x),
        num_frames=num_frames,
        num_heads=inner.num_heads,
        axis=axis,
        frame_mask=kept,
        scale=inner.scale,
        dropout_p=inner.attn_drop.p if layer.training else 0.0,
        impl=layer._mmkernels_impl,
    )
    return output(y)


def _layer_forward(layer: Any, x: Tensor) -> Tensor:
    """A TimesformerLayer, x [B, 1 + N T, C] (space-only: [B T, 1 + N, C]) -> the same shape."""
    p = getattr(layer.drop_path, "drop_prob", 0.0) if layer.training else 0.0
    if layer.attention_type == "divided_space_time":
        T = layer.config.num_frames
        y = _attend(layer, layer.temporal_attention, layer.temporal_layernorm(x), T, "time")
        if p:
            y = y * drop_positions(y, T, p)
        x = torch.cat([x[:, :1], x[:, 1:] + layer.temporal_dense(y)[:, 1:]], 1)
        if p:
            kept, weights = drop_frames(x, T, p)
            x = x + weights * _attend(layer, layer.attention, layer.layernorm_before(x), T, "space", kept)
        else:
            x = x + _attend(layer, layer.attention, layer.layernorm_before(x), T, "space")
    else:
        x = x + layer.drop_path(_attend(layer, layer.attention, layer.layernorm_before(x), 1, "joint"))
    return x + layer.drop_path(layer.output(layer.intermediate(layer.layernorm_after(x))))


@functools.cache
def _patched_class(layer_class: Any) -> type:
    """A subclass of a TimesformerLayer class that runs on the op.

    The class keeps its name: placement rules name layers by their class. transformers wraps the `forward` of every
    subclass for gradient checkpointing by itself.
    """

    def forward(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        if output_attentions:  # the original layer, which holds all probabilities
            return layer_class.forward(self, hidden_states, output_attentions)
        return (_layer_forward(self, hidden_states),)

    def reduce(self: Any) -> tuple[Any, ...]:  # pickle finds no class by its name that was made at run time
        return _empty_layer, (layer_class,), self.__dict__

    members = {"forward": forward, "__reduce__": reduce, "_mmkernels_original": layer_class}
    return type(layer_class.__name__, (layer_class,), members)


def _empty_layer(layer_class: Any) -> Any:
    """A patched layer that holds nothing yet: what pickle fills."""
    patched: Any = _patched_class(layer_class)
    return patched.__new__(patched)


def _check_frames(embeddings: Any, arguments: tuple[Any, ...], config: Any) -> None:
    """Refuse clips of another length than the layers would take them for."""
    frames = arguments[0].shape[1]
    if frames != config.num_frames:
        raise ValueError(
            f"pixel_values: expected config.num_frames = {config.num_frames} frames, got {frames}, which the layers "
            f"would take for other positions; set model.config.num_frames = {frames} (the time embeddings are "
            "interpolated)"
        )


class TimesformerPatch:
    """What :func:`patch_timesformer` did to a model; `undo()`, or leaving a `with` block, takes it back."""

    def __init__(self, layers: list[Any], hooks: list[Any]) -> None:
        self._layers, self._hooks = layers, hooks

    def undo(self) -> None:
        """Give the model its own layers back. A second call does nothing."""
        for layer in self._layers:
            layer.__class__ = layer._mmkernels_original
            del layer._mmkernels_impl
        for hook in self._hooks:
            hook.remove()
        self._layers, self._hooks = [], []

    def __enter__(self) -> TimesformerPatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def patch_timesformer(model: nn.Module, *, impl: str = "auto") -> TimesformerPatch:
    """Run a Hugging Face TimeSformer on :func:`mmkernels.divided_attention`, in place.

    Replaces the rearranges, the repeated class token and the stored probabilities of every layer::

        model = TimesformerForVideoClassification.from_pretrained("facebook/timesformer-base-finetuned-k400")
        patch_timesformer(model)                # or: with patch_timesformer(model): ...
        logits = model(pixel_values).logits     # the same to rounding, and so are gradients

    Modules, parameters and state dict stay as they are. All three attention types run; drop-path draws the random
    numbers of the original, in its order. Attention dropout drops by the op's own generator: with the same
    probability, not the same entries. With output_attentions=True the original layers run.

    In the original, a clip of other than `config.num_frames` frames gets silently wrong logits from divided attention;
    here it raises ValueError, which names the remedy.

    Args:
        model: TimesformerModel, TimesformerForVideoClassification, or a module that holds one.
        impl: see :func:`mmkernels.divided_attention`.

    Returns:
        A handle: `undo()` takes the patch back, and so does leaving it as a context manager.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        TypeError: there is no TimeSformer in `model`.
        ValueError: `model` is patched already; when called in training, hidden_dropout_prob > 0.
    """
    from transformers.models.timesformer.modeling_timesformer import TimesformerLayer, TimesformerModel

    layers: list[Any] = [module for module in model.modules() if isinstance(module, TimesformerLayer)]
    if not layers:
        raise TypeError(
            f"model: expected a TimesformerModel, TimesformerForVideoClassification or a module that holds one, "
            f"got {type(model).__name__}"
        )
    if any(hasattr(layer, "_mmkernels_original") for layer in layers):
        raise ValueError("model: is patched already; undo that patch first")
    hooks = [
        module.embeddings.register_forward_pre_hook(functools.partial(_check_frames, config=module.config))
        for module in model.modules()
        if isinstance(module, TimesformerModel) and module.config.attention_type == "divided_space_time"
    ]
    for layer in layers:
        layer._mmkernels_impl = impl
        layer.__class__ = _patched_class(layer.__class__)
    return TimesformerPatch(layers, hooks)


def _rows(value: Any, index: Tensor | slice, rows: int) -> Any:
    """The tensors of a model's keyword argument that have `rows` rows, at an index; all else as it is."""
    if isinstance(value, Tensor):
        return value[index].contiguous() if value.ndim and value.shape[0] == rows else value
    if isinstance(value, dict):  # a ModelOutput is one
        copy = value.copy() if type(value) is dict else type(value)(**value)
        for name, part in value.items():
            copy[name] = _rows(part, index, rows)
        return copy
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(part, index, rows) for part in value)
    return value


def _has_rows(name: str, value: Any, rows: int) -> bool:
    """Whether :func:`_rows` finds the rows of an argument: its tensors have them first, and a cache is still empty.

    It does not in the patches of several images in one tensor, in positions of [3, rows, L], or in the features of
    images, one tuple for each row.
    """
    if isinstance(value, Tensor):
        return value.ndim == 0 or (value.shape[0] == rows and not (name == "position_ids" and value.ndim == 3))
    if hasattr(value, "layers"):  # a cache; one of recurrent layers has no length to ask for
        return not any(isinstance(held, Tensor) for layer in value.layers for held in vars(layer).values())
    if hasattr(value, "get_seq_length"):
        return value.get_seq_length() == 0
    if isinstance(value, dict):
        return name != "mm_encoder_outputs" and all(_has_rows(part, value[part], rows) for part in value)
    return not isinstance(value, (tuple, list)) or all(part is None for part in value)


# Options of `generate` that change the search itself, with the value that asks for nothing.
_OTHER_SEARCHES = {
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0.0),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "prefill_chunk_size": (None,),
}


def beam_search(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Any:
    """Beam search for Hugging Face's `generate`, on :func:`mmkernels.beam_search`.

    Replaces::

        model.generate(**inputs, num_beams=5)
        model.generate(**inputs, num_beams=5, custom_generate=beam_search)      # the same hypotheses

    It serves decoder-only, encoder-decoder and vision-language models whose cache can be reordered, Mamba's too. The
    prompt runs once per item, not once per beam, unless images stand in it or it comes with a cache. All options of
    `generate` that act through logits processors work, and so do `early_stopping`, `length_penalty`,
    `num_return_sequences`, several EOS ids and `return_dict_in_generate`: its `sequences`, `sequences_scores` and
    `beam_indices` are filled, asked for or not; its `scores`, [B K, V] for every step, with `output_scores=True` alone,
    which makes the step write log-probabilities out; once an item is done its rows there mean nothing. A `pad_token_id`
    of 0 is honoured, which transformers 5.23 takes for none. Items with NaN logits are named in a warning.

    Raises:
        ValueError: sampling, groups, forced words, contrastive, assisted or DoLa decoding, a static cache, a cache that
            cannot be reordered, Moshi, whose audio codes lie beside the cache, logits, attentions or hidden states of
            every step, or stopping criteria other than length and EOS: each by name.
    """
    from transformers.generation import stopping_criteria as stopping
    from transformers.generation.utils import (
        ALL_CACHE_NAMES,
        GenerateBeamDecoderOnlyOutput,
        GenerateBeamEncoderDecoderOutput,
    )

    c = generation_config
    for name in ("do_sample", "output_attentions", "output_hidden_states", "output_logits"):
        if getattr(c, name):
            raise ValueError(f"{name}: expected False with custom_generate=beam_search, got {getattr(c, name)}")
    for name, neutral in _OTHER_SEARCHES.items():
        if getattr(c, name, None) not in neutral:
            raise ValueError(f"{name}: not carried out by custom_generate=beam_search, got {getattr(c, name)}")
    for criterion in stopping_criteria:
        if not isinstance(criterion, (stopping.MaxLengthCriteria, stopping.EosTokenCriteria)):
            raise ValueError(f"stopping_criteria: expected those of length and EOS, got {type(criterion).__name__}")
    if c.cache_implementation is not None and c.cache_implementation.startswith("static"):
        raise ValueError(f"cache_implementation: expected a dynamic cache, got {c.cache_implementation!r}")
    for name in ("synced_gpus", "assistant_model", "streamer"):
        if model_kwargs.pop(name, None):
            raise ValueError(f"{name}: expected none with custom_generate=beam_search")
    if hasattr(model, "generated_audio_codes"):  # Moshi's generate sets it, and adds to it by its own search's beams
        raise ValueError(
            "model: expected one whose cache holds all that a beam has, got "
            f"{type(model).__name__}, which keeps generated_audio_codes itself; call it without custom_generate"
        )
    K, rows, prompt_length = c.num_beams, *input_ids.shape
    B = rows // K
    first = slice(None, None, K)
    prompts = input_ids[first]
    # The prompt runs on one row per item where its arguments can be cut to that, else on one per beam.
    one_per_item = all(_has_rows(name, value, rows) for name, value in model_kwargs.items())
    if one_per_item:
        model_kwargs = {name: _rows(value, first, rows) for name, value in model_kwargs.items()}
    is_decoder_only = not model.config.is_encoder_decoder

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        ids, kwargs = state
        is_prompt = kwargs is None
        if is_prompt:
            kwargs = model_kwargs
            ids = prompts if one_per_item else input_ids
            outputs = model._prefill(ids, c, kwargs, is_first_iteration=True)
        else:
            ids = torch.cat([ids, tokens[:, None]], 1)
            inputs = model.prepare_inputs_for_generation(
                ids, next_sequence_length=1 if kwargs["use_cache"] else None, **kwargs
            )
            outputs = model(**inputs, return_dict=True)
        kwargs = model._update_model_kwargs_for_generation(
            outputs, kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        logits = outputs.logits[:, -1]
        return logits[first] if is_prompt and not one_per_item else logits, (ids, kwargs)

    def reorder(state: Any, index: Tensor) -> Any:
        ids, kwargs = state
        rows = len(ids)
        cached = next((name for name in ALL_CACHE_NAMES if kwargs.get(name) is not None), "")
        if ids.shape[1] == prompt_length:  # after the prompt: `index` holds items
            if one_per_item:
                kwargs = {name: value if name == cached else _rows(value, index, B) for name, value in kwargs.items()}
            else:
                index = index * K
        if cached:
            if hasattr(model, "_reorder_cache"):
                kwargs[cached] = model._reorder_cache(kwargs[cached], index)
            elif hasattr(kwargs[cached], "reorder_cache"):
                kwargs[cached].reorder_cache(index)
                for name, value in vars(kwargs[cached]).items():
                    if name != "layers":  # what a cache keeps beside them, such as MiniMax's, nobody else reorders
                        setattr(kwargs[cached], name, _rows(value, index, rows))
            else:
                raise ValueError(
                    f"model: expected a cache that can be reordered, got {type(kwargs[cached]).__name__} of "
                    f"{type(model).__name__}; pass use_cache=False"
                )
        return ids[index], kwargs

    keeps_scores = c.return_dict_in_generate and c.output_scores
    scores: list[Tensor] = []

    def process(history: Tensor, log_probs: Tensor) -> Tensor:
        is_first = len(log_probs) == B
        if is_first:  # processors expect one row per beam
            history, log_probs = history.repeat_interleave(K, 0), log_probs.repeat_interleave(K, 0)
        processed = logits_processor(history, log_probs)
        if keeps_scores:
            scores.append(processed)
        return processed[first] if is_first else processed

    eos = [] if c._eos_token_tensor is None else c._eos_token_tensor.tolist()
    pad = None if c._pad_token_tensor is None else int(c._pad_token_tensor)
    result = search_beams(
        step,
        (None, None),
        batch_size=B,
        num_beams=K,
        bos_token_id=prompts.new_zeros(B),  # `step` does not read it
        eos_token_id=eos,
        pad_token_id=pad,
        max_length=c.max_length - prompt_length,
        length_penalty=c.length_penalty,
        early_stopping=c.early_stopping,
        num_return_sequences=c.num_return_sequences,
        prompt=prompts,
        log_prob_processor=process if len(logits_processor) or keeps_scores else None,
        reorder=reorder,
    )
    for item, fault in result.faults().items():
        logger.warning("beam_search: item %d: %s", item, fault)
    R = c.num_return_sequences
    sequences = torch.cat([prompts.repeat_interleave(R, 0), result.sequences.flatten(0, 1)], 1)
    if not c.return_dict_in_generate:
        return sequences
    past = torch.arange(result.beams.shape[-1], device=sequences.device) >= result.lengths[..., None]
    offsets = torch.arange(B, device=sequences.device)[:, None, None] * K
    beams = torch.where(past, -1, result.beams + offsets).flatten(0, 1).int()
    output: Any = GenerateBeamDecoderOnlyOutput if is_decoder_only else GenerateBeamEncoderDecoderOutput
    return output(
        sequences=sequences,
        sequences_scores=result.scores.flatten(),
        scores=tuple(scores) if keeps_scores else None,
        beam_indices=beams,
    )
