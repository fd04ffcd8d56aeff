"""Watch every video of a bucket once, and ask anything of what was kept.

`longvlm.index` watches, `longvlm.open` gives a handle on what was kept; docs/concepts.md has the words.

Every import of `longvlm.pipeline...` runs this file, so it imports next to nothing.
"""

from pkgutil import extend_path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from longvlm.handle import VideoIndex

# In a checkout the rooms lie beside this folder and not in it. Where that is found before an installation or before
# `.links` (`PYTHONPATH=.links python -m benchmarks...`), their `longvlm` has the rooms.
__path__ = extend_path(__path__, __name__)
__all__ = ["index", "open"]


def open(store: str) -> "VideoIndex":  # noqa: A001 - longvlm.open is what it is
    """A handle on a store, a folder or bucket prefix that `longvlm.index` or `longvlm index` made.

    Raises:
        longvlm.schemas.errors.InputError: there is no store.
    """
    from longvlm.handle import VideoIndex

    return VideoIndex(store)


def index(
    source: str,
    store: str,
    *,
    model: str | None = None,
    recipe: str | None = None,
    decode: Literal["exact", "keyframe"] | None = None,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    limit: int | None = None,
    restale: bool = False,
    prune: bool = False,
    max_hours: float | None = None,
    ray_address: str | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Watch the videos of a source once and keep their tokens in a store, as `longvlm index` does.

    Args:
        source: a folder, a bucket prefix or a manifest.
        store: folder or bucket prefix that holds the tables; made where there is none.
        model: folder or hub id of a model, or tinyworld; None: what the store remembers.
        recipe: paper, long, tiny, or a TOML or JSON file; None: the store's, or long.
        decode: exact or keyframe; None: as the recipe says.
        include: only paths below the source that match one of these globs.
        exclude: no paths that match one of these.
        limit: at most so many videos now.
        restale: index what is indexed under another recipe only under this one too.
        prune: delete from the store what the source no longer has.
        max_hours: the run ends well after so many.
        ray_address: a Ray cluster; None: RAY_ADDRESS or a local Ray; "none": this process alone.
        show_progress: bars on stderr.

    Returns:
        Where every listed video went, as `longvlm index --json` ends with; `stopped` says why a run ended early.

    Raises:
        longvlm.schemas.errors.InputError: the source, model, recipe or store cannot be used; nothing is written.
    """
    from longvlm.jobs.index.order import IndexOrder
    from longvlm.jobs.index.run import run_index
    from longvlm.pipeline.source.corpus import Source

    order = IndexOrder(
        Source(source, include, exclude),
        store,
        model=model,
        recipe=recipe,
        decode=decode,
        limit=limit,
        restale=restale,
        prune=prune,
        max_hours=max_hours,
        ray_address=ray_address,
        show_progress=show_progress,
    )
    return run_index(order).as_json()
