"""The figures as tables."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

from targets import (
    BOTO3,
    CUBE,
    DATABASE,
    MANY,
    MANY_FACTOR,
    MANY_STEPS,
    MEMORY_STEPS,
    MIB,
    PUBLISHED,
    Figures,
    Target,
    floor,
    judge,
)

COLUMNS = (CUBE, PUBLISHED, BOTO3, DATABASE)


@dataclass
class Row:
    """A step and what each contender has taken for it, in seconds or bytes."""

    step: str
    label: str
    taken: dict[str, float]
    to_published: float | None
    to_floor: float | None
    target: Target | None

    def as_dict(self) -> dict:
        return asdict(self)

    @property
    def cells(self) -> list[str]:
        reached, target = "", ""
        if self.target:
            reached = "yes" if self.target.reached else "NO"
            target = self.target.text
            if self.target.limit is not None:
                target += f": {self._amount(self.target.limit)}"
        return [
            self.label,
            *(self._amount(self.taken.get(name)) for name in COLUMNS),
            _ratio(self.to_published),
            _ratio(self.to_floor),
            target,
            reached,
        ]

    def _amount(self, amount: float | None) -> str:
        if amount is None:
            return "-"
        if self.step in MEMORY_STEPS:
            return f"{amount / MIB:.1f} MiB"
        return f"{amount:.3f} s"


def rows(steps: list[str], best: Figures, options: argparse.Namespace) -> list[Row]:
    """A row for each step.

    :param best: the figures by contender and step
    """
    labels = _labels(options.values, options.large)
    return [_row(step, labels[step], best, options) for step in steps]


def tables(rows: list[Row], best: Figures) -> str:
    """What is printed: time and memory, then requests and processor time."""
    header = ["", *COLUMNS, "/ 4.1.0", "/ boto3 (+ db)", "target", "reached"]
    amounts = _table([header, *(row.cells for row in rows)])
    header = ["", "requests", "at once", "cpu s", "of 4.1.0", "at once", "cpu s"]
    requests = _table([header, *_request_cells(rows, best)])
    return f"{amounts}\n\n{requests}"


def _row(step: str, label: str, best: Figures, options: argparse.Namespace) -> Row:
    unit = "bytes" if step in MEMORY_STEPS else "seconds"
    taken = {name: best[name][step][unit] for name in COLUMNS if step in best[name]}
    if step in MANY_STEPS:
        one = MANY_STEPS[step]
        taken = {name: best[many][one][unit] for name, many in MANY.items()}
    own, published = taken.get(CUBE), taken.get(PUBLISHED)
    bare = floor(step, best)
    return Row(
        step,
        label,
        taken,
        own / published if own is not None and published else None,
        own / bare if own is not None and bare else None,
        judge(step, best, options.values, options.large),
    )


def _labels(values: int, large: int) -> dict[str, str]:
    size = f"{large // MIB} MiB"
    return {
        "create": f"create {values:,} values",
        "read": "read all, cold",
        "read_again": "read all again",
        "select": "select all, read none",
        "length": "LENGTH of all, cold",
        "update": "update all",
        "roll_back": "update all, roll back",
        "delete": "delete all",
        "write_large": f"write {size}",
        "read_large": f"read {size}, cold",
        "stream_large": f"to_file {size}, cold",
        "memory_write_large": f"memory: write {size}",
        "memory_read_large": f"memory: read {size}",
        "memory_stream_large": f"memory: to_file {size}",
        **{
            many: f"{one} {values * MANY_FACTOR:,} values"
            for many, one in MANY_STEPS.items()
        },
    }


def _request_cells(rows: list[Row], best: Figures) -> list[list[str]]:
    cells = []
    for row in rows:
        line = [row.label]
        for name in (CUBE, PUBLISHED):
            measured = best[name].get(row.step)
            if name == CUBE and row.step in MANY_STEPS:
                measured = best[MANY[CUBE]][MANY_STEPS[row.step]]
            if measured is None or "requests" not in measured:
                line += ["-", "", ""]
                continue
            kinds = measured["requests"].items()
            requests = ", ".join(f"{number} {kind}" for kind, number in kinds)
            cpu = f"{measured['cpu_seconds']:.3f}"
            line += [requests or "none", str(measured["peak"]), cpu]
        if row.step not in MEMORY_STEPS:
            cells.append(line)
    return cells


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _table(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    )
