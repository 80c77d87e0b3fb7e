"""Files that ship with the package and are not Python: the SQL scripts and the example workflows."""

from pathlib import Path


def shipped_path(*parts: str) -> Path:
    """Return where a shipped file lies: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    installed = package / "_shipped"
    return (installed if installed.is_dir() else package.parent).joinpath(*parts)
