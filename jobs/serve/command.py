"""The command `serve`."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.commands import Command
from longvlm.jobs.options import STORE, say
from longvlm.schemas.errors import InputError

if TYPE_CHECKING:
    from longvlm.jobs.serve.asking import Asker


@click.command(
    cls=Command,
    examples=(
        "longvlm serve --store index",
        "longvlm serve --store index --write anna --model tinyworld",
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
@click.option(
    "--model",
    "asked_model",
    is_flag=False,
    flag_value="",
    metavar="[M]",
    help="Load a model, so that questions may be asked in the pages: a folder, a hub id or tinyworld; without M the "
    "one that the store remembers.",
)
@click.option(
    "--write",
    is_flag=False,
    flag_value="",
    metavar="[NAME]",
    help="Let the pages write: NAME's verdicts on answers, and answers to what is asked; without NAME the login's.",
)
def serve(*, store: str, host: str, port: int, asked_model: str | None, write: str | None) -> None:
    """Look at a store in the browser: videos, answers and the seconds they rest on, search, runs and SQL.

    It only reads unless --write is given, shows the store as it is now, and needs no Ray; Ctrl-C ends it. Videos are
    played from where they lie, thumbnails are made as they are looked at.
    """
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise InputError("serve needs starlette and uvicorn; pip install 'longvlm-index[serve]'.")
    import secrets

    from longvlm.jobs.serve.app import make_app, open_socket, run_server
    from longvlm.jobs.serve.guard import is_loopback
    from longvlm.jobs.serve.pinned import ShownStore
    from longvlm.jobs.serve.verdicts import HumanVerdicts, name_of

    doing(f"reading the store {store}")
    shown = ShownStore(store)
    person = None if write is None else HumanVerdicts(shown.store_uri, name_of(write))
    asker = None if asked_model is None else _load(shown.store_uri, asked_model or None, keeps=person is not None)
    token = None if is_loopback(host) else secrets.token_urlsafe(32)
    with open_socket(host, port) as listening:
        name = f"[{host}]" if ":" in host else host
        query = "" if token is None else f"?token={token}"
        say(f"{store} is shown at http://{name}:{listening.getsockname()[1]}/{query}; Ctrl-C ends it.")
        try:
            run_server(make_app(shown, host, token, person=person, asker=asker), listening)
        except KeyboardInterrupt:  # as it is meant to end
            return


def _load(store_uri: str, model: str | None, *, keeps: bool) -> "Asker":
    """A model for the pages. With it comes torch, which they do without otherwise."""
    from longvlm.jobs.answer.loaded import LoadedModel
    from longvlm.jobs.serve.asking import Asker
    from longvlm.pipeline.store.ledger import Store

    doing("loading the model")
    return Asker(store_uri, LoadedModel(Store.open(store_uri), model), keeps=keeps)
