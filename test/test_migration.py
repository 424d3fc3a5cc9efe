"""Values move from the database to S3: `storage_changed` in a migration shell."""

import contextlib
import io
import threading

from cubicweb import Binary
from cubicweb.server.migractions import ServerMigrationHelper

from cubicweb_s3storage.errors import AccessRefused
from cubicweb_s3storage.storages import S3Storage
from s3server import Fault
from testlib import S3TC, ContentHashStorage, OwnKeyStorage


class StorageChangedTC(S3TC):
    def setUp(self):
        super().setUp()
        self.repo.system_source.unset_storage("Document", "content")
        self.contents = {}
        with self.admin_access.repo_cnx() as cnx:
            for content in (b"text", bytes(range(256)), None):
                self.contents[self.create(cnx, content).eid] = content
            cnx.commit()
        self.set_storage("Document", "content", self.storage)

    def migrate(
        self, commit: bool = True, times: int = 1, before_commit=lambda: None
    ) -> None:
        with self.admin_access.repo_cnx() as cnx:
            shell = ServerMigrationHelper(
                self.repo.config,
                self.repo.schema,
                repo=self.repo,
                cnx=cnx,
                interactive=False,
            )
            self.repo.system_source.clear_caches(None, None)
            for _ in range(times):
                with contextlib.redirect_stdout(io.StringIO()):
                    shell.cmd_storage_changed("Document", "content")
            self.repo.system_source.clear_caches(None, None)
            before_commit()
            if commit:
                cnx.commit()

    def read_all(self) -> dict[int, bytes | None]:
        return {eid: self.read(eid) for eid in self.contents}

    def test_values_become_objects(self):
        self.migrate()
        self.assertEqual(self.read_all(), self.contents)
        contents = [content for content in self.contents.values() if content]
        self.assertCountEqual(self.objects().values(), contents)

    def test_nothing_else_of_the_entities_changes(self):
        with self.admin_access.repo_cnx() as cnx:
            rql = "Any X, T, MD WHERE X is Document, X title T, X modification_date MD"
            before = cnx.execute(rql).rows
        self.migrate()
        with self.admin_access.repo_cnx() as cnx:
            self.assertEqual(cnx.execute(rql).rows, before)

    def test_rollback_leaves_the_values_in_the_database(self):
        self.migrate(commit=False)
        self.assertEqual(self.objects(), {})
        self.repo.system_source.unset_storage("Document", "content")
        self.repo.system_source.clear_caches(None, None)
        self.assertEqual(self.read_all(), self.contents)
        self.set_storage("Document", "content", self.storage)

    def test_again_changes_nothing(self):
        self.migrate()
        before = self.objects()
        self.migrate()
        self.assertEqual(self.objects(), before)
        self.assertEqual(self.read_all(), self.contents)

    def test_again_with_versions_changes_nothing(self):
        self.keep_versions()
        self.migrate()
        before = self.versions()
        self.migrate()
        self.assertEqual(self.versions(), before)
        self.assertEqual(self.read_all(), self.contents)

    def test_again_in_the_same_transaction_changes_nothing(self):
        for storage_class in (S3Storage, OwnKeyStorage):
            with self.subTest(storage_class.__name__):
                self.forget_migration()
                self.set_storage("Document", "content", storage_class(self.bucket))
                uploaded = threading.Event()
                self.s3.faults[:] = [Fault("PUT", instead=uploaded.wait)]
                self.migrate(times=2, before_commit=uploaded.set)
                self.assertEqual(self.read_all(), self.contents)

    def forget_migration(self) -> None:
        """Have the rows hold the contents again."""
        for eid, content in self.contents.items():
            if content is not None:
                self.set_row(eid, content)

    def test_a_content_that_looks_like_a_key_is_a_content(self):
        self.put("text", b"somebody else's object")
        self.migrate()
        self.assertEqual(self.read_all(), self.contents)

    def test_a_content_with_the_separator_is_a_content(self):
        self.repo.system_source.unset_storage("Document", "content")
        with self.admin_access.repo_cnx() as cnx:
            for content in (b"#fff", b"a#b", b"#"):
                self.contents[self.create(cnx, content).eid] = content
            cnx.commit()
        self.set_storage("Document", "content", self.storage)
        self.migrate()
        self.assertEqual(self.read_all(), self.contents)

    def test_a_refusal_stops_it_and_loses_nothing(self):
        self.s3.faults.append(Fault("PUT", 403, "AccessDenied", skip=1))
        with self.assertRaises(AccessRefused):
            self.migrate()
        self.assertEqual(self.objects(), {})
        self.s3.faults.clear()
        self.set_storage("Document", "content", self.storage)
        self.migrate()
        self.assertEqual(self.read_all(), self.contents)

    def test_an_update_of_a_migrated_value(self):
        (eid, *_) = self.contents
        self.migrate()
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        self.contents[eid] = b"new"
        self.assertEqual(self.read_all(), self.contents)
        self.assertEqual(len(self.objects()), 2)


class ContentHashTC(StorageChangedTC):
    storage_class = ContentHashStorage


class OwnKeyTC(StorageChangedTC):
    storage_class = OwnKeyStorage
