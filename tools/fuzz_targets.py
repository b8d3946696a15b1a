"""The parsers that the fuzzer calls one by one, each beside its double in fuzz_oracle.py.

A target makes bytes from a seeded random.Random and checks any bytes: what the product's parser
does with them has to be what the protocol says, and no other exception may come than it promises.
Each takes bytes that nobody trusts: from a peer, a disk, firmware, a TPM, an engine, or, on the
proxy's side, from a hostile enclave.
"""

import collections
import contextlib
import hashlib
import json
import socket
import struct
import types

import eventlog  # with it the product's modules can be found
import fuzz_messages as messages
import fuzz_oracle as oracle

import muenclave as me
import muprotocol as mp
import muproxy

Finding = collections.namedtuple("Finding", "verdict text")
Target = collections.namedtuple("Target", "make check about")
VERDICTS = {
    "crash": "an exception that nobody promised, or the process died",
    "hang": "a deadline passed: a peer was not answered, or not cut off",
    "growth": "memory, sessions, threads or descriptors that were not given back",
    "reply": "a reply that is not in the protocol",
    "accepted": "something was taken that the protocol has to refuse",
    "refused": "something was refused that the protocol allows, or with another code",
}
KEY = bytes(range(32))
SCHEMAS = {  # target: (schemas of muprotocol, forms of the oracle)
    "challenge": ((mp.CHALLENGE,), ("challenge",)),
    "measurement": ((mp.MEASUREMENT,), ("measurement",)),
    "owner-token": ((mp.UNLOCK, mp.LOG), ("unlock", "log")),
    "user-token": ((mp.ACCESS,), ("access",)),
    "request": ((mp.GENERATE, mp.GENERATE_CHAT, mp.CANCEL), ("generate", "chat", "cancel")),
    "command": (
        (*mp.OWNER, *mp.SCORE, mp.CANCEL),
        ("status", "lock", "revoke", "score", "score_chat", "cancel"),
    ),
    "progress": ((mp.PROGRESS, mp.READY, mp.ERROR), ("progress", "ready", "error")),
    "final": ((mp.FINAL, mp.ERROR), ("final", "error")),
    "logged": ((mp.LOGGED, mp.ERROR), ("logged", "error")),
}


def compared(real, ideal, data):
    """A Finding if two outcomes differ: ("ok", value) or ("refused", code)."""
    if repr(real) == repr(ideal):
        return None
    verdict = "refused" if real[0] == "refused" else "accepted"
    return Finding(verdict, f"{real} where {ideal} was due, for {data[:120]!r}"[:600])


def outcome(function, *arguments, promised=(mp.ProtocolError,), **options):
    """("ok", value) or ("refused", code) of a call; ("crash", Finding) for what it must not do."""
    try:
        return "ok", function(*arguments, **options)
    except promised as error:
        return "refused", getattr(error, "code", type(error).__name__)
    except oracle.Refused as error:
        return "refused", error.code
    except Exception as error:  # noqa: BLE001  that is what is looked for
        return "crash", Finding("crash", f"{function.__qualname__}: {error!r}"[:600])


def check_both(real, ideal, data):
    """Compare two outcomes; a crash is a Finding of its own."""
    return real[1] if real[0] == "crash" else compared(real, ideal, data)


# ---------------------------------------------------------------- JSON and messages


def check_json(data):
    """mp.parse_json."""
    return check_both(outcome(mp.parse_json, data), outcome(oracle.parse_json, data), data)


def check_schema(name, data):
    """mp.parse_message with a step's schemas."""
    schemas, forms = SCHEMAS[name]
    ideal = outcome(lambda: oracle.parse(data, *forms)[1])
    return check_both(outcome(mp.parse_message, data, *schemas), ideal, data)


def make_json(chance):
    """Any JSON, or what is nearly that."""
    tree = messages.Pairs([["a", messages.anything(chance)], ["b", messages.anything(chance)]])
    return messages.message(chance, "status", tree, 0.8)


def schema_target(name):
    """A Target for a step's schemas."""
    forms = SCHEMAS[name][1]
    return Target(
        lambda chance: messages.message(chance, chance.choice(forms)),
        lambda data: check_schema(name, data),
        f"parse_message: {' or '.join(forms)}",
    )


# ---------------------------------------------------------------- frames
# Data: the limit's number, seconds, then for each piece that comes its delay, its size, its bytes.

LIMITS = (64, 4096, 1 << 20)
LATE = 0.05  # seconds, so that no piece comes just at the deadline


class Wire:
    """A socket whose pieces come at moments of a clock that only it moves."""

    def __init__(self, data):
        self.pieces, self.now, self.timeout = [], 0.0, None
        at, delay = 2, 0
        while at + 2 <= len(data):
            delay, piece = delay + data[at], data[at + 2 : at + 2 + data[at + 1]]
            at += 2 + data[at + 1]
            if piece:
                self.pieces.append([delay / 10, piece])
                delay = 0

    def settimeout(self, seconds):
        self.timeout = seconds

    def recv(self, size):
        if not self.pieces:
            return b""
        delay, piece = self.pieces[0]
        if self.timeout is not None and delay > self.timeout:
            self.pieces[0][0] -= self.timeout
            self.now += self.timeout
            raise TimeoutError("timed out")
        self.now += delay
        self.pieces[0] = [0, piece[size:]]
        if not piece[size:]:
            self.pieces.pop(0)
        return piece[:size]


def check_frame(data):
    """mp.read_frame from a socket that is as slow as the data says."""
    data = data.ljust(2, b"\0")
    limit, seconds = LIMITS[data[0] % len(LIMITS)], data[1] / 10 + LATE
    wire = Wire(data)
    errors = (mp.ProtocolError, EOFError, TimeoutError)
    real = outcome(mp.read_frame, wire, limit, seconds, lambda: wire.now, promised=errors)
    found = check_both(real, ideal_frame(Wire(data).pieces, limit, seconds), data)
    if found and wire.now > seconds:
        return Finding("hang", f"a frame was waited for {wire.now:.2f} s, deadline {seconds:.2f} s")
    return found


def ideal_frame(pieces, limit, seconds):
    """What has to come of pieces [(delay, bytes)]."""
    moment, stream, length = 0.0, b"", None
    for delay, piece in pieces:
        moment += delay
        if moment > seconds:
            return "refused", "TimeoutError"
        stream += piece
        if len(stream) >= 4 and length is None:
            (length,) = struct.unpack(">I", stream[:4])
            if length > limit:
                return "refused", "bad_frame"
        if length is not None and len(stream) >= 4 + length:
            return "ok", stream[4 : 4 + length]
    return "refused", "EOFError"


def make_frame(chance):
    """A frame in pieces, at leisure; its length may lie."""
    which = chance.randrange(len(LIMITS))
    limit, size = LIMITS[which], chance.choice((0, 1, 5, 63, 64, 65, 300))
    body = chance.randbytes(size)
    length = chance.choice((size, size, size, size + 1, limit, limit + 1, 0, 1 << 31, 0xFFFFFFFF))
    stream, data = struct.pack(">I", length) + body, bytearray((which, chance.randrange(60)))
    while stream:
        piece = stream[: chance.choice((1, 2, 3, 4, 50, 255))]
        stream = stream[len(piece) :]
        data += bytes((chance.choice((0, 0, 0, 0, 1, 9, 40)), len(piece))) + piece
    return bytes(data)


# ---------------------------------------------------------------- records
# Data: for each record an octet that says how it is made, 2 octets of size, its plaintext.

FAIR, AGAIN, SKIPPED, BARE, FLIPPED, OTHER_WAY = range(6)
MESSAGE = 3000  # bytes: limit of a message


def payloads(data):
    """The records' payloads, as an attacker (or whoever has the key) sends them."""
    at, count = 0, 0
    while at + 3 <= len(data):
        way, size = data[at] % 6, int.from_bytes(data[at + 1 : at + 3], "big")
        plain = data[at + 3 : at + 3 + size]
        at += 3 + size
        number = {AGAIN: max(0, count - 1), SKIPPED: count + 1}.get(way, count)
        sealed = oracle.seal(KEY[::-1] if way == OTHER_WAY else KEY, number, plain)[4:]
        if way == FLIPPED:
            spot = (plain[0] if plain else 0) % len(sealed)
            sealed = sealed[:spot] + bytes([sealed[spot] ^ 1 << size % 8]) + sealed[spot + 1 :]
        yield plain if way == BARE else sealed
        count += 1


def opened(opener, data):
    """[message or None] of the records, up to the one that is refused."""
    told = []
    for payload in payloads(data):
        result = outcome(opener.open, payload)
        told.append(result)
        if result[0] != "ok":
            break
    return told


def check_records(data):
    """mp.Opener."""
    real, ideal = opened(mp.Opener(KEY, MESSAGE), data), opened(oracle.Records(KEY, MESSAGE), data)
    crash = [result[1] for result in real if result[0] == "crash"]
    if crash:
        return crash[0]
    is_longer = len(real) > len(ideal) or real[-1:] and real[-1][0] == "ok"
    if real == ideal:
        return None
    verdict = "accepted" if is_longer else "refused"
    return Finding(verdict, f"{real[-1]} where {ideal[-1]} was due, at record {len(ideal)}"[:600])


def make_records(chance):
    """Some good messages of one record or several, and something that is none."""
    data = bytearray()
    for _ in range(chance.choice((1, 1, 2, 3))):
        kind, body = chance.randrange(2), chance.randbytes(chance.choice((0, 1, 9, 40)))
        cut = chance.choice((len(body), len(body), 1, 7))
        while True:
            plain = oracle.plain_message(body[:cut], kind, len(body), bytes(chance.choice((0, 3))))
            if chance.random() < 0.15:
                plain = wrong_plain(chance, kind, body)
            way = FAIR if chance.random() < 0.85 else chance.randrange(6)
            data += bytes([way]) + len(plain).to_bytes(2, "big") + plain
            body = body[cut:]
            if not body:
                break
    return bytes(data)


def wrong_plain(chance, kind, body):
    """The plaintext of a record of a wrong form."""
    size = len(body)
    return chance.choice(
        (
            oracle.plain_message(body, 2),
            oracle.plain_message(body, 255),
            oracle.plain_message(body, kind, size, b"\0\1"),
            oracle.plain_message(body, kind, size, b"\1"),
            oracle.plain_message(body, kind, max(0, size - 1)),
            oracle.plain_message(body, kind, size + 1),
            oracle.plain_message(b"", kind, size + 1, bytes(9)),
            oracle.plain_message(body, kind, MESSAGE),
            oracle.plain_message(body, kind, MESSAGE + 1),
            oracle.plain_message(body, kind, 0xFFFFFFFF),
            oracle.plain_message(body, 1 - kind),
            b"",
            b"\0",
            b"\0\0\0\0",
        )
    )


# ---------------------------------------------------------------- container, vocabulary, ids, text


def check_prefix(data):
    """mp.header_length."""

    def ideal():
        if len(data) < 12 or data[:8] != b"MUSEALv1":
            raise oracle.Refused("container_corrupt")
        (length,) = struct.unpack_from(">I", data, 8)
        if not 2 <= length <= 1 << 17:
            raise oracle.Refused("container_corrupt")
        return length

    return check_both(outcome(mp.header_length, data[:12]), outcome(ideal), data)


def check_container(data):
    """mp.Container: canonical JSON whose numbers agree."""

    def ideal():
        try:
            _, fields = oracle.parse(data, "header")
        except oracle.Refused:
            raise oracle.Refused("container_corrupt") from None
        end, names = 0, set()
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        is_good = text.encode() == data
        for entry in fields["files"]:
            is_good = is_good and entry["offset"] >= end and entry["path"] not in names
            end = entry["offset"] + entry["size"]
            names.add(entry["path"])
        needed = (fields["length"] + fields["chunk_size"] - 1) // fields["chunk_size"]
        if not is_good or end > fields["length"] or fields["chunks"] != needed:
            raise oracle.Refused("container_corrupt")
        return hashlib.sha256(data).hexdigest()

    real = outcome(lambda: mp.Container(data).digest)
    return check_both(real, outcome(ideal), data)


def make_container(chance):
    """A header that agrees with itself, or nearly."""
    size, sizes = chance.choice((4096, 5000, 1 << 20)), [chance.randrange(9000) for _ in range(3)]
    files, at = [], 0
    for number, length in enumerate(sizes):
        files.append({"offset": at, "path": f"f{number}", "size": length})
        at += length + chance.choice((0, 0, 7))
    total = max(1, at + chance.choice((0, 0, 0, 1, -1)))
    fields = {name: chance.randbytes(32).hex() for name in ("salt", "commitment", "vocabulary")}
    fields |= {"asset": "demo", "model_type": "llama", "version": 1, "chunk_size": size}
    fields |= {"length": total, "chunks": -(-total // size), "files": files}
    if chance.random() < 0.3:
        fields["chunks"] += chance.choice((-1, 1))
    if chance.random() < 0.3:
        entry = chance.choice(files)
        entry[chance.choice(("offset", "size"))] += chance.choice((-1, 1, 4096, -entry["size"]))
    if chance.random() < 0.1:
        chance.choice(files)["path"] = "f0"
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    if chance.random() < 0.6:
        return text.encode()
    pairs = messages.Pairs([list(pair) for pair in json.loads(text).items()])
    return messages.message(chance, "header", pairs)


def check_vocabulary(data):
    """mp.Vocabulary: the table."""
    real = outcome(lambda: mp.Vocabulary(data).table)
    return check_both(real, outcome(oracle.parse_vocabulary, data), data)


def make_vocabulary(chance):
    """A table, or nearly."""
    table = [chance.randbytes(chance.choice((0, 1, 3, 300))) for _ in range(chance.randrange(6))]
    data = len(table).to_bytes(4, "big")
    data += b"".join(len(item).to_bytes(2, "big") + item for item in table)
    return messages.mutate_bytes(chance, data) if chance.random() < 0.6 else data


TABLES = {size: [b"a"] * size for size in (2, 256, 257, 300, 512, 1000, 4096, 5000)}


def check_ids(data):
    """Vocabulary.unpack, and that pack gives the same bytes. Data: 1 octet for the size first."""
    size = list(TABLES)[(data[0] if data else 0) % len(TABLES)]
    vocabulary, packed = vocabulary_of(size), data[1:]
    real = outcome(vocabulary.unpack, packed)
    bits = oracle.id_bits(size)
    found = check_both(real, outcome(oracle.unpack_ids, packed, bits, size), data)
    if not found and real[0] == "ok" and vocabulary.pack(real[1]) != packed:
        return Finding("accepted", f"ids that pack to other bytes: {packed.hex()}")
    return found


def vocabulary_of(size, made={}):  # noqa: B006  a cache
    """The Vocabulary of a table of this size."""
    if size not in made:
        made[size] = mp.Vocabulary(mp.encode_vocabulary(TABLES[size]))
    return made[size]


def make_ids(chance):
    """Packed ids, or nearly."""
    which = chance.randrange(len(TABLES))
    size = list(TABLES)[which]
    bits, count = oracle.id_bits(size), chance.randrange(12)
    top = size if chance.random() < 0.7 else 1 << bits
    text = "".join(f"{chance.randrange(top):0{bits}b}" for _ in range(count))
    text += chance.choice(("0", "0", "0", "1")) * (-len(text) % 8)
    packed = int(text or "0", 2).to_bytes(len(text) // 8, "big")
    packed += chance.choice((b"", b"", b"", b"\0", b"\1"))
    return bytes([which]) + packed


def check_text(data):
    """TextCutter: the text does not depend on how ids arrive, and ends before a stop string.

    Data: 1 octet for the stop strings, then the ids of bytes, each a token.
    """
    stops = (("ab",), ("a", "aba"), ("\u00e9",), (), ("abc", "b"))[(data[0] if data else 0) % 5]
    vocabulary, ids = byte_vocabulary(), list(data[1:])

    def text(pieces):
        cutter = mp.TextCutter(vocabulary, stops)
        return "".join(map(cutter.feed, pieces)) + cutter.feed([], last=True)

    whole, single = outcome(text, [ids]), outcome(text, [[token] for token in ids])
    if "crash" in (whole[0], single[0]):
        return whole[1] if whole[0] == "crash" else single[1]
    plain = bytes(ids).decode("utf-8", "replace")
    ends = [(plain.index(stop) + len(stop), plain.index(stop)) for stop in stops if stop in plain]
    ideal = plain[: min(ends)[1]] if ends else plain
    if single[1] != ideal or whole[1] != ideal:
        return Finding("reply", f"text {single[1]!r} or {whole[1]!r} where {ideal!r} was due")
    return None


def byte_vocabulary(made=[]):  # noqa: B006  a cache
    """A Vocabulary of all 256 bytes."""
    if not made:
        made.append(mp.Vocabulary(mp.encode_vocabulary([bytes([value]) for value in range(256)])))
    return made[0]


def make_text(chance):
    """Text with stop strings and broken characters in it."""
    parts = [b"a", b"b", b"c", "\u00e9".encode(), b"\xff", b"\xe2\x82", "\U0001f600".encode()]
    return bytes([chance.randrange(5)]) + b"".join(chance.choices(parts, k=chance.randrange(12)))


# ---------------------------------------------------------------- TPM, event log, proofs


def check_tpm(data):
    """mp.tpm_response: None, the body, or OSError; and what reads a body of any kind."""
    real = outcome(mp.tpm_response, data, promised=(OSError,))
    if real[0] == "crash":
        return real[1]
    for name in (mp.tpm_created, lambda body: body[4 : 4 + int.from_bytes(body[:4], "big")]):
        created = outcome(name, real[1] if real[0] == "ok" and real[1] else data, promised=())
        if created[0] == "crash":
            return created[1]
    size = int.from_bytes(data[2:6], "big")
    ideal = ("refused", "OSError")
    if len(data) < 10 or len(data) < min(size, 4096):
        ideal = ("ok", None)
    elif len(data) == size and data[6:10] == bytes(4):
        ideal = ("ok", data[10:])
    return compared(real, ideal, data)


def make_tpm(chance):
    """A response, whole or not."""
    body = chance.randbytes(chance.choice((0, 2, 32, 400)))
    size = len(body) + 10 + chance.choice((0, 0, 0, 1, -1, 5000))
    code = chance.choice((0, 0, 0, 1, 0x80280400))
    data = struct.pack(">HII", chance.choice((0x8001, 0x8002, 0)), size, code) + body
    return messages.mutate_bytes(chance, data) if chance.random() < 0.3 else data


def check_eventlog(data):
    """eventlog.parse and what is made of its events: LogError alone."""
    real = outcome(eventlog.parse, data, promised=(eventlog.LogError,))
    if real[0] == "ok":
        real = outcome(lambda: [*map(eventlog.describe, real[1]), eventlog.replay(real[1])])
    return real[1] if real[0] == "crash" else None


def make_eventlog(chance):
    """A crypto-agile log, or nearly."""
    spec = b"Spec ID Event03\0" + bytes(8) + struct.pack("<IHH", 1, 11, 32) + b"\0"
    data = struct.pack("<II20xI", 0, 3, len(spec)) + spec
    for _ in range(chance.randrange(5)):
        content = chance.randbytes(chance.choice((0, 4, 40, 17)))
        kind = chance.choice(list(eventlog.TYPES))
        data += struct.pack("<IIIH", chance.randrange(26), kind, 1, 11) + chance.randbytes(32)
        data += struct.pack("<I", len(content)) + content
    data += chance.choice((b"", b"", bytes(30), b"\xff" * 9))
    return messages.mutate_bytes(chance, data) if chance.random() < 0.6 else data


REFERENCE = {"kind": "tpm2", "root": "fixture", "measurement": "00" * 32, "withdrawn": []}
REFERENCE |= {"attestation_key": mp.ATTESTATION_KEY.hex() + "0100" + "ab" * 256}
REFERENCE |= {"pcrs": {str(pcr): "00" * 32 for pcr in mp.PCRS}}


def check_proof(data):
    """muproxy.verify_tpm2 and verify_psk: a list of checks, of which one fails at least."""
    for verify, secret in ((muproxy.verify_tpm2, None), (muproxy.verify_psk, KEY)):
        real = outcome(verify, secret, bytes(32), data, REFERENCE, promised=())
        if real[0] == "crash":
            return real[1]
        if all(check.ok for check in real[1]) and data != mp.psk_proof(KEY, bytes(32)):
            return Finding("accepted", f"a proof that proves nothing: {data[:80].hex()}")
    return None


def make_proof(chance):
    """Bytes that are as long as a quote, and begin as one."""
    size = muproxy.PROOF.size + chance.choice((0, 0, 0, 1, -1, -muproxy.PROOF.size))
    data = b"\0\x91\xffTCG\x80\x18\0\x22\0\x0b" + chance.randbytes(size)
    return data[:size]


# ---------------------------------------------------------------- the engine's pipe
# Data: 8 bytes for each message of the engine, as it writes them.

SLOTS, LIMIT, CONTEXT = 2, 5, 100


def check_pipe(data):
    """Gate.take_message, with two answers that run: KeyError or ProtocolError end an engine.

    An engine that lies gets no more into an answer than its limit, and nothing behind its end.
    """
    gate = types.SimpleNamespace(context=CONTEXT, charged=0)
    gate.charge = lambda bits: setattr(gate, "charged", gate.charged + bits)
    gate.replies = {slot: new_reply(slot) for slot in range(SLOTS)}
    replies, ids, ended = dict(gate.replies), {0: [], 1: []}, set()
    for at in range(0, len(data) - 7, 8):
        kind, slot, value = mp.PIPE.unpack(data[at : at + 8])
        reply = replies.get(slot)
        is_good = (
            reply is not None
            and slot not in ended
            and is_pipe_message(
                kind, value, len(ids.get(slot, ())), getattr(reply, "prompt_tokens", 0)
            )
        )
        real = outcome(
            me.Gate.take_message, gate, kind, slot, value, promised=(KeyError, mp.ProtocolError)
        )
        if real[0] == "crash":
            return real[1]
        if (real[0] == "ok") != is_good:
            verdict = "accepted" if real[0] == "ok" else "refused"
            return Finding(verdict, f"the engine's message {kind}, {slot}, {value}")
        if not is_good:
            break
        if kind == 1:
            ids[slot].append(value)
        ended |= {slot} if kind in (2, 4) else set()
        if [*reply.ids] != ids[slot]:
            return Finding("accepted", f"other ids than were said: {[*reply.ids]}")
    return None


def new_reply(slot):
    """A reply as Gate.open_reply makes it."""
    lease = {"policy": {"latency_ms": 0, "shape": "plain"}}
    reply = types.SimpleNamespace(slot=slot, ids=collections.deque(), due=0, lease=lease)
    reply.table = vocabulary_of(300)
    reply.limit, reply.ending, reply.prompt_tokens = LIMIT, None, 0
    return reply


def is_pipe_message(kind, value, count, prompt_tokens):
    """Whether an engine may say this: an id, the end, the prompt's length once, a refusal."""
    if kind == 1:
        return value < 300 and count < LIMIT
    if kind == 3:
        return not prompt_tokens and 0 < value <= CONTEXT
    return kind in (2, 4) and value < 3


def make_pipe(chance):
    """What an engine says, or nearly."""
    data = b""
    for _ in range(chance.randrange(1, 20)):
        slot = chance.choice((0, 1, 0, 1, 0, 1, 2, 65535))
        kind = chance.choice((1, 1, 1, 1, 3, 3, 2, 4, 0, 5, 6, 255))
        value = chance.choice((0, 1, 2, 3, 100, 101, 299, 300, 0xFFFFFFFF))
        value = chance.randrange(300) if chance.random() < 0.6 else value
        data += mp.PIPE.pack(kind, slot, value if kind == 1 else value % 120)
    return data


# ------------------------------------------------------- a hostile enclave, as the proxy sees it
# Data: records as above, which the proxy gets as the answer to a request.

READY = {"vocabulary": "", "asset": "demo", "model": "00" * 32, "lease": "00" * 16}
BOUNDARY = b"\0"


def check_answer(data):
    """muproxy.Session.generate: the text, or ProtocolError; never another end, never a wait."""
    vocabulary = byte_vocabulary()
    ours, theirs = socket.socketpair()
    with theirs:
        session = proxy_session(ours, vocabulary)
        framed = b"".join(struct.pack(">I", len(part)) + part for part in payloads(data))
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(framed) + 4096)
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            theirs.sendall(framed)
        theirs.shutdown(socket.SHUT_WR)
        real = outcome(lambda: "".join(session.generate({"prompt": "a"}, vocabulary)))
        session.close()
    return check_both(real, ideal_answer(data), data)


def proxy_session(connection, vocabulary):
    """A muproxy.Session past its handshake, whose enclave is at the other end of a socket."""
    session = object.__new__(muproxy.Session)
    session.link = types.SimpleNamespace(
        socket=connection,
        recv=connection.recv,
        settimeout=connection.settimeout,
        sendall=connection.sendall,
        close=connection.close,
    )
    session.ready = READY | {"vocabulary": vocabulary.digest}
    session.final, session.is_open, session.entry = None, True, {}
    session.record = lambda *_: None
    session.sealer = mp.Sealer(KEY[::-1])
    session.opener = mp.Opener(KEY, oracle.MESSAGE_LIMIT)
    return session


def ideal_answer(data):
    """What has to come of the records: ids as text up to FINAL, an error's code, or a lost link."""
    records, ids = oracle.Records(KEY, oracle.MESSAGE_LIMIT), []
    try:
        for payload in payloads(data):
            if len(payload) > 64 << 10:
                raise oracle.Refused("bad_frame")
            message = records.open(payload)
            if message is None:
                continue
            if message[0] == 1:
                ids += oracle.unpack_ids(message[1], 8, 256)
                continue
            form, fields = oracle.parse(message[1], "final", "error")
            if form == "error":
                raise oracle.Refused(fields["error"])
            return "ok", bytes(ids).decode("utf-8", "replace")
    except oracle.Refused as error:
        return "refused", error.code
    return "refused", "connection_lost"


def make_answer(chance):
    """Ids, then the final record, or nearly."""
    data = bytearray()
    bodies = [(1, chance.randbytes(chance.randrange(1, 9))) for _ in range(chance.randrange(3))]
    form = chance.choice(("final", "final", "error", "ready"))
    bodies.append((0, messages.message(chance, form, wrong=0.4)[:60_000]))
    if chance.random() < 0.2:
        chance.shuffle(bodies)
    for kind, body in bodies:
        plain = oracle.plain_message(body, kind)
        if chance.random() < 0.1:
            plain = wrong_plain(chance, kind, body[:40])
        way = FAIR if chance.random() < 0.95 else chance.randrange(6)
        data += bytes([way]) + len(plain).to_bytes(2, "big") + plain
    return bytes(data)


TARGETS = {"json": Target(make_json, check_json, "parse_json")}
TARGETS |= {name: schema_target(name) for name in SCHEMAS}
TARGETS |= {
    "frame": Target(make_frame, check_frame, "read_frame on a clock of its own"),
    "records": Target(make_records, check_records, "Opener: replayed, changed, short, padded"),
    "prefix": Target(
        lambda chance: (
            messages.mutate_bytes(
                chance,
                b"MUSEALv1"
                + chance.choice(
                    (
                        b"\0\0\0\2",
                        b"\0\x10\0\0",
                        b"\0\x10\0\1",
                        b"\0\0\0\1",
                        b"\xff" * 4,
                        b"\0\0\2\0",
                    )
                ),
            )
            if chance.random() < 0.5
            else b"MUSEALv1" + chance.randbytes(4)
        ),
        check_prefix,
        "header_length",
    ),
    "container": Target(make_container, check_container, "Container: a sealed model's header"),
    "vocabulary": Target(make_vocabulary, check_vocabulary, "Vocabulary: the table of ids"),
    "ids": Target(make_ids, check_ids, "Vocabulary.unpack and pack"),
    "text": Target(make_text, check_text, "TextCutter"),
    "tpm": Target(make_tpm, check_tpm, "tpm_response, tpm_created"),
    "eventlog": Target(make_eventlog, check_eventlog, "eventlog.parse"),
    "proof": Target(make_proof, check_proof, "verify_tpm2, verify_psk"),
    "pipe": Target(make_pipe, check_pipe, "Gate.take_message: an engine that lies"),
    "answer": Target(make_answer, check_answer, "muproxy.Session.generate: a hostile enclave"),
}
