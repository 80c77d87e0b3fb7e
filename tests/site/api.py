"""The page of the Python API: what `pgflow_prefect` and `pgflow_prefect.consumer` are documented to have."""

from collections.abc import Iterator
from functools import cache

import griffe

from tests.site.places import ROOT

PUBLIC = ("pgflow_prefect", "pgflow_prefect.consumer")
"""The modules that users import from. Their `__all__` says what is public."""

_OF_PYDANTIC = ("model_config",)
"""What a class of pydantic's says to pydantic."""

_HEAD = """\
# Python API

All names can be imported from the module that heads their section. Everything else is internal, and changes without
notice. [Handlers](../handlers.md) and [Step kinds](../kinds.md) say how the names are used.
"""


def write_api() -> str:
    """Return the page: a directive of mkdocstrings for each public name."""
    package = load_package()
    parts = [_HEAD]
    for name in PUBLIC:
        parts.append(f"## {name}\n")
        parts += [_write_directive(package, name, each) for each in _list_names(package, name)]
    return "\n".join(parts)


def _write_directive(package: griffe.Module, module: str, name: str) -> str:
    """Return the directive for a name. A class shows what it inherits from a class that is not public itself."""
    made = package.modules_collection[module][name]
    inherited = ", inherited_members: true" if made.is_class and made.inherited_members else ""
    return f"::: {module}.{name}\n    options: {{heading_level: 3{inherited}}}\n"


def find_undocumented() -> list[str]:
    """Return the public names, and public members of public classes, that have no documentation."""
    package = load_package()
    found: list[str] = []
    for module in PUBLIC:
        for name in _list_names(package, module):
            made = package.modules_collection[module][name]
            found += _find_undocumented(made.final_target if made.is_alias else made)
    return found


@cache
def load_package() -> griffe.Module:
    """Return the package as its source says it is, with docstrings."""
    loader = griffe.GriffeLoader(search_paths=[ROOT], docstring_parser=griffe.Parser.google)
    package = loader.load("pgflow_prefect")
    loader.resolve_aliases()
    assert isinstance(package, griffe.Module)
    return package


def _list_names(package: griffe.Module, module: str) -> list[str]:
    return sorted(str(name) for name in package.modules_collection[module].exports or ())


def _find_undocumented(made: griffe.Object) -> Iterator[str]:
    if not made.has_docstring:
        yield made.path
    if not isinstance(made, griffe.Class):
        return
    described = set(_list_described(made))
    for name, member in (made.members | _list_inherited(made)).items():
        is_named = not member.is_alias and member.is_public and not name.startswith("__")
        if is_named and not member.has_docstring and name not in described:
            yield f"{made.path}.{name}"


def _list_inherited(made: griffe.Class) -> dict[str, griffe.Object | griffe.Alias]:
    return {name: member.final_target for name, member in made.inherited_members.items() if member.is_alias}


def _list_described(made: griffe.Class) -> Iterator[str]:
    """Yield the names that the docstrings of a class, of what it inherits from, and of its `__init__` describe."""
    yield from _OF_PYDANTIC
    for each in (made, *made.mro()):
        initialiser = each.members.get("__init__")
        for docstring in (each.docstring, initialiser.docstring if initialiser else None):
            for section in docstring.parsed if docstring else ():
                if isinstance(section, griffe.DocstringSectionAttributes | griffe.DocstringSectionParameters):
                    yield from (described.name for described in section.value)
