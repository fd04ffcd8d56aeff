import pytest

from longvlm.pipeline.refusals import code_of, told_by
from longvlm.schemas.errors import ErrorCode


def made(name, module, base=Exception, **known):
    """An exception as a cloud's library has it, which need not be installed here."""
    error = type(name, (base,), {"__module__": module})("as it says.")
    for key, value in known.items():
        setattr(error, key, value)
    return error


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (made("HttpError", "gcsfs.retry", code=401), "credentials"),
        (made("HttpError", "gcsfs.retry", code="429"), "network"),
        (OSError("Forbidden: b/o/a.mp4\nno access"), "forbidden"),  # of gcsfs
        (made("RefreshError", "google.auth.exceptions"), "credentials"),
        (made("TransportError", "google.auth.exceptions"), "network"),
        (made("HttpResponseError", "azure.core.exceptions", status_code=403, error_code="AuthenticationFailed"),
         "credentials"),
        (made("HttpResponseError", "azure.core.exceptions", status_code=403, error_code="AuthorizationFailure"),
         "forbidden"),
        (made("ClientAuthenticationError", "azure.core.exceptions", status_code=401), "credentials"),
        (made("ResourceNotFoundError", "azure.core.exceptions", status_code=404), "not_found"),
        (made("ServiceRequestError", "azure.core.exceptions"), "network"),
        (FileNotFoundError("a"), "not_found"),
        (caused(FileNotFoundError("a"), TimeoutError("slow")), "network"),
        (caused(FileNotFoundError("a"), made("ClientConnectorError", "aiohttp", OSError)), "network"),
        (caused(made("ClientConnectorError", "aiohttp", OSError), PermissionError("no connections")), "network"),
        (made("InvalidURL", "aiohttp", ValueError), "not_found"),
        (PermissionError("no"), "forbidden"),
        (IsADirectoryError("a"), "not_a_video"),
        (RuntimeError("whatever"), "network"),
    ],
)  # fmt: skip
def test_the_code_of_an_exception(error, code):
    assert code_of(error) == ErrorCode(code)


def test_an_exception_is_told_by_what_is_beneath_it():
    assert told_by(caused(FileNotFoundError("https://host/a"), TimeoutError("too slow."))) == "TimeoutError: too slow"
    assert told_by(PermissionError("no.")) == "no"
    answered = made("ClientResponseError", "aiohttp", status=500, message="Oh", request_info="https://host/a?sig=1")
    assert told_by(caused(FileNotFoundError("a"), answered)) == "the server answered 500 Oh"
    denied = made("ClientError", "botocore.exceptions", response={"Error": {"Code": "ExpiredToken", "Message": "Old."}})
    assert told_by(caused(PermissionError("Old."), denied)) == "ExpiredToken: Old"
