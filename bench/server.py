"""An S3 server in memory, with a latency and a bandwidth, that counts requests.

It knows what the contenders of the benchmark ask for and checks no signatures. It
shares the processor with them: bodies are neither copied nor hashed without need.

    python server.py

prints the address where it listens, and serves until its standard input closes.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import os
import socket
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from itertools import count
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit
from xml.sax.saxutils import escape

MAX_HASHED = (
    8 << 20
)  # of larger objects the ETag is no MD5, as after an upload in parts
CHUNK = 256 << 10
CONTROL = "/-/"  # no bucket has this name


class Control:
    """What the benchmark asks of the server, beside S3.

    :param url: address of the server
    """

    def __init__(self, url: str) -> None:
        self.address = urlsplit(url).netloc

    def set(self, latency: float, bandwidth: float = 0) -> None:
        """Set the latency in ms, and the bandwidth per connection in MB/s, 0: any."""
        query = urlencode({"latency": latency, "bandwidth": bandwidth})
        self._request("PUT", f"settings?{query}")

    def reset_counters(self) -> None:
        self._request("DELETE", "counters")

    def counters(self) -> dict:
        """Requests by operation, and the peak of requests in flight."""
        return self._request("GET", "counters")

    def wipe(self) -> None:
        """Remove all objects."""
        self._request("DELETE", "objects")

    def _request(self, method: str, path: str) -> dict:
        connection = http.client.HTTPConnection(self.address)
        connection.request(method, CONTROL + path)
        answer = json.load(connection.getresponse())
        connection.close()
        return answer


@dataclass
class Object:
    parts: list[bytearray]
    etag: str
    headers: dict[str, str]
    modified: float = field(default_factory=time.time)

    @property
    def size(self) -> int:
        return sum(map(len, self.parts))

    def slices(self, start: int, stop: int) -> Iterator[memoryview]:
        for part in self.parts:
            piece = memoryview(part)[max(start, 0) : max(stop, 0)]
            if piece:
                yield piece
            start -= len(part)
            stop -= len(part)


@dataclass
class Request:
    method: str
    bucket: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytearray

    @property
    def operation(self) -> str:
        """Its name in the API of S3."""
        if not self.key:
            if self.method == "POST" and "delete" in self.query:
                return "DeleteObjects"
            if self.method == "GET" and "list-type" in self.query:
                return "ListObjectsV2"
            return {"PUT": "CreateBucket", "HEAD": "HeadBucket"}.get(self.method, "?")
        if "uploads" in self.query:
            return "CreateMultipartUpload"
        if "uploadId" in self.query:
            return {
                "PUT": "UploadPart",
                "POST": "CompleteMultipartUpload",
                "DELETE": "AbortMultipartUpload",
            }.get(self.method, "?")
        if "x-amz-copy-source" in self.headers:
            return "CopyObject"
        return f"{self.method.title()}Object"


@dataclass
class Answer:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: list[memoryview | bytes] = field(default_factory=list)


class Refusal(Exception):
    """An error that S3 answers with."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


class S3:
    """The operations, one method each."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.uploads: dict[str, tuple[dict[int, bytearray], dict[str, str]]] = {}
        self._ids = count(1)

    def answer(self, request: Request) -> Answer:
        operation = getattr(self, request.operation, None)
        if operation is None or "aws-chunked" in request.headers.get(
            "content-encoding", ""
        ):
            return _error(501, "NotImplemented")
        try:
            return operation(request)
        except Refusal as refusal:
            return _error(refusal.status, refusal.code)

    def CreateBucket(self, request: Request) -> Answer:
        return Answer()

    HeadBucket = CreateBucket

    def PutObject(self, request: Request) -> Answer:
        if len(request.body) <= MAX_HASHED:
            digest = hashlib.md5(request.body, usedforsecurity=False)
            etag = f'"{digest.hexdigest()}"'
        else:
            etag = self._cheap_etag(1)
        self._store(request, [request.body], etag, request.headers)
        return Answer(headers={"ETag": etag})

    def CopyObject(self, request: Request) -> Answer:
        source = unquote(request.headers["x-amz-copy-source"]).lstrip("/")
        found = self._find(*source.split("/", 1))
        replaced = request.headers.get("x-amz-metadata-directive") == "REPLACE"
        headers = request.headers if replaced else found.headers
        self._store(request, found.parts, found.etag, headers)
        return _xml(f"<CopyObjectResult>{_described(found)}</CopyObjectResult>")

    def GetObject(self, request: Request) -> Answer:
        found = self._find(request.bucket, request.key)
        headers = {
            "ETag": found.etag,
            "Last-Modified": formatdate(found.modified, usegmt=True),
            "Accept-Ranges": "bytes",
            **found.headers,
        }
        if request.headers.get("if-match", found.etag) not in (found.etag, "*"):
            raise Refusal(412, "PreconditionFailed")
        if request.headers.get("if-none-match") in (found.etag, "*"):
            return Answer(304, headers)
        size = found.size
        start, stop = _range(request.headers.get("range"), size)
        headers["Content-Length"] = str(stop - start)
        if (start, stop) == (0, size) and "range" not in request.headers:
            return Answer(200, headers, list(found.slices(start, stop)))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Answer(206, headers, list(found.slices(start, stop)))

    HeadObject = GetObject  # whoever sends the answer leaves the body out

    def DeleteObject(self, request: Request) -> Answer:
        self.objects.pop((request.bucket, request.key), None)
        return Answer(204)

    def DeleteObjects(self, request: Request) -> Answer:
        document = ET.fromstring(request.body)
        keys = [element.text for element in document.iterfind("{*}Object/{*}Key")]
        if len(keys) > 1000:
            raise Refusal(400, "MalformedXML")
        for key in keys:
            self.objects.pop((request.bucket, key), None)
        deleted = "".join(
            f"<Deleted><Key>{escape(key)}</Key></Deleted>"
            for key in keys
            if document.findtext("{*}Quiet") != "true"
        )
        return _xml(f"<DeleteResult>{deleted}</DeleteResult>")

    def ListObjectsV2(self, request: Request) -> Answer:
        query = request.query
        after = query.get("continuation-token", query.get("start-after", ""))
        limit = int(query.get("max-keys", 1000))
        keys = sorted(
            key
            for bucket, key in self.objects
            if bucket == request.bucket
            if key.startswith(query.get("prefix", "")) and key > after
        )
        listed, more = keys[:limit], len(keys) > limit
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key>{_described(found)}"
            f"<Size>{found.size}</Size></Contents>"
            for key in listed
            for found in [self.objects[request.bucket, key]]
        )
        token = more and f"<NextContinuationToken>{escape(listed[-1])}"
        return _xml(
            f"<ListBucketResult><KeyCount>{len(listed)}</KeyCount>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>"
            f"{f'{token}</NextContinuationToken>' if token else ''}{contents}"
            "</ListBucketResult>"
        )

    def CreateMultipartUpload(self, request: Request) -> Answer:
        upload_id = str(next(self._ids))
        self.uploads[upload_id] = {}, request.headers
        return _xml(
            "<InitiateMultipartUploadResult>"
            f"<UploadId>{upload_id}</UploadId></InitiateMultipartUploadResult>"
        )

    def UploadPart(self, request: Request) -> Answer:
        parts, _ = self._upload(request)
        parts[int(request.query["partNumber"])] = request.body
        return Answer(headers={"ETag": self._cheap_etag()})

    def CompleteMultipartUpload(self, request: Request) -> Answer:
        parts, headers = self._upload(request)
        document = ET.fromstring(request.body)
        numbers = [int(e.text) for e in document.iterfind("{*}Part/{*}PartNumber")]
        etag = self._cheap_etag(len(numbers))
        self._store(request, [parts[number] for number in numbers], etag, headers)
        del self.uploads[request.query["uploadId"]]
        return _xml(
            "<CompleteMultipartUploadResult>"
            f"<ETag>{escape(etag)}</ETag></CompleteMultipartUploadResult>"
        )

    def AbortMultipartUpload(self, request: Request) -> Answer:
        self.uploads.pop(request.query["uploadId"], None)
        return Answer(204)

    def _find(self, bucket: str, key: str) -> Object:
        try:
            return self.objects[bucket, key]
        except KeyError:
            raise Refusal(404, "NoSuchKey") from None

    def _upload(self, request: Request) -> tuple[dict, dict]:
        try:
            return self.uploads[request.query["uploadId"]]
        except KeyError:
            raise Refusal(404, "NoSuchUpload") from None

    def _store(
        self,
        request: Request,
        parts: list[bytearray],
        etag: str,
        headers: dict[str, str],
    ) -> None:
        present = self.objects.get((request.bucket, request.key))
        wanted = request.headers.get("if-match")
        if (present and request.headers.get("if-none-match") == "*") or (
            wanted and (present is None or present.etag != wanted)
        ):
            raise Refusal(412, "PreconditionFailed")
        kept = {
            name: value
            for name, value in headers.items()
            if name == "content-type" or name.startswith("x-amz-meta-")
        }
        self.objects[request.bucket, request.key] = Object(parts, etag, kept)

    def _cheap_etag(self, parts: int = 0) -> str:
        return f'"{next(self._ids):032x}{f"-{parts}" if parts else ""}"'


class Server:
    """Speaks HTTP, takes its time, and counts."""

    def __init__(self) -> None:
        self.s3 = S3()
        self.latency = 0.0  # seconds
        self.bandwidth = 0.0  # bytes per second
        self.requests: Counter[str] = Counter()
        self.in_flight = self.peak = 0
        self._tasks: set[asyncio.Task] = set()

    async def listen(self) -> None:
        loop = asyncio.get_running_loop()
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        listener.setblocking(False)
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        while True:
            sock, _ = await loop.sock_accept(listener)
            task = loop.create_task(self.serve(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def serve(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(sock)
        with sock:
            try:
                while head := await connection.read_head():
                    await self._serve_one(connection, head)
            except ConnectionError:
                pass

    async def _serve_one(self, connection: Connection, head: str) -> None:
        line, *lines = head.split("\r\n")
        method, target, _ = line.split(" ")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        if target.startswith(CONTROL):
            await connection.send(method, self._control(method, target), Pace(0))
            return
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            if headers.get("expect", "").lower() == "100-continue":
                await connection.send_continue()
            length = int(headers.get("content-length", 0))
            body = await connection.read_body(length, Pace(self.bandwidth))
            path, _, query = target.partition("?")
            bucket, _, key = unquote(path).lstrip("/").partition("/")
            arguments = dict(parse_qsl(query, keep_blank_values=True))
            request = Request(method, bucket, key, arguments, headers, body)
            self.requests[request.operation] += 1
            await asyncio.sleep(self.latency)
            answer = self.s3.answer(request)
            await connection.send(method, answer, Pace(self.bandwidth))
        finally:
            self.in_flight -= 1

    def _control(self, method: str, target: str) -> Answer:
        url = urlsplit(target.removeprefix(CONTROL))
        if method == "PUT":
            settings = dict(parse_qsl(url.query))
            self.latency = float(settings["latency"]) / 1000
            self.bandwidth = float(settings["bandwidth"]) * 1e6
        elif method == "DELETE" and url.path == "counters":
            self.requests.clear()
            self.peak = self.in_flight
        elif method == "DELETE":
            self.s3 = S3()
        counters = {"requests": self.requests, "peak": self.peak}
        return Answer(body=[json.dumps(counters).encode()])


class Connection:
    """A connection with a client, whose requests follow each other."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()  # and not read yet

    async def read_head(self) -> str:
        """The request line and the headers; nothing when the client has gone."""
        while (end := self._received.find(b"\r\n\r\n")) < 0:
            received = await self._loop.sock_recv(self._sock, CHUNK)
            if not received:
                return ""
            self._received += received
        head = self._received[:end].decode("latin-1")
        del self._received[: end + 4]
        return head

    async def read_body(self, length: int, pace: Pace) -> bytearray:
        body = bytearray(length)
        done = min(length, len(self._received))
        body[:done] = self._received[:done]
        del self._received[:done]
        await pace.after(done)
        with memoryview(body) as view:
            while done < length:
                part = view[done : done + CHUNK]
                received = await self._loop.sock_recv_into(self._sock, part)
                if not received:
                    raise ConnectionResetError
                done += received
                await pace.after(received)
        return body

    async def send_continue(self) -> None:
        await self._loop.sock_sendall(self._sock, b"HTTP/1.1 100 Continue\r\n\r\n")

    async def send(self, method: str, answer: Answer, pace: Pace) -> None:
        status = HTTPStatus(answer.status)
        answer.headers.setdefault("Content-Length", str(sum(map(len, answer.body))))
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in answer.headers.items()
        )
        await self._loop.sock_sendall(self._sock, f"{head}\r\n".encode("latin-1"))
        if method == "HEAD":
            return
        for piece in answer.body:
            for start in range(0, len(piece), CHUNK):
                part = piece[start : start + CHUNK]
                await self._loop.sock_sendall(self._sock, part)
                await pace.after(len(part))


class Pace:
    """Keeps a transfer at the bandwidth.

    :param bandwidth: bytes per second, 0 for any
    """

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth
        self._begun = time.monotonic()
        self._moved = 0

    async def after(self, moved: int) -> None:
        """Wait until this many bytes more can have been moved."""
        if self.bandwidth:
            self._moved += moved
            due = self._begun + self._moved / self.bandwidth
            await asyncio.sleep(max(0, due - time.monotonic()))


def _range(wanted: str | None, size: int) -> tuple[int, int]:
    if wanted is None:
        return 0, size
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start = int(first) if first else max(0, size - int(last))
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise Refusal(416, "InvalidRange")
    return start, stop


def _described(found: Object) -> str:
    modified = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.modified))
    return f"<LastModified>{modified}</LastModified><ETag>{escape(found.etag)}</ETag>"


def _error(status: int, code: str) -> Answer:
    return _xml(f"<Error><Code>{code}</Code></Error>", status)


def _xml(document: str, status: int = 200) -> Answer:
    headers = {"Content-Type": "application/xml"}
    return Answer(status, headers, [document.encode()])


def _exit_with_standard_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_exit_with_standard_input, daemon=True).start()
    asyncio.run(Server().listen())
