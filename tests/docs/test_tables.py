"""The tables between the marks of README.md and docs/ are those that the numbers in docs/figures give."""

import re

import pytest

for package in ("matplotlib", "rich", "triton", "typer"):
    pytest.importorskip(package)

from benchmarks.harness import tables
from benchmarks.registry import FOLDERS
from benchmarks.report import NUMBERS, ROOT, blocks, pages

MADE = blocks(ROOT / NUMBERS)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_numbers(page):
    text = page.read_text()
    assert tables.filled(text, MADE) == text, "python -m benchmarks.report --tables makes them anew"


def test_every_table_stands_on_a_page():
    shown = {name for page in pages() for name in re.findall(r"<!-- table (.+?) -->", page.read_text())}
    assert set(MADE) <= shown
    assert {f"{folder} machine" for folder in FOLDERS} <= shown


def test_a_page_whose_numbers_were_changed_by_hand_is_seen():
    page = (ROOT / "docs/siglip.md").read_text()
    changed = re.sub(r"\*\*[\d.]+ s\*\*", "**0.99 s**", page, count=1)
    assert changed != page
    assert tables.filled(changed, MADE) == page


def test_a_mark_without_a_table_is_refused():
    with pytest.raises(KeyError, match="no such table"):
        tables.filled("<!-- table no such table -->\n<!-- end of table -->\n", MADE)


def test_a_table_without_an_end_is_refused():
    page = "<!-- table siglip -->\n<!-- table triplet -->\n<!-- end of table -->\n"
    with pytest.raises(ValueError, match="siglip: expected <!-- end of table -->"):
        tables.filled(page, MADE)


MACHINE = {"processor": "AMD EPYC 9B14", "threads": 2, "kernels": "avx2", "torch": "2.14.1", "date": "2026-11-29"}
SAID = "Measured on 2026-11-29 on 2 threads of a CPU (AMD EPYC 9B14) with the `avx2` kernels, under torch 2.14.1"


def test_ops_that_were_measured_alike_share_a_sentence():
    machines = {"retrieval": MACHINE | {"peers": {"faiss-cpu": "1.15.1"}}, "triplet": MACHINE | {"peers": {}}}
    assert tables.provenances(machines) == f"{SAID}, faiss-cpu 1.15.1."


def test_ops_that_were_measured_apart_are_named():
    machines = {"retrieval": MACHINE | {"peers": {}}, "triplet": MACHINE | {"torch": "2.15.0", "peers": {}}}
    assert tables.provenances(machines) == f"`retrieval`: {SAID}. `triplet`: {SAID.replace('2.14.1', '2.15.0')}."


@pytest.mark.parametrize(
    ("value", "text"),
    [(43.37, "43.4 s"), (0.9996, "1.00 s"), (0.0674, "67.4 ms"), (0.00999, "9.99 ms"), (7.27e-5, "72.7 µs")],
)
def test_durations_have_three_digits(value, text):
    assert tables.duration(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (8200, "8.0 KiB"), (131080, "0.13 MiB"), (5111812, "4.9 MiB"), (1073807384, "1024 MiB")],
)
def test_memory_is_in_the_unit_that_shows_it(count, text):
    assert tables.memory_text(count) == text


def test_a_table_for_the_screen_has_no_marks_of_markdown():
    table = tables.Table(("N", "`torch.compile`"), [("8192", "**1.32 s**")]).for_screen("title")
    assert [list(column.cells) for column in table.columns] == [["8192"], ["1.32 s"]]
    assert table.columns[1].header == "torch.compile"
