"""The guest as tests have it: an image of one's own making, run by tools/vm.py."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import muenclave
from tests import support

sys.path.insert(0, str(support.TOOLS))

import environment  # noqa: E402
import image  # noqa: E402
import vm  # noqa: E402

# All that a guest's serial port may show: the firmware's lines, then the gate's vocabulary.
FIRMWARE_LINE = r"(?:\x1b\[[0-9;=]*\w)*|.*BdsDxe: (?:loading|starting) Boot[0-9A-F]{4} .*"
GUEST_LINE = "|".join(f"muenclave: {line}(?: [0-9]+)?" for line in (*muenclave.LOG, "stopped"))
CONSOLE = re.compile(rf"\A(?:{FIRMWARE_LINE}|{GUEST_LINE})\Z")
SECONDS = 600  # that a boot may take under TCG on a busy machine
MISSING = environment.missing_packages(image.PROGRAMS | vm.PROGRAMS)
# Flags of the product's image, as several tests have it: torch's disk is not what they look at.
PRODUCT = ("--no-extras", "--microvm")
CONFIG = """MODEL_PATH=/dev/vda
ENCLAVE_BIND=0.0.0.0
ENCLAVE_CONFINEMENT=full
ENCLAVE_EVIDENCE=psk
ENCLAVE_OWNER_PSK=/etc/muenclave/owner.psk
ENCLAVE_USER_PSK=/etc/muenclave/user.psk
"""


def overlay(folder, site, **files):
    """Make what a test build adds to the root: settings for evidence psk, secrets, more files."""
    (folder / "etc" / "muenclave").mkdir(parents=True)
    (folder / "etc" / "muenclave.conf").write_text(CONFIG)
    for role in ("owner", "user"):
        secret = getattr(site, f"{role}_psk").read_bytes()
        (folder / "etc" / "muenclave" / f"{role}.psk").write_bytes(secret)
    (folder / "usr/lib/muenclave").mkdir(parents=True)
    for name, content in files.items():
        (folder / "usr/lib/muenclave" / name.replace("__", ".")).write_bytes(content)
    return folder


def build(output, *flags):
    """Run tools/image.py image; the cache makes the second time quick. Returns the folder.

    An image with an overlay is of this run alone: the user's cache does not keep it.
    """
    command = [sys.executable, support.TOOLS / "image.py", "image", "--output", output, *flags]
    shared = ("packages", "linux-*", "kernel-*", "extras-*", "lock")
    with another_cache(*shared) if "--overlay" in flags else contextlib.nullcontext() as cache:
        done = subprocess.run(list(map(str, command)), env=cache, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


class Guest:
    """A running guest; its `with` block ends it. lines: of its serial port, and of tools/vm.py."""

    def __init__(self, folder, weights, *flags):
        self.lines, self.news, self.port = [], threading.Condition(), None
        command = [sys.executable, support.TOOLS / "vm.py", "run", "--print-console"]
        command += ["--image", folder, "--weights", weights, "--memory", "1024", *flags]
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        with self.process.stdout as lines:
            for line in lines:
                with self.news:
                    self.lines.append(line.strip())
                    self.news.notify_all()
        with self.news:
            self.lines.append("(it has ended)")
            self.news.notify_all()

    def wait_for(self, word, seconds=SECONDS):
        """The first line that holds a word. AssertionError."""
        with self.news:
            found = self.news.wait_for(lambda: self._find(word), seconds)
            assert found not in (None, "(it has ended)"), f"no {word!r}: it said {self.lines}"
            return found

    def _find(self, word):
        ended = self.lines[-1:] == ["(it has ended)"]
        return next(
            (line for line in self.lines if word in line), "(it has ended)" if ended else None
        )

    def count_for(self, line, count):
        """Whether a line is said so many times, in time."""
        with self.news:
            return self.news.wait_for(lambda: self.lines.count(line) >= count, SECONDS)

    def listen(self):
        """Wait until it listens; returns the port of 127.0.0.1."""
        self.port = int(self.wait_for("the guest listens on").rpartition(":")[2])
        self.wait_for("muenclave: locked")
        return self.port

    def children(self):
        """{name of the program: process id} of what tools/vm.py has started."""
        found = {}
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                stat = (process / "stat").read_text()
                if int(stat.rpartition(")")[2].split()[1]) == self.process.pid:
                    found[stat.split("(")[1].split(")")[0]] = int(process.name)
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise


def enter(case, context):
    """Enter a context for the time of a test class (enterClassContext, which 3.10 has not)."""
    value = context.__enter__()
    case.addClassCleanup(context.__exit__, None, None, None)
    return value


@contextlib.contextmanager
def another_cache(*shared):
    """A cache folder of its own that shares only these patterns with the user's."""
    old = image.demo_model.cache_folder()
    with tempfile.TemporaryDirectory() as folder:
        new = pathlib.Path(folder, "muenclave")
        new.mkdir()
        for pattern in shared:
            for path in old.glob(pattern):
                (new / path.name).symlink_to(path)
        yield os.environ | {"XDG_CACHE_HOME": folder}


def wait_until(condition, seconds=20):
    """Whether a condition comes true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
