"""The boto3 S3 client: whose settings, which endpoint."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore
from botocore import session as botocore_session
from botocore.client import BaseClient
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from botocore.utils import determine_content_length, parse_timestamp

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

#: bytes from which a body waits for S3 to agree to it, as in other SDKs:
#: https://docs.aws.amazon.com/sdk-for-kotlin/api/latest/s3/aws.sdk.kotlin.services.s3/-s3-client/-config/-builder/continue-header-threshold-bytes.html
MIN_WAITING_BODY = 2 * 2**20

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
        if boto3.DEFAULT_SESSION is None:
            _set_up_default_session()
        user_config = _user_config()
        if not _is_chosen("sdk_ua_app_id", user_config):
            # botocore puts a longer one together for every single request.
            settings["user_agent"] = USER_AGENT
        if not _is_chosen("retry_mode", user_config):
            settings["retries"] = {"mode": "standard"}
        client = _client(endpoint_url, settings)
        if _is_aws(client.meta.endpoint_url):
            return client
        # Since 1.36 boto3 adds CRC32 trailers, which other servers may refuse:
        # https://github.com/boto/boto3/issues/4392
        for name in ("request_checksum_calculation", "response_checksum_validation"):
            if not _is_chosen(name, user_config):
                settings[name] = "when_required"
        logger.info("S3 endpoint is %s", client.meta.endpoint_url)
        return _client(endpoint_url, settings)
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


def _client(endpoint_url: str | None, settings: dict[str, Any]) -> BaseClient:
    config = Config(**settings)
    client = boto3.client("s3", endpoint_url=endpoint_url, config=config)
    client.meta.events.register_last("before-call.s3", _send_short_body_at_once)
    return client


def _set_up_default_session() -> None:
    """As `boto3.client` does, but with a parser that does not take long over dates."""
    session = botocore_session.get_session()
    parsers = session.get_component("response_parser_factory")
    parsers.set_parser_defaults(timestamp_parser=_parse_timestamp)
    boto3.setup_default_session(botocore_session=session)


def _parse_timestamp(value: str | float) -> datetime:
    """As botocore does, which spends a tenth of a GET on Last-Modified."""
    if isinstance(value, str) and value.endswith(" GMT"):  # RFC 9110, section 5.6.7
        with suppress(ValueError):
            return parsedate_to_datetime(value)
    return parse_timestamp(value)


def _send_short_body_at_once(params: dict[str, Any], **_: Any) -> None:
    """Have a request not wait for "100 Continue" before it sends a short body.

    That would be a round trip more, and botocore takes the answers to empty bodies
    for those to later requests: https://github.com/boto/botocore/issues/3755
    """
    if "Expect" in params["headers"]:
        length = determine_content_length(params["body"])
        if length is not None and length < MIN_WAITING_BODY:
            del params["headers"]["Expect"]


def _user_config() -> dict[str, Any]:
    """The AWS configuration of the user's profile."""
    profile = boto3.DEFAULT_SESSION.profile_name
    session = botocore_session.Session(
        profile=profile if profile != "default" else None
    )
    return session.get_scoped_config()


def _is_chosen(setting: str, user_config: dict[str, Any]) -> bool:
    return f"AWS_{setting.upper()}" in os.environ or setting in user_config


def _is_aws(endpoint_url: str) -> bool:
    return (urlsplit(endpoint_url).hostname or "").endswith(AWS_DOMAINS)
