"""The content of one object: a plain GET, and ranges beside it when it is long."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from io import BytesIO
from itertools import count, islice
from mmap import mmap
from typing import Any

from botocore.client import BaseClient
from botocore.exceptions import ClientError
from botocore.response import StreamingBody
from s3transfer.utils import S3_RETRYABLE_DOWNLOAD_ERRORS

from cubicweb_s3storage.answers import error_code, explained, explanation
from cubicweb_s3storage.engine import Engine
from cubicweb_s3storage.errors import S3StorageError
from cubicweb_s3storage.objects import ObjectRef

logger = logging.getLogger("cube.s3storage.downloads")

#: bytes up to which an object comes in one answer
MAX_SINGLE = 16 * 2**20
#: bytes of each range of an object that is read whole
RANGE = 8 * 2**20
#: bytes of each range of an object that is streamed, and ranges fetched ahead: all
#: that streaming keeps in memory
STREAM_RANGE = 2 * 2**20
STREAM_AHEAD = 10
#: bytes read from the network at a time
CHUNK = 64 * 2**10
#: requests for the same bytes, when connections break before all have come
ATTEMPTS = 5


class NotModified(Exception):
    """The object still has the ETag that the caller knows."""


class _Changed(Exception):
    """The object has been replaced since the first answer."""


class Download:
    """An object, as the answer to the first GET tells it.

    What is read later is of the same object, or an error is raised.

    :param engine: makes further requests beside each other
    :param arguments: arguments of boto3's `get_object`
    :raise NotModified: it has the ETag in the argument `IfNoneMatch`
    :raise S3StorageError: it cannot be read
    """

    def __init__(
        self, client: BaseClient, engine: Engine, arguments: dict[str, Any]
    ) -> None:
        self._client = client
        self._engine = engine
        self._arguments = arguments
        try:
            self._open()
        except _Changed as error:
            raise S3StorageError(
                "The object has not the ETag in IfMatch", **self._place
            ) from error

    def _open(self) -> None:
        answer = self._get(**self._arguments)
        self.etag: str = answer["ETag"]
        self.length: int = answer["ContentLength"]
        self._body: StreamingBody = answer["Body"]

    def close(self) -> None:
        """Leave unread what has not been read."""
        self._body.close()

    def content(self) -> bytes:
        """All of it."""
        # Who reads a short object may be a job, which must not wait for others.
        may_wait, attempt = self._is_long, 1
        while True:
            try:
                if may_wait and self._is_long:
                    return self._content_in_ranges()
                return self._content_at_once()
            except _Changed as error:
                if attempt == ATTEMPTS:
                    raise self._keeps_changing() from error
                attempt += 1
                self._arguments.pop("IfNoneMatch", None)  # nobody expects NotModified
                self._open()

    def chunks(self) -> Iterator[bytes]:
        """All of it, in order, in constant memory."""
        try:
            if self._is_long:
                yield from self._ranges_in_order()
            else:
                yield from self._pieces(0, self.length, self._body)
        except _Changed as error:
            raise self._keeps_changing() from error
        finally:
            self.close()

    @property
    def _is_long(self) -> bool:
        return self.length > MAX_SINGLE and "Range" not in self._arguments

    def _content_at_once(self) -> bytes:
        body, attempt = self._body, 1
        while True:
            try:
                return body.read()
            except S3_RETRYABLE_DOWNLOAD_ERRORS as error:
                self._note(error, attempt)
                attempt += 1
                body = self._get(**self._same_object)["Body"]

    def _content_in_ranges(self) -> bytes:
        content = BytesIO()
        content.seek(self.length - 1)
        content.write(b"\0")
        with content.getbuffer() as buffer:
            first, *others = self._ranges(RANGE)
            jobs = [
                self._engine.start_at_once(self._fill, buffer, *part) for part in others
            ]
            try:
                self._fill(buffer, *first, self._body)
                self.close()
                for job in jobs:
                    job.result()
            finally:
                self._engine.stop(jobs)
        return content.getvalue()

    def _ranges_in_order(self) -> Iterator[bytes]:
        first, *others = self._ranges(STREAM_RANGE)
        remaining = iter(others)
        jobs = deque(self._fetch(part) for part in islice(remaining, STREAM_AHEAD))
        try:
            yield from self._pieces(*first, self._body)
            self.close()
            while jobs:
                with jobs.popleft().result() as part:
                    while piece := part.read(CHUNK):
                        yield piece
                jobs.extend(self._fetch(part) for part in islice(remaining, 1))
        finally:
            # Not waited for: the garbage collector may close this in one of them.
            for job in jobs:
                job.cancel()

    def _fetch(self, part: tuple[int, int]) -> Future[mmap]:
        return self._engine.start_at_once(self._part, *part)

    def _part(self, start: int, end: int) -> mmap:
        # Goes back to the system at once: what malloc keeps for each thread adds up.
        content = mmap(-1, end - start)
        for piece in self._pieces(start, end):
            content.write(piece)
        content.seek(0)
        return content

    def _fill(
        self,
        buffer: memoryview,
        start: int,
        end: int,
        body: StreamingBody | None = None,
    ) -> None:
        for piece in self._pieces(start, end, body):
            buffer[start : start + len(piece)] = piece
            start += len(piece)

    def _pieces(
        self, start: int, end: int, body: StreamingBody | None = None
    ) -> Iterator[bytes]:
        """The bytes of a range; goes on where a connection has broken."""
        for attempt in count(1):
            try:
                while start < end:
                    if body is None:
                        body = self._get_range(start, end)
                    piece = body.read(min(CHUNK, end - start))
                    if not piece:
                        raise ConnectionError("the answer is too short")
                    start += len(piece)
                    yield piece
                return
            except S3StorageError:
                raise  # some of them are connection errors
            except S3_RETRYABLE_DOWNLOAD_ERRORS as error:
                self._note(error, attempt)
                body = None

    def _ranges(self, size: int) -> list[tuple[int, int]]:
        starts = range(0, self.length, size)
        return [(start, min(start + size, self.length)) for start in starts]

    @property
    def _same_object(self) -> dict[str, Any]:
        arguments = {**self._arguments, "IfMatch": self.etag}
        arguments.pop("IfNoneMatch", None)
        return arguments

    def _get_range(self, start: int, end: int) -> StreamingBody:
        answer = self._get(**self._same_object, Range=f"bytes={start}-{end - 1}")
        if "ContentRange" in answer:
            return answer["Body"]
        answer["Body"].close()
        raise S3StorageError("S3 does not send parts of objects", **self._place)

    def _get(self, **arguments: Any) -> dict[str, Any]:
        with explained("read the object", **self._place):
            try:
                return self._client.get_object(**arguments)
            except ClientError as error:
                if error_code(error) == "304":
                    raise NotModified from error
                if error_code(error) in ("412", "PreconditionFailed"):
                    raise _Changed from error
                raise

    @property
    def _place(self) -> dict[str, str]:
        ref = ObjectRef(self._arguments["Key"], self._arguments.get("VersionId"))
        return {"bucket": self._arguments["Bucket"], "key": str(ref)}

    def _note(self, error: Exception, attempt: int) -> None:
        """A connection has broken: go on, unless that has happened too often."""
        if attempt >= ATTEMPTS:
            raise explanation(error, "read the object", **self._place) from error
        logger.info("Reading %(bucket)s/%(key)s again", self._place, exc_info=error)

    def _keeps_changing(self) -> S3StorageError:
        return S3StorageError(
            "The object is replaced while it is read", remedy="Try again", **self._place
        )
