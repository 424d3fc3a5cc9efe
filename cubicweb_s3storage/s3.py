"""Every request to S3 is made here, and nothing here knows CubicWeb."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import boto3
from botocore import session as botocore_session
from botocore.client import BaseClient
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)
from s3transfer.manager import TransferManager

from cubicweb_s3storage.errors import (
    AccessRefused,
    BucketMissing,
    InvalidKey,
    ObjectMissing,
    S3StorageError,
    S3Unreachable,
)

logger = logging.getLogger("cube.s3storage.s3")

#: seconds
CONNECT_TIMEOUT = 5
#: seconds without a byte from the server
READ_TIMEOUT = 30
MAX_CONNECTIONS = 32
#: bytes of UTF-8, https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
MAX_KEY_LENGTH = 1024
#: objects, https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObjects.html
MAX_DELETE = 1000

AWS_DOMAINS = (".amazonaws.com", ".amazonaws.com.cn", ".api.aws")
NOT_FOUND = {"404", "NotFound", "NoSuchKey", "NoSuchVersion"}
#: answers to a version id that the server cannot even parse
BAD_VERSION = {"400", "BadRequest", "InvalidArgument"}
NOT_IMPLEMENTED = {"501", "NotImplemented"}
#: what a key may have and `DeleteObjects`, which is XML 1.0, cannot say
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

CREDENTIALS_REMEDY = {
    "InvalidAccessKeyId": "S3 does not know this access key id: correct it",
    "SignatureDoesNotMatch": "The secret access key is wrong: correct it",
    "ExpiredToken": "Renew the session token",
    "RequestTimeTooSkewed": "Set the clock of this host",
}
NO_CREDENTIALS_REMEDY = (
    "Give credentials as boto3 expects them: AWS_PROFILE, or AWS_ACCESS_KEY_ID and"
    " AWS_SECRET_ACCESS_KEY"
)
PERMISSIONS_REMEDY = (
    "Allow these credentials to get, put, delete and list in this bucket (without"
    " s3:ListBucket, AWS answers so for an object that is not there)"
)

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


def make_client() -> BaseClient:
    """A boto3 S3 client on the endpoint and with the settings of the environment.

    Timeouts, retries and the size of the connection pool are set; retries and
    checksums only where the user's environment or AWS configuration does not.

    :raise S3StorageError: the configuration cannot be used
    """
    try:
        endpoint_url = os.environ.get("AWS_S3_ENDPOINT_URL") or None
        settings: dict[str, Any] = {
            "connect_timeout": CONNECT_TIMEOUT,
            "read_timeout": READ_TIMEOUT,
            "max_pool_connections": MAX_CONNECTIONS,
        }
        if not _chosen_by_user("retry_mode"):
            settings["retries"] = {"mode": "standard"}
        client = boto3.client(
            "s3", endpoint_url=endpoint_url, config=Config(**settings)
        )
        if _is_aws(client.meta.endpoint_url):
            return client
        # Since 1.36 boto3 adds CRC32 trailers, which other servers may refuse:
        # https://github.com/boto/boto3/issues/4392
        for name in ("request_checksum_calculation", "response_checksum_validation"):
            if not _chosen_by_user(name):
                settings[name] = "when_required"
        logger.info("S3 endpoint is %s", client.meta.endpoint_url)
        return boto3.client("s3", endpoint_url=endpoint_url, config=Config(**settings))
    except (BotoCoreError, ValueError) as error:
        raise _explanation(error, "configure the S3 client") from error


def quieten_libraries() -> None:
    """Keep a root logger at DEBUG from switching on the debug logs of boto3.

    They print headers with session tokens and double the time of a request. A
    level that somebody has set stays.
    """
    for name in ("botocore", "boto3", "s3transfer", "urllib3"):
        library = logging.getLogger(name)
        if library.level == logging.NOTSET:
            library.setLevel(logging.INFO)


def _chosen_by_user(setting: str) -> bool:
    profile = boto3.DEFAULT_SESSION.profile_name if boto3.DEFAULT_SESSION else None
    session = botocore_session.Session(
        profile=profile if profile != "default" else None
    )
    return (
        f"AWS_{setting.upper()}" in os.environ or setting in session.get_scoped_config()
    )


def _is_aws(endpoint_url: str) -> bool:
    return (urlsplit(endpoint_url).hostname or "").endswith(AWS_DOMAINS)


class ObjectRef(NamedTuple):
    """One object, or one version of it."""

    key: str
    version_id: str | None = None

    def __str__(self) -> str:
        return f"{self.key} version {self.version_id}" if self.version_id else self.key

    @property
    def arguments(self) -> dict[str, str]:
        version = {"VersionId": self.version_id} if self.version_id else {}
        return {"Key": self.key, **version}


class Written(NamedTuple):
    """The outcome of a write.

    :param version_id: None where the bucket keeps no versions
    :param retried: the request was sent more than once, so that there may be further
      versions, the effects of earlier attempts whose answers were lost
    """

    version_id: str | None
    retried: bool


class AlreadyThere(Exception):
    """An object has this key already.

    :param retried: the request was sent more than once, so that the object may
      be the effect of an earlier attempt whose answer was lost
    """

    def __init__(self, retried: bool) -> None:
        super().__init__(retried)
        self.retried = retried


class Bucket:
    """The requests about the objects of one bucket.

    Each method raises an `S3StorageError` that names bucket and key; the cause,
    an error of botocore, is its `__cause__`.

    :param client: boto3 S3 client
    :param name: name of the bucket
    """

    def __init__(self, client: BaseClient, name: str) -> None:
        self.client = client
        self.name = name

    def put(self, key: str, content: bytes, arguments: Mapping[str, Any]) -> Written:
        """Write an object.

        :param arguments: further arguments of boto3's `put_object`
        """
        try:
            with explained("write the object", self.name, key):
                answer = self.client.put_object(
                    Bucket=self.name, Key=key, Body=content, **arguments
                )
        except ObjectMissing as error:
            remedy = "Check the endpoint (AWS_S3_ENDPOINT_URL) and the bucket"
            raise S3StorageError(
                error.problem, bucket=self.name, key=key, remedy=remedy
            ) from error.__cause__
        return Written(real_version(answer), _retries(answer) > 0)

    def put_new(
        self, key: str, content: bytes, arguments: Mapping[str, Any]
    ) -> Written:
        """Write an object unless there is one, see `put`.

        :raise AlreadyThere: there is one
        """
        try:
            return self.put(key, content, {**arguments, "IfNoneMatch": "*"})
        except S3StorageError as error:
            code = _code(error.__cause__)
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
                    Bucket=self.name, **ref.arguments, **_for_reading(arguments)
                )
        except S3StorageError as error:
            if is_missing(error, ref.version_id):
                return None
            raise

    def get(self, key: str, **arguments: Any) -> bytes:
        """The content of an object.

        :param arguments: further arguments of boto3's `get_object`
        """
        with explained("read the object", self.name, key):
            answer = self.client.get_object(Bucket=self.name, Key=key, **arguments)
            return answer["Body"].read()

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
        if etag == md5(content):
            return True
        # The ETag of an object is its MD5 unless it was uploaded in parts or is
        # encrypted with a key of KMS or of the user:
        # https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
        encryption = head.get("ServerSideEncryption") or "AES256"
        is_md5 = encryption == "AES256" and "SSECustomerAlgorithm" not in head
        if is_md5 and re.fullmatch("[0-9a-f]{32}", etag):
            return False
        return self.get(key, **_for_reading(arguments)) == content

    def copy(self, source: ObjectRef, key: str, arguments: Mapping[str, Any]) -> None:
        """Copy an object inside the bucket, on the server.

        :param arguments: the arguments of the upload of the source
        """
        arguments = {
            name: value
            for name, value in arguments.items()
            if name in TransferManager.ALLOWED_COPY_ARGS
            and name not in COPIED_WITH_THE_OBJECT
        }
        for name, value in _for_reading(arguments).items():
            if name.startswith("SSE"):
                arguments[f"CopySource{name}"] = value
        with explained(f"copy the object {source} to its final key", self.name, key):
            self.client.copy_object(
                Bucket=self.name,
                Key=key,
                CopySource={"Bucket": self.name, **source.arguments},
                **arguments,
            )

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
        failures: dict[ObjectRef, str] = {}
        for ref in refs:
            try:
                with explained("delete the object", self.name, str(ref)):
                    self.client.delete_object(Bucket=self.name, **ref.arguments)
            except S3StorageError as error:
                if not is_missing(error, ref.version_id):
                    failures[ref] = str(error)
        return failures


def check_key(key: object, bucket: str) -> str:
    """The key, if S3 accepts it.

    :raise InvalidKey: not a str, empty, not UTF-8 or too long
    """
    shown = ""
    if not isinstance(key, str):
        problem = f"A key is a str, not the {type(key).__name__} {key!r}"
    elif not key:
        problem = "The key is empty"
    elif (length := len(key.encode(errors="replace"))) > MAX_KEY_LENGTH:
        problem, shown = f"The key has {length} bytes, S3 allows {MAX_KEY_LENGTH}", key
    elif not _is_utf8(key):
        problem, shown = "The key cannot be written in UTF-8", ascii(key)
    else:
        return key
    remedy = "Use another key, see S3Storage.new_s3_key"
    raise InvalidKey(problem, bucket=bucket, key=shown, remedy=remedy)


def md5(content: bytes) -> str:
    """Hexadecimal MD5, S3's ETag of a plain object."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def real_version(answer: Mapping[str, Any] | None) -> str | None:
    """The version id in an answer to `put_object` or `head_object`.

    A bucket whose versioning is suspended calls all its versions null.
    """
    version_id = (answer or {}).get("VersionId")
    return version_id if version_id != "null" else None


def is_missing(error: S3StorageError, version_id: str | None) -> bool:
    """Whether the error says that the object, or this version, is not there."""
    if isinstance(error, ObjectMissing):
        return True
    return bool(version_id) and _code(error.__cause__) in BAD_VERSION


@contextmanager
def explained(task: str, bucket: str, key: str = "") -> Iterator[None]:
    """Turn what botocore raises into an `S3StorageError` that a user understands."""
    try:
        yield
    except (ClientError, BotoCoreError) as error:
        raise _explanation(error, task, bucket, key) from error


def _explanation(
    error: Exception, task: str, bucket: str = "", key: str = ""
) -> S3StorageError:
    kind, problem, remedy = _diagnosis(error, task)
    return kind(problem, bucket=bucket, key=key, remedy=remedy)


def _diagnosis(error: Exception, task: str) -> tuple[type[S3StorageError], str, str]:
    failed = f"Cannot {task}"
    if isinstance(error, ClientError):
        return _diagnosis_of_answer(error, failed)
    reason = str(error).rstrip(". ")
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return AccessRefused, f"{failed}: {reason}", NO_CREDENTIALS_REMEDY
    if isinstance(error, CredentialRetrievalError):
        return AccessRefused, f"{failed}: {reason}", "Correct the credentials"
    if isinstance(error, (BotoConnectionError, HTTPClientError, IncompleteReadError)):
        remedy = "Check the endpoint (AWS_S3_ENDPOINT_URL) and the network, try again"
        return S3Unreachable, f"{failed}, S3 is unreachable: {reason}", remedy
    remedy = "Correct the AWS configuration, the bucket or the arguments of the upload"
    return S3StorageError, f"{failed}: {reason}", remedy


def _diagnosis_of_answer(
    error: ClientError, failed: str
) -> tuple[type[S3StorageError], str, str]:
    code = _code(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    # Ceph leaves the message out.
    message = error.response.get("Error", {}).get("Message") or ""
    answer = f"{failed}, S3 answers {code} {message}".rstrip(" .")
    if code == "NoSuchBucket":
        return BucketMissing, answer, "Create the bucket or correct its name"
    if code in NOT_FOUND:
        remedy = "Restore the object from a backup or another version"
        return ObjectMissing, answer, remedy
    if code in CREDENTIALS_REMEDY:
        return AccessRefused, answer, CREDENTIALS_REMEDY[code]
    if status in (401, 403) or code in ("401", "403"):
        return AccessRefused, answer, PERMISSIONS_REMEDY
    if (status >= 500 and code not in NOT_IMPLEMENTED) or status in (408, 429):
        return S3Unreachable, answer, "Try again when the server has recovered"
    return S3StorageError, answer, ""


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _code(error: BaseException | None) -> str:
    if not isinstance(error, ClientError):
        return ""
    return str(error.response.get("Error", {}).get("Code", ""))


def _retries(answer: Mapping[str, Any]) -> int:
    return answer.get("ResponseMetadata", {}).get("RetryAttempts", 0)


def _refuses_batches(error: BaseException | None) -> bool:
    """Whether another way to say the same might succeed."""
    if not isinstance(error, ClientError):
        return False
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status == 501 or (400 <= status < 500 and status not in (401, 403, 404))


def _for_reading(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        name: value
        for name, value in (arguments or {}).items()
        if name in READ_ARGUMENTS
    }
