"""What mkdocs does beyond `mkdocs.yml`. It loads this file, and calls these functions by their names."""

import logging
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parents[2]))  # the command `mkdocs` does not look there

from tests.site.api import find_undocumented
from tests.site.pages import complete_nav, draw_rooms, finish_page, list_pictures, make_pages
from tests.site.sources import find_foreign

_log = logging.getLogger(f"mkdocs.hooks.{__name__}")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add what is generated, and the pictures. A public name without documentation is a warning, which is an error."""
    for place, text in {**make_pages(), **draw_rooms()}.items():
        if files.get_file_from_path(place) is not None:
            raise PluginError(f"the guide has a page {place}, which is also generated: rename one of them")
        files.append(File.generated(config, place, content=text))
    for place, picture in list_pictures().items():
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    complete_nav(config.nav or [])
    for name in find_undocumented():
        _log.warning("%s is public and has no docstring", name)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Give a page its links, figures and description."""
    try:
        text, about = finish_page(markdown, page.file.src_uri)
    except LookupError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from None
    if about is not None:
        page.meta["description"] = about
    return text


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that would load something from elsewhere."""
    if foreign := find_foreign(Path(config.site_dir)):
        raise PluginError("the site would load from elsewhere:\n" + "\n".join(foreign))
