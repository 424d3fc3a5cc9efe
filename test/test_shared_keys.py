"""Overridden keys: equal contents share an object, an entity's object is replaced."""

from cubicweb import Binary
from cubicweb.server.hook import LateOperation, Operation, SingleLastOperation

from cubicweb_s3storage.errors import KeyConflict
from cubicweb_s3storage.storages import S3DeleteFileOp, S3Storage
from testlib import S3TC, ContentHashStorage, OwnKeyStorage

HASH = "040f06fd774092478d450774f5ba30c5da78acc8"  # SHA-1 of b"content"


class SameContentTC(S3TC):
    storage_class = ContentHashStorage

    def test_rows_share_one_object(self):
        eids = [self.committed(b"content"), self.committed(b"content")]
        self.assertEqual([self.row(eid) for eid in eids], [HASH, HASH])
        self.assertEqual(self.objects(), {HASH: b"content"})

    def test_the_object_goes_with_the_last_row(self):
        first, second = self.committed(b"content"), self.committed(b"content")
        self.delete(first)
        self.assertEqual(self.read(second), b"content")
        self.delete(second)
        self.assertEqual(self.objects(), {})

    def test_rows_of_another_type_count(self):
        self.set_storage("Scan", "content", self.storage)
        first = self.committed(b"content")
        with self.admin_access.repo_cnx() as cnx:
            scan = cnx.create_entity("Scan", content=Binary(b"content")).eid
            cnx.commit()
            cnx.entity_from_eid(first).cw_delete()
            cnx.commit()
        self.assertEqual(self.read(scan), b"content")

    def test_update_of_one_row_keeps_the_object_of_the_other(self):
        first, second = self.committed(b"content"), self.committed(b"content")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(first).cw_set(content=Binary(b"other"))
            cnx.commit()
        self.assertEqual(self.read(first), b"other")
        self.assertEqual(self.read(second), b"content")

    def test_update_with_the_same_content(self):
        eid = self.committed(b"content")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"content"))
            cnx.commit()
        self.assertEqual(self.objects(), {HASH: b"content"})
        self.assertEqual(self.read(eid), b"content")

    def test_rollback_keeps_an_object_that_was_there(self):
        eid = self.committed(b"content")
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"content")
            cnx.rollback()
        self.assertEqual(self.read(eid), b"content")

    def test_rollback_keeps_an_object_that_was_there_and_that_no_row_names(self):
        self.put(HASH, b"content")
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"content")
            cnx.rollback()
        self.assertEqual(self.objects(), {HASH: b"content"})

    def test_rollback_removes_an_object_that_was_not_there(self):
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"content")
            self.create(cnx, b"content")
            cnx.rollback()
        self.assertEqual(self.objects(), {})

    def test_rollback_of_an_update_to_a_shared_content(self):
        first, second = self.committed(b"first"), self.committed(b"content")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(first).cw_set(content=Binary(b"content"))
            cnx.rollback()
        self.assertEqual(self.read(first), b"first")
        self.assertEqual(self.read(second), b"content")

    def test_delete_and_create_again_in_one_transaction(self):
        eid = self.committed(b"content")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_delete()
            eid = self.create(cnx, b"content").eid
            cnx.commit()
        self.assertEqual(self.read(eid), b"content")

    def test_two_equal_creates_and_one_delete_in_one_transaction(self):
        with self.admin_access.repo_cnx() as cnx:
            first = self.create(cnx, b"content")
            second = self.create(cnx, b"content").eid
            first.cw_delete()
            cnx.commit()
        self.assertEqual(self.read(second), b"content")

    def test_exchange_of_contents(self):
        first, second = self.committed(b"1"), self.committed(b"2")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(first).cw_set(content=Binary(b"2"))
            cnx.entity_from_eid(second).cw_set(content=Binary(b"1"))
            cnx.commit()
        self.assertEqual((self.read(first), self.read(second)), (b"2", b"1"))
        self.assertEqual(len(self.objects()), 2)

    def test_the_object_is_written_again(self):
        self.committed(b"content")
        before = self.client.head_object(Bucket=self.bucket, Key=HASH)
        self.committed(b"content")
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"content")
            cnx.commit()
        self.assertEqual(self.s3.requests, ["HEAD", "PUT"])
        self.assertIn("LastModified", before)

    def test_an_object_whose_etag_is_no_md5_is_compared(self):
        # as multipart uploads leave them
        upload = self.client.create_multipart_upload(Bucket=self.bucket, Key=HASH)
        ids = {"Bucket": self.bucket, "Key": HASH, "UploadId": upload["UploadId"]}
        part = self.client.upload_part(PartNumber=1, Body=b"content", **ids)
        parts = [{"PartNumber": 1, "ETag": part["ETag"]}]
        self.client.complete_multipart_upload(MultipartUpload={"Parts": parts}, **ids)
        eid = self.committed(b"content")
        self.assertEqual(self.row(eid), HASH)
        self.assertEqual(self.objects(), {HASH: b"content"})

    def test_an_application_deletes_through_the_operation(self):
        eid = self.committed(b"content")
        self.put("scratch", b"made by the application")
        with self.admin_access.repo_cnx() as cnx:
            operation = S3DeleteFileOp.get_instance(cnx)
            operation.add_data((self.storage, "scratch", eid, "content"))
            operation.add_data((self.storage, HASH, eid, "content"))
            cnx.commit()
        self.assertEqual(self.objects(), {HASH: b"content"})

    def test_an_application_calls_the_public_methods(self):
        eid = self.committed(b"content")
        key = self.row(eid)
        self.assertEqual(self.storage.download(key).read(), b"content")
        self.assertEqual(
            self.storage.download(key, Range="bytes=3-").getvalue(), b"tent"
        )
        self.assertEqual(self.storage.suffixed_key(key), f"{HASH}.tmp")
        self.assertEqual(self.storage.parse_key("a#b#c"), ("a#b", "c"))
        self.assertEqual(self.storage.parse_key("a"), ("a", None))
        self.assertEqual(self.storage.format_version_id_suffix("a", "v"), "a#v")
        answer = self.storage.s3cnx.head_object(Bucket=self.storage.bucket, Key=key)
        self.assertEqual(answer["ContentLength"], 7)
        with self.admin_access.repo_cnx() as cnx:
            value = self.storage.get_s3_object(cnx, key)
            self.assertEqual((value.tell(), value.read()), (0, b"content"))


class OtherContentTC(S3TC):
    storage_class = OwnKeyStorage

    def update(self, cnx, eid, content):
        cnx.entity_from_eid(eid).cw_set(content=Binary(content))

    def test_update_keeps_the_key(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            self.update(cnx, eid, b"new")
            cnx.commit()
        self.assertEqual(self.row(eid), f"documents/{eid}")
        self.assertEqual(self.objects(), {f"documents/{eid}": b"new"})

    def test_before_the_commit_only_the_transaction_sees_the_new_content(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            self.update(cnx, eid, b"new")
            cnx.drop_entity_cache()
            self.assertEqual(cnx.entity_from_eid(eid).content.read(), b"new")
            self.assertEqual(
                self.storage.get_s3_key(cnx.entity_from_eid(eid), "content"),
                f"documents/{eid}",
            )
            self.assertEqual(self.read(eid), b"old")
            cnx.commit()

    def test_rollback_keeps_the_old_content_and_nothing_else(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            self.update(cnx, eid, b"new")
            cnx.rollback()
        self.assertEqual(self.objects(), {f"documents/{eid}": b"old"})

    def test_several_updates_in_one_transaction(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            self.update(cnx, eid, b"1")
            self.update(cnx, eid, b"2")
            cnx.commit()
        self.assertEqual(self.objects(), {f"documents/{eid}": b"2"})

    def test_there_and_back_again_in_one_transaction(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            self.update(cnx, eid, b"new")
            self.update(cnx, eid, b"old")
            cnx.drop_entity_cache()
            self.assertEqual(cnx.entity_from_eid(eid).content.read(), b"old")
            cnx.commit()
        self.assertEqual(self.objects(), {f"documents/{eid}": b"old"})

    def test_create_and_update_in_one_transaction(self):
        with self.admin_access.repo_cnx() as cnx:
            eid = self.create(cnx, b"1").eid
            self.update(cnx, eid, b"2")
            cnx.commit()
        self.assertEqual(self.objects(), {f"documents/{eid}": b"2"})

    def test_create_update_and_rollback_leaves_nothing(self):
        with self.admin_access.repo_cnx() as cnx:
            eid = self.create(cnx, b"1").eid
            self.update(cnx, eid, b"2")
            cnx.rollback()
        self.assertEqual(self.objects(), {})

    def test_update_then_null(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            self.update(cnx, eid, b"new")
            cnx.entity_from_eid(eid).cw_set(content=None)
            cnx.commit()
        self.assertEqual(self.objects(), {})

    def test_null_then_update(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=None)
            self.update(cnx, eid, b"new")
            cnx.commit()
        self.assertEqual(self.objects(), {f"documents/{eid}": b"new"})

    def test_an_object_that_no_row_names_is_replaced_only_by_a_commit(self):
        class FixedKeyStorage(S3Storage):
            def new_s3_key(self, entity, attr):
                return "fixed"

        self.set_storage("Document", "content", FixedKeyStorage(self.bucket))
        self.put("fixed", b"somebody's")
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"ours")
            cnx.rollback()
        self.assertEqual(self.objects(), {"fixed": b"somebody's"})
        self.committed(b"ours")
        self.assertEqual(self.objects(), {"fixed": b"ours"})

    def test_rollback_over_a_missing_object_leaves_it_missing(self):
        eid = self.committed(b"old")
        self.client.delete_object(Bucket=self.bucket, Key=f"documents/{eid}")
        with self.admin_access.repo_cnx() as cnx:
            self.update(cnx, eid, b"never committed")
            cnx.rollback()
        with self.assertRaises(FileNotFoundError):
            self.read(eid)

    def test_with_auto_delete_off_a_value_that_was_never_committed_replaces_none(self):
        self.set_option("s3-auto-delete", False)
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            self.update(cnx, eid, b"new")
            cnx.entity_from_eid(eid).cw_set(content=None)
            cnx.commit()
        self.assertEqual(self.objects(), {f"documents/{eid}": b"old"})

    def test_a_late_operation_that_writes_and_gives_up(self):
        eid = self.committed(b"old")
        update = self.update

        class WriteLate(LateOperation):
            def precommit_event(self):
                update(self.cnx, eid, b"new")
                self.cnx.entity_from_eid(eid).cw_set(content=None)

        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"another").cw_delete()
            WriteLate(cnx)
            cnx.commit()
        self.assertEqual(self.objects(), {})

    def test_operations_read_what_the_transaction_wrote_at_any_time(self):
        eid = self.committed(b"old")
        read = []

        class Read(Operation):
            def read(self):
                self.cnx.drop_entity_cache()
                read.append(self.cnx.entity_from_eid(eid).content.getvalue())

            precommit_event = postcommit_event = read

        class ReadLast(Read, SingleLastOperation):
            pass

        with self.admin_access.repo_cnx() as cnx:
            Read(cnx)
            self.update(cnx, eid, b"new")
            ReadLast(cnx)
            cnx.commit()
        self.assertEqual(read, [b"new"] * 4)

    def test_content_type_survives_the_move(self):
        eid = self.committed(b"old", content_format="text/plain")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(
                content=Binary(b"new"), content_format="text/html"
            )
            cnx.commit()
        answer = self.client.head_object(Bucket=self.bucket, Key=self.row(eid))
        self.assertEqual(answer["ContentType"], "text/html")

    def test_what_get_upload_extra_args_says_survives_the_move(self):
        class ArgumentsStorage(OwnKeyStorage):
            def get_upload_extra_args(self, entity, attr, key):
                return {
                    "CacheControl": "max-age=60",
                    "Metadata": {"title": "deed"},
                    "StorageClass": "STANDARD",
                }

        self.set_storage("Document", "content", ArgumentsStorage(self.bucket))
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            self.update(cnx, eid, b"new")
            cnx.commit()
        answer = self.client.head_object(Bucket=self.bucket, Key=self.row(eid))
        self.assertEqual(answer["CacheControl"], "max-age=60")
        self.assertEqual(answer["Metadata"], {"title": "deed"})

    def test_long_keys_are_staged_too(self):
        class LongKeyStorage(S3Storage):
            def new_s3_key(self, entity, attr):
                return f"{entity.eid}-".ljust(1024, "x")

        self.set_storage("Document", "content", LongKeyStorage(self.bucket))
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            self.update(cnx, eid, b"new")
            cnx.commit()
        self.assertEqual(list(self.objects().values()), [b"new"])


class FixedKeyStorage(S3Storage):
    def new_s3_key(self, entity, attr):
        return "fixed"


class ConflictTC(S3TC):
    """One key for different contents: no row may see its content change."""

    storage_class = FixedKeyStorage

    def test_a_second_row_with_another_content_is_refused(self):
        eid = self.committed(b"first")
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"second")
            with self.assertRaisesRegex(
                KeyConflict, rf"Document {eid}, attribute content.*'fixed'"
            ):
                cnx.commit()
        self.assertEqual(self.objects(), {"fixed": b"first"})

    def test_two_rows_with_different_contents_in_one_transaction(self):
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"first")
            self.create(cnx, b"second")
            with self.assertRaises(KeyConflict):
                cnx.commit()
        self.assertEqual(self.objects(), {})

    def test_an_update_of_one_of_two_rows_is_refused(self):
        first, second = self.committed(b"same"), self.committed(b"same")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(first).cw_set(content=Binary(b"other"))
            with self.assertRaises(KeyConflict):
                cnx.commit()
        self.assertEqual(self.read(second), b"same")

    def test_an_update_of_both_rows_is_not(self):
        first, second = self.committed(b"same"), self.committed(b"same")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(first).cw_set(content=Binary(b"other"))
            cnx.entity_from_eid(second).cw_set(content=Binary(b"other"))
            cnx.commit()
        self.assertEqual(self.read(first), b"other")
        self.assertEqual(self.objects(), {"fixed": b"other"})

    def test_a_row_that_a_later_operation_deletes_does_not_count(self):
        eid = self.committed(b"first")

        class DeleteInPrecommit(Operation):
            def precommit_event(self):
                self.cnx.entity_from_eid(eid).cw_delete()

        with self.admin_access.repo_cnx() as cnx:
            second = self.create(cnx, b"second").eid
            DeleteInPrecommit(cnx)
            cnx.commit()
        self.assertEqual(self.read(second), b"second")
        self.assertEqual(self.objects(), {"fixed": b"second"})

    def test_a_replaced_row_does_not_count(self):
        eid = self.committed(b"first")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_delete()
            eid = self.create(cnx, b"second").eid
            cnx.commit()
        self.assertEqual(self.read(eid), b"second")
        self.assertEqual(self.objects(), {"fixed": b"second"})

    def test_a_row_without_version_keeps_its_content(self):
        self.keep_versions()
        self.set_option("s3-activate-object-versioning", False)
        eid = self.committed(b"first")
        self.set_option("s3-activate-object-versioning", True)
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"second")
            with self.assertRaises(KeyConflict):
                cnx.commit()
        self.assertEqual(self.read(eid), b"first")
