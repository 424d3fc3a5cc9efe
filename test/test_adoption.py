"""Objects that exist already become values, `fsimport` given."""

from cubicweb import Binary
from cubicweb.server.sources.storages import fsimport

from cubicweb_s3storage.errors import InvalidKey, ObjectMissing
from testlib import S3TC


class AdoptionTC(S3TC):
    def adopt(self, cnx, key: str):
        with fsimport(cnx):
            return self.create(cnx, key.encode())

    def test_the_object_becomes_the_value_as_it_is(self):
        self.put("scans/1.tif", b"scan")
        self.s3.requests.clear()
        with self.admin_access.repo_cnx() as cnx:
            document = self.adopt(cnx, "scans/1.tif")
            self.assertEqual(document.content.getvalue(), b"scan")
            cnx.commit()
        self.assertNotIn("PUT", self.s3.requests)
        self.assertEqual(self.row(document.eid), "scans/1.tif")
        self.assertEqual(self.read(document.eid), b"scan")
        self.assertEqual(self.objects(), {"scans/1.tif": b"scan"})

    def test_rollback_leaves_the_object_alone(self):
        self.put("scans/1.tif", b"scan")
        with self.admin_access.repo_cnx() as cnx:
            self.adopt(cnx, "scans/1.tif")
            cnx.rollback()
        self.assertEqual(self.objects(), {"scans/1.tif": b"scan"})

    def test_an_unknown_key_is_refused(self):
        with self.admin_access.repo_cnx() as cnx:
            with self.assertRaisesRegex(
                ObjectMissing, r"Document.*'scans/2.tif'.*Give"
            ):
                self.adopt(cnx, "scans/2.tif")
            cnx.rollback()
        self.assertEqual(self.objects(), {})

    def test_what_is_no_key_is_refused(self):
        for raw in (b"", b"\xff\xfe", b"x" * 1025):
            with self.admin_access.repo_cnx() as cnx:
                with fsimport(cnx), self.assertRaises(InvalidKey):
                    self.create(cnx, raw)
                self.assertEqual(self.s3.requests, [])

    def test_null_is_null(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            with fsimport(cnx):
                cnx.entity_from_eid(eid).cw_set(content=None)
            cnx.commit()
        self.assertIsNone(self.read(eid))
        self.assertEqual(self.objects(), {})

    def test_update_by_adoption_removes_the_old_object(self):
        self.put("scans/1.tif", b"scan")
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            with fsimport(cnx):
                cnx.entity_from_eid(eid).cw_set(content=Binary(b"scans/1.tif"))
            cnx.commit()
        self.assertEqual(self.read(eid), b"scan")
        self.assertEqual(self.objects(), {"scans/1.tif": b"scan"})

    def test_rollback_of_an_update_by_adoption(self):
        self.put("scans/1.tif", b"scan")
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            with fsimport(cnx):
                cnx.entity_from_eid(eid).cw_set(content=Binary(b"scans/1.tif"))
            cnx.rollback()
        self.assertEqual(self.read(eid), b"old")
        self.assertEqual(len(self.objects()), 2)

    def test_update_of_an_adopted_value_removes_the_adopted_object(self):
        self.put("scans/1.tif", b"scan")
        with self.admin_access.repo_cnx() as cnx:
            document = self.adopt(cnx, "scans/1.tif")
            cnx.commit()
            document.cw_set(content=Binary(b"new"))
            cnx.commit()
        self.assertEqual(self.objects(), {self.row(document.eid): b"new"})

    def test_adoption_of_its_own_object_keeps_it(self):
        eid = self.committed(b"content")
        with self.admin_access.repo_cnx() as cnx:
            with fsimport(cnx):
                key = Binary(self.row(eid).encode())
                cnx.entity_from_eid(eid).cw_set(content=key)
            cnx.commit()
        self.assertEqual(self.read(eid), b"content")

    def test_an_object_that_another_row_adopted_outlives_the_first_row(self):
        first = self.committed(b"content")
        with self.admin_access.repo_cnx() as cnx:
            second = self.adopt(cnx, self.row(first)).eid
            cnx.commit()
            cnx.entity_from_eid(first).cw_delete()
            cnx.commit()
        self.assertEqual(self.read(second), b"content")
        self.delete(second)
        self.assertEqual(self.objects(), {})

    def test_adoption_of_what_this_transaction_wrote(self):
        with self.admin_access.repo_cnx() as cnx:
            first = self.create(cnx, b"content")
            key = self.storage.get_s3_key(first, "content")
            second = self.adopt(cnx, key)
            first.cw_delete()
            cnx.commit()
        self.assertEqual(self.read(second.eid), b"content")

    def test_keys_beyond_ascii(self):
        self.put("écrits/été #1.txt", b"texte")
        with self.admin_access.repo_cnx() as cnx:
            document = self.adopt(cnx, "écrits/été #1.txt")
            cnx.commit()
        self.assertEqual(self.read(document.eid), b"texte")

    def test_an_object_that_another_transaction_has_staged_is_not_there(self):
        self.put(f"k.tmp.{'0' * 32}", b"not committed")
        with self.admin_access.repo_cnx() as cnx, self.assertRaises(ObjectMissing):
            self.adopt(cnx, "k")

    def test_a_version_that_is_not_there_is_refused(self):
        self.put("k", b"content")
        with self.admin_access.repo_cnx() as cnx, self.assertRaises(ObjectMissing):
            self.adopt(cnx, "k#nonsense")
