"""How a file of handlers becomes a module: its name, what its imports find, and what is refused."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgflow_prefect.deployment.handler_files import load_module, load_workflows
from pgflow_prefect.errors import UsageError

HANDLERS = (
    "from pgflow_prefect import Workflow\n\nworkflow = Workflow({slug!r})\n\n\ndef square(n):\n    return n * n\n"
)
HELPERS = ("helpers", "texts", "shared", "flows", "child", "orders", "requests_like")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory, from which this test alone imports."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = dict(sys.modules)
    for name in [name for name in before if name.partition(".")[0] in HELPERS]:
        del sys.modules[name]
    yield tmp_path
    for name in {*sys.modules} - {*before}:
        del sys.modules[name]
    sys.modules.update(before)


def write(path: Path, text: str = "", slug: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + (HANDLERS.format(slug=slug) if slug else ""), encoding="utf-8")
    return path


def test_a_file_is_called_as_python_would_call_it(directory: Path) -> None:
    assert load_module(str(write(directory / "plain" / "orders.py", slug="a"))).__name__ == "orders"
    write(directory / "project" / "flows" / "__init__.py")
    assert load_module(str(write(directory / "project" / "flows" / "mails.py", slug="b"))).__name__ == "flows.mails"


@pytest.mark.parametrize("name", ["statistics.py", "pydantic.py", "e-mail.py", "no_suffix", "class.py"])
def test_a_file_whose_name_is_taken_or_is_none_of_pythons_gets_one_of_its_own(directory: Path, name: str) -> None:
    before = sys.modules.get(Path(name).stem)
    module = load_module(str(write(directory / "flows" / name, slug="a")))
    assert module.workflow.slug == "a"
    assert sys.modules.get(Path(name).stem) in {before, module}
    assert module.__name__ == "class" or module.__name__.startswith("pgflow_prefect.by_path.")


@pytest.mark.processes
@pytest.mark.parametrize("name", ["orders.py", "statistics.py", "e-mail.py", "flows/relative.py"])
def test_another_process_finds_a_function_of_the_file_by_its_name(directory: Path, name: str) -> None:
    text = "from .texts import GREETING\n" if "relative" in name else ""
    write(directory / "north" / "flows" / "texts.py", "GREETING = 'hello'\n")
    module = load_module(str(write(directory / "north" / name, text, slug="a")))
    code = f"import sys, pickle\nsys.path[:] = {sys.path!r}\nprint(pickle.loads({pickle.dumps(module.square)!r})(3))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert child.stdout == "9\n", child.stderr


def test_two_files_of_one_name_are_two_modules(directory: Path) -> None:
    files = [write(directory / folder / "orders.py", slug=folder) for folder in ("north", "south")]
    modules = [load_module(str(each)) for each in files]
    assert [each.workflow.slug for each in modules] == ["north", "south"]
    assert [sys.modules[each.__name__] for each in modules] == modules
    assert [*load_workflows(map(str, files))] == ["north", "south"]


@pytest.mark.parametrize("is_package", [False, True])
@pytest.mark.parametrize(
    "line", ["from .shared.db import NAME", "from flows.shared.db import NAME", "from . import shared"]
)
def test_imports_of_a_folder_work_as_prefects_loader_takes_them(directory: Path, line: str, is_package: bool) -> None:
    write(directory / "work" / "flows" / "shared" / "db.py", "NAME = 'db'\n")
    if is_package:
        write(directory / "work" / "flows" / "__init__.py")
        write(directory / "work" / "flows" / "shared" / "__init__.py")
    assert (
        load_module(str(write(directory / "work" / "flows" / "orders.py", f"{line}\n", slug="a"))).workflow.slug == "a"
    )


def test_a_package_is_found_from_any_working_directory(directory: Path) -> None:
    for name in ("__init__", "shared/__init__"):
        write(directory / "project" / "flows" / f"{name}.py")
    write(directory / "project" / "flows" / "shared" / "db.py", "NAME = 'db'\n")
    lines = "from flows.shared.db import NAME\nfrom .shared import db\nassert db.NAME is NAME\n"
    load_module(str(write(directory / "project" / "flows" / "orders.py", lines, slug="a")))


@pytest.mark.parametrize("library", ["statistics", "colorsys", "xmlrpc"])
def test_a_file_never_hides_the_standard_library(directory: Path, library: str) -> None:
    write(directory / "flows" / f"{library}.py", slug="hides")
    path = write(directory / "flows" / "uses.py", f"import {library}\nfound = {library}.__file__\n", slug="uses")
    sys.modules.pop(library, None)
    assert "pytest" not in load_module(str(path)).found


def test_a_file_of_handlers_does_not_hide_the_library_that_it_is_called_after(directory: Path) -> None:
    site = write(directory / "site" / "requests_like.py", "INSTALLED = True\n").parent
    sys.path.append(str(site))
    path = write(directory / "flows" / "requests_like.py", "from requests_like import INSTALLED\n", slug="a")
    assert load_module(str(path)).INSTALLED
    other = write(directory / "flows" / "uses.py", "from requests_like import INSTALLED\n", slug="b")
    assert load_module(str(other)).INSTALLED


def test_a_module_beside_the_file_wins_over_an_installed_one(directory: Path) -> None:
    site = write(directory / "site" / "helpers.py", "NAME = 'installed'\n").parent
    sys.path.append(str(site))
    write(directory / "flows" / "helpers.py", "NAME = 'own'\n")
    assert load_module(str(write(directory / "flows" / "a.py", "from helpers import NAME\n", slug="a"))).NAME == "own"


@pytest.mark.parametrize(
    "text",
    [
        "from helpers import NAME\n",
        "import texts\n",  # which imports it in turn
        "def late():\n    from helpers import NAME\n",
        "import importlib\n\n\ndef late():\n    return importlib.import_module('helpers')\n",
    ],
)
def test_two_modules_of_one_name_are_refused_with_both_paths(directory: Path, text: str) -> None:
    for team in ("north", "south"):
        write(directory / team / "helpers.py", f"NAME = {team!r}\n")
    write(directory / "south" / "texts.py", "from helpers import NAME\n")
    load_module(str(write(directory / "north" / "a.py", "from helpers import NAME\n", slug="a")))
    with pytest.raises(UsageError) as refused:
        load_module(str(write(directory / "south" / "b.py", text, slug="b")))
    for path in ("north/a.py", "south/b.py", "north/helpers.py", "south/helpers.py"):
        assert str(directory / path) in str(refused.value)


def test_a_module_that_is_called_as_a_file_of_handlers_elsewhere_is_refused(directory: Path) -> None:
    load_module(str(write(directory / "north" / "orders.py", slug="orders")))
    write(directory / "south" / "orders.py", "NAME = 'south'\n")
    with pytest.raises(UsageError) as refused:
        load_module(str(write(directory / "south" / "a.py", "from orders import NAME\n", slug="a")))
    for path in ("north/orders.py", "south/orders.py"):
        assert str(directory / path) in str(refused.value)


def test_files_of_two_folders_with_modules_of_one_name_work_where_one_file_imports_it(directory: Path) -> None:
    for team in ("north", "south"):
        write(directory / team / "helpers.py", f"NAME = {team!r}\n")
    load_module(str(write(directory / "north" / "a.py", slug="a")))
    second = load_module(
        str(write(directory / "south" / "b.py", "def late():\n    import helpers\n    return helpers\n", slug="b"))
    )
    assert second.late().NAME == "south"


def test_a_file_that_another_file_imports_is_executed_once(directory: Path) -> None:
    write(directory / "flows" / "__init__.py")
    child = write(directory / "flows" / "child.py", slug="child")
    parent = write(directory / "flows" / "parent.py", "from child import workflow as child\n", slug="parent")
    first = load_module(str(child))
    assert load_module(str(parent)).child is first.workflow


@pytest.mark.parametrize("order", [("child", "parent"), ("parent", "child")])
def test_a_workflow_belongs_to_the_file_that_makes_it(directory: Path, order: tuple[str, str]) -> None:
    write(directory / "flows" / "child.py", slug="child")
    write(directory / "flows" / "parent.py", "from child import workflow as child\n", slug="parent")
    found = load_workflows(str(directory / "flows" / f"{name}.py") for name in order)
    assert {slug: Path(source).stem for slug, (_, source) in found.items()} == {"child": "child", "parent": "parent"}


def test_a_workflow_that_a_helper_makes_counts(directory: Path) -> None:
    write(
        directory / "flows" / "helpers.py",
        "from pgflow_prefect import Workflow\n\n\ndef make(s):\n    return Workflow(s)\n",
    )
    path = write(directory / "flows" / "made.py", "from helpers import make\nworkflow = make('made')\n")
    assert [*load_workflows([str(path)])] == ["made"]


def test_two_files_that_make_one_workflow_are_refused(directory: Path) -> None:
    files = [str(write(directory / "flows" / f"{name}.py", slug="same")) for name in ("a", "b")]
    with pytest.raises(UsageError, match=r"workflow 'same' has handlers in both .*a\.py and .*b\.py: name one"):
        load_workflows(files)


def test_two_folders_that_files_add_to_the_path_themselves_are_refused_with_both_paths(directory: Path) -> None:
    lines = "import sys\nfrom pathlib import Path\nsys.path.insert(0, str(Path(__file__).parent / 'lib'))\n"
    for team in ("north", "south"):
        write(directory / team / "lib" / "helpers.py", f"NAME = {team!r}\n")
        write(directory / team / f"{team}.py", f"{lines}from helpers import NAME\n", slug=team)
    load_module(str(directory / "north" / "north.py"))
    with pytest.raises(UsageError) as refused:
        load_module(str(directory / "south" / "south.py"))
    for team in ("north", "south"):
        assert str(directory / team / "lib" / "helpers.py") in str(refused.value)


def test_a_file_in_the_working_directory_does_not_hide_the_standard_library(directory: Path) -> None:
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it
    write(Path("colorsys.py"), slug="hides")
    sys.modules.pop("colorsys", None)
    load_workflows(["colorsys.py"])
    module = load_module(str(write(Path("uses.py"), "import colorsys\nfound = colorsys.__file__\n", slug="uses")))
    assert "pytest" not in module.found


def test_modules_by_name_own_their_workflows_too(directory: Path) -> None:
    write(Path("child.py"), slug="child")
    write(Path("orders.py"), "from child import workflow as child\n", slug="parent")
    found = load_workflows(["orders", "child"])
    assert {slug: source for slug, (_, source) in found.items()} == {"child": "child", "parent": "orders"}


@pytest.mark.anyio
async def test_a_file_is_imported_outside_of_the_event_loop(directory: Path) -> None:
    lines = "import asyncio\ntry:\n    asyncio.get_running_loop()\nexcept RuntimeError:\n    outside = True\n"
    assert load_module(str(write(directory / "flows" / "a.py", lines, slug="a"))).outside
