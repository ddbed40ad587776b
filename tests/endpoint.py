"""A real HTTP server with the part of OpenAI's protocol that a judge needs, and with failures on request."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """The server's reply to a request.

    Attributes:
        says: Content of a well-formed answer.
        status: Status code of the response.
        headers: Further headers of the response.
        body: Bytes to send in place of a well-formed answer.
        after_s: Delay before the reply in seconds.
        drops: Whether to close the connection without a reply.
    """

    says: str = "A"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None
    after_s: float = 0.0
    drops: bool = False


@dataclass
class Endpoint:
    """A server's address, its script, and the requests that it has received.

    Attributes:
        url: Base URL.
        script: Function of a question and the number of its earlier requests that returns the reply.
        questions: Text of each request's last message.
        requests: Path and body of each request.
        keys: Header ``Authorization`` of each request.
        at: Time of each request on the monotonic clock in seconds.
        most_at_once: Largest number of simultaneous requests.
    """

    url: str = ""
    script: Callable[[str, int], Reply] = lambda question, times: Reply()
    questions: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, handler: BaseHTTPRequestHandler) -> None:
        """Record a request and send the scripted reply."""
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        question = request["messages"][-1]["content"]
        with self._lock:
            times = Counter(self.questions)[question]
            self.questions.append(question)
            self.requests.append({"path": handler.path, **request})
            self.keys.append(handler.headers.get("Authorization"))
            self.at.append(time.monotonic())
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            self._send(handler, self.script(question, times))
        finally:
            with self._lock:
                self._now -= 1

    def _send(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        time.sleep(reply.after_s)
        if reply.drops:
            handler.close_connection = True
            return
        message = {"role": "assistant", "content": reply.says}
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102},
        }
        body = json.dumps(answer).encode() if reply.body is None else reply.body
        handler.send_response(reply.status)
        for name, value in (("Content-Type", "application/json"), *reply.headers):
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)


@contextmanager
def serving() -> Iterator[Endpoint]:
    """Run an endpoint on this machine for the duration of the block."""
    endpoint = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # The client may have stopped waiting.
                endpoint.reply(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
