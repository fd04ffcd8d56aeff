"""A video in a notebook: its page in a frame, from a server on the loopback that ends with the kernel."""

import threading
from functools import lru_cache
from html import escape

from longvlm.jobs.serve.app import make_app, open_socket, run_server
from longvlm.jobs.serve.pinned import ShownStore

_HOST = "127.0.0.1"
# Notebooks of this machine; and of others, whose reader leads the port here, for a frame of http in a page of https
# is let through for the loopback alone.
_NOTEBOOKS = "http://localhost:* http://127.0.0.1:* https://localhost:* vscode-webview:"
_HEIGHT = 640  # pixels


class VideoFrame:
    """A frame around the page of a video. Notebooks show it; its text is the address of the page."""

    def __init__(self, address: str) -> None:
        self.address = address

    def _repr_html_(self) -> str:
        style = f'width="100%" height="{_HEIGHT}" frameborder="0" allowfullscreen'
        return f'<iframe src="{escape(self.address)}" {style}></iframe>'

    def __repr__(self) -> str:
        return self.address


def show_video(store_uri: str, write_id: str, start_s: float | None = None) -> VideoFrame:
    """The page of a live video in a frame, at a second of it.

    Raises:
        InputError: there is no store, or it cannot be read.
    """
    at = "" if start_s is None else f"#t={start_s:.3f}"
    return VideoFrame(f"http://{_HOST}:{_port_for(store_uri)}/video/{write_id}{at}")


@lru_cache(8)
def _port_for(store_uri: str) -> int:
    """The port of a server over a store, in a thread of this process; the first call starts it."""
    app = make_app(ShownStore(store_uri), _HOST, None, _NOTEBOOKS)
    listening = open_socket(_HOST, 0)
    threading.Thread(target=run_server, args=(app, listening), name="longvlm-serve", daemon=True).start()
    port: int = listening.getsockname()[1]
    return port
