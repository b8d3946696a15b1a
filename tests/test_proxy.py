"""The proxy against a real enclave with the demo model, through the real openai client and curl."""

import concurrent.futures
import contextlib
import hashlib
import http.client
import io
import json
import os
import pathlib
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
from unittest import mock

import muprotocol as mp
import muproxy
from tests.support import FREE_RATE, ROOT, SECONDS, Enclave, make_site, own, owner, proxy

LONG = {"temperature": 2.0, "seed": 1}  # no end in sight
ZEN = "Beautiful is better than ugly"  # of the answer to what `chat` and `Api.create` ask
ONE_THREAD = {"ENCLAVE_THREADS": "1"}  # does not suffer when the machine is busy
site = enclave = None


def setUpModule():
    global site, enclave
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    site = make_site(pathlib.Path(folder.name))
    for name in ("ANSWER_SECONDS", "LOAD_SECONDS"):
        patience = mock.patch.object(muproxy, name, SECONDS)
        patience.start()
        unittest.addModuleCleanup(patience.stop)
    enclave = Enclave(site, environment=ONE_THREAD)
    unittest.addModuleCleanup(enclave.end)
    enclave.unlock()


def reference():
    return muproxy.read_reference(site.reference)


def free_inlet():
    """An outer meter that is effectively off."""
    return muproxy.Inlet(FREE_RATE, 1 << 30)


def open_session(address=None, inlet=None, secret=None, role="user", **wanted):
    """A verified session with the enclave, which has not proved anything yet."""
    values = wanted.pop("reference", reference())
    secret = secret or muproxy.read_secret(site.user_psk)
    facts = (address or enclave.address, values, secret, role, inlet or free_inlet())
    return muproxy.Session(*facts, **wanted)


def token():
    return muproxy.read_token(site.token)


def vocabulary():
    return muproxy.read_vocabulary(site.vocabulary)


@contextlib.contextmanager
def ready_session(**options):
    with contextlib.closing(open_session(**options)) as session:
        session.prove({"token": token()})
        yield session


def chat(text="Tell me about zen.", **options):
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "temperature": 0, "max_new_tokens": 40} | options


def wait_until(condition):
    """Wait for something that another thread or process brings about. AssertionError."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "stuck"
        time.sleep(0.01)


def gate_has_read_all():
    """Whether the module's enclave has taken all that its connections have brought."""
    rows = [row.split() for row in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]]
    queues = [row[4] for row in rows if row[1].endswith(f":{enclave.port:04X}") and row[3] == "01"]
    return all(queue.endswith(":00000000") for queue in queues)


@contextlib.contextmanager
def engine_held():
    """The engine stands still. Gives the function that lets it go on before the block ends, once
    the gate has read what it was sent.
    """
    engine = enclave.pids()["engine"]
    state = pathlib.Path(f"/proc/{engine}/stat")
    os.kill(engine, signal.SIGSTOP)
    try:
        wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")

        def go_on():
            wait_until(gate_has_read_all)
            os.kill(engine, signal.SIGCONT)

        yield go_on
    finally:
        os.kill(engine, signal.SIGCONT)


class Middle:
    """A man in the middle: passes frames on, each as edit(side, number, payload) says.

    side: "h" from the host, "e" from the enclave. edit returns the payloads to pass on.
    passed: bytes that the proxy's side has been sent.
    """

    def __init__(self, edit=lambda side, number, payload: [payload], target=None):
        self.edit, self.target = edit, target or enclave.address
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.passed, self.sockets, self.threads = 0, [self.listener], []
        self.taker = threading.Thread(target=self.run, daemon=True)
        self.taker.start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                host = self.listener.accept()[0]
                self.sockets.append(host)
                self.sockets.append(socket.create_connection(self.target, SECONDS))
                ends = self.sockets[-2:]
                for side, pair in (("h", ends), ("e", ends[::-1])):
                    pump = threading.Thread(target=self.pump, args=(side, *pair), daemon=True)
                    self.threads.append(pump)
                    pump.start()

    def pump(self, side, source, sink):
        number = 0
        with contextlib.suppress(OSError, EOFError):
            while True:
                for payload in self.edit(side, number, mp.read_frame(source, 1 << 21)):
                    sink.sendall(mp.frame(payload))
                    self.passed += len(mp.frame(payload)) if side == "e" else 0
                number += 1
        self.end(source, sink)

    def end(self, *sockets):
        for connection in sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end(self.listener)
        self.taker.join(SECONDS)
        self.end(*self.sockets)
        for thread in self.threads:
            thread.join(SECONDS)
        for connection in self.sockets:
            connection.close()


def change(payload, **fields):
    """A JSON payload with other fields; None strips one."""
    value = json.loads(payload) | fields
    return mp.encode_json({name: v for name, v in value.items() if v is not None})


class Case(unittest.TestCase):
    """A test that hangs is a failure."""

    def run(self, result=None):
        def stuck(*_):
            raise AssertionError("stuck")

        before = signal.signal(signal.SIGALRM, stuck)
        signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS, 5)  # again while it unwinds
        try:
            return super().run(result)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def assertCode(self, code, call, *arguments, **options):
        """Assert that a call raises ProtocolError with this code; the error."""
        with self.assertRaises(mp.ProtocolError) as caught:
            result = call(*arguments, **options)
            list(result if hasattr(result, "__next__") else ())
        self.assertEqual(caught.exception.code, code, str(caught.exception))
        return caught.exception

    def assertFails(self, status, pattern, done):
        """Assert an exit status and one line on stderr, of the proxy or the owner's tool."""
        self.assertEqual(done.returncode, status, done.stderr)
        self.assertRegex(done.stderr, pattern)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertRegex(done.stderr, "^(muproxy|owner): error: ")

    def assertRefused(self, code, pool, token):
        """Assert that a pool gives no session for this token, for this reason."""
        with self.assertRaises(mp.ProtocolError) as caught, pool.session(token):
            pass
        self.assertEqual(caught.exception.code, code)

    def enclave(self, *flags):
        """A locked enclave of this test's own."""
        extra = Enclave(site, *flags, environment=ONE_THREAD)
        self.addCleanup(extra.__exit__)
        return extra


def wrapped(passphrase, key, asset="m"):
    """The content of a key file under a passphrase."""
    facts = {"version": 1, "asset": asset, "scrypt": {"n": 16384, "r": 8, "p": 1}}
    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
    costs = facts["scrypt"] | {"salt": salt, "dklen": 32, "maxmem": 1 << 26}
    wrapping = hashlib.scrypt(passphrase.encode(), **costs)
    facts["scrypt"]["salt"] = salt.hex()
    sealed = mp.aead(wrapping).encrypt(nonce, key, mp.encode_json(facts))
    return facts | {"nonce": nonce.hex(), "wrapped": sealed.hex()}


class Files(Case):
    """What the proxy reads and writes."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def write(self, name, text, mode=0o600):
        path = self.folder / name
        path.write_text(text)
        path.chmod(mode)
        return path

    def test_key_file(self):
        key = secrets.token_bytes(32)
        path = self.write("key", json.dumps({"version": 1, "asset": "m", "key": key.hex()}))
        self.assertEqual(owner.read_key_file(path, self.fail), ("m", key))

    def test_wrapped_key_file(self):
        key, asked = secrets.token_bytes(32), []
        fields = wrapped("correct horse", key)
        path = self.write("key", json.dumps(fields))

        def ask(answer="correct horse"):
            asked.append(answer)
            return answer

        self.assertEqual(owner.read_key_file(path, ask), ("m", key))
        self.assertEqual(len(asked), 1)
        for wrong in (lambda: "Correct horse", lambda: ""):
            with self.assertRaisesRegex(muproxy.Failure, "wrong passphrase"):
                owner.read_key_file(path, wrong)
        path = self.write("key", json.dumps(fields | {"asset": "n"}))
        with self.assertRaisesRegex(muproxy.Failure, "wrong passphrase, or the file was changed"):
            owner.read_key_file(path, ask)

    def test_private_files_that_others_can_read_are_refused(self):
        readers = {
            "key": lambda path: owner.read_key_file(path, self.fail),
            "psk": muproxy.read_secret,
            "token": muproxy.read_token,
        }
        for name, read in readers.items():
            for mode in (0o640, 0o604, 0o660):
                path = self.write(name, "00" * 32, mode)
                with self.assertRaisesRegex(muproxy.Failure, "chmod 600"):
                    read(path)

    def test_what_is_not_what_it_should_be(self):
        readers = (
            lambda path: owner.read_key_file(path, self.fail),
            muproxy.read_secret,
            muproxy.read_token,
            muproxy.read_reference,
            muproxy.read_container,
            muproxy.read_vocabulary,
            muproxy.read_prompts,
        )
        for read in readers:
            for text in ("[1]", '{"version": 1}', "\0" * 20, "\ud800"):
                path = self.folder / "file"
                path.write_bytes(text.encode("utf-8", "surrogatepass"))
                path.chmod(0o600)
                if read is muproxy.read_prompts and text in ('{"version": 1}', "\0" * 20):
                    continue  # a prompt as good as any
                with self.assertRaisesRegex(muproxy.Failure, "file: not a"):
                    read(path)
            with self.assertRaisesRegex(muproxy.Failure, "No such file"):
                read(self.folder / "nothing")

    def test_reference_with_an_unknown_field_is_refused(self):
        values = reference()
        path = self.write("reference", json.dumps(values | {"measurment": "00" * 32}))
        with self.assertRaisesRegex(muproxy.Failure, "measurment"):
            muproxy.read_reference(path)

    def test_keygen(self):
        for what, pattern in (("token", "mu-[0-9a-f]{64}\n"), ("psk", "[0-9a-f]{64}\n")):
            path = self.folder / what
            done = own("keygen", what, path)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            text = path.read_text()
            self.assertRegex(text, f"^{pattern}$")
            self.assertEqual(path.stat().st_mode & 0o777, 0o600)
            self.assertNotIn(text.strip(), done.stdout)
            again = own("keygen", what, path)
            self.assertFails(2, f"{what}: File exists", again)
            self.assertEqual(path.read_text(), text)
        said = own("keygen", "token", self.folder / "other").stdout
        self.assertIn(mp.token_hash(muproxy.read_token(self.folder / "other")), said)

    def test_prompts(self):
        path = self.write("prompts", "one\n\n two \n")
        self.assertEqual(muproxy.read_prompts(path), ["one", " two "])
        path = self.write("prompts", ' ["one\\ntwo", ""]')
        self.assertEqual(muproxy.read_prompts(path), ["one\ntwo", ""])
        for text in ('["a"', "[1]", '["a"], "more": 1', '["\\ud800"]', "[" * 100_000):
            path = self.write("prompts", text)
            with self.assertRaisesRegex(muproxy.Failure, "prompts: not a file of prompts"):
                muproxy.read_prompts(path)


class Evidence(Case):
    """What is compared with the reference values."""

    MEASUREMENT = {
        "measurement": "11" * 32,
        "model": "22" * 32,
        "posture": {"confinement": "seccomp", "debug": False},
    }
    REFERENCE = {"kind": "psk", "root": "psk", "measurement": "11" * 32, "withdrawn": []}

    def failed(self, measurement=None, reference=None, **wanted):
        checks = muproxy.check_measurement(
            self.MEASUREMENT | (measurement or {}), self.REFERENCE | (reference or {}), **wanted
        )
        return {check.name for check in checks if not check.ok}

    def test_each_mismatch_has_its_name(self):
        posture = self.MEASUREMENT["posture"]
        none, debug = posture | {"confinement": "none"}, posture | {"debug": True}
        self.assertEqual(self.failed(), set())
        self.assertEqual(self.failed({"measurement": "12" * 32}), {"measurement"})
        self.assertEqual(self.failed(reference={"withdrawn": ["11" * 32]}), {"withdrawn"})
        other = {
            "measurement": "12" * 32
        }  # whatever it says: these values are withdrawn themselves
        wrong = self.failed(other, {"withdrawn": ["11" * 32]})
        self.assertEqual(wrong, {"measurement", "withdrawn"})
        self.assertEqual(self.failed({"posture": none}), {"confinement"})
        self.assertEqual(self.failed({"posture": debug}), {"debug"})
        self.assertEqual(self.failed(model="22" * 32), set())
        self.assertEqual(self.failed(model="33" * 32), {"model"})
        self.assertEqual(self.failed(reference={"model": "33" * 32}), {"model"})

    def test_all_mismatches_at_once(self):
        measurement = {"measurement": "44" * 32, "model": "55" * 32}
        measurement["posture"] = {"confinement": "none", "debug": True}
        wrong = {"measurement", "withdrawn", "confinement", "debug", "model"}
        reference = {"withdrawn": ["44" * 32]}
        self.assertEqual(self.failed(measurement, reference, model="22" * 32), wrong)

    def test_proof(self):
        secret, data = secrets.token_bytes(32), secrets.token_bytes(32)
        proof = mp.psk_proof(secret, data)
        self.assertTrue(muproxy.verify_psk(secret, data, proof, {})[0].ok)
        for wrong in (b"", proof[:-1], proof + b"\0", bytes(32), mp.psk_proof(bytes(32), data)):
            self.assertFalse(muproxy.verify_psk(secret, data, wrong, {})[0].ok)
        with self.assertRaisesRegex(muproxy.Failure, "--psk"):
            muproxy.verify_psk(None, data, proof, {})

    def test_roots_that_are_for_development(self):
        for kind, root, weak in (
            ("psk", "psk", True),
            ("psk", "tee", True),
            ("tpm2", "fixture", True),
            ("tpm2", "ek:ACME", False),
            ("tsm", "tee", False),
        ):
            self.assertEqual(muproxy.is_for_development({"kind": kind, "root": root}), weak)


class Handshake(Case):
    """Real enclave, tampered link: nothing is released, and each case has its own code."""

    def refused(self, edit, code="evidence_refused", **options):
        with Middle(edit) as middle:
            return self.assertCode(code, open_session, middle.address, **options)

    def failed_checks(self, error):
        return {check.name for check in error.checks if not check.ok}

    def test_untouched(self):
        with Middle() as middle, contextlib.closing(open_session(middle.address)) as session:
            self.assertTrue(all(check.ok for check in session.checks))
            session.prove({"token": token()})
            self.assertEqual(session.ready["status"], "ready")

    def test_wrong_secret(self):
        error = self.assertCode("evidence_refused", open_session, secret=bytes(32))
        self.assertEqual(self.failed_checks(error), {"proof"})

    def test_user_secret_for_the_owner(self):
        error = self.assertCode("evidence_refused", open_session, role="owner")
        self.assertEqual(self.failed_checks(error), {"proof"})

    def test_wrong_and_withdrawn_measurement(self):
        values = reference()
        other = values | {"measurement": "00" * 32, "withdrawn": [values["measurement"]]}
        error = self.assertCode("evidence_refused", open_session, reference=other)
        self.assertEqual(self.failed_checks(error), {"measurement", "withdrawn"})
        self.assertIn(values["measurement"], str(error))
        self.assertIn("00" * 32, str(error))

    def test_wrong_model(self):
        error = self.assertCode("evidence_refused", open_session, model="00" * 32)
        self.assertEqual(self.failed_checks(error), {"model"})

    def test_edited_measurement(self):
        posture = {"confinement": "full", "debug": False}
        for fields in (
            {"posture": posture},
            {"measurement": "00" * 32},
            {"share": mp.KeyShare().public.hex()},
            {"nonce": "00" * 32},
            {"status": "loading"},
        ):

            def edit(side, number, payload, fields=fields):
                return [change(payload, **fields) if (side, number) == ("e", 0) else payload]

            error = self.refused(edit)
            self.assertIn("proof", self.failed_checks(error), fields)

    def test_stripped_posture(self):
        def edit(side, number, payload):
            return [change(payload, posture=None) if (side, number) == ("e", 0) else payload]

        self.refused(edit, "bad_message")

    def test_swapped_share(self):
        def edit(side, number, payload):
            share = mp.KeyShare().public.hex()
            return [change(payload, share=share) if (side, number) == ("h", 0) else payload]

        self.assertEqual(self.failed_checks(self.refused(edit)), {"proof"})

    def test_another_kind_in_the_challenge(self):
        def edit(side, number, payload):
            return [change(payload, evidence="tpm2") if (side, number) == ("h", 0) else payload]

        self.refused(edit, "connection_lost")

    def test_kind_that_we_cannot_verify(self):
        values = reference() | {"kind": "tsm", "root": "tee"}
        with self.assertRaisesRegex(muproxy.Failure, "kind tsm"):
            open_session(reference=values)

    def test_replayed_transcript(self):
        recorded = []

        def record(side, number, payload):
            if side == "e":
                recorded.append(payload)
            return [payload]

        with Middle(record) as middle:
            open_session(middle.address).close()

        def replay(side, number, payload):
            return [recorded[number] if side == "e" else payload]

        self.assertEqual(self.failed_checks(self.refused(replay)), {"proof"})

    def test_proof_cut_or_too_long(self):
        for edited in (lambda proof: proof[:-1], lambda proof: proof + b"\0"):

            def edit(side, number, payload, edited=edited):
                return [edited(payload) if (side, number) == ("e", 1) else payload]

            self.assertEqual(self.failed_checks(self.refused(edit)), {"proof"})
        self.refused(lambda side, n, p: [bytes(5000) if (side, n) == ("e", 1) else p], "bad_frame")

    def test_nobody_there(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
        self.assertCode("connection_lost", open_session, address)

    def test_one_that_says_nothing(self):
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            mock.patch.object(muproxy, "HANDSHAKE_SECONDS", 0.2),
        ):
            self.assertCode("timeout", open_session, listener.getsockname())


class Sessions(Case):
    """Requests and answers on a verified session."""

    def answer(self, session, request, stops=()):
        text = "".join(session.generate(request, vocabulary(), stops))
        return text, session.final

    def test_text_is_that_of_the_ids(self):
        with ready_session() as session:
            text, final = self.answer(session, chat())
            ids = sum(session.exchange(chat(), vocabulary()), [])
            self.assertEqual(b"".join(vocabulary().table[i] for i in ids).decode(), text)
            self.assertEqual(final["usage"], session.final["usage"])
            self.assertIn(ZEN, text)

    def test_stop_strings(self):
        with ready_session() as session:
            whole, _ = self.answer(session, chat())
            stop = whole[20:26]
            text, final = self.answer(session, chat(), ["no such", stop])
            self.assertEqual(text, whole[: whole.index(stop)])
            self.assertEqual(final["finish_reason"], "stop")
            self.assertTrue(session.is_usable())

    def test_closing_the_iterator_frees_the_session(self):
        with ready_session() as session:
            pieces = session.generate({"prompt": "The"} | LONG, vocabulary())
            next(pieces)
            pieces.close()
            self.assertTrue(session.is_usable())
            self.assertIn(ZEN, self.answer(session, chat())[0])

    def test_nobody_wants_the_answer(self):
        with ready_session() as session:
            request = {"prompt": "The"} | LONG
            pieces = session.generate(request, vocabulary(), (), lambda: True)
            with engine_held() as go_on, concurrent.futures.ThreadPoolExecutor() as pool:
                done = pool.submit(list, pieces)
                wait_until(lambda: getattr(session, "_is_cancelled", False))
                go_on()
                self.assertEqual(done.result(SECONDS), [])
            self.assertEqual(session.final["finish_reason"], "cancelled")
            self.assertEqual(session.final["usage"]["completion_tokens"], 0)

    def test_mistakes_leave_the_session_open(self):
        with ready_session() as session:
            context = session.ready["context"]
            for code, request in (
                ("prompt_too_long", {"prompt": "word " * 4 * context}),
                ("too_many_tokens", {"prompt": "a", "max_new_tokens": context}),
                ("bad_message", {"prompt": "a", "temprature": 1}),
                ("bad_message", {"prompt": "a", "encoding": "text"}),
                ("prompt_too_long", {"prompt": "a" * mp.REQUEST_FRAME}),
            ):
                error = self.assertCode(code, session.generate, request, vocabulary())
                self.assertTrue(session.is_usable(), code)
                if code == "too_many_tokens":
                    self.assertEqual(error.limit, context)
            self.assertIn(ZEN, self.answer(session, chat())[0])

    def test_refused_token(self):
        session = open_session()
        self.assertCode("token_refused", session.prove, {"token": "x" * 20})
        self.assertFalse(session.is_open)

    def test_access_token_is_not_an_unlock_token(self):
        secret = muproxy.read_secret(site.owner_psk)
        session = open_session(role="owner", secret=secret)
        self.assertCode("bad_message", session.prove, {"token": token()})

    def test_another_vocabulary(self):
        table = mp.Vocabulary(mp.encode_vocabulary([b"x"] * len(vocabulary())))
        with ready_session() as session, self.assertRaisesRegex(muproxy.Failure, "--vocabulary"):
            list(session.generate(chat("hi"), table))

    def test_tampered_records(self):
        """Every bit of a record from the enclave; lost, repeated and swapped ones."""
        at = 3  # the first record after measurement, proof and READY

        def flip(bit):
            def edit(payload):
                flipped = bytearray(payload)
                flipped[bit // 8] ^= 1 << bit % 8
                return [bytes(flipped)]

            return edit

        rng = random.Random(7)
        bits = rng.sample(range(8 * (mp.CELL - mp.FRAME_HEADER)), 40)
        cases = [
            *map(flip, bits),
            lambda payload: [payload, payload],
            lambda payload: [payload[:-1]],
        ]
        held = []
        for case in cases:

            def edit(side, number, payload, case=case):
                return case(payload) if (side, number) == ("e", at) else [payload]

            self.ask_through(edit, "bad_record")

        def swap(side, number, payload):
            if side == "e" and number == at:
                held.append(payload)
                return []
            return [payload, held.pop()] if side == "e" and held else [payload]

        self.ask_through(swap, "bad_record")

    def ask_through(self, edit, code):
        with Middle(edit) as middle, ready_session(address=middle.address) as session:
            request = {"prompt": "The", "max_new_tokens": 100}
            self.assertCode(code, session.generate, request, vocabulary())
            self.assertFalse(session.is_open)

    def test_an_answer_without_its_final_record_is_a_failure(self):
        class Cut(Exception):
            pass

        def edit(side, number, payload):
            if side == "e" and number == 4:
                raise OSError("cut")
            return [payload]

        with Middle(edit) as middle, ready_session(address=middle.address) as session:
            request = {"prompt": "The", "max_new_tokens": 100}
            self.assertCode("connection_lost", session.generate, request, vocabulary())
            self.assertIsNone(session.final)

    def test_what_nobody_asked_for_ends_the_session(self):
        with ready_session() as session:
            self.assertTrue(session.is_usable())
            session._send({"cancel": True})  # of nothing: no answer is due
            session._send({"prompt": "The", "max_new_tokens": 1})
            wait_until(lambda: not session.is_usable())


class Pools(Case):
    """Sessions are reused, bounded, and opened anew when they are lost."""

    def pool(self, *arguments, **options):
        self.opened = []

        def connect():
            self.opened.append(open_session())
            return self.opened[-1]

        pool = muproxy.Pool(connect, *arguments, **options)
        self.addCleanup(pool.close)
        return pool

    def test_reuse_and_loss(self):
        pool = self.pool()
        for _ in range(3):
            with pool.session(token()):
                pass
        self.assertEqual(len(self.opened), 1)
        self.opened[0].link.shutdown(socket.SHUT_RDWR)
        with pool.session(token()) as session:
            self.assertIs(session, self.opened[1])
            self.assertTrue(all(check.ok for check in session.checks))
        self.assertEqual((pool.count, len(pool.idle)), (1, 1))

    def test_no_token_is_kept(self):
        pool = self.pool()
        with pool.session(token()):
            pass
        held = repr(vars(pool)) + repr([vars(session) for _, session in pool.idle])
        self.assertNotIn(token(), held)

    def test_bound(self):
        pool = self.pool(1, 0.1)
        with pool.session(token()):
            self.assertRefused("busy", pool, token())
        with pool.session(token()):
            pass

    def test_another_users_idle_session_makes_room(self):
        pool = self.pool(1, 0.1)
        with pool.session(token()):
            pass
        self.assertRefused("token_refused", pool, "x" * 20)
        self.assertFalse(self.opened[0].is_open)
        self.assertEqual((pool.count, pool.idle), (0, []))

    def test_a_session_that_failed_is_not_kept(self):
        pool = self.pool()
        with contextlib.suppress(mp.ProtocolError), pool.session(token()) as session:
            session.link.shutdown(socket.SHUT_RDWR)
            list(session.generate(chat("hi"), vocabulary()))
        self.assertEqual((pool.count, pool.idle), (0, []))


class VirtualClock:
    """Time that passes when somebody sleeps."""

    def __init__(self):
        self.now = 10**15

    def monotonic_ns(self):
        return self.now

    def sleep(self, seconds):
        self.now += -int(-seconds * mp.NANOSECOND // 1)


class OuterMeter(Case):
    """In any time T, no more than rate * T + burst; measured from outside too."""

    def test_windows_on_a_virtual_clock(self):
        for seed in range(20):
            rng = random.Random(seed)
            rate, burst = rng.choice([64, 5120, 10**6]), rng.choice([1024, 32768])
            clock = VirtualClock()
            inlet = muproxy.Inlet(rate, burst, clock)
            source, sink = socket.socketpair()
            takes = []
            with source, sink:
                for _ in range(60):
                    if rng.random() < 0.3:
                        clock.sleep(rng.expovariate(rate / burst))
                    source.sendall(bytes(rng.randrange(1, 3000)))
                    for _ in range(rng.randrange(1, 8)):
                        if mp.is_readable(sink, 0):
                            with mock.patch.object(time, "monotonic", lambda: 0):
                                got = inlet.receive(sink, rng.randrange(1, 5000), SECONDS)
                            takes.append((clock.now, len(got)))
            self.assertEqual(inlet.received, sum(size for _, size in takes))
            for first, (start, _) in enumerate(takes):
                total = 0
                for now, size in takes[first:]:
                    total += size
                    allowed = rate * (now - start) / mp.NANOSECOND + burst
                    self.assertLessEqual(total, allowed)

    def test_sessions_share_it(self):
        """Bytes that the proxy must have taken, against the time that it took, by real sockets."""
        rate, count = 6000, 4
        with Middle() as middle:
            start = time.monotonic()
            inlet = muproxy.Inlet(rate, 1024)

            def use(_):
                with ready_session(address=middle.address, inlet=inlet) as session:
                    list(session.generate(chat(), vocabulary()))

            with concurrent.futures.ThreadPoolExecutor(count) as pool:
                list(pool.map(use, range(count)))
            seconds = time.monotonic() - start
        self.assertGreater(middle.passed, count * 2000)
        self.assertEqual(inlet.received, middle.passed)
        self.assertGreaterEqual(seconds, middle.passed / rate)

    def test_flood(self):
        """A sender without a meter is held back by the receive buffer, not only by our pace."""
        rate, size = 20_000, 0
        with socket.create_server(("127.0.0.1", 0)) as listener:
            inlet = muproxy.Inlet(rate, 4096)
            start = time.monotonic()
            with contextlib.closing(muproxy.Link(listener.getsockname(), inlet)) as link:
                peer = listener.accept()[0]
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                peer.setblocking(False)
                buffers = peer.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
                buffers += link.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
                link.settimeout(SECONDS)
                while inlet.received < rate:
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            size += peer.send(bytes(1000))
                    link.recv(1 << 20)
                    seconds = time.monotonic() - start
                    self.assertLessEqual(inlet.received, rate * seconds)
                    self.assertLessEqual(size, rate * seconds + 2 * buffers)
                peer.close()

    def test_too_slow_a_meter_is_a_timeout(self):
        source, sink = socket.socketpair()
        with source, sink:
            source.sendall(bytes(512))
            with self.assertRaises(TimeoutError):
                muproxy.Inlet(64, 4096).receive(sink, 512, 0.05)
            with self.assertRaises(TimeoutError):
                muproxy.Inlet(64, 4096).receive(source, 512, 0.05)


class Terminal(Case):
    """What others send can't command the reader's terminal."""

    SENT = "a\tb\nc\x1b[2J\r\x9b2J\x7f\0d"
    TAME = "a\tb\nc\ufffd[2J\ufffd\ufffd2J\ufffd\ufffdd"

    def shown(self, is_terminal):
        with mock.patch.object(sys, "stdout", io.StringIO()) as out:
            out.isatty = lambda: is_terminal
            muproxy.show_piece(self.SENT)
            return out.getvalue()

    def test_answer(self):
        self.assertEqual(self.shown(True), self.TAME)
        self.assertEqual(self.shown(False), self.SENT)

    def test_enclave_that_nobody_has_verified(self):
        def edit(side, number, payload):
            return [change(payload, **{self.SENT: 1}) if (side, number) == ("e", 0) else payload]

        with Middle(edit) as middle:
            done = proxy("attest", *enclave.flags(), "--port", middle.address[1])
        self.assertFails(1, "fields: a\tb c\ufffd", done)
        self.assertEqual(re.findall("[\x1b\x9b\x7f\r\0]", done.stderr), [])


class Requests(Case):
    """What OpenAI's form asks for, and what is refused by name."""

    CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}

    def parse(self, is_chat=True, **fields):
        body = self.CHAT if is_chat else {"model": "m", "prompt": "hi"}
        return muproxy.parse_request(body | fields, is_chat)

    def refused(self, param, status=400, is_chat=True, **fields):
        with self.assertRaises(muproxy.HttpError) as caught:
            self.parse(is_chat, **fields)
        self.assertEqual(caught.exception.status, status)
        error = caught.exception.body["error"]
        self.assertEqual(set(error), {"message", "type", "param", "code"})
        self.assertEqual(error["param"], param)
        return error

    def test_plain(self):
        request, stops, _ = self.parse()
        self.assertEqual(request, {"messages": [{"role": "user", "content": "hi"}]})
        self.assertEqual(stops, [])
        request, _, _ = self.parse(is_chat=False)
        self.assertEqual(request, {"prompt": "hi", "max_new_tokens": 16})

    def test_what_is_passed_on(self):
        request, stops, _ = self.parse(
            temperature=0, top_p=0, top_k=5, seed=-1, max_tokens=7, stop="x", user="me", n=1
        )
        self.assertTrue(mp.is_object(mp.GENERATE_CHAT)(request), request)
        self.assertEqual(request["seed"], (1 << 63) - 1)
        self.assertEqual(request["max_new_tokens"], 7)
        self.assertEqual(stops, ["x"])
        request, _, _ = self.parse(max_tokens=7, max_completion_tokens=8)
        self.assertEqual(request["max_new_tokens"], 8)

    def test_nothing_asked_for_is_nothing_refused(self):
        neutral = {"tools": [], "tool_choice": "none", "n": 1, "logprobs": False, "logit_bias": {}}
        neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0, "modalities": ["text"]}
        neutral |= {"response_format": {"type": "text"}, "parallel_tool_calls": True}
        self.parse(**neutral)
        self.parse(**dict.fromkeys(neutral))

    def test_unsupported_by_name(self):
        for name, value in {
            "n": 2,
            "tools": [{"type": "function"}],
            "tool_choice": "required",
            "functions": [{}],
            "logprobs": True,
            "response_format": {"type": "json_object"},
            "logit_bias": {"5": 1},
            "presence_penalty": 0.5,
            "modalities": ["text", "audio"],
            "audio": {"voice": "x"},
        }.items():
            error = self.refused(name, **{name: value})
            self.assertEqual(error["code"], "unsupported_parameter")
            self.assertIn(name, error["message"])

    def test_wrong_values(self):
        for name, value in {
            "temperature": 11,
            "top_p": "1",
            "max_tokens": 0,
            "seed": 1.5,
            "stop": ["x"] * 17,
            "stream": "yes",
            "model": 5,
        }.items():
            self.refused(name, **{name: value})
        self.refused("messages[0]", messages="hi")
        self.refused(None, temprature=1)
        self.refused("model", model=None)
        self.refused("messages", messages=None)
        self.refused("prompt", is_chat=False, prompt=[1, 2])
        self.refused("prompt", is_chat=False, prompt=["a", "b"])
        self.refused("stream_options", stream_options={"include_usage": 1})

    def test_messages(self):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        given = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
        request, _, _ = self.parse(messages=given)
        wanted = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}]
        self.assertEqual(request["messages"], wanted)
        image = {"type": "image_url", "image_url": {"url": "data:"}}
        for param, message in (
            ("messages[0].content of type image_url", {"role": "user", "content": [image]}),
            ("messages[0].content", {"role": "user"}),
            ("messages[0].content", {"role": "user", "content": [{"type": "text"}]}),
            ("messages[0].content", {"role": "user", "content": [5]}),
            ("messages[0].role", {"role": "tool", "content": "x"}),
            ("messages[0].role", {"role": ["user"], "content": "x"}),
            ("messages[0].tool_calls", {"role": "assistant", "content": "x", "tool_calls": [1]}),
            ("messages[0]", "hi"),
        ):
            self.refused(param, messages=[message])


class Api(Case):
    """The HTTP API as clients see it."""

    SESSIONS = 4

    @classmethod
    def setUpClass(cls):
        cls.sessions = []
        cls.server = cls.serve(enclave, cls.SESSIONS)
        cls.address = cls.server.server_address
        cls.client = cls.make_client(cls.address)

    @classmethod
    def serve(cls, target, limit):
        """A server in a thread of ours."""
        inlet = free_inlet()

        def connect():
            cls.sessions.append(open_session(target.address, inlet))
            return cls.sessions[-1]

        pool = muproxy.Pool(connect, limit, 0.2)
        server = muproxy.Server(("127.0.0.1", 0), pool, inlet, vocabulary())
        threading.Thread(target=server.serve_forever, daemon=True).start()
        cls.addClassCleanup(pool.close)
        cls.addClassCleanup(server.server_close)
        cls.addClassCleanup(server.shutdown)
        return server

    @classmethod
    def make_client(cls, address, key=None):
        import openai

        url = f"http://{address[0]}:{address[1]}/v1"
        client = openai.OpenAI(base_url=url, api_key=key or token(), max_retries=0, timeout=SECONDS)
        cls.addClassCleanup(client.close)
        return client

    def setUp(self):
        self.model = self.client.models.list().data[0].id

    def create(self, text="Tell me about zen.", client=None, **options):
        options = {"model": self.model, "temperature": 0, "max_tokens": 40} | options
        messages = options.pop("messages", [{"role": "user", "content": text}])
        return (client or self.client).chat.completions.create(messages=messages, **options)

    def request(self, method, path, body=None, headers=None, address=None):
        """(status, headers, object or text) of a request by hand."""
        connection = http.client.HTTPConnection(*(address or self.address), timeout=SECONDS)
        with contextlib.closing(connection):
            known = {"Authorization": f"Bearer {token()}", "Content-Type": "application/json"}
            known = {k: v for k, v in (known | (headers or {})).items() if v is not None}
            connection.request(method, path, body, known)
            reply = connection.getresponse()
            text = reply.read().decode()
            is_json = reply.headers.get_content_type() == "application/json"
            return reply.status, reply.headers, json.loads(text) if is_json and text else text

    def metrics(self):
        lines = self.request("GET", "/metrics")[2].splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name.removeprefix("muproxy_"): float(value) for name, value in pairs}

    def test_models(self):
        (model,) = self.client.models.list().data
        self.assertEqual((model.id, model.object), (self.asset(), "model"))

    def asset(self):
        return muproxy.read_container(site.model).fields["asset"]

    def head(self, length):
        """A request's head, by hand."""
        fields = (f"Authorization: Bearer {token()}", "Content-Type: application/json")
        return "\r\n".join(
            ("POST /v1/completions HTTP/1.1", *fields, f"Content-Length: {length}\r\n\r\n")
        )

    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(site.demo)

    def test_chat(self):
        answer = self.create(max_tokens=None)
        self.assertIn(ZEN, answer.choices[0].message.content)
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        self.assertEqual((answer.object, answer.model), ("chat.completion", self.model))

    def test_usage_is_the_tokenizers(self):
        tokenizer, prompt = self.tokenizer(), "Tell me about zen."
        answer = self.create(prompt, max_tokens=10)
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        self.assertEqual(answer.usage.prompt_tokens, len(ids))
        self.assertEqual(answer.usage.completion_tokens, 10)
        self.assertEqual(answer.usage.total_tokens, len(ids) + 10)
        self.assertEqual(answer.choices[0].finish_reason, "length")
        text = answer.choices[0].message.content
        self.assertEqual(len(tokenizer.encode(text, add_special_tokens=False)), 10)

    def test_stream(self):
        whole = self.create()
        for with_usage in (True, False):
            options = {"stream_options": {"include_usage": True}} if with_usage else {}
            chunks = list(self.create(stream=True, **options))
            if with_usage:
                usage = chunks.pop()
                self.assertEqual((usage.choices, usage.usage), ([], whole.usage))
            self.assertTrue(all(chunk.usage is None for chunk in chunks))
            self.assertEqual({chunk.object for chunk in chunks}, {"chat.completion.chunk"})
            self.assertEqual(len({chunk.id for chunk in chunks}), 1)
            choices = [chunk.choices[0] for chunk in chunks]
            self.assertEqual(choices[0].delta.role, "assistant")
            self.assertGreater(len(choices), 3)
            text = "".join(choice.delta.content or "" for choice in choices)
            self.assertEqual(text, whole.choices[0].message.content)
            reasons = [choice.finish_reason for choice in choices]
            self.assertEqual(reasons, [None] * (len(reasons) - 1) + ["length"])

    def test_stop(self):
        whole = self.create().choices[0].message.content
        stop = whole[30:36]
        answer = self.create(stop=[stop, "nowhere"])
        self.assertEqual(answer.choices[0].message.content, whole[: whole.index(stop)])
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        chunks = list(self.create(stop=stop, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        self.assertEqual(text, whole[: whole.index(stop)])

    def test_seed(self):
        def draw(seed):
            options = {"temperature": 1.5, "max_tokens": 40, "seed": seed}
            return self.create("Tell me", **options).choices[0].message.content

        self.assertEqual(draw(5), draw(5))
        self.assertGreater(len({draw(seed) for seed in range(5)}), 1)

    def test_completions(self):
        options = {"model": self.model, "prompt": "The", "temperature": 0}
        answer = self.client.completions.create(**options)
        self.assertEqual(answer.object, "text_completion")
        self.assertEqual(answer.usage.completion_tokens, 16)
        self.assertEqual(answer.choices[0].finish_reason, "length")
        chunks = list(self.client.completions.create(stream=True, **options))
        self.assertEqual("".join(c.choices[0].text for c in chunks), answer.choices[0].text)

    def test_unauthorized(self):
        import openai

        for key in ("short", "mu-" + "0" * 64):
            client = self.make_client(self.address, key)
            with self.assertRaises(openai.AuthenticationError) as caught:
                self.create(client=client)
            self.assertEqual(caught.exception.code, "invalid_api_key")
        status, _, body = self.request("GET", "/v1/models", headers={"Authorization": None})
        self.assertEqual((status, body["error"]["code"]), (401, "invalid_api_key"))

    def test_unknown_model(self):
        import openai

        with self.assertRaises(openai.NotFoundError) as caught:
            self.create(model="gpt-4")
        self.assertEqual(caught.exception.code, "model_not_found")

    def test_bad_requests(self):
        import openai

        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
        tool = {"type": "function", "function": {"name": "f"}}
        for name, options in (
            ("n", {"n": 2}),
            ("tools", {"tools": [tool]}),
            ("image_url", {"messages": [{"role": "user", "content": [image]}]}),
        ):
            with self.assertRaises(openai.BadRequestError) as caught:
                self.create(**options)
            self.assertEqual(caught.exception.code, "unsupported_parameter")
            self.assertIn(name, str(caught.exception))

    def test_context(self):
        import openai

        for options in ({"text": "word " * 5000}, {"max_tokens": 100_000}):
            with self.assertRaises(openai.BadRequestError) as caught:
                self.create(**options)
            self.assertEqual(caught.exception.code, "context_length_exceeded")

    def test_http_errors(self):
        chat_path = "/v1/chat/completions"
        big = {"Content-Length": str(mp.REQUEST_FRAME + 1)}
        for wanted, method, path, body, headers in (
            (404, "GET", "/v1/nothing", None, {}),
            (405, "GET", chat_path, None, {}),
            (405, "DELETE", "/v1/models", None, {}),
            (405, "POST", "/health", "{}", {}),
            (405, "BREW", "/health", None, {}),
            (411, "POST", chat_path, None, {"Transfer-Encoding": "chunked"}),
            (413, "POST", chat_path, "{}", big),
            (415, "POST", chat_path, "{}", {"Content-Type": "text/plain"}),
            (400, "POST", chat_path, "{", {}),
            (400, "POST", chat_path, "[]", {}),
            (400, "POST", chat_path, '{"model": "a", "model": "b"}', {}),
            (400, "POST", chat_path, '{"model": NaN}', {}),
            (431, "GET", "/health", None, {"X-Long": "x" * 70_000}),
        ):
            with self.subTest(wanted=wanted, path=path, body=body):
                status, found, answer = self.request(method, path, body, headers)
                self.assertEqual(status, wanted)
                self.assertEqual(set(answer["error"]), {"message", "type", "param", "code"})
                self.assertEqual(found["Content-Type"], "application/json")
                self.assertEqual("Allow" in found, wanted == 405)
                self.assertNotIn("Traceback", json.dumps(answer))

    def test_nothing_inside_is_shown(self):
        _, headers, _ = self.request("GET", "/health")
        self.assertEqual(headers["Server"], "muproxy")
        for line in (b"GET / HTTP/9.9\r\n\r\n", b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\r\n\r\n"):
            with socket.create_connection(self.address, SECONDS) as connection:
                connection.sendall(line)
                said = b"".join(iter(lambda: connection.recv(4096), b""))  # noqa: B023
                self.assertNotIn(b"Python", said)
                self.assertNotIn(b"Error", said)

    def test_a_body_that_nobody_reads_is_no_request(self):
        """Behind a server that shares a connection, the next user would get its answer."""
        for method in (b"GET", b"POST", b"BREW"):
            inner = b"GET /metrics HTTP/1.1\r\n\r\n"
            head = b"%b /health HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (method, len(inner))
            with socket.create_connection(self.address, SECONDS) as connection:
                connection.sendall(head + inner)
                said = b"".join(iter(lambda: connection.recv(4096), b""))  # noqa: B023
            self.assertEqual(said.count(b"HTTP/1.1 "), 1, said)
            self.assertIn(b"Connection: close\r\n", said)

    def test_a_connection_is_used_again(self):
        connection = http.client.HTTPConnection(*self.address, timeout=SECONDS)
        with contextlib.closing(connection):
            for path, status in (("/health", 200), ("/nothing", 404), ("/v1/models", 401)):
                connection.request("GET", path)
                reply = connection.getresponse()
                reply.read()
                self.assertEqual((reply.status, reply.will_close), (status, False))

    def test_an_enclave_that_does_not_answer_holds_up_nothing_else(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            place = types.SimpleNamespace(address=silent.getsockname())
            server = self.serve(place, 1)
            with concurrent.futures.ThreadPoolExecutor() as pool:
                address = server.server_address
                health = pool.submit(self.request, "GET", "/health", address=address)
                with silent.accept()[0]:  # the health is being asked for
                    status = self.request("GET", "/nothing", address=address)[0]
                    self.assertEqual((status, server.health[1]), (404, ""))
                status, _, body = health.result(SECONDS)
                self.assertEqual((status, body), (503, {"status": "unreachable"}))

    def test_a_big_body_does_not_lose_its_answer(self):
        status, _, body = self.request("POST", "/v1/completions", "x" * (3 * mp.REQUEST_FRAME))
        self.assertEqual((status, body["error"]["type"]), (413, "invalid_request_error"))

    def test_too_many_requests(self):
        import openai

        server = self.serve(enclave, 1)
        client = self.make_client(server.server_address)
        with engine_held() as go_on, concurrent.futures.ThreadPoolExecutor() as pool:
            first = pool.submit(self.create, client=client)
            wait_until(lambda: server.pool.count)
            self.assertIn("muproxy_requests_waiting 1\n", server.metrics())
            with self.assertRaises(openai.RateLimitError) as caught:
                self.create(client=client)
            self.assertEqual(caught.exception.code, "rate_limit_exceeded")
            self.assertEqual(caught.exception.response.headers["Retry-After"], "5")
            go_on()
            self.assertIn(ZEN, first.result(SECONDS).choices[0].message.content)

    def test_too_many_connections(self):
        server = self.serve(enclave, 1)
        server.places = threading.BoundedSemaphore(1)
        with socket.create_connection(server.server_address, SECONDS):
            wait_until(lambda: server.places._value == 0)
            with socket.create_connection(server.server_address, SECONDS) as second:
                self.assertEqual(second.recv(100), b"")
        wait_until(lambda: server.places._value == 1)
        status, _, _ = self.request("GET", "/health", address=server.server_address)
        self.assertEqual(status, 200)

    def test_slow_clients(self):
        with (
            mock.patch.object(muproxy, "HEAD_SECONDS", 0.2),
            socket.create_connection(self.address, SECONDS) as connection,
        ):
            connection.sendall(b"GET /health HTTP/1.1\r\nX-Slow:")
            self.assertEqual(connection.recv(100), b"")
        with (
            mock.patch.object(muproxy, "BODY_SECONDS", 0.2),
            socket.create_connection(self.address, SECONDS) as connection,
        ):
            connection.sendall((self.head(10) + "{").encode())
            self.assertEqual(connection.recv(100), b"")

    def test_locked(self):
        import openai

        locked = self.enclave()
        server = self.serve(locked, 2)
        client = self.make_client(server.server_address)
        with self.assertRaises(openai.InternalServerError) as caught:
            client.models.list()
        self.assertEqual(caught.exception.status_code, 503)
        self.assertEqual(caught.exception.code, "locked")
        self.assertIn("Retry-After", caught.exception.response.headers)
        status, _, body = self.request("GET", "/health", address=server.server_address)
        self.assertEqual((status, body), (503, {"status": "locked"}))

    def test_cancel_mid_stream_frees_the_enclave(self):
        before = self.metrics()
        stream = self.create("Tell me about zen.", stream=True, max_tokens=None, **LONG)
        next(stream)
        stream.close()
        wait_until(lambda: not self.metrics()["requests_running"])
        tokens = 'tokens_total{kind="completion"}'
        sent = self.metrics()[tokens] - before.get(tokens, 0)
        context = self.sessions[-1].ready["context"]
        self.assertLess(sent, context - 100)
        self.assertIn(ZEN, self.create().choices[0].message.content)

    def test_hang_up_before_the_first_token(self):
        """The client goes while the engine stands still: nothing is generated for it."""
        known = len(self.sessions)
        body = json.dumps({"model": self.model, "prompt": "The", "max_tokens": 50})

        def cancelled():
            return [s for s in self.sessions if s.is_open and getattr(s, "_is_cancelled", False)]

        with engine_held() as go_on:
            with socket.create_connection(self.address, SECONDS) as connection:
                connection.sendall((self.head(len(body)) + body).encode())
                wait_until(lambda: self.metrics()["requests_running"])
            wait_until(cancelled)
            go_on()
            wait_until(lambda: not self.metrics()["requests_running"])
        cancelled = cancelled()
        self.assertEqual([s.final["finish_reason"] for s in cancelled], ["cancelled"])
        self.assertEqual(cancelled[0].final["usage"]["completion_tokens"], 0)
        self.assertLessEqual(len(self.sessions), known + 1)

    def test_metrics(self):
        before = self.metrics()
        usage = self.create(max_tokens=10).usage
        after = self.metrics()
        self.assertEqual(after["requests_running"], 0)
        self.assertEqual(after["requests_waiting"], 0)
        name = 'requests_total{path="/v1/chat/completions",code="200"}'
        self.assertEqual(after[name] - before.get(name, 0), 1)
        for kind, count in (("prompt", usage.prompt_tokens), ("completion", 10)):
            name = f'tokens_total{{kind="{kind}"}}'
            self.assertEqual(after[name] - before.get(name, 0), count)
        self.assertGreater(after["egress_bytes_total"], before["egress_bytes_total"])
        self.assertLess(after["budget_left_bytes"], before.get("budget_left_bytes", 10**9))
        self.assertEqual(after["engine_restarts"], 0)

    def test_streams_at_once(self):
        with concurrent.futures.ThreadPoolExecutor(self.SESSIONS) as pool:
            answers = pool.map(lambda _: self.create().choices[0].message.content, range(4))
            self.assertEqual(len(set(answers)), 1)

    @unittest.skipUnless(shutil.which("curl"), "curl is not installed")
    def test_curl(self):
        url = f"http://{self.address[0]}:{self.address[1]}"
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": "Tell me about zen."}],
        }
        command = ["curl", "-sS", "-N", f"{url}/v1/chat/completions", "-d", "@-"]
        for field in (f"Authorization: Bearer {token()}", "Content-Type: application/json"):
            command += ["-H", field]
        for stream in (False, True):
            text = json.dumps(body | {"stream": stream, "temperature": 0})
            done = subprocess.run(
                command, input=text, capture_output=True, text=True, timeout=SECONDS
            )
            self.assertEqual(done.returncode, 0, done.stderr)
            if not stream:
                content = json.loads(done.stdout)["choices"][0]["message"]["content"]
                continue
            events = [line.removeprefix("data: ") for line in done.stdout.split("\n\n") if line]
            self.assertEqual(events.pop(), "[DONE]")
            deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
            self.assertEqual("".join(delta.get("content", "") for delta in deltas), content)
        done = subprocess.run(["curl", "-sS", f"{url}/health"], capture_output=True, text=True)
        self.assertEqual(json.loads(done.stdout), {"status": "ready"})


class Warnings(Case):
    """What is told before a budget is spent."""

    LESS = (
        r"(?m)^muproxy: warning: lease [0-9a-f]{32}: [0-9,]+ of [0-9,]+ bytes of egress are left$"
    )

    def test_nine_tenths(self):
        """Once for a budget, by every program; and again once more was granted and spent."""
        extra, said = self.enclave(), io.StringIO()
        extra.unlock(budget=1000)
        pool = muproxy.Pool(lambda: open_session(extra.address))
        self.addCleanup(pool.close)
        server = muproxy.Server(("127.0.0.1", 0), pool, free_inlet(), vocabulary())
        self.addCleanup(server.server_close)
        request = {"prompt": "The", "temperature": 2, "seed": 1, "max_new_tokens": 40}

        def spend():
            while 10 * pool.facts.get("budget_left", 1000) >= pool.facts.get("budget", 1000):
                self.assertEqual(re.findall(self.LESS, said.getvalue()), [])
                with pool.session(token()) as session:
                    list(session.generate(request, vocabulary()))

        with contextlib.redirect_stderr(said):
            spend()
            for _ in range(2):
                with pool.session(token()):
                    pass
        self.assertEqual(len(re.findall(self.LESS, said.getvalue())), 1, said.getvalue())
        self.assertIn("muproxy_budget_bytes 1000\n", server.metrics())
        done = own("status", *extra.flags("owner"))
        self.assertIn("warning: less than a tenth of the budget is left", done.stdout)
        flags = [*extra.flags(), "--token-file", site.token, "--vocabulary", site.vocabulary]
        done = proxy(*flags, input="quit\n")
        self.assertEqual((done.returncode, len(re.findall(self.LESS, done.stderr))), (0, 1))
        extra.unlock(budget=1000)
        pool.close()
        with contextlib.redirect_stderr(said := io.StringIO()):
            with pool.session(token()):
                pass
            self.assertIn("muproxy_budget_bytes 2000\n", server.metrics())
            spend()
        self.assertEqual(len(re.findall(self.LESS, said.getvalue())), 1, said.getvalue())


class Losses(Case):
    """An enclave that is locked, killed and started again."""

    def test_lost_enclave_is_found_again(self):
        first = self.enclave()
        first.unlock()
        addresses = [first.address]
        pool = muproxy.Pool(lambda: open_session(addresses[-1]))
        self.addCleanup(pool.close)
        with pool.session(token()) as session:
            known = session
        first.process.kill()  # its children go with it
        first.process.wait()
        wait_until(lambda: not known.is_usable())
        self.assertRefused("connection_lost", pool, token())
        second = self.enclave()
        addresses.append(second.address)
        self.assertRefused("locked", pool, token())
        second.unlock()
        with pool.session(token()) as session:
            self.assertIsNot(session, known)
            self.assertTrue(all(check.ok for check in session.checks))
            self.assertIn(ZEN, "".join(session.generate(chat(), vocabulary())))
            said = len(second.lines)
            pieces = session.generate({"prompt": "The", "max_new_tokens": 900} | LONG, vocabulary())
            next(pieces)
            os.kill(second.pids()["engine"], signal.SIGKILL)
            self.assertCode("engine_lost", lambda: pieces)
            self.assertTrue(session.is_usable())
        second.wait_for("ready", said)
        with pool.session(token()) as again:
            self.assertIs(again, session)
            self.assertIn(ZEN, "".join(again.generate(chat(), vocabulary())))
        server = muproxy.Server(("127.0.0.1", 0), pool, free_inlet(), vocabulary())
        self.addCleanup(server.server_close)
        self.assertIn("muproxy_engine_restarts 1\n", server.metrics())

    def test_stream_that_has_begun_ends_with_the_error(self):
        extra = self.enclave()
        extra.unlock()
        pool = muproxy.Pool(lambda: open_session(extra.address))
        server = muproxy.Server(("127.0.0.1", 0), pool, free_inlet(), vocabulary())
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for end in (pool.close, server.server_close, server.shutdown):
            self.addCleanup(end)
        body = {"model": "demo", "prompt": "The", "max_tokens": 900, "stream": True} | LONG
        head = {"Authorization": f"Bearer {token()}", "Content-Type": "application/json"}
        connection = http.client.HTTPConnection(*server.server_address, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(body), head)
            reply = connection.getresponse()
            events = [reply.readline().decode()]
            os.kill(extra.pids()["engine"], signal.SIGKILL)
            events += filter(str.strip, reply.read().decode().splitlines())
        last = json.loads(events[-1].removeprefix("data: "))
        self.assertEqual(last["error"]["code"], "engine_lost")
        self.assertTrue(all(json.loads(event[6:])["choices"] for event in events[:-1]))


class CommandLine(Case):
    """The verbs, their exit statuses, and one line for every mistake."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.ledger = self.folder / "ledger"
        self.user, self.owner = enclave.flags(), self.owned(enclave)
        self.table = ["--vocabulary", site.vocabulary]
        self.talk = [*self.user, *self.table, "--token-file", site.token, "--rate-kb", 10**6]

    def owned(self, enclave):
        """An owner's flags, with a ledger of this test's own."""
        return [*enclave.flags("owner"), "--ledger", self.ledger]

    def test_attest(self):
        done = proxy("attest", *self.user)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        lines = done.stdout.splitlines()
        self.assertTrue(lines[0].startswith("root: psk"))
        self.assertEqual(lines[-1], "verified")
        self.assertIn(f"got {reference()['measurement']}", done.stdout)
        done = proxy("attest", *self.user, "--json")
        facts = json.loads(done.stdout)
        self.assertEqual((facts["verified"], facts["root"], facts["kind"]), (True, "psk", "psk"))
        self.assertTrue(all(check["ok"] for check in facts["checks"]))

    def test_attest_refuses(self):
        path = self.folder / "reference"
        path.write_text(json.dumps(reference() | {"measurement": "00" * 32}))
        flags = ["--port", enclave.port, "--reference", path, "--psk", site.owner_psk]
        done = proxy("attest", *flags)
        self.assertEqual((done.returncode, done.stderr), (1, ""))
        self.assertEqual(done.stdout.count("FAILED"), 2)
        self.assertEqual(done.stdout.splitlines()[-1], "refused")
        facts = json.loads(proxy("attest", *flags, "--json").stdout)
        wrong = {check["name"] for check in facts["checks"] if not check["ok"]}
        self.assertEqual((facts["verified"], wrong), (False, {"proof", "measurement"}))

    def test_expected_measurement(self):
        known, other = reference()["measurement"], "00" * 32
        flags = ["--port", enclave.port, "--psk", site.user_psk]
        self.assertEqual(proxy("attest", *flags, "--expected-measurement", known).returncode, 0)
        self.assertEqual(proxy("attest", *flags, "--expected-measurement", other).returncode, 1)
        self.assertFails(2, "nothing to verify against", proxy("attest", *flags))
        flags += ["--reference", site.reference, "--expected-measurement", other]
        self.assertFails(2, "is not that of", proxy("attest", *flags))

    def test_unreachable(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        flags = ["--port", port, *self.user[2:]]
        for verb in (["attest"], ["chat", *self.table, "--token-file", site.token]):
            self.assertFails(3, "Connection refused", proxy(*verb, *flags))

    def test_usage(self):
        for pattern, arguments in (
            ("chmod 600", ["--psk", self.open_file("00" * 32), "--token-file", site.token]),
            ("no-such", ["--psk", site.user_psk, "--token-file", "/no-such"]),
            ("access token is needed", ["--psk", site.user_psk, *self.table]),
            ("--psk", ["--token-file", site.token, *self.table]),
            ("--rate-kb", ["--rate-kb", "0"]),
            ("--rate-kb", ["--rate-kb", "nan"]),
            ("temperature", [*self.talk[4:], "--temperature", "nan"]),
            ("max_tokens", [*self.talk[4:], "--max-tokens", "0"]),
            ("vocabulary", ["--psk", site.user_psk, "--vocabulary", site.key]),
            ("--vocabulary FILE: ", ["--psk", site.user_psk, "--token-file", site.token]),
            ("stop", [*self.talk[4:], "--stop", ""]),
            ("stop", [*self.talk[4:], "--stop", "a" * 257]),
            ("stop", [*self.talk[4:], *["--stop", "a"] * 17]),
        ):
            with self.subTest(pattern=pattern):
                flags = [*self.user[:4], *arguments]
                done = proxy(*flags, input="hello\n", env=self.without_token())
                done.stderr = re.sub("^verified; .*\n", "", done.stderr)
                self.assertFails(2, pattern, done)
        for arguments in (["fly"], ["attest", "--role", "x"], ["--token", site.token]):
            done = proxy(*arguments)
            self.assertEqual((done.returncode, done.stdout), (2, ""))
            self.assertRegex(done.stderr, "muproxy( [a-z]+)?: error: ")
        self.assertFails(2, "label", proxy("attest", *self.user, "--host", "a..b"))
        for arguments in (["--help"], ["chat", "--help"]):
            self.assertEqual(proxy(*arguments).returncode, 0)
        for arguments in (["--help"], ["unlock", "--help"], ["keygen", "--help"]):
            self.assertEqual(own(*arguments).returncode, 0)
        for arguments in (["fly"], ["keygen", "key", "x"], ["unlock", "--token", site.token]):
            done = own(*arguments)
            self.assertEqual((done.returncode, done.stdout), (2, ""))
            self.assertRegex(done.stderr, "owner( [a-z]+)?: error: ")
        self.assertIn("3 unreachable", proxy("attest", "--help").stdout)

    def without_token(self):
        return {k: v for k, v in os.environ.items() if k != "MUENCLAVE_TOKEN"}

    def open_file(self, text):
        path = self.folder / "open"
        path.write_text(text)
        path.chmod(0o644)
        return path

    def test_chat(self):
        done = proxy(*self.talk, input="Tell me about zen.\nquit\nno\n")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(ZEN, done.stdout)
        self.assertRegex(
            done.stderr, r"\[stop: \d+ tokens, [\d.]+ tok/s; egress [\d,]+ bytes, [\d,]+ left\]"
        )
        self.assertNotIn("Traceback", done.stderr)
        environment = self.without_token() | {"MUENCLAVE_TOKEN": token()}
        flags = [*self.user, *self.table, "--rate-kb", 10**6]
        again = proxy("chat", *flags, input="Tell me about zen.\n", env=environment)
        self.assertEqual((again.returncode, again.stdout), (0, done.stdout))

    def test_chat_commands(self):
        done = proxy(
            *self.talk, input="/tokens 3 Tell me about zen.\n/what\n\nTell me about zen.\n"
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("[length: 3 tokens", done.stderr)
        self.assertIn("/tokens N prompt", done.stderr)

    def test_interrupt_cancels_the_answer_and_then_ends(self):
        steps = set()  # of the host's frames: 0 challenge, 1 token, 2 request, 3 cancel

        def edit(side, number, payload):
            steps.add((side, number))
            return [payload]

        with Middle(edit) as middle, engine_held() as go_on:
            flags = [*self.talk, "--raw"]
            process = self.start("chat", *flags, "--port", middle.address[1])
            self.assertIn("verified", process.stderr.readline())
            process.stdin.write("The\n")
            process.stdin.flush()
            wait_until(lambda: ("h", 2) in steps)
            process.send_signal(signal.SIGINT)
            wait_until(lambda: ("h", 3) in steps)
            go_on()
            self.assertIn("[cancelled: 0 tokens", process.stderr.readline())
            process.stdin.write("/tokens 5 The\n")
            process.stdin.flush()
            self.assertIn("[length: 5 tokens", process.stderr.readline())
            self.assertEqual(len(middle.threads), 2)  # of the one connection, used again
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.wait(SECONDS), 130)
            self.assertEqual(process.stderr.read(), "muproxy: interrupted\n")

    def start(self, *arguments):
        """A process of the command line, with pipes; killed if it does not end by itself."""
        command = [sys.executable, "-B", "-m", "muproxy", *map(str, arguments)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        self.addCleanup(process.__exit__, None, None, None)
        self.addCleanup(process.kill)
        return process

    def test_batch(self):
        prompts, output = self.folder / "prompts", self.folder / "results.json"
        prompts.write_text(json.dumps(["Tell me about zen.", "word " * 5000, "Tell me"]))
        flags = ["--prompts-file", prompts, "--output-file", output, "--max-tokens", 12]
        done = proxy(*self.talk, *flags)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("error: prompt 2: the prompt does not fit", done.stderr)
        first, second, third = json.loads(output.read_text())
        self.assertTrue(first["completion"].startswith("The Zen of Python"), first)
        self.assertEqual(first["usage"]["completion_tokens"], 12)
        self.assertEqual(second, {"prompt": "word " * 5000, "error": "prompt_too_long"})
        self.assertEqual(third["prompt"], "Tell me")
        prompts.write_text("Tell me about zen.\n")
        done = proxy(*self.talk, "--prompts-file", prompts, "--max-tokens", 12)
        self.assertEqual(json.loads(done.stdout)[0]["completion"], first["completion"])
        with Middle() as middle:
            flags = ["--prompts-file", prompts, "--port", middle.address[1], "--rate-kb", 1]
            start = time.monotonic()
            done = proxy(*self.talk, *flags, "--max-tokens", 12)
            self.assertGreaterEqual(time.monotonic() - start, middle.passed / 1024)
        self.assertEqual(json.loads(done.stdout)[0]["completion"], first["completion"])
        self.assertGreater(middle.passed, 4 * mp.CELL)
        bad = self.folder / "no" / "such"
        done = proxy(*self.talk, "--prompts-file", prompts, "--output-file", bad)
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertIn(f"muproxy: error: {bad}: No such file or directory\n", done.stderr)

    def test_full_disk_loses_no_answer(self):
        prompts = self.folder / "prompts"
        prompts.write_text("Tell me about zen.\n")
        flags = ["--prompts-file", prompts, "--output-file", "/dev/full", "--max-tokens", 4]
        done = proxy(*self.talk, *flags)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertTrue(json.loads(done.stdout)[0]["completion"].startswith("The Zen"))
        self.assertTrue(done.stderr.endswith("muproxy: error: No space left on device\n"))
        self.assertNotIn("Traceback", done.stderr)

    def test_interrupted_batch_keeps_what_it_has(self):
        prompts, output = self.folder / "prompts", self.folder / "results.json"
        prompts.write_text("The\nTell me\n")
        steps = set()

        def edit(side, number, payload):
            steps.add((side, number))
            return [payload]

        with Middle(edit) as middle, engine_held() as go_on:
            flags = ["--prompts-file", prompts, "--output-file", output]
            process = self.start("chat", *self.talk, *flags, "--port", middle.address[1])
            wait_until(lambda: ("h", 2) in steps)
            process.send_signal(signal.SIGINT)
            wait_until(lambda: ("h", 3) in steps)
            go_on()
            self.assertEqual(process.wait(SECONDS), 130)
        (result,) = json.loads(output.read_text())
        self.assertEqual((result["prompt"], result["finish_reason"]), ("The", "cancelled"))

    def test_owner(self):
        done = own("status", *self.owner)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("status: ready", done.stdout)
        told = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
        budget, left = int(told["budget"]), int(told["budget left"])
        self.assertEqual((budget, told["spent"]), (10**7, f"{1 - left / budget:.1%} of the budget"))
        self.assertRegex(told["head"], "^[0-9a-f]{64}$")
        self.assertNotIn("warning", told)
        self.assertFails(2, "whose token", own("revoke", *self.owner))
        for given in (["--token-file", site.other] * 2, ["--token-hash", "0" * 64]):
            done = own("revoke", *self.owner, *given)
            self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_wrapped_key(self):
        path, phrase = self.folder / "key", self.folder / "phrase"
        asset, key = owner.read_key_file(site.key, self.fail)
        path.write_text(json.dumps(wrapped("correct horse", key, asset)))
        phrase.write_text("correct horse\n")
        for private in (path, phrase):
            private.chmod(0o600)
        flags = [path if flag == site.key else flag for flag in self.owner]
        done = own("status", *flags, "--passphrase-file", phrase)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        phrase.write_text("wrong horse")
        done = own("status", *flags, "--passphrase-file", phrase)
        self.assertFails(2, "wrong passphrase", done)
        done = own("status", *flags, stdin=subprocess.DEVNULL)
        self.assertFails(2, "--passphrase-file", done)

    def test_weak_evidence_needs_a_word(self):
        flags = [flag for flag in self.owner if flag != "--development"]
        lease = ["--token-file", site.token, "--budget", 10**6, "--new-ledger"]
        for verb in (["unlock", *lease], ["status"], ["lock"]):
            done = own(*verb, *flags)
            self.assertFails(1, "--development", done)
            self.assertEqual(done.stdout, "")
        self.assertFalse(self.ledger.exists())

    def test_lease_as_the_flags_say(self):
        parser = muproxy.make_parser("owner", "", owner.VERBS, owner.FLAGS, owner.CHOICES)
        plain = {"verified": False, "latency_ms": 0, "shape": "plain"}
        other = ["--verified", "--latency-ms", "250", "--shape", "constant"]
        for flags, policy in (
            ([], plain),
            (other, {"verified": True, "latency_ms": 250, "shape": "constant"}),
        ):
            options = parser.parse_args(["unlock", "--token-file", str(site.token), *flags])
            lease = owner.make_lease(options)
            self.assertEqual(lease["policy"], policy)
            more = {"id": "00" * 16, "sequence": 1, "budget": 1}
            self.assertTrue(mp.is_object(mp.LEASE)(lease | more))

    def test_verified_lease(self):
        """The policy reaches the enclave: it refuses what a replay could not follow."""
        extra = self.enclave()
        flags = ["--token-file", site.token, "--rate", FREE_RATE, "--budget", 10**5, "--verified"]
        new = ["--new-ledger", "--lifetime-budget", 10**6]
        done = own("unlock", *self.owned(extra), *flags, *new)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        with contextlib.closing(open_session(extra.address)) as session:
            session.prove({"token": token()})
            self.assertCode("policy_refused", session.generate, chat(top_k=5), vocabulary())
            self.assertIn(ZEN, "".join(session.generate(chat(), vocabulary())))

    def test_unlock_refusals(self):
        lease = ["--token-file", site.token]
        for flag in ("--burst", "--rate", "--budget", "--lifetime-budget", "--latency-ms"):
            self.assertFails(2, flag, own("unlock", *self.owner, *lease, flag, -5))
        self.assertFails(2, "--token-file", own("unlock", *self.owner, "--budget", 10**6))
        self.assertFails(2, "--new-ledger", own("unlock", *self.owner, *lease))
        other = self.folder / "other.key"
        fields = json.loads(site.key.read_text())
        other.write_text(json.dumps(fields | {"key": "00" * 32}))
        other.chmod(0o600)
        flags = [other if flag == site.key else flag for flag in self.owner]
        done = own("unlock", *flags, *lease, "--budget", 10**6)
        self.assertFails(2, "is not the key of", done)
        wrong = [site.user_psk if flag == site.owner_psk else flag for flag in self.owner]
        done = own("unlock", *wrong, *lease, "--new-ledger")
        self.assertFails(1, "proof: expected", done)
        for word in (fields["key"], token(), site.owner_psk.read_text().strip()):
            self.assertNotIn(word, done.stdout + done.stderr)

    def test_owner_through_a_relay(self):
        """Unlock, again, revoke, lock; who taps the relay's far side sees ciphertext only."""
        extra, seen = self.enclave(), []

        def record(side, number, payload):
            seen.append(payload)
            return [payload]

        middle = Middle(record, extra.address)
        self.addCleanup(middle.__exit__)
        relay, address, _ = self.background("relay", *self.relayed(middle, 10**6))
        flags = [*self.owned(extra), "--port", address[1]]
        lease = ["--token-file", site.token, "--token-file", site.other, "--rate", FREE_RATE]
        for number in (1, 2):
            new = ["--new-ledger", "--lifetime-budget", 2 * 10**7] if number == 1 else []
            done = own("unlock", *flags, *lease, "--budget", 10**7, *new)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertTrue(done.stdout.startswith("root: psk (a shared secret: "))
            self.assertIn("budget 10,000,000 bytes", done.stdout)
            left = int(re.search("^budget left: ([0-9]+)$", done.stdout, re.MULTILINE)[1])
            self.assertTrue(0 <= number * 10**7 - left < 100, left)  # loading costs a little
        addresses = [extra.address]
        pool = muproxy.Pool(lambda: open_session(addresses[-1]))
        self.addCleanup(pool.close)
        other = muproxy.read_token(site.other)
        with pool.session(other) as revoked, pool.session(token()):
            pass
        done = own("revoke", *flags, "--token-file", site.other)
        self.assertEqual(done.returncode, 0, done.stderr)
        wait_until(lambda: not revoked.is_usable())
        self.assertRefused("token_refused", pool, other)
        with pool.session(token()):
            pass
        done = own("lock", *flags)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("status: locked", done.stdout)
        line = extra.wait_for("listening", 3)  # afresh
        addresses.append(("127.0.0.1", int(line.split()[-1])))
        self.assertRefused("locked", pool, token())
        relay.send_signal(signal.SIGTERM)
        self.assertEqual(relay.wait(SECONDS), 0)
        key = owner.read_key_file(site.key, self.fail)[1]
        for secret in (key, key.hex().encode(), token().encode()):
            self.assertNotIn(secret, b"".join(seen))
        self.assertGreater(len(seen), 20)

    def relayed(self, middle, rate):
        """The flags of a relay to a man in the middle."""
        return "--port", middle.address[1], "--listen", "127.0.0.1:0", "--rate-kb", rate

    def test_relay_is_metered(self):
        with Middle() as middle:
            start = time.monotonic()
            _, address, _ = self.background("relay", *self.relayed(middle, 1))
            for _ in range(3):
                open_session(address).close()
            self.assertGreater(middle.passed, 3000)
            self.assertGreaterEqual(time.monotonic() - start, middle.passed / 1024)

    def background(self, *arguments):
        """A server process of the command line, its address, and what it said until then."""
        process, lines = self.start(*arguments), []
        while not re.search(r" on [\d.]+:\d+$", "".join(lines[-1:])):
            lines.append(process.stderr.readline())
            self.assertNotEqual(lines[-1], "", lines)
        host, _, port = lines[-1].split()[-1].rpartition(":")
        return process, (host, int(port)), lines

    def test_serve(self):
        flags = [*self.user, *self.table, "--listen", "127.0.0.1:0"]
        process, address, lines = self.background("serve", *flags)
        self.assertNotIn("warning", "".join(lines))
        connection = http.client.HTTPConnection(*address, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {token()}"})
            reply = connection.getresponse()
            self.assertEqual(reply.status, 200)
            self.assertEqual(json.load(reply)["object"], "list")
        command = pathlib.Path(f"/proc/{process.pid}/cmdline").read_text()
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(SECONDS), 0)
        for secret in (token(), site.user_psk.read_text().strip()):
            self.assertNotIn(secret, command + "".join(lines) + process.stderr.read())

    def test_serve_warns_beyond_loopback(self):
        flags = [*self.user, *self.table, "--listen", "0.0.0.0:0"]
        process, _, lines = self.background("serve", *flags)
        self.assertRegex("".join(lines), "warning: .*TLS")
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(SECONDS), 0)

    def test_serve_refuses_what_it_cannot_verify(self):
        path = self.folder / "reference"
        path.write_text(json.dumps(reference() | {"measurement": "00" * 32}))
        flags = ["--port", enclave.port, "--reference", path, "--psk", site.user_psk, *self.table]
        done = proxy("serve", *flags, "--listen", "127.0.0.1:0")
        self.assertFails(1, "measurement: expected 0000", done)
        flags = ["--port", enclave.port, "--reference", site.reference, *self.table]
        self.assertFails(2, "--psk", proxy("serve", *flags, "--listen", "127.0.0.1:0"))

    def test_address_in_use(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            place = f"127.0.0.1:{listener.getsockname()[1]}"
            self.assertFails(2, "in use", proxy("relay", "--listen", place))

    def test_relay_passes_all_and_is_bounded(self):
        relay = muproxy.Relay(("127.0.0.1", 0), enclave.address, free_inlet())
        relay.places = threading.BoundedSemaphore(2)
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        self.addCleanup(relay.server_close)
        self.addCleanup(relay.shutdown)
        with ready_session(address=relay.server_address) as session:
            self.assertIn(ZEN, "".join(session.generate(chat(), vocabulary())))
            with ready_session(address=relay.server_address):
                self.assertCode("connection_lost", open_session, relay.server_address)
        wait_until(lambda: relay.places._value)
        open_session(relay.server_address).close()


if __name__ == "__main__":
    unittest.main()
