"""Every op in Triton's interpreter on the tiles that its launchers take on each family of GPUs, where the other tests
take small ones.

tests/conftest.py runs this file in a process of its own, where the interpreter is chosen before Triton is imported.
"""

import dataclasses

import pytest
import torch

from mmkernels._tiles import configs, launch
from mmkernels.beam_search import triton_kernels as beam_search_kernels
from mmkernels.divided_attention.triton_kernels import configs as attention_configs
from mmkernels.retrieval import triton_kernels as retrieval_kernels
from tests.beam_search import cases as beam_search
from tests.distillation import cases as distillation
from tests.divided_attention import cases as divided_attention
from tests.info_nce import cases as info_nce
from tests.interpreting import guarded_allocations
from tests.linear_cross_entropy import cases as linear_cross_entropy
from tests.retrieval import cases as retrieval
from tests.siglip import cases as siglip
from tests.triplet import cases as triplet

# The dtype that takes each column of the tables of tiles. float16 takes bfloat16's.
DTYPES = {"half": torch.bfloat16, "ieee": torch.float32, "tf32x3": torch.float32}
# Two tiles of 128 and an edge each way. A loss of N x N has a small and square last tile, as half of all sizes have.
N, M, D = 269, 330, 40

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]


@pytest.fixture(params=[family for family in configs.CONFIGS if family != "interpreter"], autouse=True)
def family(request, monkeypatch):
    for module in (configs, attention_configs, retrieval_kernels, beam_search_kernels):
        monkeypatch.setattr(module, "family_of", lambda device: request.param)
    monkeypatch.setattr(launch, "MAX_PARTIALS", 2)
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request, family):
    if request.param not in configs.CONFIGS[family]:
        pytest.skip("multiplies float32 as IEEE asks")
    before = torch.backends.cuda.matmul.fp32_precision
    if request.param == "tf32x3":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield DTYPES[request.param]
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    yield from guarded_allocations(monkeypatch, launches=False)  # a precision that a family has not is skipped


def near_zero(case):
    """The case with matches that outweigh all other pairs: float32 leaves eager's loss no digit but 0."""
    changes = {name: 0.95 for name in ("near", "teacher_near") if hasattr(case, name)}
    changes |= {name: 100.0 for name in ("scale", "teacher_scale") if hasattr(case, name)}
    return dataclasses.replace(case, **changes, regime="loss near zero")


@pytest.mark.parametrize(
    "case",
    [
        info_nce.Case(N, M, D),
        info_nce.Case(N, M, D, options=info_nce.grouped(N, M, 37, label_smoothing=0.1), regime="groups"),
        near_zero(info_nce.Case(N, N, 64)),
        near_zero(info_nce.Case(N, N, 64, options=info_nce.grouped(N, N, N))),
    ],
    ids=str,
)
def test_info_nce(case, dtype):
    info_nce.check_case(case, dtype, "triton")


@pytest.mark.parametrize(
    "case",
    [
        distillation.Case(N, N, D, 48),
        distillation.Case(N, M, D, 48, symmetric=False, regime="rows alone"),
        near_zero(distillation.Case(N, N, 64, 64)),
    ],
    ids=str,
)
def test_distillation(case, dtype):
    distillation.check_case(case, dtype, "triton")


@pytest.mark.parametrize("case", [siglip.Case(N, M, D), siglip.Case(1, M, D, regime="one query")], ids=str)
def test_siglip(case, dtype):
    siglip.check_case(case, dtype, "triton", ("none", "mean"))


@pytest.mark.parametrize("case", triplet.cases([triplet.Case(N, M, D)]), ids=str)
def test_triplet(case, dtype):
    for reduction in ("none", "mean"):
        triplet.check_case(case, dtype, "triton", reduction)


@pytest.mark.parametrize(
    "case",
    [
        linear_cross_entropy.Case(N, M, D, ignored="some", options={"label_smoothing": 0.1}),
        linear_cross_entropy.Case(N, M, D, bias=False, scale=100.0, regime="logits of 100"),
    ],
    ids=str,
)
def test_linear_cross_entropy(case, dtype):
    linear_cross_entropy.check_case(case, dtype, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [retrieval.Case(N, M, D)], ids=str)
def test_retrieval(case, dtype):
    retrieval.check_case(case, dtype, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "case",
    [
        # Packed and streamed, with a mask and without; sequences of several tiles and an edge.
        divided_attention.Case(5, 13, "time", batch=1, heads=1),
        divided_attention.Case(5, 13, "time", "paper", batch=1, heads=1, mask="holes"),
        divided_attention.Case(70, 2, "space", batch=1, heads=1, head=40),
        divided_attention.Case(70, 2, "space", "global_cls", "tn", batch=1, heads=1, mask="holes", dropout_p=0.3),
    ],
    ids=str,
)
def test_divided_attention(case, dtype):
    divided_attention.check_case(case, dtype, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "case",
    [
        beam_search.Case(1, 3, 5003),
        beam_search.Case(1, 2, 5003, "ties", options=beam_search.of(forbidden="rows", mask_first=True)),
    ],
    ids=str,
)
def test_beam_search(case, dtype):
    beam_search.check_case(case, dtype, "triton")
