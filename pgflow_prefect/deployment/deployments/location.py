"""Describes where a worker on another machine finds the code: a git repository, a directory, or this machine."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pgflow_prefect.errors import UsageError

Steps = list[dict[str, Any]]

_SET_DIRECTORY = "prefect.deployments.steps.set_working_directory"
_CLONE = "prefect.deployments.steps.git_clone"
_CLONE_ID = "pgflow-clone"
_SAID = {"id": "pgflow-directory"}  # marks a directory from --directory, as opposed to the one of an earlier `deploy`

_SCHEMES = ("https", "http", "ssh", "git", "file")
_SCP = re.compile(r"(?P<user>[\w.-]+)@(?P<host>[\w.-]+):(?P<path>[^@]+)(?:@(?P<ref>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BLOCK = re.compile(r"(?P<type>[a-z0-9][a-z0-9-]*)/(?P<name>[a-z0-9][a-z0-9-]*)")


@dataclass(frozen=True)
class GitSource:
    """A git repository that Prefect's workers clone for each flow run.

    Attributes:
        url: without any secret.
        ref: branch, tag or full commit; by default, the default branch.
        credentials: type and name of the Prefect block that has them.
    """

    url: str
    ref: str | None = None
    credentials: tuple[str, str] | None = None

    def make_step(self) -> dict[str, Any]:
        """Return the pull step that clones it."""
        inputs: dict[str, Any] = {"id": _CLONE_ID, "repository": self.url}
        if self.ref is not None:
            inputs["commit_sha" if _COMMIT.fullmatch(self.ref) else "branch"] = self.ref
        if self.credentials is not None:
            kind, name = self.credentials
            # git_clone takes the text of a Secret block as its token. It asks blocks of other types for their token.
            inputs["access_token" if kind == "secret" else "credentials"] = f"{{{{ prefect.blocks.{kind}.{name} }}}}"
        return {_CLONE: inputs}


@dataclass(frozen=True)
class Location:
    """The user's location of the code: a repository, a directory of it, or a directory of a machine or image."""

    source: GitSource | None = None
    directory: str | None = None

    def make_steps(self, here: Path) -> Steps:
        """Return the pull steps; a relative directory outside of a repository is beneath `here`."""
        if self.source is None:
            directory = str(here / (self.directory or "."))
            return [{_SET_DIRECTORY: {**_SAID, "directory": directory}}]
        steps = [self.source.make_step()]
        if self.directory is not None:
            within = f"{{{{ {_CLONE_ID}.directory }}}}/{self.directory}"
            steps.append({_SET_DIRECTORY: {**_SAID, "directory": within}})
        return steps


def parse_location(source: str | None, credentials: str | None, directory: str | None) -> Location | None:
    """Return the location of the code; None if the user gave none.

    Args:
        source: the URL of a git repository, `git+https://…` or plain, with `@ref` for a branch, tag or commit.
        credentials: the Prefect block for cloning it, `type/name`.
        directory: of that repository; without a repository, of the other machine or the image.

    Raises:
        UsageError: one of them can't be used, or contains a secret.
    """
    if source is None and credentials is not None:
        raise UsageError("--source-credentials goes with --source")
    if source is None:
        return None if directory is None else Location(directory=directory)
    if directory is not None and Path(directory).is_absolute():
        raise UsageError(
            f"--directory {directory} must be a directory of the repository of --source: name it relative to its root"
        )
    url, ref = _split_url(source.removeprefix("git+"))
    return Location(GitSource(url, ref, (credentials and _parse_block(credentials)) or None), directory)


def make_default_steps(here: Path) -> Steps:
    """Return the pull steps for code in the directory where `deploy` is called."""
    # Without a pull step, a worker copies its own working directory for every flow run.
    return [{_SET_DIRECTORY: {"directory": str(here)}}]


def is_said(steps: Steps | None) -> bool:
    """Tell whether a user set the location, by an option or in Prefect, and not `make_default_steps`."""
    if not steps:
        return False
    first = steps[0].get(_SET_DIRECTORY) or {}
    return len(steps) > 1 or {*first} != {"directory"}


def describe_steps(steps: Steps | None) -> str | None:
    """Return the location in a few words, without secrets that a user may have put into a URL."""
    words = []
    for step in steps or []:
        for name, given in step.items():
            inputs = given or {}
            ref = inputs.get("branch") or inputs.get("commit_sha")
            place = _redact(inputs.get("repository")) or inputs.get("directory") or name.rpartition(".")[2]
            words.append(f"{place}@{ref}" if ref else str(place))
    return ", then ".join(words) or None


def _redact(repository: str | None) -> str | None:
    """Return a repository's URL without parts that may be a secret."""
    if repository is None or _SCP.fullmatch(repository):
        return repository
    try:
        parts = urlsplit(repository)
    except ValueError:
        return "a repository"
    if not parts.netloc:
        return repository.rpartition("@")[2]
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _split_url(url: str) -> tuple[str, str | None]:
    """Return the URL of a repository, and the ref that was named with it."""
    if "#" in url:  # pip accepts this form, git does not
        raise UsageError("--source takes no #…: name a directory of the repository with --directory")
    if match := _SCP.fullmatch(url):
        return f"{match['user']}@{match['host']}:{match['path']}", match["ref"]
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in _SCHEMES or not (parts.hostname or parts.scheme == "file") or not parts.path.strip("/"):
        raise UsageError("--source is no URL of a git repository: write it as git+https://HOST/OWNER/REPOSITORY@BRANCH")
    # First of all, because no message may have a secret.
    if parts.password is not None or parts.query or (parts.username and parts.scheme != "ssh"):
        raise UsageError(
            "--source has credentials, which every reader of the deployment would see. Leave them out, "
            "and name the Prefect block that has them with --source-credentials"
        )
    path, at, ref = parts.path.partition("@")
    if at and not ref:
        raise UsageError(f"--source {url} names no ref after its @: name a branch, a tag or a commit")
    return parts._replace(path=path).geturl(), ref or None


def _parse_block(text: str) -> tuple[str, str]:
    match = _BLOCK.fullmatch(text)
    if not match:
        raise UsageError(
            "--source-credentials names a Prefect block as TYPE/NAME: github-credentials/mine, or secret/my-token"
        )
    return match["type"], match["name"]
