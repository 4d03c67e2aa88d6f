"""Servers on this machine in place of a judge's endpoint: one that speaks its protocol, and one that says anything."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from http.client import parse_headers
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


KEY = "sk-a-secret-key"


def completion(content, finish_reason="stop", **message):
    """The body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}}
    choice |= {} if finish_reason is None else {"finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


class Endpoint:
    """Speaks as much of the chat protocol as a judge hears.

    Args:
        reply: the request's text to the reply, to an HTTP status, or to a whole body.
    """

    def __init__(self, reply):
        self.requests, outer = [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append({"path": self.path, "authorization": self.headers["Authorization"], **body})
                said = reply(body["messages"][0]["content"])
                if isinstance(said, int):
                    error = {"error": {"message": f"refused {self.headers['Authorization']}", "type": "x"}}
                    self.answer(said, error)
                else:
                    self.answer(200, said if isinstance(said, dict) else completion(said))

            def answer(self, status, content):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                # Otherwise the first wait is half a second.
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Bytes:
    """Sends what it is given to each connection, and closes it.

    Args:
        answers: for one connection after the other, the last for all that follow: bytes, or bytes and seconds between
            each two of them.
    """

    def __init__(self, *answers):
        self.answers, self.connections = list(answers), 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            answer = self.answers[min(self.connections, len(self.answers) - 1)]
            self.connections += 1
            threading.Thread(target=self._answer, args=(connection, answer), daemon=True).start()

    def _answer(self, connection, answer):
        with connection:
            try:
                _read_request(connection)
                if isinstance(answer, bytes):
                    connection.sendall(answer)
                    return
                data, seconds = answer
                for place in range(len(data)):
                    connection.sendall(data[place : place + 1])
                    time.sleep(seconds)
            except OSError:
                pass  # it was given up

    def close(self):
        # Without it, `accept` goes on in its thread.
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def _read_request(connection):
    """All of it: a connection that is closed with bytes unread is reset, and what was answered may be lost."""
    with connection.makefile("rb") as request:
        request.readline()
        request.read(int(parse_headers(request).get("Content-Length", 0)))


def http(body, status="200 OK", kind="application/json", headers=""):
    """An answer of HTTP, as bytes."""
    body = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    return f"{head}{headers}\r\n".encode() + body


@contextmanager
def servers(monkeypatch):
    """Gives a function that keeps servers to close them at the end; the key is in the environment meanwhile."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    opened = []

    def keep(server):
        opened.append(server)
        return server

    try:
        yield keep
    finally:
        for server in opened:
            server.close()


def section(text, name):
    """What stands in a section of a judge's question."""
    return text.partition(f"<{name}>\n")[2].partition(f"\n</{name}>")[0]


def prefers_longer(text):
    """A reply in favour of the longer answer."""
    a, b = (len(section(text, f"answer {letter}")) for letter in "AB")
    return f"I could say [[C]], but:\n[[{'C' if a == b else 'AB'[b > a]}]]"
