"""S3 fails at each request: refused, overloaded for a while, cut after the effect."""

from cubicweb import Binary

from cubicweb_s3storage.errors import AccessRefused, S3Unreachable
from cubicweb_s3storage.storages import S3DeleteFileOp
from s3server import Fault
from testlib import S3TC, ContentHashStorage, OwnKeyStorage


class WritingTC(S3TC):
    def create_in_vain(self, error: type[Exception]) -> None:
        with self.admin_access.repo_cnx() as cnx:
            with self.assertRaises(error) as raised:
                self.create(cnx)
                cnx.commit()
            cnx.rollback()
        self.assertIn(self.bucket, str(raised.exception))
        self.assertEqual(self.objects(), {})

    def test_a_refused_put(self):
        self.s3.faults.append(Fault("PUT", 403, "AccessDenied"))
        self.create_in_vain(AccessRefused)

    def test_a_put_that_never_succeeds(self):
        self.s3.faults.append(Fault("PUT", 503, "SlowDown"))
        self.create_in_vain(S3Unreachable)

    def test_a_put_that_succeeds_in_the_end(self):
        self.s3.faults.append(Fault("PUT", 503, "SlowDown", times=2))
        eid = self.committed(b"content")
        self.assertEqual(self.objects(), {self.row(eid): b"content"})

    def test_a_put_whose_answer_is_lost_once(self):
        self.s3.faults.append(Fault("PUT", times=1, after=True))
        eid = self.committed(b"content")
        self.assertEqual(self.objects(), {self.row(eid): b"content"})

    def test_a_put_whose_answers_are_all_lost_leaves_nothing(self):
        self.s3.faults.append(Fault("PUT", after=True))
        self.create_in_vain(S3Unreachable)

    def test_a_failing_put_fails_the_next_write_and_the_commit(self):
        self.s3.faults.append(Fault("PUT", 403, "AccessDenied"))
        eid = self.committed(None)
        with self.admin_access.repo_cnx() as cnx:
            document = cnx.entity_from_eid(eid)
            document.cw_set(title="changed")
            document.cw_set(content=Binary(b"new"))
            self.uploaded(cnx)
            with self.assertRaises(AccessRefused):
                self.create(cnx)
            with self.assertRaises(AccessRefused):
                cnx.commit()
        with self.admin_access.repo_cnx() as cnx:
            self.assertIsNone(cnx.entity_from_eid(eid).title)

    def test_the_first_uploads_are_removed_when_a_later_one_fails(self):
        self.s3.faults.append(Fault("PUT", 403, "AccessDenied", skip=2))
        with self.admin_access.repo_cnx() as cnx:
            for _ in range(3):
                self.create(cnx)
            with self.assertRaises(AccessRefused):
                cnx.commit()
        self.assertEqual(self.objects(), {})


class OverriddenKeysTC(S3TC):
    storage_class = ContentHashStorage

    def fail(self, *faults: Fault, error: type[Exception]) -> None:
        self.s3.faults.extend(faults)
        with self.admin_access.repo_cnx() as cnx:
            with self.assertRaises(error):
                self.create(cnx, b"content")
                cnx.commit()
            self.s3.faults.clear()
            cnx.rollback()

    def test_a_failing_head_removes_nothing(self):
        self.put("040f06fd774092478d450774f5ba30c5da78acc8", b"content")
        self.fail(Fault("HEAD", 503, "SlowDown"), error=S3Unreachable)
        self.assertEqual(len(self.objects()), 1)

    def test_a_refused_head(self):
        self.fail(Fault("HEAD", 403), error=AccessRefused)
        self.assertEqual(self.objects(), {})

    def test_a_put_of_shared_content_that_fails_removes_nothing(self):
        eid = self.committed(b"content")
        self.fail(Fault("PUT", after=True), error=S3Unreachable)
        self.assertEqual(self.read(eid), b"content")

    def test_a_put_of_new_content_whose_answers_are_lost_leaves_nothing(self):
        self.fail(Fault("PUT", after=True), error=S3Unreachable)
        self.assertEqual(self.objects(), {})

    def test_a_put_whose_answer_is_lost_once_is_ours(self):
        self.s3.faults.append(Fault("PUT", times=1, after=True))
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"content")
            self.uploaded(cnx)
            self.assertEqual(len(self.objects()), 1)
            cnx.rollback()
        self.assertEqual(self.objects(), {})

    def test_a_server_without_conditional_writes(self):
        self.s3.faults.append(Fault("PUT", 501, "NotImplemented", times=1))
        eid = self.committed(b"content")
        self.assertEqual(self.read(eid), b"content")

    def test_a_write_that_meets_another_one(self):
        self.s3.faults.append(Fault("PUT", 409, "ConditionalRequestConflict", times=1))
        eid = self.committed(b"content")
        self.assertEqual(self.read(eid), b"content")
        self.assertEqual(len(self.objects()), 1)

    def test_a_rollback_that_cannot_remove_a_shareable_object_logs_its_key(self):
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"content")
            self.s3.faults.append(Fault("DELETEMANY", 500, "InternalError"))
            with self.assertLogs("cube.s3storage", "ERROR") as logs:
                cnx.rollback()
        self.assertIn("040f06fd774092478d450774f5ba30c5da78acc8", logs.output[0])


class DeletingTC(S3TC):
    def delete(self, *eids: int) -> list[str]:
        """Delete documents; what is logged as an error."""
        with self.admin_access.repo_cnx() as cnx:
            for eid in eids:
                cnx.entity_from_eid(eid).cw_delete()
            with self.assertLogs("cube.s3storage", "ERROR") as logs:
                cnx.commit()
        return logs.output

    def test_what_cannot_be_deleted_is_logged_with_its_key(self):
        for fault in (
            Fault("DELETEMANY", 403, "AccessDenied"),
            Fault("DELETEMANY", 503, "SlowDown"),
            Fault("DELETEMANY"),
        ):
            self.s3.faults[:] = [fault]
            eid = self.committed()
            key = self.row(eid)
            (line,) = self.delete(eid)
            self.assertIn(key, line)
            self.assertIn(key, self.objects())

    def test_a_delete_whose_answer_is_lost_once(self):
        eid = self.committed()
        self.s3.faults.append(Fault("DELETEMANY", times=1, after=True))
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_delete()
            cnx.commit()
        self.assertEqual(self.objects(), {})

    def test_a_server_that_refuses_to_delete_many_at_once(self):
        eids = [self.committed(), self.committed()]
        for status, code in ((400, "MalformedXML"), (501, "NotImplemented")):
            self.s3.faults[:] = [Fault("DELETEMANY", status, code)]
            with self.admin_access.repo_cnx() as cnx:
                cnx.entity_from_eid(eids.pop()).cw_delete()
                cnx.commit()
            self.assertEqual(self.s3.requests[-2:], ["DELETEMANY", "DELETE"])
        self.assertEqual(self.objects(), {})

    def test_one_refused_key_stops_nothing_else(self):
        keep, *others = [self.committed() for _ in range(3)]
        key = self.row(keep)
        self.s3.faults += [
            Fault("DELETEMANY", 400, "MalformedXML"),
            Fault("DELETE", 403, "AccessDenied", match=key),
        ]
        (line,) = self.delete(keep, *others)
        self.assertIn(key, line)
        self.assertEqual(list(self.objects()), [key])

    def test_one_error_in_an_answer_of_200(self):
        keep, *others = [self.committed() for _ in range(3)]
        key = self.row(keep)
        self.s3.refused_keys.add(key)
        (line,) = self.delete(keep, *others)
        self.assertIn(key, line)
        self.assertIn("AccessDenied", line)
        self.assertEqual(list(self.objects()), [key])

    def test_a_rollback_that_cannot_delete_logs_and_goes_on(self):
        self.s3.faults.append(Fault("DELETEMANY", 403, "AccessDenied"))
        with self.admin_access.repo_cnx() as cnx:
            document = self.create(cnx)
            key = self.storage.get_s3_key(document, "content")
            with self.assertLogs("cube.s3storage", "ERROR") as logs:
                cnx.rollback()
        self.assertIn(key, logs.output[0])

    def test_a_key_that_xml_cannot_carry(self):
        odd = "odd\x01key"
        self.put(odd, b"content")
        eid = self.committed()
        with self.admin_access.repo_cnx() as cnx:
            operation = S3DeleteFileOp.get_instance(cnx)
            operation.add_data((self.storage, odd, eid, "content"))
            cnx.entity_from_eid(eid).cw_delete()
            cnx.commit()
        self.assertEqual(self.versions(), [])


class MovingTC(S3TC):
    storage_class = OwnKeyStorage

    def update(self, eid: int) -> None:
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()

    def test_a_copy_that_succeeds_in_the_end(self):
        eid = self.committed(b"old")
        self.s3.faults.append(Fault("COPY", 503, "SlowDown", times=2))
        self.update(eid)
        self.assertEqual(self.objects(), {f"documents/{eid}": b"new"})

    def test_a_copy_whose_answer_is_lost_once(self):
        eid = self.committed(b"old")
        self.s3.faults.append(Fault("COPY", times=1, after=True))
        self.update(eid)
        self.assertEqual(self.objects(), {f"documents/{eid}": b"new"})

    def test_a_copy_that_fails_keeps_both_contents_and_says_where(self):
        eid = self.committed(b"old")
        self.s3.faults.append(Fault("COPY", 403, "AccessDenied"))
        with self.assertLogs("cube.s3storage", "CRITICAL") as logs:
            self.update(eid)
        self.assertIn(f"documents/{eid}.tmp.", logs.output[0])
        self.assertEqual(sorted(self.objects().values()), [b"new", b"old"])

    def test_one_copy_that_fails_stops_no_other(self):
        first, second = self.committed(b"old"), self.committed(b"old")
        self.s3.faults.append(Fault("COPY", 403, match=f"documents/{first}"))
        with self.assertLogs("cube.s3storage", "CRITICAL"):
            with self.admin_access.repo_cnx() as cnx:
                for eid in (first, second):
                    cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
                cnx.commit()
        self.assertEqual(self.read(second), b"new")


class ReadingTC(S3TC):
    cache_size = 0

    def test_a_get_that_succeeds_in_the_end(self):
        eid = self.committed(b"content")
        for fault in (
            Fault("GET", 503, "SlowDown", times=2),
            Fault("GET", times=1),
            Fault("GET", times=1, after=True),
        ):
            self.s3.faults[:] = [fault]
            self.assertEqual(self.read(eid), b"content")
