"""Takes secrets out of values that other programs have written, before they reach a file or a terminal."""

import re

from pydantic import JsonValue

HIDDEN = "***"

_DEEPEST = 200
_LONGEST = 8_000
"""Characters of a text that are looked at. Nothing after them is ever shown."""

_WORDS = (
    r"pass(?:word|wd|phrase)|(?<![a-z])pwd|secret|token(?!s(?![a-z])|iz)|api[_-]?key|access[_-]?key|private[_-]?key|"
    r"account[_-]?key|credential|authorization|auth[_-]?string|(?<![a-z])conn(?:ection)?[_-]?(?:str(?:ing)?|uri|url)|"
    r"(?<![a-z])dsn(?![a-z])"
)
_SECRET_NAME = re.compile(rf"{_WORDS}|(?<![a-z])pass$", re.IGNORECASE)
_NAMES_SECRETS = re.compile(r"_(?:ids?|names?|files?|paths?|types?|fields?|expiry|required|scopes?)$", re.IGNORECASE)
"""The ends of names of what names a secret and does not have it."""

_NOT_HIDDEN = r"(?!\{\{|\$[\w({]|\*\*\*|None\b|True\b|False\b)"
_VALUE = (
    rf"{_NOT_HIDDEN}(?:\"[^\"]{{1,2000}}\"|'[^']{{1,2000}}'|(?:bearer|basic)\s+[^\s,;&\"']+|"
    r"[^\s,;&\"')\]}\\]{1,2000})"
)
_NAME = rf"[\w.-]{{0,60}}?(?:{_WORDS}|(?<![a-z])pass(?![a-z]))[\w.-]{{0,40}}"
_NAMED = re.compile(rf"{_WORDS}|pass", re.IGNORECASE)
_PATTERNS = [
    # postgresql://user:password@host; a port before a path is none
    (
        re.compile(
            r"([a-z][a-z0-9+.-]{0,40}://[^\s/:@'\"]{0,200}):(?!\d{1,5}/)[^\s'\",;]{1,400}@",
            re.IGNORECASE,
        ),
        rf"\1:{HIDDEN}@",
    ),
    # https://host/path?sig=…
    (re.compile(rf"([?&](?:sig|code|key|auth|sas)=){_NOT_HIDDEN}[^\s&'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(hooks\.slack\.com/(?:services|workflows)/)[\w/-]+"), rf"\1{HIDDEN}"),
    # PASSWORD=…, "token": "…", secret => …, and JSON in JSON
    (re.compile(rf"({_NAME}[\"']?\s{{0,5}}(?:=>|:=|=|:(?!//))\s{{0,5}}){_VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (
        re.compile(rf"({_NAME}\\{{1,3}}\"\s{{0,5}}:\s{{0,5}})\\{{1,3}}\"[^\"\\]{{1,2000}}\\{{1,3}}\"", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
    # <password>…</password>
    (re.compile(rf"(<{_NAME}>)[^<>]{{1,2000}}(?=</)", re.IGNORECASE), rf"\1{HIDDEN}"),
    # --password …
    (re.compile(rf"(--?{_NAME}\s{{1,5}})(?!-){_VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),
    # PASSWORD '…' and IDENTIFIED BY '…' of SQL
    (re.compile(r"\b((?:password|identified\s{1,5}by)\s{1,5})'[^']{1,2000}'", re.IGNORECASE), rf"\1'{HIDDEN}'"),
    # mysql -p…, sshpass -p …
    (re.compile(rf"\b((?:mysql\w*|mariadb\w*)\b[^\n|;&]{{0,200}}?\s-p){_NOT_HIDDEN}[^\s'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(rf"\b(sshpass\s{{1,5}}-p\s{{0,5}}){_NOT_HIDDEN}\S+"), rf"\1{HIDDEN}"),
    # curl --user name:password
    (re.compile(rf"((?:\s|^)(?:-u|--user)\s{{1,5}}[\"']?[^\s:\"']{{1,200}}:){_NOT_HIDDEN}[^\s\"']+"), rf"\1{HIDDEN}"),
    (re.compile(rf"\b(bearer|basic)\s{{1,5}}{_NOT_HIDDEN}[a-z0-9._~+/=-]{{12,}}", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (
        re.compile(
            r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
            r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?"
            r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{15,}"
            r"|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bsk-[\w-]{20,}|\bAIza[\w-]{30,}|\bdapi[0-9a-f]{30,}"
            r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[\s\S]{0,20000}?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|$)"
        ),
        HIDDEN,
    ),
]


def is_secret_name(name: str) -> bool:
    """Return whether a value of this name may be a secret: `db_password`, but not `secret_name`."""
    return _SECRET_NAME.search(name[-200:]) is not None and _NAMES_SECRETS.search(name[-200:]) is None


def redact_text(text: str) -> str:
    """Return a text with `***` for each password, token and key in it: in addresses, assignments and options.

    Templates, such as `{{ var.value.token }}`, and variables, such as `$TOKEN`, stay: they have no secret.
    """
    text = text[:_LONGEST]
    has_name = _NAMED.search(text) is not None
    for pattern, instead in _PATTERNS:
        if has_name or _NAME not in pattern.pattern:  # a name before a secret is what takes time to look for
            text = pattern.sub(instead, text)
    return text


def redact(name: str, value: JsonValue, depth: int = 0) -> JsonValue:
    """Return a value with `***` for what its names say is secret, and for each secret in its texts.

    Args:
        name: the name of the value, which may say that it is secret; empty for none.
        value: JSON.
        depth: of the value in the whole.
    """
    if depth > _DEEPEST:
        return HIDDEN
    if name and is_secret_name(name):
        return _hide(value)
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, list):
        return [
            _hide(each) if place and _is_option(value[place - 1]) else redact("", each, depth + 1)
            for place, each in enumerate(value)
        ]
    if isinstance(value, dict):
        named = next((said for key in ("name", "key") if isinstance(said := value.get(key), str)), "")
        return {key: redact(named if key == "value" and named else key, each, depth + 1) for key, each in value.items()}
    return value


def _is_option(value: JsonValue) -> bool:
    return isinstance(value, str) and value.startswith("-") and "=" not in value and is_secret_name(value)


def _hide(value: JsonValue) -> JsonValue:
    """Return `***`, but for what can't be a secret: nothing, a switch, or a template as a whole."""
    if value is None or isinstance(value, bool) or value in ("", [], {}):
        return value
    if isinstance(value, str) and re.fullmatch(r"\s*(?:\{\{[^{}]*\}\}|\$\w+|\$\{\w+\})\s*", value):
        return value
    return HIDDEN
