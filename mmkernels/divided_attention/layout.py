"""What a call of the op means, in plain numbers: sizes, sequences, rows of log-sum-exps, the pairs that attend."""

from typing import NamedTuple

AXES = ("time", "space", "joint")
CLS_MODES = ("timesformer", "global_cls", "paper", "none")
TOKEN_ORDERS = ("nt", "tn")


class Layout(NamedTuple):
    """The tokens of one clip and the sequences that they form.

    Patches lie at position n of N and frame t of T. A *sequence* is the set of patches that meet: those of a position
    (time), those of a frame (space), or all (joint).
    """

    num_positions: int  # N
    num_frames: int  # T
    axis: str
    cls_mode: str
    token_order: str

    @property
    def has_cls(self) -> int:
        """1 if token 0 is the class token, else 0: the index of the first patch."""
        return int(self.cls_mode != "none")

    @property
    def num_tokens(self) -> int:
        """L, the class token included."""
        return self.has_cls + self.num_positions * self.num_frames

    @property
    def num_sequences(self) -> int:
        """How many sequences the patches form."""
        return {"time": self.num_positions, "space": self.num_frames, "joint": 1}[self.axis]

    @property
    def length(self) -> int:
        """Patches of a sequence."""
        return self.num_positions * self.num_frames // self.num_sequences

    @property
    def cls_is_key(self) -> bool:
        """Whether patches attend to the class token."""
        return self.cls_mode != "none" and not (self.cls_mode == "timesformer" and self.axis == "time")

    @property
    def cls_is_global(self) -> bool:
        """Whether the class token attends to all tokens, once."""
        return self.has_cls == 1 and (self.cls_mode == "global_cls" or self.axis == "joint")

    @property
    def cls_rows(self) -> int:
        """How often the class token is a query: once in each sequence (its outputs are averaged), once, or never."""
        if not self.cls_is_key:
            return 0
        return 1 if self.cls_is_global else self.num_sequences

    @property
    def num_rows(self) -> int:
        """Rows of the log-sum-exps: the class token's, then the patches in the order of the tokens."""
        return self.cls_rows + self.num_positions * self.num_frames

    @property
    def pairs(self) -> int:
        """Query-key pairs of one clip and head: what FLOPs are counted from."""
        patches = self.num_positions * self.num_frames * (self.length + self.cls_is_key)
        if not self.cls_rows:
            return patches
        return patches + (self.num_tokens if self.cls_is_global else self.num_sequences * (self.length + 1))

    def token(self, position: int, frame: int) -> int:
        """The index of a patch among the tokens."""
        first, second = (position, frame) if self.token_order == "nt" else (frame, position)
        return self.has_cls + first * (self.num_frames if self.token_order == "nt" else self.num_positions) + second


def layout_of(num_tokens: int, num_frames: int, axis: str, cls_mode: str, token_order: str) -> Layout:
    """The layout of clips of `num_tokens` tokens."""
    positions = (num_tokens - (cls_mode != "none")) // num_frames
    return Layout(positions, num_frames, axis, cls_mode, token_order)
