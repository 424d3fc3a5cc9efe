"""A repository whose documents are kept in S3, behind an endpoint that can fail."""

from __future__ import annotations

import functools
import os
import threading
import uuid
from tempfile import TemporaryDirectory
from unittest.mock import patch

from cubicweb import Binary
from cubicweb.devtools.testlib import CubicWebTC

import s3server
from cubicweb_s3storage.engine import MAX_REQUESTS
from cubicweb_s3storage.storages import S3Storage
from cubicweb_s3storage.uploads import history


@functools.cache
def endpoint() -> s3server.S3Server:
    return s3server.start()


class S3TC(CubicWebTC):
    """`Document.content` is kept in a bucket of its own for each test."""

    storage_class = S3Storage
    #: bytes
    cache_size = 2**24

    def setUp(self) -> None:
        self.s3 = endpoint()
        self.s3.faults.clear()
        self.enterContext(patch.dict(os.environ, {"AWS_S3_ENDPOINT_URL": self.s3.url}))
        self.bucket = f"test-{uuid.uuid4()}"
        self.client = self.s3.client()
        self.client.create_bucket(Bucket=self.bucket)
        self.addCleanup(self._remove_bucket)
        super().setUp()
        for option, default in (
            ("s3-auto-delete", True),
            ("s3-transaction-suffix-key", False),
            ("s3-activate-object-versioning", False),
            ("s3-cache-size", self.cache_size),
            ("s3-cache-directory", self.enterContext(TemporaryDirectory())),
        ):
            self.set_option(option, default)
        self._storages: set[tuple[str, str]] = set()
        self.storage = self.storage_class(self.bucket)
        self.set_storage("Document", "content", self.storage)
        self.s3.requests.clear()
        self.s3.waited.clear()

    def tearDown(self) -> None:
        self.s3.faults.clear()
        self.s3.refused_keys.clear()
        for etype, attr in self._storages:
            self.repo.system_source.unset_storage(etype, attr)
        super().tearDown()

    def _remove_bucket(self) -> None:
        for ref in self.versions():
            self.client.delete_object(Bucket=self.bucket, **ref)
        self.client.delete_bucket(Bucket=self.bucket)

    # the instance #############################################################

    def set_storage(self, etype: str, attr: str, storage: S3Storage) -> None:
        source = self.repo.system_source
        source.set_storage(etype, attr, storage)
        source.clear_caches(None, None)  # queries remember the storage
        self._storages.add((etype, attr))

    def set_option(self, name: str, value: object) -> None:
        self.repo.config.global_set_option(name, value)

    def keep_versions(self) -> None:
        self.client.put_bucket_versioning(
            Bucket=self.bucket, VersioningConfiguration={"Status": "Enabled"}
        )
        self.set_option("s3-activate-object-versioning", True)

    def create(self, cnx, content: bytes | None = b"content", **kwargs):
        binary = None if content is None else Binary(content)
        return cnx.create_entity("Document", content=binary, **kwargs)

    def committed(self, content: bytes | None = b"content", **kwargs) -> int:
        """The eid of a new document."""
        with self.admin_access.repo_cnx() as cnx:
            eid = self.create(cnx, content, **kwargs).eid
            cnx.commit()
        self.s3.requests.clear()
        return eid

    def uploaded(self, cnx) -> None:
        """Wait until the uploads of the transaction have ended."""
        for uploads in history(cnx).values():
            for upload in uploads:
                upload.finish()

    def meeting(self, operation: str, parties: int) -> threading.Barrier:
        """Where requests wait for each other; broken when they do not meet."""
        barrier = threading.Barrier(parties, timeout=30)
        fault = s3server.Fault(
            operation, times=parties, instead=lambda: barrier.wait() >= 0
        )
        self.s3.faults[:] = [fault]
        return barrier

    def idle(self, storage: S3Storage) -> None:
        """Have all threads of its engine meet: none makes a request then.

        What is given up while it is read leaves requests behind for a moment.
        """
        everyone = threading.Barrier(MAX_REQUESTS, timeout=30)
        storage.engine.map(lambda _: everyone.wait(), range(MAX_REQUESTS))

    def delete(self, eid: int) -> None:
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_delete()
            cnx.commit()

    def commit_in_vain(self, cnx) -> None:
        """Commit, and the database refuses the COMMIT itself."""
        with (
            patch.object(cnx.cnxset, "commit", side_effect=OSError("gone")),
            self.assertRaises(OSError),
        ):
            cnx.commit()

    def read(self, eid: int) -> bytes | None:
        """The content of a document, as a new connection sees it."""
        with self.admin_access.repo_cnx() as cnx:
            value = cnx.entity_from_eid(eid).content
            return None if value is None else value.getvalue()

    def row(self, eid: int, attr: str = "content") -> str | None:
        with self.admin_access.repo_cnx() as cnx:
            return self.storage.get_s3_key(cnx.entity_from_eid(eid), attr)

    def set_row(self, eid: int, value: bytes) -> None:
        """Have the row hold a value as an earlier release wrote it."""
        with self.admin_access.repo_cnx() as cnx:
            cnx.system_sql(
                "UPDATE cw_Document SET cw_content=%(value)s WHERE cw_eid=%(eid)s",
                {"value": self.repo.system_source._binary(value), "eid": eid},
            )
            cnx.commit()

    # the bucket ###############################################################

    def put(self, key: str, content: bytes) -> str | None:
        answer = self.client.put_object(Bucket=self.bucket, Key=key, Body=content)
        return answer.get("VersionId")

    def objects(self) -> dict[str, bytes]:
        """The objects of the bucket and their contents."""
        listed = self.client.list_objects_v2(Bucket=self.bucket).get("Contents", ())
        return {
            entry["Key"]: self.client.get_object(Bucket=self.bucket, Key=entry["Key"])[
                "Body"
            ].read()
            for entry in listed
        }

    def versions(self) -> list[dict[str, str]]:
        """Key and version id of everything in the bucket, delete markers too."""
        listed = self.client.list_object_versions(Bucket=self.bucket)
        return [
            {"Key": entry["Key"], "VersionId": entry["VersionId"]}
            for kind in ("Versions", "DeleteMarkers")
            for entry in listed.get(kind, ())
        ]


class ContentHashStorage(S3Storage):
    """As applications write one: equal contents share an object."""

    def new_s3_key(self, entity, attr):
        import hashlib

        return hashlib.sha1(entity.cw_edited[attr].getvalue()).hexdigest()

    def get_upload_extra_args(self, entity, attr, key):
        return None


class OwnKeyStorage(S3Storage):
    """As applications write one: an entity's object keeps its key."""

    def new_s3_key(self, entity, attr):
        return f"documents/{entity.eid}"
