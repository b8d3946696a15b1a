"""The gate under the fuzzer: in this process, or a real enclave at its port; and who plays a case.

A case is a list of actions, plain JSON, each with the number of its peer (a connection):

    world    state: "locked" or "ready": begin with an enclave that is so (in this process only)
    open     connect
    send     data: bytes as they are; cut: in pieces of so many bytes, as in frame and say; pause:
             seconds between them
    frame    data: a payload, in a frame; length: what its header says instead
    greet    role: connect and make a good handshake
    token    prove what the role has to, well
    say      data: a JSON message, as a good record
    record   data: a record's plaintext; way: fair, again (the last record's bytes once more),
             skipped (a number is left out), flipped (a bit), bare (not sealed); length: as in frame
    read     take all that has to come
    leave    how: close, reset, half (no more will be sent)
    stall    from here on the peer is silent, and has to be cut off
    dribble  peers: they send a byte now and then, within the handshake, and have to be cut off
    parse    target, data: one parser by itself (fuzz_targets.py); no peer

Data is text, or {"hex": ...}. In it @TOKEN@, @KEY@, @MODEL@, @USER@, @SHARE@, @NONCE@ stand for
what the target has, @LEASE@ for an id and @SEQUENCE@ for a number that were never used before.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import secrets
import socket
import struct
import tempfile
import threading
import time

import fuzz_oracle as oracle
import fuzz_targets as targets
from fuzz_targets import Finding

import muenclave as me
import muprotocol as mp

ROLES = ("user", "owner")
HOLD = "hold"  # how a prompt begins to which the double of the engine answers without an end
VOCABULARY = 300  # ids
CONTEXT = 4096
SEGMENT = 2000  # bytes of messages that go out together
TOKEN = "mu-" + "5a" * 32
SECRETS = {"owner": bytes([1]) * 32, "user": bytes([2]) * 32}
WEIGHTS_KEY = bytes([3]) * 32
FREE = 10**9  # bytes a second
QUICK = {"SHORTEST_TICK": 1000, "PAUSE": 0.02}  # of muenclave, in this process
IMPATIENT = {"HANDSHAKE_SECONDS": 3, "FRAME_SECONDS": 3}  # while peers stall in this process
SEQUENCE_START = 1000
NONCE = "ab" * 32
CHALLENGE = '{"version":1,"role":"%s","nonce":"@NONCE@","share":"@SHARE@","evidence":"psk"}'
TOKENS = {"user": '{"token":"@TOKEN@"}', "owner": '{"key":"@KEY@","model":"@MODEL@"}'}
LEASE = (
    '{"id":"@LEASE@","sequence":@SEQUENCE@,"rate":1000000000,"burst":1048576,'
    '"budget":1099511627776,"expiry":86400,"users":["@USER@"],'
    '"policy":{"verified":false,"latency_ms":0,"shape":"plain"}}'
)
UNLOCK = f'{{"key":"@KEY@","model":"@MODEL@","lease":{LEASE}}}'


class Lost(Exception):
    """The connection ended, or nothing came in time; `is_late` for the latter."""

    def __init__(self, text, is_late=False):
        self.is_late = is_late
        super().__init__(text)


def data_of(action):
    """The bytes of an action's data."""
    data = action.get("data", "")
    return bytes.fromhex(data["hex"]) if isinstance(data, dict) else data.encode()


def as_data(data):
    """Bytes as an action's data."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"hex": data.hex()}


# ---------------------------------------------------------------- the gate in this process


class Local:
    """The product's own Gate, welcome and Session in this process, on a socket in a folder.

    Doubles stand for init, loader and engine: they say what those say over the same pipes. Ticks
    and pauses are short (QUICK); deadlines are the product's, but where peers stall (IMPATIENT).
    """

    is_live = False
    dribble = 9  # seconds that peers dribble: long past IMPATIENT
    patience = 30  # seconds that anything may take

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="muenclave-")
        folder = pathlib.Path(self.folder.name)
        table = mp.encode_vocabulary([b"%d " % number for number in range(VOCABULARY)])
        self.table, self.header = table, header_of(table)
        model = folder / "model.mus"
        model.write_bytes(mp.MAGIC + len(self.header).to_bytes(4, "big") + self.header)
        for role, secret in SECRETS.items():
            (folder / role).write_text(secret.hex())
        self.settings = me.DEFAULTS | {"MODEL_PATH": str(model), "ENCLAVE_MEASUREMENT": "ab" * 32}
        self.settings |= {
            "ENCLAVE_OWNER_PSK": f"{folder}/owner",
            "ENCLAVE_USER_PSK": f"{folder}/user",
        }
        self.settings |= {"ENCLAVE_RATE": str(FREE), "ENCLAVE_BURST": str(1 << 30)}
        self.address = str(folder / "gate")
        self.crashes, self.gate, self.welcome = [], None, None
        self.psk, self.can = SECRETS, dict.fromkeys(ROLES, True)
        self.values = {"TOKEN": TOKEN, "KEY": WEIGHTS_KEY.hex()}
        self.values |= {"MODEL": hashlib.sha256(self.header).hexdigest()}
        self.values |= {"USER": hashlib.sha256(TOKEN.encode()).hexdigest()}
        self.vocabulary = (oracle.id_bits(VOCABULARY), VOCABULARY)
        self.hook, threading.excepthook = threading.excepthook, self.crashed
        self.kept = {name: getattr(me, name) for name in (*QUICK, *IMPATIENT)}
        self.hurry(QUICK)

    def hurry(self, constants):
        """Set constants of the product."""
        for name, value in constants.items():
            setattr(me, name, value)

    def crashed(self, arguments):
        """An exception that no thread caught."""
        at = arguments.exc_traceback
        while at.tb_next:
            at = at.tb_next
        place = f"{at.tb_frame.f_code.co_filename.rpartition('/')[2]}:{at.tb_lineno}"
        self.crashes.append(f"{arguments.exc_value!r} at {place}"[:600])

    def start(self, is_ready=True):
        """A fresh gate, locked, or unlocked by a good owner."""
        self.stop()
        self.crashes.clear()
        control, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        threading.Thread(target=self.play_init, args=(ours,), daemon=True).start()
        self.gate = me.Gate(self.settings, control)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.address)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen(256)
        listener.setblocking(False)
        self.world = oracle.World(self.values["MODEL"], self.values["KEY"])
        self.sequence = SEQUENCE_START
        self.welcome = threading.Thread(target=self.serve, args=(listener,), daemon=True)
        self.welcome.start()
        if is_ready:
            with contextlib.closing(Connection(self, 0)) as owner:
                owner.greet("owner")
                owner.say(self.fill(UNLOCK.encode()))
                owner.read()

    def serve(self, listener):
        """What gate_main does between its files and its end."""
        with listener:
            me.welcome(self.gate, listener, 1000, 1000)

    def stop(self):
        """End the gate, if there is one."""
        if self.gate is not None:
            with contextlib.suppress(OSError):
                self.gate.end_lease("lease_ended")
            self.welcome.join(self.patience)
            self.gate.control.close()
            self.gate = None

    def close(self):
        """End it all."""
        self.stop()
        self.hurry(self.kept)
        threading.excepthook = self.hook
        self.folder.cleanup()

    def play_init(self, control):
        """init's double: it starts doubles of loader and engine when the gate says so."""
        engine = None
        with control, contextlib.suppress(OSError):
            while letter := control.recv(64)[:1]:
                if letter in b"sk" and engine is not None:
                    with contextlib.suppress(OSError):
                        engine.shutdown(socket.SHUT_RDWR)
                if letter == b"s":
                    (gate_loader, loader), (gate_engine, engine) = (
                        socket.socketpair() for _ in range(2)
                    )
                    threading.Thread(target=self.play_loader, args=(loader,), daemon=True).start()
                    threading.Thread(target=play_engine, args=(engine,), daemon=True).start()
                    with gate_loader, gate_engine:
                        numbers = [gate_loader.fileno(), gate_engine.fileno()]
                        socket.send_fds(control, [b"s"], numbers)
        if engine is not None:
            with contextlib.suppress(OSError):
                engine.shutdown(socket.SHUT_RDWR)

    def play_loader(self, loader):
        """The loader's double: some progress, then the table of ids."""
        with loader, contextlib.suppress(OSError, EOFError):
            mp.read_frame(loader, mp.HEADER_LIMIT)
            mp.read_frame(loader, 32)
            loader.sendall(mp.frame(b"p\5") + mp.frame(b"v" + self.table))

    def connect(self):
        """A connection to the gate."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(self.patience)
        connection.connect(self.address)
        return connection

    def fill(self, data):
        """Data with what stands for its marks."""
        return fill(self, data)

    def is_harmful(self, peer, body):
        """Whether a message, well received, would end or slow down all that comes after it."""
        if peer.stage != "token" or peer.role != "owner":
            return False
        with contextlib.suppress(oracle.Refused):
            lease = oracle.parse(body, "unlock")[1].get("lease", {"rate": FREE, "burst": 1 << 20})
            policy = {"verified": False, "latency_ms": 0, "shape": "plain"}
            policy = lease.get("policy", policy)
            is_slow = lease["rate"] < FREE // 10 or lease["burst"] < 1 << 20
            is_short = lease.get("expiry", 3600) < 3600 or lease.get("budget", FREE) < FREE
            is_other = policy["verified"] or policy["latency_ms"] > 0
            return is_slow or is_short or is_other or policy["shape"] != "plain"
        return False

    def left_over(self):
        """A Finding if the gate has not given back what sessions took, once all have gone."""
        gate, deadline = self.gate, time.monotonic() + self.patience / 3
        while (gate.sessions or gate.replies) and time.monotonic() < deadline:
            time.sleep(0.001)
        if gate.sessions:
            return Finding(
                "growth", f"{len(gate.sessions)} sessions are left of peers that have gone"
            )
        if gate.replies:
            return Finding(
                "growth", f"{len(gate.replies)} answers are left of peers that have gone"
            )
        return None


def header_of(table):
    """The header of a sealed model, of which nobody will ever see more."""
    salt = bytes(32).hex()
    header = {"version": 1, "asset": "fuzzed", "model_type": "llama", "chunk_size": 1 << 20}
    header |= {"chunks": 1, "length": len(table), "salt": salt}
    header |= {"commitment": mp.key_commitment(WEIGHTS_KEY, salt).hex()}
    header |= {"vocabulary": hashlib.sha256(table).hexdigest()}
    header |= {"files": [{"path": mp.VOCABULARY_FILE, "offset": 0, "size": len(table)}]}
    return mp.encode_json(header)


def play_engine(gate):
    """The engine's double: a few ids for each request; those that HOLD wait for their cancel."""
    held = set()
    with gate, contextlib.suppress(OSError, EOFError):
        mp.read_frame(gate, mp.HANDSHAKE_FRAME)
        gate.sendall(mp.PIPE.pack(mp.LOADED, 0, CONTEXT))
        while True:
            message = json.loads(mp.read_frame(gate, mp.MESSAGE_LIMIT))
            if "cancel" in message:
                if message["cancel"] in held:
                    held.discard(message["cancel"])
                    gate.sendall(mp.PIPE.pack(mp.END, message["cancel"], 2))
                continue
            slot, text = message["slot"], message.get("prompt", "")
            if not text and "prompt" in message:
                gate.sendall(mp.PIPE.pack(mp.REFUSED, slot, 0))
                continue
            said = mp.PIPE.pack(mp.LENGTH, slot, min(1 + len(text), CONTEXT))
            count, size = min(message.get("max_new_tokens", 5), 5), VOCABULARY
            if "score" in message:
                count, size = 2 * len(message["score"]["ids"]) + 2, len(mp.CODES)
            for number in range(count):
                said += mp.PIPE.pack(mp.ID, slot, (7 * number + len(text)) % size)
            if text.startswith(HOLD):
                held.add(slot)
            else:
                said += mp.PIPE.pack(mp.END, slot, 1)
            gate.sendall(said)


def fill(stand, data):
    """Data with what stands for its marks."""
    if b"@" not in data:
        return data
    values = stand.values | {"SHARE": oracle.SHARE.hex(), "NONCE": NONCE}
    for name, value in values.items():
        data = data.replace(f"@{name}@".encode(), value.encode())
    while b"@LEASE@" in data:
        data = data.replace(b"@LEASE@", secrets.token_hex(16).encode(), 1)
    while b"@SEQUENCE@" in data:
        stand.sequence += 1
        data = data.replace(b"@SEQUENCE@", str(stand.sequence).encode(), 1)
    return data


# ---------------------------------------------------------------- an enclave at its port


class Live:
    """An enclave that runs somewhere, unlocked by its owner.

    address: (host, port). psk: {role: secret}. token: an access token of its lease. key: the
    weights key, 32 bytes; without these a role is refused behind its handshake. table: a
    vocabulary's, if known. pid: of its gate, on this machine, whose memory is watched.
    """

    is_live = True
    dribble = 30  # seconds that peers dribble: long past the product's deadline
    patience = 90  # seconds

    def __init__(self, address, psk, token=None, key=None, table=None, pid=None):
        self.address, self.psk, self.pid = address, psk, pid
        self.values = {
            "TOKEN": token or "-" * 20,
            "KEY": (key or bytes(32)).hex(),
            "MODEL": "00" * 32,
        }
        self.values["USER"] = hashlib.sha256(self.values["TOKEN"].encode()).hexdigest()
        self.vocabulary = (oracle.id_bits(len(table)), len(table)) if table else None
        self.can = {"user": bool(token and "user" in psk), "owner": bool(key and "owner" in psk)}
        self.crashes, self.sequence = [], time.time_ns() // 1000

    def start(self, is_ready=True):
        """Find out what the measurement says. Raises Lost, OSError."""
        with contextlib.closing(Connection(self, 0)) as peer:
            self.world = oracle.World(self.values["MODEL"], self.values["KEY"])
            peer.greet("user")
            self.values["MODEL"] = peer.measured["model"]
            is_ready = peer.measured["status"] == "ready"
        users = {self.values["USER"]} if self.can["user"] else ()
        key = self.values["KEY"] if self.can["owner"] else None
        self.world = oracle.World(self.values["MODEL"], key, users, is_ready)

    def close(self):
        """Nothing of it is ours."""

    def connect(self):
        """A connection. Raises OSError."""
        connection = socket.create_connection(self.address, self.patience)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def fill(self, data):
        """Data with what stands for its marks."""
        return fill(self, data)

    def is_harmful(self, peer, body):
        """Whether a message, well received, would change the lease, or ask for a long answer."""
        with contextlib.suppress(oracle.Refused):
            if peer.stage == "token" and peer.role == "owner":
                return "lease" in oracle.parse(body, "unlock")[1]
            if peer.stage == "serving" and peer.role == "owner":
                form, command = oracle.parse(body, "lock", "revoke")
                return form == "lock" or command["revoke"] == self.values["USER"]
            if peer.stage == "serving":
                request = oracle.parse(body, "generate", "chat")[1]
                return request.get("max_new_tokens", 1 << 24) > 64 or len(body) > 20_000
        return False

    def left_over(self):
        """Nobody can see that from outside."""
        return None


# ---------------------------------------------------------------- a peer


class Connection:
    """One peer of a case: the socket, and beside it what the gate has to make of it."""

    def __init__(self, stand, number):
        self.stand, self.number = stand, number
        self.socket = stand.connect()
        self.peer = oracle.Peer(getattr(stand, "world", oracle.World("", "")))
        self.has_left = self.is_stalled = False
        self.last = b""  # the last record's bytes
        self.waiting = b""  # messages of a session, to be sent in one segment
        self.taken = 0  # messages that came

    def close(self):
        """End it."""
        self.socket.close()

    def send(self, data, cut=None, pause=0):
        """Send bytes, in pieces if need be. That the gate has hung up is seen when it is read."""
        if self.has_left:
            return
        is_serving = self.peer.stage == "serving"
        self.peer.feed(data)
        self.waiting += data
        if is_serving and not cut and len(self.waiting) < SEGMENT:
            return
        self.flush(cut, pause)
        if self.peer.stage == "measurement" and not self.has_left:
            self.measure()

    def flush(self, cut=None, pause=0):
        """Send what waits to be sent with more."""
        data, self.waiting = self.waiting, b""
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(data), cut or len(data) or 1):
                self.socket.sendall(data[at : at + (cut or len(data))])
                if pause:
                    time.sleep(pause)

    def measure(self):
        """Take step 1 and check it; then the keys are known. Raises Lost, Refused."""
        payload, proof = self.frame(4096), self.frame(4096)
        self.measured = oracle.parse(payload, "measurement")[1]
        report = self.peer.agreed(payload)
        secret = self.stand.psk.get(self.peer.role)
        if secret and proof != mp.psk_proof(secret, report):
            raise oracle.Refused("the proof is not that of this session")

    def greet(self, role):
        """A good handshake."""
        challenge = self.stand.fill((CHALLENGE % role).encode())
        self.send(struct.pack(">I", len(challenge)) + challenge)
        if self.peer.stage != "token":
            raise oracle.Refused("a good challenge was not answered")

    def say(self, body, cut=None):
        """A message in a good record."""
        self.record(oracle.plain_message(body), cut=cut)

    def record(self, plain, way="fair", length=None, cut=None):
        """A record, made in one of these ways; before there are keys it is sealed by another."""
        key, count = getattr(self.peer, "key", bytes(32)), getattr(self.peer, "sent", 0)
        if way == "again" and self.last:
            data = self.last
        elif way == "bare":
            data = struct.pack(">I", len(plain)) + plain
        else:
            data = oracle.seal(key, count + (way == "skipped"), plain, length)
        if way == "flipped":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if hasattr(self.peer, "sent") and way in ("fair", "flipped", "skipped"):
            self.peer.sent += 1
        self.last = data
        self.send(data, cut)

    def frame(self, limit):
        """The payload of the next frame. Raises Lost; Refused for one that is too long."""
        (length,) = struct.unpack(">I", self.exactly(4))
        if length > limit:
            raise oracle.Refused(f"a frame of {length} bytes")
        return self.exactly(length)

    def exactly(self, size):
        """So many bytes. Raises Lost."""
        data, deadline = b"", time.monotonic() + self.stand.patience
        while len(data) < size:
            block = self.block(size - len(data), deadline)
            if not block:
                raise Lost(f"peer {self.number}: the end came where {self.due()} was due")
            data += block
        return data

    def block(self, size, deadline, flags=0):
        """Some bytes, b"" at the end. Raises Lost if nothing comes until the deadline."""
        self.socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            return self.socket.recv(size, flags)
        except TimeoutError:
            text = f"peer {self.number}: nothing came in time where {self.due()} was due"
            raise Lost(text, True) from None
        except ConnectionError:
            return b""

    def is_kept(self):
        """Whether the gate still takes bytes of this peer; it gets one."""
        try:
            self.socket.sendall(b" ")
            self.socket.settimeout(0.001)
            self.has_left = not self.socket.recv(1)
        except TimeoutError:
            return True
        except ConnectionError:
            self.has_left = True
        return not self.has_left

    def due(self):
        """What has to come, in words."""
        first = self.peer.due[0] if self.peer.due else ("the end",)
        return self.peer.wanted(first)

    def is_unproved(self):
        """Whether its token's answer has not come yet."""
        return bool(self.peer.due) and self.taken == 0

    def is_stuck(self):
        """Whether a frame that is not whole holds up an answer: that one may last."""
        is_cut = len(self.peer.wire) > 0 and not self.peer.is_ending
        return is_cut and any(item[0] == "answer" for item in self.peer.due)

    def read(self):
        """Take all that has to come. Raises Lost; Refused for what the protocol does not have."""
        peer = self.peer
        self.flush()
        if self.has_left or self.is_stalled or self.is_stuck():
            return
        while peer.is_waiting():
            if not peer.due and peer.is_ending:
                return self.end()
            held = peer.due and peer.due[0][0] == "answer" and len(peer.due) == 1
            if held and str(peer.due[0][1].get("prompt", "")).startswith(HOLD):
                self.say(b'{"cancel":true}')
                self.flush()
            try:
                self.take()
            except Lost as error:
                if error.is_late or not peer.may_be_cut(self.stand.is_live):
                    raise
                self.has_left = True
                return None

    def take(self):
        """One message."""
        message = None
        while message is None:
            payload = self.frame(oracle.CELL - 4)
            if len(payload) != oracle.CELL - 4:
                raise oracle.Refused(f"a record of {len(payload) + 4} bytes, not of a cell's")
            message = self.peer.answers.open(payload)
        self.taken += 1
        self.peer.check(*message, self.stand.vocabulary)

    def end(self):
        """Nothing more may come but the end, or why all sessions end. Lost, Refused."""
        deadline = time.monotonic() + self.stand.patience
        if self.peer.ending() is not None and self.block(1, deadline, socket.MSG_PEEK):
            self.take()
        if data := self.block(1 << 16, deadline):
            raise oracle.Refused(f"{len(data)} bytes where the end was due: {data[:40].hex()}")
        self.has_left = True

    def leave(self, how):
        """Hang up in one way or another. Raises Refused for what comes though nothing was due."""
        if self.has_left:
            return
        self.flush()
        if how == "reset" and self.socket.family != socket.AF_UNIX:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
        if how == "half":
            is_quiet = not self.peer.due and self.peer.ending() is None
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
            if is_quiet and not self.is_stalled:
                return self.end()
            deadline = time.monotonic() + self.stand.patience
            while self.block(1 << 16, deadline):
                pass  # it was asked for, and need not come any more
        self.has_left = True
        self.socket.close()


# ---------------------------------------------------------------- who plays a case


class Player:
    """Plays actions against a stand, and says what went wrong. counts: messages, by action."""

    def __init__(self, stand):
        self.stand, self.counts, self.replies = stand, {}, 0

    def count(self, name, number=1):
        """One more message."""
        self.counts[name] = self.counts.get(name, 0) + number

    def play(self, actions):
        """A Finding, or None. Afterwards no peer is left; a gate that has changed is replaced."""
        if actions and actions[0]["do"] == "parse":
            return self.parse_all(actions)
        peers, action = {}, {"do": "start"}
        try:
            self.prepare(actions)
            for action in actions:
                self.act(peers, action)
            for peer in [*peers.values()]:
                action = {"do": "end", "peer": peer.number}
                self.finish(peer)
            return self.crash() or self.stand.left_over()
        except oracle.Refused as error:
            return self.crash() or Finding(
                "reply", f"{action['do']}, peer {action.get('peer')}: {error}"
            )
        except Lost as error:
            return self.crash() or Finding("hang" if error.is_late else "refused", str(error))
        except OSError as error:
            return self.crash() or Finding(
                "hang", f"{action['do']}: the gate takes no more: {error}"
            )
        finally:
            for peer in peers.values():
                self.replies += peer.taken
                peer.close()

    def parse_all(self, actions):
        """Cases of one parser each."""
        for action in actions:
            self.count(action["target"])
            if found := targets.TARGETS[action["target"]].check(data_of(action)):
                return found
        return None

    def crash(self):
        """A Finding for what a thread of the gate did not catch."""
        return Finding("crash", self.stand.crashes[0]) if self.stand.crashes else None

    def prepare(self, actions):
        """Have the enclave locked or ready, as the case wants it."""
        stand = self.stand
        wanted = actions[0]["state"] if actions and actions[0]["do"] == "world" else "ready"
        if stand.is_live:
            return
        is_good = stand.gate is not None and stand.gate.code is None and not stand.crashes
        is_good = is_good and stand.world.is_ready == (wanted == "ready")
        is_good = is_good and (wanted == "locked" or stand.values["USER"] in stand.world.users)
        if not is_good:
            stand.start(wanted == "ready")
        stalls = any(action["do"] in ("stall", "dribble") for action in actions)
        stand.hurry(IMPATIENT if stalls else {name: stand.kept[name] for name in IMPATIENT})

    def act(self, peers, action):
        """One action."""
        what, number = action["do"], action.get("peer", 0)
        if what == "world":
            return
        if what == "dribble":
            self.dribble([peers[n] for n in action["peers"] if n in peers])
            return
        if what in ("open", "greet"):
            if number in peers:
                peers.pop(number).close()
            if self.stand.world.is_over:
                return  # after a lock nobody comes in any more
            peers[number] = Connection(self.stand, number)
            if what == "greet":
                self.count("greet")
                peers[number].greet(action["role"])
            return
        peer = peers.get(number)
        if peer is None:
            return
        if peer.peer.role == "owner":  # who may change what others' tokens are worth
            for other in [other for other in peers.values() if other.is_unproved()]:
                other.read()
        if what == "read":
            peer.read()
        elif what == "leave":
            peer.leave(action["how"])
        elif what == "stall":
            peer.flush()
            peer.is_stalled = True
        else:
            self.put(peer, action)
        if peer.peer.has_changed:
            peer.peer.has_changed = False
            peer.read()

    def put(self, peer, action):
        """Send what an action says."""
        what, data = action["do"], self.stand.fill(data_of(action))
        if what == "token":
            data, what = self.stand.fill(TOKENS[peer.peer.role or "user"].encode()), "say"
        if what == "say" and self.stand.is_harmful(peer.peer, data):
            return
        self.count(action["do"])
        if what == "say" and peer.peer.role:
            peer.say(data, action.get("cut"))
        elif what == "record":
            peer.record(data, action.get("way", "fair"), action.get("length"))
        elif what == "frame":
            length = action.get("length", len(data))
            peer.send(struct.pack(">I", length) + data, action.get("cut"))
        else:
            peer.send(data, action.get("cut"), action.get("pause", 0))

    def dribble(self, peers):
        """Peers that send a byte now and then: as slow as can be, but never silent. Raises Lost."""
        until = time.monotonic() + self.stand.dribble
        kept = [peer for peer in peers if not peer.has_left]
        while kept and time.monotonic() < until:
            time.sleep(0.5)
            kept = [peer for peer in kept if peer.is_kept()]
        if kept:
            raise Lost(f"peer {kept[0].number} is kept though its frame never ends", True)

    def finish(self, peer):
        """The end of a case, for one peer: what is due comes; then it leaves, and nothing more."""
        if peer.is_stalled:
            deadline = time.monotonic() + self.stand.patience
            while peer.block(1 << 16, deadline):
                pass
            return
        peer.read()
        peer.leave("half")

    def is_served(self):
        """A Finding unless a good user, and a good owner, are served now."""
        actions = []
        for number, role in enumerate(ROLES):
            if self.stand.can[role]:
                actions += [{"do": "greet", "peer": number, "role": role}]
                actions += [{"do": "token", "peer": number}, {"do": "read", "peer": number}]
        found = self.play(actions)
        return found and Finding("hang", f"a good client was not served: {found.text}")


def memory(pid="self"):
    """The resident memory of a process, in bytes; None if it can't be read."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        text = pathlib.Path(f"/proc/{pid}/status").read_text()
        return (
            int(next(row for row in text.splitlines() if row.startswith("VmRSS")).split()[1]) << 10
        )
    return None
