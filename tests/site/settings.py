"""The settings, from the class that reads them."""

import griffe

from pgflow_prefect.settings import Settings
from tests.site.api import load_package

_HEAD = """\
## Each setting

This part is made from the class that reads the settings.
"""


def write_settings() -> str:
    """Return a section for each setting: what it does, its type, its bounds and its default."""
    members = load_package()["settings.Settings"].members
    return "\n".join([_HEAD, *(_write_setting(name, members[name]) for name in Settings.model_fields)])


def _write_setting(name: str, member: griffe.Object | griffe.Alias) -> str:
    variable = f"{Settings.model_config['env_prefix']}{name.upper()}"
    text = member.docstring.value if member.docstring else ""
    return f"### `{variable}`\n\n{text}\n\n{_describe(name)}\n"


def _describe(name: str) -> str:
    """Return a line about the form of a setting's value, from its JSON schema."""
    schema = Settings.model_json_schema()
    field = schema["properties"][name]
    for option in (field, *field.get("anyOf", ())):
        if "$ref" in option:
            field = {**schema["$defs"][option["$ref"].rpartition("/")[2]], **field}
        elif option.get("type") not in {None, "null"}:
            field = {**option, **field}
    parts = [_TYPES[field["type"]] if field.get("format") != "password" else "text, kept secret"]
    parts += [", ".join(f"`{value}`" for value in field["enum"])] if "enum" in field else []
    parts += [f"{words} {field[bound]:g}" for bound, words in _BOUNDS.items() if bound in field]
    default = field.get("default")
    parts.append("not set by default" if default in {None, ""} else f"default `{default}`")
    return f"*{'; '.join(parts)}*".replace("text; `", "one of `")


_TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true` or `false`"}
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "minLength": "characters: at least",
}
