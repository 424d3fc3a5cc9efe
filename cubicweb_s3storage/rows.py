"""What the database knows about keys: the rows that name them, and locks on them.

Everything runs on a cursor of its own: the one that CubicWeb shares may be in
the middle of a result set, whose values are being read.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import NamedTuple

from cubicweb.server.repository import Repository
from cubicweb.server.session import Connection

from cubicweb_s3storage.errors import subject

#: values per query
BATCH = 500
#: advisory locks per bucket. A transaction that writes a hundred thousand keys
#: must not need as many locks: PostgreSQL has room for some thousands in all.
STRIPES = 128
#: how long a transaction waits for another one's moves
MOVE_TIMEOUT = "60s"
MOVE_LOCKS = "s3storage_move_locks"


class Holder(NamedTuple):
    """An attribute whose row holds this value."""

    value: str
    etype: str
    eid: int
    attr: str

    def __str__(self) -> str:
        return subject(self.etype, self.eid, self.attr)


def attributes(repo: Repository, bucket: str) -> Iterator[tuple[str, str]]:
    """Entity types and the names of their attributes that are kept in this bucket."""
    for etype, storages in repo.system_source._storages.items():
        for attr, storage in storages.items():
            if getattr(storage, "bucket", None) == bucket:
                yield etype, attr


def is_written_elsewhere(cnx: Connection, eid: int) -> bool:
    """Whether the row of a new entity is not part of this transaction.

    So with `cubicweb.dataimport.pgstore.SQLGenSourceWrapper`, which commits rows on a
    connection of its own.
    """
    if cnx.added_in_transaction(eid):
        return False
    return not _select(cnx, "SELECT 1 FROM entities WHERE eid=%(eid)s", {"eid": eid})


def held_value(cnx: Connection, etype: str, eid: int, attr: str) -> bytes | None:
    """What the row holds, whoever is asking."""
    sql = f"SELECT cw_{attr} FROM cw_{etype} WHERE cw_eid=%(eid)s"
    values = [value for (value,) in _select(cnx, sql, {"eid": eid})]
    return bytes(values[0]) if values and values[0] is not None else None


def replace(
    cnx: Connection, etype: str, attr: str, changes: Iterable[tuple[int, str, str]]
) -> None:
    """Have rows hold another value, unless they do so already.

    :param changes: eids, the values that the rows hold, and the new ones
    """
    binary = cnx.repo.system_source._binary
    sql = (
        f"UPDATE cw_{etype} SET cw_{attr}=%(new)s"
        f" WHERE cw_eid=%(eid)s AND cw_{attr}=%(old)s"
    )
    args = [
        {"eid": eid, "old": binary(old.encode()), "new": binary(new.encode())}
        for eid, old, new in changes
    ]
    with closing(cnx.cnxset.cnx.cursor()) as cursor:
        cursor.executemany(sql, args)


def holders(cnx: Connection, bucket: str, values: Iterable[str]) -> list[Holder]:
    """The attributes kept in this bucket whose rows hold one of the values."""
    return list(_holders(cnx, bucket, "{column}", values))


def holders_of_parts(
    cnx: Connection, bucket: str, separator: str, parts: Iterable[str]
) -> list[Holder]:
    """Those whose rows hold one of the texts, then the separator, then anything."""
    place = "instr({column}, %(separator)s)"
    if _is_postgres(cnx):
        place = "position(%(separator)s in {column})"
    part = f"CASE WHEN {place} > 0 THEN substr({{column}}, 1, {place} - 1) END"
    return list(_holders(cnx, bucket, part, parts, separator=separator))


def _holders(
    cnx: Connection, bucket: str, expression: str, values: Iterable[str], **named: str
) -> Iterator[Holder]:
    binary = cnx.repo.system_source._binary
    remaining = iter(dict.fromkeys(values))
    while batch := list(islice(remaining, BATCH)):
        args = {f"v{n}": value for n, value in enumerate(batch)}
        wanted = ", ".join(f"%({name})s" for name in args)
        args = {name: binary(text.encode()) for name, text in (args | named).items()}
        for etype, attr in attributes(cnx.repo, bucket):
            column = f"cw_{attr}"
            where = f"{expression.replace('{column}', column)} IN ({wanted})"
            sql = f"SELECT {column}, cw_eid FROM cw_{etype} WHERE {where}"
            for value, eid in _select(cnx, sql, args):
                yield Holder(bytes(value).decode(), etype, eid, attr)


def share_lock(cnx: Connection, bucket: str, key: str) -> None:
    """Keep others from removing the object until this transaction ends.

    Only on PostgreSQL: several processes share no other database.
    """
    if _is_postgres(cnx):
        sql = "SELECT pg_advisory_xact_lock_shared(%(space)s, %(stripe)s)"
        args = {"space": _lock_space(bucket), "stripe": _stripe(key)}
        _select(cnx, sql, args)


def try_lock(cnx: Connection, bucket: str, keys: Iterable[str]) -> set[str]:
    """Those of the keys that no other transaction has locked, now locked by this one.

    Nor is another one about to move an object there. Never waits, so that it cannot
    be part of a deadlock.
    """
    keys = set(keys)
    if not _is_postgres(cnx):
        return keys
    sql = (
        "SELECT stripe FROM unnest(%(stripes)s) AS stripe"
        " WHERE pg_try_advisory_xact_lock(%(space)s, stripe)"
        " AND pg_try_advisory_xact_lock(%(moves)s, stripe)"
    )
    stripes = sorted({_stripe(key) for key in keys})
    args = {
        "space": _lock_space(bucket),
        "moves": _lock_space(f"{bucket} moves"),
        "stripes": stripes,
    }
    locked = {stripe for (stripe,) in _select(cnx, sql, args)}
    return {key for key in keys if _stripe(key) in locked}


def lock_moves(cnx: Connection, bucket: str, keys: Iterable[str]) -> None:
    """Wait until no other transaction is about to move objects to these keys.

    Two transactions that replace one object thus move theirs in the order of their
    commits. Only on PostgreSQL. Outlives the commit, until `unlock_moves`.
    """
    if _is_postgres(cnx):
        stripes = sorted({_stripe(key) for key in keys})
        lock = _MoveLock(cnx, _lock_space(f"{bucket} moves"), stripes)
        cnx.transaction_data.setdefault(MOVE_LOCKS, []).append(lock)
        lock.take()


def unlock_moves(cnx: Connection) -> None:
    """Let others move objects. Ends the SQL transaction of the connection."""
    for lock in cnx.transaction_data.pop(MOVE_LOCKS, ()):
        lock.release()


class _MoveLock:
    """Advisory locks of a session, given back with the data of its transaction.

    CubicWeb drops these data, but calls no operation, when COMMIT fails.
    """

    def __init__(self, cnx: Connection, space: int, stripes: list[int]) -> None:
        self._cnxset = cnx.cnxset
        self._error = cnx.repo.system_source.DbapiError
        self._args = {"space": space, "stripes": stripes, "timeout": MOVE_TIMEOUT}
        self._taken = False
        self._pid = os.getpid()

    def take(self) -> None:
        self._taken = True  # some of them, should this fail
        self._execute("SET LOCAL lock_timeout = %(timeout)s")
        self._on_stripes("pg_advisory_lock")
        self._execute("SET LOCAL lock_timeout TO DEFAULT")

    def release(self) -> None:
        if self._taken and self._pid == os.getpid():
            self._taken = False
            try:
                self._cnxset.rollback()
                self._on_stripes("pg_advisory_unlock")
                self._cnxset.rollback()
            except self._error:
                pass  # a lost connection has lost its locks

    __del__ = release

    def _on_stripes(self, function: str) -> None:
        stripes = "unnest(%(stripes)s) AS stripe"
        self._execute(f"SELECT {function}(%(space)s, stripe) FROM {stripes}")

    def _execute(self, sql: str) -> None:
        with self._cnxset.cnx.cursor() as cursor:
            cursor.execute(sql, self._args)


def _select(cnx: Connection, sql: str, args: dict) -> list[tuple]:
    with closing(cnx.cnxset.cnx.cursor()) as cursor:
        cursor.execute(sql, args)
        return cursor.fetchall()


def _is_postgres(cnx: Connection) -> bool:
    return cnx.repo.system_source.dbdriver == "postgres"


def _lock_space(bucket: str) -> int:
    return _signed(zlib.crc32(f"cubicweb-s3storage {bucket}".encode()))


def _stripe(key: str) -> int:
    return zlib.crc32(key.encode()) % STRIPES


def _signed(number: int) -> int:
    """The advisory locks of PostgreSQL are signed integers of 32 bits."""
    return number - 2**32 if number >= 2**31 else number
