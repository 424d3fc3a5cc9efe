"""Large values: written in parts, read whole, never held twice in memory."""

import base64
import hashlib
import os
import random
import subprocess
import sys
import unittest

from cubicweb import Binary

from cubicweb_s3storage.errors import (
    AccessRefused,
    S3StorageError,
    S3Unreachable,
)
from cubicweb_s3storage.storages import S3Storage
from s3server import Fault
from testlib import S3TC, ContentHashStorage, OwnKeyStorage

MIB = 2**20
LARGE = random.Random(1).randbytes(17 * MIB + 1)
#: of the same length, other bytes in every part
OTHER = bytes(reversed(LARGE))
IN_PARTS = ["CREATEPARTS", "PART", "PART", "PART", "COMPLETE"]


class DescribedStorage(S3Storage):
    def get_upload_extra_args(self, entity, attr, key):
        arguments = {"CacheControl": "private", "Metadata": {"eid": str(entity.eid)}}
        if not self.s3cnx.meta.endpoint_url.startswith("https"):
            # Over TLS it is sent after the content, which not every server accepts.
            arguments["ChecksumAlgorithm"] = "SHA256"
        return arguments


class LargeTC(S3TC):
    cache_size = 0

    def unfinished_uploads(self) -> list[dict]:
        answer = self.client.list_multipart_uploads(Bucket=self.bucket)
        return answer.get("Uploads", [])

    def update(self, eid: int, content: bytes) -> None:
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(content))
            cnx.commit()

    def create_in_vain(self, error: type[Exception]) -> None:
        with self.admin_access.repo_cnx() as cnx:
            with self.assertRaises(error) as raised:
                self.create(cnx, LARGE)
                cnx.commit()
            cnx.rollback()
        self.assertIn(self.bucket, str(raised.exception))
        self.assertEqual(self.versions(), [])


class WritingTC(LargeTC):
    def test_parts_are_uploaded_beside_each_other(self):
        barrier = self.meeting("PART", 3)
        with self.admin_access.repo_cnx() as cnx:
            document = self.create(cnx, LARGE)
            cnx.commit()
        self.assertFalse(barrier.broken)
        self.assertEqual(self.s3.requests, IN_PARTS)
        self.assertEqual(self.objects(), {self.row(document.eid): LARGE})

    def test_content_type_and_arguments_are_kept(self):
        self.set_storage("Document", "content", DescribedStorage(self.bucket))
        eid = self.committed(LARGE, content_format="image/png")
        head = self.client.head_object(Bucket=self.bucket, Key=self.row(eid))
        self.assertEqual(head["ContentType"], "image/png")
        self.assertEqual(head["CacheControl"], "private")
        self.assertEqual(head["Metadata"], {"eid": str(eid)})
        self.assertEqual(self.read(eid), LARGE)

    def test_what_put_object_accepts_does_not_depend_on_the_length(self):
        for name, algorithm in (("ContentMD5", "md5"), ("ChecksumSHA256", "sha256")):
            for content in (b"small", LARGE):
                digest = hashlib.new(algorithm, content).digest()
                arguments = {name: base64.b64encode(digest).decode()}
                with self.subTest(name, length=len(content)):
                    self.storage.objects.put("key", content, arguments)

    def test_a_part_that_succeeds_in_the_end(self):
        for fault in (
            Fault("PART", 503, "SlowDown", times=2),
            Fault("PART", times=1),
            Fault("PART", times=1, after=True),
        ):
            self.s3.faults[:] = [fault]
            eid = self.committed(LARGE)
            self.assertEqual(self.read(eid), LARGE)
        self.assertEqual(self.unfinished_uploads(), [])

    def test_a_part_that_fails_for_good_aborts_the_upload(self):
        for part in (1, 3):
            fault = Fault("PART", 403, "AccessDenied", match=f"partNumber={part}")
            self.s3.faults[:] = [fault]
            self.s3.requests.clear()
            self.create_in_vain(AccessRefused)
            self.assertNotIn("COMPLETE", self.s3.requests)
            after = self.s3.requests[self.s3.requests.index("ABORT") :]
            self.assertEqual(after, ["ABORT", "DELETEMANY"])
            self.assertEqual(self.unfinished_uploads(), [])

    def test_an_upload_that_cannot_be_aborted_is_logged(self):
        self.s3.faults += [Fault("PART", 403), Fault("ABORT", 403)]
        with self.assertLogs("cube.s3storage", "ERROR") as logs:
            self.create_in_vain(AccessRefused)
        (upload,) = self.unfinished_uploads()
        self.assertIn(upload["UploadId"], logs.output[0])
        self.client.abort_multipart_upload(
            Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
        )

    def test_an_upload_that_cannot_be_begun_or_completed(self):
        for operation in ("CREATEPARTS", "COMPLETE"):
            self.s3.faults[:] = [Fault(operation, 403, "AccessDenied")]
            self.create_in_vain(AccessRefused)
            self.assertEqual(self.unfinished_uploads(), [])

    def test_an_error_in_an_answer_of_200(self):
        self.s3.faults.append(Fault("COMPLETE", 200, "InternalError", times=1))
        eid = self.committed(LARGE)
        self.assertEqual(self.read(eid), LARGE)

    def test_a_completion_whose_answer_is_lost_once(self):
        for storage_class in (S3Storage, ContentHashStorage, OwnKeyStorage):
            self.set_storage("Document", "content", storage_class(self.bucket))
            self.s3.faults[:] = [Fault("COMPLETE", times=1, after=True)]
            eid = self.committed(LARGE)
            self.assertEqual(self.read(eid), LARGE)
            self.delete(eid)
            self.assertEqual(self.objects(), {})

    def test_a_completion_whose_answers_are_all_lost_leaves_nothing(self):
        for storage_class in (S3Storage, ContentHashStorage, OwnKeyStorage):
            self.set_storage("Document", "content", storage_class(self.bucket))
            self.s3.faults[:] = [Fault("COMPLETE", after=True)]
            self.create_in_vain(S3Unreachable)

    def test_a_server_that_has_forgotten_the_upload_it_completed(self):
        for storage_class in (S3Storage, ContentHashStorage, OwnKeyStorage):
            self.set_storage("Document", "content", storage_class(self.bucket))
            self.s3.faults[:] = [
                Fault("COMPLETE", times=1, after=True),
                Fault("COMPLETE", 404, "NoSuchUpload"),
            ]
            self.create_in_vain(S3StorageError)

    def test_a_completion_that_meets_its_own_first_attempt(self):
        self.set_storage("Document", "content", ContentHashStorage(self.bucket))
        self.s3.faults += [
            Fault("COMPLETE", times=1, after=True),
            Fault("COMPLETE", 412, "PreconditionFailed"),
        ]
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, LARGE)
            self.assertEqual(list(self.objects().values()), [LARGE])
            cnx.rollback()
        self.assertEqual(self.objects(), {})

    def test_rollback_removes_it(self):
        for suffix in (False, True):
            self.set_option("s3-transaction-suffix-key", suffix)
            for storage_class in (S3Storage, ContentHashStorage, OwnKeyStorage):
                self.set_storage("Document", "content", storage_class(self.bucket))
                with self.admin_access.repo_cnx() as cnx:
                    self.create(cnx, LARGE)
                    self.assertEqual(len(self.objects()), 1)
                    cnx.rollback()
                self.assertEqual(self.versions(), [])


class KeysTC(LargeTC):
    """Large values under overridden keys, staged, and as versions."""

    def test_equal_contents_share_an_object_that_is_not_read(self):
        self.set_storage("Document", "content", ContentHashStorage(self.bucket))
        first = self.committed(LARGE)
        second = self.committed_requests(["HEAD", *IN_PARTS])
        self.delete(first)
        self.assertEqual(self.objects(), {self.row(second): LARGE})

    def committed_requests(self, requests: list[str]) -> int:
        with self.admin_access.repo_cnx() as cnx:
            document = self.create(cnx, LARGE)
            cnx.commit()
        self.assertEqual(self.s3.requests, requests)
        return document.eid

    def test_so_does_one_that_was_put_in_other_ways(self):
        """At once, by a move; in other parts, which only reading it can tell."""
        self.set_storage("Document", "content", ContentHashStorage(self.bucket))
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, LARGE)
            key = next(iter(self.objects()))
            cnx.rollback()
        self.put(key, LARGE)
        self.s3.requests.clear()
        first = self.committed_requests(["HEAD", *IN_PARTS])
        self.put_in_parts_of(6 * MIB, key, LARGE)
        second = self.committed(LARGE)
        self.assertEqual(self.row(first), self.row(second))
        self.assertEqual(self.read(second), LARGE)

    def put_in_parts_of(self, size: int, key: str, content: bytes) -> None:
        place = {"Bucket": self.bucket, "Key": key}
        place["UploadId"] = self.client.create_multipart_upload(**place)["UploadId"]
        parts = []
        for n, start in enumerate(range(0, len(content), size), 1):
            body = content[start : start + size]
            answer = self.client.upload_part(Body=body, PartNumber=n, **place)
            parts.append({"PartNumber": n, "ETag": answer["ETag"]})
        self.client.complete_multipart_upload(MultipartUpload={"Parts": parts}, **place)

    def test_another_content_is_staged_and_moved(self):
        storage = OwnKeyStorage(self.bucket)
        self.set_storage("Document", "content", storage)
        eid = self.committed(LARGE)
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(OTHER))
            # The old content is read as far as it is the same, ranges ahead of it too.
            written = [one for one in self.s3.requests if one in IN_PARTS]
            self.assertEqual(written, IN_PARTS)
            self.assertEqual(self.read(eid), LARGE)
            self.idle(storage)
            self.s3.requests.clear()
            cnx.commit()
        self.assertEqual(self.s3.requests, ["COPY", "DELETEMANY"])
        self.assertEqual(self.objects(), {f"documents/{eid}": OTHER})

    def test_another_content_of_the_same_length_in_other_parts_is_replaced(self):
        self.set_storage("Document", "content", OwnKeyStorage(self.bucket))
        eid = self.committed(LARGE)
        self.put_in_parts_of(6 * MIB, f"documents/{eid}", OTHER[:-1] + b"?")
        self.update(eid, OTHER)
        self.assertEqual(self.objects(), {f"documents/{eid}": OTHER})

    def test_every_write_is_staged_and_moved_when_the_instance_says_so(self):
        self.set_option("s3-transaction-suffix-key", True)
        eid = self.committed(LARGE, content_format="image/png")
        head = self.client.head_object(Bucket=self.bucket, Key=self.row(eid))
        self.assertEqual(head["ContentType"], "image/png")
        self.assertEqual(self.objects(), {self.row(eid): LARGE})

    def test_rows_name_versions(self):
        self.keep_versions()
        for storage_class in (S3Storage, OwnKeyStorage):
            self.set_storage("Document", "content", storage_class(self.bucket))
            eid = self.committed(LARGE)
            with self.admin_access.repo_cnx() as cnx:
                cnx.entity_from_eid(eid).cw_set(content=Binary(OTHER))
                self.assertEqual(self.read(eid), LARGE)
                cnx.commit()
            key, version_id = self.storage.parse_key(self.row(eid))
            self.assertEqual(self.versions(), [{"Key": key, "VersionId": version_id}])
            self.assertEqual(self.read(eid), OTHER)
            self.delete(eid)
            self.assertEqual(self.versions(), [])

    def test_a_version_that_is_unknown_is_removed(self):
        self.keep_versions()
        for storage_class in (S3Storage, OwnKeyStorage):
            self.set_storage("Document", "content", storage_class(self.bucket))
            self.s3.faults[:] = [Fault("COMPLETE", after=True)]
            with self.subTest(storage_class.__name__):
                self.create_in_vain(S3Unreachable)


MEASURE = """
import re, sys, tracemalloc
from pathlib import Path
from cubicweb_s3storage.client import make_client
from cubicweb_s3storage.engine import Engine
from cubicweb_s3storage.objects import ObjectRef
from cubicweb_s3storage.s3 import Bucket

bucket = Bucket(make_client(), Engine(), sys.argv[1])
large, size = ObjectRef("large"), int(sys.argv[2])
bucket.put("small", b"x", {})  # what is imported and made on first use
bucket.download(ObjectRef("small")).content()

def resident(name):
    status = Path("/proc/self/status").read_text()
    return int(re.search(name + ":\\s+([0-9]+) kB", status)[1]) * 1024

def write():
    bucket.put(large.key, content, {})

def read():
    assert len(bucket.download(large).content()) == size

before, length = resident("VmRSS"), 0
for chunk in bucket.download(large).chunks():
    length += len(chunk)
assert length == size
print(resident("VmHWM") - before)

content = b"x" * size
tracemalloc.start()
for do in read, write:
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    do()
    print(tracemalloc.get_traced_memory()[1] - before)
"""


class MemoryTC(LargeTC):
    @unittest.skipUnless(os.path.exists("/proc/self/status"), "needs Linux")
    def test_what_is_kept_beside_the_content(self):
        size = 64 * MIB
        self.put("large", bytes(size))
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, self.bucket, str(size)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=120,
        )
        to_file, read, write = map(int, done.stdout.split())
        self.assertLessEqual(to_file, 32 * MIB)
        self.assertLessEqual(read, 1.1 * size)
        self.assertLessEqual(write, 0.1 * size)
