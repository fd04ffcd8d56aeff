"""What an index run is asked to do, and what it reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longvlm.jobs.index.accounting import Counts
from longvlm.pipeline.decode.device import Device
from longvlm.pipeline.source.corpus import Source
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import new_run_id
from longvlm.schemas.recipe import Decode


@dataclass(frozen=True)
class IndexOrder:
    """What to index, and how."""

    source: Source
    store: str
    model: str | None = None
    recipe: str | None = None  # a name or a file; None: the store's own, or `long`
    decode: Decode | None = None  # exact or keyframe; None: as the recipe says
    decode_device: Device = "cpu"  # cuda: a GPU's own decoder where there is one; the pixels are the same
    thumbnails: bool | None = None  # of segments; None: as the store remembers
    limit: int | None = None
    retry_failed: tuple[str, ...] = ()  # codes of failures to try again, or ANY_CODE
    restale: bool = False
    prune: bool = False  # delete what is gone from the source
    allow_mass_delete: bool = False  # however much that is
    max_hours: float | None = None  # then the run ends, well
    max_failed: float = 0.2  # more than this share of failures that are not the videos' own ends the run, badly
    ray_address: str | None = None
    show_progress: bool = False


@dataclass
class IndexReport:
    """How a run ended."""

    counts: Counts
    started_s: float  # seconds since the epoch
    run_id: str = field(default_factory=new_run_id)
    wall_s: float = 0.0
    startup_s: float = 0.0  # before the first decode: listing, Ray, loading models
    work_s: float = 0.0  # from the first decode to the last commit
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    stopped: str | None = None  # why, if it did not get to the end; what was finished by then is committed
    out_of_time: bool = False  # it ended at max_hours
    notes: list[str] = field(default_factory=list)  # what a person should know, and no result depends on

    def as_json(self) -> dict[str, Any]:
        """The object that `longvlm index --json` ends with."""
        said = {"wall_s": round(self.wall_s, 3), "stopped": self.stopped, "run_id": self.run_id}
        return {**self.counts.as_json(), "mostly_failed": self.counts.mostly_failed, **said}


def check_order(order: IndexOrder) -> None:
    """Raise InputError for settings that contradict one another."""
    if order.prune and order.limit is not None:
        raise InputError("--prune with --limit would delete by half a look; leave --limit out, or prune another time.")
    if order.allow_mass_delete and not order.prune:
        raise InputError("--allow-mass-delete goes with --prune; add it, or leave both out.")


def check_device(order: IndexOrder, cluster: Mapping[str, float]) -> None:
    """Raise InputError where GPUs are to decode and a cluster, by `Executor.resources`, has none."""
    if order.decode_device == "cuda" and cluster and not cluster.get("GPU"):
        raise InputError("there is no GPU to decode with; leave --decode-device cuda out, and the CPU does it all.")
