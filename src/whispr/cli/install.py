"""Makes .venv and installs the pinned requirements. Run by the launcher, as a file, before anything is installed:
it uses nothing but the standard library.

Usage: install.py ROOT "GROUP GROUP …"
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNUSABLE = 69
FAILED = 70


class InstallError(Exception):
    """What to tell the person at the terminal."""


def say(text: str) -> None:
    sys.stderr.write(f"whispr: {text}\n")
    sys.stderr.flush()


def marker(root: Path, group: str) -> str:
    """What the launcher expects to read once `group` is installed: the output of cksum(1), and the folder."""
    with (root / "requirements" / f"{group}.txt").open("rb") as file:
        return (
            subprocess.run(["cksum"], stdin=file, capture_output=True, text=True, check=True).stdout.strip()
            + f" {root}"
        )


def is_installed(root: Path, group: str) -> bool:
    try:
        return (root / ".venv" / f".whispr-{group}").read_text().strip() == marker(root, group)
    except OSError:
        return False


@contextmanager
def lock(root: Path) -> Iterator[None]:
    """Keeps two first starts apart. The kernel lets go of it when its holder dies, however it dies."""
    try:
        descriptor = os.open(root, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another start is installing; waiting for it …")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise InstallError(f"cannot use {root}: {error.strerror}.") from error
    try:
        yield
    finally:
        os.close(descriptor)


def works(python: Path) -> bool:
    if not python.exists():
        return False
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


def make_environment(folder: Path) -> None:
    say(f"making {folder} with Python {sys.version.split()[0]} …")
    venv.EnvBuilder(clear=True, symlinks=True, with_pip=False).create(folder)


def requirement_files(root: Path, groups: list[str]) -> list[str]:
    return [part for group in groups for part in ("-r", str(root / "requirements" / f"{group}.txt"))]


def count(root: Path, groups: list[str]) -> int:
    lines = (
        line for group in groups for line in (root / "requirements" / f"{group}.txt").read_text().splitlines()
    )
    return sum("==" in line for line in lines)


def find_uv(root: Path, python: Path) -> str | None:
    """The machine's uv, or one that pip puts into the environment; None when neither can be had."""
    inside = python.parent / "uv"
    found = shutil.which("uv") or (str(inside) if inside.exists() else None)
    if found is not None:
        return found
    command = [*pip_command(python), "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--require-hashes", "--only-binary", ":all:", *requirement_files(root, ["installer"])]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    return str(inside) if outcome.returncode == 0 and inside.exists() else None


def install_with_uv(root: Path, groups: list[str], python: Path) -> bool:
    uv = find_uv(root, python)
    if uv is None:
        return False
    command = [uv, "pip", "install", "--python", str(python), "--require-hashes", "--only-binary", ":all:"]
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    environment = {**package_index(), **system_certificates(), **os.environ}
    outcome = subprocess.run(
        [*command, *quiet, *requirement_files(root, groups)], env=environment, check=False
    )
    if outcome.returncode == 0:
        return True
    say("uv could not install; trying pip.")
    return False


def system_certificates() -> dict[str, str]:
    """Lets uv trust whom this machine trusts, as pip does: a company's proxy has a certificate of its own."""
    store = Path("/etc/ssl/certs/ca-certificates.crt")
    return {"UV_SYSTEM_CERTS": "1"} if store.exists() or sys.platform == "darwin" else {}


def package_index() -> dict[str, str]:
    """The package index that pip is told to use on this machine, as uv wants to be told: uv does not read pip's."""
    index = os.environ.get("PIP_INDEX_URL")
    if not index:
        asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
        index = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return {"UV_DEFAULT_INDEX": index} if index else {}


def pip_command(python: Path) -> list[str]:
    """How to call pip for `python`: its own, or the one of the Python that runs this."""
    own = [str(python), "-m", "pip"]
    if subprocess.run([*own, "--version"], capture_output=True, check=False).returncode == 0:
        return own
    bundled = [str(python), "-m", "ensurepip", "--default-pip"]
    if subprocess.run(bundled, capture_output=True, check=False).returncode == 0:
        return own
    outside = [sys.executable, "-m", "pip", "--python", str(python)]
    if subprocess.run([*outside, "--version"], capture_output=True, check=False).returncode == 0:
        return outside
    raise InstallError(
        f"{sys.executable} has no pip. Install it (Debian: apt install python3-venv python3-pip), or install uv."
    )


def install_with_pip(root: Path, groups: list[str], python: Path) -> None:
    total = count(root, groups)
    command = [
        *pip_command(python),
        "install",
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar",
        "off",
    ]
    command += ["--require-hashes", "--only-binary", ":all:", *requirement_files(root, groups)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen, told = 0, 0.0
    last: list[str] = []
    for line in process.stdout or ():
        last = [*last[-30:], line]
        seen += line.startswith(("Collecting ", "Requirement already satisfied"))
        if time.monotonic() - told > (0.2 if sys.stderr.isatty() else 5.0):
            told = time.monotonic()
            sys.stderr.write(
                f"\rwhispr: {min(seen, total)} of {total} packages" + ("" if sys.stderr.isatty() else "\n")
            )
            sys.stderr.flush()
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    if process.wait() != 0:
        sys.stderr.writelines(last)
        raise InstallError(
            "the requirements could not be installed; the reason stands above. Run the command again."
        )


def add_sources(root: Path, python: Path) -> None:
    """Puts src/ on the path of the environment. A .pth file needs neither a build nor the network."""
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    (Path(found) / "whispr.pth").write_text(f"{root / 'src'}\n")


def install(root: Path, groups: list[str]) -> None:
    folder = root / ".venv"
    writable = folder if folder.exists() else root
    if not os.access(writable, os.W_OK | os.X_OK):
        raise InstallError(
            f"may not write to {writable}, where the requirements belong. "
            "Let the owner of the folder run this once, or clone the repository to a folder of your own."
        )
    with lock(root):
        missing = [group for group in groups if not is_installed(root, group)]
        python = folder / "bin" / "python"
        if not works(python):
            make_environment(folder)
            missing = groups
        if not missing:
            return
        started = time.monotonic()
        say(
            f"installing {count(root, missing)} packages ({', '.join(missing)}); only the first start does this …"
        )
        if not install_with_uv(root, missing, python):
            install_with_pip(root, missing, python)
        add_sources(root, python)
        for group in missing:
            (folder / f".whispr-{group}").write_text(marker(root, group) + "\n")
        say(f"installed in {time.monotonic() - started:.0f} s.")


def main() -> int:
    root, groups = Path(sys.argv[1]), sys.argv[2].split()
    try:
        install(root, groups)
    except InstallError as error:
        say(str(error))
        return UNUSABLE
    except (OSError, subprocess.SubprocessError) as error:
        say(f"could not install: {error}")
        return FAILED
    except KeyboardInterrupt:
        say("stopped; the next start goes on from here.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
