"""The gate against those who may be anyone: strangers, users, owners, the host, the engine.

Every enclave here is real, with the demo model. Tests share one that is unlocked when they need it
(`ready`); those that end its lease leave it locked for the next one.
"""

import contextlib
import hashlib
import hmac
import json
import os
import pathlib
import random
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import muenclave
import muprotocol as mp
import muproxy
from tests.support import FREE_RATE, ROOT, SECONDS, Enclave, make_site, measure, own, seal, until

SEED = 20261125
MUTATIONS = {"challenge": 150, "token": 150, "user": 2350, "owner": 2350, "answer": 300}  # 10,000
FLAT = 8 << 20  # bytes by which a gate may grow while it is pestered
TICK = 20  # ms, at a free rate
LONG = {"prompt": "The", "temperature": 10, "seed": 1}  # all but noise: its end is not in sight
SHORT = {"prompt": "The", "temperature": 0, "max_new_tokens": 8}
WITHOUT = object()
site = shared = folder = None


def setUpModule():
    global site, folder
    holder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(holder.cleanup)
    folder = pathlib.Path(holder.name)
    site = make_site(folder)
    start()
    unittest.addModuleCleanup(lambda: shared.process.poll() is None and shared.end())


def start():
    """Start the shared enclave."""
    global shared
    shared = Enclave(site, "--slots", "2")


def ready(enclave=None, **lease):
    """The shared enclave (or another), unlocked with a new lease that differs in these fields."""
    enclave = enclave or shared
    enclave.unlock(**lease)
    return enclave


def status(enclave=None):
    """READY, as an owner sees it who brings no lease."""
    with owner(enclave) as session:
        return session.ready


def settled():
    """Its status once a good client was served: by then all answers before have been charged."""
    with shared.ready() as session:
        send(session, SHORT)
        assert finish(session)[1]["usage"]["completion_tokens"] == 8
    return status()


@contextlib.contextmanager
def owner(enclave=None):
    """A session of the owner that changes nothing."""
    enclave = enclave or shared
    token = enclave.unlock_token()
    del token["lease"]
    with contextlib.closing(enclave.session("owner")) as session:
        session.prove(token)
        yield session


def relocked(enclave, known):
    """Wait until its lease has ended, since line `known` of its log, and it is locked again."""
    enclave.wait_for("lease ended", known)
    enclave.port = int(enclave.wait_for("listening", known).split()[-1])
    enclave.address = ("127.0.0.1", enclave.port)


def send(session, *messages):
    """Send messages, objects or raw bodies, each as a good record."""
    bodies = (m if isinstance(m, bytes) else mp.encode_json(m) for m in messages)
    session.link.sendall(b"".join(session.sealer.seal(mp.JSON_RECORD, b)[0] for b in bodies))


def receive(session):
    """The next message: an object, or the bytes of packed ids. EOFError at the end."""
    message = None
    while message is None:
        message = session.opener.open(mp.read_frame(session.link, mp.CELL, SECONDS))
    return message[1] if message[0] == mp.IDS_RECORD else mp.parse_json(message[1])


def finish(session):
    """The rest of an answer: (packed ids of each message, the last record).

    The heads of an error, which are there if it ended an answer, are left out.
    """
    pieces = []
    while isinstance(message := receive(session), bytes):
        pieces.append(message)
    return pieces, {name: message[name] for name in message if name != "heads" or len(message) > 2}


def rest(connection):
    """All that still comes from a socket until its end."""
    data = b""
    connection.settimeout(SECONDS)
    with contextlib.suppress(ConnectionResetError):
        while block := connection.recv(1 << 16):
            data += block
    return data


def connect(enclave=None):
    """A stranger's connection."""
    return socket.create_connection((enclave or shared).address, SECONDS)


def challenge(**fields):
    """The payload of a good challenge, but for these fields."""
    good = {"version": mp.VERSION, "role": "user", "evidence": "psk"}
    good |= {"nonce": secrets.token_hex(32), "share": mp.KeyShare().public.hex()}
    return mp.encode_json(good | fields)


def garbled(token):
    """Every way to garble a message by one field: missing, extra, of a wrong type or range."""
    for path in paths(token):
        for value in (None, True, -1, 0.5, "", "0" * 63, [], {}, [token], "\0", WITHOUT):
            changed = json.loads(json.dumps(token))
            inner = changed
            for step in path[:-1]:
                inner = inner[step]
            inner[path[-1]] = value
            if value is WITHOUT:
                del inner[path[-1]]
            if changed != token:
                yield changed
    yield token | {"more": 1}
    yield {}


def paths(value, path=()):
    """The paths of all fields of an object, as tuples."""
    for name, inner in value.items():
        yield (*path, name)
        if isinstance(inner, dict):
            yield from paths(inner, (*path, name))


HELL = {  # what no JSON reader of ours may take, and the code for it
    b'{"a":' * 17 + b"1" + b"}" * 17: "bad_json",
    b"[" * 100_000: "bad_json",
    b'{"a":' * 5000: "bad_json",
    b'{"status":true,"status":true}': "bad_json",
    '{"status":true}'.encode("utf-16"): "bad_json",
    '{"status":true}'.encode("utf-16-le"): "bad_json",
    b'\xef\xbb\xbf{"status":true}': "bad_json",
    b'{"prompt":"\\ud800"}': "bad_json",
    b'{"\\udfff":1}': "bad_json",
    b'{"prompt":"\xed\xa0\x80"}': "bad_json",
    b'{"prompt":"\xc0\xaf"}': "bad_json",
    b'{"temperature":NaN}': "bad_json",
    b'{"temperature":-Infinity}': "bad_json",
    b'{"temperature":1e999}': "bad_json",
    b'{"seed":' + b"1" * 5000 + b"}": "bad_json",
    b'{"status":true} {}': "bad_json",
    b'["status"]': "bad_json",
    b"true": "bad_json",
    b"": "bad_json",
    b'{"status":1}': "bad_message",
    b'{"prompt":"a","seed":true}': "bad_message",
    b'{"prompt":"a","max_new_tokens":1.0}': "bad_message",
    b'{"prompt":"a","max_new_tokens":0}': "bad_message",
    b'{"prompt":"a","messages":[]}': "bad_message",
    b'{"messages":[{"role":"owner","content":"a"}]}': "bad_message",
    b"{}": "bad_message",
}


def mutate(chance, data):
    """A mutation of a message, by a seeded generator."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 1, 2, 8, 64)))
        kind = chance.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = data[at:end]
        elif kind == 3:
            data[at:at] = chance.randbytes(chance.choice((1, 3, 40)))
        else:
            words = (b"null", b"true", b"{}", b"[]", b'"', b"\\u0000", b"-1", b"1e400", b",", b"}")
            data[at:end] = chance.choice(words)
    return bytes(data)


def mutations(seed, goods, count, *schemas):
    """`count` pairs: a mutated message that none of the schemas takes, and the code for it."""
    chance = random.Random(f"{SEED} {seed}")
    goods = [mp.encode_json(good) for good in goods]
    while count:
        body = mutate(chance, chance.choice(goods))
        try:
            mp.parse_message(body, *schemas)
        except mp.ProtocolError as error:
            count -= 1
            yield body, error.code


def memory(pid):
    """The resident memory of a process, in bytes."""
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) << 10


class Case(unittest.TestCase):
    """What the classes below share."""

    def assertCode(self, code, function, *arguments, **options):
        """The call raises ProtocolError with this code."""
        with self.assertRaises(mp.ProtocolError) as caught:
            function(*arguments, **options)
        self.assertEqual(caught.exception.code, code)
        return caught.exception

    def assertSilent(self, connection):
        """The enclave closes the connection without another byte."""
        with connection:
            self.assertEqual(rest(connection), b"")

    def prove(self, token, role, enclave=None):
        """Steps 2 and 3 with a token, in a session of its own."""
        with contextlib.closing((enclave or shared).session(role)) as session:
            return session.prove(token)


class BadPeers(Case):
    """Prove 6: whatever peers do, the next good one is served, and nothing is used up."""

    @classmethod
    def setUpClass(cls):
        ready()

    def setUp(self):
        self.before = settled()

    def tearDown(self):
        self.assertEqual(status(), self.before)
        settled()

    def test_mutated_messages(self):
        gate = shared.pids()["gate"]
        user = [SHORT, LONG | {"date": "today"}, {"cancel": True}]
        user += [{"messages": [{"role": "user", "content": "a"}], "top_p": 0.5, "top_k": 3}]
        owners = [{"status": True}, {"lock": True}, {"revoke": "ab" * 32}]
        schemas = mp.GENERATE, mp.GENERATE_CHAT, mp.CANCEL
        self.pester_strangers()
        self.pester_tokens()
        with shared.ready() as session, owner() as other:
            for half in range(2):
                self.pester(session, mutations(f"user {half}", user, MUTATIONS["user"], *schemas))
                self.pester(
                    other, mutations(f"owner {half}", owners, MUTATIONS["owner"], *mp.OWNER)
                )
                if not half:
                    used = memory(gate)
            self.assertLess(memory(gate) - used, FLAT)
            self.assertEqual(status(), self.before)
            for body, code in mutations("answer", user, MUTATIONS["answer"], mp.CANCEL):
                send(session, LONG, body)
                self.assertEqual(finish(session)[1], {"error": code}, body)
        self.assertLess(memory(gate) - used, FLAT)
        self.assertEqual(shared.pids()["gate"], gate)
        self.before = settled()  # the answers were paid for

    def pester(self, session, pairs):
        """Send what is wrong, many at a time, in a session that survives each."""
        pairs = list(pairs)
        for start in range(0, len(pairs), 50):
            some = pairs[start : start + 50]
            send(session, *(body for body, _ in some))
            for body, code in some:
                self.assertEqual(receive(session), {"error": code}, body)

    def pester_strangers(self):
        """Mutated challenges: no answer."""
        good = [json.loads(challenge()), json.loads(challenge(role="owner"))]
        pairs = list(mutations("challenge", good, MUTATIONS["challenge"], mp.CHALLENGE))
        for start in range(0, len(pairs), 50):
            peers = [connect() for _ in pairs[start : start + 50]]
            for peer, (body, _) in zip(peers, pairs[start:]):
                with contextlib.suppress(ConnectionError):
                    peer.sendall(mp.frame(body))
            for peer in peers:
                self.assertSilent(peer)

    def pester_tokens(self):
        """Mutated tokens: their code, and the end."""

        def offer(role, body, code):
            with contextlib.closing(shared.session(role)) as session:
                send(session, body)
                self.assertEqual(receive(session), {"error": code}, body)
                self.assertEqual(rest(session.link.socket), b"")

        access, unlock = {"token": muproxy.read_token(site.token)}, shared.unlock_token()
        count = MUTATIONS["token"] // 2
        users = mutations("access", [access], count, mp.ACCESS)
        owners = mutations("unlock", [unlock], count, mp.UNLOCK)
        work = [("user", *pair) for pair in users] + [("owner", *pair) for pair in owners]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda item: offer(*item), work))

    def test_json_from_hell(self):
        with shared.ready() as session, owner() as other:
            for body, code in HELL.items():
                with self.subTest(body=body[:40]):
                    for peer in (session, other):
                        send(peer, body)
                        self.assertEqual(receive(peer), {"error": code})

    def test_length_of_4_gib(self):
        with connect() as peer:
            peer.sendall(b"\xff" * 4)
            self.assertEqual(rest(peer), b"")
        with connect() as peer:
            peer.sendall((mp.HANDSHAKE_FRAME + 1).to_bytes(4, "big"))
            self.assertEqual(rest(peer), b"")
        with owner() as session, shared.ready() as other:
            for peer, length in ((session, b"\xff" * 4), (other, b"\0\x10\0\1")):
                peer.link.sendall(length)
                self.assertEqual(rest(peer.link.socket), b"")

    def test_slow_peers(self):
        """A byte every 5 s, or none: the handshake's deadline ends them all."""

        def trickle(peer, data):
            with peer:
                for count, byte in enumerate(data):
                    if mp.is_readable(peer, 5 if count else 0):
                        return count, rest(peer)
                    peer.sendall(bytes([byte]))

        payload = mp.frame(challenge())
        with ThreadPoolExecutor(4) as pool, contextlib.closing(shared.session()) as session:
            with contextlib.closing(shared.session("owner")) as silent, connect() as mute:
                record = session.sealer.seal_json({"token": "a" * 20})[0]
                first = pool.submit(trickle, connect(), payload)
                second = pool.submit(trickle, session.link.socket, record)
                self.assertEqual(rest(silent.link.socket), b"")
                self.assertEqual(rest(mute), b"")
            for ended in (first, second):
                count, said = ended.result(SECONDS)
                self.assertLessEqual(count, 3)
                self.assertEqual(said, b"")

    def test_200_connections(self):
        """At the default rate: many full handshakes, many idle peers; all of them then leave."""
        flags = ("--rate", str(mp.DEFAULT_RATE), "--burst", str(mp.DEFAULT_BURST))
        with Enclave(site, *flags) as enclave, contextlib.ExitStack() as stack:
            for number in range(200):
                peer = stack.enter_context(connect(enclave))
                if number % 2:
                    peer.sendall(mp.frame(challenge(role=("owner", "user")[number // 2 % 2])))
            stack.close()
            self.assertEqual(status(enclave)["status"], "locked")
            with contextlib.closing(enclave.session()) as session:
                self.assertEqual(session.measurement["status"], "locked")

    def test_strangers_make_room(self):
        """More idle peers than places: the oldest leaves for the newest, the good are served."""
        with Enclave(site, "--sessions", "3") as enclave, contextlib.ExitStack() as stack:
            with owner(enclave) as session:
                peers = [stack.enter_context(connect(enclave)) for _ in range(8)]
                for peer in peers[:5]:
                    self.assertEqual(rest(peer), b"")
                send(session, {"status": True})
                self.assertEqual(receive(session)["status"], "locked")
            self.assertEqual(status(enclave)["status"], "locked")

    def test_peers_that_reset(self):
        """Who leaves by a reset, at any step, is gone and harms nobody."""
        for step in range(60):
            peer = connect()
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
            peer.sendall(mp.frame(challenge())[: step * 24])
            peer.close()


class Budget(Case):
    """Prove 7, the inner meter's second account: the bits that an engine could have chosen."""

    BYTES = 200

    def test_exact_to_the_end(self):
        if status()["lease"]:
            lock(shared)
        known, before = len(shared.lines), shared.pids()
        bits = 8 * self.BYTES - 2 * mp.LENGTH_BITS  # the engine chose when, and what, it had loaded
        self.assertEqual(shared.unlock(budget=self.BYTES)["budget_left"], bits // 8)
        engine = shared.pids()["engine"]
        vocabulary = muproxy.read_vocabulary(site.vocabulary)
        room = mp.CELL_ROOM * 8 // vocabulary.bits  # ids in a cell: the engine chose how many
        with shared.ready() as session:
            for number in range(3):
                send(session, SHORT | {"seed": number})
                pieces, final = finish(session)
                ticks = final["elapsed_ms"] // TICK
                bits -= ticks + mp.LENGTH_BITS + mp.ENDING_BITS
                bits -= 8 * sum(map(len, pieces)) + len(pieces) * room.bit_length()
                self.assertEqual(final["budget_left"], bits // 8)
                self.assertEqual(sum(len(vocabulary.unpack(p)) for p in pieces), 8)
            send(session, LONG)
            pieces, final = finish(session)
            self.assertEqual(final, {"error": "lease_ended"})
            ids = [token for piece in pieces for token in vocabulary.unpack(piece)]
            self.assertGreater(len(ids), 0)
            spent = 8 * sum(map(len, pieces)) + len(pieces) * (1 + room.bit_length())
            self.assertLessEqual(spent + mp.LENGTH_BITS, bits)
            self.assertEqual(rest(session.link.socket), b"")
        relocked(shared, known)
        after = shared.pids()
        self.assertNotEqual(after["gate"], before["gate"])
        self.assertEqual(after.keys(), {"init", "gate"})
        self.assertFalse(pathlib.Path(f"/proc/{engine}").exists())
        facts = status()
        self.assertEqual((facts["lease"], facts["budget_left"]), ("", 0))
        token = {"token": muproxy.read_token(site.token)}
        self.assertCode("locked", self.prove, token, "user")

    def test_too_small_to_load(self):
        """An engine that has loaded has said something; without a budget for it there is none."""
        if status()["lease"]:
            lock(shared)
        known = len(shared.lines)
        self.assertCode("lease_ended", shared.unlock, budget=1)
        relocked(shared, known)


def lock(enclave):
    """End its lease, as its owner does; it is locked again afterwards. What the owner is told."""
    known = len(enclave.lines)
    with owner(enclave) as session:
        told = session.command({"lock": True})
        last = receive(session)
    relocked(enclave, known)
    return told, last


class Lease(Case):
    """What a lease says, holds; and a further one replaces it, but for its bytes."""

    @classmethod
    def setUpClass(cls):
        ready()

    def tearDown(self):
        ready()

    def hash(self, path):
        """What a lease names a user by."""
        return mp.token_hash(muproxy.read_token(path))

    def test_another_lease(self):
        """It adds its bytes; its users are the only ones, also in sessions that are open."""
        with shared.ready() as session:
            before = status()
            token = shared.unlock_token(budget=5, users=[self.hash(site.other)])
            after = self.prove(token, "owner")
            self.assertEqual(after["budget_left"], before["budget_left"] + 5)
            self.assertEqual(after["lease"], token["lease"]["id"])
            self.assertEqual(after["sequence"], token["lease"]["sequence"])
            self.assertEqual(receive(session), {"error": "token_refused"})
            self.assertEqual(rest(session.link.socket), b"")
        old = {"token": muproxy.read_token(site.token)}
        self.assertCode("token_refused", self.prove, old, "user")
        with shared.ready(muproxy.read_token(site.other)) as session:
            send(session, SHORT)
            self.assertEqual(finish(session)[1]["usage"]["completion_tokens"], 8)

    def test_revoke(self):
        users = [self.hash(site.token), self.hash(site.other)]
        ready(users=users)
        with shared.ready() as one, shared.ready(muproxy.read_token(site.other)) as other:
            send(one, LONG)
            self.assertIsInstance(receive(one), bytes)
            with owner() as session:
                self.assertEqual(session.command({"revoke": users[0]})["status"], "ready")
            self.assertEqual(finish(one)[1], {"error": "token_refused"})
            self.assertEqual(rest(one.link.socket), b"")
            send(other, SHORT)
            self.assertEqual(finish(other)[1]["usage"]["completion_tokens"], 8)
        revoked = {"token": muproxy.read_token(site.token)}
        self.assertCode("token_refused", self.prove, revoked, "user")

    def test_verified_sampling(self):
        """What can't be replayed is refused; the session lives on."""
        ready(policy={"verified": True, "latency_ms": 0, "shape": "plain"})
        good = {"prompt": "The", "seed": 3, "temperature": 0.7, "max_new_tokens": 4}
        with shared.ready() as session:
            for wrong in ({"top_p": 0.9}, {"top_k": 5}, {"repetition_penalty": 1.1}):
                send(session, good | wrong)
                self.assertEqual(finish(session), ([], {"error": "policy_refused"}))
            send(session, {name: good[name] for name in ("prompt", "temperature")})
            self.assertEqual(finish(session), ([], {"error": "policy_refused"}))
            send(session, good)
            self.assertEqual(finish(session)[1]["usage"]["completion_tokens"], 4)

    def test_latency(self):
        """Ids wait for the policy's latency, for a full cell, or for the answer's end."""
        ready(policy={"verified": False, "latency_ms": 10_000, "shape": "plain"})
        with shared.ready() as session:
            send(session, SHORT)
            pieces, final = finish(session)
            self.assertEqual(len(pieces), 1)
            self.assertEqual(final["usage"]["completion_tokens"], 8)

    def test_expiry(self):
        lock(shared)
        known = len(shared.lines)
        self.assertCode("lease_ended", shared.unlock, expiry=1)
        relocked(shared, known)
        self.assertEqual(status()["lease"], "")

    def test_lock(self):
        """An answer that runs ends, the engine is killed, the gate is another process."""
        before = shared.pids()
        with shared.ready() as session:
            send(session, LONG)
            self.assertIsInstance(receive(session), bytes)
            told, last = lock(shared)
            self.assertEqual(set(told), {"closing"})
            self.assertEqual(last, {"error": "lease_ended"})
            self.assertEqual(finish(session)[1], {"error": "lease_ended"})
            self.assertEqual(rest(session.link.socket), b"")
        self.assertEqual(shared.pids().keys(), {"init", "gate"})
        self.assertNotEqual(shared.pids()["gate"], before["gate"])

    def test_stuck_engine(self):
        """An engine that stands still holds up nobody but those who wait for its ids."""
        with shared.ready() as session, shared.ready() as other:
            send(session, LONG)
            self.assertIsInstance(receive(session), bytes)
            os.kill(shared.pids()["engine"], signal.SIGSTOP)
            self.assertEqual(status()["status"], "ready")
            send(session, {"cancel": True})
            pieces, final = finish(session)
            self.assertEqual(final["finish_reason"], "cancelled")
            send(other, SHORT)
            send(session, SHORT, {"cancel": True})
            self.assertEqual(finish(session)[1]["finish_reason"], "cancelled")
            lock(shared)
            self.assertEqual(finish(other), ([], {"error": "lease_ended"}))
        self.assertEqual(shared.pids().keys(), {"init", "gate"})


class Closing(Case):
    """What the owner is told at the end: what was spent, and the head of the chain of exchanges."""

    def test_statement(self):
        """Also of an answer that the end cuts off; by the key of the session that unlocked."""
        if status()["lease"]:
            lock(shared)
        vocabulary, token = muproxy.read_vocabulary(site.vocabulary), shared.unlock_token()
        with contextlib.closing(shared.session("owner")) as session:
            session.prove(token)
            key = session.close_key
        asked = [one | {"seed": seed} for seed, one in enumerate((SHORT, LONG, SHORT, LONG), 1)]
        head, answered = bytes(32), []
        with shared.ready() as session:
            for request in asked:
                send(session, request)
                pieces = []
                if request["seed"] % 2 == 0:
                    pieces.append(receive(session))
                    if request["seed"] == 2:
                        send(session, {"cancel": True})
                    else:
                        told, _ = lock(shared)
                while isinstance(final := receive(session), bytes):
                    pieces.append(final)
                ids = [i for piece in pieces for i in vocabulary.unpack(piece)]
                answered.append((request, ids, final))
        self.assertEqual([len(ids) for _, ids, _ in answered[::2]], [8, 8])
        for request, ids, final in answered:
            ending = final.get("finish_reason") or final["error"]
            before, head = head.hex(), mp.chain(head, token["lease"]["id"], request, ids, ending)
            self.assertEqual(final["heads"], [before, head.hex()])
        closing = told["closing"]
        facts = {"lease": token["lease"]["id"], "spent": closing["spent"], "head": head.hex()}
        mac = hmac.digest(key, mp.encode_json(facts), "sha256")
        self.assertEqual(closing, facts | {"mac": mac.hex()})
        budget, left = token["lease"]["budget"], answered[2][2]["budget_left"]
        self.assertGreater(closing["spent"], budget - left)
        self.assertLess(closing["spent"], budget)

    def test_a_lease_that_comes_too_late_is_not_taken(self):
        """A gate that has ended its lease, and is about to end, takes no key any more."""
        settings = muenclave.DEFAULTS | {"MODEL_PATH": str(site.model)}
        settings |= {"ENCLAVE_OWNER_PSK": str(site.owner_psk), "ENCLAVE_MEASUREMENT": "ab" * 32}
        settings |= {"ENCLAVE_USER_PSK": str(site.user_psk)}
        control, init = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with control, init, mock.patch.object(muenclave.Gate, "run_engine", lambda _: None):
            gate = muenclave.Gate(settings, control)
            gate.unlock(shared.unlock_token(), bytes(32))
            self.assertEqual((gate.state, len(gate.key)), ("loading", 32))
            gate.end_lease("lease_ended")
            gate.unlock(shared.unlock_token(), bytes(32))
        self.assertEqual((gate.state, gate.key, gate.account.lease), ("lease ended", None, None))

    def test_once(self):
        """Who locks what is locked is told that, and no statement."""
        if status()["lease"]:
            lock(shared)
        self.assertEqual(lock(shared)[0]["status"], "locked")


class Ready(unittest.TestCase):
    """What a session is told when its weights have been loaded, or have not."""

    def test_a_lease_that_ends_meanwhile_is_told_by_its_code(self):
        gate = types.SimpleNamespace(state="lease ended", code=None, handshakes=None)
        gate.account = mp.Account()

        def ready():
            gate.code = "no_engine"
            return {"lease": None}

        gate.ready = ready
        with self.assertRaises(mp.ProtocolError) as caught:
            muenclave.Session(gate, None).await_ready()
        self.assertEqual(caught.exception.code, "no_engine")


class Turns(unittest.TestCase):
    """A cell's time for each, in the order of asking, at ticks of one clock."""

    def turns(self, rate, count, now=0):
        """The moments (ns) at which so many cells leave that were asked for at the same time."""
        gate = muenclave.Gate.__new__(muenclave.Gate)
        gate.lock, gate.turn, clock = threading.Lock(), 0, [now]
        gate.handshakes = gate.cells = mp.Meter(rate, 1 << 20, now)
        slept = []
        with mock.patch.object(muenclave.time, "monotonic_ns", lambda: clock[0]):
            gate.set_rate(rate, 1 << 20)
            with mock.patch.object(muenclave.time, "sleep", slept.append):
                for _ in range(count):
                    gate.wait_turn()
        return gate.tick, [now + round(seconds * mp.NANOSECOND) for seconds in slept]

    def test_one_a_tick(self):
        """But for the turns just missed, which may have been lost by a thread that woke up late."""
        start, missed = 10**12 + 12345, muenclave.MISSED_TURNS
        tick, moments = self.turns(mp.DEFAULT_RATE, missed + 5, start)
        self.assertEqual(tick, mp.NANOSECOND // 10)
        self.assertEqual(moments[: missed + 1], [start] * (missed + 1))
        ticks = [start - start % tick + n * tick for n in range(1, 5)]
        self.assertEqual(moments[missed + 1 :], ticks)

    def test_as_many_as_the_rate_allows(self):
        rate, cells = 1 << 20, 400
        tick, moments = self.turns(rate, cells)
        share = rate - rate // muenclave.HANDSHAKE_SHARE
        for start in range(0, max(moments), tick):
            sent = sum(start <= moment < start + 10 * tick for moment in moments) * mp.CELL
            self.assertLessEqual(sent, share * 10 * tick / mp.NANOSECOND + mp.CELL)
        self.assertEqual({moment % tick for moment in moments}, {0})
        whole = cells * mp.CELL * mp.NANOSECOND / share
        self.assertLess(max(moments), whole + 2 * tick)


class Scores(Case):
    """An owner has an answer scored, by the same enclave here; a user never."""

    @classmethod
    def setUpClass(cls):
        ready()

    def scored(self, session, request, ids):
        """The codes of ids and their end, and the last record."""
        send(session, request | {"score": {"ids": ids, "tolerance": 0.5}})
        pieces, final = finish(session)
        return [code for piece in pieces for code in mp.CODES.unpack(piece)], final

    def test_an_answer_of_its_own(self):
        vocabulary = muproxy.read_vocabulary(site.vocabulary)
        request = {"prompt": "Beautiful", "temperature": 1.0, "seed": 5, "max_new_tokens": 40}
        with shared.ready() as user, owner() as session:
            send(user, request)
            pieces, final = finish(user)
            ids = [token for piece in pieces for token in vocabulary.unpack(piece)]
            self.assertGreater(len(ids), 5)
            codes, scored = self.scored(session, request, ids)
            self.assertEqual(scored["finish_reason"], final["finish_reason"])
            self.assertEqual(set(codes[::2]), {0})
            self.assertEqual(len(codes) // 2, len(ids) + (final["finish_reason"] == "stop"))
            ids[3] = (ids[3] + 1) % len(vocabulary)
            codes, _ = self.scored(session, request, ids)
            self.assertEqual((codes[:6:2], codes[6] > 0), ([0] * 3, True))
            before = status()["budget_left"]
            codes, final = self.scored(session, request | {"max_new_tokens": 5}, ids[:5])
            self.assertEqual((len(codes), final["finish_reason"]), (10, "length"))
            self.assertGreater(before - final["budget_left"], len(codes))
            self.assertEqual(status()["head"], final["heads"][1])

    def test_not_for_users(self):
        request = SHORT | {"score": {"ids": [1], "tolerance": 0}}
        with shared.ready() as session:
            send(session, request)
            self.assertEqual(finish(session), ([], {"error": "bad_message"}))

    def test_what_it_refuses(self):
        with owner() as session:
            for score in ({}, {"ids": [1]}, {"ids": [-1], "tolerance": 0}, {"ids": 1}, None):
                send(session, SHORT | {"score": score})
                self.assertEqual(finish(session), ([], {"error": "bad_message"}))
            size = len(muproxy.read_vocabulary(site.vocabulary))
            _, final = self.scored(session, SHORT, [size + 5])
            self.assertEqual(final, {"error": "engine_lost"})
            shared.wait_for("ready")


class Answers(Case):
    """Several sessions at once, cancelled answers, and an engine that dies."""

    @classmethod
    def setUpClass(cls):
        ready()

    def test_interleaved(self):
        with shared.ready() as one, shared.ready() as other:
            send(one, LONG)
            send(other, LONG)
            for session in (one, other, one, other):
                self.assertIsInstance(receive(session), bytes)
            for session in (one, other):
                send(session, {"cancel": True})
                self.assertEqual(finish(session)[1]["finish_reason"], "cancelled")

    def test_cancel_frees_the_slot(self):
        """Both slots are taken; the third answer begins when one of them is free."""
        vocabulary = muproxy.read_vocabulary(site.vocabulary)
        with shared.ready() as one, shared.ready() as two, shared.ready() as three:
            for session in (one, two):
                send(session, LONG)
                self.assertIsInstance(receive(session), bytes)
            send(three, SHORT)
            for _ in range(5):
                self.assertIsInstance(receive(two), bytes)
            self.assertFalse(mp.is_readable(three.link.socket, 0))
            send(one, {"cancel": True})
            self.assertEqual(finish(three)[1]["usage"]["completion_tokens"], 8)
            self.assertEqual(finish(one)[1]["finish_reason"], "cancelled")
            send(two, {"cancel": True})
            self.assertEqual(finish(two)[1]["finish_reason"], "cancelled")
            send(one, LONG, {"cancel": True})
            pieces, final = finish(one)
            count = sum(len(vocabulary.unpack(piece)) for piece in pieces)
            self.assertEqual(final["usage"]["completion_tokens"], count)

    def test_cancel_after_the_end(self):
        """A cancel that crosses the answer's end is no mistake, and gets no answer."""
        with shared.ready() as session:
            send(session, SHORT)
            finish(session)
            send(session, {"cancel": True}, SHORT)
            self.assertEqual(finish(session)[1]["finish_reason"], "length")

    def test_hang_up_frees_the_slots(self):
        for _ in range(4):
            with shared.ready() as one, shared.ready() as two:
                send(one, LONG)
                send(two, LONG)
                self.assertIsInstance(receive(two), bytes)
        with shared.ready() as session:
            send(session, SHORT)
            self.assertEqual(finish(session)[1]["usage"]["completion_tokens"], 8)


class Impatient(Case):
    """A build whose patience is short, so that its end can be seen."""

    PATIENCE = {"IDLE_SECONDS = 900": 20, "FRAME_SECONDS = 30": 5, "RESPAWNS = 8": 1}

    @classmethod
    def setUpClass(cls):
        build = folder / "impatient"
        build.mkdir()
        code = (ROOT / "muenclave.py").read_text()
        for line, value in cls.PATIENCE.items():
            assert code.count(f"\n{line}") == 1, line
            code = code.replace(f"\n{line}", f"\n{line.split()[0]} = {value}")
        (build / "muenclave.py").write_text(code)
        shutil.copy(ROOT / "muprotocol.py", build)
        measurement = mp.manifest_digest(measure.local_manifest(sys.executable, build))
        reference = json.loads(site.reference.read_text()) | {"measurement": measurement}
        (build / "reference.json").write_text(json.dumps(reference))
        files = types.SimpleNamespace(**vars(site) | {"reference": build / "reference.json"})
        cls.enclave = Enclave(files, "--sessions", "3", code=build)
        cls.addClassCleanup(lambda: cls.enclave.process.poll() is None and cls.enclave.end())

    def setUp(self):
        ready(self.enclave)

    def test_idle(self):
        """Idle sessions end with a code; half a record is waited for, but not for ever."""
        with self.enclave.ready() as session, owner(self.enclave) as other:
            other.link.sendall(other.sealer.seal_json({"status": True})[0][:9])
            self.assertEqual(rest(other.link.socket), b"")
            self.assertEqual(receive(session), {"error": "timeout"})
            self.assertEqual(rest(session.link.socket), b"")

    def test_places(self):
        """All places but one are for users; who leaves makes room."""
        token = {"token": muproxy.read_token(site.token)}
        with self.enclave.ready() as session, self.enclave.ready():
            self.assertCode("busy", self.prove, token, "user", self.enclave)
            self.assertEqual(status(self.enclave)["status"], "ready")
            send(session, {})
            self.assertEqual(receive(session), {"error": "bad_message"})
        with self.enclave.ready() as session:
            send(session, SHORT)
            self.assertEqual(finish(session)[1]["finish_reason"], "length")

    def test_respawn(self):
        """Killed once it is loaded again within the lease; killed too often the lease ends."""
        known, gate = len(self.enclave.lines), self.enclave.pids()["gate"]
        with self.enclave.ready() as session:
            send(session, LONG)
            self.assertIsInstance(receive(session), bytes)
            before = status(self.enclave)["budget_left"]
            os.kill(self.enclave.pids()["engine"], signal.SIGKILL)
            self.assertEqual(finish(session)[1], {"error": "engine_lost"})
            self.enclave.wait_for("engine lost", known)
            send(session, SHORT)
            self.assertEqual(finish(session), ([], {"error": "engine_lost"}))
        self.enclave.wait_for("ready", known)
        with self.enclave.ready() as session:
            send(session, SHORT)
            pieces, final = finish(session)
            self.assertEqual((final["restarts"], final["finish_reason"]), (1, "length"))
            spent = 2 * mp.LENGTH_BITS + mp.ENDING_BITS + 8 * sum(map(len, pieces))
            self.assertLess(final["budget_left"], before - spent // 8)
            self.assertEqual(self.enclave.pids()["gate"], gate)
            send(session, LONG)
            self.assertIsInstance(receive(session), bytes)
            os.kill(self.enclave.pids()["engine"], signal.SIGKILL)
            self.assertIn(finish(session)[1]["error"], ("engine_lost", "lease_ended"))
        relocked(self.enclave, known)
        self.assertNotEqual(self.enclave.pids()["gate"], gate)
        self.assertEqual(self.enclave.pids().keys(), {"init", "gate"})

    def test_respawn_that_fails(self):
        """The loader dies while it loads: the owner is told, and the lease ends."""
        lock(self.enclave)
        known = len(self.enclave.lines)
        with ThreadPoolExecutor(1) as pool:
            unlocking = pool.submit(self.enclave.unlock)
            while "loader" not in self.enclave.pids() and not unlocking.done():
                pass
            os.kill(self.enclave.pids()["loader"], signal.SIGKILL)
            self.assertCode("out_of_memory", unlocking.result, SECONDS)
        relocked(self.enclave, known)


class Talkative(Case):
    """A build whose event log is as long as it can be, asked for by those who do not read it."""

    def test_strangers_do_not_keep_the_owner_out(self):
        build = folder / "talkative"
        build.mkdir()
        code = (ROOT / "muenclave.py").read_text()
        assert code.count('log = b""  #') == 1
        code = code.replace('log = b""  #', "log = bytes(256 << 10)  #")
        (build / "muenclave.py").write_text(code)
        shutil.copy(ROOT / "muprotocol.py", build)
        measurement = mp.manifest_digest(measure.local_manifest(sys.executable, build))
        reference = json.loads(site.reference.read_text()) | {"measurement": measurement}
        (build / "reference.json").write_text(json.dumps(reference))
        files = types.SimpleNamespace(**vars(site) | {"reference": build / "reference.json"})
        with Enclave(files, "--sessions", "3", code=build) as enclave, contextlib.ExitStack() as s:
            strangers = [
                s.enter_context(contextlib.closing(enclave.session("owner"))) for _ in "abc"
            ]
            for stranger in strangers:
                send(stranger, {"log": True})
                self.assertTrue(mp.is_readable(stranger.link.socket, SECONDS))
            self.assertEqual(enclave.unlock()["status"], "ready")
            for stranger in strangers:  # cut off, long before all of it
                self.assertLess(len(rest(stranger.link.socket)), 256 << 10)


def is_gone(pid):
    """Whether a process has ended, reaped or not: what has ended has no command line."""
    try:
        return not pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


class WhenStopped(Case):
    """SIGTERM, for the shared enclave; whatever comes after it gets another one."""

    def test_it_ends_at_once(self):
        """The answer that runs breaks off, and nothing claims that it was whole."""
        self.addCleanup(start)
        with ready().ready() as session:
            send(session, LONG)
            self.assertIsInstance(receive(session), bytes)
            pids = shared.pids()
            shared.process.send_signal(signal.SIGTERM)
            final = {}
            with contextlib.suppress(EOFError, OSError):
                final = finish(session)[1]
            self.assertNotIn("finish_reason", final)
        self.assertEqual(shared.process.wait(SECONDS), -signal.SIGTERM)
        for role in ("gate", "engine"):
            until(lambda pid=pids[role]: is_gone(pid), f"the end of the {role}")


class Rate(Case):
    """Prove 7, the inner meter: seen from outside, with the outer one off."""

    RATE, BURST = 2048, 16384

    def record(self, seconds, *workers):
        """[(when, bytes)] that workers, each with a callback for what it reads, were sent."""
        events, until = [], time.monotonic() + seconds

        def work(worker):
            while time.monotonic() < until:
                with contextlib.suppress(OSError, EOFError, mp.ProtocolError):
                    worker(lambda count: events.append((time.monotonic(), count)), until)

        with ThreadPoolExecutor(len(workers)) as pool:
            list(pool.map(work, workers))
        return sorted(events)

    def check(self, events, start, rate, burst, least):
        """No moment has seen more than the meter allows since `start`; and it was at its limit."""
        total = 0
        for when, count in events:
            total += count
            self.assertLessEqual(total, rate * (when - start) + burst)
        self.assertGreater(total, least)

    def read(self, connection, seen, until):
        """Count what comes."""
        while (left := until - time.monotonic()) > 0:
            connection.settimeout(left)
            block = connection.recv(4096)
            seen(len(block))
            if not block:
                return

    def stranger(self, seen, until):
        """A handshake, and then another one."""
        with connect(self.enclave) as peer:
            peer.sendall(mp.frame(challenge(role="owner")))
            peer.settimeout(max(0.01, until - time.monotonic()))
            seen(len(mp.read_exactly(peer, mp.FRAME_HEADER)))
            self.read(peer, seen, min(until, time.monotonic() + 0.2))

    def user(self, seen, until):
        """A session with an answer that does not end."""
        with contextlib.closing(self.enclave.session()) as session:
            session.link.sendall(
                b"".join(
                    session.sealer.seal_json({"token": muproxy.read_token(site.token)})
                    + session.sealer.seal_json(LONG)
                )
            )
            self.read(session.link.socket, seen, until)

    def status_loop(self, seen, until):
        """An owner who asks for the status all the time."""
        with owner(self.enclave) as session:
            while time.monotonic() < until:
                send(session, *[{"status": True}] * 8)
                seen(len(mp.read_exactly(session.link.socket, 8 * mp.CELL)))

    def test_locked(self):
        """Strangers get the handshakes' share of the enclave's own rate, however many they are."""
        start = time.monotonic()
        with Enclave(site, "--rate", str(self.RATE), "--burst", str(self.BURST)) as self.enclave:
            events = self.record(6, *[self.stranger] * 8)
        share = self.RATE // 16, self.BURST // 2
        self.check(events, start, *share, least=share[1] * 3 // 4)

    def test_lease(self):
        """Sessions at once, sessions anew, strangers: all of them share the lease's rate."""
        self.enclave = ready(rate=self.RATE, burst=self.BURST)
        start = time.monotonic()
        work = [self.user] * 3 + [self.stranger] * 2 + [self.status_loop]
        events = self.record(8, *work)
        self.check(events, start, self.RATE, self.BURST, least=self.BURST * 3 // 4)
        ready()
        start = time.monotonic()
        with owner() as session:  # and another lease brings another rate
            for _ in range(10):
                send(session, *[{"status": True}] * 20)
                mp.read_exactly(session.link.socket, 20 * mp.CELL)
        allowed = self.RATE * (time.monotonic() - start) + self.BURST
        self.assertGreater(200 * mp.CELL, allowed)


class Unlocking(Case):
    """Prove 4: what does not fit is refused with its own code, and leaves the state as it was."""

    @classmethod
    def setUpClass(cls):
        cls.locked = Enclave(site)
        cls.addClassCleanup(cls.locked.end)
        ready()

    def setUp(self):
        self.before = settled(), status(self.locked)

    def tearDown(self):
        self.assertEqual((status(), status(self.locked)), self.before)
        for enclave, expected in ((self.locked, "locked"), (shared, "ready")):
            with contextlib.closing(enclave.session()) as session:
                self.assertEqual(session.measurement["status"], expected)

    def refused(self, code, token, role="owner"):
        """Refused by the locked and by the ready enclave."""
        for enclave in (self.locked, shared):
            self.assertCode(code, self.prove, token, role, enclave)

    def test_wrong_key(self):
        token = shared.unlock_token()
        self.refused("wrong_key", token | {"key": "00" * 32})
        flipped = f"{int(token['key'], 16) ^ 1:064x}"
        self.refused("wrong_key", token | {"key": flipped})

    def test_wrong_model(self):
        token = shared.unlock_token()
        self.refused("wrong_model", token | {"model": "00" * 32})
        self.refused("wrong_model", token | {"model": "00" * 32, "key": "00" * 32})

    def test_garbled_unlock_token(self):
        token = shared.unlock_token()
        visit = {name: token[name] for name in ("key", "model")}
        tokens = [changed for changed in garbled(token) if changed != visit]
        self.assertGreater(len(tokens), 100)
        chance = random.Random(SEED)
        for changed in tokens[-2:] + chance.sample(tokens[:-2], 40):
            with self.subTest(token=changed):
                self.assertCode("bad_message", self.prove, changed, "owner", self.locked)
        for changed in chance.sample(tokens, 5):
            self.assertCode("bad_message", self.prove, changed, "owner")

    def test_token_of_the_other_role(self):
        self.refused("bad_message", {"token": muproxy.read_token(site.token)}, "owner")
        self.refused("bad_message", shared.unlock_token(), "user")

    def test_unknown_access_token(self):
        token = muproxy.read_token(site.token)
        self.assertCode("locked", self.prove, {"token": token}, "user", self.locked)
        for other in (muproxy.read_token(site.other), token[:-1], token + "a", "\u00e9" * 16):
            self.assertCode("token_refused", self.prove, {"token": other}, "user")

    def test_garbled_access_token(self):
        for token in ({}, {"token": 1}, {"token": "short"}, {"token": "a" * 257}):
            self.refused("bad_message", token, "user")
        self.refused("bad_message", {"token": "a" * 16, "more": 1}, "user")

    def test_json_from_hell_as_a_token(self):
        for body, code in HELL.items():
            if len(body) > mp.HANDSHAKE_FRAME - 64:
                continue
            for role in ("owner", "user"):
                with contextlib.closing(shared.session(role)) as session:
                    send(session, body)
                    self.assertEqual(receive(session), {"error": code}, body[:40])
                    self.assertEqual(rest(session.link.socket), b"")

    def test_token_longer_than_the_step_allows(self):
        with contextlib.closing(shared.session("owner")) as session:
            send(session, shared.unlock_token() | {"more": "a" * mp.HANDSHAKE_FRAME})
            self.assertEqual(rest(session.link.socket), b"")

    def test_wrong_secret(self):
        psk = folder / "stranger.psk"
        psk.exists() or own("keygen", "psk", psk)
        reference = muproxy.read_reference(site.reference)
        for secret, role in ((psk, "owner"), (psk, "user"), (site.user_psk, "owner")):
            secret = muproxy.read_secret(secret)
            inlet = muproxy.Inlet(FREE_RATE, 1 << 30)
            options = (self.locked.address, reference, secret, role, inlet)
            error = self.assertCode("evidence_refused", muproxy.Session, *options)
            self.assertEqual(len([check for check in error.checks if not check.ok]), 1)

    def test_challenges_that_get_no_answer(self):
        """What is not exactly a challenge to us hears nothing, not even a code."""
        share = mp.KeyShare().public.hex()
        edge = [value.to_bytes(384, "big").hex() for value in (0, 1, mp.PRIME - 1, mp.PRIME)]
        wrong = [{"version": version} for version in (0, 2, True, "1", 1.0)]
        wrong += [{"evidence": kind} for kind in ("tpm2", "tsm", "none", "PSK", "", None)]
        wrong += [{"role": role} for role in ("admin", "", None)]
        wrong += [{"share": value} for value in (*edge, share[2:], share + "00", share.upper())]
        wrong += [{"nonce": ""}, {"nonce": "ab" * 31}, {"more": 1}]
        bodies = [challenge(**fields) for fields in wrong]
        bodies += [b"", challenge() * 2, challenge()[:-1], b"\0" * 100]
        good = json.loads(challenge())
        bodies += [mp.encode_json({k: v for k, v in good.items() if k != name}) for name in good]
        bodies += [body for body in HELL if len(body) < mp.HANDSHAKE_FRAME]
        peers = [(body, connect(self.locked)) for body in bodies]
        for body, peer in peers:
            peer.sendall(mp.frame(body))
        for body, peer in peers:
            with self.subTest(body=body[:80]):
                self.assertSilent(peer)


class Replays(Case):
    """Prove 4: what was said once is worth nothing when it is said again."""

    def test_lease_seen_before(self):
        token = shared.unlock_token()
        self.prove(token, "owner")
        before = status()
        self.assertEqual(before["lease"], token["lease"]["id"])
        self.assertCode("lease_refused", self.prove, token, "owner")
        later = token["lease"] | {"sequence": token["lease"]["sequence"] + 1}
        self.assertCode("lease_refused", self.prove, token | {"lease": later}, "owner")
        for sequence in (1, later["sequence"] - 2, later["sequence"] - 1):
            old = shared.unlock_token(sequence=sequence)
            self.assertCode("lease_refused", self.prove, old, "owner")
        self.assertEqual(status(), before)

    def test_transcript(self):
        """A whole session of the owner, played again byte by byte: step 1 and nothing more."""
        ready()
        with tap(shared) as (port, said):
            relayed = types.SimpleNamespace(site=site, address=("127.0.0.1", port))
            with contextlib.closing(Enclave.session(relayed, "owner")) as session:
                session.prove(shared.unlock_token())
        before = status()
        with connect() as peer:
            peer.sendall(bytes(said))
            answer = mp.parse_message(mp.read_frame(peer, 4096, SECONDS), mp.MEASUREMENT)
            self.assertEqual(answer["status"], "ready")
            self.assertEqual(len(mp.read_frame(peer, 4096, SECONDS)), 32)
            self.assertEqual(rest(peer), b"")
        opening = mp.FRAME_HEADER + int.from_bytes(said[: mp.FRAME_HEADER], "big")
        with contextlib.closing(shared.session("owner")) as other:
            other.link.sendall(bytes(said[opening:]))  # the records of one session in another
            self.assertEqual(rest(other.link.socket), b"")
        self.assertEqual(status(), before)


@contextlib.contextmanager
def tap(enclave):
    """A relay for one connection: (its port, all that the host says through it)."""
    said = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def relay():
            host, _ = listener.accept()
            with host, connect(enclave) as guest:
                back = threading.Thread(target=muproxy.pump, args=(guest, host), daemon=True)
                back.start()
                while data := host.recv(1 << 16):
                    said.extend(data)
                    guest.sendall(data)

        worker = threading.Thread(target=relay, daemon=True)
        worker.start()
        yield listener.getsockname()[1], said
        worker.join(SECONDS)


class Containers(Case):
    """Prove 4: a container that is not what was sealed is refused; then it is locked again."""

    @classmethod
    def setUpClass(cls):
        cls.good = site.model.read_bytes()
        cls.container = muproxy.read_container(site.model)
        cls.path = folder / "disk.mus"

    def enclave(self, data):
        """A locked enclave whose disk holds these bytes."""
        self.path.write_bytes(data)
        files = types.SimpleNamespace(**vars(site) | {"model": self.path})
        enclave = Enclave(files)
        self.addCleanup(enclave.end)
        return enclave

    def flipped(self, at, bit=0):
        """The container with one bit flipped."""
        data = bytearray(self.good)
        data[at] ^= 1 << bit
        return bytes(data)

    def test_no_container(self):
        """A prefix that is none ends the enclave with one line."""
        cut_off = (b"", self.good[:11], self.good[: len(self.container.header)])
        for data in (*cut_off, self.flipped(0), self.flipped(8, 7), self.flipped(7)):
            self.path.write_bytes(data)
            command = [sys.executable, "-B", ROOT / "tools" / "enclave.py", "--model", self.path]
            command += ["--port", "0", "--owner-psk", site.owner_psk, "--user-psk", site.user_psk]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertRegex(done.stderr, r"\Aenclave: error: can't use the model [^\n]+\n\Z")

    def test_header(self):
        """An edited header is another model; the token of who was fooled is refused as well."""
        header = len(self.container.header)
        chance = random.Random(SEED)
        spots = [mp.PREFIX - 1, mp.PREFIX, mp.PREFIX + header - 1]
        spots += chance.sample(range(mp.PREFIX, mp.PREFIX + header), 5)
        spots += [self.good.index(b'"asset":"') + 9, self.good.index(b'"salt":"') + 8]
        for at in spots:
            with self.subTest(at=at):
                data = self.flipped(at)
                size = mp.header_length(data[: mp.PREFIX])
                enclave = self.enclave(data)
                token = shared.unlock_token()
                self.assertCode("wrong_model", self.prove, token, "owner", enclave)
                header = data[mp.PREFIX : mp.PREFIX + size]
                token["model"] = hashlib.sha256(header).hexdigest()
                code = self.expected(header, bytes.fromhex(token["key"]))
                self.assertCode(code, self.prove, token, "owner", enclave)
                enclave.end()

    def expected(self, header, key):
        """The code for a header that a fooled owner's token names."""
        try:
            container = mp.Container(header)
        except mp.ProtocolError as error:
            return error.code
        return "container_corrupt" if container.is_key(key) else "wrong_key"

    def test_chunks(self):
        """The host changes the disk under a locked enclave: each load finds it out."""
        container, good = self.container, self.good
        spots = {}
        for index in {0, container.chunks // 2, container.chunks - 1}:
            offset, _, size, _ = container.chunk(index)
            for at in (offset, offset + size // 2, offset + size - 1, offset + size + mp.TAG - 1):
                spots[f"bit of byte {at}"] = self.flipped(at, at % 8)
        first, second = (container.chunk(index)[0] for index in (0, 1))
        step = container.chunk_size + mp.TAG
        moved = bytearray(good)
        moved[first : first + step], moved[second : second + step] = (
            good[second : second + step],
            good[first : first + step],
        )
        spots["two chunks swapped"] = bytes(moved)
        last = container.chunk(container.chunks - 1)[0]
        spots["the last chunk dropped"] = good[:last]
        spots["a byte short"] = good[: last + container.chunk(container.chunks - 1)[2] + mp.TAG - 1]
        repeated = bytearray(good)
        repeated[second : second + step] = good[first : first + step]
        spots["a chunk repeated"] = bytes(repeated)
        twin = folder / "twin.mus"
        seal(site.demo, twin, "--key", site.key, "--asset", "demo").check()
        twin = twin.read_bytes()
        self.assertEqual(len(twin), len(good))
        spots["a chunk of another sealing"] = good[:first] + twin[first:second] + good[second:]
        enclave = self.enclave(good)
        for what, data in spots.items():
            with self.subTest(what), self.path.open("r+b") as disk:
                disk.write(data)
                disk.truncate(len(data))
                disk.flush()
                known, gate = len(enclave.lines), enclave.pids()["gate"]
                self.assertCode("container_corrupt", enclave.unlock)
                relocked(enclave, known)
                self.assertNotEqual(enclave.pids()["gate"], gate)
                with contextlib.closing(enclave.session()) as session:
                    self.assertEqual(session.measurement["status"], "locked")


class Records(Case):
    """Prove 5: a record that is changed, dropped, repeated or moved ends its session only."""

    @classmethod
    def setUpClass(cls):
        ready()

    def setUp(self):
        self.gate, self.before = shared.pids()["gate"], settled()

    def tearDown(self):
        self.assertEqual(status(), self.before)
        self.assertEqual(shared.pids()["gate"], self.gate)

    def check(self, edit, cells, role="owner"):
        """A session whose records were edited gets so many cells, then nothing but the end."""
        with contextlib.closing(shared.session(role)) as session:
            user = {"token": muproxy.read_token(site.token)}
            session.prove(user if role == "user" else self.visit())
            message = {"cancel": True} if role == "user" else {"status": True}
            records = [session.sealer.seal_json(message)[0] for _ in range(3)]
            with contextlib.suppress(ConnectionError):  # it may close before it has read them
                session.link.sendall(b"".join(edit(records)))
            said = mp.read_exactly(session.link.socket, cells * mp.CELL)
            if cells == 3 or role == "user":
                session.link.shutdown(socket.SHUT_WR)
            return len(said + rest(session.link.socket))

    def visit(self):
        """The token of an owner who brings no lease."""
        return {name: v for name, v in shared.unlock_token().items() if name != "lease"}

    def flip(self, bit):
        """How many bytes come after a record in which one bit was flipped."""

        def edit(records):
            size = len(records[0])
            changed = int.from_bytes(records[0], "big") ^ 1 << bit
            is_longer = bit >= 8 * (size - mp.FRAME_HEADER)  # it waits for what is missing
            return [changed.to_bytes(size, "big"), *records[1:], bytes(1 << 20) * is_longer]

        return self.check(edit, 0)

    def test_every_bit(self):
        size = 8 * len(mp.Sealer(bytes(32)).seal_json({"status": True})[0])
        with ThreadPoolExecutor(4) as pool:
            for bit, count in enumerate(pool.map(self.flip, range(size))):
                self.assertEqual(count, 0, f"bit {bit}")

    def test_unchanged(self):
        """What the other tests would see if nothing were refused."""
        self.assertEqual(self.check(lambda records: records, 3), 3 * mp.CELL)
        self.assertEqual(self.check(lambda records: records, 0, "user"), 0)

    def test_drop(self):
        self.assertEqual(self.check(lambda records: records[1:], 0), 0)
        self.assertEqual(self.check(lambda r: [r[0], r[2]], 1), mp.CELL)

    def test_repeat(self):
        self.assertEqual(self.check(lambda r: [r[0], r[0], r[1]], 1), mp.CELL)
        self.assertEqual(self.check(lambda r: [r[0], r[0]], 0, "user"), 0)

    def test_swap(self):
        self.assertEqual(self.check(lambda r: [r[1], r[0], r[2]], 0), 0)

    def test_truncate(self):
        for size in (4, 5, 24, 39):
            cut = lambda r, size=size: [r[0][:size], bytes([r[0][size] ^ 1]) * 64]  # noqa: E731
            self.assertEqual(self.check(cut, 0), 0)

    def test_records_that_the_key_holder_may_not_send(self):
        """Well sealed, but of the wrong form: ids, several records, padding, no body, no end."""
        for kind, plain in (
            (mp.IDS_RECORD, b"\0\0\0\1a"),
            (2, b"\0\0\0\2{}"),
            (mp.JSON_RECORD, b"\0\0\0\2{}\1"),
            (mp.JSON_RECORD, b"\0\0\0\3{}"),
            (mp.JSON_RECORD, b"\0\0\0\5"),
            (mp.JSON_RECORD, b"\xff\xff\xff\xff{}"),
            (mp.JSON_RECORD, b""),
        ):
            with self.subTest(plain=plain), owner() as session:
                session.link.sendall(seal_plain(session, bytes([kind]) + plain))
                self.assertEqual(rest(session.link.socket), b"")

    def test_every_record_is_one_cell(self):
        """Whatever is said, the wire shows records of one size."""
        with shared.ready() as session, owner() as other:
            for peer, message in (
                (session, {"prompt": "a", "bad": 1}),
                (session, SHORT),
                (session, {"prompt": "a" * 5000}),
                (other, {"status": True}),
            ):
                send(peer, message)
                sizes = set()
                while not (frames := self.frame(peer))[1]:
                    sizes.add(frames[0])
                self.assertEqual(sizes | {frames[0]}, {mp.CELL})
        self.before = settled()  # the answers were paid for

    def frame(self, session):
        """(bytes on the wire of the next record, whether it ends the step)."""
        payload = mp.read_frame(session.link, 1 << 20, SECONDS)
        kind, body = session.opener.open(payload)
        return len(payload) + mp.FRAME_HEADER, kind == mp.JSON_RECORD


def seal_plain(session, plain):
    """A record with this plaintext, as only the key's holder can make it."""
    nonce = session.sealer._count.to_bytes(12, "big")
    session.sealer._count += 1
    header = (len(plain) + mp.TAG).to_bytes(mp.FRAME_HEADER, "big")
    return header + session.sealer._aead.encrypt(nonce, plain, header)


if __name__ == "__main__":
    unittest.main()
