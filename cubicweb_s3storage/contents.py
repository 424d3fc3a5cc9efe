"""Contents of objects: from the cache on local disk, else from S3."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from cubicweb_s3storage.cache import Cache
from cubicweb_s3storage.downloads import MAX_SINGLE, Download, NotModified
from cubicweb_s3storage.errors import ObjectMissing
from cubicweb_s3storage.objects import ObjectRef
from cubicweb_s3storage.s3 import Bucket

logger = logging.getLogger("cube.s3storage.contents")


class Fetched(NamedTuple):
    """The content of an object, and whether the cache has it not."""

    ref: ObjectRef
    etag: str
    content: bytes
    is_new: bool


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
        fetched = self._fetch(ref, lambda length: True)
        self.keep(fetched)
        return fetched.content

    def fetch_if(self, ref: ObjectRef, admits: Callable[[int], bool]) -> Fetched | None:
        """The content, for who will `keep` it.

        :return: None when it is long or `admits` refuses its length in bytes
        """
        return self._fetch(ref, lambda length: length <= MAX_SINGLE and admits(length))

    def keep(self, fetched: Fetched) -> None:
        """Have a content in the cache.

        To be called where the content is used: if all threads that fetch contents did
        so, Python would switch between them at each call of the operating system.
        """
        if fetched.is_new:
            self.remember(fetched.ref, fetched.etag, fetched.content)

    def is_at_hand(self, ref: ObjectRef) -> bool:
        """Whether S3 need not be asked for the content."""
        return self._is_immutable(ref) and self._cache.peek(self._name(ref)) is not None

    def chunks(self, ref: ObjectRef) -> Iterator[bytes]:
        """The content in pieces, in constant memory.

        :raise S3StorageError: it cannot be read
        """
        found = self._cache.open(self._name(ref))
        if found and self._is_immutable(ref):
            return found.chunks()
        known = {"IfNoneMatch": found.etag} if found and found.etag else {}
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

    def _fetch(self, ref: ObjectRef, admits: Callable[[int], bool]) -> Fetched | None:
        found = self._cache.read(self._name(ref))
        if found and self._is_immutable(ref):
            return Fetched(ref, *found, is_new=False)
        try:
            known = {"IfNoneMatch": found[0]} if found and found[0] else {}
            download = self._objects.download(ref, **known)
        except NotModified:
            return Fetched(ref, *found, is_new=False)
        if not admits(download.length):
            download.close()
            return None
        content = download.content()
        logger.info("Read %s/%s, %s bytes", self._objects.name, ref, len(content))
        return Fetched(ref, download.etag, content, is_new=True)

    def _keeping(self, ref: ObjectRef, download: Download) -> Iterator[bytes]:
        name, size = self._name(ref), download.length
        with self._cache.writer(name, download.etag, size) as copy:
            for chunk in download.chunks():
                copy.write(chunk)
                yield chunk

    def _name(self, ref: ObjectRef) -> str:
        endpoint = self._objects.client.meta.endpoint_url
        # What may change is not believed by who takes it for something that cannot.
        kind = "immutable" if self._is_immutable(ref) else "changing"
        parts = (endpoint, self._objects.name, kind, ref.key, ref.version_id or "")
        return "\n".join(parts)
