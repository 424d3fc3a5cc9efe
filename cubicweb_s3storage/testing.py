"""For the tests of applications that keep values in S3."""

from tempfile import TemporaryDirectory
from unittest.mock import patch

import boto3
from botocore.config import Config
from moto import mock_aws

from cubicweb_s3storage.cache import Cache


class S3StorageTestMixin:
    """Gives a CubicWebTC a bucket in memory, before its repository starts.

    `s3_bucket`, the name of the bucket, is the boto3 Bucket resource in the tests.
    """

    s3_bucket = "test-bucket"

    def setUp(self) -> None:
        aws = mock_aws()
        aws.start()
        self.addCleanup(aws.stop)
        # Whatever endpoint the environment names, tests do not talk to it.
        aws_config = Config(ignore_configured_endpoint_urls=True)
        resource = boto3.resource("s3", region_name="us-east-1", config=aws_config)
        self.s3_bucket = resource.create_bucket(Bucket=self.s3_bucket)
        client = patch(
            "cubicweb_s3storage.storages.S3Storage._s3_client",
            return_value=resource.meta.client,
        )
        client.start()
        self.addCleanup(client.stop)
        directory = TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        cache = patch(
            "cubicweb_s3storage.storages._instance_cache",
            return_value=Cache(directory.name, 2**28),
        )
        cache.start()
        self.addCleanup(cache.stop)
        super().setUp()
