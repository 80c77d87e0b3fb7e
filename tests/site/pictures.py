"""Takes the pictures of the site, from Prefect's real UI and a real terminal: `python -m tests.site.pictures`.

Needs the extra `dev` and Chromium. The servers are those of `pgflow-prefect demo --keep`. The workflows are those of
the guide's pages, as the pages have them: so what a tutorial says is also executed.
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.acceptance.browser import open_browser
from tests.site.observed_run import take_observed
from tests.site.places import PICTURES, ROOT
from tests.site.session import COLUMNS, Session, open_demo

WORKFLOW = "daily_report"
SKIPPING = "nightly_orders"


def main() -> None:
    """Take the pictures of the pages that are named, or all, and say where they are."""
    pages = {"first-workflow": _take_tutorial, "rules": _take_rules, "released": take_observed}
    wanted = sys.argv[1:] or [*pages]
    if unknown := {*wanted} - {*pages}:
        sys.exit(f"there are no pictures of {', '.join(sorted(unknown))}: name {', '.join(pages)}")
    (ROOT / PICTURES).mkdir(exist_ok=True)
    with TemporaryDirectory(prefix="pgflow-pictures-") as name, open_demo() as variables, open_browser() as browser:
        environment = {**os.environ, **variables, "FORCE_COLOR": "1", "COLUMNS": str(COLUMNS)}
        session = Session(environment, Path(name), browser)
        for page in wanted:
            pages[page](session)
    for picture in sorted((ROOT / PICTURES).glob("*.png")):
        print(picture.relative_to(ROOT))


def _take_tutorial(session: Session) -> None:
    """Do what the page `first-workflow` says."""
    handlers = session.write_handlers("first-workflow", WORKFLOW)
    session.run(f"pgflow-prefect push {handlers} --yes")
    session.run(f"pgflow-prefect graph {WORKFLOW}")
    session.run(f"pgflow-prefect validate {WORKFLOW}")
    session.take_terminal("push")
    ran = session.run(f"""pgflow-prefect run {WORKFLOW} --payload '{{"day": "2026-01-31"}}'""")
    session.take_run("report", ran)
    session.shown.clear()  # a live display is no text
    session.run("pgflow-prefect status latest")
    session.run("pgflow-prefect timeline latest")
    session.take_terminal("status")
    session.change_handlers(handlers, "sum(sale.euros for", "sum(sale.dollars for")
    session.run(f"""pgflow-prefect run {WORKFLOW} --payload '{{"day": "2026-02-01"}}'""", code=1)
    session.shown.clear()
    session.run("pgflow-prefect status latest")
    session.take_terminal("failed")
    session.change_handlers(handlers, "sum(sale.dollars for", "sum(sale.euros for")
    session.take_run("resumed", session.run("pgflow-prefect run --resume latest"))
    session.run(f"pgflow-prefect deploy {WORKFLOW}")
    session.take_form("form", WORKFLOW)


def _take_rules(session: Session) -> None:
    """Do what the page `rules` says, where it shows a run in Prefect."""
    handlers = session.write_handlers("rules", SKIPPING)
    session.run(f"pgflow-prefect push {handlers} --yes")
    ran = session.run(f"""pgflow-prefect run {SKIPPING} --payload '{{"orders": [100, -1, 300]}}'""", code=1)
    session.shown.clear()
    address = session.find_address(ran)
    session.take_page("skipped", address, awaited=["Skipped: "], height=1080)
    session.take_page("states", address, awaited=["publish", "NotReady", "everything", "Skipped"], tab="Task Runs")


if __name__ == "__main__":
    main()
