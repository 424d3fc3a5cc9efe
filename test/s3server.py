"""An S3 endpoint for tests that counts requests and makes them fail.

A reverse proxy before moto's server, or before the server that the variable
TEST_S3_ENDPOINT_URL names (with credentials for it in the environment). For one with
https, the proxy speaks TLS too, with the certificate in AWS_CA_BUNDLE, whose key
TEST_S3_TLS_KEY names.
"""

from __future__ import annotations

import http.client
import os
import re
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import boto3
from botocore.client import BaseClient
from botocore.config import Config

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class Fault:
    """What happens to the next requests of one kind.

    :param operation: PUT, GET, HEAD, COPY, DELETE, DELETEMANY, LIST, VERSIONS; RANGE,
      which is a GET with Range and If-Match; CREATEPARTS, PART, COMPLETE, ABORT
    :param status: answer with this status, or cut the connection when None
    :param code: the error code in the answer
    :param times: so many requests
    :param after: only after the request has had its effect
    :param skip: let so many requests pass first
    :param match: only requests whose path has this text
    :param instead: call this; nothing fails when it returns a true value
    :param cut_after: cut the connection after so many bytes of the content
    :param without: a header that the server does not get to see; nothing fails
    """

    operation: str
    status: int | None = None
    code: str = ""
    times: int = 1000
    after: bool = False
    skip: int = 0
    match: str = ""
    instead: Callable[[], object] | None = None
    cut_after: int | None = None
    without: str = ""


class S3Server:
    """The endpoint; `requests` are the operations seen so far, in order."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream)
        self.requests: list[str] = []
        #: those among them whose body has waited for "100 Continue"
        self.waited: list[str] = []
        self.faults: list[Fault] = []
        #: keys that DeleteObjects refuses in an answer of status 200
        self.refused_keys: set[str] = set()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.proxy = self
        if self.upstream.scheme == "https":
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(
                os.environ["AWS_CA_BUNDLE"], os.environ["TEST_S3_TLS_KEY"]
            )
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True
            )
        self.url = f"{self.upstream.scheme}://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def fault_of(self, operation: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append(operation)
            for fault in self.faults:
                if fault.operation == operation and fault.match in unquote(path):
                    if fault.skip:
                        fault.skip -= 1
                    elif fault.times:
                        fault.times -= 1
                        return fault
        return None

    def client(self) -> BaseClient:
        """A client beside the proxy: its requests neither count nor fail."""
        settings = Config(
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        return boto3.client("s3", endpoint_url=self.upstream.geturl(), config=settings)

    def connect(self) -> http.client.HTTPConnection:
        if self.upstream.scheme == "https":
            context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))
            return http.client.HTTPSConnection(self.upstream.netloc, context=context)
        return http.client.HTTPConnection(self.upstream.netloc)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = proxy.fault_of(self._operation(), self.path)
        if fault and fault.instead and not fault.after and fault.instead():
            fault = None
        cut_after = without = None
        if fault and (fault.cut_after is not None or fault.without):
            cut_after, without, fault = fault.cut_after, fault.without.lower(), None
        if fault and not fault.after:
            self._fail(fault)
            return
        if proxy.refused_keys and self._operation() == "DELETEMANY":
            self._delete_some(body.decode())
            return
        connection = proxy.connect()
        connection.putrequest(
            self.command, self.path, skip_host=True, skip_accept_encoding=True
        )
        for name, value in self.headers.items():
            if name.lower() != without:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault and not (fault.instead and fault.instead()):
            self._fail(fault)
            return
        self.send_response(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        length = answer.getheader("Content-Length", str(len(content)))
        if answer.status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        with suppress(ConnectionError):  # not all of it is wanted
            self.wfile.write(content[:cut_after])
        self.close_connection = self.close_connection or cut_after is not None

    def handle_expect_100(self) -> bool:
        self.server.proxy.waited.append(self._operation())
        return super().handle_expect_100()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request

    def _operation(self) -> str:
        url = urlsplit(self.path)
        if self.command == "POST" and "delete" in url.query:
            return "DELETEMANY"
        if self.command == "GET" and "versions" in url.query:
            return "VERSIONS"
        if self.command == "GET" and "list-type" in url.query:
            return "LIST"
        if "uploadId=" in url.query or url.query == "uploads":
            return {
                "POST": "COMPLETE" if "uploadId=" in url.query else "CREATEPARTS",
                "PUT": "PART",
                "DELETE": "ABORT",
            }[self.command]
        if "Range" in self.headers and "If-Match" in self.headers:
            return "RANGE"
        if "x-amz-copy-source" in self.headers:
            return "COPY"
        return self.command

    def _delete_some(self, body: str) -> None:
        """Delete what is not refused; say the rest in an answer of status 200."""
        bucket = urlsplit(self.path).path.strip("/")
        errors = ""
        for key in re.findall("<Key>(.*?)</Key>", body):
            if key in self.server.proxy.refused_keys:
                errors += f"<Error><Key>{key}</Key><Code>AccessDenied</Code></Error>"
            else:
                self.server.proxy.client().delete_object(Bucket=bucket, Key=key)
        self._answer(200, f"<DeleteResult>{errors}</DeleteResult>")

    def _fail(self, fault: Fault) -> None:
        self.close_connection = True
        if fault.status is None:
            return
        self._answer(fault.status, f"<Error><Code>{fault.code}</Code></Error>")

    def _answer(self, status: int, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        """Tests are quiet."""


def start() -> S3Server:
    """Start the proxy, and moto's server where no other is given."""
    upstream = os.environ.get("TEST_S3_ENDPOINT_URL")
    if not upstream:
        from moto.server import ThreadedMotoServer

        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        host, port = moto.get_host_and_port()
        upstream = f"http://{host}:{port}"
        os.environ.setdefault("AWS_ACCESS_KEY_ID", "testing")
        os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "testing")
    return S3Server(upstream)
