"""Does a step by a program of this machine. It gets the step's input on stdin, and its last line is the result."""

import errno
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

from pgflow_prefect.bindings import Command, NamedCommand
from pgflow_prefect.errors import CommandFailedError, NotRetriableError, ResultInvalidError, RetryLaterError
from pgflow_prefect.handlers.base import (
    AnyItemContext,
    AnyStepContext,
    RetryPolicy,
    StepExecution,
    Toolbox,
    make_input,
    make_policy,
)
from pgflow_prefect.handlers.command_output import Line, LineSplitter, OutputLog, find_secrets
from pgflow_prefect.handlers.command_process import Launch, NotStartedError, run_program
from pgflow_prefect.handlers.json_text import check_json, write_json
from pgflow_prefect.handlers.outcomes import Decided, Skip
from pgflow_prefect.models import Claim
from pgflow_prefect.programs import Program
from pgflow_prefect.wording import suggest

RESULT_FILE = "STEP_RESULT_FILE"
"""The variable with the path of the file that a program may write its result to."""

_OF_THE_MOMENT = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETXTBSY})


@dataclass(frozen=True)
class CommandHandler:
    """A program that gets the step's input as JSON on stdin.

    Attributes:
        step_slug: the step.
        binding: which program; a row can only name one of the worker's settings.
        toolbox: has these settings, and the limit of results.
    """

    step_slug: str
    binding: Command | NamedCommand
    toolbox: Toolbox

    @property
    def policy(self) -> RetryPolicy:
        """The binding's."""
        return make_policy(self.binding)

    async def execute(self, claim: Claim, upstream: Collection[str], execution: StepExecution) -> str | Decided:
        """Run the program and return its result as JSON text, or that the step is skipped.

        Raises:
            CommandFailedError: it has ended with another exit code than 0, or a signal has ended it.
            RetryLaterError: the machine can't start a program now.
            ResultInvalidError: its result is too large, or no text.
            NotRetriableError: the program, its directory or a variable is missing.
        """
        program, log = find_program(self.binding, self.toolbox.programs), self._make_log(execution.context)
        output = _Output(LineSplitter(self.toolbox.result_limit + 1), LineSplitter(log.kept), log)
        with _make_scratch() as scratch:
            launch = make_launch(program, execution.context, scratch)
            try:
                ended = await run_program(launch, make_input(claim).text.encode(), output.take, output.take_error)
            except OSError as error:
                raise _explain(self._label, program, error) from None
            await output.end()
            if ended is not None and ended == program.skip_exit_code:
                return Decided.to_skip(Skip(output.note or f"{self._label} has ended with exit code {ended}"))
            if ended != 0:
                raise CommandFailedError(f"{self._label} {_describe_end(ended)}{output.describe_tail()}")
            return self._read_result(Path(scratch, _RESULT), output.last)

    @property
    def _label(self) -> str:
        return f"the program of {self.binding}"

    def _make_log(self, context: AnyStepContext[Any]) -> OutputLog:
        program = find_program(self.binding, self.toolbox.programs)
        return OutputLog(context.logger, find_secrets(program.env, program.pass_env, os.environ, self.toolbox.secrets))

    def _read_result(self, file: Path, last: Line | None) -> str:
        limit = self.toolbox.result_limit
        line = last
        if is_written := file.is_symlink() or file.exists():
            line = read_file(file, limit)
        if line is None:
            return "null"
        source = "the file with the result" if is_written else "the last line of the output"
        if line.is_cut or len(line.text) > limit:
            raise ResultInvalidError(
                f"step {self.step_slug!r}: {source} has more bytes than the limit of {limit:,} (PGFLOW_RESULT_LIMIT): "
                "store the result elsewhere, and print its address"
            )
        try:
            text = line.text.decode()
        except UnicodeDecodeError:
            raise ResultInvalidError(
                f"step {self.step_slug!r}: {source} is not UTF-8: end the output with a line of JSON or text, or write "
                f"one to the file that {RESULT_FILE} names"
            ) from None
        return to_json(text)


def to_json(text: str) -> str:
    """Return the JSON text of a result: the text itself if it is JSON, else a JSON string of it."""
    stripped = text.strip()
    if not stripped:
        return "null"
    try:
        return check_json(stripped.encode())
    except ValueError:
        return write_json(stripped)


@dataclass
class _Output:
    """The output of one attempt.

    Attributes:
        stdout: its lines; the last one may be the result.
        stderr: the lines of the other stream.
        log: gets both.
        last: the last line of stdout that is not empty.
    """

    stdout: LineSplitter
    stderr: LineSplitter
    log: OutputLog
    last: Line | None = None

    async def take(self, chunk: bytes) -> None:
        await self.log.show(self._note(self.stdout.feed(chunk)))

    async def take_error(self, chunk: bytes) -> None:
        await self.log.show(self.stderr.feed(chunk))

    async def end(self) -> None:
        await self.log.show(self._note(self.stdout.end()))
        await self.log.show(self.stderr.end())
        self.log.end()

    def _note(self, lines: Iterator[Line]) -> Iterator[Line]:
        for line in lines:
            if line.text.strip():
                self.last = line
            yield line

    @property
    def note(self) -> str | None:
        """The last line of stdout, for people."""
        return self.log.write(self.last, NOTE_LIMIT) if self.last is not None else None

    def describe_tail(self) -> str:
        tail = self.log.describe_tail()
        return f". Its last lines:{tail}" if tail else ", and has written nothing"


NOTE_LIMIT = 500
"""Bytes of a line that says why a step is skipped."""

_RESULT = "result"


def find_program(binding: Command | NamedCommand, programs: Mapping[str, Program]) -> Program:
    """Return the program of a binding.

    Args:
        binding: of Python code, or of a row.
        programs: those of the settings, by name.

    Raises:
        NotRetriableError: the settings do not name it.
    """
    if isinstance(binding, Command):
        return binding.program
    if binding.name in programs:
        return programs[binding.name]
    there = f"they name {', '.join(sorted(programs))}" if programs else "they name none"
    raise NotRetriableError(
        f"the settings of this process name no program {binding.name!r}{suggest(binding.name, programs)}: {there}. "
        "Add it to PGFLOW_COMMANDS where steps are executed"
    )


def find_problems(program: Program) -> Iterator[str]:
    """Yield a sentence for each reason why this process can't start a program."""
    if sys.platform == "win32":
        yield "a step can't be a program on Windows: run the worker on Linux or macOS"
    for name in program.pass_env:
        if name not in os.environ:
            yield f"the environment variable {name} is not set here, and the program is to get it: set it"
    if program.cwd is not None and not Path(program.cwd).is_dir():
        yield f"its working directory {program.cwd} is no directory here"
    elif _find_file(program) is None:
        yield f"the program {program.label} is not here, or can't be executed: install it, or name its path"


def make_launch(program: Program, context: AnyStepContext[Any], scratch: str) -> Launch:
    """Return what is to be started for an attempt of a step.

    Raises:
        NotRetriableError: the program, its directory or a variable is missing.
    """
    if problems := [*find_problems(program)]:
        raise NotRetriableError("; ".join(problems))
    file = _find_file(program)
    assert file is not None
    env = {name: os.fsencode(os.environ[name]) for name in program.pass_env}
    env |= {name: os.fsencode(value) for name, value in program.env.items()}
    env |= {name: value.encode("utf-8", "replace") for name, value in _describe_step(context).items()}
    env[RESULT_FILE] = os.fsencode(Path(scratch, _RESULT))
    return Launch(file, program.argv, env, program.cwd, scratch)


def _describe_step(context: AnyStepContext[Any]) -> Mapping[str, str]:
    named = {
        "STEP_RUN_ID": str(context.run_id),
        "STEP_WORKFLOW": context.workflow_slug,
        "STEP_SLUG": context.step_slug,
        "STEP_ATTEMPT": str(context.attempt),
        "STEP_IDEMPOTENCY_KEY": context.idempotency_key,
    }
    return named | ({"STEP_ITEM_INDEX": str(context.item_index)} if isinstance(context, AnyItemContext) else {})


def _find_file(program: Program) -> str | None:
    """Return the path of a program's file; None if there is none that can be executed."""
    name = program.argv[0]
    if "/" not in name:
        found = shutil.which(name)
        return str(Path(found).absolute()) if found is not None else None
    path = Path(program.cwd or Path.cwd(), name).absolute()
    return str(path) if path.is_file() and os.access(path, os.X_OK) else None


def read_file(file: Path, limit: int) -> Line:
    """Return the content of the file that a program has written, up to a limit in bytes.

    Raises:
        ResultInvalidError: it is no plain file: a link, a pipe or a device could lead anywhere, or never end.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ResultInvalidError(f"the file with the result can't be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ResultInvalidError("the file with the result is no plain file: write the result into it")
    with os.fdopen(descriptor, "rb") as opened:
        text = opened.read(limit + 1)
    return Line(text[:limit], is_cut=len(text) > limit)


@contextmanager
def _make_scratch() -> Iterator[str]:
    """Make a directory that only this user can read, and remove it with the block."""
    scratch = tempfile.mkdtemp(prefix="pgflow-step-")
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _describe_end(ended: int | None) -> str:
    if ended is None:
        return "has ended, and its exit code is not known: its supervisor was killed, or a process of it can't be ended"
    if ended >= 0:
        return f"has ended with exit code {ended}"
    try:
        return f"was ended by {Signals(-ended).name}"
    except ValueError:
        return f"was ended by signal {-ended}"


def _explain(label: str, program: Program, error: OSError) -> NotRetriableError | RetryLaterError:
    """Return the error for a program that was not started, without its arguments."""
    if isinstance(error, NotStartedError) and error.at == "cwd":
        return NotRetriableError(f"{label} can't be started in {program.cwd}: {error.strerror}")
    if error.errno in _OF_THE_MOMENT:
        return RetryLaterError(f"{label} can't be started now: {error.strerror}", None)
    reason = {
        errno.ENOEXEC: "its file is no program: a script begins with a line such as #!/bin/sh",
        errno.E2BIG: "its arguments and its environment are too large",
    }.get(error.errno or 0, error.strerror)
    return NotRetriableError(f"{label} can't be started: {reason}")
