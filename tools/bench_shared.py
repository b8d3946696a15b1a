"""What the verbs of tools/bench.py share: rounds and what may be said of them, workers that run
rounds in turn, the peers' virtual environment, memory, the machine.

A figure is what was measured in each round; it is told as the median with the least and the most.
Two contenders are compared round by round, since a machine's other work weighs on both: a ratio is
told only if at least LEAST_ROUNDS rounds agree on it to SPREAD.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile

from environment import ROOT, ToolError, run

sys.path.insert(0, str(ROOT))

SPREAD = 0.25  # (most - least) / median of a ratio's rounds, beyond which it is no figure
BUILD = "CMAKE_ARGS=-DLLAVA_BUILD=OFF"  # of llama.cpp: its models of images are half of it
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
LEAST_ROUNDS = 3  # that a ratio takes: fewer can't disagree


# ---------------------------------------------------------------- rounds


def ratio(ours, theirs):
    """{"ratio", "least", "most", "rounds"} of ours / theirs, two lists with a value a round.

    ratio is None where it can't be told: too few rounds, or rounds that disagree. None if one of
    the lists is missing.
    """
    if not ours or not theirs:
        return None
    values = [our / their for our, their in zip(ours, theirs, strict=True)]
    middle = statistics.median(values)
    is_told = len(values) >= LEAST_ROUNDS and max(values) - min(values) <= SPREAD * middle
    least, most = (round(value, 4) for value in (min(values), max(values)))
    facts = {"ratio": round(middle, 4) if is_told else None, "least": least, "most": most}
    return facts | {"rounds": len(values)}


def tell_ratio(found, unit="×"):
    """A ratio in words: the number, or why there is none."""
    if found is None:
        return "not measured"
    spread = f"{found['least']:.3g} to {found['most']:.3g}"
    if found["ratio"] is not None:
        return f"{found['ratio']:.3g}{unit} ({spread})"
    if found["rounds"] < LEAST_ROUNDS:
        return f"no ratio of fewer than {LEAST_ROUNDS} rounds ({spread})"
    return f"rounds disagree ({spread}): no ratio"


def tell_values(values, form=",.1f", unit=""):
    """Median, least and most of a figure's rounds."""
    if not values:
        return "not measured"
    middle, least, most = (f"{f(values):{form}}" for f in (statistics.median, min, max))
    return f"{middle}{unit} ({least} to {most})"


# ---------------------------------------------------------------- targets


def target(text, found, at_least=None, at_most=None, unit="×"):
    """A line of the table of targets: {"target", "limit", "figure", "verdict"}.

    found: a number, or what `ratio` gives; None if it was not measured. verdict: met, missed by so
    much, not measured, or why the figure can't be told; never a guess.
    """
    sign, limit = (">=", at_least) if at_most is None else ("<=", at_most)
    line = {"target": text, "limit": f"{sign} {limit:,g}{unit}", "figure": None}
    if isinstance(found, dict):
        line["verdict"] = tell_ratio(found, unit)
        found = found["ratio"]
    elif found is None:
        line["verdict"] = "not measured"
    if found is None:
        return line
    is_met = found >= limit if at_most is None else found <= limit
    missed = abs(found - limit) / limit if limit else abs(found)
    return line | {"figure": found, "verdict": "met" if is_met else f"missed by {missed:.0%}"}


def show_targets(lines):
    """Print the table of targets."""
    print("targets:")
    for line in lines:
        figure = "-" if line["figure"] is None else f"{line['figure']:,.3g}"
        limit = f"{figure:>8} ({line['limit']})"
        print(f"  {line['target']:66} {limit:26} {line['verdict']}")


# ---------------------------------------------------------------- programs and packages


def need_modules(*names):
    """Refuse to go on without these packages in this Python. Raises ToolError."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ToolError(f"this Python has no {name}: pip install 'muenclave[test]'")


def peers_python(folder, packages, say):
    """The Python of the virtual environment `folder`, with these packages (NAME==VERSION).

    It is made if the folder is not there; packages that it lacks are installed. ToolError.
    """
    python = pathlib.Path(folder).absolute() / "bin" / "python"
    if not pathlib.Path(folder).exists():
        run([sys.executable, "-m", "venv", str(folder)], f"can't make {folder}")
    if not python.exists() or not (pathlib.Path(folder) / "pyvenv.cfg").exists():
        raise ToolError(f"--peers {folder}: no virtual environment; name a folder to make")
    missing = [package for package in packages if not has_package(python, package)]
    if missing:
        say(f"installing {' '.join(missing)} in {folder}")
        install = ["env", BUILD, str(python), "-m", "pip", "install"]
        install += ["--disable-pip-version-check", *missing]
        run(install, f"--peers {folder}: pip can't install {' '.join(missing)}")
    return python


def has_package(python, package):
    """Whether a Python has this version of a package; NAME[EXTRAS]==VERSION."""
    name, _, version = package.partition("==")
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    command = [str(python), "-c", code, name.partition("[")[0]]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().partition("+")[0] == version


# ---------------------------------------------------------------- huge pages


def huge_pages():
    """The machine's setting of huge pages for files in memory, as the arena is; None if none."""
    with contextlib.suppress(OSError):
        return re.search(r"\[(\w+)\]", HUGE_PAGES.read_text("ascii"))[1]


@contextlib.contextmanager
def as_in_guest(is_wanted):
    """Huge pages for files in memory, as the guest's init has them. Raises ToolError."""
    before = huge_pages()
    if not is_wanted:
        yield
        return
    try:
        HUGE_PAGES.write_text("always")
    except OSError as error:
        raise ToolError(f"--huge-pages: can't write {HUGE_PAGES}: {error.strerror}") from None
    try:
        yield
    finally:
        HUGE_PAGES.write_text(before)


# ---------------------------------------------------------------- workers


class Worker:
    """A process that measures a round for each line of JSON it is given; a context manager.

    command: its words. The first line that it says is what it is. environment: added to ours.
    """

    def __init__(self, name, command, environment=None):
        self.name, self.errors = name, tempfile.TemporaryFile()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        told = os.environ | {"HF_HUB_OFFLINE": "1"} | (environment or {})
        self.process = subprocess.Popen(list(map(str, command)), env=told, **pipes)
        try:
            self.facts = self.read()
        except BaseException:
            self.__exit__()
            raise

    def ask(self, **request):
        """What it answers to a request. Raises ToolError if it has ended."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        return self.read()

    def read(self):
        """Its next line. Raises ToolError with the last thing that it said, if it has ended."""
        line = self.process.stdout.readline()
        if not line:
            raise ToolError(f"{self.name}: {last_line(self.errors)}")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


@contextlib.contextmanager
def leaving_out(name, left_out, say, drop):
    """A peer that fails is left out, whatever it measured before; ours must not fail.

    left_out: gets {name: why}. drop: what ends the peer.
    """
    try:
        yield
    except ToolError as error:
        if name == "muenclave":
            raise
        say(f"left out: {error}")
        left_out[name] = str(error)
        drop()


def last_line(file):
    """The last line that a program has written to a file, for a message."""
    file.seek(0)
    lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")


# ---------------------------------------------------------------- memory and the machine


def status_kib(pid, name):
    """A number of KiB of a process's status: VmHWM, its peak; None if it can't be read."""
    with contextlib.suppress(OSError):
        text = pathlib.Path(f"/proc/{pid}/status").read_text("ascii", errors="replace")
        found = re.search(rf"^{name}:\s+(\d+) kB", text, re.M)
        return int(found[1]) if found else None


def family(pid):
    """A process and what it has started, and so on: process ids."""
    parents = {}
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            words = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            parents.setdefault(int(words[1]), []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def cpu_seconds(pid):
    """Seconds of processor time that a process has taken, 0 if it is gone."""
    with contextlib.suppress(OSError, IndexError):
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace")
        words = text.rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def describe_processor():
    """The processor, and how many of it there are."""
    found = re.search(r"^model name\s*: (.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.M)
    return {"processor": found[1] if found else platform.machine(), "cpus": os.cpu_count()}


def show_machine(figures):
    """Print what the figures were measured on."""
    machine = figures["machine"]
    print(f"{machine['processor']}, {machine['cpus']} CPUs, {figures['rounds']} rounds in turn")
    if "huge_pages" in figures:
        print(f"huge pages for files in memory: {figures['huge_pages']}")
