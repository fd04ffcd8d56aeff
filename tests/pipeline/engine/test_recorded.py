"""A step that is recorded: on any device it does what it does as it is, and one without room says so."""

import pytest
import torch

from longvlm.pipeline.engine.recorded import GraphMemory, RecordedStep

SIDE = 64


def powers(device):
    """A step that multiplies a matrix by another, in place, and the matrix."""
    matrix = torch.eye(SIDE, device=device)
    factor = 2 * torch.eye(SIDE, device=device)

    def step():
        matrix.copy_(matrix @ factor)

    return step, matrix


def memory_of(device):
    return GraphMemory(device) if device.type == "cuda" else None


def test_every_run_is_one_step(device):
    step, matrix = powers(device)
    recorded = RecordedStep(step, memory_of(device))
    for runs in range(1, 6):
        recorded()
        assert matrix.trace().item() == SIDE * 2**runs


def test_recordings_come_and_go_in_the_same_memory(device):
    memory = memory_of(device)
    for _ in range(3):
        step, matrix = powers(device)
        recorded = RecordedStep(step, memory)
        for _ in range(4):
            recorded()
        assert matrix.trace().item() == SIDE * 2**4


def test_a_step_without_room_says_so_and_later_ones_run(device):
    if device.type == "cpu":
        pytest.skip("a CPU records nothing")
    memory = memory_of(device)
    room = []

    def step():
        room.append(torch.empty(2**50 if room else 1, dtype=torch.uint8, device=device))

    recorded = RecordedStep(step, memory)
    recorded()
    with pytest.raises(torch.OutOfMemoryError):
        recorded()
    step, matrix = powers(device)
    again = RecordedStep(step, memory)
    for _ in range(3):
        again()
    assert matrix.trace().item() == SIDE * 2**3
