"""The ratchet that the compile checks hold the main forms to."""

import json
from collections import Counter

import pytest

pytest.importorskip("triton")

from benchmarks import gpu_limits
from benchmarks.harness.gpu_forms import Case
from benchmarks.issue_model.predict import Tile, Work


@pytest.mark.skipif(not gpu_limits.taken(), reason="another Triton has other main forms")
def test_every_main_form_has_a_limit():
    """A new form gets one from `python -m benchmarks.gpu_bounds OP --dtype bf16 --targets sm_90 --ratchet`."""
    assert set(gpu_limits.read()) == {gpu_limits.key(case) for case in gpu_limits.all_forms()}


def test_a_limit_only_goes_down(monkeypatch, tmp_path):
    form, other, new = (gpu_limits.key(case) for case in gpu_limits.all_forms()[:3])
    monkeypatch.setattr(gpu_limits, "FILE", tmp_path / "limits.json")
    gpu_limits.FILE.write_text(json.dumps({form: 2.0, other: 2.0, "a form that is no more": 1.0}))
    assert gpu_limits.lowered({form: 2.5, other: 1.6, new: 1.0}) == {form: 2.0, other: 1.65, new: 1.03}


def test_a_slower_form_fails(monkeypatch):
    form = gpu_limits.all_forms()[0]
    (problem,) = gpu_limits.registry.gpu_bounds(form.op).problems(form)
    product = Work(1, {"matrix": 100.0}, Counter())
    tile = Tile(product, Work(0, {}, Counter()), warps=2, steps=8, flops=2 * 128 * 128 * 512, cycles=16_000)
    milliseconds = problem.predicted(tile, gpu_limits.CHIPS["sm_90"]) * 1e3
    assert milliseconds == pytest.approx(32768**2 / 128**2 / 132 * 16_000 / 1.755e9 * 1e3, rel=0.01)
    monkeypatch.setattr(gpu_limits, "predict_case", lambda case, steps: [tile])
    monkeypatch.setattr(gpu_limits, "_TRITON", "")
    monkeypatch.setattr(gpu_limits, "read", lambda: {gpu_limits.key(form): milliseconds})
    assert gpu_limits.excess(form) == ""
    monkeypatch.setattr(gpu_limits, "read", lambda: {gpu_limits.key(form): milliseconds * 0.999})
    assert "ms by prediction" in gpu_limits.excess(form)


def test_a_form_without_a_limit_passes(monkeypatch):
    monkeypatch.setattr(gpu_limits, "read", dict)
    assert gpu_limits.excess(Case("info_nce", "forward_kernel", "sm_80", "half", "bf16", (), 8, 3)) == ""
