"""What queries return; missing is not unreachable."""

import io
import pickle

from cubicweb import Binary

from cubicweb_s3storage.errors import AccessRefused, ObjectMissing, S3Unreachable
from s3server import Fault
from testlib import S3TC


class QueriesTC(S3TC):
    def rql(self, rql: str, **kwargs) -> list:
        with self.admin_access.repo_cnx() as cnx:
            return cnx.execute(rql, kwargs).rows

    def test_length(self):
        self.committed(b"12345")
        rows = self.rql("Any LENGTH(D) WHERE X is Document, X content D")
        self.assertEqual(rows, [[5]])

    def test_null_and_values_in_one_result(self):
        self.committed(b"1", title="a")
        self.committed(None, title="b")
        rows = self.rql(
            "Any T, D ORDERBY T WHERE X is Document, X title T, X content D"
        )
        self.assertEqual(rows[0][1].getvalue(), b"1")
        self.assertIsNone(rows[1][1])

    def test_union(self):
        self.set_storage("Scan", "content", self.storage)
        self.committed(b"document")
        with self.admin_access.repo_cnx() as cnx:
            cnx.create_entity("Scan", content=Binary(b"scan"))
            cnx.commit()
        rows = self.rql(
            "(Any D WHERE X is Document, X content D) UNION"
            " (Any D WHERE X is Scan, X content D)"
        )
        self.assertEqual(
            sorted(value.getvalue() for (value,) in rows), [b"document", b"scan"]
        )

    def test_one_query_over_two_types(self):
        self.set_storage("Scan", "content", self.storage)
        self.committed(b"document")
        rows = self.rql("Any D WHERE X is IN (Document, Scan), X content D")
        self.assertEqual([value.getvalue() for (value,) in rows], [b"document"])

    def test_subquery(self):
        self.committed(b"content")
        rows = self.rql(
            "Any X, D WITH X, D BEING (Any X, D WHERE X is Document, X content D)"
        )
        self.assertEqual(rows[0][1].getvalue(), b"content")

    def test_stkey(self):
        eid = self.committed(b"content")
        rows = self.rql("Any STKEY(D) WHERE X is Document, X content D")
        self.assertEqual(rows[0][0].getvalue().decode(), self.row(eid))
        self.assertEqual(self.s3.requests, [])

    def test_stkey_of_another_attribute_is_not_implemented(self):
        self.committed(b"content", thumbnail=Binary(b"in the database"))
        with self.assertRaises(NotImplementedError):
            self.rql("Any STKEY(D) WHERE X is Document, X thumbnail D")

    def test_stkey_of_another_storage_is_not_implemented(self):
        from cubicweb.server.sources.storages import BytesFileSystemStorage

        self.set_storage("Scan", "content", BytesFileSystemStorage("/nowhere"))
        with self.assertRaises(NotImplementedError):
            self.rql("Any STKEY(D) WHERE X is Scan, X content D")

    def test_many_values_in_one_query(self):
        with self.admin_access.repo_cnx() as cnx:
            for n in range(101):
                self.create(cnx, b"%d" % n)
            cnx.commit()
        rows = self.rql("Any D WHERE X is Document, X content D")
        self.assertEqual(
            {row[0].getvalue() for row in rows}, {b"%d" % n for n in range(101)}
        )

    def test_the_key_does_not_depend_on_who_asks(self):
        eid = self.committed(b"content")
        with self.admin_access.repo_cnx() as cnx:
            self.create_user(cnx, "guest", groups=("guests",))
            cnx.commit()
        with self.temporary_permissions(Document={"read": ("managers",)}):
            with self.new_access("guest").repo_cnx() as cnx:
                entity = cnx.vreg["etypes"].etype_class("Document")(cnx)
                entity.eid = eid
                key = self.storage.get_s3_key(entity, "content")
        self.assertEqual(key, self.row(eid))


class MissingTC(S3TC):
    cache_size = 0

    def lost(self) -> int:
        eid = self.committed(b"content")
        self.client.delete_object(Bucket=self.bucket, Key=self.row(eid))
        return eid

    def test_reading_raises_a_file_not_found_error_that_says_what(self):
        eid = self.lost()
        with self.assertRaises(FileNotFoundError) as raised:
            self.read(eid)
        self.assertIsInstance(raised.exception, ObjectMissing)
        for part in (f"Document {eid}", "content", self.bucket, self.row(eid)):
            self.assertIn(part, str(raised.exception))

    def test_queries_do_not_fail(self):
        self.lost()
        self.committed(b"still there")
        with self.admin_access.repo_cnx() as cnx:
            rows = cnx.execute(
                "Any X, D ORDERBY X WHERE X is Document, X content D"
            ).rows
        self.assertEqual(len(rows), 2)
        self.assertEqual(rows[1][1].getvalue(), b"still there")

    def test_it_is_logged_as_critical_once(self):
        eid = self.lost()
        with self.admin_access.repo_cnx() as cnx:
            with self.assertLogs("cube.s3storage", "CRITICAL") as logs:
                value = cnx.entity_from_eid(eid).content
                for _ in range(3):
                    with self.assertRaises(ObjectMissing):
                        value.read()
        self.assertEqual(len(logs.output), 1)

    def test_no_way_of_reading_gives_an_empty_value(self):
        eid = self.lost()
        with self.admin_access.repo_cnx() as cnx:
            value = cnx.entity_from_eid(eid).content
        ways = (
            value.read,
            value.getvalue,
            value.getbuffer,
            value.readline,
            value.readlines,
            lambda: value.read1(1),
            lambda: value.readinto(bytearray(1)),
            lambda: value.seek(0, 2),
            lambda: value.to_file(io.BytesIO()),
            lambda: list(value),
            lambda: next(value),
            lambda: value == Binary(),
            lambda: Binary() == value,
            lambda: pickle.dumps(value),
            lambda: self.committed_value(value),
        )
        for way in ways:
            with self.assertRaises(ObjectMissing):
                way()

    def committed_value(self, value: Binary) -> None:
        with self.admin_access.repo_cnx() as cnx:
            cnx.create_entity("Document", content=value)
            cnx.commit()

    def test_an_entity_whose_object_is_missing_can_be_updated_and_deleted(self):
        first, second = self.lost(), self.lost()
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(first).cw_set(content=Binary(b"new"))
            cnx.entity_from_eid(second).cw_delete()
            cnx.commit()
        self.assertEqual(self.objects(), {self.row(first): b"new"})

    def test_a_missing_key_that_starts_with_the_separator(self):
        eid = self.committed(None)
        self.set_row(eid, b"#x")
        for versions in (False, True):
            self.set_option("s3-activate-object-versioning", versions)
            with self.assertRaises(ObjectMissing):
                self.read(eid)

    def test_a_content_that_was_never_migrated_is_no_key(self):
        eid = self.committed(None)
        for content in (b"\xff\xfe", b"x" * 2000):
            self.set_row(eid, content)
            with self.assertRaisesRegex(ObjectMissing, "storage_changed"):
                self.read(eid)
            with self.admin_access.repo_cnx() as cnx:
                rows = cnx.execute(
                    "Any LENGTH(D) WHERE X is Document, X content D"
                ).rows
            self.assertEqual(rows, [[None]])


class UnreachableTC(S3TC):
    cache_size = 0

    def test_an_outage_raises_from_the_use_of_the_value(self):
        eid = self.committed(b"content")
        self.s3.faults.append(Fault("GET"))
        with self.assertRaises(ConnectionError) as raised:
            self.read(eid)
        self.assertIsInstance(raised.exception, S3Unreachable)
        for part in (f"Document {eid}", self.bucket, self.row(eid)):
            self.assertIn(part, str(raised.exception))

    def test_so_does_a_server_that_cannot_serve(self):
        eid = self.committed(b"content")
        self.s3.faults.append(Fault("GET", 503, "SlowDown"))
        with self.assertRaisesRegex(S3Unreachable, "SlowDown"):
            self.read(eid)

    def test_so_does_a_refusal(self):
        eid = self.committed(b"content")
        self.s3.faults.append(Fault("GET", 403, "AccessDenied"))
        with self.assertRaises(PermissionError) as raised:
            self.read(eid)
        self.assertIsInstance(raised.exception, AccessRefused)

    def test_a_version_that_cannot_be_asked_for_is_not_a_missing_one(self):
        self.keep_versions()
        eid = self.committed(b"content")
        self.s3.faults.append(Fault("GET", 503, "SlowDown"))
        with self.assertRaises(S3Unreachable):
            self.read(eid)
