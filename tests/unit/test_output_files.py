"""What commands write into files: the old text or the new one, never half of it."""

import os
import stat
from pathlib import Path

import pytest

from pgflow_prefect.cli.files import write_output
from pgflow_prefect.errors import UsageError


def test_a_file_is_replaced_as_a_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "picture"
    file.write_text("before")
    file.chmod(0o600)
    with file.open() as old:
        write_output("größe\n", file)
        assert old.read() == "before", "a reader still has the old one"
    assert file.read_text(encoding="utf-8") == "größe\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["picture"]  # noqa: PTH208


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    write_output("text", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    out, into = os.pipe()
    write_output("text", Path(f"/dev/fd/{into}"))
    os.close(into)
    with open(out) as pipe:  # noqa: PTH123
        assert pipe.read() == "text"


def test_without_a_file_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    write_output("text", None)
    assert capsys.readouterr().out == "text"


@pytest.mark.parametrize(
    ("name", "why"),
    [("no/such/file", "No such file or directory"), (".", "Is a directory"), ("/dev/full", "No space left on device")],
)
def test_a_file_that_can_t_be_written_is_named(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(UsageError) as refused:
        write_output("text", tmp_path / name)
    assert str(refused.value) == f"--output {str(tmp_path / name)!r} can't be written: {why}"
    assert list(tmp_path.iterdir()) == []
