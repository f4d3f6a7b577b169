"""Pictures by address, from a server of our own that does what servers do wrong."""

import http.server
import io
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from PIL import Image

from oner.processing import image_fetching
from oner.processing.image_fetching import fetch_bytes
from oner.processing.image_processing_vl import ImageDecodeError, open_image

BUFFER = io.BytesIO()
Image.new("RGB", (6, 4), (255, 0, 0)).save(BUFFER, "PNG")
PNG = BUFFER.getvalue()
# path -> what the answer says is wrong
WRONG = {
    "/cut": "IncompleteRead",
    "/short": "IncompleteRead",
    "/garbage": "BadStatusLine",
    "/closed": "closed connection",
    "/missing": "404",
    "/long-line": "LineTooLong",
    "/page": "not a picture",
    "/empty": "empty",
    "/loop": "infinite loop",
    "/to-file": "'file:///etc/passwd' is not allowed",
    "/to-ftp": "ftp://example.org/a', which is no http",
    "/to-private": r"127\.0\.0\.1\), which is no public address",
}


class Handler(http.server.BaseHTTPRequestHandler):
    agents: list[str] = []

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802
        name = self.path.split("?")[0]
        self.agents.append(self.headers.get("User-Agent", ""))
        if name in ("/garbage", "/closed"):
            self.wfile.write(b"garbage\r\n\r\n" if name == "/garbage" else b"")
        elif name == "/trickle":
            self.trickle()
        elif name.startswith(("/to-", "/loop")):
            places = {"/to-file": "file:///etc/passwd", "/to-ftp": "ftp://example.org/a", "/loop": "/loop"}
            self.answer(302, b"", Location=places.get(name, "/a.png"))
        elif name == "/cut":
            self.protocol_version = "HTTP/1.1"
            self.answer(200, b"400\r\n" + PNG[:20], **{"Transfer-Encoding": "chunked"})
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            body = {"/page": b"<html>", "/empty": b"", "/short": PNG[:20]}.get(name, PNG)
            headers = {"Content-Length": "999"} if name == "/short" else {}
            headers |= {"X": "a" * 70_000} if name == "/long-line" else {}
            self.answer(404 if name == "/missing" else 200, body, **headers)

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def trickle(self) -> None:
        """A header that never ends, a byte at a time: no single wait is long."""
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        try:
            for _ in range(100):
                self.wfile.write(b"a")
                time.sleep(0.02)
        except OSError:
            pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_good_address_is_read_by_a_named_agent(site):
    Handler.agents.clear()
    for address in ("/a.png", "/a photo.png?size=1 2", "/Größe.png", "/a%20photo.png"):
        assert open_image(site + address, allow_urls=True).size == (6, 4)
    assert all(agent.startswith("oner ") for agent in Handler.agents)


@pytest.mark.parametrize("path", WRONG)
def test_whatever_a_server_does_is_a_picture_that_cannot_be_read(site, path, monkeypatch):
    # this server, to be asked at all, stands for one on the web until it redirects
    if path == "/loop":
        monkeypatch.setattr(image_fetching, "is_guarded", lambda request: False)
    with pytest.raises(ImageDecodeError, match=WRONG[path]):
        open_image(site + path, allow_urls=True)


@pytest.mark.parametrize(
    "address",
    ["http://", "http://[", "http://a b/c", "https://127.0.0.1:1/a", "http://\0/", "http://a:b/", "http://ä..ö/"],
)
def test_whatever_an_address_is(address):
    with pytest.raises(ImageDecodeError, match="cannot fetch"):
        open_image(address, allow_urls=True)


def test_time_and_size_are_limited(site):
    start = time.monotonic()
    with pytest.raises(OSError, match=r"not done after 0\.2 seconds"):
        fetch_bytes(f"{site}/trickle", seconds=0.2)
    assert time.monotonic() - start < 1
    with pytest.raises(OSError, match="more than 10 bytes"):
        fetch_bytes(f"{site}/a.png", most=10)
