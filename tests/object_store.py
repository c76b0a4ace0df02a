"""A small S3 on this machine: as much of the protocol, over real HTTP, as a client that keeps files there speaks.

Buckets, whole and ranged reads, writes in one piece and in parts, copies, deletion and listing by pages; what is
written in parts appears when the last request of it has come. Signatures are not checked, but the key's name is.
"""

import hashlib
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

KEY, SECRET = "tests-key", "tests-secret"
PAGE = 50  # keys a page of a listing
BUCKET = "bucket"


class ObjectStore:
    """What is kept, by key, of one bucket; it outlives the server that shows it."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}  # upload id -> number -> bytes
        self.lock = threading.Lock()
        self.log: list[tuple[str, str]] = []  # method and key of each request that changed something
        self.on_request: Callable[[str, str], None] = lambda method, key: None  # ConnectionResetError: no answer
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        """Answer on a free port, or on the one that it had before it was stopped."""
        store = self

        class Handler(S3Handler):
            shown = store

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Let nobody in any more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def is_up(self) -> bool:
        return self._server is not None

    def url(self, prefix: str = "searches", bucket: str = BUCKET) -> str:
        options = f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"
        return f"s3://{bucket}/{prefix}?{options}"

    def names(self, under: str = "") -> list[str]:
        """The keys of all objects but the empty ones that stand for folders."""
        with self.lock:
            return sorted(key for key in self.objects if key.startswith(under) and not key.endswith("/"))


@contextmanager
def serve() -> Iterator[ObjectStore]:
    store = ObjectStore()
    store.start()
    try:
        yield store
    finally:
        store.stop()


def credentials(key: str = KEY) -> dict[str, str]:
    """The environment of a client."""
    return {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
        "no_proxy": "127.0.0.1",
    }


class S3Handler(BaseHTTPRequestHandler):
    """Path-style requests: /BUCKET/KEY."""

    shown: ObjectStore
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    # ------------------------------------------------------------ requests

    def handle_request(self) -> None:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        body = self._body()
        if not self.shown.is_up:  # a connection from before
            self.close_connection = True
            return
        if KEY not in self.headers.get("Authorization", ""):
            self._refuse(403, "InvalidAccessKeyId")
        elif bucket != BUCKET:
            self._refuse(404, "NoSuchBucket")
        else:
            try:
                self.shown.on_request(self.command, key)
            except ConnectionResetError:
                self.close_connection = True
                return
            getattr(self, f"_{self.command.lower()}")(key, query, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request  # noqa: N815

    def _get(self, key: str, query: dict[str, str], body: bytes) -> None:
        if not key:
            self._list(query)
            return
        with self.shown.lock:
            data = self.shown.objects.get(key)
        if data is None:
            self._refuse(404, "NoSuchKey")
            return
        headers = {"ETag": etag(data), "Last-Modified": formatdate(usegmt=True), "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        self._answer(206 if asked else 200, data, headers)

    def _head(self, key: str, query: dict[str, str], body: bytes) -> None:
        if key:
            self._get(key, query, body)
        else:
            self._answer(200)

    def _put(self, key: str, query: dict[str, str], body: bytes) -> None:
        with self.shown.lock:
            if "uploadId" in query:
                self.shown.parts[query["uploadId"]][int(query["partNumber"])] = body
            else:
                source = self.headers.get("x-amz-copy-source")
                if source:
                    body = self.shown.objects[unquote(source).lstrip("/").partition("/")[2]]
                self.shown.objects[key] = body
                self.shown.log.append(("PUT", key))
        if self.headers.get("x-amz-copy-source"):
            self._answer_xml(f"<CopyObjectResult><ETag>{etag(body)}</ETag></CopyObjectResult>")
        else:
            self._answer(200, headers={"ETag": etag(body)})

    def _post(self, key: str, query: dict[str, str], body: bytes) -> None:
        with self.shown.lock:
            if "uploads" in query:
                upload = uuid.uuid4().hex
                self.shown.parts[upload] = {}
                name, told = "InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>"
            else:
                found = self.shown.parts.pop(query["uploadId"])
                self.shown.objects[key] = b"".join(data for _, data in sorted(found.items()))
                self.shown.log.append(("PUT", key))
                name, told = "CompleteMultipartUploadResult", f"<ETag>{etag(b'')}</ETag>"
        self._answer_xml(f"<{name}><Bucket>{BUCKET}</Bucket><Key>{escape(key)}</Key>{told}</{name}>")

    def _delete(self, key: str, query: dict[str, str], body: bytes) -> None:
        with self.shown.lock:
            if "uploadId" in query:
                self.shown.parts.pop(query["uploadId"], None)
            else:
                self.shown.objects.pop(key, None)
                self.shown.log.append(("DELETE", key))
        self._answer(204)

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token", "") or query.get("start-after", "")
        limit = min(int(query.get("max-keys", PAGE)), PAGE)
        with self.shown.lock:
            found = sorted((key, len(data)) for key, data in self.shown.objects.items() if key.startswith(prefix))
        entries: dict[str, str] = {}
        for key, size in found:
            head, cut, _ = key.removeprefix(prefix).partition(delimiter) if delimiter else (key, "", "")
            if cut:
                entries[prefix + head + cut] = (
                    f"<CommonPrefixes><Prefix>{escape(prefix + head + cut)}</Prefix></CommonPrefixes>"
                )
            else:
                time = "2026-01-01T00:00:00.000Z"
                entries[key] = (
                    f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><LastModified>{time}</LastModified>"
                    "<StorageClass>STANDARD</StorageClass></Contents>"
                )
        left = [name for name in sorted(entries) if name > after]
        page = left[:limit]
        more = len(left) > limit
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        self._answer_xml(
            f"<ListBucketResult><Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
            f"<MaxKeys>{limit}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>{token}"
            f"{''.join(entries[name] for name in page)}</ListBucketResult>"
        )

    # ------------------------------------------------------------ bodies and answers

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            data = self._chunks()
            while self.rfile.readline().strip():
                pass
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            data = without_chunk_signatures(data)
        return data

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        return data

    def _answer(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _answer_xml(self, text: str, status: int = 200) -> None:
        whole = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'
        self._answer(status, whole.encode(), {"Content-Type": "application/xml"})

    def _refuse(self, status: int, code: str) -> None:
        self._answer_xml(f"<Error><Code>{code}</Code><Message>{code}</Message></Error>", status)


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def without_chunk_signatures(data: bytes) -> bytes:
    """What a body of aws-chunked encoding carries: SIZE;chunk-signature=… lines each before so many bytes."""
    whole, rest = b"", data
    while True:
        line, _, rest = rest.partition(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        if size == 0:
            return whole
        whole, rest = whole + rest[:size], rest[size + 2 :]
