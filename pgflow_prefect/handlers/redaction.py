"""Takes secrets out of values that are about to be shown: by the names of members, by annotations, and out of URLs."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel, JsonValue, Secret, SecretBytes, SecretStr

MASK = "********"
"""What stands in place of a secret."""

_SECRET_WORDS = re.compile(
    "passw|passphrase|secret|token|apikey|accesskey|privatekey|signingkey|credential|authorization|cookie|dsn"
    "|connectionstring|webhookurl|^pwd$|^pin$|^cvv$|^cvc$"
)
_NOT_IN_WORDS = re.compile(r"[^a-z0-9]+")
_LOGIN = re.compile(r"(?<=://)[^/?#\s@]*@")
"""User and password of a URL."""

_SHORTEST = 4
"""Characters that a secret has at least where its copies within other texts are masked."""


def is_secret_name(name: str) -> bool:
    """Tell whether a member of this name holds a secret, as `api_key` and `clientSecret` do."""
    return _SECRET_WORDS.search(_NOT_IN_WORDS.sub("", name.lower())) is not None


def find_secrets(value: object) -> Iterator[str]:
    """Yield the secrets in a value: those of pydantic's secret types, and those of members with a secret's name.

    Args:
        value: a JSON value, a model, a dataclass, or containers of these.
    """
    if isinstance(value, SecretStr | SecretBytes | Secret):
        yield from _list_texts(value.get_secret_value())
    elif (members := _list_members(value)) is not None:
        for name, member in members:
            if isinstance(name, str) and is_secret_name(name):
                # Not its numbers: `max_tokens` may be the same number as an id.
                yield from (text for text in _list_texts(member) if not text.isdigit())
            else:
                yield from find_secrets(member)


def redact(value: JsonValue, secrets: Iterable[str] = ()) -> JsonValue:
    """Return a JSON value with `MASK` in place of each secret.

    Args:
        value: the value.
        secrets: texts that are secret wherever they stand, from `find_secrets`.
    """
    return _redact(value, frozenset(secrets))


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """Return a text without these secrets, and without the logins of its URLs."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST or secret == text:
            text = text.replace(secret, MASK)
    return _LOGIN.sub(f"{MASK}@", text)


def _redact(value: JsonValue, secrets: frozenset[str]) -> JsonValue:
    if isinstance(value, dict):
        return {
            name: MASK if is_secret_name(name) and member is not None else _redact(member, secrets)
            for name, member in value.items()
        }
    if isinstance(value, list):
        return [_redact(each, secrets) for each in value]
    if isinstance(value, str):
        return MASK if value in secrets else _LOGIN.sub(f"{MASK}@", value)
    return MASK if not isinstance(value, bool) and value is not None and str(value) in secrets else value


def _list_members(value: object) -> Iterable[tuple[object, object]] | None:
    """Return what a value consists of, each with its name or without one; None for a value without members."""
    if isinstance(value, BaseModel):
        return [*vars(value).items(), *(value.__pydantic_extra__ or {}).items()]
    if is_dataclass(value) and not isinstance(value, type):
        return [(each.name, getattr(value, each.name, None)) for each in fields(value)]
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, Sequence | Set) and not isinstance(value, str | bytes | bytearray):
        return [(None, each) for each in value]
    return None


def _list_texts(secret: Any) -> Iterator[str]:  # noqa: ANN401  whatever a user keeps secret
    """Yield the texts of a secret; of an object, those of its members."""
    if (members := _list_members(secret)) is not None:
        for _, member in members:
            yield from _list_texts(member)
    elif isinstance(secret, bytes | bytearray):
        yield bytes(secret).decode("utf-8", "replace")
    elif isinstance(secret, SecretStr | SecretBytes | Secret):
        yield from _list_texts(secret.get_secret_value())
    elif secret is not None and not isinstance(secret, bool) and str(secret):
        yield str(secret)
