from jobs.demo import ANSWERS_SQL, run_demo
from pipeline.store import catalog
from pipeline.store.ledger import Store


def test_the_demo_indexes_asks_and_says_that_its_model_is_untrained(tmp_path, capsys):
    run_demo(tmp_path)
    shown = capsys.readouterr().out
    assert "UNTRAINED" in shown
    assert str(tmp_path / "store") in shown
    answers = catalog.query(catalog.connect(Store.open(str(tmp_path / "store")).pin()), ANSWERS_SQL).to_pylist()
    assert len(answers) == 18
    assert all(row["answer"] in shown for row in answers)
