"""Beams of every architecture that transformers builds from a small configuration: ours against its own."""

import pytest
import torch
from torch import nn

from mmkernels.integrations.transformers import beam_search

transformers = pytest.importorskip("transformers")

from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

# What makes a configuration small, under the names that transformers' configurations give it.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "attention_hidden_size"), 16),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "rank", "q_lora_rank", "kv_lora_rank", "d_embed"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 4),  # some attend in every fourth layer alone
    **dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 32),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "lru_width", "d_inner"), 32),
    **dict.fromkeys(("head_dim", "d_kv", "linear_key_head_dim", "linear_value_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "attention_head_size", "mamba_d_head"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "context_length", "max_seq_len"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "mamba_n_heads", "rotary_dim"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "linear_num_value_heads"), 2),
    **dict.fromkeys(
        ("n_group", "topk_group", "n_shared_experts", "mamba_n_groups", "n_groups", "attn_layer_offset"), 1
    ),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 4),
    **dict.fromkeys(("decoder_start_token_id", "bos_token_id"), 1),
    "vocab_size": 23,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
OTHER_SIZES = {
    "codegen": {"n_head": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 4},
}
KINDS = {
    name: auto
    for auto, names in (
        (transformers.AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        (transformers.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    )
    for name in names
}


# transformers leaves MiniMax's states with the wrong beams: only its search without a cache is right.
WITHOUT_CACHE = ["minimax"]
ALONE = [name for name in KINDS if not transformers.CONFIG_MAPPING[name].sub_configs]  # no model of models


def small_model(name):
    """A model of the kind with random weights, whose logits are far enough apart that no rounding decides."""
    config_class = transformers.CONFIG_MAPPING[name]
    known = {*config_class().to_dict(), *config_class.attribute_map}
    sizes = {key: value for key, value in SIZES.items() if key in known} | OTHER_SIZES.get(name, {})
    config = config_class(**sizes)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 1
    else:
        config.is_decoder = True
    torch.manual_seed(0)
    model = KINDS[name].from_config(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
                module.weight.normal_(0, 0.4)
    return model


def beams(model, **options):
    mask = torch.ones(3, 4, dtype=torch.int64)
    mask[0, 0] = 0
    prompts = torch.randint(4, 23, (3, 4), generator=torch.Generator().manual_seed(1))
    options |= {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": "custom_generate" not in options}
    return model.generate(input_ids=prompts, attention_mask=mask, **options)


def assert_same(ours, theirs):
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.beam_indices, theirs.beam_indices)


@pytest.mark.parametrize("name", ["bart", "t5", "bloom", "gemma2", "gpt_neox", "llama", "mamba", "opt"])
def test_beams_are_those_of_transformers(name):
    model = small_model(name)
    assert_same(beams(model, custom_generate=beam_search), beams(model))


@pytest.mark.slow
def test_every_architecture():
    """Those that these sizes cannot build, or that transformers' own search cannot run, are counted and no more."""
    same, unlike, out_of_reach = [], {}, {}
    for name in ALONE:
        try:
            model = small_model(name)
            theirs = beams(model, use_cache=name not in WITHOUT_CACHE)
        except Exception as error:  # of any kind: transformers raises what it likes
            out_of_reach[name] = error
            continue
        try:
            assert_same(beams(model, custom_generate=beam_search), theirs)
            same.append(name)
        except Exception as error:
            unlike[name] = error
    print(f"{len(same)} the same; out of reach: {out_of_reach}")
    assert unlike == {}
    assert len(same) >= 150
