"""muproxy: the host's side, in the order in which data passes through it: files and reference
values, evidence, the outer meter, a session, the pool of sessions, the HTTP API, relay, chat,
attest, the command line.

It sees prompts and answers, never the weights key or the weights; what it has not verified, it does
not talk to; `attest --log` alone asks a guest that booted otherwise for its event log. The owner's
commands, which hold the weights key until it is sealed for a verified enclave, are tools/owner.py:
they take from here how an enclave is reached and verified.

    enclave -- outer meter -- evidence -- session -- pool -- HTTP API, chat, batch
                         `--- relay (ciphertext only: an owner's unlock passes unseen)
"""

import argparse
import base64
import collections
import contextlib
import hashlib
import http.server
import io
import itertools
import json
import os
import re
import secrets
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time

import muprotocol as mp
from muprotocol import ProtocolError, is_readable

DONE, REFUSED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130
EPILOG = "exit status: 0 done; 1 refused; 2 wrong flags or files; 3 unreachable; 130 interrupted"


class Failure(Exception):
    """A command can't go on: one line that says why and what to do, and the exit status."""

    def __init__(self, text, status=USAGE):
        self.status = status
        super().__init__(text)


TEXTS = {code: f"the protocol was broken: {code}" for code in mp.ERRORS if code[:4] == "bad_"}
TEXTS |= {  # a code of mp.ERRORS: what it tells a user
    "timeout": "the peer took too long",
    "connection_lost": "the connection ended before the step was complete",
    "version_unsupported": "the peer speaks another version of the protocol",
    "evidence_refused": "the evidence does not match the reference values",
    "evidence_unavailable": "this kind of evidence is not available",
    "locked": "the enclave is locked: the owner has to unlock it",
    "token_refused": "the token was refused",
    "wrong_key": "the weights key does not belong to this model",
    "wrong_model": "the enclave holds another model than the token names",
    "lease_refused": "the lease was seen before, is out of order, or is exhausted",
    "lease_ended": "the lease has ended",
    "container_corrupt": "the sealed weights failed authentication",
    "model_invalid": "the sealed model can't be loaded",
    "no_engine": "the inference engine is not installed in this enclave",
    "out_of_memory": "the model does not fit in memory",
    "engine_lost": "the engine died; it is being started again",
    "prompt_invalid": "the prompt or its messages can't be rendered",
    "prompt_too_long": "the prompt does not fit into the model's context",
    "too_many_tokens": "prompt and max_new_tokens do not fit into the model's context",
    "policy_refused": "the lease's sampling policy does not allow this request",
    "busy": "the enclave has no room for another request or session now",
}


def text_of(error):
    """What an exception tells a user: a ProtocolError in words, any other as it is."""
    if not isinstance(error, ProtocolError):
        return str(error)
    return f"{TEXTS[error.code]} ({error.detail})" if error.detail else TEXTS[error.code]


# ==== files and reference values

TOKEN_FORM = "[!-~]{16,256}"  # of an access token; ours are mu- and 64 hexadecimal characters
ROOTS = {  # what evidence is worth, by its root
    "psk": "a shared secret: it says who answers, not what runs; for development",
    "fixture": "a software TPM in a real one's place; for development",
    "ek": "a TPM: worth what its issuer and its command channel are worth",
    "tee": "the processor",
}
REFERENCE = {
    "version": mp.is_one_of(1),
    "kind": mp.is_one_of(*mp.EVIDENCE_KINDS),
    "root": lambda v: isinstance(v, str) and re.fullmatch("psk|fixture|tee|ek:.{1,200}", v),
    "measurement": mp.is_hex(32),
    "withdrawn": mp.is_list(mp.is_hex(32), 0, 4096),
    "model?": mp.is_hex(32),
    "pcrs?": mp.is_object({f"{pcr}?": mp.is_hex(32) for pcr in mp.PCRS}),
    "attestation_key?": mp.is_hex(len(mp.ATTESTATION_KEY) + 2 + 256),  # TPMT_PUBLIC
    "event_log?": mp.LOGGED["log"],  # of the boot that was enrolled: it explains, it proves nothing
    "image?": lambda v: isinstance(v, dict),  # facts for readers; no check rests on them
}


def load(path, parse, what, is_private=False, limit=64 << 20):
    """parse(bytes of a file); a private file that others can read is refused. Raises Failure."""
    try:
        with open(path, "rb") as file:
            if is_private and os.fstat(file.fileno()).st_mode & 0o077:
                raise Failure(f"{path}: others can read it; chmod 600 {path}")
            return parse(file.read(limit))
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None
    except (ValueError, ProtocolError) as error:
        raise Failure(f"{path}: not {what}: {getattr(error, 'detail', error)}") from None


def read_secret(path):
    """A provisioning secret: 32 bytes. Raises Failure."""
    return load(path, lambda d: mp.parse_secret(d.decode("ascii")), "a provisioning secret", True)


def parse_token(data):
    """An access token from bytes that hold one. Raises ValueError."""
    if not re.fullmatch(TOKEN_FORM, token := data.decode("ascii").strip()):
        raise ValueError("16 to 256 printable characters are wanted; see keygen")
    return token


def read_token(path):
    """An access token. Raises Failure."""
    return load(path, parse_token, "an access token", True)


def read_reference(path):
    """Reference values, an object. Raises Failure."""
    return load(path, lambda d: mp.parse_message(d, REFERENCE), "a file of reference values")


def read_vocabulary(path):
    """The id -> bytes table that sealing left beside the sealed model. Raises Failure."""
    return load(path, mp.Vocabulary, "a vocabulary table (.vocab)")


def read_container(path):
    """The Container (header alone) of a sealed model. Raises Failure."""

    def parse(data):
        return mp.Container(data[mp.PREFIX : mp.PREFIX + mp.header_length(data[: mp.PREFIX])])

    return load(path, parse, "a sealed model (.mus)", limit=mp.PREFIX + mp.HEADER_LIMIT)


# ==== evidence

Check = collections.namedtuple("Check", "name expected got ok")


def verify_psk(secret, data, proof, reference):
    """Evidence for development: HMAC under a role's provisioning secret. Says who, not what."""
    if secret is None:
        raise Failure("evidence of kind psk needs the provisioning secret: --psk FILE")
    ok = secrets.compare_digest(mp.psk_proof(secret, data), proof)
    got = "that" if ok else "another: other secret, or a changed transcript"
    return [Check("proof", "HMAC of this session under our secret", got, ok)]


# Names as in the TCG's TPM 2.0 Library, Part 2: Structures. A proof is what TPM2_Quote gives, then
# the PCRs' values: TPM2B_ATTEST (10.12.13) with the size, then TPMS_ATTEST of magic, type,
# qualifiedSigner, extraData, clockInfo, firmwareVersion, pcrSelect, pcrDigest; TPMT_SIGNATURE
# (11.3.4). Our key, PCRs and report data leave each field one size; clock and version may be any.
PROOF = struct.Struct(f">2s4s2s36s34s25x10s34s6s256s{32 * len(mp.PCRS)}s")
DIGEST_INFO = bytes.fromhex("3031300d060960864801650304020105000420")  # RFC 8017, 9.2, note 1


def verify_tpm2(secret, data, proof, reference):
    """Evidence of a measured boot: a TPM 2.0's quote of the PCRs, signed by the reference's key.

    Firmware ends each of PCR 0 to 7 with a separator (TCG PC Client Platform Firmware Profile,
    3.3.4), so none of them is zero; 9 would hold an initrd or load options, and we take none.
    """
    if len(proof) != PROOF.size:
        return [Check("proof", f"{PROOF.size} bytes", f"{len(proof)} bytes", False)]
    size, magic, kind, signer, extra, pcrs, digest, scheme, signed, values = PROOF.unpack(proof)
    public, known = bytes.fromhex(reference.get("attestation_key", "")), reference.get("pcrs", {})
    qualified_name = tpm_name(mp.TPM_RH_ENDORSEMENT + tpm_name(public))  # of a primary key
    compared = {
        "attestation key": (mp.ATTESTATION_KEY + b"\1\0", public[:-256]),
        "size": (b"\0\x91", size),
        "magic": (b"\xffTCG", magic),  # TPM_GENERATED_VALUE: nothing else that it signs begins so
        "type": (b"\x80\x18", kind),  # TPM_ST_ATTEST_QUOTE
        "qualifiedSigner": (mp.tpm2b(qualified_name), signer),
        "extraData": (mp.tpm2b(data), extra),
        "pcrSelect": (mp.pcr_selection(*mp.PCRS), pcrs),
        "pcrDigest": (mp.tpm2b(hashlib.sha256(values).digest()), digest),
        "sigAlg": (struct.pack(">HHH", mp.TPM_ALG_RSASSA, mp.TPM_ALG_SHA256, 256), scheme),
    }
    checks = [Check(name, a.hex(), b.hex(), a == b) for name, (a, b) in compared.items()]
    ok = is_signed(int.from_bytes(public[-256:], "big"), proof[2:147], signed)
    got = "that" if ok else "another: of another key, or of a changed quote"
    checks.append(Check("signature", "the attestation key's", got, ok))
    pcrs = {str(pcr): values[32 * at :][:32].hex() for at, pcr in enumerate(mp.PCRS)}
    for pcr, value in pcrs.items():
        expected = known.get(pcr, "a reference value")
        checks.append(Check(f"PCR {pcr}", expected, value, value == expected))
    zeros = [pcr for pcr, value in pcrs.items() if value == "00" * 32]
    return [*checks, Check("PCRs at zero", "9", " ".join(zeros) or "none", zeros == ["9"])]


def tpm_name(data):
    """A Name by SHA-256, of a public area or of a parent and a name. (Part 1, 16; 34 bytes)"""
    return mp.TPM_ALG_SHA256.to_bytes(2, "big") + hashlib.sha256(data).digest()


def is_signed(modulus, message, signature):
    """Whether this is its RSASSA-PKCS1-v1_5 signature with SHA-256 and exponent 65537, 256 bytes.

    By encode and compare, so that no padding is ever parsed. (RFC 8017, 8.2.2)
    """
    encoded = b"\0\1" + (b"\0" + DIGEST_INFO + hashlib.sha256(message).digest()).rjust(254, b"\xff")
    value = int.from_bytes(signature, "big")
    return value < modulus and pow(value, 65537, modulus).to_bytes(256, "big") == encoded


# By kind: verify(secret or None, 32 bytes of report data, proof, reference values) -> [Check].
EVIDENCE = {"psk": verify_psk, "tpm2": verify_tpm2}


class Refusal(ProtocolError):
    """Evidence that does not match; `checks` has every check, those that failed among them."""

    def __init__(self, checks):
        self.checks = checks
        failed = (f"{c.name}: expected {c.expected}, got {c.got}" for c in checks if not c.ok)
        super().__init__("evidence_refused", "; ".join(failed))


def check_measurement(measurement, reference, model=None):
    """The checks of a MEASUREMENT against the reference values. [Check]

    model: digest (hexadecimal) of the sealed model that must be the enclave's, None for any.
    """
    expected, posture = reference["measurement"], measurement["posture"]
    got, sealed = measurement["measurement"], measurement["model"]
    model = model or reference.get("model")
    withdrawn = {got, expected} & set(reference["withdrawn"])
    level = posture["confinement"]
    return [
        Check("measurement", expected, got, got == expected),
        Check("withdrawn", "no", "yes" if withdrawn else "no", not withdrawn),
        Check("confinement", "full or seccomp", level, level != "none"),
        Check("debug", "no", "yes" if posture["debug"] else "no", not posture["debug"]),
        Check("model", model or "any", sealed, model in (None, sealed)),
    ]


def is_for_development(reference):
    """Whether this evidence leaves open what runs, so that no real key may be released for it."""
    return reference["kind"] == "psk" or reference["root"] in ("psk", "fixture")


# ==== the outer meter

CONNECT_SECONDS = 10
LEAST_BUFFER = 4 << 10  # bytes
LEAST_RATE = 64  # bytes a second


class Inlet:
    """The way in through the outer meter: one for all sessions of a process.

    rate: bytes a second; burst: bytes; received: bytes so far. Over any time T this process takes
    at most rate * T + burst from its enclave. `buffer` is what the kernel may hold besides, for
    each connection: an eighth of a second's worth, so that the enclave feels a slow meter.
    clock: has monotonic_ns() and sleep(seconds).
    """

    def __init__(self, rate=mp.DEFAULT_RATE, burst=mp.DEFAULT_BURST, clock=time):
        self.meter = mp.Meter(rate, burst, clock.monotonic_ns())
        self.buffer = min(max(rate // 8, LEAST_BUFFER), 1 << 20)
        self.received, self._clock, self._turn = 0, clock, threading.Lock()

    def receive(self, connection, size, seconds):
        """At most `size` bytes from a socket, b"" at the end, paid for before they are taken.

        They are looked at first, so that nothing is paid that is not there. Raises TimeoutError.
        """
        deadline = time.monotonic() + seconds
        if not is_readable(connection, seconds):
            raise TimeoutError("nothing came")
        if not self._turn.acquire(timeout=max(0, deadline - time.monotonic())):
            raise TimeoutError("the meter is busy")
        try:
            count = len(connection.recv(min(size, mp.CELL), socket.MSG_PEEK))
            while not self.meter.take(count, self._clock.monotonic_ns()):
                wait = self.meter.wait(count, self._clock.monotonic_ns()) / mp.NANOSECOND
                if time.monotonic() + wait > deadline:
                    raise TimeoutError("the meter gives too little")
                self._clock.sleep(wait)
            self.received += count
            return mp.read_exactly(connection, count)
        finally:
            self._turn.release()


class Link:
    """A connection to the enclave, or to a relay before it, that is read through an inlet."""

    def __init__(self, address, inlet, seconds=CONNECT_SECONDS):
        self.socket = connect(address, inlet.buffer, seconds)
        self.inlet, self.seconds = inlet, seconds

    def __getattr__(self, name):
        return getattr(self.socket, name)  # all but what follows is the socket's own

    def settimeout(self, seconds):
        """Seconds that each read may take from now on."""
        self.seconds = seconds

    def recv(self, size):
        """At most `size` bytes, b"" at the end. Raises TimeoutError."""
        return self.inlet.receive(self.socket, size, self.seconds)


def connect(address, buffer, seconds):
    """A TCP socket whose receive buffer is small from its first byte on. Raises OSError."""
    failure = None
    for family, kind, protocol, _, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(seconds)
            connection.connect(place)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


# ==== a session

HANDSHAKE_SECONDS = 60  # metered: many at once share the rate
RECORD_SECONDS = 120  # from a record's first byte to its last, at the least rate
LOAD_SECONDS = 3600  # between two tenths of the weights
ANSWER_SECONDS = 900  # until an answer's next record
DRAIN_SECONDS = 30  # until a cancelled answer's next record; for running ones before we end
POLL_SECONDS = 0.2  # between two looks at whether an answer is still wanted
ACCEPTED_SECONDS = 30  # that a token counts as accepted without a session in use


class Session:
    """A session with an enclave that has been verified; one request at a time, from one thread.

    address: (host, port). reference: reference values. psk: the role's secret, for that kind.
    excused: names of checks that may fail. wanted: options of check_measurement.
    checks: what was verified, against `reference`, at the time `verified`. measurement: step 1.
    ready: step 3, with what answers said since, the last time at `told`. final: an answer's last
    record. entry: the last exchange, as AuditLog has it. record: called before an exchange, and
    after it with its entry: AuditLog.write.
    close_key: 32 bytes, under which the enclave states what a lease that was sent here has spent.
    Raises Refusal when a check fails, else ProtocolError: connection_lost or timeout for a link
    that fails, the enclave's code for what it refuses.
    """

    def __init__(self, address, reference, psk=None, role="user", inlet=None, excused=(), **wanted):
        if reference["kind"] not in EVIDENCE:
            raise Failure(f"this muproxy can't verify evidence of kind {reference['kind']}")
        self.link = self.ready = self.final = None
        self.is_open, self.reference, self.verified = True, reference, time.time()
        self.record, self.entry = wanted.pop("record", lambda *_: None), {}
        with self._step():
            self.link = Link(address, inlet or Inlet())
            self._handshake(role, reference, psk, excused, wanted)

    def _handshake(self, role, reference, psk, excused, wanted):
        """Steps 0 and 1."""
        kind, share = reference["kind"], mp.KeyShare()
        challenge = {"version": mp.VERSION, "role": role, "evidence": kind}
        challenge |= {"nonce": secrets.token_hex(32), "share": share.public.hex()}
        challenge = mp.encode_json(challenge)
        self.link.sendall(mp.frame(challenge))
        answer = mp.read_frame(self.link, mp.HANDSHAKE_FRAME, HANDSHAKE_SECONDS)
        self.measurement = mp.parse_message(answer, mp.MEASUREMENT)
        transcript = mp.transcript_hash(challenge, answer)
        keys = mp.session_keys(share.agree(bytes.fromhex(self.measurement["share"])), transcript)
        proof = mp.read_frame(self.link, mp.HANDSHAKE_FRAME, HANDSHAKE_SECONDS)
        self.checks = EVIDENCE[kind](psk, mp.report_data(kind, transcript), proof, reference)
        self.checks += check_measurement(self.measurement, reference, **wanted)
        if not all(check.ok or check.name in excused for check in self.checks):
            raise Refusal(self.checks)
        self.close_key, self.sealer = keys["close"], mp.Sealer(keys["h2e"])
        self.opener = mp.Opener(keys["e2h"], mp.MESSAGE_LIMIT)

    def prove(self, token, on_progress=lambda _: None):
        """Steps 2 and 3: send UNLOCK or ACCESS, wait until the model can answer. Returns READY.

        on_progress: called with the tenths of the weights that are loaded.
        """
        self.ready = None
        self._send(token)
        while "progress" in (message := self._receive(LOAD_SECONDS, mp.PROGRESS, mp.READY)):
            on_progress(message["progress"])
        self.ready, self.told = message, time.monotonic()
        return message

    def read_log(self):
        """The event log of the boot, bytes, in place of step 2; the session ends with it."""
        if self.measurement["status"] != "locked":
            raise ProtocolError("evidence_unavailable", "it tells its log while it is locked")
        self._send({"log": True})
        return bytes.fromhex(self._receive(ANSWER_SECONDS, mp.LOGGED)["log"])

    def command(self, message):
        """An owner's status, lock or revoke, after `prove`. Returns READY, or CLOSED of a lease."""
        self._send(message)
        return self._receive(ANSWER_SECONDS, mp.READY, mp.CLOSED)

    def exchange(self, request, vocabulary, is_gone=lambda: False):
        """The ids of one answer as they come, in lists; `final` is its last record afterwards.

        request: GENERATE or GENERATE_CHAT, to which a seed is added, or SCORE. vocabulary: how the
        ids are packed. is_gone() is asked now and then whether nobody wants the rest. Close the
        iterator to cancel; the session is then ready for the next one.
        """
        request = {"seed": secrets.randbits(63)} | request
        if len(mp.encode_json(request)) > mp.REQUEST_FRAME - mp.RECORD_HEADER - mp.TAG:
            raise ProtocolError("prompt_too_long")
        self.record()
        self.final, self._is_cancelled, self._vocabulary = None, False, vocabulary
        self.entry = {"lease": self.ready["lease"], "request": request, "ids": []}
        self.entry |= {"ending": None, "heads": None}
        try:
            self._send(request)
            while self.final is None:
                if ids := self._take(ANSWER_SECONDS, is_gone):
                    yield ids
        except GeneratorExit:
            with contextlib.suppress(ProtocolError):  # which is the session's end
                self.cancel()
                while self.final is None:
                    self._take(DRAIN_SECONDS)
            raise
        finally:
            self.record(self.entry)

    def generate(self, request, vocabulary, stops=(), is_gone=lambda: False):
        """The pieces of one answer's text, as they come: an exchange, and its ids as text.

        stops: strings before which the text ends, here: the enclave knows of none.
        """
        if vocabulary.digest != self.ready["vocabulary"]:
            raise Failure("the vocabulary table is not that of the enclave's model: --vocabulary")
        cutter = mp.TextCutter(vocabulary, stops)
        with contextlib.closing(self.exchange(request, vocabulary, is_gone)) as lists:
            for ids in lists:
                piece = cutter.feed(ids)
                if cutter.stopped:
                    self.cancel()
                if piece:
                    yield piece
        if cutter.stopped:
            self.final["finish_reason"] = "stop"
        if piece := cutter.feed([], last=True):
            yield piece

    def _take(self, seconds, is_gone=lambda: False):
        """The ids in an answer's next record; none in its last one, which is `final` then."""
        message = self._receive(seconds, mp.FINAL, is_gone=is_gone)
        if isinstance(message, list):
            self.entry["ids"] += message
            return message
        self.ready |= {name: message[name] for name in ("budget_left", "restarts")}
        self.final, self.told = message, time.monotonic()
        self.entry |= {"ending": message["finish_reason"], "heads": message["heads"]}
        return []

    def cancel(self):
        """Have a running answer end now; its final record still comes."""
        if not self._is_cancelled:
            self._is_cancelled = True
            self._send({"cancel": True})

    def _send(self, message):
        with self._step():
            self.link.sendall(b"".join(self.sealer.seal_json(message)))

    def _receive(self, seconds, *schemas, is_gone=lambda: False):
        """The next message: an object; for FINAL also a list of ids.

        It must begin within so many seconds. Raises ProtocolError, for an ERROR with its code.
        """
        deadline, has_begun, message = time.monotonic() + seconds, False, None
        with self._step():
            while not has_begun:
                if time.monotonic() > deadline:
                    raise TimeoutError("no message came")
                if is_gone():
                    self.cancel()
                has_begun = is_readable(self.link.socket, POLL_SECONDS)
            while message is None:
                payload = mp.read_frame(self.link, mp.RESPONSE_FRAME, RECORD_SECONDS)
                message = self.opener.open(payload)
            if message[0] == mp.IDS_RECORD and mp.FINAL in schemas:
                return self._vocabulary.unpack(message[1])
            if message[0] != mp.JSON_RECORD:
                raise ProtocolError("bad_record", "ids where JSON was due")
            fields = mp.parse_message(message[1], *schemas, mp.ERROR)
        if "error" in fields:
            if self.ready is None or fields["error"] not in mp.CORRECTABLE:
                self.close()
            self.entry |= {"ending": fields["error"], "heads": fields.get("heads")}
            raise ProtocolError(fields["error"], limit=fields.get("limit"))
        return fields

    @contextlib.contextmanager
    def _step(self):
        """A step whose failure is the session's end; that of the link is told as ProtocolError."""
        try:
            if not self.is_open:
                raise EOFError("the session is over")
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, TimeoutError):
                raise ProtocolError("timeout") from None
            if isinstance(error, EOFError | OSError):
                detail = getattr(error, "strerror", None) or str(error)
                raise ProtocolError("connection_lost", detail) from None
            raise

    def is_usable(self):
        """Whether it can take a request: still open, and nothing came that nobody asked for."""
        return self.is_open and not is_readable(self.link.socket, 0)

    def close(self):
        """End the session. An answer that runs ends with it."""
        self.is_open = False
        if self.link is not None:
            self.link.close()


class AuditLog:
    """The file to which each exchange is added when it ends, a line of JSON, for a replay audit.

    {"lease": id, "request": GENERATE as it was sent, "ids": [those that came], "ending": the
    finish_reason or the error's code that the enclave told, null for a connection that was lost,
    "heads": of the enclave's chain before and after it, null if it told none}. What the disk does
    not take is kept, and no other exchange begins until it does. Raises Failure.
    """

    def __init__(self, path):
        self.path, self.lock = path, threading.Lock()
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_SYNC, 0o600)
        load(path, bytes, "an audit log", True, 0)  # it holds prompts and answers
        end = os.pread(self.file, 1, max(0, os.fstat(self.file).st_size - 1))
        self.rest = b"" if end in (b"", b"\n") else b"\n"  # after a line that a crash cut short

    def write(self, entry=None):
        """Have an entry on the disk, after those that it did not take before."""
        with self.lock:
            self.rest += b"" if entry is None else mp.encode_json(entry) + b"\n"
            try:
                while self.rest:
                    self.rest = self.rest[os.write(self.file, self.rest) :]
            except OSError as error:
                raise Failure(f"{self.path}: {error.strerror}: an exchange is not logged") from None


class Pool:
    """Verified sessions by the hash of their access token; the token itself is kept nowhere.

    connect(): a new Session, which is then proved with the token of whoever asks. limit: sessions
    at once; who asks beyond waits, then is refused as busy. seen: when any was last found well.
    facts: the last that an enclave told in READY or at an answer's end. newest: the session that
    was verified last. warned: lease and budget of the last warning. idle: (token hash, session),
    the last used at the end. accepted: by token hash, until when it counts as accepted.
    """

    def __init__(self, connect, limit=32, wait_seconds=10, on_progress=lambda _: None):
        self.connect, self.on_progress, self.wait_seconds = connect, on_progress, wait_seconds
        self.limit, self.count, self.idle, self.accepted = limit, 0, [], {}
        self.facts, self.told, self.seen = {}, float("-inf"), float("-inf")
        self.changed, self.newest, self.warned = threading.Condition(), None, None

    @contextlib.contextmanager
    def session(self, token):
        """A session that this token opens, ours alone until the block ends. ProtocolError."""
        owner = mp.token_hash(token)
        session = self._take(owner)
        try:
            if session is None:
                session = self.connect()
                session.prove({"token": token}, self.on_progress)
                self.newest = session
            self._note(session)
            self.accepted[owner] = float("inf")
            yield session
        finally:
            with self.changed:
                if session is not None and session.ready and session.is_usable():
                    self.idle.append((owner, session))
                    self._note(session)
                    self.accepted[owner] = self.seen + ACCEPTED_SECONDS
                else:
                    self._end(session)
                    self.accepted.pop(owner, None)
                self.changed.notify_all()

    def _note(self, session):
        self.seen = time.monotonic()
        if session.told >= self.told:
            self.facts, self.told = session.ready, session.told
            lease, budget, left = (self.facts[name] for name in ("lease", "budget", "budget_left"))
            if 10 * left < budget and self.warned != (lease, budget):
                self.warned = (lease, budget)
                say(f"warning: lease {lease}: {left:,} of {budget:,} bytes of egress are left")

    def accepts(self, token):
        """Whether the enclave is known to have accepted this token lately; it is not asked."""
        owner = mp.token_hash(token)
        with self.changed:
            lost = any(entry[0] == owner and not entry[1].is_usable() for entry in self.idle)
            return not lost and time.monotonic() < self.accepted.get(owner, 0)

    def _take(self, owner):
        """An idle session of this user, or None with a place for a new one. Raises busy."""
        deadline = time.monotonic() + self.wait_seconds
        with self.changed:
            while True:
                for entry in [entry for entry in self.idle if not entry[1].is_usable()]:
                    self.idle.remove(entry)
                    self._end(entry[1])
                found = [entry for entry in self.idle if entry[0] == owner]
                if found:
                    self.idle.remove(found[-1])
                    return found[-1][1]
                if self.count >= self.limit and self.idle:
                    self._end(self.idle.pop(0)[1])
                if self.count < self.limit:
                    self.count += 1
                    return None
                if not self.changed.wait(deadline - time.monotonic()):
                    raise ProtocolError("busy")

    def _end(self, session):
        self.count -= 1
        if session is not None:
            session.close()

    def close(self):
        """End the sessions, those in use once they are not, if that is soon."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.idle) == self.count, DRAIN_SECONDS)
            while self.idle:
                self._end(self.idle.pop()[1])


# ==== the HTTP API

# Until a request's head is whole, idle time on a kept connection included; until its body is; for
# the client to take what we send.
HEAD_SECONDS = BODY_SECONDS = WRITE_SECONDS = 30
LINGER_SECONDS = 2  # for a client to read our answer to a body that we did not
CONNECTIONS = 128  # at once, a thread each
BODY_FIELDS = {"content-length", "transfer-encoding"}  # of the head of a request with a body
HEALTH_SECONDS = 30  # between two handshakes for the health alone: they are metered as all are
RETRY_SECONDS = 5
COMPLETION_TOKENS = 16  # OpenAI's default where there are no messages
STATUSES = dict.fromkeys((*mp.REFUSALS, "policy_refused", "bad_message"), 400)
STATUSES |= {"token_refused": 401, "busy": 429, "timeout": 504}  # else 503
CODES = dict.fromkeys(("prompt_too_long", "too_many_tokens"), "context_length_exceeded")
CODES |= {"token_refused": "invalid_api_key", "busy": "rate_limit_exceeded"}  # as OpenAI has it
# What this model can't do, and the values that do not ask for it; then OpenAI's own bookkeeping.
UNSUPPORTED = """audio best_of echo frequency_penalty function_call functions logit_bias logprobs
    modalities n prediction presence_penalty reasoning_effort response_format
    suffix tool_choice tools top_logprobs verbosity web_search_options""".split()
NEUTRAL = (False, 0, 0.0, 1, "", "none", "auto", [], ["text"], {}, {"type": "text"})
IGNORED = """metadata parallel_tool_calls prompt_cache_key prompt_cache_retention
    safety_identifier service_tier store user""".split()
FLAG = mp.is_one_of(True, False)
STOPS = mp.is_list(mp.is_text(1, 256), 0, 16)
SAMPLING = {name.rstrip("?"): check for name, check in mp.SAMPLING.items()}
SAMPLING |= {"top_p": mp.is_number(0, 1), "seed": mp.is_integer(-(1 << 63), (1 << 63) - 1)}
TOKENS = mp.is_integer(1, 1 << 24)
FIELDS = SAMPLING | {"model": mp.is_text(1, 256), "stream": FLAG, "max_tokens": TOKENS}
FIELDS |= {"max_completion_tokens": TOKENS, "stop": lambda v: STOPS([v] if type(v) is str else v)}
FIELDS |= {"stream_options": mp.is_object({"include_usage?": FLAG, "include_obfuscation?": FLAG})}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
PATHS = dict.fromkeys(("/", "/console/state", "/v1/models", "/health", "/metrics"), "GET")
PATHS |= dict.fromkeys(("/v1/chat/completions", "/v1/completions"), "POST")
CONSOLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools", "console.html")
POLICY = "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'"
POLICY += "; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"


class HttpError(Exception):
    """An answer in OpenAI's error form."""

    def __init__(self, status, message, code=None, param=None):
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        kind = "rate_limit_error" if status == 429 else kind
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        super().__init__(message)


def http_error(error):
    """The HttpError for a ProtocolError; it shows the code's constant text alone."""
    limit = "" if error.limit is None else f" of {error.limit} tokens"
    code = CODES.get(error.code, error.code)
    return HttpError(STATUSES.get(error.code, 503), TEXTS[error.code] + limit, code)


def unsupported(name):
    """The HttpError for what this model can't do."""
    return HttpError(400, f"{name} is not supported", "unsupported_parameter", name)


def invalid(name, wanted):
    """The HttpError for a field's wrong value."""
    return HttpError(400, f"{name} must be {wanted}", "invalid_value", name)


def parse_request(body, is_chat):
    """(request for a session, stop strings, fields) from a request in OpenAI's form. HttpError."""
    fields = {name: value for name, value in body.items() if value is not None}
    source = "messages" if is_chat else "prompt"
    for name, value in fields.items():
        if name in UNSUPPORTED and not mp.is_one_of(*NEUTRAL)(value):
            raise unsupported(name)
        if not FIELDS.get(name, lambda _: True)(value):
            raise invalid(name, "of the documented type and range")
        if name not in (*UNSUPPORTED, *IGNORED, *FIELDS, source):
            raise HttpError(400, f"Unrecognized request argument supplied: {name[:64]}")
    for name in ("model", source):
        if name not in fields:
            text = f"Missing required parameter: '{name}'"
            raise HttpError(400, text, "missing_required_parameter", name)
    request = {name: fields[name] for name in SAMPLING if name in fields}
    if "top_p" in request:
        request["top_p"] = max(request["top_p"], 1e-6)
    if "seed" in request:
        request["seed"] &= (1 << 63) - 1
    limit = fields.get("max_completion_tokens", fields.get("max_tokens"))
    if limit or not is_chat:
        request["max_new_tokens"] = limit or COMPLETION_TOKENS
    if not is_chat and not isinstance(fields["prompt"], str):
        raise invalid("prompt", "one string: lists and token ids are not supported")
    request[source] = parse_messages(fields[source]) if is_chat else fields["prompt"]
    stops = fields.get("stop", [])
    return request, [stops] if isinstance(stops, str) else stops, fields


def parse_messages(messages):
    """CHAT messages from OpenAI's, whose content is text or a list of text parts. HttpError."""
    chat = []
    for number, message in enumerate(messages if isinstance(messages, list) else [None]):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise invalid(place, "an object")
        fields = {name: value for name, value in message.items() if value is not None}
        for name in fields.keys() - {"role", "content"}:
            raise unsupported(f"{place}.{name[:64]}")
        if not mp.is_one_of(*ROLES)(fields.get("role")):
            raise invalid(f"{place}.role", f"one of {', '.join(ROLES)}; tools are not supported")
        parts = fields.get("content")
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        for part in parts if isinstance(parts, list) else [None]:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise unsupported(f"{place}.content of type {kind[:64]}")
            if kind != "text" or not isinstance(part.get("text"), str):
                raise invalid(f"{place}.content", "text")
        text = "".join(part["text"] for part in parts)
        chat.append({"role": ROLES[fields["role"]], "content": text})
    return chat


class Answer:
    """The objects in OpenAI's form that one answer is made of."""

    def __init__(self, is_chat, is_stream, ready):
        # The role is told in a stream's first chunk.
        self.is_chat, self.is_stream, self.role = is_chat, is_stream, {"role": "assistant"}
        name = ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12)
        kind = "chat.completion" if is_chat else "text_completion"
        kind += ".chunk" if is_chat and is_stream else ""
        self.base = {"id": name, "object": kind, "created": int(time.time())}
        self.base |= {"model": ready["asset"], "system_fingerprint": "fp_" + ready["model"][:16]}

    def make(self, text, reason=None, **more):
        """One object: the whole answer, or a chunk of a stream."""
        choice = {"index": 0, "logprobs": None, "finish_reason": reason}
        if not self.is_chat:
            choice["text"] = text
        elif self.is_stream:
            choice["delta"] = {} if reason else self.role | {"content": text}
            self.role = {}
        else:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        return self.base | {"choices": [choice]} | more


def read_console():
    """(the console page, its head), ("", {}) where there is none. Raises Failure.

    Its style and script are named by their hashes. (W3C, Content Security Policy Level 3, 2.3.1)
    """
    if not os.path.exists(CONSOLE):
        return "", {}
    page, policy = load(CONSOLE, lambda data: data.decode("utf-8"), "a page"), POLICY
    for kind, text in re.findall(r"(?s)<(script|style)>(.*?)</\1>", page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        policy += f"; {kind}-src 'sha256-{digest}'"
    head = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return page, head | {"Cache-Control": "no-store"}


class Deadline(socket.SocketIO):
    """What a client sends; every read must be done by the time `until`, which is to be set."""

    def readinto(self, buffer):
        """Read what there is. Raises TimeoutError."""
        self._sock.settimeout(max(self.until - time.monotonic(), 1e-3))
        return super().readinto(buffer)


class BoundedServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A thread for each connection, never more than `places`; who comes then is cut off."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 128

    def __init__(self, address, handler, places):
        self.places = threading.BoundedSemaphore(places)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def verify_request(self, request, client_address):
        """Whether there is a place for this connection."""
        return self.places.acquire(blocking=False)

    def process_request_thread(self, request, client_address):
        """The thread of a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request, client_address):
        """A client that goes away in the middle of things is no news."""


class Server(BoundedServer):
    """The HTTP API over a pool of sessions. address: (host, port), port 0 for any."""

    def __init__(self, address, pool, inlet, vocabulary):
        self.pool, self.inlet, self.vocabulary = pool, inlet, vocabulary
        self.counts = collections.Counter(requests_running=0, requests_waiting=0)
        self.health = (float("-inf"), "")  # when it was asked for, and what it was
        # Of the counts; of the health, held while the enclave is asked.
        self.lock, self.health_lock = threading.Lock(), threading.Lock()
        self.page, self.page_head = read_console()
        super().__init__(address, Handler, CONNECTIONS)

    def count(self, name, value=1):
        """Add to one of the metrics."""
        with self.lock:
            self.counts[name] += value

    def ask_health(self):
        """The enclave's status, or why there is none; a handshake at most every HEALTH_SECONDS."""
        with self.health_lock:
            since = time.monotonic() - HEALTH_SECONDS
            if self.pool.seen > max(since, self.health[0]):
                return "ready"
            if self.health[0] < since:
                try:
                    with contextlib.closing(self.pool.connect()) as session:
                        status = session.measurement["status"]
                except ProtocolError as error:
                    status = "refused" if isinstance(error, Refusal) else "unreachable"
                self.health = (time.monotonic(), status)
            return self.health[1]

    def metrics(self):
        """The metrics as Prometheus' text format 0.0.4."""
        with self.lock:
            values = dict(self.counts)
        values |= {"egress_bytes_total": self.inlet.received, "sessions": self.pool.count}
        if facts := self.pool.facts:
            values |= {f"{name}_bytes": facts[name] for name in ("budget", "budget_left")}
            values["engine_restarts"] = facts["restarts"]
        lines = []
        for name, value in sorted(values.items()):
            family = name.partition("{")[0]
            kind = "counter" if family.endswith("_total") else "gauge"
            lines += [f"# TYPE muproxy_{family} {kind}", f"muproxy_{name} {value}"]
        return "\n".join(dict.fromkeys(lines)) + "\n"

    def state(self):
        """What the console page shows, an object, once a session was verified."""
        pool, meter, newest = self.pool, self.inlet.meter, self.pool.newest
        evidence = {name: newest.reference[name] for name in ("kind", "root")}
        evidence |= {"meaning": ROOTS[evidence["root"].partition(":")[0]]}
        evidence |= {"is_for_development": is_for_development(newest.reference)}
        evidence |= {"verified": newest.verified, "checks": [c._asdict() for c in newest.checks]}
        return {
            "time": time.time(),
            "evidence": evidence,
            "meter": {"rate": meter.rate, "burst": meter.burst, "received": self.inlet.received},
            "sessions": {"open": pool.count, "idle": len(pool.idle), "limit": pool.limit},
            "enclave": pool.facts,
        }


class Handler(http.server.BaseHTTPRequestHandler):
    """One client's connection."""

    protocol_version = "HTTP/1.1"

    def setup(self):
        """Read through deadlines instead of a plain file."""
        super().setup()
        self.rfile.close()
        self.deadline = Deadline(self.connection, "r")
        self.rfile = io.BufferedReader(self.deadline)

    def handle_one_request(self):
        """Read a request and answer it."""
        self.deadline.until = time.monotonic() + HEAD_SECONDS
        self.path, self.is_body_read, self.is_answered = "", False, False
        try:
            super().handle_one_request()
            if self.is_answered and not self.is_body_read:
                self.let_go()
        except OSError:  # the client has gone, or is too slow
            self.close_connection = True

    def let_go(self):
        """Take some of a body that nobody read: closing on it would take the answer back."""
        self.connection.shutdown(socket.SHUT_WR)
        self.deadline.until = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < self.deadline.until and self.rfile.read1(1 << 16):
            pass

    def version_string(self):
        """Our name in the Server field."""
        return "muproxy"

    def log_message(self, *_):
        """Nothing: paths and clients are not ours to keep. The metrics count them."""

    def send_error(self, code, message=None, explain=None):
        """Errors that http.server finds, in the form of all others."""
        self.fail(HttpError(405 if code == 501 else code, message or "bad request"))

    def answer(self):
        """Answer one request."""
        self.is_body_read = not BODY_FIELDS & {name.lower() for name in self.headers}
        try:
            self.route(self.path.partition("?")[0])
        except HttpError as error:
            self.fail(error)
        except ProtocolError as error:
            self.fail(http_error(error))
        except Failure as error:
            say(f"error: {error}")
            self.fail(HttpError(503, "the proxy can't do this: its operator is told why"))

    do_GET = do_POST = answer

    def route(self, path):
        """Find out what is asked for. Raises HttpError, ProtocolError."""
        method = PATHS.get(path)
        if method is None:
            raise HttpError(404, f"Invalid URL ({self.command} {path[:100]})")
        if self.command != method:
            raise HttpError(405, f"Not allowed to {self.command} on {path[:100]} (HINT: {method})")
        if path == "/health":
            status = self.server.ask_health()
            self.reply(200 if status == "ready" else 503, {"status": status})
        elif path == "/metrics":
            self.reply(200, self.server.metrics(), "text/plain; version=0.0.4")
        elif path == "/":
            self.show_console()
        elif path == "/console/state":
            self.show_state(self.read_token())
        elif method == "POST":
            self.complete(self.read_token(), path == "/v1/chat/completions")
        else:
            self.list_models(self.read_token())

    def read_token(self):
        """The access token that the client sent. Raises HttpError."""
        given = self.headers.get("Authorization", "")
        if not re.fullmatch(f"Bearer {TOKEN_FORM}", given):
            raise HttpError(401, "Authorization: Bearer needs an access token", "invalid_api_key")
        return given.removeprefix("Bearer ")

    def read_body(self):
        """The request's body, an object. Raises HttpError."""
        length = ",".join(self.headers.get_all("Content-Length", []))
        if "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]{1,18}", length):
            raise HttpError(411, "a Content-Length is needed, one")
        if int(length) > mp.REQUEST_FRAME:
            raise HttpError(413, f"the body is longer than {mp.REQUEST_FRAME} bytes")
        if self.headers.get_content_type() != "application/json":
            raise HttpError(415, "Content-Type must be application/json")
        self.deadline.until = time.monotonic() + BODY_SECONDS
        data = self.rfile.read(int(length))
        self.is_body_read = True
        try:
            return mp.parse_json(data)
        except ProtocolError as error:
            raise HttpError(400, f"the body is not JSON: {error.detail}", "invalid_json") from None

    def list_models(self, token):
        """The one model that there is."""
        with self.server.pool.session(token) as session:
            facts = {"id": session.ready["asset"], "object": "model", "owned_by": "muenclave"}
        self.reply(200, {"object": "list", "data": [facts | {"created": int(time.time())}]})

    def show_console(self):
        """The console page, which holds nothing that is not in its file."""
        if not self.server.page:
            raise HttpError(404, "the console page is tools/console.html of a checkout: not here")
        self.reply(200, self.server.page, "text/html; charset=utf-8", self.server.page_head)

    def show_state(self, token):
        """What the page shows, to who has a token that the enclave accepts."""
        if not self.server.pool.accepts(token):
            with self.server.pool.session(token):
                pass
        self.reply(200, self.server.state(), headers={"Cache-Control": "no-store"})

    def complete(self, token, is_chat):
        """Both kinds of completion, whole or as a stream."""
        request, stops, fields = parse_request(self.read_body(), is_chat)
        is_stream, server = fields.get("stream", False), self.server
        stack, running, waiting = (contextlib.ExitStack() for _ in range(3))
        with stack, running, waiting:
            for name, until in (("running", running), ("waiting", waiting)):
                server.count(f"requests_{name}")
                until.callback(server.count, f"requests_{name}", -1)
            session = stack.enter_context(server.pool.session(token))
            if fields["model"] != session.ready["asset"]:
                text = f"The model `{fields['model'][:100]}` does not exist here"
                raise HttpError(404, text, "model_not_found", "model")
            running.callback(self.count_tokens, session)
            pieces = session.generate(request, server.vocabulary, stops, self.is_gone)
            running.enter_context(contextlib.closing(pieces))
            first = next(pieces, "")
            waiting.close()
            answer = Answer(is_chat, is_stream, session.ready)
            if is_stream:
                return self.stream(answer, session, first, pieces, fields)
            text, final = first + "".join(pieces), session.final
            running.close()
            self.reply(200, answer.make(text, final["finish_reason"], usage=final["usage"]))

    def count_tokens(self, session):
        """Count an answer's tokens, also of one that was cancelled."""
        for kind in ("prompt", "completion") if session.final else ():
            name, value = f'tokens_total{{kind="{kind}"}}', session.final["usage"][f"{kind}_tokens"]
            self.server.count(name, value)

    def stream(self, answer, session, first, pieces, fields):
        """Server-sent events, to the end or until the client is gone."""
        usage = {"usage": None} if fields.get("stream_options", {}).get("include_usage") else {}
        self.close_connection = True
        self.start(200, "text/event-stream", {"Cache-Control": "no-cache"})
        for piece in itertools.chain([first], pieces):
            self.send_event(answer.make(piece, **usage))
        self.send_event(answer.make("", session.final["finish_reason"], **usage))
        if usage:
            self.send_event(answer.base | {"choices": [], "usage": session.final["usage"]})
        self.wfile.write(b"data: [DONE]\n\n")

    def send_event(self, value):
        """One event of a stream. Raises OSError when the client is gone."""
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def is_gone(self):
        """Whether the client has hung up."""
        with contextlib.suppress(OSError):
            return is_readable(self.connection, 0) and not self.connection.recv(1, socket.MSG_PEEK)
        return True

    def reply(self, status, value, kind="application/json", headers=None):
        """A whole response: text, or an object."""
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.start(status, kind, {"Content-Length": len(data)} | (headers or {}))
        self.wfile.write(data)

    def start(self, status, kind, headers):
        """Status and head of a response; one without a length ends with the connection."""
        path = self.path.partition("?")[0]
        path = path if path in PATHS else "other"
        self.server.count(f'requests_total{{path="{path}",code="{status}"}}')
        self.is_answered = True
        self.close_connection |= not self.is_body_read  # it would pass for the next request
        self.connection.settimeout(WRITE_SECONDS)
        self.send_response(status)
        headers |= {"Content-Type": kind, "X-Content-Type-Options": "nosniff"}
        headers |= {"Connection": "close"} if self.close_connection else {}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def fail(self, error):
        """Answer with an error; a stream that has begun ends with it instead."""
        if self.is_answered:
            return self.send_event(error.body)
        headers = {"Retry-After": RETRY_SECONDS} if error.status in (429, 503) else {}
        if error.status == 405:
            headers["Allow"] = PATHS.get(self.path.partition("?")[0], "GET, POST")
        self.reply(error.status, error.body, headers=headers)


# ==== relay

# Connections at once; seconds, longer than an enclave keeps an idle session.
RELAYED, RELAY_IDLE_SECONDS = 64, 1800


class Relay(BoundedServer):
    """A plain TCP relay to the enclave, what comes back metered; it sees ciphertext only."""

    def __init__(self, address, target, inlet):
        self.target, self.inlet = target, inlet
        super().__init__(address, None, RELAYED)

    def finish_request(self, request, client_address):
        """Relay one connection until the enclave ends it, or either side fails."""
        with contextlib.closing(Link(self.target, self.inlet)) as link:
            for connection in (link, link.socket, request):
                connection.settimeout(RELAY_IDLE_SECONDS)
            forward = threading.Thread(target=pump, args=(request, link.socket), daemon=True)
            forward.start()
            pump(link, request)
            for connection in (link, request):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            forward.join()


def pump(source, sink):
    """Pass bytes on until the source ends or either fails; then end the sink's side."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def run_relay(options):
    """`relay`: pass bytes, metered."""
    return serve(Relay(options.listen, (options.host, options.port), options.inlet), "relaying")


def run_serve(options):
    """`serve`: the HTTP API."""
    pool = Pool(connector(options), max(1, options.sessions))
    server = Server(options.listen, pool, options.inlet, options.vocabulary)
    if server.ask_health() == "refused":
        pool.connect()  # which says what does not match
    say(f"the enclave is {server.health[1]}")
    with contextlib.closing(pool):
        return serve(server, "serving the API")


def serve(server, what):
    """Serve until SIGINT or SIGTERM; warn of an address that others can reach."""
    host, port = server.server_address[:2]
    if host not in ("127.0.0.1", "::1"):
        tls = f"caddy reverse-proxy --from YOUR.HOST --to 127.0.0.1:{port}"
        say(f"warning: others can read what is sent here: put TLS in front, as with: {tls}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.closing(server.socket), contextlib.suppress(KeyboardInterrupt):
        say(f"{what} on {f'[{host}]' if ':' in host else host}:{port}")
        server.serve_forever()
    say("stopped")
    return DONE


# ==== chat

PROMPTS = {"prompts": mp.is_list(mp.is_text(0, 1 << 20), 0, 1 << 20)}
HELP = "/tokens N prompt: an answer of at most N tokens; /reset: forget the talk; quit: leave"


def say(text, program="muproxy"):
    """One line for the reader, on stderr; it may quote a peer that nobody has verified."""
    print(f"{program}:", tame(text.replace("\n", " ")), file=sys.stderr, flush=True)


def tame(text):
    """Text without the characters that a terminal obeys, but for tab and new line."""
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def dim(text):
    """A line beside the answer, on stderr; dim on a terminal."""
    text = f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text
    print(text, file=sys.stderr, flush=True)


def show_progress(tenths):
    """A bar on a terminal while the enclave loads its weights."""
    if sys.stderr.isatty():
        bar = f"\rloading weights [{'##' * tenths:-<20}] {tenths}0 %"
        print(bar, end="\n" if tenths == 10 else "", file=sys.stderr, flush=True)


def show_piece(text):
    """Print a piece of an answer, tame if to a terminal."""
    print(tame(text) if sys.stdout.isatty() else text, end="", flush=True)


@contextlib.contextmanager
def interruptible():
    """Ctrl-C sets a flag instead of tearing a record apart. Gives the function that reads it."""
    flag = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: flag.set())
    try:
        yield flag.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def ask(pool, token, options, turns, prompt, limit=None, show=lambda _: None):
    """One answer, shown piece by piece, then a status line: (text, final record). ProtocolError."""
    request = {name: getattr(options, name, None) for name in SAMPLING}
    request |= {"max_new_tokens": limit or options.max_tokens, "stop": options.stop}
    request = {name: value for name, value in request.items() if value is not None}
    checks = mp.OPTIONS | {"stop?": STOPS}
    for name, value in request.items():
        if not checks[f"{name}?"](value):
            raise Failure(f"{name.replace('_new', '')}: {value} is out of range")
    system = [{"role": "system", "content": options.system}] if options.system else []
    messages = [*system, *turns, {"role": "user", "content": prompt}]
    request |= {"prompt": prompt} if options.raw else {"messages": messages}
    parts, before, start = [], options.inlet.received, time.monotonic()
    with pool.session(token) as session, interruptible() as is_gone:
        stops = request.pop("stop", ())
        answer = session.generate(request, options.vocabulary, stops, is_gone)
        with contextlib.closing(answer) as pieces:
            for piece in pieces:
                parts.append(piece)
                show(piece)
    show("\n")
    final = session.final
    count, used = final["usage"]["completion_tokens"], options.inlet.received - before
    speed = count / (time.monotonic() - start)
    left, reason = final["budget_left"], final["finish_reason"]
    dim(f"[{reason}: {count} tokens, {speed:.1f} tok/s; egress {used:,} bytes, {left:,} left]")
    return "".join(parts), final


def chat_loop(pool, token, options):
    """Read prompts and answer them until the end of input. Returns the exit status."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing for input()
    is_terminal, status, turns = sys.stdin.isatty(), DONE, []
    if is_terminal:
        dim(HELP)
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            return status
        command = re.fullmatch(r"/tokens\s+([1-9][0-9]{0,6})\s+(.+)", line)
        limit, prompt = (int(command[1]), command[2]) if command else (None, line)
        if line == "quit":
            return status
        if line == "/reset":
            turns = []
        elif prompt.startswith("/"):
            dim(HELP)
        elif prompt:
            try:
                text, _ = ask(pool, token, options, turns, prompt, limit, show_piece)
                asked = {"role": "user", "content": prompt}
                turns = [*turns, asked, {"role": "assistant", "content": text}]
            except ProtocolError as error:
                status = status_of(error)
                say(f"error: {text_of(error)}")


def batch(pool, token, options):
    """Answer the prompts of a file; write JSON results, as far as they came. Exit status."""
    results, status, path = [], DONE, options.output_file
    with open(path, "w", encoding="utf-8") if path else contextlib.nullcontext(sys.stdout) as file:
        try:
            for number, prompt in enumerate(options.prompts_file, 1):
                try:
                    text, final = ask(pool, token, options, [], prompt)
                except ProtocolError as error:
                    results.append({"prompt": prompt, "error": error.code})
                    status = status_of(error)
                    say(f"error: prompt {number}: {text_of(error)}")
                    if error.code not in mp.CORRECTABLE:
                        break
                    continue
                facts = {name: final[name] for name in ("elapsed_ms", "finish_reason", "usage")}
                results.append({"prompt": prompt, "completion": text} | facts)
                if final["finish_reason"] == "cancelled":
                    raise KeyboardInterrupt
        finally:
            text = json.dumps(results, indent=1, ensure_ascii=not path)
            try:
                print(text, file=file, flush=True)
            except OSError:  # a full disk, perhaps: what was paid for is not lost
                print(text if path else "", flush=True)
                raise
    return status


def read_prompts(path):
    """Prompts of a file: a JSON list of strings, or one a line. Raises Failure."""

    def parse(data):
        if not data.lstrip().startswith(b"["):
            return [line for line in data.decode("utf-8").splitlines() if line.strip()]
        return mp.parse_message(b'{"prompts":%b}' % data, PROMPTS)["prompts"]

    return load(path, parse, "a file of prompts")


def run_chat(options):
    """`chat`: talk, or answer a file of prompts."""
    token = options.token_file[-1] if options.token_file else os.environ.get("MUENCLAVE_TOKEN", "")
    if not re.fullmatch(TOKEN_FORM, token):
        raise Failure("an access token is needed: --token-file FILE, or MUENCLAVE_TOKEN")
    pool = Pool(connector(options), 1, on_progress=show_progress)
    with contextlib.closing(pool):
        if options.prompts_file is not None:
            return batch(pool, token, options)
        with pool.session(token) as session:
            ready = session.ready
            dim(f"verified; model {ready['asset']}, {ready['budget_left']:,} bytes of egress left")
        return chat_loop(pool, token, options)


# ==== attest

# Checks that may fail and still leave a session with the TPM's guest, to ask it for its log.
EXPLAINED = ("measurement", "withdrawn", "model", "PCRs at zero", *(f"PCR {n}" for n in mp.PCRS))


def print_checks(checks, reference):
    """The root of the evidence, then every check."""
    print(f"root: {reference['root']} ({ROOTS[reference['root'].partition(':')[0]]})")
    for check in checks:
        facts = f"{check.name}: expected {check.expected}, got {check.got}"
        print("ok    " if check.ok else "FAILED", facts, flush=True)


def run_attest(options):
    """`attest`: verify, print the evidence and every check, and explain PCRs by the event log."""
    log, excused = None, EXPLAINED if options.log else ()
    try:
        with contextlib.closing(connector(options, excused=excused)()) as session:
            checks = session.checks
            log = session.read_log() if options.log else None
    except Refusal as error:
        checks = error.checks
    verified = all(check.ok for check in checks)
    facts = {"verified": verified, "checks": [check._asdict() for check in checks]}
    facts |= {name: options.reference[name] for name in ("root", "kind")}
    lines = [] if log is None else explain(log, options, facts)
    if options.json:
        print(json.dumps(facts | {"log": lines}, indent=1))
    else:
        print_checks(checks, options.reference)
        print(*lines, "verified" if verified else "refused", sep="\n")
    return DONE if verified else REFUSED


def explain(log, options, facts):
    """Write an event log to its file; what tools/eventlog.py says of the PCRs in it, by line."""
    with open(options.log, "wb") as file:
        file.write(log)
    tool = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools", "eventlog.py")
    if not os.path.exists(tool):
        return [f"{options.log}: tools/eventlog.py of a checkout explains it"]
    facts = json.dumps(facts | {"event_log": options.reference.get("event_log", "")})
    command = [sys.executable, "-B", tool, options.log, "--attested", "/dev/stdin"]
    done = subprocess.run(command, input=facts, capture_output=True, text=True)
    return (done.stdout + done.stderr).splitlines()


# ==== the command line


def address_of(text):
    """(host, port) of HOST:PORT, [HOST]:PORT or PORT, for argparse; port 0 for any."""
    host, _, port = text.rpartition(":")
    return host.strip("[]") or "127.0.0.1", int(port)


REACH = "host port rate-kb "
VERIFY = REACH + "reference expected-measurement psk model "
LOGGED = VERIFY + "vocabulary audit-log "
TALK = LOGGED + "token-file max-tokens temperature top-p top-k seed stop system raw "
VERBS = {  # verb: function, help, flags
    "chat": (run_chat, "talk to the model (the default)", TALK + "prompts-file output-file"),
    "serve": (run_serve, "OpenAI-compatible HTTP API", LOGGED + "listen sessions"),
    "relay": (run_relay, "plain metered TCP relay to the enclave", REACH + "listen"),
    "attest": (run_attest, "verify the enclave and print every check", VERIFY + "role json log"),
}
REPEATABLE = ("token-file", "stop")
CHOICES = {"role": ("user", "owner")}
FLAGS = {  # flag: type, default, help
    "host": (str, "127.0.0.1", "the enclave, or a relay before it"),
    "port": (int, 9000, "its port (9000)"),
    "rate-kb": (float, mp.DEFAULT_RATE / 1024, "outer meter: KB/s of all sessions together (5)"),
    "reference": (read_reference, None, "file of reference values"),
    "expected-measurement": (str, None, "a measurement instead of that file, for kind psk"),
    "psk": (read_secret, None, "file of the provisioning secret, for kind psk"),
    "model": (read_container, None, "sealed model that must be the enclave's"),
    "token-file": (read_token, None, "file of the access token (chat: or MUENCLAVE_TOKEN is set)"),
    "vocabulary": (read_vocabulary, None, "token table (.vocab) of the enclave's model"),
    "audit-log": (AuditLog, None, "file to add each exchange to, for the owner's replay audit"),
    "prompts-file": (read_prompts, None, "prompts, one a line, or a JSON list"),
    "output-file": (str, None, "where their answers go, as JSON (stdout)"),
    "system": (str, None, "system message"),
    "raw": (bool, False, "continue the prompt as it is, without the chat template"),
    "max-tokens": (int, None, "of an answer"),
    "temperature": (float, None, "0 for the likeliest token always"),
    "top-p": (float, None, "share of the likeliest tokens to draw from"),
    "top-k": (int, None, "number of the likeliest tokens to draw from"),
    "seed": (int, None, "makes an answer repeatable"),
    "stop": (str, None, "text before which an answer ends; repeatable"),
    "listen": (address_of, ("127.0.0.1", 8080), "HOST:PORT (127.0.0.1:8080)"),
    "sessions": (int, 32, "enclave sessions at once (32)"),
    "role": (str, "user", "whose secret --psk is: user or owner"),
    "json": (bool, False, "print JSON"),
    "log": (str, None, "where to write the boot's event log, which explains PCRs (kind tpm2)"),
}


def make_parser(program, about, verbs, flags, choices):
    """A command line, of tables like ours."""
    parser = argparse.ArgumentParser(prog=program, description=about.partition(":")[0])
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (run, text, names) in verbs.items():
        about = {"help": text, "description": text, "epilog": EPILOG}
        command = parsers.add_parser(verb, allow_abbrev=False, **about)
        command.set_defaults(run=run)
        for name in names.split():
            kind, default, about = flags.get(name, (str, None, None))
            action = "append" if name in REPEATABLE else "store"
            options = {"action": action, "type": kind, "choices": choices.get(name)}
            options = {"action": "store_true"} if kind is bool else options
            flag = f"--{name}" if name in flags else name
            command.add_argument(flag, default=default, help=about, **options)
    return parser


def status_of(error):
    """The exit status for a ProtocolError."""
    return UNREACHABLE if error.code in ("connection_lost", "timeout") else REFUSED


def connector(options, **wanted):
    """A function that opens and verifies a session, as the flags say."""
    is_owner = "key" in options or getattr(options, "log", None)
    role = "owner" if is_owner else getattr(options, "role", "user")
    wanted |= {"model": options.model.digest if options.model else None}
    if getattr(options, "audit_log", None):
        wanted |= {"record": options.audit_log.write}
    address = (options.host, options.port)
    return lambda: Session(address, options.reference, options.psk, role, options.inlet, **wanted)


def prepare(options):
    """Make the outer meter and the reference values that the flags ask for. Raises Failure."""
    if "rate_kb" in options:
        if not LEAST_RATE <= options.rate_kb * 1024 <= 1 << 40:
            raise Failure(f"--rate-kb: {LEAST_RATE / 1024} or more is wanted")
        options.inlet = Inlet(int(options.rate_kb * 1024))
    if "reference" in options:
        expected = options.expected_measurement
        values = {"version": 1, "kind": "psk", "root": "psk", "withdrawn": []}
        reference = options.reference or values | {"measurement": expected}
        if expected not in (None, reference["measurement"]):
            raise Failure("--expected-measurement is not that of --reference")
        if not mp.is_hex(32)(reference["measurement"]):
            raise Failure("nothing to verify against: --reference or --expected-measurement")
        options.reference = reference
    if "vocabulary" in options and options.vocabulary is None:
        raise Failure("--vocabulary FILE: the token table (.vocab) of the model is needed")


def main(argv=None):
    """`python -m muproxy`. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in (*VERBS, "-h", "--help"):
        arguments.insert(0, "chat")
    return run_command(make_parser("muproxy", __doc__, VERBS, FLAGS, CHOICES), arguments)


def run_command(parser, arguments):
    """Run what a command line says; a failure is told in one line. Returns the exit status."""
    sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal can't show
    program = parser.prog
    try:
        options = parser.parse_args(arguments)
        prepare(options)
        return options.run(options)
    except Failure as error:
        say(f"error: {error}", program)
        return error.status
    except ProtocolError as error:
        say(f"error: {options.host}:{options.port}: {text_of(error)}", program)
        return status_of(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains later
        return REFUSED
    except (OSError, OverflowError, UnicodeError) as error:  # of an address, or a file to write
        name = f"{error.filename}: " if getattr(error, "filename", None) else ""
        say(f"error: {name}{getattr(error, 'strerror', None) or error}", program)
        return USAGE
    except KeyboardInterrupt:
        say("interrupted", program)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
