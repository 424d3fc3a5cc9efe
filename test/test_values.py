"""What queries return is a Binary that loads when it is used, with those after it."""

import concurrent.futures
import copy
import gc
import hashlib
import io
import json
import pickle
import random
import shutil
import sys
import threading
import zipfile
from unittest.mock import patch

from cubicweb import Binary
from hypothesis import given, settings
from hypothesis import strategies as st

from cubicweb_s3storage import values
from cubicweb_s3storage.errors import AccessRefused, ObjectMissing, S3Unreachable
from s3server import Fault
from testlib import S3TC

CONTENTS = "Any D ORDERBY T WHERE X is Document, X title T, X content D"
LENGTHS = "Any LENGTH(D) ORDERBY T WHERE X is Document, X title T, X content D"


class ValuesTC(S3TC):
    cache_size = 0

    def documents(self, count: int) -> list[bytes]:
        """The contents of new documents, in the order of `selected`."""
        contents = [b"content %03d" % n for n in range(count)]
        with self.admin_access.repo_cnx() as cnx:
            for n, content in enumerate(contents):
                self.create(cnx, content, title=f"{n:03}")
            cnx.commit()
        self.s3.requests.clear()
        return contents

    def selected(self, rql: str = CONTENTS, **kwargs) -> list:
        """The first column."""
        with self.admin_access.repo_cnx() as cnx:
            return [row[0] for row in cnx.execute(rql, kwargs).rows]

    def value(self, cnx, eid: int) -> Binary:
        """The content of a document, that has not been read."""
        rql = "Any D WHERE X eid %(x)s, X content D"
        return cnx.execute(rql, {"x": eid}).rows[0][0]

    def unread(self, eid: int) -> Binary:
        with self.admin_access.repo_cnx() as cnx:
            return self.value(cnx, eid)

    def loaded_ahead(self, value: Binary) -> list[bytes]:
        """What the values after this one have loaded when nothing loads any more."""
        jobs = value._selection._jobs.values()
        concurrent.futures.wait(jobs)
        return [job.result().content for job in jobs if job.result()]

    def meeting(self, operation: str, parties: int = 4) -> None:
        """At the end, so many requests must have been in flight at once."""
        barrier = threading.Barrier(parties, timeout=10)
        fault = Fault(operation, times=parties, instead=lambda: barrier.wait() >= 0)
        self.s3.faults.append(fault)
        self.addCleanup(lambda: self.assertEqual((fault.times, barrier.broken), (0, 0)))


# a Binary #####################################################################


def state(binary: Binary) -> tuple:
    attributes = dict(vars(binary))
    if binary.closed:
        return "closed", attributes
    return binary.getvalue(), binary.tell(), attributes


def readinto(binary, method, size):
    buffer = bytearray(size)
    return getattr(binary, method)(buffer), buffer


def to_file(binary):
    target = io.BytesIO()
    return binary.to_file(target), target.getvalue()


def change_buffer(binary, replacement):
    with binary.getbuffer() as buffer:
        buffer[: len(replacement)] = replacement


def write_while_exported(binary):
    with binary.getbuffer():
        binary.write(b"longer than the rest" * 9)


def copied(binary, make):
    made = make(binary)
    return type(made), state(made)


def enter_and_leave(binary):
    with binary:
        return binary.read(1)


OPERATIONS = {
    "readinto": readinto,
    "to_file": to_file,
    "iterate": list,
    "next": next,
    "eq": lambda binary, content: binary == Binary(content),
    "equal": lambda binary, content: Binary(content) == binary,
    "ne": lambda binary, content: binary != content,
    "getbuffer": lambda binary: bytes(binary.getbuffer()),
    "change_buffer": change_buffer,
    "write_while_exported": write_while_exported,
    "copy": lambda binary: copied(binary, copy.copy),
    "deepcopy": lambda binary: copied(binary, copy.deepcopy),
    "pickle": lambda binary, protocol: copied(
        binary, lambda plain: pickle.loads(pickle.dumps(plain, protocol))
    ),
    "setattr": lambda binary, value: setattr(binary, "filename", value),
    "hash": hash,
    "with": enter_and_leave,
}


SIMPLE = """
    read read1 readline readlines iterate next getvalue getbuffer tell to_file truncate
    flush copy deepcopy write_while_exported readable seekable writable isatty fileno
    detach unzpickle hash with
"""


def call(name: str, *arguments: st.SearchStrategy) -> st.SearchStrategy:
    return st.tuples(st.just(name), st.tuples(*arguments))


sizes = st.none() | st.integers(-2, 40)
contents = st.binary(max_size=8) | st.just(b"a\nb\n")
calls = st.one_of(
    *[call(name, sizes) for name in ("read", "read1", "readline", "readlines")],
    *[call(name) for name in SIMPLE.split()],
    call("readinto", st.sampled_from(["readinto", "readinto1"]), st.integers(0, 9)),
    call("seek", st.integers(-40, 40) | st.just(sys.maxsize) | st.just("1")),
    call("seek", st.integers(-40, 40) | st.just(sys.maxsize), st.integers(-1, 4)),
    call("write", contents | contents.map(bytearray) | st.just("text")),
    call("writelines", st.lists(contents, max_size=3)),
    call("truncate", sizes),
    call("change_buffer", contents),
    call("eq", contents),
    call("equal", contents),
    call("ne", contents),
    call("pickle", st.integers(2, pickle.HIGHEST_PROTOCOL)),
    call("setattr", st.integers() | st.lists(st.integers(), max_size=2)),
)
# Closed values have little to tell.
sequences = st.tuples(st.lists(calls, max_size=8), st.lists(call("close"), max_size=1))


def outcome(binary: Binary, name: str, arguments: tuple) -> tuple:
    try:
        if name in OPERATIONS:
            result = OPERATIONS[name](binary, *arguments)
        else:
            result = getattr(binary, name)(*arguments)
    except Exception as error:  # noqa: BLE001, compared
        result = type(error), str(error).replace("LazyBinary", "Binary")
    return result, binary.closed or binary.tell()


class BinaryTC(ValuesTC):
    cache_size = 2**24

    @settings(max_examples=300, deadline=None, database=None)
    @given(data=st.data())
    def check(self, eids, data):
        content = data.draw(st.sampled_from(sorted(eids)))
        lazy, plain = self.value(self.cnx, eids[content]), Binary(content)
        before, close = data.draw(sequences)
        for name, arguments in [*before, *close, *data.draw(st.lists(calls))]:
            expected = outcome(plain, name, copy.deepcopy(arguments))
            got = outcome(lazy, name, copy.deepcopy(arguments))
            self.assertEqual(got, expected, (name, arguments))
        self.assertEqual(state(lazy), state(plain))

    def test_calls_do_what_they_do_to_a_plain_one(self):
        contents = (b"x", b"no end of line", b"one\ntwo\r\n\nthree", bytes(range(256)))
        eids = {content: self.committed(content) for content in (b"", *contents)}
        self.read(eids[b""])  # which is not cached before
        self.s3.requests.clear()
        with self.admin_access.repo_cnx() as self.cnx:
            self.check(eids)
        self.assertEqual(self.s3.requests, [])

    def test_writelines_keeps_the_content(self):
        value = self.unread(self.committed(b"old content"))
        value.writelines([b"n", b"ew"])
        self.assertEqual(value.getvalue(), b"new content")

    def test_old_pickle_protocols_cannot_do_binaries(self):
        for binary in (Binary(b"content"), self.unread(self.committed(b"content"))):
            for protocol in (0, 1):
                with self.assertRaises(TypeError):
                    pickle.dumps(binary, protocol)

    def test_a_state_that_is_set_stays(self):
        value = self.unread(self.committed(b"content"))
        value.__setstate__((b"new", 1, None))
        self.assertEqual((value.getvalue(), value.tell()), (b"new", 1))


class UsesTC(ValuesTC):
    """What reads files reads values."""

    content = b'{"one":\n 1}'

    def setUp(self):
        super().setUp()
        self.eid = self.committed(self.content)

    def test_what_reads_files(self):
        expected = hashlib.sha256(self.content).digest()
        target = io.BytesIO()
        for read, result in (
            (lambda value: hashlib.file_digest(value, "sha256").digest(), expected),
            (json.load, {"one": 1}),
            (lambda value: io.BufferedReader(value).read(), self.content),
            (lambda value: io.TextIOWrapper(value).read(), self.content.decode()),
            (lambda value: bytes(value.getbuffer()), self.content),
            (lambda value: isinstance(value, Binary), True),
            (lambda value: b"".join(value), self.content),
            (lambda value: shutil.copyfileobj(value, target), None),
        ):
            self.assertEqual(read(self.unread(self.eid)), result)
        self.assertEqual(target.getvalue(), self.content)

    def test_zipfile(self):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as files:
            files.writestr("name", self.content)
        value = self.unread(self.committed(archive.getvalue()))
        with zipfile.ZipFile(value) as files:
            self.assertEqual(files.read("name"), self.content)
        value = self.unread(self.committed(archive.getvalue()))
        with zipfile.ZipFile(value, "a") as files:
            files.writestr("other", b"")
        with zipfile.ZipFile(io.BytesIO(value.getvalue())) as files:
            self.assertEqual(files.namelist(), ["name", "other"])

    def test_psycopg2(self):
        import psycopg2

        adapted = psycopg2.Binary(self.unread(self.eid).getvalue())
        self.assertEqual(bytes(adapted.adapted), self.content)

    def test_an_attribute_in_the_database(self):
        with self.admin_access.repo_cnx() as cnx:
            entity = cnx.entity_from_eid(self.eid)
            entity.cw_set(thumbnail=self.value(cnx, self.eid))
            cnx.commit()
        (copied,) = self.selected("Any T WHERE X is Document, X thumbnail T")
        self.assertEqual(copied.getvalue(), self.content)

    def test_an_argument_of_rql(self):
        with self.admin_access.repo_cnx() as cnx:
            value = {"value": self.value(cnx, self.eid)}
            cnx.execute("INSERT Document X: X content %(value)s, X title 'new'", value)
            cnx.execute("SET X thumbnail %(value)s WHERE X title 'new'", value)
            found = cnx.execute("Any X WHERE X thumbnail %(value)s", value)
            self.assertEqual(found.one().title, "new")
            cnx.commit()
            self.assertEqual(self.read(found[0][0]), self.content)


# look-ahead ###################################################################


class AheadTC(ValuesTC):
    def test_selecting_requests_nothing(self):
        self.documents(3)
        self.selected()
        self.assertEqual(self.s3.requests, [])

    def test_the_first_use_loads_a_bounded_number(self):
        expected = self.documents(values.MAX_AHEAD + 4)
        selected = self.selected()
        self.assertEqual(selected[0].read(), expected[0])
        ahead = self.loaded_ahead(selected[0])
        self.assertEqual(ahead, expected[1 : 1 + values.MAX_AHEAD])
        self.assertEqual(self.s3.requests, ["GET"] * (1 + values.MAX_AHEAD))

    def test_each_is_requested_once_beside_others(self):
        expected = self.documents(100)
        self.meeting("GET")
        self.assertEqual([value.read() for value in self.selected()], expected)
        self.assertEqual(self.s3.requests, ["GET"] * 100)

    def test_in_any_order(self):
        expected = self.documents(40)
        for order in (range(39, -1, -1), random.Random(1).sample(range(40), 40)):
            selected = self.selected()
            self.s3.requests.clear()
            for place in order:
                self.assertEqual(selected[place].read(), expected[place])
            self.assertEqual(self.s3.requests, ["GET"] * 40)

    def test_two_threads_may_read_the_same_values(self):
        expected = self.documents(40)
        selected = self.selected()
        with concurrent.futures.ThreadPoolExecutor(4) as readers:
            for read in [
                readers.submit(lambda: [value.getvalue() for value in selected])
                for _ in range(4)
            ]:
                self.assertEqual(read.result(), expected)

    def test_the_last_is_1_get(self):
        expected = self.documents(3)
        self.assertEqual(self.selected()[-1].read(), expected[-1])
        self.assertEqual(self.s3.requests, ["GET"])

    def test_what_nobody_can_use_is_not_loaded(self):
        expected = self.documents(10)
        selected = self.selected()
        first, sixth = selected[0], selected[5]
        del selected
        gc.collect()
        first.read()
        self.assertEqual(self.loaded_ahead(first), [expected[5]])
        self.assertEqual(self.s3.requests, ["GET", "GET"])
        self.assertEqual(sixth.read(), expected[5])

    def test_bytes_in_memory_are_bounded(self):
        expected = self.documents(40)
        self.enterContext(patch.object(values, "MAX_AHEAD_BYTES", 40))  # of 11 each
        selected = self.selected()
        for value, content in zip(selected, expected, strict=True):
            self.assertEqual(value.read(), content)
            self.assertLessEqual(len(self.loaded_ahead(value)), 3)
        self.assertLessEqual(len(self.s3.requests), 2 * 40)

    def test_an_error_is_raised_where_its_value_is_used(self):
        expected = self.documents(5)
        eids = self.selected("Any X ORDERBY T WHERE X is Document, X title T")
        fault = Fault("GET", 403, "AccessDenied", match=self.row(eids[3]))
        self.s3.faults.append(fault)
        selected = self.selected()
        for place in (0, 1, 2, 4):
            self.assertEqual(selected[place].read(), expected[place])
        with self.assertRaises(AccessRefused) as raised:
            selected[3].read()
        self.assertIn(self.row(eids[3]), str(raised.exception))
        self.assertIn("Document", str(raised.exception))
        self.s3.faults.clear()
        self.assertEqual(selected[3].read(), expected[3])

    def test_an_error_names_the_entity_while_the_connection_is_open(self):
        self.documents(3)
        with self.admin_access.repo_cnx() as cnx:
            rql = "Any X, D ORDERBY T WHERE X is Document, X title T, X content D"
            (_, first), (eid, second), _ = cnx.execute(rql).rows
            key = self.storage.get_s3_key(cnx.entity_from_eid(eid), "content")
            self.s3.faults.append(Fault("GET", 403, "AccessDenied", match=key))
            first.read()
            with self.assertRaisesRegex(AccessRefused, f"Document {eid}, attribute"):
                second.read()

    def test_an_outage_ends(self):
        expected = self.documents(3)
        selected = self.selected()
        self.s3.faults.append(Fault("GET"))
        with self.assertRaises(S3Unreachable):
            selected[0].read()
        concurrent.futures.wait(selected[0]._selection._jobs.values())
        self.s3.faults.clear()
        self.assertEqual([value.read() for value in selected], expected)


# lengths ######################################################################


class LengthTC(ValuesTC):
    def test_lengths_are_asked_for_beside_each_other(self):
        self.documents(40)
        self.meeting("HEAD")
        self.assertEqual(self.selected(LENGTHS), [11] * 40)
        self.assertEqual(self.s3.requests, ["HEAD"] * 40)

    def test_null(self):
        self.committed(b"1", title="a")
        self.committed(None, title="b")
        self.committed(b"", title="c")
        self.assertEqual(self.selected(LENGTHS), [1, None, 0])

    def test_a_missing_object_has_none(self):
        self.documents(2)
        eid = self.committed(b"lost", title="a")
        self.client.delete_object(Bucket=self.bucket, Key=self.row(eid))
        with self.assertLogs("cube.s3storage", "CRITICAL") as logs:
            self.assertEqual(self.selected(LENGTHS), [11, 11, None])
        self.assertEqual(len(logs.output), 1)
        self.assertIn(f"Document {eid}", logs.output[0])

    def test_an_outage_raises_from_the_query(self):
        self.documents(3)
        self.s3.faults.append(Fault("HEAD"))
        with self.assertRaisesRegex(S3Unreachable, "Document"):
            self.selected(LENGTHS)
        self.s3.faults.clear()
        self.assertEqual(self.selected(LENGTHS), [11] * 3)

    def test_columns_types_and_unions(self):
        self.set_storage("Document", "thumbnail", self.storage)
        self.set_storage("Scan", "content", self.storage)
        with self.admin_access.repo_cnx() as cnx:
            self.create(cnx, b"12", thumbnail=Binary(b"1"))
            cnx.create_entity("Scan", content=Binary(b"123"))
            cnx.commit()
            ((content, thumbnail, value),) = cnx.execute(
                "Any LENGTH(C), LENGTH(T), C"
                " WHERE X is Document, X content C, X thumbnail T"
            ).rows
        self.assertEqual((content, thumbnail, value.read()), (2, 1, b"12"))
        both = "Any LENGTH(D) WHERE X is IN (Document, Scan), X content D"
        union = (
            "(Any LENGTH(D) WHERE X is Document, X content D) UNION"
            " (Any LENGTH(D) WHERE X is Scan, X content D)"
        )
        sub = f"Any L WITH L BEING ({union})"
        for rql in (both, union, sub):
            with self.subTest(rql):
                self.assertEqual(sorted(self.selected(rql)), [2, 3])

    def test_an_attribute_in_the_database(self):
        self.committed(b"content", thumbnail=Binary(b"123"))
        rql = "Any LENGTH(T) WHERE X is Document, X thumbnail T"
        self.assertEqual(self.selected(rql), [3])

    def test_what_this_transaction_writes(self):
        for suffixed in (False, True):
            self.set_option("s3-transaction-suffix-key", suffixed)
            with self.admin_access.repo_cnx() as cnx:
                for n in range(40):
                    self.create(cnx, b"1" * n, title=f"{n:02}")
                rows = cnx.execute(LENGTHS.replace("LENGTH(D)", "LENGTH(D), LENGTH(D)"))
                self.assertEqual(rows.rows, [[n, n] for n in range(40)])
                cnx.rollback()

    def test_the_cache_knows_them(self):
        self.set_option("s3-cache-size", 2**24)
        self.documents(3)
        self.assertEqual(self.selected(LENGTHS), [11] * 3)
        self.assertEqual(self.s3.requests, [])


# to_file ######################################################################


class Pieces(list):
    """A file that notes what is written at once."""

    write = list.append


class ToFileTC(ValuesTC):
    def check_streams(self):
        content = random.Random(1).randbytes(2**21)
        value, pieces = self.unread(self.committed(content)), Pieces()
        value.seek(3)
        value.to_file(pieces)
        self.assertEqual(b"".join(pieces), content)
        self.assertLess(max(map(len, pieces)), len(content))
        self.assertEqual(value.tell(), 3)
        self.assertEqual(value.read(), content[3:])

    def test_it_streams_and_leaves_the_value_as_it_was(self):
        self.check_streams()
        self.assertEqual(self.s3.requests, ["GET", "GET"])

    def test_it_streams_from_the_cache(self):
        self.set_option("s3-cache-size", 2**24)
        self.check_streams()
        self.assertEqual(self.s3.requests, [])

    def test_each_object_of_a_result_is_requested_once(self):
        expected = self.documents(40)
        self.meeting("GET")
        target = io.BytesIO()
        for value in self.selected():
            value.to_file(target)
        self.assertEqual(target.getvalue(), b"".join(expected))
        self.assertEqual(self.s3.requests, ["GET"] * 40)


class LaterTC(ValuesTC):
    """Values outlive their connections."""

    def lost(self) -> tuple[str, Binary]:
        eid = self.committed(b"content")
        key = self.row(eid)
        self.client.delete_object(Bucket=self.bucket, Key=key)
        return key, self.unread(eid)

    def test_it_is_read_after_its_connection_is_closed(self):
        self.assertEqual(self.unread(self.committed(b"content")).read(), b"content")

    def test_a_missing_object_is_named(self):
        key, value = self.lost()
        gc.collect()  # the connection
        with self.assertRaises(ObjectMissing) as raised:
            value.read()
        for part in (self.bucket, key, "Document", "content"):
            self.assertIn(part, str(raised.exception))

    def test_a_missing_object_cannot_be_pickled_nor_copied(self):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with self.assertRaises(ObjectMissing):
                pickle.dumps(self.lost()[1], protocol)
        for make in (copy.copy, copy.deepcopy):
            with self.assertRaises(ObjectMissing):
                make(self.lost()[1])
