"""The proxy against a real enclave with the demo model, through the real openai client and curl."""

import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import os
import pathlib
import random
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

ROOT = pathlib.Path(__file__).resolve().parent.parent
FREE_RATE = 10**9  # bytes a second: a meter that is effectively off
SECONDS = 60  # that anything here may take before it counts as stuck
LONG = {"temperature": 2.0, "seed": 1}  # no end in sight
files = enclave = None


def setUpModule():
    global files, enclave
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    files = make_files(pathlib.Path(folder.name))
    enclave = Enclave()
    unittest.addModuleCleanup(enclave.end)
    enclave.unlock()


def make_files(folder):
    """A sealed demo model, and the files of its owner and users, by the project's own tools."""
    names = "demo demo.mus demo.mus.vocab demo.key owner.psk user.psk token other reference.json"
    found = types.SimpleNamespace(**{name.replace(".", "_"): folder / name for name in names.split()})
    make_model(found)
    for kind, path in (("psk", found.owner_psk), ("psk", found.user_psk)):
        proxy("keygen", kind, path)
    for path in (found.token, found.other):
        proxy("keygen", "token", path)
    tool("measure.py", "--output", found.reference_json)
    return found


def make_model(found):
    tool("demo_model.py", found.demo)
    tool("seal.py", found.demo, found.demo_mus, "--key", found.demo_key)


def tool(name, *arguments):
    command = [sys.executable, ROOT / "tools" / name, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def proxy(*arguments, **options):
    """The proxy's command line, run to its end."""
    command = [sys.executable, "-m", "muproxy", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, **options
    )


class Enclave:
    """An enclave process; locked until `unlock`."""

    def __init__(self, *flags):
        paths = {"model": "demo_mus", "owner-psk": "owner_psk", "user-psk": "user_psk"}
        command = [sys.executable, "-m", "muenclave", "--port", "0", "--rate", str(FREE_RATE)]
        for flag, name in paths.items():
            command += [f"--{flag}", str(getattr(files, name))]
        self.process = subprocess.Popen(
            [*command, *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        self.lines = []
        self.port = int(self.wait_for("listening").split()[-1])
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()
        self.address = ("127.0.0.1", self.port)

    def wait_for(self, word):
        for line in self.process.stderr:
            self.lines.append(line)
            if word in line:
                return line
        raise AssertionError(f"the enclave said {self.lines}")

    def flags(self, role="user"):
        """How the command line reaches and verifies it."""
        psk = files.owner_psk if role == "owner" else files.user_psk
        flags = ["--port", self.port, "--reference", files.reference_json, "--psk", psk]
        own = ["--key", files.demo_key, "--model", files.demo_mus, "--development"]
        return flags + (own if role == "owner" else [])

    def unlock(self, *flags):
        """Unlock it by the command line; the finished process."""
        lease = ["--token-file", files.token, "--budget", 10**7, "--rate", FREE_RATE, *flags]
        done = proxy("unlock", *self.flags("owner"), *lease)
        assert done.returncode == 0, done.stderr
        return done

    def engine(self):
        """The process id of its engine."""
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                if b"--engine" in words and int(parent) == self.process.pid:
                    return int(process.name)
        raise AssertionError("there is no engine")

    def end(self):
        for _ in range(2):
            self.process.terminate()
        self.process.wait(SECONDS)
        self.process.stderr.close()


def reference():
    return muproxy.read_reference(files.reference_json)


def free_inlet():
    return muproxy.Inlet(FREE_RATE, 1 << 30)


def open_session(address=None, inlet=None, secret=None, role="user", **wanted):
    """A verified session with the enclave, which has not proved anything yet."""
    secret = secret or muproxy.read_secret(files.user_psk)
    address = address or enclave.address
    inlet = inlet or free_inlet()
    return muproxy.Session(address, wanted.pop("reference", reference()), secret, role, inlet, **wanted)


def token():
    return muproxy.read_token(files.token)


def vocabulary():
    return muproxy.read_vocabulary(files.demo_mus_vocab)


@contextlib.contextmanager
def ready_session(**options):
    with contextlib.closing(open_session(**options)) as session:
        session.prove({"token": token()})
        yield session


def chat(text, **options):
    return {"messages": [{"role": "user", "content": text}], "temperature": 0} | options


class Middle:
    """A man in the middle: passes frames on, each as edit(side, number, payload) says.

    side: "h" from the host, "e" from the enclave. edit returns the payloads to pass on.
    passed: bytes that the proxy's side has been sent.
    """

    def __init__(self, edit=lambda side, number, payload: [payload], target=None):
        self.edit, self.target = edit, target or enclave.address
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.passed = 0
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            try:
                host = self.listener.accept()[0]
            except OSError:
                return
            ends = (host, socket.create_connection(self.target))
            for side, pair in (("h", ends), ("e", ends[::-1])):
                threading.Thread(target=self.pump, args=(side, *pair), daemon=True).start()

    def pump(self, side, source, sink):
        number = 0
        with contextlib.suppress(OSError, EOFError):
            while True:
                for payload in self.edit(side, number, mp.read_frame(source, 1 << 21)):
                    sink.sendall(mp.frame(payload))
                    self.passed += len(mp.frame(payload)) if side == "e" else 0
                number += 1
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()


def change(payload, **fields):
    """A JSON payload with other fields; None strips one."""
    value = json.loads(payload) | fields
    return mp.encode_json({name: v for name, v in value.items() if v is not None})


class Case(unittest.TestCase):
    def assertCode(self, code, call, *arguments, **options):
        """Assert that a call raises ProtocolError with this code; the error."""
        with self.assertRaises(mp.ProtocolError) as caught:
            result = call(*arguments, **options)
            list(result if hasattr(result, "__next__") else ())
        self.assertEqual(caught.exception.code, code, str(caught.exception))
        return caught.exception

    def assertFails(self, status, pattern, done):
        """Assert an exit status and one line on stderr."""
        self.assertEqual(done.returncode, status, done.stderr)
        self.assertRegex(done.stderr, pattern)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertTrue(done.stderr.startswith("muproxy: error: "), done.stderr)


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

    def wrapped(self, passphrase, key):
        facts = {"version": 1, "asset": "m", "scrypt": {"n": 16384, "r": 8, "p": 1}}
        salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
        wrapping = hashlib.scrypt(
            passphrase.encode(), salt=salt, n=16384, r=8, p=1, dklen=32, maxmem=1 << 26
        )
        facts["scrypt"]["salt"] = salt.hex()
        sealed = mp.aead(wrapping).encrypt(nonce, key, mp.encode_json(facts))
        return facts | {"nonce": nonce.hex(), "wrapped": sealed.hex()}

    def test_key_file(self):
        key = secrets.token_bytes(32)
        path = self.write("key", json.dumps({"version": 1, "asset": "m", "key": key.hex()}))
        self.assertEqual(muproxy.read_key_file(path, self.fail), ("m", key))

    def test_wrapped_key_file(self):
        key, asked = secrets.token_bytes(32), []
        fields = self.wrapped("correct horse", key)
        path = self.write("key", json.dumps(fields))

        def ask(answer="correct horse"):
            asked.append(answer)
            return answer

        self.assertEqual(muproxy.read_key_file(path, ask), ("m", key))
        self.assertEqual(len(asked), 1)
        for wrong in (lambda: "Correct horse", lambda: ""):
            with self.assertRaisesRegex(muproxy.Failure, "wrong passphrase"):
                muproxy.read_key_file(path, wrong)
        path = self.write("key", json.dumps(fields | {"asset": "n"}))
        with self.assertRaisesRegex(muproxy.Failure, "wrong passphrase, or the file was changed"):
            muproxy.read_key_file(path, ask)

    def test_private_files_that_others_can_read_are_refused(self):
        readers = {
            "key": lambda path: muproxy.read_key_file(path, self.fail),
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
            lambda path: muproxy.read_key_file(path, self.fail),
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
            done = proxy("keygen", what, path)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            text = path.read_text()
            self.assertRegex(text, f"^{pattern}$")
            self.assertEqual(path.stat().st_mode & 0o777, 0o600)
            self.assertNotIn(text.strip(), done.stdout)
            again = proxy("keygen", what, path)
            self.assertFails(2, "File exists; nothing was overwritten", again)
            self.assertEqual(path.read_text(), text)
        hashed = mp.token_hash(muproxy.read_token(self.folder / "token"))
        self.assertIn(hashed, proxy("keygen", "token", self.folder / "other").stdout + hashed)

    def test_write_file_leaves_the_old_one_when_it_fails(self):
        path = self.write("results", "old")
        with (
            mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device")),
            self.assertRaisesRegex(muproxy.Failure, "No space left"),
        ):
            muproxy.write_file(path, b"new")
        self.assertEqual(path.read_text(), "old")
        self.assertEqual(os.listdir(self.folder), ["results"])
        muproxy.write_file(path, b"new")
        self.assertEqual(path.read_text(), "new")

    def test_prompts(self):
        path = self.write("prompts", "one\n\n two \n")
        self.assertEqual(muproxy.read_prompts(path), ["one", " two "])
        path = self.write("prompts", ' ["one\\ntwo", ""]')
        self.assertEqual(muproxy.read_prompts(path), ["one\ntwo", ""])


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
        self.assertEqual(self.failed({"posture": none}), {"confinement"})
        self.assertEqual(self.failed({"posture": none}, allow_unconfined=True), set())
        self.assertEqual(self.failed({"posture": debug}, allow_unconfined=True), {"debug"})
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
        self.assertTrue(muproxy.Psk(secret).verify(data, proof, {})[0].ok)
        for wrong in (b"", proof[:-1], proof + b"\0", bytes(32), mp.psk_proof(bytes(32), data)):
            self.assertFalse(muproxy.Psk(secret).verify(data, wrong, {})[0].ok)
        with self.assertRaisesRegex(muproxy.Failure, "--psk"):
            muproxy.Psk(None)

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

    def test_unconfined_enclave(self):
        loose = Enclave("--unconfined")
        self.addCleanup(loose.end)
        error = self.assertCode("evidence_refused", open_session, loose.address)
        self.assertEqual(self.failed_checks(error), {"confinement"})
        open_session(loose.address, allow_unconfined=True).close()

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

    def answer(self, session, request, **options):
        text = "".join(session.generate(request, **options))
        return text, session.final

    def test_ids_and_text_give_the_same(self):
        with ready_session() as session:
            request = chat("Tell me about zen.")
            by_ids = self.answer(session, request, vocabulary=vocabulary())
            by_gate = self.answer(session, request)
            self.assertEqual(by_ids[0], by_gate[0])
            self.assertEqual(by_ids[1]["usage"], by_gate[1]["usage"])
            self.assertIn("Beautiful is better than ugly", by_ids[0])

    def test_stop_strings(self):
        with ready_session() as session:
            request = chat("Tell me about zen.")
            whole = self.answer(session, request, vocabulary=vocabulary())[0]
            stop = whole[20:26]
            for table in (vocabulary(), None):
                text, final = self.answer(session, request, vocabulary=table, stops=[stop])
                self.assertEqual(text, whole[: whole.index(stop)])
                self.assertEqual(final["finish_reason"], "stop")

    def test_closing_the_iterator_frees_the_session(self):
        with ready_session() as session:
            pieces = session.generate({"prompt": "The"} | LONG, vocabulary())
            next(pieces)
            pieces.close()
            self.assertTrue(session.is_usable())
            text = self.answer(session, chat("Tell me about zen."), vocabulary=vocabulary())[0]
            self.assertIn("Beautiful", text)

    def test_nobody_wants_the_answer(self):
        with ready_session() as session:
            os.kill(enclave.engine(), signal.SIGSTOP)
            try:
                pieces = session.generate({"prompt": "The"} | LONG, vocabulary(), (), lambda: True)
                with concurrent.futures.ThreadPoolExecutor() as pool:
                    done = pool.submit(list, pieces)
                    while not getattr(session, "_is_cancelled", False):
                        time.sleep(0.01)
                    os.kill(enclave.engine(), signal.SIGCONT)
                    self.assertEqual(done.result(SECONDS), [])
            finally:
                os.kill(enclave.engine(), signal.SIGCONT)
            self.assertEqual(session.final["finish_reason"], "cancelled")
            self.assertEqual(session.final["usage"]["completion_tokens"], 0)

    def test_mistakes_leave_the_session_open(self):
        with ready_session() as session:
            context = session.ready["context"]
            for code, request in (
                ("prompt_too_long", {"prompt": "word " * 4 * context}),
                ("too_many_tokens", {"prompt": "a", "max_new_tokens": context}),
                ("bad_message", {"prompt": "a", "temprature": 1}),
                ("prompt_too_long", {"prompt": "a" * mp.REQUEST_FRAME}),
            ):
                error = self.assertCode(code, session.generate, request, vocabulary())
                self.assertTrue(session.is_usable(), code)
                if code == "too_many_tokens":
                    self.assertEqual(error.limit, context)
            self.assertIn("Beautiful", self.answer(session, chat("Tell me about zen."))[0])

    def test_refused_token(self):
        session = open_session()
        self.assertCode("token_refused", session.prove, {"token": "x" * 20})
        self.assertFalse(session.is_open)

    def test_access_token_is_not_an_unlock_token(self):
        secret = muproxy.read_secret(files.owner_psk)
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
        cases = [*map(flip, bits), lambda payload: [payload, payload], lambda payload: [payload[:-1]]]
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
        with Middle() as middle, ready_session(address=middle.address) as session:
            self.assertTrue(session.is_usable())
            middle.listener.close()
            session.link.socket.shutdown(socket.SHUT_RD)
            self.assertFalse(session.is_usable())


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
            with self.assertRaises(mp.ProtocolError) as caught, pool.session(token()):
                pass
            self.assertEqual(caught.exception.code, "busy")
        with pool.session(token()):
            pass

    def test_another_users_idle_session_makes_room(self):
        pool = self.pool(1, 0.1)
        with pool.session(token()):
            pass
        with self.assertRaises(mp.ProtocolError) as caught, pool.session("x" * 20):
            pass
        self.assertEqual(caught.exception.code, "token_refused")
        self.assertFalse(self.opened[0].is_open)
        self.assertEqual((pool.count, pool.idle), (0, []))

    def test_a_session_that_failed_is_not_kept(self):
        pool = self.pool()
        with contextlib.suppress(mp.ProtocolError), pool.session(token()) as session:
            session.link.shutdown(socket.SHUT_RDWR)
            list(session.generate(chat("hi")))
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
                        if muproxy.is_readable(sink, 0):
                            with mock.patch.object(time, "monotonic", lambda: 0):
                                got = inlet.receive(sink, rng.randrange(1, 5000), 1e9)
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
                    list(session.generate(chat("Tell me about zen."), vocabulary()))

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
            "temperature": 3,
            "top_p": "1",
            "max_tokens": 0,
            "seed": 1.5,
            "stop": ["x"] * 17,
            "stream": "yes",
            "model": 5,
            "messages": [],
        }.items():
            self.refused(name, **{name: value})
        self.refused(None, temprature=1)
        self.refused("model", model=None)
        self.refused("messages", messages=None)
        self.refused("prompt", is_chat=False, prompt=[1, 2])
        self.refused("prompt", is_chat=False, prompt=["a", "b"])
        self.refused("stream_options", stream_options={"include_usage": True})

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
        options = {"model": self.model, "temperature": 0} | options
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
        return muproxy.read_container(files.demo_mus).fields["asset"]

    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(files.demo)

    def test_chat(self):
        answer = self.create()
        self.assertIn("Beautiful is better than ugly", answer.choices[0].message.content)
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
            self.assertEqual(reasons, [None] * (len(reasons) - 1) + ["stop"])

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
        big = {"Content-Length": str(muproxy.BODY_LIMIT + 1)}
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

    def test_a_big_body_does_not_lose_its_answer(self):
        status, _, body = self.request("POST", "/v1/completions", "x" * (3 * muproxy.BODY_LIMIT))
        self.assertEqual((status, body["error"]["type"]), (413, "invalid_request_error"))

    def test_too_many_requests(self):
        import openai

        server = self.serve(enclave, 1)
        client = self.make_client(server.server_address)
        stop = self.hold_engine()
        try:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                first = pool.submit(self.create, client=client)
                while not server.counts["requests_running"]:
                    time.sleep(0.01)
                with self.assertRaises(openai.RateLimitError) as caught:
                    self.create(client=client)
                self.assertIn("Retry-After", caught.exception.response.headers)
                stop()
                self.assertIn("Beautiful", first.result(SECONDS).choices[0].message.content)
        finally:
            stop()

    def hold_engine(self):
        """Stop the engine; returns the function that lets it go on."""
        engine = enclave.engine()
        os.kill(engine, signal.SIGSTOP)
        return lambda: os.kill(engine, signal.SIGCONT)

    def test_too_many_connections(self):
        server = self.serve(enclave, 1)
        server.places = threading.BoundedSemaphore(1)
        with socket.create_connection(server.server_address, SECONDS):
            while server.places.acquire(blocking=False):
                server.places.release()
                time.sleep(0.01)
            status, headers, body = self.request("GET", "/health", address=server.server_address)
            self.assertEqual((status, body["error"]["code"]), (429, "rate_limit_exceeded"))
            self.assertIn("Retry-After", headers)

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
            head = f"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer {token()}\r\n"
            head += "Content-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
            connection.sendall(head.encode())
            self.assertIn(b" 408 ", connection.recv(100))

    def test_locked(self):
        import openai

        locked = Enclave()
        self.addCleanup(locked.end)
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
        stream = self.create("Tell me about zen.", stream=True, **LONG)
        next(stream)
        stream.close()
        while self.metrics()["requests_running"]:
            time.sleep(0.05)
        tokens = 'tokens_total{kind="completion"}'
        sent = self.metrics()[tokens] - before.get(tokens, 0)
        context = self.sessions[-1].ready["context"]
        self.assertLess(sent, context - 100)
        self.assertIn("Beautiful", self.create().choices[0].message.content)

    def test_hang_up_before_the_first_token(self):
        """The client goes while the engine stands still: nothing is generated for it."""
        known, stop = len(self.sessions), self.hold_engine()
        body = json.dumps({"model": self.model, "prompt": "The", "max_tokens": 50})
        try:
            with socket.create_connection(self.address, SECONDS) as connection:
                head = f"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer {token()}\r\n"
                head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall((head + body).encode())
                while not self.metrics()["requests_running"]:
                    time.sleep(0.01)
            while not any(getattr(s, "_is_cancelled", False) for s in self.sessions if s.is_open):
                time.sleep(0.01)
            stop()
            while self.metrics()["requests_running"]:
                time.sleep(0.01)
        finally:
            stop()
        cancelled = [s for s in self.sessions if s.is_open and s._is_cancelled]
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
        body = {"model": self.model, "messages": [{"role": "user", "content": "Tell me about zen."}]}
        command = ["curl", "-sS", "-N", f"{url}/v1/chat/completions", "-d", "@-"]
        for field in (f"Authorization: Bearer {token()}", "Content-Type: application/json"):
            command += ["-H", field]
        for stream in (False, True):
            text = json.dumps(body | {"stream": stream, "temperature": 0})
            done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=SECONDS)
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


class Losses(Case):
    """An enclave that is locked, killed and started again."""

    def test_lost_enclave_is_found_again(self):
        first = Enclave()
        self.addCleanup(first.end)
        first.unlock()
        addresses = [first.address]
        pool = muproxy.Pool(lambda: open_session(addresses[-1]))
        self.addCleanup(pool.close)
        with pool.session(token()) as session:
            known = session
        first.process.kill()
        first.process.wait()
        with self.assertRaises(mp.ProtocolError) as caught, pool.session(token()):
            pass
        self.assertEqual(caught.exception.code, "connection_lost")
        second = Enclave()
        self.addCleanup(second.end)
        addresses.append(second.address)
        with self.assertRaises(mp.ProtocolError) as caught, pool.session(token()):
            pass
        self.assertEqual(caught.exception.code, "locked")
        second.unlock()
        with pool.session(token()) as session:
            self.assertIsNot(session, known)
            self.assertIn("Beautiful", "".join(session.generate(chat("Tell me about zen."))))


class CommandLine(Case):
    """The verbs, their exit statuses, and one line for every mistake."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.user, self.owner = enclave.flags(), enclave.flags("owner")
        self.talk = [*self.user, "--token-file", files.token, "--rate-kb", 10**6]

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
        flags = ["--port", enclave.port, "--reference", path, "--psk", files.owner_psk]
        done = proxy("attest", *flags)
        self.assertEqual((done.returncode, done.stderr), (1, ""))
        self.assertEqual(done.stdout.count("FAILED"), 2)
        self.assertEqual(done.stdout.splitlines()[-1], "refused")
        facts = json.loads(proxy("attest", *flags, "--json").stdout)
        wrong = {check["name"] for check in facts["checks"] if not check["ok"]}
        self.assertEqual((facts["verified"], wrong), (False, {"proof", "measurement"}))

    def test_expected_measurement(self):
        known, other = reference()["measurement"], "00" * 32
        flags = ["--port", enclave.port, "--psk", files.user_psk]
        self.assertEqual(proxy("attest", *flags, "--expected-measurement", known).returncode, 0)
        self.assertEqual(proxy("attest", *flags, "--expected-measurement", other).returncode, 1)
        self.assertFails(2, "nothing to verify against", proxy("attest", *flags))
        flags += ["--reference", files.reference_json, "--expected-measurement", other]
        self.assertFails(2, "is not that of", proxy("attest", *flags))

    def test_unreachable(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        flags = ["--port", port, *self.user[2:]]
        for verb in (["attest"], ["chat", "--token-file", files.token]):
            self.assertFails(3, "Connection refused", proxy(*verb, *flags))

    def test_usage(self):
        for pattern, arguments in (
            ("chmod 600", ["--psk", self.open_file("00" * 32), "--token-file", files.token]),
            ("no-such", ["--psk", files.user_psk, "--token-file", "/no-such"]),
            ("access token is needed", ["--psk", files.user_psk]),
            ("--psk", ["--token-file", files.token]),
            ("--rate-kb", ["--rate-kb", "0"]),
            ("--rate-kb", ["--rate-kb", "nan"]),
            ("temperature", [*self.talk[4:], "--temperature", "nan"]),
            ("max-tokens", [*self.talk[4:], "--max-tokens", "0"]),
            ("vocabulary", ["--psk", files.user_psk, "--vocabulary", files.demo_key]),
        ):
            with self.subTest(pattern=pattern):
                flags = [*self.user[:4], *arguments]
                done = proxy(*flags, input="hello\n", env=self.without_token())
                self.assertFails(2, pattern, types.SimpleNamespace(
                    returncode=done.returncode, stderr=done.stderr.split("\n", 1)[-1]
                    if done.stderr.startswith("verified") else done.stderr))
        self.assertEqual(proxy("fly").returncode, 2)
        for arguments in (["--help"], ["unlock", "--help"], ["chat", "--help"]):
            self.assertEqual(proxy(*arguments).returncode, 0)
        self.assertIn("3 unreachable", proxy("attest", "--help").stdout)

    def without_token(self):
        return {k: v for k, v in os.environ.items() if k != "MUENCLAVE_TOKEN"}

    def open_file(self, text):
        path = self.folder / "open"
        path.write_text(text)
        path.chmod(0o644)
        return path

    def test_chat(self):
        done = proxy(*self.talk, "--vocabulary", files.demo_mus_vocab, input="Tell me about zen.\nquit\nno\n")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("Beautiful is better than ugly", done.stdout)
        self.assertRegex(done.stderr, r"\[stop: \d+ tokens, [\d.]+ tok/s; egress [\d,]+ bytes, [\d,]+ left\]")
        self.assertNotIn("Traceback", done.stderr)
        environment = self.without_token() | {"MUENCLAVE_TOKEN": token()}
        again = proxy("chat", *self.user, "--rate-kb", 10**6, input="Tell me about zen.\n", env=environment)
        self.assertEqual((again.returncode, again.stdout), (0, done.stdout))

    def test_chat_commands(self):
        done = proxy(*self.talk, input="/tokens 3 Tell me about zen.\n/what\n\nTell me about zen.\n")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("[length: 3 tokens", done.stderr)
        self.assertIn("/tokens N prompt", done.stderr)

    def test_interrupt_cancels_the_answer_and_then_ends(self):
        command = [sys.executable, "-m", "muproxy", *map(str, self.talk), "--raw"]
        command += ["--vocabulary", str(files.demo_mus_vocab)]
        engine = enclave.engine()
        process = subprocess.Popen(
            command, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        with process:
            self.addCleanup(process.kill)
            self.assertIn("verified", process.stderr.readline())
            os.kill(engine, signal.SIGSTOP)
            try:
                before = self.connections(process.pid)
                process.stdin.write("The\n")
                process.stdin.flush()
                time.sleep(0.5)
                process.send_signal(signal.SIGINT)
                time.sleep(0.5)
            finally:
                os.kill(engine, signal.SIGCONT)
            self.assertIn("[cancelled: 0 tokens", process.stderr.readline())
            self.assertEqual(before, self.connections(process.pid))
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.wait(SECONDS), 0)
            self.assertEqual(process.stderr.read(), "")

    def connections(self, pid):
        links = pathlib.Path(f"/proc/{pid}/fd").iterdir()
        return sum("socket" in os.readlink(link) for link in links)

    def test_batch(self):
        prompts, output = self.folder / "prompts", self.folder / "results.json"
        prompts.write_text(json.dumps(["Tell me about zen.", "word " * 5000, "Tell me"]))
        flags = ["--prompts-file", prompts, "--output-file", output, "--max-tokens", 12]
        done = proxy(*self.talk, *flags)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("error: prompt 2: the prompt does not fit", done.stderr)
        first, second, third = json.loads(output.read_text())
        self.assertIn("Beautiful", first["completion"])
        self.assertEqual(first["usage"]["completion_tokens"], 12)
        self.assertEqual(second, {"prompt": "word " * 5000, "error": "prompt_too_long"})
        self.assertEqual(third["prompt"], "Tell me")
        prompts.write_text("Tell me about zen.\n")
        done = proxy(*self.talk, "--prompts-file", prompts, "--max-tokens", 12)
        self.assertEqual(json.loads(done.stdout)[0]["completion"], first["completion"])
        bad = self.folder / "no" / "such"
        done = proxy(*self.talk, "--prompts-file", prompts, "--output-file", bad)
        self.assertEqual(done.returncode, 2)
        self.assertIn("Beautiful", done.stdout)  # not lost

    def test_owner(self):
        done = proxy("status", *self.owner)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("status: ready", done.stdout)
        self.assertFails(2, "whose token", proxy("revoke", *self.owner))

    def test_weak_evidence_needs_a_word(self):
        flags = [flag for flag in self.owner if flag != "--development"]
        lease = ["--token-file", files.token, "--budget", 10**6]
        for verb in (["unlock", *lease], ["status"], ["lock"]):
            done = proxy(*verb, *flags)
            self.assertFails(1, "--development", done)
            self.assertEqual(done.stdout, "")

    def test_unlock_refusals(self):
        lease = ["--token-file", files.token]
        self.assertFails(2, "--budget", proxy("unlock", *self.owner, *lease))
        self.assertFails(2, "--burst", proxy("unlock", *self.owner, *lease, "--budget", 10**6, "--burst", 5))
        self.assertFails(2, "--token-file", proxy("unlock", *self.owner, "--budget", 10**6))
        other = self.folder / "other.key"
        fields = json.loads(files.demo_key.read_text())
        other.write_text(json.dumps(fields | {"key": "00" * 32}))
        other.chmod(0o600)
        flags = [other if flag == files.demo_key else flag for flag in self.owner]
        done = proxy("unlock", *flags, *lease, "--budget", 10**6)
        self.assertFails(2, "is not the key of", done)
        wrong = [files.user_psk if flag == files.owner_psk else flag for flag in self.owner]
        done = proxy("unlock", *wrong, *lease, "--budget", 10**6)
        self.assertFails(1, "proof: expected", done)
        for word in (fields["key"], token(), files.owner_psk.read_text().strip()):
            self.assertNotIn(word, done.stdout + done.stderr)

    def test_unlock_again_adds_a_lease_and_revoke_strikes_a_token(self):
        extra = Enclave()
        self.addCleanup(extra.end)
        first = extra.unlock("--token-file", files.other)
        self.assertIn("root: psk", first.stdout)
        self.assertIn("budget 10,000,000 bytes", first.stdout)
        again = extra.unlock("--token-file", files.other)
        self.assertIn("budget left: 20000000", again.stdout)
        pool = muproxy.Pool(lambda: open_session(extra.address))
        self.addCleanup(pool.close)
        other = muproxy.read_token(files.other)
        with pool.session(other), pool.session(token()):
            pass
        owner = extra.flags("owner")
        done = proxy("revoke", *owner, "--token-file", files.other)
        self.assertEqual(done.returncode, 0, done.stderr)
        with self.assertRaises(mp.ProtocolError) as caught, pool.session(other):
            pass
        self.assertEqual(caught.exception.code, "token_refused")
        with pool.session(token()):
            pass
        done = proxy("lock", *owner)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("status: locked", done.stdout)
        with self.assertRaises(mp.ProtocolError) as caught, pool.session(token()):
            pass
        self.assertIn(caught.exception.code, ("locked", "connection_lost"))

    def background(self, *arguments):
        """A server process of the command line, and the address that it says."""
        command = [sys.executable, "-m", "muproxy", *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        lines = []
        for line in process.stderr:
            lines.append(line)
            if " on 127.0.0.1:" in line or " on 0.0.0.0:" in line:
                host, _, port = line.split()[-1].rpartition(":")
                return process, (host, int(port)), lines
        raise AssertionError(lines)

    def test_serve(self):
        flags = [*self.user, "--vocabulary", files.demo_mus_vocab, "--listen", "127.0.0.1:0"]
        process, address, lines = self.background("serve", *flags)
        self.assertNotIn("warning", "".join(lines))
        connection = http.client.HTTPConnection(*address, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {token()}"})
            reply = connection.getresponse()
            self.assertEqual(reply.status, 200)
            self.assertEqual(json.load(reply)["object"], "list")
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(SECONDS), 0)
        self.assertNotIn(token(), "".join(lines) + process.stderr.read())

    def test_serve_warns_beyond_loopback(self):
        process, _, lines = self.background("serve", *self.user, "--listen", "0.0.0.0:0")
        self.assertRegex("".join(lines), "warning: .*TLS")
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(SECONDS), 0)

    def test_serve_refuses_what_it_cannot_verify(self):
        path = self.folder / "reference"
        path.write_text(json.dumps(reference() | {"measurement": "00" * 32}))
        flags = ["--port", enclave.port, "--reference", path, "--psk", files.user_psk]
        done = proxy("serve", *flags, "--listen", "127.0.0.1:0")
        self.assertFails(1, "measurement: expected 0000", done)

    def test_address_in_use(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            place = f"127.0.0.1:{listener.getsockname()[1]}"
            self.assertFails(2, "in use", proxy("relay", "--listen", place))

    def test_relay(self):
        flags = ["--port", enclave.port, "--listen", "127.0.0.1:0", "--rate-kb", 4]
        start = time.monotonic()
        process, address, _ = self.background("relay", *flags)
        done = proxy("status", "--port", address[1], *self.owner[2:])
        self.assertEqual(done.returncode, 0, done.stderr)
        taken = 2 * mp.CELL + 1000  # at least: measurement, proof, two READYs
        self.assertGreaterEqual(time.monotonic() - start, taken / 4096)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(SECONDS), 0)

    def test_relay_passes_all_and_is_bounded(self):
        relay = muproxy.Relay(("127.0.0.1", 0), enclave.address, free_inlet())
        relay.places = threading.BoundedSemaphore(2)
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        self.addCleanup(relay.server_close)
        self.addCleanup(relay.shutdown)
        with ready_session(address=relay.server_address) as session:
            self.assertIn("Beautiful", "".join(session.generate(chat("Tell me about zen."))))
            with ready_session(address=relay.server_address):
                self.assertCode("connection_lost", open_session, relay.server_address)
        while not relay.places.acquire(blocking=False):
            time.sleep(0.01)
        open_session(relay.server_address).close()


if __name__ == "__main__":
    unittest.main()
