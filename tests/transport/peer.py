"""A small TLS server that keeps what arrives, and breaks off wherever it is told to."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from koinon.site.kit import Kit
from koinon.task.wire import Orders, Poll, Receipt, decode, encode
from koinon.transport.http import PIECE
from koinon.transport.tls import server_context

DATA = os.urandom(3 * PIECE + 12345)
DIGEST = hashlib.sha256(DATA).hexdigest()


class Peer(ThreadingHTTPServer):
    """A server that keeps what arrives, and breaks off as told.

    `cut`: bytes of bodies after which the line is cut, once each; `answers`: (status, body) instead of its own, once.
    """

    daemon_threads = True

    def __init__(self, kit: Kit, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.tls = server_context(kit)
        self.blobs, self.parts, self.cut, self.answers, self.asked = {DIGEST: DATA}, bytearray(), [], [], []
        self.orders, self.arrived, self.lines = Orders(), 0, 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def finish_request(self, request, client_address) -> None:
        self.lines += 1
        try:
            with self.tls.wrap_socket(request, server_side=True) as secure:
                super().finish_request(secure, client_address)
        except OSError:
            return

    def handle_error(self, request, client_address) -> None:
        """A cut line is no news."""

    @property
    def address(self) -> str:
        return f"https://localhost:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: Peer

    def say(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        left = self.server.cut.pop() if self.server.cut and self.command == "GET" and len(body) > 1000 else len(body)
        self.wfile.write(body[:left])
        if left < len(body):
            self.break_off()

    def break_off(self) -> None:
        self.wfile.flush()
        self.connection.unwrap = None
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionResetError

    def log_message(self, *arguments) -> None: ...

    def answer(self) -> None:
        place, peer = urlsplit(self.path), self.server
        peer.asked.append((self.command, self.path))
        length = int(self.headers.get("Content-Length", 0))
        if self.command == "PUT" and not peer.answers:
            return self.take(place, length)
        body = self.rfile.read(length) if self.command == "POST" else b""
        if peer.answers:
            status, text = peer.answers.pop(0)
            self.say(text, status)
            while self.command == "PUT" and length and (piece := self.rfile.read(min(length, 65536))):
                length -= len(piece)  # as aiohttp does, so that the answer arrives
            return None
        if place.path == "/v1/poll":
            peer.poll = decode(body, Poll)
            return self.say(encode(peer.orders))
        if place.path.startswith("/v1/blobs/"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            return self.say(peer.blobs[place.path[10:]][start:], 206)
        if place.path.startswith("/v1/results/"):
            return self.say(encode(Receipt(len(peer.parts))))
        return self.say(json.dumps({"job": body.decode(), "asked": place.path}).encode(), Koinon_State="running")

    def take(self, place, length: int) -> None:
        peer, query = self.server, parse_qs(place.query)
        if int(query["offset"][0]) != len(peer.parts):
            self.rfile.read(length)
            return self.say(encode(Receipt(len(peer.parts))), 409)
        most = peer.cut.pop() if peer.cut else length
        while length and most > 0:
            piece = self.rfile.read(min(length, most, 65536))
            peer.parts += piece
            peer.arrived, length, most = peer.arrived + len(piece), length - len(piece), most - len(piece)
        if length:
            return self.break_off()
        if hashlib.sha256(peer.parts).hexdigest() != query["digest"][0]:
            peer.parts.clear()
            return self.say(b'{"error": "other bytes"}', 422)
        return self.say(encode(Receipt(len(peer.parts), "accepted")))

    do_GET = do_PUT = do_POST = answer  # noqa: N815
