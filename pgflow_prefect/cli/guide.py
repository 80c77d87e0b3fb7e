"""`guide`."""

import re
import sys
from importlib.resources import files

from pgflow_prefect.cli.console import out, print_table
from pgflow_prefect.errors import UsageError

_ABOUT = re.compile(r"\s*<!-- (.*) -->\n")


def guide(topic: str | None = None, /) -> None:
    """Show a page of the guide, or the list of pages.

    Example: `pgflow-prefect guide scaling`

    Parameters
    ----------
    topic
        The page's name.
    """
    pages = _read_pages()
    if topic is None:
        print_table(("page", "about"), [(name, _find_title(text)) for name, text in pages.items()], whole=("page",))
    elif topic not in pages:
        from pgflow_prefect.wording import suggest

        raise UsageError(f"the guide has no page {topic!r}{suggest(topic, pages)}: it has {', '.join(pages)}")
    elif out.is_terminal:
        from rich.markdown import Markdown

        out.print(Markdown(pages[topic]))
    else:
        sys.stdout.write(pages[topic])


def _read_pages() -> dict[str, str]:
    """Return the pages' texts by their names."""
    found = sorted(files("pgflow_prefect.guide").iterdir(), key=lambda page: page.name.removesuffix(".md"))
    return {
        page.name.removesuffix(".md"): page.read_text(encoding="utf-8") for page in found if page.name.endswith(".md")
    }


def _find_title(text: str) -> str:
    """Return the subject of a page: the sentence in the comment under its title, or the title."""
    title, _, rest = text.partition("\n")
    found = _ABOUT.match(rest)
    return found[1] if found else title.removeprefix("# ")
