"""The option s3-activate-object-versioning: every row names a version."""

from cubicweb import Binary
from cubicweb.server.sources.storages import fsimport

from cubicweb_s3storage.errors import AccessRefused, S3Unreachable
from cubicweb_s3storage.storages import S3Storage
from cubicweb_s3storage.uploads import history
from s3server import Fault
from testlib import S3TC, ContentHashStorage, OwnKeyStorage


class VersionsTC(S3TC):
    def setUp(self):
        super().setUp()
        self.keep_versions()

    def test_the_row_holds_key_and_version(self):
        eid = self.committed(b"content")
        key, version_id = self.storage.parse_key(self.row(eid))
        self.assertEqual(self.versions(), [{"Key": key, "VersionId": version_id}])
        self.assertEqual(self.read(eid), b"content")

    def test_uploads_run_beside_each_other(self):
        barrier = self.meeting("PUT", 8)
        with self.admin_access.repo_cnx() as cnx:
            contents = {self.create(cnx, b"%d" % n).eid: b"%d" % n for n in range(8)}
            cnx.commit()
        self.assertFalse(barrier.broken)
        self.assertEqual(self.s3.requests, ["PUT"] * 8)
        self.assertCountEqual(
            map(self.row, contents), ["#".join(ref.values()) for ref in self.versions()]
        )
        for eid, content in contents.items():
            self.assertEqual(self.read(eid), content)

    def test_the_transaction_sees_what_the_row_will_hold(self):
        with self.admin_access.repo_cnx() as cnx:
            document = self.create(cnx)
            held = self.storage.get_s3_key(document, "content")
            ((stkey,),) = cnx.execute("Any STKEY(D) WHERE X is Document, X content D")
            self.assertEqual(stkey.getvalue().decode(), held)
            cnx.drop_entity_cache()
            value = cnx.entity_from_eid(document.eid).content
            cnx.commit()
        self.assertEqual(self.row(document.eid), held)
        self.s3.requests.clear()
        self.assertEqual(value.getvalue(), b"content")
        self.assertEqual(self.s3.requests, [])

    def test_what_the_transaction_gives_up_leaves_nothing(self):
        with self.admin_access.repo_cnx() as cnx:
            kept, gone = self.create(cnx, b"1"), self.create(cnx, b"2")
            kept.cw_set(content=Binary(b"3"))
            gone.cw_delete()
            cnx.commit()
        self.assertEqual(self.read(kept.eid), b"3")
        self.assertEqual(len(self.versions()), 1)

    def test_a_key_of_the_transaction_is_adopted_with_its_version(self):
        with self.admin_access.repo_cnx() as cnx:
            eid = self.create(cnx).eid
            ((_, key),) = history(cnx)
            with fsimport(cnx):
                adopter = self.create(cnx, key.encode()).eid
            cnx.commit()
        self.assertEqual(self.row(adopter), self.row(eid))
        self.assertEqual(self.read(adopter), b"content")
        self.delete(eid)
        self.delete(adopter)
        self.assertEqual(self.versions(), [])

    def test_subclasses_that_see_rows_see_versions(self):
        class OwnRowsStorage(S3Storage):
            """Writes rows in a way of its own."""

            KEY_SEPARATOR = "@"

            def save_s3_key(self, entity, attr, key, version_id=None):
                return super().save_s3_key(entity, attr, f"{key}@{version_id}")

        class TitleStorage(S3Storage):
            """Notes what the row holds."""

            def entity_added(self, entity, attr):
                binary = super().entity_added(entity, attr)
                held = entity.cw_edited[attr].getvalue().decode()
                entity.cw_edited["title"] = held
                return binary

        class PlainStorage(S3Storage):
            """Reads by itself."""

            def get_s3_object(self, cnx, key):
                key, version_id = self.parse_key(key)
                return self.download(key, VersionId=version_id)

        for storage_class in (OwnRowsStorage, TitleStorage, PlainStorage):
            with self.subTest(storage_class.__name__):
                self.set_storage("Document", "content", storage_class(self.bucket))
                with self.admin_access.repo_cnx() as cnx:
                    document = self.create(cnx)
                    cnx.drop_entity_cache()
                    value = cnx.entity_from_eid(document.eid).content
                    self.assertEqual(value.getvalue(), b"content")
                    cnx.commit()
                    title = cnx.entity_from_eid(document.eid).title
                self.assertEqual(self.read(document.eid), b"content")
                if storage_class is TitleStorage:
                    self.assertEqual(title, self.row(document.eid))

    def test_update_removes_the_old_version(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        self.assertEqual(len(self.versions()), 1)
        self.assertEqual(self.read(eid), b"new")

    def test_delete_removes_the_version_and_leaves_no_marker(self):
        eid = self.committed(b"content")
        self.delete(eid)
        self.assertEqual(self.versions(), [])

    def test_rollback_removes_exactly_the_versions_it_made(self):
        eid = self.committed(b"old")
        before = self.versions()
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"another")
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.rollback()
        self.assertEqual(self.versions(), before)
        self.assertEqual(self.read(eid), b"old")

    def test_one_key_for_one_entity(self):
        self.set_storage("Document", "content", OwnKeyStorage(self.bucket))
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            self.assertEqual(self.read(eid), b"old")
            cnx.rollback()
        self.assertEqual(self.read(eid), b"old")
        self.assertEqual(len(self.versions()), 1)
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        self.assertEqual(self.read(eid), b"new")
        self.assertEqual(len(self.versions()), 1)
        self.delete(eid)
        self.assertEqual(self.versions(), [])

    def test_one_key_for_equal_contents(self):
        self.set_storage("Document", "content", ContentHashStorage(self.bucket))
        first, second = self.committed(b"content"), self.committed(b"content")
        self.assertNotEqual(self.row(first), self.row(second))
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"content")
            cnx.rollback()
            cnx.entity_from_eid(second).cw_delete()
            cnx.commit()
        self.assertEqual(self.read(first), b"content")
        self.assertEqual(len(self.versions()), 1)

    def test_several_writes_in_one_transaction(self):
        self.set_storage("Document", "content", OwnKeyStorage(self.bucket))
        with self.admin_access.repo_cnx() as cnx:
            document = self.create(cnx, b"1")
            document.cw_set(content=Binary(b"2"))
            cnx.drop_entity_cache()
            value = cnx.entity_from_eid(document.eid).content
            self.assertEqual(value.read(), b"2")
            cnx.commit()
        self.assertEqual(self.read(document.eid), b"2")
        self.assertEqual(len(self.versions()), 1)

    def test_an_upload_whose_version_is_unknown_is_removed(self):
        self.s3.faults.append(Fault("PUT", after=True))
        for storage_class in (S3Storage, OwnKeyStorage):
            self.set_storage("Document", "content", storage_class(self.bucket))
            with self.admin_access.repo_cnx() as cnx:
                with self.assertRaises(S3Unreachable):
                    self.create(cnx)
                    self.uploaded(cnx)
                    self.assertNotEqual(self.versions(), [])
                    cnx.commit()
                cnx.rollback()
            self.assertEqual(self.versions(), [])

    def test_an_upload_that_fails_leaves_no_marker(self):
        self.s3.faults.append(Fault("PUT", 403, "AccessDenied"))
        for storage_class in (S3Storage, OwnKeyStorage):
            self.set_storage("Document", "content", storage_class(self.bucket))
            with self.admin_access.repo_cnx() as cnx:
                with self.assertRaises(AccessRefused):
                    self.create(cnx)
                    cnx.commit()
                cnx.rollback()
            self.assertEqual(self.versions(), [])

    def test_the_suffix_option_does_not_matter(self):
        self.set_option("s3-transaction-suffix-key", True)
        with self.admin_access.repo_cnx() as cnx:
            document = self.create(cnx)
            self.uploaded(cnx)
            ((name, _),) = [ref.values() for ref in self.versions()]
            cnx.commit()
        self.assertEqual(self.storage.parse_key(self.row(document.eid))[0], name)

    def test_a_row_from_before_the_option(self):
        self.set_option("s3-activate-object-versioning", False)
        eid = self.committed(b"old")
        self.set_option("s3-activate-object-versioning", True)
        self.assertEqual(self.read(eid), b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        self.assertEqual(self.read(eid), b"new")

    def test_a_row_from_before_the_option_whose_key_stays(self):
        self.set_storage("Document", "content", OwnKeyStorage(self.bucket))
        self.set_option("s3-activate-object-versioning", False)
        eid = self.committed(b"old")
        self.set_option("s3-activate-object-versioning", True)
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        self.assertEqual(self.read(eid), b"new")
        self.assertEqual(list(self.objects().values()), [b"new"])

    def test_such_a_row_shows_nothing_before_the_commit(self):
        self.set_storage("Document", "content", OwnKeyStorage(self.bucket))
        self.set_option("s3-activate-object-versioning", False)
        eid = self.committed(b"0")
        self.set_option("s3-activate-object-versioning", True)
        for old, new in ((b"0", b"1"), (b"1", b"2")):
            with self.admin_access.repo_cnx() as cnx:
                cnx.entity_from_eid(eid).cw_set(content=Binary(new))
                self.assertEqual(self.read(eid), old)
                cnx.commit()
            self.assertEqual(self.read(eid), new)

    def test_a_lost_answer_leaves_no_second_version(self):
        self.s3.faults.append(Fault("PUT", times=1, after=True))
        eid = self.committed(b"content")
        ((key, version_id),) = [ref.values() for ref in self.versions()]
        self.assertEqual(self.row(eid), f"{key}#{version_id}")

    def test_what_earlier_attempts_left_fails_no_write(self):
        self.s3.faults += [
            Fault("PUT", 503, "SlowDown", times=1),
            Fault("VERSIONS", 403, "AccessDenied", times=1),
        ]
        eid = self.committed(b"content")
        self.assertEqual(self.read(eid), b"content")

    def test_after_a_lost_answer_the_row_names_its_version(self):
        self.set_storage("Document", "content", OwnKeyStorage(self.bucket))
        self.s3.faults.append(Fault("PUT", times=1, after=True))
        eid = self.committed(b"old")
        before = self.versions()
        self.assertIn(self.row(eid), ["#".join(ref.values()) for ref in before])
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            self.assertEqual(self.read(eid), b"old")
            cnx.rollback()
        self.assertEqual(self.versions(), before)

    def test_rows_with_versions_after_the_option_is_turned_off(self):
        eid, other = self.committed(b"old"), self.committed(b"other")
        self.set_option("s3-activate-object-versioning", False)
        self.assertEqual(self.read(eid), b"old")
        self.delete(eid)
        self.assertEqual(self.read(other), b"other")
        self.assertEqual(len(self.versions()), 1)


class UnversionedBucketTC(S3TC):
    """The option without the bucket's versioning."""

    storage_class = OwnKeyStorage

    def setUp(self):
        super().setUp()
        self.set_option("s3-activate-object-versioning", True)

    def test_an_upload_whose_answers_are_lost_is_removed(self):
        self.s3.faults.append(Fault("PUT", after=True))
        for storage_class in (S3Storage, OwnKeyStorage):
            self.set_storage("Document", "content", storage_class(self.bucket))
            with self.admin_access.repo_cnx() as cnx:
                with self.assertRaises(S3Unreachable):
                    self.create(cnx)
                    cnx.commit()
                cnx.rollback()
            self.assertEqual(self.objects(), {})

    def test_it_is_as_safe_as_without_the_option(self):
        eid = self.committed(b"old")
        self.assertEqual(self.row(eid), f"documents/{eid}")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.rollback()
        self.assertEqual(self.read(eid), b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        self.assertEqual(self.objects(), {f"documents/{eid}": b"new"})


class VersionedBucketTC(S3TC):
    """The bucket's versioning without the option."""

    def setUp(self):
        super().setUp()
        self.keep_versions()
        self.set_option("s3-activate-object-versioning", False)

    def test_rollback_leaves_neither_version_nor_marker(self):
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx)
            cnx.rollback()
        self.assertEqual(self.versions(), [])

    def test_delete_leaves_the_version_to_the_bucket(self):
        eid = self.committed(b"content")
        self.delete(eid)
        self.assertEqual(self.objects(), {})
        self.assertEqual(len(self.versions()), 2)
