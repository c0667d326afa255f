"""The CUDA device code of beam search, run thread by thread on a CPU under AddressSanitizer: the bits of the reference.

The program (emulated.cpp) reads cases and writes results; every buffer there is an allocation of its own,
so that a step over its ends is an error.
"""

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

import mmkernels
from mmkernels.beam_search.reference import beam_search_advance
from mmkernels.beam_search.specification import BeamCandidates, Beams, Progress
from tests.beam_search.cases import CASES, Case, assert_same
from tests.beam_search.test_advance import random_search

HERE = Path(__file__).parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLAGS = ["-std=c++20", "-O1", "-g1", "-fno-strict-aliasing", "-ffp-contract=off", "-fsanitize=address,undefined"]
FLAGS += ["-fno-sanitize-recover=all"]

# multiprocessors, clusters, warps, part_bytes, least_part, staged_bytes, group_bytes
DEVICES = {
    "H100": (132, 1, 8, 32 << 10, 2048, 96 << 10, 16 << 20),
    "A100": (108, 0, 8, 32 << 10, 2048, 96 << 10, 16 << 20),
    # Small, so that small inputs have parts and groups, too.
    "clusters": (64, 1, 2, 512, 128, 1 << 20, 1 << 20),
    "clusters-not-staged": (64, 1, 2, 512, 128, 0, 1 << 20),
    "parts": (64, 0, 2, 512, 128, 1 << 20, 4096),
    "parts-not-staged": (64, 0, 2, 512, 128, 0, 1),
    "one-warp": (1, 0, 1, 1 << 20, 1 << 20, 1 << 20, 1 << 20),
}
FORWARD, BACKWARD, RANDOM = 0, 1, 2


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("emulated") / "beam_search_emulated"
    command = [*compiler.split(), *FLAGS, str(HERE / "emulated.cpp"), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "libasan" in result.stderr or "unsupported option" in result.stderr:
        pytest.skip(f"{compiler} has no AddressSanitizer")
    assert result.returncode == 0, result.stderr
    return target


def rows_of_bytes(x: torch.Tensor) -> bytes:
    """A matrix as it lies in memory, strides included, without what follows its last row."""
    length = 0 if x.numel() == 0 else (x.shape[0] - 1) * x.stride(0) + x.shape[1]
    return x.as_strided((length,), (1,)).view(torch.uint8).numpy().tobytes()


def spaced(logits: torch.Tensor) -> torch.Tensor:
    """The same rows with NaN between them."""
    wide = torch.full((logits.shape[0], logits.shape[1] + 3), torch.nan, dtype=logits.dtype)
    wide[:, : logits.shape[1]] = logits
    return wide[:, : logits.shape[1]]


def run_emulated(program: Path, device: str, schedule: int, calls) -> list[BeamCandidates]:
    """The step's results for calls of (logits, scores, options)."""
    shapes = []
    with open(program.parent / "input", "wb") as out:
        for logits, scores, options in calls:
            (B, K), V = scores.shape, logits.shape[1]
            C = options.get("num_candidates") or 2 * K
            forbidden, valid = options.get("forbidden"), options.get("valid")
            if forbidden is not None:
                forbidden = forbidden.expand(B * K, V)
            out.write(
                struct.pack(
                    "19q", B, K, V, C, options.get("normalize", True), options.get("mask_first", False),
                    DTYPES.index(logits.dtype), logits.stride(0), 0 if forbidden is None else forbidden.stride(0),
                    forbidden is not None, valid is not None, *DEVICES[device], schedule,
                )
            )  # fmt: skip
            out.write(rows_of_bytes(logits))
            if forbidden is not None:
                out.write(rows_of_bytes(forbidden))
            out.write(scores.numpy().tobytes())
            if valid is not None:
                out.write(valid.numpy().tobytes())
            shapes.append((B, C))
    types = (torch.float32, torch.int64, torch.int64, torch.bool, torch.bool)
    outputs = run_program(program, "step", [list(zip(types, [(B, C)] * 4 + [(B,)], strict=True)) for B, C in shapes])
    return [BeamCandidates(*columns) for columns in outputs]


def run_program(program: Path, what: str, outputs: list) -> list[list[torch.Tensor]]:
    """What the program writes for its input: for each case tensors of (dtype, shape)."""
    command = [program, what, program.parent / "input", program.parent / "output"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    data, at, results = (program.parent / "output").read_bytes(), 0, []
    for case in outputs:
        results.append([])
        for dtype, shape in case:
            count = torch.Size(shape).numel()
            flags = torch.uint8 if dtype == torch.bool else dtype
            part = bytearray(data[at : at + count * dtype.itemsize])
            column = torch.frombuffer(part, dtype=flags) if part else torch.empty(0, dtype=flags)
            at += len(part)
            if dtype == torch.bool:
                assert (column <= 1).all(), "a flag was not written"
                column = column.bool()
            results[-1].append(column.view(shape))
    assert at == len(data)
    return results


def check(program, device, schedule, cases, dtypes=DTYPES, spread=False):
    calls, names = [], []
    for case in cases:
        for dtype in dtypes:
            logits, scores, options = case.inputs(dtype)
            calls.append((spaced(logits) if spread else logits, scores, options))
            names.append(f"{case} {dtype} on {device}")
    for name, call, actual in zip(names, calls, run_emulated(program, device, schedule, calls), strict=True):
        logits, scores, options = call
        try:
            assert_same(actual, mmkernels.beam_search_step(logits, scores, **options, impl="reference"))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


# Rows are launched, so there are some; an empty batch ends before.
RUN = [case for case in CASES if case.B > 0]
SMALL = [case for case in RUN if case.V < 5000 and case.K < 50]
LARGE = [case for case in RUN if case not in SMALL]


@pytest.mark.parametrize(
    ("device", "schedule"),
    [("clusters", FORWARD), ("parts", BACKWARD), ("clusters-not-staged", RANDOM), ("parts-not-staged", RANDOM)],
)
def test_gives_the_bits_of_the_reference(program, device, schedule):
    """Each device with one dtype and some of the cases; the rest is slow."""
    at = list(DEVICES).index(device)
    check(program, device, schedule, SMALL[at % 2 :: 2], [DTYPES[at % 3]], spread=schedule == RANDOM)


def test_as_on_an_h100(program):
    check(program, "H100", BACKWARD, SMALL[::7])


def test_each_operation_is_rounded_by_itself(program):
    """A contraction shows in a few rows of a hundred, once the logarithm of their sums is rounded to float32."""
    check(program, "one-warp", FORWARD, [Case(60, 8, 200, candidates=8)], [torch.float32])


def test_what_follows_the_step(program):
    """Random rules and candidates with ties: hypotheses, bounds, faults and the next beams of each step."""
    expected = []
    with open(program.parent / "input", "wb") as out:
        for seed in range(300):
            N, k, eos, penalties, steps = random_search(seed)
            progress = Progress.none(N, k, torch.zeros(1))
            for found, rule in steps:
                out.write(struct.pack("4q", N, k, found.scores.shape[1], len(eos)))
                out.write(struct.pack("8q", *rule))
                for x in (*found, *progress, eos, penalties):
                    out.write(x.contiguous().numpy().tobytes())
                beams = beam_search_advance(found, progress, eos, penalties, rule)
                expected.append([x.clone() for x in (*beams, *progress)])
    shapes = [[(x.dtype, x.shape) for x in case] for case in expected]
    for case, actual in zip(expected, run_program(program, "advance", shapes), strict=True):
        for name, x, y in zip((*Beams._fields, *Progress._fields), actual, case, strict=True):
            assert torch.equal(x, y), name


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("schedule", [FORWARD, BACKWARD, RANDOM], ids=["forward", "backward", "random"])
def test_every_case(program, device, schedule):
    check(program, device, schedule, SMALL, spread=schedule == BACKWARD)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["H100", "A100", "parts"])
def test_large_vocabularies(program, device):
    check(program, device, FORWARD, [case for case in LARGE if case.K < 50], [torch.float32])


@pytest.mark.slow
def test_many_candidates(program):
    check(program, "one-warp", FORWARD, [case for case in LARGE if case.K >= 50], [torch.float32])
