"""A captioner: a convolutional encoder, and an LSTM that looks at its feature map while it writes.

The decoder follows Xu et al. 2015 (arXiv:1502.03044): at each word a softmax over the places of the map says where it
looks. Its loss is ``mmkernels.linear_cross_entropy``, on the embedding table as the last layer;
``mmkernels.beam_search`` writes captions, and needs an image encoded once, whatever the number of beams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmkernels
from mmkernels.beam_search import BeamSearchResult
from models.common.layers import conv_stages

PAD, START, UNKNOWN, END = range(4)  # the first ids of every vocabulary


@dataclass(frozen=True)
class CaptionerConfig:
    """A captioner. The encoder has a stage for each of ``widths``; each halves the side of the image.

    The last stage but one is the map that the decoder looks at; the last one sums up the image.
    """

    image_size: int = 48
    widths: tuple[int, ...] = (32, 64, 128, 256)
    depths: tuple[int, ...] = (0, 1, 2, 2)
    features: int = 256
    embedding: int = 256
    hidden: int = 512
    attention: bool = True
    dropout: float = 0.3

    @staticmethod
    def from_dict(values: dict[str, Any]) -> CaptionerConfig:
        """The config that :func:`dataclasses.asdict` made ``values`` from (JSON's lists become tuples again)."""
        return CaptionerConfig(**{**values, "widths": tuple(values["widths"]), "depths": tuple(values["depths"])})


PresetName = Literal["nano", "small", "base"]

PRESETS: dict[PresetName, CaptionerConfig] = {
    # Tests use this one.
    "nano": CaptionerConfig(32, (16, 32, 32), (0, 0, 0), 32, 32, 64, dropout=0.0),
    # What two CPU cores train in less than half an hour.
    "small": CaptionerConfig(),
    # Photographs.
    "base": CaptionerConfig(224, (64, 128, 256, 512, 512), (1, 1, 2, 2, 1), 512, 512, 1024),
}


class Encoded(NamedTuple):
    """An image as the decoder sees it: places [B, P, F] to look at, and a summary [B, F]."""

    places: Tensor
    summary: Tensor

    def first(self, count: int) -> Encoded:
        """The first ``count`` images."""
        return Encoded(self.places[:count], self.summary[:count])


State = tuple[Tensor, Tensor]  # hidden and cell of the LSTM, [rows, H] each


class Captioner(nn.Module):
    """Encoder and decoder."""

    def __init__(self, config: CaptionerConfig, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        stride = 2 ** len(config.widths)
        if config.image_size % stride:
            raise ValueError(f"image_size {config.image_size} is not a multiple of the encoder's stride, {stride}")
        width, side = config.features, config.image_size // stride
        self.local = conv_stages(3, config.widths[:-1], config.depths[:-1])
        self.whole = conv_stages(config.widths[-2], config.widths[-1:], config.depths[-1:])
        self.summary = nn.Linear(config.widths[-1] * side**2, width)
        self.summary_norm = nn.LayerNorm(width)
        if config.attention:
            self.places = nn.Linear(config.widths[-2], width)
            self.position_embedding = nn.Parameter(0.02 * torch.randn((2 * side) ** 2, width))
            self.places_norm = nn.LayerNorm(width)
            self.query = nn.Linear(config.hidden, width)
            self.gate = nn.Linear(config.hidden, width)
        seen = width * (2 if config.attention else 1)  # how many features of the image each word sees
        self.embedding = nn.Embedding(vocabulary, config.embedding)
        self.start = nn.Linear(width, 2 * config.hidden)
        self.cell = nn.Linear(config.embedding + seen + config.hidden, 4 * config.hidden)
        self.head = nn.Linear(config.hidden + seen, config.embedding)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=config.embedding**-0.5)

    def encode(self, images: Tensor) -> Encoded:
        """images [B, 3, S, S] -> what the decoder sees of them."""
        local = self.local(images)
        summary = self.summary_norm(self.summary(self.whole(local).flatten(1)))
        if not self.config.attention:
            return Encoded(summary.unsqueeze(1), summary)
        places = self.places(local.flatten(2).transpose(1, 2))
        return Encoded(self.places_norm(places + self.position_embedding), summary)

    def begin(self, encoded: Encoded) -> State:
        """The state before the first word."""
        hidden, cell = self.start(encoded.summary).tanh().chunk(2, -1)
        return hidden, cell

    def step(self, tokens: Tensor, state: State, encoded: Encoded) -> tuple[Tensor, State, Tensor]:
        """Take one word: tokens [B K], K per image -> rows [B K, E] for :meth:`logits`, state, shares [B K, P].

        The shares say where the decoder looks; they sum to 1.
        """
        hidden, cell = state
        items = len(encoded.summary)
        beams = hidden.view(items, -1, hidden.shape[-1])  # [B, K, H]: an image is there once for all its beams
        seen = encoded.summary.unsqueeze(1).expand(-1, beams.shape[1], -1)
        if self.config.attention:
            scores = self.query(beams) @ encoded.places.transpose(1, 2) * encoded.places.shape[-1] ** -0.5
            shares = scores.softmax(-1)
            looked = self.gate(beams).sigmoid() * (shares.to(encoded.places.dtype) @ encoded.places)
            seen = torch.cat([seen, looked], -1)
        else:
            shares = hidden.new_ones(items, beams.shape[1], 1)
        seen = seen.flatten(0, 1)
        words = self.dropout(self.embedding(tokens))
        gates = self.cell(torch.cat([words, seen, hidden], -1)).float()
        keep, write, show, content = gates.chunk(4, -1)
        cell = (keep + 1).sigmoid() * cell + write.sigmoid() * content.tanh()
        hidden = show.sigmoid() * cell.tanh()
        return self.head(self.dropout(torch.cat([hidden, seen], -1))), (hidden, cell), shares.flatten(0, 1)

    def logits(self, rows: Tensor) -> Tensor:
        """Rows [n, E] -> logits [n, V] over what may be written: never padding, start, or the unknown word."""
        logits = F.linear(rows, self.embedding.weight, self.bias)
        logits[:, [PAD, START, UNKNOWN]] = float("-inf")
        return logits

    def forward(self, images: Tensor, tokens: Tensor, lengths: Sequence[int], sampling: float = 0.0) -> Tensor:
        """Rows [n, E] that predict the tokens [B, L] of captions, one step after the other: see :func:`targets_of`.

        ``lengths`` are the predictions of each caption, in falling order: a step leaves out the captions that have
        ended. With probability ``sampling`` the word before is not the caption's but one that the model itself would
        have written (Bengio et al. 2015, arXiv:1506.03099).
        """
        encoded = self.encode(images)
        state = self.begin(encoded)
        rows: list[Tensor] = []
        for t in range(lengths[0]):
            count = sum(length > t for length in lengths)
            given = tokens[:count, t]
            if t and sampling > 0:
                with torch.no_grad():
                    own = torch.multinomial(self.logits(rows[-1][:count]).float().softmax(-1), 1).squeeze(1)
                    own = torch.where(own == END, given, own)  # after the end there is no word
                    given = torch.where(torch.rand(count, device=given.device) < sampling, own, given)
            state = state[0][:count], state[1][:count]
            out, state, _ = self.step(given, state, encoded.first(count))
            rows.append(out)
        return torch.cat(rows)

    @torch.no_grad()
    def greedy(self, encoded: Encoded, max_length: int) -> Tensor:
        """Write the most probable word each time: ids [B, L], padded behind their end."""
        state, items = self.begin(encoded), len(encoded.summary)
        token = torch.full((items,), START, device=encoded.summary.device)
        ended = torch.zeros_like(token, dtype=torch.bool)
        found: list[Tensor] = []
        while len(found) < max_length and not ended.all():
            rows, state, _ = self.step(token, state, encoded)
            token = self.logits(rows).argmax(-1).masked_fill(ended, PAD)
            ended = ended | (token == END)
            found.append(token)
        return torch.stack(found, 1)

    def beam_search(
        self, encoded: Encoded, beams: int, max_length: int, length_penalty: float = 1.0
    ) -> BeamSearchResult:
        """The best captions that ``beams`` beams find."""

        def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
            rows, state, _ = self.step(tokens, state, encoded)
            return self.logits(rows), state

        return mmkernels.beam_search(
            step,
            self.begin(encoded),
            batch_size=len(encoded.summary),
            num_beams=beams,
            bos_token_id=START,
            eos_token_id=END,
            pad_token_id=PAD,
            max_length=max_length,
            length_penalty=length_penalty,
        )

    @torch.no_grad()
    def looks(self, encoded: Encoded, ids: Tensor) -> Tensor:
        """Where the decoder looks for each of the words ids [B, L]: shares [B, L, P]."""
        state, shares = self.begin(encoded), []
        before = torch.cat([torch.full_like(ids[:, :1], START), ids[:, :-1]], 1)
        for given in before.T:
            _, state, own = self.step(given, state, encoded)
            shares.append(own)
        return torch.stack(shares, 1)


def targets_of(tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """The tokens that the rows of :meth:`Captioner.forward` predict, in its order."""
    return torch.cat([tokens[: sum(length > t for length in lengths), t + 1] for t in range(lengths[0])])
