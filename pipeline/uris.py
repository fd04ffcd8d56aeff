"""Addresses of files: which are local, the one spelling of each, the fsspec filesystem behind it, and no secrets in it.

An address is a path of this machine, the same after `file://`, or `protocol://...` of a bucket or a web server. What
tells them apart is `://` alone, which no path needs: `a:b.mp4`, `C:/a.mp4` and `file:a.mp4` are names of local files.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longvlm.pipeline.refusals import code_of, told_by
from longvlm.schemas.errors import ErrorCode, InputError

_CREDENTIALS = re.compile(r"(?<=://)[^/]*@|\?.*", re.DOTALL)
_PROTOCOLS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https", "memory"})
_SECRET = re.compile(
    r"[^/]+://[^/@]*:[^/]*@"  # user:password@host; without a colon it is a container@account of Azure
    r"|https?://.*[?&](X-Amz-\w+|X-Goog-\w+|Signature|AWSAccessKeyId|GoogleAccessId|sig|token|access_token)=",
    re.IGNORECASE | re.DOTALL,
)


class AddressError(InputError):
    """An address that nothing can be at, or that nobody may write down; others beside it may be good."""


def is_local(uri: str) -> bool:
    """Whether an address is a plain path or file://; those under any other name of fsspec's are not, and refused."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> str:
    """The absolute path that a local address means; a leading ~ is the user's home."""
    path = Path(uri.removeprefix("file://")).expanduser()
    return os.path.abspath(path)  # noqa: PTH100 - resolve() follows links, and a link is a name of its own


def locate(uri: str) -> tuple[Any, str]:
    """Resolve an address: its fsspec filesystem, and the path in it.

    Raises:
        AddressError: the protocol is none of those that are opened, or the address holds a secret.
        InputError: the library for the protocol is missing. Nobody is connected to.
    """
    from fsspec import filesystem, get_filesystem_class
    from fsspec.implementations.local import LocalFileSystem

    if is_local(uri):
        return LocalFileSystem(), local_path(uri)
    refuse_secrets(uri)
    protocol = uri.partition("://")[0]  # one, and no chain of them: "::" may stand in the name of an object
    if protocol not in _PROTOCOLS:  # fsspec knows many more, of which some connect when they are only looked up
        raise AddressError(
            f"cannot open {uri}: files are read from this machine, named by plain paths, and from s3://, gs://, az://, "
            "abfs://, http:// and https:// addresses."
        )
    try:
        kind = get_filesystem_class(protocol)
        return filesystem(protocol, **kind._get_kwargs_from_urls(uri)), kind._strip_protocol(uri)  # noqa: SLF001
    except ImportError as error:
        raise InputError(f"cannot open {uri}: {error}; install what its protocol needs.") from error
    except (ValueError, TypeError, AttributeError, OSError) as error:  # each kind says it in its own way
        raise AddressError(f"cannot open {uri}: {error}; check the address.") from error


def canonical_uri(fs: Any, path: str) -> str:
    """The canonical URI of a file: an absolute path for local files, else with the scheme."""
    uri = str(fs.unstrip_protocol(path))
    return uri.removeprefix("file://")


def refuse_secrets(uri: str) -> None:
    """Raise AddressError for an address with a password or a signature in it: it would stand in tables and in logs."""
    if _SECRET.match(uri):
        protocol = uri.partition("://")[0]
        raise AddressError(
            f"an address of {protocol}:// holds a password, a key or a signature; leave it out, and give credentials "
            "through the environment or fsspec's configuration."
        )


def without_secrets(uri: str) -> str:
    """An address as it may be written down, whatever it holds: without its user, and its query if that may be one."""
    return _CREDENTIALS.sub("...", uri) if _SECRET.match(uri) else uri


@contextmanager
def refusals_as_sentences(name: str, done: str = "read") -> Iterator[None]:
    """Turn what a filesystem raises into InputError, about what is called `name` and was to be `done`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # every cloud library has exceptions of its own
        code = code_of(error)
        if code == ErrorCode.NOT_FOUND:
            said = f"{name} does not exist; check the address."
        elif code == ErrorCode.NOT_A_VIDEO:
            said = f"{name} is a folder; name a file."
        elif code in (ErrorCode.FORBIDDEN, ErrorCode.CREDENTIALS):
            said = f"access to {name} is forbidden ({told_by(error)}); check its permissions or your credentials."
        else:
            said = f"{name} cannot be {done}: {told_by(error)}; check the address, the network and your credentials."
        raise InputError(said) from error
