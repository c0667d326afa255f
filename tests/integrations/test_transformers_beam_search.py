"""generate(custom_generate=beam_search) against Hugging Face's own beams."""

import copy

import pytest
import torch

from mmkernels.integrations import transformers as bridge
from mmkernels.integrations.transformers import beam_search

transformers = pytest.importorskip("transformers")

PROMPTS = torch.tensor([[1, 4, 5], [1, 7, 3], [1, 9, 9], [1, 3, 10]])
SMALL = {"vocab_size": 13, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def randomised(model, scale=0.6):
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * scale)
    return model.eval()


def gpt2(**options):
    return transformers.GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2, **SMALL, **options)


def models():
    bart = transformers.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64, decoder_start_token_id=2,
        forced_eos_token_id=2, **SMALL,
    )  # fmt: skip
    vit = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt2())
    both.decoder_start_token_id, both.pad_token_id, both.eos_token_id = 1, 0, 2
    t5 = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0, **SMALL
    )
    mask = torch.ones_like(PROMPTS)
    mask[0, 0] = 0
    text = {"input_ids": PROMPTS, "attention_mask": mask}
    return {
        "decoder-only": (transformers.GPT2LMHeadModel(gpt2()), text),
        "encoder-decoder": (transformers.BartForConditionalGeneration(bart), text),
        "t5": (transformers.T5ForConditionalGeneration(t5), text),
        "vision": (transformers.VisionEncoderDecoderModel(both), {"pixel_values": torch.randn(4, 3, 8, 8)}),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"early_stopping": True, "length_penalty": 2.0},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.5},
        {"eos_token_id": [2, 5], "min_new_tokens": 3},
        {"prefix_allowed_tokens_fn": lambda b, tokens: [2, 4 + b, 7, 8]},
        {"use_cache": False},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("kind", ["decoder-only", "encoder-decoder", "t5", "vision"])
def test_the_same_beams(kind, options):
    model, inputs = models()[kind]
    model = randomised(model)
    common = {
        **inputs, "num_beams": 3, "max_new_tokens": 7, "num_return_sequences": 2, "do_sample": False,
        "return_dict_in_generate": True, "output_scores": True, **options,
    }  # fmt: skip
    theirs = model.generate(**common)
    ours = model.generate(**(common | {"output_scores": False}), custom_generate=beam_search)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.beam_indices, theirs.beam_indices)
    own = ours.sequences == theirs.sequences
    assert (own | (ours.sequences == 0)).all()  # past its end: transformers takes a padding id of 0 for none
    assert type(ours) is type(theirs)


@pytest.mark.parametrize("kind", ["decoder-only", "encoder-decoder"])
@pytest.mark.parametrize("options", [{}, {"no_repeat_ngram_size": 2}], ids=["plain", "processed"])
def test_scores_of_every_step(kind, options):
    model, inputs = models()[kind]
    model = randomised(model)
    common = {
        **inputs, "num_beams": 3, "max_new_tokens": 7, "min_new_tokens": 7, "num_return_sequences": 2,
        "do_sample": False, "return_dict_in_generate": True, "output_scores": True, **options,
    }  # fmt: skip
    theirs, ours = model.generate(**common), model.generate(**common, custom_generate=beam_search)
    assert len(ours.scores) == len(theirs.scores) == 7
    for own, other in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    added = model.compute_transition_scores(ours.sequences, ours.scores, ours.beam_indices)
    torch.testing.assert_close(added.sum(1) / 7, ours.sequences_scores)
    common["output_scores"] = False
    assert model.generate(**common, custom_generate=beam_search).scores is None


def test_what_it_cannot_do_is_refused_by_name():
    model, inputs = models()["decoder-only"]
    for options, name in (({"output_logits": True}, "output_logits"), ({"max_time": 1.0}, "MaxTimeCriteria")):
        with pytest.raises(ValueError, match=name):
            model.generate(
                **inputs, num_beams=2, max_new_tokens=3, custom_generate=beam_search, return_dict_in_generate=True,
                **options,
            )  # fmt: skip


def language_models():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, **SMALL}
    return {
        "Mamba": transformers.MambaConfig(state_size=4, **sizes),
        "Mamba2": transformers.Mamba2Config(state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=8, **sizes),
        "Llama": transformers.LlamaConfig(intermediate_size=32, num_attention_heads=2, **sizes),
        "MiniMax": transformers.MiniMaxConfig(
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=2,
            layer_types=["linear_attention", "full_attention"],
            **sizes,
        ),
        "Rwkv": transformers.RwkvConfig(attention_hidden_size=16, intermediate_size=32, context_length=64, **sizes),
    }


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2", "MiniMax", "Rwkv"])
def test_states_of_recurrent_models_follow_their_beams(kind):
    model = randomised(transformers.AutoModelForCausalLM.from_config(language_models()[kind]), 0.4)
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 8, "do_sample": False}
    options["attention_mask"] = torch.ones_like(PROMPTS)
    whole = model.generate(PROMPTS, use_cache=False, custom_generate=beam_search, **options)
    if kind == "Rwkv":  # its state is a list of tensors that nothing can reorder
        with pytest.raises(ValueError, match="expected a cache that can be reordered, got list of RwkvForCausalLM"):
            model.generate(PROMPTS, custom_generate=beam_search, **options)
    else:
        assert torch.equal(model.generate(PROMPTS, custom_generate=beam_search, **options), whole)


def test_audio_codes_beside_the_cache_are_refused_by_name():
    ids = {"pad_token_id": 3, "eos_token_id": 2, "bos_token_id": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 1}
    sizes = {**heads, "hidden_size": 16, "max_position_embeddings": 64, "num_codebooks": 4, "audio_vocab_size": 8}
    mimi = {**heads, "model_type": "mimi", "hidden_size": 16, "num_filters": 4, "intermediate_size": 16}
    mimi |= {"codebook_size": 8, "codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "num_quantizers": 4}
    mimi |= {"num_semantic_quantizers": 1, "upsample_groups": 16}
    sizes |= {"ffn_dim": 32, "vocab_size": 23}
    config = transformers.MoshiConfig(**sizes, **ids, audio_encoder_config=mimi, depth_decoder_config=sizes)
    model = transformers.MoshiForConditionalGeneration(config).eval()
    codes = torch.zeros(2, 4, 3, dtype=torch.int64)
    inputs = {"input_ids": torch.full((2, 3), 5), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    inputs |= {"user_audio_codes": codes, "moshi_audio_codes": codes}
    options = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False, "return_audio_waveforms": False}
    options["concat_unconditional_inputs"] = False
    with pytest.raises(ValueError, match="got MoshiForConditionalGeneration, which keeps generated_audio_codes"):
        model.generate(**inputs, **options, custom_generate=beam_search)


def test_features_in_place_of_a_prompt():
    model = randomised(transformers.LlamaForCausalLM(language_models()["Llama"]))
    options = {"inputs_embeds": torch.randn(2, 5, 16), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    options |= {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "eos_token_id": 5, "pad_token_id": 3}
    assert torch.equal(model.generate(custom_generate=beam_search, **options), model.generate(**options))


@pytest.mark.parametrize("filled", [0, 2])
def test_a_cache_that_comes_with_the_prompt(filled):
    model = randomised(transformers.LlamaForCausalLM(language_models()["Llama"]))
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 3}

    def cache():
        kept = transformers.DynamicCache(config=model.config)
        if filled:
            with torch.no_grad():
                model(PROMPTS[:, :filled], past_key_values=kept, use_cache=True)
            kept.batch_repeat_interleave(3)
        return kept

    ours = model.generate(PROMPTS, past_key_values=cache(), custom_generate=beam_search, **options)
    assert torch.equal(ours, model.generate(PROMPTS, **options))


def test_features_of_images_are_never_cut_to_rows():
    """Their first dimension counts images or patches, and may only happen to be that of the rows."""
    assert not bridge._has_rows("mm_encoder_outputs", {"image_features": torch.zeros(6, 4)}, 6)
    assert not bridge._has_rows("position_ids", torch.zeros(3, 3, 5), 3)
    assert bridge._has_rows("attention_mask", torch.ones(6, 4), 6)


def vision_language_models():
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ids = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    clip = {**text, "image_size": 8, "patch_size": 4}
    image, prompts = 19, PROMPTS[:2]
    four = torch.cat([torch.full((2, 4), image), prompts], 1)  # an image is four tokens
    qwen = torch.cat([torch.tensor([[17, image, image, image, image, 16]] * 2), prompts], 1)
    mask = {"attention_mask": torch.ones_like(four)}
    return {
        "LLaVA": lambda: (
            transformers.LlavaForConditionalGeneration(
                transformers.LlavaConfig(
                    vision_config=transformers.CLIPVisionConfig(**clip), image_token_id=image, vision_feature_layer=-1,
                    text_config=transformers.LlamaConfig(**text, **ids),
                )
            ),
            {"input_ids": four, "pixel_values": torch.randn(2, 3, 8, 8)},
        ),
        "Idefics3": lambda: (
            transformers.Idefics3ForConditionalGeneration(
                transformers.Idefics3Config(
                    vision_config=clip, text_config=transformers.LlamaConfig(**text, **ids), image_token_id=image,
                    scale_factor=1,
                )
            ),
            {"input_ids": four, "pixel_values": torch.randn(2, 1, 3, 8, 8), **mask},
        ),
        "Qwen2-VL": lambda: (
            transformers.Qwen2VLForConditionalGeneration(
                transformers.Qwen2VLConfig(
                    text_config={
                        **text, **ids, "num_key_value_heads": 2,
                        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
                    },
                    vision_config={
                        "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2,
                        "patch_size": 2, "spatial_merge_size": 1, "temporal_patch_size": 1,
                    },
                    image_token_id=image, video_token_id=18, vision_start_token_id=17, vision_end_token_id=16,
                )
            ),
            {
                "input_ids": qwen, "attention_mask": torch.ones_like(qwen), "pixel_values": torch.randn(8, 12),
                "image_grid_thw": torch.tensor([[1, 2, 2]] * 2), "mm_token_type_ids": (qwen == image).int(),
            },
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["LLaVA", "Idefics3", "Qwen2-VL"])
def test_beams_of_vision_language_models(kind):
    torch.manual_seed(0)
    model, inputs = vision_language_models()[kind]()
    model = randomised(model)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    theirs = model.generate(**copy.deepcopy(inputs), **options)
    ours = model.generate(**copy.deepcopy(inputs), **options, custom_generate=beam_search)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.beam_indices, theirs.beam_indices)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("num_beam_groups", {"num_beam_groups": 2, "diversity_penalty": 1.0}),
        ("force_words_ids", {"force_words_ids": [[5]]}),
        ("penalty_alpha", {"penalty_alpha": 0.6, "top_k": 4}),
        ("dola_layers", {"dola_layers": "low"}),
        ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 2}),
    ],
)
def test_other_searches_are_refused_by_name(name, options):
    model, inputs = models()["decoder-only"]
    with pytest.raises(ValueError, match=f"{name}: not carried out"):
        model.generate(**inputs, num_beams=4, max_new_tokens=3, custom_generate=beam_search, **options)
