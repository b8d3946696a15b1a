"""tools/fuzz_rpc.py: it finds what is planted, finds nothing in what we have, and repeats itself."""

import contextlib
import io
import itertools
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor

from tests import support

sys.path.insert(0, str(support.TOOLS))

import fuzz_cases as cases  # noqa: E402
import fuzz_gate as gate  # noqa: E402
import fuzz_oracle as oracle  # noqa: E402
import fuzz_rpc as fuzz  # noqa: E402
import fuzz_targets as targets  # noqa: E402

CORPUS = support.ROOT / "tests" / "corpus"
TOOLS = [path.name for path in support.TOOLS.glob("fuzz_*.py")] + ["environment.py", "eventlog.py"]
SEED, BUDGET = 1, 20_000  # messages in which each planted bug has to be found
CLEAN = 30_000  # messages in which nothing may be found, beyond the named cases
# What is planted: file, text, text in its place (each there once); then flags other than --random,
# and the verdicts that say so.
SHORT = ("muenclave.py", "FRAME_SECONDS = 30 ", "FRAME_SECONDS = 3 ")
PLANTED = {
    "length limit": (
        [("muprotocol.py", "    if length > limit:\n", "    if False:\n")],
        [],
        {"accepted", "refused", "reply"},
    ),
    "deadline of a frame": (
        [("muprotocol.py", "connection.settimeout(max(deadline - clock(), 1e-6))", "pass")],
        [],
        {"hang"},
    ),
    "deadline of the handshake": (
        [("muenclave.py", "mp.HANDSHAKE_FRAME, HANDSHAKE_SECONDS)", "mp.HANDSHAKE_FRAME)")],
        ["--case", "slow-peers", "--patience", "9"],
        {"hang"},
    ),
    "deadline of a token": (
        [("muenclave.py", "self.read(deadline - time.monotonic(), mp", "self.read(None, mp")],
        ["--case", "dribbling-peers"],
        {"hang"},
    ),
    "duplicate fields": (
        [("muprotocol.py", "    if len(result) != len(pairs):\n", "    if False:\n")],
        [],
        {"accepted", "reply"},
    ),
    "depth": (
        [("muprotocol.py", "        if depth > JSON_DEPTH:\n", "        if False:\n")],
        [],
        {"accepted", "reply"},
    ),
    "recursion": (
        [("muprotocol.py", "except (ValueError, RecursionError) as error", "except ValueError as error")],
        [],
        {"crash"},
    ),
    "NaN": (
        [("muprotocol.py", "            parse_constant=_no_constant,\n", "")],
        [],
        {"accepted", "reply"},
    ),
    "unknown fields": (
        [("muprotocol.py", "if name not in fields or not fields[name](v)]", "if name in fields and not fields[name](v)]")],
        [],
        {"accepted", "reply", "crash"},
    ),
    "bounds of an integer": (
        [("muprotocol.py", '"top_k?": is_integer(0, 1 << 20)', '"top_k?": is_integer(-1, 1 << 21)')],
        [],
        {"accepted", "reply"},
    ),
    "replayed records": (
        [
            (
                "muprotocol.py",
                "            return self._aead.decrypt(nonce, payload, header)\n",
                "            try:\n"
                "                return self._aead.decrypt(nonce, payload, header)\n"
                "            except InvalidTag:\n"
                "                self._count -= 1\n"
                "                last = max(0, self._count - 1).to_bytes(12, 'big')\n"
                "                return self._aead.decrypt(last, payload, header)\n",
            )
        ],
        [],
        {"accepted", "reply"},
    ),
    "padding": (
        [("muprotocol.py", "        if any(plain[RECORD_HEADER + left :]):\n", "        if False:\n")],
        [],
        {"accepted", "reply"},
    ),
    "token of the other role": (
        [("muenclave.py", '        if self.role == "owner":\n            token =', "        if b'\"key\"' in body:\n            token =")],
        [],
        {"reply", "refused"},
    ),
    "lease seen before": (
        [("muprotocol.py", 'if lease["id"] in self._seen or is_old:', "if is_old:")],
        ["--case", "replayed-leases"],
        {"reply"},
    ),
    "exception's text in an error": (
        [("muenclave.py", 'self.say({"error": error.code} | limit)', 'self.say({"error": error.code, "detail": error.detail} | limit)')],
        [],
        {"reply"},
    ),
    "size of a cell": (
        [("muenclave.py", 'mp.Sealer(keys["e2h"], mp.CELL)', 'mp.Sealer(keys["e2h"])')],
        [],
        {"reply"},
    ),
    "sessions that are kept": (
        [("muenclave.py", "self.gate.sessions.pop(self, None)", "pass")],
        ["--random", "--patience", "15"],
        {"growth"},
    ),
    "answers that are kept": (
        [("muenclave.py", "            del self.replies[slot]\n", "")],
        ["--random", "--patience", "15"],
        {"growth", "accepted", "reply"},
    ),
    "ids that do not exist": (
        [("muenclave.py", "value < len(self.vocabulary) and reply.limit", "reply.limit")],
        [],
        {"accepted"},
    ),
}


def plant(folder, changes):
    """A copy of the modules and of the fuzzer, with these changes, each of which must apply."""
    shutil.copytree(support.ROOT / "tools", folder / "tools", ignore=lambda _, names: {n for n in names if n not in TOOLS})
    for name in ("muprotocol.py", "muenclave.py", "muproxy.py"):
        text = (support.ROOT / name).read_text("utf-8")
        for file, old, new in changes:
            if file == name:
                assert text.count(old) == 1, f"{name}: {old!r} is there {text.count(old)} times"
                text = text.replace(old, new)
        (folder / name).write_text(text, "utf-8")
    return folder / "tools" / "fuzz_rpc.py"


def run(*flags, tool=support.TOOLS / "fuzz_rpc.py"):
    """Run the fuzzer. (exit status, report or None, standard error)"""
    command = [sys.executable, "-B", str(tool), *map(str, flags), "--json", "-"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    quiet = {"capture_output": True, "text": True, "cwd": "/", "env": clean}
    done = subprocess.run(command, timeout=support.SECONDS, **quiet)
    report = json.loads(done.stdout) if done.stdout else None
    return done.returncode, report, done.stderr


class Planted(unittest.TestCase):
    """Each check that is left out is found, in a budget of messages that is the same for all."""

    def find(self, name):
        """What it finds in a build with one bug."""
        changes, flags, _ = PLANTED[name]
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            tool = plant(folder, changes)
            flags = flags or ["--random"]
            common = ("--in-process", "--seed", SEED, "--count", BUDGET, "--save", folder / "found", "--shrink", 0)
            status, report, told = run(*common, *flags, tool=tool)
            saved = [json.loads(path.read_text()) for path in (folder / "found").glob("*.json")]
        return status, report, told, saved

    def test_each(self):
        with ThreadPoolExecutor(2) as pool:
            for name, (status, report, told, saved) in zip(PLANTED, pool.map(self.find, PLANTED)):
                with self.subTest(bug=name):
                    self.assertEqual(status, 1, told or report)
                    (found,) = report["findings"]
                    self.assertIn(found["verdict"], PLANTED[name][2], found)
                    self.assertEqual([saved[0]["actions"]], [found["actions"]])


if __name__ == "__main__":
    unittest.main()
