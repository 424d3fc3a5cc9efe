"""Reading long objects in ranges, over connections that break, while they change."""

import os
import random
import threading
import unittest
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from unittest.mock import patch

from cubicweb import Binary

from cubicweb_s3storage import downloads
from cubicweb_s3storage.errors import ObjectMissing, S3StorageError, S3Unreachable
from cubicweb_s3storage.storages import S3Storage
from s3server import Fault
from testlib import S3TC, OwnKeyStorage

MIB = 2**20
CONTENT = random.Random(1).randbytes(2 * MIB)
#: of the same length, other bytes everywhere
OTHER = bytes(reversed(CONTENT))


class DownloadTC(S3TC):
    """An object is long from 256 KiB on."""

    cache_size = 0

    old = CONTENT[: 300 * 1024 + 1]

    def setUp(self):
        super().setUp()
        for name, size in (("MAX_SINGLE", 256), ("RANGE", 128), ("STREAM_RANGE", 64)):
            self.enterContext(patch.object(downloads, name, size * 1024))
        name = "cubicweb_s3storage.contents.MAX_SINGLE"
        self.enterContext(patch(name, 256 * 1024))
        self.enterContext(patch.object(downloads, "CHUNK", 16 * 1024))

    def value(self, eid: int) -> Binary:
        with self.admin_access.repo_cnx() as cnx:
            return cnx.entity_from_eid(eid).content

    def written(self, eid: int) -> bytes:
        """What `to_file` writes."""
        file = BytesIO()
        self.value(eid).to_file(file)
        return file.getvalue()

    def ways(self) -> tuple[Callable[[int], bytes], ...]:
        return self.read, self.written

    def each_way(self) -> Iterator[tuple[Callable[[int], bytes], int]]:
        """Ways to read a new document, each in a state of its own."""
        for read in self.ways():
            eid = self.committed(self.old)
            with self.subTest(read.__name__):
                yield read, eid
            self.idle(self.storage)
            self.s3.faults.clear()

    def test_a_plain_get_and_ranges_of_the_same_object(self):
        for content in (self.old, self.old[: 256 * 1024 + 1], CONTENT[:MIB]):
            eid = self.committed(content)
            for read, size in (
                (self.read, downloads.RANGE),
                (self.written, downloads.STREAM_RANGE),
            ):
                self.s3.requests.clear()
                self.assertEqual(read(eid), content)
                ranges = -(-len(content) // size) - 1
                self.assertEqual(Counter(self.s3.requests), {"GET": 1, "RANGE": ranges})
                self.assertEqual(self.s3.requests[0], "GET")

    def test_a_small_object_is_one_get(self):
        for content in (b"", b"x", self.old[: 256 * 1024]):
            eid = self.committed(content)
            for read in self.ways():
                self.s3.requests.clear()
                self.assertEqual(read(eid), content)
                self.assertEqual(self.s3.requests, ["GET"])

    def test_ranges_are_fetched_beside_each_other(self):
        for read, parties in ((self.read, 2), (self.written, 4)):
            eid, barrier = self.committed(self.old), self.meeting("RANGE", parties)
            self.assertEqual(read(eid), self.old)
            self.assertFalse(barrier.broken)

    def test_a_connection_that_is_cut_in_the_content(self):
        for content in (self.old[:1000], self.old[: 100 * 1024], self.old):
            for fault in (
                Fault("GET", cut_after=0, times=1),
                Fault("GET", cut_after=999, times=2),
                Fault("GET", cut_after=20 * 1024, times=1),
                Fault("RANGE", cut_after=999, times=4),
                Fault("RANGE", cut_after=40 * 1024, times=1),
            ):
                for read in self.ways():
                    eid = self.committed(content)
                    self.s3.faults[:] = [Fault(**vars(fault))]
                    with self.subTest(read.__name__, length=len(content), fault=fault):
                        self.assertEqual(read(eid), content)

    def test_connections_that_are_always_cut(self):
        for content in (self.old[:100], self.old):
            eid = self.committed(content)
            for fault in (Fault("RANGE", cut_after=4), Fault("GET", cut_after=4)):
                if fault.operation == "RANGE" and content != self.old:
                    continue
                for read in self.ways():
                    self.s3.faults[:] = [Fault("RANGE", cut_after=4), fault]
                    self.idle(self.storage)
                    self.s3.requests.clear()
                    with self.assertRaises(S3Unreachable) as raised:
                        read(eid)
                    self.assertIn(self.row(eid), str(raised.exception))
                    ranges = -(-len(content) // downloads.STREAM_RANGE)
                    most = downloads.ATTEMPTS * ranges
                    self.assertLessEqual(len(self.s3.requests), most)

    def replacing(self, operation: str, eid: int, *contents: bytes) -> None:
        """Have the object replaced before the answers to the next requests."""
        key = self.row(eid)

        def replace(content: bytes) -> bool:
            self.put(key, content)
            return True

        self.s3.faults += [
            Fault(operation, times=1, instead=partial(replace, content))
            for content in contents
        ]

    def test_an_object_that_is_replaced_is_read_entirely_new(self):
        for new in (OTHER[:1], OTHER[: len(self.old)], OTHER[: 2 * len(self.old)]):
            eid = self.committed(self.old)
            self.replacing("RANGE", eid, new)
            self.assertEqual(self.read(eid), new)

    def test_an_object_that_is_replaced_is_not_written_to_a_file_as_a_mix(self):
        for new in (OTHER[:1], OTHER[: len(self.old)], OTHER[: 2 * len(self.old)]):
            eid, file = self.committed(self.old), BytesIO()
            self.replacing("RANGE", eid, new)
            with self.assertRaisesRegex(S3StorageError, "replaced") as raised:
                self.value(eid).to_file(file)
            self.assertIn("Document, attribute content", str(raised.exception))
            self.assertTrue(self.old.startswith(file.getvalue()))

    def test_an_object_that_is_replaced_all_the_time(self):
        for read, eid in self.each_way():
            self.replacing("RANGE", eid, *(b"%d" % n + self.old for n in range(99)))
            with self.assertRaisesRegex(S3StorageError, "replaced"):
                read(eid)
            self.assertLessEqual(len(self.s3.requests), downloads.ATTEMPTS * 5)

    def test_an_object_that_comes_to_be_what_the_cache_has(self):
        self.set_option("s3-cache-size", 2**24)
        self.set_storage("Document", "content", OwnKeyStorage(self.bucket))
        eid = self.committed(self.old)
        self.assertEqual(self.read(eid), self.old)
        self.put(self.row(eid), OTHER[: len(self.old)])
        self.replacing("RANGE", eid, self.old)
        self.assertEqual(self.read(eid), self.old)

    def test_a_cut_small_object_that_is_replaced(self):
        for new in (b"new", self.old):
            eid = self.committed(b"content")
            self.s3.faults[:] = [Fault("GET", cut_after=3, times=1)]
            self.replacing("GET", eid, new)
            self.assertEqual(self.read(eid), new)
            # Jobs that read ahead come here, and must not wait for other jobs.
            self.assertEqual(self.s3.requests, ["GET", "GET", "GET"])

    def test_an_object_that_is_deleted_in_between(self):
        for read, eid in self.each_way():
            place = {"Bucket": self.bucket, "Key": self.row(eid)}
            delete = partial(self.client.delete_object, **place)
            self.s3.faults.append(Fault("RANGE", times=1, instead=delete))
            with self.assertRaises(ObjectMissing):
                read(eid)

    @unittest.skipIf("TEST_S3_ENDPOINT_URL" in os.environ, "its signature covers Range")
    def test_a_server_that_sends_no_ranges(self):
        for read, eid in self.each_way():
            self.s3.faults.append(Fault("RANGE", without="Range"))
            with self.assertRaisesRegex(S3StorageError, "does not send parts"):
                read(eid)

    def test_a_large_value_is_not_loaded_ahead(self):
        begun = threading.Event()
        self.committed(b"small")
        eid = self.committed(self.old)
        ahead = Fault("GET", match=self.row(eid), instead=lambda: begun.set() or True)
        self.s3.faults.append(ahead)
        with self.admin_access.repo_cnx() as cnx:
            rql = "Any D ORDERBY X WHERE X is Document, X content D"
            (small,), (large,) = cnx.execute(rql)
        self.assertEqual(small.getvalue(), b"small")
        self.assertTrue(begun.wait(30))
        self.assertEqual(self.s3.requests, ["GET", "GET"])
        self.assertEqual(large.getvalue(), self.old)
        self.assertEqual(Counter(self.s3.requests), {"GET": 3, "RANGE": 2})

    def test_many_threads_read_large_values_with_few_to_fetch(self):
        self.enterContext(patch("cubicweb_s3storage.engine.MAX_REQUESTS", 2))
        storage = S3Storage(self.bucket)
        self.set_storage("Document", "content", storage)
        eids = [self.committed(CONTENT[n : n + MIB]) for n in range(8)]
        barrier = threading.Barrier(8)

        def load(value: Binary) -> bytes:
            barrier.wait()
            if value is values[0]:
                file = BytesIO()
                value.to_file(file)
                return file.getvalue()
            return value.getvalue()

        values = [self.value(eid) for eid in eids]
        with ThreadPoolExecutor(8) as threads:
            for n, content in enumerate(threads.map(load, values, timeout=60)):
                self.assertEqual(content, CONTENT[n : n + MIB])
