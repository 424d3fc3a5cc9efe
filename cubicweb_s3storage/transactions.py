"""What happens to the objects of a transaction when it commits or is rolled back."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from cubicweb.server.hook import DataOperationMixIn, LateOperation
from cubicweb.server.session import Connection

from cubicweb_s3storage import rows
from cubicweb_s3storage.errors import KeyConflict, S3StorageError
from cubicweb_s3storage.objects import ObjectRef
from cubicweb_s3storage.s3 import MAX_DELETE
from cubicweb_s3storage.uploads import (
    Upload,
    history,
    is_known,
    last_upload,
    uploaded_by_application,
)

if TYPE_CHECKING:
    from cubicweb_s3storage.storages import S3Storage

logger = logging.getLogger("cube.s3storage.transactions")

#: seconds before each attempt to lock keys that another transaction has locked
PAUSES = (0, 0.05, 0.2, 0.8)


class S3AddFileOp(DataOperationMixIn, LateOperation):
    """The values that the transaction writes.

    Confirmed before the commit; staged ones are moved after it; a rollback removes
    what was written.
    """

    containercls = list

    def add_data(self, data: Upload | tuple) -> None:
        """:param data: an upload, or the tuple (storage, key, eid, attr) of 4.x"""
        if isinstance(data, Upload):
            super().add_data(data)
        elif not is_known(self.cnx, *data):
            super().add_data(uploaded_by_application(self.cnx, *data))

    def precommit_event(self) -> None:
        # From here on, writes of other operations get an operation of their own.
        self.get_data()
        for upload in self._container:
            upload.confirm()
        self._name_versions()
        self._lock_moves()
        refuse_conflicts(self.cnx)

    def postcommit_event(self) -> None:
        try:
            for storage, uploads in _by_storage(self._container).items():
                self._move_staged(storage, [u for u in uploads if u.staging_key])
        finally:
            self._unlock_moves()

    def rollback_event(self) -> None:
        # A fork must not remove what the transaction of its parent writes.
        uploads = [u for u in self._container if u.pid == os.getpid()]
        if not uploads:
            return
        groups = _by_storage(uploads)
        for storage, some in groups.items():
            storage.keep_values(upload.key for upload in some)
        for upload in uploads:
            upload.cancel()
        for upload in uploads:
            upload.finish()
        try:
            for storage, some in groups.items():
                storage.contents.forget(ObjectRef(upload.key) for upload in some)
                self._remove_written(storage, [u for u in some if u.begun])
        finally:
            self._unlock_moves()

    def _unlock_moves(self) -> None:
        if not any(isinstance(op, S3AddFileOp) for op in self.cnx.pending_operations):
            rows.unlock_moves(self.cnx)

    def _name_versions(self) -> None:
        """Have the rows name the versions, which are known now."""
        changes: dict[tuple[str, str], list[tuple[int, str, str]]] = {}
        for upload in self._container:
            if upload.version_follows and upload.row_value != upload.key:
                some = changes.setdefault((upload.etype, upload.attr), [])
                some.append((upload.eid, upload.key, upload.row_value))
        for (etype, attr), some in changes.items():
            rows.replace(self.cnx, etype, attr, some)

    def _lock_moves(self) -> None:
        keys: dict[str, list[str]] = {}
        for upload in self._container:
            if upload.staging_key and not upload.fresh:
                keys.setdefault(upload.storage.bucket, []).append(upload.key)
        for bucket in sorted(keys):
            try:
                rows.lock_moves(self.cnx, bucket, keys[bucket])
            except self.cnx.repo.system_source.OperationalError as error:
                raise KeyConflict(
                    "Another transaction does not finish replacing objects",
                    bucket=bucket,
                    key=keys[bucket][0],
                    remedy="Try again",
                ) from error

    def _move_staged(self, storage: S3Storage, uploads: list[Upload]) -> None:
        """Move what rows name; a later write of this transaction may have won."""
        if not uploads:
            return
        keys = {upload.key for upload in uploads}
        storage.keep_values(keys)
        named = self._named_keys(storage, keys)
        wanted = [
            upload
            for upload in uploads
            if last_upload(self.cnx, storage.bucket, upload.key) is upload
            and (upload.key in named or upload.foreign)
        ]
        outcomes = storage.engine.map(self._move, wanted)
        kept = {u for u, is_moved in zip(wanted, outcomes, strict=True) if not is_moved}
        done = [upload for upload in uploads if upload not in kept]
        staged = [upload.ref for upload in done]
        for upload in done:
            upload.staging_key = ""
        remove(storage, staged)
        moved = {u.key for u in wanted if u not in kept and not u.foreign}
        if moved and self.cnx.repo.config["s3-auto-delete"]:
            # Another transaction may have deleted the row in the meantime.
            gone = moved - self._named_keys(storage, moved)
            remove_unnamed(self.cnx, storage, [ObjectRef(key) for key in gone])

    def _named_keys(self, storage: S3Storage, keys: set[str]) -> set[str]:
        refs = {ObjectRef(key) for key in keys}
        try:
            refs = storage.named(self.cnx, refs)
        except self.cnx.repo.system_source.DbapiError as error:
            logger.error("Cannot ask the database, so all objects are kept: %s", error)
        finally:
            self.cnx.cnxset.rollback()
        return {ref.key for ref in refs}

    def _move(self, upload: Upload) -> bool:
        bucket = upload.storage.bucket
        try:
            upload.storage.objects.copy(upload.ref, upload.key, upload.arguments)
        except S3StorageError as error:
            logger.critical(
                "The new content of %s is committed, but stays under its staging key"
                " %s in bucket %s, copy it over %s: %s",
                upload.subject,
                upload.ref,
                bucket,
                upload.key,
                error.problem,
            )
            return False
        logger.info("Moved %s to %s/%s", upload.ref, bucket, upload.key)
        return True

    def _remove_written(self, storage: S3Storage, uploads: list[Upload]) -> None:
        own, shareable = [], []
        for upload in uploads:
            if upload.detached:
                # Its row may be committed, or still will be.
                _log_left_behind(storage, upload.ref, "its row is written elsewhere")
                continue
            refs = [upload.ref]
            if upload.error and storage.keeps_versions(self.cnx):
                refs = _versions_of(upload)
            if upload.is_ours_alone:
                own += refs
            elif upload.created:
                shareable += refs
            elif upload.version_id:
                own += refs
        remove(storage, own)
        if shareable:
            # What the rows name when this transaction is no more.
            self.cnx.cnxset.rollback()
            remove_unnamed(self.cnx, storage, shareable)


class S3DeleteFileOp(DataOperationMixIn, LateOperation):
    """The objects that the rows stop naming, removed after the commit.

    Data are tuples (storage, key, eid, attr), the key as the row has held it.
    """

    containercls = list

    def postcommit_event(self) -> None:
        for storage, entries in _by_storage(self.get_data()).items():
            keys = dict.fromkeys(key for _, key, _, _ in entries)
            refs = [ref for key in keys if (ref := self._find(storage, key))]
            remove_unnamed(self.cnx, storage, refs)

    def _find(self, storage: S3Storage, value: str) -> ObjectRef | None:
        try:
            return storage.find_removable(self.cnx, value)
        except S3StorageError as error:
            _log_left_behind(storage, ObjectRef(value), error)
            return None


def refuse_conflicts(cnx: Connection) -> None:
    """Refuse to replace an object of which another row expects the old content.

    :raise KeyConflict: this commit would do so
    """
    replaced: dict[S3Storage, set[str]] = {}
    for (_, key), uploads in history(cnx).items():
        if any(upload.replaces for upload in uploads):
            replaced.setdefault(uploads[-1].storage, set()).add(key)
    for storage, keys in replaced.items():
        for key, holder in storage.readers(cnx, keys):
            uploads = history(cnx)[storage.bucket, key]
            last = uploads[-1]
            own = [u for u in uploads if (u.eid, u.attr) == (holder.eid, holder.attr)]
            if own:
                same_content = own[-1].md5 == last.md5
            else:
                # What a concurrent transaction has moved since counts, too.
                same_content = last.shared or (
                    bool(last.staging_key) and storage.reads_as(key, last.md5)
                )
            if not same_content:
                error = KeyConflict(
                    f"The object is also the value of {holder}, whose content is"
                    " another",
                    bucket=storage.bucket,
                    key=key,
                    remedy="Return different keys for different contents from"
                    " new_s3_key",
                )
                error.subject = last.subject
                raise error


def remove(storage: S3Storage, refs: Iterable[ObjectRef]) -> None:
    """Remove objects that no row can name; what S3 refuses to remove is logged."""
    refs = list(refs)
    needed = storage.keep_values(ref.key for ref in refs)
    for ref in refs:
        if ref.key in needed:
            _log_left_behind(storage, ref, "a value has not been read")
    refs = [ref for ref in refs if ref.key not in needed]
    storage.contents.forget(refs)
    try:
        failures = storage.objects.delete(refs)
    except S3StorageError as error:
        failures = dict.fromkeys(refs, str(error))
    for ref in refs:
        if ref not in failures:
            logger.info("Deleted %s from bucket %s", ref, storage.bucket)
    for ref, reason in failures.items():
        _log_left_behind(storage, ref, reason)


def remove_unnamed(
    cnx: Connection, storage: S3Storage, refs: Iterable[ObjectRef]
) -> None:
    """Remove those of the objects that no committed row names.

    Objects that another transaction keeps locked, because it may come to name them,
    stay. Between transactions only: ends the SQL transaction of the connection.
    """
    remaining = iter(refs)
    while batch := set(islice(remaining, MAX_DELETE)):
        for pause in PAUSES:
            time.sleep(pause)
            try:
                batch -= _remove_unlocked(cnx, storage, batch)
            except (S3StorageError, cnx.repo.system_source.DbapiError) as error:
                for ref in batch:
                    _log_left_behind(storage, ref, error)
                batch.clear()
            finally:
                cnx.cnxset.rollback()
            if not batch:
                break
        for ref in batch:
            _log_left_behind(storage, ref, "another transaction writes this key")


def _remove_unlocked(
    cnx: Connection, storage: S3Storage, refs: set[ObjectRef]
) -> set[ObjectRef]:
    """Remove those that no row names among those that nobody else has locked.

    :return: the latter
    """
    locked = rows.try_lock(cnx, storage.bucket, (ref.key for ref in refs))
    ready = {ref for ref in refs if ref.key in locked}
    remove(storage, ready - storage.named(cnx, ready))
    return ready


def _by_storage(entries: Iterable[Upload | tuple]) -> dict[S3Storage, list]:
    groups: dict[S3Storage, list] = {}
    for entry in entries:
        storage = entry.storage if isinstance(entry, Upload) else entry[0]
        groups.setdefault(storage, []).append(entry)
    return groups


def _versions_of(upload: Upload) -> list[ObjectRef]:
    """What the attempts of a failed upload may have made.

    Removing an object that is not there would make a delete marker.
    """
    key = upload.ref.key
    try:
        if versions := upload.storage.objects.versions(key, upload.md5):
            return versions
        head = upload.storage.objects.head(ObjectRef(key))
    except S3StorageError as error:
        _log_left_behind(upload.storage, upload.ref, error)
        return []
    return [ObjectRef(key)] if head else []


def _log_left_behind(storage: S3Storage, ref: ObjectRef, reason: object) -> None:
    logger.error(
        "Cannot remove %s from bucket %s, left for garbage collection: %s",
        ref,
        storage.bucket,
        reason,
    )
