"""What several tests share: the demo model and its sealed copy, made once for this user; the files
of an owner and of users; an enclave as a process of its own.

Models lie in the cache that tools/demo_model.py keeps, under names drawn from what they are made
of.
"""

import collections
import contextlib
import hashlib
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import threading
import time
import types

import muprotocol as mp
import muproxy

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))

import demo_model as demo  # noqa: E402
import enclave as starter  # noqa: E402, F401  for the tests
import measure  # noqa: E402, F401  for the tests
import owner  # noqa: E402

FREE_RATE = 10**9  # bytes a second: a meter that is effectively off
SECONDS = 300  # that anything here may take before it counts as stuck
SEALERS = (
    "tools/seal.py",
    "tools/prompting.py",
    "muprotocol.py",
)  # what decides how a sealed copy looks

# demo: the plaintext directory; model: the .mus file; key: its key file; vocabulary: the table.
Sealed = collections.namedtuple("Sealed", "demo model key vocabulary")


def demo_model(dtype="bfloat16", shards=1):
    """The directory of the demo model, read-only by convention; trained on the first call."""
    return demo.demo_model(dtype, shards)


def sealed_demo(dtype="bfloat16", shards=1):
    """A sealed copy of the demo model and what belongs to it; read-only by convention."""
    source = demo_model(dtype, shards)
    code = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in SEALERS)).hexdigest()

    def make(folder):
        folder.mkdir()
        seal(source, folder / "demo.mus", "--key", folder / "demo.key", "--asset", "demo").check()

    folder = demo.cached(f"sealed-{code[:16]}-{source.name}", make)
    files = [folder / name for name in ("demo.mus", "demo.key", "demo.mus.vocab")]
    return Sealed(source, *files)


class Done:
    """How a program ended: status, out and err (str)."""

    def __init__(self, process):
        self.status = process.returncode
        self.out, self.err = process.stdout, process.stderr

    def check(self):
        """Self, if it ended well. AssertionError."""
        if self.status:
            raise AssertionError(f"exit status {self.status}: {self.err}")
        return self


def seal(*arguments, **options):
    """Run tools/seal.py as an owner does; options go to subprocess.run. Returns Done."""
    command = [sys.executable, "-B", TOOLS / "seal.py", *arguments]
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "cwd": "/"}
    return Done(subprocess.run(list(map(str, command)), **(quiet | options)))


def proxy(*arguments, **options):
    """Run muproxy's command line to its end. Returns the finished process."""
    command = [sys.executable, "-B", "-m", "muproxy", *map(str, arguments)]
    quiet = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": SECONDS}
    return subprocess.run(command, **(quiet | options))


def own(*arguments, **options):
    """Run tools/owner.py to its end. Returns the finished process."""
    command = [sys.executable, "-B", TOOLS / "owner.py", *arguments]
    quiet = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": SECONDS}
    return subprocess.run(list(map(str, command)), **(quiet | options))


def make_site(folder, sealed=None):
    """The files of an owner, a host and two users in a folder, made by the project's own tools.

    model, key, vocabulary; owner_psk, user_psk, token, other, reference: paths. ledger: where one
    is to be, since the key is everybody's.
    """
    sealed = sealed or sealed_demo()
    site = types.SimpleNamespace(**sealed._asdict())
    for name in ("owner_psk", "user_psk", "token", "other"):
        path = folder / name
        setattr(site, name, path)
        done = own("keygen", "psk" if name.endswith("psk") else "token", path)
        assert done.returncode == 0, done.stderr
    site.ledger = folder / "ledger"
    site.reference = folder / "reference.json"
    command = [sys.executable, "-B", TOOLS / "measure.py", "--output", site.reference]
    subprocess.run(command, check=True)
    return site


def until(condition, what="what another process brings about"):
    """Wait for condition() to be true, and return it; AssertionError if it never is."""
    end = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)
    return value


def unlock_token(site, **lease):
    """An unlock token for a site's model, whose lease differs from a generous one in these.

    It is what an owner may send, not what our owner does: no ledger has granted it.
    """
    fields = {"id": secrets.token_hex(16), "sequence": time.time_ns() // 1000}
    fields |= {"rate": FREE_RATE, "burst": 1 << 20, "budget": 10**7, "expiry": 3600}
    users = [mp.token_hash(muproxy.read_token(site.token))]
    fields |= {"users": users, "policy": {"verified": False, "latency_ms": 0, "shape": "plain"}}
    key = owner.read_key_file(site.key, None)[1].hex()
    digest = muproxy.read_container(site.model).digest
    return {"key": key, "model": digest, "lease": fields | lease}


class Enclave:
    """An enclave process on a port of its own; locked until `unlock`. Ends with its `with` block.

    site: its files. code: the directory whose muenclave.py runs. environment: added to ours.
    """

    def __init__(self, site, *flags, code=ROOT, environment=None, prefix=()):
        self.site, self.lines, self.news = site, [], threading.Condition()
        command = [*prefix, sys.executable, "-B", TOOLS / "enclave.py", "--code", code]
        command += ["--port", "0"]
        command += ["--rate", str(FREE_RATE), "--model", site.model]
        command += ["--owner-psk", site.owner_psk, "--user-psk", site.user_psk, *flags]
        self.process = subprocess.Popen(
            list(map(str, command)),
            cwd=code,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()
        self.port = int(self.wait_for("listening").split()[-1])
        self.address = ("127.0.0.1", self.port)

    def _read(self):
        with self.process.stderr as log:
            for line in log:
                with self.news:
                    self.lines.append(line.strip())
                    self.news.notify_all()
        with self.news:
            self.lines.append("(it has ended)")
            self.news.notify_all()

    def wait_for(self, word, after=0, seconds=SECONDS):
        """The first line of the log, from number `after` on, that holds a word. AssertionError."""
        with self.news:
            found = self.news.wait_for(lambda: self._find(word, after), seconds)
            assert found not in (False, "(it has ended)"), f"no {word!r}: it said {self.lines}"
            return found

    def _find(self, word, after):
        ended = self.lines[-1:] == ["(it has ended)"]
        return next((line for line in self.lines[after:] if word in line), ended and self.lines[-1])

    def pids(self):
        """{role: process id} of its processes that are alive."""
        found = {"init": self.process.pid}
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                words = (process / "cmdline").read_bytes().split(b"\0")
                roles = [
                    role for role in ("gate", "loader", "engine") if f"--{role}".encode() in words
                ]
                if parent == self.process.pid and roles:
                    found[roles[0]] = int(process.name)
        return found

    def flags(self, role="user"):
        """The flags by which the proxy's command line reaches and verifies it."""
        psk = self.site.owner_psk if role == "owner" else self.site.user_psk
        flags = ["--port", self.port, "--reference", self.site.reference, "--psk", psk]
        files = ["--key", self.site.key, "--model", self.site.model, "--ledger", self.site.ledger]
        return flags + ([*files, "--development"] if role == "owner" else [])

    def session(self, role="user", inlet=None, **wanted):
        """A verified session that has not proved anything yet; the outer meter is off."""
        psk = self.site.owner_psk if role == "owner" else self.site.user_psk
        inlet = inlet or muproxy.Inlet(FREE_RATE, 1 << 30)
        reference = wanted.pop("reference", muproxy.read_reference(self.site.reference))
        secret = muproxy.read_secret(psk)
        return muproxy.Session(self.address, reference, secret, role, inlet, **wanted)

    def unlock_token(self, **lease):
        """An unlock token whose lease differs from a generous one in these fields."""
        return unlock_token(self.site, **lease)

    def unlock(self, **lease):
        """Unlock it by a session of the owner, wait until it is ready. Returns READY."""
        with contextlib.closing(self.session("owner")) as session:
            return session.prove(self.unlock_token(**lease))

    def ready(self, token=None):
        """A user's session that can take requests; a context manager."""
        session = self.session()
        session.prove({"token": token or muproxy.read_token(self.site.token)})
        return contextlib.closing(session)

    def end(self):
        """Ask it to end, and wait until it has. AssertionError if it does not."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError("the enclave did not end when it was asked to") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.end()
