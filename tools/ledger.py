"""The owner's ledger: how many bytes of each asset's lifetime budget were granted to leases.

    ledger.py show FILE                      what each asset has left
    ledger.py history FILE                   every row
    ledger.py verify FILE                    recompute the chain and the sums
    ledger.py raise FILE --asset A --budget N --reason TEXT   a higher lifetime budget
    ledger.py witness FILE --witness FILE    make a witness of the ledger as it is now

`owner.py unlock` has each grant on the disk before the weights key leaves, so whatever fails in
between, bytes are lost and never given twice. An asset keeps its budget when it is sealed anew. The
moments in the rows inform readers; nothing rests on a clock.

The file is a SQLite database of one table: rows are appended, each an event in canonical JSON and
the SHA-256 of the hash before it and that event. A copy of the file is a ledger too, and an old one
would grant anew: --witness keeps count and hash of the last row in a file elsewhere, and whoever
has it refuses a ledger that does not lead there. Live enclaves are witnesses as well: they report
the lease that they hold.

--json FILE (or - for standard output) writes {"tool": "ledger", "version": 1, "rows": N, "hash":
hex, "assets": {asset: {"lifetime", "granted", "returned", "left": bytes, "grants", "pending",
"last_sequence": N}}}; history adds "events": [event, ...], without the keys that closing statements
are verified by.
"""

import argparse
import contextlib
import ctypes
import datetime
import hashlib
import hmac
import json
import os
import pathlib
import secrets
import sqlite3
import sys
import tempfile

sys.dont_write_bytecode = True
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import muprotocol as mp  # noqa: E402
import muproxy  # noqa: E402
from muproxy import REFUSED, Failure  # noqa: E402

LIFETIME_DIVISOR = 1000  # an asset's lifetime budget: a thousandth of its sealed size
GRANT_DIVISOR = 10  # a lease's grant: a tenth of what is left
LEAST_BUDGET = 4096  # bytes: less answers nothing
BUSY_SECONDS = 5  # for other processes to be done; an enclave waits 10 for its token
TABLE = "CREATE TABLE events (number INTEGER PRIMARY KEY, event TEXT, hash TEXT)"
FIRST = bytes(32).hex()  # the hash before the first row
WITNESS_LIMIT = 4096  # bytes
# Where locks and fsync are known to do what they say: f_type of statfs(2), linux/magic.h. In order:
# ext2 to ext4, xfs, btrfs, zfs, f2fs, bcachefs, jfs, ecryptfs, overlayfs, tmpfs.
LOCAL = (0xEF53, 0x58465342, 0x9123683E, 0x2FC12FC1, 0xF2F52010, 0xCA451A4E, 0x3153464A, 0xF15F)
LOCAL += (0x794C7630, 0x01021994)

BYTES = mp.is_integer(0, 1 << 50)
EVENTS = {
    "ledger": {"id": mp.is_hex(16)},  # the first row: no two ledgers are equal
    "create": {"asset": mp.is_name, "size": mp.COUNT, "lifetime": BYTES},
    "raise": {"asset": mp.is_name, "lifetime": BYTES, "reason": mp.is_text(1, 1000)},
    "grant": {
        "asset": mp.is_name,
        "sequence": mp.LEASE["sequence"],
        "lease": mp.LEASE["id"],
        "bytes": mp.LEASE["budget"],
        "model": mp.is_hex(32),  # digest of the sealed header
        "root": muproxy.REFERENCE["root"],  # of the evidence
        "measurement": mp.is_hex(32),
        "close": mp.is_hex(32),  # the handshake's key under which the enclave says what it spent
    },
    "ready": {"lease": mp.is_hex(16)},
    # The head of the enclave's chain of exchanges as it was then: what a log holds up to there, a
    # replay audit can rely on, whatever becomes of the enclave.
    "head": {"lease": mp.is_hex(16), "head": mp.is_hex(32)},
    "close": {"lease": mp.is_hex(16), "spent": mp.COUNT, "head": mp.is_hex(32), "returned": BYTES},
}
SCHEMAS = [
    fields | {"event": mp.is_one_of(name), "time": mp.is_text(1, 40)}
    for name, fields in EVENTS.items()
]
WITNESS = {"version": mp.is_one_of(1), "count": mp.is_integer(1, 1 << 53), "hash": mp.is_hex(32)}


def now():
    """The time in UTC, for readers."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def check_place(path):
    """Refuse a file system that may be another machine's, or that nobody knows. Raises Failure."""
    folder = os.path.dirname(os.path.abspath(path))
    facts = ctypes.create_string_buffer(256)  # struct statfs: f_type is its first word
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(folder), facts):
        raise Failure(f"{path}: {os.strerror(ctypes.get_errno())}")
    kind = int.from_bytes(facts.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)
    if kind not in LOCAL:
        text = f"{path}: a file system of type {kind:#x} may not be this machine's own"
        raise Failure(f"{text}: put the ledger on a local one, such as ext4, xfs or btrfs")


def create(path):
    """A new ledger, whole or not at all, readable by its owner only. Raises Failure."""
    check_place(path)
    path = os.path.abspath(path)
    try:
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path), prefix=".ledger-") as folder:
            made = os.path.join(folder, os.path.basename(path))
            os.close(os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            text = mp.encode_json({"event": "ledger", "time": now(), "id": secrets.token_hex(16)})
            with contextlib.closing(sqlite3.connect(made)) as db, db:
                db.execute(TABLE)
                row = (1, text.decode(), chain(FIRST, text.decode()))
                db.execute("INSERT INTO events VALUES (?, ?, ?)", row)
            os.link(made, path)  # unlike a rename, never in the place of another
        sync_folder(path)
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None
    except sqlite3.Error as error:
        raise Failure(f"{path}: can't be made: {error}") from None


def sync_folder(path):
    """Have the names in a file's folder on the disk. Raises OSError."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Ledger:
    """An open ledger: a context manager. All methods raise Failure, and then have granted nothing.

    events: as in EVENTS, in their order; hashes: of their rows. assets: {name: {lifetime, granted,
    returned: bytes, grants, pending, last_sequence: int}}. grants: {lease id: the event, `state`:
    pending, complete once the enclave has named the lease, closed; and `head`, the last one of the
    enclave's chain that was seen}.
    """

    def __init__(self, path, witness=None):
        self.path, self.witness = path, witness
        self.forget()
        with self.errors():
            check_place(path)
            if os.stat(path).st_mode & 0o077:
                raise Failure(f"{path}: others can read it; chmod 600 {path}")
            place = pathlib.Path(path).absolute().as_uri() + "?mode=rw"
            self.db = sqlite3.connect(place, BUSY_SECONDS, isolation_level=None, uri=True)
        try:
            with self.errors():
                # A rollback journal, so that at rest the one file is all of it and can be copied.
                # Its end is the commit: EXTRA is FULL, and has that on the disk too.
                self.db.execute("PRAGMA journal_mode = DELETE")
                self.db.execute("PRAGMA synchronous = EXTRA")
            with self.transaction():
                pass  # it has been read, and checked
        except BaseException:
            self.db.close()
            raise

    def forget(self):
        """Know no row; the next transaction reads them all."""
        self.events, self.hashes, self.assets, self.grants = [], [], {}, {}

    def take_back(self, count):
        """Know only so many rows, the first ones."""
        events, hashes = self.events[:count], self.hashes[:count]
        self.forget()
        for event in events:
            self.apply(event)
        self.hashes = hashes

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.db.close()

    @contextlib.contextmanager
    def errors(self):
        """What the file or SQLite has to say, in one line."""
        try:
            yield
        except OSError as error:
            raise Failure(f"{error.filename or self.path}: {error.strerror}") from None
        except sqlite3.Error as error:
            text = str(error)
            if "locked" in text:
                text = "another process is busy with it; try again"
            elif "full" in text:
                text = "no space left on its disk"
            elif "not a database" in text or "malformed" in text or "no such table" in text:
                text = f"not a ledger, or damaged ({text}); restore it as the README says"
            raise Failure(f"{self.path}: {text}") from None

    # ---- rows

    @contextlib.contextmanager
    def transaction(self):
        """Nobody else writes during the block. Afterwards what it appended is on the disk, and its
        witness knows; if it fails, nothing is.
        """
        with self.errors():
            count = self.begin()
            try:
                yield
                if len(self.events) == count:
                    return self.end()
                self.commit()
            except BaseException:
                self.end()
                self.take_back(count)
                raise
            self.tell_witness()

    def begin(self):
        """Take the lock and read what is new; the number of rows."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            self.catch_up()
            self.check_witness()
        except BaseException:
            self.end()
            raise
        return len(self.events)

    def commit(self):
        """Have what was appended on the disk."""
        self.db.execute("COMMIT")

    def end(self):
        """Give the lock back; what was not committed is gone."""
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")

    def catch_up(self):
        """Read and check the rows that this process has not seen."""
        known, last = len(self.events), self.hashes[-1] if self.hashes else FIRST
        rows = self.db.execute(
            "SELECT number, event, hash FROM events WHERE number >= ? ORDER BY number", (known,)
        ).fetchall()
        if known and (not rows or rows.pop(0)[2] != last):
            raise Failure(f"{self.path}: it is not what it was a moment ago: start again", REFUSED)
        for number, text, row_hash in rows:
            try:
                if number != len(self.events) + 1:
                    raise ValueError("a row is missing before it")
                if not isinstance(text, str) or chain(last, text) != row_hash:
                    raise ValueError("its hash is wrong")
                self.apply(mp.parse_message(text.encode(), *SCHEMAS))
            except (ValueError, mp.ProtocolError) as error:
                self.forget()
                text = f"{self.path}: row {number} was changed: {muproxy.text_of(error)}"
                raise Failure(f"{text}; restore the ledger as the README says", REFUSED) from None
            self.hashes.append(row_hash)
            last = row_hash
        if not self.events:
            raise Failure(f"{self.path}: not a ledger, or damaged: it has no rows")

    def append(self, event):
        """Add a row; `commit` makes it last."""
        event = event | {"time": now()}
        text = mp.encode_json(event).decode()
        row_hash = chain(self.hashes[-1] if self.hashes else FIRST, text)
        self.apply(mp.parse_message(text.encode(), *SCHEMAS))
        self.hashes.append(row_hash)
        row = (len(self.events), text, row_hash)
        self.db.execute("INSERT INTO events VALUES (?, ?, ?)", row)
        return event

    def apply(self, event):
        """Take an event into the sums. ValueError if it can't follow the ones before it."""
        kind, asset, grant = event["event"], None, self.grants.get(event.get("lease"))
        if kind in ("ready", "head", "close"):
            rule(grant is not None, "no grant of this lease is before it")
            asset = self.assets[grant["asset"]]
        elif kind in ("raise", "grant"):
            rule(event["asset"] in self.assets, "its asset is not known")
            asset = self.assets[event["asset"]]
        rule(bool(self.events) == (kind != "ledger"), "a ledger begins once, and with that")
        if kind == "create":
            rule(event["asset"] not in self.assets, "its asset is known")
            counts = dict.fromkeys(("granted", "returned", "grants", "pending", "last_sequence"), 0)
            self.assets[event["asset"]] = {"lifetime": event["lifetime"]} | counts
        elif kind == "raise":
            rule(event["lifetime"] > asset["lifetime"], "it does not raise the budget")
            asset["lifetime"] = event["lifetime"]
        elif kind == "grant":
            rule(grant is None, "its lease was granted before")
            rule(event["sequence"] == len(self.grants) + 1, "its sequence is not the next one")
            rule(event["bytes"] <= left_of(asset), "it exceeds the lifetime budget")
            asset["granted"] += event["bytes"]
            asset["grants"] += 1
            asset["pending"] += 1
            asset["last_sequence"] = event["sequence"]
            self.grants[event["lease"]] = event | {"state": "pending", "head": FIRST}
        elif kind == "ready":
            rule(grant["state"] == "pending", "its lease is not pending")
            grant["state"] = "complete"
            asset["pending"] -= 1
        elif kind == "head":
            rule(grant["state"] == "complete", "its lease is not complete")
            grant["head"] = event["head"]
        elif kind == "close":
            rule(grant["state"] != "closed", "its lease is closed")
            rule(event["returned"] <= returnable(grant, event["spent"]), "it gives too much back")
            asset["pending"] -= grant["state"] == "pending"
            asset["returned"] += event["returned"]
            grant["state"], grant["head"] = "closed", event["head"]
        self.events.append(event)

    # ---- the witness

    def check_witness(self):
        """Refuse a ledger that does not lead to where its witness has seen it."""
        if self.witness is None:
            return
        seen = read_witness(self.witness)
        if seen is None and self.grants:
            text = f"{self.witness}: there is no witness, but the ledger has granted"
            raise Failure(f"{text}: is its disk there? tools/ledger.py witness makes one", REFUSED)
        if seen and self.hashes[seen["count"] - 1 : seen["count"]] != [seen["hash"]]:
            text = f"{self.path}: the ledger is older than its witness, or another one"
            text += f": it has {len(self.events)} rows, {self.witness} has seen {seen['count']}"
            raise Failure(f"{text}; restore it as the README says", REFUSED)

    def tell_witness(self):
        """Have the witness know the last row; under the lock, so that it never goes back."""
        if self.witness is None:
            return
        with self.errors():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                self.catch_up()
                write_witness(self.witness, len(self.hashes), self.hashes[-1])
            except OSError as error:
                text = f"{self.witness}: {error.strerror}: it was not told of the ledger's last row"
                raise Failure(f"{text}, which stays") from None
            finally:
                self.end()

    # ---- what the owner's commands do

    def grant(self, facts, size, budget=None, lifetime=None):
        """Count a new lease's bytes; they are spent from here on. Returns the event.

        facts: asset, model (digest of the sealed header), root (of the evidence) and measurement of
        the enclave, close (the handshake's key of that name). size: of the sealed model, bytes.
        budget: bytes, None for a tenth of what is left. lifetime: bytes, for a new asset alone.
        """
        name = facts["asset"]
        with self.transaction():
            is_new = name not in self.assets
            if is_new:
                total = size // LIFETIME_DIVISOR if lifetime is None else lifetime
                self.append({"event": "create", "asset": name, "size": size, "lifetime": total})
            elif lifetime is not None:
                text = f"{name} has a lifetime budget already: leave out --lifetime-budget"
                raise Failure(f"{text}, or see tools/ledger.py raise")
            left, lifetime = left_of(self.assets[name]), self.assets[name]["lifetime"]
            wanted = left // GRANT_DIVISOR if budget is None else budget
            more = "--lifetime-budget N gives a new asset another"
            if not is_new:
                more = f"tools/ledger.py raise {self.path} --asset {name} --budget N --reason TEXT"
            if wanted > left:
                text = f"{name}: {wanted:,} bytes exceed the {left:,} that are left of its lifetime"
                raise Failure(f"{text} budget of {lifetime:,}: {more}", REFUSED)
            if budget is None and wanted < LEAST_BUDGET:
                text = f"{name}: a tenth of the {left:,} bytes left of its lifetime budget is too"
                raise Failure(f"{text} little to answer with: say --budget N; {more}", REFUSED)
            event = {"event": "grant", "sequence": len(self.grants) + 1, "bytes": wanted}
            event = self.append(event | {"lease": secrets.token_hex(16)} | facts)
        return event

    def check(self, ready):
        """Compare what an enclave says of its lease (READY) with what was granted.

        A grant that it names is complete. One that is not ours is the mark of an old copy. The head
        of the chain of exchanges is kept when it is another one than was seen before.
        """
        if not ready["lease"]:
            return
        with self.transaction():
            grant = self.grants.get(ready["lease"])
            if grant is None or grant["sequence"] != ready["sequence"]:
                text = f"the enclave holds lease {ready['lease']}, sequence {ready['sequence']}"
                text += f", which is not in {self.path} (its last sequence is {len(self.grants)})"
                raise Failure(f"{text}: the ledger is an old copy, or another one", REFUSED)
            if grant["state"] == "pending":
                self.append({"event": "ready", "lease": ready["lease"]})
            if grant["head"] != ready["head"]:
                self.append({"event": "head", "lease": ready["lease"], "head": ready["head"]})

    def close(self, statement):
        """Record an enclave's closing statement, once a lease. Returns the grant and the event.

        statement: as mp.CLOSING; `spent` counts all leases since the enclave was locked, so an
        earlier one only lessens what comes back. What was not spent is given back only if the
        evidence excludes that the enclave was forked: a fork spends the same lease once more.
        """
        with self.transaction():
            grant = self.grants.get(statement["lease"])
            if grant is None:
                raise Failure(f"{self.path}: no lease {statement['lease']} was granted", REFUSED)
            key, head = (bytes.fromhex(text) for text in (grant["close"], statement["head"]))
            mac = mp.closing(key, statement["lease"], statement["spent"], head)["mac"]
            if not hmac.compare_digest(mac, statement["mac"]):
                text = f"the closing statement of lease {statement['lease']} is not authentic"
                raise Failure(f"{text}: nothing was recorded", REFUSED)
            if grant["state"] == "closed":
                raise Failure(f"lease {statement['lease']} was closed before", REFUSED)
            event = {name: statement[name] for name in ("lease", "spent", "head")}
            event |= {"event": "close", "returned": returnable(grant, statement["spent"])}
            return grant, self.append(event)

    def raise_budget(self, asset, lifetime, reason):
        """A higher lifetime budget. Returns the event."""
        with self.transaction():
            if asset not in self.assets:
                known = ", ".join(self.assets) or "none"
                raise Failure(f"{self.path}: no asset {asset}; it has: {known}")
            if not self.assets[asset]["lifetime"] < lifetime <= 1 << 50:
                text = f"{asset} has a lifetime budget of {self.assets[asset]['lifetime']:,} bytes"
                raise Failure(f"{text}: --budget takes more than that")
            if not EVENTS["raise"]["reason"](reason.strip()):
                raise Failure("--reason: why the budget is raised, in 1 to 1000 characters")
            event = {"event": "raise", "asset": asset, "lifetime": lifetime}
            return self.append(event | {"reason": reason.strip()})


def chain(last, text):
    """The hash of a row: SHA-256 of the hash before it and its event."""
    return hashlib.sha256(bytes.fromhex(last) + text.encode()).hexdigest()


def rule(holds, text):
    """Raise ValueError unless it holds."""
    if not holds:
        raise ValueError(text)


def left_of(asset):
    """Bytes of an asset that may still be granted."""
    return asset["lifetime"] - asset["granted"] + asset["returned"]


def returnable(grant, spent):
    """Bytes of a grant that come back when so many were spent."""
    return max(0, grant["bytes"] - spent) if grant["root"] == "tee" else 0


def read_witness(path):
    """What a witness has seen, None if there is none. Raises Failure."""
    if not os.path.lexists(path):
        return None
    return muproxy.load(
        path, lambda d: mp.parse_message(d, WITNESS), "a ledger's witness", limit=WITNESS_LIMIT
    )


def write_witness(path, count, row_hash):
    """Replace a witness, whole or not at all, on the disk. Raises OSError."""
    text = mp.encode_json({"version": 1, "count": count, "hash": row_hash}) + b"\n"
    new = f"{path}.new"
    with open(new, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync_folder(path)


# ---------------------------------------------------------------- command line


def summary(ledger):
    """The JSON document of a ledger."""
    assets = {name: facts | {"left": left_of(facts)} for name, facts in ledger.assets.items()}
    facts = {"tool": "ledger", "version": 1, "rows": len(ledger.events)}
    return facts | {"hash": ledger.hashes[-1], "assets": assets}


def show(ledger, flags):
    """`show`: what each asset has left."""
    rows = [("asset", "lifetime", "granted", "given back", "left", "grants", "pending", "sequence")]
    for name, facts in ledger.assets.items():
        numbers = [facts["lifetime"], facts["granted"], facts["returned"], left_of(facts)]
        numbers += [facts[count] for count in ("grants", "pending", "last_sequence")]
        rows.append((name, *(f"{number:,}" for number in numbers)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:]))
        say(flags, "  ".join((first.ljust(widths[0]), *cells)))
    return summary(ledger)


def history(ledger, flags):
    """`history`: every row."""
    events = [{k: v for k, v in event.items() if k != "close"} for event in ledger.events]
    for number, event in enumerate(events, 1):
        facts = (f"{k} {v}" for k, v in event.items() if k not in ("event", "time"))
        say(flags, f"{number} {event['time']} {event['event']}: {', '.join(facts)}")
    return summary(ledger) | {"events": events}


def verify(ledger, flags):
    """`verify`: recompute the chain and the sums."""
    # Whoever has opened the ledger has done that: what is left is what SQLite says of its file.
    with ledger.errors():
        found = [row for (row,) in ledger.db.execute("PRAGMA integrity_check")]
    if found != ["ok"]:
        raise Failure(f"{ledger.path}: {found[0]}; restore it as the README says", REFUSED)
    say(flags, f"{len(ledger.events)} rows, each follows from those before it: {ledger.hashes[-1]}")
    say(flags, f"witness: {flags.witness or 'none was named, so an old copy is not found out'}")
    return summary(ledger)


def raise_budget(ledger, flags):
    """`raise`: a higher lifetime budget."""
    event = ledger.raise_budget(flags.asset, flags.budget, flags.reason)
    left = left_of(ledger.assets[flags.asset])
    say(flags, f"{flags.asset}: lifetime budget {event['lifetime']:,} bytes, {left:,} left")
    return summary(ledger)


def make_witness(ledger, flags):
    """`witness`: make a witness of the ledger as it is now."""
    if flags.witness is None:
        raise Failure("--witness FILE: where it is to be, best on another disk")
    if os.path.lexists(flags.witness):
        raise Failure(f"{flags.witness}: is there already")
    with ledger.errors():
        ledger.witness = flags.witness
        write_witness(flags.witness, len(ledger.hashes), ledger.hashes[-1])
    say(flags, f"{flags.witness}: has seen {len(ledger.events)} rows")
    return summary(ledger)


def say(flags, line):
    """A line for the reader, unless JSON goes there."""
    if flags.json != "-":
        print(line)


VERBS = {"show": show, "history": history, "verify": verify, "raise": raise_budget}
VERBS |= {"witness": make_witness}


def make_parser():
    """The command line."""
    parser = argparse.ArgumentParser(prog="ledger", description=__doc__.partition(":")[0])
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, run in VERBS.items():
        command = verbs.add_parser(
            verb, help=run.__doc__.split(": ")[1].strip("."), allow_abbrev=False
        )
        command.add_argument("ledger", metavar="FILE", help="the ledger: MODEL.key.ledger")
        command.add_argument("--witness", metavar="FILE", help="where its last row is known")
        command.add_argument("--json", metavar="FILE", help="write JSON; - for standard output")
        if verb == "raise":
            command.add_argument("--asset", required=True)
            command.add_argument("--budget", type=int, required=True, help="bytes in its lifetime")
            command.add_argument("--reason", required=True, help="kept in the ledger")
    return parser


def main(argv=None):
    """The command line. Returns the exit status."""
    flags = make_parser().parse_args(argv)
    try:
        with Ledger(flags.ledger, None if flags.verb == "witness" else flags.witness) as ledger:
            facts = VERBS[flags.verb](ledger, flags)
        if flags.json:
            text = json.dumps(facts, indent=1) + "\n"
            if flags.json == "-":
                print(text, end="")
            else:
                pathlib.Path(flags.json).write_text(text, "utf-8")
    except Failure as error:
        print(f"ledger: error: {error}", file=sys.stderr)
        return error.status
    except OSError as error:
        print(f"ledger: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return muproxy.USAGE
    return muproxy.DONE


if __name__ == "__main__":
    sys.exit(main())
