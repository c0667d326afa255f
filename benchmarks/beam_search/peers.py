"""What users run today for beam search: one step of it, and two whole loops with their models."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmkernels

# The packages whose versions a report writes beside its numbers; torch is always there.
PACKAGES = ("transformers", "ctranslate2")

EOS = 2
Step = Callable[[Tensor, Tensor], Any]


def eager_step(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three lines that the step replaces, in the dtype of the logits."""
    B, K = scores.shape
    log_probs = torch.log_softmax(logits, -1).view(B, K, -1)
    best, at = (scores[:, :, None] + log_probs).flatten(1).topk(2 * K)
    return best, at // log_probs.shape[2], at % log_probs.shape[2]


def beam_steps(dtype: torch.dtype, impl: str = "auto") -> dict[str, Step]:
    """Calls (logits [B K, V], scores [B, K]), the fused one first."""
    steps: dict[str, Step] = {
        "mmkernels": lambda logits, scores: mmkernels.beam_search_step(logits, scores, impl=impl),  # type: ignore[arg-type]
        "eager": eager_step,
        "torch.compile": torch.compile(eager_step, dynamic=False),
    }
    if dtype != torch.float32:
        steps["eager in float32"] = lambda logits, scores: eager_step(logits.float(), scores)
    return steps


class Captioner(nn.Module):
    """An LSTM that tells of a picture: the decoder of a captioner, random weights."""

    def __init__(self, vocabulary: int, size: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.cell = nn.LSTMCell(size, size)
        self.head = nn.Linear(size, vocabulary)

    def forward(self, tokens: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden, memory = self.cell(self.embedding(tokens), state)
        return self.head(hidden), (hidden, memory)


@torch.no_grad()
def eager_search(model: Captioner, state: Any, B: int, K: int, T: int) -> Tensor:
    """A loop as tutorials write it: finished beams are held at EOS, histories are gathered; sequences [B, K, T]."""
    tokens = torch.ones(B * K, dtype=torch.int64)
    state = tuple(x.repeat_interleave(K, 0) for x in state)
    scores = torch.full((B, K), -torch.inf)
    scores[:, 0] = 0
    sequences = torch.empty(B, K, 0, dtype=torch.int64)
    held = None
    for _ in range(T):
        logits, state = model(tokens, state)
        log_probs = torch.log_softmax(logits, -1).view(B, K, -1)
        if held is None:
            held = torch.full((log_probs.shape[2],), -torch.inf)
            held[EOS] = 0
        if len(sequences[0, 0]):
            log_probs = torch.where((sequences[:, :, -1] == EOS)[:, :, None], held, log_probs)
        scores, at = (scores[:, :, None] + log_probs).flatten(1).topk(K)
        parents, chosen = at // log_probs.shape[2], at % log_probs.shape[2]
        sequences = torch.cat([sequences.gather(1, parents[:, :, None].expand_as(sequences)), chosen[:, :, None]], 2)
        rows = (torch.arange(B)[:, None] * K + parents).flatten()
        state = tuple(x[rows] for x in state)
        tokens = chosen.flatten()
        if bool((chosen == EOS).all()):
            break
    return sequences


def captioner_loops(B: int, K: int, V: int, T: int, impl: str = "auto") -> dict[str, Callable[[], Any]]:
    """Loops over a captioner: our search, a tutorial's, and the model alone on as many rows for as many steps."""
    torch.manual_seed(0)
    model = Captioner(V).eval()
    start = (torch.randn(B, 512), torch.randn(B, 512))
    wide = tuple(x.repeat_interleave(K, 0) for x in start)
    rows = torch.ones(B * K, dtype=torch.int64)

    def search() -> Any:
        result = mmkernels.beam_search(
            model, start, batch_size=B, num_beams=K, bos_token_id=1, eos_token_id=EOS, max_length=T, impl=impl  # type: ignore[arg-type]
        )  # fmt: skip
        assert result.steps == T
        return result

    @torch.no_grad()
    def alone() -> None:
        model(rows[:B], start)
        state = wide
        for _ in range(T - 1):
            _, state = model(rows, state)

    return {"mmkernels": search, "the model alone": alone, "eager": lambda: eager_search(model, start, B, K, T)}


def gpt2_loops(B: int, K: int, T: int, width: int) -> dict[str, Callable[[], Any]]:
    """`generate` of a GPT-2 of two layers, random weights: on the op, as Hugging Face has it, and in CTranslate2."""
    import tokenizers
    import transformers

    from mmkernels.integrations.transformers import beam_search

    V = 50257
    torch.manual_seed(0)
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": EOS}
    config = transformers.GPT2Config(vocab_size=V, n_positions=64, n_embd=width, n_layer=2, n_head=4, **special)
    model = transformers.GPT2LMHeadModel(config).eval()
    prompts = torch.randint(3, V, (B, 4))
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    options = {"num_beams": K, "max_new_tokens": T, "do_sample": False}
    spent = 0.0
    forward = model.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        before = time.perf_counter()
        output = forward(*args, **kwargs)
        spent += time.perf_counter() - before
        return output

    def forward_alone() -> float:
        """Seconds in the model in one run of Hugging Face's search."""
        nonlocal spent
        model.forward, spent = timed, 0.0
        try:
            model.generate(**inputs, **options)
        finally:
            model.forward = forward
        return spent

    loops: dict[str, Callable[[], Any]] = {
        "mmkernels": lambda: model.generate(**inputs, **options, custom_generate=beam_search),
        "Hugging Face": lambda: model.generate(**inputs, **options),
        "the model, in Hugging Face's": forward_alone,
    }
    try:
        import ctranslate2
    except ImportError:
        return loops
    with tempfile.TemporaryDirectory() as folder:
        names = {f"t{i}": i for i in range(V)}
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="t0"))
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="t1", eos_token="t2", unk_token="t0"
        )
        model.save_pretrained(Path(folder, "model"))
        tokenizer.save_pretrained(Path(folder, "model"))
        ctranslate2.converters.TransformersConverter(f"{folder}/model").convert(f"{folder}/converted")
        generator = ctranslate2.Generator(
            f"{folder}/converted", device="cpu", intra_threads=torch.get_num_threads(), compute_type="float32"
        )
    texts = [[f"t{i}" for i in prompt] for prompt in prompts.tolist()]
    loops["CTranslate2"] = lambda: generator.generate_batch(
        texts, beam_size=K, max_length=T, include_prompt_in_result=False, return_scores=True
    )
    return loops
