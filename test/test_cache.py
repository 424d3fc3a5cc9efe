"""The cache on disk: right bytes or none, within its bounds, whatever the disk does."""

import errno
import fcntl
import hashlib
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import tracemalloc
import unittest
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from unittest import mock

from cubicweb_s3storage.cache import Cache, CachedObject

MIB = 1024 * 1024
NOBODY = 65534
LOGGER = "cube.s3storage.cache"
HEADER_SIZE = 352


def on_disk(size: int) -> int:
    return -(-size // 4096) * 4096


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def in_child(function: Callable[[], object]) -> int:
    """Fork a process that ends with 0 if the function returns something true."""
    child = os.fork()
    if child:
        return child
    try:
        signal.alarm(60)  # what hangs fails
        os._exit(0 if function() else 1)
    finally:
        os._exit(2)


class CacheTC(unittest.TestCase):
    max_bytes = 16 * MIB

    def setUp(self):
        parent = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, parent)
        parent.chmod(0o711)  # other users have to get there
        self.directory = parent / "below" / "cache"
        self.cache = self.new_cache()

    def new_cache(self, max_bytes: int | None = None) -> Cache:
        return Cache(self.directory, max_bytes or self.max_bytes)

    def path(self, name: str) -> Path:
        return self.directory / hashlib.sha256(name.encode()).hexdigest()

    def files(self) -> list[Path]:
        return [path for path in self.directory.iterdir() if path.name != "usage"]

    def used(self) -> int:
        """What the files take; while the lock is held none is removed."""
        total = 0
        with open(self.directory / "usage", "rb") as usage:
            fcntl.flock(usage, fcntl.LOCK_EX)
            for path in self.files():
                with suppress(FileNotFoundError):
                    total += on_disk(path.stat().st_size)
            fcntl.flock(usage, fcntl.LOCK_UN)
        return total

    def have_it_counted(self) -> None:
        """Have the next one who needs an allowance count the files."""
        (self.directory / "usage").unlink()

    def streamed(self, name: str, size: int = MIB) -> bytes | None:
        found = self.cache.open(name)
        if found is None:
            return None
        with found:
            return b"".join(found.chunks(size))

    def assert_absent(self, name: str, cache: Cache | None = None) -> None:
        cache = cache or self.cache
        self.assertIsNone(cache.read(name))
        self.assertIsNone(cache.open(name))
        self.assertIsNone(cache.peek(name))

    def assert_children_succeed(self, *children: int) -> None:
        endings = [os.waitpid(child, 0)[1] for child in children]
        self.assertEqual(endings, [0] * len(children))

    def assert_no_temporary_file(self) -> None:
        self.assertEqual([path for path in self.files() if path.suffix == ".tmp"], [])


class ContentTC(CacheTC):
    def test_what_was_written_is_read(self):
        content = os.urandom(100_000)
        self.cache.write("name", '"etag"', content)
        self.assertEqual(self.cache.read("name"), ('"etag"', content))
        self.assertEqual(self.cache.peek("name"), ('"etag"', len(content)))
        with self.cache.open("name") as found:
            self.assertEqual((found.etag, found.size), ('"etag"', len(content)))
            chunks = list(found.chunks(30_000))
        self.assertEqual([len(chunk) for chunk in chunks], [30_000] * 3 + [10_000])
        self.assertEqual(b"".join(chunks), content)

    def test_another_object_and_another_process_read_it(self):
        self.cache.write("name", "etag", b"content")
        child = in_child(lambda: self.new_cache().read("name") == ("etag", b"content"))
        self.assert_children_succeed(child)

    def test_content_in_chunks_of_any_kind(self):
        with self.cache.writer("name", "etag", 8) as writer:
            writer.write(b"ab")
            writer.write(bytearray(b"cd"))
            writer.write(b"")
            writer.write(memoryview(b"efgh"))
        self.assertEqual(self.cache.read("name"), ("etag", b"abcdefgh"))

    def test_empty_content(self):
        self.cache.write("whole", "etag", b"")
        with self.cache.writer("chunks", "etag", 0) as writer:
            writer.write(b"")
            writer.write(b"")
        with self.cache.writer("no chunk", "etag", 0):
            pass
        for name in ("whole", "chunks", "no chunk"):
            self.assertEqual(self.cache.read(name), ("etag", b""))
            self.assertEqual(self.streamed(name), b"")

    def test_an_unknown_name(self):
        self.assert_absent("name")
        self.cache.write("other", "etag", b"content")
        self.assert_absent("name")

    def test_names_and_etags_are_any_text(self):
        for name in ("", "../..", "a\0b", "é" * 500, "\udcff"):
            self.cache.write(name, "é\udcff", name.encode("utf-8", "replace"))
        for name in ("", "../..", "a\0b", "é" * 500, "\udcff"):
            content = name.encode("utf-8", "replace")
            self.assertEqual(self.cache.read(name), ("é\udcff", content))
        self.assertEqual(list(self.directory.parent.iterdir()), [self.directory])

    def test_an_etag_that_is_too_long(self):
        self.cache.write("long", "e" * 255, b"content")
        self.cache.write("too long", "e" * 256, b"content")
        self.assertEqual(self.cache.read("long"), ("e" * 255, b"content"))
        self.assert_absent("too long")

    def test_a_replaced_entry(self):
        self.cache.write("name", "old", b"o" * 50_000)
        self.cache.write("name", "new", b"new")
        self.assertEqual(self.cache.read("name"), ("new", b"new"))
        self.assertEqual(self.used(), 4096)

    def test_an_open_entry_survives_its_removal(self):
        self.cache.write("name", "old", b"old")
        with self.cache.open("name") as found:
            self.cache.write("name", "new", b"new")
            self.cache.drop(["name"])
            self.assertEqual(list(found.chunks()), [b"old"])

    def test_dropped_entries(self):
        for name in "abc":
            self.cache.write(name, "etag", b"content")
        self.cache.drop(name for name in ("a", "b", "unknown"))
        self.assert_absent("a")
        self.assert_absent("b")
        self.assertEqual(self.cache.read("c"), ("etag", b"content"))

    def test_nothing_to_drop(self):
        self.cache.drop(["name"])
        self.assertFalse(self.directory.exists())

    def test_off(self):
        for max_bytes in (0, -1):
            cache = Cache(self.directory, max_bytes)
            self.assertFalse(cache.accepts(0))
            cache.write("name", "etag", b"")
            with cache.writer("name", "etag", 1) as writer:
                writer.write(b"c")
            self.assert_absent("name", cache)
            cache.drop(["name"])
        self.assertFalse(self.directory.parent.exists())

    def test_reading_takes_the_memory_of_the_content(self):
        size = 4 * MIB
        self.cache.write("name", "etag", os.urandom(size))
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.assertEqual(len(self.cache.read("name")[1]), size)
        self.assertLess(tracemalloc.get_traced_memory()[1], 1.2 * size)

    def test_streaming_takes_constant_memory(self):
        size = 4 * MIB
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        with self.cache.writer("name", "etag", size) as writer:
            for _ in range(64):
                writer.write(bytes(size // 64))
        with self.cache.open("name") as found:
            self.assertEqual(sum(map(len, found.chunks(65536))), size)
        self.assertLess(tracemalloc.get_traced_memory()[1], 2.5 * MIB)


class InterruptionTC(CacheTC):
    def test_nothing_is_visible_before_the_end(self):
        with self.cache.writer("name", "etag", 7) as writer:
            writer.write(b"content")
            self.assert_absent("name")
        self.assertEqual(self.cache.read("name"), ("etag", b"content"))

    def test_an_exception_discards_and_propagates(self):
        before = descriptors()
        for exception in (ZeroDivisionError, KeyboardInterrupt, FileNotFoundError):
            with self.assertRaises(exception):
                with self.cache.writer("name", "etag", 7) as writer:
                    writer.write(b"content")
                    raise exception
            self.assert_absent("name")
            self.assertEqual(self.files(), [])
        self.assertEqual(descriptors(), before)

    def test_too_few_or_too_many_bytes(self):
        for content in (b"", b"conten", b"content."):
            self.cache.write("name", "etag", b"old")
            with self.cache.writer("name", "etag", 7) as writer:
                for byte in content:
                    writer.write(bytes([byte]))
            self.assertEqual(self.cache.read("name"), ("etag", b"old"))
            self.assertEqual(self.files(), [self.path("name")])

    def test_what_a_killed_writer_left_is_removed_an_hour_later(self):
        content = os.urandom(2 * MIB)
        reading, writing = os.pipe()

        def write_half() -> None:
            with self.cache.writer("name", "etag", len(content)) as writer:
                writer.write(content[:MIB])
                os.write(writing, b".")
                signal.pause()

        child = in_child(write_half)
        os.read(reading, 1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
        self.assert_absent("name")
        (temporary,) = self.files()
        for is_left in (True, False):
            for number in range(10):
                self.cache.write(str(number), "etag", bytes(3 * MIB))
            self.assertLessEqual(self.used(), self.max_bytes)
            self.assertEqual(temporary.exists(), is_left)
            if is_left:
                an_hour_ago = temporary.stat().st_mtime - 3700
                os.utime(temporary, (an_hour_ago, an_hour_ago))
        self.cache.write("name", "etag", content)
        self.assertEqual(self.cache.read("name"), ("etag", content))

    def test_more_bytes_than_announced_do_not_get_onto_the_disk(self):
        with self.cache.writer("name", "etag", 10) as writer:
            writer.write(bytes(MIB))
            self.assertLessEqual(self.used(), 4096)
        self.assert_absent("name")

    def test_other_files_are_left_alone(self):
        self.directory.mkdir(parents=True)
        other = self.directory / "other.tmp"
        other.write_bytes(b"precious")
        os.utime(other, (0, 0))
        for number in range(10):
            self.cache.write(str(number), "etag", bytes(3 * MIB))
        self.assertEqual(other.read_bytes(), b"precious")


class DamageTC(CacheTC):
    content = random.Random(1).randbytes(20_000)

    def damaged(self, damage: Callable[[Path], object]) -> Path:
        self.cache.write("name", "etag", self.content)
        path = self.path("name")
        damage(path)
        return path

    def flip(self, offset: int) -> Callable[[Path], object]:
        def flip(path: Path) -> None:
            content = bytearray(path.read_bytes())
            content[offset] ^= 1
            path.write_bytes(content)

        return flip

    def assert_removed(self, damage: Callable[[Path], object]) -> None:
        """No way of reading returns the entry, and each removes it."""
        for read in (self.cache.read, self.streamed):
            path = self.damaged(damage)
            self.assertIsNone(read("name"))
            self.assertFalse(os.path.lexists(path))
        self.assert_absent("name")

    def test_a_wrong_byte_in_the_content(self):
        for offset in (HEADER_SIZE, -1, 10_000):
            self.assert_removed(self.flip(offset))

    def test_a_wrong_byte_anywhere_in_the_header(self):
        for offset in range(0, HEADER_SIZE, 7):
            path = self.damaged(self.flip(offset))
            self.assertIsNone(self.cache.peek("name"))
            self.assertFalse(path.exists())
        self.assert_removed(self.flip(3))

    def test_a_truncated_file(self):
        for size in (0, 1, HEADER_SIZE - 1, HEADER_SIZE, 19_000):
            self.assert_removed(lambda path, size=size: os.truncate(path, size))
            self.damaged(lambda path, size=size: os.truncate(path, size))
            self.assertIsNone(self.cache.peek("name"))

    def test_an_extended_file(self):
        self.assert_removed(lambda path: path.write_bytes(path.read_bytes() + b"0"))

    def test_a_file_of_zeros(self):
        self.assert_removed(lambda path: path.write_bytes(bytes(20_000 + HEADER_SIZE)))

    def test_the_file_of_another_entry(self):
        self.cache.write("other", "etag", b"other")
        self.assert_removed(lambda path: shutil.copy(self.path("other"), path))
        self.assertEqual(self.cache.read("other"), ("etag", b"other"))

    def test_a_damage_is_logged_once(self):
        with self.assertLogs(LOGGER, "WARNING") as logs:
            for offset in (1, HEADER_SIZE + 1):
                self.damaged(self.flip(offset))
                self.cache.read("name")
        self.assertEqual(len(logs.records), 1)

    def test_a_directory_in_place_of_the_file(self):
        path = self.damaged(lambda path: (path.unlink(), path.mkdir()))
        self.assert_absent("name")
        self.cache.write("name", "etag", self.content)
        self.assert_absent("name")
        self.assertEqual(self.files(), [path])

    def test_a_symbolic_link_is_not_followed(self):
        self.cache.write("name", "etag", self.content)
        path = self.path("name")
        elsewhere = self.directory.parent / "elsewhere"
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
        self.assert_absent("name")
        self.cache.write("name", "new", b"new")
        self.assertEqual(self.cache.read("name"), ("new", b"new"))
        self.assertEqual(elsewhere.stat().st_size, HEADER_SIZE + len(self.content))

    def test_a_named_pipe_does_not_block(self):
        path = self.damaged(lambda path: (path.unlink(), os.mkfifo(path)))
        child = in_child(lambda: self.cache.read("name") is None)
        self.assert_children_succeed(child)
        self.assertTrue(path.is_fifo())

    def test_a_damaged_file_that_another_process_has_just_replaced(self):
        path = self.damaged(lambda path: None)
        sound = shutil.copy(path, self.directory.parent)
        self.flip(-1)(path)
        fstat = os.fstat

        def replace_first(file: int) -> os.stat_result:
            if os.path.exists(sound):
                os.replace(sound, path)
            return fstat(file)

        with mock.patch("os.fstat", replace_first):
            self.assertIsNone(self.cache.read("name"))
        self.assertEqual(self.cache.read("name"), ("etag", self.content))

    def test_a_disk_that_can_only_be_read(self):
        self.cache.write("name", "etag", self.content)
        refusal = OSError(errno.EROFS, "Read-only file system")
        with mock.patch("os.utime", side_effect=refusal):
            self.assertEqual(self.cache.read("name"), ("etag", self.content))
            self.assertEqual(self.streamed("name"), self.content)

    def test_a_disk_that_cannot_be_read(self):
        self.cache.write("name", "etag", self.content)
        with mock.patch("os.pread", side_effect=OSError(errno.EIO, "Bad sector")):
            with self.assertLogs(LOGGER, "WARNING"):
                self.assertIsNone(self.cache.open("name"))
        self.assertEqual(self.streamed("name"), self.content)

    def test_a_file_that_shrinks_while_it_is_handed_out(self):
        path = self.damaged(lambda path: None)
        with self.cache.open("name") as found:
            os.truncate(path, HEADER_SIZE + 10)
            with self.assertRaises(OSError):
                list(found.chunks())


class DirectoryTC(CacheTC):
    def mode(self, path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    def test_nothing_is_accessible_to_others_whatever_the_umask(self):
        for umask in (0, 0o277):
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.parent.mkdir(exist_ok=True)
            old = os.umask(umask)
            try:
                self.new_cache().write("name", "etag", b"content")
            finally:
                os.umask(old)
            self.assertEqual(self.mode(self.directory), 0o700)
            for path in self.directory.iterdir():
                self.assertEqual(self.mode(path) & 0o077, 0)
            self.assertEqual(self.cache.read("name"), ("etag", b"content"))

    def test_a_directory_that_others_may_enter_is_closed_to_them(self):
        self.directory.mkdir(parents=True)
        self.directory.chmod(0o777)
        self.cache.write("name", "etag", b"content")
        self.assertEqual(self.mode(self.directory), 0o700)

    def test_a_relative_directory_stays_where_it_was(self):
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(self.directory.parent.parent)
        cache = Cache("relative", self.max_bytes)
        os.chdir("/")
        cache.write("name", "etag", b"content")
        self.assertTrue((self.directory.parent.parent / "relative").is_dir())

    def test_a_directory_that_vanishes(self):
        for _ in range(3):
            self.cache.write("name", "etag", b"content")
            self.assertEqual(self.cache.read("name"), ("etag", b"content"))
            self.assertEqual(self.mode(self.directory), 0o700)
            with self.cache.writer("other", "etag", 7) as writer:
                shutil.rmtree(self.directory)
                writer.write(b"content")
            self.assert_absent("name")
            self.cache.drop(["name"])

    def test_a_file_in_place_of_the_directory(self):
        self.directory.parent.mkdir()
        self.directory.write_bytes(b"precious")
        self.directory.chmod(0o644)
        with self.assertLogs(LOGGER, "WARNING") as logs:
            for _ in range(2):
                self.cache.write("name", "etag", b"content")
                self.assert_absent("name")
                self.cache.drop(["name"])
        self.assertEqual(len(logs.records), 3)  # writing, reading, removing
        self.assertEqual(self.directory.read_bytes(), b"precious")
        self.assertEqual(self.mode(self.directory), 0o644)

    def test_a_directory_that_cannot_be_made(self):
        self.directory.parent.write_bytes(b"a file")
        with self.assertLogs(LOGGER, "WARNING"):
            self.cache.write("name", "etag", b"content")
        self.assert_absent("name")

    def test_a_link_to_a_directory_of_ours(self):
        target = self.directory.parent / "target"
        target.mkdir(parents=True)
        self.directory.symlink_to(target)
        self.cache.write("name", "etag", b"content")
        self.assertEqual(self.cache.read("name"), ("etag", b"content"))

    @unittest.skipUnless(os.geteuid() == 0, "only root can act as somebody else")
    def test_a_directory_of_another_user(self):
        target = self.directory.parent / "target"
        target.mkdir(parents=True)
        os.chown(target, NOBODY, NOBODY)
        self.directory.symlink_to(target)
        for directory in (target, self.directory):
            cache = Cache(directory, self.max_bytes)
            with self.assertLogs(LOGGER, "WARNING"):
                cache.write("name", "etag", b"content")
            self.assert_absent("name", cache)
        self.assertEqual(list(target.iterdir()), [])

    @unittest.skipUnless(os.geteuid() == 0, "needs a user who is not root")
    def test_a_directory_that_is_read_only(self):
        os.makedirs(self.directory)

        def read_and_write() -> bool:
            os.setuid(NOBODY)
            self.cache.write("name", "etag", b"content")
            os.chmod(self.directory, 0o500)
            self.cache.write("name", "new", b"new")
            self.cache.write("other", "etag", b"other")
            self.cache.drop(["name"])
            known = self.cache.read("name") == ("etag", b"content")
            return known and self.cache.read("other") is None

        os.chown(self.directory, NOBODY, NOBODY)
        self.assert_children_succeed(in_child(read_and_write))


class FullDiskTC(CacheTC):
    def assert_survives(self) -> None:
        with self.assertLogs(LOGGER, "WARNING") as logs:
            for number in range(20):
                self.cache.write(str(number), "etag", os.urandom(200_000))
                with self.cache.writer(f"s{number}", "etag", 200_000) as writer:
                    for _ in range(4):
                        writer.write(os.urandom(50_000))
        self.assertEqual(len(logs.records), 1)
        self.assert_no_temporary_file()

    @unittest.skipUnless(os.geteuid() == 0, "only root can mount")
    def test_a_file_system_without_space(self):
        self.directory.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", self.directory]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            self.skipTest("mounting is not allowed")
        self.addCleanup(subprocess.run, ["umount", self.directory], check=True)
        content = os.urandom(300_000)
        self.cache.write("first", "etag", content)
        self.assert_survives()
        self.assertEqual(self.cache.read("first"), ("etag", content))

    def test_a_limit_of_the_process(self):
        def write() -> bool:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            self.cache.write("name", "old", b"old")
            before = descriptors()
            self.assert_survives()
            for size in (200_000, 2 * MIB):
                self.cache.write("name", "new", bytes(size))
                self.assert_no_temporary_file()
            self.assertEqual(descriptors(), before)
            return self.cache.read("name") == ("old", b"old")

        self.assert_children_succeed(in_child(write))


class BoundTC(CacheTC):
    max_bytes = MIB

    def write(self, *names: str, size: int = 60_000) -> None:
        for name in names:
            self.cache.write(name, "etag", bytes(size))

    def present(self, names: str) -> str:
        return "".join(name for name in names if self.cache.peek(name))

    def test_an_object_of_more_than_a_quarter_is_not_kept(self):
        self.assertTrue(self.cache.accepts(MIB // 4))
        self.assertFalse(self.cache.accepts(MIB // 4 + 1))
        self.write("a", size=MIB // 4)
        self.write("b", size=MIB // 4 + 1)
        self.assertEqual(self.present("ab"), "a")

    def test_the_bound_holds_after_each_write(self):
        for number in range(200):
            self.write(str(number), size=number * 1000)
            self.assertLessEqual(self.used(), MIB)
        self.assertGreater(self.used(), MIB // 2)

    def test_files_count_with_the_blocks_that_they_take(self):
        for size in (1, 30_000):
            for number in range(400):
                self.write(str(number), size=size)
            os.sync()
            taken = sum(path.stat().st_blocks * 512 for path in self.files())
            self.assertLessEqual(taken, MIB)
            self.assertLessEqual(self.used(), MIB)
            self.assertGreater(self.used(), MIB * 8 // 10)

    def test_the_least_recently_used_goes_first(self):
        names = "abcdefghijklmnop"  # 16 times 61440 bytes, and what others may have
        self.write(*names)
        self.assertEqual(self.present(names), names)
        for age, name in enumerate(reversed(names)):
            os.utime(self.path(name), (10**9 - age, 10**9 - age))
        self.cache.read("a")
        self.cache.open("c").close()
        self.cache.peek("b")  # is not a use
        self.write("q")
        # Three have to go until an eighth is free again.
        self.assertEqual(self.present(names + "q"), "acfghijklmnopq")

    def test_a_reduced_bound(self):
        for number in range(12):
            self.write(str(number))
        smaller = self.new_cache(MIB // 2)
        smaller.write("last", "etag", b"content")
        self.assertLessEqual(self.used(), MIB // 2)
        self.assertEqual(smaller.read("last"), ("etag", b"content"))
        self.assertGreater(self.used(), MIB // 4)

    def test_a_bound_below_one_block(self):
        cache = self.new_cache(4000)
        cache.write("name", "etag", b"content")
        self.assertEqual(self.files(), [])

    def test_files_removed_by_hand(self):
        for _ in range(3):
            self.write(*"abcdefghijklmn")
            self.assertEqual(self.present("abcdefghijklmn"), "abcdefghijklmn")
            for path in self.files():
                path.unlink()

    def test_a_total_that_is_lost_or_nonsense(self):
        usage = self.directory / "usage"
        self.write("first")
        too_low = bytes(8) + usage.read_bytes()[8:]
        damages = [b"", b"nonsense", b"\xff" * 32, bytes(32), bytes(100), too_low]
        for number, damage in enumerate(damages):
            self.write(*(f"{number} {name}" for name in "abcdefghijklmnopq"))
            usage.write_bytes(damage)
            self.write(*"abcdefgh")
            self.assertEqual(self.present("h"), "h")
            self.assertLessEqual(self.used(), MIB)

    def test_what_was_discarded_takes_no_room(self):
        self.write("a")
        for _ in range(50):
            with suppress(ZeroDivisionError), self.cache.writer("b", "etag", MIB // 4):
                raise ZeroDivisionError
        self.write("c")
        self.assertEqual(self.present("abc"), "ac")

    def test_what_is_being_written_leaves_no_room_for_others(self):
        cache = self.new_cache(16 * MIB)
        with ExitStack() as writers:
            for name in "abc":
                writers.enter_context(cache.writer(name, "etag", 4 * MIB))
            self.have_it_counted()
            cache.write("d", "etag", bytes(4 * MIB))
            self.assertLessEqual(self.used(), 16 * MIB)
        self.assertEqual(self.present("abcd"), "")

    def test_an_entry_that_appears_while_files_are_counted(self):
        cache = self.new_cache(16 * MIB)
        content = bytes(4 * MIB)
        writers = ExitStack()
        writers.enter_context(cache.writer("a", "etag", len(content))).write(content)
        self.have_it_counted()
        scandir = os.scandir

        def publish_then(directory: str) -> nullcontext:
            files = list(scandir(directory))
            writers.close()
            return nullcontext(files)

        with mock.patch("os.scandir", publish_then):
            for name in "bcd":
                cache.write(name, "etag", content)
        self.assertEqual(self.present("d"), "d")
        self.assertLessEqual(self.used(), 16 * MIB)

    def test_allowances_that_others_have_left_while_files_are_counted(self):
        others = [self.new_cache(16 * MIB) for _ in range(7)]  # as good as processes
        for number, other in enumerate(others):
            other.write(f"{number}", "etag", b"content")
        cache = self.new_cache(16 * MIB)
        for number in range(20):
            cache.write(f"full {number}", "etag", bytes(MIB - HEADER_SIZE))
            if number == 16:
                self.have_it_counted()
        for number, other in enumerate(others):
            for part in range(31):  # 32 blocks are a 128th
                other.write(f"{number} {part}", "etag", b"content")
        self.assertLessEqual(self.used(), 16 * MIB)


class ConcurrencyTC(CacheTC):
    max_bytes = 8 * MIB

    @staticmethod
    def content(number: int) -> bytes:
        return random.Random(number).randbytes(number % 20 * 3000)

    def work(self, seed: int, times: int) -> bool:
        """Read, write and drop; whether all was right and within the bound."""
        chosen = random.Random(seed)
        for _ in range(times):
            number = chosen.randrange(600)
            name = str(number)
            action = chosen.randrange(10)
            if action == 0:
                self.cache.drop([name])
            elif action < 6:
                self.cache.write(name, name, self.content(number))
            elif action < 8:
                if self.cache.read(name) not in (None, (name, self.content(number))):
                    return False
            elif self.streamed(name, 10_000) not in (None, self.content(number)):
                return False
            if self.used() > self.max_bytes:
                return False
        return True

    def test_several_processes_stay_within_the_bound(self):
        self.cache.write("first", "etag", b"content")
        self.assert_children_succeed(
            *(in_child(lambda seed=seed: self.work(seed, 400)) for seed in range(4))
        )
        self.assertGreater(self.used(), self.max_bytes * 3 // 4)
        self.assert_no_temporary_file()

    def test_several_threads_share_an_object(self):
        self.cache.write("first", "etag", b"content")
        with ThreadPoolExecutor(6) as threads:
            results = list(threads.map(self.work, range(6), [200] * 6))
        self.assertEqual(results, [True] * 6)

    def test_two_writers_of_a_name(self):
        with self.cache.writer("name", "1", 5000) as first:
            with self.cache.writer("name", "2", 9000) as second:
                first.write(b"1" * 5000)
                second.write(b"2" * 9000)
            self.assertEqual(self.cache.read("name"), ("2", b"2" * 9000))
        self.assertEqual(self.cache.read("name"), ("1", b"1" * 5000))
        self.assertEqual(self.used(), 8192)

    def test_a_fork_while_threads_write(self):
        self.cache.write("first", "etag", b"content")
        stop = threading.Event()

        def write(seed: int) -> bool:
            results = [self.work(seed, 5)]
            while not stop.is_set():
                results.append(self.work(seed, 5))
            return all(results)

        with ThreadPoolExecutor(3) as threads:
            results = threads.map(write, range(3))
            try:
                for seed in range(20):
                    child = in_child(lambda seed=seed: self.work(seed, 5))
                    self.assert_children_succeed(child)
            finally:
                stop.set()
        self.assertEqual(list(results), [True] * 3)

    def test_a_lock_does_not_survive_in_a_forked_process(self):
        children = []
        pwrite = os.pwrite

        def fork_while_locked(file: int, content: bytes, offset: int) -> int:
            children.append(in_child(signal.pause))
            return pwrite(file, content, offset)

        with mock.patch("os.pwrite", fork_while_locked):
            self.cache.write("name", "etag", b"content")
        try:
            self.assertEqual(len(children), 1)
            self.new_cache().write("other", "etag", b"content")
            self.assertEqual(self.cache.read("other"), ("etag", b"content"))
        finally:
            os.kill(children[0], signal.SIGKILL)
            os.waitpid(children[0], 0)

    def test_a_process_that_keeps_the_lock_stops_nobody(self):
        self.cache.write("name", "etag", b"content")
        another = self.new_cache()  # without an allowance
        with open(self.directory / "usage", "rb") as usage:
            fcntl.flock(usage, fcntl.LOCK_EX)
            with self.assertLogs(LOGGER, "WARNING"):
                another.write("other", "etag", b"content")
            with mock.patch("time.sleep") as sleep:  # once is enough
                another.write("other", "etag", b"content")
            sleep.assert_not_called()
            self.assert_absent("other")
            self.assertEqual(another.read("name"), ("etag", b"content"))
            another.drop(["name"])
            self.assert_absent("name")
        another.write("name", "new", b"new")
        self.assertEqual(another.read("name"), ("new", b"new"))

    def test_no_descriptor_stays_open(self):
        self.cache.write("name", "etag", b"content")
        before = descriptors()
        self.work(1, 200)
        self.assertEqual(descriptors(), before)
        for finish in (CachedObject.close, lambda found: list(found.chunks())):
            found = self.cache.open("name")
            self.assertEqual(descriptors(), before + 1)
            finish(found)
            self.assertEqual(descriptors(), before)


if __name__ == "__main__":
    unittest.main()
