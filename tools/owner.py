"""The owner's commands: they release the weights key, and run on the owner's station alone.

    owner.py keygen token|psk FILE      an access token, or a provisioning secret
    owner.py unlock                     verify the enclave, then release the key with a lease
    owner.py status | lock | revoke     of an enclave that is unlocked

The weights key is in here until the evidence has been verified and the key is sealed for the
enclave that gave it. What a lease may let out is granted by the ledger (tools/ledger.py), beside
the key file unless --ledger says otherwise; without a ledger nothing is unlocked.
"""

import contextlib
import getpass
import hashlib
import os
import pathlib
import secrets
import sys

sys.dont_write_bytecode = True
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ledger  # noqa: E402

import muprotocol as mp  # noqa: E402
import muproxy  # noqa: E402
from muprotocol import ProtocolError  # noqa: E402
from muproxy import DONE, REFUSED, USAGE, Failure  # noqa: E402

# ---------------------------------------------------------------- key files

SCRYPT = {"n": mp.is_one_of(*(1 << power for power in range(14, 21))), "salt": mp.is_hex(16)}
SCRYPT |= dict.fromkeys(("r", "p"), mp.is_integer(1, 16))
SCRYPT_MEMORY = (2 << 30) - 2  # bytes: as much as hashlib takes
KEY_FACTS = {"version": mp.is_one_of(1), "asset": mp.is_name}
KEY = KEY_FACTS | {"key": mp.is_hex(32)}
WRAPPED_KEY = KEY_FACTS | {"scrypt": mp.is_object(SCRYPT), "nonce": mp.is_hex(12)}
WRAPPED_KEY |= {"wrapped": mp.is_hex(32 + mp.TAG)}


def read_passphrase(path):
    """The passphrase of a wrapped key. Raises Failure."""
    return muproxy.load(path, lambda d: d.decode("utf-8").rstrip("\r\n"), "a passphrase", True)


def read_key_file(path, ask_passphrase):
    """(asset, weights key of 32 bytes); ask_passphrase() is called for a wrapped one. Failure."""
    from cryptography.exceptions import InvalidTag

    def parse(data):
        fields = mp.parse_message(data, KEY, WRAPPED_KEY)
        if "key" in fields:
            return fields["asset"], bytes.fromhex(fields["key"])
        nonce, wrapped = (bytes.fromhex(fields.pop(name)) for name in ("nonce", "wrapped"))
        costs = fields["scrypt"] | {"salt": bytes.fromhex(fields["scrypt"]["salt"])}
        key = hashlib.scrypt(ask_passphrase().encode(), maxmem=SCRYPT_MEMORY, dklen=32, **costs)
        try:
            return fields["asset"], mp.aead(key).decrypt(nonce, wrapped, mp.encode_json(fields))
        except InvalidTag:
            raise Failure(f"{path}: wrong passphrase, or the file was changed") from None

    return muproxy.load(path, parse, "a weights key file", True)


def ask_passphrase(options):
    """The passphrase of the key file, from a file or the terminal."""
    if options.passphrase_file:
        return options.passphrase_file
    if not sys.stdin.isatty():
        raise Failure(f"{options.key} has a passphrase: --passphrase-file FILE")
    return getpass.getpass(f"passphrase of {options.key}: ")


# ---------------------------------------------------------------- token, lease, ledger


def read_owner(options):
    """The unlock token without a lease; no key for weak evidence. Raises Failure."""
    root, container = options.reference["root"], options.model
    if muproxy.is_for_development(options.reference) and not options.development:
        worth = muproxy.ROOTS[root.partition(":")[0]]
        text = f"root {root} is {worth}; this command sends the weights key"
        raise Failure(f"{text}: say --development if that is meant", REFUSED)
    if container is None or options.key is None:
        raise Failure("an owner names the sealed model and its key: --model FILE --key FILE")
    asset, key = read_key_file(options.key, lambda: ask_passphrase(options))
    if asset != container.fields["asset"] or not container.is_key(key):
        raise Failure(f"{options.key} is not the key of this model: {container.fields['asset']}")
    return {"key": key.hex(), "model": container.digest}


def make_lease(options):
    """A lease as the flags say, without what the ledger gives it. Raises Failure."""
    lease = {name: getattr(options, name) for name in ("rate", "burst", "expiry")}
    lease |= {"users": [mp.token_hash(token) for token in options.token_file or ()]}
    policy = {name: getattr(options, name) for name in ("verified", "latency_ms", "shape")}
    limits = mp.LEASE | mp.POLICY
    wrong = [name for name, value in (lease | policy).items() if not limits[name](value)]
    for name in ("budget", "lifetime_budget"):
        value = getattr(options, name)
        if value is not None and not mp.LEASE["budget"](value):
            wrong.append(name)
    if wrong:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        raise Failure(f"out of range: {flags}")
    if not lease["users"]:
        raise Failure("a lease admits access tokens: --token-file FILE, once for each")
    return lease | {"policy": policy}


def ledger_path(options):
    """Where the ledger is: beside the key file, unless the flags say otherwise."""
    return options.ledger or f"{options.key}.ledger"


def open_ledger(options):
    """The ledger that an unlock needs; a new one only where that is said. Raises Failure."""
    path, witness = ledger_path(options), options.witness
    if options.new_ledger and not os.path.lexists(path):
        ledger.create(path)
    if not os.path.lexists(path):
        text = f"{path}: there is no ledger, and no unlock without one: bring it back, or say"
        raise Failure(f"{text} --new-ledger if this model's key was never released")
    book = ledger.Ledger(path, witness)
    if options.new_ledger and book.grants:
        raise Failure(f"{path}: this ledger has granted before: leave out --new-ledger")
    if witness is not None and not os.path.lexists(witness) and not book.grants:
        book.tell_witness()
    return book


# ---------------------------------------------------------------- commands


def run_unlock(options):
    """`unlock`: verify, release the weights key with a lease."""
    token, lease = read_owner(options), make_lease(options)
    with open_ledger(options) as book, open_session(options, token, book) as session:
        muproxy.print_checks(session.checks, options.reference)
        container = options.model
        facts = {"asset": container.fields["asset"], "model": container.digest}
        facts |= {"root": options.reference["root"], "close": session.close_key.hex()}
        facts |= {"measurement": session.measurement["measurement"]}
        size = container.sealed_size()
        grant = book.grant(facts, size, options.budget, options.lifetime_budget)
        lease |= {"id": grant["lease"], "sequence": grant["sequence"], "budget": grant["bytes"]}
        limits = f"{lease['rate']:,} bytes/s, {lease['expiry']:,} s, {len(lease['users'])} tokens"
        print(f"lease {lease['id']}: budget {lease['budget']:,} bytes, {limits}", flush=True)
        print_left(book, grant["asset"])
        if options.witness is None:
            print("ledger: no --witness, so an old copy of it would not be found out", flush=True)
        try:
            ready = session.prove(token | {"lease": lease}, muproxy.show_progress)
        except ProtocolError as error:
            raise ProtocolError(error.code, what_became_of(grant, error), error.limit) from None
        if ready["lease"] != lease["id"]:
            text = f"the enclave holds another lease, {ready['lease'] or 'none'}"
            raise Failure(f"{text}: what was granted stays counted", REFUSED)
        print_status(ready)
        book.check(ready)
    return DONE


def open_session(options, token, book):
    """A verified session to unlock in; an enclave that holds a lease has to hold one of ours."""
    connect = muproxy.connector(options)
    session = connect()
    if session.measurement["status"] != "locked":
        with contextlib.closing(session):
            book.check(session.prove(token, muproxy.show_progress))
        session = connect()
    return contextlib.closing(session)


def what_became_of(grant, error):
    """What to know of a grant whose lease was sent and not confirmed."""
    facts = [error.detail] if error.detail else []
    if error.code == "lease_refused":
        text = f"the enclave has seen sequence {grant['sequence']} or a later one"
        facts.append(f"{text}: the ledger may be an old copy")
    return "; ".join([*facts, f"the {grant['bytes']:,} bytes of the grant stay counted"])


def run_owner(options):
    """`status`, `lock` and `revoke`."""
    command = {options.verb: True}
    if options.verb == "revoke":
        users = [mp.token_hash(token) for token in options.token_file or ()]
        command = {"revoke": users[-1] if users else options.token_hash}
        if not mp.is_hex(32)(command["revoke"]):
            raise Failure("say whose token: --token-file FILE, or --token-hash HASH")
    token = read_owner(options)
    with contextlib.closing(muproxy.connector(options)()) as session:
        ready = session.prove(token)
        answer = session.command(command)
    if "closing" in answer:
        print("status: locked", flush=True)
    else:
        print_status(answer)
    record(options, ready, answer.get("closing"))
    return DONE


def record(options, ready, statement):
    """Compare the lease that an enclave holds with the ledger; record its closing statement."""
    path = ledger_path(options)
    if not os.path.lexists(path):
        print(f"ledger: none at {path}, so nothing was compared")
        return
    with ledger.Ledger(path, options.witness) as book:
        book.check(ready)
        if statement is not None:
            grant, event = book.close(statement)
            text = f"{event['spent']:,} bytes spent since the enclave was locked"
            text += f", {event['returned']:,} of {grant['bytes']:,} given back"
            print(f"lease {event['lease']} closed: {text}")
        print_left(book, ready["asset"])


def print_left(book, asset):
    """What an asset has left of its lifetime budget."""
    if asset in book.assets:
        facts = book.assets[asset]
        left = ledger.left_of(facts)
        print(f"ledger: {left:,} of {facts['lifetime']:,} bytes of {asset} left", flush=True)


def print_status(ready):
    """READY, a line for each thing that an owner wants to know."""
    names = "status asset model lease budget budget_left restarts context head"
    for name in names.split():
        print(f"{name.replace('_', ' ')}: {ready[name] if ready[name] != '' else 'none'}")
    budget, left = ready["budget"], ready["budget_left"]
    if budget:
        print(f"spent: {(budget - left) / budget:.1%} of the budget")
    if 10 * left < budget:
        text = "the enclave locks at its end; another unlock adds to it"
        print(f"warning: less than a tenth of the budget is left: {text}")
    sys.stdout.flush()


def run_keygen(options):
    """`keygen`: a new access token or provisioning secret, in a file that only we can read."""
    text = ("mu-" if options.what == "token" else "") + secrets.token_hex(32)
    with open(os.open(options.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")
    hashed = f", its hash is {mp.token_hash(text)}" if options.what == "token" else ""
    print(f"{options.file}: new {options.what}{hashed}")
    return DONE


# ---------------------------------------------------------------- the command line

OWN = muproxy.VERIFY + "key passphrase-file development ledger witness "
LEASE = "token-file budget lifetime-budget new-ledger rate burst expiry verified latency-ms shape"
VERBS = {  # verb: function, help, flags
    "unlock": (run_unlock, "verify, then release the weights key with a lease", OWN + LEASE),
    "status": (run_owner, "ask an unlocked enclave how it is", OWN),
    "lock": (run_owner, "end the lease", OWN),
    "revoke": (run_owner, "strike an access token from the lease", OWN + "token-file token-hash"),
    "keygen": (run_keygen, "make an access token or a provisioning secret", "what file"),
}
CHOICES = {"what": ("token", "psk"), "shape": ("plain", "constant")}
FLAGS = muproxy.FLAGS | {  # flag: type, default, help
    "token-file": (muproxy.read_token, None, "file of an access token; for a lease, once for each"),
    "key": (str, None, "file of the weights key"),
    "passphrase-file": (read_passphrase, None, "passphrase of a wrapped key; else it is asked for"),
    "development": (bool, False, "release the key although the evidence says too little"),
    "ledger": (str, None, "file of the ledger (the key file's name and .ledger)"),
    "witness": (str, None, "file elsewhere that knows the ledger's last row"),
    "new-ledger": (bool, False, "make the ledger: for a key that was never released"),
    "budget": (int, None, "bytes that may leave (a tenth of what the asset has left)"),
    "lifetime-budget": (int, None, "of a new asset (a thousandth of its sealed size)"),
    "rate": (int, mp.DEFAULT_RATE, "inner meter: bytes a second"),
    "burst": (int, mp.DEFAULT_BURST, "inner meter: bytes at once"),
    "expiry": (int, 86400, "seconds until the lease ends (86400)"),
    "verified": (bool, False, "for replay audits: a seed, and of the sampling only temperature"),
    "latency-ms": (int, 0, "how long ids may wait for a cell to fill (0)"),
    "shape": (str, "plain", "constant: a cell leaves at each tick of an answer, empty or not"),
    "token-hash": (str, None, "of the access token, as keygen printed it"),
}


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = muproxy.make_parser("owner", __doc__, VERBS, FLAGS, CHOICES)
    try:
        return muproxy.run_command(parser, argv)
    except ModuleNotFoundError as error:
        print(f"owner: error: {error.name} is not installed: pip install .", file=sys.stderr)
        return USAGE


if __name__ == "__main__":
    sys.exit(main())
