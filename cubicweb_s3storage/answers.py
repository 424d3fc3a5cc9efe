"""What the errors of S3 and botocore mean, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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

from cubicweb_s3storage.errors import (
    AccessRefused,
    BucketMissing,
    ObjectMissing,
    S3StorageError,
    S3Unreachable,
)

NOT_FOUND = {"404", "NotFound", "NoSuchKey", "NoSuchVersion"}
#: answers to a version id that the server cannot even parse
BAD_VERSION = {"400", "BadRequest", "InvalidArgument"}
NOT_IMPLEMENTED = {"501", "NotImplemented"}
UNREACHABLE = (BotoConnectionError, HTTPClientError, IncompleteReadError, OSError)

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


def is_missing(error: S3StorageError, version_id: str | None) -> bool:
    """Whether the error says that the object, or this version, is not there."""
    if isinstance(error, ObjectMissing):
        return True
    return bool(version_id) and error_code(error.__cause__) in BAD_VERSION


@contextmanager
def explained(task: str, bucket: str, key: str = "") -> Iterator[None]:
    """Turn what botocore raises into an `S3StorageError` that a user understands."""
    try:
        yield
    except (ClientError, BotoCoreError) as error:
        raise explanation(error, task, bucket, key) from error


def explanation(
    error: Exception, task: str, bucket: str = "", key: str = ""
) -> S3StorageError:
    """The error to raise in the place of one of botocore, or of a connection."""
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
    if isinstance(error, UNREACHABLE):
        remedy = "Check the endpoint (AWS_S3_ENDPOINT_URL) and the network, try again"
        return S3Unreachable, f"{failed}, S3 is unreachable: {reason}", remedy
    remedy = "Correct the AWS configuration, the bucket or the arguments of the upload"
    return S3StorageError, f"{failed}: {reason}", remedy


def _diagnosis_of_answer(
    error: ClientError, failed: str
) -> tuple[type[S3StorageError], str, str]:
    code = error_code(error)
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


def error_code(error: BaseException | None) -> str:
    if not isinstance(error, ClientError):
        return ""
    return str(error.response.get("Error", {}).get("Code", ""))
