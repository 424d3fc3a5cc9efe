"""Contents of objects: from the cache on local disk, else from S3."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

from cubicweb_s3storage.cache import Cache
from cubicweb_s3storage.downloads import MAX_SINGLE, NotModified
from cubicweb_s3storage.errors import ObjectMissing
from cubicweb_s3storage.objects import ObjectRef
from cubicweb_s3storage.s3 import Bucket

logger = logging.getLogger("cube.s3storage.contents")


class Contents:
    """The contents of the objects of one bucket.

    An object that cannot change is not asked for again once it is in the cache; for
    another one, S3 is asked whether it has changed.

    :param objects: the bucket
    :param cache: where contents are kept
    :param is_immutable: whether an object never changes
    """

    def __init__(
        self,
        objects: Bucket,
        cache: Cache,
        is_immutable: Callable[[ObjectRef], bool],
    ) -> None:
        self._objects = objects
        self._cache = cache
        self._is_immutable = is_immutable

    def read(self, ref: ObjectRef) -> bytes:
        """The content.

        :raise S3StorageError: it cannot be read
        """
        return self._read(ref, lambda length: True)

    def read_if(self, ref: ObjectRef, admits: Callable[[int], bool]) -> bytes | None:
        """The content, or None when it is long or `admits` refuses its length."""
        return self._read(ref, lambda length: length <= MAX_SINGLE and admits(length))

    def cached(self, ref: ObjectRef) -> bytes | None:
        """The content, when S3 need not be asked."""
        if not self._is_immutable(ref):
            return None
        found = self._cache.read(self._name(ref))
        return found and found[1]

    def chunks(self, ref: ObjectRef) -> Iterator[bytes]:
        """The content in pieces, in constant memory.

        :raise S3StorageError: it cannot be read
        """
        found = self._cache.open(self._name(ref))
        if found and self._is_immutable(ref):
            return found.chunks()
        known = {"IfNoneMatch": found.etag} if found else {}
        try:
            download = self._objects.download(ref, **known)
        except NotModified:
            return found.chunks()
        except BaseException:
            if found:
                found.close()
            raise
        if found:
            found.close()
        return self._keeping(ref, download)

    def length(self, ref: ObjectRef) -> int:
        """How many bytes the object has.

        :raise S3StorageError: that cannot be told
        """
        if self._is_immutable(ref) and (found := self._cache.peek(self._name(ref))):
            return found[1]
        head = self._objects.head(ref)
        if head is None:
            raise ObjectMissing(
                "S3 answers that the object is not there",
                bucket=self._objects.name,
                key=str(ref),
                remedy="Restore the object from a backup or another version",
            )
        return head["ContentLength"]

    def remember(self, ref: ObjectRef, etag: str, content: bytes) -> None:
        """What has been written need not be fetched."""
        self._cache.write(self._name(ref), etag, content)

    def forget(self, refs: Iterable[ObjectRef]) -> None:
        """What has been removed need not be kept."""
        self._cache.drop(self._name(ref) for ref in refs)

    def _read(self, ref: ObjectRef, admits: Callable[[int], bool]) -> bytes | None:
        name = self._name(ref)
        found = self._cache.read(name)
        if found and self._is_immutable(ref):
            return found[1]
        try:
            known = {"IfNoneMatch": found[0]} if found else {}
            download = self._objects.download(ref, **known)
        except NotModified:
            return found[1]
        if not admits(download.length):
            download.close()
            return None
        content = download.content()
        logger.info("Read %s/%s, %s bytes", self._objects.name, ref, len(content))
        self._cache.write(name, download.etag, content)
        return content

    def _keeping(self, ref: ObjectRef, download) -> Iterator[bytes]:
        name, size = self._name(ref), download.length
        with self._cache.writer(name, download.etag, size) as copy:
            for chunk in download.chunks():
                copy.write(chunk)
                yield chunk

    def _name(self, ref: ObjectRef) -> str:
        endpoint = self._objects.client.meta.endpoint_url
        parts = (endpoint, self._objects.name, ref.key, ref.version_id or "")
        return "\n".join(parts)
