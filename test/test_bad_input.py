"""Bad input and bad surroundings get an error that helps, before any harm."""

import os
import socket
import threading
from unittest.mock import patch

from cubicweb_s3storage import client
from cubicweb_s3storage.errors import (
    AccessRefused,
    BucketMissing,
    InvalidKey,
    ObjectMissing,
    S3StorageError,
    S3Unreachable,
)
from cubicweb_s3storage.storages import S3Storage
from s3server import Fault
from testlib import S3TC


class KeysTC(S3TC):
    def refused(self, key: object) -> str:
        class BadKeyStorage(S3Storage):
            def new_s3_key(self, entity, attr):
                return key

        self.set_storage("Document", "content", BadKeyStorage(self.bucket))
        with self.admin_access.repo_cnx() as cnx:
            with self.assertRaises(InvalidKey) as raised:
                self.create(cnx)
                cnx.commit()
            cnx.rollback()
        self.assertIsInstance(raised.exception, ValueError)
        self.assertEqual(self.s3.requests, [])
        message = str(raised.exception)
        self.assertIn(self.bucket, message)
        self.assertRegex(message, r"Document \d+, attribute content")
        self.assertIn("new_s3_key", message)
        return message

    def test_not_a_str(self):
        for key in (None, b"bytes", 12, ["list"]):
            self.assertIn(repr(key), self.refused(key))

    def test_empty(self):
        self.assertIn("empty", self.refused(""))

    def test_too_long(self):
        self.assertIn("1025 bytes", self.refused("x" * 1025))
        self.assertIn("1026 bytes", self.refused("é" * 513))

    def test_not_unicode(self):
        self.assertIn("UTF-8", self.refused("a\ud800"))

    def test_the_longest_key_is_fine(self):
        class LongKeyStorage(S3Storage):
            def new_s3_key(self, entity, attr):
                return "é" * 512

        self.set_storage("Document", "content", LongKeyStorage(self.bucket))
        self.assertEqual(self.read(self.committed(b"content")), b"content")

    def test_arguments_that_boto3_does_not_know(self):
        class BadArgumentsStorage(S3Storage):
            def get_upload_extra_args(self, entity, attr, key):
                return {"Colour": "red"}

        self.set_storage("Document", "content", BadArgumentsStorage(self.bucket))
        with (
            self.admin_access.repo_cnx() as cnx,
            self.assertRaisesRegex(S3StorageError, "Colour"),
        ):
            self.create(cnx)
            cnx.commit()


class SurroundingsTC(S3TC):
    def setUp(self):
        super().setUp()
        self.storage.s3cnx = self.client  # whatever surrounds the others

    def failure(self, storage: S3Storage, error: type[S3StorageError]) -> str:
        """What writing and reading say; both, and the commit, fail."""
        eid = self.committed(b"content")
        key = self.row(eid)
        self.set_storage("Document", "content", storage)
        with self.admin_access.repo_cnx() as cnx:
            with self.assertRaises(error) as raised:
                self.create(cnx)
                cnx.commit()
            cnx.rollback()
        writing = str(raised.exception)
        self.assertRegex(writing, r"Document \d+, attribute content")
        with self.assertRaises(error) as raised:
            self.read(eid)
        reading = str(raised.exception)
        self.assertIn(key, reading)
        for message in (writing, reading):
            self.assertIn(repr(storage.bucket), message)
            self.assertRegex(message, r"\. [A-Z]")  # what to do
        self.set_storage("Document", "content", self.storage)
        self.assertEqual(self.read(eid), b"content")
        return f"{writing}\n{reading}"

    def test_the_bucket_is_missing(self):
        message = self.failure(S3Storage(f"{self.bucket}-none"), BucketMissing)
        self.assertIn("Create the bucket", message)

    def test_the_name_is_no_bucket_name(self):
        self.assertIn(
            "Invalid bucket name", self.failure(S3Storage("a b"), S3StorageError)
        )

    def test_no_credentials_at_all(self):
        nothing = {
            "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
            "AWS_CONFIG_FILE": "/nowhere",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        with patch.dict(os.environ, nothing), patch("boto3.DEFAULT_SESSION", None):
            for name in list(os.environ):
                if name.startswith("AWS_") and name not in (
                    *nothing,
                    "AWS_S3_ENDPOINT_URL",
                ):
                    del os.environ[name]
            message = self.failure(S3Storage(self.bucket), AccessRefused)
        self.assertIn("AWS_ACCESS_KEY_ID", message)

    def test_an_endpoint_that_refuses(self):
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}"
            with patch.dict(os.environ, {"AWS_S3_ENDPOINT_URL": url}):
                message = self.failure(S3Storage(self.bucket), S3Unreachable)
        self.assertIn(url, message)

    def test_an_endpoint_that_never_answers(self):
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            environment = {"AWS_S3_ENDPOINT_URL": url, "AWS_MAX_ATTEMPTS": "1"}
            with (
                patch.dict(os.environ, environment),
                patch.object(client, "READ_TIMEOUT", 0.2),
            ):
                message = self.failure(S3Storage(self.bucket), S3Unreachable)
        self.assertIn("timeout", message.lower())

    def test_an_endpoint_that_is_no_url(self):
        with patch.dict(os.environ, {"AWS_S3_ENDPOINT_URL": "minio"}):
            storage = S3Storage(self.bucket)
            with self.assertRaisesRegex(S3StorageError, "minio"):
                storage.s3cnx  # noqa: B018

    def test_an_endpoint_that_is_no_s3_server(self):
        def answer(server: socket.socket) -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(
                        b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnope"
                    )

        with socket.create_server(("127.0.0.1", 0)) as server:
            threading.Thread(target=answer, args=(server,), daemon=True).start()
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            with (
                patch.dict(os.environ, {"AWS_S3_ENDPOINT_URL": url}),
                self.admin_access.repo_cnx() as cnx,
            ):
                self.set_storage("Document", "content", S3Storage(self.bucket))
                with self.assertRaises(S3StorageError):
                    self.create(cnx)
                    cnx.commit()
                cnx.rollback()
            server.shutdown(socket.SHUT_RDWR)

    def test_a_deleted_bucket_is_not_a_missing_value(self):
        eid = self.committed(b"content")
        self.set_storage("Document", "content", S3Storage(f"{self.bucket}-none"))
        with self.assertRaises(S3StorageError) as raised:
            self.read(eid)
        self.assertNotIsInstance(raised.exception, ObjectMissing)

    def test_no_credential_is_shown(self):
        secrets = {
            "AWS_ACCESS_KEY_ID": "AKIDVERYVISIBLE",
            "AWS_SECRET_ACCESS_KEY": "verysecretindeed",
        }
        with (
            patch.dict(os.environ, secrets),
            patch("boto3.DEFAULT_SESSION", None),
            self.assertLogs(level="DEBUG") as logs,
        ):
            self.s3.faults.append(Fault("PUT", 403, "AccessDenied"))
            storage = S3Storage(self.bucket)
            self.set_storage("Document", "content", storage)
            with self.admin_access.repo_cnx() as cnx:
                with self.assertRaises(AccessRefused) as raised:
                    self.create(cnx)
                    cnx.commit()
                cnx.rollback()
        for secret in secrets.values():
            self.assertNotIn(secret, str(raised.exception))
            self.assertNotIn(secret, "\n".join(logs.output))


class AnswersTC(S3TC):
    cache_size = 0

    def test_wrong_key_id_wrong_secret_and_access_refused(self):
        for code, remedy in (
            ("InvalidAccessKeyId", "access key id"),
            ("SignatureDoesNotMatch", "secret"),
            ("AccessDenied", "Allow"),
        ):
            self.s3.faults[:] = [Fault("PUT", 403, code), Fault("GET", 403, code)]
            with self.admin_access.repo_cnx() as cnx:
                with self.assertRaisesRegex(AccessRefused, f"{code}.*{remedy}"):
                    self.create(cnx)
                    cnx.commit()
                cnx.rollback()

    def test_the_cause_is_kept(self):
        self.s3.faults.append(Fault("PUT", 403, "AccessDenied"))
        with self.admin_access.repo_cnx() as cnx:
            with self.assertRaises(AccessRefused) as raised:
                self.create(cnx)
                cnx.commit()
            cnx.rollback()
        response = raised.exception.__cause__.response
        self.assertEqual(response["Error"]["Code"], "AccessDenied")

    def test_an_answer_without_message(self):
        self.s3.faults.append(Fault("GET", 403, "AccessDenied"))
        eid = self.committed(b"content")
        with self.assertRaises(AccessRefused) as raised:
            self.read(eid)
        self.assertNotIn("None", str(raised.exception))
