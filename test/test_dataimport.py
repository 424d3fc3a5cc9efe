"""The stores of cubicweb.dataimport, also those that write rows by themselves."""

import contextlib
import io

from cubicweb import Binary
from cubicweb.dataimport import stores
from cubicweb.dataimport.pgstore import SQLGenSourceWrapper

from cubicweb_s3storage.errors import KeyConflict
from s3server import Fault
from test_postgres import PostgresMixin
from testlib import S3TC, ContentHashStorage, OwnKeyStorage


class Rows(SQLGenSourceWrapper):
    """Repaired: CubicWeb's does not find the table `is_relation(` in psycopg2 2.9."""

    def _append_to_entities(self, sql, attrs):
        super()._append_to_entities(sql.replace("_relation(", "_relation ("), attrs)


class SQLGenStore(stores.NoHookRQLObjectStore):
    """As CubicWeb's SQLGenObjectStore was: flush() commits rows, on its own."""

    def __init__(self, cnx):
        super().__init__(cnx)
        source = cnx.repo.system_source
        self.rows = Rows(source, cnx.vreg.schema)
        self._system_source = self.rows
        self._add_relation = self.rows.add_relation

    def flush(self):
        with contextlib.redirect_stdout(io.StringIO()):  # it reports
            self.rows.flush()


class OrdinaryStoresTC(S3TC):
    def test_what_they_import_is_kept_in_s3(self):
        for store_class in (stores.RQLObjectStore, stores.NoHookRQLObjectStore):
            with self.admin_access.repo_cnx() as cnx:
                store = store_class(cnx)
                eids = [
                    store.prepare_insert_entity("Document", content=Binary(b"%d" % n))
                    for n in range(3)
                ]
                store.flush()
                cnx.commit()
                store.finish()
            contents = [self.read(eid) for eid in eids]
            self.assertEqual(contents, [b"0", b"1", b"2"])
            self.assertEqual(
                set(self.objects()) & {self.row(eid) for eid in eids},
                {self.row(eid) for eid in eids},
            )

    def test_a_rollback_removes_what_they_wrote(self):
        for store_class in (stores.RQLObjectStore, stores.NoHookRQLObjectStore):
            with self.admin_access.repo_cnx() as cnx:
                store = store_class(cnx)
                store.prepare_insert_entity("Document", content=Binary(b"content"))
                store.flush()
                cnx.rollback()
            self.assertEqual(self.objects(), {})


class SQLGenTC(PostgresMixin, S3TC):
    """Rows are committed by another connection than the one that uploads."""

    def insert(self, store: SQLGenStore, content: bytes) -> int:
        return store.prepare_insert_entity("Document", content=Binary(content))

    def test_what_it_flushes_is_readable_before_the_commit(self):
        with self.admin_access.repo_cnx() as cnx:
            store = SQLGenStore(cnx)
            eids = [self.insert(store, b"%d" % n) for n in range(3)]
            store.flush()
            self.assertEqual([self.read(eid) for eid in eids], [b"0", b"1", b"2"])
            cnx.commit()
        self.assertEqual([self.read(eid) for eid in eids], [b"0", b"1", b"2"])

    def test_a_rollback_after_the_flush_removes_nothing(self):
        for storage_class in (type(self.storage), ContentHashStorage):
            self.set_storage("Document", "content", storage_class(self.bucket))
            with self.admin_access.repo_cnx() as cnx:
                store = SQLGenStore(cnx)
                eid = self.insert(store, b"content")
                store.flush()
                cnx.rollback()
            self.assertEqual(self.read(eid), b"content")

    def test_a_flush_after_the_end_of_the_transaction_is_readable(self):
        for end in ("commit", "rollback"):
            with self.admin_access.repo_cnx() as cnx:
                store = SQLGenStore(cnx)
                eid = self.insert(store, b"content")
                getattr(cnx, end)()
                store.flush()
            self.assertEqual(self.read(eid), b"content")

    def test_with_staging_too(self):
        self.set_option("s3-transaction-suffix-key", True)
        with self.admin_access.repo_cnx() as cnx:
            store = SQLGenStore(cnx)
            eid = self.insert(store, b"content")
            store.flush()
            self.assertEqual(self.read(eid), b"content")
            cnx.rollback()
        self.assertEqual(self.objects(), {self.row(eid): b"content"})

    def test_with_versions_too(self):
        self.keep_versions()
        with self.admin_access.repo_cnx() as cnx:
            store = SQLGenStore(cnx)
            eid = self.insert(store, b"content")
            store.flush()
            cnx.rollback()
        self.assertIn("#", self.row(eid))
        self.assertEqual(self.read(eid), b"content")

    def test_an_upload_that_fails_is_never_flushed(self):
        self.s3.faults.append(Fault("PUT", 403, "AccessDenied"))
        with self.admin_access.repo_cnx() as cnx:
            store = SQLGenStore(cnx)
            with self.assertRaises(PermissionError):
                self.insert(store, b"content")
            store.flush()
        with self.admin_access.repo_cnx() as cnx:
            self.assertFalse(cnx.execute("Any X WHERE X is Document"))

    def test_an_object_with_another_content_is_not_replaced(self):
        self.set_storage("Document", "content", _TitleStorage(self.bucket))
        first = self.committed(b"first", title="same")
        with self.admin_access.repo_cnx() as cnx:
            store = SQLGenStore(cnx)
            with self.assertRaises(KeyConflict):
                store.prepare_insert_entity(
                    "Document", content=Binary(b"second"), title="same"
                )
        self.assertEqual(self.read(first), b"first")

    def test_what_it_imported_is_updated_and_deleted_as_ever(self):
        with self.admin_access.repo_cnx() as cnx:
            store = SQLGenStore(cnx)
            eid = self.insert(store, b"content")
            store.flush()
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        self.assertEqual(self.objects(), {self.row(eid): b"new"})
        self.delete(eid)
        self.assertEqual(self.objects(), {})


class _TitleStorage(OwnKeyStorage):
    def new_s3_key(self, entity, attr):
        return entity.cw_edited["title"]
