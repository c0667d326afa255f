"""What a call of the op means, in plain numbers: derived here once, and taken as they are by every backend."""

import functools
from typing import NamedTuple

import torch

AXES = ("time", "space", "joint")
CLS_MODES = ("timesformer", "global_cls", "paper", "none")
TOKEN_ORDERS = ("nt", "tn")

# Layout.cls: what the class token does, if there is one.
APART = 0  # it takes no part
AVERAGED = 1  # it is a key and a query of every sequence, and its outputs are averaged
GLOBAL = 2  # it is a key of every sequence, and as a query it attends to all tokens, once


class Layout(NamedTuple):
    """The tokens of one clip and the sequences that they form.

    A *sequence* is the set of patches that meet: those of a position (time), those of a frame (space), or all (joint).
    Patch j of sequence s is the token has_cls + s * sequence_step + j * patch_step. The frame of a token is
    (token - has_cls) // frame_step % num_frames.
    """

    num_sequences: int
    length: int  # patches of a sequence
    sequence_step: int
    patch_step: int
    has_cls: int  # 1 if token 0 is the class token, else 0: the index of the first patch
    cls: int  # APART, AVERAGED or GLOBAL
    num_frames: int
    frame_step: int

    @property
    def num_patches(self) -> int:
        """N T: the tokens but for the class token."""
        return self.num_sequences * self.length

    @property
    def num_tokens(self) -> int:
        """L, the class token included."""
        return self.has_cls + self.num_patches

    @property
    def items(self) -> int:
        """Keys of a sequence: its patches, and the class token where it takes part."""
        return self.length + int(self.cls != APART)

    @property
    def cls_rows(self) -> int:
        """How often the class token is a query: once in each sequence (its outputs are averaged), once, or never."""
        return self.num_sequences if self.cls == AVERAGED else int(self.cls == GLOBAL)

    @property
    def num_rows(self) -> int:
        """Rows of the log-sum-exps: the class token's, then the patches in the order of the tokens."""
        return self.cls_rows + self.num_patches

    @property
    def pairs(self) -> int:
        """Query-key pairs of one clip and head: what FLOPs are counted from."""
        of_cls = self.num_tokens if self.cls == GLOBAL else self.cls_rows * self.items
        return self.num_patches * self.items + of_cls

    @property
    def mixes_frames(self) -> bool:
        """Whether a sequence holds patches of more than one frame."""
        return (self.length - 1) * self.patch_step // self.frame_step % self.num_frames > 0


def layout_of(num_tokens: int, num_frames: int, axis: str, cls_mode: str, token_order: str) -> Layout:
    """The layout of clips of `num_tokens` tokens."""
    # torch.compile warns of a cache and traces past it; a size that is no number yet has no place in one.
    known = isinstance(num_tokens, int) and isinstance(num_frames, int) and not torch.compiler.is_compiling()
    return (_derive_once if known else _derive)(num_tokens, num_frames, axis, cls_mode, token_order)


def _derive(num_tokens: int, num_frames: int, axis: str, cls_mode: str, token_order: str) -> Layout:
    has_cls = int(cls_mode != "none")
    patches = num_tokens - has_cls
    positions = patches // num_frames
    # Tokens to the next position, and to the next frame.
    position_step, frame_step = (num_frames, 1) if token_order == "nt" else (1, positions)
    if axis == "time":
        shape = positions, num_frames, position_step, frame_step
    elif axis == "space":
        shape = num_frames, positions, frame_step, position_step
    else:
        shape = 1, patches, 0, 1
    if not has_cls or (cls_mode == "timesformer" and axis == "time"):
        cls = APART
    else:
        cls = GLOBAL if cls_mode == "global_cls" or axis == "joint" else AVERAGED
    return Layout(*shape, has_cls, cls, num_frames, frame_step)


# To derive takes 0.8 us, to look it up 0.1, and a whole call of a few tokens 15.
_derive_once = functools.lru_cache(maxsize=1024)(_derive)
