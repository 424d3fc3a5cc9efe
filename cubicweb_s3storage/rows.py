"""What the database knows about keys: the rows that name them, and locks on them.

Everything runs on a cursor of its own: the one that CubicWeb shares may be in
the middle of a result set, whose values are being read.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from cubicweb.server.session import Connection

from cubicweb_s3storage.errors import subject

#: values per query
BATCH = 500
#: advisory locks per bucket. A transaction that writes a hundred thousand keys
#: must not need as many locks: PostgreSQL has room for some thousands in all.
STRIPES = 128
#: how long a transaction waits for another one's moves
MOVE_TIMEOUT = "60s"


class Holder(NamedTuple):
    """An attribute whose row holds this value."""

    value: str
    etype: str
    eid: int
    attr: str

    def __str__(self) -> str:
        return subject(self.etype, self.eid, self.attr)


def held_value(cnx: Connection, etype: str, eid: int, attr: str) -> bytes | None:
    """What the row holds, whoever is asking."""
    sql = f"SELECT cw_{attr} FROM cw_{etype} WHERE cw_eid=%(eid)s"
    values = [value for (value,) in _select(cnx, sql, {"eid": eid})]
    return bytes(values[0]) if values and values[0] is not None else None


def holders(cnx: Connection, bucket: str, values: Iterable[str]) -> list[Holder]:
    """The attributes kept in this bucket whose rows hold one of the values."""
    source = cnx.repo.system_source
    found = []
    remaining = iter(dict.fromkeys(values))
    while batch := list(islice(remaining, BATCH)):
        args = {
            f"v{n}": source._binary(value.encode()) for n, value in enumerate(batch)
        }
        wanted = ", ".join(f"%({name})s" for name in args)
        for etype, attr in _attributes(cnx, bucket):
            column = f"cw_{attr}"
            sql = (
                f"SELECT {column}, cw_eid FROM cw_{etype} WHERE {column} IN ({wanted})"
            )
            for value, eid in _select(cnx, sql, args):
                found.append(Holder(bytes(value).decode(), etype, eid, attr))
    return found


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

    Never waits, so that it cannot be part of a deadlock.
    """
    keys = set(keys)
    if not _is_postgres(cnx):
        return keys
    sql = (
        "SELECT stripe FROM unnest(%(stripes)s) AS stripe"
        " WHERE pg_try_advisory_xact_lock(%(space)s, stripe)"
    )
    stripes = sorted({_stripe(key) for key in keys})
    args = {"space": _lock_space(bucket), "stripes": stripes}
    locked = {stripe for (stripe,) in _select(cnx, sql, args)}
    return {key for key in keys if _stripe(key) in locked}


def lock_moves(cnx: Connection, bucket: str, keys: Iterable[str]) -> None:
    """Wait until no other transaction is about to move objects to these keys.

    Two transactions that replace one object thus move theirs in the order of their
    commits. Outlives the commit: call `unlock_moves` as often.
    """
    if _is_postgres(cnx):
        ((timeout,),) = _select(cnx, "SELECT current_setting('lock_timeout')", {})
        set_timeout = "SELECT set_config('lock_timeout', %(timeout)s, true)"
        _select(cnx, set_timeout, {"timeout": MOVE_TIMEOUT})
        _on_stripes(cnx, "pg_advisory_lock", f"{bucket} moves", keys)
        _select(cnx, set_timeout, {"timeout": timeout})


def unlock_moves(cnx: Connection, bucket: str, keys: Iterable[str]) -> None:
    """Let others move objects to these keys."""
    if _is_postgres(cnx):
        _on_stripes(cnx, "pg_advisory_unlock", f"{bucket} moves", keys)


def _on_stripes(
    cnx: Connection, function: str, bucket: str, keys: Iterable[str]
) -> None:
    sql = f"SELECT {function}(%(space)s, stripe) FROM unnest(%(stripes)s) AS stripe"
    stripes = sorted({_stripe(key) for key in keys})
    _select(cnx, sql, {"space": _lock_space(bucket), "stripes": stripes})


def _attributes(cnx: Connection, bucket: str) -> Iterator[tuple[str, str]]:
    for etype, storages in cnx.repo.system_source._storages.items():
        for attr, storage in storages.items():
            if getattr(storage, "bucket", None) == bucket:
                yield etype, attr


def _select(cnx: Connection, sql: str, args: dict) -> list[tuple]:
    cursor = cnx.cnxset.cnx.cursor()
    try:
        cursor.execute(sql, args)
        return cursor.fetchall()
    finally:
        cursor.close()


def _is_postgres(cnx: Connection) -> bool:
    return cnx.repo.system_source.dbdriver == "postgres"


def _lock_space(bucket: str) -> int:
    return _signed(zlib.crc32(f"cubicweb-s3storage {bucket}".encode()))


def _stripe(key: str) -> int:
    return zlib.crc32(key.encode()) % STRIPES


def _signed(number: int) -> int:
    """The advisory locks of PostgreSQL are signed integers of 32 bits."""
    return number - 2**32 if number >= 2**31 else number
