"""tools/fuzz_rpc.py: it finds what is planted, nothing in what we have, and repeats itself."""

import contextlib
import importlib.util
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
TOOLS = [path.name for path in support.TOOLS.glob("fuzz_*.py")]
TOOLS += ["environment.py", "eventlog.py", "ledger.py", "owner.py"]
SEED, BUDGET = 1, 20_000  # messages in which each planted bug has to be found
CLEAN = 20_000  # messages in which nothing may be found, those of the named cases among them
# What is planted: file, text, text in its place (each there once); then flags other than --random,
# and the verdicts that say so.
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
        [("muprotocol.py", "except (ValueError, RecursionError) as", "except ValueError as")],
        [],
        {"crash"},
    ),
    "NaN": (
        [
            (
                "muprotocol.py",
                "            parse_constant=_finite_float,  # NaN and Infinity, which are not\n",
                "",
            )
        ],
        [],
        {"accepted", "refused", "reply"},
    ),
    "unknown fields": (
        [("muprotocol.py", "if name not in fields or not", "if name in fields and not")],
        [],
        {"accepted", "reply", "crash"},
    ),
    "bounds of an integer": (
        [
            (
                "muprotocol.py",
                '"top_k?": is_integer(0, 1 << 20)',
                '"top_k?": is_integer(-1, 1 << 40)',
            )
        ],
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
        [
            (
                "muprotocol.py",
                "        if any(plain[RECORD_HEADER + left :]):\n",
                "        if False:\n",
            )
        ],
        [],
        {"accepted", "refused", "reply"},
    ),
    "token of the other role": (
        [
            (
                "muenclave.py",
                'if self.role == "owner":\n            token',
                "if b'key' in body:\n            token",
            )
        ],
        [],
        {"reply", "refused"},
    ),
    "lease seen before": (
        [("muprotocol.py", 'if lease["id"] in self._seen or is_old:', "if is_old:")],
        ["--case", "replayed-leases"],
        {"reply"},
    ),
    "exception's text in an error": (
        [
            (
                "muenclave.py",
                '{"error": error.code, "limit"',
                '{"error": error.code, "why": str(error), "limit"',
            )
        ],
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
    "ids that are not chained": (
        [("muenclave.py", "reply.request, reply.sent, ended", "reply.request, [], ended")],
        ["--case", "scores"],
        {"reply"},
    ),
    "ids that do not exist": (
        [("muenclave.py", "value < len(reply.table) and reply.limit", "reply.limit")],
        [],
        {"accepted"},
    ),
}


def plant(folder, changes):
    """A copy of the modules and of the fuzzer, with these changes, each of which must apply."""
    (folder / "tools").mkdir()
    for name in TOOLS:
        shutil.copy(support.TOOLS / name, folder / "tools")
    for name in ("muprotocol.py", "muenclave.py", "muproxy.py"):
        text = (support.ROOT / name).read_text("utf-8")
        for file, old, new in changes:
            if file == name:
                assert text.count(old) == 1, f"{name}: {old!r} is there {text.count(old)} times"
                text = text.replace(old, new)
        (folder / name).write_text(text, "utf-8")
    return folder / "tools" / "fuzz_rpc.py"


def command(*flags, tool=support.TOOLS / "fuzz_rpc.py"):
    """The words that run the fuzzer, and options for subprocess. Its own modules are the first."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, "-B", str(tool), *map(str, flags)]
    return words, {"text": True, "cwd": "/", "env": clean}


def run(*flags, tool=support.TOOLS / "fuzz_rpc.py"):
    """Run the fuzzer to its end. (exit status, report or None, standard error)"""
    words, options = command(*flags, "--json", "-", tool=tool)
    done = subprocess.run(words, capture_output=True, timeout=support.SECONDS, **options)
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def slug(name):
    """The name of a planted bug's file in the corpus."""
    return name.replace("'", "").replace(" ", "-").lower()


clean = None  # the run on what we have, which begins first: its slow peers take their time


def setUpModule():
    global clean
    words, options = command("--in-process", "--seed", 2, "--count", CLEAN, "--json", "-")
    clean = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    unittest.addModuleCleanup(end)


def end():
    """End the run if nobody waited for it."""
    if clean.poll() is None:
        clean.kill()
    clean.communicate()


class Planted(unittest.TestCase):
    """Each check that is left out is found, in a budget of messages that is the same for all."""

    def find(self, name):
        """What it finds in a build with one bug, what it saves, and what the corpus finds."""
        changes, flags, _ = PLANTED[name]
        corpus = CORPUS / f"{slug(name)}.json"
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            tool = plant(folder, changes)
            common = ("--in-process", "--seed", SEED, "--count", BUDGET, "--shrink", 0)
            found = run(*common, "--save", folder / "f", *(flags or ["--random"]), tool=tool)
            saved = [json.loads(path.read_text()) for path in (folder / "f").glob("*.json")]
            again = None
            if corpus.exists():
                again = run("--in-process", "--patience", 15, "--replay", corpus, tool=tool)
        return *found, saved, again

    def test_each(self):
        with ThreadPoolExecutor(2) as pool:
            for name, told in zip(PLANTED, pool.map(self.find, PLANTED)):
                status, report, errors, saved, again = told
                with self.subTest(bug=name):
                    self.assertEqual(status, 1, errors or report)
                    (found,) = report["findings"]
                    self.assertIn(found["verdict"], PLANTED[name][2], found)
                    self.assertEqual([case["actions"] for case in saved], [found["actions"]])
                    if again is not None:
                        self.assertEqual(again[0], 1, again[2])

    def test_most_are_in_the_corpus(self):
        kept = [name for name in PLANTED if (CORPUS / f"{slug(name)}.json").exists()]
        self.assertGreaterEqual(len(kept), 10)


class Clean(unittest.TestCase):
    """It finds nothing in the modules as they are."""

    def test_named_and_random(self):
        out, errors = clean.communicate(timeout=support.SECONDS)
        report = json.loads(out)
        self.assertEqual((clean.returncode, report["findings"]), (0, []), errors)
        self.assertGreaterEqual(report["messages"], CLEAN)
        self.assertEqual(sum(report["by_kind"].values()), report["messages"])
        self.assertLessEqual({*cases.CASES, *cases.STREAMS}, report["cases"].keys())
        self.assertLessEqual(targets.TARGETS.keys(), report["by_kind"].keys())
        self.assertGreater(report["replies"], 1000)
        memory = report["memory"]
        self.assertLess(memory["last"] - memory["first"], memory["bound"])

    def test_corpus(self):
        """Cases that once failed, or that find a check that is left out."""
        files = sorted(CORPUS.glob("*.json"))
        self.assertGreater(len(files), 10)
        status, report, errors = run("--in-process", "--findings", 99, "--replay", *files)
        self.assertEqual((status, report["findings"]), (0, []), errors)
        self.assertEqual(report["cases"], {path.stem: 1 for path in files})


class Live(unittest.TestCase):
    """A real enclave, for a few seconds."""

    @classmethod
    def setUpClass(cls):
        holder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(holder.cleanup)
        cls.site = support.make_site(pathlib.Path(holder.name))
        cls.enclave = support.Enclave(cls.site)
        cls.addClassCleanup(cls.enclave.end)
        cls.enclave.unlock()

    def target(self, *flags):
        """Run against the enclave."""
        return run("--target", f"127.0.0.1:{self.enclave.port}", *flags)

    def test_sessions(self):
        site, pids = self.site, self.enclave.pids()
        flags = ["--reference", site.reference, "--psk", site.user_psk]
        flags += ["--owner-psk", site.owner_psk, "--token-file", site.token, "--key", site.key]
        flags += ["--vocabulary", site.vocabulary, "--pid", pids["gate"]]
        for name in ("every-split", "cancels", "two-requests", "replayed-messages", "sessions"):
            flags += ["--case", name]
        status, report, errors = self.target(*flags, "--count", 500)
        self.assertEqual((status, report["findings"]), (0, []), errors)
        self.assertGreaterEqual(report["messages"], 500)
        self.assertGreater(report["replies"], 100)
        self.assertGreater(report["memory"]["last"], 1 << 20)
        self.assertEqual(self.enclave.pids(), pids)

    def test_strangers(self):
        """Without a secret or a token, as anybody can."""
        named = ("--case", "other-protocols", "--case", "bad-shares", "--case", "truncated-frame")
        status, report, errors = self.target(*named)
        self.assertEqual((status, report["findings"]), (0, []), errors)
        self.assertGreater(report["messages"], 30)

    def test_a_secret_of_another_role(self):
        """Its proof is not what was to be expected: another enclave's, or none."""
        status, report, errors = self.target("--psk", self.site.owner_psk, "--case", "cancels")
        self.assertEqual((status, report), (2, None))
        self.assertRegex(errors, r"\Afuzz_rpc: error: the enclave does not answer[^\n]+\n\Z")

    def test_another_enclave(self):
        reference = json.loads(self.site.reference.read_text()) | {"measurement": "00" * 32}
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(reference, file)
            file.flush()
            flags = ("--reference", file.name, "--psk", self.site.user_psk)
            status, report, errors = self.target(*flags)
        self.assertEqual((status, report), (2, None))
        self.assertRegex(errors, r"\Afuzz_rpc: error: the enclave is not that of [^\n]+\n\Z")


class Repeatable(unittest.TestCase):
    """A seed says everything; a case can be played again; a smaller one is one that still fails."""

    def episodes(self, name, seed):
        """The first episodes of a case."""
        made = {**cases.CASES, **cases.STREAMS}[name](random.Random(f"{seed} {name}"))
        return list(itertools.islice(made, 3))

    def test_seeds(self):
        for name in (*cases.CASES, *cases.STREAMS):
            with self.subTest(case=name):
                once = self.episodes(name, 1)
                self.assertEqual(once, self.episodes(name, 1))
                self.assertEqual(once, json.loads(json.dumps(once)))
                if name in cases.STREAMS:
                    self.assertNotEqual(once, self.episodes(name, 2))

    def test_the_same_run_twice(self):
        flags = ("--in-process", "--random", "--seed", 9, "--count", 800)
        one, two = (run(*flags)[1] for _ in range(2))
        for name in ("messages", "by_kind", "cases", "findings"):
            self.assertEqual(one[name], two[name])

    def test_a_saved_case(self):
        """It fails again in the build that it was found in, and nowhere else."""
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            tool = plant(folder, PLANTED["padding"][0])
            flags = ("--in-process", "--case", "records-of-other-forms", "--save", folder / "found")
            status, report, _ = run(*flags, tool=tool)
            (path,) = (folder / "found").glob("*.json")
            self.assertEqual((status, report["findings"][0]["file"]), (1, str(path)))
            self.assertLessEqual(len(json.loads(path.read_text())["actions"]), 4)
            self.assertEqual(run("--in-process", "--replay", path, tool=tool)[0], 1)
            self.assertEqual(run("--in-process", "--replay", path)[0], 0)

    def test_minimum(self):
        """No single item, and no single byte, more can be left out."""
        self.assertEqual(fuzz.minimum(list(range(100)), lambda items: {3, 77} <= {*items}), [3, 77])
        actions = [{"do": "say", "data": "x" * number + "!"} for number in range(40)]
        smaller = fuzz.shrink(actions, lambda kept: any("xx!" in a["data"] for a in kept))
        self.assertEqual(smaller, [{"do": "say", "data": "xx!"}])
        self.assertEqual(fuzz.shrink(actions, lambda kept: True, 0), actions)

    def test_bytes_of_any_kind(self):
        for data in (b"", b"abc", "\u00e9\0".encode(), b"\xff\0", bytes(range(256))):
            text = json.dumps({"data": gate.as_data(data)})
            self.assertEqual(gate.data_of(json.loads(text)), data)


class Oracle(unittest.TestCase):
    """The second opinion is one: it shares nothing with the module that it judges."""

    def test_it_imports_nothing_of_ours(self):
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import fuzz_oracle; print(*sys.modules)"
        )
        words = [sys.executable, "-B", "-c", code, str(support.TOOLS)]
        done = subprocess.run(words, capture_output=True, text=True, cwd="/", check=True)
        ours = {path.stem for path in support.ROOT.glob("*.py")}
        self.assertEqual(ours & {*done.stdout.split()}, set())

    def test_json(self):
        """Against the interpreter's own reader, where that is strict."""
        for text in ('{"a":[1,{"b":[]},[[]],"x"],"c":{}}', ' {"a" : -0.5e3 , "b":null} ', "{}"):
            self.assertEqual(oracle.parse_json(text.encode()), json.loads(text))
        wrong = ('{"a":1,}', "[1]", '{"a":[1,]}', "", "{", '{"a"}', '{"a":[}', "1", '{"a":01}')
        wrong += ('{"a":NaN}', '{"a":1e999}', '{"a":1,"\\u0061":2}', r'{"a":"\ud800"}', "{}{}")
        for text in wrong:
            with self.subTest(text=text), self.assertRaises(oracle.Refused):
                oracle.parse_json(text.encode())
        for depth, is_good in ((16, True), (17, False)):
            text = b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"
            with contextlib.nullcontext() if is_good else self.assertRaises(oracle.Refused):
                oracle.parse_json(text)


class CommandLine(unittest.TestCase):
    """What it is told, and how it ends."""

    def test_list(self):
        words, options = command("--list")
        done = subprocess.run(words, capture_output=True, **options)
        named = [line.split()[0] for line in done.stdout.splitlines()]
        self.assertEqual(named, [*cases.CASES, *cases.STREAMS])
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_mistakes_are_one_line(self):
        with tempfile.TemporaryDirectory() as folder:
            broken = pathlib.Path(folder, "broken.json")
            broken.write_text('{"actions":[{"do":"parse","target":"nothing"}]}')
            for flags in (
                ("--in-process", "--case", "nothing"),
                ("--in-process", "--replay", folder + "/absent"),
                ("--in-process", "--replay", broken),
                ("--in-process", "--case", "negative-length", "--json", folder + "/absent/a"),
                ("--target", "127.0.0.1:1", "--case", "cancels"),
                ("--target", "127.0.0.1:1", "--psk", folder + "/absent"),
            ):
                words, options = command(*flags)
                done = subprocess.run(words, capture_output=True, **options)
                self.assertEqual((done.returncode, done.stdout), (2, ""), flags)
                self.assertRegex(done.stderr, r"\Afuzz_rpc: error: [^\n]+\n\Z")
        for flags in ((), ("--in-process", "--count", "0"), ("--in-process", "--target", "1")):
            words, options = command(*flags)
            self.assertEqual(subprocess.run(words, capture_output=True, **options).returncode, 2)

    def test_what_is_printed(self):
        words, options = command("--in-process", "--case", "bad-shares")
        done = subprocess.run(words, capture_output=True, **options)
        self.assertRegex(done.stdout, r"seed 1: \d+ messages in [\d.]+ s .*\nnothing found\n\Z")

    def test_atheris(self):
        """Guided by coverage where atheris is installed; a line where it is not."""
        if importlib.util.find_spec("atheris") is None:
            status, report, errors = run("--atheris")
            self.assertEqual((status, report), (2, None))
            line = "fuzz_rpc: error: --atheris needs the package: pip install atheris\n"
            self.assertEqual(errors, line)
            return
        status, report, errors = run("--atheris", "--count", 2000)
        self.assertEqual((status, report["findings"]), (0, []), errors)
        self.assertEqual(report["messages"], 2000)
        self.assertGreater(report["coverage"], 100)


if __name__ == "__main__":
    unittest.main()
