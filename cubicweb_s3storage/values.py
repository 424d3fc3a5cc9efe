"""The values that queries return: they load when they are used."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial, wraps
from io import SEEK_END, SEEK_SET, BytesIO
from typing import Any, BinaryIO

from cubicweb import Binary
from cubicweb.server.session import Connection
from cubicweb.server.sources.native import NativeSQLSource

from cubicweb_s3storage.contents import Fetched
from cubicweb_s3storage.engine import PerProcess
from cubicweb_s3storage.errors import ObjectMissing, S3StorageError
from cubicweb_s3storage.readers import Reader

#: values that are loaded before they are used
MAX_AHEAD = 32
#: bytes that such values have together
MAX_AHEAD_BYTES = 64 * 2**20
SELECTION = "s3storage_selection"


def _loading(name: str) -> Callable:
    method = getattr(Binary, name)

    @wraps(method)
    def load_first(self, *args, **kwargs):
        self.load()
        return method(self, *args, **kwargs)

    return load_first


class LazyBinary(Binary):
    """A value that loads on its first use, and has the next ones load beside it.

    :param reader: reads what the row names
    :param selection: the values of the same query
    """

    # User code may have attributes of its own in `__dict__`.
    __slots__ = ("_place", "_selection", "reader")

    def __init__(self, reader: Reader, selection: Selection) -> None:
        super().__init__()
        self.reader: Reader | None = reader
        self._selection = selection
        self._place = selection.add(self)

    def load(self) -> None:
        """Have the content in memory.

        :raise S3StorageError: it cannot be read
        """
        reader = self.reader
        if reader is None or self.closed:
            return
        content = self._content(reader)
        with _installing.get():
            if self.reader is not None:
                position = self.tell()
                # Shares the bytes, which write() copies.
                BytesIO.__init__(self, content)
                BytesIO.seek(self, position)
                self.reader = None

    def keep(self) -> None:
        """Have the content in memory, before its object goes.

        Another thread may use the value: this one leaves its position alone.

        :raise S3StorageError: it cannot be read
        """
        if (reader := self.reader) is not None:
            reader.keep(self._content(reader))

    def _content(self, reader: Reader) -> bytes:
        with reader.reporting():
            if (held := reader.held) is not None:
                return held
            content = self._selection.take(self._place, reader)
            return reader.content() if content is None else content

    __next__ = _loading("__next__")
    __setstate__ = _loading("__setstate__")
    getbuffer = _loading("getbuffer")
    getvalue = _loading("getvalue")
    read = _loading("read")
    read1 = _loading("read1")
    readinto = _loading("readinto")
    readline = _loading("readline")
    readlines = _loading("readlines")
    truncate = _loading("truncate")
    write = _loading("write")
    writelines = _loading("writelines")

    def seek(self, offset: int, whence: int = SEEK_SET, /) -> int:
        if whence == SEEK_END:
            self.load()
        return super().seek(offset, whence)

    def to_file(self, fobj: BinaryIO) -> None:
        """Write the content to a file; it does not stay in memory."""
        reader = self.reader
        if reader is None or self.closed:
            super().to_file(fobj)
            return
        with reader.reporting():
            content = self._selection.take(self._place, reader)
            for chunk in reader.chunks() if content is None else [content]:
                fobj.write(chunk)

    def __reduce_ex__(self, protocol: int) -> tuple:
        plain = Binary(self.getvalue())
        plain.seek(self.tell())
        plain.__dict__.update(self.__dict__)
        if protocol < 2:
            return plain.__reduce_ex__(protocol)
        return Binary, (), plain.__getstate__()

    def __eq__(self, other: object) -> bool:
        # Schemas ask whether a value is still the one that was given.
        return (self is other and not self.closed) or super().__eq__(other)

    __hash__ = None


_installing = PerProcess(threading.Lock)


class Selection:
    """The values of one query, in order; those after the one in use load ahead."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._values: list[weakref.ref[LazyBinary]] = []
        self._jobs: dict[int, Future[Fetched | None]] = {}
        #: bytes of what has been loaded ahead, or is on its way
        self._sizes: dict[int, int] = {}
        #: too long when they came, to be loaded ahead when there is room
        self._refused: set[int] = set()
        self._looked_at = 0
        self._usual_size = 0
        self._admitting = threading.Lock()

    def add(self, value: LazyBinary) -> int:
        place = len(self._values)
        drop = partial(_drop, weakref.ref(self), place)
        self._values.append(weakref.ref(value, drop))
        return place

    def take(self, place: int, reader: Reader) -> bytes | None:
        """The content, if it has been loaded ahead; has the next ones load."""
        if self._pid != os.getpid():  # jobs do not survive a fork
            return None
        job = self._jobs.pop(place, None)
        if job is None and reader.is_at_hand():
            return None
        self._load_ahead(place)
        if job is None or job.cancel():
            return None
        self._refused.discard(place)
        try:
            fetched = job.result()
        except ObjectMissing:
            raise
        except S3StorageError:
            return None  # perhaps it can be read now
        finally:
            self._sizes.pop(place, None)
        if fetched is None:
            return None
        reader.storage.contents.keep(fetched)
        return fetched.content

    def _load_ahead(self, place: int) -> None:
        end = min(place + 1 + MAX_AHEAD, len(self._values))
        start = place + 1
        if start < self._looked_at and not self._refused:
            start = self._looked_at
        for ahead in range(start, end):
            if not self._has_room(self._usual_size):
                end = ahead
                break
            value = self._values[ahead]()
            reader = value and value.reader
            is_begun = ahead in self._jobs and ahead not in self._refused
            if reader and not is_begun and reader.may_read_ahead:
                self._refused.discard(ahead)
                admits = partial(self._admits, ahead)
                engine = reader.storage.engine
                self._jobs[ahead] = engine.start_at_once(reader.fetch_if, admits)
        self._looked_at = end

    def _admits(self, place: int, size: int) -> bool:
        with self._admitting:
            self._usual_size = size
            if self._values[place]() is None:
                return False
            if sum(self._sizes.values()) + size > MAX_AHEAD_BYTES:
                self._refused.add(place)
                return False
            self._sizes[place] = size
            return True

    def _has_room(self, size: int) -> bool:
        """Whether one more of this size fits in beside those not yet admitted."""
        sizes = list(self._sizes.values())
        unknown = len(self._jobs) - len(sizes) - len(self._refused)
        return sum(sizes) + (unknown + 1) * size <= MAX_AHEAD_BYTES

    def drop(self, place: int) -> None:
        """Nobody has this value any more."""
        if job := self._jobs.pop(place, None):
            job.cancel()
        self._sizes.pop(place, None)
        self._refused.discard(place)


def _drop(
    selection: weakref.ref[Selection], place: int, _: weakref.ref[LazyBinary]
) -> None:
    if (found := selection()) is not None:
        found.drop(place)


def current_selection(cnx: Connection) -> Selection:
    """The selection of the query that is being answered."""
    return cnx.transaction_data.get(SELECTION) or Selection()


def select_together(source: NativeSQLSource) -> None:
    """Have the values that a query of this source selects know each other.

    CubicWeb makes the values of a result one by one. Here is where it has them all.
    """
    process_result = source.process_result

    @wraps(process_result)
    def process_result_together(
        cursor: Any,
        cnx: Connection | None = None,
        column_callbacks: dict[int, list[Callable]] | None = None,
    ) -> list[list]:
        if not column_callbacks:
            return process_result(cursor, cnx, column_callbacks)
        outer = cnx.transaction_data.get(SELECTION)
        cnx.transaction_data[SELECTION] = Selection()
        try:
            rows = process_result(cursor, cnx, column_callbacks)
        finally:
            cnx.transaction_data[SELECTION] = outer
        for column, callbacks in column_callbacks.items():
            if length in callbacks:
                _replace_by_lengths(rows, column)
        return rows

    source.process_result = process_result_together


def leave_unread(source: NativeSQLSource) -> None:
    """Have no value loaded because it is an argument of a query.

    CubicWeb makes SQL arguments of all of them, also of what is set, which the SQL
    never uses.
    """
    merge_args = source.merge_args

    @wraps(merge_args)
    def merge_unread_args(
        args: dict[str, Any] | None, query_args: dict[str, Any]
    ) -> dict[str, Any]:
        unread = {
            name: _UnreadArgument(value, source._binary)
            for name, value in (args or {}).items()
            if isinstance(value, LazyBinary) and value.reader
        }
        return merge_args({**args, **unread} if unread else args, query_args)

    source.merge_args = merge_unread_args


class _UnreadArgument:
    """An argument of an SQL statement that is loaded if the statement uses it."""

    def __init__(self, value: LazyBinary, binary: Callable[[bytes], Any]) -> None:
        self._value = value
        self._binary = binary

    def __conform__(self, protocol: type) -> Any:
        # https://docs.python.org/3/library/sqlite3.html#how-to-adapt-custom-python-types-to-sqlite-values
        # https://www.psycopg.org/docs/advanced.html#adapting-new-python-types-to-sql-syntax
        return self._binary(self._value.getvalue())


def length(source: NativeSQLSource, cnx: Connection, value: Binary) -> Any:
    """What `LENGTH` makes of a value of an attribute that a storage holds.

    :return: bytes; of a query that selects together the value itself, for the length
      to be asked for with the others
    """
    if not isinstance(value, LazyBinary):
        return len(value.getvalue())
    if cnx.transaction_data.get(SELECTION):
        return value
    return lengths([value])[0]


def _replace_by_lengths(rows: list[list], column: int) -> None:
    lazy = [row for row in rows if isinstance(row[column], LazyBinary)]
    for row, size in zip(lazy, lengths([row[column] for row in lazy]), strict=True):
        row[column] = size


def lengths(values: list[LazyBinary]) -> list[int | None]:
    """Their lengths in bytes, asked for beside each other; None for a missing object.

    :raise S3StorageError: one cannot be told
    """
    readers = [value.reader for value in values]
    if not readers:
        return []
    storage = readers[0].storage
    # Such a download may need the engine itself.
    do_all = map if storage.downloads_by_itself else storage.engine.map
    answers = do_all(_try_length, readers)
    return [
        _length(reader, answer) for reader, answer in zip(readers, answers, strict=True)
    ]


def _try_length(reader: Reader) -> int | S3StorageError:
    try:
        return reader.length()
    except S3StorageError as error:
        return error


def _length(reader: Reader, answer: int | S3StorageError) -> int | None:
    if isinstance(answer, int):
        return answer
    try:
        with reader.reporting():
            raise answer
    except ObjectMissing:
        return None


class Unread:
    """The values that have not been loaded, by bucket and keys that they may read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[
            tuple[str, str], weakref.WeakValueDictionary[int, LazyBinary]
        ] = {}
        self._many = 1000

    def add(self, value: LazyBinary, keys: Iterable[tuple[str, str]]) -> None:
        with self._lock:
            if len(self._values) > self._many:
                self._values = {key: some for key, some in self._values.items() if some}
                self._many = 2 * len(self._values) + 1000
            for key in keys:
                some = self._values.setdefault(key, weakref.WeakValueDictionary())
                some[id(value)] = value

    def pop(self, key: tuple[str, str]) -> list[LazyBinary]:
        """Those that may read this."""
        with self._lock:
            return list(self._values.pop(key, {}).values())
