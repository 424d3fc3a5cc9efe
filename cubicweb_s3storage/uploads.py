"""Writing one value: under its key at once where that harms nobody, else staged."""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cubicweb.server.session import Connection

from cubicweb_s3storage import rows
from cubicweb_s3storage.errors import (
    KeyConflict,
    ObjectMissing,
    S3StorageError,
    subject,
)
from cubicweb_s3storage.objects import MAX_KEY_LENGTH, ObjectRef
from cubicweb_s3storage.s3 import (
    AlreadyThere,
    Written,
    is_long,
    md5_as_written,
    real_version,
)

if TYPE_CHECKING:
    from cubicweb_s3storage.readers import Reader
    from cubicweb_s3storage.storages import S3Storage

logger = logging.getLogger("cube.s3storage.uploads")

HISTORY = "s3storage_uploads"
FAILURES = "s3storage_failed_uploads"


@dataclass(eq=False, slots=True)
class Upload:
    """A value that the transaction writes, in the background.

    The first four fields are the tuple that cubicweb-s3storage 4.x kept. Those after
    `arguments` are known when the upload has finished.

    :param key: the final key, which the row names
    :param fresh: nobody else can know the key
    :param visible: what is written under the key would be read before the commit
    :param foreign: the application has written it by itself
    :param detached: its row is committed on another connection, nobody knows when
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
    detached: bool = False
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
    error: BaseException | None = None
    #: a request may have had its effect
    begun: bool = False
    #: the process in which it runs; what a fork has copied never ends
    pid: int = field(default_factory=os.getpid)
    #: the content, while it is not known how the upload ends
    pending: bytes | None = None
    stages: bool = False
    adds_versions: bool = False
    #: the row names the key until the commit, when the version is known
    version_follows: bool = False
    _job: Future | None = None

    @property
    def ref(self) -> ObjectRef:
        """The object that was written."""
        return ObjectRef(self.staging_key or self.key, self.version_id)

    @property
    def named_version(self) -> str | None:
        """The version that the row names at last, once it is known."""
        return self.version_id if self.adds_versions and not self.staging_key else None

    @property
    def row_value(self) -> str:
        """What the row holds at last, once the version is known that it names."""
        if (version_id := self.named_version) is None:
            return self.key
        return self.storage.format_version_id_suffix(self.key, version_id)

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

    # in the transaction #######################################################

    def send(self, cnx: Connection, content: bytes | Reader) -> None:
        """Write the content, so that nothing which is committed changes.

        :param content: what a reader has found is copied; the key is fresh then
        :raise S3StorageError: it is known already that S3 does not keep it
        """
        if not self.fresh:
            # Which has waited for those before it.
            if earlier := last_upload(cnx, self.storage.bucket, self.key):
                earlier.finish()
            rows.share_lock(cnx, self.storage.bucket, self.key)
        register(cnx, self)
        self.adds_versions = self.storage.keeps_versions(cnx)
        self.stages = self.visible or (
            self.storage.stages_every_write(cnx) and not self.detached
        )
        failed = failures(cnx)
        has_bytes = isinstance(content, bytes)
        size = len(content) if has_bytes else 0
        if size and self._is_cached_at_once:
            # Nobody asks for it before the commit, and its ETag is never needed.
            self._remember(None, "", content)
        needs_version = self.adds_versions and not (
            self.fresh and self.storage.names_versions_later
        )
        # Long contents go in parts beside each other.
        if self.detached or needs_version or (has_bytes and is_long(content)):
            self._write(content, failed)
            self.confirm()
        else:
            if size:
                self.pending = content
            engine = self.storage.engine
            self._job = engine.start(size, self._write, content, failed)
            self.version_follows = self.adds_versions

    def finish(self) -> None:
        """Wait until it is known how the upload ends."""
        job = self._job
        if job is None:
            return
        if self.pid != os.getpid():
            self._end("The upload belongs to the process that has forked")
        else:
            try:
                job.result()
            except CancelledError:
                self._end("The upload was cancelled by a rollback")
                self.pending = None
        self._job = None

    def _end(self, problem: str) -> None:
        self.error = S3StorageError(problem, bucket=self.storage.bucket, key=self.key)

    @property
    def has_finished(self) -> bool:
        job = self._job
        return job is None or (self.pid == os.getpid() and job.done())

    def confirm(self) -> None:
        """Wait until S3 keeps the content.

        :raise S3StorageError: it does not
        """
        self.finish()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """Do not write it, if that has not begun."""
        if self._job is not None and self.pid == os.getpid():
            self._job.cancel()

    # in the background ########################################################

    def _write(self, content: bytes | Reader, failed: list[Upload]) -> None:
        self.begun = True
        try:
            if self.fresh and not self.stages:
                self._put(content)
            elif self.fresh:
                self._stage(content)
            else:
                self._write_where_others_may(content)
        except BaseException as error:  # noqa: BLE001, raised by confirm()
            if isinstance(error, S3StorageError):
                error.subject = error.subject or self.subject
            self.error = error
            failed.append(self)
        finally:
            self.pending = None

    def _write_where_others_may(self, content: bytes) -> None:
        self.md5 = md5_as_written(content)
        head = self._head()
        if head is None and not self.stages:
            if self._put_new(content):
                return
            head = self._head()
        self.created = head is None
        self.shared = self._is_content_of(head, content)
        adds_version = self.adds_versions and real_version(head)
        if not self.stages and (self.shared or adds_version):
            # A shared object is written again, too: its age tells garbage
            # collection that somebody wants it.
            self._put(content)
        elif self.detached:
            raise KeyConflict(
                "There is an object with another content, which an import that writes"
                " rows by itself cannot replace",
                bucket=self.storage.bucket,
                key=self.key,
                remedy="Remove it, or import with RQLObjectStore",
            )
        else:
            self._stage(content)

    def _put_new(self, content: bytes) -> bool:
        """Write the object unless another transaction was faster."""
        self.created = True
        try:
            written = self.storage.objects.put_new(self.key, content, self.arguments)
            self.version_id = written.version_id
            self._remember(written.version_id, written.etag, content)
        except AlreadyThere as obstacle:
            # An earlier attempt of ours may have had its effect, its answer lost.
            # A version, however, has to be ours for certain.
            self.created = (
                obstacle.retried
                and not self.adds_versions
                and self._is_content_of(self._head(), content)
            )
        return self.created

    def _head(self) -> dict[str, Any] | None:
        return self.storage.objects.head(ObjectRef(self.key), self.arguments)

    def _is_content_of(self, head: dict[str, Any] | None, content: bytes) -> bool:
        return head is not None and self.storage.objects.holds(
            self.key, content, head, self.arguments
        )

    def _stage(self, content: bytes | Reader) -> None:
        self.staging_key = new_staging_key(self.storage, self.key)
        self._put(content)

    def _put(self, content: bytes | Reader) -> None:
        if isinstance(content, bytes):
            written = self.storage.objects.put(self.ref.key, content, self.arguments)
            if not self._is_cached_at_once:
                version_id = None if self.staging_key else written.version_id
                self._remember(version_id, written.etag, content)
        else:
            written = self._copy(content)
        self.version_id = written.version_id
        if self.is_ours_alone and written.version_id and written.retried:
            self._remove_other_attempts()

    def _copy(self, original: Reader) -> Written:
        try:
            written = self.storage.objects.duplicate(
                original.found, self.ref.key, self.arguments
            )
        except ObjectMissing:
            # Removed since, and kept in memory; or there is only a staged copy.
            content = original.content_in_a_job()
            if content is None:
                raise
            return self.storage.objects.put(self.ref.key, content, self.arguments)
        if self.adds_versions and written.version_id is None:
            # Ceph does not tell which version a copy is. The key is ours alone.
            head = self.storage.objects.head(self.ref, self.arguments)
            written = written._replace(version_id=real_version(head))
        return written

    @property
    def _is_cached_at_once(self) -> bool:
        return self.fresh and not self.adds_versions

    def _remember(self, version_id: str | None, etag: str, content: bytes) -> None:
        """Cache the content as what it will be when it is committed."""
        # Who encrypts with a key of his own does not want it on the local disk.
        if "SSECustomerKey" not in self.arguments:
            ref = ObjectRef(self.key, version_id)
            self.storage.contents.remember(ref, etag, content)

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
    upload = Upload(storage, key, eid, attr, foreign=True, created=True, begun=True)
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


def failures(cnx: Connection) -> list[Upload]:
    """The uploads of the transaction of which it is known that they have failed."""
    return cnx.transaction_data.setdefault(FAILURES, [])


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
