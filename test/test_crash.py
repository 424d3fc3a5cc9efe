"""A process is killed at each moment of a transaction: nothing is lost."""

import os
import signal
import threading
from collections.abc import Callable

from cubicweb import Binary

from s3server import Fault
from testlib import S3TC, OwnKeyStorage


class CrashTC(S3TC):
    def killed_at(self, operation: str, work: Callable, after: bool = False) -> None:
        """Do some work and commit in a process that dies at the first such request.

        :param after: when the request has had its effect
        """
        forked = threading.Event()

        def kill() -> None:
            forked.wait()
            os.kill(child, signal.SIGKILL)

        fault = Fault(operation, times=1, after=after, instead=kill)
        self.s3.faults.append(fault)
        child = os.fork()
        if child == 0:
            try:
                with self.admin_access.repo_cnx() as cnx:
                    work(cnx)
                    cnx.commit()
            finally:
                os._exit(1)
        forked.set()
        _, status = os.waitpid(child, 0)
        self.assertEqual(os.WTERMSIG(status), signal.SIGKILL)

    def update(self, eid: int) -> Callable:
        return lambda cnx: cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))

    def test_before_the_upload(self):
        eid = self.committed(b"old")
        self.killed_at("PUT", self.update(eid))
        self.assertEqual(self.read(eid), b"old")

    def test_after_the_upload(self):
        eid = self.committed(b"old")
        self.killed_at("PUT", self.update(eid), after=True)
        self.assertEqual(self.read(eid), b"old")
        self.assertEqual(sorted(self.objects().values()), [b"new", b"old"])

    def test_before_the_removal(self):
        eid = self.committed(b"old")
        self.killed_at("DELETEMANY", self.update(eid))
        self.assertEqual(self.read(eid), b"new")
        self.assertIn(b"new", self.objects().values())

    def test_after_the_removal(self):
        eid = self.committed(b"old")
        self.killed_at("DELETEMANY", self.update(eid), after=True)
        self.assertEqual(self.read(eid), b"new")
        self.assertEqual(self.objects(), {self.row(eid): b"new"})

    def test_before_the_move_of_a_new_object(self):
        self.set_option("s3-transaction-suffix-key", True)
        self.killed_at("COPY", lambda cnx: self.create(cnx, b"content"))
        with self.admin_access.repo_cnx() as cnx:
            ((eid,),) = cnx.execute("Any X WHERE X is Document").rows
        self.assertNotIn(self.row(eid), self.objects())
        self.assertEqual(self.read(eid), b"content")

    def test_before_the_move_over_an_object(self):
        self.set_storage("Document", "content", OwnKeyStorage(self.bucket))
        eid = self.committed(b"old")
        self.killed_at("COPY", self.update(eid))
        self.assertEqual(sorted(self.objects().values()), [b"new", b"old"])

    def test_between_the_move_and_the_removal_of_the_staged_copy(self):
        self.set_storage("Document", "content", OwnKeyStorage(self.bucket))
        eid = self.committed(b"old")
        self.killed_at("COPY", self.update(eid), after=True)
        self.assertEqual(self.read(eid), b"new")
