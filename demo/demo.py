"""Keep files in S3: a real CubicWeb instance on a real bucket, step by step.

    demo.py [--bucket BUCKET] [--keep] [FILE ...]

Stores the files, by default those beside this script, as File entities, and shows
the rows and the bucket after each step. Ends with an error at the first difference.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import mimetypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from cubicweb_s3storage.answers import explained
from cubicweb_s3storage.client import make_client
from cubicweb_s3storage.errors import S3StorageError

# CubicWeb needs pyramid 1.10, which needs pkg_resources.
warnings.filterwarnings("ignore", "pkg_resources")

SAMPLES = Path(__file__).parent / "files"
INSTANCE = "s3demo"
HOOK = """\
from cubicweb.server.hook import Hook
from cubicweb_s3storage.storages import S3Storage


class S3StorageStartupHook(Hook):
    __regid__ = "demo.server-startup-hook"
    events = ("server_startup", "server_maintenance")

    def __call__(self):
        storage = S3Storage({bucket!r})
        self.repo.system_source.set_storage("File", "data", storage)
"""


class Difference(Exception):
    """Something is not as it should be."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument(
        "--bucket",
        default=os.environ.get("S3_BUCKET"),
        help="an existing bucket on the server that AWS_S3_ENDPOINT_URL names, or on "
        "AWS (default: a new bucket on a server of the demonstration's own)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the instance and the objects, for exploring",
    )
    options = parser.parse_args()
    if os.environ.get("AWS_S3_ENDPOINT_URL") and not options.bucket:
        parser.error("AWS_S3_ENDPOINT_URL is set: give an existing bucket of it too")
    files = options.files or sorted(SAMPLES.iterdir())
    for path in files:
        if not path.is_file():
            parser.error(f"{path} is not a file")
    directory = Path(tempfile.mkdtemp(prefix="s3storage-demo-"))
    try:
        with contextlib.ExitStack() as stack:
            bucket = options.bucket or stack.enter_context(own_server(directory))
            demonstrate(directory, bucket, files, options.keep)
            if options.keep:
                explain_exploring(directory, wait=not options.bucket)
    except Difference as difference:
        sys.exit(f"\nDIFFERENCE: {difference}")
    except S3StorageError as error:
        sys.exit(f"\n{error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"\n{error}\n{error.output}")
    finally:
        if not options.keep:
            shutil.rmtree(directory)


# the surroundings #############################################################


@contextlib.contextmanager
def own_server(directory: Path) -> Iterator[str]:
    """Run moto's S3 server in a process of its own.

    :return: the name of an empty bucket
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(directory / "moto.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(server, port)
        os.environ.update(
            AWS_S3_ENDPOINT_URL=f"http://127.0.0.1:{port}",
            AWS_ACCESS_KEY_ID="demo",
            AWS_SECRET_ACCESS_KEY="demo",
            AWS_DEFAULT_REGION="us-east-1",
            NO_PROXY="127.0.0.1",
            no_proxy="127.0.0.1",
        )
        os.environ.pop("AWS_PROFILE", None)
        make_client().create_bucket(Bucket="s3demo")
        yield "s3demo"
    finally:
        server.terminate()
        server.wait()


def wait_for(server: subprocess.Popen, port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise Difference("moto's S3 server does not start") from None
            time.sleep(0.05)
        else:
            return


def create_instance(directory: Path, bucket: str) -> None:
    """A CubicWeb instance on SQLite with the cubes file and s3storage."""
    os.environ.update(
        CW_MODE="user",
        CW_INSTANCES_DIR=str(directory),
        CW_INSTANCES_DATA_DIR=str(directory),
        CW_RUNTIME_DIR=str(directory),
        CW_DB_DRIVER="sqlite",
        CW_DB_NAME=str(directory / "demo.sqlite"),
    )
    # The first cube's languages are compiled: s3storage has none, so that this
    # needs no gettext.
    subprocess.run(
        [cubicweb_ctl(), "create", "-a", "s3storage,file", INSTANCE],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    if not (directory / "demo.sqlite").exists():
        raise Difference("cubicweb-ctl create has made no database")
    (directory / INSTANCE / "hooks.py").write_text(HOOK.format(bucket=bucket))


def cubicweb_ctl() -> str:
    return str(Path(sys.executable).parent / "cubicweb-ctl")


def explain_exploring(directory: Path, wait: bool) -> None:
    print(f"\nThe instance is kept in {directory}. To explore it:\n")
    names = ("CW_", "AWS_S3_ENDPOINT_URL")
    if wait:
        names += ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    for name, value in sorted(os.environ.items()):
        if name.startswith(names):
            print(f"    export {name}={value}")
    print(f"    {cubicweb_ctl()} shell {INSTANCE}")
    if wait:
        print("\nIts S3 server runs until you press Ctrl-C.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


# the steps ####################################################################


def demonstrate(directory: Path, bucket: str, files: list[Path], keep: bool) -> None:
    view = BucketView(bucket)
    print(f"S3: {view.client.meta.endpoint_url}, bucket {bucket}")
    print("Creating a CubicWeb instance with the cubes file and s3storage...")
    create_instance(directory, bucket)
    repo = open_repository()
    try:
        with repo.internal_cnx() as cnx:
            try:
                steps(cnx, view, files)
            finally:
                if not keep:
                    cnx.rollback()
                    cnx.execute("DELETE File X")
                    cnx.commit()
            if not keep:
                title("Deleted all: the bucket is as it was before")
                view.check(cnx, "all deleted")
    finally:
        repo.shutdown()
    print("\nEverything is as it should be.")


def open_repository():
    from cubicweb.cwconfig import CubicWebConfiguration
    from cubicweb.server.repository import Repository

    config = CubicWebConfiguration.config_for(INSTANCE)
    config.global_set_option("log-threshold", "CRITICAL")
    repo = Repository(config)
    repo.bootstrap()
    return repo


def steps(cnx, view: BucketView, files: list[Path]) -> None:
    from cubicweb import Binary

    originals = {}
    for path in files:
        content = path.read_bytes()
        entity = cnx.create_entity(
            "File",
            data=Binary(content),
            data_name=path.name,
            data_format=mimetypes.guess_type(path.name)[0]
            or "application/octet-stream",
        )
        originals[entity.eid] = content
    cnx.commit()
    title(f"Stored {len(files)} files in one transaction")
    show_files(cnx, view)
    view.check(cnx, "stored")

    title("Read everything back")
    check_contents(cnx, originals)

    eid, *_ = originals
    title(f"Updated File {eid}: a new object, the old one is gone")
    originals[eid] = originals[eid] + b"\nSecond edition.\n"
    cnx.entity_from_eid(eid).cw_set(data=Binary(originals[eid]))
    cnx.commit()
    view.check(cnx, "updated")
    check_contents(cnx, originals)

    title(f"Updated File {eid} again, and rolled back: nothing has changed")
    cnx.entity_from_eid(eid).cw_set(data=Binary(b"a mistake"))
    view.show("before the rollback")
    cnx.rollback()
    view.check(cnx, "rolled back")
    check_contents(cnx, originals)

    title(f"Deleted File {eid}: its object is gone")
    cnx.entity_from_eid(eid).cw_delete()
    del originals[eid]
    cnx.commit()
    view.check(cnx, "deleted")
    check_contents(cnx, originals)


def keys_in_rows(cnx) -> dict[int, str]:
    rset = cnx.execute("Any X, STKEY(D) ORDERBY X WHERE X is File, X data D")
    return {eid: key.getvalue().decode() for eid, key in rset.rows}


def check_contents(cnx, originals: dict[int, bytes]) -> None:
    cnx.drop_entity_cache()
    rset = cnx.execute("Any X, D WHERE X is File, X data D")
    found = {eid: checksum(data.getvalue()) for eid, data in rset.rows}
    expected = {eid: checksum(content) for eid, content in originals.items()}
    if found != expected:
        raise Difference(f"checksums are {found}, not {expected}")
    print(f"  {len(found)} checksums (SHA-256) agree with the originals")


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class BucketView:
    """What a bucket has, apart from what it had before the demonstration."""

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.client = make_client()
        self.before: set[str] = set()
        self.before = set(self.sizes())
        self.shown: dict[str, int] = {}

    def sizes(self) -> dict[str, int]:
        with explained("list the bucket", self.bucket):
            pages = self.client.get_paginator("list_objects_v2")
            return {
                entry["Key"]: entry["Size"]
                for page in pages.paginate(Bucket=self.bucket)
                for entry in page.get("Contents", ())
                if entry["Key"] not in self.before
            }

    def show(self, when: str) -> None:
        """Print the objects, with those that came (+) and went (-)."""
        sizes = self.sizes()
        print(f"  The bucket, {when}: {len(sizes)} objects")
        for key in sorted(sizes | self.shown):
            mark = "-" if key not in sizes else " " if key in self.shown else "+"
            size = sizes.get(key, self.shown.get(key))
            print(f"  {mark} {key}  {size:>11,} bytes")
        self.shown = sizes

    def check(self, cnx, when: str) -> None:
        """Show the objects, which the rows must name one by one."""
        self.show(when)
        keys = set(keys_in_rows(cnx).values())
        if keys != set(self.shown):
            raise Difference(f"the rows name {keys}, the bucket has {set(self.shown)}")


def show_files(cnx, view: BucketView) -> None:
    table = [("entity", "name", "size", "key in the row", "object in the bucket")]
    for eid, key in keys_in_rows(cnx).items():
        entity = cnx.entity_from_eid(eid)
        head = view.client.head_object(Bucket=view.bucket, Key=key)
        described = f"{head['ContentLength']:,} bytes, {head['ContentType']}"
        size = f"{len(entity.data.getvalue()):,}"
        table.append((f"File {eid}", entity.data_name, size, key, described))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for n, row in enumerate(table):
        cells = [
            cell.rjust(width) if column == 2 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())
        if n == 0:
            print("  " + "  ".join("-" * width for width in widths))
    print()


def title(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}")


if __name__ == "__main__":
    main()
