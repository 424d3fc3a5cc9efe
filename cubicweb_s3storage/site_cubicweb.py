"""Options of the instance, and the RQL function STKEY."""

from functools import partial
from typing import NoReturn

from cubicweb import Binary
from cubicweb.server.sources.rql2sql import LENGTH
from logilab.database import FunctionDescr
from rql.utils import register_function

from cubicweb_s3storage.values import length

options = (
    (
        "s3-auto-delete",
        {
            "type": "yn",
            "default": True,
            "help": "Remove the S3 object of a value when the value is replaced or "
            "its entity is deleted. With no, objects are kept for ever.",
            "group": "s3",
            "level": 2,
        },
    ),
    (
        "s3-transaction-suffix-key",
        {
            "type": "yn",
            "default": False,
            "help": "Upload every value under a temporary key, the final key with a "
            "suffix, and move it to the final key after the commit. Useful when "
            "others read the bucket and must see committed values only.",
            "group": "s3",
            "level": 2,
        },
    ),
    (
        "s3-activate-object-versioning",
        {
            "type": "yn",
            "default": False,
            "help": "Keep key and version id of the S3 object in the database, so "
            "that each row names one version. The bucket's versioning must be "
            "enabled too.",
            "group": "s3",
            "level": 2,
        },
    ),
    (
        "s3-cache-size",
        {
            "type": "bytes",
            "default": 256 * 2**20,
            "help": "Local disk space for copies of S3 objects that have been read or "
            "written, shared by the processes of the instance on this host. 0 turns "
            "the cache off.",
            "group": "s3",
            "level": 2,
        },
    ),
    (
        "s3-cache-directory",
        {
            "type": "string",
            "default": "",
            "help": "Directory of that cache, which only the user that the instance "
            "runs as may read; by default s3cache in the instance's data directory.",
            "group": "s3",
            "level": 2,
        },
    ),
)


class STKEY(FunctionDescr):
    """The key, in UTF-8, of the object that holds the value of an attribute."""

    rtype = "Bytes"

    def update_cb_stack(self, stack: list) -> None:
        from cubicweb_s3storage.storages import S3Storage

        (callback,) = stack
        storage = getattr(callback, "__self__", None)
        if not isinstance(storage, S3Storage):
            self.as_sql(None, ())
        stack[0] = partial(self.source_execute, storage)

    def as_sql(self, backend, args) -> NoReturn:
        raise NotImplementedError(
            "STKEY() is the key of an attribute that is held by an S3Storage, and "
            "this attribute is not"
        )

    def source_execute(self, storage, source, cnx, value) -> Binary:
        raw = source.binary_to_str(value)
        try:
            key = raw.decode()
        except UnicodeDecodeError:
            return Binary(raw)
        return Binary(storage.committed_value(cnx, key).encode())


register_function(STKEY)

# Without reading the values that an S3Storage holds.
LENGTH.source_execute = length
