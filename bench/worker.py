"""One contender of the benchmark, in a process of its own.

    python worker.py CONTENDER HOME SERVER [options] STEP ...

runs the steps one after the other, having emptied the cache on local disk, and prints
what each has taken as JSON. It runs in the environment of its contender, 4.1.0 too.

HOME is the instance, in the working directory of the contender; with the step
`prepare` its database is made.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import platform
import random
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from server import Control

BUCKET = "benchmark"
CONCURRENCY = 32  # of bare boto3
CLEAR_REFS = Path("/proc/self/clear_refs")


class Discarding(io.RawIOBase):
    """A file that forgets what is written to it."""

    written = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.written += len(data)
        return len(data)


class Checking(Discarding):
    """A file that remembers a checksum only."""

    checksum = 0

    def write(self, data) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return super().write(data)


class SeekableDiscarding(Discarding):
    """For boto3, which then writes parts in any order.

    Into a file that cannot seek s3transfer 0.19 never ends once there are more parts
    than it keeps in memory, if checksums are validated when required: the task of the
    first part submits the others and waits for a place, which is its own.
    """

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return offset


class Cube:
    """A repository on SQLite whose documents are kept by the installed cube.

    :param home: directory of the instance
    """

    output = Discarding

    def __init__(self, home: Path) -> None:
        from cubicweb.pyramid.config import AllInOneConfiguration

        os.chdir(home)
        self.config = AllInOneConfiguration(home.name)
        self.repo = self.config.repository()
        self._empty_cache(home)
        self._set_storage()

    def _set_storage(self) -> None:
        from cubicweb_s3storage.storages import S3Storage

        self.repo.system_source.set_storage("Document", "data", S3Storage(BUCKET))

    def _empty_cache(self, home: Path) -> None:
        configured = self.config.get("s3-cache-directory")
        cache = Path(configured or Path(self.config.appdatahome, "s3cache")).resolve()
        if not cache.is_relative_to(home):
            raise SystemExit(f"{cache} is not in the instance, it is left alone")
        shutil.rmtree(cache, ignore_errors=True)

    def create(self, title: str, contents: list[bytes]) -> None:
        from cubicweb import Binary

        with self.repo.internal_cnx() as cnx:
            for content in contents:
                cnx.create_entity("Document", title=title, data=Binary(content))
            cnx.commit()

    def read(self, title: str) -> list[bytes]:
        with self.repo.internal_cnx() as cnx:
            return [data.getvalue() for _, data in self._rows(cnx, title)]

    def select(self, title: str) -> None:
        with self.repo.internal_cnx() as cnx:
            self._rows(cnx, title)

    def stream(self, title: str, output: Discarding) -> None:
        with self.repo.internal_cnx() as cnx:
            ((_, data),) = self._rows(cnx, title)
            data.to_file(output)

    def _rows(self, cnx, title: str) -> list:
        query = "Any X, D WHERE X is Document, X title %(title)s, X data D"
        return cnx.execute(query, {"title": title}).rows

    def lengths(self, title: str) -> list[int]:
        query = "Any X, LENGTH(D) WHERE X is Document, X title %(title)s, X data D"
        with self.repo.internal_cnx() as cnx:
            rows = cnx.execute(query, {"title": title}).rows
            return [length for _, length in rows]

    def update(self, title: str, contents: list[bytes]) -> None:
        with self.repo.internal_cnx() as cnx:
            self._update(cnx, title, contents)
            cnx.commit()

    def roll_back(self, title: str, contents: list[bytes]) -> None:
        with self.repo.internal_cnx() as cnx:
            self._update(cnx, title, contents)
            cnx.rollback()

    def _update(self, cnx, title: str, contents: list[bytes]) -> None:
        from cubicweb import Binary

        query = "Any X WHERE X is Document, X title %(title)s"
        found = cnx.execute(query, {"title": title}).entities()
        for entity, content in zip(found, contents, strict=True):
            entity.cw_set(data=Binary(content))

    def delete(self, title: str) -> None:
        with self.repo.internal_cnx() as cnx:
            cnx.execute("DELETE Document X WHERE X title %(title)s", {"title": title})
            cnx.commit()


class Database(Cube):
    """The same, with the documents in the database."""

    def _set_storage(self) -> None:
        pass


class Boto3:
    """What the cubes do, by the shortest way to do it with boto3."""

    output = SeekableDiscarding

    def __init__(self, home: Path) -> None:
        import boto3
        from botocore.config import Config

        self.client = boto3.client(
            "s3",
            endpoint_url=os.environ["AWS_S3_ENDPOINT_URL"],
            config=Config(
                max_pool_connections=CONCURRENCY,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        self.executor = ThreadPoolExecutor(CONCURRENCY)
        # The rows, so to say: the keys of the objects, and which update wrote them.
        self.rows = home / "keys.json"
        self.keys = json.loads(self.rows.read_text()) if self.rows.exists() else {}

    def create(self, title: str, contents: list[bytes]) -> None:
        self.keys[title] = self._put(title, contents)
        self.rows.write_text(json.dumps(self.keys))

    def read(self, title: str) -> list[bytes]:
        return list(self.executor.map(self._get, self.keys[title]))

    def lengths(self, title: str) -> list[int]:
        return list(self.executor.map(self._head, self.keys[title]))

    def update(self, title: str, contents: list[bytes]) -> None:
        replaced = self.keys[title]
        self.keys[title] = self._put(f"{title}-updated", contents)
        self._delete(replaced)

    def roll_back(self, title: str, contents: list[bytes]) -> None:
        self._delete(self._put(f"{title}-in-vain", contents))

    def delete(self, title: str) -> None:
        self._delete(self.keys.pop(title))

    def write_large(self, title: str, content: bytes) -> None:
        self.keys[title] = [title]
        self.rows.write_text(json.dumps(self.keys))
        self.client.upload_fileobj(io.BytesIO(content), BUCKET, title)

    def read_large(self, title: str) -> list[bytes]:
        buffer = io.BytesIO()
        self.client.download_fileobj(BUCKET, title, buffer)
        return [buffer.getvalue()]

    def stream(self, title: str, output: Discarding) -> None:
        self.client.download_fileobj(BUCKET, title, output)

    def _put(self, prefix: str, contents: list[bytes]) -> list[str]:
        keys = [f"{prefix}/{number}" for number in range(len(contents))]

        def put(key: str, content: bytes) -> None:
            self.client.put_object(Bucket=BUCKET, Key=key, Body=content)

        list(self.executor.map(put, keys, contents))
        return keys

    def _get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def _head(self, key: str) -> int:
        return self.client.head_object(Bucket=BUCKET, Key=key)["ContentLength"]

    def _delete(self, keys: list[str]) -> None:
        for start in range(0, len(keys), 1000):
            objects = [{"Key": key} for key in keys[start : start + 1000]]
            self.client.delete_objects(
                Bucket=BUCKET, Delete={"Objects": objects, "Quiet": True}
            )


class Steps:
    """The steps, which check what they have read, but not at the clock's expense."""

    def __init__(self, contender: Cube | Boto3, options: argparse.Namespace) -> None:
        self.contender = contender
        self.control = Control(options.server)
        self.latency = options.latency
        self.bandwidth = options.bandwidth
        self.count = options.values
        self.size = options.size
        self.large = options.large
        self.measured: dict[str, dict] = {}

    def run(self, step: str) -> None:
        gc.collect()
        with self._network(self.bandwidth if step.endswith("large") else 0):
            getattr(self, step)()

    def warm_up(self) -> None:
        """Have modules imported, threads and connections made."""
        contents = _contents(0, CONCURRENCY, 1024)
        self.contender.create("warm-up", contents)
        self.contender.read("warm-up")
        self.contender.lengths("warm-up")
        self.contender.update("warm-up", contents)
        self.contender.roll_back("warm-up", contents)
        self.contender.delete("warm-up")

    def create(self) -> None:
        contents = self._values()
        with self._clock("create"):
            self.contender.create("values", contents)

    def read(self) -> None:
        self._read("read")
        self._check_cold("read")

    def read_again(self) -> None:
        self._read("read_again")

    def _read(self, step: str) -> None:
        with self._clock(step):
            values = self.contender.read("values")
        _check(sorted(values) == sorted(self._values()), "what was written is read")

    def select(self) -> None:
        with self._clock("select"):
            self.contender.select("values")

    def length(self) -> None:
        with self._clock("length"):
            lengths = self.contender.lengths("values")
        _check(lengths == [self.size] * self.count, "the lengths are right")

    def update(self) -> None:
        contents = self._values(updates=1)
        with self._clock("update"):
            self.contender.update("values", contents)

    def roll_back(self) -> None:
        contents = self._values(updates=2)
        with self._clock("roll_back"):
            self.contender.roll_back("values", contents)

    def delete(self) -> None:
        with self._clock("delete"):
            self.contender.delete("values")

    def write_large(self) -> None:
        content = _content(0, self.large)
        with self._clock("write_large"):
            self._write_large(content)

    def read_large(self) -> None:
        with self._clock("read_large"):
            (content,) = self._read_large()
        _check(content == _content(0, self.large), "what was written is read")
        self._check_cold("read_large")

    def stream_large(self) -> None:
        output = self.contender.output()
        with self._clock("stream_large"):
            self.contender.stream("large", output)
        _check(output.written == self.large, "everything is streamed")
        self._check_cold("stream_large")

    def memory_write_large(self) -> None:
        from cubicweb import Binary

        value = Binary(_content(0, self.large))
        with self._memory("memory_write_large"), self._cnx() as cnx:
            cnx.create_entity("Document", title="in memory", data=value)
            cnx.commit()

    def memory_read_large(self) -> None:
        with self._memory("memory_read_large"):
            (content,) = self.contender.read("large")
        _check(len(content) == self.large, "everything is read")

    def memory_stream_large(self) -> None:
        output = Checking()
        with self._memory("memory_stream_large"):
            self.contender.stream("large", output)
        checksum = zlib.crc32(_content(0, self.large))
        _check(output.checksum == checksum, "what was written is streamed")

    def _check_cold(self, step: str) -> None:
        if not isinstance(self.contender, Database):
            asked = "GetObject" in self.measured[step]["requests"]
            _check(asked, f"the cache is empty before {step}")

    def _write_large(self, content: bytes) -> None:
        if isinstance(self.contender, Boto3):
            self.contender.write_large("large", content)
        else:
            self.contender.create("large", [content])

    def _read_large(self) -> list[bytes]:
        if isinstance(self.contender, Boto3):
            return self.contender.read_large("large")
        return self.contender.read("large")

    def _cnx(self):
        return self.contender.repo.internal_cnx()

    def _values(self, updates: int = 0) -> list[bytes]:
        return _contents(1 + updates * self.count, self.count, self.size)

    @contextmanager
    def _network(self, bandwidth: float) -> Iterator[None]:
        self.control.set(self.latency, bandwidth)
        yield
        self.control.set(0)

    @contextmanager
    def _clock(self, step: str) -> Iterator[None]:
        self.control.reset_counters()
        cpu, start = time.process_time(), time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        cpu = time.process_time() - cpu
        counters = self.control.counters()
        self.measured[step] = {"seconds": seconds, "cpu_seconds": cpu, **counters}

    @contextmanager
    def _memory(self, step: str) -> Iterator[None]:
        """Measure the peak of resident memory, above what there is now."""
        if not CLEAR_REFS.exists():
            raise SystemExit("Peaks of memory are measured on Linux only")
        before = _status("VmRSS")
        CLEAR_REFS.write_text("5")  # the peak is forgotten, see proc(5)
        yield
        self.measured[step] = {"bytes": _status("VmHWM") - before}


def prepare(home: Path) -> None:
    """Make the database of the instance."""
    from cubicweb.pyramid.config import AllInOneConfiguration
    from cubicweb.server import init_repository

    os.chdir(home)
    # CubicWeb complains where there is no catalogue of messages: this one is empty.
    catalogue = home / "i18n" / "en" / "LC_MESSAGES" / "cubicweb.mo"
    catalogue.parent.mkdir(parents=True)
    catalogue.write_bytes(struct.pack("<7I", 0x950412DE, 0, 0, 28, 28, 0, 28))
    config = AllInOneConfiguration(home.name, creating=True)
    config.init_cubes(config.expand_cubes(["s3storage"]))
    init_repository(config, interactive=False)


def _content(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def _contents(seed: int, count: int, size: int) -> list[bytes]:
    return [_content(seed + number, size) for number in range(count)]


def _check(truth: bool, claim: str) -> None:
    if not truth:
        raise SystemExit(f"It is not so that {claim}")


def _status(name: str) -> int:
    """A figure of this process in bytes, see proc(5)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("boto3", "cubicweb", "cubicweb-s3storage"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


CONTENDERS = {"cube": Cube, "database": Database, "boto3": Boto3}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("home", type=Path)
    parser.add_argument("server")
    parser.add_argument("steps", nargs="+")
    parser.add_argument("--values", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--large", type=int)
    parser.add_argument("--latency", type=float)
    parser.add_argument("--bandwidth", type=float)
    options = parser.parse_args()
    home = options.home.resolve()
    if options.steps == ["prepare"]:
        prepare(home)
        print(json.dumps(_versions()))
        return
    steps = Steps(CONTENDERS[options.contender](home), options)
    steps.warm_up()
    for step in options.steps:
        steps.run(step)
    sys.stdout.write(f"{json.dumps(steps.measured)}\n")


if __name__ == "__main__":
    main()
