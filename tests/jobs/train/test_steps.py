from longvlm.jobs.train.steps import StepsTaken
from longvlm.jobs.train.worker_config import LOSSES


def test_steps_are_the_lines_of_the_loss_curve_also_where_it_is_written_anew(tmp_path):
    taken = StepsTaken(tmp_path)
    assert taken.begun_s() is None
    (tmp_path / LOSSES).write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert taken.begun_s() == (tmp_path / LOSSES).stat().st_mtime
    assert taken.report() == {"train": {"done": 2}}
    with (tmp_path / LOSSES).open("a") as file:
        file.write('ep": 3}\n')
    assert taken.report() == {"train": {"done": 3}}
    (tmp_path / LOSSES).write_text('{"step": 1}\n')
    assert taken.report() == {"train": {"done": 1}}
