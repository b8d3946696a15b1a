"""The servers of tools/bench.py http: ours, as an operator starts it, and the peers'.

Each is stopped (SIGSTOP) while another has its turn: some of them spin.
"""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import bench_shared as shared
import vm
from bench_contender import CONTEXT, PAGE, ROWS
from environment import ROOT, ToolError, run

STARTING_SECONDS = 300  # imports and a model, on a busy machine
ENDING_SECONDS = 20
FREE_RATE = 10**9  # bytes a second: a meter that is effectively off
BUDGET = 1 << 40  # bytes


class Program:
    """A program that runs until its `end`. environment: added to ours."""

    def __init__(self, name, command, environment=None):
        self.name, self.log = name, tempfile.TemporaryFile()
        # What is set for an enclave here is not for this one.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ENCLAVE_", "MODEL_"))}
        quiet = {"stdin": subprocess.DEVNULL, "stdout": self.log, "stderr": self.log}
        words, told = list(map(str, command)), kept | (environment or {})
        self.process = subprocess.Popen(words, cwd=ROOT, env=told, start_new_session=True, **quiet)

    def check(self):
        """Raise ToolError, with its last line, if it has ended."""
        if self.process.poll() is not None:
            raise ToolError(f"{self.name} ended: {shared.last_line(self.log)}")

    def wait_for(self, pattern):
        """The first group of a line that it says. Raises ToolError if it ends or takes too long."""
        return self.wait(lambda: re.search(pattern, self.said()))[1]

    def said(self):
        """All that it has said."""
        return os.pread(self.log.fileno(), 1 << 24, 0).decode(errors="replace")

    def wait_answer(self, url):
        """Wait until it answers to a GET. Raises ToolError."""
        self.wait(lambda: answers(url))

    def wait(self, condition):
        """What a condition comes to, once that is something. Raises ToolError."""
        until = time.monotonic() + STARTING_SECONDS
        while not (found := condition()):
            self.check()
            if time.monotonic() > until:
                raise ToolError(
                    f"{self.name} does not start; it said: {shared.last_line(self.log)}"
                )
            time.sleep(0.1)
        return found

    def signal(self, number):
        """Send a signal to it and to what it has started."""
        for pid in shared.family(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self):
        """End it, and what it has started."""
        family = shared.family(self.process.pid)
        self.signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in family[1:]:
            if f"{self.process.pid}" == session_of(pid):  # of the same session: still its own
                os.kill(pid, signal.SIGKILL)
        self.log.close()


def session_of(pid):
    """The session of a process, as text; None if it is gone."""
    with contextlib.suppress(OSError, IndexError):
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return text.rpartition(")")[2].split()[3]


def answers(url):
    """Whether a server answers to a GET, whatever it says."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


class Server:
    """One or more programs that serve OpenAI's API at `base`, under `key`, as `model`."""

    key = "none"

    def __init__(self):
        self.programs = []

    def start(self, name, command, environment=None):
        """Start a program of it."""
        self.programs.append(Program(name, command, environment))
        return self.programs[-1]

    def pause(self):
        """Stop it until `resume`."""
        for program in self.programs:
            program.signal(signal.SIGSTOP)

    def resume(self):
        """Let it go on. Raises ToolError if it has ended."""
        for program in self.programs:
            program.check()
            program.signal(signal.SIGCONT)

    def end(self):
        """End it."""
        for program in reversed(self.programs):
            program.end()

    def processes(self):
        """Process ids."""
        return [pid for program in self.programs for pid in shared.family(program.process.pid)]

    def peak_kib(self):
        """The sum of what each of its processes had at most."""
        return sum(shared.status_kib(pid, "VmHWM") or 0 for pid in self.processes())

    def cpu(self):
        """{role: seconds of processor time}; one role for peers."""
        return {"server": sum(map(shared.cpu_seconds, self.processes()))}


# ---------------------------------------------------------------- ours


class Ours(Server):
    """An enclave without a VM, unlocked by the owner's tool at a raised rate, and a proxy."""

    model = "bench"

    def __init__(self, sealed, threads, folder):
        super().__init__()
        self.folder, self.sealed = folder, sealed
        try:
            self.start_all(threads)
        except BaseException:
            self.end()
            raise

    def start_all(self, threads):
        """Measure, make secrets, start, unlock, serve."""
        folder, sealed, python = self.folder, self.sealed, sys.executable
        tools = ROOT / "tools"
        psk = {role: folder / f"{role}.psk" for role in ("owner", "user")}
        token, reference = folder / "token", folder / "reference.json"
        for path in (*psk.values(), token):
            kind = "token" if path == token else "psk"
            self.run("make a secret", tools / "owner.py", "keygen", kind, path)
        self.run("measure this checkout", tools / "measure.py", "--output", reference)
        self.key = token.read_text("ascii").strip()
        flags = ["--model", sealed / "model.mus", "--port", 0, "--rate", FREE_RATE]
        flags += ["--owner-psk", psk["owner"], "--user-psk", psk["user"], "--slots", ROWS]
        flags += ["--sessions", 2 * ROWS, "--context", CONTEXT, "--threads", threads]
        enclave = self.start("the enclave", [python, "-B", tools / "enclave.py", *flags])
        port = enclave.wait_for(r"muenclave: listening (\d+)")
        way = ["--port", port, "--reference", reference]
        lease = ["--budget", BUDGET, "--lifetime-budget", BUDGET, "--rate", FREE_RATE]
        lease += ["--new-ledger", "--ledger", folder / "ledger", "--development"]
        files = ["--key", sealed / "model.key", "--model", sealed / "model.mus"]
        words = [*way, "--psk", psk["owner"], *files, "--token-file", token, *lease]
        self.run("unlock the enclave", tools / "owner.py", "unlock", *words)
        enclave.wait_for("muenclave: (ready)")
        listen = vm.free_port()
        flags = [*way, "--psk", psk["user"], "--vocabulary", sealed / "model.mus.vocab"]
        flags += ["--listen", listen, "--sessions", ROWS + 1, "--rate-kb", FREE_RATE // 1024]
        proxy = self.start("the proxy", [python, "-B", ROOT / "muproxy.py", "serve", *flags])
        proxy.wait_answer(f"http://127.0.0.1:{listen}/health")
        self.base = f"http://127.0.0.1:{listen}/v1"

    def run(self, what, *words):
        """Run one of the project's programs. Raises ToolError."""
        run([sys.executable, "-B", *map(str, words)], f"can't {what}")

    def cpu(self):
        """{role: seconds of processor time} of init, gate, engine, proxy."""
        found = {"proxy": shared.cpu_seconds(self.programs[1].process.pid)}
        for pid in shared.family(self.programs[0].process.pid):
            with contextlib.suppress(OSError):
                words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                roles = [role for role in ("gate", "engine") if f"--{role}".encode() in words]
                role = roles[0] if roles else "init"
                found[role] = found.get(role, 0) + shared.cpu_seconds(pid)
        return found


# ---------------------------------------------------------------- peers


class Transformers(Server):
    """`transformers serve`, with or without continuous batching."""

    def __init__(self, python, model, threads, is_continuous):
        super().__init__()
        port = vm.free_port()
        self.base, self.model = f"http://127.0.0.1:{port}/v1", str(model)
        name = "transformers serve" + is_continuous * " --continuous-batching"
        command = [python.parent / "transformers", "serve", model, "--host", "127.0.0.1"]
        command += ["--port", port, "--device", "cpu", "--dtype", "bfloat16"]
        if is_continuous:  # sized by hand: by itself it takes a minute
            blocks, tokens = 2 * ROWS * CONTEXT // PAGE, ROWS * PAGE // 4
            command += ["--continuous-batching", "--cb-num-blocks", blocks]
            command += ["--cb-max-batch-tokens", tokens]
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        try:
            self.start(name, command, quiet).wait_answer(f"http://127.0.0.1:{port}/health")
        except BaseException:
            self.end()
            raise


class Llama(Server):
    """llama-cpp-python's server: one answer after the other."""

    model = "bench"

    def __init__(self, python, path, threads):
        super().__init__()
        port = vm.free_port()
        self.base = f"http://127.0.0.1:{port}/v1"
        command = [python, "-m", "llama_cpp.server", "--model", path, "--model_alias", "bench"]
        command += ["--host", "127.0.0.1", "--port", port, "--n_ctx", CONTEXT]
        command += ["--n_threads", threads, "--n_threads_batch", threads]
        command += ["--interrupt_requests", "False", "--verbose", "False"]
        try:
            self.start("llama.cpp's server", command).wait_answer(f"{self.base}/models")
        except BaseException:
            self.end()
            raise
