"""A terminal and a browser in which the servers of `pgflow-prefect demo --keep` can be reached, to take pictures of."""

import os
import re
import shlex
import signal
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

from playwright.sync_api import Browser
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from tests.acceptance.browser import PATIENCE, Screen, open_screen
from tests.site.places import GUIDE, PICTURES, ROOT

COLUMNS = 112
"""The width of the terminal."""

_TERMINAL = """\
<body style="margin: 0">
<div id="terminal" style="display: inline-block; padding: 14px 18px; background: #16181d; color: #d8dae0">
<pre style="margin: 0; font: 14px/1.35 'DejaVu Sans Mono', monospace">{code}</pre></div></body>
"""
_LOG_IN = "localStorage.setItem('prefect-password', btoa({!r}))"


@dataclass(frozen=True)
class Session:
    """A terminal in which the demo's servers can be reached.

    Attributes:
        environment: the demo's variables, and what makes output coloured.
        directory: where commands run.
        browser: takes the pictures.
        shown: the commands so far, with their output, since the last picture.
    """

    environment: Mapping[str, str]
    directory: Path
    browser: Browser
    shown: list[str] = field(default_factory=list)

    def run(self, command: str, *, code: int = 0) -> str:
        """Run a command as a user would, keep it for the next picture of the terminal, and return its output."""
        words = [sys.executable, "-m", "pgflow_prefect", *shlex.split(command)[1:]]
        done = subprocess.run(
            words, cwd=self.directory, env=self.environment, check=False, stdout=-1, stderr=subprocess.STDOUT, text=True
        )
        self.shown.append(f"\x1b[1m$ {command}\x1b[0m\n{done.stdout}")
        if done.returncode != code:
            sys.exit(f"`{command}` ended with {done.returncode}, not {code}:\n{done.stdout}")
        return done.stdout

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a command that goes on, and return when it says that it is ready."""
        words = [sys.executable, "-m", "pgflow_prefect", *shlex.split(command)[1:]]
        started = subprocess.Popen(
            words, cwd=self.directory, env=self.environment, stdout=-1, stderr=subprocess.STDOUT, text=True
        )
        assert started.stdout is not None
        for line in started.stdout:
            if "ready: " in line:
                return started
        sys.exit(f"`{command}` is not ready")

    def write_handlers(self, page: str, workflow: str) -> str:
        """Save the handlers that a page of the guide shows, and return their path."""
        text = (ROOT / GUIDE / f"{page}.md").read_text(encoding="utf-8")
        blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        [code] = [str(block) for block in blocks if f'workflow = Workflow("{workflow}")' in block]
        path = self.directory / "flows" / f"{workflow}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code, encoding="utf-8")
        return str(path.relative_to(self.directory))

    def change_handlers(self, handlers: str, former: str, code: str) -> None:
        """Replace a piece of the handlers' code, as a user would with an editor."""
        path = self.directory / handlers
        text = path.read_text(encoding="utf-8")
        assert text.count(former) == 1, f"{handlers} does not have {former!r} once"
        path.write_text(text.replace(former, code), encoding="utf-8")

    def take_terminal(self, name: str) -> None:
        """Take a picture of the commands since the last one."""
        console = Console(file=StringIO(), record=True, width=COLUMNS, force_terminal=True, color_system="truecolor")
        console.print(Text.from_ansi("\n".join(self.shown).rstrip()), soft_wrap=True)
        self.shown.clear()
        page = self.browser.new_page(device_scale_factor=1.5)
        page.set_content(console.export_html(theme=MONOKAI, inline_styles=True, code_format=_TERMINAL))
        page.locator("#terminal").screenshot(path=name_picture(name))
        page.close()

    def take_run(self, name: str, ran: str) -> None:
        """Take a picture of a run's page in Prefect's UI, once its graph is drawn; `run` has printed the address."""
        self.take_page(name, self.find_address(ran))

    def find_address(self, ran: str) -> str:
        """Return the address of a run's page, as `run` has printed it."""
        [address] = re.findall(r"in Prefect: (\S+)", re.sub(r"\x1b\[[\d;]*m", "", ran))
        return str(address)

    def take_page(
        self, name: str, address: str, *, awaited: Sequence[str] = (), tab: str | None = None, height: int = 800
    ) -> None:
        """Take a picture of a flow run's page, once its graph is drawn.

        Args:
            name: of the picture.
            address: of the page.
            awaited: texts that the page shows, and has to show first.
            height: of the picture.
            tab: the tab below the graph, where it is another one than the log. The picture is of its rows.
        """
        with self.open_prefect() as screen:
            screen.page.set_viewport_size({"width": 1280, "height": height})
            screen.open(address)
            screen.await_something_green()
            if tab is not None:
                screen.page.get_by_text(tab, exact=True).last.click(timeout=PATIENCE)
            for text in awaited:
                screen.page.get_by_text(text, exact=tab is not None).first.wait_for(timeout=PATIENCE)
            if tab is not None:
                screen.page.set_viewport_size({"width": 1280, "height": 2000})
                rows = screen.page.get_by_text(awaited[0], exact=True).first.bounding_box(timeout=PATIENCE)
                assert rows is not None
                screen.page.screenshot(
                    path=name_picture(name), clip={"x": 256, "y": rows["y"] - 130, "width": 1024, "height": 760}
                )
                return
            screen.page.screenshot(path=name_picture(name))

    def take_form(self, name: str, workflow: str) -> None:
        """Take a picture of the form behind the Run button of a workflow's deployment."""
        api = self.environment["PREFECT_API_URL"]
        with self.open_prefect() as screen:
            page = screen.page
            user, password = self.environment["PREFECT_API_AUTH_STRING"].split(":", 1)
            login = b64encode(f"{user}:{password}".encode()).decode()
            answer = page.request.get(
                f"{api}/deployments/name/{workflow}/pgflow", headers={"Authorization": f"Basic {login}"}
            )
            screen.open(f"{api.removesuffix('/api')}/deployments/deployment/{answer.json()['id']}/run")
            page.get_by_text("Payload", exact=False).first.wait_for(timeout=PATIENCE)
            page.wait_for_load_state("networkidle", timeout=PATIENCE)
            page.screenshot(path=name_picture(name))

    @contextmanager
    def open_prefect(self) -> Iterator[Screen]:
        """Open a window of Prefect's UI that has logged in."""
        here = self.environment["PREFECT_API_URL"].removesuffix("api")
        with open_screen(self.browser, ROOT / PICTURES, here=here) as screen:
            screen.page.set_viewport_size({"width": 1280, "height": 800})
            screen.page.add_init_script(_LOG_IN.format(self.environment["PREFECT_API_AUTH_STRING"]))
            yield screen


def name_picture(name: str) -> Path:
    return ROOT / PICTURES / f"{name}.png"


@contextmanager
def open_demo() -> Iterator[dict[str, str]]:
    """Run the demo, and yield the variables that it prints, until the end."""
    command = [sys.executable, "-m", "pgflow_prefect", "demo", "--keep"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_leave_out_settings()) as demo:
        try:
            assert demo.stdout is not None
            yield _read_variables(demo.stdout)
        finally:
            demo.send_signal(signal.SIGINT)
            demo.communicate()


def _leave_out_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PGFLOW_", "PREFECT_"))}


def _read_variables(lines: Iterator[str] | Sequence[str]) -> dict[str, str]:
    variables: dict[str, str] = {}
    for line in lines:
        if line.startswith("export "):
            name, _, value = shlex.split(line)[1].partition("=")
            variables[name] = value
        if line.startswith("its password:"):
            return variables
    sys.exit("the demo did not come to its end")
