"""What a cap is worth in tokens: real text over sockets that a meter keeps to the same bytes a
second, as our cells of packed ids, as a JSON object a token, and as OpenAI's events. For
tools/bench.py meter.

Transport alone: the text was tokenised before, and nobody computes. Ours goes through the product's
gate, as a process of its own with its filter, and the proxy's session and inlet, each with its
meter; stand-ins say what init, loader and engine say, the engine with all ids at once. The others
get the whole cap, without handshakes, and no more bytes than their form needs.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import pydoc_data.topics
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import bench_shared as shared
from environment import ROOT, ToolError

sys.path.insert(0, str(ROOT))
import muenclave  # noqa: E402
import muprotocol as mp  # noqa: E402
import muproxy  # noqa: E402

PACKAGE = "mistral-common==1.13.1"
TOKENS = ROOT / "tools" / "bench_tokens.py"
FORMATS = {
    "cells": "ours: packed ids in sealed cells",
    "json": "a sealed JSON object a token",
    "sse": "OpenAI's events, a chunk a token",
}
DESCRIPTIONS = {
    "cells": "the product's gate and proxy; a 16th of the cap is kept for handshakes",
    "json": 'a frame of 4 bytes, AES-256-GCM, {"done":false,"token":TEXT}',
    "sse": "data: and a chat.completion.chunk with the fields that OpenAI's reference requires, no "
    "white space, in clear; HTTP's and TLS's own bytes are left out",
}
WHOLE = 1 << 18  # tokens of an answer: more than LONGEST at the default rate take
LONGEST = 100  # seconds
LISTEN_SECONDS = 30  # for the gate to listen, or to say why not


# ---------------------------------------------------------------- the text


def read_text():
    """English text that every Python has: the language reference's topics, as pydoc shows them."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def tokenise(text, peers, say):
    """(ids, table: [bytes], version) by tekken, in the virtual environment `peers`. ToolError."""
    if peers is None:
        told = f"no tokenizer: --peers DIR makes a virtual environment there with {PACKAGE}"
        raise ToolError(f"{told} (nothing else needs it)")
    python = shared.peers_python(peers, [PACKAGE], say)
    done = subprocess.run([python, "-B", TOKENS], input=text.encode(), capture_output=True)
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise ToolError(f"--peers {peers}: can't tokenise: {last}; it takes {PACKAGE}")
    found = json.loads(done.stdout)
    return found["ids"], [base64.b64decode(item) for item in found["table"]], found["version"]


# ---------------------------------------------------------------- ours: a gate with stand-ins


class Stand:
    """The gate in a process of its own, and an engine that has all ids ready; a context manager.

    ids: what each answer is, again and again. table: [bytes] of the ids. cap: bytes a second of the
    lease, and of the inlet. The program that makes it plays init, loader and engine.
    """

    def __init__(self, ids, table, cap):
        self.ids, self.cap = ids, cap
        self.vocabulary = mp.Vocabulary(mp.encode_vocabulary(table))
        self.table = mp.encode_vocabulary(table)
        self.key, self.token = secrets.token_bytes(32), "mu-" + secrets.token_hex(32)
        self.port, self.heard, self.problem = None, threading.Event(), "it does not listen"
        self.engine = None

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        with self.stack:
            folder = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="muenclave-"))
            control, for_gate = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.stack.enter_context(control)
            gate = muenclave.spawn("gate", self.settings(pathlib.Path(folder)), for_gate)
            self.stack.callback(muenclave.end, [gate])
            threading.Thread(target=self.play_init, args=(control,), daemon=True).start()
            if not self.heard.wait(LISTEN_SECONDS) or self.port is None:
                raise ToolError(f"the gate: {self.problem}")
            self.unlock()
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *_):
        self.stack.close()

    def settings(self, folder):
        """What the gate is started with; its files are in the folder."""
        salt = secrets.token_hex(32)
        header = {"version": 1, "asset": "text", "model_type": "none", "salt": salt}
        header |= {"chunk_size": mp.CHUNK_SIZE, "length": len(self.table)}
        header |= {"chunks": -(-len(self.table) // mp.CHUNK_SIZE)}
        header |= {"commitment": mp.key_commitment(self.key, salt).hex()}
        header |= {"vocabulary": self.vocabulary.digest}
        files = [{"path": mp.VOCABULARY_FILE, "offset": 0, "size": len(self.table)}]
        header = mp.encode_json(header | {"files": files})
        self.digest = hashlib.sha256(header).hexdigest()
        (folder / "model").write_bytes(mp.MAGIC + len(header).to_bytes(4, "big") + header)
        self.psk = {role: secrets.token_bytes(32) for role in ("owner", "user")}
        for role, secret in self.psk.items():
            (folder / role).write_text(secret.hex(), "ascii")
        given = {"MODEL_PATH": folder / "model", "ENCLAVE_PORT": 0, "ENCLAVE_CONTEXT": WHOLE}
        given |= {f"ENCLAVE_{role.upper()}_PSK": folder / role for role in self.psk}
        self.measurement = secrets.token_hex(32)  # nothing is proved here
        given |= {"ENCLAVE_MEASUREMENT": self.measurement}
        return muenclave.DEFAULTS | os.environ | {k: str(v) for k, v in given.items()}

    def play_init(self, control):
        """Start loader and engine when the gate says so; note where it listens."""
        with contextlib.suppress(OSError):
            while message := control.recv(512):
                if message[:1] == b"l" and message[1] == muenclave.LOG.index("listening"):
                    self.port = int.from_bytes(message[2:4], "big")
                    self.heard.set()
                elif message[:1] == b"e":
                    self.problem = message[1:].decode("utf-8", "replace")
                    self.heard.set()
                elif message[:1] == b"s":
                    (gate_loader, loader), (gate_engine, engine) = (
                        socket.socketpair() for _ in range(2)
                    )
                    for work, pipe in ((self.play_loader, loader), (self.play_engine, engine)):
                        threading.Thread(target=work, args=(pipe,), daemon=True).start()
                    with gate_loader, gate_engine:
                        numbers = [gate_loader.fileno(), gate_engine.fileno()]
                        socket.send_fds(control, [b"s"], numbers)

    def play_loader(self, gate):
        """Take header and key, give the table of ids."""
        with gate, contextlib.suppress(OSError, EOFError):
            for limit in (mp.HEADER_LIMIT, 32):
                mp.read_frame(gate, limit)
            gate.sendall(mp.frame(b"v" + self.table))

    def play_engine(self, gate):
        """Give each answer its ids as fast as the gate takes them."""
        ids = self.ids * -(-WHOLE // len(self.ids))
        with gate, contextlib.suppress(OSError, EOFError):
            mp.read_frame(gate, mp.HANDSHAKE_FRAME)
            gate.sendall(mp.PIPE.pack(mp.LOADED, 0, WHOLE))
            while True:
                request = json.loads(mp.read_frame(gate, mp.MESSAGE_LIMIT))
                if "cancel" in request:
                    gate.sendall(mp.PIPE.pack(mp.END, request["cancel"], 2))
                    continue
                slot, count = request["slot"], min(request["max_new_tokens"], WHOLE)
                said = [mp.PIPE.pack(mp.LENGTH, slot, 1)]
                said += [mp.PIPE.pack(mp.ID, slot, token) for token in ids[:count]]
                said.append(mp.PIPE.pack(mp.END, slot, mp.ENDINGS.index("length")))
                gate.sendall(b"".join(said))

    def session(self, role):
        """A verified session, through an inlet with the cap."""
        reference = {"version": 1, "kind": "psk", "root": "psk", "withdrawn": []}
        reference |= {"measurement": self.measurement}
        inlet = muproxy.Inlet(self.cap, mp.DEFAULT_BURST)
        address = ("127.0.0.1", self.port)
        return contextlib.closing(muproxy.Session(address, reference, self.psk[role], role, inlet))

    def unlock(self):
        """Give the gate a lease that ends with nothing but the run."""
        lease = {"id": secrets.token_hex(16), "sequence": 1, "rate": self.cap}
        lease |= {"burst": mp.DEFAULT_BURST, "budget": 1 << 40, "expiry": 1 << 20}
        lease |= {"users": [mp.token_hash(self.token)]}
        lease |= {"policy": {"verified": False, "latency_ms": 0, "shape": "plain"}}
        with self.session("owner") as session:
            session.prove({"key": self.key.hex(), "model": self.digest, "lease": lease})


def cells(ids, table, cap):
    """(tokens, bytes) of each message of one answer, whose ids are checked. Raises ToolError."""
    with Stand(ids, table, cap) as stand, stand.session("user") as session:
        session.prove({"token": stand.token})
        due = itertools.cycle(ids)
        request = {"prompt": "", "seed": 0, "max_new_tokens": WHOLE}
        answer = session.exchange(request, stand.vocabulary)
        with contextlib.closing(answer):
            for some in answer:
                if some != list(itertools.islice(due, len(some))):
                    raise ToolError("other ids came than were sent")
                yield len(some), mp.CELL


# ---------------------------------------------------------------- the others: a socket with a meter


def send_metered(connection, frames, cap):
    """Send frames as a meter that begins empty lets them out; until the reader is gone."""
    meter = mp.Meter(cap, mp.DEFAULT_BURST, time.monotonic_ns())
    with connection, contextlib.suppress(OSError):
        for data in frames:
            while not meter.take(len(data), time.monotonic_ns()):
                time.sleep(meter.wait(len(data), time.monotonic_ns()) / mp.NANOSECOND)
            connection.sendall(data)


@contextlib.contextmanager
def metered(frames, cap):
    """The reader's end of a TCP connection over which frames come, metered."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reader = socket.create_connection(listener.getsockname())
        sender, _ = listener.accept()
    sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=send_metered, args=(sender, frames, cap), daemon=True).start()
    with reader:
        yield reader


def texts_of(ids, table):
    """The text of each token, again and again."""
    return itertools.cycle([table[token].decode("utf-8", "replace") for token in ids])


def objects(ids, table, cap):
    """(1, bytes) of each token as a sealed JSON object."""
    cipher = mp.aead(secrets.token_bytes(32))

    def frames():
        for number, text in enumerate(texts_of(ids, table)):
            data = compact({"done": False, "token": text})
            header = (len(data) + mp.TAG).to_bytes(mp.FRAME_HEADER, "big")
            yield header + cipher.encrypt(number.to_bytes(12, "big"), data, header)

    with metered(frames(), cap) as reader:
        for number in itertools.count():
            data = mp.read_frame(reader, mp.RESPONSE_FRAME)
            header = len(data).to_bytes(mp.FRAME_HEADER, "big")
            message = json.loads(cipher.decrypt(number.to_bytes(12, "big"), data, header))
            yield "token" in message, len(header) + len(data)


def events(ids, table, cap):
    """(1, bytes) of each token as an event with a chunk of OpenAI's."""
    base = {"id": "chatcmpl-" + secrets.token_hex(12), "object": "chat.completion.chunk"}
    base |= {"created": int(time.time()), "model": "text"}

    def frames():
        for text in texts_of(ids, table):
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
            yield b"data: " + compact(base | {"choices": [choice]}) + b"\n\n"

    with metered(frames(), cap) as reader, reader.makefile("rb") as lines:
        for line in lines:
            if line.startswith(b"data: "):
                choices = json.loads(line[6:])["choices"]
                yield len(choices), len(line) + 1  # and the empty line


def compact(value):
    """JSON without white space, text as UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


MESSAGES = {"cells": cells, "json": objects, "sse": events}


# ---------------------------------------------------------------- the run


def take(messages, seconds):
    """(tokens, bytes) a second of messages that come, for so many seconds after the first."""
    tokens = size = 0
    with contextlib.closing(messages):
        next(messages)
        began = time.monotonic()
        for count, length in messages:
            tokens, size = tokens + count, size + length
            passed = time.monotonic() - began
            if passed >= seconds:
                return tokens / passed, size / passed
    raise ToolError(
        f"{WHOLE:,} tokens were over before their time: fewer --seconds, or a lower --rate"
    )


def run_meter(flags, say):
    """The figures of `meter`, a dict. ToolError."""
    text = read_text()
    ids, table, version = tokenise(text, flags.peers, say)
    rates = {name: {"tokens": [], "bytes": []} for name in FORMATS}
    for number in range(flags.rounds):
        for name, messages in MESSAGES.items():
            say(f"round {number + 1} of {flags.rounds}: {FORMATS[name]}")
            tokens, size = take(messages(ids, table, flags.rate), flags.seconds)
            rates[name]["tokens"].append(round(tokens, 2))
            rates[name]["bytes"].append(round(size, 1))
    bits = mp.id_bits(len(table))
    facts = {"cap": flags.rate, "seconds": flags.seconds, "ceiling": flags.rate * 8 / bits}
    facts |= {"descriptions": DESCRIPTIONS, "formats": rates}
    facts["text"] = {"source": "pydoc_data.topics, tokenised before", "bytes": len(text.encode())}
    facts["text"] |= {"python": sys.version.split()[0], "tokens": len(ids)}
    vocabulary = {"package": f"mistral-common {version}", "name": "tekken", "entries": len(table)}
    return facts | {"vocabulary": vocabulary | {"bits": bits}}


def show_meter(figures):
    """Print the figures of `meter`."""
    text, vocabulary = figures["text"], figures["vocabulary"]
    print(f"transport alone, {figures['cap']:,} bytes/s: {text['source']}: ", end="")
    print(f"{text['tokens']:,} tokens of {vocabulary['name']} ({vocabulary['package']}), ", end="")
    print(f"{text['bytes'] / text['tokens']:.2f} bytes each")
    print(f"ceiling of {vocabulary['bits']} bits an id: {figures['ceiling']:,.0f} tokens/s")
    ours = statistics.median(figures["formats"]["cells"]["tokens"])
    for name, rates in figures["formats"].items():
        tokens, median = rates["tokens"], statistics.median(rates["tokens"])
        spread = f"({min(tokens):,.1f} to {max(tokens):,.1f}, {len(tokens)} rounds)"
        ratio = "" if name == "cells" else f"; ours is {ours / median:.1f} times as much"
        print(f"  {FORMATS[name]:34} {median:9,.1f} tokens/s {spread}{ratio}")
    for name, told in figures["descriptions"].items():
        print(f"{name}: {told}")
