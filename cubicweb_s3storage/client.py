"""The boto3 S3 client: whose settings, which endpoint."""

from __future__ import annotations

import logging
import os
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore
from botocore import session as botocore_session
from botocore.client import BaseClient
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from cubicweb_s3storage.__pkginfo__ import distname, version
from cubicweb_s3storage.answers import explanation
from cubicweb_s3storage.engine import MAX_REQUESTS

logger = logging.getLogger("cube.s3storage.client")

#: seconds
CONNECT_TIMEOUT = 5
#: seconds without a byte from the server
READ_TIMEOUT = 30
#: the threads of an engine, and as many transactions beside them
MAX_CONNECTIONS = 2 * MAX_REQUESTS

USER_AGENT = (
    f"{distname}/{version} Boto3/{boto3.__version__} Botocore/{botocore.__version__}"
)
AWS_DOMAINS = (".amazonaws.com", ".amazonaws.com.cn", ".api.aws")


def make_client() -> BaseClient:
    """A boto3 S3 client on the endpoint and with the settings of the environment.

    Timeouts, retries and the size of the connection pool are set; retries and
    checksums only where the user's environment or AWS configuration does not.

    :raise S3StorageError: the configuration cannot be used
    """
    try:
        endpoint_url = os.environ.get("AWS_S3_ENDPOINT_URL") or None
        settings: dict[str, Any] = {
            "connect_timeout": CONNECT_TIMEOUT,
            "read_timeout": READ_TIMEOUT,
            "max_pool_connections": MAX_CONNECTIONS,
        }
        user_config = _user_config()
        if not _is_chosen("sdk_ua_app_id", user_config):
            # botocore puts a longer one together for every single request.
            settings["user_agent"] = USER_AGENT
        if not _is_chosen("retry_mode", user_config):
            settings["retries"] = {"mode": "standard"}
        client = boto3.client(
            "s3", endpoint_url=endpoint_url, config=Config(**settings)
        )
        if _is_aws(client.meta.endpoint_url):
            return client
        # Since 1.36 boto3 adds CRC32 trailers, which other servers may refuse:
        # https://github.com/boto/boto3/issues/4392
        for name in ("request_checksum_calculation", "response_checksum_validation"):
            if not _is_chosen(name, user_config):
                settings[name] = "when_required"
        logger.info("S3 endpoint is %s", client.meta.endpoint_url)
        return boto3.client("s3", endpoint_url=endpoint_url, config=Config(**settings))
    except (BotoCoreError, ValueError) as error:
        raise explanation(error, "configure the S3 client") from error


def quieten_libraries() -> None:
    """Keep a root logger at DEBUG from switching on the debug logs of boto3.

    They print headers with session tokens and double the time of a request. A
    level that somebody has set stays.
    """
    for name in ("botocore", "boto3", "s3transfer", "urllib3"):
        library = logging.getLogger(name)
        if not library.level and library.getEffectiveLevel() < logging.INFO:
            library.setLevel(logging.INFO)


def _user_config() -> dict[str, Any]:
    """The AWS configuration of the user's profile."""
    profile = boto3.DEFAULT_SESSION.profile_name if boto3.DEFAULT_SESSION else None
    session = botocore_session.Session(
        profile=profile if profile != "default" else None
    )
    return session.get_scoped_config()


def _is_chosen(setting: str, user_config: dict[str, Any]) -> bool:
    return f"AWS_{setting.upper()}" in os.environ or setting in user_config


def _is_aws(endpoint_url: str) -> bool:
    return (urlsplit(endpoint_url).hostname or "").endswith(AWS_DOMAINS)
