"""The launcher, in a copy of the repository whose requirements are empty, so that nothing is downloaded."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
GROUPS = ("installer", "runtime", "test", "lint")
SAYS_WHAT_IT_GOT = """
import os, sys
print("started", os.getpid(), sys.prefix, *sys.argv[1:], sep="|")
"""


@pytest.fixture
def copy() -> Iterator[Path]:
    base = Path(tempfile.mkdtemp(prefix="whispr launcher "))
    root = base / "a folder with spaces"
    (root / "src" / "whispr" / "cli").mkdir(parents=True)
    (root / "requirements").mkdir()
    shutil.copy(REPOSITORY / "whispr", root / "whispr")
    shutil.copy(
        REPOSITORY / "src" / "whispr" / "cli" / "install.py", root / "src" / "whispr" / "cli" / "install.py"
    )
    (root / "src" / "whispr" / "__init__.py").touch()
    (root / "src" / "whispr" / "__main__.py").write_text(SAYS_WHAT_IT_GOT)
    for group in GROUPS:
        (root / "requirements" / f"{group}.txt").write_text(f"# nothing for {group}\n")
    yield root
    base.chmod(0o755)
    shutil.rmtree(base, ignore_errors=True)


def launch(
    command: Path | str, *arguments: str, cwd: Path | None = None, **environment: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(command), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        env={**os.environ, "WHISPR_PYTHON": sys.executable, **environment},
    )


def started(outcome: "subprocess.CompletedProcess[str]") -> list[str]:
    assert outcome.returncode == 0, outcome.stderr
    line = outcome.stdout.strip().splitlines()[-1]
    assert line.startswith("started|")
    return line.split("|")[2:]


def test_the_first_start_installs_and_the_second_only_starts(copy: Path) -> None:
    first = launch(copy / "whispr", "up", "--data", "my data")
    assert started(first) == [str(copy / ".venv"), "up", "--data", "my data"]
    assert "installing" in first.stderr
    began = time.monotonic()
    second = launch(copy / "whispr", "status")
    assert started(second)[1:] == ["status"]
    assert second.stderr == ""
    # Far above what it takes, far below what any installation takes.
    assert time.monotonic() - began < 5


def test_it_works_from_any_folder_and_through_a_link(copy: Path, tmp_path: Path) -> None:
    started(launch(copy / "whispr"))
    (tmp_path / "to").symlink_to(copy / "whispr")
    (tmp_path / "link").symlink_to("to")
    assert started(launch(tmp_path / "link", "doctor", cwd=tmp_path)) == [str(copy / ".venv"), "doctor"]
    assert started(launch("./whispr", cwd=copy)) == [str(copy / ".venv")]


def test_changed_requirements_are_installed_again(copy: Path) -> None:
    started(launch(copy / "whispr"))
    (copy / "requirements" / "runtime.txt").write_text("# something else\n")
    assert "installing" in launch(copy / "whispr").stderr
    assert launch(copy / "whispr").stderr == ""


def test_only_tests_and_checks_install_more_than_the_runtime(copy: Path) -> None:
    assert "(runtime)" in launch(copy / "whispr", "up").stderr
    assert "(test)" in launch(copy / "whispr", "test").stderr
    assert "(lint)" in launch(copy / "whispr", "check").stderr
    assert launch(copy / "whispr", "test").stderr == ""


def test_starts_at_the_same_time_install_once(copy: Path) -> None:
    environment = {**os.environ, "WHISPR_PYTHON": sys.executable}
    both = [
        subprocess.Popen(
            [str(copy / "whispr")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("installing 0 packages" in complaints for _, complaints in outputs) == 1


def test_a_moved_repository_is_set_right(copy: Path) -> None:
    started(launch(copy / "whispr"))
    moved = copy.with_name("moved")
    copy.rename(moved)
    assert started(launch(moved / "whispr")) == [str(moved / ".venv")]
    paths = [path.read_text().strip() for path in moved.glob(".venv/lib/python*/site-packages/whispr.pth")]
    assert paths == [str(moved / "src")]


def test_a_broken_environment_is_made_anew(copy: Path) -> None:
    started(launch(copy / "whispr"))
    python = copy / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nonexistent/python")
    again = launch(copy / "whispr")
    assert "making" in again.stderr
    started(again)


def test_no_python_is_told(copy: Path, tmp_path: Path) -> None:
    for tool in ("sh", "dirname", "readlink", "cksum"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or f"/usr/bin/{tool}")
    outcome = launch(copy / "whispr", PATH=str(tmp_path), WHISPR_PYTHON="")
    assert outcome.returncode == 69
    assert "needs Python 3.11 or newer" in outcome.stderr


def test_requirements_that_cannot_be_had_are_told(copy: Path) -> None:
    (copy / "requirements" / "runtime.txt").write_text(f"nosuchpackage==1.0 --hash=sha256:{'0' * 64}\n")
    outcome = launch(
        copy / "whispr", PIP_NO_INDEX="1", UV_OFFLINE="1", PIP_FIND_LINKS="", UV_NO_INDEX="1", PIP_RETRIES="0"
    )
    assert outcome.returncode == 69
    assert "could not be installed" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not (copy / ".venv" / ".whispr-runtime").exists()


def test_a_folder_that_may_not_be_written_is_told(copy: Path) -> None:
    copy.parent.chmod(0o755)
    copy.chmod(0o555)
    user = "nobody" if os.geteuid() == 0 else None
    python = "/usr/bin/python3" if user else sys.executable
    if (
        user
        and subprocess.run(
            [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], check=False
        ).returncode
    ):
        pytest.skip("no system-wide Python 3.11 that another user can run")
    outcome = subprocess.run(
        [str(copy / "whispr")],
        capture_output=True,
        text=True,
        check=False,
        user=user,
        cwd="/",
        env={**os.environ, "WHISPR_PYTHON": python},
    )
    assert outcome.returncode == 69
    assert "may not write" in outcome.stderr
    copy.chmod(0o755)
    started(launch(copy / "whispr"))
    copy.chmod(0o555)
    assert started(launch(copy / "whispr")) == [str(copy / ".venv")], "once installed it only reads"


def test_the_launcher_is_plain_shell() -> None:
    launcher = REPOSITORY / "whispr"
    assert stat.S_IMODE(launcher.stat().st_mode) & 0o111
    assert launcher.read_text().startswith("#!/bin/sh\n")
    assert subprocess.run(["sh", "-n", str(launcher)], check=False).returncode == 0
