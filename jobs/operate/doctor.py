"""Health checks of a cluster: what a run needs, tried in a worker on every node."""

import shutil
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.table import Table
from rich.text import Text

from longvlm.jobs.choose import absolute, choose_index_recipe
from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.cluster.resources import DECODE_MEMORY_BYTES
from longvlm.jobs.cluster.session import connect, failure_of
from longvlm.jobs.runs import VERSIONS
from longvlm.jobs.terminal import terminal
from longvlm.pipeline.decode import video
from longvlm.pipeline.decode.isolate import Decoder
from longvlm.pipeline.source.corpus import Source, list_pages, nothing_in
from longvlm.pipeline.store import catalog, lease
from longvlm.pipeline.store.files import canonical, filesystem
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.uris import is_local, local_path, locate
from longvlm.pipeline.visible import visible
from longvlm.pipeline.vision.towers.families import load_tower
from longvlm.schemas.errors import InputError

_TIMEOUT_S = 300.0  # for a node to start a worker and load a tower
_CHILD_S = 60.0  # for a decoder's child to start
_MIN_SCRATCH_BYTES = 2 << 30  # a few downloaded videos
_LIBRARIES = ("av", *VERSIONS)


@dataclass(frozen=True)
class DoctorOrder:
    """The order of a health check: what a run would be given."""

    source: str
    store: str
    model: str | None = None


@dataclass(frozen=True)
class Finding:
    """The result of one check on one node."""

    node: str  # its address; `here` for where the command was given
    check: str
    ok: bool
    detail: str
    advice: str = ""  # what to do, where it is not well


@dataclass(frozen=True)
class _NodeCheck:
    """All that a worker needs to check its node."""

    order: DoctorOrder
    node: str
    has_gpu: bool
    test_object: str  # an object in the store that was written by the driver; empty where it could not be
    versions: dict[str, str | None]


def run_doctor(order: DoctorOrder, ray_address: str | None = None) -> list[Finding]:
    """Run every check on every node; returns the findings, node by node.

    Raises:
        InputError: no cluster answers at the address, or no store can be at its own.
    """
    order = DoctorOrder(  # by addresses and names that hold in a worker, which is in another folder
        local_path(order.source) if is_local(order.source) else order.source,
        canonical(order.store),
        absolute(order.model) if order.model else None,
    )
    doing("starting Ray" if ray_address is None else f"joining the Ray cluster at {ray_address}")
    connect(ray_address)
    doing("trying every node")
    with _test_object(order.store) as (test_object, findings):
        asked = {}
        for node in (node for node in ray.nodes() if node["Alive"]):
            has_gpu = node["Resources"].get("GPU", 0) > 0
            node_check = _NodeCheck(order, node["NodeManagerAddress"], has_gpu, test_object, _versions())
            remote = ray.remote(num_cpus=0, num_gpus=0.01 if has_gpu else 0, max_retries=0)(_examine_node)
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[remote.options(scheduling_strategy=here).remote(node_check)] = node_check.node
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_TIMEOUT_S)
        for task, node in asked.items():
            findings.extend(_findings_of(task, node) if task in done else [_no_answer(node)])
    return findings


def _findings_of(task: Any, node: str) -> list[Finding]:
    try:
        found: list[Finding] = ray.get(task)
    except ray.exceptions.RayError as error:
        advice = "Install the same longvlm-index in the cluster's image, or send it along with `longvlm submit`."
        return [Finding(node, "worker", ok=False, detail=failure_of(error), advice=advice)]
    return found


def _no_answer(node: str) -> Finding:
    detail = f"no worker answered within {_TIMEOUT_S:.0f} s"
    return Finding(
        node, "worker", ok=False, detail=detail, advice="Is the node busy or its GPU taken? See `ray status`."
    )


@contextmanager
def _test_object(store_uri: str) -> Iterator[tuple[str, list[Finding]]]:
    """A test object in the store for the workers to find, and what came of writing it; nothing stays behind."""
    uri = f"{canonical(store_uri)}/.doctor-{uuid.uuid4()}"
    made = _missing_folders(uri)
    try:
        lease.create(uri, b"doctor")
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is what is asked
        advice = "Check the store's address, your credentials and your rights."
        yield "", [Finding("here", "store", ok=False, detail=_error_text(error), advice=advice)]
    else:
        try:
            yield uri, []
        finally:
            fs, path = filesystem(uri)
            fs.rm_file(path)
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _missing_folders(uri: str) -> list[Path]:
    """The folders that writing a local file would make, the innermost first."""
    return [folder for folder in Path(uri).parents if not folder.exists()] if is_local(uri) else []


def _examine_node(node_check: _NodeCheck) -> list[Finding]:
    """Run the checks of a node, in a worker of it."""
    return [_try(node_check, *check) for check in _CHECKS]


def _try(node_check: _NodeCheck, name: str, check: Callable[[_NodeCheck], str], advice: str) -> Finding:
    try:
        detail = check(node_check)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is what is asked
        return Finding(node_check.node, name, ok=False, detail=_error_text(error), advice=advice)
    return Finding(node_check.node, name, ok=True, detail=detail)


def _error_text(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, InputError | _CheckFailedError) else f"{type(error).__name__}: {text}"


class _CheckFailedError(Exception):
    """A check has failed: what is wrong, as a sentence."""


def _versions() -> dict[str, str | None]:
    """Versions of the libraries that are installed here, and of Python; None of those that are not."""
    found: dict[str, str | None] = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _libraries(node_check: _NodeCheck) -> str:
    here = _versions()
    missing = [name for name, found in here.items() if found is None]
    other = [
        f"{name} {here[name]} (driver: {found})"
        for name, found in node_check.versions.items()
        if found and here[name] != found
    ]
    if missing or other:
        raise _CheckFailedError("; ".join([*(f"{name} is not installed" for name in missing), *other]))
    return ", ".join(f"{name} {found}" for name, found in here.items() if found)


def _decoders(_: _NodeCheck) -> str:
    import av

    with closing(Decoder(_CHILD_S, DECODE_MEMORY_BYTES)) as decoder:
        decoder.call(video.close_video)  # the least that a child can be asked
        confined = ", ".join(decoder.confined) or "nothing that this kernel has"
        return f"PyAV {av.__version__}; its child starts, confined by {confined}"


def _scratch(_: _NodeCheck) -> str:
    folder = tempfile.gettempdir()
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"doctor")
    free = shutil.disk_usage(folder).free
    if free < _MIN_SCRATCH_BYTES:
        raise _CheckFailedError(f"{folder} has {free / 1e9:.1f} GB free")
    return f"{folder} has {free / 1e9:.0f} GB free"


def _source(node_check: _NodeCheck) -> str:
    source = Source(node_check.order.source)
    left_out: Counter[str] = Counter()
    page = next((page for page in list_pages(source, left_out) if page["error_code"].null_count), None)
    if page is None:
        raise nothing_in(source, left_out)
    uri = page.filter(page["error_code"].is_null())["uri"][0].as_py()
    fs, path = locate(uri)
    head = fs.cat_file(path, start=0, end=1 << 16)
    return f"lists {len(page)} videos on its first page; read {len(head)} bytes of {uri}"


def _shared_store(node_check: _NodeCheck) -> str:
    if not node_check.test_object:
        raise _CheckFailedError("not tried, since the store cannot be written from here")
    fs, path = filesystem(node_check.test_object)
    fs.invalidate_cache()
    if not fs.exists(path):
        raise _CheckFailedError("what the driver wrote is not seen here: this is another folder of the same name")
    uri = f"{node_check.test_object}-{uuid.uuid4()}"
    fs, path = filesystem(uri)
    if not lease.create(uri, b"first"):
        raise _CheckFailedError("a conditional put of a new object was refused")
    try:
        if lease.create(uri, b"second"):
            raise _CheckFailedError(
                "a conditional put overwrote an object: two runs at once would lose each other's work"
            )
    finally:
        fs.rm_file(path)
    return "written, refused a second time, removed"


def _tables(node_check: _NodeCheck) -> str:
    store = Store.find(node_check.order.store)
    if store is None:
        return "no store yet; the first index makes it"
    with catalog.connect(store.pin(("videos",)), ("live_videos",)) as con:
        ((number,),) = con.execute("SELECT count(*) FROM live_videos").fetchall()
    return f"{number} live videos"


def _model(node_check: _NodeCheck) -> str:
    store = Store.find(node_check.order.store)
    if node_check.order.model is None and (store is None or store.active_recipe() is None):
        return "not tried: no --model, and no store that remembers one"
    recipe, model = choose_index_recipe(store, node_check.order.model, None, None)
    device = "cuda" if node_check.has_gpu else "cpu"
    load_tower(recipe.tower.name, recipe.precision, device)
    return f"the tower {recipe.tower.name} of {model} is loaded on {device}"


def _gpu(node_check: _NodeCheck) -> str:
    import torch

    if not node_check.has_gpu:
        return "none here: encoders take CPUs"
    if not torch.cuda.is_available():
        raise _CheckFailedError(f"Ray counts GPUs here, and torch {torch.__version__} sees none")
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"


_CHECKS: tuple[tuple[str, Callable[[_NodeCheck], str], str], ...] = (
    ("libraries", _libraries, "Install the same versions on the cluster and where jobs are started: constraints.txt."),
    ("decoders", _decoders, "Install av again in the cluster's image, and look at the node's memory."),
    ("scratch", _scratch, "Give the node room, or point TMPDIR to a disk with some: videos are downloaded there."),
    ("source", _source, "Check its address, and that workers have credentials: they come from their environment."),
    ("store", _shared_store, "Check its address and the workers' rights. A folder must be one that all nodes share."),
    ("tables", _tables, "If files are missing, `longvlm maintain --verify` says which."),
    ("gpu", _gpu, "Install a driver and a torch for CUDA in the cluster's image."),
    ("model", _model, "The folder must be where workers read it, or a hub within their reach; see also the memory."),
)


def print_findings(findings: list[Finding]) -> None:
    """Print a table of the findings, a line a check; several nodes that say the same share one."""
    grouped: dict[tuple[str, bool, str, str], list[str]] = {}
    for found in findings:
        grouped.setdefault((found.check, found.ok, found.detail, found.advice), []).append(found.node)
    table = Table("check", "node", "", "what was found", box=None)
    for (check, ok, detail, advice), nodes in grouped.items():
        where = nodes[0] if len(nodes) == 1 else f"{len(nodes)} nodes"
        said = detail if ok else f"{detail.rstrip('.')}. {advice}"
        table.add_row(*(Text(visible(cell)) for cell in (check, where, "ok" if ok else "FAILED", said)))
    terminal().print(table)
