import pyarrow as pa
import pytest

from longvlm.jobs.cluster.executor import IN_PROCESS, InProcess, Stage, StageError, run_inprocess
from longvlm.jobs.cluster.open_executor import open_executor
from longvlm.jobs.cluster.ray_executor import StartTurn


def operators():
    """Classes that Ray sends to its workers by value, having been made in a function."""

    class Spread:
        """Every row twice, a table a row."""

        def __call__(self, table):
            for row in range(len(table)):
                yield pa.concat_tables([table.slice(row, 1)] * 2)

    class Sized:
        """Says how many rows came together."""

        def __call__(self, table):
            return table.append_column("together", pa.array([len(table)] * len(table), pa.int64()))

    class Breaks:
        def __call__(self, table):
            if 3 in table["n"].to_pylist():
                raise OSError(28, "No space left on device")
            return table

    return Spread, Sized, Breaks


Spread, Sized, Breaks = operators()


def blocks(*sizes):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        pa.table({"n": pa.array(range(start, start + size), pa.int64())})
        for start, size in zip(starts, sizes, strict=True)
    ]


def stages(*operators, batch_size=None):
    return [Stage(operator, (), batch_size if operator is Sized else None, 1, 0.5) for operator in operators]


@pytest.fixture(params=["on_ray", "in process"])
def executor(request):
    if request.param == "in process":
        return open_executor(IN_PROCESS)
    request.getfixturevalue("ray_session")
    return open_executor("local")


def test_every_row_goes_through_all_stages_in_batches_of_the_size_asked_for(executor):
    found = list(executor.run(blocks(2, 3), stages(Spread, Sized, batch_size=4)))
    rows = pa.concat_tables(found).to_pylist()
    assert sorted(row["n"] for row in rows) == sorted([*range(5)] * 2)
    assert sorted(row["together"] for row in rows) == [2] * 2 + [4] * 8
    assert executor.resources()["CPU"] >= 1


def test_what_breaks_a_stage_is_told_in_a_line(executor):
    with pytest.raises(StageError) as failure:
        list(executor.run(blocks(2, 2), stages(Breaks)))
    assert str(failure.value) == "OSError: [Errno 28] No space left on device"
    executor.release()


@pytest.mark.usefixtures("on_ray")
def test_runs_take_turns_to_start():
    first, second = StartTurn(), StartTurn()
    assert next(first.looks())
    waiting = second.looks()
    assert not next(waiting)
    first.give_back()
    first.give_back()
    assert any(waiting)
    second.give_back()


def test_the_environment_may_say_that_there_is_no_ray(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", IN_PROCESS)
    assert isinstance(open_executor(None), InProcess)
    assert isinstance(open_executor(IN_PROCESS), InProcess)


def test_in_process_a_table_is_through_before_the_next_is_read_and_operators_are_made_once_and_closed():
    told = []

    class Telling:
        def __init__(self, name):
            self.name = name
            told.append(f"{name} made")

        def __call__(self, table):
            told.append(f"{self.name} {table['n'].to_pylist()}")
            return table

        def close(self):
            told.append(f"{self.name} closed")

    run = run_inprocess(blocks(1, 1), [Stage(Telling, (name,), None, 1, 1.0) for name in "ab"])
    next(run)
    assert told == ["a made", "b made", "a [0]", "b [0]"]
    run.close()
    assert told[4:] == ["b closed", "a closed"]


@pytest.mark.parametrize("num_rows", [1, 3, 5, 100])
def test_in_process_batches_keep_the_order_and_lose_nothing(num_rows):
    found = list(run_inprocess(blocks(4, 0, 3, 5), stages(Sized, batch_size=num_rows)))
    assert pa.concat_tables(found)["n"].to_pylist() == list(range(12))
    assert [len(table) for table in found[:-1]] == [num_rows] * (len(found) - 1)
    assert {size for table in found for size in table["together"].to_pylist()} == {len(table) for table in found}
