"""The command `serve`."""

from importlib.util import find_spec

import click

from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.commands import Command
from longvlm.jobs.options import STORE, say
from longvlm.schemas.errors import InputError


@click.command(
    cls=Command,
    examples=(
        "longvlm serve --store index",
        "longvlm serve --store s3://bucket/index --host 0.0.0.0 --port 8000",
    ),
)
@STORE
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at; at any but this machine's own, requests need a token, which is printed.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
def serve(*, store: str, host: str, port: int) -> None:
    """Look at a store in the browser: videos, answers and the seconds they rest on, search, runs and SQL.

    It only reads, shows the store as it is now, and needs no Ray; Ctrl-C ends it. Videos are played from where they
    lie, thumbnails are made as they are looked at.
    """
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise InputError("serve needs starlette and uvicorn; pip install 'longvlm-index[serve]'.")
    import secrets

    from longvlm.jobs.serve.app import make_app, open_socket, run_server
    from longvlm.jobs.serve.guard import is_loopback
    from longvlm.jobs.serve.library import Library

    doing(f"reading the store {store}")
    library = Library(store)
    token = None if is_loopback(host) else secrets.token_urlsafe(32)
    with open_socket(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        query = "" if token is None else f"?token={token}"
        say(f"{store} is shown at http://{shown}:{listening.getsockname()[1]}/{query}; Ctrl-C ends it.")
        try:
            run_server(make_app(library, host, token), listening)
        except KeyboardInterrupt:  # as it is meant to end
            return
