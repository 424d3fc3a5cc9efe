"""A throw-away PostgreSQL for tests, on a socket in a temporary directory."""

from __future__ import annotations

import atexit
import functools
import getpass
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


@functools.cache
def programs() -> Path | None:
    """Where initdb and pg_ctl are, None when PostgreSQL is not installed."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return installed[-1].parent if installed else None


@functools.cache
def start() -> str:
    """Start it, until Python ends.

    :return: the directory of its socket
    """
    directory = tempfile.mkdtemp(prefix="s3storage-pg-")
    as_user = []
    if os.getuid() == 0:  # PostgreSQL does not run as root
        shutil.chown(directory, "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [*as_user, programs() / program, "-D", f"{directory}/data", *arguments],
            check=True,
            cwd=directory,
            stdout=subprocess.DEVNULL,
        )

    user = getpass.getuser()
    run("initdb", "-U", user, "--auth=trust", "-E", "UTF8", "--locale=C")
    options = f"-h '' -k {directory} -c fsync=off"
    run("pg_ctl", "start", "-w", "-l", f"{directory}/log", "-o", options)

    def stop() -> None:
        run("pg_ctl", "stop", "-m", "immediate")
        shutil.rmtree(directory)

    atexit.register(stop)
    return directory
