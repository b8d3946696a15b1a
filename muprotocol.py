"""What both sides of a muenclave session share: frames, strict JSON, keys, records, the sealed
container, token ids and the meter. Pure: it opens no socket and no file, and every clock that it
reads can be given by the caller.

The asset is the model's weights and with them the 32-byte weights key. This module is in the
trusted base of both sides: it parses what an attacker sends, before and after the handshake.

    step            direction   payload of the frame
    0 challenge     H -> E      CHALLENGE as JSON, in clear
    1 measurement   E -> H      MEASUREMENT as JSON, then the proof (raw evidence), in clear
    2 token         H -> E      record: UNLOCK or LOG (role owner) or ACCESS (role user)
    3 ready         E -> H      records: PROGRESS while weights load, then READY, LOGGED or ERROR
    4 request       H -> E      record: GENERATE, or CANCEL while an answer runs; owner: OWNER
    5 response      E -> H      records of packed ids, then FINAL or ERROR

A frame is a 4-byte big-endian length and that many bytes. A record is a frame whose payload is
AES-256-GCM under a key for each direction, its nonce a counter, its additional data the length.
"""

import codecs
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import select
import struct
import time

VERSION = 1
HANDSHAKE_FRAME = 4 << 10  # both ways until the token is accepted
REQUEST_FRAME = 1 << 20  # from the host afterwards
RESPONSE_FRAME = 64 << 10  # from the enclave afterwards
MESSAGE_LIMIT = 8 << 20  # of a message that spans several records
CELL = 480  # bytes on the wire of every record from the enclave
FRAME_HEADER = 4
RECORD_HEADER = 5  # type octet, 4-byte length of what is left of the message
TAG = 16
CELL_ROOM = CELL - FRAME_HEADER - RECORD_HEADER - TAG
JSON_RECORD = 0
IDS_RECORD = 1
JSON_DEPTH = 16
EVIDENCE_KINDS = ("psk", "tpm2", "tsm")
DEFAULT_RATE = 5120  # bytes a second
DEFAULT_BURST = 32 << 10  # bytes

# Everything an enclave or a verifier may answer a peer's mistake with: a code, and nothing else.
ERRORS = """
bad_frame bad_json bad_message bad_record bad_share timeout connection_lost version_unsupported
evidence_refused evidence_unavailable locked token_refused wrong_key wrong_model lease_refused
lease_ended container_corrupt model_invalid no_engine out_of_memory engine_lost prompt_invalid
prompt_too_long too_many_tokens policy_refused busy
""".split()


class ProtocolError(Exception):
    """A peer, a file or a request broke a rule. `code` is one of ERRORS.

    `detail` is for the local reader only and never crosses the wire; `limit` may.
    """

    def __init__(self, code, detail="", limit=None):
        self.code = code
        self.detail = detail
        self.limit = limit
        super().__init__(f"{code}: {detail}" if detail else code)


# ---------------------------------------------------------------- strict JSON


def encode_json(value):
    """Canonical JSON: sorted keys, no white space, ASCII. bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def parse_json(data):
    """Parse bytes that must be one JSON object in UTF-8, without any of JSON's loose ends.

    Refuses duplicate keys, NaN, Infinity and overflowing numbers, lone surrogates, a byte order
    mark and nesting deeper than JSON_DEPTH. Raises ProtocolError("bad_json").
    """
    try:
        value = json.loads(
            bytes(data).decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_float=_finite_float,
            parse_constant=_finite_float,  # NaN and Infinity, which are not
        )
    except (ValueError, RecursionError) as error:
        raise ProtocolError("bad_json", str(error)[:80]) from None
    if not isinstance(value, dict):
        raise ProtocolError("bad_json", "not an object")
    _check_tree(value, 1)
    return value


def _unique_keys(pairs):
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _finite_float(text):
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("number out of range")
    return number


def _check_tree(value, depth):
    if isinstance(value, str):
        if not _is_unicode(value):
            raise ProtocolError("bad_json", "lone surrogate")
    elif isinstance(value, dict | list):
        if depth > JSON_DEPTH:
            raise ProtocolError("bad_json", "nested too deeply")
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_tree(item, depth + 1)


def _is_unicode(text):
    return not re.search("[\ud800-\udfff]", text)


# ---------------------------------------------------------------- schemas
# A schema maps a field's name to a predicate; a name that ends in "?" is optional.


def is_integer(low, high):
    """A predicate: an int (not a bool) within [low, high]."""
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def is_number(low, high):
    """A predicate: an int or float (not a bool) within [low, high]."""
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high


def is_text(low, high):
    """A predicate: a str of low to high characters."""
    return lambda v: isinstance(v, str) and low <= len(v) <= high


def is_hex(size):
    """A predicate: exactly `size` bytes in lower-case hexadecimal."""
    pattern = re.compile(rf"[0-9a-f]{{{2 * size}}}")
    return lambda v: isinstance(v, str) and pattern.fullmatch(v) is not None


def is_one_of(*choices):
    """A predicate: one of these values, of the same type."""
    return lambda v: any(type(v) is type(c) and v == c for c in choices)


def is_list(item, low, high):
    """A predicate: a list of low to high elements, each of which satisfies `item`."""
    return lambda v: isinstance(v, list) and low <= len(v) <= high and all(map(item, v))


def is_object(schema):
    """A predicate: an object that satisfies the schema."""
    return lambda v: isinstance(v, dict) and not _violations(v, schema)


def is_name(v):
    """True for a plain file or asset name: no path parts, no leading dot, 1 to 128 characters."""
    return isinstance(v, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", v) is not None


def _violations(value, schema):
    fields = {name.rstrip("?"): check for name, check in schema.items()}
    needed = {name for name in schema if not name.endswith("?")}
    wrong = [name for name, v in value.items() if name not in fields or not fields[name](v)]
    return sorted(wrong) + sorted(needed - value.keys())


def parse_message(data, *schemas):
    """Parse JSON that must satisfy one of the schemas; return the object.

    Raises ProtocolError: bad_json, bad_message (the detail names the offending fields).
    """
    value = parse_json(data)
    for schema in schemas:
        if not _violations(value, schema):
            return value
    best = min((_violations(value, schema) for schema in schemas), key=len)
    raise ProtocolError("bad_message", "fields: " + ", ".join(name[:40] for name in best[:8]))


COUNT = is_integer(0, 1 << 53)
SHAPE = is_one_of("plain", "constant")  # constant: an open answer sends a cell every tick
POLICY = {"verified": is_one_of(True, False), "latency_ms": is_integer(0, 10_000), "shape": SHAPE}
LEASE = {
    "id": is_hex(16),
    "sequence": is_integer(1, 1 << 53),
    "rate": is_integer(64, 1 << 40),  # bytes a second
    "burst": is_integer(16 << 10, 1 << 40),  # bytes
    "budget": is_integer(1, 1 << 50),  # bytes an engine may choose
    "expiry": is_integer(1, 10 * 366 * 86400),  # seconds from acceptance
    "users": is_list(is_hex(32), 0, 32),  # SHA-256 of access tokens
    "policy": is_object(POLICY),
}


def is_share(value):
    """Whether it is a key share that can be agreed with (NIST SP 800-56A, 5.6.2.3.1)."""
    return is_hex(SHARE_SIZE)(value) and 1 < int(value, 16) < PRIME - 1


CHALLENGE = {
    "version": is_integer(0, 1 << 31),
    "role": is_one_of("owner", "user"),
    "nonce": is_hex(32),
    "share": is_share,
    "evidence": is_one_of(*EVIDENCE_KINDS),
}
POSTURE = {"confinement": is_one_of("full", "seccomp", "none"), "debug": is_one_of(True, False)}
MEASUREMENT = {
    "measurement": is_hex(32),
    "nonce": is_hex(32),
    "share": is_hex(384),
    "model": is_hex(32),
    "status": is_one_of("locked", "loading", "ready"),
    "posture": is_object(POSTURE),
}
UNLOCK = {"key": is_hex(32), "model": is_hex(32), "lease?": is_object(LEASE)}
ACCESS = {"token": is_text(16, 256)}
PROGRESS = {"status": is_one_of("loading"), "progress": is_integer(0, 10)}
READY = {
    "status": is_one_of("locked", "ready"),
    "lease": lambda v: v == "" or is_hex(16)(v),
    "sequence": COUNT,
    "budget": COUNT,  # bytes granted since the enclave was locked
    "budget_left": COUNT,
    "head": is_hex(32),  # of the chain of exchanges
    "restarts": COUNT,
    "model": is_hex(32),
    "asset": is_name,
    "vocabulary": is_hex(32),  # SHA-256 of the id -> bytes table
    "context": COUNT,  # tokens
}
HEADS = is_list(is_hex(32), 2, 2)  # of the chain of exchanges, before and after this one
ERROR = {"error": is_one_of(*ERRORS), "limit?": COUNT, "heads?": HEADS}
CHAT = {"role": is_one_of("system", "user", "assistant"), "content": is_text(0, 1 << 20)}
SAMPLING = {
    "temperature?": is_number(0, 10),
    "top_p?": is_number(1e-6, 1),
    "top_k?": is_integer(0, 1 << 20),
    "repetition_penalty?": is_number(0.1, 10),
    "seed?": is_integer(0, (1 << 63) - 1),
}
OPTIONS = SAMPLING | {
    "max_new_tokens?": is_integer(1, 1 << 24),
    "date?": is_text(1, 64),  # what a chat template may print, since it gets no clock
}
GENERATE = OPTIONS | {"prompt": is_text(0, 1 << 20)}
GENERATE_CHAT = OPTIONS | {"messages": is_list(is_object(CHAT), 1, 1024)}
NEUTRAL = {"top_p": 1, "top_k": 0, "repetition_penalty": 1}  # all that a verified lease allows
LOG = {"log": is_one_of(True)}  # in place of UNLOCK; answered by LOGGED, and the session ends
LOGGED = {"log": lambda v: isinstance(v, str) and re.fullmatch("([0-9a-f]{2})*", v) is not None}
CANCEL = {"cancel": is_one_of(True)}
OWNER = ({"status": is_one_of(True)}, {"lock": is_one_of(True)}, {"revoke": is_hex(32)})
# An answer's ids, to be judged by an owner's own enclave. For each, and for the answer's end, it
# sends two of CODES: by how much another token had the better score, and how many tokens scored
# within the tolerance of the best.
SCORED = {"ids": is_list(is_integer(0, 1 << 24), 0, 1 << 18), "tolerance": is_number(0, 1e6)}
SCORING = {"score": is_object(SCORED)}
SCORE = (GENERATE | SCORING, GENERATE_CHAT | SCORING)
REQUESTS = {"user": (GENERATE, GENERATE_CHAT, CANCEL), "owner": (*OWNER, *SCORE, CANCEL)}
CLOSING = {"lease": is_hex(16), "spent": COUNT, "head": is_hex(32), "mac": is_hex(32)}
CLOSED = {"closing": is_object(CLOSING)}  # the answer to an owner's lock
USAGE = {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT}
FINAL = {
    "elapsed_ms": COUNT,
    "finish_reason": is_one_of("stop", "length", "cancelled"),
    "usage": is_object(USAGE),
    "budget_left": COUNT,
    "restarts": COUNT,
    "heads": HEADS,
}


# ---------------------------------------------------------------- frames


def frame(payload):
    """A frame around the payload: 4-byte big-endian length, then the bytes."""
    return len(payload).to_bytes(FRAME_HEADER, "big") + payload


def read_frame(connection, limit, seconds=None, clock=time.monotonic):
    """The payload of the next frame from a socket, whole within so many seconds.

    Raises ProtocolError("bad_frame") over the limit, EOFError at the end, TimeoutError.
    """
    deadline = None if seconds is None else clock() + seconds
    length = int.from_bytes(read_exactly(connection, FRAME_HEADER, deadline, clock), "big")
    if length > limit:
        raise ProtocolError("bad_frame", f"{length} bytes, limit {limit}")
    return read_exactly(connection, length, deadline, clock)


def read_exactly(connection, size, deadline=None, clock=time.monotonic):
    """`size` bytes from a socket. Raises EOFError, or TimeoutError when the deadline has passed."""
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            connection.settimeout(max(deadline - clock(), 1e-6))
        block = connection.recv(min(size - len(data), 1 << 20))
        if not block:
            raise EOFError("the connection ended")
        data += block
    return bytes(data)


GONE = getattr(select, "POLLRDHUP", 0)  # the peer has closed; the connection was shut down


def is_readable(connection, seconds, events=select.POLLIN):
    """Whether there is something to read, or the end, within so many seconds (None: at last)."""
    poll = select.poll()
    poll.register(connection, events)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


# ---------------------------------------------------------------- keys


def ffdhe3072():
    """The prime of RFC 7919: 2^3072 - 2^3008 + (floor(2^2942 e) + 2625351) 2^64 - 1."""
    e, term, count = 0, 1 << 3072, 0
    while term:  # e is the sum of 1 / count!, here with 130 bits more than are kept
        e += term
        count += 1
        term //= count
    return 2**3072 - 2**3008 + ((e >> 130) + 2625351) * 2**64 - 1


PRIME = ffdhe3072()  # its generator is 2
SHARE_SIZE = 384
EXPONENT_BITS = 275  # RFC 7919, section 5.2: at least 2 x the 125-bit strength, with margin


class KeyShare:
    """One side's ephemeral ffdhe3072 key; `public` is 384 bytes. It agrees on one secret only."""

    def __init__(self):
        self._exponent = secrets.randbits(EXPONENT_BITS) | 1 << (EXPONENT_BITS - 1)
        self.public = pow(2, self._exponent, PRIME).to_bytes(SHARE_SIZE, "big")

    def agree(self, peer):
        """The shared secret Z as 384 bytes. Raises ProtocolError("bad_share")."""
        value = int.from_bytes(peer, "big")
        if len(peer) != SHARE_SIZE or not 1 < value < PRIME - 1:
            raise ProtocolError("bad_share")
        exponent, self._exponent = self._exponent, None
        return pow(value, exponent, PRIME).to_bytes(SHARE_SIZE, "big")


def hkdf(secret, salt, info):
    """HKDF-SHA256 (RFC 5869): extract, then expand to one block. 32 bytes."""
    extracted = hmac.digest(salt, secret, "sha256")
    return hmac.digest(extracted, info + b"\1", "sha256")


def transcript_hash(challenge, measurement):
    """SHA-256 over the two clear frames, given their payloads. 32 bytes."""
    return hashlib.sha256(frame(challenge) + frame(measurement)).digest()


def session_keys(secret, transcript):
    """Keys of a session by name, 32 bytes each: h2e, e2h and close."""
    names = ("h2e", "e2h", "close")
    return {name: hkdf(secret, transcript, f"muenclave v1 {name}".encode()) for name in names}


def report_data(kind, transcript):
    """What evidence of this kind must bind: 32 bytes that no other kind or transcript shares."""
    label = b"muenclave evidence v1" + kind.encode("ascii") + b"\0"
    return hashlib.sha256(label + transcript).digest()


def closing(key, lease, spent, head):
    """CLOSING: a lease's id, the bytes spent since the enclave was locked, the chain's head.

    mac: HMAC-SHA256 of these as JSON under `close` of the handshake that brought the lease.
    """
    facts = {"lease": lease, "spent": spent, "head": head.hex()}
    return facts | {"mac": hmac.digest(key, encode_json(facts), "sha256").hex()}


def chain(head, lease, request, ids, ending):
    """The head of the chain of exchanges after one more: 32 bytes, SHA-256 of head and exchange.

    request: GENERATE with its seed. ids: a list. ending: a finish_reason, or an error's code.
    """
    exchange = {"lease": lease, "request": request, "ids": ids, "ending": ending}
    return hashlib.sha256(head + encode_json(exchange)).digest()


def psk_proof(secret, data):
    """Evidence of kind psk: HMAC-SHA256 of the report data under a role's provisioning secret."""
    return hmac.digest(secret, data, "sha256")


def parse_secret(text):
    """A 32-byte secret from 64 hexadecimal characters. Raises ValueError."""
    if not is_hex(32)(text.strip()):
        raise ValueError("64 hexadecimal characters are wanted")
    return bytes.fromhex(text)


def token_hash(token):
    """What a lease holds of an access token: SHA-256 of its UTF-8, in hexadecimal."""
    return hashlib.sha256(token.encode("utf-8")).hexdigest()


def manifest_digest(manifest):
    """The measurement: SHA-256 of a canonical manifest (a JSON object), in hexadecimal."""
    return hashlib.sha256(encode_json(manifest)).hexdigest()


# ---------------------------------------------------------------- evidence of kind tpm2
# The TCG's TPM 2.0 Library (version 1.59): structures as in its Part 2, commands as in its Part 3,
# big-endian. TPM2B_: a 2-byte size, then so many bytes.

TPM_ALG_RSA, TPM_ALG_SHA256, TPM_ALG_NULL, TPM_ALG_RSASSA = 0x0001, 0x000B, 0x0010, 0x0014  # 6.3
TPM_CC_CREATE_PRIMARY, TPM_CC_QUOTE, TPM_CC_FLUSH, TPM_CC_PCR_READ = 0x131, 0x158, 0x165, 0x17E
TPM_ST_NO_SESSIONS, TPM_ST_SESSIONS = 0x8001, 0x8002  # 6.9
TPM_RH_ENDORSEMENT = bytes.fromhex("4000000b")  # 7.4
EMPTY_PASSWORD = struct.pack(">IHBH", 0x40000009, 0, 0, 0)  # TPM_RS_PW in a TPMS_AUTH_COMMAND
TPM_BUFFER = 4096  # bytes: the longest response
PCRS = (0, 1, 2, 3, 4, 5, 6, 7, 9)  # 0-7: firmware and what it boots; 9: what was put beside that
# TPMA_OBJECT (8.3): fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA (it has no
# password that a lockout could protect), restricted, sign.
SIGNING_KEY = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 10 | 1 << 16 | 1 << 18
# The attestation key's TPMT_PUBLIC (12.2.4) up to its modulus: RSA, its Name by SHA-256, no policy,
# then TPMS_RSA_PARMS: no symmetric cipher, RSASSA with SHA-256, 2048 bits, exponent 0 for 65537.
ATTESTATION_KEY = struct.pack(">HHIH", TPM_ALG_RSA, TPM_ALG_SHA256, SIGNING_KEY, 0)
ATTESTATION_KEY += struct.pack(">HHHHI", TPM_ALG_NULL, TPM_ALG_RSASSA, TPM_ALG_SHA256, 2048, 0)


def tpm2b(data):
    """A TPM2B_ structure around the data."""
    return len(data).to_bytes(2, "big") + data


def pcr_selection(*pcrs):
    """TPML_PCR_SELECTION (10.9.7) of these PCRs, of the SHA-256 bank alone. 10 bytes."""
    bits = sum(1 << pcr for pcr in pcrs)
    return struct.pack(">IHB", 1, TPM_ALG_SHA256, 3) + bits.to_bytes(3, "little")


def tpm_command(code, handles=b"", parameters=b"", authorization=b""):
    """A command, ready to write to a TPM. (Part 1, 18)"""
    area = len(authorization).to_bytes(4, "big") + authorization if authorization else b""
    tag = TPM_ST_SESSIONS if authorization else TPM_ST_NO_SESSIONS
    body = handles + area + parameters
    return struct.pack(">HII", tag, 10 + len(body), code) + body


def tpm_response(data):
    """What follows the header of a response; None until all of it has come.

    Raises OSError for another response code than success, and for what is no response at all.
    """
    size = int.from_bytes(data[2:6], "big")
    if len(data) < max(10, min(size, TPM_BUFFER)):
        return None
    if len(data) != size or any(data[6:10]):
        raise OSError(f"the TPM answers {data[:10].hex()}")
    return data[10:]


def tpm_ask(device, command, seconds=None):
    """What follows the header of a TPM's response to a command. device: a descriptor.

    seconds: how long it may say nothing. Raises OSError as tpm_response does, and at the end.
    """
    os.write(device, command)
    response = b""
    while (body := tpm_response(response)) is None:
        block = os.read(device, TPM_BUFFER) if is_readable(device, seconds) else b""
        if not block:
            raise OSError("the TPM does not answer")
        response += block
    return body


def tpm_create_primary(public):
    """TPM2_CreatePrimary in the endorsement hierarchy: always the same key, from the TPM's seed.

    public: TPMT_PUBLIC, its unique part included. tpm_created reads the response.
    """
    sensitive, outside_info, creation_pcr = struct.pack(">HHH", 4, 0, 0), bytes(2), bytes(4)
    parameters = sensitive + tpm2b(public) + outside_info + creation_pcr
    return tpm_command(TPM_CC_CREATE_PRIMARY, TPM_RH_ENDORSEMENT, parameters, EMPTY_PASSWORD)


def tpm_created(body):
    """(handle of 4 bytes, TPMT_PUBLIC) from the response to TPM2_CreatePrimary."""
    return body[:4], body[10 : 10 + int.from_bytes(body[8:10], "big")]


def tpm_quote(key, data):
    """TPM2_Quote of PCRS by a key's handle and its own scheme; data: what it is to bind."""
    parameters = tpm2b(data) + TPM_ALG_NULL.to_bytes(2, "big") + pcr_selection(*PCRS)
    return tpm_command(TPM_CC_QUOTE, key, parameters, EMPTY_PASSWORD)


# ---------------------------------------------------------------- records


def aead(key):
    """AES-256-GCM from `cryptography`, the only thing that muenclave takes from it."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


class Sealer:
    """Seals messages into records for one direction; the nonce counts records and never repeats."""

    def __init__(self, key, cell=None):
        self._aead = aead(key)
        self._cell = cell
        self._count = 0

    def seal(self, kind, body):
        """The frames of a message, ready to send: one, or as many cells as it fills."""
        room = CELL_ROOM if self._cell else len(body)
        frames = [self._record(kind, body, room)]
        while len(body) > room:
            body = body[room:]
            frames.append(self._record(kind, body, room))
        return frames

    def seal_json(self, value):
        """The frames of a JSON message."""
        return self.seal(JSON_RECORD, encode_json(value))

    def _record(self, kind, body, room):
        plain = bytes([kind]) + len(body).to_bytes(4, "big") + body[:room].ljust(room, b"\0")
        nonce = self._count.to_bytes(12, "big")
        self._count += 1
        header = (len(plain) + TAG).to_bytes(FRAME_HEADER, "big")
        return header + self._aead.encrypt(nonce, plain, header)


class Opener:
    """Opens the records of one direction and joins those that make one message."""

    def __init__(self, key, limit):
        self._aead = aead(key)
        self._limit = limit
        self._count = 0
        self._kind = None
        self._left = 0
        self._parts = []

    def open(self, payload):
        """(kind, body) once a message is whole, else None. Raises ProtocolError("bad_record")."""
        plain = self._decrypt(payload)
        kind = plain[0]
        left = int.from_bytes(plain[1:RECORD_HEADER], "big")
        body = plain[RECORD_HEADER : RECORD_HEADER + left]
        first = not self._parts
        if kind not in (JSON_RECORD, IDS_RECORD) or (first and left > self._limit):
            raise ProtocolError("bad_record", "unknown type or too long")
        if not first and (kind != self._kind or left != self._left):
            raise ProtocolError("bad_record", "continuation does not fit")
        if any(plain[RECORD_HEADER + left :]):
            raise ProtocolError("bad_record", "padding is not zero")
        if left > len(body) and not body:
            raise ProtocolError("bad_record", "empty continuation")
        self._parts.append(body)
        self._kind, self._left = kind, left - len(body)
        if self._left:
            return None
        message = b"".join(self._parts)
        self._parts = []
        return kind, message

    def _decrypt(self, payload):
        from cryptography.exceptions import InvalidTag

        nonce = self._count.to_bytes(12, "big")
        self._count += 1
        if len(payload) < RECORD_HEADER + TAG:
            raise ProtocolError("bad_record", "too short")
        try:
            header = len(payload).to_bytes(FRAME_HEADER, "big")
            return self._aead.decrypt(nonce, payload, header)
        except InvalidTag:
            raise ProtocolError("bad_record", "authentication failed") from None


def warm_up():
    """Import and run now what Python would look for on disk later, when a filter forbids that."""
    frames = Sealer(bytes(32), CELL).seal_json({"text": "\u00e9"})
    Opener(bytes(32), CELL).open(frames[0][FRAME_HEADER:])
    parse_json('{"\u00e9":1.5}'.encode())


# ---------------------------------------------------------------- the sealed container (.mus)
# magic, 4-byte header length, canonical-JSON header, chunks of ciphertext and tag, zeros to 4096.
# Chunks follow STREAM (Hoang, Reyhanitabar, Rogaway, Vizar 2015): the nonce is the index and a
# flag on the last one, so none can be dropped, moved or added.

MAGIC = b"MUSEALv1"
PREFIX = len(MAGIC) + 4
HEADER_LIMIT = 1 << 17  # its table of files goes to the engine as one message
CHUNK_SIZE = 1 << 20
ALIGNMENT = 4096
VOCABULARY_FILE = "vocabulary.bin"
FILE_ENTRY = {"path": is_name, "offset": COUNT, "size": COUNT}
HEADER = {
    "version": is_one_of(1),
    "asset": is_name,
    "model_type": is_name,  # names the transformers class, which is imported before confinement
    "chunk_size": is_integer(4096, 1 << 26),
    "chunks": is_integer(1, 1 << 40),
    "length": is_integer(1, 1 << 50),
    "salt": is_hex(32),
    "commitment": is_hex(32),
    "vocabulary": is_hex(32),
    "files": is_list(is_object(FILE_ENTRY), 1, 4096),
}


def header_length(prefix):
    """Length of a container's header, from its first PREFIX bytes. Raises container_corrupt."""
    length = int.from_bytes(prefix[len(MAGIC) : PREFIX], "big")
    if len(prefix) < PREFIX or prefix[: len(MAGIC)] != MAGIC or not 2 <= length <= HEADER_LIMIT:
        raise ProtocolError("container_corrupt", "not a sealed model (.mus)")
    return length


def read_header(path):
    """The unparsed header of the sealed model; of a file that ends within it, another model's.

    Raises OSError, ProtocolError.
    """
    with open(path, "rb") as file:
        return file.read(header_length(file.read(PREFIX)))


class Container:
    """A sealed container's header, parsed and checked; `header` is its exact bytes.

    digest: SHA-256 of the header, the model's digest. files: name -> (offset, size) in plaintext.
    """

    def __init__(self, header):
        try:
            fields = parse_message(header, HEADER)
        except ProtocolError as error:
            raise ProtocolError("container_corrupt", error.detail) from None
        if encode_json(fields) != header:
            raise ProtocolError("container_corrupt", "header is not canonical")
        self.header = header
        self.digest = hashlib.sha256(header).hexdigest()
        self.fields = fields
        self.length = fields["length"]
        self.chunk_size = fields["chunk_size"]
        self.chunks = fields["chunks"]
        self.files = {f["path"]: (f["offset"], f["size"]) for f in fields["files"]}
        if not self._is_consistent():
            raise ProtocolError("container_corrupt", "header contradicts itself")

    def _is_consistent(self):
        end = 0
        for entry in self.fields["files"]:
            if entry["offset"] < end:
                return False
            end = entry["offset"] + entry["size"]
        whole = self.chunks == -(-self.length // self.chunk_size)
        unique = len(self.files) == len(self.fields["files"])
        return whole and unique and end <= self.length

    def is_key(self, weights_key):
        """Whether this weights key sealed the container; AES-GCM alone does not commit to a key."""
        expected = bytes.fromhex(self.fields["commitment"])
        return hmac.compare_digest(key_commitment(weights_key, self.fields["salt"]), expected)

    def chunk_key(self, weights_key):
        """The 32-byte key of the chunks; bound to the whole header through its digest."""
        info = b"mus v1" + bytes.fromhex(self.digest)
        return hkdf(weights_key, bytes.fromhex(self.fields["salt"]), info)

    def chunk(self, index):
        """Of chunk `index`: (offset in the file, plaintext offset, plaintext size, nonce)."""
        start = index * self.chunk_size
        size = min(self.chunk_size, self.length - start)
        offset = PREFIX + len(self.header) + index * (self.chunk_size + TAG)
        return offset, start, size, chunk_nonce(index, index == self.chunks - 1)

    def sealed_size(self):
        """Bytes of the container, its zeros at the end included."""
        end = PREFIX + len(self.header) + self.length + self.chunks * TAG
        return -(-end // ALIGNMENT) * ALIGNMENT


def chunk_nonce(index, is_last):
    """12 bytes: the chunk's index and a flag octet on the last chunk."""
    return index.to_bytes(11, "big") + bytes([is_last])


def key_commitment(weights_key, salt):
    """32 bytes that only this weights key gives with this salt (hexadecimal)."""
    return hkdf(weights_key, bytes.fromhex(salt), b"mus v1 key commitment")


# ---------------------------------------------------------------- token ids and text


class Vocabulary:
    """The public table id -> bytes. Form: 4-byte count, then for each id 2-byte length and bytes.

    bits: how many bits an id takes on the wire, ceil(log2 count) and at least 8, so that the
    number of ids follows from the number of bytes. room: ids in a cell. digest: SHA-256 of it.
    """

    def __init__(self, data):
        self.digest = hashlib.sha256(data).hexdigest()
        count = int.from_bytes(data[:4], "big")
        self.table = []
        at = 4
        while at + 2 <= len(data) and len(self.table) < count:
            end = at + 2 + int.from_bytes(data[at : at + 2], "big")
            self.table.append(bytes(data[at + 2 : end]))
            at = end
        if at != len(data) or len(self.table) != count or not 2 <= count <= 1 << 24:
            raise ProtocolError("model_invalid", "the vocabulary table is malformed")
        self.bits = id_bits(count)
        self.room = CELL_ROOM * 8 // self.bits

    def __len__(self):
        return len(self.table)

    def cost(self, count):
        """The bits that an engine has chosen with a cell of so many ids: these, and how many."""
        return 8 * -(-count * self.bits // 8) + self.room.bit_length()

    def pack(self, ids):
        """Ids as bytes: `bits` bits each, big-endian, zero bits at the end."""
        value = 0
        for token in ids:
            value = value << self.bits | token
        size = -(-len(ids) * self.bits // 8)
        return (value << (size * 8 - len(ids) * self.bits)).to_bytes(size, "big")

    def unpack(self, data):
        """The ids in packed bytes. Raises ProtocolError("bad_record") if not exactly `pack`'s."""
        count = len(data) * 8 // self.bits
        value = int.from_bytes(data, "big") >> (len(data) * 8 - count * self.bits)
        mask = (1 << self.bits) - 1
        ids = [value >> self.bits * (count - 1 - i) & mask for i in range(count)]
        if any(token >= len(self) for token in ids) or self.pack(ids) != data:
            raise ProtocolError("bad_record", "packed ids are not canonical")
        return ids


def id_bits(count):
    """Bits of an id below `count`: ceil(log2 count), at least 8."""
    return max(8, (count - 1).bit_length())


def encode_vocabulary(table):
    """The byte form of a list of token byte strings; the inverse of Vocabulary(...).table."""
    entries = (len(item).to_bytes(2, "big") + item for item in table)
    return len(table).to_bytes(4, "big") + b"".join(entries)


CODES = Vocabulary(encode_vocabulary([b""] * 256))  # what SCORE is answered with, 8 bits each


class TextCutter:
    """Turns ids into text at character boundaries and ends it before a stop string.

    Of several the one that is complete first counts, so that it does not matter how ids arrive.
    """

    def __init__(self, vocabulary, stops=()):
        self._table = vocabulary.table
        self._stops = list(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def feed(self, ids, last=False):
        """Text that is now certain. After a stop string, or `last`, nothing more comes."""
        if self.stopped:
            return ""
        data = b"".join(self._table[token] for token in ids)
        text = self._held + self._decoder.decode(data, last)
        ends = [(text.find(s) + len(s), text.find(s)) for s in self._stops if s in text]
        if ends:
            self.stopped = True
            return text[: min(ends)[1]]
        keep = 0 if last else self._possible_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_stop(self, text):
        """Length of the longest end of `text` that a stop string could begin with."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0


# ---------------------------------------------------------------- sampling and its scores


def gumbel_quantiles():
    """Quantiles of the Gumbel distribution, times 2^18, as integers: [lower tail, upper tail].

    Entry n of 2,176 is that of probability 2^(n // 64 - 34) (1 + (n mod 64) / 64), from its end.
    """
    chances = [2.0 ** (n // 64 - 34) * (1 + n % 64 / 64) for n in range(34 * 64)]
    tails = ([-math.log(p) for p in chances], [-math.log1p(-p) for p in chances])
    return [[round(-math.log(x) * 2**18) for x in tail] for tail in tails]


def margin_code(margin):
    """A margin of scores in eighths of an octave, 1 to 255: 128 for 1.0; 0 for none at all."""
    return int(min(max(8 * math.log2(margin) + 128, 1), 255)) if margin else 0


# ---------------------------------------------------------------- the engine's pipe
# All that an engine can say, 8 bytes each: kind, slot, value. The gate answers in framed JSON.

PIPE = struct.Struct("=BxHI")
ID, END, LENGTH, REFUSED, LOADED, FAILED = range(1, 7)
ENDINGS = ("stop", "length", "cancelled")
REFUSALS = ("prompt_invalid", "prompt_too_long", "too_many_tokens")
# After these a session goes on: the request was wrong, or its moment.
CORRECTABLE = (*REFUSALS, "bad_json", "bad_message", "policy_refused", "busy", "engine_lost")
FAILURES = ("model_invalid", "no_engine", "out_of_memory")


def failure(error):
    """The number in FAILURES of what an engine was ended by; torch has an error of its own."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"}:
        return 2
    return int(not names.isdisjoint({"ImportError", "OSError"}))


ENDING_BITS = 32  # of an ending, refusal or failure that an engine chooses, and of its moment
LENGTH_BITS = 32  # of a number that the engine reports


# ---------------------------------------------------------------- the meter

NANOSECOND = 1_000_000_000


class Meter:
    """A token bucket in integers: over any time T at most rate * T + burst bytes are taken.

    rate: bytes a second. burst: bytes. now: a monotonic clock's nanoseconds, from the caller. It
    starts empty, so that a restart earns nothing, and a clock that steps back earns nothing.
    """

    def __init__(self, rate, burst, now):
        self.rate = rate
        self.burst = burst
        self._credit = 0  # in bytes times nanoseconds: exact for every rate
        self._last = now

    def _refill(self, now):
        elapsed = max(0, now - self._last)
        self._last = max(now, self._last)
        self._credit = min(self.burst * NANOSECOND, self._credit + elapsed * self.rate)

    def take(self, count, now):
        """Take `count` bytes if there is credit for all of them; say whether it was taken."""
        self._refill(now)
        if count * NANOSECOND > self._credit:
            return False
        self._credit -= count * NANOSECOND
        return True

    def wait(self, count, now):
        """Nanoseconds until `count` bytes (at most a burst) can be taken."""
        self._refill(now)
        missing = min(count, self.burst) * NANOSECOND - self._credit
        return max(0, -(-missing // self.rate))

    def change(self, rate, burst, now):
        """Other limits from now on; credit is kept up to the new burst, never added."""
        self._refill(now)
        self.rate, self.burst = rate, burst
        self._credit = min(self._credit, burst * NANOSECOND)


class Account:
    """The leases of one unlocked enclave: who may use it, how much may still leave, and what left.

    bits: what an engine may still choose, of those granted. head: of the chain of exchanges. Every
    method raises ProtocolError, and then has changed nothing. A later lease adds its bytes and
    replaces the rest.
    """

    def __init__(self):
        self.lease, self.head = None, bytes(32)
        self.bits = self.granted = 0
        self.expires = math.inf  # ns
        self._seen, self._key = set(), None

    def add(self, lease, now, key):
        """Take a lease. lease_refused: its id was seen, or its sequence is not higher.

        key: what its closing statement is to be authenticated with, 32 bytes.
        """
        is_old = self.lease is not None and lease["sequence"] <= self.lease["sequence"]
        if lease["id"] in self._seen or is_old:
            raise ProtocolError("lease_refused")
        self._seen.add(lease["id"])
        self.lease, self._key = lease, key
        added = min(8 * lease["budget"], (8 << 53) - self.granted)  # READY can say no more
        self.bits += added
        self.granted += added
        self.expires = now + lease["expiry"] * NANOSECOND

    def user(self, token):
        """The hash of an access token that the lease names. locked, token_refused."""
        if self.lease is None:
            raise ProtocolError("locked")
        given = token_hash(token)
        if not any([hmac.compare_digest(given, user) for user in self.lease["users"]]):
            raise ProtocolError("token_refused")
        return given

    def admit(self, request):
        """The request as the engine gets it. policy_refused: a verified answer has a seed, and of
        the sampling only its temperature is the user's.
        """
        if not self.lease["policy"]["verified"]:
            return request
        if NEUTRAL.keys() & request.keys() or "seed" not in request:
            raise ProtocolError("policy_refused")
        return request | NEUTRAL

    def charge(self, bits):
        """Take bits before what they pay for leaves. lease_ended: there are not so many left."""
        if bits > self.bits:
            raise ProtocolError("lease_ended")
        self.bits -= bits

    def chain(self, lease, request, ids, ending):
        """Add an exchange (see `chain`); the heads before and after it, in hexadecimal."""
        before, self.head = self.head, chain(self.head, lease, request, ids, ending)
        return [before.hex(), self.head.hex()]

    def facts(self):
        """What READY says of the leases."""
        lease = self.lease or {"id": "", "sequence": 0}
        facts = {"lease": lease["id"], "sequence": lease["sequence"], "head": self.head.hex()}
        return facts | {"budget": self.granted // 8, "budget_left": self.bits // 8}

    def close(self):
        """The statement that ends the leases, with the chain's head; None if there was none."""
        if self.lease is None:
            return None
        spent = -(-(self.granted - self.bits) // 8)
        return closing(self._key, self.lease["id"], spent, self.head)

    def revoke(self, user):
        """Strike a user's hash from the lease."""
        if self.lease is not None:
            users = [other for other in self.lease["users"] if other != user]
            self.lease = self.lease | {"users": users}
