"""muenclave: what runs in the guest, in the order in which data passes through it: settings and
measurement, confinement, init, gate, loader; then, apart from them, the engine.

Threat model. The asset is the model's weights, and the 32-byte weights key that opens the sealed
copy the host already holds. The host operator reads and changes disks and network, and starts,
stops and floods this machine at will; API users send anything; the engine (torch, drivers, a
poisoned file) is assumed compromised. What stands against them is here and in muprotocol.py:

    init     holds nothing; starts the others when the gate says so; ends when the gate ends
    gate     parses every byte from outside, holds the weights key for a lease, meters what leaves
    loader   authenticates and decrypts the sealed weights into a memory arena, seals it, ends
    engine   computes; has the arena and one pipe of fixed-size messages; never a key, no way out

What the bound rests on is init, gate and loader. The engine may be wrong in every way.
"""

import argparse
import collections
import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import mmap
import os
import platform
import re
import resource
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import muprotocol as mp
from muprotocol import ProtocolError

# ==== settings and measurement

CONFIG_FILE = "/etc/muenclave.conf"
DEFAULTS = """
MODEL_PATH=  ENCLAVE_PORT=9000  ENCLAVE_BIND=127.0.0.1  ENCLAVE_EVIDENCE=psk
ENCLAVE_OWNER_PSK=  ENCLAVE_USER_PSK=  ENCLAVE_RATE=5120  ENCLAVE_BURST=32768
ENCLAVE_SESSIONS=64  ENCLAVE_SLOTS=8  ENCLAVE_CONTEXT=4096  ENCLAVE_DEVICE=cpu
ENCLAVE_THREADS=0  ENCLAVE_CONFINEMENT=seccomp
"""
LEAST = {"ENCLAVE_RATE": 64, "ENCLAVE_BURST": 16384, "ENCLAVE_SESSIONS": 2, "ENCLAVE_SLOTS": 1}
MODULES = ("muenclave.py", "muprotocol.py")
MOUNT_POINTS = ("dev", "proc", "sys", "tmp", "run", "usr/lib/muenclave/extras")


class StartError(Exception):
    """The enclave can't start; the text is one line that says why and what to do."""


def read_settings(flags, path=CONFIG_FILE):
    """Settings by environment name: flags override the environment, which overrides the file.

    Raises StartError for an unreadable file, an unknown name or a value that is no number.
    """
    defaults = dict(word.split("=") for word in DEFAULTS.split())
    environment = {name: os.environ[name] for name in defaults if name in os.environ}
    values = defaults | read_config(path) | environment | flags
    for name, value in values.items():
        if name not in defaults:
            raise StartError(f"{path}: unknown setting {name!r}")
        is_number = re.fullmatch("[0-9]{1,15}", value) is not None
        if defaults[name].isdigit() and not (is_number and int(value) >= LEAST.get(name, 0)):
            raise StartError(f"{name}: {value!r} is not a number from {LEAST.get(name, 0)} up")
    return values


def read_config(path):
    """The KEY=value lines of a file, {} if there is none. Raises StartError."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip() and line[0] != "#"]
        return dict(re.fullmatch(r"(\w+)\s*=\s*(.*)", line).groups() for line in lines)
    except (OSError, UnicodeDecodeError, AttributeError):
        raise StartError(f"can't read {path}: it must hold KEY=value lines") from None


def local_manifest():
    """The manifest of a run outside a VM: both guest modules, Python, every installed package.

    It says which code a development enclave claims to run; only a measured boot proves it.
    """
    folder = os.path.dirname(os.path.abspath(__file__))
    files = {name: _file_hash(os.path.join(folder, name)) for name in MODULES}
    found = importlib.metadata.distributions()
    packages = {str(d.metadata["Name"]).lower(): d.version for d in found}
    version = platform.python_version()
    return {"kind": "local", "files": files, "python": version, "packages": packages}


def root_manifest(root, kernel, command_line):
    """The manifest of a guest: (path, mode, SHA-256) of its root file system, kernel, command line.

    What is mounted at run time is left out by name, so that image and running guest agree.
    """
    files = []
    for folder, folders, names in os.walk(root):
        if os.path.relpath(folder, root) in MOUNT_POINTS:
            folders.clear()
            continue
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for path in (os.path.join(folder, name) for name in names + links):
            is_link = os.path.islink(path)
            target = os.fsencode(os.readlink(path)) if is_link else b""
            content = hashlib.sha256(target).hexdigest() if is_link else _file_hash(path)
            files.append([os.path.relpath(path, root), f"{os.lstat(path).st_mode:o}", content])
    files.sort()
    return {"kind": "root", "files": files, "kernel": kernel, "command_line": command_line}


def _file_hash(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


# ==== confinement
# By ctypes and prctl. The filter is an allow-list that answers EPERM; clone3 gets ENOSYS, so that
# the C library falls back to clone, whose flags a filter can see.

UIDS = {"gate": 64001, "loader": 64002, "engine": 64003}
ARCHITECTURES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # column, AUDIT_ARCH
SYSCALLS = """
read 0 63, write 1 64, close 3 57, fstat 5 80, poll 7 -1, lseek 8 62, mmap 9 222, mprotect 10 226,
munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
ioctl 16 29, sched_yield 24 124, mremap 25 216, madvise 28 233, getpid 39 172, sendto 44 206,
recvfrom 45 207, sendmsg 46 211, recvmsg 47 212, shutdown 48 210, getsockname 51 204,
setsockopt 54 208, getsockopt 55 209, clone 56 220, exit 60 93, fcntl 72 25, ftruncate 77 46, gettid 186 178,
futex 202 98, sched_getaffinity 204 123, clock_gettime 228 113, clock_nanosleep 230 115,
exit_group 231 94, newfstatat 262 79, ppoll 271 73, set_robust_list 273 99, accept4 288 242,
preadv2 327 286, getrandom 318 278, seccomp 317 277, rseq 334 293, clone3 435 435
"""
# A rule is None (allow) or (argument, mask, value): allow if argument & mask == value.
EVERYWHERE = dict.fromkeys(
    "read write close fstat lseek munmap brk rt_sigaction rt_sigprocmask rt_sigreturn sched_yield "
    "mremap madvise getpid sendto recvfrom sendmsg recvmsg exit gettid futex sched_getaffinity "
    "clock_gettime clock_nanosleep exit_group set_robust_list getrandom rseq".split()
) | {"clone": (0, 0x10000, 0x10000)}  # CLONE_THREAD: threads, never processes
NO_EXECUTE = {"mmap": (2, mmap.PROT_EXEC, 0), "mprotect": (2, mmap.PROT_EXEC, 0)}
FIONBIO = {"ioctl": (1, 0xFFFFFFFF, 0x5421)}  # how Python makes a socket non-blocking
GATE_SOCKETS = "accept4 poll ppoll shutdown setsockopt getsockopt getsockname".split()
RULES = {  # torch compiles its CPU kernels at run time: the engine alone may map executable memory
    "gate": EVERYWHERE | NO_EXECUTE | FIONBIO | dict.fromkeys(GATE_SOCKETS),
    "loader": EVERYWHERE | NO_EXECUTE | dict.fromkeys("preadv2 ftruncate fcntl".split()),
    "engine": EVERYWHERE | dict.fromkeys("mmap mprotect poll ppoll fcntl".split()),
}
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
EPERM, ENOSYS = 1, 38


def libc():
    """The C library; its results are checked by `check`."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.syscall.restype = ctypes.c_long
    return library


def check(result, what):
    """Raise OSError if a C call failed. seccomp's positive results are failures too."""
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def drop_privileges(role, level):
    """Give up user, groups, capabilities and core dumps; die with init.

    Single-threaded, since these are per thread. level: "full" changes to the role's own uid,
    "seccomp" keeps it, "none" changes nothing. Raises OSError.
    """
    if level == "none":
        return
    library = libc()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if role != "loader":  # which sizes the arena, a file to the kernel
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for capability in range(64 if os.getuid() == 0 else 0):
        library.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if level == "full":
        os.setgroups([])
        os.setresgid(*[UIDS[role]] * 3)
        os.setresuid(*[UIDS[role]] * 3)
    check(library.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)), "capset")
    check(library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
    check(library.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "PR_SET_DUMPABLE")
    check(library.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")


def filter_program(rules, machine):
    """The seccomp filter of an allow-list, as bytes of classic BPF, 8 for each instruction."""
    column, audit = ARCHITECTURES[machine]
    rows = [entry.split() for entry in SYSCALLS.replace("\n", " ").split(",")]
    numbers = {row[0]: int(row[column]) for row in rows}
    load, equal, mask_with, give = 0x20, 0x15, 0x54, 0x06
    allow, refuse, absent = 0x7FFF0000, 0x50000 | EPERM, 0x50000 | ENOSYS
    program = [(load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, refuse), (load, 0, 0, 0)]
    program += [(equal, 0, 1, numbers["clone3"]), (give, 0, 0, absent)]
    for name, rule in rules.items():
        if rule is None:
            program += [(equal, 0, 1, numbers[name] & 0xFFFFFFFF), (give, 0, 0, allow)]
            continue
        argument, mask, value = rule
        program += [(equal, 0, 5, numbers[name]), (load, 0, 0, 16 + 8 * argument)]
        program += [(mask_with, 0, 0, mask), (equal, 0, 1, value), (give, 0, 0, allow)]
        program += [(give, 0, 0, refuse)]
    program.append((give, 0, 0, refuse))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def confine(role, level):
    """Install the role's filter on every thread of this process. Raises OSError."""
    if level == "none":
        return
    code = filter_program(RULES[role], platform.machine())
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    number = {"x86_64": 317, "aarch64": 277}[platform.machine()]
    mode_filter, for_all_threads = 1, 1
    result = libc().syscall(number, mode_filter, for_all_threads, ctypes.c_char_p(header))
    check(result, "the system call filter")


# ==== init
# Starts the gate, and loader and engine when the gate asks. The gate's messages are a letter each:
# s start loader and engine, k kill them, a start me afresh, r confined and running, l a line of
# LOG by number (with the port, for the first); e, an error text, is heard only before r.

LOG = ("listening", "locked", "loading", "ready", "engine lost", "lease ended")
DRAIN_SECONDS = 60  # from SIGTERM to the end of running answers
KEPT = ("PYTHONPATH", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def init_main(settings):
    """Run the enclave until its gate ends. Returns the exit status. Raises StartError."""
    if settings["ENCLAVE_CONFINEMENT"] != "none" and platform.machine() not in ARCHITECTURES:
        raise StartError("this machine has no seccomp filter for us; see --unconfined")
    for name in ("cryptography", "torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise StartError(f"{name} is not installed; pip install 'muenclave[inference]'")
    environment = {name: os.environ[name] for name in KEPT if name in os.environ} | settings
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": "/nonexistent"}  # else torch wants a writable /tmp
    wake, wake_up = socket.socketpair()
    wake_up.setblocking(False)
    signal.set_wakeup_fd(wake_up.fileno())
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    status = None
    while status is None:
        status = supervise(environment, wake)
    print("muenclave: stopped", file=sys.stderr, flush=True)
    return status


def supervise(environment, wake):
    """Run one gate to its end. Returns the exit status, None if it is to be started afresh."""
    control, for_gate = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gate, helpers, heard, timeout = spawn("gate", environment, for_gate), [], set(), None
    message = b" "
    while message:
        ready, _, _ = select.select([control, wake], [], [], timeout)
        if wake in ready:  # a signal: the gate drains; a second one ends it
            wake.recv(64)
            gate.terminate()
            timeout = DRAIN_SECONDS if timeout is None else 0
        if not ready or timeout == 0:
            break
        if control not in ready:
            continue
        message = control.recv(512)
        letter = message[:1]
        if letter in (b"s", b"k"):
            end(helpers)
            helpers = start_helpers(control, environment) if letter == b"s" else []
        elif letter == b"l":
            port = f" {int.from_bytes(message[2:4], 'big')}" if message[1] == 0 else ""
            print(f"muenclave: {LOG[message[1]]}{port}", file=sys.stderr, flush=True)
        elif letter == b"e" and b"r" not in heard:
            raise StartError(message[1:].decode("utf-8", "replace"))
        heard.add(letter)
    control.close()
    end([*helpers, gate])
    return None if b"a" in heard and timeout is None else int(gate.returncode != 0)


def spawn(role, environment, *sockets):
    """Start a process of ours; it inherits these sockets and nothing else."""
    numbers = [connection.fileno() for connection in sockets]
    command = [sys.executable, "-B", os.path.abspath(__file__), f"--{role}", *map(str, numbers)]
    options = {name: subprocess.DEVNULL for name in ("stdin", "stdout", "stderr")}
    options |= {"env": environment, "pass_fds": numbers, "start_new_session": True}
    child = subprocess.Popen(command, **options)
    for connection in sockets:
        connection.close()
    return child


def start_helpers(control, environment):
    """Start loader and engine, joined by a pipe; give the gate its pipes to both."""
    (gate_loader, loader_gate), (gate_engine, engine_gate), (loader_engine, engine_loader) = (
        socket.socketpair() for _ in range(3)
    )
    loader = spawn("loader", environment, loader_gate, loader_engine)
    engine = spawn("engine", environment, engine_gate, engine_loader)
    with gate_loader, gate_engine:
        socket.send_fds(control, [b"s"], [gate_loader.fileno(), gate_engine.fileno()])
    return [loader, engine]


def end(children):
    """Kill and reap; a gate that has closed its control socket is about to end by itself."""
    for child in children:
        try:
            child.wait(0.5 if child is children[-1] else 0)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


# ==== gate
# A thread for each session, which reads as the protocol does, from top to bottom; one thread for
# the engine. What they share is Gate, under one lock.

HANDSHAKE_SECONDS = 10  # from connecting to an accepted token
FRAME_SECONDS = 30  # from a frame's first byte to its last; for the peer to take what we send
IDLE_SECONDS = 900
LEAVE_SECONDS = 5  # for the last records before the gate ends
PAUSE = 0.5  # seconds between two looks at whether the lease has ended
SHORTEST_TICK = 20_000_000  # ns
HANDSHAKES = (20, 64)  # a second, and at once
HANDSHAKE_SHARE = 16  # a 16th of the rate: strangers can't starve the lease, nor it them
RESPAWNS = 8  # engine deaths in a lease
PIPE_READ = 64 << 10  # bytes taken from the engine at a time
CORRECTABLE = (*mp.REFUSALS, "bad_json", "bad_message", "policy_refused", "busy", "engine_lost")
STATES = {  # state: event -> next state
    "locked": {"unlock": "loading", "end": "lease ended"},
    "loading": {"loaded": "ready", "end": "lease ended"},
    "ready": {"died": "loading", "end": "lease ended"},
    "lease ended": {},
}


def read_header(path):
    """The unparsed header of the sealed model. Raises StartError."""
    if not path:
        raise StartError("no model; set MODEL_PATH or --model to a sealed model (.mus)")
    try:
        with open(path, "rb") as file:
            return file.read(mp.header_length(file.read(mp.PREFIX)))
    except (OSError, ProtocolError) as error:
        raise StartError(f"can't use the model {path}: {error}") from None


class Psk:
    """Evidence for development: HMAC under a role's provisioning secret. Says who, not what."""

    def __init__(self, settings):
        self._secrets = {}
        for role, name in (("owner", "ENCLAVE_OWNER_PSK"), ("user", "ENCLAVE_USER_PSK")):
            try:
                with open(settings[name], encoding="ascii") as file:
                    self._secrets[role] = mp.parse_secret(file.read())
            except (OSError, ValueError) as error:
                raise StartError(f"{name}: no secret in {settings[name]!r}: {error}") from None

    def produce(self, role, data):
        """The proof over 32 bytes of report data."""
        return mp.psk_proof(self._secrets[role], data)


EVIDENCE = {"psk": Psk}


class Outlet:
    """The way out through a meter: whoever sends waits until it has paid for every byte."""

    def __init__(self, meter):
        self.meter = meter
        self._turn = threading.Lock()

    def send(self, connection, data):
        """Write bytes to a socket, in turn. Raises OSError."""
        with self._turn:
            while not self.meter.take(len(data), time.monotonic_ns()):
                time.sleep(self.meter.wait(len(data), time.monotonic_ns()) / mp.NANOSECOND)
        connection.settimeout(FRAME_SECONDS)
        connection.sendall(data)


class Gate:
    """What all sessions share. `lock` guards every field that changes."""

    def __init__(self, settings, header, evidence, measurement, control):
        self.settings, self.evidence, self.control = settings, evidence, control
        self.measurement, self.header = measurement, header
        self.digest = hashlib.sha256(header).hexdigest()
        self.limit = int(settings["ENCLAVE_SESSIONS"])
        self.lock = threading.RLock()
        self.state, self.code = "locked", None  # code: why the lease ended
        self.account = mp.Account()
        self.container = self.key = self.engine = self.vocabulary = None
        self.progress = self.context = self.restarts = 0
        self.is_draining = False
        self.replies = {}  # slot: Reply
        self.sessions = []
        rate, burst = int(settings["ENCLAVE_RATE"]), int(settings["ENCLAVE_BURST"])
        now = time.monotonic_ns()
        # Full at the start: before an unlock, nothing that leaves was chosen by an engine.
        self.handshakes = Outlet(mp.Meter(rate, burst // 2, now - burst * mp.NANOSECOND))
        self.cells = Outlet(mp.Meter(rate, burst // 2, now))
        self.set_rate(rate, burst)

    def set_rate(self, rate, burst):
        """Split the rate between handshakes and sessions; a tick is a cell's time."""
        now, share = time.monotonic_ns(), rate // HANDSHAKE_SHARE
        self.handshakes.meter.change(share, burst // 2, now)
        self.cells.meter.change(rate - share, burst // 2, now)
        self.tick = max(SHORTEST_TICK, mp.CELL * mp.NANOSECOND // (rate - share))

    def wait_tick(self):
        """Sleep to the next tick, so that the moments of what leaves are those of a clock."""
        time.sleep((self.tick - time.monotonic_ns() % self.tick) / mp.NANOSECOND)

    def log(self, line, number=0):
        """Have init print a line of LOG."""
        self.control.send(b"l" + bytes([LOG.index(line)]) + number.to_bytes(2, "big"))

    def enter(self, event):
        """Follow STATES; False if the state does not know the event."""
        following = STATES[self.state].get(event)
        if following is not None:
            self.state = following
            self.log(following)
        return following is not None

    def unlock(self, token):
        """Check an unlock token; with a lease, take that and load the weights. ProtocolError."""
        with self.lock:
            if token["model"] != self.digest:
                raise ProtocolError("wrong_model")
            container = self.container or mp.Container(self.header)
            key = bytes.fromhex(token["key"])
            if not container.is_key(key):
                raise ProtocolError("wrong_key")
            self.container = container
            if "lease" not in token:
                return
            if self.code:
                raise ProtocolError("lease_refused")
            self.account.add(token["lease"], time.monotonic_ns())
            self.set_rate(token["lease"]["rate"], token["lease"]["burst"])
            self.key = key
            if self.enter("unlock"):
                threading.Thread(target=self.run_engine, daemon=True).start()

    def charge(self, bits):
        """Take bits from the budget before what they pay for leaves; without them the lease ends."""
        with self.lock:
            try:
                self.account.charge(bits)
            except ProtocolError as error:
                self.end_lease(error.code)
                raise

    def end_lease(self, code):
        """Kill the engine, drop the key, end every answer; the gate then starts afresh.

        Python can't be trusted to erase the key: only the end of this process does.
        """
        with self.lock:
            if not self.enter("end"):
                return
            self.code = code
            self.control.send(b"k")
            self.key, self.account = None, mp.Account()
            for reply in self.replies.values():
                reply.error = code

    def run_engine(self):
        """Load and serve; an engine that dies is loaded afresh within the lease."""
        try:
            while self.state != "lease ended":
                self.load()
                self.read_engine()
                with self.lock:
                    self.control.send(b"k")
                    for reply in self.replies.values():
                        reply.error = reply.error or "engine_lost"
                    self.replies.clear()
                    if self.enter("died"):
                        self.log("engine lost")
                        self.restarts += 1
                        self.charge(mp.LENGTH_BITS)
                if self.restarts > RESPAWNS:
                    raise ProtocolError("lease_ended")
        except ProtocolError as error:
            self.end_lease(error.code)

    def load(self):
        """Start loader and engine; wait until the model can answer. Raises ProtocolError."""
        try:
            self.control.send(b"s")
            _, numbers, _, _ = socket.recv_fds(self.control, 16, 2)
            loader, engine = (socket.socket(fileno=number) for number in numbers)
            engine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 30, 0))
            with self.lock:
                self.engine, self.vocabulary, key = engine, None, self.key or b""
            loader.sendall(mp.frame(self.header) + mp.frame(key))
            self.to_engine({"model_type": self.container.fields["model_type"]})
            while self.vocabulary is None:
                message = mp.read_frame(loader, mp.MESSAGE_LIMIT)
                if message[:1] == b"v":
                    self.vocabulary = mp.Vocabulary(message[1:])
                elif message[:1] == b"c":
                    raise ProtocolError("container_corrupt")
                self.progress = message[1]
            kind, _, value = mp.PIPE.unpack(mp.read_exactly(engine, mp.PIPE.size))
        except (EOFError, OSError):
            raise ProtocolError("out_of_memory") from None  # the kernel ended it
        if kind != mp.LOADED:
            raise ProtocolError(mp.FAILURES[min(value, len(mp.FAILURES) - 1)])
        with self.lock:
            self.context = min(value, int(self.settings["ENCLAVE_CONTEXT"]))
            self.enter("loaded")

    def read_engine(self):
        """Take the engine's messages until it dies, or says what it may not say."""
        try:
            while True:
                data = self.engine.recv(PIPE_READ)
                data += mp.read_exactly(self.engine, -len(data) % mp.PIPE.size)
                with self.lock:
                    for message in mp.PIPE.iter_unpack(data):
                        self.take_message(*message)
                if not data:
                    return
        except (OSError, EOFError, ProtocolError):
            return

    def take_message(self, kind, slot, value):
        """One message of the engine. Raises ProtocolError if it may not say that now."""
        reply = self.replies.get(slot)
        if reply is None:
            raise ProtocolError("bad_message")
        if kind == mp.ID and value < len(self.vocabulary) and reply.limit > 0:
            reply.limit -= 1
            reply.since = reply.since if reply.ids else time.monotonic_ns()
            if not reply.is_cancelled:
                reply.ids.append(value)
        elif kind == mp.LENGTH and not reply.prompt_tokens and 0 < value <= self.context:
            self.charge(mp.LENGTH_BITS)
            reply.prompt_tokens = value
        elif kind in (mp.END, mp.REFUSED) and value < len(mp.ENDINGS):
            self.charge(mp.ENDING_BITS)
            reply.ending = mp.ENDINGS[value]
            reply.error = mp.REFUSALS[value] if kind == mp.REFUSED else None
            del self.replies[slot]
        else:
            raise ProtocolError("bad_message")

    def open_reply(self, request):
        """Give a request to the engine. Returns the reply that it fills: `ids` that have not left,
        the oldest of which came at `since` (ns), and `limit` that may still come. ProtocolError.
        """
        shaped = {"top_p", "top_k", "repetition_penalty"} & request.keys()
        with self.lock:
            if self.is_draining or self.code:
                raise ProtocolError(self.code or "draining")
            if self.state != "ready":
                raise ProtocolError("engine_lost")
            if self.account.lease["policy"]["verified"] and (shaped or "seed" not in request):
                raise ProtocolError("policy_refused")
            free = set(range(2 * self.limit)) - self.replies.keys()
            if not free:  # taken by cancelled answers that the engine has not ended yet
                raise ProtocolError("busy")
            reply = types.SimpleNamespace(slot=min(free), ids=collections.deque(), since=0)
            reply.limit = min(request.get("max_new_tokens", self.context), self.context)
            reply.ending, reply.error, reply.is_cancelled, reply.prompt_tokens = (
                None,
                None,
                False,
                0,
            )
            self.replies[reply.slot] = reply
        kept = {k: v for k, v in request.items() if k not in ("stop", "encoding", "stream")}
        self.to_engine({"seed": secrets.randbits(63)} | kept | {"slot": reply.slot})
        return reply

    def cancel(self, reply):
        """Have the engine end an answer early; what has not been sent by now never leaves."""
        with self.lock:
            is_new = not (reply.is_cancelled or reply.ending or reply.error)
            reply.is_cancelled = True
            reply.ids.clear()
        if is_new:
            self.to_engine({"cancel": reply.slot})

    def to_engine(self, value):
        """Send the engine a message; one that does not take it is as good as dead."""
        try:
            self.engine.sendall(mp.frame(mp.encode_json(value)))
        except OSError:
            self.control.send(b"k")

    def ready(self):
        """What a session is told at step 3, and an owner who asks for the status."""
        with self.lock:
            lease = self.account.lease or {"id": "", "sequence": 0}
            status = "ready" if self.state == "ready" else "locked"
            facts = {"status": status, "model": self.digest, "context": self.context}
            facts |= {"budget_left": self.account.bits // 8, "restarts": self.restarts}
            facts |= {name: self.container.fields[name] for name in ("asset", "vocabulary")}
            return facts | {"lease": lease["id"], "sequence": lease["sequence"]}


class Session:
    """One peer's connection, from its challenge to its last record."""

    def __init__(self, gate, connection):
        self.gate, self.connection = gate, connection
        self.outlet = gate.handshakes
        self.role = self.user = self.sealer = self.opener = None

    def run(self):
        """Serve the peer. One that breaks the protocol hears no more than an error's code."""
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        try:
            self.handshake(deadline)
            self.prove(self.read(deadline, mp.HANDSHAKE_FRAME))
            self.outlet = self.gate.cells
            self.await_ready()
            while True:
                self.await_frame()
                self.serve(self.read(time.monotonic() + FRAME_SECONDS))
        except (OSError, EOFError):
            pass  # it hung up, or took too long
        except ProtocolError as error:
            self.refuse(error)
        finally:
            self.connection.close()
            with self.gate.lock:
                self.gate.sessions.remove(self)

    def read(self, deadline, limit=mp.REQUEST_FRAME):
        """The body of the next message, one record. EOFError for a record that fails."""
        seconds = deadline - time.monotonic()
        try:
            message = self.opener.open(mp.read_frame(self.connection, limit, seconds))
        except ProtocolError as error:
            raise EOFError(error.code) from None
        if message is None or message[0] != mp.JSON_RECORD:
            raise EOFError("bad_record")
        return message[1]

    def say(self, value):
        """Send a JSON message, as cells."""
        for cell in self.sealer.seal_json(value):
            self.outlet.send(self.connection, cell)

    def refuse(self, error):
        """Send an error, if there are keys yet: its code, and the limit that was passed."""
        if self.sealer is not None:
            limit = {} if error.limit is None else {"limit": error.limit}
            self.say({"error": error.code} | limit)

    def handshake(self, deadline):
        """Steps 0 and 1: agree on keys, bind the transcript into evidence."""
        gate, kind = self.gate, self.gate.settings["ENCLAVE_EVIDENCE"]
        seconds = deadline - time.monotonic()
        payload = mp.read_frame(self.connection, mp.HANDSHAKE_FRAME, seconds)
        challenge = mp.parse_message(payload, mp.CHALLENGE)
        if challenge["version"] != mp.VERSION or challenge["evidence"] != kind:
            raise ProtocolError("version_unsupported")
        share, status = mp.KeyShare(), "locked" if gate.code else gate.state
        posture = {"confinement": gate.settings["ENCLAVE_CONFINEMENT"], "debug": False}
        facts = {"measurement": gate.measurement, "nonce": secrets.token_hex(32)}
        facts |= {"model": gate.digest, "status": status, "posture": posture}
        answer = mp.encode_json(facts | {"share": share.public.hex()})
        transcript = mp.transcript_hash(payload, answer)
        keys = mp.session_keys(share.agree(bytes.fromhex(challenge["share"])), transcript)
        proof = gate.evidence.produce(challenge["role"], mp.report_data(kind, transcript))
        self.outlet.send(self.connection, mp.frame(answer) + mp.frame(proof))
        self.role = challenge["role"]
        self.opener = mp.Opener(keys["h2e"], mp.REQUEST_FRAME)
        self.sealer = mp.Sealer(keys["e2h"], mp.CELL)

    def prove(self, body):
        """Step 2: an unlock token from an owner, an access token from a user."""
        gate = self.gate
        if self.role == "owner":
            gate.unlock(mp.parse_message(body, mp.UNLOCK))
            return
        token = mp.parse_message(body, mp.ACCESS)["token"]
        with gate.lock:
            user = gate.account.user(token)
            if sum(other.user is not None for other in gate.sessions) >= gate.limit - 1:
                raise ProtocolError("busy")  # the last place is kept for the owner
            self.user = user

    def await_ready(self):
        """Step 3: progress in tenths while the weights load, then ready."""
        told = None
        while self.gate.state == "loading":
            if told != self.gate.progress:
                told = self.gate.progress
                self.say({"status": "loading", "progress": told})
            self.gate.wait_tick()
        if self.gate.code:
            raise ProtocolError(self.gate.code)
        self.say(self.gate.ready())

    def await_frame(self):
        """Wait for the first byte of the next message. Raises the code with which a lease ends."""
        idle_until = time.monotonic() + IDLE_SECONDS
        while not is_readable(self.connection, PAUSE):
            if self.gate.code or time.monotonic() > idle_until:
                raise ProtocolError(self.gate.code or "timeout")

    def serve(self, body):
        """Step 4: a request, or an owner's command. A mistake may be mended by the next one."""
        try:
            if self.role == "owner":
                self.command(mp.parse_message(body, *mp.OWNER))
                return
            request = mp.parse_message(body, mp.GENERATE, mp.GENERATE_CHAT, mp.CANCEL)
            if "cancel" not in request:  # which crossed the answer's end
                self.answer(request)
        except ProtocolError as error:
            if error.code not in CORRECTABLE:
                raise
            self.refuse(error)

    def command(self, command):
        """An owner's status, lock or revoke."""
        if "lock" in command:
            self.gate.end_lease("lease_ended")
        if "revoke" in command:
            with self.gate.lock:
                self.gate.account.revoke(command["revoke"])
                for session in self.gate.sessions:
                    if session.user == command["revoke"]:
                        session.connection.shutdown(socket.SHUT_RDWR)
        self.say(self.gate.ready())

    def answer(self, request):
        """Step 5: a cell of ids a tick, then the final record, whose every field the gate fills."""
        gate, ticks, sent, text = self.gate, 0, 0, ""
        reply = gate.open_reply(request)
        is_text = request.get("encoding") == "text"
        cutter = mp.TextCutter(gate.vocabulary, request.get("stop", ()) if is_text else ())
        try:
            while reply.ids or not (reply.ending or reply.error):
                gate.wait_tick()
                ticks += 1
                gate.charge(1)
                self.take_cancel(reply)
                ids = self.next_ids(reply)
                sent += len(ids)
                text += cutter.feed(ids)
                if cutter.stopped:
                    gate.cancel(reply)
                if ids and not is_text:
                    for cell in self.sealer.seal(mp.IDS_RECORD, gate.vocabulary.pack(ids)):
                        self.outlet.send(self.connection, cell)
        finally:
            gate.cancel(reply)
        if reply.error:
            limit = gate.context if reply.error in mp.REFUSALS[1:] else None
            raise ProtocolError(reply.error, limit=limit)
        counts = (reply.prompt_tokens, sent, reply.prompt_tokens + sent)
        final = {"usage": dict(zip(mp.USAGE, counts, strict=True)), "restarts": gate.restarts}
        final |= {"finish_reason": "stop" if cutter.stopped else reply.ending}
        final |= {"elapsed_ms": ticks * gate.tick // 10**6, "budget_left": gate.account.bits // 8}
        if is_text:
            final["completion"] = text + cutter.feed([], last=True)
        self.say(final)

    def next_ids(self, reply):
        """Ids for one cell, charged to the budget, if they fill it or have waited long enough."""
        gate, bits = self.gate, self.gate.vocabulary.bits
        room = mp.CELL_ROOM * 8 // bits
        with gate.lock:
            lease, now = gate.account.lease, time.monotonic_ns()
            due = reply.since + (lease["policy"]["latency_ms"] * 1_000_000 if lease else 0)
            if len(reply.ids) < room and now < due and not (reply.ending or reply.error):
                return []
            ids = [reply.ids.popleft() for _ in range(min(room, len(reply.ids)))]
            gate.charge(8 * -(-len(ids) * bits // 8))
            return ids

    def take_cancel(self, reply):
        """All that a peer may say while it is answered. Raises EOFError if it hung up."""
        if is_readable(self.connection, 0):
            mp.parse_message(self.read(time.monotonic() + FRAME_SECONDS), mp.CANCEL)
            self.gate.cancel(reply)


def is_readable(connection, seconds):
    """Whether there is something to read, or the end, within so many seconds (None: at last)."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def gate_main(settings, control):
    """The gate process, from its first file to its last record."""
    level = settings["ENCLAVE_CONFINEMENT"]
    try:
        if settings["ENCLAVE_EVIDENCE"] not in EVIDENCE:
            raise StartError(f"ENCLAVE_EVIDENCE must be one of {', '.join(EVIDENCE)}")
        evidence = EVIDENCE[settings["ENCLAVE_EVIDENCE"]](settings)
        measurement = mp.manifest_digest(local_manifest())
        header = read_header(settings["MODEL_PATH"])
        gate = Gate(settings, header, evidence, measurement, control)
        address = (settings["ENCLAVE_BIND"], int(settings["ENCLAVE_PORT"]))
        listener = socket.create_server(address, backlog=256)
        port = listener.getsockname()[1]
        mp.warm_up()
        drop_privileges("gate", level)
        confine("gate", level)
    except (StartError, OSError, OverflowError, ImportError) as error:
        control.send(b"e" + str(error).encode()[:500])
        return 1
    control.send(b"r")
    gate.log("listening", port)
    gate.log("locked")
    signal.signal(signal.SIGTERM, lambda *_: setattr(gate, "is_draining", True))
    welcome(gate, listener)
    listener.close()
    leave_by = time.monotonic() + LEAVE_SECONDS
    while gate.sessions and time.monotonic() < leave_by:
        time.sleep(PAUSE / 10)
    if not gate.is_draining:
        control.send(b"a")
    return 0


def welcome(gate, listener):
    """Take connections until the lease has ended, each into a thread.

    When all places are taken, the oldest peer that has proved nothing makes room.
    """
    arrivals = mp.Meter(*HANDSHAKES, time.monotonic_ns() - 4 * mp.NANOSECOND)
    while gate.code is None:
        now = time.monotonic_ns()
        if gate.is_draining and not gate.replies:
            gate.end_lease("draining")
        elif gate.account.expires is not None and now >= gate.account.expires:
            gate.end_lease("lease_ended")
        if not is_readable(listener, PAUSE):
            continue
        time.sleep(arrivals.wait(1, now) / mp.NANOSECOND)
        arrivals.take(1, time.monotonic_ns())
        session = Session(gate, listener.accept()[0])
        with gate.lock:
            strangers = [other for other in gate.sessions if other.opener is None]
            gate.sessions.append(session)
            if len(gate.sessions) > gate.limit:
                (strangers or gate.sessions[-1:])[0].connection.shutdown(socket.SHUT_RDWR)
        threading.Thread(target=session.run, daemon=True).start()


# ==== loader


def loader_main(settings, gate, engine):
    """Decrypt the sealed model into an arena that nobody can write, and hand it to the engine.

    The key arrives only after confinement. Every chunk is verified before the engine gets any.
    """
    disk = os.open(settings["MODEL_PATH"], os.O_RDONLY | os.O_CLOEXEC)
    arena = os.memfd_create("arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    mp.warm_up()
    from cryptography.exceptions import InvalidTag

    drop_privileges("loader", settings["ENCLAVE_CONFINEMENT"])
    confine("loader", settings["ENCLAVE_CONFINEMENT"])
    container = mp.Container(mp.read_frame(gate, mp.HEADER_LIMIT))
    cipher = mp.aead(container.chunk_key(mp.read_frame(gate, 32)))
    try:
        vocabulary = unseal(disk, container, cipher, arena, gate)
    except (InvalidTag, EOFError, KeyError):
        gate.sendall(mp.frame(b"c"))
        return 1
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    fcntl.fcntl(arena, fcntl.F_ADD_SEALS, seals)
    gate.sendall(mp.frame(b"v" + vocabulary))
    table = mp.encode_json({"length": container.length, "files": container.files})
    socket.send_fds(engine, [len(table).to_bytes(4, "big")], [arena])
    engine.sendall(table)
    return 0


def unseal(disk, container, cipher, arena, gate):
    """Fill the arena, all chunks in parallel; return the vocabulary table in it.

    Raises InvalidTag for a chunk that fails authentication, EOFError for one that is missing.
    """
    os.ftruncate(arena, container.length)
    memory = mmap.mmap(arena, container.length)
    memory.madvise(mmap.MADV_DONTDUMP)
    workers = min(len(os.sched_getaffinity(0)), container.chunks)
    told = [0]  # tenths
    with memoryview(memory) as view, ThreadPoolExecutor(workers) as pool:

        def work(first):
            private = memoryview(bytearray(container.chunk_size + mp.TAG))
            for index in range(first, container.chunks, workers):
                unseal_chunk(disk, container, cipher, index, private, view)
                if first == 0:
                    tenths = index * 10 // container.chunks
                    gate.sendall(mp.frame(b"p" + bytes([tenths])) * (tenths > told[0]))
                    told[0] = tenths

        list(pool.map(work, range(workers)))
    start, size = container.files[mp.VOCABULARY_FILE]
    vocabulary = memory[start : start + size]
    memory.close()
    return vocabulary


def unseal_chunk(disk, container, cipher, index, private, arena):
    """Read one chunk into private memory (the host can change a disk under us), then decrypt it."""
    offset, start, size, nonce = container.chunk(index)
    sealed = private[: size + mp.TAG]
    if os.preadv(disk, [sealed], offset) != len(sealed):
        raise EOFError("the sealed model is truncated")
    if hasattr(cipher, "decrypt_into"):  # cryptography >= 47: no copy
        cipher.decrypt_into(nonce, sealed, None, arena[start : start + size])
    else:
        arena[start : start + size] = cipher.decrypt(nonce, sealed, None)


# ==== engine
# Nothing below is trusted with anything but answers. It has the arena and its pipe to the gate.

CHUNK = 256  # prompt tokens between two steps of the running streams: none of them starves
MASK = 0xF0000  # private-use plane 15: stands for a special token's text inside user text
WARM_CONFIG = """{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size":
    256, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}"""
WARM_TOKENIZER = b"""{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true}}"""
WARM_TEMPLATE = rb"""{% set n = namespace(a='\n') %}{% macro f(x) %}{{ x ~ n.a }}{% endmacro %}
    {% for m in messages %}{{ f(m['content'] | trim | tojson) }}{% endfor %}"""


def engine_main(settings, gate, loader):
    """Import, warm up, confine; only then take the arena; build the model, serve until killed."""
    level, device = settings["ENCLAVE_CONFINEMENT"], settings["ENCLAVE_DEVICE"]
    drop_privileges("engine", level)
    try:
        warm_up(json.loads(mp.read_frame(gate, mp.HANDSHAKE_FRAME))["model_type"], settings)
        confine("engine", level)
        files = map_arena(loader)
        generation = read_json(files, "generation_config.json")
        model = build_model(read_json(files, "config.json"), generation, read_state(files), device)
        decoder = Decoder(model, Prompter(files), settings, gate)
    except EOFError:
        return 1  # loader or gate have failed, and have said so
    except Exception as error:  # noqa: BLE001  a broken model may raise anything
        kinds = {ImportError: "no_engine", MemoryError: "out_of_memory"}
        failure = mp.FAILURES.index(kinds.get(type(error), "model_invalid"))
        gate.sendall(mp.PIPE.pack(mp.FAILED, 0, failure))
        return 1
    gate.sendall(mp.PIPE.pack(mp.LOADED, 0, decoder.context))
    return decoder.serve()


def map_arena(loader):
    """Receive the sealed arena; map it copy-on-write. Returns {file name: memoryview}."""
    size, (descriptor,), _, _ = socket.recv_fds(loader, 4, 1)
    table = json.loads(mp.read_exactly(loader, int.from_bytes(size, "big")))
    length, access = ctypes.c_size_t(table["length"]), mmap.PROT_READ | mmap.PROT_WRITE
    address = libc().mmap(None, length, access, mmap.MAP_PRIVATE, descriptor, ctypes.c_size_t(0))
    os.close(descriptor)
    if address == ctypes.c_void_p(-1).value:
        raise MemoryError("the arena can't be mapped")
    libc().madvise(ctypes.c_void_p(address), length, mmap.MADV_DONTDUMP)
    arena = memoryview((ctypes.c_ubyte * length.value).from_address(address)).cast("B")
    return {name: arena[start : start + size] for name, (start, size) in table["files"].items()}


# -- the model


def read_json(files, name):
    """A JSON file of the model, {} if there is none."""
    return json.loads(bytes(files[name])) if name in files else {}


def read_state(files):
    """{name: tensor}, views into the arena, of a model in one file or in shards. ValueError."""
    import torch
    from transformers.modeling_utils import str_to_torch_dtype

    index = read_json(files, "model.safetensors.index.json").get("weight_map")
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    state, places = {}, {}
    for shard in shards:
        for name, dtype, shape, start, size in mp.safetensors_entries(files[shard]):
            dtype, data = str_to_torch_dtype[dtype], files[shard][start : start + size]
            state[name] = (
                torch.frombuffer(data, dtype=dtype) if size else torch.empty(0, dtype=dtype)
            )
            state[name] = state[name].reshape(shape)
            if places.setdefault(name, shard) != shard:
                raise ValueError("a tensor is in two shards")
    if places != (index or places) or (index is None and shards != ["model.safetensors"]):
        raise ValueError("the index does not agree with the shards")
    return state


def build_model(fields, generation, state, device):
    """transformers' own class for the config, filled from memory; no path, no remote code.

    fields, generation: config.json and generation_config.json; state: {name: tensor}.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

    if "auto_map" in fields:
        raise ValueError("remote code")
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=config.dtype or next(iter(state.values())).dtype,
        generation_config=GenerationConfig.from_dict(generation),
        device_map={"": device},
        local_files_only=True,
        output_loading_info=True,
    )
    if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ValueError("the tensors are not this config's")
    return model.eval()


def warm_up(model_type, settings):
    """Import and run what the real model will use, on a tiny one: later nothing can be opened."""
    import jinja2.debug  # noqa: F401  for a template that is wrong
    import torch
    import transformers

    torch.set_num_threads(int(settings["ENCLAVE_THREADS"]) or torch.get_num_threads())
    config = transformers.CONFIG_MAPPING[model_type](**json.loads(WARM_CONFIG))
    tiny = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(torch.bfloat16)
    model = build_model(config.to_dict(), {}, tiny.state_dict(), settings["ENCLAVE_DEVICE"])
    files = {"tokenizer.json": WARM_TOKENIZER, "chat_template.jinja": WARM_TEMPLATE}
    decoder = Decoder(model, Prompter(files), settings, None)
    chat = {"messages": [{"role": "user", "content": "a"}], "date": "b", "top_k": 5, "top_p": 0.9}
    decoder.take(chat | {"slot": 0, "seed": 1, "temperature": 0.7, "repetition_penalty": 1.1})
    decoder.take({"prompt": "ab", "slot": 1, "seed": 2, "max_new_tokens": 3})
    while decoder.is_busy():
        decoder.step()


# -- prompts


class Prompter:
    """Turns requests into ids; text from outside never becomes a special token.

    Special tokens' texts inside user text are masked by one private character each, the template
    is rendered, the result is split at the special tokens that the template itself wrote, and
    every run between them is unmasked and encoded by a tokenizer that knows no special token.
    """

    def __init__(self, files):
        from tokenizers import Tokenizer
        from transformers.utils.chat_template_utils import _compile_jinja_template

        fields = read_json(files, "tokenizer.json")
        added = {token["content"]: token for token in fields.pop("added_tokens", ())}
        self.added, self.texts = added, sorted(added, key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(re.escape, self.texts)) or '(?!)'})")
        full = Tokenizer.from_str(bytes(files["tokenizer.json"]).decode())
        self.plain = Tokenizer.from_str(json.dumps(fields | {"post_processor": None}))
        config = read_json(files, "tokenizer_config.json")
        config |= read_json(files, "special_tokens_map.json")
        named = {name: token for name, token in config.items() if name.endswith("_token")}
        texts = {name: t["content"] if isinstance(t, dict) else t for name, t in named.items()}
        self.variables = {name: t for name, t in texts.items() if isinstance(t, str)}
        template = bytes(files.get("chat_template.jinja", b"")).decode()
        self.template = _compile_jinja_template(template or config.get("chat_template", ""))
        del self.template.environment.globals["strftime_now"]  # a template gets no clock
        whole, alone = full.encode("a").ids, self.plain.encode("a").ids
        self.prefix = whole[: whole.index(alone[0])] if alone else []

    def encode(self, request):
        """The prompt's ids. Raises ValueError, or what a template raises."""
        if "prompt" in request:
            return self.prefix + self.encode_run(request["prompt"])
        chat = [m | {"content": self.mask(m["content"])} for m in request["messages"]]
        values = self.variables | {"messages": chat, "add_generation_prompt": True}
        if "date" in request:
            values["date_string"] = self.mask(request["date"])
        text = self.template.render(values | {"tools": None, "documents": None})
        pieces, ids = self.pattern.split(text), []
        for number, piece in enumerate(pieces):
            if number % 2:
                ids.append(self.added[piece]["id"])
                continue
            neighbours = [self.added.get(p, {}) for p in ("", *pieces, "")[number : number + 3 : 2]]
            piece = piece.lstrip() if neighbours[0].get("rstrip") else piece
            piece = piece.rstrip() if neighbours[1].get("lstrip") else piece
            ids += self.encode_run(self.unmask(piece))
        return ids

    def mask(self, text):
        """User text in which no special token's text is left. ValueError if it holds a mask."""
        if any(MASK <= ord(letter) < MASK + len(self.texts) for letter in text):
            raise ValueError("the text holds a mask character")
        return self.pattern.sub(lambda found: chr(MASK + self.texts.index(found[0])), text)

    def unmask(self, text):
        """The inverse of `mask`."""
        masks = {MASK + number: special for number, special in enumerate(self.texts)}
        return text.translate(masks)

    def encode_run(self, text):
        """Ids of text without special tokens. Raises ValueError should there be one in them."""
        ids = self.plain.encode(text, add_special_tokens=False).ids if text else []
        if any(token["special"] and token["id"] in ids for token in self.added.values()):
            raise ValueError("the text would become a special token")
        return ids


# -- decoding


class SlotCache:
    """Keys and values of all streams, a row each with positions of its own; to transformers a cache.

    The decoder sets `rows` (a slice), `positions` (rows, tokens) and `span` before each pass.
    """

    def __init__(self, rows, context):
        self.shape = (rows, context)
        self.layers = {}

    def update(self, keys, values, layer, *_, **__):
        """Store (rows, heads, tokens, size) at the positions; return all that is attended to."""
        if layer not in self.layers:
            sizes = [
                (self.shape[0], new.shape[1], self.shape[1], new.shape[3]) for new in (keys, values)
            ]
            self.layers[layer] = [keys.new_zeros(size) for size in sizes]
        stored = [store[self.rows] for store in self.layers[layer]]
        for store, new in zip(stored, (keys, values), strict=True):
            index = self.positions.new_tensor(range(len(new)))[:, None]
            store[index, :, self.positions] = new.transpose(1, 2)
        return tuple(store[:, :, : self.span] for store in stored)

    def get_seq_length(self, *_):
        """Tokens cached; positions are always given, so it only has to be a number."""
        return self.span


class Decoder:
    """A batch with a row for each stream; requests join and leave it between two tokens.

    A stream: slot, ids (the prompt, then what was sampled), cached (how many of them are in the
    cache), limit of ids, seed and the sampling options.
    """

    def __init__(self, model, prompter, settings, gate):
        config, self.defaults = model.config, model.generation_config
        self.model, self.prompter, self.gate = model, prompter, gate
        limits = (config.max_position_embeddings, getattr(config, "sliding_window", None))
        self.context = min(int(settings["ENCLAVE_CONTEXT"]), *filter(None, limits))
        self.rows = [None] * int(settings["ENCLAVE_SLOTS"])
        self.cache = SlotCache(len(self.rows), self.context)
        ends = self.defaults.eos_token_id or config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends}
        self.waiting = collections.deque()
        self.out = bytearray()

    def is_busy(self):
        """Whether there is anything to compute."""
        return bool(self.waiting) or any(self.rows)

    def serve(self):
        """Take messages and make tokens until the gate is gone."""
        while True:
            while is_readable(self.gate, 0 if self.is_busy() else None):
                try:
                    self.take(json.loads(mp.read_frame(self.gate, mp.MESSAGE_LIMIT)))
                except EOFError:
                    return 0
            self.step()
            self.gate.sendall(self.out)
            self.out.clear()

    def take(self, message):
        """A request or a cancel from the gate."""
        if "cancel" in message:
            for stream in [*self.waiting, *filter(None, self.rows)]:
                if stream.slot == message["cancel"]:
                    self.end(stream, "cancelled")
            return
        slot, wanted = message["slot"], message.get("max_new_tokens", 0)
        try:
            ids = self.prompter.encode(message)
        except Exception:  # noqa: BLE001  templates raise what they like
            ids = []
        size = len(ids)
        if not ids or size >= self.context or size + wanted > self.context:
            refusal = 0 if not ids else 1 if size >= self.context else 2
            self.out += mp.PIPE.pack(mp.REFUSED, slot, refusal)
            return
        self.out += mp.PIPE.pack(mp.LENGTH, slot, size)
        stream = types.SimpleNamespace(slot=slot, ids=ids, cached=0, seed=message["seed"])
        stream.limit = size + wanted if wanted else self.context
        for name, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
            default = getattr(self.defaults, name, None)
            setattr(stream, name, message.get(name, neutral if default is None else default))
        default = self.defaults.repetition_penalty or 1.0
        stream.penalty = message.get("repetition_penalty", default)
        if not self.defaults.do_sample and "temperature" not in message:
            stream.temperature = 0.0
        self.waiting.append(stream)

    def end(self, stream, reason):
        """Free the stream's place."""
        self.out += mp.PIPE.pack(mp.END, stream.slot, mp.ENDINGS.index(reason))
        if stream in self.waiting:
            self.waiting.remove(stream)
        else:
            self.rows[self.rows.index(stream)] = None

    def step(self):
        """One chunk of one prompt, then one token for every stream whose prompt is in the cache."""
        import torch

        while self.waiting and None in self.rows:
            self.rows[self.rows.index(None)] = self.waiting.popleft()
        streams = list(filter(None, self.rows))
        running = [stream for stream in streams if len(stream.ids) == stream.cached + 1]
        filling = next((stream for stream in streams if stream not in running), None)
        with torch.inference_mode():
            if filling is not None:
                chunk = filling.ids[filling.cached : filling.cached + CHUNK]
                logits = self.forward(self.rows.index(filling), [chunk], [filling.cached])
                filling.cached += len(chunk)
                if filling.cached == len(filling.ids):
                    self.emit([filling], logits)
            if running:
                top = 1 + max(map(self.rows.index, running))
                rows = [row if row in running else None for row in self.rows[:top]]
                tokens = [[row.ids[-1] if row else 0] for row in rows]
                places = [
                    row.cached if row else other.cached if other else 0
                    for row, other in zip(rows, self.rows)
                ]
                logits = self.forward(0, tokens, places)
                for stream in running:
                    stream.cached += 1
                self.emit(running, logits[[self.rows.index(stream) for stream in running]])

    def forward(self, first, tokens, starts):
        """Logits (rows, vocabulary) after the last token of each row, of cache rows from `first`.

        A row that only fills a gap writes where its own next token will be written.
        """
        import torch

        device, dtype = self.model.device, self.model.dtype
        tokens = torch.tensor(tokens, device=device)
        count, width = tokens.shape
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(
            width, device=device
        )
        self.cache.rows, self.cache.positions = slice(first, first + count), positions
        self.cache.span = max(starts) + width
        hidden = torch.arange(self.cache.span, device=device) > positions[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        mask.masked_fill_(hidden, torch.finfo(dtype).min)
        facts = {"position_ids": positions, "attention_mask": mask, "cache": self.cache}
        output = self.model(tokens, **facts, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].float()

    def emit(self, streams, logits):
        """Sample a token for each stream and tell the gate; end those that are done."""
        for stream, token in zip(streams, sample(streams, logits), strict=True):
            stream.ids.append(token)
            if token in self.ends:
                self.end(stream, "stop")
                continue
            self.out += mp.PIPE.pack(mp.ID, stream.slot, token)
            if len(stream.ids) >= stream.limit:
                self.end(stream, "length")


def sample(streams, logits):
    """One token id a stream from logits (streams, vocabulary): Gumbel-max with seeded noise.

    argmax(logit / T + g) draws from softmax(logit / T) if g is Gumbel noise (Maddison, Tarlow,
    Minka 2014). The noise depends on seed, position and token only, so an answer can be re-scored.
    """
    import torch
    import transformers as hf

    for row, s in enumerate(streams):
        ids, scores = torch.tensor([s.ids], device=logits.device), logits[row : row + 1]
        if s.penalty != 1.0:
            scores = hf.RepetitionPenaltyLogitsProcessor(float(s.penalty))(ids, scores)
        if s.temperature:
            scores = scores / s.temperature
        if s.temperature and s.top_k:
            scores = hf.TopKLogitsWarper(s.top_k)(ids, scores)
        if s.temperature and s.top_p < 1:
            scores = hf.TopPLogitsWarper(float(s.top_p))(ids, scores)
        if s.temperature:
            scores = scores + gumbel(s.seed, len(s.ids), scores.shape[1], scores.device)
        logits[row] = scores[0]
    return logits.argmax(-1).tolist()


def gumbel(seed, position, size, device):
    """Gumbel noise (size,): a function of seed, position and token id, by integer hashing.

    The hash is "lowbias32" (C. Wellons, hash-prospector), on 32-bit words in int64.
    """
    import torch

    digest = hashlib.sha256(seed.to_bytes(8, "big") + position.to_bytes(8, "big")).digest()
    words = torch.arange(size, device=device)
    for key in struct.unpack(">II", digest[:8]):
        words = words ^ key
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            words = (words ^ (words >> shift)) * factor & 0xFFFFFFFF
    return -torch.log(-torch.log((words.double() + 0.5) / 2**32)).float()


# ==== command line


def main(argv=None):
    """`python -m muenclave`; also each of its processes. Returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in ROLES:
        sockets = [socket.socket(fileno=int(number)) for number in arguments[1:]]
        return ROLES[arguments[0]](dict(os.environ), *sockets)
    parser = argparse.ArgumentParser(prog="muenclave", description="Serve a sealed model.")
    for name, default in (word.split("=") for word in DEFAULTS.split()):
        flag = "--" + name.removeprefix("ENCLAVE_").removesuffix("_PATH").lower().replace("_", "-")
        parser.add_argument(flag, dest=name, help=f"{name} (default: {default or 'none'})")
    parser.add_argument("--conf", default=CONFIG_FILE, help="file of KEY=value lines")
    unconfined = {"action": "store_const", "const": "none", "dest": "ENCLAVE_CONFINEMENT"}
    parser.add_argument("--unconfined", **unconfined, help="development only; proxies refuse it")
    options = vars(parser.parse_args(arguments))
    path = options.pop("conf")
    try:
        flags = {name: value for name, value in options.items() if value is not None}
        return init_main(read_settings(flags, path))
    except StartError as error:
        print(f"muenclave: error: {error}", file=sys.stderr)
        return 1


ROLES = {"--gate": gate_main, "--loader": loader_main, "--engine": engine_main}

if __name__ == "__main__":
    sys.exit(main())
