"""What can go wrong between a row and its object, one class per remedy."""


def subject(etype: str, eid: int, attr: str) -> str:
    """How messages name the attribute of an entity."""
    return f"{etype} {eid}, attribute {attr}"


class S3StorageError(Exception):
    """S3, or what was asked of it, prevents a value from being kept or read.

    :param problem: what happened, one sentence without full stop
    :param bucket: name of the bucket
    :param key: key of the object, empty when the problem is not about one
    :param remedy: what to do about it

    Who knows whose value it is says so in the attribute `subject`.
    """

    def __init__(
        self, problem: str, *, bucket: str = "", key: str = "", remedy: str = ""
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.bucket = bucket
        self.key = key
        self.remedy = remedy
        self.subject = ""

    def __str__(self) -> str:
        where = [self.subject] if self.subject else []
        if self.bucket:
            where.append(f"bucket {self.bucket!r}")
        if self.key:
            where.append(f"key {self.key!r}")
        place = f" ({', '.join(where)})" if where else ""
        remedy = f". {self.remedy}" if self.remedy else ""
        return f"{self.problem}{place}{remedy}"


class InvalidKey(S3StorageError, ValueError):
    """The key is not one that S3 accepts."""


class KeyConflict(S3StorageError):
    """Rows would share one key although their contents differ."""


class ObjectMissing(S3StorageError, FileNotFoundError):
    """S3 answered that the object is not there."""


class BucketMissing(S3StorageError):
    """S3 answered that the bucket is not there."""


class AccessRefused(S3StorageError, PermissionError):
    """Credentials are missing or wrong, or do not allow the request."""


class S3Unreachable(S3StorageError, ConnectionError):
    """S3 did not answer, or answered that it cannot serve now."""
