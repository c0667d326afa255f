"""README.md and docs/ hold: their Python blocks run, relative links and figures exist, commands are targets."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
API = "mmkernels/*/api.py"  # each op has one
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "models/README.md", *DOCS]


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run(page):
    """One after the other, as a reader would paste them; no loss, output or score of theirs is NaN."""
    names: dict = {}
    for block in blocks_of(page):
        exec(compile(block, page.name, "exec"), names)
    results = [names[name] for name in ("loss", "out", "scores") if isinstance(names.get(name), torch.Tensor)]
    assert results or "found" in names
    assert all(result.isfinite().all() for result in results)


def test_the_pages_of_the_calls_begin_with_an_example():
    calls = [page for page in DOCS if "`mmkernels." in page.read_text().splitlines()[0]]
    on_a_gpu = {page.name for page in calls if page.stem.endswith("_gpu")}
    assert {page.name for page in calls} - on_a_gpu == {f"{path.parent.name}.md" for path in ROOT.glob(API)}
    assert {page.name for page in calls if not blocks_of(page)} == on_a_gpu


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    for named in re.findall(r"`((?:mmkernels|csrc|benchmarks|models|tests|docs)/[\w./*]+)`", page.read_text()):
        assert list(ROOT.glob(named)), f"{page.name}: {named}"


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs/index.md").read_text()
    assert [page.name for page in DOCS if page.name != "index.md" and f"({page.name})" not in index] == []


def test_every_figure_is_shown():
    shown = "".join(page.read_text() for page in PAGES)
    assert [
        figure.name for figure in (ROOT / "docs/figures").glob("*.png") if f"figures/{figure.name})" not in shown
    ] == []


def test_every_make_target_that_the_pages_name_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        for named in re.findall(r"`make ([a-z-]+)", page.read_text()):
            assert named in targets, f"{page.name}: make {named}"
