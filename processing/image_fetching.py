"""Fetches images by http(s) with limits on time and size, decodes base64, and limits the memory for decoding.

Redirects to addresses that are not public are refused: otherwise anyone who can submit a URL could use a server of
their own to reach hosts that only this machine can reach. A URL that itself names such a host is the caller's choice.
"""

import base64
import binascii
import http.client
import ipaddress
import os
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, Queue
from typing import Any
from urllib.parse import quote

MAX_URL_BYTES = 64 * 2**20
URL_SECONDS = 20.0  # from the DNS look-up to the last byte
USER_AGENT = "oner (Python library of vision-language models)"  # some hosts refuse Python's default
PIECE = 2**16
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")
DECODE_BYTES = 2**30
BYTES_PER_PIXEL = 12  # of the decoder that needs most, WebP's: three canvases of four channels


class _PublicOnly:
    """Mixin for a connection: refuses peers whose address is not public."""

    def connect(self) -> None:
        super().connect()
        peer = ipaddress.ip_address(self.sock.getpeername()[0].partition("%")[0])
        peer = getattr(peer, "ipv4_mapped", None) or peer
        if not peer.is_global:
            self.close()
            raise OSError(f"redirected to {self.host} ({peer}), which is no public address")


class _PublicHTTP(_PublicOnly, http.client.HTTPConnection):
    pass


class _PublicHTTPS(_PublicOnly, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(_PublicHTTP if is_guarded(req) else http.client.HTTPConnection, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: Any) -> Any:
        return self.do_open(_PublicHTTPS if is_guarded(req) else http.client.HTTPSConnection, req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.startswith(("http://", "https://")):
            raise OSError(f"redirected to {newurl!r}, which is no http(s) address")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        request.redirected = True
        return request


def is_guarded(request: Any) -> bool:
    """Whether a request follows a redirect without a proxy; a proxy protects its own network."""
    return getattr(request, "redirected", False) and not request.has_proxy()


def fetch_bytes(url: str, seconds: float = URL_SECONDS, most: int = MAX_URL_BYTES) -> bytes:
    """The content at an http(s) URL.

    Raises:
        OSError: for any failure, also if a limit is exceeded; the message gives the reason.
    """
    answer: Queue = Queue()
    # in a thread: nothing else bounds the time of a DNS look-up, a handshake or slow headers
    threading.Thread(target=_fetch_into, args=(answer, url, seconds, most), daemon=True).start()
    try:
        got = answer.get(timeout=seconds)
    except Empty:
        raise OSError(f"not done after {seconds:g} seconds") from None
    if isinstance(got, Exception):
        raise OSError(f"{type(got).__name__}: {got}" if isinstance(got, http.client.HTTPException) else str(got))
    return got


def _fetch_into(answer: Queue, url: str, seconds: float, most: int) -> None:
    end = time.monotonic() + seconds
    data = bytearray()
    try:
        # percent-encode spaces and non-ASCII characters
        address = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        request = urllib.request.Request(address, headers={"User-Agent": USER_AGENT})
        with urllib.request.build_opener(_Http, _Https, _Redirects).open(request, timeout=seconds) as response:
            while piece := response.read1(PIECE):
                data += piece
                if len(data) > most:
                    raise OSError(f"more than {most} bytes")
                if time.monotonic() > end:
                    return
            if response.length:
                raise http.client.IncompleteRead(bytes(data), response.length)
    except Exception as error:  # http.client, urllib and sockets raise many types; all mean the same here
        answer.put(error)
    else:
        answer.put(bytes(data))


def named(source: str) -> str:
    """A path or URL for messages; for a text that contains a whole image, only its beginning."""
    short = len(source) <= 300 and not source.startswith("data:")
    return repr(source) if short else f"{source[:40]!r}... of {len(source)} characters"


def from_base64(text: str, is_picture: Callable[[bytes], bool]) -> bytes | None:
    """The bytes of a ``data:`` URL or a base64 text; None for a path. The name of an existing file is a path."""
    head, comma, body = text.partition(",")
    marked = head.startswith("data:") and head.endswith(";base64") and comma
    if not marked:
        body = text
        if not BASE64.fullmatch(text) or os.path.lexists(text):
            return None
    try:
        data = base64.b64decode(body)
    except binascii.Error:
        return None
    return data if marked or is_picture(data) else None


class ByteBudget:
    """A memory budget shared by all threads; a thread that wants more than is left waits for the others."""

    def __init__(self, total: int):
        self.total = total
        self.reset()

    def reset(self) -> None:
        """Releases everything, as needed in a forked child, which lacks the threads that held memory."""
        self._left = self.total
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, wanted: int) -> Iterator[None]:
        """Holds `wanted` bytes, at most the whole budget: a larger request runs alone."""
        wanted = min(wanted, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= wanted)
            self._left -= wanted
        try:
            yield
        finally:
            with self._changed:
                self._left += wanted
                self._changed.notify_all()


decoding = ByteBudget(DECODE_BYTES)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=decoding.reset)


__all__ = ["BYTES_PER_PIXEL", "ByteBudget", "decoding", "fetch_bytes", "from_base64", "named"]
