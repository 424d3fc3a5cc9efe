"""The S3 client: whose settings, which endpoint, one for each process."""

import logging
import os
import tempfile
import threading
import unittest
from collections import Counter
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import boto3

from cubicweb_s3storage.client import make_client
from cubicweb_s3storage.storages import S3Storage
from testlib import S3TC

ENDPOINTS = ("AWS_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


class SettingsTC(unittest.TestCase):
    def setUp(self):
        self.enterContext(patch.dict(os.environ))
        self.enterContext(patch("boto3.DEFAULT_SESSION", None))
        for name in list(os.environ):
            if name.startswith("AWS_"):
                del os.environ[name]
        directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.config_file = directory / "config"
        os.environ["AWS_CONFIG_FILE"] = str(self.config_file)
        os.environ["AWS_SHARED_CREDENTIALS_FILE"] = str(directory / "credentials")
        os.environ["AWS_DEFAULT_REGION"] = "eu-west-3"

    def config(self):
        return make_client().meta.config

    def test_timeouts_retries_and_pool_are_set(self):
        config = self.config()
        self.assertEqual((config.connect_timeout, config.read_timeout), (5, 30))
        self.assertEqual(config.retries["mode"], "standard")
        self.assertGreaterEqual(config.max_pool_connections, 32)

    def test_without_endpoint_it_talks_to_aws_as_boto3_does(self):
        client = make_client()
        self.assertIn("amazonaws.com", client.meta.endpoint_url)
        config = client.meta.config
        self.assertEqual(config.request_checksum_calculation, "when_supported")
        self.assertEqual(config.response_checksum_validation, "when_supported")

    def test_every_variable_for_the_endpoint_works(self):
        for name in ENDPOINTS:
            with patch.dict(os.environ, {name: "https://s3.example.org:9000"}):
                client = make_client()
            self.assertEqual(client.meta.endpoint_url, "https://s3.example.org:9000")
            config = client.meta.config
            self.assertEqual(config.request_checksum_calculation, "when_required")
            self.assertEqual(config.response_checksum_validation, "when_required")

    def test_the_endpoint_of_a_profile_works(self):
        self.config_file.write_text(
            "[profile minio]\nendpoint_url = http://minio.example.org\n"
        )
        os.environ["AWS_PROFILE"] = "minio"
        client = make_client()
        self.assertEqual(client.meta.endpoint_url, "http://minio.example.org")
        checksums = client.meta.config.request_checksum_calculation
        self.assertEqual(checksums, "when_required")

    def test_an_aws_endpoint_that_is_named_stays_aws(self):
        os.environ["AWS_ENDPOINT_URL"] = "https://s3.eu-west-3.amazonaws.com"
        self.assertEqual(self.config().request_checksum_calculation, "when_supported")

    def test_a_host_that_only_ends_like_aws_is_not_aws(self):
        os.environ["AWS_ENDPOINT_URL"] = "https://notamazonaws.com"
        self.assertEqual(self.config().request_checksum_calculation, "when_required")

    def test_what_the_environment_sets_wins(self):
        os.environ["AWS_S3_ENDPOINT_URL"] = "http://s3.example.org"
        os.environ["AWS_RETRY_MODE"] = "adaptive"
        os.environ["AWS_MAX_ATTEMPTS"] = "7"
        os.environ["AWS_REQUEST_CHECKSUM_CALCULATION"] = "when_supported"
        config = self.config()
        self.assertEqual(config.retries["mode"], "adaptive")
        self.assertEqual(config.retries["total_max_attempts"], 7)
        self.assertEqual(config.request_checksum_calculation, "when_supported")
        self.assertEqual(config.response_checksum_validation, "when_required")

    def test_max_attempts_alone_wins_too(self):
        os.environ["AWS_MAX_ATTEMPTS"] = "7"
        config = self.config()
        self.assertEqual(config.retries["mode"], "standard")
        self.assertEqual(config.retries["total_max_attempts"], 7)

    def test_what_the_configuration_file_sets_wins(self):
        self.config_file.write_text(
            "[default]\nretry_mode = adaptive\n"
            "response_checksum_validation = when_supported\n"
        )
        os.environ["AWS_S3_ENDPOINT_URL"] = "http://s3.example.org"
        config = self.config()
        self.assertEqual(config.retries["mode"], "adaptive")
        self.assertEqual(config.response_checksum_validation, "when_supported")
        self.assertEqual(config.request_checksum_calculation, "when_required")

    def test_the_default_session_that_the_application_has_set_up_is_used(self):
        boto3.setup_default_session(
            aws_access_key_id="application",
            aws_secret_access_key="secret",
            region_name="eu-north-1",
        )
        client = make_client()
        self.assertEqual(client.meta.region_name, "eu-north-1")
        url = client.generate_presigned_url("list_buckets")
        self.assertIn("application", url)

    def test_without_one_all_clients_share_theirs(self):
        script, log = (self.config_file.with_name(name) for name in ("script", "log"))
        credentials = '{"Version": 1, "AccessKeyId": "id", "SecretAccessKey": "key"}'
        script.write_text(f"echo fetched >> {log}\necho '{credentials}'\n")
        self.config_file.write_text(f"[default]\ncredential_process = sh {script}\n")
        os.environ["AWS_S3_ENDPOINT_URL"] = "http://s3.example.org"
        for _ in range(2):
            make_client().generate_presigned_url("list_buckets")
        self.assertEqual(log.read_text(), "fetched\n")

    def test_debug_logs_of_the_libraries_stay_off(self):
        names = ("botocore", "boto3", "s3transfer", "urllib3")
        for name in names:
            level = logging.getLogger(name).level
            self.addCleanup(logging.getLogger(name).setLevel, level)
            logging.getLogger(name).setLevel(logging.NOTSET)
        logging.getLogger("botocore").setLevel(logging.DEBUG)
        root = logging.getLogger()
        self.addCleanup(root.setLevel, root.level)
        root.setLevel(logging.DEBUG)
        S3Storage("bucket")
        self.assertTrue(logging.getLogger("botocore").isEnabledFor(logging.DEBUG))
        for name in names[1:]:
            self.assertFalse(logging.getLogger(name).isEnabledFor(logging.DEBUG))


class ClientsTC(S3TC):
    def test_it_is_made_on_first_use_and_once(self):
        with patch.object(S3Storage, "_s3_client", wraps=make_client) as make:
            storage = S3Storage(self.bucket)
            make.assert_not_called()
            self.assertIs(storage.s3cnx, storage.s3cnx)
        make.assert_called_once_with()

    def test_threads_share_it(self):
        storage = S3Storage(self.bucket)
        start, clients = threading.Barrier(8), []

        def use():
            start.wait()
            clients.append(storage.s3cnx)

        threads = [threading.Thread(target=use) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(len(clients), 8)
        self.assertEqual(len(set(map(id, clients))), 1)

    def test_a_forked_process_makes_its_own(self):
        key = self.row(self.committed(b"content"))
        mine = id(self.storage.s3cnx)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                own = id(self.storage.s3cnx) != mine
                content = self.storage.download(key).getvalue()
                os.write(writer, b"own " + content if own else b"shared")
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, "rb") as answer:
            self.assertEqual(answer.read(), b"own content")
        os.waitpid(child, 0)
        self.assertEqual(id(self.storage.s3cnx), mine)

    def test_one_can_be_assigned(self):
        self.storage.s3cnx = self.client
        self.assertIs(self.storage.s3cnx, self.client)
        eid = self.committed(b"content")
        self.assertEqual(self.read(eid), b"content")
        self.assertEqual(self.s3.requests, [])

    def test_one_can_be_patched_for_a_while(self):
        mine = self.storage.s3cnx
        with patch.object(self.storage, "s3cnx", self.client):
            self.assertIs(self.storage.s3cnx, self.client)
        self.assertIs(self.storage.s3cnx, mine)

    def test_a_subclass_can_make_its_own(self):
        client = self.client

        class OwnClientStorage(S3Storage):
            @classmethod
            def _s3_client(cls):
                return client

        self.assertIs(OwnClientStorage(self.bucket).s3cnx, client)

    def test_a_patch_at_the_start_lasts(self):
        with patch.object(S3Storage, "_s3_client", return_value=self.client):
            storage = S3Storage(self.bucket)
        self.assertIs(storage.s3cnx, self.client)


class RequestsTC(S3TC):
    """What botocore would do otherwise."""

    def test_short_bodies_do_not_wait_for_the_server_to_agree(self):
        for content in (b"", b"content", bytes(2 * 2**20 - 1)):
            self.committed(content)
        self.assertEqual(self.s3.waited, [])

    def test_long_ones_do(self):
        self.committed(bytes(2 * 2**20))
        self.committed(bytes(17 * 2**20))  # in parts of 8, 8 and 1 MiB
        self.assertEqual(Counter(self.s3.waited), {"PUT": 1, "PART": 2})

    def test_dates_are_what_they_are_for_others(self):
        with patch("boto3.DEFAULT_SESSION", None):
            own = make_client()
        place = {"Bucket": self.bucket, "Key": self.row(self.committed())}
        date = own.head_object(**place)["LastModified"]
        self.assertEqual(date, self.client.head_object(**place)["LastModified"])
        self.assertEqual(date.utcoffset(), timedelta(0))
        odd = {"Last-Modified": "2015-10-21T07:28:00 GMT"}
        own.meta.events.register(
            "before-parse.s3.HeadObject",
            lambda response_dict, **_: response_dict["headers"].update(odd),
        )
        self.assertEqual(own.head_object(**place)["LastModified"].year, 2015)
        (listed,) = own.list_objects_v2(Bucket=self.bucket)["Contents"]
        self.assertEqual(listed["LastModified"].replace(microsecond=0), date)


class ContentTypeTC(S3TC):
    def content_type(self, eid: int) -> str:
        answer = self.client.head_object(Bucket=self.bucket, Key=self.row(eid))
        return answer["ContentType"]

    def test_it_comes_from_the_format_of_the_attribute(self):
        eid = self.committed(content_format="application/pdf")
        self.assertEqual(self.content_type(eid), "application/pdf")

    def test_of_an_update_too(self):
        from cubicweb import Binary

        eid = self.committed(content_format="application/pdf")
        with self.admin_access.repo_cnx() as cnx:
            cnx.entity_from_eid(eid).cw_set(content=Binary(b"new"))
            cnx.commit()
        self.assertEqual(self.content_type(eid), "application/pdf")

    def test_without_or_with_a_nonsensical_format_s3_decides(self):
        default = self.content_type(self.committed())
        for nonsense in ("PDF", "text/plain\r\nX-Header: 1", "été/été"):
            eid = self.committed(content_format=nonsense)
            self.assertEqual(self.content_type(eid), default)

    def test_get_upload_extra_args_wins(self):
        class OwnTypeStorage(S3Storage):
            def get_upload_extra_args(self, entity, attr, key):
                return {"ContentType": "image/png", "Metadata": {"key": key}}

        self.set_storage("Document", "content", OwnTypeStorage(self.bucket))
        eid = self.committed(content_format="application/pdf")
        self.assertEqual(self.content_type(eid), "image/png")
