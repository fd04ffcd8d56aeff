"""Weights spread over workers (FSDP): each holds a part, and gathers a layer whole only while it computes it."""

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pipeline.language.stages import Trainee


def spread(trainee: Trainee) -> None:
    """Spread what a trainee holds over all workers of the process group, a unit a layer of the language model.

    Every worker has to come with the same weights, and to take every step from then on.
    """
    mesh = init_device_mesh(trainee.model.device.type, (dist.get_world_size(),))
    for layer in trainee.llm.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(trainee, mesh=mesh)
