"""tools/quickstart.py as a stranger types it: in a fresh copy of the checkout, in a fresh venv."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request

from tests import guest
from tests.support import until

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPT = "Tell me about zen."
ANSWER = "Beautiful is better than ugly"  # what the demo model has learnt
SECONDS = 1200  # for installing and training on a slow machine
SECRETS = ("demo.key", "owner.psk", "user.psk", "token")


def processes_of(folder):
    """The command lines of all running processes that name this folder, or work in it."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if folder in command or os.readlink(process / "cwd").startswith(folder):
                found.append(command)
    return found


class Quickstart(unittest.TestCase):
    """One command from a clone to an answer; again; as a server; and nothing is left behind."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.copy = pathlib.Path(folder.name).resolve() / "muenclave"
        ignored = [row.strip("/") for row in (ROOT / ".gitignore").read_text().split()]
        shutil.copytree(ROOT, cls.copy, ignore=shutil.ignore_patterns(".git", *ignored))
        cls.state = cls.copy / ".quickstart"
        cls.first = cls.run_to_its_end(PROMPT)

    @classmethod
    def command(cls, *arguments):
        return [sys.executable, cls.copy / "tools" / "quickstart.py", *arguments]

    @classmethod
    def run_to_its_end(cls, *arguments):
        return subprocess.run(
            cls.command(*arguments),
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    def setUp(self):
        self.assertEqual(self.first.returncode, 0, self.first.stdout + self.first.stderr)

    def check_all_gone(self):
        """Nothing of it runs; the last of its processes may still be about to end."""
        until(lambda: not processes_of(str(self.copy)), "the end of all processes")

    def test_answer(self):
        steps = re.findall(r"^\[(\d)/8\]", self.first.stdout, re.MULTILINE)
        self.assertEqual(sorted(set(steps)), list("12345678"))
        self.assertRegex(self.first.stdout, r"a budget of [\d,]+ bytes")
        self.assertRegex(self.first.stdout, r"a lifetime budget of [\d,]+ bytes for all runs")
        answer = self.first.stdout.partition(f"Asking: {PROMPT}\n")[2]
        self.assertIn(ANSWER, answer)
        self.check_all_gone()

    def test_second_run_finds_everything_made(self):
        before = {path.name: path.stat().st_mtime_ns for path in self.state.iterdir()}
        done = self.run_to_its_end(PROMPT)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertNotIn("Installing", done.stdout)
        self.assertNotIn("lifetime budget", done.stdout)
        after = {path.name: path.stat().st_mtime_ns for path in self.state.iterdir()}
        for name in ("demo.mus", "demo.mus.vocab", *SECRETS):
            self.assertEqual(before[name], after[name], name)
        self.assertEqual(self.answer(done.stdout), self.answer(self.first.stdout))

    def answer(self, output):
        """The text of an answer, without the steps above it."""
        return output.partition(f"Asking: {PROMPT}\n")[2]

    def test_secrets_are_for_the_owner_only_and_never_shown(self):
        self.assertEqual(self.state.stat().st_mode & 0o777, 0o700)
        shown = self.first.stdout + self.first.stderr + (self.state / "enclave.log").read_text()
        for name in SECRETS:
            path = self.state / name
            self.assertEqual(path.stat().st_mode & 0o777, 0o600, name)
            for secret in re.findall(r"[0-9a-f]{64}", path.read_text()):
                self.assertNotIn(secret, shown, name)
        ledger = self.state / "demo.key.ledger"
        self.assertEqual(ledger.stat().st_mode & 0o777, 0o600)
        keys = re.findall(b'"close":"([0-9a-f]{64})"', ledger.read_bytes())
        self.assertGreater(len(keys), 0)
        self.assertFalse([key for key in keys if key.decode() in shown])

    @unittest.skipIf(guest.MISSING, f"not installed: {' '.join(guest.MISSING)}")
    def test_vm(self):
        """The guest in its VM; then once more, enrolled, and ended while it boots."""
        done = self.run_to_its_end("--vm", PROMPT)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn(ANSWER, self.answer(done.stdout))
        self.assertEqual(done.stdout.count("Enrolling"), 2, done.stdout)
        self.check_all_gone()
        values = json.loads((self.state / "image" / "reference.json").read_text())
        self.assertEqual((values["kind"], values["root"]), ("tpm2", "fixture"))
        process = self.start("--vm", PROMPT)
        with process, contextlib.ExitStack() as stack:
            stack.callback(process.kill)
            said = ""
            while not said.startswith("[6/8]"):
                said = process.stdout.readline()
                self.assertNotEqual(said, "", "it ended")
                self.assertNotIn("Enrolling", said)
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.wait(60), 130)
        self.check_all_gone()

    def start(self, *arguments):
        """Start it; its standard output can be read."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
        streams["stderr"] = subprocess.DEVNULL
        return subprocess.Popen(self.command(*arguments), cwd="/", **streams)

    def serve_until(self, number):
        """Start with --serve, ask the API, then end it by a signal; the exit status."""
        process = self.start("--serve")
        with process, contextlib.ExitStack() as stack:
            stack.callback(process.kill)  # if an assertion fails before the signal
            lines = iter(process.stdout.readline, "")
            line = next(line for line in lines if line.startswith("[8/8]"))
            address = re.search(r"http://[\d.:]+", line)[0]
            self.assertIn(ANSWER, self.ask(address))
            process.send_signal(number)
            return process.wait(60)

    def ask(self, address):
        """The text of an answer from the HTTP API."""
        body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}]}
        token = (self.state / "token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        url = f"{address}/v1/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    return json.load(reply)["choices"][0]["message"]["content"]
            except urllib.error.HTTPError:
                raise
            except urllib.error.URLError as error:
                self.assertIsInstance(error.reason, ConnectionRefusedError)  # not listening yet
                time.sleep(0.1)

    def test_serve_ends_all_on_ctrl_c(self):
        self.assertEqual(self.serve_until(signal.SIGINT), 130)
        self.check_all_gone()

    def test_serve_ends_all_on_sigterm(self):
        self.assertEqual(self.serve_until(signal.SIGTERM), 143)
        self.check_all_gone()


if __name__ == "__main__":
    unittest.main()
