"""How objects are named."""

from __future__ import annotations

from typing import NamedTuple

from cubicweb_s3storage.errors import InvalidKey

#: bytes of UTF-8, https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
MAX_KEY_LENGTH = 1024


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


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
