"""Contents kept on the local disk, for all processes of a host together.

One directory, one file per entry, and a file with the bytes that they take, which is
what processes lock. Nothing is believed that a digest does not confirm, and nothing is
synced: what a crash or a bad disk spoils is no longer cached, that is all.
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
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from typing import TypeVar

logger = logging.getLogger("cube.s3storage.cache")

T = TypeVar("T")

MIB = 1024 * 1024

#: format with its version, digests of name and content, size of the content, ETag
_FIELDS = struct.Struct("<8s32s32sQB255s")
_FORMAT = b"\x93cached\x01"
_MAX_ETAG = 255
_CHECKSUM_SIZE = 16
_HEADER_SIZE = _FIELDS.size + _CHECKSUM_SIZE

_ENTRY = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{16}\.tmp")
_USAGE = "usage"
#: bytes that the files take, when they were counted (seconds since 1970), checksum
_TOTAL = struct.Struct("<QQ16s")

#: what the smallest file takes on a disk
_BLOCK = 4096
#: seconds after which files are counted again, and after which a temporary file
#: that nobody has written to was left by a process that died
_HOUR = 3600
#: seconds that an operation waits for other processes at most
_PATIENCE = 2.0
#: seconds for which nothing waits after having waited in vain
_PAUSE = 60.0


class Cache:
    """Contents by name, the least recently used of which give way to new ones.

    A disk that is full, damaged or forbidden makes it forget, never raise: each kind
    of problem is logged once. Any number of threads and processes may use a directory
    at once, through as many objects as they like.

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

    def accepts(self, size: int) -> bool:
        """Whether contents of a size are kept: one must not drive out all others.

        :param size: in bytes
        :return: whether it is at most a quarter of `max_bytes`
        """
        return self.max_bytes > 0 and 0 <= size * 4 <= self.max_bytes

    def peek(self, name: str) -> tuple[str, int] | None:
        """What is known of an entry without reading its content.

        :param name: name of the entry
        :return: ETag and size in bytes, None when there is no such entry
        """
        return self._use(name, _Entry.peek)

    def read(self, name: str) -> tuple[str, bytes] | None:
        """An entry as a whole.

        :param name: name of the entry
        :return: ETag and content, None when there is no such entry
        """
        return self._use(name, _Entry.read)

    def open(self, name: str) -> CachedObject | None:
        """An entry to be read in chunks, after all of it has been verified.

        :param name: name of the entry
        :return: what reads it, to be closed; None when there is no such entry
        """
        return self._use(name, _Entry.open)

    def write(self, name: str, etag: str, content: bytes) -> None:
        """Keep a content, which replaces the one of the same name.

        :param name: name of the entry
        :param etag: what identifies this content
        :param content: the content
        """
        with self.writer(name, etag, len(content)) as writer:
            writer.write(content)

    @contextmanager
    def writer(self, name: str, etag: str, size: int) -> Iterator[CacheWriter]:
        """Keep a content that comes in chunks.

        The entry appears at the end of the block, unless an exception ends it or it
        has not written as many bytes as announced.

        :param name: name of the entry
        :param etag: what identifies this content
        :param size: of the content, in bytes
        :return: a context manager that gives an object with a method `write`
        """
        writer = CacheWriter(name, etag, size)
        if self.accepts(size) and writer.fits_header:
            self._try_to_write(self._begin, writer)
        try:
            yield writer
            if writer.is_complete:
                self._try_to_write(self._publish, writer)
        finally:
            if writer.is_open:
                self._try_to_write(self._discard, writer)
            if writer.error:
                self._warn("cannot be written", writer.error)

    def drop(self, names: Iterable[str]) -> None:
        """Forget entries.

        What another thread or process is writing under these names may still appear.

        :param names: names of entries, which need not exist
        """
        if self.max_bytes <= 0:
            return
        try:
            with self._opened_directory() as directory:
                self._remove(directory, [_file_name(name) for name in names])
        except FileNotFoundError:
            pass
        except OSError as error:
            self._warn("cannot be cleaned", error)

    def _use(self, name: str, use: Callable[[_Entry], T]) -> T | None:
        if self.max_bytes <= 0:
            return None
        try:
            with self._opened_directory() as directory:
                return self._use_file(directory, name, use)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("cannot be read", error)
            return None

    def _use_file(
        self, directory: int, name: str, use: Callable[[_Entry], T]
    ) -> T | None:
        # A named pipe would block us without O_NONBLOCK.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        file_name = _file_name(name)
        with FileIO(os.open(file_name, flags, dir_fd=directory)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "Not a regular file", file_name)
            try:
                return use(_Entry(file, status.st_size, name))
            except _DamagedError as damage:
                self._warn("has a damaged entry, which is removed", damage)
                self._remove_damaged(directory, file_name, status)
        return None

    def _try_to_write(
        self, step: Callable[[CacheWriter], None], writer: CacheWriter
    ) -> None:
        try:
            step(writer)
        except OSError as error:
            writer.error = writer.error or error

    def _begin(self, writer: CacheWriter) -> None:
        with (
            self._opened_directory(create=True) as directory,
            self._locked_usage(directory) as usage,
        ):
            usage.count(writer.cost, self.max_bytes)
            if usage.total + writer.cost > self.max_bytes:
                return  # others are writing what the rest is for
            # A crash between the two leaves a total that is too high, which
            # counting corrects; one that is too low would let the files grow.
            usage.add(writer.cost)
            try:
                writer.create(directory)
            except OSError:
                usage.add(-writer.cost)
                raise

    def _publish(self, writer: CacheWriter) -> None:
        writer.finish()
        with (
            self._opened_directory() as directory,
            self._locked_usage(directory) as usage,
        ):
            replaced = _cost_of(directory, writer.file_name)
            writer.rename(directory)
            usage.add(-replaced)

    def _discard(self, writer: CacheWriter) -> None:
        writer.close()
        with self._opened_directory() as directory:
            self._remove(directory, [writer.temporary_name])

    def _remove(self, directory: int, file_names: list[str]) -> None:
        try:
            with self._locked_usage(directory) as usage:
                for file_name in file_names:
                    usage.add(-_unlink(directory, file_name))
        except OSError as error:
            # The total becomes too high, at worst. What is unwanted has to go.
            self._warn("cannot account for what is removed", error)
            for file_name in file_names:
                _unlink(directory, file_name)

    def _remove_damaged(
        self, directory: int, file_name: str, damaged: os.stat_result
    ) -> None:
        with self._locked_usage(directory) as usage:
            now = _status(directory, file_name)
            # Another process may have replaced it by a sound one.
            if now and (now.st_dev, now.st_ino) == (damaged.st_dev, damaged.st_ino):
                usage.add(-_unlink(directory, file_name))

    @contextmanager
    def _opened_directory(self, create: bool = False) -> Iterator[int]:
        try:
            directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            if not create:
                raise
            self._make_directory()
            directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            status = os.fstat(directory)
            if status.st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "Owned by another user")
            if status.st_mode & 0o077:
                os.fchmod(directory, 0o700)
            yield directory
        finally:
            os.close(directory)

    def _make_directory(self) -> None:
        with suppress(FileExistsError):  # another process was faster
            os.makedirs(self.directory, 0o700)
            os.chmod(self.directory, 0o700)  # whatever the umask

    @contextmanager
    def _locked_usage(self, directory: int) -> Iterator[_Usage]:
        """The shared total, while nobody else changes it or the list of files."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        with FileIO(os.open(_USAGE, flags, 0o600, dir_fd=directory), "r+") as file:
            self._lock(file)
            try:
                yield _Usage(file, directory)
            finally:
                # A process forked meanwhile holds the same lock: closing the file
                # here would leave it to that process (flock(2)).
                fcntl.flock(file, fcntl.LOCK_UN)

    def _lock(self, file: FileIO) -> None:
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

    def __init__(self, file: FileIO, etag: str, size: int) -> None:
        self._file = file
        self.etag = etag
        self.size = size

    def __enter__(self) -> CachedObject:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def chunks(self, size: int = MIB) -> Iterator[bytes]:
        """The content from its beginning.

        :param size: of each chunk but the last, in bytes
        :return: non-empty chunks
        :raise OSError: the disk fails to repeat what it gave for verification
        """
        return _chunks(self._file, self.size, size)

    def close(self) -> None:
        """Release the file."""
        self._file.close()


class CacheWriter:
    """Takes the content of a new entry.

    Whatever the disk answers, `write` does not raise: the content is just not cached.
    """

    def __init__(self, name: str, etag: str, size: int) -> None:
        self.file_name = _file_name(name)
        self.temporary_name = f"{self.file_name}.{os.urandom(8).hex()}.tmp"
        self.cost = _cost(_HEADER_SIZE + size)
        self.error: OSError | None = None
        self._name = name
        self._etag = _encoded(etag)
        self._size = size
        self._file: FileIO | None = None
        self._written = 0
        self._digest = _hasher()

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append to the content.

        :param chunk: the next bytes
        """
        if self._file is None or self.error:
            return
        with memoryview(chunk).cast("B") as view:
            self._written += len(view)
            if self._written > self._size:
                return
            self._digest.update(view)
            try:
                self._pwrite(view, _HEADER_SIZE + self._written - len(view))
            except OSError as error:
                self.error = error

    @property
    def fits_header(self) -> bool:
        return len(self._etag) <= _MAX_ETAG

    @property
    def is_open(self) -> bool:
        return self._file is not None

    @property
    def is_complete(self) -> bool:
        return self.is_open and not self.error and self._written == self._size

    def create(self, directory: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(self.temporary_name, flags, 0o600, dir_fd=directory)
        self._file = FileIO(descriptor, "w")
        os.fchmod(descriptor, 0o600)  # whatever the umask
        # Counting files finds what this one is going to take.
        os.ftruncate(descriptor, _HEADER_SIZE + self._size)

    def finish(self) -> None:
        header = _header(self._name, self._digest.digest(), self._size, self._etag)
        self._pwrite(memoryview(header), 0)
        _mark_as_used(self._file)

    def rename(self, directory: int) -> None:
        os.replace(
            self.temporary_name,
            self.file_name,
            src_dir_fd=directory,
            dst_dir_fd=directory,
        )
        self.close()

    def close(self) -> None:
        # A network file system may tell only now that the disk is full. Reading
        # will notice.
        with suppress(OSError):
            self._file.close()
        self._file = None

    def _pwrite(self, view: memoryview, offset: int) -> None:
        while view:
            written = os.pwrite(self._file.fileno(), view, offset)
            view = view[written:]
            offset += written


class _DamagedError(Exception):
    """The file of an entry is not what has been written."""


class _Entry:
    """An entry's file, whose header has been verified.

    :raise _DamagedError: something in it is wrong; so do all methods
    """

    def __init__(self, file: FileIO, file_size: int, name: str) -> None:
        header = file.read(_HEADER_SIZE)
        if len(header) < _HEADER_SIZE:
            raise _DamagedError("incomplete header")
        fields, checksum = header[: _FIELDS.size], header[_FIELDS.size :]
        if checksum != _checksum(fields):
            raise _DamagedError("wrong checksum of the header")
        unpacked = _FIELDS.unpack(fields)
        magic, name_digest, self._digest, self._size, etag_length, etag = unpacked
        if (magic, name_digest) != (_FORMAT, _name_digest(name)):
            raise _DamagedError("another format or another entry's file")
        if file_size != _HEADER_SIZE + self._size:
            raise _DamagedError("wrong size")
        self._etag = etag[:etag_length].decode("utf-8", "surrogatepass")
        self._file = file

    def peek(self) -> tuple[str, int]:
        return self._etag, self._size

    def read(self) -> tuple[str, bytes]:
        content = self._file.readall()
        self._verify([content])
        self._mark_as_used()
        return self._etag, content

    def open(self) -> CachedObject:
        self._verify(_chunks(self._file, self._size, MIB))
        self._mark_as_used()
        file = FileIO(os.dup(self._file.fileno()))
        return CachedObject(file, self._etag, self._size)

    def _verify(self, chunks: Iterable[bytes]) -> None:
        digest = _hasher()
        for chunk in chunks:
            digest.update(chunk)
        if digest.digest() != self._digest:
            raise _DamagedError("wrong digest of the content")

    def _mark_as_used(self) -> None:
        # Some file systems can be read but not be written to.
        with suppress(OSError):
            _mark_as_used(self._file)


class _Usage:
    """What the files of a directory take, in a file that is locked by us."""

    def __init__(self, file: FileIO, directory: int) -> None:
        self._file = file
        self._directory = directory
        self.total = 0
        self._counted = 0
        stored = file.read(_TOTAL.size)
        if len(stored) == _TOTAL.size:
            total, counted, checksum = _TOTAL.unpack(stored)
            if checksum == _checksum(stored[:-_CHECKSUM_SIZE]):
                self.total, self._counted = total, counted

    def add(self, cost: int) -> None:
        """Store that files were added, or removed when negative."""
        if cost:
            self._store(max(0, self.total + cost))

    def count(self, needed: int, max_bytes: int) -> None:
        """Count the files where the total says so, and evict for a new one.

        Also once an hour: files that were removed by hand or left by a dead process
        are noticed by nothing else.
        """
        is_recent = abs(time.time() - self._counted) < _HOUR
        if is_recent and self.total + needed <= max_bytes:
            return
        total, entries = self._list()
        if total + needed > max_bytes:
            # Not just to the limit, or the next write would list them all again.
            target = max_bytes * 9 // 10 - needed
            for _, file_name in sorted(entries):
                if total <= target:
                    break
                with suppress(OSError):
                    total -= _unlink(self._directory, file_name)
        self._counted = int(time.time())
        os.fchmod(self._file.fileno(), 0o600)  # whatever the umask
        self._store(total)

    def _list(self) -> tuple[int, list[tuple[int, str]]]:
        """What all files take, and the entries with the time of their last use."""
        total, entries = 0, []
        with os.scandir(self._directory) as files:
            for file in files:
                is_entry = _ENTRY.fullmatch(file.name)
                if not is_entry and not _TEMPORARY.fullmatch(file.name):
                    continue
                try:
                    status = file.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if not stat.S_ISREG(status.st_mode):
                    continue
                if is_entry:
                    entries.append((status.st_mtime_ns, file.name))
                elif abs(time.time() - status.st_mtime) > _HOUR:
                    with suppress(OSError):
                        _unlink(self._directory, file.name)
                        continue
                total += _cost(status.st_size)
        return total, entries

    def _store(self, total: int) -> None:
        fields = _TOTAL.pack(total, self._counted, b"")[:-_CHECKSUM_SIZE]
        os.pwrite(self._file.fileno(), fields + _checksum(fields), 0)
        self.total = total


def _hasher() -> hashlib.blake2b:
    # As fast as SHA-256 with a processor's help, much faster without.
    return hashlib.blake2b(digest_size=32)


def _checksum(fields: bytes) -> bytes:
    return hashlib.blake2b(fields, digest_size=_CHECKSUM_SIZE).digest()


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _name_digest(name: str) -> bytes:
    return hashlib.sha256(_encoded(name)).digest()


def _file_name(name: str) -> str:
    return _name_digest(name).hex()


def _header(name: str, digest: bytes, size: int, etag: bytes) -> bytes:
    fields = _FIELDS.pack(_FORMAT, _name_digest(name), digest, size, len(etag), etag)
    return fields + _checksum(fields)


def _chunks(file: FileIO, content_size: int, size: int) -> Iterator[bytes]:
    end = _HEADER_SIZE + content_size
    offset = _HEADER_SIZE
    while offset < end:
        chunk = os.pread(file.fileno(), min(size, end - offset), offset)
        if not chunk:
            raise OSError(errno.EIO, "The file has become shorter")
        yield chunk
        offset += len(chunk)


def _mark_as_used(file: FileIO) -> None:
    # The kernel's own time stamps are too coarse to tell which use was the last.
    now = time.time_ns()
    os.utime(file.fileno(), ns=(now, now))


def _cost(file_size: int) -> int:
    """What a file takes on the disk, as far as its size tells.

    The kernel's number of blocks is not known before they are written out.
    """
    return -(-file_size // _BLOCK) * _BLOCK


def _status(directory: int, file_name: str) -> os.stat_result | None:
    try:
        return os.stat(file_name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _cost_of(directory: int, file_name: str) -> int:
    status = _status(directory, file_name)
    return _cost(status.st_size) if status and stat.S_ISREG(status.st_mode) else 0


def _unlink(directory: int, file_name: str) -> int:
    """Remove a file, if it is there, and return what it took."""
    cost = _cost_of(directory, file_name)
    try:
        os.unlink(file_name, dir_fd=directory)
    except FileNotFoundError:
        return 0
    return cost
