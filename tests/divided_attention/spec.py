"""How divided_attention is called, and what it refuses: the spec that tests/contract.py holds it to."""

from fractions import Fraction

import torch

import mmkernels
from tests.contract import Call, Memory, Spec
from tests.divided_attention.cases import SEED


def clips(dtype, n, cls=True):
    """qkv of two clips of n positions and 5 frames, and a mask in which any frame may be absent."""
    generator = torch.Generator().manual_seed(n)
    qkv = torch.randn(2, cls + n * 5, 3 * 32, generator=generator, dtype=torch.float64).to(dtype)
    return [qkv], [(torch.arange(5) * 3 + torch.arange(2)[:, None] * 5) % 4 != 0]


def lse_of_an_infinite_score(impl, tensor, entry, result):
    """NaN in Triton, infinity elsewhere."""
    return impl == "triton" and abs(entry) == torch.inf and result == 1


def call(axis, cls_mode="timesformer", token_order="nt", dropout_p=0.0, masked=False):
    def run(impl, qkv, mask):
        return mmkernels.divided_attention(
            qkv, num_frames=5, num_heads=2, axis=axis, cls_mode=cls_mode, token_order=token_order, dropout_p=dropout_p,
            dropout_seed=SEED, frame_mask=mask if masked else None, return_lse=True, impl=impl,
        )  # fmt: skip

    return Call(lambda dtype, n: clips(dtype, n // 3), run, lse_of_an_infinite_score)


# One call of each schedule and treatment of the class token.
CALLS = {
    "space, masked": call("space", masked=True),
    "time": call("time"),
    "time, global class token": call("time", "global_cls", "tn"),
    "space, global class token": call("space", "global_cls"),
    "joint, dropout": call("joint", dropout_p=0.2),
}


def bad_inputs():
    x, mask = torch.zeros(2, 13, 48), torch.ones(2, 3, dtype=torch.bool)
    return {
        "qkv: expected a tensor, got list": (TypeError, [1.0], {}),
        "qkv: expected float32, bfloat16": (TypeError, x.long(), {}),
        "qkv: expected 3 dimensions": (ValueError, x[0], {}),
        "qkv: expected a dense tensor": (TypeError, x.to_sparse(), {}),
        "frame_mask: expected a dense tensor": (TypeError, x, {"frame_mask": mask.to_sparse()}),
        "axis: expected one of 'time', 'space', 'joint', got 'depth'": (ValueError, x, {"axis": "depth"}),
        "cls_mode: expected one of .* got 'mean'": (ValueError, x, {"cls_mode": "mean"}),
        "token_order: expected one of 'nt', 'tn', got 'th'": (ValueError, x, {"token_order": "th"}),
        "return_lse: expected a bool, got str": (TypeError, x, {"return_lse": "no"}),
        "num_frames: expected an int, got float": (TypeError, x, {"num_frames": 3.0}),
        "num_frames: expected at least 1, got 0": (ValueError, x, {"num_frames": 0}),
        "num_heads: expected an int, got bool": (TypeError, x, {"num_heads": True}),
        "num_heads: expected at least 1, got -2": (ValueError, x, {"num_heads": -2}),
        r"qkv: expected a last dimension of 3 \* num_heads \* D = 21 D, got 48": (ValueError, x, {"num_heads": 7}),
        "qkv: expected a last dimension of .* got 0": (ValueError, x[..., :0], {}),
        "num_frames: 13 tokens, the class token among them, are not a whole number of patches for each of 5 frames": (
            ValueError,
            x,
            {"num_frames": 5},
        ),
        "num_frames: 13 tokens are not a whole number .* cls_mode='none'": (ValueError, x, {"cls_mode": "none"}),
        "num_frames: 1 tokens": (ValueError, x[:, :1], {}),
        "scale: expected a float, got str": (TypeError, x, {"scale": "1"}),
        "frame_mask: expected a bool tensor, got list": (TypeError, x, {"frame_mask": [True]}),
        "frame_mask: expected bool, True for a real frame, got torch.float32": (
            TypeError,
            x,
            {"frame_mask": mask.float()},
        ),
        r"frame_mask: expected shape \[B, T\] = \(2, 3\), got \(3, 2\)": (ValueError, x, {"frame_mask": mask.T}),
        "frame_mask: expected device cpu": (ValueError, x, {"frame_mask": mask.to("meta")}),
        "dropout_p: expected a float, got NoneType": (TypeError, x, {"dropout_p": None}),
        r"dropout_p: expected a value in \[0, 1\), got 1.0": (ValueError, x, {"dropout_p": 1.0}),
        r"dropout_p: expected a value in \[0, 1\), got nan": (ValueError, x, {"dropout_p": float("nan")}),
        "dropout_seed: expected an int or an int64 tensor, got str": (
            TypeError,
            x,
            {"dropout_p": 0.1, "dropout_seed": "1"},
        ),
        "dropout_seed: expected an int or an int64 tensor, got bool": (
            TypeError,
            x,
            {"dropout_p": 0.1, "dropout_seed": True},
        ),
        "dropout_seed: expected an int64 tensor, got torch.float32": (
            TypeError,
            x,
            {"dropout_p": 0.1, "dropout_seed": torch.zeros(1)},
        ),
        "dropout_seed: expected one element": (
            ValueError,
            x,
            {"dropout_p": 0.1, "dropout_seed": torch.zeros(2, dtype=torch.int64)},
        ),
        "dropout_seed: expected a value of 64 bits": (ValueError, x, {"dropout_p": 0.1, "dropout_seed": 2**63}),
        "impl: expected 'auto' or one of": (ValueError, x, {"impl": "cuda13"}),
    }


def a_clip(dtype, n):
    """qkv of one clip of 8 frames of n patches, 12 heads of 64."""
    return [torch.randn(1, 1 + n * 8, 3 * 768, generator=torch.Generator().manual_seed(0)).to(dtype)], []


def joint(impl, qkv):
    return mmkernels.divided_attention(qkv, num_frames=8, num_heads=12, axis="joint", return_lse=True, impl=impl)


def packed_heads(tensors, scratch):
    """Keys and values of one head and a block of scores for each thread; the gradient of the sum, made whole."""
    return tensors[0].nbytes // 3 + max(8 << 20, scratch)


def probabilities(tensors):
    return 12 * tensors[0].shape[1] ** 2 * tensors[0].dtype.itemsize


DIVIDED_ATTENTION = Spec(
    CALLS,
    mmkernels.divided_attention,
    lambda: {
        words: (error, (qkv,), {"num_frames": 3, "num_heads": 2, "axis": "time"} | options)
        for words, (error, qkv, options) in bad_inputs().items()
    },
    # 392 patches: 12 matrices of [3137, 3137].
    memory={"joint": Memory(Call(a_clip, joint), 392, packed_heads, probabilities)},
    backward_flops=Fraction(5, 4),  # with the scores that a fused attention makes again, as torch counts its own
    traced="num_frames: 13 tokens, the class token among them, are not a whole number of patches for each of 5 frames",
)
