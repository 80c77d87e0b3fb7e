"""Takes the pictures of the site, from Prefect's real UI and a real terminal: `python -m tests.site.pictures`.

Needs the extra `dev` and Chromium. The servers are those of `pgflow-prefect demo --keep`. The workflow is that of the
page `first-workflow`, as the page has it: so what the tutorial says is also executed.
"""

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
from tempfile import TemporaryDirectory

from playwright.sync_api import Browser
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from tests.acceptance.browser import PATIENCE, Screen, open_browser, open_screen
from tests.site.places import GUIDE, PICTURES, ROOT

WORKFLOW = "daily_report"
HANDLERS = f"flows/{WORKFLOW}.py"

_COLUMNS = 112
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

    def change_handlers(self, former: str, code: str) -> None:
        """Replace a piece of the handlers' code, as a user would with an editor."""
        path = self.directory / HANDLERS
        text = path.read_text(encoding="utf-8")
        assert text.count(former) == 1, f"{HANDLERS} does not have {former!r} once"
        path.write_text(text.replace(former, code), encoding="utf-8")

    def take_terminal(self, name: str) -> None:
        """Take a picture of the commands since the last one."""
        console = Console(file=StringIO(), record=True, width=_COLUMNS, force_terminal=True, color_system="truecolor")
        console.print(Text.from_ansi("\n".join(self.shown).rstrip()), soft_wrap=True)
        self.shown.clear()
        page = self.browser.new_page(device_scale_factor=1.5)
        page.set_content(console.export_html(theme=MONOKAI, inline_styles=True, code_format=_TERMINAL))
        page.locator("#terminal").screenshot(path=_name_picture(name))
        page.close()

    def take_run(self, name: str, ran: str) -> None:
        """Take a picture of a run's page in Prefect's UI, once its graph is drawn; `run` has printed the address."""
        [address] = re.findall(r"in Prefect: (\S+)", re.sub(r"\x1b\[[\d;]*m", "", ran))
        with self._open_prefect() as screen:
            screen.open(address)
            screen.await_something_green()
            screen.page.screenshot(path=_name_picture(name))

    def take_form(self, name: str) -> None:
        """Take a picture of the form behind the Run button of the workflow's deployment."""
        api = self.environment["PREFECT_API_URL"]
        with self._open_prefect() as screen:
            page = screen.page
            user, password = self.environment["PREFECT_API_AUTH_STRING"].split(":", 1)
            login = b64encode(f"{user}:{password}".encode()).decode()
            answer = page.request.get(
                f"{api}/deployments/name/{WORKFLOW}/pgflow", headers={"Authorization": f"Basic {login}"}
            )
            screen.open(f"{api.removesuffix('/api')}/deployments/deployment/{answer.json()['id']}/run")
            page.get_by_text("Payload", exact=False).first.wait_for(timeout=PATIENCE)
            page.wait_for_load_state("networkidle", timeout=PATIENCE)
            page.screenshot(path=_name_picture(name))

    @contextmanager
    def _open_prefect(self) -> Iterator[Screen]:
        here = self.environment["PREFECT_API_URL"].removesuffix("api")
        with open_screen(self.browser, ROOT / PICTURES, here=here) as screen:
            screen.page.set_viewport_size({"width": 1280, "height": 800})
            screen.page.add_init_script(_LOG_IN.format(self.environment["PREFECT_API_AUTH_STRING"]))
            yield screen


def main() -> None:
    """Take all pictures, and say where they are."""
    (ROOT / PICTURES).mkdir(exist_ok=True)
    with TemporaryDirectory(prefix="pgflow-pictures-") as name, _demo() as variables, open_browser() as browser:
        environment = {**os.environ, **variables, "FORCE_COLOR": "1", "COLUMNS": str(_COLUMNS)}
        session = Session(environment, Path(name), browser)
        (session.directory / HANDLERS).parent.mkdir()
        (session.directory / HANDLERS).write_text(read_handlers(), encoding="utf-8")
        _take_tutorial(session)
    for picture in sorted((ROOT / PICTURES).glob("*.png")):
        print(picture.relative_to(ROOT))


def _take_tutorial(session: Session) -> None:
    """Do what the page `first-workflow` says."""
    session.run(f"pgflow-prefect push {HANDLERS} --yes")
    session.run(f"pgflow-prefect graph {WORKFLOW}")
    session.run(f"pgflow-prefect validate {WORKFLOW}")
    session.take_terminal("push")
    ran = session.run(f"""pgflow-prefect run {WORKFLOW} --payload '{{"day": "2026-01-31"}}'""")
    session.take_run("report", ran)
    session.shown.clear()  # a live display is no text
    session.run("pgflow-prefect status latest")
    session.run("pgflow-prefect timeline latest")
    session.take_terminal("status")
    session.change_handlers("sum(sale.euros for", "sum(sale.dollars for")
    session.run(f"""pgflow-prefect run {WORKFLOW} --payload '{{"day": "2026-02-01"}}'""", code=1)
    session.shown.clear()
    session.run("pgflow-prefect status latest")
    session.take_terminal("failed")
    session.change_handlers("sum(sale.dollars for", "sum(sale.euros for")
    session.take_run("resumed", session.run("pgflow-prefect run --resume latest"))
    session.run(f"pgflow-prefect deploy {WORKFLOW}")
    session.take_form("form")


def read_handlers() -> str:
    """Return the file of handlers that the tutorial shows."""
    text = (ROOT / GUIDE / "first-workflow.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    [code] = [str(block) for block in blocks if f'workflow = Workflow("{WORKFLOW}")' in block]
    return code


def _name_picture(name: str) -> Path:
    return ROOT / PICTURES / f"{name}.png"


@contextmanager
def _demo() -> Iterator[dict[str, str]]:
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


if __name__ == "__main__":
    main()
