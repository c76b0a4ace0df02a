"""Serves a small S3 on this machine: as much of the protocol, over real HTTP, as pyarrow's client speaks.

Whole and ranged reads, writes in one piece and in parts, copies, deletion, and listing by pages. An object appears when
the last request that writes it has come whole. Signatures are not checked, but the key's name is.
"""

import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

KEY, SECRET = "tests-key", "tests-secret"
PAGE = 50  # keys a page of a listing
BUCKET = "bucket"
ETAG = {"ETag": '"the same for all"'}


class ObjectStore:
    """What is kept in one bucket; it outlives the server that shows it. Threads share dicts: each access is atomic."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}  # upload id -> number -> bytes
        self.written: list[str] = []  # the keys in the order in which they were written
        self.on_request: Callable[[str, str], None] = answer
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        """Answer on a free port, or on the one that it had before it was stopped."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Handler", (S3Handler,), {"store": self}))
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

    def url(self, bucket: str = BUCKET) -> str:
        return f"s3://{bucket}/searches?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"

    def names(self, under: str = "") -> list[str]:
        """Return the keys of all objects but the empty ones that stand for folders."""
        return sorted(key for key in list(self.objects) if key.startswith(under) and not key.endswith("/"))


def answer(method: str, key: str) -> None:
    """Do nothing before a request is answered. What does this for a test may raise ConnectionResetError: no answer."""


@contextmanager
def serve() -> Iterator[ObjectStore]:
    store = ObjectStore()
    store.start()
    try:
        yield store
    finally:
        store.stop()


def credentials(key: str = KEY) -> dict[str, str]:
    """Return the environment of a client."""
    return {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",  # bodies come as they are, not in signed chunks
        "no_proxy": "127.0.0.1",
    }


class S3Handler(BaseHTTPRequestHandler):
    """Answers path-style requests: /BUCKET/KEY."""

    store: ObjectStore
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def handle_request(self) -> None:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if not self.store.is_up or len(body) < length:  # a connection from before, or a client that was killed
            self.close_connection = True
        elif KEY not in self.headers.get("Authorization", ""):
            self._refuse(403, "InvalidAccessKeyId")
        elif bucket != BUCKET:
            self._refuse(404, "NoSuchBucket")
        else:
            try:
                self.store.on_request(self.command, key)
            except ConnectionResetError:
                self.close_connection = True
                return
            query = dict(parse_qsl(parts.query, keep_blank_values=True))
            getattr(self, f"_{self.command.lower()}")(key, query, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request  # noqa: N815

    def _head(self, key: str, query: dict[str, str], body: bytes) -> None:
        data = self.store.objects.get(key) if key else b""
        if data is None:
            self._refuse(404, "NoSuchKey")
            return
        headers = {"Last-Modified": formatdate(usegmt=True), "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        self._answer(206 if asked else 200, data, headers)

    def _get(self, key: str, query: dict[str, str], body: bytes) -> None:
        if key:
            self._head(key, query, body)
        else:
            self._list(query)

    def _put(self, key: str, query: dict[str, str], body: bytes) -> None:
        source = unquote(self.headers.get("x-amz-copy-source", ""))
        if "uploadId" in query:
            self.store.parts[query["uploadId"]][int(query["partNumber"])] = body
        else:
            self.store.objects[key] = self.store.objects[source.lstrip("/").partition("/")[2]] if source else body
            self.store.written.append(key)
        if source:
            self._answer_xml("<CopyObjectResult/>")
        else:
            self._answer(200)

    def _post(self, key: str, query: dict[str, str], body: bytes) -> None:
        if "uploads" in query:
            upload = uuid.uuid4().hex
            self.store.parts[upload] = {}
            name = "InitiateMultipartUploadResult"
            self._answer_xml(f"<{name}><UploadId>{upload}</UploadId></{name}>")
        else:
            parts = self.store.parts.pop(query["uploadId"])
            self.store.objects[key] = b"".join(data for _, data in sorted(parts.items()))
            self.store.written.append(key)
            self._answer_xml("<CompleteMultipartUploadResult/>")

    def _delete(self, key: str, query: dict[str, str], body: bytes) -> None:
        self.store.parts.pop(query.get("uploadId", ""), None)
        if "uploadId" not in query:
            self.store.objects.pop(key, None)
        self._answer(204)

    def _list(self, query: dict[str, str]) -> None:
        prefix, after = query.get("prefix", ""), query.get("continuation-token", "")
        left = sorted(one for one in list(self.store.objects.items()) if one[0].startswith(prefix) and one[0] > after)
        page = left[: min(int(query.get("max-keys", PAGE)), PAGE)]
        more = f"<NextContinuationToken>{escape(page[-1][0])}</NextContinuationToken>" if len(left) > len(page) else ""
        entries = (
            f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, data in page
        )
        self._answer_xml(
            f"<ListBucketResult><KeyCount>{len(page)}</KeyCount><IsTruncated>{str(bool(more)).lower()}</IsTruncated>"
            f"{more}{''.join(entries)}</ListBucketResult>"
        )

    def _answer(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (ETAG | (headers or {})).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _answer_xml(self, text: str, status: int = 200) -> None:
        self._answer(status, f'<?xml version="1.0"?>\n{text}'.encode(), {"Content-Type": "application/xml"})

    def _refuse(self, status: int, code: str) -> None:
        self._answer_xml(f"<Error><Code>{code}</Code><Message>{code}</Message></Error>", status)
