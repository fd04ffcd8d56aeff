"""Servers on the loopback: a webhook, and such as serve files well or badly."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

POLL_S = 0.01  # to hear that a server is to end, which takes half a second otherwise


class Webhook(ThreadingHTTPServer):
    """Answers with the statuses it is given, the last one for ever, and keeps what was posted."""

    def __init__(self, *statuses):
        self.statuses = list(statuses)
        self.posts = []
        super().__init__(("127.0.0.1", 0), _WebhookHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/services/SECRET"
        threading.Thread(target=self.serve_forever, args=(POLL_S,), daemon=True).start()


class _WebhookHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status = self.server.statuses.pop(0) if len(self.server.statuses) > 1 else self.server.statuses[0]
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/login")
        self.end_headers()

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


class FileServer(ThreadingHTTPServer):
    """`answer(method, path)` gives (status, headers, body); a body is bytes, or pieces that are sent as they come.

    Without a header of that name Content-Length is that of the bytes. HEAD is answered without the body.
    """

    daemon_threads = True

    def __init__(self, answer):
        self.answer = answer
        self.requests = []  # (method, path)
        super().__init__(("127.0.0.1", 0), _FileHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(POLL_S,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


def trickle(ended, every_s):
    """A body of a byte now and then, until an event."""
    while not ended.wait(every_s):
        yield b"x"


class BucketServer(FileServer):
    """An S3 service with one bucket, `bucket`.

    Args:
        objects: contents by key.
        refuse: `refuse(key)` gives (status, code) of an error, or None; the listing is asked about as "".
    """

    def __init__(self, objects, refuse=lambda _: None):
        self.objects, self.refuse = objects, refuse
        super().__init__(self._answer)
        keys = {"AWS_ACCESS_KEY_ID": "made-up", "AWS_SECRET_ACCESS_KEY": "made-up", "AWS_REGION": "us-east-1"}
        self.environment = {"AWS_ENDPOINT_URL": self.url, "AWS_DEFAULT_REGION": "us-east-1", **keys}

    def _answer(self, _, path):
        key = unquote(path.partition("?")[0]).removeprefix("/bucket").removeprefix("/")
        if refused := self.refuse(key):
            status, code = refused
            return status, {}, f"<Error><Code>{code}</Code><Message>Said by {code}.</Message></Error>".encode()
        if key:
            return self._object(self.objects.get(key))
        keys = "".join(
            f"<Contents><Key>{key}</Key><ETag>&quot;{key}&quot;</ETag><Size>{len(content)}</Size>"
            "<LastModified>2026-01-02T03:04:05.000Z</LastModified></Contents>"
            for key, content in sorted(self.objects.items())
        )
        return 200, {"Content-Type": "application/xml"}, f"<ListBucketResult>{keys}</ListBucketResult>".encode()

    def _object(self, content):
        if content is None:
            return 404, {}, b"<Error><Code>NoSuchKey</Code><Message>gone</Message></Error>"
        return 200, {"ETag": '"x"', "Last-Modified": "Fri, 02 Jan 2026 03:04:05 GMT"}, content


class _FileHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.command, self.path))
        status, headers, body = self.server.answer(self.command, self.path)
        if isinstance(body, bytes):
            headers = {"Content-Length": len(body), **headers}
            body = [body]
        else:
            headers = {"Connection": "close", **headers}
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            for piece in body if self.command == "GET" else []:
                self.wfile.write(piece)
                self.wfile.flush()
        except OSError:
            self.close_connection = True  # the client has gone

    do_HEAD = do_GET  # noqa: N815 - as the library calls it

    def log_message(self, *_):
        pass
