"""muproxy: the host's and the owner's side, in the order in which data passes through it: files and
reference values, evidence, the outer meter, a session, the pool of sessions, the HTTP API, relay,
chat, the owner's commands, the command line.

On the host it sees prompts and answers, never the weights key or the weights; what it does not
verify, it does not talk to. On the owner's station it holds the weights key until the evidence has
been verified and the key is sealed for the enclave that gave it.

    reference values --.
    enclave -- outer meter -- evidence -- session -- pool -- HTTP API, chat, batch
                         `--- relay (ciphertext only: an owner's unlock passes unseen)
"""

import argparse
import collections
import contextlib
import errno
import functools
import getpass
import hashlib
import http.server
import io
import json
import os
import re
import secrets
import select
import signal
import socket
import socketserver
import sys
import tempfile
import threading
import time

import muprotocol as mp
from muprotocol import ProtocolError

VERBS = "chat serve relay attest unlock status lock revoke keygen".split()
OWNERS = "unlock status lock revoke".split()
CHAT_FIRST = "Talk to an enclave, after verifying it. Without a verb: chat."
DONE, REFUSED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130  # exit statuses
EXIT_STATUSES = (
    "exit status: 0 done (attest: verified); 1 refused, by us or by the enclave; "
    "2 flags or files are wrong; 3 unreachable or cut off; 130 interrupted"
)
TOKEN_FORM = "[!-~]{16,256}"  # of an access token; ours are mu- and 64 hexadecimal characters

CONNECT_SECONDS = 10
HANDSHAKE_SECONDS = 60  # metered: many at once share the rate
RECORD_SECONDS = 120  # from a record's first byte to its last, at the least rate
LOAD_SECONDS = 3600  # between two tenths of the weights
ANSWER_SECONDS = 900  # until an answer's next record
DRAIN_SECONDS = 30  # from a cancel to the final record
POLL_SECONDS = 0.2  # between two looks at whether an answer is still wanted
IDLE_SECONDS = 600  # of a pooled session; the enclave ends it after 900
LEAST_BUFFER = 4 << 10  # bytes that the kernel may take in before the meter gives
# After these the enclave keeps the session open: the request was wrong, or its time.
LASTING = (*mp.REFUSALS, "bad_json", "bad_message", "policy_refused", "busy", "engine_lost")


class Failure(Exception):
    """A command can't go on: one line that says why and what to do, and the exit status."""

    def __init__(self, text, status=USAGE):
        self.status = status
        super().__init__(text)


# ==== files and reference values

FILE_LIMIT = 1 << 20
TABLE_LIMIT = 64 << 20  # of a vocabulary table
SCRYPT = {
    "n": mp.is_one_of(*(1 << power for power in range(14, 21))),
    "r": mp.is_integer(1, 16),
    "p": mp.is_integer(1, 16),
    "salt": mp.is_hex(16),
}
SCRYPT_MEMORY = 512 << 20
KEY = {"version": mp.is_one_of(1), "asset": mp.is_name, "key": mp.is_hex(32)}
WRAPPED_KEY = {
    "version": mp.is_one_of(1),
    "asset": mp.is_name,
    "scrypt": mp.is_object(SCRYPT),
    "nonce": mp.is_hex(12),
    "wrapped": mp.is_hex(32 + mp.TAG),
}
ROOTS = {  # what evidence is worth, by its root
    "psk": "a shared secret: says who answers, not what runs; for development",
    "fixture": "a software TPM that stands for a real one; for development",
    "ek": "a TPM, worth what its issuer and its command channel are worth",
    "tee": "the processor",
}
REFERENCE = {
    "version": mp.is_one_of(1),
    "kind": mp.is_one_of(*mp.EVIDENCE_KINDS),
    "root": lambda v: isinstance(v, str) and re.fullmatch("psk|fixture|tee|ek:.{1,200}", v),
    "measurement": mp.is_hex(32),
    "withdrawn": mp.is_list(mp.is_hex(32), 0, 4096),
    "model?": mp.is_hex(32),
    "pcrs?": lambda v: isinstance(v, dict) and all(map(mp.is_hex(32), v.values())),
    "attestation_key?": mp.is_text(1, 4096),
}


def read_file(path, is_private=False, limit=FILE_LIMIT):
    """A file's bytes. A private one that others can read is refused. Raises Failure."""
    try:
        with open(path, "rb") as file:
            if is_private and os.fstat(file.fileno()).st_mode & 0o077:
                raise Failure(f"{path}: others can read it; chmod 600 {path}")
            data = file.read(limit + 1)
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None
    if len(data) > limit:
        raise Failure(f"{path}: longer than {limit} bytes")
    return data


def read_secret(path):
    """A provisioning secret, 32 bytes, of a file as `keygen psk` makes it. Raises Failure."""
    try:
        return mp.parse_secret(read_file(path, is_private=True).decode("ascii"))
    except ValueError:
        raise Failure(f"{path}: 64 hexadecimal characters are wanted; see keygen psk") from None


def read_token(path):
    """An access token, of a file as `keygen token` makes it. Raises Failure."""
    token = read_file(path, is_private=True).decode("ascii", "replace").strip()
    if not re.fullmatch(TOKEN_FORM, token):
        raise Failure(f"{path}: no access token in it; see keygen token")
    return token


def read_reference(path):
    """Reference values from a file. Raises Failure."""
    try:
        return mp.parse_message(read_file(path), REFERENCE)
    except ProtocolError as error:
        raise Failure(f"{path}: not a reference-values file: {error.detail}") from None


def read_key_file(path, ask_passphrase):
    """(asset, weights key of 32 bytes); ask_passphrase() is called for a wrapped key. Failure."""
    try:
        fields = mp.parse_message(read_file(path, is_private=True), KEY, WRAPPED_KEY)
    except ProtocolError as error:
        raise Failure(f"{path}: not a weights key file: {error.detail}") from None
    if "key" in fields:
        return fields["asset"], bytes.fromhex(fields["key"])
    facts = {name: fields[name] for name in ("version", "asset", "scrypt")}
    costs = {name: fields["scrypt"][name] for name in ("n", "r", "p")}
    salt = bytes.fromhex(fields["scrypt"]["salt"])
    passphrase = ask_passphrase().encode()
    try:
        key = hashlib.scrypt(passphrase, salt=salt, maxmem=SCRYPT_MEMORY, dklen=32, **costs)
    except ValueError:
        raise Failure(f"{path}: its scrypt costs are more than this machine allows") from None
    return fields["asset"], unwrap(path, key, fields, mp.encode_json(facts))


def unwrap(path, key, fields, facts):
    """The weights key out of its wrapping. Raises Failure."""
    from cryptography.exceptions import InvalidTag

    try:
        wrapped = bytes.fromhex(fields["wrapped"])
        return mp.aead(key).decrypt(bytes.fromhex(fields["nonce"]), wrapped, facts)
    except InvalidTag:
        raise Failure(f"{path}: wrong passphrase, or the file was changed") from None


def read_container(path):
    """The header of a sealed model. Raises Failure."""
    try:
        with open(path, "rb") as file:
            return mp.Container(file.read(mp.header_length(file.read(mp.PREFIX))))
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None
    except ProtocolError as error:
        raise Failure(f"{path}: not a sealed model: {error.detail}") from None


def read_vocabulary(path):
    """The id -> bytes table that sealing left beside the sealed model. Raises Failure."""
    try:
        return mp.Vocabulary(read_file(path, limit=TABLE_LIMIT))
    except ProtocolError:
        raise Failure(f"{path}: not a vocabulary table (.vocab)") from None


def write_file(path, data):
    """Write a file whole or not at all. Raises Failure."""
    folder = os.path.dirname(os.path.abspath(path))
    try:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None


# ==== evidence

Check = collections.namedtuple("Check", "name expected got ok")


class Psk:
    """Evidence for development: HMAC under a role's provisioning secret. Says who, not what."""

    def __init__(self, secret):
        if secret is None:
            raise Failure("evidence of kind psk needs the provisioning secret: --psk FILE")
        self._secret = secret

    def verify(self, data, proof, reference):
        """The checks of a proof over 32 bytes of report data. [Check]"""
        ok = secrets.compare_digest(mp.psk_proof(self._secret, data), proof)
        got = "the same" if ok else "another secret, or a changed transcript"
        return [Check("proof", "HMAC of this session under our secret", got, ok)]


EVIDENCE = {"psk": Psk}  # a class per kind: made from the secret (or None), verify as above


class Refusal(ProtocolError):
    """Evidence that does not match; `checks` has every check, those that failed among them."""

    def __init__(self, checks):
        self.checks = checks
        failed = (f"{c.name}: expected {c.expected}, got {c.got}" for c in checks if not c.ok)
        super().__init__("evidence_refused", "; ".join(failed))


def check_measurement(measurement, reference, model=None, allow_unconfined=False):
    """The checks of a MEASUREMENT against the reference values. [Check]

    model: digest (hexadecimal) of the sealed model that must be the enclave's, None for any.
    """
    got, posture = measurement["measurement"], measurement["posture"]
    model = model or reference.get("model")
    withdrawn = got in reference["withdrawn"]
    confined = posture["confinement"] != "none" or allow_unconfined
    levels = "full, seccomp or none" if allow_unconfined else "full or seccomp"
    return [
        Check("measurement", reference["measurement"], got, got == reference["measurement"]),
        Check("withdrawn", "no", "yes" if withdrawn else "no", not withdrawn),
        Check("confinement", levels, posture["confinement"], confined),
        Check("debug", "no", "yes" if posture["debug"] else "no", not posture["debug"]),
        Check("model", model or "any", measurement["model"], model in (None, measurement["model"])),
    ]


def is_for_development(reference):
    """Whether this evidence leaves open what runs, so that no real key may be released for it."""
    return reference["kind"] == "psk" or reference["root"] in ("psk", "fixture")


# ==== the outer meter


class Inlet:
    """The way in through the outer meter: one for all sessions of a process.

    rate: bytes a second; burst: bytes; received: bytes so far. Over any time T this process takes
    at most rate * T + burst from its enclave. `buffer` is what the kernel may hold besides, for
    each connection: an eighth of a second's worth, so that a slow meter is felt by the enclave.
    """

    def __init__(self, rate=mp.DEFAULT_RATE, burst=mp.DEFAULT_BURST, clock=time.monotonic_ns):
        self.meter = mp.Meter(rate, burst, clock())
        self.buffer = min(max(rate // 8, LEAST_BUFFER), 1 << 20)
        self.received = 0
        self._clock = clock
        self._turn = threading.Lock()

    def receive(self, connection, size, deadline):
        """At most `size` bytes of a readable socket, paid for before they are taken.

        They are looked at first, so that nothing is paid that is not there. Raises TimeoutError.
        """
        if not self._turn.acquire(timeout=max(0, deadline - time.monotonic())):
            raise TimeoutError("the meter is busy")
        try:
            count = len(connection.recv(min(size, mp.CELL), socket.MSG_PEEK))
            while not self.meter.take(count, self._clock()):
                seconds = self.meter.wait(count, self._clock()) / mp.NANOSECOND
                if time.monotonic() + seconds > deadline:
                    raise TimeoutError("the meter gives too little")
                time.sleep(seconds)
            self.received += count
            return mp.read_exactly(connection, count)
        finally:
            self._turn.release()


class Link:
    """A connection to the enclave, or to a relay before it, that is read through an inlet."""

    def __init__(self, address, inlet, seconds=CONNECT_SECONDS):
        self.inlet, self.seconds, self.received = inlet, seconds, 0
        self.socket = connect(address, inlet.buffer, seconds)

    def settimeout(self, seconds):
        """Seconds that the next reads may take."""
        self.seconds = seconds

    def is_readable(self, seconds):
        """Whether there are bytes, or the end, within so many seconds."""
        return is_readable(self.socket, seconds)

    def recv(self, size):
        """At most `size` bytes, b"" at the end. Raises TimeoutError."""
        deadline = time.monotonic() + self.seconds
        if not self.is_readable(self.seconds):
            raise TimeoutError("nothing came")
        data = self.inlet.receive(self.socket, size, deadline)
        self.received += len(data)
        return data

    def sendall(self, data):
        """Send all of it."""
        self.socket.sendall(data)

    def close(self):
        """End the connection."""
        self.socket.close()


def connect(address, buffer, seconds):
    """A TCP socket whose receive buffer is small from its first byte on. Raises OSError."""
    failure = OSError(errno.EHOSTUNREACH, "no such host")
    for family, kind, protocol, _, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(seconds)
            connection.connect(place)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


def is_readable(connection, seconds):
    """Whether a socket has bytes, or its end, within so many seconds."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


# ==== a session


class Session:
    """A session with an enclave that has been verified; one request at a time, one thread.

    address: (host, port). reference: reference values. secret: what the evidence kind needs of us.
    checks: what was verified. measurement: step 1. ready: step 3. final: an answer's last record.
    Raises Refusal when a check fails, else ProtocolError: connection_lost and timeout for a link
    that fails (the session is then over), the enclave's own code for what it refuses.
    """

    def __init__(self, address, reference, secret=None, role="user", inlet=None, **wanted):
        if reference["kind"] not in EVIDENCE:
            raise Failure(f"this muproxy can't verify evidence of kind {reference['kind']}")
        evidence = EVIDENCE[reference["kind"]](secret)
        self.role, self.link = role, None
        self.ready = self.final = None
        self.is_open = True
        self.used = time.monotonic()
        try:
            with self._step():
                self.link = Link(address, inlet or Inlet())
                self._handshake(reference, evidence, wanted)
        except BaseException:
            self.close()
            raise

    def _handshake(self, reference, evidence, wanted):
        """Steps 0 and 1. wanted: options of check_measurement."""
        kind, share, link = reference["kind"], mp.KeyShare(), self.link
        challenge = {"version": mp.VERSION, "role": self.role, "evidence": kind}
        challenge |= {"nonce": secrets.token_hex(32), "share": share.public.hex()}
        payload = mp.encode_json(challenge)
        link.sendall(mp.frame(payload))
        answer = mp.read_frame(link, mp.HANDSHAKE_FRAME, HANDSHAKE_SECONDS)
        proof = mp.read_frame(link, mp.HANDSHAKE_FRAME, HANDSHAKE_SECONDS)
        self.measurement = mp.parse_message(answer, mp.MEASUREMENT)
        transcript = mp.transcript_hash(payload, answer)
        self.checks = evidence.verify(mp.report_data(kind, transcript), proof, reference)
        self.checks += check_measurement(self.measurement, reference, **wanted)
        if not all(check.ok for check in self.checks):
            raise Refusal(self.checks)
        secret = share.agree(bytes.fromhex(self.measurement["share"]))
        keys = mp.session_keys(secret, transcript)
        self.sealer = mp.Sealer(keys["h2e"])
        self.opener = mp.Opener(keys["e2h"], mp.MESSAGE_LIMIT)

    def prove(self, token, on_progress=None):
        """Steps 2 and 3: send UNLOCK or ACCESS, wait until the model can answer. Returns READY.

        on_progress: called with the tenths of the weights that are loaded.
        """
        self._send(token)
        while True:
            message = self._receive_json(LOAD_SECONDS, mp.PROGRESS, mp.READY)
            if message["status"] != "loading":
                self.ready = message
                return message
            if on_progress is not None:
                on_progress(message["progress"])

    def command(self, command):
        """An owner's status, lock or revoke; returns READY."""
        self._send(command)
        self.ready = self._receive_json(HANDSHAKE_SECONDS, mp.READY)
        return self.ready

    def generate(self, request, vocabulary=None, stops=(), is_gone=None):
        """The pieces of one answer's text, as they come; `final` is its last record afterwards.

        request: GENERATE or GENERATE_CHAT without encoding and stop. Without a vocabulary table
        the enclave renders the text, in one piece. is_gone() is asked now and then whether nobody
        wants the rest. Close the iterator to cancel; the session is then ready for the next one.
        """
        if vocabulary is None:
            request = request | {"encoding": "text"} | ({"stop": list(stops)} if stops else {})
        elif vocabulary.digest != self.ready["vocabulary"]:
            raise Failure("the vocabulary table is not that of the enclave's model: --vocabulary")
        self.final, self._is_cancelled, self._watched = None, False, 0
        if len(mp.encode_json(request)) > mp.REQUEST_FRAME - mp.RECORD_HEADER - mp.TAG:
            raise ProtocolError("prompt_too_long")
        cutter = mp.TextCutter(vocabulary, stops) if vocabulary else None
        self._send(request)
        try:
            while self.final is None:
                piece = self._take_piece(vocabulary, cutter, is_gone)
                if piece:
                    yield piece
        except GeneratorExit:
            self._drain()
            raise

    def _take_piece(self, vocabulary, cutter, is_gone):
        """The text that the next message brings."""
        kind, body = self._receive(ANSWER_SECONDS, is_gone)
        if kind == mp.IDS_RECORD:
            with self._step():
                if cutter is None:
                    raise ProtocolError("bad_record", "ids where text was asked for")
                piece = cutter.feed(vocabulary.unpack(body))
            if cutter.stopped:
                self.cancel()
            return piece
        final = self._parse(body, mp.FINAL)
        piece = final.get("completion", "") if cutter is None else cutter.feed([], last=True)
        if cutter is not None and cutter.stopped:
            final["finish_reason"] = "stop"
        self.ready |= {name: final[name] for name in ("budget_left", "restarts")}
        self.final = final
        return piece

    def cancel(self):
        """Have a running answer end now; its final record still comes."""
        if not self._is_cancelled:
            self._is_cancelled = True
            self._send({"cancel": True})

    def _drain(self):
        """Cancel the answer and take what is left of it, or else end the session."""
        deadline = time.monotonic() + DRAIN_SECONDS
        with contextlib.suppress(ProtocolError):
            self.cancel()
            while self.is_open:
                kind, body = self._receive(deadline - time.monotonic())
                if kind == mp.JSON_RECORD:
                    self.final = self._parse(body, mp.FINAL)
                    return

    def _send(self, message):
        with self._step():
            self.link.sendall(b"".join(self.sealer.seal_json(message)))

    def _receive(self, seconds, is_gone=None):
        """(kind, body) of the next message, which must begin within so many seconds."""
        deadline, message = time.monotonic() + seconds, None
        with self._step():
            if not self.is_open:
                raise EOFError("the session is over")
            self._watch(is_gone)
            while not self.link.is_readable(POLL_SECONDS):
                self._watch(is_gone)
                if time.monotonic() > deadline:
                    raise TimeoutError("no message came")
            while message is None:
                payload = mp.read_frame(self.link, mp.RESPONSE_FRAME, RECORD_SECONDS)
                message = self.opener.open(payload)
        self.used = time.monotonic()
        return message

    def _watch(self, is_gone):
        """Cancel the answer if nobody wants it any more; look now and then only."""
        if is_gone is not None and time.monotonic() > self._watched + POLL_SECONDS:
            self._watched = time.monotonic()
            if is_gone():
                self.cancel()

    def _receive_json(self, seconds, *schemas):
        kind, body = self._receive(seconds)
        if kind != mp.JSON_RECORD:
            self.close()
            raise ProtocolError("bad_record", "ids where JSON was due")
        return self._parse(body, *schemas)

    def _parse(self, body, *schemas):
        """A JSON message. Raises ProtocolError with the code of an ERROR."""
        with self._step():
            message = mp.parse_message(body, *schemas, mp.ERROR)
        if "error" not in message:
            return message
        if self.ready is None or message["error"] not in LASTING:
            self.close()
        raise ProtocolError(message["error"], limit=message.get("limit"))

    @contextlib.contextmanager
    def _step(self):
        """A step whose failure is the session's end, told as ProtocolError."""
        try:
            yield
        except ProtocolError:
            self.close()
            raise
        except TimeoutError:
            self.close()
            raise ProtocolError("timeout") from None
        except (EOFError, OSError) as error:
            self.close()
            raise ProtocolError(
                "connection_lost", getattr(error, "strerror", None) or str(error)
            ) from None

    def is_usable(self):
        """Whether it can take a request: still open, and nothing came that nobody asked for."""
        return self.is_open and not self.link.is_readable(0)

    def close(self):
        """End the session. An answer that runs ends with it."""
        self.is_open = False
        if self.link is not None:
            self.link.close()


class Pool:
    """Verified sessions by the hash of their access token; the token itself is kept nowhere.

    connect(): a new Session. prove is called on it with the token of whoever asks. limit: sessions
    at once; a request beyond waits, then is refused as busy. facts: the last READY of any, and
    `seen` when that was.
    """

    def __init__(self, connect, limit=32, wait_seconds=10, on_progress=None):
        self.connect, self.on_progress, self.wait_seconds = connect, on_progress, wait_seconds
        self.limit, self.count = limit, 0
        self.idle = []  # (token hash, session), the last used at the end
        self.facts, self.seen = {}, -HEALTH_SECONDS
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def session(self, token):
        """A session that this token opens, alone ours until the block ends. ProtocolError."""
        owner = mp.token_hash(token)
        session = self._take(owner)
        try:
            if session is None:
                session = self.connect()
                session.prove({"token": token}, self.on_progress)
            self.facts, self.seen = session.ready, time.monotonic()
            yield session
        finally:
            self._give(owner, session)

    def _take(self, owner):
        """An idle session of this user, or None with a place for a new one. Raises busy."""
        deadline = time.monotonic() + self.wait_seconds
        with self.changed:
            while True:
                self._clean()
                for entry in reversed(self.idle):
                    if entry[0] == owner:
                        self.idle.remove(entry)
                        return entry[1]
                if self.count >= self.limit and self.idle:
                    self._end(self.idle.pop(0)[1])
                if self.count < self.limit:
                    self.count += 1
                    return None
                if not self.changed.wait(deadline - time.monotonic()):
                    raise ProtocolError("busy")

    def _give(self, owner, session):
        with self.changed:
            if session is not None and session.ready and session.is_usable():
                self.idle.append((owner, session))
            else:
                self._end(session)
            self.changed.notify()

    def _clean(self):
        """End what has been lost, or idle for long."""
        oldest = time.monotonic() - IDLE_SECONDS
        for entry in list(self.idle):
            if not entry[1].is_usable() or entry[1].used < oldest:
                self.idle.remove(entry)
                self._end(entry[1])

    def _end(self, session):
        self.count -= 1
        if session is not None:
            session.close()

    def has_live(self):
        """Whether a verified session is open now, or was lately begun."""
        with self.changed:
            self._clean()
            return bool(self.idle) or time.monotonic() < self.seen + HEALTH_SECONDS

    def close(self):
        """End the idle sessions."""
        with self.changed:
            while self.idle:
                self._end(self.idle.pop()[1])


# ==== the HTTP API

BODY_LIMIT = mp.REQUEST_FRAME
HEAD_SECONDS = 30  # until a request's head is whole, idle time on a kept connection included
BODY_SECONDS = 30
WRITE_SECONDS = 30  # for the client to take what we send
LINGER_SECONDS = 2  # for a client to read our answer to a body that we did not
CONNECTIONS = 128  # at once, a thread each
HEALTH_SECONDS = 30  # between two handshakes that only ask for the health: metered as all are
RETRY_SECONDS = 5
COMPLETION_TOKENS = 16  # OpenAI's default where there are no messages
STATUSES = {  # error code of the session: HTTP status, type, code; 503 where none is named
    "token_refused": (401, "invalid_request_error", "invalid_api_key"),
    "prompt_too_long": (400, "invalid_request_error", "context_length_exceeded"),
    "too_many_tokens": (400, "invalid_request_error", "context_length_exceeded"),
    "prompt_invalid": (400, "invalid_request_error", "prompt_invalid"),
    "policy_refused": (400, "invalid_request_error", "policy_refused"),
    "bad_message": (400, "invalid_request_error", None),
    "busy": (429, "rate_limit_error", "rate_limit_exceeded"),
    "timeout": (504, "server_error", "timeout"),
}
# What this model can't do, by the values that do not ask for it.
ONLY = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
LABELS = (  # of OpenAI's own bookkeeping: nothing here to keep them in
    "metadata prompt_cache_key prompt_cache_retention safety_identifier service_tier store user"
).split()
TOKENS = mp.is_integer(1, 1 << 24)
STOPS = mp.is_list(mp.is_text(1, 256), 0, 16)
STREAM_OPTIONS = {
    "include_usage?": mp.is_one_of(True, False),
    "include_obfuscation?": mp.is_one_of(True, False),
}
FIELDS = {
    "model": mp.is_text(1, 256),
    "stream": mp.is_one_of(True, False),
    "stream_options": mp.is_object(STREAM_OPTIONS),
    "stop": lambda v: STOPS([v] if isinstance(v, str) else v),
    "temperature": mp.is_number(0, 2),
    "top_p": mp.is_number(0, 1),
    "top_k": mp.SAMPLING["top_k?"],
    "repetition_penalty": mp.SAMPLING["repetition_penalty?"],
    "seed": mp.is_integer(-(1 << 63), (1 << 63) - 1),
    "max_tokens": TOKENS,
    "max_completion_tokens": TOKENS,
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class HttpError(Exception):
    """An answer in OpenAI's error form."""

    def __init__(self, status, message, code=None, param=None, kind="invalid_request_error"):
        self.status = status
        self.body = {"message": message, "type": kind, "param": param, "code": code}
        super().__init__(message)


def http_error(error):
    """The HttpError for a ProtocolError; it shows the code's constant text alone."""
    status, kind, code = STATUSES.get(error.code, (503, "server_error", error.code))
    text = mp.ERRORS[error.code]
    if status == 503 and isinstance(error, Refusal):
        text = "the enclave could not be verified"
    if error.limit is not None:
        text += f" of {error.limit} tokens"
    return HttpError(status, text, code, kind=kind)


def parse_request(body, is_chat):
    """(request for a session, stop strings, fields) from a request in OpenAI's form. HttpError."""
    fields = {name: value for name, value in body.items() if value is not None}
    source = "messages" if is_chat else "prompt"
    for name, value in fields.items():
        if name in ONLY and not mp.is_one_of(*ONLY[name])(value):
            raise HttpError(400, f"{name} is not supported", "unsupported_parameter", name)
        if name in FIELDS and not FIELDS[name](value):
            raise HttpError(400, f"{name} has a wrong type or value", "invalid_value", name)
        if name not in (*ONLY, *FIELDS, *LABELS, source):
            text = f"Unrecognized request argument supplied: {name[:64]}"
            raise HttpError(400, text, "unknown_parameter")
    for name in ("model", source):
        if name not in fields:
            text = f"Missing required parameter: '{name}'"
            raise HttpError(400, text, "missing_required_parameter", name)
    if "stream_options" in fields and not fields.get("stream"):
        raise HttpError(400, "stream_options needs stream", None, "stream_options")
    sampling = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
    request = {name: fields[name] for name in sampling if name in fields}
    if "top_p" in request:
        request["top_p"] = max(request["top_p"], 1e-6)
    if "seed" in request:
        request["seed"] &= (1 << 63) - 1
    limit = fields.get("max_completion_tokens", fields.get("max_tokens"))
    if limit or not is_chat:
        request["max_new_tokens"] = limit or COMPLETION_TOKENS
    request[source] = parse_messages(fields[source]) if is_chat else parse_prompt(fields[source])
    stops = fields.get("stop", [])
    return request, [stops] if isinstance(stops, str) else stops, fields


def parse_prompt(prompt):
    """One prompt's text. Raises HttpError."""
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        text = "prompt must be one string: lists and token ids are not supported"
        raise HttpError(400, text, "unsupported_parameter", "prompt")
    return prompt


def parse_messages(messages):
    """CHAT messages from OpenAI's. Raises HttpError."""
    if not isinstance(messages, list) or not 1 <= len(messages) <= 1024:
        raise HttpError(400, "messages must be a list of 1 to 1024", "invalid_value", "messages")
    return [parse_chat(f"messages[{i}]", message) for i, message in enumerate(messages)]


def parse_chat(place, message):
    """One message; its content is a string or a list of parts of text. Raises HttpError."""
    fields = {}
    if isinstance(message, dict):
        fields = {name: value for name, value in message.items() if value is not None}
    role = fields.pop("role", None)
    content = fields.pop("content", None)
    if fields or role in ("tool", "function"):
        name = min(fields, default=role)[:64]
        text = f"{place}.{name} is not supported"
        raise HttpError(400, text, "unsupported_parameter", f"{place}.{name}")
    if not isinstance(role, str) or role not in ROLES:
        text = f"{place}.role must be one of {', '.join(ROLES)}"
        raise HttpError(400, text, "invalid_value", f"{place}.role")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise HttpError(400, f"{place}.content must be text", "invalid_value", f"{place}.content")
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            text = f"{place}.content: parts of type {str(kind)[:64]} are not supported"
            raise HttpError(400, text, "unsupported_parameter", f"{place}.content")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            text = f"{place}.content: a part of text is malformed"
            raise HttpError(400, text, "invalid_value", f"{place}.content")
    return {"role": ROLES[role], "content": "".join(part["text"] for part in parts)}


class Answers:
    """The objects in OpenAI's form that make up one answer."""

    def __init__(self, is_chat, is_stream, session):
        self.is_chat, self.is_stream = is_chat, is_stream
        kind = "chat.completion" if is_chat else "text_completion"
        self.base = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12),
            "object": kind + (".chunk" if is_chat and is_stream else ""),
            "created": int(time.time()),
            "model": session.ready["asset"],
            "system_fingerprint": "fp_" + session.ready["model"][:16],
        }

    def make(self, text, reason=None, delta=None, **more):
        """One object: the whole answer, or a chunk of a stream."""
        choice = {"index": 0, "logprobs": None, "finish_reason": reason}
        if not self.is_chat:
            choice["text"] = text
        elif self.is_stream:
            choice["delta"] = {"content": text} if delta is None else delta
        else:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        return self.base | {"choices": [choice]} | more


class Deadline(io.RawIOBase):
    """What a client sends; every read must be done by the time `until`."""

    def __init__(self, connection):
        self.connection, self.until = connection, 0

    def readable(self):
        """True."""
        return True

    def readinto(self, buffer):
        """Read what there is. Raises TimeoutError."""
        self.connection.settimeout(max(self.until - time.monotonic(), 1e-3))
        return self.connection.recv_into(buffer)


class BoundedServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A thread for each connection, never more than `places`; who comes then is turned away."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 128

    def __init__(self, address, handler, places):
        self.places = threading.BoundedSemaphore(places)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def process_request(self, request, client_address):
        """Give a connection a thread, or a refusal."""
        if not self.places.acquire(blocking=False):
            self.turn_away(request)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system has no thread for us
            self.places.release()
            raise

    def process_request_thread(self, request, client_address):
        """The thread of a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def turn_away(self, request):
        """Say why there is no place, if the protocol has words for it."""

    def handle_error(self, request, client_address):
        """A client that goes away in the middle of things is no news."""


class Server(BoundedServer):
    """The HTTP API over a pool of sessions. address: (host, port), port 0 for any."""

    def __init__(self, address, pool, inlet, vocabulary=None):
        self.pool, self.inlet, self.vocabulary = pool, inlet, vocabulary
        self.lock = threading.Lock()
        self.counts = collections.Counter()
        self.health = (0, "")  # when it is to be asked for again, and what it was
        self.health_lock = threading.Lock()
        super().__init__(address, Handler, CONNECTIONS)

    def count(self, name, value=1):
        """Add to one of the counts."""
        with self.lock:
            self.counts[name] += value

    @contextlib.contextmanager
    def counted(self, name):
        """Count a request as running or waiting while the block lasts."""
        self.count((name,))
        try:
            yield
        finally:
            self.count((name,), -1)

    def turn_away(self, request):
        """429, without waiting for what the client wants."""
        self.count(("requests", "other", 429))
        error = HttpError(429, "too many connections", "rate_limit_exceeded", None, "requests")
        body = mp.encode_json({"error": error.body})
        head = f"HTTP/1.1 429 Too Many Requests\r\nRetry-After: {RETRY_SECONDS}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(head.encode() + b"Connection: close\r\n\r\n" + body)
            request.recv(1 << 16)  # closing on unread bytes would take the answer back

    def ask_health(self):
        """The enclave's status, or why there is none; a handshake at most every HEALTH_SECONDS."""
        if self.pool.has_live():
            return "ready"
        with self.health_lock:
            if time.monotonic() >= self.health[0]:
                try:
                    with contextlib.closing(self.pool.connect()) as session:
                        status = session.measurement["status"]
                except Refusal:
                    status = "refused"
                except (ProtocolError, Failure):
                    status = "unreachable"
                self.health = (time.monotonic() + HEALTH_SECONDS, status)
            return self.health[1]

    def metrics(self):
        """The counts as Prometheus' text format 0.0.4."""
        with self.lock:
            counts = dict(self.counts)
        requests = [(k[1:], v) for k, v in sorted(counts.items(), key=str) if k[0] == "requests"]
        lines = ["# TYPE muproxy_requests_total counter"]
        for (path, status), value in requests:
            lines.append(f'muproxy_requests_total{{path="{path}",code="{status}"}} {value}')
        lines.append("# TYPE muproxy_tokens_total counter")
        for kind in ("prompt", "completion"):
            value = counts.get(("tokens", kind), 0)
            lines.append(f'muproxy_tokens_total{{kind="{kind}"}} {value}')
        facts = self.pool.facts
        values = {
            "egress_bytes_total counter": self.inlet.received,
            "requests_running gauge": counts.get(("running",), 0),
            "requests_waiting gauge": counts.get(("waiting",), 0),
            "sessions gauge": self.pool.count,
            "budget_left_bytes gauge": facts.get("budget_left"),
            "engine_restarts gauge": facts.get("restarts"),
        }
        for name, value in values.items():
            if value is not None:
                lines += [f"# TYPE muproxy_{name}", f"muproxy_{name.split()[0]} {value}"]
        return "\n".join(lines) + "\n"


class Handler(http.server.BaseHTTPRequestHandler):
    """One client's connection."""

    protocol_version = "HTTP/1.1"
    paths = {
        "/v1/models": "GET",
        "/v1/chat/completions": "POST",
        "/v1/completions": "POST",
        "/health": "GET",
        "/metrics": "GET",
    }

    def setup(self):
        """Read through deadlines instead of a plain file."""
        super().setup()
        self.rfile.close()
        self.deadline = Deadline(self.connection)
        self.rfile = io.BufferedReader(self.deadline)

    def handle_one_request(self):
        """Read a request and answer it."""
        self.deadline.until = time.monotonic() + HEAD_SECONDS
        self.is_body_read = self.is_answered = False
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True

    def version_string(self):
        """Our name in the Server field."""
        return "muproxy"

    def log_message(self, *_):
        """Nothing: paths and clients are not ours to keep. The metrics count them."""

    def send_error(self, code, message=None, explain=None):
        """Errors that http.server finds, in the form of all others."""
        self.path = getattr(self, "path", "")
        if code == 501:
            code, message = 405, f"Not allowed to {self.command[:32]} here"
        self.fail(HttpError(code, message or "bad request"))

    def answer(self):
        """Answer one request, whatever its method."""
        try:
            self.route(self.path.partition("?")[0])
        except HttpError as error:
            self.fail(error)
        except ProtocolError as error:
            self.fail(http_error(error))
        except Failure:
            self.fail(HttpError(503, "the proxy is not set up", kind="server_error"))

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = answer

    def route(self, path):
        """Find out what is asked for. Raises HttpError, ProtocolError."""
        model = path.removeprefix("/v1/models/") if path.startswith("/v1/models/") else None
        method = self.paths.get("/v1/models" if model else path)
        if method is None:
            raise HttpError(404, f"Invalid URL ({self.command} {path[:100]})", "unknown_url")
        if self.command != method:
            text = f"Not allowed to {self.command} on {path[:100]} (HINT: {method})"
            raise HttpError(405, text, "method_not_supported")
        if path == "/health":
            status = self.server.ask_health()
            self.reply(200 if status == "ready" else 503, {"status": status})
        elif path == "/metrics":
            self.reply(200, self.server.metrics().encode(), "text/plain; version=0.0.4")
        elif method == "POST":
            self.complete(self.read_token(), path == "/v1/chat/completions")
        else:
            self.list_models(self.read_token(), model)

    def read_token(self):
        """The access token that the client sent. Raises HttpError."""
        given = re.fullmatch(f"Bearer ({TOKEN_FORM})", self.headers.get("Authorization", ""))
        if given is None:
            text = "No access token was given, or a malformed one (Authorization: Bearer ...)"
            raise HttpError(401, text, "invalid_api_key")
        return given[1]

    def read_body(self):
        """The request's body, an object. Raises HttpError."""
        length = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or not length:
            raise HttpError(411, "Content-Length is needed")
        if len(length) > 1 or not re.fullmatch("[0-9]{1,18}", length[0]):
            raise HttpError(400, "Content-Length is malformed")
        if int(length[0]) > BODY_LIMIT:
            raise HttpError(413, f"the body is longer than {BODY_LIMIT} bytes")
        if self.headers.get_content_type() != "application/json":
            raise HttpError(415, "Content-Type must be application/json")
        self.deadline.until = time.monotonic() + BODY_SECONDS
        try:
            data = self.rfile.read(int(length[0]))
        except TimeoutError:
            raise HttpError(408, "the body took too long") from None
        if len(data) < int(length[0]):
            raise HttpError(400, "the body ended early")
        self.is_body_read = True
        try:
            return mp.parse_json(data)
        except ProtocolError as error:
            raise HttpError(400, f"the body is not JSON: {error.detail}", "invalid_json") from None

    def list_models(self, token, name):
        """The one model that there is, in a list or alone."""
        with self.server.pool.session(token) as session:
            self.check_model(session, name)
            asset = session.ready["asset"]
        now = int(time.time())
        model = {"id": asset, "object": "model", "created": now, "owned_by": "muenclave"}
        self.reply(200, model if name else {"object": "list", "data": [model]})

    def check_model(self, session, name):
        """Raise HttpError if a model was named that is not the enclave's."""
        if name not in (None, session.ready["asset"]):
            text = f"The model `{name[:100]}` does not exist or you do not have access to it."
            raise HttpError(404, text, "model_not_found", "model")

    def complete(self, token, is_chat):
        """Both kinds of completion, whole or as a stream."""
        request, stops, fields = parse_request(self.read_body(), is_chat)
        is_stream, server = fields.get("stream", False), self.server
        with contextlib.ExitStack() as stack, contextlib.ExitStack() as waiting:
            stack.enter_context(server.counted("running"))
            waiting.enter_context(server.counted("waiting"))
            session = stack.enter_context(server.pool.session(token))
            self.check_model(session, fields["model"])
            pieces = session.generate(request, server.vocabulary, stops, self.is_gone)
            stack.callback(self.count_tokens, session)
            stack.enter_context(contextlib.closing(pieces))
            first = next(pieces, "")
            waiting.close()
            answers = Answers(is_chat, is_stream, session)
            if is_stream:
                self.stream(answers, session, first, pieces, fields)
                return
            text, final = first + "".join(pieces), session.final
        answer = answers.make(text, final["finish_reason"], usage=final["usage"])
        self.reply(200, answer)

    def count_tokens(self, session):
        """Count an answer's tokens, also one that was cancelled."""
        for kind in ("prompt", "completion") if session.final else ():
            self.server.count(("tokens", kind), session.final["usage"][f"{kind}_tokens"])

    def stream(self, answers, session, first, pieces, fields):
        """Server-sent events, to the end or until the client is gone."""
        with_usage = fields.get("stream_options", {}).get("include_usage", False)
        usage = {"usage": None} if with_usage else {}
        self.start(200, "text/event-stream", {"Cache-Control": "no-cache"}, None)
        try:
            if answers.is_chat:
                opening = {"role": "assistant", "content": ""}
                self.send_event(answers.make("", delta=opening, **usage))
            if first:
                self.send_event(answers.make(first, **usage))
            for piece in pieces:
                self.send_event(answers.make(piece, **usage))
        except ProtocolError as error:
            self.send_event({"error": http_error(error).body})
            raise
        self.send_event(answers.make("", session.final["finish_reason"], delta={}, **usage))
        if with_usage:
            self.send_event(answers.base | {"choices": [], "usage": session.final["usage"]})
        self.wfile.write(b"data: [DONE]\n\n")

    def send_event(self, value):
        """One event of a stream. Raises OSError when the client is gone."""
        self.connection.settimeout(WRITE_SECONDS)
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def is_gone(self):
        """Whether the client has hung up."""
        try:
            return is_readable(self.connection, 0) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def reply(self, status, value, kind="application/json", headers=()):
        """A whole response: an object, or bytes."""
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.start(status, kind, dict(headers), len(data))
        if self.command != "HEAD":
            self.wfile.write(data)

    def start(self, status, kind, headers, length):
        """Status and head of a response; without a length it ends with the connection."""
        path = self.path.partition("?")[0]
        self.server.count(("requests", path if path in self.paths else "other", status))
        self.is_answered = True
        self.connection.settimeout(WRITE_SECONDS)
        self.send_response(status)
        headers |= {"Content-Type": kind, "X-Content-Type-Options": "nosniff"}
        headers |= {"Connection": "close"} if length is None else {"Content-Length": length}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def fail(self, error):
        """Answer with an error, unless an answer has begun; then let go of a body left unread."""
        self.close_connection = self.close_connection or not self.is_body_read
        if self.is_answered:
            self.close_connection = True
            return
        headers = {"Connection": "close"} if self.close_connection else {}
        if error.status in (429, 503):
            headers["Retry-After"] = RETRY_SECONDS
        if error.status == 405:
            headers["Allow"] = self.paths.get(self.path.partition("?")[0], "GET, POST")
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        self.reply(error.status, {"error": error.body}, headers=headers)
        if not self.is_body_read:
            self.linger()

    def linger(self):
        """Read on for a little while: closing on unread bytes would take the answer back."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.deadline.until = time.monotonic() + LINGER_SECONDS
            while time.monotonic() < self.deadline.until and self.rfile.read1(1 << 16):
                pass


# ==== relay

RELAYED = 64  # connections at once
RELAY_IDLE_SECONDS = 1800  # longer than an enclave keeps an idle session


class Relay(BoundedServer):
    """A plain TCP relay to the enclave, what comes back metered; it sees ciphertext only."""

    def __init__(self, address, target, inlet):
        self.target, self.inlet = target, inlet
        super().__init__(address, None, RELAYED)

    def finish_request(self, request, client_address):
        """Relay one connection until the enclave ends it, or either side fails."""
        with (
            contextlib.suppress(OSError),
            contextlib.closing(Link(self.target, self.inlet)) as link,
        ):
            link.settimeout(RELAY_IDLE_SECONDS)
            for connection in (link.socket, request):
                connection.settimeout(RELAY_IDLE_SECONDS)
            forward = threading.Thread(target=pump, args=(request, link.socket), daemon=True)
            forward.start()
            pump(link, request)
            for connection in (link.socket, request):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            forward.join()


def pump(source, sink):
    """Pass bytes on until the source ends or either fails; then end the sink's side."""
    how = socket.SHUT_RDWR
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        how = socket.SHUT_WR
    with contextlib.suppress(OSError):
        sink.shutdown(how)


def serve_until_signal(server):
    """Serve until SIGINT or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("stopped")
    finally:
        server.server_close()
    return DONE


def warn_if_open(address):
    """Warn of a listening address that others can reach."""
    if address[0] not in ("127.0.0.1", "::1", "localhost"):
        say(
            f"warning: {address[0]} is reachable from elsewhere, and access tokens and prompts would "
            "cross the network in clear; listen on 127.0.0.1 and put TLS in front, for example: "
            f"caddy reverse-proxy --from your.host.name --to 127.0.0.1:{address[1]}"
        )


# ==== chat

HELP = "/tokens N prompt: an answer of at most N tokens; /reset: forget the talk; quit: leave"
BAR = 20  # characters
FORGETTABLE = ("prompt_too_long", "too_many_tokens")


def say(text):
    """One line for the reader, on stderr."""
    print(f"muproxy: {text}", file=sys.stderr, flush=True)


def dim(text):
    """A line beside the answer, on stderr; dim on a terminal."""
    is_terminal = sys.stderr.isatty()
    print(f"\033[2m{text}\033[0m" if is_terminal else text, file=sys.stderr, flush=True)


def show_progress(tenths):
    """A bar on a terminal while the enclave loads its weights."""
    if sys.stderr.isatty():
        bar = "#" * (tenths * BAR // 10)
        end = "\n" if tenths == 10 else ""
        print(
            f"\rloading weights [{bar:-<{BAR}}] {tenths}0 %", end=end, file=sys.stderr, flush=True
        )


def printable(text):
    """Text without the control characters by which an answer could command a terminal."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


@contextlib.contextmanager
def interruptible():
    """Ctrl-C sets a flag instead of tearing a record apart. Gives the function that reads it."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return
    before = signal.signal(signal.SIGINT, lambda *_: flag.set())
    try:
        yield flag.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def ask(pool, token, request, options, show):
    """One answer, shown piece by piece: (text, final record). Raises ProtocolError."""
    parts = []
    with pool.session(token) as session, interruptible() as is_gone:
        pieces = session.generate(request, options.vocabulary, options.stop, is_gone)
        with contextlib.closing(pieces):
            for piece in pieces:
                parts.append(piece)
                show(piece)
        return "".join(parts), session.final


def request_from(options):
    """The sampling fields that the flags give."""
    names = ("temperature", "top_p", "top_k", "seed")
    fields = {name: getattr(options, name) for name in names}
    fields["max_new_tokens"] = options.max_tokens
    return {name: value for name, value in fields.items() if value is not None}


def answer_turn(pool, token, turns, prompt, request, options):
    """Answer a prompt within the talk; print it and its status line. Returns the talk after it.

    What no longer fits is forgotten from its beginning. Raises ProtocolError.
    """
    message = {"role": "user", "content": prompt}
    beginning = [{"role": "system", "content": options.system}] if options.system else []
    terminal = sys.stdout.isatty()

    def show(piece):
        print(printable(piece) if terminal else piece, end="", flush=True)

    while True:
        chat = {"prompt": prompt} if options.raw else {"messages": beginning + turns + [message]}
        before, start = options.inlet.received, time.monotonic()
        try:
            text, final = ask(pool, token, request | chat, options, show)
        except ProtocolError as error:
            if error.code not in FORGETTABLE or not turns or options.raw:
                raise
            turns = turns[2:]
            dim("(the talk no longer fits; its oldest turn is forgotten)")
            continue
        print(flush=True)
        count, seconds = final["usage"]["completion_tokens"], time.monotonic() - start
        used = options.inlet.received - before
        how = "" if final["finish_reason"] == "stop" else f", {final['finish_reason']}"
        dim(
            f"[{count} tokens, {count / seconds:.1f} tok/s{how}; egress {used:,} bytes, "
            f"{final['budget_left']:,} left]"
        )
        return [*turns, message, {"role": "assistant", "content": text}]


def chat_loop(pool, token, options):
    """Read prompts and answer them until the end of input. Returns the exit status."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing for input()
    terminal, status, turns = sys.stdin.isatty(), DONE, []
    if terminal:
        dim(HELP)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return status
        request = request_from(options)
        command = re.fullmatch(r"/tokens\s+([1-9][0-9]{0,6})\s+(.+)", line)
        if line == "quit":
            return status
        if line == "/reset" or not line:
            turns = [] if line else turns
            continue
        if command is not None:
            request["max_new_tokens"], line = int(command[1]), command[2]
        elif line.startswith("/"):
            dim(HELP)
            continue
        try:
            turns = answer_turn(pool, token, turns, line, request, options)
        except ProtocolError as error:
            print(flush=True)
            status = status_of(error)
            say(f"error: {error}")
            if not terminal and status == UNREACHABLE:
                return status


def read_prompts(path):
    """Prompts of a file: a JSON list of strings, or one a line. Raises Failure."""
    try:
        text = read_file(path, limit=TABLE_LIMIT).decode("utf-8")
        if not text.lstrip().startswith("["):
            return [line for line in text.splitlines() if line.strip()]
        prompts = json.loads(text)
    except ValueError as error:
        raise Failure(f"{path}: not UTF-8 text or a JSON list: {error}") from None
    if not mp.is_list(mp.is_text(0, 1 << 20), 0, 1 << 20)(prompts):
        raise Failure(f"{path}: a JSON list of strings is wanted")
    return prompts


def batch(pool, token, options):
    """Answer the prompts of a file; write JSON results, as far as they came. Exit status."""
    prompts, results, status = read_prompts(options.prompts_file), [], DONE
    system = [{"role": "system", "content": options.system}] if options.system else []
    try:
        for number, prompt in enumerate(prompts, 1):
            chat = {"messages": [*system, {"role": "user", "content": prompt}]}
            request = request_from(options) | ({"prompt": prompt} if options.raw else chat)
            try:
                text, final = ask(pool, token, request, options, lambda _: None)
            except ProtocolError as error:
                results.append({"prompt": prompt, "error": error.code})
                status = status_of(error)
                say(f"error: prompt {number}: {error}")
                if error.code not in LASTING:
                    break
                continue
            facts = {name: final[name] for name in ("elapsed_ms", "finish_reason", "usage")}
            results.append({"prompt": prompt, "completion": text} | facts)
            dim(f"[{number} of {len(prompts)} prompts; egress {options.inlet.received:,} bytes]")
            if final["finish_reason"] == "cancelled":
                raise KeyboardInterrupt
    finally:
        write_results(options.output_file, results)
    return status


def write_results(path, results):
    """Write them to the file; without one, or if that fails, to stdout, so that none is lost."""
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    try:
        if path:
            write_file(path, text.encode())
    except Failure:
        sys.stdout.write(text)
        raise
    if not path:
        sys.stdout.write(text)


def run_chat(options):
    """`chat`: talk, or answer a file of prompts."""
    token = given_token(options)
    pool = Pool(connector(options), 1, on_progress=show_progress)
    with contextlib.closing(pool):
        if options.prompts_file:
            return batch(pool, token, options)
        with pool.session(token) as session:
            model, left = session.ready["asset"], session.ready["budget_left"]
            dim(f"verified; model {model}, egress budget {left:,} bytes")
        return chat_loop(pool, token, options)


def run_serve(options):
    """`serve`: the HTTP API."""
    pool = Pool(connector(options), options.sessions)
    server = Server(options.listen, pool, options.inlet, options.vocabulary)
    warn_if_open(server.server_address)
    status = server.ask_health()
    if status == "refused":
        pool.connect()  # which lists what does not match
    host, port = server.server_address[:2]
    say(f"the enclave is {'verified, ' * (status != 'unreachable')}{status}")
    say(f"serving http://{f'[{host}]' if ':' in host else host}:{port}/v1")
    with contextlib.closing(pool):
        return serve_until_signal(server)


def run_relay(options):
    """`relay`: pass bytes, metered."""
    relay = Relay(options.listen, (options.host, options.port), options.inlet)
    host, port = relay.server_address[:2]
    say(f"relaying {host}:{port} to {options.host}:{options.port}")
    return serve_until_signal(relay)


# ==== the owner's commands

BUDGET_DIVISOR = 10_000  # a lease's grant is a ten-thousandth of the sealed model's size
LEAST_BUDGET = 4096  # bytes


def print_checks(session, reference):
    """The root of the evidence, then every check."""
    root = reference["root"]
    print(f"root: {root} ({ROOTS[root.partition(':')[0]]})")
    for check in session.checks:
        word = "ok" if check.ok else "FAILED"
        print(f"{word:6} {check.name}: expected {check.expected}, got {check.got}")
    sys.stdout.flush()


def run_attest(options):
    """`attest`: verify, and print the evidence and every check."""
    refusal = None
    try:
        session = connector(options)()
        session.close()
    except Refusal as error:
        session = refusal = error
    reference = options.reference
    if options.json:
        facts = {"verified": refusal is None, "root": reference["root"], "kind": reference["kind"]}
        checks = [check._asdict() for check in session.checks]
        print(json.dumps(facts | {"checks": checks}, indent=1))
    else:
        print_checks(session, reference)
        print("refused" if refusal else "verified")
    return REFUSED if refusal else DONE


def open_owner(options):
    """(session, unlock token without a lease) of an owner; no key for weak evidence. Failure."""
    if is_for_development(options.reference) and not options.development:
        root = options.reference["root"]
        raise Failure(
            f"evidence with root {root} is {ROOTS[root.partition(':')[0]]}: this command sends "
            "the weights key, so say --development if that is what you mean",
            REFUSED,
        )
    container = options.container
    if container is None:
        raise Failure("an owner names the sealed model: --model FILE")
    asset, key = read_key_file(options.key, lambda: ask_passphrase(options))
    if asset != container.fields["asset"] or not container.is_key(key):
        raise Failure(f"{options.key} is not the key of {options.model}")
    return connector(options)(), {"key": key.hex(), "model": container.digest}


def ask_passphrase(options):
    """The passphrase of the key file, from a file or the terminal."""
    if options.passphrase_file:
        return read_file(options.passphrase_file, is_private=True).decode().rstrip("\r\n")
    return getpass.getpass(f"passphrase of {options.key}: ")


def make_lease(options):
    """A lease as the flags say. Raises Failure."""
    budget = options.budget or options.container.sealed_size() // BUDGET_DIVISOR
    if not options.budget and budget < LEAST_BUDGET:
        raise Failure(
            f"a ten-thousandth of this small model is {budget} bytes, too few to answer with: "
            "say with --budget how many bytes may leave"
        )
    lease = {
        "id": secrets.token_hex(16),
        "sequence": time.time_ns() // 1_000_000,  # until a ledger counts them
        "rate": options.rate,
        "burst": options.burst,
        "budget": budget,
        "expiry": options.expiry,
        "users": [mp.token_hash(read_token(path)) for path in options.token_file],
        "policy": {"verified": False, "latency_ms": 0},
    }
    wrong = [name for name, check in mp.LEASE.items() if not check(lease[name])]
    if wrong:
        raise Failure(f"out of range: {', '.join(wrong)}")
    return lease


def run_unlock(options):
    """`unlock`: verify, release the weights key with a lease."""
    session, token = open_owner(options)
    with contextlib.closing(session):
        print_checks(session, options.reference)
        lease = make_lease(options)
        print(
            f"lease {lease['id']}: {lease['budget']:,} bytes, {lease['rate']:,} bytes/s, ", end=""
        )
        print(f"{lease['expiry']:,} s, {len(lease['users'])} access tokens", flush=True)
        ready = session.prove(token | {"lease": lease}, show_progress)
    print_status(ready)
    return DONE


def run_owner(options):
    """`status`, `lock` and `revoke`."""
    command = {options.verb: True}
    if options.verb == "revoke":
        if not (options.token_file or mp.is_hex(32)(options.token_hash)):
            raise Failure("say whose token: --token-file FILE, or --token-hash HASH")
        command = {"revoke": options.token_hash or mp.token_hash(read_token(options.token_file))}
    session, token = open_owner(options)
    with contextlib.closing(session):
        session.prove(token)
        print_status(session.command(command))
    return DONE


def print_status(ready):
    """READY, a line each for what an owner wants to know."""
    names = ("status", "asset", "model", "lease", "budget_left", "restarts", "context")
    for name in names:
        print(f"{name.replace('_', ' ')}: {ready[name] if ready[name] != '' else 'none'}")


def run_keygen(options):
    """`keygen`: a new access token or provisioning secret, in a file that only we can read."""
    text = ("mu-" if options.what == "token" else "") + secrets.token_hex(32)
    try:
        number = os.open(options.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(number, "w") as file:
            file.write(text + "\n")
    except FileExistsError:
        raise Failure(f"{options.file} is there already; nothing was changed") from None
    except OSError as error:
        raise Failure(f"{options.file}: {error.strerror}") from None
    hashed = f", its hash is {mp.token_hash(text)}" if options.what == "token" else ""
    print(f"{options.file}: new {options.what}{hashed}")
    return DONE


# ==== the command line


def status_of(error):
    """The exit status for a ProtocolError."""
    return UNREACHABLE if error.code in ("connection_lost", "timeout") else REFUSED


def connector(options):
    """A function that opens and verifies a session, as the flags say."""
    address = (options.host, options.port)
    wanted = {"model": options.digest, "allow_unconfined": options.allow_unconfined}
    facts = (options.reference, options.secret, options.role, options.inlet)
    return functools.partial(Session, address, *facts, **wanted)


def given_token(options):
    """The access token, from a file or the environment. Raises Failure."""
    if options.token_file:
        return read_token(options.token_file)
    token = os.environ.get("MUENCLAVE_TOKEN", "")
    if not re.fullmatch(TOKEN_FORM, token):
        raise Failure("an access token is needed: --token-file FILE or MUENCLAVE_TOKEN")
    return token


def given_reference(options):
    """Reference values, from a file or a measurement alone. Raises Failure."""
    expected = options.expected_measurement
    if options.reference is None and expected is None:
        raise Failure("nothing to verify against: give --reference FILE or --expected-measurement")
    if expected is not None and not mp.is_hex(32)(expected):
        raise Failure("--expected-measurement wants 64 hexadecimal characters, lower case")
    if options.reference is None:
        return {"version": 1, "kind": "psk", "root": "psk", "withdrawn": []} | {
            "measurement": expected
        }
    reference = read_reference(options.reference)
    if expected not in (None, reference["measurement"]):
        raise Failure(f"--expected-measurement is not that of {options.reference}")
    return reference


def prepare(options):
    """Replace what the flags name by what it is: files by their content. Raises Failure."""
    if options.verb == "keygen":
        return
    options.inlet = Inlet(options.rate_kb)
    if options.verb == "relay":
        return
    options.reference = given_reference(options)
    options.secret = read_secret(options.psk) if options.psk else None
    options.container = read_container(options.model) if options.model else None
    options.digest = options.container.digest if options.model else None
    if options.verb in ("chat", "serve") and options.vocabulary:
        options.vocabulary = read_vocabulary(options.vocabulary)


def address_of(text):
    """(host, port) of HOST:PORT, [HOST]:PORT or PORT, for argparse."""
    found = re.fullmatch(r"(?:(?:\[(.+)\]|([^:]+)):)?([0-9]{1,5})", text)
    if found is None or int(found[3]) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return found[1] or found[2] or "127.0.0.1", int(found[3])


def rate_of(text):
    """Bytes a second of a number of KB/s, for argparse."""
    try:
        rate = int(float(text) * 1024)
    except (ValueError, OverflowError):
        rate = 0
    if not 64 <= rate <= 1 << 40:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate of 0.0625 KB/s or more")
    return rate


def number_of(kind, low, high):
    """An argparse type: a number within [low, high]."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return value

    return convert


def make_parser():
    """The command line."""
    parser = argparse.ArgumentParser(prog="muproxy", description=CHAT_FIRST, epilog=EXIT_STATUSES)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name, run, text, *groups):
        command = verbs.add_parser(name, help=text, description=text, epilog=EXIT_STATUSES)
        command.set_defaults(run=run, role="user")
        for group in groups:
            group(command.add_argument)
        return command.add_argument

    add = verb("chat", run_chat, "talk to the model (the default)", reach, verify)
    add("--token-file", metavar="FILE", help="access token (or MUENCLAVE_TOKEN)")
    add("--vocabulary", metavar="FILE", help="token table, .vocab; without it answers come whole")
    add("--prompts-file", metavar="FILE", help="answer these: one a line, or a JSON list")
    add("--output-file", metavar="FILE", help="write their answers here as JSON")
    add("--system", metavar="TEXT", help="system message")
    add("--raw", action="store_true", help="continue the prompt as text, without a chat template")
    add("--max-tokens", type=number_of(int, 1, 1 << 24), metavar="N")
    add("--temperature", type=number_of(float, 0, 10), metavar="T")
    add("--top-p", type=number_of(float, 1e-6, 1), metavar="P")
    add("--top-k", type=number_of(int, 0, 1 << 20), metavar="K")
    add("--seed", type=number_of(int, 0, (1 << 63) - 1), metavar="N")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable")

    add = verb("serve", run_serve, "OpenAI-compatible HTTP API", reach, verify)
    add("--listen", type=address_of, default=("127.0.0.1", 8080), metavar="HOST:PORT")
    add("--vocabulary", metavar="FILE", help="token table, .vocab; without it nothing streams")
    add("--sessions", type=number_of(int, 1, 1024), default=32, help="enclave sessions at once")

    add = verb("relay", run_relay, "plain metered TCP relay", reach)
    add("--listen", type=address_of, required=True, metavar="HOST:PORT")

    add = verb("attest", run_attest, "verify the enclave; print every check", reach, verify)
    add("--role", choices=("user", "owner"), default="user", help="whose --psk it is")
    add("--json", action="store_true")

    add = verb("unlock", run_unlock, "verify, then release the weights key", reach, verify, own)
    token_help = "access token that the lease admits; repeatable"
    add("--token-file", action="append", required=True, metavar="FILE", help=token_help)
    add("--budget", type=number_of(int, 1, 1 << 50), metavar="BYTES", help="that may leave")
    add("--rate", type=number_of(int, 64, 1 << 40), default=mp.DEFAULT_RATE, metavar="B/s")
    burst = number_of(int, 16 << 10, 1 << 40)
    add("--burst", type=burst, default=mp.DEFAULT_BURST, metavar="BYTES")
    expiry = number_of(int, 1, 10 * 366 * 86400)
    add("--expiry", type=expiry, default=86400, metavar="SECONDS")
    verb("status", run_owner, "ask an unlocked enclave how it is", reach, verify, own)
    verb("lock", run_owner, "lock the enclave", reach, verify, own)
    add = verb("revoke", run_owner, "strike an access token from the lease", reach, verify, own)
    add("--token-file", metavar="FILE")
    add("--token-hash", metavar="HASH", help="as keygen printed it")

    add = verb("keygen", run_keygen, "make an access token or a provisioning secret")
    add("what", choices=("token", "psk"))
    add("file")
    return parser


def reach(add):
    """Flags of every verb that connects."""
    add("--host", default="127.0.0.1")
    add("--port", type=number_of(int, 1, 65535), default=9000)
    rate_help = "outer meter: what may come in, all sessions together (default 5)"
    add("--rate-kb", type=rate_of, default=mp.DEFAULT_RATE, metavar="KB/s", help=rate_help)


def verify(add):
    """Flags of every verb that verifies."""
    add("--reference", metavar="FILE", help="reference values")
    add("--expected-measurement", metavar="HASH", help="instead of a file, for kind psk")
    add("--psk", metavar="FILE", help="provisioning secret, for kind psk")
    add("--model", metavar="FILE", help="the sealed model that must be the enclave's")
    add("--allow-unconfined", action="store_true", help="accept an enclave without confinement")


def own(add):
    """Flags of the owner's verbs."""
    add("--key", required=True, metavar="FILE", help="weights key")
    add("--passphrase-file", metavar="FILE", help="passphrase of a wrapped key; else asked for")
    add("--development", action="store_true", help="release the key although the root is weak")


def main(argv=None):
    """`python -m muproxy`. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in (*VERBS, "-h", "--help"):
        arguments.insert(0, "chat")
    options = make_parser().parse_args(arguments)
    try:
        if options.verb in OWNERS:
            options.role = "owner"
        prepare(options)
        return options.run(options)
    except Failure as error:
        say(f"error: {error}")
        return error.status
    except ProtocolError as error:
        say(f"error: {options.host}:{options.port}: {error}")
        return status_of(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it ends
        return REFUSED
    except OSError as error:
        say(f"error: {error.strerror or error}")
        return UNREACHABLE
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
