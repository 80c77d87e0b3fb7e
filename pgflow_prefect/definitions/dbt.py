"""Reads a manifest of dbt: its models, seeds, snapshots and tests as the steps of a workflow.

Source: https://schemas.getdbt.com/dbt/manifest/v12.json
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from pgflow_prefect.definitions.from_handlers import find_unstorable
from pgflow_prefect.definitions.graph import find_problems
from pgflow_prefect.definitions.model import Dep, WorkflowDefinition
from pgflow_prefect.definitions.origin import Ledger, LedgerLine, Origin, StepOrigin, list_names
from pgflow_prefect.definitions.redaction import redact_text
from pgflow_prefect.errors import InvalidDefinitionError, UsageError
from pgflow_prefect.wording import clean, write_code

VERSIONS = (7, 8, 9, 10, 11, 12, 20)
"""The versions of the manifest that are read: those of dbt 1.3 to 2.0. Version 20, of dbt Fusion, is the same as 12."""

MOST_BYTES = 256 * 1024 * 1024
MOST_NODES = 20_000
LONGEST_NAME = 250

_SCHEMA = re.compile(r"/dbt/manifest/v(\d{1,4})\.json$")
_COMMANDS = {"model": "run", "seed": "seed", "snapshot": "snapshot", "test": "test", "unit_test": "test"}
"""The command of dbt that executes a resource of a type."""


@dataclass(frozen=True)
class DbtNode:
    """A resource that dbt executes.

    Attributes:
        unique_id: dbt's own id.
        slug: of its step.
        kind: `model`, `seed`, `snapshot`, `test` or `unit_test`.
        name: as dbt's users know it.
        path: of the file that defines it.
        selector: what selects it, and nothing else, on dbt's command line.
        above: the ids of the resources that it needs.
        materialized: how a model is stored, if the manifest says so.
        severity: of a test: `warn` or `error`.
        tags: of dbt.
        description: a text for people.
    """

    unique_id: str
    slug: str
    kind: str
    name: str
    path: str
    selector: str
    above: tuple[str, ...]
    materialized: str
    severity: str
    tags: tuple[str, ...]
    description: str

    @property
    def command(self) -> list[str]:
        """The command line that executes it."""
        return ["dbt", _COMMANDS[self.kind], "--select", self.selector]


@dataclass(frozen=True)
class DbtProject:
    """A project of dbt.

    Attributes:
        name: of the project.
        dbt_version: the version of dbt that wrote the manifest.
        version: of the manifest.
        adapter: the kind of database.
        nodes: what is executed.
        inlined: ids of ephemeral models, which are part of the models below them.
        others: how many resources of each other type there are, by name.
        hooks: names of the operations at the start and the end of each command.
        definition: the workflow.
    """

    name: str
    dbt_version: str
    version: int
    adapter: str
    nodes: tuple[DbtNode, ...]
    inlined: tuple[str, ...]
    others: Mapping[str, int]
    hooks: tuple[str, ...]
    definition: WorkflowDefinition

    @property
    def origin(self) -> Origin:
        """What the file of stubs says of where it comes from."""
        lines = (f"Imported from the dbt project {clean(self.name)}.",)
        return Origin(steps={node.slug: _make_step(node) for node in self.nodes}, lines=lines)

    @property
    def ledger(self) -> Ledger:
        """What the project says, and what becomes of it here."""
        lines = [*_describe_project(self), *(line for node in self.nodes for line in _describe_node(node, self.name))]
        return Ledger(f"{self.name}: from dbt", tuple(lines))


def read_manifest(text: bytes, source: str) -> DbtProject:
    """Return the project of a manifest.

    Args:
        text: of the file `manifest.json`, which dbt writes into its folder `target`.
        source: what to call it in an error.

    Raises:
        UsageError: it is no manifest, or one of a version that is not read.
        InvalidDefinitionError: its resources make no workflow.
    """
    if len(text) > MOST_BYTES:
        raise UsageError(f"{source} has {len(text):,} bytes: more than {MOST_BYTES:,} are not read")
    try:
        manifest = json.loads(text)
    except RecursionError:
        raise UsageError(f"{source} has lists and objects that are too deep inside each other") from None
    except ValueError as error:
        raise UsageError(f"{source} is no JSON: {error}") from error
    metadata = _get(manifest, "metadata")
    found = _SCHEMA.search(_read_text(metadata, "dbt_schema_version"))
    nodes = manifest.get("nodes") if isinstance(manifest, dict) else None
    if found is None or not isinstance(nodes, dict):
        raise UsageError(f"{source} is no manifest of dbt: it is to be target/manifest.json of a project")
    version = int(found[1])
    if version not in VERSIONS:
        raise UsageError(
            f"{source} has version {version} of dbt's manifest: versions {', '.join(map(str, VERSIONS))} are read"
        )
    if len(nodes) > MOST_NODES:
        raise UsageError(f"{source} has {len(nodes):,} resources: more than {MOST_NODES:,} are not read")
    return _read_project(manifest, metadata, version, source)


def _read_project(manifest: Mapping[str, JsonValue], metadata: JsonValue, version: int, source: str) -> DbtProject:
    resources = {**_members(manifest, "nodes"), **_members(manifest, "unit_tests")}
    name = _read_text(metadata, "project_name") or _find_project(resources)
    if not name:
        raise UsageError(f"{source} does not say the name of the project")
    inlined = tuple(each for each, node in resources.items() if _is_inlined(node))
    executed = {
        each: node
        for each, node in sorted(resources.items())
        if _find_kind(node) in _COMMANDS and not _is_inlined(node)
    }
    slugs = _name_steps(executed, name)
    nodes = tuple(_read_node(each, node, slugs[each], name) for each, node in executed.items())
    definition = WorkflowDefinition(
        slug=name,
        steps=tuple(node.slug for node in nodes),
        deps=tuple(_list_deps(nodes, slugs, {each: _list_above(resources[each]) for each in inlined})),
        when_failed="continue",
    )
    too_long = [each for each in definition.steps if len(each) > LONGEST_NAME]
    problems = [
        *find_unstorable(name, definition.steps),
        *(f"the name {each[:40]!r}… is longer than {LONGEST_NAME} characters" for each in too_long),
    ]
    if problems := problems or find_problems(definition):
        raise InvalidDefinitionError(name, problems)
    kinds = Counter(kind for node in resources.values() if (kind := _find_kind(node)) not in _COMMANDS)
    others = {each: len(_members(manifest, each)) for each in ("sources", "exposures", "metrics", "semantic_models")}
    return DbtProject(
        name=name,
        dbt_version=_read_text(metadata, "dbt_version"),
        version=version,
        adapter=_read_text(metadata, "adapter_type"),
        nodes=nodes,
        inlined=tuple(sorted(_read_text(resources[each], "name") or each for each in inlined)),
        others={each: count for each, count in {**others, "analyses": kinds["analysis"]}.items() if count},
        hooks=tuple(sorted(_read_text(each, "name") for each in resources.values() if _find_kind(each) == "operation")),
        definition=definition,
    )


def _get(value: JsonValue, name: str) -> JsonValue:
    return value.get(name) if isinstance(value, dict) else None


def _members(value: Mapping[str, JsonValue], name: str) -> Mapping[str, JsonValue]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def _read_text(value: JsonValue, name: str) -> str:
    found = _get(value, name)
    return found if isinstance(found, str) else ""


def _read_list(value: JsonValue, name: str) -> list[str]:
    found = _get(value, name)
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []


def _find_kind(node: JsonValue) -> str:
    return _read_text(node, "resource_type")


def _find_project(resources: Mapping[str, JsonValue]) -> str:
    """Return the package that most resources are of: manifests of dbt before 1.5 do not name the project."""
    packages = Counter(_read_text(node, "package_name") for node in resources.values())
    return packages.most_common(1)[0][0] if packages else ""


def _is_inlined(node: JsonValue) -> bool:
    return _find_kind(node) == "model" and _read_text(_get(node, "config"), "materialized") == "ephemeral"


def _list_above(node: JsonValue) -> list[str]:
    return list(dict.fromkeys(_read_list(_get(node, "depends_on"), "nodes")))


def _name_steps(executed: Mapping[str, JsonValue], project: str) -> dict[str, str]:
    """Return the slug of each resource: its name, which begins with the package unless it is the project's own.

    Tests whose name is taken get the last part of their id, a hash, after it.
    """
    slugs: dict[str, str] = {}
    taken: set[str] = set()
    for unique_id, node in sorted(executed.items(), key=lambda each: (_find_kind(each[1]).endswith("test"), each[0])):
        name, package = _read_text(node, "name") or unique_id, _read_text(node, "package_name")
        slug = name if package in {"", project} else f"{package}.{name}"
        version = _get(node, "version")
        if isinstance(version, int | str) and not isinstance(version, bool):
            slug = f"{slug}.v{version}"
        if slug in taken:
            slug = f"{slug}_{unique_id.rpartition('.')[2]}" if _find_kind(node).endswith("test") else unique_id
        taken.add(slug)
        slugs[unique_id] = slug
    return slugs


def _read_node(unique_id: str, node: JsonValue, slug: str, project: str) -> DbtNode:
    name, config = _read_text(node, "name") or unique_id, _get(node, "config")
    fqn = _read_list(node, "fqn")
    is_plain = _read_text(node, "package_name") in {"", project} and slug == name
    return DbtNode(
        unique_id=unique_id,
        slug=slug,
        kind=_find_kind(node),
        name=name,
        path=_read_text(node, "original_file_path") or _read_text(node, "path"),
        selector=name if is_plain else ".".join(fqn) or name,
        above=tuple(_list_above(node)),
        materialized=_read_text(config, "materialized"),
        severity=_read_text(config, "severity").lower(),
        tags=tuple(sorted({*_read_list(node, "tags")})),
        description=_read_text(node, "description"),
    )


def _list_deps(nodes: tuple[DbtNode, ...], slugs: Mapping[str, str], inlined: Mapping[str, list[str]]) -> Iterator[Dep]:
    """Yield what waits for what. What an ephemeral model needs is needed by the models that it is a part of."""
    for node in nodes:
        found: dict[str, None] = {}
        seen: set[str] = set()
        waiting = list(reversed(node.above))
        while waiting:
            above = waiting.pop()
            if above in seen:
                continue
            seen.add(above)
            if above in slugs:
                found[slugs[above]] = None
            else:
                waiting += reversed(inlined.get(above, []))
        for slug in found:
            yield Dep(slug, node.slug)


def _make_step(node: DbtNode) -> StepOrigin:
    lines = [
        f"In dbt: {node.kind.replace('_', ' ')} {node.name} in {node.path}.",
        f"It runs: {shlex.join(node.command)}",
    ]
    if node.materialized and node.kind == "model":
        lines.append(f"materialized = {node.materialized!r}")
    if node.description:
        lines += ["", *redact_text(node.description[:1000]).splitlines()[:10]]
    return StepOrigin(lines=tuple(line[:1000] for line in lines))


def _describe_project(project: DbtProject) -> Iterator[LedgerLine]:
    made = ", ".join(filter(None, [f"dbt {project.dbt_version}" if project.dbt_version else "", project.adapter]))
    yield _of_all(
        "source", f"Version {project.version} of the manifest ({write_code(made or 'unknown')}).", is_done=True
    )
    yield _of_all(
        "failure",
        "dbt skips what is below a failed resource and goes on with the rest: when_failed='continue'.",
        is_done=True,
    )
    yield _of_all(
        "one command a step",
        "Each step starts dbt, which takes some seconds. To execute several resources in one step, write their "
        "handlers as one.",
    )
    yield _of_all(
        "threads", "dbt executes so many resources at a time. Here PGFLOW_CONCURRENCY says how many steps do."
    )
    if any(node.kind.endswith("test") for node in project.nodes):
        yield _of_all(
            "tests",
            "A test waits for what it tests, and nothing waits for it. `dbt build` also keeps the models below from "
            "running until it has passed. Add a dependency where that matters.",
        )
    if project.inlined:
        yield _of_all(
            "ephemeral", f"{list_names(project.inlined)}: part of the models below, and no step.", is_done=True
        )
    if project.hooks:
        yield _of_all(
            "hooks", f"{list_names(project.hooks)}: each command of dbt executes them, and so each step does."
        )
    if "sources" in project.others:
        yield _of_all(
            "sources", f"{project.others['sources']} sources are no steps. Their freshness is not checked here."
        )
    rest = [f"{count} {name.replace('_', ' ')}" for name, count in project.others.items() if name != "sources"]
    if rest:
        yield _of_all("others", f"{', '.join(rest)}: dbt does not execute them.", is_done=True)
    yield _of_all("schedule", "A manifest has none. Give it to `pgflow-prefect deploy`.")


def _describe_node(node: DbtNode, project: str) -> Iterator[LedgerLine]:
    command = f"workflow.bind({json.dumps(node.slug)}, Command({json.dumps(node.command)}))"
    yield LedgerLine(
        node.slug,
        node.kind.replace("_", " "),
        f"{write_code(shlex.join(node.command))}. Write that in the handler, or bind the step: {write_code(command)}.",
        is_done=False,
    )
    if node.tags:
        yield LedgerLine(
            node.slug, "tags", f"{list_names(node.tags)}: not kept. Steps have tags of Prefect.", is_done=False
        )
    if node.kind == "test" and node.severity == "warn":
        yield LedgerLine(node.slug, "severity", "warn: dbt succeeds although the test fails.", is_done=True)
    if node.materialized == "incremental":
        yield LedgerLine(node.slug, "incremental", "A full refresh needs --full-refresh.", is_done=False)
    if "." in node.slug and not node.slug.startswith(f"{project}."):
        package = node.slug.partition(".")[0]
        yield LedgerLine(
            node.slug, "package", f"{write_code(package)}: the beginning of the step's slug.", is_done=True
        )


def _of_all(topic: str, says: str, *, is_done: bool = False) -> LedgerLine:
    return LedgerLine(None, topic, says, is_done=is_done)
