"""Several transactions at a time, as on PostgreSQL; the same promises there."""

import threading
import time
import unittest

from cubicweb import Binary, ValidationError
from cubicweb.devtools import DEFAULT_PSQL_SOURCES
from cubicweb.devtools.apptest_config import PostgresApptestConfiguration
from cubicweb.server.hook import LateOperation
from cubicweb.server.sources.storages import fsimport

import pgserver
import test_adoption
import test_lifecycle
import test_old_rows
import test_reading
import test_shared_keys
import test_versions
from cubicweb_s3storage.storages import S3Storage
from s3server import Fault
from testlib import S3TC, ContentHashStorage, OwnKeyStorage


@unittest.skipUnless(pgserver.programs(), "PostgreSQL is not installed")
class PostgresMixin:
    configcls = PostgresApptestConfiguration

    @classmethod
    def setUpClass(cls):
        DEFAULT_PSQL_SOURCES["system"]["db-host"] = pgserver.start()
        super().setUpClass()


class CommitTC(PostgresMixin, test_lifecycle.CommitTC):
    pass


class RollbackTC(PostgresMixin, test_lifecycle.RollbackTC):
    pass


class SameContentTC(PostgresMixin, test_shared_keys.SameContentTC):
    pass


class OtherContentTC(PostgresMixin, test_shared_keys.OtherContentTC):
    pass


class ConflictTC(PostgresMixin, test_shared_keys.ConflictTC):
    pass


class AdoptionTC(PostgresMixin, test_adoption.AdoptionTC):
    pass


class OldRowsTC(PostgresMixin, test_old_rows.OldRowsTC):
    pass


class QueriesTC(PostgresMixin, test_reading.QueriesTC):
    pass


class MissingTC(PostgresMixin, test_reading.MissingTC):
    pass


class VersionsTC(PostgresMixin, test_versions.VersionsTC):
    pass


class ConcurrencyTC(PostgresMixin, S3TC):
    """What one transaction comes to share, another does not remove."""

    storage_class = ContentHashStorage

    def test_the_last_row_goes_while_another_is_on_its_way(self):
        first = self.committed(b"content")
        with self.admin_access.repo_cnx() as one, self.admin_access.repo_cnx() as two:
            second = self.create(one, b"content").eid
            two.entity_from_eid(first).cw_delete()
            with self.assertLogs("cube.s3storage", "ERROR") as logs:
                two.commit()
            one.commit()
        self.assertIn("another transaction", logs.output[0])
        self.assertEqual(self.read(second), b"content")

    def test_the_creator_is_rolled_back_while_another_row_is_on_its_way(self):
        with self.admin_access.repo_cnx() as one, self.admin_access.repo_cnx() as two:
            self.create(one, b"content")
            self.uploaded(one)
            eid = self.create(two, b"content").eid
            with self.assertLogs("cube.s3storage", "ERROR"):
                one.rollback()
            two.commit()
        self.assertEqual(self.read(eid), b"content")

    def test_an_object_goes_while_it_is_adopted(self):
        first = self.committed(b"content")
        with self.admin_access.repo_cnx() as one, self.admin_access.repo_cnx() as two:
            with fsimport(one):
                key = self.row(first).encode()
                second = one.create_entity("Document", content=Binary(key)).eid
            two.entity_from_eid(first).cw_delete()
            with self.assertLogs("cube.s3storage", "ERROR"):
                two.commit()
            one.commit()
        self.assertEqual(self.read(second), b"content")

    def test_the_creator_is_rolled_back_after_another_row_adopted_its_version(self):
        self.keep_versions()
        self.set_option("s3-activate-object-versioning", False)
        with self.admin_access.repo_cnx() as one, self.admin_access.repo_cnx() as two:
            key = self.storage.get_s3_key(self.create(one, b"content"), "content")
            self.uploaded(one)
            with fsimport(two):
                eid = self.create(two, key.encode()).eid
            two.commit()
            one.rollback()
        self.assertEqual(self.read(eid), b"content")

    def test_without_others_everything_is_removed(self):
        first, second = self.committed(b"1"), self.committed(b"2")
        with self.admin_access.repo_cnx() as one, self.admin_access.repo_cnx() as two:
            one.entity_from_eid(first).cw_delete()
            two.entity_from_eid(second).cw_delete()
            one.commit()
            two.commit()
        self.assertEqual(self.objects(), {})

    def test_threads_that_create_and_delete_equal_contents(self):
        contents = (b"a", b"b", b"c")
        start, errors = threading.Barrier(4), []

        def work(number: int) -> None:
            start.wait()
            try:
                with self.admin_access.repo_cnx() as cnx:
                    for n in range(12):
                        content = contents[(number + n) % 3]
                        document = self.create(cnx, content)
                        if n % 4 == 3:
                            cnx.rollback()
                            continue
                        cnx.commit()
                        if n % 2:
                            document.cw_delete()
                            cnx.commit()
            except Exception as error:  # noqa: BLE001
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(errors, [])
        with self.admin_access.repo_cnx() as cnx:
            rows = cnx.execute("Any X WHERE X is Document").rows
        self.assertGreater(len(rows), 0)
        for (eid,) in rows:
            self.assertIn(self.read(eid), contents)


class MovesTC(PostgresMixin, S3TC):
    """Objects are moved to a key in the order of the commits."""

    storage_class = OwnKeyStorage

    def update(self, eid: int, content: bytes) -> threading.Thread:
        def work():
            with self.admin_access.repo_cnx() as cnx:
                cnx.entity_from_eid(eid).cw_set(content=Binary(content))
                cnx.commit()

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)

    def waiting(self) -> bool:
        sql = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        with self.admin_access.repo_cnx() as cnx:
            return bool(cnx.system_sql(sql).fetchall())

    def locks(self) -> int:
        sql = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
        with self.admin_access.repo_cnx() as cnx:
            return cnx.system_sql(sql).fetchone()[0]

    def test_the_second_update_waits_for_the_move_of_the_first(self):
        eid = self.committed(b"old")
        go = threading.Event()
        self.addCleanup(go.set)
        self.s3.faults.append(Fault("COPY", times=1, instead=go.wait))
        first = self.update(eid, b"first")
        self.wait_until(lambda: "COPY" in self.s3.requests)
        second = self.update(eid, b"second")
        self.wait_until(self.waiting)
        go.set()
        first.join()
        second.join()
        self.assertEqual(self.objects(), {f"documents/{eid}": b"second"})
        self.assertEqual(self.locks(), 0)

    def held_move(self, transaction) -> tuple[threading.Thread, threading.Event]:
        """Run a transaction until its first move, which waits for the event."""
        go = threading.Event()
        self.addCleanup(go.set)
        self.s3.faults.append(Fault("COPY", times=1, instead=go.wait))
        thread = threading.Thread(target=transaction)
        thread.start()
        self.wait_until(lambda: "COPY" in self.s3.requests)
        return thread, go

    def test_the_moves_of_late_writes_are_waited_for_too(self):
        eid = self.committed(b"old")

        class WriteLate(LateOperation):
            def precommit_event(self):
                document = self.cnx.entity_from_eid(eid)
                document.cw_set(content=Binary(b"first"))

        def transaction():
            with self.admin_access.repo_cnx() as cnx:
                self.create(cnx, b"another")
                WriteLate(cnx)
                cnx.commit()

        first, go = self.held_move(transaction)
        second = self.update(eid, b"second")
        self.wait_until(self.waiting)
        go.set()
        first.join()
        second.join()
        self.assertEqual(self.read(eid), b"second")

    def test_a_row_that_goes_while_its_object_is_moved_leaves_nothing(self):
        self.set_option("s3-transaction-suffix-key", True)
        for storage_class in (S3Storage, OwnKeyStorage):
            self.set_storage("Document", "content", storage_class(self.bucket))
            self.s3.requests.clear()
            created = []

            def transaction(created=created):
                with self.admin_access.repo_cnx() as cnx:
                    created.append(self.create(cnx).eid)
                    cnx.commit()

            first, go = self.held_move(transaction)
            with self.admin_access.repo_cnx() as cnx:
                cnx.entity_from_eid(created[0]).cw_delete()
                cnx.commit()
            go.set()
            first.join()
            self.assertEqual(self.objects(), {})

    def test_a_row_that_is_emptied_and_filled_while_its_object_is_moved(self):
        eid = self.committed(b"old")

        def transaction():
            with self.admin_access.repo_cnx() as cnx:
                cnx.entity_from_eid(eid).cw_set(content=Binary(b"first"))
                cnx.commit()

        first, go = self.held_move(transaction)
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=None)
            cnx.commit()
        second = self.update(eid, b"third")
        self.wait_until(self.waiting)
        go.set()
        first.join()
        second.join()
        self.assertEqual(self.objects(), {f"documents/{eid}": b"third"})

    def test_equal_contents_staged_at_the_same_time(self):
        self.set_option("s3-transaction-suffix-key", True)
        storage = ContentHashStorage(self.bucket)
        self.set_storage("Document", "content", storage)
        with self.admin_access.repo_cnx() as one, self.admin_access.repo_cnx() as two:
            eids = [self.create(one, b"c").eid, self.create(two, b"c").eid]
            one.commit()
            two.commit()
        self.assertEqual([self.read(eid) for eid in eids], [b"c", b"c"])

    def test_no_lock_is_left_by_a_rollback(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            test_lifecycle.RefuseInPrecommit(cnx)
            with self.assertRaises(ValidationError):
                cnx.commit()
        self.assertEqual(self.locks(), 0)
        self.assertEqual(self.objects(), {f"documents/{eid}": b"old"})

    def test_no_lock_is_left_by_a_commit_that_fails(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            self.commit_in_vain(cnx)
            self.assertEqual(self.locks(), 0)

    def test_the_present_content_written_again_by_the_last_to_commit_stays(self):
        eid = self.committed(b"old")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            second = self.update(eid, b"old")
            self.wait_until(lambda: self.s3.requests.count("PUT") == 2)
            cnx.commit()
        second.join()
        self.assertEqual(self.read(eid), b"old")
        self.assertEqual(len(self.objects()), 1)
