"""Child processes that never outlive the process that started them."""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Account:
    """An unprivileged operating-system user a child runs as."""

    name: str
    uid: int
    gid: int


def _death_signal_setter(death_signal: int) -> Callable[[], None] | None:
    """A function for the child, between fork and exec, that ties its life to its parent's.

    Everything is looked up here, before the fork: afterwards only plain calls are safe.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def tie_to_parent() -> None:
        prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        if os.getppid() != parent:
            # The parent died between fork and prctl: the signal will never come.
            os._exit(1)

    return tie_to_parent


def spawn(
    argv: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    account: Account | None = None,
    death_signal: int = signal.SIGKILL,
    stdin: bytes | None = None,
    keep_stdin: bool = False,
    cwd: Path | None = None,
) -> "subprocess.Popen[bytes]":
    """Starts `argv` in its own session, so that Ctrl-C at the terminal reaches only the supervisor.

    `death_signal` is sent to the child when this process dies (Linux). Call it from the main thread: Linux ties the
    child to the thread that forked it. Output goes to the end of `log`, or nowhere. `stdin` must fit a pipe (64 KiB);
    `keep_stdin` leaves the pipe open for the caller.
    """
    output: int
    if log is None:
        output = subprocess.DEVNULL
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        process = subprocess.Popen(
            [os.fspath(part) for part in argv],
            env=None if env is None else dict(env),
            stdin=subprocess.PIPE if stdin is not None or keep_stdin else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=_death_signal_setter(death_signal),  # noqa: PLW1509 (it takes no lock, see there)
            user=None if account is None else account.uid,
            group=None if account is None else account.gid,
            extra_groups=None if account is None else [],
        )
    finally:
        if log is not None:
            os.close(output)
    if stdin is not None and process.stdin is not None:
        process.stdin.write(stdin)
        process.stdin.close()
    return process


def stop(process: "subprocess.Popen[bytes]", first: int, grace: float) -> int:
    """Sends `first`, waits `grace` seconds, then kills. Returns the exit status."""
    if process.poll() is None:
        process.send_signal(first)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def wait_gone(pid: int, seconds: float) -> bool:
    """Waits until the process `pid` has ended; false when it still runs after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not _runs(pid):
            return True
        time.sleep(0.02)
    return False


def _runs(pid: int) -> bool:
    try:
        # What has ended keeps its number until its parent has asked after it, which some never do.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def raise_file_limit() -> None:
    """Every socket of a person is a file or two of the gateway and of messaging; the default of 1,024 is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1_048_576
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
