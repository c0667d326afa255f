"""generate(custom_generate=beam_search) against Hugging Face's own beams."""

import pytest
import torch

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
    theirs, ours = model.generate(**common), model.generate(**common, custom_generate=beam_search)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.beam_indices, theirs.beam_indices)
    own = ours.sequences == theirs.sequences
    assert (own | (ours.sequences == 0)).all()  # past its end: transformers takes a padding id of 0 for none
    assert type(ours) is type(theirs)


def test_what_it_cannot_do_is_refused_by_name():
    model, inputs = models()["decoder-only"]
    for options, name in (({"output_logits": True}, "output_logits"), ({"max_time": 1.0}, "MaxTimeCriteria")):
        with pytest.raises(ValueError, match=name):
            model.generate(
                **inputs, num_beams=2, max_new_tokens=3, custom_generate=beam_search, return_dict_in_generate=True,
                **options,
            )  # fmt: skip
