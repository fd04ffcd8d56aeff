"""A chat endpoint on the loopback that says what a test wants."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from servers import POLL_S

LIKES = "{'pred': 'yes', 'score': 4}"


def chat(content):
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


class JudgeServer(ThreadingHTTPServer):
    """`say(request, number)` gives what is said: a text, or (status, headers, body), or seconds of silence."""

    daemon_threads = True

    def __init__(self, say=lambda *_: LIKES):
        self.say = say
        self.requests, self.headers = [], []
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.host = f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.host}/v1"
        threading.Thread(target=self.serve_forever, args=(POLL_S,), daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()


def once(first, then=LIKES):
    """What to say to the first request, and to the others."""
    return lambda _, number: first if number == 0 else then


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(request | {"path": self.path})
            self.server.headers.append(dict(self.headers))
        said = self.server.say(request, number)
        if isinstance(said, float):
            time.sleep(said)
            said = LIKES
        status, headers, body = said if isinstance(said, tuple) else (200, {}, json.dumps(chat(said)))
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())
        except OSError:
            pass  # the client has gone

    def log_message(self, *_):
        pass
