"""The demonstration on a server of the user's own, and when something is wrong."""

import os
import subprocess
import sys
import tempfile
import unittest
import uuid
from pathlib import Path

import testlib
from s3server import Fault

DEMO = Path(__file__).parent.parent / "demo" / "demo.py"


class DemoTC(unittest.TestCase):
    def setUp(self):
        self.s3 = testlib.endpoint()
        self.s3.faults.clear()
        self.bucket = f"test-{uuid.uuid4()}"
        self.client = self.s3.client()
        self.client.create_bucket(Bucket=self.bucket)
        self.client.put_object(Bucket=self.bucket, Key="mine", Body=b"before")
        self.addCleanup(self.remove_bucket)

    def remove_bucket(self):
        self.s3.faults.clear()
        for key in self.keys():
            self.client.delete_object(Bucket=self.bucket, Key=key)
        self.client.delete_bucket(Bucket=self.bucket)

    def keys(self) -> list[str]:
        listed = self.client.list_objects_v2(Bucket=self.bucket)
        return [entry["Key"] for entry in listed.get("Contents", ())]

    def run_demo(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, DEMO, *arguments],
            env={**os.environ, "AWS_S3_ENDPOINT_URL": self.s3.url},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def test_on_a_server_of_ones_own_with_files_of_ones_own(self):
        with tempfile.TemporaryDirectory() as directory:
            contents = {"empty": b"", "été.bin": os.urandom(300_000)}
            paths = []
            for name, content in contents.items():
                path = Path(directory) / name
                path.write_bytes(content)
                paths.append(str(path))
            done = self.run_demo("--bucket", self.bucket, *paths)
        self.assertEqual(done.returncode, 0, done.stdout)
        for name in contents:
            self.assertIn(name, done.stdout)
        self.assertIn("300,000", done.stdout)
        self.assertEqual(self.keys(), ["mine"])

    def test_an_object_that_stays_behind_is_a_difference(self):
        self.s3.faults.append(Fault("DELETEMANY", 403, "AccessDenied", times=1))
        done = self.run_demo("--bucket", self.bucket)
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn("DIFFERENCE", done.stdout)

    def test_bad_surroundings(self):
        for arguments, said in (
            (["--bucket", f"{self.bucket}-none"], "Create the bucket"),
            ([], "give an existing bucket"),
            (["--bucket", self.bucket, "/no/such/file"], "/no/such/file is not a file"),
        ):
            done = self.run_demo(*arguments)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn(said, done.stdout)
            self.assertNotIn("Traceback", done.stdout)
