"""Writing one value: under its key at once where that harms nobody, else staged."""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cubicweb.server.session import Connection

from cubicweb_s3storage import rows
from cubicweb_s3storage.errors import S3StorageError, subject
from cubicweb_s3storage.s3 import (
    MAX_KEY_LENGTH,
    AlreadyThere,
    ObjectRef,
    md5,
    real_version,
)

if TYPE_CHECKING:
    from cubicweb_s3storage.storages import S3Storage

logger = logging.getLogger("cube.s3storage.uploads")

HISTORY = "s3storage_uploads"


@dataclass(eq=False)
class Upload:
    """A value that the transaction writes.

    The first four fields are the tuple that cubicweb-s3storage 4.x kept.

    :param key: the final key, which the row names
    :param fresh: nobody else can know the key
    :param visible: what is written under the key would be read before the commit
    :param foreign: the application has written it by itself
    :param arguments: further arguments of boto3's `put_object`
    """

    storage: S3Storage
    key: str
    eid: int
    attr: str
    etype: str = ""
    fresh: bool = False
    visible: bool = False
    foreign: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    #: the key under which the content waits for the commit, when it has to
    staging_key: str = ""
    #: the version that was written, where the bucket keeps versions
    version_id: str | None = None
    #: there was no object under the key
    created: bool = False
    #: there was an object with this content under the key
    shared: bool = False
    md5: str = ""
    #: why S3 has not confirmed the upload
    error: S3StorageError | None = None

    @property
    def ref(self) -> ObjectRef:
        """The object that was written."""
        return ObjectRef(self.staging_key or self.key, self.version_id)

    @property
    def subject(self) -> str:
        return subject(self.etype or "entity", self.eid, self.attr)

    @property
    def is_ours_alone(self) -> bool:
        """Whether nobody else can know the key under which the content is."""
        return self.fresh or bool(self.staging_key)

    @property
    def replaces(self) -> bool:
        """Whether rows that hold the key may come to read another content."""
        if self.fresh or self.foreign:
            return False
        new_version = self.version_id and not self.created and not self.shared
        return bool(self.staging_key or new_version)

    def send(self, cnx: Connection, content: bytes) -> None:
        """Write the content so that nothing which is committed changes.

        :raise S3StorageError: S3 has not confirmed the upload; `error` keeps it
        """
        register(cnx, self)
        try:
            if not self.fresh:
                self._send_where_others_may_write(cnx, content)
            elif self.storage.stages_every_write(cnx):
                self._stage(content)
            else:
                self._put(content)
        except S3StorageError as error:
            self.error = error
            raise

    def _send_where_others_may_write(self, cnx: Connection, content: bytes) -> None:
        self.md5 = md5(content)
        rows.share_lock(cnx, self.storage.bucket, self.key)
        stages = self.visible or self.storage.stages_every_write(cnx)
        head = self._head()
        if head is None and not stages:
            if self._put_new(cnx, content):
                return
            head = self._head()
        self.created = head is None
        self.shared = self._is_content_of(head, content)
        adds_version = self.storage.keeps_versions(cnx) and real_version(head)
        if not stages and (self.shared or adds_version):
            # A shared object is written again, too: its age tells garbage
            # collection that somebody wants it.
            self._put(content)
        else:
            self._stage(content)

    def _put_new(self, cnx: Connection, content: bytes) -> bool:
        """Write the object unless another transaction was faster."""
        self.created = True
        objects = self.storage.objects
        try:
            self.version_id = objects.put_new(
                self.key, content, self.arguments
            ).version_id
        except AlreadyThere as obstacle:
            # An earlier attempt of ours may have had its effect, its answer lost.
            # A version, however, has to be ours for certain.
            self.created = (
                obstacle.retried
                and not self.storage.keeps_versions(cnx)
                and self._is_content_of(self._head(), content)
            )
        return self.created

    def _head(self) -> dict[str, Any] | None:
        return self.storage.objects.head(ObjectRef(self.key), self.arguments)

    def _is_content_of(self, head: dict[str, Any] | None, content: bytes) -> bool:
        objects = self.storage.objects
        return head is not None and objects.holds(
            self.key, content, head, self.arguments
        )

    def _stage(self, content: bytes) -> None:
        self.staging_key = new_staging_key(self.storage, self.key)
        self._put(content)

    def _put(self, content: bytes) -> None:
        objects = self.storage.objects
        written = objects.put(self.ref.key, content, self.arguments)
        self.version_id = written.version_id
        if self.is_ours_alone and written.version_id and written.retried:
            self._remove_other_attempts()

    def _remove_other_attempts(self) -> None:
        objects = self.storage.objects
        try:
            attempts = set(objects.versions(self.ref.key)) - {self.ref}
            failures = objects.delete(attempts)
        except S3StorageError as error:
            failures = {self.ref: str(error)}
        for ref, reason in failures.items():
            logger.warning("Earlier attempts to write %s may stay: %s", ref, reason)


def uploaded_by_application(
    cnx: Connection, storage: S3Storage, key: str, eid: int, attr: str
) -> Upload:
    """An upload that a subclass has made itself, as those written for 4.x may.

    With `s3-transaction-suffix-key`, under the suffixed key.
    """
    upload = Upload(storage, key, eid, attr, foreign=True, created=True)
    if storage.stages_every_write(cnx):
        upload.staging_key = storage.suffixed_key(key)
    register(cnx, upload)
    return upload


def is_known(
    cnx: Connection, storage: S3Storage, key: str, eid: int, attr: str
) -> bool:
    """Whether the transaction has registered this upload already."""
    uploads = history(cnx).get((storage.bucket, key), ())
    return any((upload.eid, upload.attr) == (eid, attr) for upload in uploads)


def history(cnx: Connection) -> dict[tuple[str, str], list[Upload]]:
    """The uploads of the transaction by bucket and key, in order."""
    return cnx.transaction_data.setdefault(HISTORY, {})


def register(cnx: Connection, upload: Upload) -> None:
    """Have the transaction know that it writes this."""
    key = upload.storage.bucket, upload.key
    history(cnx).setdefault(key, []).append(upload)


def last_upload(cnx: Connection, bucket: str, key: str) -> Upload | None:
    """The upload that this transaction's reads of the key see, if there is one."""
    uploads = history(cnx).get((bucket, key))
    return uploads[-1] if uploads else None


def new_staging_key(storage: S3Storage, key: str) -> str:
    """A key that no other transaction uses and that tells the final key."""
    return f"{staging_prefix(storage, key)}{uuid.uuid4().hex}"


def staging_prefix(storage: S3Storage, key: str) -> str:
    """What the staging keys of a key start with."""
    prefix = f"{storage.suffixed_key(key)}."
    if len(prefix.encode()) + 32 > MAX_KEY_LENGTH:
        digest = hashlib.sha256(key.encode()).hexdigest()
        prefix = f"{storage.suffixed_key(digest)}."
    return prefix
