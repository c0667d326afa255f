"""The tables of the reports: one description each, for the screen and for the pages.

A page holds a table between two marks, `<!-- table NAME -->` and `<!-- end of table -->`. What stands between them is
made from the numbers in docs/figures by `python -m benchmarks.report --tables`; a test fails where the two differ.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    import rich.table

Row = dict[str, Any]  # one line of a report: sizes, names and numbers by their keys

_MARKED = re.compile(r"^(<!-- table (.+?) -->\n)(.*?)^(<!-- end of table -->)$", re.DOTALL | re.MULTILINE)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Table(NamedTuple):
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def for_screen(self, title: str) -> "rich.table.Table":
        import rich.table  # a machine that checks the GPU kernels may not have it

        table = rich.table.Table(title=title)
        for i, column in enumerate(self.columns):
            table.add_column(_plain(column), justify="right" if i else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(_plain, row))
        return table

    def markdown(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _plain(text: str) -> str:
    return text.replace("*", "").replace("`", "")


class Comparison(NamedTuple):
    """How the rows of a report are compared: ours beside what users run, cell by cell."""

    cell: tuple[str, ...]  # the keys of a row that tell its cell
    who: str  # the key of a row that tells who ran
    ours: str = "mmkernels"

    def cells(self, results: Sequence[Row]) -> list[dict[str, Row]]:
        """{who: row} of every cell, in the order of the results."""
        cells: dict[tuple[Any, ...], dict[str, Row]] = {}
        for row in results:
            cells.setdefault(tuple(row[key] for key in self.cell), {})[row[self.who]] = row
        return list(cells.values())

    def ratio(self, cell: Mapping[str, Row], who: str) -> float:
        """How many times ours they take."""
        return cell[who]["seconds"] / cell[self.ours]["seconds"]

    def multiple(self, cell: Mapping[str, Row], who: str) -> str:
        """The ratio as text, which tells where it comes from a single call."""
        return multiple(self.ratio(cell, who)) + (", one call" if cell[who].get("once") else "")

    def peers(self, cell: Mapping[str, Row]) -> list[str]:
        """What users run, the fastest first. A model without a search is a part of all, and no peer."""
        others = [who for who in cell if not who.startswith("mmkernels") and who != "the model alone"]
        return sorted(others, key=lambda who: cell[who]["seconds"])

    def table(
        self,
        results: Sequence[Row],
        first: tuple[str, Callable[[Row], str]],
        peers: Mapping[str, str],
        memory: Mapping[str, str] | None = None,
    ) -> Table:
        """A row for each cell: our time and its share of the limit, the peers' times and ratios, memory.

        Args:
            results: the rows of the report that belong into this table.
            first: head of the first column, and what it says of a cell.
            peers: {who: head of the column}.
            memory: the same for those whose memory is shown beside ours.
        """
        memory = memory or {}
        limits = any("share_of_limit" in row for row in results)
        columns = [first[0], "mmkernels", *(["of the limit"] if limits else []), *peers.values()]
        if memory:
            columns += ["memory: mmkernels", *memory.values()]
        rows = []
        for cell in self.cells(results):
            ours = cell[self.ours]
            texts = [first[1](ours), f"**{duration(ours['seconds'])}**"]
            if limits:
                texts.append(share_of_limit(ours))
            texts += [
                f"{duration(cell[who]['seconds'])} ({self.multiple(cell, who)})" if who in cell else "-"
                for who in peers
            ]
            if memory:
                texts += [memory_text(cell[who].get("bytes")) if who in cell else "-" for who in (self.ours, *memory)]
            rows.append(texts)
        return Table(columns, rows)


class Headline(NamedTuple):
    """What the README's table and the front picture say of an op."""

    call: str  # the public name
    size: str  # of the cell, in words
    rows: Mapping[str, Any]  # the values of the rows that belong to this call, in any size
    cell: Mapping[str, Any]  # and those of the cell that is shown
    replaces: str  # who of the cell is what the call replaces
    page: str  # in docs/
    release: str = ""  # whose code that is, where its name does not say

    @property
    def replaced(self) -> str:
        """The name of what the call replaces, for a reader who has not seen the op's page."""
        return f"{self.replaces} ({self.release})" if self.release else self.replaces


class Standing(NamedTuple):
    """A headline with its numbers."""

    headline: Headline
    faster: float  # than what it replaces
    best_peer: str
    faster_than_best: float
    least: float  # times faster than the fastest peer, over all cells of the call
    most: float
    bytes: tuple[int, int] | None  # ours, and those of what it replaces


def standing(headline: Headline, comparison: Comparison, results: Sequence[Row]) -> Standing:
    def matching(values: Mapping[str, Any]) -> list[dict[str, Row]]:
        chosen = [row for row in results if all(row[key] == value for key, value in values.items())]
        return [cell for cell in comparison.cells(chosen) if comparison.peers(cell)]

    (shown,) = matching(headline.cell)
    fastest = [comparison.ratio(cell, comparison.peers(cell)[0]) for cell in matching(headline.rows)]
    best = comparison.peers(shown)[0]
    sizes = tuple(shown[who].get("bytes") for who in (comparison.ours, headline.replaces))
    return Standing(
        headline,
        comparison.ratio(shown, headline.replaces),
        best,
        comparison.ratio(shown, best),
        min(fastest),
        max(fastest),
        None if None in sizes else sizes,  # type: ignore[arg-type]
    )


def headline_table(standings: Sequence[Standing]) -> Table:
    rows = []
    for s in standings:
        memory = "-" if s.bytes is None else f"{memory_text(s.bytes[0])} instead of {memory_text(s.bytes[1])}"
        rows.append(
            [
                f"[`{s.headline.call}`](docs/{s.headline.page})",
                s.headline.size,
                titled(s.headline.replaced),
                f"**{multiple(s.faster)}**",
                f"{multiple(s.faster_than_best)} ({titled(s.best_peer)})",
                f"{multiple(s.least)} to {multiple(s.most)}",
                memory,
            ]
        )
    heads = ("call", "at", "replaces", "times faster", "than the fastest peer", "than it at all sizes", "memory")
    return Table(heads, rows)


def titled(who: str) -> str:
    """The name of a peer, with what is code marked as code."""
    return re.sub(r"\b(\w*ClipLoss|SigLipLoss|torch\.\w+|IndexFlatIP)\b", r"`\1`", who)


def duration(value: float) -> str:
    """Three digits: 202 µs, 67.4 ms, 1.32 s."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 0.9995:
            return f"{_three_digits(value * factor)} {unit}"
    return f"{_three_digits(value * 1e6)} µs"


def multiple(ratio: float) -> str:
    return f"{_three_digits(ratio)}x"


def memory_text(count: float | None) -> str:
    if count is None:
        return "-"
    size = count / 2**20
    if size < 0.095:
        return f"{count / 2**10:.1f} KiB"
    return f"{size:.0f} MiB" if size >= 99.5 else f"{size:.1f} MiB" if size >= 0.95 else f"{size:.2f} MiB"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def share_of_limit(row: Row) -> str:
    if "share_of_limit" not in row:
        return "-"
    return f"{row['share_of_limit']:.0%}" + (f" of {row['products']} G" if "products" in row else "")


def size(row: Row) -> str:
    return f"{row['n']} {row['dtype']}"


def provenance(machine: Mapping[str, Any]) -> str:
    """On what, with which versions and when the numbers of a file were measured."""
    versions = {"torch": machine["torch"], **machine["peers"]}
    under = ", ".join(f"{package} {version}" for package, version in versions.items())
    return (
        f"Measured on {machine['date']} on {machine['threads']} threads of a CPU ({machine['processor']}) with the"
        f" `{machine['kernels']}` kernels, under {under}."
    )


def provenances(machines: Mapping[str, Mapping[str, Any]]) -> str:
    """The same of several files, {op: machine}: one sentence for all that were measured alike."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for op, machine in machines.items():
        alike.setdefault(tuple(value for key, value in machine.items() if key != "peers"), []).append(op)
    sentences = []
    for ops in alike.values():
        peers = {package: version for op in ops for package, version in machines[op]["peers"].items()}
        names = "" if len(alike) == 1 else f"{', '.join(f'`{op}`' for op in ops)}: "
        sentences.append(names + provenance({**machines[ops[0]], "peers": peers}))
    return " ".join(sentences)


def filled(page: str, blocks: Mapping[str, str]) -> str:
    """The page with every marked table made anew."""

    def block(mark: re.Match[str]) -> str:
        if mark[2] not in blocks:
            raise KeyError(f"table {mark[2]}: expected one of {', '.join(blocks)}")
        if "<!-- table" in mark[3]:
            raise ValueError(f"table {mark[2]}: expected <!-- end of table --> before the next table")
        return f"{mark[1]}{blocks[mark[2]]}{mark[4]}"

    return _MARKED.sub(block, page)
