"""A CubicWeb instance as an operator makes it, with cubicweb-ctl."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path


class Instance:
    """An instance on SQLite in a temporary directory, removed after the test.

    :param cubes: the cubes it is created with
    """

    name = "myinstance"

    def __init__(self, test: unittest.TestCase, cubes: str, **environment: str):
        directory = Path(test.enterContext(tempfile.TemporaryDirectory()))
        self.home = directory / self.name
        self.environment = {
            **os.environ,
            "CW_MODE": "user",
            "CW_INSTANCES_DIR": str(directory),
            "CW_INSTANCES_DATA_DIR": str(directory),
            "CW_RUNTIME_DIR": str(directory),
            "CW_DB_DRIVER": "sqlite",
            "CW_DB_NAME": str(directory / "database.sqlite"),
            "PATH": f"{os.environ['PATH']}:{_gettext_stand_ins(directory)}",
            "PYTHONWARNINGS": "ignore",
            **environment,
        }
        self.ctl("create", "-a", cubes, self.name)

    def ctl(self, *arguments: str) -> str:
        """Run cubicweb-ctl; what it prints."""
        program = Path(sys.executable).parent / "cubicweb-ctl"
        done = subprocess.run(
            [program, *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise AssertionError(f"cubicweb-ctl {arguments}: {done.stdout}")
        return done.stdout

    def shell(self, script: str) -> str:
        """Run a script in cubicweb-ctl shell; what it prints."""
        path = self.home / "script.py"
        path.write_text(script)
        return self.ctl("shell", self.name, str(path))

    def add_hook(self, source: str) -> None:
        (self.home / "hooks.py").write_text(source)


def _gettext_stand_ins(directory: Path) -> Path:
    """Where programs are that stand in for gettext's, of which nothing is needed."""
    programs = directory / "bin"
    programs.mkdir()
    for name in ("msgcat", "msgfmt"):
        if shutil.which(name) is None:
            (programs / name).write_text("#!/bin/sh\n")
            (programs / name).chmod(0o755)
    return programs
