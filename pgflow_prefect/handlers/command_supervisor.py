"""Starts one program, and ends with it and with everything that it has started. A process of its own runs this file.

The worker can't do this itself. If a signal kills the worker, only its kernel and another process are left to end the
program, and the next owner of the run starts the program again. This process notices the worker's death. On Linux, it
also becomes the parent of what the program leaves behind, so a process that leaves the program's group does not escape.

It imports nothing of the package, and has few imports: it starts for every program.

The worker sends one line of JSON over the socket whose number is the first argument: `{"program", "argv", "env", "cwd",
"grace", "scratch"}`. Texts stand for bytes, as Latin-1. One more byte asks for the end: SIGTERM, and SIGKILL after
`grace` seconds. If the socket closes, the worker is dead: SIGKILL at once. The answers are lines of JSON: `{"pid"}`;
then `{"refused", "at"}` with the errno, or `{"started"}`; at last `{"ended", "clean"}` with the exit code, or with a
signal's number below zero.
"""

# pathlib takes as long to import as all the rest
# ruff: noqa: PTH110, PTH123, PTH208

import contextlib
import errno
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_INTERVAL = 1.0  # seconds between two looks at the parent, which a forked copy of the worker's socket may hide
_ENDING = 10.0  # seconds for processes to go after SIGKILL; one that hangs in the kernel may not
_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # of Linux's prctl


def main() -> None:
    """Do it."""
    link = socket.socket(fileno=int(sys.argv[1]))
    link.set_inheritable(False)
    for each in _IGNORED:
        signal.signal(each, signal.SIG_IGN)  # the worker decides when the program ends
    order = _read_order(link)
    if order is None:
        return
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the mask of the worker's thread
    wake, waker = _make_pipe()
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    control = _find_prctl()
    control(_SET_CHILD_SUBREAPER, 1)
    program = _start(order, link, control)
    if program is not None:
        _supervise(program, order, link, wake)


def _make_pipe() -> tuple[int, int]:
    ends = os.pipe()
    for each in ends:
        os.set_blocking(each, False)
    return ends


def _read_order(link: socket.socket) -> dict[str, Any] | None:
    """Return what is to be started; None if the worker has died or has taken the order back."""
    received = bytearray()
    while b"\n" not in received:
        part = link.recv(1 << 16)
        if not part:  # the worker has died
            return None
        received += part
    line, _, rest = received.partition(b"\n")
    if rest:  # the worker already asks for the end
        return None
    order: dict[str, Any] = json.loads(line)
    return order


def _find_prctl() -> Callable[[int, int], object]:
    """Return Linux's prctl; where there is none, a function that does nothing."""
    if sys.platform != "linux":
        return lambda option, value: None
    try:
        import ctypes  # noqa: PLC0415  not everywhere

        call = ctypes.CDLL(None, use_errno=True).prctl
    except (ImportError, OSError, AttributeError):
        return lambda option, value: None
    return lambda option, value: call(option, value, 0, 0, 0)


def _start(order: dict[str, Any], link: socket.socket, control: Callable[[int, int], object]) -> int | None:
    """Start the program in a session of its own, and return its id; None if it can't be started."""
    told, tell = os.pipe()  # closed by a successful exec
    held, release = os.pipe()  # a program may kill its supervisor at once: first, the worker gets to know its id
    supervisor, program = os.getpid(), os.fork()
    if program == 0:
        os.close(release)
        control(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if not os.read(held, 1) or os.getppid() != supervisor:
            os._exit(127)
        _become(order, tell)
    _say(link, pid=program)
    os.write(release, b".")
    for each in (tell, held, release):
        os.close(each)
    with os.fdopen(told, "rb") as answer:
        refusal = answer.read().decode()
    if not refusal:
        _say(link, started=True)
        return program
    os.waitpid(program, 0)
    place, _, number = refusal.partition(" ")
    _say(link, refused=int(number), at=place)
    return None


def _become(order: dict[str, Any], tell: int) -> None:
    """Become the program, in the forked process."""
    place = "start"
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for each in (*_IGNORED, signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(each, signal.SIG_DFL)
        if order["cwd"] is not None:
            place = "cwd"
            os.chdir(_encode(order["cwd"]))
            place = "start"
        argv = [_encode(each) for each in order["argv"]]
        env = {_encode(name): _encode(value) for name, value in order["env"].items()}
        os.execve(_encode(order["program"]), argv, env)  # noqa: S606
    except OSError as error:
        os.write(tell, f"{place} {error.errno}".encode())
    finally:
        os._exit(127)


def _encode(text: str) -> bytes:
    return text.encode("latin-1")


def _supervise(program: int, order: dict[str, Any], link: socket.socket, wake: int) -> None:
    """Wait for the end of the program, or for the worker's wish, and leave nothing running."""
    parent = int(sys.argv[2])
    deadline: float | None = None
    is_alone = False
    while (ended := _reap(program)) is None and not is_alone:
        left = _INTERVAL if deadline is None else min(_INTERVAL, deadline - time.monotonic())
        if left <= 0:
            break
        asked = link.fileno()
        ready, _, _ = select.select([wake, asked] if deadline is None else [wake], [], [], left)
        if wake in ready:
            _empty(wake)
        is_alone = os.getppid() != parent or (asked in ready and not _receive(link))
        if asked in ready and not is_alone:
            deadline = time.monotonic() + order["grace"]
            _signal_all(program, signal.SIGTERM)
    ended, is_clean = _end_all(program, ended)
    if is_alone or not _say(link, ended=ended, clean=is_clean):
        import shutil  # noqa: PLC0415  slow to import

        shutil.rmtree(order["scratch"], ignore_errors=True)


def _receive(link: socket.socket) -> bytes:
    try:
        return link.recv(1)
    except OSError:  # reset: the worker has died
        return b""


def _empty(wake: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(wake, 4096):
            pass


def _reap(program: int) -> int | None:
    """Collect the processes that have ended; return how the program has, None while it goes on."""
    ended: int | None = None
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if found[0] == program:
                ended = os.waitstatus_to_exitcode(found[1])
    return ended


def _end_all(program: int, ended: int | None) -> tuple[int | None, bool]:
    """Kill the program and what it has started; return how the program has ended, and whether nothing is left."""
    give_up = time.monotonic() + _ENDING
    while True:
        _signal_all(program, signal.SIGKILL)
        reaped = _reap(program)
        ended = reaped if ended is None else ended
        if ended is not None and not _list_descendants():
            return ended, sys.platform == "linux" and os.path.exists("/proc/self/stat")
        if time.monotonic() >= give_up:
            return ended, False
        time.sleep(0.002)


def _signal_all(program: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(program, number)
    for each in _list_descendants():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(each, number)


def _list_descendants() -> list[int]:
    """Return the processes below this one, whatever group or session they are in; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for each, parent in _list_processes():
        children.setdefault(parent, []).append(each)
    found = children.get(os.getpid(), [])
    for each in found:  # it grows meanwhile
        found += children.get(each, ())
    return found


def _list_processes() -> Iterator[tuple[int, int]]:
    """Yield the id of each process, and that of its parent."""
    try:
        names = [each for each in os.listdir("/proc") if each.isdecimal()]
    except OSError:
        return
    for name in names:
        try:
            with open(f"/proc/{name}/stat", "rb") as stat:
                fields = stat.read().rpartition(b")")[2].split()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESRCH, errno.EACCES):
                raise
            continue
        yield int(name), int(fields[1])


def _say(link: socket.socket, **said: object) -> bool:
    """Tell the worker; return whether it is there."""
    try:
        link.sendall(json.dumps(said).encode() + b"\n")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
