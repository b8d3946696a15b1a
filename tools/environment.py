"""What the tools share: the project's virtual environment and the system's packages.

Standard library only; runs under the Python that the user has, from 3.10 on.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
OLDEST_PYTHON = (3, 10)
INCLUDES = {"inference": ("inference", "test"), "test": ("test",)}  # extra: extras that hold it


class ToolError(Exception):
    """Something that the tool needs is not there; the text is one line that says what to do."""


def make_venv(extra, say=print):
    """Path of the Python of .venv with the package and this extra installed; ToolError.

    A stamp beside it names what was installed, so that a second call costs nothing.
    """
    if sys.version_info < OLDEST_PYTHON:
        raise ToolError("Python 3.10 or later is needed; this is " + sys.version.split()[0])
    python = VENV / "bin" / "python"
    if any(is_installed(python, held) for held in INCLUDES[extra]):
        return python
    if not runs(python):
        say(f"Creating {VENV.name} with Python {sys.version.split()[0]}")
        command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
        run(command, "can't create .venv (on Debian and Ubuntu: apt-get install python3-venv)")
    say(f"Installing muenclave[{extra}] into {VENV.name}: the first time takes some minutes")
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off"]
    run([*command, "--editable", f"{ROOT}[{extra}]"], "pip can't install the packages")
    stamp_file(extra).write_text(stamp(python), encoding="ascii")
    return python


def stamp_file(extra):
    """Where it is noted that .venv holds this extra."""
    return VENV / f"muenclave-{extra}"


def stamp(python):
    """What .venv was made from: SHA-256 of setup.cfg and the place that Python was asked for at."""
    return hashlib.sha256(bytes(python) + (ROOT / "setup.cfg").read_bytes()).hexdigest()


def is_installed(python, extra):
    """Whether .venv is whole and holds this extra as setup.cfg has it now."""
    file = stamp_file(extra)
    return file.exists() and file.read_text("ascii") == stamp(python) and runs(python)


def runs(python):
    """Whether there is a Python here that still works, and is not too old."""
    code = f"import sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"
    return python.exists() and subprocess.run([python, "-c", code], check=False).returncode == 0


def run(command, failure):
    """Run a command quietly. Raises ToolError with the failure and its last line of output."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
    )
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
        raise ToolError(f"{failure}: {errors[-1]}")


def write_document(path, tool, content):
    """Write what a tool measured as JSON, for tools/report.py: to a file, or if - to stdout.

    A path of None writes nothing. The file is whole or not there. Raises ToolError.
    """
    if path is None:
        return
    text = json.dumps({"tool": tool, "version": 1, **content}, indent=1) + "\n"
    if path == "-":
        print(text, end="")
        return
    draft = pathlib.Path(f"{path}.new")
    try:
        draft.write_text(text, "utf-8")
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise ToolError(f"can't write {path}: {error.strerror}") from None


def install_system(programs, say=print):
    """Have these programs ({name or file: package}) on the machine: by apt where that works.

    Otherwise they are named in one line, and whoever needs them has to do without.
    """
    missing = missing_packages(programs)
    if not missing:
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        say(f"Installing by apt: {' '.join(missing)}")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
        for command in (["apt-get", "update"], install):
            done = subprocess.run(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            if done.returncode:
                say(f"{' '.join(command)} failed: {done.stderr.decode(errors='replace').strip()}")
                break
    left = missing_packages(programs)
    if left:
        say(f"Not installed, so what needs it is left out: apt-get install {' '.join(left)}")


def missing_packages(programs):
    """The packages of those programs, or files by absolute path, that are not there; sorted."""
    missing = set()
    for name, package in programs.items():
        is_here = os.path.exists(name) if os.path.isabs(name) else shutil.which(name)
        if not is_here:
            missing.add(package)
    return sorted(missing)
