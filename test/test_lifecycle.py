"""Values come, change and go with their transactions; default options."""

from cubicweb import Binary, ValidationError
from cubicweb.server.hook import Hook, Operation

from cubicweb_s3storage.storages import S3Storage
from testlib import S3TC


class CommitTC(S3TC):
    def test_create_makes_one_object_and_the_row_holds_its_key(self):
        eid = self.committed(b"some content")
        self.assertEqual(self.objects(), {self.row(eid): b"some content"})

    def test_keys_are_random_uuids(self):
        keys = {self.row(self.committed()), self.row(self.committed())}
        self.assertEqual(len(keys), 2)
        for key in keys:
            self.assertRegex(key, r"^\w{8}-\w{4}-4\w{3}-\w{4}-\w{12}$")

    def test_the_given_binary_is_returned_unread_and_unmoved(self):
        binary = Binary(b"some content")
        binary.seek(5)
        with self.admin_access.repo_cnx() as cnx:
            document = cnx.create_entity("Document", content=binary)
            self.assertEqual(binary.tell(), 5)
            cnx.commit()
        self.assertEqual(self.read(document.eid), b"some content")

    def test_a_later_change_of_the_given_binary_changes_nothing(self):
        binary = Binary(b"before")
        with self.admin_access.repo_cnx() as cnx:
            eid = cnx.create_entity("Document", content=binary).eid
            binary.seek(0)
            binary.write(b"AFTER!")
            cnx.commit()
        self.assertEqual(self.read(eid), b"before")

    def test_every_byte_and_the_empty_value_survive(self):
        for content in (b"", bytes(range(256)), b"\xff\xfe\r\n\x00" * 100_000):
            self.assertEqual(self.read(self.committed(content)), content)

    def test_values_are_read_at_position_0(self):
        eid = self.committed(b"some content")
        with self.admin_access.repo_cnx() as cnx:
            value = cnx.entity_from_eid(eid).content
            self.assertEqual(value.tell(), 0)
            self.assertEqual(value.read(), b"some content")

    def test_update_replaces_the_object(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        self.assertEqual(self.objects(), {self.row(eid): b"new"})
        self.assertEqual(self.read(eid), b"new")

    def test_update_of_another_attribute_leaves_the_object_alone(self):
        eid = self.committed(b"content")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(title="new")
            cnx.commit()
        self.assertEqual(self.s3.requests, [])
        self.assertEqual(self.read(eid), b"content")

    def test_update_by_rql(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.execute(
                "SET X content %(c)s WHERE X eid %(x)s",
                {"c": Binary(b"new"), "x": eid},
            )
            cnx.commit()
        self.assertEqual(self.objects(), {self.row(eid): b"new"})

    def test_update_to_null_removes_the_object(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=None)
            cnx.commit()
        self.assertIsNone(self.read(eid))
        self.assertEqual(self.objects(), {})

    def test_null_makes_no_object(self):
        eid = self.committed(None)
        self.assertIsNone(self.read(eid))
        self.assertIsNone(self.row(eid))
        self.assertEqual(self.objects(), {})

    def test_update_from_null(self):
        eid = self.committed(None)
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        self.assertEqual(self.objects(), {self.row(eid): b"new"})

    def test_delete_removes_the_object(self):
        eid, other = self.committed(b"gone"), self.committed(b"stays")
        self.delete(eid)
        self.assertEqual(self.objects(), {self.row(other): b"stays"})

    def test_delete_by_rql_of_many(self):
        for n in range(5):
            self.committed(b"%d" % n)
        with self.admin_access.repo_cnx() as cnx:
            cnx.execute("DELETE Document X")
            cnx.commit()
        self.assertEqual(self.objects(), {})

    def test_two_attributes_of_one_entity(self):
        self.set_storage("Document", "thumbnail", self.storage)
        with self.admin_access.repo_cnx() as cnx:
            document = self.create(cnx, b"big", thumbnail=Binary(b"small"))
            cnx.commit()
            eid = document.eid
        big, small = self.row(eid), self.row(eid, "thumbnail")
        self.assertEqual(self.objects(), {big: b"big", small: b"small"})

    def test_two_storages_on_two_buckets_in_one_transaction(self):
        other = f"{self.bucket}-2"
        self.client.create_bucket(Bucket=other)
        storage = S3Storage(other)
        self.set_storage("Scan", "content", storage)
        with self.admin_access.repo_cnx() as cnx:
            scan = cnx.create_entity("Scan", content=Binary(b"scan"))
            document = self.create(cnx, b"document")
            cnx.commit()
            key = storage.get_s3_key(scan, "content")
            scan.cw_delete()
            document.cw_delete()
            self.client.head_object(Bucket=other, Key=key)
            cnx.commit()
        self.assertEqual(self.objects(), {})
        self.assertNotIn("Contents", self.client.list_objects_v2(Bucket=other))
        self.client.delete_bucket(Bucket=other)

    def test_with_auto_delete_off_committed_objects_stay(self):
        self.set_option("s3-auto-delete", False)
        first, second = self.committed(b"1"), self.committed(b"2")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(first).cw_set(content=Binary(b"new"))
            cnx.entity_from_eid(second).cw_delete()
            cnx.commit()
        self.assertEqual(sorted(self.objects().values()), [b"1", b"2", b"new"])

    def test_with_auto_delete_off_what_was_never_committed_goes(self):
        self.set_option("s3-auto-delete", False)
        with self.admin_access.repo_cnx() as cnx:
            document = self.create(cnx, b"first")
            document.cw_set(content=Binary(b"second"))
            self.create(cnx, b"third").cw_delete()
            cnx.commit()
        self.assertEqual(self.objects(), {self.row(document.eid): b"second"})

    def test_with_undo_objects_stay_for_it(self):
        self.set_option("undo-enabled", True)
        self.addCleanup(self.set_option, "undo-enabled", False)
        eid = self.committed(b"content", thumbnail=Binary(b"not null, as undo needs"))
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_delete()
            uuid = cnx.commit()
            cnx.undo_transaction(uuid)
            cnx.commit()
        self.assertEqual(self.read(eid), b"content")


class SeveralWritesTC(S3TC):
    def test_only_the_last_of_several_writes_stays(self):
        with self.admin_access.repo_cnx() as cnx:
            document = self.create(cnx, b"1")
            document.cw_set(content=Binary(b"2"))
            document.cw_set(content=Binary(b"3"))
            cnx.commit()
        self.assertEqual(self.objects(), {self.row(document.eid): b"3"})

    def test_write_null_write(self):
        eid = self.committed(b"1")
        with self.admin_access.repo_cnx() as cnx:
            document = cnx.entity_from_eid(eid)
            document.cw_set(content=Binary(b"2"))
            document.cw_set(content=None)
            document.cw_set(content=Binary(b"3"))
            cnx.commit()
        self.assertEqual(self.objects(), {self.row(eid): b"3"})

    def test_create_and_delete_in_one_transaction_leaves_nothing(self):
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx).cw_delete()
            cnx.commit()
        self.assertEqual(self.objects(), {})

    def test_update_and_delete_in_one_transaction_leaves_nothing(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            document = cnx.entity_from_eid(eid)
            document.cw_set(content=Binary(b"new"))
            document.cw_delete()
            cnx.commit()
        self.assertEqual(self.objects(), {})

    def test_a_transaction_reads_what_it_wrote(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.drop_entity_cache()
            self.assertEqual(cnx.entity_from_eid(eid).content.getvalue(), b"new")
            self.assertEqual(self.read(eid), b"old")


class AddInPrecommit(Operation):
    def precommit_event(self):
        self.cnx.create_entity("Document", title="second", content=Binary(b"second"))


class AddSecondDocument(Hook):
    __regid__ = "test.add-second-document"
    events = ("after_add_entity",)

    def __call__(self):
        if self.entity.cw_etype == "Document" and self.entity.title == "first":
            AddInPrecommit(self._cw)


class RefuseInPrecommit(Operation):
    def precommit_event(self):
        raise ValidationError(None, {"content": "refused"})


class PrecommitTC(S3TC):
    def test_what_a_hook_writes_during_precommit_is_committed(self):
        with self.temporary_appobjects(AddSecondDocument):
            self.committed(b"first", title="first")
        self.assertEqual(sorted(self.objects().values()), [b"first", b"second"])

    def test_a_precommit_that_fails_removes_all_it_wrote(self):
        with (
            self.temporary_appobjects(AddSecondDocument),
            self.admin_access.repo_cnx() as cnx,
        ):
            self.create(cnx, b"first", title="first")
            RefuseInPrecommit(cnx)
            with self.assertRaises(ValidationError):
                cnx.commit()
        self.assertEqual(self.objects(), {})

    def test_a_late_precommit_that_fails_removes_what_precommit_wrote(self):
        with self.admin_access.repo_cnx() as cnx:
            AddInPrecommit(cnx)
            RefuseInPrecommit(cnx)
            with self.assertRaises(ValidationError):
                cnx.commit()
            self.assertIn("PUT", self.s3.requests)
        self.assertEqual(self.objects(), {})


class RollbackTC(S3TC):
    def test_rollback_of_a_create_removes_the_object(self):
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx)
            self.uploaded(cnx)
            self.assertEqual(len(self.objects()), 1)
            cnx.rollback()
        self.assertEqual(self.objects(), {})

    def test_leaving_without_commit_is_a_rollback(self):
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx)
        self.assertEqual(self.objects(), {})

    def test_rollback_of_an_update_keeps_the_old_object_and_no_other(self):
        eid = self.committed(b"old")
        before = self.objects()
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.rollback()
        self.assertEqual(self.objects(), before)
        self.assertEqual(self.read(eid), b"old")

    def test_rollback_of_a_delete_keeps_the_object(self):
        eid = self.committed(b"content")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_delete()
            cnx.rollback()
        self.assertEqual(self.read(eid), b"content")

    def test_rollback_of_null_keeps_the_object(self):
        eid = self.committed(b"content")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=None)
            cnx.rollback()
        self.assertEqual(self.read(eid), b"content")

    def test_rollback_then_commit_on_the_same_connection(self):
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"first")
            cnx.rollback()
            eid = self.create(cnx, b"second").eid
            cnx.commit()
        self.assertEqual(self.objects(), {self.row(eid): b"second"})

    def test_a_commit_that_fails_in_the_database_loses_nothing(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            self.commit_in_vain(cnx)
            cnx.cnxset.rollback()
        self.assertEqual(self.read(eid), b"old")
        # The new object is an orphan: whether the commit took place is unknown.
        self.assertEqual(sorted(self.objects().values()), [b"new", b"old"])

    def test_a_validation_error_after_the_upload(self):
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx)
            with self.assertRaises(ValidationError):
                cnx.create_entity("CWGroup")
            cnx.rollback()
        self.assertEqual(self.objects(), {})
