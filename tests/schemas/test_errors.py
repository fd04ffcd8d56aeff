import pickle

import pytest

from longvlm.schemas.errors import ErrorCode, InputError, PipelineError, TerminalError, TransientError


@pytest.mark.parametrize("family", [TransientError, TerminalError])
def test_errors_cross_processes_whole(family):
    error = family(ErrorCode.DEADLINE, "decoding took longer than 300 s.")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is family
    assert (again.code, again.message, str(again)) == (ErrorCode.DEADLINE, error.message, error.message)


def test_input_errors_are_no_rows():
    assert not issubclass(InputError, PipelineError)
    assert str(pickle.loads(pickle.dumps(InputError("no such store.")))) == "no such store."
