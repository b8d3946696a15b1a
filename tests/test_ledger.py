"""The owner's ledger: what was granted stays counted, and nothing is granted twice."""

import contextlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import muprotocol as mp
import muproxy
from tests.support import FREE_RATE, ROOT, SECONDS, TOOLS, Enclave, make_site, own

import ledger  # isort: skip  of tools, which tests.support has put on the path

PROCESSES, GRANTS = 8, 1000
LIFETIME = 10**6  # bytes
FACTS = {"asset": "demo", "model": "11" * 32, "root": "psk", "measurement": "22" * 32}
FACTS["close"] = "33" * 32
SIZE = 6_400_000_000  # bytes of a sealed model
ACTOR = f"import sys; sys.path[:0] = {[str(TOOLS), str(ROOT)]!r}; import ledger, owner, muproxy\n"


def run(script, *arguments, prefix=(), **options):
    """Run a script that has the modules of ACTOR. Returns the finished process."""
    command = [*prefix, sys.executable, "-B", "-c", ACTOR + script, *arguments]
    quiet = {"capture_output": True, "text": True, "timeout": SECONDS}
    return subprocess.run(list(map(str, command)), **(quiet | options))


def tool(*arguments):
    """Run tools/ledger.py. Returns the finished process."""
    command = [sys.executable, "-B", TOOLS / "ledger.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=SECONDS)


class Case(unittest.TestCase):
    """A folder, and the path of a ledger and of a witness in it."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.path, self.witness = self.folder / "ledger", self.folder / "witness"

    def create(self, lifetime=LIFETIME):
        """A new ledger that has granted one byte of FACTS' asset."""
        ledger.create(self.path)
        with self.open() as book:
            book.grant(FACTS, SIZE, 1, lifetime)

    def open(self, witness=None):
        return ledger.Ledger(self.path, witness)

    def grants(self):
        """The grants in the ledger, once all of it is checked: [event with its state]."""
        with self.open() as book:
            return list(book.grants.values())

    @contextlib.contextmanager
    def refused(self, pattern, status=1):
        """The block is refused in one line."""
        with self.assertRaisesRegex(muproxy.Failure, pattern) as caught:
            yield
        self.assertNotIn("\n", str(caught.exception))
        self.assertEqual(caught.exception.status, status)

    def assertFails(self, status, pattern, done):
        """A program ended with this status and one line that says why."""
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        self.assertRegex(done.stderr, rf"\A(owner|ledger): error: [^\n]*{pattern}[^\n]*\n\Z")


class Budget(Case):
    """What is granted, and what is given back."""

    def test_defaults(self):
        """A thousandth of the sealed size for life, a tenth of what is left for a lease."""
        ledger.create(self.path)
        with self.open() as book:
            self.assertEqual(book.grant(FACTS, SIZE)["bytes"], SIZE // 10_000)
            self.assertEqual(book.grant(FACTS, SIZE)["bytes"], SIZE // 10_000 * 9 // 10)
            self.assertEqual(book.assets["demo"]["lifetime"], SIZE // 1000)

    def test_never_more_than_the_lifetime_budget(self):
        self.create()
        with self.open() as book:
            with self.refused(r"1,000,000 bytes exceed the 999,999 .* raise .* --asset demo"):
                book.grant(FACTS, SIZE, LIFETIME)
            self.assertEqual(book.grant(FACTS, SIZE, LIFETIME - 1)["sequence"], 2)
            with self.refused("1 bytes exceed the 0 that are left"):
                book.grant(FACTS, SIZE, 1)
            with self.refused("too little to answer with"):
                book.grant(FACTS, SIZE)
            self.assertEqual(book.grant(FACTS | {"asset": "other"}, SIZE)["sequence"], 3)
        self.assertEqual([grant["bytes"] for grant in self.grants()][:2], [1, LIFETIME - 1])

    def test_small_model(self):
        """Its budgets have to be said; a grant that is refused leaves the asset new."""
        ledger.create(self.path)
        with self.open() as book:
            for budget, pattern in ((None, "too little"), (10**6, "2,000 that are left")):
                with self.refused(f"{pattern}.*--lifetime-budget"):
                    book.grant(FACTS, 2 * 10**6, budget)
            self.assertEqual(book.grant(FACTS, 2 * 10**6, 5000, 10**5)["bytes"], 5000)
            with self.refused("leave out --lifetime-budget", 2):
                book.grant(FACTS, 2 * 10**6, 5000, 10**5)

    def test_sealing_anew_gives_nothing(self):
        self.create()
        with self.open() as book:
            book.grant(FACTS | {"model": "44" * 32}, 100 * SIZE, LIFETIME - 1)
            with self.refused("0 that are left"):
                book.grant(FACTS | {"model": "55" * 32}, 100 * SIZE, 1)

    def test_clock_set_back_a_year(self):
        times = ["2026-06-01T00:00:00+00:00", "2025-06-01T00:00:00+00:00"]
        for time in times:
            with mock.patch.object(ledger, "now", lambda time=time: time):
                with self.open() if self.path.exists() else contextlib.nullcontext() as book:
                    self.create() if book is None else book.grant(FACTS, SIZE, 1)
        self.assertEqual([grant["sequence"] for grant in self.grants()], [1, 2])
        self.assertEqual([grant["time"] for grant in self.grants()], times)

    def test_raise(self):
        self.create()
        with self.open() as book:
            for asset, lifetime, reason, pattern in (
                ("demo", LIFETIME, "why", "takes more than that"),
                ("demo", 1 << 60, "why", "takes more than that"),
                ("demo", 2 * LIFETIME, " ", "--reason"),
                ("other", 2 * LIFETIME, "why", "no asset other; it has: demo"),
            ):
                with self.refused(pattern, 2):
                    book.raise_budget(asset, lifetime, reason)
            book.raise_budget("demo", 2 * LIFETIME, "a second year")
            book.grant(FACTS, SIZE, LIFETIME + 1)
        self.assertEqual(len(self.grants()), 2)

    def statement(self, grant, spent, key=None):
        """An enclave's closing statement."""
        told = {"lease": grant["lease"], "spent": spent, "head": "66" * 32}
        mac = mp.hmac.digest(bytes.fromhex(key or grant["close"]), mp.encode_json(told), "sha256")
        return told | {"mac": mac.hex()}

    def test_given_back_only_where_nothing_can_be_forked(self):
        self.create()
        with self.open() as book:
            for root, returned in (("psk", 0), ("fixture", 0), ("ek:a maker", 0), ("tee", 900)):
                grant = book.grant(FACTS | {"root": root}, SIZE, 1000)
                before = ledger.left_of(book.assets["demo"])
                told, event = book.close(self.statement(grant, 100))
                self.assertEqual((told["lease"], event["spent"]), (grant["lease"], 100))
                self.assertEqual(event["returned"], returned)
                self.assertEqual(ledger.left_of(book.assets["demo"]), before + returned)
            grant = book.grant(FACTS | {"root": "tee"}, SIZE, 1000)
            self.assertEqual(book.close(self.statement(grant, 1001))[1]["returned"], 0)
        self.assertEqual({grant["state"] for grant in self.grants()}, {"pending", "closed"})

    def test_closing_statements_that_are_refused(self):
        self.create()
        with self.open() as book:
            grant, other = (book.grant(FACTS | {"root": "tee"}, SIZE, 1000) for _ in range(2))
            for pattern, statement in (
                ("not authentic", self.statement(grant, 5, key="44" * 32)),
                ("not authentic", self.statement(grant, 5) | {"spent": 4}),
                ("not authentic", self.statement(grant, 5) | {"head": "77" * 32}),
                ("not authentic", self.statement(grant, 5) | {"lease": other["lease"]}),
                ("no lease .* was granted", self.statement(grant | {"lease": "00" * 16}, 5)),
            ):
                with self.refused(pattern):
                    book.close(statement)
            self.assertEqual({grant["state"] for grant in self.grants()}, {"pending"})
            book.close(self.statement(grant, 5))
            with self.refused("closed before"):
                book.close(self.statement(grant, 5))
            self.assertEqual(ledger.left_of(book.assets["demo"]), LIFETIME - 1 - 5 - 1000)

    def test_leases_that_enclaves_report(self):
        """One that was granted is complete; another one is the mark of an old copy."""
        self.create()
        with self.open() as book:
            grant = book.grant(FACTS, SIZE, 1000)
            for lease, sequence in (("00" * 16, 2), (grant["lease"], 3), ("00" * 16, 99)):
                with self.refused("an old copy, or another one"):
                    book.check(self.told(lease, sequence))
            self.assertEqual([grant["state"] for grant in self.grants()], ["pending"] * 2)
            for _ in range(2):
                book.check(self.told(grant["lease"], 2))
                book.check(self.told("", 0))
        self.assertEqual([grant["state"] for grant in self.grants()], ["pending", "complete"])

    def told(self, lease, sequence, head=ledger.FIRST):
        """What an enclave says of its lease."""
        return {"lease": lease, "sequence": sequence, "head": head}

    def test_heads_of_the_chain_of_exchanges(self):
        """Each other one that an enclave reports is kept, with its lease, up to the last one."""
        self.create()
        with self.open() as book:
            grant = book.grant(FACTS, SIZE, 1000)
            for head in (ledger.FIRST, "aa" * 32, "aa" * 32, "bb" * 32):
                book.check(self.told(grant["lease"], 2, head))
            kept = [event for event in book.events if event["event"] == "head"]
            heads = [(event["lease"], event["head"]) for event in kept]
            self.assertEqual(heads, [(grant["lease"], "aa" * 32), (grant["lease"], "bb" * 32)])
            self.assertEqual(book.grants[grant["lease"]]["head"], "bb" * 32)
            book.close(self.statement(grant, 5))
            self.assertEqual(book.grants[grant["lease"]]["head"], "66" * 32)
        self.assertEqual(self.grants()[-1]["head"], "66" * 32)


class Concurrency(Case):
    """Several processes that grant at once."""

    SCRIPT = """
path, witness, count, facts = sys.argv[1], sys.argv[2], int(sys.argv[3]), eval(sys.argv[4])
ledger.BUSY_SECONDS = 300
granted = refused = 0
with ledger.Ledger(path, witness) as book:
    for _ in range(count):
        try:
            book.grant(facts, 1, 1000)
            granted += 1
        except muproxy.Failure as error:
            assert "0 that are left" in str(error), error
            refused += 1
print(granted, refused)
"""

    def test_a_thousand_grants_from_eight_processes(self):
        ledger.create(self.path)
        with self.open() as book:
            book.witness = self.witness
            book.tell_witness()
            book.grant(FACTS, 1, 1000, GRANTS * 1000)
        each = GRANTS // PROCESSES + 5
        arguments = [self.path, self.witness, each, repr(FACTS)]
        command = [sys.executable, "-B", "-c", ACTOR + self.SCRIPT, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen(command, **pipes) for _ in range(PROCESSES)]
        told = [process.communicate(timeout=SECONDS)[0].split() for process in processes]
        self.assertEqual([process.returncode for process in processes], [0] * PROCESSES)
        granted, refused = (sum(int(line[n]) for line in told) for n in range(2))
        self.assertEqual((granted, refused), (GRANTS - 1, PROCESSES * each - GRANTS + 1))
        with self.open(self.witness) as book:
            grants = list(book.grants.values())
            self.assertEqual(ledger.left_of(book.assets["demo"]), 0)
            self.assertEqual(ledger.read_witness(self.witness)["hash"], book.hashes[-1])
        self.assertEqual([grant["sequence"] for grant in grants], list(range(1, GRANTS + 1)))
        self.assertEqual(len({grant["lease"] for grant in grants}), GRANTS)
        self.assertEqual(sum(grant["bytes"] for grant in grants), GRANTS * 1000)


class Crashes(Case):
    """kill -9 at every call by which a grant reaches the disk."""

    CALLS = ("pwrite64", "fdatasync", "fsync", "unlink", "write", "rename")
    SCRIPT = """
with ledger.Ledger(sys.argv[1], sys.argv[2]) as book:
    book.grant(eval(sys.argv[3]), 1, 1000)
sys.stdout.write("granted")
sys.stdout.flush()
"""

    @unittest.skipUnless(shutil.which("strace"), "strace is not installed")
    def test_kill_at_every_call(self):
        self.create()
        with self.open() as book:
            ledger.write_witness(self.witness, 3, book.hashes[2])
        kills, granted = 0, 1
        for call in self.CALLS:
            for number in itertools.count(1):
                strace = ["strace", "-o", "/dev/null", "-e", f"trace={call}"]
                strace += ["-e", f"inject={call}:signal=KILL:when={number}"]
                done = run(self.SCRIPT, self.path, self.witness, repr(FACTS), prefix=strace)
                with self.open(self.witness) as book:
                    count = len(book.grants)
                    left = ledger.left_of(book.assets["demo"])
                self.assertEqual(left, LIFETIME - 1 - (count - 1) * 1000, (call, number))
                self.assertIn(count - granted, (0, 1), (call, number))
                if done.stdout:
                    self.assertEqual(count, granted + 1, (call, number))
                granted = count
                if done.returncode == 0:
                    break
                self.assertIn(done.returncode, (-signal.SIGKILL, 128 + signal.SIGKILL), done.stderr)
                kills += 1
        self.assertGreater(kills, 12)
        grants = self.grants()
        self.assertEqual([grant["sequence"] for grant in grants], list(range(1, granted + 1)))

    @unittest.skipUnless(shutil.which("strace"), "strace is not installed")
    def test_on_the_disk_before_it_returns(self):
        """The rows, then the end of the journal, which is the commit; then the witness."""
        self.create()
        with self.open() as book:
            ledger.write_witness(self.witness, 3, book.hashes[2])
        calls, trace = "pwrite64,fdatasync,fsync,unlink,rename,write", self.folder / "trace"
        strace = ["strace", "-y", "-s", "20", "-o", trace, "-e", f"trace={calls}"]
        done = run(self.SCRIPT, self.path, self.witness, repr(FACTS), prefix=strace)
        self.assertEqual(done.stdout, "granted", done.stderr)
        folder, path, told = f"<{self.folder}>)", f"<{self.path}>", f"<{self.witness}.new>"
        steps = (
            ("pwrite64", "-journal>"),
            ("fdatasync", "-journal>"),
            ("pwrite64", path),
            ("fdatasync", path),
            ("unlink", "-journal"),
            ("fdatasync|fsync", folder),
            ("write", told),
            ("fsync", told),
            ("rename", str(self.witness)),
            ("fsync", folder),
            ("write", '"granted"'),
        )
        lines = iter(trace.read_text().splitlines())
        for calls, word in steps:
            found = (line for line in lines if re.match(rf"({calls})\(", line) and word in line)
            self.assertTrue(next(found, None), f"no {calls} of {word}:\n{trace.read_text()}")


class Rows(Case):
    """Whatever is changed in a ledger is found out, row by row."""

    def setUp(self):
        super().setUp()
        self.create()
        with self.open() as book:
            for size in (1000, 2000, 3000):
                book.grant(FACTS, SIZE, size)
        self.before = self.path.read_bytes()

    def rows(self):
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            return db.execute("SELECT number, event, hash FROM events ORDER BY number").fetchall()

    def write(self, rows):
        """Have these rows and no others in the ledger."""
        self.path.write_bytes(self.before)
        with contextlib.closing(sqlite3.connect(self.path)) as db, db:
            db.execute("DELETE FROM events")
            db.executemany("INSERT INTO events VALUES (?, ?, ?)", rows)

    def chained(self, texts):
        """Rows of a chain without a fault."""
        rows, last = [], ledger.FIRST
        for number, text in enumerate(texts, 1):
            last = ledger.chain(last, text)
            rows.append((number, text, last))
        return rows

    def test_edited(self):
        rows = self.rows()
        self.write(rows)
        self.open().__exit__()
        edits = [(*rows[:at], *rows[at + 1 :]) for at in range(len(rows) - 1)]
        for at, (number, text, row_hash) in enumerate(rows):
            for other in (
                (number, text.replace(":", ": ", 1), row_hash),
                (number, re.sub('"time":"20', '"time":"19', text), row_hash),
                (number, text, "00" * 32),
                (number, None, row_hash),
                (number, b"\xff", row_hash),
            ):
                edits.append((*rows[:at], other, *rows[at + 1 :]))
        first, second = rows[3], rows[4]
        swapped = ((first[0], *second[1:]), (second[0], *first[1:]))
        edits.append((*rows[:3], *swapped, *rows[5:]))
        for edit in edits:
            self.write(edit)
            with self.subTest(edit=edit), self.refused(r"row \d was changed"):
                self.open()

    def test_sums_of_a_chain_without_a_fault(self):
        """Who makes the hashes fit still can't grant too much, twice, or out of order."""
        texts = [text for _, text, _ in self.rows()]
        grant = json.loads(texts[-1])
        lease = {"time": "now", "lease": grant["lease"]}
        close = lease | {"event": "close", "spent": 0, "head": "00" * 32, "returned": 0}
        ready, other = lease | {"event": "ready"}, {"lease": "00" * 16, "bytes": 1}
        head = lease | {"event": "head", "head": "00" * 32}
        more = {"event": "raise", "asset": "demo", "lifetime": LIFETIME, "reason": "x"}
        for pattern, *events in (
            ("exceeds the lifetime", grant | other | {"sequence": 5, "bytes": LIFETIME}),
            ("sequence is not the next", grant | other),
            ("sequence is not the next", grant | other | {"sequence": 6}),
            ("granted before", grant | {"sequence": 5, "bytes": 1}),
            ("asset is not known", grant | {"asset": "x"}),
            ("not pending", ready, ready),
            ("not pending", close, ready),
            ("not complete", head),
            ("not complete", ready, close, head),
            ("lease is closed", close, close),
            ("gives too much back", close | {"returned": 1}),
            ("no grant", close | {"lease": "00" * 16}),
            ("no grant", ready | {"lease": "00" * 16}),
            ("begins once", json.loads(texts[0])),
            ("its asset is known", json.loads(texts[1])),
            ("does not raise", more | {"time": "now"}),
            ("fields: time", more),
            ("fields: bytes", grant | {"bytes": -1}),
        ):
            added = [mp.encode_json(event).decode() for event in events]
            self.write(self.chained([*texts, *added]))
            with self.subTest(pattern=pattern):
                with self.refused(f"row {len(texts) + len(events)} was changed: .*{pattern}"):
                    self.open()

        self.write(self.chained(texts[1:]))
        with self.refused("row 1 was changed: a ledger begins once, and with that"):
            self.open()
        self.write([])
        with self.refused("it has no rows", 2):
            self.open()

    def test_verify_says_it_in_a_line(self):
        done = tool("verify", self.path)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        rows = self.rows()
        self.assertIn(
            f"{len(rows)} rows, each follows from those before it: {rows[-1][2]}\n", done.stdout
        )
        self.write(rows[1:])
        self.assertFails(1, "row 2 was changed", tool("verify", self.path))


class Witness(Case):
    """A copy of the ledger is a ledger too; a witness knows which one is old."""

    def setUp(self):
        super().setUp()
        ledger.create(self.path)
        with self.open(self.witness) as book:
            book.tell_witness()
            book.grant(FACTS, SIZE, 1000, LIFETIME)
        self.old = self.path.read_bytes()

    def grant(self, witness):
        with self.open(witness) as book:
            return book.grant(FACTS, SIZE, 1000)

    def test_old_copy(self):
        for _ in range(2):
            self.grant(self.witness)
        newest = self.path.read_bytes()
        self.path.write_bytes(self.old)
        for verb in ("show", "history", "verify"):
            done = tool(verb, self.path, "--witness", self.witness)
            self.assertFails(1, "older than its witness, .* has 3 rows, .* has seen 5", done)
        with self.refused("older than its witness"):
            self.grant(self.witness)
        self.assertEqual(self.path.read_bytes(), self.old)
        self.path.write_bytes(newest)
        self.assertEqual(self.grant(self.witness)["sequence"], 4)

    def test_old_copy_that_went_on(self):
        """As many rows as the witness has seen, or more, but others."""
        self.grant(self.witness)
        self.path.write_bytes(self.old)
        for _ in range(2):
            self.grant(None)
            with self.refused("older than its witness, or another one"):
                self.grant(self.witness)

    def test_another_ledger(self):
        self.path.unlink()
        ledger.create(self.path)
        with self.refused("or another one"):
            self.grant(self.witness)

    def test_behind_is_as_good_as_a_crash_before_it_was_told(self):
        self.grant(None)
        with mock.patch.object(ledger, "write_witness", side_effect=OSError(28, "No space left")):
            with self.refused("No space left", 2):
                self.grant(self.witness)
        self.assertEqual(len(self.grants()), 3)  # what it could not tell of is counted
        self.assertEqual(self.grant(self.witness)["sequence"], 4)
        self.assertEqual(ledger.read_witness(self.witness)["count"], 6)

    def test_missing_or_damaged(self):
        kept = self.witness.read_bytes()
        self.witness.unlink()
        with self.refused("there is no witness, but the ledger has granted"):
            self.grant(self.witness)
        for data in (b"", b"{}", kept.replace(b'"count":3', b'"count":0'), b"x" * 10**5):
            self.witness.write_bytes(data)
            with self.refused("not a ledger's witness", 2):
                self.grant(self.witness)
        self.witness.write_bytes(kept.replace(b'"count":3', b'"count":300'))
        with self.refused("older than its witness"):
            self.grant(self.witness)
        self.assertEqual(len(self.grants()), 1)

    def test_make_one(self):
        done = tool("witness", self.path, "--witness", self.witness)
        self.assertFails(2, "is there already", done)
        self.assertFails(2, "--witness FILE", tool("witness", self.path))
        self.witness.unlink()
        done = tool("witness", self.path, "--witness", self.witness)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(self.grant(self.witness)["sequence"], 2)
        far = self.folder / "no" / "where"
        self.assertFails(2, "No such file", tool("witness", self.path, "--witness", far))


class Files(Case):
    """One line for each thing that can be wrong with a file; nothing is lost."""

    def test_modes(self):
        self.create()
        self.assertEqual(self.path.stat().st_mode & 0o777, 0o600)
        for mode in (0o640, 0o604, 0o644):
            self.path.chmod(mode)
            with self.refused(f"others can read it; chmod 600 {self.path}", 2):
                self.open()

    def test_never_in_the_place_of_another(self):
        self.create()
        before = self.path.read_bytes()
        with self.refused("File exists", 2):
            ledger.create(self.path)
        self.assertEqual(self.path.read_bytes(), before)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["ledger"])

    def test_what_is_no_ledger(self):
        with self.refused("No such file", 2):
            self.open()
        for data in (b"", b"hello", b"SQLite format 3\0" + bytes(4096)):
            self.path.write_bytes(data)
            self.path.chmod(0o600)
            with self.subTest(data=data), self.refused("not a ledger, or damaged", 2):
                self.open()
            self.assertEqual(self.path.read_bytes(), data)
        with self.refused("No such file", 2):
            ledger.create(self.folder / "no" / "where")

    def test_damaged(self):
        """Pages of zeros, as a disk that failed leaves them."""
        self.create()
        data = self.path.read_bytes()
        for start in range(0, len(data), 4096):
            self.path.write_bytes(data[:start] + bytes(4096) + data[start + 4096 :])
            done = tool("verify", self.path)
            self.assertIn(done.returncode, (1, 2), start)
            self.assertEqual(done.stderr.count("\n"), 1, done.stderr)

    def test_file_systems_that_nobody_knows(self):
        for place in ("/proc/self/ledger", "/sys/ledger"):
            for attempt in (ledger.create, ledger.Ledger):
                with self.refused("may not be this machine's own: put the ledger on a local", 2):
                    attempt(place)

    def test_another_process_holds_it(self):
        self.create()
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with mock.patch.object(ledger, "BUSY_SECONDS", 0.1):
                with self.refused("another process is busy with it; try again", 2):
                    self.open()
            other.execute("ROLLBACK")
        self.assertEqual(len(self.grants()), 1)

    def test_replaced_while_it_is_open(self):
        """The same file with an older content: it is found out before anything is granted."""
        self.create()
        old = self.path.read_bytes()
        with self.open() as book:
            book.grant(FACTS, SIZE, 1)
            self.path.write_bytes(old)
            with self.assertRaises(muproxy.Failure):
                book.grant(FACTS, SIZE, 1)
        self.assertEqual(len(self.grants()), 1)

    @unittest.skipUnless(os.getuid() == 0, "needs root")
    def test_full_disk(self):
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "ledger", self.folder]
        subprocess.run(mount, check=True)
        self.addCleanup(subprocess.run, ["umount", self.folder], check=True)
        self.create()
        filler = self.folder / "filler"
        for spare in (0, 1, 2):  # pages
            with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            os.truncate(filler, filler.stat().st_size - 4096 * spare)
            count = len(self.grants())
            with self.open() as book, self.refused("no space left on its disk", 2):
                while True:
                    count += bool(book.grant(FACTS, SIZE, 1))
            self.assertEqual(len(self.grants()), count)
            filler.unlink()
        with self.open() as book:
            self.assertEqual(book.grant(FACTS, SIZE, 1)["sequence"], count + 1)
        filler.write_bytes(bytes(os.statvfs(self.folder).f_bavail * 4096))
        with self.refused("no space left|No space left|full", 2):
            ledger.create(self.folder / "other")
        self.assertEqual({path.name for path in self.folder.iterdir()}, {"ledger", "filler"})


class CommandLine(Case):
    """tools/ledger.py, as an owner types it."""

    def setUp(self):
        super().setUp()
        self.create()
        with self.open() as book:
            book.grant(FACTS, SIZE, 1000)
            facts = {"lease": list(book.grants)[-1], "sequence": 2, "head": ledger.FIRST}
            book.check(facts)

    def facts(self, *arguments):
        done = tool(*arguments, "--json", "-")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return json.loads(done.stdout)

    def test_show(self):
        done = tool("show", self.path)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        row = done.stdout.splitlines()[1].split()
        self.assertEqual(row, ["demo", "1,000,000", "1,001", "0", "998,999", "2", "1", "2"])
        facts = self.facts("show", self.path)
        self.assertEqual(list(facts)[:2], ["tool", "version"])
        self.assertEqual((facts["tool"], facts["version"], facts["rows"]), ("ledger", 1, 5))
        asset = {"lifetime": LIFETIME, "granted": 1001, "returned": 0, "left": 998_999}
        asset |= {"grants": 2, "pending": 1, "last_sequence": 2}
        self.assertEqual(facts["assets"], {"demo": asset})
        path = self.folder / "facts.json"
        tool("show", self.path, "--json", path)
        self.assertEqual(json.loads(path.read_text()), facts)

    def test_history_without_keys(self):
        done = tool("history", self.path)
        kinds = [line.split()[2] for line in done.stdout.splitlines()]
        self.assertEqual(kinds, ["ledger:", "create:", "grant:", "grant:", "ready:"])
        facts = self.facts("history", self.path)
        self.assertEqual(facts["events"][3]["bytes"], 1000)
        self.assertNotIn(FACTS["close"], done.stdout + json.dumps(facts))

    def test_raise(self):
        budget = ["--asset", "demo", "--budget", 2 * LIFETIME]
        self.assertEqual(tool("raise", self.path, *budget).returncode, 2)
        done = tool("raise", self.path, *budget, "--reason", "a second year")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("2,000,000 bytes, 1,998,999 left", done.stdout)
        events = self.facts("history", self.path)["events"]
        self.assertEqual(events[-1]["reason"], "a second year")
        self.assertFails(2, "more than that", tool("raise", self.path, *budget, "--reason", "x"))

    def test_mistakes(self):
        self.assertFails(2, "No such file", tool("show", self.folder / "none"))
        self.assertFails(2, "No such file", tool("show", self.path, "--json", "/no/such/file"))
        self.assertFails(2, "No space left", tool("show", self.path, "--json", "/dev/full"))


class Unlock(Case):
    """tools/owner.py and a real enclave. The tests go on from one another, in their order."""

    POINTS = """
import os, signal
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def prove(session, token, *arguments, real=muproxy.Session.prove):
    if "lease" not in token:
        return real(session, token, *arguments)
    if point == "before it is sent":
        die()
    if point == "once it is sent":
        muproxy.Session._receive = die
    ready = real(session, token, *arguments)
    if point == "once the enclave is ready":
        die()
    return ready
point = sys.argv.pop(1)
muproxy.Session.prove = prove
if point == "before the grant":
    ledger.Ledger.grant = die
if point == "before the commit":
    ledger.Ledger.commit = die
if point == "once it is committed":
    ledger.Ledger.tell_witness = die
if point == "unchecked":
    ledger.Ledger.check = lambda *_: None
sys.exit(owner.main(sys.argv[1:]))
"""
    KILLED = {  # point: whether the grant is there afterwards
        "before the grant": False,
        "before the commit": False,
        "once it is committed": True,
        "before it is sent": True,
        "once it is sent": True,
        "once the enclave is ready": True,
    }

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.home = pathlib.Path(folder.name)
        cls.site = make_site(cls.home)
        cls.enclave = Enclave(cls.site, environment={"ENCLAVE_THREADS": "1"})
        cls.addClassCleanup(cls.enclave.end)
        cls.files = [*cls.enclave.flags("owner"), "--witness", cls.home / "witness"]
        cls.lease = ["--token-file", cls.site.token, "--budget", 1000, "--rate", FREE_RATE]
        cls.new = ["--new-ledger", "--lifetime-budget", LIFETIME]

    def setUp(self):
        super().setUp()
        self.path = self.site.ledger

    def status(self):
        """READY, as the enclave tells its owner."""
        with contextlib.closing(self.enclave.session("owner")) as session:
            token = self.enclave.unlock_token()
            return session.prove({name: token[name] for name in ("key", "model")})

    def unlock(self, *flags, point=None):
        """Run `owner.py unlock`, up to one of POINTS."""
        if point is None:
            return own("unlock", *self.files, *self.lease, *flags)
        return run(self.POINTS, point, "unlock", *self.files, *self.lease, *flags)

    def test_1_refusals_leave_the_enclave_locked_and_grant_nothing(self):
        self.assertFails(2, "there is no ledger, and no unlock without one", self.unlock())
        self.assertFalse(self.path.exists())
        wrong = self.home / "wrong.json"
        values = json.loads(self.site.reference.read_text()) | {"measurement": "00" * 32}
        wrong.write_text(json.dumps(values))
        done = self.unlock(*self.new, "--reference", wrong)
        self.assertFails(1, "measurement: expected 0000", done)
        self.assertEqual(self.grants(), [])
        done = self.unlock(*self.new, "--budget", LIFETIME + 1)
        self.assertFails(1, "1,000,001 bytes exceed the 1,000,000", done)
        self.assertEqual(self.grants(), [])
        self.assertEqual(self.status()["status"], "locked")

    def test_2_unlock_completes_the_row(self):
        done = self.unlock(*self.new)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("ledger: 999,000 of 1,000,000 bytes of demo left\n", done.stdout)
        self.assertNotIn("no --witness", done.stdout)
        (grant,) = self.grants()
        ready = self.status()
        self.assertEqual((ready["lease"], ready["sequence"]), (grant["lease"], 1))
        self.assertEqual((grant["state"], grant["bytes"], grant["root"]), ("complete", 1000, "psk"))
        values = muproxy.read_reference(self.site.reference)
        self.assertEqual(grant["measurement"], values["measurement"])
        self.assertEqual(grant["model"], ready["model"])
        self.assertNotIn(grant["close"], done.stdout)
        self.assertFails(2, "leave out --new-ledger", self.unlock(*self.new))
        done = self.unlock("--lifetime-budget", 5)
        self.assertFails(2, "leave out --lifetime-budget", done)
        self.assertEqual(len(self.grants()), 1)

    def test_3_killed_at_every_step(self):
        """Each time the bytes are counted once they are committed, and no lease is sent again."""
        for point, is_granted in self.KILLED.items():
            before = self.grants()
            done = self.unlock(point=point)
            self.assertEqual(done.returncode, -signal.SIGKILL, done.stderr)
            after = self.grants()
            self.assertEqual(len(after), len(before) + is_granted, point)
            if is_granted:
                self.assertEqual((after[-1]["state"], after[-1]["bytes"]), ("pending", 1000))
            if point.startswith("once the enclave"):
                self.assertEqual(self.status()["lease"], after[-1]["lease"])
                done = own("status", *self.files)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertEqual(self.grants()[-1]["state"], "complete")
            done = self.unlock()
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            last = self.grants()[-1]
            self.assertEqual(last["sequence"], len(after) + 1)
            self.assertNotIn(last["lease"], [grant["lease"] for grant in after])
            ready = self.status()
            self.assertEqual((ready["lease"], ready["sequence"]), (last["lease"], last["sequence"]))

    def test_4_old_copies(self):
        """Found out by the witness; without it by the live enclave, which would refuse as well."""
        old = self.path.read_bytes()
        self.assertEqual(self.unlock().returncode, 0)
        newest, before = self.path.read_bytes(), self.status()
        self.path.write_bytes(old)
        for verb in ("status", "unlock"):
            flags = self.lease if verb == "unlock" else []
            done = own(verb, *self.files, *flags)
            self.assertFails(1, "older than its witness", done)
            done = own(verb, *self.enclave.flags("owner"), *flags)
            self.assertFails(1, f"holds lease {before['lease']}.* an old copy", done)
        self.assertEqual(self.path.read_bytes(), old)
        self.files = self.enclave.flags("owner")  # of this test alone
        done = self.unlock(point="unchecked")
        self.assertFails(1, "lease was seen before.* old copy; the 1,000 bytes .* counted", done)
        self.assertIn("ledger: no --witness, so an old copy", done.stdout)
        self.assertEqual(self.status(), before)
        self.path.write_bytes(newest)
        self.assertEqual(own("status", *self.files).returncode, 0)

    def test_5_clock_set_back_a_year(self):
        script = 'ledger.now = lambda: "2020-01-01T00:00:00+00:00"\nsys.exit(owner.main())'
        arguments = ["unlock", *self.files, *self.lease]
        done = run(script.replace("main()", "main(sys.argv[1:])"), *arguments)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        last = self.grants()[-1]
        self.assertEqual((last["state"], last["time"][:4]), ("complete", "2020"))
        self.assertEqual(self.status()["sequence"], last["sequence"])

    @unittest.skipUnless(os.getuid() == 0, "needs root")
    def test_5_full_disk(self):
        """Nothing is granted, and nothing is sent: the enclave keeps the lease that it had."""
        before, full = self.status(), self.folder / "ledger"
        mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "ledger", self.folder]
        subprocess.run(mount, check=True)
        self.addCleanup(subprocess.run, ["umount", self.folder], check=True)
        shutil.copy(self.path, full)
        with open(self.folder / "filler", "wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
        kept = full.read_bytes()
        done = own("unlock", *self.files, "--ledger", full, *self.lease)
        self.assertFails(2, "no space left on its disk", done)
        self.assertEqual((full.read_bytes(), self.status()), (kept, before))

    def test_6_lock_records_a_closing_statement(self):
        grant, left = self.grants()[-1], self.status()["budget_left"]
        said = len(self.enclave.lines)
        self.assertEqual(own("status", *self.files).returncode, 0)
        done = own("lock", *self.files)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        (line,) = re.findall(r"(?m)^lease .* closed: .*$", done.stdout)
        words = r"lease (\w+) closed: (\d+) bytes spent since .*, 0 of 1,000 given back"
        found = re.fullmatch(words, line)
        self.assertEqual(found[1], grant["lease"])
        self.assertEqual(self.grants()[-1]["state"], "closed")
        with self.open() as book:
            event = book.events[-1]
        self.assertEqual((event["event"], event["spent"]), ("close", int(found[2])))
        self.assertLess(0, event["spent"])
        self.assertGreaterEqual(event["spent"] + left, 1000)
        port = self.enclave.wait_for("listening", said).split()[-1]
        type(self).files = [*self.files, "--port", port]  # of another gate

    def test_7_lock_works_whatever_the_ledger_is(self):
        self.path.chmod(0o644)
        done = own("lock", *self.files)
        self.path.chmod(0o600)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("status: locked", done.stdout)
        self.assertIn("chmod 600", done.stderr)


if __name__ == "__main__":
    unittest.main()
