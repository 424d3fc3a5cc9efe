"""Unread values whose objects are removed, replaced or copied."""

import concurrent.futures
import threading
import uuid

from cubicweb import Binary

from cubicweb_s3storage.engine import MAX_REQUESTS
from cubicweb_s3storage.errors import ObjectMissing
from cubicweb_s3storage.storages import S3Storage
from test_values import ValuesTC
from testlib import OwnKeyStorage


class ReplacedTC(ValuesTC):
    """A value stays what it was when it was selected."""

    def replace(self, eid: int) -> None:
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()

    def test_objects_that_are_removed(self):
        expected = self.documents(40)
        eids = self.selected("Any X ORDERBY T WHERE X is Document, X title T")
        selected, again = self.selected(), self.selected()
        with self.admin_access.repo_cnx() as cnx:
            for eid in eids[::2]:
                cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            for eid in eids[1::2]:
                cnx.entity_from_eid(eid).cw_delete()
            cnx.commit()
        self.assertEqual([value.read() for value in selected], expected)
        self.assertEqual([value.read() for value in again], expected)
        self.assertEqual(set(self.objects().values()), {b"new"})

    def test_in_the_transaction_that_removes_them(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            value = self.value(cnx, eid)
            cnx.entity_from_eid(eid).cw_delete()
            cnx.commit()
            self.assertEqual(value.read(), b"old")

    def test_another_thread_removes_it(self):
        for end in (self.delete, self.replace):
            eid = self.committed(b"old")
            value = self.unread(eid)
            value.seek(1)
            with concurrent.futures.ThreadPoolExecutor(1) as other:
                other.submit(end, eid).result()
            self.assertEqual(value.read(), b"ld")

    def test_a_move_replaces_it(self):
        self.set_storage("Document", "content", OwnKeyStorage(self.bucket))
        eid = self.committed(b"old")
        before = self.unread(eid), self.unread(eid)
        self.replace(eid)
        after = self.unread(eid)
        self.delete(eid)
        self.assertEqual([value.read() for value in before], [b"old", b"old"])
        self.assertEqual(after.read(), b"new")
        self.assertEqual(self.objects(), {})

    def test_a_rollback(self):
        for storage_class in (S3Storage, OwnKeyStorage):
            for suffixed in (False, True):
                with self.subTest(storage_class, suffixed=suffixed):
                    self.set_option("s3-transaction-suffix-key", suffixed)
                    self.set_storage("Document", "content", storage_class(self.bucket))
                    with self.admin_access.repo_cnx() as cnx:
                        value = self.value(cnx, self.create(cnx, b"new").eid)
                        self.uploaded(cnx)
                        cnx.rollback()
                        self.assertEqual(self.objects(), {})
                        self.assertEqual(value.read(), b"new")

    def test_a_rollback_before_the_upload_has_begun(self):
        for storage_class in (S3Storage, OwnKeyStorage):
            with self.subTest(storage_class):
                storage = storage_class(self.bucket)
                self.set_storage("Document", "content", storage)
                eid = self.committed(b"old")
                go_on = threading.Event()
                for _ in range(MAX_REQUESTS):
                    storage.engine.start_at_once(go_on.wait)
                with self.admin_access.repo_cnx() as cnx:
                    cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
                    value = self.value(cnx, eid)
                    cnx.rollback()
                go_on.set()
                self.assertEqual(value.read(), b"new")

    def test_writes_of_one_transaction(self):
        """Each value is what its row named, whichever of the writes it was."""
        for storage_class in (S3Storage, OwnKeyStorage):
            for end in ("commit", "rollback"):
                with self.subTest(storage_class, end=end):
                    self.set_storage("Document", "content", storage_class(self.bucket))
                    eid = self.committed(b"0")
                    with self.admin_access.repo_cnx() as cnx:
                        selected = [self.value(cnx, eid)]
                        for content in (b"1", b"2"):
                            entity = cnx.entity_from_eid(eid)
                            entity.cw_set(content=Binary(content))
                            selected.append(self.value(cnx, eid))
                        self.uploaded(cnx)
                        getattr(cnx, end)()
                    read = [value.read() for value in selected]
                    self.assertEqual(read, [b"0", b"1", b"2"])


# copies #######################################################################


class CopyTC(ValuesTC):
    def setUp(self):
        super().setUp()
        self.set_storage("Document", "thumbnail", S3Storage(self.bucket))
        self.set_storage("Scan", "content", self.storage)
        self.eid = self.committed(b"content", content_format="image/png")

    def copied(self, prepare=lambda value: None, **kwargs) -> int:
        with self.admin_access.repo_cnx() as cnx:
            value = self.value(cnx, self.eid)
            prepare(value)
            eid = cnx.create_entity("Document", content=value, **kwargs).eid
            cnx.commit()
        return eid

    def test_an_unread_value_is_copied_on_the_server(self):
        with self.admin_access.repo_cnx() as cnx:
            value = self.value(cnx, self.eid)
            value.seek(3)
            scan = cnx.create_entity("Scan", content=value).eid
            cnx.entity_from_eid(self.eid).cw_set(thumbnail=value)
            cnx.commit()
            self.assertEqual(self.s3.requests, ["COPY"] * 2)
            self.assertEqual(value.tell(), 3)
        rql = f"Any D, T WHERE S eid {scan}, S content D, X thumbnail T"
        with self.admin_access.repo_cnx() as cnx:
            for value in cnx.execute(rql).rows[0]:
                self.assertEqual(value.getvalue(), b"content")
        self.assertEqual(list(self.objects().values()), [b"content"] * 3)

    def test_another_entity_gets_it_and_gives_up_its_own(self):
        eid = self.committed(b"other")
        with self.admin_access.repo_cnx() as cnx:
            value = self.value(cnx, self.eid)
            cnx.entity_from_eid(eid).cw_set(content=value)
            cnx.commit()
        self.assertEqual(self.s3.requests, ["COPY", "DELETEMANY"])
        self.assertEqual(self.read(eid), b"content")
        self.assertEqual(list(self.objects().values()), [b"content"] * 2)

    def test_its_own_entity_gets_it(self):
        with self.admin_access.repo_cnx() as cnx:
            value = self.value(cnx, self.eid)
            cnx.entity_from_eid(self.eid).cw_set(content=value)
            cnx.commit()
            self.assertEqual(value.read(), b"content")
        self.assertEqual(self.read(self.eid), b"content")
        self.assertEqual(list(self.objects().values()), [b"content"])

    def test_a_loaded_value_is_uploaded(self):
        self.copied(lambda value: value.read())
        self.assertEqual(self.s3.requests, ["GET", "PUT"])

    def test_a_modified_value_is_uploaded(self):
        eid = self.copied(lambda value: value.write(b"C"))
        self.assertEqual(self.read(eid), b"Content")
        self.assertEqual(self.read(self.eid), b"content")
        eid = self.copied(lambda value: value.writelines([b"C"]))
        self.assertEqual(self.read(eid), b"Content")

    def test_a_value_for_another_bucket_is_uploaded(self):
        bucket = f"test-{uuid.uuid4()}"
        self.client.create_bucket(Bucket=bucket)
        self.addCleanup(self.client.delete_bucket, Bucket=bucket)
        self.set_storage("Scan", "content", S3Storage(bucket))
        with self.admin_access.repo_cnx() as cnx:
            value = self.value(cnx, self.eid)
            scan = cnx.create_entity("Scan", content=value)
            cnx.commit()
            self.assertEqual(self.s3.requests, ["GET", "PUT"])
            self.assertEqual(
                self.selected("Any D WHERE X is Scan, X content D")[0], value
            )
            scan.cw_delete()
            cnx.commit()

    def test_the_media_type_is_that_of_the_new_entity(self):
        for media_type, expected in (
            ("text/plain",) * 2,
            (None, "binary/octet-stream"),
        ):
            key = self.row(self.copied(content_format=media_type))
            head = self.client.head_object(Bucket=self.bucket, Key=key)
            self.assertEqual(head["ContentType"], expected)

    def test_the_source_may_be_deleted_by_the_same_transaction(self):
        for suffixed in (False, True):
            self.set_option("s3-transaction-suffix-key", suffixed)
            with self.admin_access.repo_cnx() as cnx:
                value = self.value(cnx, self.eid)
                eid = self.create(cnx, None).eid
                cnx.entity_from_eid(eid).cw_set(content=value)
                cnx.entity_from_eid(self.eid).cw_delete()
                cnx.commit()
            self.eid = eid
            self.assertEqual(self.read(eid), b"content")
            self.assertEqual(list(self.objects().values()), [b"content"])

    def test_a_source_of_the_same_transaction(self):
        for suffixed in (False, True):
            self.set_option("s3-transaction-suffix-key", suffixed)
            with self.admin_access.repo_cnx() as cnx:
                value = self.value(cnx, self.create(cnx, b"new").eid)
                eid = cnx.create_entity("Document", content=value).eid
                cnx.commit()
            self.assertEqual(self.read(eid), b"new")

    def test_a_source_that_is_replaced_by_the_same_transaction(self):
        self.set_storage("Scan", "content", OwnKeyStorage(self.bucket))
        with self.admin_access.repo_cnx() as cnx:
            scan = cnx.create_entity("Scan", content=Binary(b"old"))
            cnx.commit()
            value = cnx.execute("Any D WHERE X is Scan, X content D").rows[0][0]
            cnx.entity_from_eid(self.eid).cw_set(content=value)
            scan.cw_set(content=Binary(b"new"))
            cnx.commit()
        self.assertEqual(self.read(self.eid), b"old")
        self.assertEqual(set(self.objects().values()), {b"old", b"new"})

    def test_a_missing_source_fails_the_commit(self):
        key = self.row(self.eid)
        self.client.delete_object(Bucket=self.bucket, Key=key)
        with self.assertRaisesRegex(ObjectMissing, key):
            self.copied()
        self.assertEqual(self.selected("Any COUNT(X) WHERE X is Document"), [1])
        self.assertEqual(self.objects(), {})

    def test_a_rollback_removes_the_copy(self):
        for suffixed in (False, True):
            self.set_option("s3-transaction-suffix-key", suffixed)
            with self.admin_access.repo_cnx() as cnx:
                cnx.create_entity("Document", content=self.value(cnx, self.eid))
                self.uploaded(cnx)
                self.assertEqual(len(self.objects()), 2)
                cnx.rollback()
            self.assertEqual(list(self.objects()), [self.row(self.eid)])

    def test_suffixes(self):
        self.set_option("s3-transaction-suffix-key", True)
        eid = self.copied()
        self.assertEqual(self.s3.requests, ["COPY", "COPY", "DELETEMANY"])
        self.assertEqual(self.read(eid), b"content")
        self.assertEqual(set(self.objects()), {self.row(self.eid), self.row(eid)})

    def test_versions(self):
        self.keep_versions()
        self.eid = self.committed(b"version")
        eid = self.copied()
        self.assertNotIn("PUT", self.s3.requests)
        self.assertNotIn("GET", self.s3.requests)
        self.assertIn("#", self.row(eid))
        self.assertEqual(self.read(eid), b"version")
