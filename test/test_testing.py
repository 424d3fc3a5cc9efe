"""The mixin for the tests of applications."""

import os
import unittest
from unittest.mock import patch

import boto3
from cubicweb import Binary
from cubicweb.devtools.testlib import CubicWebTC

from cubicweb_s3storage.storages import S3Storage
from cubicweb_s3storage.testing import S3StorageTestMixin


class ApplicationTC(S3StorageTestMixin, CubicWebTC):
    s3_bucket = "application-bucket"

    def setUp(self):
        super().setUp()
        storage = S3Storage("application-bucket")
        self.repo.system_source.set_storage("Document", "content", storage)
        self.repo.system_source.clear_caches(None, None)

    def tearDown(self):
        self.repo.system_source.unset_storage("Document", "content")
        super().tearDown()

    def test_values_go_to_the_bucket_in_memory(self):
        with self.admin_access.repo_cnx() as cnx:
            document = cnx.create_entity("Document", content=Binary(b"content"))
            cnx.commit()
            self.assertEqual(document.content.getvalue(), b"content")
        (summary,) = self.s3_bucket.objects.all()
        self.assertEqual(summary.get()["Body"].read(), b"content")

    def test_each_test_starts_with_an_empty_bucket(self):
        self.assertEqual(self.s3_bucket.name, "application-bucket")
        self.assertEqual(list(self.s3_bucket.objects.all()), [])


class MixinTC(unittest.TestCase):
    def run_test(self, **methods) -> unittest.TestResult:
        class Base(unittest.TestCase):
            def setUp(self):
                """Of the repository."""

            def runTest(self):
                """Runs."""

        for name, method in methods.items():
            setattr(Base, name, method)
        return type("Test", (S3StorageTestMixin, Base), {})().run()

    def test_the_server_is_there_before_the_repository_starts(self):
        def set_up(test):
            test.names = [
                b["Name"] for b in boto3.client("s3").list_buckets()["Buckets"]
            ]
            test.assertEqual(test.names, ["test-bucket"])

        self.assertTrue(self.run_test(setUp=set_up).wasSuccessful())

    def test_all_is_undone_even_when_the_repository_does_not_start(self):
        def set_up(test):
            raise OSError("no repository")

        before = S3Storage._s3_client
        self.assertFalse(self.run_test(setUp=set_up).wasSuccessful())
        self.assertEqual(S3Storage._s3_client, before)

    def test_an_endpoint_in_the_environment_is_not_talked_to(self):
        def run_test(test):
            client = S3Storage(test.s3_bucket.name).s3cnx
            client.put_object(Bucket=test.s3_bucket.name, Key="k", Body=b"v")
            test.assertIn("amazonaws.com", client.meta.endpoint_url)

        elsewhere = dict.fromkeys(
            ("AWS_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL"), "http://127.0.0.1:9"
        )
        with patch.dict(os.environ, elsewhere):
            result = self.run_test(runTest=run_test)
        self.assertEqual(result.errors + result.failures, [])
