"""Builds what a release publishes, and checks it: `python -m tests.release --tag v0.1.0`.

Needs the extra `release`. The archives are built from the files that git knows. A virtual environment that has nothing
else gets what the source archive has in it, and runs README's demo.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from email import message_from_bytes
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]

_DEMO = re.compile(r"^(?P<install>.*) && .*pgflow-prefect demo$", re.MULTILINE)
_IN_WHEEL = ("pgflow_prefect/py.typed", "pgflow_prefect/guide/engine.md", "pgflow_prefect/_shipped/sql/pgflow.sql")
_IN_SDIST = (
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "mkdocs.yml",
    "pyproject.toml",
    "sql/pgflow.sql",
    "tests/release.py",
)
_FILE_LINK = re.compile(r"\]\(((?!https?://|#)[^)]+)\)")
_ONLY_CODE = re.compile(r"pgflow_prefect(?:-[^/]*\.dist-info)?/")
_NOT_IN_WHEEL = (".png", ".pyc")


class ReleaseError(Exception):
    """What is to be released is not as it has to be."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Build and check a release, and say what was checked."""
    parser = argparse.ArgumentParser(prog="python -m tests.release", description=__doc__)
    parser.add_argument("--tag", help="the tag of the release: v and the version")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where the archives are left; default: dist")
    options = parser.parse_args(arguments)
    try:
        version = read_version()
        if options.tag is not None:
            check_tag(options.tag, version, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
        sdist, wheel = build(options.dist)
        check_texts([sdist, wheel])
        check_wheel(list_wheel(wheel))
        check_description(read_description(wheel))
        check_sdist(list_sdist(sdist))
        check_environment(sdist, wheel, version)
    except ReleaseError as error:
        sys.exit(f"error: {error}")
    print(f"{sdist.name} and {wheel.name} can be released")


def read_version() -> str:
    """Return the version that pyproject.toml says."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def check_tag(tag: str, version: str, changelog: str) -> None:
    """Compare a tag with the version, and look for the version in the changelog.

    Raises:
        ReleaseError: they differ, or the changelog has no section for the version.
    """
    if tag != f"v{version}":
        raise ReleaseError(
            f"the tag is {tag}, but pyproject.toml has the version {version}: tag v{version}, or change it"
        )
    if not re.search(rf"^## {re.escape(version)}\b", changelog, re.MULTILINE):
        raise ReleaseError(f"CHANGELOG.md has no section '## {version}': rename 'Unreleased', and add the date")


def build(dist: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it, out of a copy of the files that git knows."""
    shutil.rmtree(dist, ignore_errors=True)
    with TemporaryDirectory(prefix="pgflow-release-") as name:
        copy = Path(name)
        listed = _run("git", "ls-files", "-z", cwd=ROOT).split("\0")
        for path in filter(None, listed):
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, copy / path)
        _run(sys.executable, "-m", "build", "--outdir", str(dist.resolve()), cwd=copy)
    [sdist], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return sdist, wheel


def check_texts(archives: Iterable[Path]) -> None:
    """Check the archives' metadata, and that a package index can show README."""
    _run(sys.executable, "-m", "twine", "check", "--strict", *map(str, archives))
    _run(sys.executable, "-m", "readme_renderer", "--package", "pgflow-prefect", "-o", "/dev/null")


def list_wheel(wheel: Path) -> list[str]:
    """Return the names of a wheel's files."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def list_sdist(sdist: Path) -> list[str]:
    """Return the names of the files of a source archive, without its folder."""
    with tarfile.open(sdist) as archive:
        return [str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in archive.getnames()]


def read_description(wheel: Path) -> str:
    """Return the text that a package index shows: README, in the wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return str(message_from_bytes(archive.read(name)).get_payload())


def check_description(text: str) -> None:
    """Check that no link leads to a file: a package index has README alone.

    Raises:
        ReleaseError: with the links.
    """
    if links := _FILE_LINK.findall(text):
        raise ReleaseError(f"the description links to files, which a package index does not have: {', '.join(links)}")


def check_wheel(names: Sequence[str]) -> None:
    """Check that a wheel has the package, its licence, its scripts of SQL and its guide, and nothing else.

    Raises:
        ReleaseError: with the names that are missing, or too many.
    """
    _check_names("the wheel", _IN_WHEEL, names)
    odd = [name for name in names if not _ONLY_CODE.match(name) or name.endswith(_NOT_IN_WHEEL)]
    if odd:
        raise ReleaseError(f"the wheel has files that are not for users: {', '.join(odd)}")
    if not any(name.endswith("/licenses/LICENSE") for name in names):
        raise ReleaseError("the wheel has no licence")


def check_sdist(names: Sequence[str]) -> None:
    """Check that a source archive has what builds and tests the package.

    Raises:
        ReleaseError: with the names that are missing.
    """
    _check_names("the source archive", _IN_SDIST, names)


def _check_names(archive: str, needed: Iterable[str], names: Sequence[str]) -> None:
    if missing := [name for name in needed if name not in names]:
        raise ReleaseError(f"{archive} lacks {', '.join(missing)}")


def check_environment(sdist: Path, wheel: Path, version: str) -> None:
    """Run README's demo in a new environment that has the source archive's package, and compare that with the wheel.

    Raises:
        ReleaseError: the environment has other files than the wheel, or another version.
    """
    demo = _DEMO.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert demo is not None, "README has no line that installs the package and runs the demo"
    with TemporaryDirectory(prefix="pgflow-release-") as name:
        with tarfile.open(sdist) as archive:
            archive.extractall(name, filter="data")
        [directory] = Path(name).iterdir()
        subprocess.run(demo[0], shell=True, check=True, cwd=directory)  # noqa: S602  README's line, as a user types it
        [installed] = directory.glob(".venv/lib/python*/site-packages")
        files = {str(path.relative_to(installed)) for path in installed.glob("pgflow_prefect*/**/*") if path.is_file()}
        if differ := sorted(_name_code(files) ^ _name_code(list_wheel(wheel))):
            raise ReleaseError(f"the source archive and the wheel differ in {', '.join(differ)}")
        if (shown := _run(".venv/bin/pgflow-prefect", "--version", cwd=directory).strip()) != version:
            raise ReleaseError(f"pgflow-prefect --version says {shown}, and not {version}")


def _name_code(names: Iterable[str]) -> set[str]:
    """Return the files of the package: what installing adds beside it differs."""
    return {name for name in names if name.startswith("pgflow_prefect/") and "__pycache__" not in name}


def _run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ReleaseError(f"`{' '.join(command)}` ended with {done.returncode}:\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


if __name__ == "__main__":
    main()
