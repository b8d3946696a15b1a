"""From a fresh clone to an answer out of the enclave: python3 tools/quickstart.py "a prompt".

Makes .venv, trains and caches a small demo model, seals it, starts the enclave, verifies it,
unlocks it with explicit budgets, answers the prompt, and chats if there is a terminal. With --vm
the enclave is the guest in its VM: the image is built from Debian packages, boots under QEMU with a
software TPM, and is unlocked once its quote is what the image file predicts. What all this makes
lies in .venv, in .quickstart and in the user's cache; what it starts, it ends. Standard library
only.
"""

import argparse
import collections
import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading

import environment
import ledger
import vm
from environment import ROOT, ToolError

STATE, TOOLS = ROOT / ".quickstart", ROOT / "tools"
DEMO, SEALED, KEY = STATE / "demo", STATE / "demo.mus", STATE / "demo.key"
LEDGER = STATE / "demo.key.ledger"  # where the owner's tool looks for it
OWNER_PSK, USER_PSK, TOKEN = STATE / "owner.psk", STATE / "user.psk", STATE / "token"
PSK = {OWNER_PSK: "psk", USER_PSK: "psk"}  # not for the guest
REFERENCE, VOCABULARY = STATE / "reference.json", STATE / "demo.mus.vocab"
IMAGE, TPM = STATE / "image", STATE / "tpm"  # of the guest
LOG = STATE / "enclave.log"
ASSET = "demo"
BUDGET = 64 << 10  # bytes the engine may choose: a hundred answers, a thirtieth of the demo model
LIFETIME_BUDGET = 100 * BUDGET  # over all runs; the demo model's weights are no secret
RATE = 5120  # bytes a second
EXPIRY = 24 * 3600  # seconds
STARTING_SECONDS = 120
ENDING_SECONDS = 10
PROMPT = "Tell me about zen."
API_PORT = 8080

# How a proxy reaches and verifies an enclave, as an owner and as a user: flags.
Way = collections.namedtuple("Way", "owner user")


class Steps:
    """Tells what happens, in one line a step."""

    def __init__(self, count):
        self.count, self.number = count, 0

    def next(self, text):
        """The next step begins."""
        self.number += 1
        self.tell(text)

    def tell(self, text):
        """More about this step."""
        print(f"[{self.number}/{self.count}] {text}", flush=True)


class Enclave:
    """A running enclave. Its log goes to LOG, and line by line to whoever waits for one."""

    def __init__(self, *command):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("ENCLAVE_", "MODEL_"))}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is ours: the enclave is ended in order
        )
        self.lines = queue.Queue()
        threading.Thread(target=self.read_log, daemon=True).start()

    def read_log(self):
        """Copy the log until the enclave ends; then None."""
        with LOG.open("w", encoding="utf-8") as file:
            for line in self.process.stdout:
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
        """Ask it to end, then make it."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        for ask in (self.process.terminate, self.process.kill):
            ask()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(ENDING_SECONDS)
                return


def run(python, *arguments, failure):
    """Run one of the project's programs quietly. Raises ToolError with its last line."""
    environment.run([python, *map(str, arguments)], failure)


def prepare(steps, python, secrets):
    """Model, sealed model, secrets ({path: kind}); what is there is kept."""
    is_new = not (DEMO / "config.json").exists()
    steps.next(f"Demo model: {'training one, about a minute' if is_new else 'cached'} ({DEMO})")
    run(python, TOOLS / "demo_model.py", DEMO, failure="can't train the demo model")
    sources = [*DEMO.iterdir(), TOOLS / "seal.py", TOOLS / "prompting.py"]
    if is_older(SEALED, sources) or not (KEY.exists() and VOCABULARY.exists()):
        steps.next(f"Sealing it into {SEALED}; the weights key goes to {KEY}")
        seal = (TOOLS / "seal.py", DEMO, SEALED, "--key", KEY, "--asset", ASSET)
        run(python, *seal, failure="can't seal the model")
    else:
        steps.next(f"Sealed model: cached ({SEALED})")
    names = ", ".join(path.name for path in secrets)
    steps.next(f"Secrets ({names}): in {STATE}, readable by you only")
    for path, kind in secrets.items():
        if not path.exists():
            run(python, TOOLS / "owner.py", "keygen", kind, path, failure=f"can't make {path}")


def is_older(path, sources):
    """Whether a file is missing, or older than one of these."""
    newest = max(file.stat().st_mtime_ns for file in sources)
    return not path.exists() or path.stat().st_mtime_ns < newest


# ---------------------------------------------------------------- the enclave as a process


@contextlib.contextmanager
def local_enclave(steps, python):
    """Measure this checkout and run it, locked; yields the way to it."""
    steps.next(f"Measuring this checkout and its packages: {REFERENCE}")
    measure = (TOOLS / "measure.py", "--output", REFERENCE)
    run(python, *measure, failure="can't write the reference values")
    secrets = ("--owner-psk", OWNER_PSK, "--user-psk", USER_PSK)
    flags = ("--model", SEALED, "--port", "0", "--rate", str(RATE), *secrets)
    enclave = Enclave(python, "-B", TOOLS / "enclave.py", *flags)
    try:
        port = enclave.wait_for("muenclave: listening")
        enclave.wait_for("muenclave: locked")
        steps.next(f"Enclave: running locked on 127.0.0.1:{port}, its log is {LOG}")
        where = connection_flags(port, REFERENCE)
        yield Way([*where, "--psk", str(OWNER_PSK)], [*where, "--psk", str(USER_PSK)])
    finally:
        enclave.end()


def connection_flags(port, reference):
    """How a proxy reaches the enclave, and what it expects of it."""
    return ["--host", "127.0.0.1", "--port", port, "--reference", str(reference)]


# ---------------------------------------------------------------- the enclave as a VM


@contextlib.contextmanager
def guest(steps, python):
    """Build the guest's image and boot it, locked; yields the way to it."""
    steps.next(f"The guest's image, from Debian packages and wheels: {IMAGE}")
    build = [python, TOOLS / "image.py", "all", "--output", IMAGE]
    check(subprocess.run(build, cwd=ROOT), "tools/image.py")
    reference = IMAGE / "reference.json"
    values = json.loads(reference.read_text("utf-8"))
    if "attestation_key" not in values:
        steps.tell("Enrolling the key of a new software TPM, in a real one's place: development")
        with vm.tpm_device(TPM) as device:
            enroll(python, reference, "--tpm", device)
    flags = ("--image", IMAGE, "--weights", SEALED, "--tpm-state", TPM, "--print-console")
    enclave = Enclave(python, TOOLS / "vm.py", "run", *flags)
    try:
        port = enclave.wait_for("vm: the guest listens on 127.0.0.1:")
        enclave.wait_for("muenclave: locked")
        steps.next(f"Guest: booted, locked, on 127.0.0.1:{port}; its serial port goes to {LOG}")
        if not values["pcrs"].keys() >= {"0", "7"}:
            steps.tell("Enrolling the firmware's PCRs from this first boot, trusted: development")
            enroll(python, reference, "--enclave", f"127.0.0.1:{port}")
        where = connection_flags(port, reference)
        yield Way(where, where)
    finally:
        enclave.end()


def enroll(python, reference, *flags):
    """Complete the reference values by tools/enroll.py."""
    run(python, TOOLS / "enroll.py", reference, *flags, failure="it can't be enrolled")


# ---------------------------------------------------------------- unlock and use


def unlock(steps, python, way, evidence):
    """Verify, then hand over the weights key with a lease."""
    steps.next(
        f"Verifying the enclave, then unlocking it: development evidence ({evidence}), "
        f"a budget of {BUDGET:,} bytes, {RATE:,} bytes a second, {EXPIRY // 3600} hours"
    )
    steps.tell(f"The ledger of what leases were granted: {LEDGER}")
    lifetime = [] if has_granted() else ["--new-ledger", "--lifetime-budget", LIFETIME_BUDGET]
    if lifetime:
        steps.tell(f"It is new: a lifetime budget of {LIFETIME_BUDGET:,} bytes for all runs")
    attest = (python, "-m", "muproxy", "attest", *way.user)
    run(*attest, failure="the enclave is not what was measured")
    lease = ["--budget", BUDGET, "--rate", RATE, "--expiry", EXPIRY, "--development"]
    files = ["--key", KEY, "--model", SEALED, "--token-file", TOKEN, "--ledger", LEDGER]
    arguments = (TOOLS / "owner.py", "unlock", *way.owner, *files, *lease, *lifetime)
    run(python, *arguments, failure="it was not unlocked")


def has_granted():
    """Whether there is a ledger that knows the demo model. Raises ToolError."""
    if not LEDGER.exists():
        return False
    try:
        with ledger.Ledger(LEDGER) as book:
            return bool(book.grants)
    except ledger.Failure as error:
        raise ToolError(error) from None


def talk(steps, python, way, prompt):
    """Answer the prompt; then chat, if there is a terminal."""
    user = [*way.user, "--token-file", TOKEN, "--vocabulary", VOCABULARY]
    command = [python, "-m", "muproxy", "chat", *user]
    has_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if prompt is None and not has_terminal:
        prompt = PROMPT
    steps.next(f"Asking: {prompt}" if prompt is not None else "Chat: type a prompt, or quit")
    if prompt is not None:
        one_line = " ".join(prompt.split())
        check(subprocess.run(command, cwd=ROOT, input=f"{one_line}\nquit\n", text=True), "the chat")
    if has_terminal:
        if prompt is not None:
            steps.tell("Chat: type a prompt, or quit")
        check(subprocess.run(command, cwd=ROOT), "the chat")


def serve(steps, python, way):
    """With --serve: the HTTP API, until Ctrl-C."""
    address = f"127.0.0.1:{free_port(API_PORT)}"
    steps.next(f"OpenAI-compatible API on http://{address}/v1, until Ctrl-C. Try:")
    print(
        f'curl http://{address}/v1/chat/completions -H "Authorization: Bearer $(cat {TOKEN})" '
        f'-H \'Content-Type: application/json\' -d \'{{"model": "demo", '
        f'"messages": [{{"role": "user", "content": "{PROMPT}"}}]}}\'',
        flush=True,
    )
    flags = [*way.user, "--vocabulary", VOCABULARY, "--listen", address]
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
    steps = Steps(8)
    steps.next(f"Python environment: {environment.VENV}")
    python = environment.make_venv("inference", steps.tell)
    STATE.mkdir(mode=0o700, exist_ok=True)
    prepare(steps, python, {TOKEN: "token"} | ({} if flags.vm else PSK))
    start, evidence = (guest, "a software TPM's quote") if flags.vm else (local_enclave, "psk")
    with start(steps, python) as way:
        unlock(steps, python, way, evidence)
        if flags.serve:
            serve(steps, python, way)
        else:
            talk(steps, python, way, flags.prompt)


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="quickstart.py", description=__doc__.split("\n")[0])
    parser.add_argument("prompt", nargs="?", help=f"default without a terminal: {PROMPT}")
    parser.add_argument("--vm", action="store_true", help="run the enclave as a measured VM")
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
