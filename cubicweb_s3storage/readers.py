"""Reading what a row names, also after its transaction has ended."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from cubicweb.server.session import Connection

from cubicweb_s3storage import rows
from cubicweb_s3storage.answers import explained, is_missing
from cubicweb_s3storage.contents import Fetched
from cubicweb_s3storage.errors import ObjectMissing, S3StorageError
from cubicweb_s3storage.objects import ObjectRef
from cubicweb_s3storage.uploads import last_upload

if TYPE_CHECKING:
    from cubicweb_s3storage.storages import S3Storage

logger = logging.getLogger("cube.s3storage.readers")

T = TypeVar("T")


class Reader:
    """Reads the object that a row names: the first that is there of some.

    Its methods raise `ObjectMissing` when S3 answers that none is there, another
    `S3StorageError` when it cannot be told.

    :param value: what the row holds
    :param refs: the objects that it may name
    :param error: why none is there, when that is known
    """

    def __init__(
        self,
        storage: S3Storage,
        cnx: Connection,
        value: str,
        refs: list[ObjectRef],
        error: ObjectMissing | None = None,
    ) -> None:
        self.storage = storage
        self.refs = refs
        self._value = value
        self._upload = last_upload(cnx, storage.bucket, value)
        self._repo = cnx.repo
        self._cnx = weakref.ref(cnx)
        self._error = error
        self._is_reported = False
        self._kept: bytes | None = None
        self.found: ObjectRef | None = None
        self._pid = os.getpid()

    def keep(self, content: bytes) -> None:
        """Read this from now on: its object goes."""
        self._kept = content

    @property
    def held(self) -> bytes | None:
        """The content, while it is in memory."""
        if self._kept is not None:
            return self._kept
        if self._upload is None or self.storage.downloads_by_itself:
            return None
        return self._upload.pending

    def content(self) -> bytes:
        """The content."""
        if (held := self.held) is not None:
            return held
        return self._first(self.storage.read_object)

    def fetch_if(self, admits: Callable[[int], bool]) -> Fetched | None:
        """The content, see `Contents.fetch_if`."""
        contents = self.storage.contents
        return self._first(lambda ref: contents.fetch_if(ref, admits))

    def is_at_hand(self) -> bool:
        """Whether no request is needed for the content."""
        if self.held is not None:
            return True
        if self._error is not None or self.storage.downloads_by_itself:
            return False
        return self.storage.contents.is_at_hand(self._candidates()[0])

    def chunks(self) -> Iterator[bytes]:
        """The content in pieces, in constant memory."""
        if self.held is not None or self.storage.downloads_by_itself:
            return iter([self.content()])
        return self._first(self.storage.contents.chunks)

    def length(self) -> int:
        """How many bytes the content has."""
        if self.held is not None or self.storage.downloads_by_itself:
            return len(self.content())
        return self._first(self.storage.contents.length)

    def find(self) -> ObjectRef:
        """The object that is there, which `found` is from now on.

        It is not asked for when it can be but one.
        """
        candidates = self._candidates()
        if len(candidates) > 1:

            def look_for(ref: ObjectRef) -> ObjectRef:
                self.storage.contents.length(ref)
                return ref

            candidates = [self._first(look_for)]
        self.found = candidates[0]
        return self.found

    def content_in_a_job(self) -> bytes | None:
        """The content, None if it is long."""
        if (held := self.held) is not None:
            return held
        fetched = self.fetch_if(lambda size: True)
        return fetched and fetched.content

    @property
    def may_read_ahead(self) -> bool:
        """Whether a thread can read it without waiting for other threads."""
        ready = self._upload is None or self._upload.has_finished
        known = self._error or self.held is not None
        return ready and not known and not self.storage.downloads_by_itself

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Errors say whose value it is; a missing object is logged, once.

        To be used where the transaction is.
        """
        try:
            yield
        except S3StorageError as error:
            error.subject = error.subject or self._subject()
            if isinstance(error, ObjectMissing) and not self._is_reported:
                self._is_reported = True
                self._error = error
                logger.critical("%s", error)
            raise

    def _first(self, request: Callable[[ObjectRef], T]) -> T:
        if self._error is not None:
            raise self._error
        bucket = self.storage.bucket
        missing = None
        for ref in self._candidates():
            try:
                with explained("read the object", bucket, str(ref)):
                    return request(ref)
            except S3StorageError as error:
                if not is_missing(error, ref.version_id):
                    raise
                missing = missing or error
        staging_key = self.storage.staged_before_a_crash(self._value)
        if staging_key is None:
            raise missing
        logger.warning("Reading %s/%s from %s", bucket, self._value, staging_key)
        return request(ObjectRef(staging_key))

    def _candidates(self) -> list[ObjectRef]:
        if self._upload is not None:
            self._upload.confirm()
            if self._upload.staging_key or self._upload.version_follows:
                return [self._upload.ref]
        return self.refs

    def _subject(self) -> str:
        bucket = self.storage.bucket
        attributes = rows.attributes(self._repo, bucket)
        names = [f"{etype}, attribute {attr}" for etype, attr in attributes]
        cnx = self._cnx()
        if cnx is not None and cnx.cnxset is not None and self._pid == os.getpid():
            try:
                values = {self._value}
                if self._upload is not None:
                    values.add(self._upload.row_value)
                held_by = rows.holders(cnx, bucket, values)
                names = [str(holder) for holder in held_by] or names
            except self._repo.system_source.DbapiError:
                pass  # as in a transaction that has failed
        return "; ".join(names[:3])
