"""The protocol said a second time, for the fuzzer: what a peer may say, and what has to come back.

Written from the README and the design, not from muprotocol.py, of which nothing is used here: an
error that the two share has to be made twice. JSON as in RFC 8259, records as AES-256-GCM with
counter nonces. Nothing here is quick or kind: it says yes or no, and with which code.
"""

import collections
import hashlib
import hmac
import json
import re
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

CODES = """bad_frame bad_json bad_message bad_record bad_share timeout connection_lost
version_unsupported evidence_refused evidence_unavailable locked token_refused wrong_key wrong_model
lease_refused lease_ended container_corrupt model_invalid no_engine out_of_memory engine_lost
prompt_invalid prompt_too_long too_many_tokens policy_refused busy""".split()
# What a session outlives, besides a message of the wrong form.
MENDABLE = "prompt_invalid prompt_too_long too_many_tokens policy_refused busy engine_lost".split()
HANDSHAKE_LIMIT, REQUEST_LIMIT, MESSAGE_LIMIT = 4096, 1 << 20, 8 << 20  # bytes
CELL = 480  # bytes on the wire of each record from the enclave
DEPTH = 16  # containers within each other
DIGITS = 4300  # of an integer
BIG = 1 << 53

# A message's fields, separated by semicolons: name (with ? if it may be missing), kind, arguments.
FORMS = {
    "challenge": "version int 0 2147483648; role one owner user; nonce hex 32; share hex 384;"
    "evidence one psk tpm2 tsm",
    "posture": "confinement one full seccomp none; debug bool",
    "measurement": "measurement hex 32; nonce hex 32; share hex 384; model hex 32;"
    "status one locked loading ready; posture form posture",
    "policy": "verified bool; latency_ms int 0 10000; shape one plain constant",
    "lease": f"id hex 16; sequence int 1 {BIG}; rate int 64 {1 << 40}; burst int 16384 {1 << 40};"
    f"budget int 1 {1 << 50}; expiry int 1 316224000; users list 0 32 hex 32; policy form policy",
    "unlock": "key hex 32; model hex 32; lease? form lease",
    "log": "log true",
    "access": "token text 16 256",
    "generate": "prompt text 0 1048576;"
    + (
        options := f"temperature? number 0 10; top_p? number 0.000001 1; top_k? int 0 {1 << 20};"
        f"repetition_penalty? number 0.1 10; seed? int 0 {(1 << 63) - 1};"
        f"max_new_tokens? int 1 {1 << 24}; date? text 1 64"
    ),
    "chat": f"messages list 1 1024 form turn; {options}",
    "scored": "ids list 0 262144 int 0 16777216; tolerance number 0 1000000",
    "score": "prompt text 0 1048576;" + (scoring := f"{options}; score form scored"),
    "score_chat": f"messages list 1 1024 form turn; {scoring}",
    "turn": "role one system user assistant; content text 0 1048576",
    "cancel": "cancel true",
    "status": "status true",
    "lock": "lock true",
    "revoke": "revoke hex 32",
    "progress": "status one loading; progress int 0 10",
    "ready": f"status one locked ready; lease lease; sequence int 0 {BIG}; budget_left int 0 {BIG};"
    f"budget int 0 {BIG}; head hex 32; restarts int 0 {BIG}; model hex 32; asset name;"
    f"vocabulary hex 32; context int 0 {BIG}",
    "logged": "log bytes",
    "error": f"error one {' '.join(CODES)}; limit? int 0 {BIG}; heads? list 2 2 hex 32",
    "usage": f"prompt_tokens int 0 {BIG}; completion_tokens int 0 {BIG}; total_tokens int 0 {BIG}",
    "final": f"elapsed_ms int 0 {BIG}; finish_reason one stop length cancelled; usage form usage;"
    f"budget_left int 0 {BIG}; restarts int 0 {BIG}; heads list 2 2 hex 32",
    "closing": f"lease hex 16; spent int 0 {BIG}; head hex 32; mac hex 32",
    "closed": "closing form closing",
    "file": f"path name; offset int 0 {BIG}; size int 0 {BIG}",
    "header": f"version int 1 1; asset name; model_type name; chunk_size int 4096 {1 << 26};"
    f"chunks int 1 {1 << 40}; length int 1 {1 << 50}; salt hex 32; commitment hex 32;"
    "vocabulary hex 32; files list 1 4096 form file",
}
FIELDS = {
    form: {words[0]: words[1:] for words in map(str.split, text.split(";")) if words}
    for form, text in FORMS.items()
}


class Refused(Exception):
    """What the other side may not say; `code` as in CODES."""

    def __init__(self, code):
        self.code = code
        super().__init__(code)


# ---------------------------------------------------------------- JSON

SPACE = re.compile(r"[ \t\n\r]*")
STRING = re.compile(r'"[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*"')
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
WORDS = {"true": True, "false": False, "null": None}
ESCAPE = re.compile(
    r"\\(?:u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|(.))"
)
SURROGATE = re.compile("[\ud800-\udfff]")  # that has no other half
LETTERS = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def parse_json(data):
    """The object in bytes of JSON. Raises Refused("bad_json"). Without recursion."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused("bad_json") from None
    stack, top, at = [], [], SPACE.match(text).end()
    holder, key = top, None  # what the next value goes into; by what key, if that is an object
    while True:
        value, at = _value(text, at)
        if isinstance(holder, dict):
            if key in holder:
                raise Refused("bad_json")
            holder[key] = value
        else:
            holder.append(value)
        if isinstance(value, dict | list):
            stack.append(holder)
            holder = value
            if len(stack) > DEPTH:
                raise Refused("bad_json")
        fresh = isinstance(value, dict | list)
        while True:  # close what ends here
            at = SPACE.match(text, at).end()
            closer = "}" if isinstance(holder, dict) else "]"
            if not stack or text[at : at + 1] != closer:
                break
            holder, at, fresh = stack.pop(), at + 1, False
        if not stack:
            break
        if not fresh:
            if text[at : at + 1] != ",":
                raise Refused("bad_json")
            at = SPACE.match(text, at + 1).end()
        if isinstance(holder, dict):
            key, at = _string(text, at)
            at = SPACE.match(text, at).end()
            if text[at : at + 1] != ":":
                raise Refused("bad_json")
            at = SPACE.match(text, at + 1).end()
    if at != len(text) or not isinstance(top[0], dict):
        raise Refused("bad_json")
    return top[0]


def _value(text, at):
    """(value, where it ends); an empty list or dict for one that begins here."""
    letter = text[at : at + 1]
    if letter == "{":
        return {}, at + 1
    if letter == "[":
        return [], at + 1
    if letter == '"':
        return _string(text, at)
    for word, value in WORDS.items():
        if text.startswith(word, at):
            return value, at + len(word)
    found = NUMBER.match(text, at)
    if not found:
        raise Refused("bad_json")
    digits = found[0]
    if found[1] is None and found[2] is None:
        if len(digits.lstrip("-")) > DIGITS:
            raise Refused("bad_json")
        return int(digits), found.end()
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise Refused("bad_json")
    return number, found.end()


def _string(text, at):
    found = STRING.match(text, at)
    if not found:
        raise Refused("bad_json")
    string = found[0][1:-1]
    if "\\" in string:
        string = ESCAPE.sub(_unescape, string)
        if SURROGATE.search(string):
            raise Refused("bad_json")
    return string, found.end()


def _unescape(found):
    high, low, one, letter = found.groups()
    if high:
        return chr(0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF))
    return chr(int(one, 16)) if one else LETTERS.get(letter, letter)


# ---------------------------------------------------------------- messages


def fits(value, kind):
    """Whether a value is of a kind: a list of the words of FORMS."""
    name, *rest = kind
    if name == "int":
        return type(value) is int and int(rest[0]) <= value <= int(rest[1])
    if name == "number":
        return type(value) in (int, float) and float(rest[0]) <= value <= float(rest[1])
    if name == "bool":
        return value is True or value is False
    if name == "true":
        return value is True
    if name == "form":
        return type(value) is dict and is_form(value, rest[0])
    if name == "list":
        low, high = map(int, rest[:2])
        return (
            type(value) is list
            and low <= len(value) <= high
            and all(fits(item, rest[2:]) for item in value)
        )
    if type(value) is not str:
        return False
    if name == "text":
        return int(rest[0]) <= len(value) <= int(rest[1])
    if name == "one":
        return value in rest
    if name == "lease":
        return value == "" or fits(value, ["hex", "16"])
    if name == "name":
        plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-."
        return 1 <= len(value) <= 128 and value[0] != "." and all(c in plain for c in value)
    digits = all(letter in "0123456789abcdef" for letter in value)
    if name == "bytes":
        return digits and len(value) % 2 == 0
    return digits and len(value) == 2 * int(rest[0])  # hex


def is_form(value, form):
    """Whether an object has exactly the fields of a form."""
    fields = FIELDS[form]
    for name in fields:
        if not name.endswith("?") and name not in value:
            return False
    for name, item in value.items():
        kind = fields.get(name) or fields.get(name + "?")
        if name.endswith("?") or kind is None or not fits(item, kind):
            return False
    return True


def parse(data, *forms):
    """(form, object) of a message in one of these forms. Raises Refused: bad_json, bad_message."""
    value = parse_json(data)
    for form in forms:
        if is_form(value, form) and (form != "challenge" or is_share(value["share"])):
            return form, value
    raise Refused("bad_message")


# ---------------------------------------------------------------- frames and records


class Records:
    """Opens the records of one direction. limit: bytes of a message. count: of records so far."""

    def __init__(self, key, limit):
        self.cipher, self.limit, self.count = AESGCM(key), limit, 0
        self.kind, self.parts, self.missing = None, b"", 0

    def open(self, payload):
        """(kind, body) of a whole message, None while some of it is missing. Refused."""
        nonce, self.count = struct.pack(">IQ", 0, self.count), self.count + 1
        try:
            plain = self.cipher.decrypt(nonce, payload, struct.pack(">I", len(payload)))
        except (InvalidTag, ValueError):
            raise Refused("bad_record") from None
        if len(plain) < 5:
            raise Refused("bad_record")
        kind, left = struct.unpack(">BI", plain[:5])
        body, padding = plain[5 : 5 + left], plain[5 + left :]
        is_next = self.missing > 0
        if kind > 1 or padding.strip(b"\0") or (left and not body):
            raise Refused("bad_record")
        if (is_next and (kind, left) != (self.kind, self.missing)) or (
            not is_next and left > self.limit
        ):
            raise Refused("bad_record")
        self.parts = self.parts + body if is_next else body
        self.kind, self.missing = kind, left - len(body)
        return None if self.missing else (kind, self.parts)


def seal(key, count, plain, length=None):
    """A record, framed. count: of records before it. length: what its header says, if it lies."""
    header = struct.pack(">I", len(plain) + 16 if length is None else length)
    return header + AESGCM(key).encrypt(struct.pack(">IQ", 0, count), plain, header)


def plain_message(body, kind=0, left=None, padding=b""):
    """The plaintext of a record with a message, or with what is like one."""
    return struct.pack(">BI", kind, len(body) if left is None else left) + body + padding


def unpack_ids(data, bits, size):
    """The ids in packed bytes: `bits` each, all below `size`, as many as fit, zeros behind them.

    Raises Refused("bad_record").
    """
    text = "".join(f"{byte:08b}" for byte in data)
    count = len(text) // bits
    ids = [int(text[at * bits : (at + 1) * bits], 2) for at in range(count)]
    if "1" in text[count * bits :] or len(text) - count * bits >= 8 or any(i >= size for i in ids):
        raise Refused("bad_record")
    return ids


def id_bits(size):
    """Bits of an id in a vocabulary of this size."""
    bits = 8
    while 1 << bits < size:
        bits += 1
    return bits


def parse_vocabulary(data):
    """The table of a vocabulary, [bytes]. Raises Refused("model_invalid")."""
    table, at = [], 4
    while at < len(data):
        if at + 2 > len(data):
            raise Refused("model_invalid")
        (size,) = struct.unpack_from(">H", data, at)
        if at + 2 + size > len(data):
            raise Refused("model_invalid")
        table.append(data[at + 2 : at + 2 + size])
        at += 2 + size
    if len(data) < 4 or struct.unpack(">I", data[:4])[0] != len(table) or len(table) < 2:
        raise Refused("model_invalid")
    return table


# ---------------------------------------------------------------- keys


def _prime():
    """2^3072 - 2^3008 + (floor(2^2942 e) + 2625351) 2^64 - 1."""
    term = total = 1 << 3000  # e = sum of 1/n!, in fixed point with 58 guard bits
    number = 0
    while term:
        number += 1
        term //= number
        total += term
    return 2**3072 - 2**3008 + ((total >> 58) + 2625351) * 2**64 - 1


PRIME = _prime()
EXPONENT = int.from_bytes(hashlib.sha256(b"the fuzzer keeps no secret").digest(), "big") | 1 << 274
SHARE = pow(2, EXPONENT, PRIME).to_bytes(384, "big")  # the fuzzer's own, always the same


def is_share(text):
    """Whether a peer's share (768 hexadecimal digits) is one: 1 < y < p - 1."""
    return 1 < int(text, 16) < PRIME - 1


def expand(secret, salt, info):
    """32 bytes by HKDF with SHA-256 (RFC 5869)."""
    extracted = hmac.new(salt, secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\1", hashlib.sha256).digest()


def agree(challenge, measurement, share):
    """(key to the enclave, key from it, report data of kind psk) from both clear payloads."""
    framed = b"".join(struct.pack(">I", len(part)) + part for part in (challenge, measurement))
    transcript = hashlib.sha256(framed).digest()
    secret = pow(int(share, 16), EXPONENT, PRIME).to_bytes(384, "big")
    keys = [expand(secret, transcript, b"muenclave v1 " + way) for way in (b"h2e", b"e2h")]
    report = hashlib.sha256(b"muenclave evidence v1psk\0" + transcript).digest()
    return *keys, report


# ---------------------------------------------------------------- a session, as the gate sees it


class World:
    """What all sessions of one enclave share.

    model, key: digest and weights key in hexadecimal. tokens: hashes of access tokens that are in
    the lease. is_ready: whether there is a lease. is_over: why all sessions end, or None. covers:
    whether a lease has had cells sent in which there is nothing.
    """

    def __init__(self, model, key, users=(), is_ready=False):
        self.model, self.key, self.users, self.is_ready = model, key, set(users), is_ready
        self.seen, self.sequence, self.is_over, self.covers = set(), 0, None, False

    def take(self, lease):
        """A further lease. Raises Refused("lease_refused")."""
        if lease["id"] in self.seen or lease["sequence"] <= self.sequence:
            raise Refused("lease_refused")
        self.seen.add(lease["id"])
        self.sequence, self.users, self.is_ready = lease["sequence"], set(lease["users"]), True
        self.covers |= lease["policy"]["shape"] == "constant"


class Peer:
    """One connection as the gate has to see it: feed what was sent, then check what comes back.

    due: what has still to come, in order: ("error", code), ("ready",), ("logged",), or of a user
    ("answer", request, message), ("cancel",), ("wrong", code). is_ending: nothing comes after that
    but the end. has_changed: it has changed the world, which others have to see. is_told: it was
    told why all sessions end.
    """

    def __init__(self, world):
        self.world, self.stage, self.role, self.user = world, "challenge", None, None
        self.wire, self.due, self.is_ending = b"", collections.deque(), False
        self.has_changed, self.is_told, self.ids = False, False, []
        self.challenge = self.records = self.answers = None

    def feed(self, data):
        """Bytes that were sent."""
        self.wire += data
        while not self.is_ending and self.stage != "measurement" and len(self.wire) >= 4:
            (length,) = struct.unpack(">I", self.wire[:4])
            limit = REQUEST_LIMIT if self.stage == "serving" else HANDSHAKE_LIMIT
            if length > limit:
                self.is_ending = True
            elif len(self.wire) < 4 + length:
                break
            else:
                payload, self.wire = self.wire[4 : 4 + length], self.wire[4 + length :]
                self.take(payload)

    def take(self, payload):
        """One frame's payload."""
        try:
            if self.stage == "challenge":
                _, self.challenge = parse(payload, "challenge")
                is_ours = self.challenge["version"] == 1 and self.challenge["evidence"] == "psk"
                if not is_ours:
                    raise Refused("version_unsupported")
                self.payload, self.stage = payload, "measurement"
                return
            message = self.records.open(payload)
            if message is None or message[0] != 0:
                raise Refused("bad_record")
        except Refused:
            self.is_ending = True  # without a word
            return
        try:
            self.take_token(message[1]) if self.stage == "token" else self.take_request(message[1])
        except Refused as error:
            self.due.append(("error", error.code))
            self.is_ending = self.stage == "token"

    def agreed(self, measurement):
        """The enclave's measurement came; from here on all is records. Returns the report data."""
        share = parse(measurement, "measurement")[1]["share"]
        to_it, from_it, report = agree(self.payload, measurement, share)
        self.key, self.sent = to_it, 0
        self.records = Records(to_it, REQUEST_LIMIT)
        self.answers = Records(from_it, MESSAGE_LIMIT)
        self.role, self.stage = self.challenge["role"], "token"
        self.feed(b"")
        return report

    def take_token(self, body):
        """Step 2. Raises Refused."""
        world = self.world
        if self.role == "user":
            token = parse(body, "access")[1]["token"]
            if not world.is_ready:
                raise Refused("locked")
            user = hashlib.sha256(token.encode()).hexdigest()
            if user not in world.users:
                raise Refused("token_refused")
            self.user = user
        else:
            form, token = parse(body, "unlock", "log")
            if form == "log":
                self.is_ending = True
                if not world.is_ready:
                    self.due.append(("logged",))
                return
            if token["model"] != world.model:
                raise Refused("wrong_model")
            if token["key"] != world.key:
                raise Refused("wrong_key")
            if "lease" in token:
                world.take(token["lease"])
                self.has_changed = True
        self.due.append(("ready",))
        self.stage = "serving"

    def take_request(self, body):
        """Step 4. Raises Refused."""
        if self.role == "user":
            try:
                form, request = parse(body, "generate", "chat", "cancel")
                kind = ("cancel",) if form == "cancel" else ("answer", request)
            except Refused as error:
                kind = ("wrong", error.code)
            self.due.append(kind)
            return
        forms = ("status", "lock", "revoke", "score", "score_chat", "cancel")
        form, command = parse(body, *forms)
        if "score" in command or form == "cancel":
            self.due.append(("cancel",) if form == "cancel" else ("answer", command))
            return
        self.due.append(("closed",) if form == "lock" and self.world.is_ready else ("ready",))
        if form == "revoke" and command["revoke"] in self.world.users:
            self.world.users.discard(command["revoke"])
            self.has_changed = True
        if form == "lock":
            self.world.is_over, self.has_changed = "lease_ended", True

    def ending(self):
        """The code with which the enclave may end this session at any time, or None."""
        if self.is_told:
            return None
        if self.world.is_over and self.stage == "serving":
            return self.world.is_over
        is_struck = self.user is not None and self.user not in self.world.users
        return "token_refused" if is_struck else None

    def is_waiting(self):
        """Whether something has to come: a reply, or the end."""
        while self.due and self.due[0] == ("cancel",):
            self.due.popleft()  # nothing is said to a cancel that crosses an answer's end
        return bool(self.due) or self.is_ending or self.ending() is not None

    def may_be_cut(self, is_tcp):
        """Whether the end may come where a reply was due: what breaks the protocol was sent since.

        It ends an answer that runs. By TCP, bytes behind it that nobody reads any more turn the end
        into a reset, which can overtake replies.
        """
        is_answering = bool(self.due) and self.due[0][0] == "answer"
        return self.is_ending and (is_answering or (is_tcp and len(self.wire) > 0))

    def check(self, kind, body, vocabulary):
        """What came, one message: whether the protocol has it here. Raises Refused with a text.

        vocabulary: (bits of an id, number of ids), or None if that is not known.
        """
        while self.due and self.due[0] == ("cancel",):
            self.due.popleft()
        first = self.due[0] if self.due else ("nothing",)
        if kind == 1:
            if first[0] != "answer":
                raise Refused("packed ids where none are due")
            if not body and not self.world.covers:
                raise Refused("a record of no ids")
            vocabulary = (8, 256) if "score" in first[1] else vocabulary
            if vocabulary:
                try:
                    self.ids += unpack_ids(body, *vocabulary)
                except Refused:
                    raise Refused(f"packed ids are not canonical: {body.hex()}") from None
            return
        try:
            form, reply = parse(body, "error", "progress", "ready", "closed", "logged", "final")
        except Refused as error:
            raise Refused(f"{error.code} in a reply: {body[:200]!r}") from None
        if form == "error" and reply["error"] == self.ending():
            self.due.clear()
            self.is_ending = self.is_told = True
            return
        if form == "progress" and first == ("ready",):
            return
        text = f"{body[:200].decode()} where {self.wanted(first)} was due"
        if form == "error":
            self.check_error(reply, first, text)
        elif form == "final":
            self.check_final(reply, first, text)
        elif (form,) == first:
            self.due.popleft()
        else:
            raise Refused(text)

    def wanted(self, first):
        """A line on what was due."""
        return " ".join(str(word)[:80] for word in first)

    def check_error(self, reply, first, text):
        """An error: of a message of the wrong form, or of a request that can't be met."""
        if first[0] in ("error", "wrong"):
            if first[1] != reply["error"] or {"limit", "heads"} & reply.keys():
                raise Refused(text)
            self.due.popleft()
        elif first[0] == "answer":
            self.due.popleft()
            request, ids, self.ids = first[1], self.ids, []
            after = self.due[0] if self.due else None
            cut = {"wrong": after and after[-1], "answer": "bad_message"}
            if after and reply["error"] == cut.get(after[0]) and "limit" not in reply:
                self.due.popleft()  # it came while the answer ran, and ended it
            elif reply["error"] not in MENDABLE:
                raise Refused(text)
            elif "heads" in reply:
                self.check_heads(reply["heads"], request, ids, reply["error"])
        else:
            raise Refused(text)

    def check_final(self, reply, first, text):
        """An answer's last record."""
        if first[0] != "answer":
            raise Refused(text)
        request, usage = first[1], reply["usage"]
        self.due.popleft()
        is_cancelled = bool(self.due) and self.due[0] == ("cancel",)
        if reply["finish_reason"] == "cancelled" and not is_cancelled:
            raise Refused("an answer was cancelled by nobody")
        if usage["prompt_tokens"] + usage["completion_tokens"] != usage["total_tokens"]:
            raise Refused("the counts do not add up")
        limit = request.get("max_new_tokens", BIG)
        if "score" in request:
            limit = 2 * len(request["score"]["ids"]) + 2
        if usage["completion_tokens"] > limit:
            raise Refused("more tokens than were asked for")
        ids, self.ids = self.ids, []
        if ids and len(ids) != usage["completion_tokens"]:
            raise Refused("the count is not that of the ids that came")
        if len(ids) == usage["completion_tokens"]:
            self.check_heads(reply["heads"], request, ids, reply["finish_reason"])

    def check_heads(self, heads, request, ids, ending):
        """The chain of exchanges, where all that is in it is known: a lease of ours, a seed."""
        first, last = heads
        links = set()
        for lease in self.world.seen:
            exchange = {"lease": lease, "request": request, "ids": ids, "ending": ending}
            data = json.dumps(exchange, sort_keys=True, separators=(",", ":")).encode()
            links.add(hashlib.sha256(bytes.fromhex(first) + data).hexdigest())
        if links and "seed" in request and last not in links:
            raise Refused("the head of the chain does not follow from the one before it")
