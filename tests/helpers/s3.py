"""A local S3 server that can be told to fail, and the objects that it serves."""

import base64
import hashlib
import random
import socket
import struct
import threading
import time
import zlib
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from rareplanes.bucket import PARTS

MODIFIED = datetime(2020, 6, 1, tzinfo=UTC)
AIRPORTS = ("Atlanta", "Basel", "Chicago", "Hong_Kong")


class FakeS3(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.over = threading.Event()
        self.reset()

    def reset(self):
        self.over.set()  # ends requests that still stall
        self.objects: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}  # where the ETag is not the MD5 of the object
        self.sizes: dict[str, str] = {}  # wrong sizes for the listing
        self.extra = ""  # further content of the listing
        self.sends_checksums = False
        self.refuses: tuple[int, str] | None = None  # status and code of every listing
        self.faults: dict[str, list[str]] = {}  # key: what goes wrong on its next GETs, in order
        self.page_size = 7
        self.storm_until = 0.0  # 503 to everything before this time
        self.chunk_delay = 0.0
        self.object_bytes = 0
        self.counting = threading.Lock()
        self.log: list[tuple[str, dict[str, str]]] = []
        self.over = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def etag(self, key):
        return self.etags.get(key) or hashlib.md5(self.objects[key]).hexdigest()

    def handle_error(self, request, client_address):
        pass  # clients may hang up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise every answer waits 40 ms for an acknowledgement
    server: FakeS3

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def error(self, status, code):
        body = f"<Error><Code>{code}</Code><Message>no\u202eon</Message></Error>"
        self.reply(status, body.encode())

    def do_GET(self):
        url = urlsplit(self.path)
        self.server.log.append((self.path, dict(self.headers)))
        if time.monotonic() < self.server.storm_until:
            return self.error(503, "SlowDown")
        if key := unquote(url.path.removeprefix("/rareplanes-public").lstrip("/")):
            return self.get_object(key)
        if self.server.refuses:
            return self.error(*self.server.refuses)
        return self.list_objects({k: v[0] for k, v in parse_qs(url.query).items()})

    def list_objects(self, query):
        keys = sorted(k for k in self.server.objects if k.startswith(query["prefix"]))
        start = int(query.get("continuation-token", 0))
        end = start + self.server.page_size
        rows = "".join(
            f"<Contents><Key>{escape(quote(key))}</Key>"
            f"<LastModified>{MODIFIED:%Y-%m-%dT%H:%M:%S}.500Z</LastModified>"
            f"<ETag>&quot;{self.server.etag(key)}&quot;</ETag>"
            f"<Size>{self.server.sizes.get(key, len(self.server.objects[key]))}</Size></Contents>"
            for key in keys[start:end]
        )
        more = end < len(keys)
        token = f"<NextContinuationToken>{end}</NextContinuationToken>" if more else ""
        body = (
            f"<ListBucketResult><EncodingType>url</EncodingType>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{rows}{self.server.extra}</ListBucketResult>"
        )
        self.reply(200, body.encode())

    def get_object(self, key):
        server = self.server
        if key not in server.objects:
            return self.error(404, "NoSuchKey")
        body, etag = server.objects[key], f'"{server.etag(key)}"'
        checksum = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
        if self.headers.get("If-Match", etag) not in (etag, "*"):
            return self.error(412, "PreconditionFailed")
        faults = server.faults.get(key)
        fault = faults.pop(0) if faults else None
        if fault == "503":
            return self.error(503, "SlowDown")
        if fault == "500":
            return self.error(500, "InternalError")
        if fault == "nonsense":
            return self.reply(200, b"<html>log in to the hotel network</html>", ETag=etag)
        if fault == "flip":
            body = body[:100] + bytes([body[100] ^ 1]) + body[101:]
        if fault == "long":
            body += b"more"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", etag)
        if server.sends_checksums and self.headers.get("x-amz-checksum-mode") == "ENABLED":
            self.send_header("x-amz-checksum-crc32", checksum)
        self.end_headers()
        if fault in ("short", "reset", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                server.over.wait()
            if fault == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            if fault == "short":
                self.connection.shutdown(socket.SHUT_RD)
            else:
                self.connection.close()
            self.close_connection = True
            return None
        for at in range(0, len(body), 4096):
            # Counted first: after the last chunk the client may be done and the test may continue.
            with server.counting:
                server.object_bytes += len(body[at : at + 4096])
            self.wfile.write(body[at : at + 4096])
            if server.chunk_delay:
                time.sleep(server.chunk_delay)
        return None


def keys_of(split, stem):
    return [f"synthetic/{split}/{part}/{stem}{end}" for part, end in PARTS.items()]


def fill(server, per_airport=3, splits=("train", "test"), size=9000):
    rng = random.Random(1)
    for split in splits:
        for airport in AIRPORTS:
            for n in range(per_airport):
                image, mask, xml = keys_of(split, f"{airport}_Airport_0_0_{n}")
                server.objects[image] = rng.randbytes(size)
                server.objects[mask] = rng.randbytes(size // 2)
                server.objects[xml] = rng.randbytes(200)
