"""Threads and forks: the engine, uploads in the background, what a child inherits."""

import itertools
import logging
import os
import select
import signal
import threading
import time
import traceback
import unittest
from collections.abc import Callable
from unittest.mock import patch

from cubicweb import Binary
from cubicweb.server.hook import LateOperation, Operation
from cubicweb.server.repository import get_cnxset

from cubicweb_s3storage import downloads, engine
from cubicweb_s3storage.engine import Engine
from cubicweb_s3storage.errors import AccessRefused
from cubicweb_s3storage.storages import S3Storage
from cubicweb_s3storage.uploads import history
from s3server import Fault
from test_postgres import PostgresMixin
from testlib import S3TC, ContentHashStorage, OwnKeyStorage

#: seconds after which something will never happen
PATIENCE = 20
#: seconds in which what must not happen would
MOMENT = 0.1
CONTENTS = "Any X, C ORDERBY X WHERE X is Document, X content C"


def bounds(**numbers: int):
    """Have the engines that are made from now on have other bounds."""
    return patch.multiple(engine, **numbers)


class InFlight:
    """How many pass at the same time: `seen` whenever one begins."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._now = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._now += 1
            self.seen.append(self._now)

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._now -= 1


def run_threads(test: unittest.TestCase, count: int, work: Callable) -> None:
    """Call a function with the numbers of so many threads, all at once."""
    start, errors = threading.Barrier(count, timeout=PATIENCE), []

    def run(number: int) -> None:
        try:
            start.wait()
            work(number)
        except BaseException:  # noqa: BLE001
            errors.append(traceback.format_exc())

    threads = [
        threading.Thread(target=run, args=(n,), daemon=True) for n in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * PATIENCE)
        test.assertFalse(thread.is_alive(), "a thread hangs")
    test.assertEqual(errors, [])


def run_in_child(test: unittest.TestCase, work: Callable[[], object]) -> str:
    """What a function returns in a forked process, which ends then, as text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = "nothing"
        try:
            answer = str(work())
        except BaseException:  # noqa: BLE001
            answer = traceback.format_exc()
        finally:
            os.write(writer, answer.encode())
            os._exit(0)
    os.close(writer)
    answer, deadline = b"", time.monotonic() + PATIENCE
    with open(reader, "rb", buffering=0) as pipe:
        while True:
            remaining = max(0, deadline - time.monotonic())
            if not select.select([pipe], [], [], remaining)[0]:
                os.kill(child, signal.SIGKILL)
            if not (part := pipe.read(65536)):
                break
            answer += part
    _, status = os.waitpid(child, 0)
    test.assertEqual(status, 0, "the child hangs")
    return answer.decode()


class EngineTC(unittest.TestCase):
    def setUp(self):
        self.go = threading.Event()
        self.addCleanup(self.go.set)

    def start(self, some: Engine, size: int) -> threading.Event:
        """Start a job that lasts; the event tells that it has been started."""
        started = threading.Event()

        def work():
            some.start(size, self.go.wait, PATIENCE)
            started.set()

        threading.Thread(target=work, daemon=True).start()
        return started

    def assert_waits(self, *sizes: int) -> None:
        """The last of these jobs has to wait until one of the others ends."""
        some = Engine()
        self.go.clear()
        for size in sizes[:-1]:
            self.assertTrue(self.start(some, size).wait(PATIENCE))
        last = self.start(some, sizes[-1])
        self.assertFalse(last.wait(MOMENT))
        self.go.set()
        self.assertTrue(last.wait(PATIENCE))

    def test_jobs_that_wait_are_bounded(self):
        with bounds(MAX_REQUESTS=2, MAX_WAITING=3):
            self.assert_waits(0, 0, 0, 0, 0, 0)

    def test_bytes_are_bounded(self):
        with bounds(MAX_BYTES=10):
            self.assert_waits(6, 4, 1)

    def test_what_is_larger_than_the_bound_goes_alone(self):
        with bounds(MAX_BYTES=10):
            self.assert_waits(11, 1)
            self.assert_waits(1, 11)

    def test_a_job_that_is_cancelled_or_fails_makes_room(self):
        with bounds(MAX_REQUESTS=1, MAX_WAITING=1, MAX_BYTES=10):
            some = Engine()
            some.start(1, self.go.wait, PATIENCE)
            self.assertTrue(some.start(9, divmod, 7, 0).cancel())
            failing = some.start(9, divmod, 7, 0)
            self.go.set()
            self.assertIsInstance(failing.exception(PATIENCE), ZeroDivisionError)
            self.assertTrue(self.start(some, 10).wait(PATIENCE))

    def test_map_gives_the_results_in_order(self):
        with bounds(MAX_REQUESTS=4):
            together = threading.Barrier(4, timeout=PATIENCE)
            results = Engine().map(lambda n: together.wait() * 0 + n, range(12))
        self.assertEqual(results, list(range(12)))
        self.assertEqual(Engine().map(str, ()), [])

    def test_an_error_in_map_stops_what_has_not_begun(self):
        begun = []

        def work(number: int) -> None:
            begun.append(number)
            if number == 0:
                raise ValueError

        with bounds(MAX_REQUESTS=2), self.assertRaises(ValueError):
            Engine().map(work, range(100))
        self.assertLessEqual(set(begun), {0, 1})

    def test_an_error_in_map_is_raised_when_all_have_stopped(self):
        both, ended = threading.Barrier(2, timeout=PATIENCE), []

        def work(number: int) -> None:
            both.wait()
            if number == 0:
                raise ValueError
            self.go.wait(MOMENT)
            ended.append(number)

        with bounds(MAX_REQUESTS=2), self.assertRaises(ValueError):
            Engine().map(work, range(2))
        self.assertEqual(ended, [1])

    def test_threads_that_start_jobs_of_all_sizes(self):
        in_flight = InFlight()

        def job(n: int) -> int:
            with in_flight:
                return n

        def work(number: int) -> None:
            jobs = [some.start((number * n) % 13, job, n) for n in range(100)]
            results = [started.result(PATIENCE) for started in jobs]
            self.assertEqual(results, list(range(100)))

        with bounds(MAX_REQUESTS=4, MAX_WAITING=2, MAX_BYTES=10):
            some = Engine()
            run_threads(self, 8, work)
            self.assertTrue(self.start(some, 10).wait(PATIENCE))
        self.assertLessEqual(max(in_flight.seen), 4)


class HoldingTC(S3TC):
    """Requests that are on their way for as long as a test wants."""

    def setUp(self):
        super().setUp()
        self.go = threading.Event()
        self.arrived = threading.Semaphore(0)

    def tearDown(self):
        self.go.set()
        super().tearDown()

    def hold(self, operation: str, times: int, **kwargs) -> None:
        """Hold the next requests back until `self.go`."""

        def wait():
            self.arrived.release()
            return self.go.wait(PATIENCE)

        self.s3.faults.append(Fault(operation, times=times, instead=wait, **kwargs))

    def await_held(self, count: int) -> None:
        for _ in range(count):
            self.assertTrue(self.arrived.acquire(timeout=PATIENCE))

    def announce(self, event: str) -> type[Operation]:
        """An operation on whose event what is held back goes on."""
        return type("Announce", (Operation,), {event: lambda _: self.go.set()})

    def contents(self, cnx) -> list[Binary]:
        return [content for _, content in cnx.execute(CONTENTS).rows]


class UploadsTC(HoldingTC):
    def test_they_run_beside_each_other_and_the_transaction(self):
        together = threading.Barrier(5, timeout=PATIENCE)
        self.s3.faults.append(
            Fault("PUT", times=4, instead=lambda: together.wait() is not None)
        )
        with self.admin_access.repo_cnx() as cnx:
            eids = [self.create(cnx, b"%d" % n).eid for n in range(4)]
            self.assertEqual(len(cnx.execute("Any X WHERE X is Document")), 4)
            together.wait()
            cnx.commit()
        self.assertEqual([self.read(eid) for eid in eids], [b"0", b"1", b"2", b"3"])
        self.assertEqual(self.s3.requests.count("PUT"), 4)

    def test_so_many_at_a_time(self):
        together = threading.Barrier(3, timeout=PATIENCE)
        in_flight = InFlight()

        def pass_together():
            with in_flight:
                return together.wait() is not None

        self.s3.faults.append(Fault("PUT", instead=pass_together))
        with bounds(MAX_REQUESTS=3), self.admin_access.repo_cnx() as cnx:
            for _ in range(9):
                self.create(cnx)
            cnx.commit()
        self.assertEqual((len(in_flight.seen), max(in_flight.seen)), (9, 3))

    def test_the_commit_waits_for_them(self):
        eids, seen = [], []

        def look():
            self.go.wait(PATIENCE)
            seen.append(self.row(eids[0]))
            return True

        self.s3.faults.append(Fault("PUT", after=True, instead=look))
        with self.admin_access.repo_cnx() as cnx:
            eids += [self.create(cnx).eid for _ in range(3)]
            self.announce("precommit_event")(cnx)
            cnx.commit()
            self.assertEqual(seen, [None, None, None])
        self.assertIsNotNone(self.row(eids[0]))

    def test_one_that_fails_during_the_commit_fails_it(self):
        self.s3.faults.append(
            Fault("PUT", 403, times=1, instead=lambda: not self.go.wait(PATIENCE))
        )
        with self.admin_access.repo_cnx() as cnx:
            for _ in range(3):
                self.create(cnx)
            self.announce("precommit_event")(cnx)
            with self.assertRaises(AccessRefused):
                cnx.commit()
        self.assertEqual(self.objects(), {})

    def test_one_that_fails_stops_those_that_have_not_begun(self):
        uploads = []

        def until_the_last_is_cancelled():
            deadline = time.monotonic() + PATIENCE
            while not uploads[-1].has_finished and time.monotonic() < deadline:
                time.sleep(0.01)
            return True

        self.hold("PUT", 1)
        self.s3.faults += [
            Fault("PUT", 403, times=1),
            Fault("PUT", instead=until_the_last_is_cancelled),
        ]
        with bounds(MAX_REQUESTS=1), self.admin_access.repo_cnx() as cnx:
            for _ in range(6):
                self.create(cnx)
            uploads += itertools.chain.from_iterable(history(cnx).values())
            self.go.set()
            uploads[1].finish()
            for write in (self.create, lambda cnx: cnx.commit()):
                with self.assertRaises(AccessRefused):
                    write(cnx)
        self.assertEqual(self.s3.requests.count("PUT"), 3)
        self.assertEqual(self.objects(), {})

    def test_a_rollback_waits_for_them_and_removes_them(self):
        def end_late():
            self.arrived.release()
            self.go.wait(PATIENCE)
            threading.Event().wait(MOMENT)
            return not events.append("uploaded")

        def delete():
            return not events.append("removed")

        events = []
        self.s3.faults.append(Fault("PUT", instead=end_late))
        self.s3.faults.append(Fault("DELETEMANY", instead=delete))
        with bounds(MAX_REQUESTS=4), self.admin_access.repo_cnx() as cnx:
            self.announce("rollback_event")(cnx)
            for _ in range(4):
                self.create(cnx)
            self.await_held(4)
            cnx.rollback()
            self.assertEqual(self.objects(), {})
        self.assertEqual(events, [*4 * ["uploaded"], "removed"])

    def test_those_that_operations_add_are_confirmed_too(self):
        eid = self.committed(b"old")
        for base in (Operation, LateOperation):

            class Write(base):
                def precommit_event(self):
                    self.cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))

            self.s3.faults[:] = [Fault("PUT", 403, times=1, skip=1)]
            with self.admin_access.repo_cnx() as cnx:
                self.create(cnx)
                self.uploaded(cnx)
                Write(cnx)
                with self.assertRaises(AccessRefused):
                    cnx.commit()
            self.assertEqual(list(self.objects().values()), [b"old"])
        with self.admin_access.repo_cnx() as cnx:
            Write(cnx)
            self.create(cnx)
            cnx.commit()
        self.assertEqual(self.read(eid), b"new")
        self.assertEqual(sorted(self.objects().values()), [b"content", b"new"])

    def test_what_was_given_is_stored_whatever_becomes_of_the_value(self):
        self.hold("PUT", 3)
        with self.admin_access.repo_cnx() as cnx:
            values = [Binary(b"given") for _ in range(3)]
            for value in values:
                cnx.create_entity("Document", content=value)
            values[0].write(b"other")
            values[1].truncate(0)
            values[2].getbuffer()[:] = b"wrong"
            self.go.set()
            cnx.commit()
        self.assertEqual(list(self.objects().values()), 3 * [b"given"])

    def test_what_a_transaction_has_written_it_reads_before_the_upload_has_ended(self):
        for cache_size in (0, self.cache_size):
            self.set_option("s3-cache-size", cache_size)
            self.go.clear()
            self.hold("PUT", 3)
            with self.admin_access.repo_cnx() as cnx:
                for content in (b"first", b"second", b"third"):
                    self.create(cnx, content)
                contents = [value.getvalue() for value in self.contents(cnx)]
                self.go.set()
            self.assertEqual(contents, [b"first", b"second", b"third"])

    def test_what_could_not_be_written_cannot_be_read(self):
        self.s3.faults.append(
            Fault("PUT", 403, instead=lambda: not self.go.wait(PATIENCE))
        )
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx)
            (value,) = self.contents(cnx)
            self.go.set()
            self.uploaded(cnx)
            with self.assertRaises(AccessRefused):
                value.getvalue()


class TwoWritesTC(S3TC):
    """Of two writes of one attribute in one transaction the last wins."""

    def assert_last_wins(self, storage_class: type[S3Storage]) -> None:
        self.set_storage("Document", "content", storage_class(self.bucket))
        updated = self.committed(b"zeroth")
        with self.admin_access.repo_cnx() as cnx:
            created = self.create(cnx, b"first").eid
            for content in (b"first", b"second"):
                cnx.entity_from_eid(updated).cw_set(content=Binary(content))
            cnx.entity_from_eid(created).cw_set(content=Binary(b"second"))
            cnx.commit()
        contents = [self.read(updated), self.read(created)]
        self.assertEqual(contents, [b"second", b"second"])
        self.assertEqual(list(self.objects().values()), contents)
        self.delete(updated)
        self.delete(created)

    def test_with_and_without_staging(self):
        for storage_class in (S3Storage, OwnKeyStorage):
            for stages in (False, True):
                self.set_option("s3-transaction-suffix-key", stages)
                self.assert_last_wins(storage_class)

    def test_with_versions(self):
        self.keep_versions()
        for storage_class in (S3Storage, OwnKeyStorage):
            self.assert_last_wins(storage_class)


class ForkTC(PostgresMixin, HoldingTC):
    def use_own_connections(self) -> None:
        """In a child: leave to its parent what that has opened to the database."""
        source = self.repo.system_source
        self.inherited = [self.repo.cnxsets, source.eid_generator.cnx]
        source.eid_generator.cnx = None
        self.repo.cnxsets = get_cnxset(self.config, source)

    def test_a_child_writes_and_reads_while_its_parent_uploads(self):
        def work():
            self.use_own_connections()
            with self.admin_access.repo_cnx() as own:
                eid = self.create(own, b"of the child").eid
                self.create(own, b"of nobody")
                own.commit()
                own.entity_from_eid(eid + 1).cw_delete()
                own.commit()
                self.create(own, b"of nobody")
                own.rollback()
            shared = {id(self.storage.s3cnx), id(self.storage.engine)} & parts
            return eid, len(shared), self.read(eid).decode()

        self.hold("PUT", 4)
        with self.admin_access.repo_cnx() as cnx:
            mine = [self.create(cnx, b"%d" % n).eid for n in range(4)]
            self.await_held(4)
            parts = {id(self.storage.s3cnx), id(self.storage.engine)}
            answer = run_in_child(self, work)
            self.go.set()
            cnx.commit()
        eid = answer.strip("(").split(",")[0]
        self.assertEqual(answer, f"({eid}, 0, 'of the child')")
        contents = [self.read(eid) for eid in (*mine, int(eid))]
        self.assertEqual(contents, [b"0", b"1", b"2", b"3", b"of the child"])
        self.assertEqual(sorted(self.objects().values()), contents)

    def test_a_child_uses_the_values_that_its_parent_has_selected(self):
        self.set_option("s3-cache-size", 0)
        keys = [self.row(self.committed(b"%d" % n)) for n in range(6)]

        def work():
            whole = values[1].getvalue()
            with open(os.devnull, "wb") as file:
                values[3].to_file(file)
            return [whole, *(value.read() for value in values[2:])]

        expected = [b"1", b"2", b"3", b"4", b"5"]
        with self.admin_access.repo_cnx() as cnx:
            values = self.contents(cnx)
            self.assertEqual(run_in_child(self, work), str(expected))
            for key in keys[1:]:
                self.hold("GET", 1, match=key)
            self.assertEqual(values[0].getvalue(), b"0")
            self.await_held(5)  # by the look-ahead
            self.assertEqual(run_in_child(self, work), str(expected))
            self.go.set()
            self.assertEqual([value.read() for value in values[1:]], expected)

    def test_a_child_that_leaves_the_transaction_of_its_parent_removes_nothing(self):
        def leave():
            inherited.append(cnx.cnxset.cnx)
            cnx.cnxset.cnx = self.repo.system_source.get_connection()
            error = SystemExit()
            cnx.__exit__(SystemExit, error, error.__traceback__)

        inherited = []
        # Closed in a child, a connection would end that of the parent.
        for storage_class in (S3Storage, OwnKeyStorage, ContentHashStorage):
            self.set_storage("Document", "content", storage_class(self.bucket))
            updated = self.committed(b"old")
            self.go.clear()
            with self.admin_access.repo_cnx() as cnx:
                cnx.entity_from_eid(updated).cw_set(content=Binary(b"new"))
                self.uploaded(cnx)
                self.hold("PUT", 1)
                created = self.create(cnx, b"created").eid
                self.await_held(1)
                self.assertEqual(run_in_child(self, leave), "None")
                self.assertNotIn("DELETEMANY", self.s3.requests)
                self.go.set()
                cnx.commit()
            self.assertEqual(self.read(updated), b"new")
            self.assertEqual(self.read(created), b"created")


class ForksTC(HoldingTC):
    def test_forks_while_threads_transfer(self):
        contents = [b"%d" % n for n in range(12)]
        for content in contents:
            self.committed(content)
        stop, rounds = threading.Event(), threading.Semaphore(0)

        def work(number: int) -> None:
            if number == 0:
                try:
                    for n, value in enumerate(values):
                        self.assertTrue(rounds.acquire(timeout=PATIENCE))
                        answer = run_in_child(self, lambda n=n, v=value: child(n, v))
                        self.assertEqual(answer, str((contents[n], b"new")))
                finally:
                    stop.set()
            while not stop.is_set():
                key = f"{number}-{next(numbers)}"
                self.storage.objects.put(key, b"content", {})
                self.assertEqual(self.storage.download(key).getvalue(), b"content")
                with self.admin_access.repo_cnx() as cnx:
                    read = [value.getvalue() for value in self.contents(cnx)]
                self.assertEqual(read, contents)
                rounds.release()

        def child(n: int, value: Binary) -> tuple[bytes, bytes]:
            key = f"child-{n}"
            self.storage.objects.put(key, b"new", {})
            return value.getvalue(), self.storage.download(key).getvalue()

        numbers = itertools.count()
        for cache_size in (0, self.cache_size):
            self.set_option("s3-cache-size", cache_size)
            stop.clear()
            with self.admin_access.repo_cnx() as cnx:
                values = self.contents(cnx)
                run_threads(self, 5, work)

    def test_lengths_of_long_objects_that_a_subclass_downloads(self):
        class OwnDownloadStorage(S3Storage):
            def download(self, key, **kwargs):
                return super().download(key, **kwargs)

        self.set_option("s3-cache-size", 0)
        self.set_storage("Document", "content", OwnDownloadStorage(self.bucket))
        for _ in range(2):
            self.committed(b"long content")

        def work():
            rql = "Any LENGTH(C) WHERE X is Document, X content C"
            with self.admin_access.repo_cnx() as cnx:
                return cnx.execute(rql).rows

        ranges = patch.multiple(downloads, MAX_SINGLE=5, RANGE=5)
        with bounds(MAX_REQUESTS=2), ranges:
            self.assertEqual(run_in_child(self, work), "[[12], [12]]")


class ThreadsTC(PostgresMixin, S3TC):
    def setUp(self):
        super().setUp()
        self.left_behind: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.left_behind.append(record.getMessage())
        handler.setLevel(logging.ERROR)
        logger = logging.getLogger("cube.s3storage")
        logger.addHandler(handler)
        self.addCleanup(logger.removeHandler, handler)

    def work_in_threads(self, content_of: Callable[[int, int], bytes]) -> list[str]:
        """Have threads write; the keys of the objects that no row names."""
        committed: dict[int, bytes] = {}

        def work(number: int) -> None:
            new = (content_of(number, n) for n in itertools.count())
            with self.admin_access.repo_cnx() as cnx:
                for _ in range(3):
                    first, second = next(new), next(new)
                    kept, updated = self.create(cnx, first), self.create(cnx, first)
                    gone = self.create(cnx, second)
                    cnx.commit()
                    self.create(cnx, next(new))
                    updated.cw_set(content=Binary(next(new)))
                    cnx.rollback()
                    self.assertEqual(self.read(updated.eid), first)
                    updated.cw_set(content=Binary(second))
                    gone.cw_delete()
                    cnx.commit()
                    committed.update({kept.eid: first, updated.eid: second})

        run_threads(self, 8, work)
        self.assertEqual(len(committed), 8 * 3 * 2)
        self.assertEqual({eid: self.read(eid) for eid in committed}, committed)
        named = {self.row(eid) for eid in committed}
        objects = self.objects().keys()
        self.assertLessEqual(named, objects)
        return sorted(objects - named)

    def test_default_keys(self):
        unnamed = self.work_in_threads(lambda number, n: b"%d %d" % (number, n))
        self.assertEqual((unnamed, self.left_behind), ([], []))

    def test_shared_keys(self):
        """What a thread may not remove while others use it, it logs."""
        storage = ContentHashStorage(self.bucket)
        self.set_storage("Document", "content", storage)
        for key in self.work_in_threads(lambda number, n: b"%d" % ((number + n) % 9)):
            self.assertIn(key, "\n".join(self.left_behind))
