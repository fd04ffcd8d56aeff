"""What the exceptions of filesystems mean: each cloud's library has its own, and fsspec hides some behind others."""

from http import HTTPStatus
from typing import Any

from longvlm.schemas.errors import ErrorCode

# What a service answers that would refuse the same request for any other file, too: of S3, and of Azure.
_OF_THE_RUN = """
    RequestTimeTooSkewed RequestExpired InvalidAccessKeyId SignatureDoesNotMatch ExpiredToken ExpiredTokenException
    InvalidToken InvalidClientTokenId UnrecognizedClientException TokenRefreshRequired InvalidSecurity NotSignedUp
    MissingSecurityHeader MissingSecurityElement CredentialsNotSupported AuthorizationHeaderMalformed AccountProblem
    AuthenticationFailed InvalidAuthenticationInfo NoAuthenticationInformation AccountIsDisabled
"""
_REASONS_OF_THE_RUN = frozenset(_OF_THE_RUN.split())
# What is raised before anything is asked, where there are no keys or no way to renew them: of botocore, google.auth and
# azure.core, each of which has one more for every way to log in.
_NO_KEYS = ("Credential", "Token", "ProfileNotFound", "RefreshError", "ClientAuthenticationError")
_AUTHENTICATORS = ("botocore.", "aiobotocore.", "google.auth.", "azure.")
_FORBIDDEN = (401, 402, 403, 407, 451)
_GONE = (404, 410)


def code_of(error: BaseException) -> ErrorCode:
    """The code of a file that could not be read, by the exception of its filesystem.

    NOT_FOUND, FORBIDDEN, NOT_A_VIDEO of a folder; CREDENTIALS where any other file would have been refused likewise;
    NETWORK for all that may pass by itself, and for what is known to nobody.
    """
    error = _unwrapped(error)
    status = _status_of(error)
    if _reason_of(error) in _REASONS_OF_THE_RUN or _lacks_keys(error):
        return ErrorCode.CREDENTIALS
    if status == HTTPStatus.UNAUTHORIZED and not _is_of_a_website(error):
        return ErrorCode.CREDENTIALS
    if status in _GONE or isinstance(error, FileNotFoundError | NotADirectoryError) or _is_no_address(error):
        return ErrorCode.NOT_FOUND
    if status in _FORBIDDEN or isinstance(error, PermissionError) or str(error).startswith("Forbidden: "):  # of gcsfs
        return ErrorCode.FORBIDDEN
    if isinstance(error, IsADirectoryError):
        return ErrorCode.NOT_A_VIDEO
    return ErrorCode.NETWORK


def told_by(error: BaseException) -> str:
    """What an exception says, in the words of the server where there is one, and without the address."""
    error = _unwrapped(error)
    if _is_of_a_website(error):  # its own text holds the address that it was led to, maybe with a signature
        return f"the server answered {_status_of(error)} {getattr(error, 'message', '')}".rstrip()
    if reason := _reason_of(error):
        message = _s3_answer(error).get("Error", {}).get("Message") or ""
        return f"{reason}: {message}".rstrip(" .:")
    name = "" if isinstance(error, PermissionError) else f"{type(error).__name__}: "
    return f"{name}{error}".rstrip(" .:")


def _unwrapped(error: BaseException) -> BaseException:
    """What a library raised beneath the built-in exception that fsspec made of it: of http always FileNotFoundError."""
    while type(error).__module__ == "builtins" and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_of_a_website(error: BaseException) -> bool:
    """Whether a web server answered so (aiohttp.ClientResponseError), and not a bucket."""
    return hasattr(error, "request_info") and isinstance(getattr(error, "status", None), int)


def _status_of(error: BaseException) -> int | None:
    """The HTTP status, under the names that aiohttp, azure.core, gcsfs and botocore have for it."""
    found = [getattr(error, name, None) for name in ("status", "status_code", "code")]
    found.append(_s3_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode"))
    return next((int(text) for text in map(str, found) if text.isdecimal()), None)


def _reason_of(error: BaseException) -> str | None:
    """The service's own word for what happened."""
    reason = _s3_answer(error).get("Error", {}).get("Code") or getattr(error, "error_code", None)
    return str(reason) if reason else None


def _s3_answer(error: BaseException) -> dict[str, Any]:
    answer = getattr(error, "response", None)
    return answer if isinstance(answer, dict) else {}


def _lacks_keys(error: BaseException) -> bool:
    kinds = [f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__]
    return any(kind.startswith(_AUTHENTICATORS) and name in kind for kind in kinds for name in _NO_KEYS)


def _is_no_address(error: BaseException) -> bool:
    """Whether the address can be no file's: aiohttp.InvalidURL, botocore's ParamValidationError."""
    return bool({"InvalidURL", "ParamValidationError"} & {kind.__name__ for kind in type(error).__mro__})
