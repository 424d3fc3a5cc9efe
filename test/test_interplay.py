"""Copies, caches, rollbacks and other transactions that meet."""

import gc
import threading
import uuid
from contextlib import suppress
from unittest.mock import patch

from cubicweb import Binary
from cubicweb.server.sources.storages import fsimport

from cubicweb_s3storage import downloads
from cubicweb_s3storage.engine import MAX_REQUESTS
from cubicweb_s3storage.errors import S3StorageError
from cubicweb_s3storage.objects import ObjectRef
from cubicweb_s3storage.s3 import md5
from cubicweb_s3storage.storages import S3Storage
from cubicweb_s3storage.uploads import Upload
from s3server import Fault
from test_values import ValuesTC
from testlib import S3TC, ContentHashStorage, OwnKeyStorage


class UuidOfEidStorage(S3Storage):
    def new_s3_key(self, entity, attr):
        return str(uuid.uuid5(uuid.NAMESPACE_URL, str(entity.eid)))


def selected(cnx, eid: int) -> Binary:
    rql = "Any D WHERE X eid %(x)s, X content D"
    return cnx.execute(rql, {"x": eid}).rows[0][0]


def block(storage: S3Storage) -> threading.Event:
    """Keep all threads of a storage busy, until the event is set."""
    go_on = threading.Event()
    for _ in range(MAX_REQUESTS):
        storage.engine.start_at_once(go_on.wait)
    return go_on


class CopiesTC(ValuesTC):
    def thumbnail(self, eid):
        with self.admin_access.repo_cnx() as cnx:
            return cnx.entity_from_eid(eid).thumbnail.getvalue()

    def copy_while(self, source, target, meanwhile):
        """Another transaction commits after the copy has been queued.

        Before the SQL of the copying one: SQLite has one writer at a time.
        """

        class Thumbs(S3Storage):
            def save_s3_key(storage, *args):
                with self.admin_access.repo_cnx() as other:
                    meanwhile(other.entity_from_eid(source))
                    other.commit()
                go_on.set()
                return super().save_s3_key(*args)

        thumbs = Thumbs(self.bucket)
        self.set_storage("Document", "thumbnail", thumbs)
        go_on = block(thumbs)
        self.addCleanup(go_on.set)
        with self.admin_access.repo_cnx() as cnx:
            value = self.value(cnx, source)
            cnx.entity_from_eid(target).cw_set(thumbnail=value)
            self.assertEqual(value.getvalue(), b"old")
            cnx.commit()
        self.assertEqual(self.thumbnail(target), b"old")

    def test_copy_of_an_object_that_is_replaced_before(self):
        self.set_storage("Document", "content", OwnKeyStorage(self.bucket))
        source, target = self.committed(b"old"), self.committed(b"")
        self.copy_while(source, target, lambda e: e.cw_set(content=Binary(b"new")))

    def test_copy_of_an_object_that_is_removed_before(self):
        source, target = self.committed(b"old"), self.committed(b"")
        self.copy_while(source, target, lambda e: e.cw_delete())

    def test_copy_of_an_empty_value_whose_object_is_gone(self):
        source = self.committed(b"")
        value = self.unread(source)
        self.delete(source)
        with self.admin_access.repo_cnx() as cnx:
            eid = cnx.create_entity("Document", content=value).eid
            cnx.commit()
        self.assertEqual(self.read(eid), b"")

    def test_copy_of_what_a_crash_left_staged(self):
        self.set_option("s3-transaction-suffix-key", True)
        source = self.committed(b"old")
        key = self.row(source)
        self.put(f"{key}.tmp.{'0' * 32}", b"old")
        self.client.delete_object(Bucket=self.bucket, Key=key)
        self.assertEqual(self.read(source), b"old")
        with self.admin_access.repo_cnx() as cnx:
            eid = cnx.create_entity("Document", content=self.value(cnx, source)).eid
            cnx.commit()
        self.assertEqual(self.read(eid), b"old")


class TwoStoragesTC(ValuesTC):
    def test_value_of_another_storage_of_the_bucket(self):
        self.set_storage("Document", "content", ContentHashStorage(self.bucket))
        self.set_storage("Scan", "content", ContentHashStorage(self.bucket))
        eid = self.committed(b"same")
        with self.admin_access.repo_cnx() as cnx:
            scan = cnx.create_entity("Scan", content=Binary(b"same")).eid
            cnx.commit()
        with self.admin_access.repo_cnx() as cnx:
            value = cnx.execute("Any D WHERE X is Scan, X content D").rows[0][0]
        self.delete(scan)
        self.delete(eid)
        self.assertEqual(self.objects(), {})
        self.assertEqual(value.getvalue(), b"same")


class CacheTC(S3TC):
    def test_uncommitted_content_under_a_key_that_looks_immutable(self):
        """Storage A (default) has adopted an object of B, whose keys are UUIDs."""
        self.set_storage("Document", "content", UuidOfEidStorage(self.bucket))
        self.set_storage("Scan", "content", S3Storage(self.bucket))
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            with fsimport(cnx):
                key = Binary(self.row(eid).encode())
                scan = cnx.create_entity("Scan", content=key).eid
            cnx.commit()
        self.assertEqual(self.read(scan), b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"uncommitted"))
            self.uploaded(cnx)
            seen = self.read(scan)
            cnx.rollback()
        self.assertEqual(seen, b"old")

    def test_stale_after_default_keys_replace_overridden_ones(self):
        self.set_storage("Document", "content", UuidOfEidStorage(self.bucket))
        eid = self.committed(b"old")
        self.assertEqual(self.read(eid), b"old")  # cached
        self.put(self.row(eid), b"new")  # an update by a process on another host
        self.assertEqual(self.read(eid), b"new")
        self.put(self.row(eid), b"newer")
        self.set_storage("Document", "content", S3Storage(self.bucket))
        self.assertEqual(self.read(eid), b"newer")

    def test_download_with_a_condition(self):
        eid = self.committed(b"old")
        for arguments in ({"IfMatch": '"x"'}, {"IfNoneMatch": f'"{md5(b"old")}"'}):
            with self.subTest(arguments), self.assertRaises(S3StorageError):
                self.storage.download(self.row(eid), **arguments)


class MemoryTC(ValuesTC):
    def test_what_nobody_holds_is_not_kept_by_a_value_of_the_same_query(self):
        for n in range(10):
            self.committed(b"%d" % n + bytes(1000), title=f"{n:03}")
        firsts = []
        for _ in range(5):
            selected = self.selected()
            selected[0].read()
            self.loaded_ahead(selected[0])
            firsts.append(selected[0])
            del selected
        gc.collect()
        kept = sum(len(self.loaded_ahead(value)) for value in firsts)
        self.assertEqual(kept, 0)

    def test_dropped_results_are_not_fetched(self):
        self.documents(33)
        go_on = block(self.storage)
        for _ in range(5):
            self.selected()[0].read()
        gc.collect()
        go_on.set()
        self.storage.engine.map(str, range(300))
        self.assertLess(len(self.s3.requests), 50)


class RollbackTC(ValuesTC):
    def test_an_odd_error_of_one_upload_leaves_no_objects(self):
        class Odd(S3Storage):
            def get_upload_extra_args(self, entity, attr, key):
                return {"Bucket": "x"} if entity.title == "odd" else {}

        self.set_storage("Document", "content", Odd(self.bucket))
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"1")
            eid = self.create(cnx, b"2", title="odd").eid
            value = self.value(cnx, eid)
            self.uploaded(cnx)
            cnx.rollback()
            del value  # unread until here
        self.assertEqual(self.objects(), {})

    def test_one_key_many_times_costs_the_same_each(self):
        self.set_storage("Document", "content", ContentHashStorage(self.bucket))
        calls = []
        finish = Upload.finish

        def counted(upload):
            calls.append(1)
            finish(upload)

        with (
            patch.object(Upload, "finish", counted),
            self.admin_access.repo_cnx() as cnx,
        ):
            for _ in range(60):
                self.create(cnx, b"same")
            n = len(calls)
            cnx.rollback()
        self.assertLess(n, 200)


class RaceTC(ValuesTC):
    def test_a_neighbour_starts_a_job_while_the_value_is_kept(self):
        expected = self.documents(2)
        eids = self.selected("Any X ORDERBY T WHERE X is Document, X title T")
        first, second = self.selected()
        keep = type(second.reader).keep

        def slow_keep(reader, content):
            first._selection._load_ahead(0)  # as first.read() of another thread
            keep(reader, content)
            # its request comes after the removal

        go_on = block(self.storage)
        with patch.object(type(second.reader), "keep", slow_keep):
            self.delete(eids[1])
        go_on.set()
        for job in list(first._selection._jobs.values()):
            with suppress(S3StorageError):
                job.result()
        self.assertEqual(second.read(), expected[1])


class HangTC(S3TC):
    def test_a_stream_that_is_closed_in_a_thread_of_the_engine(self):
        """As the garbage collector does, after the target of `to_file` has failed."""
        self.enterContext(patch.object(downloads, "MAX_SINGLE", 10))
        self.enterContext(patch.object(downloads, "STREAM_RANGE", 10))
        eid = self.committed(bytes(300))
        chunks = self.storage.objects.download(ObjectRef(self.row(eid))).chunks()
        part, entered = downloads.Download._part, []
        go, left = threading.Event(), threading.Event()

        def dropping(download, *range_):
            result = part(download, *range_)
            go.wait(10)
            if not entered:
                entered.append(1)
                chunks.close()
                left.set()
            return result

        with patch.object(downloads.Download, "_part", dropping):
            next(chunks)
            go.set()
            self.assertTrue(left.wait(5))


class MoreTC(S3TC):
    def test_tags_of_a_copy(self):
        class TaggingStorage(S3Storage):
            def get_upload_extra_args(self, entity, attr, key):
                return {"Tagging": f"owner={entity.eid}"}

        self.set_storage("Document", "content", TaggingStorage(self.bucket))
        eid = self.committed(b"x")
        with self.admin_access.repo_cnx() as cnx:
            value = selected(cnx, eid)
            new = cnx.create_entity("Document", content=value).eid
            cnx.commit()
        answer = self.client.get_object_tagging(Bucket=self.bucket, Key=self.row(new))
        tags = answer["TagSet"]
        self.assertEqual(tags, [{"Key": "owner", "Value": str(new)}])

    def test_readopt(self):
        key = "00000000-0000-0000-0000-000000000001"
        self.put(key, b"1")
        with self.admin_access.cnx() as cnx:
            with fsimport(cnx):
                e = cnx.create_entity("Document", content=Binary(key.encode()))
            cnx.commit()
            eid = e.eid
        self.assertEqual(self.read(eid), b"1")
        self.put(key, b"2")
        with self.admin_access.cnx() as cnx:
            with fsimport(cnx):
                cnx.entity_from_eid(eid).cw_set(content=Binary(key.encode()))
            cnx.commit()
        self.assertEqual(self.read(eid), b"2")

    def test_keep_fails_then_object_is_removed(self):
        self.set_option("s3-cache-size", 0)
        eid = self.committed(b"old")
        with self.admin_access.cnx() as cnx:
            value = selected(cnx, eid)
        self.s3.faults.append(Fault("GET", 403, "AccessDenied"))
        self.delete(eid)
        self.s3.faults.clear()
        self.assertEqual(value.read(), b"old")
