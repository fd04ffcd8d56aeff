"""Stages 2 to 4 of training on Ray: readers in actors of Ray Data, workers of Ray Train."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray import train
from ray.data import ActorPoolStrategy, ExecutionOptions
from ray.train.torch import TorchTrainer

from longvlm.jobs.cluster.executor import StageError
from longvlm.jobs.cluster.resources import TrainResources
from longvlm.jobs.cluster.session import failure_of
from longvlm.jobs.cluster.watch import ClusterLostError, watch_cluster
from longvlm.jobs.train.entry import ReadWorker, train_worker
from longvlm.jobs.train.worker_config import CHECKPOINTS, ReaderConfig, WorkerConfig

MAX_RETRIES = 3  # of a worker group that lost a member; it goes on from the last checkpoint


def fit_on_ray(
    config: WorkerConfig,
    parts: Sequence[list[pa.Table]],
    reader_config: ReaderConfig,
    resources: TrainResources,
    run_id: str,
) -> dict[str, Any]:
    """Train with a worker for each part of the plan (PLANNED rows).

    Returns:
        What `run_loop` of the first worker does.

    Raises:
        StageError: the workers cannot go on.
    """
    datasets = [_read(part, reader_config, resources) for part in parts]
    trainer = _trainer(config, datasets, resources, run_id)
    try:
        with _own_ctrl_c(), watch_cluster() as watch:
            (result,) = watch.wait_for(trainer.fit() for _ in range(1))
    except ClusterLostError as error:
        ray.shutdown()  # else Ray ends this process before it can tell why
        raise StageError(str(error)) from error
    except train.WorkerGroupError as error:
        raise StageError("; ".join(sorted({failure_of(one) for one in error.worker_failures.values()}))) from error
    except (train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise StageError(failure_of(error)) from error
    return result.return_value or {}


@contextmanager
def _own_ctrl_c() -> Iterator[None]:
    """Have Ctrl-C do afterwards what it did before: Ray Train puts its own in place, and leaves it there."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _read(blocks: list[pa.Table], config: ReaderConfig, resources: TrainResources) -> ray.data.Dataset:
    """Stage 2, for one worker."""
    return ray.data.from_blocks(blocks).map_batches(
        ReadWorker,
        fn_constructor_args=(config,),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=resources.readers),
        num_cpus=resources.reader_cpus,
    )


def _trainer(config: WorkerConfig, datasets: list[Any], resources: TrainResources, run_id: str) -> TorchTrainer:
    """Stages 3 and 4. Each worker has a plan of its own, so nothing is split, and order is what makes runs repeat."""
    recipe = config.card.recipe
    need = {"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})}
    return TorchTrainer(
        train_worker,
        train_loop_config={"worker_config": config},
        datasets={f"examples-{rank}": part for rank, part in enumerate(datasets)},
        dataset_config=train.DataConfig(datasets_to_split=[], execution_options=ExecutionOptions(preserve_order=True)),
        scaling_config=train.ScalingConfig(
            num_workers=resources.workers, use_gpu=bool(resources.gpus), resources_per_worker=need
        ),
        run_config=train.RunConfig(
            name=run_id,
            storage_path=str(Path(config.folder) / CHECKPOINTS),
            checkpoint_config=train.CheckpointConfig(num_to_keep=recipe.keep_checkpoints),
            failure_config=train.FailureConfig(max_failures=MAX_RETRIES),
        ),
    )
