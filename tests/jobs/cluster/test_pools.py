"""Pools of workers on a cluster that grows, shrinks and is shared: real raylets, and stages that only wait."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.faults.world import Head
from support import ROOT

pytestmark = pytest.mark.alone

DRIVER = """
import json, os, sys, time
import pyarrow as pa
import ray
from longvlm.jobs.cluster.executor import Stage
from longvlm.jobs.cluster.ray_executor import RayExecutor

num_blocks, hurry = int(sys.argv[1]), sys.argv[2]

def operators():
    class Decode:
        def __call__(self, table):
            time.sleep(0 if os.path.exists(hurry) else 1.0)
            return table.append_column("node", pa.array([ray.get_runtime_context().get_node_id()]))

    class Encode:
        def __call__(self, table):
            return table

    return Decode, Encode

Decode, Encode = operators()
stages = [Stage(Decode, (), None, 1, 0.5, threads=2, most=num_blocks), Stage(Encode, (), None, 1, 0.5)]
executor = RayExecutor(os.environ["RAY_ADDRESS"])
print("ready", flush=True)
sys.stdin.readline()
for table in executor.run([pa.table({"n": [n]}) for n in range(num_blocks)], stages):
    for row in table.to_pylist():
        print(json.dumps(row), flush=True)
"""


@pytest.fixture(scope="module")
def head():
    with Head(1) as head:
        yield head


def start(head, num_blocks, hurry):
    """A run of its own process, to be begun: a block, which is a row, takes a second until `hurry` is there."""
    command = [sys.executable, "-c", DRIVER, str(num_blocks), str(hurry)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **head.env}, **pipes)


def begin(*runs):
    """Let runs begin at the same time, once all have joined the cluster; the rows of each as they land."""
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * len(runs)
    for run in runs:
        run.stdin.write("begin\n")
        run.stdin.flush()
    return [map(json.loads, run.stdout) for run in runs]


def test_a_node_that_joins_a_run_decodes_and_one_that_leaves_it_loses_nothing(head, tmp_path):
    hurry = tmp_path / "hurry"
    run = start(head, 150, hurry)
    (landed,) = begin(run)
    found = [next(landed)]
    node = head.add_node(1)
    while len({row["node"] for row in found}) == 1:
        found.append(next(landed))
    node.terminate()
    hurry.touch()
    found.extend(landed)
    assert run.wait() == 0
    assert sorted(row["n"] for row in found) == list(range(150))


def test_two_runs_that_begin_at_once_where_there_is_room_for_one_both_get_to_their_end(head, tmp_path):
    runs = [start(head, 4, tmp_path) for _ in range(2)]
    for run, landed in zip(runs, begin(*runs), strict=True):
        assert sorted(row["n"] for row in landed) == list(range(4))
        assert run.wait() == 0
