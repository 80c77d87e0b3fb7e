"""A step that is bound to a program: what the program gets, and what its end means."""

import errno
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import anyio
import httpx
import psutil
import pytest
from pydantic import ValidationError

from pgflow_prefect.bindings import Command, NamedCommand
from pgflow_prefect.errors import (
    CommandFailedError,
    NotRetriableError,
    PgflowPrefectError,
    ResultInvalidError,
    RetryLaterError,
)
from pgflow_prefect.handlers import command_process
from pgflow_prefect.handlers.base import AnyStepContext, ItemContext, StepContext, StepExecution, Toolbox
from pgflow_prefect.handlers.command import CommandHandler
from pgflow_prefect.handlers.command_output import LINE_LIMIT, LOG_LIMIT
from pgflow_prefect.handlers.command_process import Launch
from pgflow_prefect.handlers.outcomes import Decided
from pgflow_prefect.models import Claim, Status
from pgflow_prefect.programs import Program
from pgflow_prefect.raw_json import RawJson

pytestmark = pytest.mark.anyio

LIMIT = 10_000
RUN = UUID(int=7)
CLAIM = Claim(
    status=Status.PENDING,
    attempt=2,
    payload=RawJson('{"n": 1.10}'),
    upstream_results=RawJson('{"a": [12345678901234567.89], "payload": "é"}'),
)
TIMEOUT = 180


class Lines(logging.Handler):
    """Collects what a step logs."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.came: Callable[[str], None] = lambda text: None

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        self.came(self.texts[-1])


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    logger = logging.getLogger(__name__)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs write their results; the directory is empty after each test."""
    made = tmp_path / "scratch"
    made.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(made))
    return made


def make_toolbox(limit: int = LIMIT, **programs: Program) -> Toolbox:
    def refuse() -> httpx.AsyncClient:
        raise AssertionError("a program needs no HTTP")

    async def find_secret(name: str) -> str:
        raise AssertionError("a program needs no block")

    return Toolbox(refuse, find_secret, limit, programs=programs, secrets=("hunter2-dsn",))


async def call(
    binding: Command | NamedCommand,
    toolbox: Toolbox | None = None,
    claim: Claim = CLAIM,
    context: AnyStepContext[Any] | None = None,
) -> str | Decided:
    context = context or StepContext(RUN, "Prüfung 工", "send/ü %", 2, logging.getLogger(__name__))
    with anyio.fail_after(TIMEOUT):
        return await CommandHandler("send", binding, toolbox or make_toolbox()).execute(
            claim, ["a", "payload"], StepExecution(context)
        )


def shell(script: str, **options: object) -> Command:
    return Command(["/bin/sh", "-c", script], **options)  # type: ignore[arg-type]  # as a user gives them


def python(script: str, **options: object) -> Command:
    return Command([sys.executable, "-I", "-S", "-c", script], **options)  # type: ignore[arg-type]


# What it gets


async def test_it_gets_the_input_on_stdin_with_every_digit() -> None:
    result = await call(shell("cat"))
    assert isinstance(result, str)
    assert json.loads(result) == {"payload": {"n": 1.1}, "a": [12345678901234567.89], "payload_": "é"}
    assert "1.10" in result
    assert "12345678901234567.89" in result


async def test_its_environment_has_what_is_named_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    for name in ("PGFLOW_DSN", "PGFLOW_TOKEN_A", "PREFECT_API_KEY", "PGPASSWORD", "DSN"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("STAMP_TOKEN", "from the worker")
    script = "import json, os; print(json.dumps(dict(os.environ)))"
    result = await call(python(script, env={"MODE": "fäst"}, pass_env=["STAMP_TOKEN"]))
    assert isinstance(result, str)
    found = json.loads(result)
    found.pop("LC_CTYPE", None)  # Python itself sets it in the C locale
    assert found.pop("STEP_RESULT_FILE").startswith(f"{scratch}/")
    assert found == {
        "MODE": "fäst",
        "STAMP_TOKEN": "from the worker",
        "STEP_RUN_ID": str(RUN),
        "STEP_WORKFLOW": "Prüfung 工",
        "STEP_SLUG": "send/ü %",
        "STEP_ATTEMPT": "2",
        "STEP_IDEMPOTENCY_KEY": f"{RUN}/send/ü %",
    }


@pytest.mark.parametrize("index", [0, 1])
async def test_each_item_of_a_map_gets_its_place(index: int) -> None:
    item = ItemContext(
        RUN, "w", "a", 1, logging.getLogger(__name__), index=index, item_index=index, item_indexes=(index,)
    )
    script = "import json, os; print(json.dumps([each for each in os.environ.items() if 'INDEX' in each[0]]))"
    assert await call(python(script), context=item) == json.dumps([["STEP_ITEM_INDEX", str(index)]])


async def test_it_inherits_no_file_and_no_ignored_signal() -> None:
    script = """
import os, signal
print([each for each in os.listdir("/proc/self/fd") if int(each) > 2][1:], os.getsid(0) == os.getpid(),
      [each.name for each in signal.Signals if signal.getsignal(each) is signal.SIG_IGN
       and each not in (signal.SIGPIPE, signal.SIGXFSZ)])
"""
    with open(os.devnull, "rb") as file:  # noqa: ASYNC230, PTH123
        os.set_inheritable(file.fileno(), True)
        assert await call(python(script)) == '"[] True []"'


async def test_its_working_directory_is_the_workers_or_the_one_that_is_named(tmp_path: Path) -> None:
    assert await call(shell("pwd")) == json.dumps(str(Path.cwd()))
    assert await call(shell("pwd", cwd=str(tmp_path))) == json.dumps(str(tmp_path))


async def test_a_program_without_a_slash_is_found_in_the_workers_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "stamp"
    program.write_text('#!/bin/sh\necho "$0 $1"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert await call(Command(["stamp", "a  b; $(c)"])) == json.dumps(f"{program} a  b; $(c)")
    assert await call(Command(["./stamp", "x"], cwd=str(tmp_path))) == json.dumps(f"{program} x")


# Its result


@pytest.mark.parametrize(
    ("script", "result"),
    [
        ("true", "null"),
        ("echo", "null"),
        ("echo first; echo 12.50; echo; echo '  '", "12.50"),
        ("""printf '{"a": [1,  2]}'""", '{"a": [1,  2]}'),
        ("echo done; echo noise >&2", '"done"'),
        ("echo NaN", '"NaN"'),
        ("printf 'a\\r\\nb\\r\\n'", '"b"'),
        ("echo 1; printf '\"from the file\"' > $STEP_RESULT_FILE", '"from the file"'),
        ("echo 1; printf 'two\\nlines\\n' > $STEP_RESULT_FILE", '"two\\nlines"'),
        ("echo 1; : > $STEP_RESULT_FILE", "null"),
    ],
)
async def test_its_result_is_the_last_line_or_the_file(script: str, result: str) -> None:
    assert await call(shell(script)) == result


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (f"head -c {LIMIT + 1} /dev/zero | tr '\\0' x", "the last line of the output has more bytes than the limit"),
        (f"echo 1; head -c {LIMIT + 1} /dev/zero > $STEP_RESULT_FILE", "the file with the result has more bytes"),
        ("printf '\\377\\376'", "the last line of the output is not UTF-8"),
        ("printf '\\377' > $STEP_RESULT_FILE", "the file with the result is not UTF-8"),
        ("ln -s /etc/passwd $STEP_RESULT_FILE", "the file with the result can't be read"),
        ("mkfifo $STEP_RESULT_FILE", "no plain file"),
        ("mkdir $STEP_RESULT_FILE", "no plain file"),
        (
            "printf x > $STEP_RESULT_FILE; chmod 0 $STEP_RESULT_FILE; ln -sf /dev/zero $STEP_RESULT_FILE",
            "can't be read",
        ),
    ],
)
async def test_a_result_that_is_no_text_or_too_large_is_refused(script: str, reason: str, scratch: Path) -> None:
    with pytest.raises(ResultInvalidError, match=reason):
        await call(shell(script))
    assert os.listdir(scratch) == []  # noqa: PTH208


async def test_a_result_as_large_as_the_limit_is_taken() -> None:
    assert await call(shell(f"head -c {LIMIT} /dev/zero | tr '\\0' 7")) == "7" * LIMIT


# Its end


async def test_an_exit_code_fails_the_step_with_the_last_lines() -> None:
    with pytest.raises(CommandFailedError) as caught:
        await call(shell("seq 1 50; echo it is \033[31mbroken >&2; exit 3"))
    first, *others = str(caught.value).split("\n")
    assert first == "the program of command sh has ended with exit code 3. Its last lines:"
    assert len(others) == 20
    assert {*others} >= {"    50", "    it is ␛[31mbroken"}


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("kill -9 $$", "was ended by SIGKILL, and has written nothing"),
        ("exit 127", "has ended with exit code 127"),
        ("exit 100", "has ended with exit code 100"),
    ],
)
async def test_a_program_without_output_fails_with_its_end_alone(script: str, said: str) -> None:
    with pytest.raises(CommandFailedError, match=said):
        await call(shell(script))


async def test_an_exit_code_skips_the_step_and_the_last_line_says_why() -> None:
    skipped = await call(shell("echo nothing new; exit 99"))
    assert isinstance(skipped, Decided)
    assert skipped.outcome == {"skip": True, "note": "nothing new", "cascade": True}
    other = await call(shell("exit 3", skip_exit_code=3))
    assert isinstance(other, Decided)
    with pytest.raises(CommandFailedError, match="exit code 99"):
        await call(shell("exit 99", skip_exit_code=None))


@pytest.mark.parametrize(
    ("binding", "reason"),
    [
        (Command(["no-such-program"]), "the program no-such-program is not here"),
        (Command(["/no/such/program", "--password=hunter2"]), "the program program is not here"),
        (Command(["/etc/passwd"]), "the program passwd is not here, or can't be executed"),
        (Command(["/bin"]), "the program bin is not here, or can't be executed"),
        (Command(["/bin/sh"], cwd="/no/such/place"), "its working directory /no/such/place is no directory"),
        (Command(["/bin/sh"], pass_env=["NO_SUCH_VARIABLE"]), "variable NO_SUCH_VARIABLE is not set here"),
        (
            NamedCommand("stmap"),
            r"no program 'stmap' \(did you mean 'stamp'\?\): they name stamp. Add it to PGFLOW_COMM",
        ),
    ],
)
async def test_what_is_missing_is_named(binding: Command | NamedCommand, reason: str) -> None:
    with pytest.raises(NotRetriableError, match=reason) as caught:
        await call(binding, make_toolbox(stamp=Program(["/bin/true"])))
    assert "hunter2" not in str(caught.value)


async def test_a_file_that_is_no_program_is_named(tmp_path: Path) -> None:
    program = tmp_path / "stamp"
    program.write_text("echo hello")
    program.chmod(0o755)
    with pytest.raises(NotRetriableError, match="a script begins with a line such as #!/bin/sh"):
        await call(Command([str(program)]))
    with pytest.raises(NotRetriableError, match="its arguments and its environment are too large"):
        await call(Command(["/bin/echo", "x" * 10_000_000]))


async def test_a_machine_that_starts_no_process_now_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(command_process, "_start_supervisor", refuse)
    with pytest.raises(RetryLaterError, match="can't be started now"):
        await call(shell("true"))


async def test_a_name_means_the_program_of_the_settings() -> None:
    program = Program(["/bin/sh", "-c", "echo $MODE"], env={"MODE": "fast"})
    assert await call(NamedCommand("stamp"), make_toolbox(stamp=program)) == '"fast"'


# Its input and output


async def test_input_that_is_not_read_does_no_harm() -> None:
    large = CLAIM.model_copy(update={"payload": RawJson(json.dumps("x" * 5_000_000))})
    assert await call(shell("exec 0<&-; echo closed"), claim=large) == '"closed"'
    assert await call(shell("echo unread"), claim=large) == '"unread"'
    assert await call(shell("head -c 3; echo"), claim=large) == '"{\\"p"'


async def test_lines_are_logged_while_it_runs(lines: Lines, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def answer(text: str) -> None:
        if text == "waiting":
            gate.write_text("go\n")  # only a line that came before lets the program go on

    lines.came = answer
    assert await call(shell(f"echo waiting; read line < {gate}; echo $line; echo late >&2")) == '"go"'
    assert sorted(lines.texts) == ["go", "late", "waiting"]


async def test_lines_have_no_control_characters_and_no_secrets(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAMP_TOKEN", "hunter2-stamp\nsecond-line")
    monkeypatch.setenv("PREFECT_API_KEY", "hunter2-prefect")
    monkeypatch.setenv("TOP", "abc")
    script = (
        "printf '\\033[2Jfake\\r\\0\\377\\t|\\n'; echo \"<$STAMP_TOKEN>\"; echo $API_KEY $MODE $TOP hunter2-dsn; "
        "echo hunter2-prefect >&2"
    )
    given = {"API_KEY": "hunter2-api", "MODE": "fast"}
    await call(shell(script, env=given, pass_env=["STAMP_TOKEN", "TOP"]))
    assert sorted(lines.texts) == sorted(
        [
            "␛[2Jfake␍␀\N{REPLACEMENT CHARACTER}\t|",
            "<" + "*" * 13,
            "*" * 11 + ">",
            "*" * 11 + " fast abc " + "*" * 11,
            "*" * 15,
        ]
    )


@pytest.mark.parametrize("before", [LINE_LIMIT - 12, LINE_LIMIT - 5, LINE_LIMIT - 1, LINE_LIMIT])
async def test_a_secret_that_the_end_of_a_line_cuts_is_not_shown(lines: Lines, before: int) -> None:
    script = f"print('x' * {before} + 'hunter2-key' * 3); raise SystemExit(1)"
    with pytest.raises(CommandFailedError) as caught:
        await call(python(script, env={"KEY": "hunter2-key"}))
    assert "h" not in lines.texts[0]
    assert lines.texts[0].endswith(" …")
    assert "hun" not in str(caught.value)


@pytest.mark.thorough
async def test_output_without_end_takes_little_memory_and_few_records(lines: Lines) -> None:
    script = """
import sys
for _ in range(40):
    sys.stdout.write("x" * 1_000_000)
sys.stdout.write("\\n" + "y\\n" * 500_000)
print({"rows": 3}["rows"])
"""
    assert await call(python(script), make_toolbox(LIMIT)) == "3"
    assert sum(map(len, lines.texts)) < LOG_LIMIT + 1_000
    assert len(lines.texts) < 15_000
    assert lines.texts[0] == "x" * LINE_LIMIT + " …"
    assert "its further lines are not logged" in lines.texts[-2]
    assert lines.texts[-1].endswith("further lines of output were not logged")


# Leaving nothing running

WAITS = "echo ready; while :; do sleep 3600; done"
GOES_ON: dict[str, str] = {
    "itself": WAITS,
    "one that ignores SIGTERM": f"trap '' TERM HUP INT; {WAITS}",
    "a child": "sleep 3600 & echo ready; wait",
    "a grandchild that ignores SIGTERM": (
        """sh -c "trap '' TERM; sh -c 'echo ready; sleep 3600; :' & wait; wait" & wait"""
    ),
    "one with a session of its own": """setsid sh -c "trap '' TERM HUP; echo ready; sleep 3600; :" & wait""",
    "one that was let go": "(setsid sh -c 'echo ready; sleep 3600; :' &) ; while :; do sleep 3600; done",
    "one that is stopped": "sh -c 'echo ready; kill -STOP $$' & wait",
    "one that writes without end": "echo ready; yes",
}
"""Programs that go on for ever, of which a signal to the first process does not end all."""


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """A text in the environment of a program, and of all that it starts."""
    monkeypatch.setattr(command_process, "GRACE", 0.2)
    return uuid4().hex


def list_marked(mark: str) -> list[psutil.Process]:
    """Return the processes that run with this mark."""
    found = []
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            if each.environ().get("MARK") == mark and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


@pytest.mark.parametrize("how", GOES_ON)
async def test_a_cancellation_leaves_nothing_running(how: str, lines: Lines, mark: str, scratch: Path) -> None:
    with anyio.CancelScope() as scope:
        lines.came = lambda text: scope.cancel()
        await call(shell(GOES_ON[how], env={"MARK": mark}, pass_env=["PATH"]))
    assert scope.cancelled_caught
    assert list_marked(mark) == []
    assert os.listdir(scratch) == []  # noqa: PTH208


async def test_a_program_has_time_to_end_after_sigterm(lines: Lines, mark: str, tmp_path: Path) -> None:
    command_process.GRACE = 60
    with anyio.CancelScope() as scope:
        lines.came = lambda text: scope.cancel()
        await call(shell(f"trap 'echo tidy > {tmp_path}/said; exit 0' TERM; echo ready; while :; do sleep 0.01; done"))
    assert (tmp_path / "said").read_text() == "tidy\n"


def test_a_program_whose_end_is_asked_for_with_its_order_is_not_started(tmp_path: Path) -> None:
    """As where a step is cancelled before its supervisor has begun to read."""
    launch = Launch("/bin/sh", ["sh", "-c", f"echo started > {tmp_path}/said"], {}, None, str(tmp_path))
    ours, theirs = socket.socketpair()
    with ours, theirs, Path(os.devnull).open("rb") as nothing:
        ours.sendall(launch.write() + b"T")
        supervisor = command_process._start_supervisor(theirs, nothing)
        with supervisor:
            try:
                assert supervisor.wait(TIMEOUT) == 0
            finally:
                supervisor.kill()
    assert not (tmp_path / "said").exists()


@pytest.mark.parametrize("how", ["a child", "one that was let go"])
async def test_its_end_leaves_nothing_running_and_its_result_counts(how: str, mark: str) -> None:
    left = {
        "a child": "sleep 3600 & echo 1",
        "one that was let go": "(setsid sh -c 'trap \"\" TERM HUP; sleep 3600; :' &); echo 1",
    }
    assert await call(shell(left[how], env={"MARK": mark}, pass_env=["PATH"])) == "1"
    assert list_marked(mark) == []


async def test_a_program_that_kills_its_supervisor_fails_and_ends(mark: str) -> None:
    with pytest.raises(CommandFailedError, match="its exit code is not known"):
        await call(shell("kill -9 $PPID; while :; do sleep 3600; done", env={"MARK": mark}, pass_env=["PATH"]))
    await until_none(mark)


WORKER = """
import anyio, sys
from tests.unit.test_command import call, shell
anyio.run(call, shell(sys.argv[1], env={"MARK": sys.argv[2]}, pass_env=["PATH"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives a process what another one leaves behind")
@pytest.mark.parametrize("how", ["itself", "one that was let go", "one that writes without end"])
async def test_the_death_of_the_worker_leaves_nothing_running(how: str, tmp_path: Path) -> None:
    mark, ready = uuid4().hex, tmp_path / "ready"
    os.mkfifo(ready)
    script = GOES_ON[how].replace("echo ready", f"echo ready > {ready}")
    worker = await anyio.open_process(
        [sys.executable, "-c", WORKER, script, mark], env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    with anyio.fail_after(TIMEOUT):
        assert await anyio.Path(ready).read_text() == "ready\n"
        assert list_marked(mark) != []
        worker.send_signal(signal.SIGKILL)
        await worker.wait()
    await until_none(mark)
    with anyio.fail_after(TIMEOUT):
        while any(each.startswith("pgflow-step-") for each in os.listdir(tmp_path)):  # noqa: PTH208
            await anyio.sleep(0.02)


async def until_none(mark: str) -> None:
    with anyio.fail_after(TIMEOUT):
        while list_marked(mark):
            await anyio.sleep(0.02)


def test_an_error_names_no_argument_of_a_program() -> None:
    with pytest.raises(ValidationError) as caught:
        Command(["stamp", "hunter2\0"], env={"A=B": "hunter2"})
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(Command(["stamp", "hunter2"], env={"A": "hunter2"}))
    assert issubclass(CommandFailedError, PgflowPrefectError)
