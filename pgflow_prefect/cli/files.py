"""Files that commands write."""

import sys
import tempfile
from pathlib import Path

from pgflow_prefect.errors import UsageError
from pgflow_prefect.wording import clean_lines


def write_output(text: str, output: Path | None) -> None:
    """Write a text to a file, or to standard output. The file is replaced as a whole.

    Control characters are replaced, because people read the text in terminals.

    Raises:
        UsageError: the file can't be written.
    """
    text = clean_lines(text)
    if output is None:
        sys.stdout.write(text)
        return
    try:
        if output.exists() and not output.is_file():  # /dev/stdout, a pipe; a directory refuses it
            output.write_text(text, encoding="utf-8")
        else:
            _replace(output.resolve(), text)  # where a link leads to
    except OSError as error:
        raise UsageError(f"--output {str(output)!r} can't be written: {error.strerror}") from error


def _replace(path: Path, text: str) -> None:
    mode = path.stat().st_mode if path.exists() else 0o644
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
        written = Path(part.name)
        try:
            part.write(text.encode())
            part.flush()
            written.chmod(mode)
            written.replace(path)
        except BaseException:
            written.unlink(missing_ok=True)
            raise
