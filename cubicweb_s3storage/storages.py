"""A CubicWeb storage that keeps the values of Bytes attributes in an S3 bucket."""

from __future__ import annotations

import functools
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from logging import getLogger
from typing import Any

from botocore.client import BaseClient
from cubicweb import Binary, set_log_methods
from cubicweb.entity import Entity
from cubicweb.server.edition import EditedEntity
from cubicweb.server.session import Connection
from cubicweb.server.sources.storages import Storage

from cubicweb_s3storage import rows, s3
from cubicweb_s3storage.cache import Cache
from cubicweb_s3storage.client import make_client, quieten_libraries
from cubicweb_s3storage.contents import Contents
from cubicweb_s3storage.downloads import NotModified
from cubicweb_s3storage.engine import Engine, PerProcess
from cubicweb_s3storage.errors import (
    AccessRefused,
    InvalidKey,
    ObjectMissing,
    S3StorageError,
    subject,
)
from cubicweb_s3storage.objects import ObjectRef, check_key
from cubicweb_s3storage.readers import Reader
from cubicweb_s3storage.transactions import S3AddFileOp, S3DeleteFileOp
from cubicweb_s3storage.uploads import (
    Upload,
    failures,
    history,
    is_known,
    last_upload,
    staging_prefix,
)
from cubicweb_s3storage.values import LazyBinary, Unread, current_selection

__all__ = ["S3AddFileOp", "S3DeleteFileOp", "S3Storage"]

CACHE = "s3storage_cache"
UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
HEX_UUID = re.compile("[0-9a-f]{32}")
MEDIA_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+(;[ -~]*)?", re.ASCII)


class S3Storage(Storage):
    """Keeps the values of attributes as objects in a bucket, in the rows their keys.

    :param bucket: name of the bucket, which exists
    :param suffix: what the keys of staged objects are marked with
    """

    KEY_SEPARATOR = "#"

    def __init__(self, bucket: str, suffix: str = ".tmp") -> None:
        self.bucket = bucket
        self.suffix = suffix
        self._client = PerProcess(self._s3_client)
        self._engine = PerProcess(Engine)
        self._assigned_client: BaseClient | None = None
        self._cache = Cache("", 0)
        quieten_libraries()

    # the client ###############################################################

    @classmethod
    def _s3_client(cls) -> BaseClient:
        return make_client()

    @property
    def s3cnx(self) -> BaseClient:
        """The boto3 S3 client of this process, or the one that was assigned."""
        return self._assigned_client or self._client.get()

    @s3cnx.setter
    def s3cnx(self, client: BaseClient) -> None:
        self._assigned_client = client

    @s3cnx.deleter
    def s3cnx(self) -> None:
        self._assigned_client = None

    @property
    def engine(self) -> Engine:
        """What makes requests beside each other."""
        return self._engine.get()

    @property
    def objects(self) -> s3.Bucket:
        """The requests about the objects of the bucket."""
        return s3.Bucket(self.s3cnx, self.engine, self.bucket)

    @property
    def contents(self) -> Contents:
        """The contents of the objects, some of them on local disk."""
        return Contents(self.objects, self._cache, self._is_immutable)

    # what subclasses choose ###################################################

    def new_s3_key(self, entity: Entity, attr: str) -> str:
        """The key of a new value: here a random UUID, so that every object is fresh.

        Overrides find the value in `entity.cw_edited[attr]`. They may return the
        key of an object that exists: rows whose values have the same content share
        it; a row's own new content replaces it when the transaction commits.
        """
        return str(uuid.uuid4())

    def get_upload_extra_args(
        self, entity: Entity, attr: str, key: str
    ) -> dict[str, Any] | None:
        """Further arguments of boto3's `put_object` for a value.

        https://boto3.amazonaws.com/v1/documentation/api/latest/reference/services/s3/client/put_object.html
        """
        return {}

    def suffixed_key(self, key: str) -> str:
        """What the staging keys of a key start with."""
        return key + self.suffix

    def parse_key(self, key: str) -> tuple[str, str | None]:
        """Split what a row holds into key and version id."""
        key, separator, version_id = key.rpartition(self.KEY_SEPARATOR)
        return (key, version_id) if separator else (version_id, None)

    def format_version_id_suffix(self, key: str, version_id: str) -> str:
        """What a row holds that names a version of an object."""
        return f"{key}{self.KEY_SEPARATOR}{version_id}"

    # CubicWeb's Storage interface #############################################

    def callback(self, source, cnx: Connection, value: bytes) -> Binary:
        """The value of an attribute whose row holds `value`.

        :return: position 0; when S3 answers that the object is not there, a value
          which raises `ObjectMissing` when it is used
        :raise S3StorageError: it cannot be told whether the object is there
        """
        self._cache = _instance_cache(cnx)
        try:
            key = self._decode_key(source.binary_to_str(value))
        except InvalidKey as error:
            missing = ObjectMissing(
                "The row holds no key, maybe a content that was never migrated",
                bucket=self.bucket,
                remedy="Call storage_changed in a migration shell",
            )
            missing.__cause__ = error
            return self._lazy(cnx, "", [], missing)
        try:
            return self.get_s3_object(cnx, key)
        except ObjectMissing as error:  # of an overridden method
            return self._lazy(cnx, key, [], error)

    def entity_added(self, entity: Entity, attr: str) -> Binary | None:
        """Write the value of a new entity, or adopt an object as its value.

        :return: the value, as it was given
        :raise S3StorageError: S3 has not confirmed that it keeps the value
        """
        value = entity.cw_edited[attr]
        self._cache = _instance_cache(entity._cw)
        with _concerning(entity, attr):
            if value is None:
                return None
            if entity._cw.transaction_data.get("fs_importing"):
                return self._adopt(entity, attr, value)
            return self._write(entity, attr, value)

    def entity_updated(self, entity: Entity, attr: str) -> Binary | None:
        """Write the new value of an entity, see `entity_added`; give up the old one."""
        replaced = self.get_s3_key(entity, attr)
        binary = self.entity_added(entity, attr)
        value = entity.cw_edited[attr]
        named = None if value is None else value.getvalue().decode()
        if replaced not in (None, named):
            self._give_up(entity, attr, replaced)
        return binary

    def entity_deleted(self, entity: Entity, attr: str) -> None:
        """Give up the value of a deleted entity."""
        key = self.get_s3_key(entity, attr)
        if key is not None:
            self._give_up(entity, attr, key)

    def migrate_entity(self, entity: Entity, attribute: str) -> None:
        """Move the value of an entity from the database to S3, unless it is there."""
        value = entity.cw_attr_cache.get(attribute)
        if value is None:
            return
        entity.cw_edited = EditedEntity(entity, **entity.cw_attr_cache)
        try:
            if not self._is_migrated(entity, attribute, value):
                self.entity_added(entity, attribute)
                source = entity._cw.repo.system_source
                changes = source.preprocess_entity(entity)
                attrs = {
                    column: changes[column] for column in (f"cw_{attribute}", "cw_eid")
                }
                sql = source.sqlgen.update(f"cw_{entity.cw_etype}", attrs, ["cw_eid"])
                source.doexec(entity._cw, sql, attrs)
        finally:
            entity.cw_edited = None

    # rows, keys and objects ###################################################

    def get_s3_key(self, entity: Entity, attr: str) -> str | None:
        """What the row of the entity holds, whoever is asking; None for no key.

        :raise S3StorageError: the version that it will name cannot be told
        """
        cnx = getattr(entity._cw, "cnx", entity._cw)
        raw = rows.held_value(cnx, entity.cw_etype, entity.eid, attr)
        try:
            key = None if raw is None else self._decode_key(raw)
        except InvalidKey:
            return None
        return key and self.committed_value(cnx, key)

    def committed_value(self, cnx: Connection, value: str) -> str:
        """What a row that holds `value` will hold when the transaction has committed.

        :raise S3StorageError: S3 does not keep what the transaction has written
        """
        upload = last_upload(cnx, self.bucket, value)
        if upload is None or not upload.version_follows:
            return value
        upload.confirm()
        return upload.row_value

    def delay_deletion(self, entity: Entity, attr: str, key: str) -> None:
        """Have an object removed after the commit, if the instance removes objects.

        :param key: as the row has held it
        """
        if entity._cw.repo.config["s3-auto-delete"]:
            data = (self, key, entity.eid, attr)
            S3DeleteFileOp.get_instance(entity._cw).add_data(data)

    def save_s3_key(
        self, entity: Entity, attr: str, key: str, version_id: str | None = None
    ) -> Entity:
        """Have the row hold the key, and the version if rows name versions."""
        if version_id is not None and self.keeps_versions(entity._cw):
            key = self.format_version_id_suffix(key, version_id)
        entity.cw_edited.edited_attribute(attr, Binary(key.encode()))
        return entity

    def get_s3_object(self, cnx: Connection, key: str) -> Binary:
        """The object that a row names, as this transaction sees it.

        :param key: as the row holds it
        :return: its content, at position 0. It is loaded on first use, which raises
          `ObjectMissing` when it is not there
        """
        return self._lazy(cnx, key, self._readable(cnx, key))

    def download(self, key: str, **kwargs: Any) -> Binary:
        """The content of an object, at position 0.

        :param kwargs: further arguments of boto3's `get_object`
        :raise ObjectMissing: it is not there
        """
        if kwargs.keys() <= {"VersionId"}:
            return Binary(self.contents.read(ObjectRef(key, kwargs.get("VersionId"))))
        try:
            return Binary(self.objects.download(ObjectRef(key), **kwargs).content())
        except NotModified as error:
            raise S3StorageError(
                "The object has the ETag in IfNoneMatch", bucket=self.bucket, key=key
            ) from error

    def read_object(self, ref: ObjectRef) -> bytes:
        """The content of an object, however a subclass downloads it."""
        version = {"VersionId": ref.version_id} if ref.version_id else {}
        return self.download(ref.key, **version).getvalue()

    @property
    def downloads_by_itself(self) -> bool:
        """Whether a subclass decides what the content of an object is."""
        return type(self).download is not S3Storage.download

    @property
    def names_versions_later(self) -> bool:
        """Whether nobody but us sees what rows hold before the commit."""
        return all(
            getattr(type(self), name) is getattr(S3Storage, name) for name in _SEE_ROWS
        )

    def keep_values(self, keys: Iterable[str]) -> set[str]:
        """Have the values in memory that read objects which are going to change.

        :return: the keys of objects that values still need
        """
        needed: set[str] = set()
        for key in set(keys):
            for value in _unread.get().pop((self.bucket, key)):
                try:
                    if not needed:  # S3 is not asked again and again in an outage
                        value.keep()
                        continue
                except ObjectMissing as error:
                    self.warning("A value cannot be read any more: %s", error)
                    continue
                except Exception:  # noqa: BLE001, that of an overridden download
                    self.exception("A value cannot be read now, its object stays")
                _unread.get().add(value, [(self.bucket, key)])
                needed.add(key)
        return needed

    def find_removable(self, cnx: Connection, value: str) -> ObjectRef | None:
        """The object that a row has named, None when it is not there.

        :param value: what the row has held
        """
        refs = self._readable(cnx, value)
        if len(refs) == 1 or (refs[0].version_id and UUID.fullmatch(refs[0].key)):
            return refs[0]  # not worth a request
        return self._first_there(refs)

    def named(self, cnx: Connection, refs: set[ObjectRef]) -> set[ObjectRef]:
        """Those of the objects that a row may name, in any of the ways of reading."""
        values = {
            ref: {self.format_version_id_suffix(ref.key, ref.version_id), ref.key}
            for ref in refs
            if ref.version_id
        }
        wanted = {value for names in values.values() for value in names}
        held = {holder.value for holder in rows.holders(cnx, self.bucket, wanted)}
        named = {ref for ref, names in values.items() if not held.isdisjoint(names)}
        latest = {ref.key: ref for ref in refs - values.keys()}
        return named | {latest[key] for key, _ in self.readers(cnx, set(latest))}

    def readers(
        self, cnx: Connection, keys: set[str]
    ) -> Iterator[tuple[str, rows.Holder]]:
        """The keys of objects that rows may read without naming a version, with these.

        The inverse of `_readable`.
        """
        suffixed = {key + self.suffix: key for key in keys}
        for holder in rows.holders(cnx, self.bucket, {*keys, *suffixed}):
            if holder.value in keys:
                yield holder.value, holder
            if holder.value in suffixed:
                yield suffixed[holder.value], holder
        # Keys and version ids, where a version may be gone; a UUID has but one row.
        names = {
            name: key
            for key in keys
            if not UUID.fullmatch(key)
            for name in (key, key + self.suffix)
            if name != key or not self.keeps_versions(cnx)
        }
        parts = {name.split(self.KEY_SEPARATOR)[0] for name in names}
        for holder in rows.holders_of_parts(
            cnx, self.bucket, self.KEY_SEPARATOR, parts
        ):
            name, _ = self.parse_key(holder.value)
            if name in names:
                yield names[name], holder

    def reads_as(self, key: str, content_md5: str) -> bool:
        """Whether the object, or in its place every staged copy, has this ETag."""
        head = self.objects.head(ObjectRef(key))
        etags = self._staged_copies(key).values() if head is None else [head["ETag"]]
        return all(etag.strip('"') == content_md5 for etag in etags)

    def keeps_versions(self, cnx: Connection) -> bool:
        return cnx.repo.config["s3-activate-object-versioning"]

    def stages_every_write(self, cnx: Connection) -> bool:
        return cnx.repo.config["s3-transaction-suffix-key"] and not self.keeps_versions(
            cnx
        )

    # internals ################################################################

    def _write(self, entity: Entity, attr: str, binary: Binary) -> Binary:
        cnx = entity._cw
        for failed in failures(cnx):
            failed.confirm()
        key = check_key(self.new_s3_key(entity, attr), self.bucket)
        arguments = _content_type(entity, attr)
        arguments.update(self.get_upload_extra_args(entity, attr, key) or {})
        fresh = self._makes_fresh_keys()
        upload = Upload(
            self,
            key,
            entity.eid,
            attr,
            etype=entity.cw_etype,
            fresh=fresh,
            visible=not fresh and self._is_named_by_its_row(entity, attr, key),
            detached=rows.is_written_elsewhere(cnx, entity.eid),
            arguments=arguments,
        )
        # Registered first: a failing request may have had its effect.
        S3AddFileOp.get_instance(cnx).add_data(upload)
        # Not every server gives a copy tags of its own.
        may_copy = fresh and "Tagging" not in arguments
        original = self._to_copy(binary) if may_copy else None
        upload.send(cnx, original or binary.getvalue())
        version_id = None if upload.version_follows else upload.named_version
        self.save_s3_key(entity, attr, key, version_id)
        return binary

    def _to_copy(self, binary: Binary) -> Reader | None:
        """What reads the object of this bucket that has the value, unread so far."""
        reader = binary.reader if isinstance(binary, LazyBinary) else None
        if reader is None or reader.held is not None:
            return None
        if reader.storage.bucket != self.bucket:
            return None
        storages = {self, reader.storage}
        servers = {storage.s3cnx.meta.endpoint_url for storage in storages}
        if len(servers) > 1 or any(s.downloads_by_itself for s in storages):
            return None
        with reader.reporting():
            ref = reader.find()
        # Another one may be replaced before it is copied.
        return reader if reader.storage._is_immutable(ref) else None

    def _is_named_by_its_row(self, entity: Entity, attr: str, key: str) -> bool:
        """Whether the row names the object already, in any of the ways of reading."""
        held = self.get_s3_key(entity, attr)
        return held is not None and ObjectRef(key) in self._readable(entity._cw, held)

    def _adopt(self, entity: Entity, attr: str, value: Binary) -> Binary:
        """Take the object whose key is given as the value."""
        cnx = entity._cw
        key = self.committed_value(cnx, self._decode_key(value.getvalue()))
        entity.cw_edited.edited_attribute(attr, Binary(key.encode()))
        refs = self._named_by(cnx, key)
        for name in {ref.key for ref in refs}:
            rows.share_lock(cnx, self.bucket, name)
        if not last_upload(cnx, self.bucket, key) and not self._first_there(refs):
            raise ObjectMissing(
                "S3 answers that there is no object to adopt",
                bucket=self.bucket,
                key=key,
                remedy="Give the key of an object that exists",
            )
        # Whoever gives the key of an object may have replaced the object.
        self.contents.forget(refs)
        content = self._lazy(cnx, key, refs)
        entity._cw_dont_cache_attribute(attr, repo_side=True)
        return content

    def _lazy(
        self,
        cnx: Connection,
        value: str,
        refs: list[ObjectRef],
        error: ObjectMissing | None = None,
    ) -> LazyBinary:
        reader = Reader(self, cnx, value, refs, error)
        lazy = LazyBinary(reader, current_selection(cnx))
        _unread.get().add(lazy, {(self.bucket, ref.key) for ref in refs})
        return lazy

    def _give_up(self, entity: Entity, attr: str, key: str) -> None:
        """Have the object removed after the commit, if the row was all it was for."""
        cnx = entity._cw
        never_committed = self._was_made_by_this_transaction(cnx, key)
        if never_committed and not cnx.repo.config["s3-auto-delete"]:
            S3DeleteFileOp.get_instance(cnx).add_data((self, key, entity.eid, attr))
        elif cnx.ertype_supports_undo(entity.cw_etype) and not never_committed:
            self.info("Kept %s/%s, an undo may need it", self.bucket, key)
        else:
            self.delay_deletion(entity, attr, key)

    def _was_made_by_this_transaction(self, cnx: Connection, value: str) -> bool:
        key, version_id = self.parse_key(value)
        for upload in history(cnx).get((self.bucket, value), ()):
            if upload.fresh:
                return True
            upload.finish()
            if upload.created:
                return True
        return any(
            version_id and upload.version_id == version_id
            for upload in history(cnx).get((self.bucket, key), ())
        )

    def _is_immutable(self, ref: ObjectRef) -> bool:
        """Whether the object has the same content for ever."""
        if ref.version_id is not None:
            return ref.version_id != "null"
        return self._makes_fresh_keys() and bool(UUID.fullmatch(ref.key))

    def _makes_fresh_keys(self) -> bool:
        return getattr(self.new_s3_key, "__func__", None) is _NEW_UUID_KEY

    def _is_migrated(self, entity: Entity, attr: str, value: Binary) -> bool:
        """Whether the value in the database is the key of its own object already."""
        try:
            key = self._decode_key(value.getvalue())
        except InvalidKey:
            return False
        if is_known(entity._cw, self, key, entity.eid, attr):
            return True
        refs = self._named_by(entity._cw, key) if key.isprintable() else []
        ref = self._first_there(refs)
        if ref is None or UUID.fullmatch(ref.key):
            return ref is not None
        content = Binary(self.read_object(ref))
        entity.cw_edited.edited_attribute(attr, content)
        try:
            return self.new_s3_key(entity, attr) == ref.key
        finally:
            entity.cw_edited.edited_attribute(attr, value)

    def _named_by(self, cnx: Connection, value: str) -> list[ObjectRef]:
        """The objects that a row may name, the likeliest first.

        Rows outlive the options under which they were written, and cubicweb-s3storage
        4.x left suffixed keys in rows whose objects it had moved.
        """
        key, version_id = self.parse_key(value)
        refs = [ObjectRef(value)]
        if key and version_id:
            position = 0 if self.keeps_versions(cnx) else 1
            refs.insert(position, ObjectRef(key, version_id))
        if self.suffix and key.endswith(self.suffix) and key != self.suffix:
            refs.append(ObjectRef(key.removesuffix(self.suffix)))
        return refs

    def _readable(self, cnx: Connection, value: str) -> list[ObjectRef]:
        """The objects that a row reads, the first that is there.

        At last the latest version: the bucket may have been copied without versions.
        """
        refs = self._named_by(cnx, value)
        key, version_id = self.parse_key(value)
        latest = ObjectRef(key)
        if key and version_id and latest not in refs and not self.keeps_versions(cnx):
            refs.append(latest)
        return refs

    def _first_there(self, refs: list[ObjectRef]) -> ObjectRef | None:
        return next((ref for ref in refs if self.objects.head(ref) is not None), None)

    def staged_before_a_crash(self, key: str) -> str | None:
        """The staged copy that a crash between commit and move has left, if any."""
        try:
            copies = self._staged_copies(key)
        except AccessRefused as error:
            self.warning("Cannot look for a staged copy: %s", error)
            return None
        if len(set(copies.values())) > 1:
            self.error("One of %s is %s/%s", list(copies), self.bucket, key)
            return None
        return next(iter(copies), None)

    def _staged_copies(self, key: str) -> dict[str, str]:
        """The staging keys that a key has, and the ETags of the objects there."""
        prefix = staging_prefix(self, key)
        return {
            found: etag
            for found, etag in self.objects.etags(prefix)
            if HEX_UUID.fullmatch(found.removeprefix(prefix))
        }

    def _decode_key(self, raw: bytes) -> str:
        try:
            key = raw.decode()
        except UnicodeDecodeError as error:
            raise InvalidKey("The key is not UTF-8", bucket=self.bucket) from error
        return check_key(key, self.bucket)


def _content_type(entity: Entity, attr: str) -> dict[str, str]:
    with entity._cw.security_enabled(read=False):
        media_type = entity.cw_attr_metadata(attr, "format")
    if isinstance(media_type, str) and MEDIA_TYPE.fullmatch(media_type):
        return {"ContentType": media_type}
    return {}


@contextmanager
def _concerning(entity: Entity, attr: str) -> Iterator[None]:
    try:
        yield
    except S3StorageError as error:
        error.subject = error.subject or subject(entity.cw_etype, entity.eid, attr)
        raise


def _instance_cache(cnx: Connection) -> Cache:
    """The local cache of the instance, as its options say."""
    if CACHE not in cnx.transaction_data:  # reading options takes its time
        config = cnx.repo.config
        directory = config["s3-cache-directory"] or os.path.join(
            config.appdatahome, "s3cache"
        )
        cnx.transaction_data[CACHE] = _cache(directory, config["s3-cache-size"])
    return cnx.transaction_data[CACHE]


#: methods that, overridden, would find rows without their versions
_SEE_ROWS = (
    "callback",
    "entity_added",
    "entity_updated",
    "entity_deleted",
    "save_s3_key",
    "get_s3_key",
    "get_s3_object",
    "delay_deletion",
)

_unread = PerProcess(Unread)

_cache = functools.lru_cache(maxsize=None)(Cache)

_NEW_UUID_KEY = S3Storage.new_s3_key

set_log_methods(S3Storage, getLogger("cube.s3storage.storages"))
