"""Rows that cubicweb-s3storage 4.x has written stay readable, and removable."""

from cubicweb import Binary

from cubicweb_s3storage.errors import KeyConflict
from cubicweb_s3storage.storages import S3Storage
from testlib import S3TC, ContentHashStorage

KEY = "7d2f4a5e-c5b4-11ee-8f8c-0242ac120002"  # uuid1, as 4.x made them


class OldRowsTC(S3TC):
    def old(self, row: str) -> int:
        eid = self.committed(None)
        self.set_row(eid, row.encode())
        return eid

    def test_a_uuid(self):
        self.put(KEY, b"old")
        eid = self.old(KEY)
        self.assertEqual(self.read(eid), b"old")
        self.delete(eid)
        self.assertEqual(self.objects(), {})

    def test_a_suffixed_key_whose_object_was_moved(self):
        self.put(KEY, b"old")
        eid = self.old(f"{KEY}.tmp")
        self.assertEqual(self.read(eid), b"old")
        self.delete(eid)
        self.assertEqual(self.objects(), {})

    def test_a_suffixed_key_whose_object_was_not_moved(self):
        self.put(f"{KEY}.tmp", b"old")
        eid = self.old(f"{KEY}.tmp")
        self.assertEqual(self.read(eid), b"old")
        self.delete(eid)
        self.assertEqual(self.objects(), {})

    def test_a_suffixed_key_that_another_row_names_without_suffix(self):
        self.put(KEY, b"old")
        eid, other = self.old(f"{KEY}.tmp"), self.old(KEY)
        self.delete(eid)
        self.assertEqual(self.read(other), b"old")

    def test_a_key_that_another_row_names_with_suffix(self):
        self.put(KEY, b"old")
        eid, other = self.old(f"{KEY}.tmp"), self.old(KEY)
        self.delete(other)
        self.assertEqual(self.read(eid), b"old")

    def test_update_of_a_suffixed_row(self):
        self.put(KEY, b"old")
        eid = self.old(f"{KEY}.tmp")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        self.assertEqual(self.objects(), {self.row(eid): b"new"})

    def test_a_version(self):
        self.keep_versions()
        version_id = self.put(KEY, b"old")
        self.put(KEY, b"newer")
        eid = self.old(f"{KEY}#{version_id}")
        self.assertEqual(self.read(eid), b"old")
        self.delete(eid)
        self.assertEqual(self.objects(), {KEY: b"newer"})
        self.assertEqual(len(self.versions()), 1)

    def test_a_version_while_the_option_is_off(self):
        self.keep_versions()
        version_id = self.put(KEY, b"old")
        self.put(KEY, b"newer")
        self.set_option("s3-activate-object-versioning", False)
        eid = self.old(f"{KEY}#{version_id}")
        self.assertEqual(self.read(eid), b"old")

    def test_a_version_whose_bucket_was_copied_without_versions(self):
        self.put(KEY, b"old")
        eid = self.old(f"{KEY}#3HL4kqtJvjVBH40Nrjfkd")
        self.assertEqual(self.read(eid), b"old")
        self.delete(eid)
        self.assertEqual(self.objects(), {})

    def test_a_key_with_the_separator_while_versioning_is_off(self):
        self.put("boxes/3#17", b"old")
        self.put("boxes/3", b"another")
        eid = self.old("boxes/3#17")
        self.assertEqual(self.read(eid), b"old")
        self.delete(eid)
        self.assertEqual(self.objects(), {"boxes/3": b"another"})

    def test_a_key_with_the_separator_while_versioning_is_on(self):
        self.keep_versions()
        self.put("boxes/3#17", b"old")
        eid = self.old("boxes/3#17")
        self.assertEqual(self.read(eid), b"old")
        self.delete(eid)
        self.assertEqual(self.objects(), {})

    def test_a_suffixed_version(self):
        self.keep_versions()
        version_id = self.put(f"{KEY}.tmp", b"old")
        self.client.copy_object(
            Bucket=self.bucket,
            Key=KEY,
            CopySource={"Bucket": self.bucket, "Key": f"{KEY}.tmp"},
        )
        self.client.delete_object(Bucket=self.bucket, Key=f"{KEY}.tmp")
        eid = self.old(f"{KEY}.tmp#{version_id}")
        self.assertEqual(self.read(eid), b"old")

    def test_a_version_without_versions_and_a_row_that_shares_its_object(self):
        self.set_storage("Document", "content", ContentHashStorage(self.bucket))
        other = self.committed(b"content")
        eid = self.old(f"{self.row(other)}#3HL4kqtJvjVBH40Nrjfkd")
        self.delete(other)
        self.assertEqual(self.read(eid), b"content")

    def test_every_way_of_reading_keeps_an_object(self):
        for row, key in (("a#b#v1", "a#b"), ("abc.tmp#v1", "abc"), ("x#v1", "x")):
            self.put(key, b"old")
            eid, other = self.old(row), self.old(key)
            self.assertEqual(self.read(eid), b"old")
            self.delete(other)
            self.assertEqual(self.read(eid), b"old")

    def test_every_way_of_reading_keeps_a_content(self):
        class FixedKeyStorage(S3Storage):
            def new_s3_key(self, entity, attr):
                return "fixed"

        self.set_storage("Document", "content", FixedKeyStorage(self.bucket))
        self.put("fixed", b"old")
        for row in ("fixed.tmp", "fixed#3HL4kqtJvjVBH40Nrjfkd"):
            eid = self.old(row)
            with self.admin_access.repo_cnx() as cnx:
                self.create(cnx, b"new")
                with self.assertRaises(KeyConflict):
                    cnx.commit()
            self.assertEqual(self.read(eid), b"old")


class KeepsItsKeyStorage(S3Storage):
    """As applications write one: once chosen, a key stays."""

    def new_s3_key(self, entity, attr):
        return self.get_s3_key(entity, attr) or super().new_s3_key(entity, attr)


class OldRowsWhoseKeysStayTC(S3TC):
    storage_class = KeepsItsKeyStorage

    def test_nothing_is_visible_before_the_commit(self):
        eid = self.committed(None)
        for row, key in (
            (f"{KEY}.tmp", KEY),
            (f"{KEY}#3HL4kqtJvjVBH40Nrjfkd", KEY),
            ("a#b", "a#b"),
        ):
            self.put(key, b"old")
            self.set_row(eid, row.encode())
            with self.admin_access.repo_cnx() as cnx:
                cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
                self.assertEqual(self.read(eid), b"old")
                cnx.rollback()
            self.assertEqual(self.read(eid), b"old")
            with self.admin_access.repo_cnx() as cnx:
                cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
                cnx.commit()
            self.assertEqual(self.read(eid), b"new")
