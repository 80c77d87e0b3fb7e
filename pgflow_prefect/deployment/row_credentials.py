"""Lists the credentials that rows name, their destinations, and the settings that they need."""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pgflow_prefect.bindings import AnyBinding, HttpEndpoint, Queue, parse_binding
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import NotRetriableError, UsageError
from pgflow_prefect.handlers.queue import find_queue_origin
from pgflow_prefect.handlers.row_policy import InternalAddressError, RowPolicy, add_prefix, find_name_problem
from pgflow_prefect.models import StepBinding
from pgflow_prefect.origins import Origin, find_origin


@dataclass(frozen=True)
class RowCredential:
    """The credential of a row that names an endpoint or a queue.

    Attributes:
        workflow_slug: the workflow.
        step_slug: the step.
        origin: the destination of a request or message; None for a queue in the same database.
        variable: the environment variable that the row names.
        block: the Prefect Secret block that the row names.
    """

    workflow_slug: str
    step_slug: str
    origin: Origin | None
    variable: str | None
    block: str | None

    @property
    def name(self) -> str | None:
        """The credential's allowed name for a row; None if there is no credential or no possible name."""
        named = self.variable or self.block
        return named and add_prefix(named, is_block=self.variable is None)


def find_row_problems(bindings: Mapping[str, AnyBinding], policy: RowPolicy | None) -> Iterator[str]:
    """Yield a sentence for each row whose credential may not go to the row's origin.

    Args:
        bindings: of rows, by the slugs of the steps.
        policy: of the process that executes the steps; without it, only the names are checked.
    """
    for slug, binding in bindings.items():
        variable, block = _find_names(binding)
        try:
            if problem := find_name_problem(variable, block):
                yield f"step {slug!r}: {problem}"
            elif policy is not None:
                policy.check_credential(variable, block, _find_origin(binding))
        except (NotRetriableError, UsageError, ValueError) as error:
            yield f"step {slug!r}: {error}"


async def list_row_credentials(store: Store) -> list[RowCredential]:
    """Return the credentials of the rows of all workflows, without rows that can't be read."""
    return [*_read(await store.list_network_bindings())]


def _read(rows: Iterable[tuple[str, StepBinding]]) -> Iterator[RowCredential]:
    for workflow_slug, row in rows:
        try:
            binding = parse_binding(row.kind, row.target, row.options)
            yield RowCredential(workflow_slug, row.step_slug, _find_origin(binding), *_find_names(binding))
        except (UsageError, ValueError):
            continue  # `validate` says why


async def rename_credentials(store: Store) -> list[RowCredential]:
    """Give each credential that a row names the prefix that it needs, and return the rows as they were.

    A row whose name can't belong to a variable or a block stays as it is.
    """
    renamed: list[RowCredential] = []
    for workflow_slug, row in await store.list_network_bindings():
        names = {key: row.options[key] for key in _OPTIONS if key in row.options}
        changed = {key: add_prefix(str(name), is_block=key.endswith("_block")) for key, name in names.items()}
        if changed == names or None in changed.values():
            continue
        await store.bind_step(workflow_slug, row.step_slug, row.kind, row.target, {**row.options, **changed})
        renamed += _read([(workflow_slug, row)])
    return renamed


_OPTIONS = ("token_env", "token_block", "login_env", "login_block")


async def advise(credentials: Iterable[RowCredential], policy: RowPolicy) -> list[str]:
    """Return the settings that these rows need, as lines for a shell on the machine that executes steps.

    Args:
        credentials: of the rows before a rename.
        policy: the current settings, which the lines keep.

    Returns:
        Lines for a shell; comments describe steps that a shell can't do.
    """
    lines: dict[str, None] = {}
    allowed = {str(origin) for origin in policy.allowed}
    ties = {f"{name}={origin}" for name, origins in policy.credentials.items() for origin in origins}
    known = len(allowed), len(ties)
    for each in credentials:
        if each.name is not None:
            lines |= dict.fromkeys(_copy(each))
            ties |= {f"{each.name}={each.origin}"} if each.origin else set()
        if each.origin is not None and await _is_internal(each.origin, policy):
            allowed.add(str(each.origin))
    if len(ties) > known[1]:
        lines[f"export PGFLOW_CREDENTIAL_ORIGINS={shlex.quote(','.join(sorted(ties)))}"] = None
    if len(allowed) > known[0]:
        lines[f"export PGFLOW_HTTP_ALLOW={shlex.quote(','.join(sorted(allowed)))}"] = None
    return [*lines]


def _copy(credential: RowCredential) -> Iterator[str]:
    former = credential.variable or credential.block
    if former == credential.name:
        return
    if credential.variable is not None:
        yield f'export {credential.name}="${former}"'
    else:
        yield f"# in Prefect's UI, under Blocks: save the Secret {former!r} once more as {credential.name!r}"


async def _is_internal(origin: Origin, policy: RowPolicy) -> bool:
    try:
        await policy.find_addresses(origin.host, origin.port)
    except InternalAddressError:
        return True
    except OSError:
        return False
    return False


def _find_names(binding: AnyBinding) -> tuple[str | None, str | None]:
    match binding:
        case HttpEndpoint():
            return binding.token_env, binding.token_block
        case Queue():
            return binding.login_env, binding.login_block
        case _:
            return None, None


def _find_origin(binding: AnyBinding) -> Origin | None:
    match binding:
        case HttpEndpoint():
            return find_origin(binding.url)
        case Queue():
            return find_queue_origin(binding.url)
        case _:
            return None
