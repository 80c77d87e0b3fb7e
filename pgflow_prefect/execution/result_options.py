"""Reads what code and settings say of results: the storage and the serializer, with Prefect's names."""

from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias, Union
from urllib.parse import unquote, urlsplit

import fsspec
from prefect.blocks.core import Block
from prefect.filesystems import LocalFileSystem, RemoteFileSystem, WritableFileSystem
from prefect.serializers import Serializer
from pydantic import ValidationError

from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.codecs import JSON_CODECS, Codec, ObjectCodec
from pgflow_prefect.handlers.stored import ResultOptions
from pgflow_prefect.settings import Settings
from pgflow_prefect.wording import suggest

ResultStorage: TypeAlias = WritableFileSystem | str | Path
"""Prefect's `result_storage`: a block, the name of a block such as `s3-bucket/results`, a path, or a URL of fsspec."""

ResultSerializer: TypeAlias = Union["Serializer[Any]", str]
"""Prefect's `result_serializer`: a serializer, or the name of one such as `pickle`."""

_SERIALIZERS = ("json", "pickle", "compressed/json", "compressed/pickle")

_FORMS = (
    "give a block, the name of one such as 's3-bucket/results', a URL such as 's3://bucket/results', or a pathlib.Path"
)


def make_result_options(storage: object, serializer: object) -> ResultOptions:
    """Return the options that `result_storage=` and `result_serializer=` name; None names none.

    Raises:
        UsageError: one of them is none.
    """
    return ResultOptions(_parse_storage(storage), _parse_serializer(serializer))


def read_result_options(settings: Settings) -> ResultOptions:
    """Return the options that a worker's settings name.

    Raises:
        UsageError: there is no such storage.
    """
    try:
        return make_result_options(settings.result_storage, settings.result_serializer)
    except UsageError as error:
        raise UsageError(f"PGFLOW_RESULT_STORAGE: {error}") from None


def is_storage(block: object) -> bool:
    """Tell whether a block can store results."""
    return isinstance(block, Block) and all(
        callable(getattr(block, name, None)) for name in ("read_path", "write_path")
    )


def _parse_storage(given: object) -> object | None:
    if given is None or is_storage(given):
        return given
    if isinstance(given, Path):
        return LocalFileSystem(basepath=str(given))
    if isinstance(given, str) and "://" in given:
        return _parse_url(given)
    if isinstance(given, str) and _is_name(given):
        return given
    if isinstance(given, Block):
        raise UsageError(
            f"result_storage is a block of the type {type(given).__name__}, which has no read_path and write_path: "
            f"{_FORMS}"
        )
    raise UsageError(f"result_storage={given!r} is no storage: {_FORMS}")


def _is_name(text: str) -> bool:
    """Tell whether this is the name of a block: its type's slug and its own name."""
    kind, _, name = text.partition("/")
    return bool(kind) and bool(name) and "/" not in name and not text.startswith((".", "~"))


def _parse_url(url: str) -> WritableFileSystem:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UsageError(f"result_storage is no URL: {error}") from None
    if parts.username is not None or parts.password is not None or parts.query:
        # Not the URL itself: it may have a password.
        raise UsageError(
            f"result_storage is a URL of {parts.scheme}:// with credentials or parameters, which rows and logs would "
            "show: put them into a block of Prefect and name the block"
        )
    if parts.scheme == "file":
        if parts.netloc not in {"", "localhost"} or not parts.path:
            raise UsageError(f"result_storage={url!r} names no path of this machine: write file:///path/of/a/folder")
        return LocalFileSystem(basepath=unquote(parts.path))
    _check_scheme(url, parts.scheme)
    try:
        return RemoteFileSystem(basepath=url)
    except ValidationError as error:
        raise UsageError(f"result_storage={url!r} is no storage: {error.errors()[0]['msg']}") from None


def _check_scheme(url: str, scheme: str) -> None:
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:  # fsspec says which package to install
        raise UsageError(f"result_storage={url!r} needs a package that is not installed here: {error}") from None
    except ValueError:
        known = [*fsspec.available_protocols()]
        raise UsageError(
            f"result_storage={url!r}: fsspec knows no {scheme}://{suggest(scheme, known)}: {_FORMS}"
        ) from None


def _parse_serializer(given: object) -> Codec | None:
    if given is None:
        return None
    if isinstance(given, Serializer):
        return ObjectCodec(given)
    if isinstance(given, str) and given in JSON_CODECS:
        return JSON_CODECS[given]
    with suppress(ValidationError, KeyError):
        if isinstance(given, str) and not given.startswith("_"):  # Prefect has one for unknown names, of this kind
            return ObjectCodec(Serializer(type=given))
    hint = suggest(given, _SERIALIZERS) if isinstance(given, str) else ""
    raise UsageError(
        f"result_serializer={given!r} is no serializer of Prefect{hint}: there is "
        f"{', '.join(map(repr, _SERIALIZERS))}, or give a Serializer"
    )
