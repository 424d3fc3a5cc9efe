"""Every request to S3 is made here, and nothing here knows CubicWeb."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from itertools import islice
from typing import Any, NamedTuple

from botocore.client import BaseClient
from botocore.exceptions import BotoCoreError, ClientError
from s3transfer.manager import TransferManager
from s3transfer.upload import UploadSubmissionTask
from s3transfer.utils import ReadFileChunk, set_default_checksum_algorithm

from cubicweb_s3storage.answers import (
    NOT_FOUND,
    NOT_IMPLEMENTED,
    error_code,
    explained,
    is_missing,
)
from cubicweb_s3storage.downloads import CHUNK, Download
from cubicweb_s3storage.engine import Engine
from cubicweb_s3storage.errors import ObjectMissing, S3StorageError
from cubicweb_s3storage.objects import ObjectRef

logger = logging.getLogger("cube.s3storage.s3")

#: bytes that are written with one request
MAX_SINGLE = 16 * 2**20
#: bytes of each part of a longer object
PART = 8 * 2**20
#: objects, https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObjects.html
MAX_DELETE = 1000
#: what a key may have and `DeleteObjects`, which is XML 1.0, cannot say
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

#: what `copy_object` answers for objects of more than 5 GiB
TOO_LARGE = {"EntityTooLarge", "InvalidRequest"}
#: arguments of `put_object` that are about a content written at once
WHOLE = re.compile("Content(MD5|Length)|Checksum(?!Algorithm).*|WriteOffsetBytes")
#: arguments of `put_object` that have a place where its parts are completed
CONDITIONS = {"IfMatch", "IfNoneMatch"}
#: what `get_object` and `head_object` need of the arguments of an upload
READ_ARGUMENTS = {
    "ExpectedBucketOwner",
    "RequestPayer",
    "SSECustomerAlgorithm",
    "SSECustomerKey",
    "SSECustomerKeyMD5",
}
#: what `copy_object` takes from the object that it copies
COPIED_WITH_THE_OBJECT = {
    "CacheControl",
    "ContentDisposition",
    "ContentEncoding",
    "ContentLanguage",
    "ContentType",
    "Expires",
    "Metadata",
    "Tagging",
}


class Written(NamedTuple):
    """The outcome of a write.

    :param version_id: None where the bucket keeps no versions
    :param etag: as S3 gives it
    :param retried: the request was sent more than once, so that there may be further
      versions, the effects of earlier attempts whose answers were lost
    """

    version_id: str | None
    etag: str
    retried: bool


class AlreadyThere(Exception):
    """An object has this key already.

    :param retried: the request was sent more than once, so that the object may
      be the effect of an earlier attempt whose answer was lost
    """

    def __init__(self, retried: bool) -> None:
        super().__init__(retried)
        self.retried = retried


class _Part(ReadFileChunk):
    """A part of a content.

    Botocore asks for 1 MiB of each part at a time, which malloc keeps for each thread.
    """

    def read(self, amount: int | None = None) -> bytes:
        return super().read(amount and min(amount, CHUNK))


class Bucket:
    """The requests about the objects of one bucket.

    Each method raises an `S3StorageError` that names bucket and key; the cause,
    an error of botocore, is its `__cause__`.

    :param client: boto3 S3 client
    :param engine: makes the requests for parts of an object
    :param name: name of the bucket
    """

    def __init__(self, client: BaseClient, engine: Engine, name: str) -> None:
        self.client = client
        self.engine = engine
        self.name = name

    def put(self, key: str, content: bytes, arguments: Mapping[str, Any]) -> Written:
        """Write an object, in parts beside each other when it is long.

        :param arguments: further arguments of boto3's `put_object`
        """
        in_parts = is_long(content) and not any(map(WHOLE.fullmatch, arguments))
        put = self._put_in_parts if in_parts else self._put_at_once
        try:
            with explained("write the object", self.name, key):
                answer = put(Bucket=self.name, Key=key, content=content, **arguments)
        except ObjectMissing as error:
            remedy = "Check the endpoint (AWS_S3_ENDPOINT_URL) and the bucket"
            raise S3StorageError(
                error.problem, bucket=self.name, key=key, remedy=remedy
            ) from error.__cause__
        return Written(real_version(answer), answer["ETag"], _retries(answer) > 0)

    def _put_at_once(self, content: bytes, **arguments: Any) -> dict[str, Any]:
        return self.client.put_object(Body=content, **arguments)

    def _put_in_parts(self, content: bytes, **arguments: Any) -> dict[str, Any]:
        """As s3transfer does, but without copying the content.

        It would keep ten parts of 8 MiB in memory, beside the content itself.
        """
        condition = {
            name: arguments.pop(name) for name in CONDITIONS if name in arguments
        }
        if self.client.meta.config.request_checksum_calculation == "when_supported":
            set_default_checksum_algorithm(arguments)
        upload = {"Bucket": self.name, "Key": arguments["Key"]}
        answer = self.client.create_multipart_upload(**arguments)
        upload["UploadId"] = answer["UploadId"]

        def send(part: int) -> dict[str, Any]:
            body = BytesIO(content)
            body.seek((part - 1) * PART)
            answer = self.client.upload_part(
                Body=_Part(body, PART, len(content)),
                PartNumber=part,
                **upload,
                **_only(UploadSubmissionTask.UPLOAD_PART_ARGS, arguments),
            )
            checksum = arguments.get("ChecksumAlgorithm")
            names = ["ETag", f"Checksum{checksum}"] if checksum else ["ETag"]
            return {"PartNumber": part, **_only(names, answer)}

        try:
            numbers = range(1, -(-len(content) // PART) + 1)
            parts = self.engine.map(send, numbers)
            return self.client.complete_multipart_upload(
                MultipartUpload={"Parts": parts},
                **upload,
                **condition,
                **_only(UploadSubmissionTask.COMPLETE_MULTIPART_ARGS, arguments),
            )
        except BaseException:
            self._abort(upload)
            raise

    def _abort(self, upload: dict[str, str]) -> None:
        try:
            self.client.abort_multipart_upload(**upload)
        except (ClientError, BotoCoreError) as error:
            logger.error("Parts of an upload may stay: %s (%s)", upload, error)

    def put_new(
        self, key: str, content: bytes, arguments: Mapping[str, Any]
    ) -> Written:
        """Write an object unless there is one, see `put`.

        :raise AlreadyThere: there is one
        """
        try:
            return self.put(key, content, {**arguments, "IfNoneMatch": "*"})
        except S3StorageError as error:
            code = error_code(error.__cause__)
            if code in ("412", "PreconditionFailed"):
                retried = _retries(error.__cause__.response) > 0
                raise AlreadyThere(retried) from error
            if code in ("409", "ConditionalRequestConflict"):  # is written now
                raise AlreadyThere(retried=False) from error
            if code in NOT_IMPLEMENTED:
                return self.put(key, content, arguments)
            raise

    def head(
        self, ref: ObjectRef, arguments: Mapping[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """What S3 tells about an object, None when it is not there.

        :param arguments: the arguments of its upload, where known
        """
        try:
            with explained("look for the object", self.name, str(ref)):
                return self.client.head_object(
                    Bucket=self.name,
                    **ref.arguments,
                    **_only(READ_ARGUMENTS, arguments or {}),
                )
        except S3StorageError as error:
            if is_missing(error, ref.version_id):
                return None
            raise

    def download(self, ref: ObjectRef, **arguments: Any) -> Download:
        """The object, its content on its way.

        :param arguments: further arguments of boto3's `get_object`
        :raise NotModified: see `Download`
        """
        arguments = {"Bucket": self.name, **ref.arguments, **arguments}
        return Download(self.client, self.engine, arguments)

    def holds(
        self, key: str, content: bytes, head: dict, arguments: Mapping[str, Any]
    ) -> bool:
        """Whether the object has exactly this content.

        :param head: the answer to its `head`
        :param arguments: the arguments of its upload, where known
        """
        if head["ContentLength"] != len(content):
            return False
        etag = head.get("ETag", "").strip('"')
        if etag in (md5_as_written(content), md5(content)):
            return True
        # The ETag of an object is its MD5 unless it was uploaded in parts or is
        # encrypted with a key of KMS or of the user:
        # https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
        encryption = head.get("ServerSideEncryption") or "AES256"
        is_md5 = encryption == "AES256" and "SSECustomerAlgorithm" not in head
        if is_md5 and re.fullmatch("[0-9a-f]{32}", etag):
            return False
        view, position = memoryview(content), 0
        reading = _only(READ_ARGUMENTS, arguments)
        for chunk in self.download(ObjectRef(key), **reading).chunks():
            if view[position : position + len(chunk)] != chunk:
                return False
            position += len(chunk)
        return position == len(content)

    def duplicate(
        self, source: ObjectRef, key: str, arguments: Mapping[str, Any]
    ) -> Written:
        """Write an object with the content of another one, on the server.

        :param arguments: further arguments of boto3's `put_object`
        """
        with explained(f"copy the object {source}", self.name, key):
            names = TransferManager.ALLOWED_COPY_ARGS
            copied = {
                **_only(names, arguments),
                "MetadataDirective": "REPLACE",
                "TaggingDirective": "REPLACE",
            }
            answer = self._copy(source, key, copied, arguments)
        return Written(real_version(answer), "", _retries(answer) > 0)

    def copy(self, source: ObjectRef, key: str, arguments: Mapping[str, Any]) -> None:
        """Give an object another key, on the server.

        :param arguments: the arguments of the upload of the source
        """
        names = set(TransferManager.ALLOWED_COPY_ARGS) - COPIED_WITH_THE_OBJECT
        copied = _only(names, arguments)
        for name, value in _only(READ_ARGUMENTS, copied).items():
            if name.startswith("SSE"):
                copied[f"CopySource{name}"] = value
        with explained(f"copy the object {source} to its final key", self.name, key):
            self._copy(source, key, copied, arguments)

    def _copy(
        self,
        source: ObjectRef,
        key: str,
        copied: dict[str, Any],
        arguments: Mapping[str, Any],
    ) -> dict[str, Any]:
        place = {"Bucket": self.name, "Key": key}
        copy_source = {"Bucket": self.name, **source.arguments}
        try:
            return self.client.copy_object(**place, CopySource=copy_source, **copied)
        except ClientError as error:
            if error_code(error) not in TOO_LARGE:
                raise
        # In parts, which take nothing over from the object that is copied.
        names = TransferManager.ALLOWED_COPY_ARGS
        everything = {**copied, **_only(names, arguments)}
        self.client.copy(**place, CopySource=copy_source, ExtraArgs=everything)
        return self.client.head_object(**place, **_only(READ_ARGUMENTS, arguments))

    def etags(self, prefix: str) -> Iterator[tuple[str, str]]:
        """The keys that start with `prefix`, in order, and the ETags."""
        with explained("list the keys that start with", self.name, prefix):
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.name, Prefix=prefix):
                for entry in page.get("Contents", ()):
                    yield entry["Key"], entry["ETag"]

    def versions(self, key: str, content_md5: str = "") -> list[ObjectRef]:
        """The versions of one object.

        :param content_md5: only those with this ETag
        """
        with explained("list the versions of the object", self.name, key):
            pages = self.client.get_paginator("list_object_versions")
            return [
                ObjectRef(key, entry["VersionId"])
                for page in pages.paginate(Bucket=self.name, Prefix=key)
                for entry in page.get("Versions", ())
                if entry["Key"] == key and content_md5 in entry["ETag"]
            ]

    def delete(self, refs: Iterable[ObjectRef]) -> dict[ObjectRef, str]:
        """Delete objects, 1000 per request; one that is not there is deleted.

        :return: why, for each object that could not be deleted
        """
        refs = dict.fromkeys(refs)
        odd = [ref for ref in refs if NOT_XML.search(ref.key)]
        failures = self._delete_singly(odd)
        remaining = iter(refs.keys() - odd)
        while batch := list(islice(remaining, MAX_DELETE)):
            failures.update(self._delete_batch(batch))
        return failures

    def _delete_batch(self, batch: list[ObjectRef]) -> dict[ObjectRef, str]:
        objects = [ref.arguments for ref in batch]
        try:
            with explained(f"delete {len(batch)} objects", self.name):
                answer = self.client.delete_objects(
                    Bucket=self.name, Delete={"Objects": objects, "Quiet": True}
                )
        except S3StorageError as error:
            if _refuses_batches(error.__cause__):
                return self._delete_singly(batch)
            return dict.fromkeys(batch, str(error))
        return {
            ObjectRef(error["Key"], error.get("VersionId") or None): (
                f"{error.get('Code')} {error.get('Message') or ''}".rstrip()
            )
            for error in answer.get("Errors", ())
            if error.get("Code") not in NOT_FOUND
        }

    def _delete_singly(self, refs: Iterable[ObjectRef]) -> dict[ObjectRef, str]:
        refs = list(refs)
        answers = self.engine.map(self._delete_one, refs)
        return {
            ref: reason for ref, reason in zip(refs, answers, strict=True) if reason
        }

    def _delete_one(self, ref: ObjectRef) -> str:
        """Why the object could not be deleted, empty if it was."""
        try:
            with explained("delete the object", self.name, str(ref)):
                self.client.delete_object(Bucket=self.name, **ref.arguments)
        except S3StorageError as error:
            if not is_missing(error, ref.version_id):
                return str(error)
        return ""


def md5(content: bytes) -> str:
    """Hexadecimal MD5, S3's ETag of a plain object."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def md5_as_written(content: bytes) -> str:
    """What the ETag has when `Bucket.put` has written the content."""
    return _md5_of_parts(content) if is_long(content) else md5(content)


def _md5_of_parts(content: bytes) -> str:
    """The ETag, without quotes, of an object that was written in parts by this cube.

    https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
    """
    view = memoryview(content)
    starts = range(0, len(content), PART)
    digests = [
        hashlib.md5(view[start : start + PART], usedforsecurity=False).digest()
        for start in starts
    ]
    return f"{md5(b''.join(digests))}-{len(starts)}"


def is_long(content: bytes) -> bool:
    """Whether the content is written in parts."""
    return len(content) > MAX_SINGLE


def real_version(answer: Mapping[str, Any] | None) -> str | None:
    """The version id in an answer to `put_object` or `head_object`.

    A bucket whose versioning is suspended calls all its versions null.
    """
    version_id = (answer or {}).get("VersionId")
    return version_id if version_id != "null" else None


def _retries(answer: Mapping[str, Any]) -> int:
    return answer.get("ResponseMetadata", {}).get("RetryAttempts", 0)


def _refuses_batches(error: BaseException | None) -> bool:
    """Whether another way to say the same might succeed."""
    if not isinstance(error, ClientError):
        return False
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status == 501 or (400 <= status < 500 and status not in (401, 403, 404))


def _only(names: Iterable[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in names if name in arguments}
