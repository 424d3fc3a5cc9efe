"""Measure this cube, the published 4.1.0, bare boto3 and the database side by side.

    tox -e bench

starts an S3 server of its own, with a latency, prints a table and writes all figures
as JSON and a chart. Of several rounds, in which the contenders take turns, the fastest
counts for each: what slows one down besides is the machine's other work.

The instances are in TMPDIR. On ext4 without a journal a new file takes half a
millisecond for minutes after many have been removed, as rounds do: /dev/shm does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import report
from server import Control
from targets import (
    BOTO3,
    CUBE,
    DATABASE,
    LARGE_STEPS,
    MANY,
    MANY_FACTOR,
    MANY_STEPS,
    MEMORY_STEPS,
    MIB,
    PUBLISHED,
    STEPS,
    VALUE_STEPS,
)

HERE = Path(__file__).resolve().parent
CHART = HERE.parent / "docs" / "benchmark.svg"
BANDWIDTH = 50  # MB/s per connection, while the large value travels

# The steps that one process runs; the next begins without a cache.
PROCESSES = (
    ("create", "write_large"),
    ("read", "read_again", "select", "read_large"),
    ("length", "stream_large", "update", "roll_back", "delete"),
)
# What a step needs to have been done.
NEEDED = {
    **dict.fromkeys(VALUE_STEPS[1:], ("create",)),
    **dict.fromkeys((*LARGE_STEPS[1:], *MEMORY_STEPS[1:]), ("write_large",)),
    **{many: (one, "create_many") for many, one in MANY_STEPS.items()},
    "read_again": ("read",),
}

PUBLISHED_REQUIREMENTS = (
    "cubicweb-s3storage==4.1.0",
    # What CubicWeb imports and does not ask for.
    "setuptools<82",
    "legacy-cgi; python_version >= '3.13'",
)


@dataclass(frozen=True)
class Contender:
    """Who is measured.

    :param kind: what the worker calls it
    :param steps: those that it takes part in
    :param environment: whose cube is installed there
    :param factor: of the number of values
    """

    name: str
    kind: str
    steps: tuple[str, ...]
    environment: str = CUBE
    factor: int = 1


EVERY = VALUE_STEPS + LARGE_STEPS
CONTENDERS = (
    Contender(CUBE, "cube", EVERY + MEMORY_STEPS),
    Contender(PUBLISHED, "cube", EVERY + MEMORY_STEPS, environment=PUBLISHED),
    Contender(BOTO3, "boto3", tuple(step for step in EVERY if step != "select")),
    Contender(DATABASE, "database", VALUE_STEPS),
    *(
        Contender(MANY[name], kind, tuple(MANY_STEPS.values()), factor=MANY_FACTOR)
        for name, kind in ((CUBE, "cube"), (BOTO3, "boto3"), (DATABASE, "database"))
    ),
)


class Benchmark:
    """Rounds of measuring.

    :param wanted: the steps to measure
    :param pythons: the interpreter of each environment
    :param url: address of the S3 server
    :param directory: for the instances
    """

    def __init__(
        self,
        wanted: set[str],
        pythons: dict[str, str],
        options: argparse.Namespace,
        url: str,
        directory: Path,
    ) -> None:
        self.wanted = wanted
        self.pythons = pythons
        self.options = options
        self.url = url
        self.directory = directory
        self.versions: dict[str, dict[str, str]] = {}
        self.rounds: list[dict[str, dict[str, dict]]] = []

    def prepare(self) -> None:
        """Make an instance in each environment, to be copied for each round."""
        for contender in CONTENDERS:
            home = self._new_home(contender)
            if not home.exists():
                shutil.copytree(HERE / "data", home)
                _say(f"{contender.name}: making an instance")
                self.versions[contender.name] = self._run(contender, home, ["prepare"])

    def measure_round(self) -> None:
        number = len(self.rounds) + 1
        figures: dict[str, dict[str, dict]] = {c.name: {} for c in CONTENDERS}
        self.rounds.append(figures)
        for contender in CONTENDERS:
            home = self._home(contender, number)
            shutil.copytree(self._new_home(contender), home)
        # A peak of memory needs no second round.
        alone = [(step,) for step in MEMORY_STEPS] if number == 1 else []
        for process in (*PROCESSES, *alone):
            for contender in CONTENDERS:
                steps = [step for step in process if self._takes_part(contender, step)]
                if steps:
                    rounds = self.options.rounds
                    title = f"round {number} of {rounds}, {contender.name}"
                    _say(f"{title}: {', '.join(steps)}")
                    home = self._home(contender, number)
                    figures[contender.name].update(self._run(contender, home, steps))
        for contender in CONTENDERS:
            shutil.rmtree(self._home(contender, number).parent)
        Control(self.url).wipe()

    def best(self) -> dict[str, dict[str, dict]]:
        """The fastest of the rounds, by contender and step."""

        def rank(figure: dict) -> float:
            return figure.get("seconds", 0)

        return {
            contender.name: {
                step: min((r[contender.name][step] for r in present), key=rank)
                for step in STEPS
                if (present := [r for r in self.rounds if step in r[contender.name]])
            }
            for contender in CONTENDERS
        }

    def _takes_part(self, contender: Contender, step: str) -> bool:
        named = f"{step}_many" if contender.factor > 1 else step
        return step in contender.steps and named in self.wanted

    def _new_home(self, contender: Contender) -> Path:
        return self.directory / contender.environment / "bench"

    def _home(self, contender: Contender, number: int) -> Path:
        return self.directory / f"{contender.name}, round {number}" / "bench"

    def _run(self, contender: Contender, home: Path, steps: list[str]) -> dict:
        options = self.options
        python = self.pythons[contender.environment]
        command = [python, HERE / "worker.py", contender.kind, home]
        settings = {
            "values": options.values * contender.factor,
            "size": options.size * 1024,
            "large": options.large,
            "latency": options.latency,
            "bandwidth": BANDWIDTH,
        }
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        done = subprocess.run(
            [*map(str, command), self.url, *steps, *arguments],
            env=self._environment(home),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])

    def _environment(self, home: Path) -> dict[str, str]:
        """That of this process, without what would lead to another S3 or instance."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AWS_", "CW_"))
        }
        return {
            **kept,
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_S3_ENDPOINT_URL": self.url,
            "CW_MODE": "user",
            "CW_INSTANCES_DIR": str(home.parent),
            "CW_INSTANCES_DATA_DIR": str(home.parent),
            "CW_RUNTIME_DIR": str(home.parent),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "PYTHONWARNINGS": "ignore",
        }


@contextmanager
def s3_server() -> Iterator[str]:
    """Run the S3 server in a process of its own; its address."""
    process = subprocess.Popen(
        [sys.executable, HERE / "server.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()  # it ends by that


def _published_python() -> str:
    """The interpreter of an environment with 4.1.0, which is made once."""
    directory = Path(sys.prefix) / "published-4.1.0"
    python = directory / "bin" / "python"
    complete = directory / "complete"
    if not complete.exists():
        _say("installing 4.1.0 into an environment of its own")
        subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *PUBLISHED_REQUIREMENTS], check=True)
        complete.touch()
    return str(python)


def _with_needed(steps: set[str]) -> set[str]:
    """The steps, and those whose outcome they need."""
    needed = set().union(*(NEEDED.get(step, ()) for step in steps))
    return steps if needed <= steps else _with_needed(steps | needed)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare this cube with 4.1.0, bare boto3 and the database.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--values", type=int, default=200, help="how many values")
    add("--size", type=int, default=64, help="size of a value in KiB")
    add("--rounds", type=int, default=3, help="how often, the fastest counts")
    add("--latency", type=float, default=20, help="of each request, in ms")
    add("--only", nargs="+", choices=STEPS, metavar="STEP", help="steps to report")
    add("--quick", action="store_true", help="try it: few values, one round, no chart")
    add("--json", type=Path, help="where the figures go, else bench/results")
    add("--chart", type=Path, help=f"where the chart goes, else docs/{CHART.name}")
    options = parser.parse_args()
    options.large = 128 * MIB
    if options.quick:
        options.values, options.rounds, options.large = 20, 1, 16 * MIB
    elif options.chart is None and not options.only:
        options.chart = CHART
    return options


def main() -> None:
    options = _options()
    wanted = set(options.only or STEPS)
    begun = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as directory, s3_server() as url:
        pythons = {CUBE: sys.executable, PUBLISHED: _published_python()}
        steps = _with_needed(wanted)
        benchmark = Benchmark(steps, pythons, options, url, Path(directory))
        benchmark.prepare()
        for _ in range(options.rounds):
            benchmark.measure_round()
    best = benchmark.best()
    steps = [step for step in STEPS if step in wanted]
    rows = report.rows(steps, best, options)
    print(report.tables(rows, best))
    path = options.json or HERE / "results" / f"{begun:%Y-%m-%dT%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "date": begun.isoformat(timespec="seconds"),
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
        "settings": {
            "values": options.values,
            "size": options.size * 1024,
            "large": options.large,
            "latency_ms": options.latency,
            "bandwidth_mb_per_second": BANDWIDTH,
            "rounds": options.rounds,
        },
        "versions": benchmark.versions,
        "rows": [row.as_dict() for row in rows],
        "best": best,
        "rounds": benchmark.rounds,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    _say(f"The figures are in {path}")
    if options.chart:
        import chart  # matplotlib is needed by nothing else

        chart.draw(rows, best, options.chart)
        _say(f"The chart is in {options.chart}")


if __name__ == "__main__":
    main()
