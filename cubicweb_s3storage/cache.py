"""Contents kept on the local disk, for all processes of a host together.

One directory, one file per entry, and a file with the bytes that they take. Nothing is
believed that a digest does not confirm, and nothing is synced: what a crash or a bad
disk spoils is no longer cached, that is all.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import TypeVar

from cubicweb_s3storage.engine import PerProcess

logger = logging.getLogger("cube.s3storage.cache")

T = TypeVar("T")

#: format with its version, digests of name and content, size of the content, ETag
_FIELDS = struct.Struct("<8s32s32sQB255s")
_FORMAT = b"\x93cached\x01"
_MAX_ETAG = 255
_CHECKSUM_SIZE = 16
_HEADER_SIZE = _FIELDS.size + _CHECKSUM_SIZE
_CHUNK = 2**20

_ENTRY = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{16}\.tmp")
_USAGE = "usage"
#: tell the temporary files of a process apart
_numbers = count()
#: bytes that the files take; a checksum follows
_TOTAL = struct.Struct("<Q")
#: parts of the room that processes reserve for themselves, one at a time
_ALLOWANCES = 128

#: what the smallest file takes on a disk
_BLOCK = 4096
#: seconds after which a temporary file was left by a process that died
_ABANDONED = 3600
#: seconds that an operation waits for other processes at most
_PATIENCE = 2.0
#: seconds for which nothing waits after having waited in vain
_PAUSE = 60.0


class Cache:
    """Contents by name, the least recently used of which give way to new ones.

    A disk that is full, damaged or forbidden makes it forget, never raise: each kind
    of problem is logged once. Any number of threads and processes may use a directory
    at once.

    :param directory: where the entries are; created when the first one is written,
        for its owner only
    :param max_bytes: what all entries together may take on the disk; with 0 nothing
        is cached and the directory stays as it is
    """

    def __init__(self, directory: str | os.PathLike[str], max_bytes: int) -> None:
        # A daemon changes its working directory later.
        self.directory = os.path.abspath(directory)
        self.max_bytes = max_bytes
        self._warned: set[tuple[str, int | None]] = set()
        self._paused_until = 0.0
        self._allowance = PerProcess(_Allowance)

    def accepts(self, size: int) -> bool:
        """Whether contents of a size are kept: one must not drive out all others.

        :param size: in bytes
        :return: whether it is at most a quarter of `max_bytes`
        """
        return self.max_bytes > 0 and 0 <= size * 4 <= self.max_bytes

    def peek(self, name: str) -> tuple[str, int] | None:
        """What is known of an entry without reading its content.

        :return: ETag and size in bytes, None when there is no such entry
        """
        return self._use(name, _Entry.peek)

    def read(self, name: str) -> tuple[str, bytes] | None:
        """An entry as a whole.

        :return: ETag and content, None when there is no such entry
        """
        return self._use(name, _Entry.read)

    def open(self, name: str) -> CachedObject | None:
        """An entry to be read in chunks, after all of it has been verified.

        :return: what reads it, to be closed; None when there is no such entry
        """
        return self._use(name, _Entry.open)

    def write(self, name: str, etag: str, content: bytes) -> None:
        """Keep a content, which replaces the one of the same name.

        :param etag: what identifies this content
        """
        with self.writer(name, etag, len(content)) as writer:
            writer.write(content)

    @contextmanager
    def writer(self, name: str, etag: str, size: int) -> Iterator[CacheWriter]:
        """Keep a content that comes in chunks.

        The entry appears at the end of the block, unless an exception ends it or it
        has not written as many bytes as announced.

        :param etag: what identifies this content
        :param size: of the content, in bytes
        :return: a context manager that gives an object with a method `write`
        """
        name_digest = _name_digest(name)
        writer = CacheWriter(self._path(name_digest), name_digest, etag, size)
        try:
            if self.accepts(size) and writer.fits_header:
                writer.attempt(lambda: self._begin(writer))
            yield writer
            if writer.is_complete:
                writer.attempt(writer.publish)
        finally:
            if writer.is_open:
                writer.attempt(writer.discard)
            if writer.error:
                self._warn("cannot be written", writer.error)

    def drop(self, names: Iterable[str]) -> None:
        """Forget entries.

        What another thread or process is writing under these names may still appear.

        :param names: names of entries, which need not exist
        """
        if self.max_bytes > 0:
            for name in names:
                try:
                    _unlink(self._path(_name_digest(name)))
                except OSError as error:
                    self._warn("cannot be cleaned", error)

    # reading ##################################################################

    def _use(self, name: str, use: Callable[[_Entry], T]) -> T | None:
        if self.max_bytes <= 0:
            return None
        name_digest = _name_digest(name)
        path = self._path(name_digest)
        try:
            # A named pipe would block us without O_NONBLOCK.
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("cannot be read", error)
            return None
        try:
            return use(_Entry(file, name_digest))
        except _DamagedError as damage:
            self._warn("has a damaged entry, which is removed", damage)
            self._remove_damaged(path, file)
        except OSError as error:
            self._warn("cannot be read", error)
        finally:
            os.close(file)
        return None

    def _remove_damaged(self, path: str, file: int) -> None:
        # Another process may have replaced it by a sound one.
        with suppress(OSError):
            if os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False)):
                _unlink(path)

    # writing ##################################################################

    def _begin(self, writer: CacheWriter) -> None:
        if self._reserve(writer.cost):
            try:
                writer.create()
            except FileNotFoundError:  # somebody has removed the directory
                self._prepare_directory()
                writer.create()

    def _reserve(self, cost: int) -> bool:
        """Whether there is room for a file; then it is counted already."""
        allowance = self._allowance.get()
        with allowance.lock:
            if allowance.bytes < cost:
                granted = max(cost, self.max_bytes // _ALLOWANCES)
                self._prepare_directory()
                with self._locked_usage() as usage:
                    if not usage.take(granted, self.max_bytes):
                        return False  # others are writing what the rest is for
                allowance.bytes += granted
            allowance.bytes -= cost
        return True

    def _prepare_directory(self) -> None:
        with suppress(FileExistsError):  # as it is, but for the first time
            os.makedirs(self.directory, 0o700)
            os.chmod(self.directory, 0o700)  # whatever the umask
        status = os.stat(os.path.join(self.directory, ""))  # of a directory only
        if status.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "Owned by another user")
        if status.st_mode & 0o077:
            os.chmod(self.directory, 0o700)

    @contextmanager
    def _locked_usage(self) -> Iterator[_Usage]:
        """The shared total, while no other process changes it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(os.path.join(self.directory, _USAGE), flags, 0o600)
        try:
            self._lock(file)
            try:
                yield _Usage(file, self.directory)
            finally:
                # A process forked meanwhile holds the same lock: closing the file
                # would leave it to that process (flock(2)).
                fcntl.flock(file, fcntl.LOCK_UN)
        finally:
            os.close(file)

    def _lock(self, file: int) -> None:
        """Wait for other processes, but not for ever: one may have been stopped."""
        deadline = time.monotonic()
        if deadline >= self._paused_until:
            deadline += _PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    self._paused_until = time.monotonic() + _PAUSE
                    raise TimeoutError(errno.ETIMEDOUT, "Locked for long") from None
            time.sleep(0.0005)

    def _path(self, name_digest: bytes) -> str:
        return os.path.join(self.directory, name_digest.hex())

    def _warn(self, problem: str, error: Exception) -> None:
        kind = problem, getattr(error, "errno", None)
        level = logging.DEBUG if kind in self._warned else logging.WARNING
        self._warned.add(kind)
        logger.log(level, "The cache %s %s: %s", self.directory, problem, error)


class CachedObject:
    """An entry of the cache, open: it stays readable when it is replaced or removed.

    :ivar etag: what identifies this content
    :ivar size: of the content, in bytes
    """

    def __init__(self, file: int, etag: str, size: int) -> None:
        self._file = os.fdopen(file, "rb", buffering=0)
        self.etag = etag
        self.size = size

    def __enter__(self) -> CachedObject:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def chunks(self, size: int = _CHUNK) -> Iterator[bytes]:
        """The content from its beginning; closes the file at the end.

        :param size: of each chunk but the last, in bytes
        :return: non-empty chunks
        :raise OSError: the disk fails to repeat what it gave for verification
        """
        with self._file:
            yield from _chunks(self._file.fileno(), self.size, size)

    def close(self) -> None:
        """Release the file."""
        self._file.close()


class CacheWriter:
    """Takes the content of a new entry.

    Whatever the disk answers, `write` does not raise: the content is just not cached.
    """

    def __init__(self, path: str, name_digest: bytes, etag: str, size: int) -> None:
        self.cost = _cost(_HEADER_SIZE + size)
        self.error: OSError | None = None
        self._path = path
        self._temporary = f"{path}.{os.getpid():08x}{next(_numbers) % 2**32:08x}.tmp"
        self._name_digest = name_digest
        self._etag = _encoded(etag)
        self._size = size
        self._file: int | None = None
        self._written = 0
        self._digest = _hasher()
        self._digest_in_header: bytes | None = None

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append to the content.

        :param chunk: the next bytes
        """
        self._written += len(chunk)
        if self._file is not None and not self.error and self._written <= self._size:
            self._digest.update(chunk)
            self.attempt(lambda: self._append(chunk))

    @property
    def fits_header(self) -> bool:
        return len(self._etag) <= _MAX_ETAG

    @property
    def is_open(self) -> bool:
        return self._file is not None

    @property
    def is_complete(self) -> bool:
        return self.is_open and not self.error and self._written == self._size

    def attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except OSError as error:
            self.error = self.error or error

    def create(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        self._file = os.open(self._temporary, flags, 0o600)
        if self._size > _CHUNK:
            # Another process that counts files finds what this one is going to take.
            os.ftruncate(self._file, _HEADER_SIZE + self._size)

    def publish(self) -> None:
        if self._digest_in_header != self._digest.digest():
            os.pwrite(self._file, self._header(), 0)
        os.replace(self._temporary, self._path)
        self._close()

    def discard(self) -> None:
        self._close()
        _unlink(self._temporary)

    def _append(self, chunk: bytes | bytearray | memoryview) -> None:
        # The header with the first chunk, which often is the whole content.
        is_first = self._digest_in_header is None
        parts = [self._header(), chunk] if is_first else [chunk]
        if os.writev(self._file, parts) < sum(map(len, parts)):
            raise OSError(errno.ENOSPC, "Not all could be written")

    def _header(self) -> bytes:
        self._digest_in_header = digest = self._digest.digest()
        return _header(self._name_digest, digest, self._size, self._etag)

    def _close(self) -> None:
        file, self._file = self._file, None
        # A network file system may tell only now that the disk is full. Reading
        # will notice.
        with suppress(OSError):
            os.close(file)


class _DamagedError(Exception):
    """The file of an entry is not what has been written."""


class _Entry:
    """An entry's file, whose header has been verified.

    :raise _DamagedError: something in it is wrong; so do all methods
    """

    def __init__(self, file: int, name_digest: bytes) -> None:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file")
        header = os.read(file, _HEADER_SIZE)
        if len(header) < _HEADER_SIZE:
            raise _DamagedError("incomplete header")
        fields, checksum = header[: _FIELDS.size], header[_FIELDS.size :]
        if checksum != _checksum(fields):
            raise _DamagedError("wrong checksum of the header")
        unpacked = _FIELDS.unpack(fields)
        magic, whose, self._digest, self._size, etag_length, etag = unpacked
        if (magic, whose) != (_FORMAT, name_digest):
            raise _DamagedError("another format or another entry's file")
        if status.st_size != _HEADER_SIZE + self._size:
            raise _DamagedError("wrong size")
        self._etag = etag[:etag_length].decode("utf-8", "surrogatepass")
        self._file = file

    def peek(self) -> tuple[str, int]:
        return self._etag, self._size

    def read(self) -> tuple[str, bytes]:
        content = b"".join(_chunks(self._file, self._size, self._size))
        self._verify([content])
        return self._etag, content

    def open(self) -> CachedObject:
        self._verify(_chunks(self._file, self._size, _CHUNK))
        return CachedObject(os.dup(self._file), self._etag, self._size)

    def _verify(self, chunks: Iterable[bytes]) -> None:
        digest = _hasher()
        for chunk in chunks:
            digest.update(chunk)
        if digest.digest() != self._digest:
            raise _DamagedError("wrong digest of the content")
        # Some file systems can be read but not be written to.
        with suppress(OSError):
            os.utime(self._file)


class _Allowance:
    """What this process may write before it has to look at the shared total."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.bytes = 0


class _Usage:
    """What the files of a directory take, in a file that is locked by us.

    At most: what is removed is not subtracted, until the files are counted again.
    """

    def __init__(self, file: int, directory: str) -> None:
        self._file = file
        self._directory = directory

    def take(self, size: int, max_bytes: int) -> bool:
        """Count new files of so many bytes, if there is room or can be made."""
        total = self._total()
        if total is None or total + size > max_bytes:
            # Less than the limit: other processes may have allowances left, for which
            # we leave a 16th, and the next write should not count again.
            total = self._evict(max_bytes * 7 // 8 - size) + max_bytes // 16
        if total + size > max_bytes:
            return False
        stored = _TOTAL.pack(total + size)
        os.pwrite(self._file, stored + _checksum(stored), 0)
        return True

    def _total(self) -> int | None:
        stored = os.pread(self._file, _TOTAL.size + _CHECKSUM_SIZE, 0)
        fields, checksum = stored[: _TOTAL.size], stored[_TOTAL.size :]
        return _TOTAL.unpack(fields)[0] if checksum == _checksum(fields) else None

    def _evict(self, target: int) -> int:
        """Remove the least recently used entries down to `target` bytes."""
        total, entries = 0, []
        # First those that may get another name meanwhile: rather twice than never.
        for status, path in self._files(_TEMPORARY):
            if abs(time.time() - status.st_mtime) > _ABANDONED:
                with suppress(OSError):
                    _unlink(path)
                    continue
            total += _cost(status.st_size)
        for status, path in self._files(_ENTRY):
            total += _cost(status.st_size)
            entries.append((status.st_mtime_ns, path, _cost(status.st_size)))
        for _, path, cost in sorted(entries):
            if total <= target:
                break
            with suppress(OSError):
                _unlink(path)
                total -= cost
        return total

    def _files(self, names: re.Pattern[str]) -> Iterator[tuple[os.stat_result, str]]:
        with os.scandir(self._directory) as files:
            for file in files:
                if names.fullmatch(file.name):
                    with suppress(FileNotFoundError):
                        status = file.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            yield status, file.path


def _hasher() -> hashlib.blake2b:
    # As fast as SHA-256 with a processor's help, much faster without.
    return hashlib.blake2b(digest_size=32)


def _checksum(fields: bytes) -> bytes:
    return hashlib.blake2b(fields, digest_size=_CHECKSUM_SIZE).digest()


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _name_digest(name: str) -> bytes:
    return hashlib.sha256(_encoded(name)).digest()


def _header(name_digest: bytes, digest: bytes, size: int, etag: bytes) -> bytes:
    fields = _FIELDS.pack(_FORMAT, name_digest, digest, size, len(etag), etag)
    return fields + _checksum(fields)


def _chunks(file: int, content_size: int, size: int) -> Iterator[bytes]:
    end = _HEADER_SIZE + content_size
    offset = _HEADER_SIZE
    while offset < end:
        chunk = os.pread(file, min(size, end - offset), offset)
        if not chunk:
            raise OSError(errno.EIO, "The file has become shorter")
        yield chunk
        offset += len(chunk)


def _cost(file_size: int) -> int:
    """What a file takes on the disk, as far as its size tells.

    The kernel's number of blocks is not known before they are written out.
    """
    return -(-file_size // _BLOCK) * _BLOCK


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
