"""From a fresh clone to an answer out of the enclave: python3 tools/quickstart.py "a prompt".

Makes .venv, trains and caches a small demo model, seals it, starts the enclave, verifies it,
unlocks it with an explicit budget, answers the prompt, and chats if there is a terminal. What it
makes lies in .venv, in .quickstart and, for the model, in the user's cache; what it starts, it
ends. Standard library only.
"""

import argparse
import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading

import environment
from environment import ROOT, ToolError

STATE = ROOT / ".quickstart"
DEMO, SEALED, KEY = STATE / "demo", STATE / "demo.mus", STATE / "demo.key"
OWNER_PSK, USER_PSK, TOKEN = STATE / "owner.psk", STATE / "user.psk", STATE / "token"
REFERENCE, VOCABULARY = STATE / "reference.json", STATE / "demo.mus.vocab"
LOG = STATE / "enclave.log"
ASSET = "demo"
BUDGET = 64 << 10  # bytes the engine may choose: a hundred answers, a thirtieth of the demo model
RATE = 5120  # bytes a second
EXPIRY = 24 * 3600  # seconds
STARTING_SECONDS = 120
ENDING_SECONDS = 10
PROMPT = "Tell me about zen."
API_PORT = 8080
STEPS = 8


class Enclave:
    """A running enclave. Its log goes to LOG, and line by line to whoever waits for one."""

    def __init__(self, python):
        command = [python, "-B", ROOT / "tools" / "enclave.py", "--model", SEALED, "--port", "0"]
        command += ["--owner-psk", OWNER_PSK, "--user-psk", USER_PSK, "--rate", str(RATE)]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("ENCLAVE_", "MODEL_"))}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=clean,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is ours: the enclave is ended in order
        )
        self.lines = queue.Queue()
        threading.Thread(target=self.read_log, daemon=True).start()

    def read_log(self):
        """Copy the log until the enclave ends; then None."""
        with LOG.open("w", encoding="utf-8") as file:
            for line in self.process.stderr:
                file.write(line)
                file.flush()
                self.lines.put(line.strip())
        self.lines.put(None)

    def wait_for(self, start):
        """The rest of the first line that starts so. Raises ToolError if the enclave ends first."""
        last = "it said nothing"
        while True:
            try:
                line = self.lines.get(timeout=STARTING_SECONDS)
            except queue.Empty:
                raise ToolError(f"the enclave is stuck; see {LOG}") from None
            if line is None:
                raise ToolError(f"the enclave ended: {last}")
            if line.startswith(start):
                return line.removeprefix(start).strip()
            last = line

    def end(self):
        """Ask it to end; a second time if its answers take long; then make it."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        for ask in (self.process.terminate, self.process.terminate, self.process.kill):
            ask()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(ENDING_SECONDS)
                return


def tell(number, text):
    """What a step does, in one line."""
    print(f"[{number}/{STEPS}] {text}", flush=True)


def run(python, *arguments, failure):
    """Run one of the project's programs quietly. Raises ToolError with its last line."""
    environment.run([python, *map(str, arguments)], failure)


def prepare(python):
    """Steps 2 to 5: model, sealed model, secrets, reference values; what is there is kept."""
    tools = ROOT / "tools"
    is_new = not (DEMO / "config.json").exists()
    tell(2, f"Demo model: {'training one, about a minute' if is_new else 'cached'} ({DEMO})")
    run(python, tools / "demo_model.py", DEMO, failure="can't train the demo model")
    if is_older(SEALED, DEMO) or not (KEY.exists() and VOCABULARY.exists()):
        tell(3, f"Sealing it into {SEALED}; the weights key goes to {KEY}")
        seal = (tools / "seal.py", DEMO, SEALED, "--key", KEY, "--asset", ASSET)
        run(python, *seal, failure="can't seal the model")
    else:
        tell(3, f"Sealed model: cached ({SEALED})")
    tell(4, f"Secrets for owner and user, and an access token: in {STATE}, readable by you only")
    for kind, path in (("psk", OWNER_PSK), ("psk", USER_PSK), ("token", TOKEN)):
        if not path.exists():
            run(python, "-m", "muproxy", "keygen", kind, path, failure=f"can't make {path}")
    tell(5, f"Measuring this checkout and its packages: {REFERENCE}")
    measure = (tools / "measure.py", "--output", REFERENCE)
    run(python, *measure, failure="can't write the reference values")


def is_older(path, folder):
    """Whether a file is missing, or older than something in this folder."""
    newest = max(file.stat().st_mtime_ns for file in folder.iterdir())
    return not path.exists() or path.stat().st_mtime_ns < newest


def connection_flags(port, psk):
    """How a proxy reaches and verifies the enclave."""
    flags = ["--host", "127.0.0.1", "--port", str(port), "--reference", REFERENCE, "--psk", psk]
    return list(map(str, flags))


def unlock(python, port):
    """Step 7: verify, then hand over the weights key with a lease."""
    tell(
        7,
        f"Verifying the enclave, then unlocking it: development evidence (psk), "
        f"a budget of {BUDGET:,} bytes, {RATE:,} bytes a second, {EXPIRY // 3600} hours",
    )
    user, owner = connection_flags(port, USER_PSK), connection_flags(port, OWNER_PSK)
    run(python, "-m", "muproxy", "attest", *user, failure="the enclave is not what was measured")
    lease = ["--budget", BUDGET, "--rate", RATE, "--expiry", EXPIRY, "--development"]
    files = ["--key", KEY, "--model", SEALED, "--token-file", TOKEN]
    run(python, "-m", "muproxy", "unlock", *owner, *files, *lease, failure="it was not unlocked")


def talk(python, port, prompt):
    """Step 8: answer the prompt; then chat, if there is a terminal."""
    user = [*connection_flags(port, USER_PSK), "--token-file", TOKEN, "--vocabulary", VOCABULARY]
    command = [python, "-m", "muproxy", "chat", *user]
    has_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if prompt is None and not has_terminal:
        prompt = PROMPT
    if prompt is not None:
        tell(8, f"Asking: {prompt}")
        one_line = " ".join(prompt.split())
        check(subprocess.run(command, cwd=ROOT, input=f"{one_line}\nquit\n", text=True), "the chat")
    if has_terminal:
        tell(8, "Chat: type a prompt, or quit")
        check(subprocess.run(command, cwd=ROOT), "the chat")


def serve(python, port):
    """Step 8 with --serve: the HTTP API, until Ctrl-C."""
    address = f"127.0.0.1:{free_port(API_PORT)}"
    tell(8, f"OpenAI-compatible API on http://{address}/v1, until Ctrl-C. Try:")
    print(
        f'curl http://{address}/v1/chat/completions -H "Authorization: Bearer $(cat {TOKEN})" '
        f'-H \'Content-Type: application/json\' -d \'{{"model": "demo", '
        f'"messages": [{{"role": "user", "content": "{PROMPT}"}}]}}\'',
        flush=True,
    )
    flags = [*connection_flags(port, USER_PSK), "--vocabulary", VOCABULARY, "--listen", address]
    check(subprocess.run([python, "-m", "muproxy", "serve", *flags], cwd=ROOT), "the API")


def check(done, name):
    """Raise ToolError if a program that spoke for itself has failed."""
    if done.returncode:
        raise ToolError(f"{name} ended with exit status {done.returncode}")


def free_port(wanted):
    """This port of 127.0.0.1, or another if it is taken."""
    for port in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return probe.getsockname()[1]
    raise ToolError("there is no free port on 127.0.0.1")


def run_all(flags):
    """All steps; the enclave is ended whatever happens."""
    tell(1, f"Python environment: {environment.VENV}")
    python = environment.make_venv("inference", lambda text: tell(1, text))
    STATE.mkdir(mode=0o700, exist_ok=True)
    prepare(python)
    enclave = Enclave(python)
    try:
        port = int(enclave.wait_for("muenclave: listening"))
        enclave.wait_for("muenclave: locked")
        tell(6, f"Enclave: running locked on 127.0.0.1:{port}, its log is {LOG}")
        unlock(python, port)
        if flags.serve:
            serve(python, port)
        else:
            talk(python, port, flags.prompt)
    finally:
        enclave.end()


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="quickstart.py", description=__doc__.split("\n")[0])
    parser.add_argument("prompt", nargs="?", help=f"default without a terminal: {PROMPT}")
    parser.add_argument("--serve", action="store_true", help="leave the HTTP API running instead")
    flags = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run_all(flags)
    except (ToolError, OSError) as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nquickstart: ended", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
