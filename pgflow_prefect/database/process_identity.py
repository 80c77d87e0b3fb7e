"""Which process holds a run, so that its own machine can tell whether that process is dead."""

import os
import socket
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_PROC = Path("/proc")
_STARTED = 19  # the field "starttime" of /proc/PID/stat, counted from the one after the command's name
_ZOMBIE = b"Z"


class ProcessIdentity(BaseModel):
    """A process on its machine; no two processes ever have all these values.

    Attributes:
        host: the machine's name.
        boot_id: which start of the machine's kernel.
        pid_namespace: in which `pid` counts: containers have their own.
        pid: the process.
        started: ticks from the kernel's start to the process's. A pid may be used again, but not with the same ticks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    host: str = Field(max_length=255)
    boot_id: str = Field(max_length=64)
    pid_namespace: str = Field(max_length=64)
    pid: int = Field(gt=0, lt=2**31)
    started: int = Field(ge=0)

    @property
    def machine(self) -> dict[str, str]:
        """The common values of processes that can look each other up."""
        return {"host": self.host, "boot_id": self.boot_id, "pid_namespace": self.pid_namespace}


def find_identity() -> ProcessIdentity | None:
    """Return the identity of this process; None if the system does not tell it, as outside Linux."""
    try:
        boot_id = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = str((_PROC / "self/ns/pid").readlink())
    except (OSError, UnicodeDecodeError):
        return None
    pid = os.getpid()
    stat = _read_stat(pid)
    if stat is None:
        return None
    return ProcessIdentity(
        host=socket.gethostname()[:255], boot_id=boot_id, pid_namespace=namespace, pid=pid, started=int(stat[_STARTED])
    )


def is_dead(holder: object, here: ProcessIdentity) -> bool:
    """Tell whether a process is known to be dead.

    False says nothing: it lives, runs on another machine, or can't be looked up.

    Args:
        holder: the row's description of the process. Any role that may take runs writes it, so it may be anything.
        here: the identity of this process.
    """
    try:
        found = ProcessIdentity.model_validate(holder)
    except ValidationError:
        return False
    if found.machine != here.machine:
        return False
    try:
        os.kill(found.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # it lives, and belongs to another user
    # A hidden process, as with the mount option hidepid, lives.
    stat = _read_stat(found.pid)
    return stat is not None and (stat[0] == _ZOMBIE or int(stat[_STARTED]) != found.started)


def _read_stat(pid: int) -> list[bytes] | None:
    """Return the kernel's fields of a process, from the state on; the name before may have blanks and brackets."""
    try:
        return (_PROC / str(pid) / "stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return None
