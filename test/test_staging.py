"""The option s3-transaction-suffix-key: every write is staged until the commit."""

from cubicweb import Binary

from cubicweb_s3storage.errors import ObjectMissing, S3Unreachable
from cubicweb_s3storage.storages import S3Storage
from s3server import Fault
from testlib import S3TC, ContentHashStorage, OwnKeyStorage


class StagingTC(S3TC):
    def setUp(self):
        super().setUp()
        self.set_option("s3-transaction-suffix-key", True)

    def test_before_the_commit_there_is_a_staged_object_only(self):
        with self.admin_access.repo_cnx() as cnx:
            document = self.create(cnx, b"content")
            key = self.storage.get_s3_key(document, "content")
            self.uploaded(cnx)
            (staged,) = self.objects()
            self.assertTrue(staged.startswith(f"{key}.tmp."))
            cnx.commit()
        self.assertEqual(self.objects(), {key: b"content"})

    def test_the_row_holds_the_final_key(self):
        eid = self.committed(b"content")
        self.assertRegex(self.row(eid), r"^\w{8}-\w{4}-\w{4}-\w{4}-\w{12}$")
        self.assertEqual(self.read(eid), b"content")

    def test_the_transaction_reads_what_it_staged(self):
        with self.admin_access.repo_cnx() as cnx:
            eid = self.create(cnx, b"content").eid
            cnx.drop_entity_cache()
            self.assertEqual(cnx.entity_from_eid(eid).content.read(), b"content")

    def test_rollback_leaves_nothing(self):
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"content")
            cnx.rollback()
        self.assertEqual(self.objects(), {})

    def test_update_and_rollback(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.rollback()
        self.assertEqual(self.objects(), {self.row(eid): b"old"})

    def test_update_delete_and_several_writes(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            document = cnx.entity_from_eid(eid)
            document.cw_set(content=Binary(b"1"))
            document.cw_set(content=Binary(b"2"))
            cnx.commit()
        self.assertEqual(self.objects(), {self.row(eid): b"2"})
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx).cw_delete()
            cnx.entity_from_eid(eid).cw_delete()
            cnx.commit()
        self.assertEqual(self.objects(), {})

    def test_with_auto_delete_off_what_was_never_committed_goes(self):
        self.set_option("s3-auto-delete", False)
        for storage_class in (S3Storage, OwnKeyStorage):
            self.set_storage("Document", "content", storage_class(self.bucket))
            with self.admin_access.repo_cnx() as cnx:
                self.create(cnx).cw_delete()
                cnx.commit()
            self.assertEqual(self.objects(), {})

    def test_two_transactions_on_one_key_do_not_meet(self):
        eid = self.committed(b"old")
        self.set_storage("Document", "content", OwnKeyStorage(self.bucket))
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"1"))
            cnx.commit()
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"2"))
            self.uploaded(cnx)
            staged = set(self.objects())
            cnx.rollback()
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"2"))
            self.uploaded(cnx)
            self.assertEqual(len(staged | set(self.objects())), 3)
            cnx.commit()
        self.assertEqual(self.objects(), {f"documents/{eid}": b"2"})

    def test_equal_contents_share_an_object(self):
        self.set_storage("Document", "content", ContentHashStorage(self.bucket))
        first, second = self.committed(b"content"), self.committed(b"content")
        self.assertEqual(len(self.objects()), 1)
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"content")
            cnx.rollback()
            cnx.entity_from_eid(first).cw_delete()
            cnx.commit()
        self.assertEqual(self.read(second), b"content")

    def test_a_move_that_fails_loses_nothing(self):
        self.s3.faults.append(Fault("COPY", 403, "AccessDenied"))
        with self.assertLogs("cube.s3storage", "CRITICAL") as logs:
            eid = self.committed(b"content")
        self.assertIn(self.row(eid), logs.output[0])
        self.assertEqual(list(self.objects().values()), [b"content"])
        self.assertEqual(self.read(eid), b"content")  # from the staged copy

    def test_a_kept_copy_stays_readable_beside_others(self):
        self.s3.faults.append(Fault("COPY", 403, "AccessDenied"))
        first = self.committed(b"first")
        self.s3.faults.clear()
        second = self.committed(b"second")
        self.assertEqual(self.read(first), b"first")
        self.assertEqual(self.read(second), b"second")

    def test_several_writes_of_a_new_object(self):
        self.set_storage("Document", "content", OwnKeyStorage(self.bucket))
        with self.admin_access.repo_cnx() as cnx:
            document = self.create(cnx, b"1")
            document.cw_set(content=Binary(b"2"))
            self.uploaded(cnx)
            self.assertNotIn(f"documents/{document.eid}", self.objects())
            cnx.commit()
        self.assertEqual(self.objects(), {f"documents/{document.eid}": b"2"})

    def test_equal_contents_share_a_kept_copy(self):
        self.set_storage("Document", "content", ContentHashStorage(self.bucket))
        self.s3.faults.append(Fault("COPY", 403, "AccessDenied", times=1))
        first, second = self.committed(b"content"), self.committed(b"content")
        self.assertEqual(self.read(first), b"content")
        self.assertEqual(self.read(second), b"content")

    def test_an_outage_while_a_kept_copy_is_looked_for_is_an_outage(self):
        self.s3.faults.append(Fault("COPY", 403, "AccessDenied", times=1))
        eid = self.committed(b"content")
        self.set_option("s3-cache-size", 0)
        self.s3.faults.append(Fault("LIST", 503, "SlowDown"))
        with self.assertRaises(S3Unreachable):
            self.read(eid)

    def test_of_two_staged_copies_none_is_guessed(self):
        eid = self.committed(b"content")
        key = self.row(eid)
        self.client.delete_object(Bucket=self.bucket, Key=key)
        self.set_option("s3-cache-size", 0)
        for content in (b"1", b"2"):
            self.put(f"{key}.tmp.{content.hex() * 16}", content)
        with self.assertRaises(ObjectMissing):
            self.read(eid)

    def test_on_a_bucket_with_versions_no_staged_version_stays(self):
        self.client.put_bucket_versioning(
            Bucket=self.bucket, VersioningConfiguration={"Status": "Enabled"}
        )
        eid = self.committed(b"content")
        self.assertEqual([ref["Key"] for ref in self.versions()], [self.row(eid)])

    def test_another_suffix(self):
        storage = type(self.storage)(self.bucket, suffix="~new")
        self.set_storage("Document", "content", storage)
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx)
            self.uploaded(cnx)
            self.assertIn("~new.", next(iter(self.objects())))
            cnx.commit()
        self.assertEqual(len(self.objects()), 1)

    def test_an_object_too_large_for_one_copy_is_copied_in_parts(self):
        content = bytes(9 * 2**20)
        fault = Fault("COPY", 400, "InvalidRequest", times=1)
        self.s3.faults.append(fault)
        eid = self.committed(content, content_format="image/tiff")
        self.assertEqual(fault.times, 0)
        self.assertEqual(self.objects(), {self.row(eid): content})
        head = self.client.head_object(Bucket=self.bucket, Key=self.row(eid))
        self.assertEqual(head["ContentType"], "image/tiff")

    def test_objects_are_moved_beside_each_other(self):
        meeting = self.meeting("COPY", 4)
        with self.admin_access.repo_cnx() as cnx:
            for _ in range(4):
                self.create(cnx)
            cnx.commit()
        self.assertFalse(meeting.broken)
        self.assertEqual(len(self.objects()), 4)
