"""Servers on the loopback: a webhook, those that serve files well or badly, `longvlm serve` and what would harm it."""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

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
        path, _, query = path.partition("?")
        asked = {name: values[0] for name, values in parse_qs(query).items()}
        key = unquote(path).removeprefix("/bucket").removeprefix("/")
        if refused := self.refuse(key):
            status, code = refused
            return status, {}, f"<Error><Code>{code}</Code><Message>Said by {code}.</Message></Error>".encode()
        if key:
            return self._object(self.objects.get(key))
        keys = "".join(
            f"<Contents><Key>{key}</Key><ETag>&quot;{key}&quot;</ETag><Size>{len(content)}</Size>"
            "<LastModified>2026-01-02T03:04:05.000Z</LastModified></Contents>"
            for key, content in sorted(self.objects.items())
            if key.startswith(asked.get("prefix", "")) and key > asked.get("start-after", "")
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


SCRIPT = "<img src=x onerror=alert(1)><script>alert(1)</script>"  # in an answer, a question, an error
SCRIPT_NAME = "b<img src=x onerror=alert(1)>"  # of a video
LARGE_NAME, LARGE_BYTES = "tiny-3-00001", 16 << 20  # a video of more bytes than a connection takes while none is read
_SERVE = """
import json, sys
from dataclasses import replace
from longvlm.jobs.cluster import resources
resources.SERVE = replace(resources.SERVE, **json.loads(sys.argv.pop(1)))
from longvlm.jobs.cli import main
main()
"""


class PagesServer:
    """`longvlm serve` in a process of its own, at a free port; fields of `ServeResources` may be others."""

    def __init__(self, *options, **limits):
        command = [sys.executable, "-c", _SERVE, json.dumps(limits), "serve", "--quiet", "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        said = self.process.stdout.readline()
        found = re.search(r" is shown at (http://\S+);", said)
        assert found, said + self.process.stderr.read()
        self.url = found[1]
        self.port = int(re.search(r":(\d+)/", self.url)[1])

    def ask(self, target, method="GET", headers=None, body=None):
        """The status, headers and body of an answer; the target is sent as it is, and no header that is None."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in {"Host": f"127.0.0.1:{self.port}", **(headers or {})}.items():
            if value is not None:
                connection.putheader(name, value)
        pieces = []
        connection.send = pieces.append
        connection.endheaders(body)
        connection.connect()
        connection.sock.sendall(b"".join(pieces))  # at once: who refuses a request reads no further
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.headers, data

    def stop(self):
        """End it as Ctrl-C does, which it takes for its end; returns what it wrote to stderr."""
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, said
        return said
