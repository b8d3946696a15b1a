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

import collections
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import itertools
import json
import mmap
import os
import re
import resource
import secrets
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import muprotocol as mp
from muprotocol import GONE, ProtocolError, is_readable

# ==== settings
# In the guest from CONFIG_FILE, elsewhere from the environment, which tools/enclave.py fills in.

CONFIG_FILE = "/etc/muenclave.conf"
MANIFEST_FILE = "/etc/muenclave.manifest"  # of the image: its SHA-256 is what a guest says it is
SETTINGS = """
MODEL_PATH=  ENCLAVE_PORT=9000  ENCLAVE_BIND=127.0.0.1  ENCLAVE_EVIDENCE=psk
ENCLAVE_OWNER_PSK=  ENCLAVE_USER_PSK=  ENCLAVE_TPM=/dev/tpmrm0  ENCLAVE_MEASUREMENT=
ENCLAVE_RATE=5120  ENCLAVE_BURST=32768  ENCLAVE_SESSIONS=64  ENCLAVE_SLOTS=8  ENCLAVE_RANKS=1
ENCLAVE_CONTEXT=4096  ENCLAVE_DEVICE=cpu  ENCLAVE_THREADS=0  ENCLAVE_CONFINEMENT=seccomp
"""
DEFAULTS = dict(word.split("=") for word in SETTINGS.split())


def read_config(path=CONFIG_FILE):
    """The settings in a file's lines of KEY=value. Raises OSError, ValueError."""
    with open(path, encoding="utf-8") as file:
        lines = [line for line in map(str.strip, file) if line and line[0] != "#"]
    return dict(re.split(r"\s*=\s*", line, maxsplit=1) for line in lines)


# ==== confinement
# By ctypes and prctl. The filter is an allow-list that answers EPERM; clone3 gets ENOSYS, so that
# the C library falls back to clone, whose flags a filter can see.

UIDS = {"gate": 64001, "loader": 64002, "engine": 64003}
# Name, number on x86-64, who may call it (gate, loader, engine; v: an engine on a GPU), and a
# condition: argument & mask == value; a call in several lines needs one of them. clone makes
# threads (CLONE_THREAD), not processes; sendto can't connect (MSG_FASTOPEN). ioctl makes a socket
# non-blocking (FIONBIO), or drives a GPU, whose requests are of type 0x46, or plain numbers (UVM);
# setsockopt sets SO_SNDTIMEO; fcntl seals and duplicates (1030, F_DUPFD_CLOEXEC), and sends no
# signals (F_SETSIG). No new mapping of gate and loader is executable; torch compiles its CPU
# kernels at run time, so the engine's may be. Ranks talk by writev and epoll_wait, on connections
# that they had before.
SYSCALLS = """
read 0 gle, write 1 gle, close 3 gle, fstat 5 gle, lseek 8 gle, munmap 11 gle, brk 12 gle,
rt_sigaction 13 gle, rt_sigprocmask 14 gle, rt_sigreturn 15 gle, sched_yield 24 gle, mremap 25 gle,
madvise 28 gle, getpid 39 gle, recvfrom 45 gle, exit 60 gle, gettid 186 gle, futex 202 gle,
sched_getaffinity 204 gle, restart_syscall 219 gle, clock_gettime 228 gle, clock_nanosleep 230 gle,
exit_group 231 gle, set_robust_list 273 gle, getrandom 318 gle, rseq 334 gle, poll 7 ge,
ppoll 271 ge, recvmsg 47 ge, accept4 288 g, shutdown 48 g, getsockopt 55 g, getsockname 51 g,
pread64 17 le, pwrite64 18 l, sendmsg 46 l, mmap 9 e, mprotect 10 e, writev 20 e, epoll_wait 232 e,
mmap 9 gl 2 4 0, mprotect 10 gl 2 4 0, clone 56 gle 0 0x10000 0x10000, sendto 44 gle 3 0x20000000 0,
ioctl 16 g 1 0xFFFFFFFF 0x5421, setsockopt 54 g 2 0xFFFFFFFF 21, fcntl 72 l 1 0xFFFFFFF0 0x400,
fcntl 72 e 1 0xFFFFFFFF 1030, ioctl 16 v 1 0xFF00 0x4600, ioctl 16 v 1 0xFFFFFF00 0
"""
AUDIT_ARCH, SECCOMP, MODE_FILTER, ALL_THREADS, CLONE3 = 0xC000003E, 317, 1, 1, 435
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
LIBC = ctypes.CDLL(None, use_errno=True)


def check(result, what):
    """Raise OSError if a C call failed. seccomp's positive results are failures too."""
    if result != 0:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")


def drop_privileges(role, level):
    """Give up user, groups, capabilities and core dumps; die with init.

    Single-threaded, since these are per thread. level: "full" changes to the role's own uid,
    "seccomp" keeps it. Raises OSError. An init that has died before PR_SET_PDEATHSIG is found out
    by the first use of a socket.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if role != "loader":  # which sizes the arena, a file to the kernel
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with contextlib.suppress(ValueError):  # more than we may; a guest has no swap
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
    drop_capabilities()
    if level == "full":
        os.setgroups([])
        os.setresgid(*[UIDS[role]] * 3)
        os.setresuid(*[UIDS[role]] * 3)
    set_capabilities(())
    options = {PR_SET_PDEATHSIG: signal.SIGKILL, PR_SET_DUMPABLE: 0, PR_SET_NO_NEW_PRIVS: 1}
    for option, value in options.items():
        check(LIBC.prctl(option, value, 0, 0, 0), f"prctl {option}")


def drop_capabilities(kept=()):
    """Have no process that this one starts hold other capabilities than those kept (numbers)."""
    for capability in set(range(64)).difference(kept):  # root may; others have none to give
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def set_capabilities(kept):
    """Hold these capabilities (numbers below 32), and no other. Raises OSError."""
    mask = sum(1 << capability for capability in kept)
    header, data = struct.pack("=Ii", 0x20080522, 0), struct.pack("=III12x", mask, mask, 0)
    check(LIBC.capset(header, data), "capset")


def filter_program(who):
    """The seccomp filter for these letters, as bytes of classic BPF, 8 for each instruction."""
    load, equal, mask_with, give = 0x20, 0x15, 0x54, 0x06
    allow, refuse, absent = 0x7FFF0000, 0x50001, 0x50026  # EPERM is 1, ENOSYS 38
    program = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH), (give, 0, 0, refuse), (load, 0, 0, 0)]
    program += [(equal, 0, 1, CLONE3), (give, 0, 0, absent)]
    for fields in map(str.split, SYSCALLS.split(",")):
        if not set(who).isdisjoint(fields[2]):
            argument, mask, value = (int(field, 0) for field in fields[3:] or "000")
            program += [(equal, 0, 5, int(fields[1])), (load, 0, 0, 16 + 8 * argument)]
            program += [(mask_with, 0, 0, mask), (equal, 0, 1, value)]
            program += [(give, 0, 0, allow), (load, 0, 0, 0)]
    return b"".join(struct.pack("=HBBI", *line) for line in [*program, (give, 0, 0, refuse)])


def confine(who):
    """Install the filter for these letters on every thread of this process. Raises OSError."""
    code = ctypes.create_string_buffer(filter_program(who))
    header = struct.pack("@HxxxxxxP", len(code) // 8, ctypes.addressof(code))
    check(LIBC.syscall(SECCOMP, MODE_FILTER, ALL_THREADS, header), "the system call filter")


# ==== init
# Starts the gate, and loader and engine when the gate asks. The gate's messages are a letter each:
# s start loader and engine, k kill them, l a line of LOG by number (with the port, for the first);
# e, an error text, is heard only before the first l: then it is confined. A gate whose lease has
# ended is started afresh when it ends.

LOG = ("listening", "locked", "loading", "ready", "engine lost", "lease ended")
WITHHELD = {"gate": (), "loader": ("_PSK",), "engine": ("_PSK", "_PATH")}  # ends of names


def init_main(settings):
    """Run gates one after the other, until one fails. Returns the exit status.

    A signal that ends this process ends all of them, by PR_SET_PDEATHSIG.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    settings = settings | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings["TORCHINDUCTOR_CACHE_DIR"] = "/proc"  # torch wants a folder: one that stays empty
    while supervise(settings):
        pass
    say("stopped")
    return 1


def say(text):
    """A line of the log."""
    print(f"muenclave: {text}", file=sys.stderr, flush=True)


def supervise(settings):
    """Run one gate to its end. Returns whether it has locked itself: the next one may come."""
    control, for_gate = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gate, helpers, told = spawn("gate", settings, for_gate), [], set()  # told: lines of LOG
    with control, contextlib.suppress(ConnectionError):  # it has ended with something unread
        while message := control.recv(512):
            letter = message[:1]
            if letter in (b"s", b"k"):
                end(helpers)
                helpers = start_helpers(control, settings) if letter == b"s" else []
            elif letter == b"l":
                port = f" {int.from_bytes(message[2:4], 'big')}" if message[1] == 0 else ""
                told.add(LOG[message[1]])
                say(LOG[message[1]] + port)
            elif letter == b"e" and not told:
                say("error: " + message[1:].decode("utf-8", "replace"))
    end(helpers)
    end([gate], LEAVE_SECONDS)
    return "lease ended" in told


def spawn(role, settings, *sockets):
    """Start a process of ours; it inherits these sockets and nothing else."""
    numbers = [connection.fileno() for connection in sockets]
    command = [sys.executable, "-B", os.path.abspath(__file__), f"--{role}", *map(str, numbers)]
    given = {k: v for k, v in settings.items() if not k.endswith(WITHHELD[role])}
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    child = subprocess.Popen(command, env=given, pass_fds=numbers, start_new_session=True, **quiet)
    for connection in sockets:
        connection.close()
    return child


def start_helpers(control, settings):
    """Start loader and engine, joined by a pipe; give the gate its pipes to both."""
    (gate_loader, loader_gate), (gate_engine, engine_gate) = (socket.socketpair() for _ in range(2))
    loader_engine, engine_loader = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    loader = spawn("loader", settings, loader_gate, loader_engine)
    engine = spawn("engine", settings, engine_gate, engine_loader)
    with gate_loader, gate_engine:
        socket.send_fds(control, [b"s"], [gate_loader.fileno(), gate_engine.fileno()])
    return [loader, engine]


def end(children, seconds=0):
    """Kill and reap; a gate that has closed its control socket ends by itself, in so many."""
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
        child.kill()
        child.wait()


# ==== PID 1 of the guest
# Nothing is mounted so that it can be written, and the root is made read-only. The kernel has no
# console: what the serial port shows is written here.

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
NO_FILES = MS_NOSUID | MS_NODEV | MS_NOEXEC
ONLY_DEVICES, NO_DEVICES = MS_NOSUID | MS_NOEXEC, MS_NOSUID | MS_NODEV | MS_RDONLY
INIT_CAPABILITIES = (5, 6, 7, 8, 22)  # KILL, SETGID, SETUID, SETPCAP for its children, SYS_BOOT
RB_AUTOBOOT = 0x01234567
MODULES, FINIT_MODULE = "/usr/lib/modules", 313


def guest_main(settings):
    """Mounts and log; then the enclave, whose settings are measured. The guest ends with it."""
    try:
        mount("proc", "/proc", "proc", NO_FILES, b"hidepid=2")
        mount("sysfs", "/sys", "sysfs", NO_FILES)
        with open("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "wb") as file:
            file.write(b"always")  # for the arena: huge pages are soon made, and soon found
        mount("", "/sys", "", MS_REMOUNT | MS_BIND | MS_RDONLY | NO_FILES)
        mount("securityfs", "/sys/kernel/security", "securityfs", NO_FILES | MS_RDONLY)
        mount("devtmpfs", "/dev", "devtmpfs", ONLY_DEVICES)
        os.dup2(os.open("/dev/ttyS0", os.O_WRONLY | os.O_NOCTTY), 2)
        sys.stderr = open(2, "w", encoding="ascii", errors="replace", closefd=False)
        if os.path.exists(MODULES):
            load_modules()
        mount("", "/dev", "", MS_REMOUNT | MS_BIND | MS_RDONLY | ONLY_DEVICES)
        if os.path.exists("/dev/dm-0"):  # without it the enclave can be verified, no more
            mount("/dev/dm-0", "/usr/lib/muenclave/extras", "squashfs", NO_DEVICES)
        mount("", "/", "", MS_REMOUNT | MS_RDONLY)
        drop_capabilities(INIT_CAPABILITIES)
        set_capabilities(INIT_CAPABILITIES)
        with open(MANIFEST_FILE, "rb") as file:
            measured = {"ENCLAVE_MEASUREMENT": hashlib.sha256(file.read()).hexdigest()}
        init_main(settings | read_config() | measured)
    except (OSError, ValueError) as error:
        say(f"error: {error}")
    finally:
        LIBC.reboot(RB_AUTOBOOT)


def mount(source, place, kind, flags, options=b""):
    """mount(2). Raises OSError."""
    words = (text.encode() for text in (source, place, kind))
    check(LIBC.mount(*words, ctypes.c_ulong(flags), options), f"can't mount {place}")


def load_modules():
    """Load the GPU's kernel modules and make its devices; from then on no more can be loaded.

    Signed with the kernel's own key, they are the only ones that it takes. Raises OSError.
    """
    for name in sorted(os.listdir(MODULES)):
        with open(f"{MODULES}/{name}", "rb") as file:
            check(LIBC.syscall(FINIT_MODULE, file.fileno(), b"", 0), name)
    with open("/proc/devices", encoding="ascii") as file:
        majors = {words[1]: int(words[0]) for words in map(str.split, file) if len(words) == 2}
    cards = len(os.listdir("/proc/driver/nvidia/gpus"))
    nodes = {f"nvidia{card}": ("nvidia", card) for card in range(cards)}
    nodes |= {"nvidiactl": ("nvidia", 255), "nvidia-uvm": ("nvidia-uvm", 0)}
    for name, (driver, minor) in nodes.items():
        os.mknod(f"/dev/{name}", stat.S_IFCHR | 0o600, os.makedev(majors[driver], minor))
        os.chown(f"/dev/{name}", UIDS["engine"], UIDS["engine"])
    with open("/proc/sys/kernel/modules_disabled", "w", encoding="ascii") as file:
        file.write("1")


# ==== gate
# A thread for each session, which reads as the protocol does, from top to bottom; one thread for
# the engine. What they share is Gate, under one lock.

HANDSHAKE_SECONDS = 10  # from connecting to an accepted token
FRAME_SECONDS = 30  # from a frame's first byte to its last; for the peer to take what we send
IDLE_SECONDS = 900
LEAVE_SECONDS = 5  # for the last records before the gate ends
PAUSE = 0.5  # seconds between two looks at whether the lease has ended
SHORTEST_TICK = 20_000_000  # ns
MISSED_TURNS = 3  # that sessions which woke up late may still take, as far as the burst goes
HANDSHAKE_SHARE = 16  # a 16th of the rate: strangers can't starve the lease, nor it them
RESPAWNS = 8  # engine deaths in a lease
SEND_BUFFER = 8 << 10  # what a peer does not take waits here, not in the kernel


class Psk:
    """Evidence for development: HMAC under a role's provisioning secret. Says who, not what."""

    log = b""  # nothing was measured

    def __init__(self, settings):
        self._secrets = {}
        for role, name in (("owner", "ENCLAVE_OWNER_PSK"), ("user", "ENCLAVE_USER_PSK")):
            with open(settings[name], encoding="ascii") as file:
                self._secrets[role] = mp.parse_secret(file.read())

    def produce(self, role, data):
        """The proof over 32 bytes of report data."""
        return mp.psk_proof(self._secrets[role], data)


EVENT_LOG = "/sys/kernel/security/tpm0/binary_bios_measurements"


class Tpm2:
    """Evidence of a measured boot: a TPM 2.0's quote of the PCRs, by a key that signs nothing else.

    The kernel's resource manager (/dev/tpmrm0) forgets the key when the gate ends.
    log: the firmware's event log (TCG PC Client Platform Firmware Profile, 10), b"" without one.
    """

    def __init__(self, settings):
        self._lock, self.log = threading.Lock(), b""
        self._device = os.open(settings["ENCLAVE_TPM"], os.O_RDWR | os.O_CLOEXEC)
        create = mp.tpm_create_primary(mp.ATTESTATION_KEY + bytes(2))
        self._key, _ = mp.tpm_created(mp.tpm_ask(self._device, create))
        # The PCRs' values are read as they are; what they are worth, the quote decides.
        reads = (mp.tpm_command(mp.TPM_CC_PCR_READ, b"", mp.pcr_selection(n)) for n in mp.PCRS)
        self._pcrs = b"".join(mp.tpm_ask(self._device, read)[-32:] for read in reads)
        with contextlib.suppress(FileNotFoundError), open(EVENT_LOG, "rb") as file:
            self.log = file.read(256 << 10)  # the host's firmware can make it as long as it likes

    def produce(self, role, data):
        """The proof over 32 bytes of report data, as TPM2_Quote gives it, then the PCRs' values.

        TPM2B_ATTEST, TPMT_SIGNATURE, 32 bytes for each of PCRS. Raises OSError.
        """
        with self._lock:
            body = mp.tpm_ask(self._device, mp.tpm_quote(self._key, data))
        return body[4 : 4 + int.from_bytes(body[:4], "big")] + self._pcrs


EVIDENCE = {"psk": Psk, "tpm2": Tpm2}


class Gate:
    """What all sessions share. `lock` guards every field that changes."""

    def __init__(self, settings, control):
        self.settings, self.control = settings, control
        self.evidence = EVIDENCE[settings["ENCLAVE_EVIDENCE"]](settings)
        self.header = mp.read_header(settings["MODEL_PATH"])
        self.digest = hashlib.sha256(self.header).hexdigest()
        self.limit = int(settings["ENCLAVE_SESSIONS"])
        self.facts = {"measurement": settings["ENCLAVE_MEASUREMENT"], "model": self.digest}
        self.facts["posture"] = {"confinement": settings["ENCLAVE_CONFINEMENT"], "debug": False}
        self.lock, self.pipe = threading.RLock(), threading.Lock()  # pipe: one message at a time
        self.state, self.account = "locked", mp.Account()
        self.container = self.key = self.engine = self.vocabulary = self.closing = self.code = None
        self.progress = self.context = self.restarts = self.turn = 0
        # code: why the lease ended. Slot: reply that the engine has not ended. Session: None, the
        # oldest first. Replies that are not in the chain of exchanges yet.
        self.replies, self.sessions, self.open = {}, {}, []
        rate, burst = int(settings["ENCLAVE_RATE"]), int(settings["ENCLAVE_BURST"])
        # Full at the start: before an unlock, nothing that leaves was chosen by an engine.
        self.handshakes = mp.Meter(rate, burst, -burst * mp.NANOSECOND)
        self.cells = mp.Meter(rate, burst, time.monotonic_ns())
        self.set_rate(rate, burst)

    def set_rate(self, rate, burst):
        """Split the rate between handshakes and sessions; a tick is a cell's time."""
        now, share = time.monotonic_ns(), rate // HANDSHAKE_SHARE
        self.handshakes.change(share, burst // 2, now)
        self.cells.change(rate - share, burst // 2, now)
        self.cell_time = mp.CELL * mp.NANOSECOND // (rate - share)
        self.tick = max(SHORTEST_TICK, self.cell_time)

    def wait_turn(self):
        """Sleep to a cell's turn: so many at a tick as the rate allows, in the order of asking."""
        with self.lock:
            now = time.monotonic_ns()
            first = (now // self.tick - MISSED_TURNS) * self.tick
            self.turn = max(self.turn + self.cell_time, first)
            wait = -(-self.turn // self.tick) * self.tick - now
        time.sleep(max(0, wait) / mp.NANOSECOND)

    def log(self, line, number=0):
        """Have init print a line of LOG."""
        self.control.send(b"l" + bytes([LOG.index(line)]) + number.to_bytes(2, "big"))

    def enter(self, state, before):
        """Go from the state before to another one, and say so; False if it is not that."""
        if self.state != before:
            return False
        self.state = state
        self.log(state)
        return True

    def unlock(self, token, close_key):
        """Check an unlock token; with a lease, take that and load the weights. ProtocolError."""
        with self.lock:
            if token["model"] != self.digest:
                raise ProtocolError("wrong_model")
            self.container = self.container or mp.Container(self.header)
            key = bytes.fromhex(token["key"])
            if not self.container.is_key(key):
                raise ProtocolError("wrong_key")
            if "lease" not in token or self.code:  # a lease that comes too late is not taken
                return
            self.account.add(token["lease"], time.monotonic_ns(), close_key)
            self.set_rate(token["lease"]["rate"], token["lease"]["burst"])
            self.key = key
            if self.enter("loading", "locked"):
                threading.Thread(target=self.run_engine, daemon=True).start()

    def charge(self, bits):
        """Take bits from the budget before what they pay for leaves; too few end the lease."""
        with self.lock:
            if bits > self.account.bits:
                self.end_lease("lease_ended")
            self.account.charge(bits)

    def pass_ticks(self, began, ticks):
        """Charge an answer's ticks up to now, at least one; how many there are since it began (ns).

        By the clock: an engine that does not read its pipe holds up who has something to say to it.
        """
        now = max(ticks + 1, (time.monotonic_ns() - began) // self.tick)
        self.charge(now - ticks)
        return now

    def end_lease(self, code):
        """Kill the engine, drop the key; all sessions end, and the gate then starts afresh.

        closing: the statement of what was spent, if there was a lease. Python can't be trusted to
        erase the key: only the end of this process does.
        """
        with self.lock:
            if self.code is None:
                for reply in list(self.open):
                    self.chain(reply, code)
                self.closing = self.account.close()
                self.enter("lease ended", self.state)
                self.control.send(b"k")
                # Last: as soon as it sees the code, gate_main lets go of init.
                self.code, self.key, self.account = code, None, mp.Account()

    def run_engine(self):
        """Load and serve; an engine that dies is loaded afresh within the lease."""
        try:
            while self.code is None and self.restarts <= RESPAWNS:
                self.load()
                lost = contextlib.suppress(OSError, KeyError, ProtocolError, struct.error)
                with lost, self.engine.makefile("rb") as pipe:
                    while message := pipe.read(mp.PIPE.size):
                        with self.lock:
                            self.take_message(*mp.PIPE.unpack(message))
                with self.lock:
                    for reply in self.replies.values():
                        reply.ending = reply.ending or self.code or "engine_lost"
                    self.replies.clear()
                    if self.enter("loading", "ready"):
                        self.log("engine lost")
                        self.restarts += 1
        except ProtocolError as error:
            self.end_lease(error.code)
        except (EOFError, OSError):
            self.end_lease("out_of_memory")
        finally:
            self.end_lease("lease_ended")

    def load(self):
        """Start loader and engine; wait until the model can answer. Raises ProtocolError.

        EOFError, OSError: one of them has ended before that, by the kernel.
        """
        self.charge(2 * mp.LENGTH_BITS)  # the engine chooses when it comes and goes, a number
        self.control.send(b"s")
        _, numbers, _, _ = socket.recv_fds(self.control, 16, 2)
        loader, engine = (socket.socket(fileno=number) for number in numbers)
        patience = struct.pack("@ll", FRAME_SECONDS, 0)
        engine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        self.engine, self.progress = engine, 0
        loader.sendall(mp.frame(self.header) + mp.frame(self.key or b""))
        engine.sendall(mp.frame(self.container.fields["model_type"].encode()))
        while (message := mp.read_frame(loader, mp.MESSAGE_LIMIT))[:1] == b"p":
            self.progress = message[1]
        if message[:1] != b"v":
            raise ProtocolError("container_corrupt")
        self.vocabulary = mp.Vocabulary(message[1:])
        kind, _, value = mp.PIPE.unpack(mp.read_exactly(engine, mp.PIPE.size))
        if kind != mp.LOADED:
            raise ProtocolError(mp.FAILURES[min(value, len(mp.FAILURES) - 1)])
        with self.lock:
            self.context = min(value, int(self.settings["ENCLAVE_CONTEXT"]))
            self.enter("ready", "loading")

    def take_message(self, kind, slot, value):
        """One message of the engine. KeyError or ProtocolError if it may not say that now."""
        reply = self.replies[slot]
        if kind == mp.ID and value < len(reply.table) and reply.limit > 0:
            reply.limit -= 1
            if not reply.ids:
                reply.due = time.monotonic_ns() + reply.lease["policy"]["latency_ms"] * 10**6
            if not reply.ending:
                reply.ids.append(value)
        elif kind == mp.LENGTH and not reply.prompt_tokens and 0 < value <= self.context:
            self.charge(mp.LENGTH_BITS)
            reply.prompt_tokens = value
        elif kind in (mp.END, mp.REFUSED) and value < len(mp.ENDINGS):
            self.charge(mp.ENDING_BITS)
            endings = mp.ENDINGS if kind == mp.END else mp.REFUSALS
            reply.ending = reply.ending or endings[value]
            del self.replies[slot]
        else:
            raise ProtocolError("bad_message")

    def open_reply(self, request, user):
        """Give a request to the engine. Returns the reply that it fills: `ids` that have not left,
        the oldest of which must by `due` (ns), and `limit` that may still come. ProtocolError.
        """
        with self.lock:
            if self.state != "ready":
                raise ProtocolError(self.code or "engine_lost")
            request = {"seed": secrets.randbits(63)} | self.account.admit(request)
            free = set(range(2 * self.limit)) - self.replies.keys()
            if not free:  # taken by cancelled answers that the engine has not ended yet
                raise ProtocolError("busy")
            reply = types.SimpleNamespace(slot=min(free), ids=collections.deque(), due=0)
            reply.limit = min(request.get("max_new_tokens", self.context), self.context)
            # ending: as in the chain of exchanges.
            reply.ending, reply.prompt_tokens, reply.sent = None, 0, []
            reply.lease, reply.request, reply.table = self.account.lease, request, self.vocabulary
            if "score" in request:
                reply.limit, reply.table = 2 * len(request["score"]["ids"]) + 2, mp.CODES
            self.replies[reply.slot] = reply
            self.open.append(reply)
        self.to_engine(reply, request | {"slot": reply.slot, "user": (user or "owner")[:16]})
        return reply

    def chain(self, reply, ended):
        """Add an exchange to the chain, once. Returns the chain's heads before and after it."""
        with self.lock:
            if reply in self.open:
                self.open.remove(reply)
                exchange = (reply.lease["id"], reply.request, reply.sent, ended)
                reply.heads = self.account.chain(*exchange)
            return reply.heads

    def cancel(self, reply):
        """End an answer early; what has not been sent by now never leaves."""
        with self.lock:
            if reply.ids or not reply.ending:
                reply.ending = "cancelled"
            reply.ids.clear()
        self.to_engine(reply, {"cancel": reply.slot})

    def to_engine(self, reply, value):
        """Tell the engine about a reply that it has not ended; if it does not listen, it is dead.

        In order: a slot's next request never overtakes its last cancel.
        """
        with self.pipe:
            engine = self.engine
            try:
                if self.replies.get(reply.slot) is reply:
                    engine.sendall(mp.frame(mp.encode_json(value)))
            except OSError:
                engine.shutdown(socket.SHUT_RDWR)

    def ready(self):
        """What a session is told at step 3, and an owner who asks for the status."""
        with self.lock:
            facts = {name: self.container.fields[name] for name in ("asset", "vocabulary")}
            facts |= {"model": self.digest, "context": self.context, "restarts": self.restarts}
            facts["status"] = "ready" if self.state == "ready" else "locked"
            return facts | self.account.facts()


class Session:
    """One peer's connection, from its challenge to its last record."""

    def __init__(self, gate, connection):
        self.gate, self.connection, self.meter = gate, connection, gate.handshakes
        self.role = self.user = self.sealer = self.opener = self.close_key = self.heads = None
        self.is_known = False  # whether it has proved that it may be here

    def run(self):
        """Serve the peer. One that breaks the protocol hears no more than an error's code."""
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        with contextlib.suppress(OSError, EOFError), self.connection:  # it hangs up, or is too slow
            try:
                self.handshake()
                self.prove(self.read(deadline - time.monotonic(), mp.HANDSHAKE_FRAME))
                self.meter, self.is_known = self.gate.cells, True
                self.await_ready()
                while True:
                    self.heads = None
                    self.await_frame()
                    self.serve(self.read(FRAME_SECONDS))
            except ProtocolError as error:
                self.refuse(error)
            finally:
                with self.gate.lock:
                    self.gate.sessions.pop(self, None)

    def read(self, seconds, limit=mp.REQUEST_FRAME):
        """The body of the next message, one record. ProtocolError, which `refuse` keeps quiet."""
        message = self.opener.open(mp.read_frame(self.connection, limit, seconds))
        if message is None or message[0] != mp.JSON_RECORD:
            raise ProtocolError("bad_record")
        return message[1]

    def write(self, data):
        """Pay for bytes and send them; a peer that is gone pays nothing. Raises OSError."""
        patience = HANDSHAKE_SECONDS if self.meter is self.gate.handshakes else IDLE_SECONDS
        deadline, wait, is_paid = time.monotonic() + patience, 0, False
        while not is_paid:
            if is_readable(self.connection, min(wait, PAUSE), GONE) or time.monotonic() > deadline:
                raise TimeoutError("the peer is gone, or there was no credit in time")
            with self.gate.lock:
                is_paid = self.meter.take(len(data), time.monotonic_ns())
                wait = self.meter.wait(len(data), time.monotonic_ns()) / mp.NANOSECOND
        self.connection.settimeout(FRAME_SECONDS)
        self.connection.sendall(data)

    def say(self, value, kind=mp.JSON_RECORD):
        """Send a message, JSON or packed ids, as cells."""
        body = mp.encode_json(value) if kind == mp.JSON_RECORD else value
        for cell in self.sealer.seal(kind, body):
            if self.is_known:
                self.gate.wait_turn()
            self.write(cell)

    def refuse(self, error):
        """Send an error, if there are keys yet: its code, the limit passed, what it ended."""
        if self.sealer is not None and error.code not in ("bad_frame", "bad_record"):
            facts = {"error": error.code, "limit": error.limit, "heads": self.heads}
            self.say({name: fact for name, fact in facts.items() if fact is not None})

    def handshake(self):
        """Steps 0 and 1: agree on keys, bind the transcript into evidence.

        The peer makes its share while we make ours, and agrees while we do.
        """
        gate, kind, share = self.gate, self.gate.settings["ENCLAVE_EVIDENCE"], mp.KeyShare()
        payload = mp.read_frame(self.connection, mp.HANDSHAKE_FRAME, HANDSHAKE_SECONDS)
        challenge = mp.parse_message(payload, mp.CHALLENGE)
        if challenge["version"] != mp.VERSION or challenge["evidence"] != kind:
            raise ProtocolError("version_unsupported")
        facts = {"nonce": secrets.token_hex(32), "share": share.public.hex()}
        facts["status"] = gate.state.replace("lease ended", "locked")
        answer = mp.encode_json(gate.facts | facts)
        self.write(mp.frame(answer))
        transcript = mp.transcript_hash(payload, answer)
        keys = mp.session_keys(share.agree(bytes.fromhex(challenge["share"])), transcript)
        proof = gate.evidence.produce(challenge["role"], mp.report_data(kind, transcript))
        self.write(mp.frame(proof))
        self.role, self.opener = challenge["role"], mp.Opener(keys["h2e"], mp.REQUEST_FRAME)
        self.sealer, self.close_key = mp.Sealer(keys["e2h"], mp.CELL), keys["close"]

    def prove(self, body):
        """Step 2: an unlock token from an owner, an access token from a user."""
        if self.role == "owner":
            token = mp.parse_message(body, mp.UNLOCK, mp.LOG)
            return self.gate.unlock(token, self.close_key) if "key" in token else self.tell_log()
        with self.gate.lock:
            user = self.gate.account.user(mp.parse_message(body, mp.ACCESS)["token"])
            if sum(bool(other.user) for other in self.gate.sessions) >= self.gate.limit - 1:
                raise ProtocolError("busy")  # the last place is kept for the owner
            self.user = user

    def tell_log(self):
        """Instead of steps 2 and 3: the log of a boot that nobody trusts yet. Ends the session.

        It is the firmware's, so the host knows it; no lease is there yet that could pay for it.
        """
        self.meter = self.gate.cells
        for cell in self.sealer.seal_json({"log": self.gate.evidence.log.hex()}):
            if self.gate.state == "locked":
                self.write(cell)
        raise EOFError

    def await_ready(self):
        """Step 3: progress in tenths while the weights load, then ready."""
        told = None
        while self.gate.state == "loading":
            if told != self.gate.progress:
                told = self.gate.progress
                self.say({"status": "loading", "progress": told})
            time.sleep(PAUSE)
        ready = self.gate.ready()
        self.check()  # after that, or a lease that ends meanwhile would look as if there were none
        self.say(ready)

    def check(self):
        """Raise the code with which the session ends, as soon as its lease or its user does."""
        lease, code = self.gate.account.lease, self.gate.code
        if code or (self.user and self.user not in lease["users"]):
            raise ProtocolError(code or "token_refused")

    def await_frame(self):
        """Wait for the first byte of the next message. Raises the code that ends the session."""
        idle_until = time.monotonic() + IDLE_SECONDS
        while not is_readable(self.connection, PAUSE):
            self.check()
            if time.monotonic() > idle_until:
                raise ProtocolError("timeout")

    def serve(self, body):
        """Step 4: a request, or an owner's command. A mistake may be mended by the next one."""
        try:
            message = mp.parse_message(body, *mp.REQUESTS[self.role])
            if "prompt" in message or "messages" in message:
                self.answer(message)
            elif "cancel" not in message:  # which has crossed the answer's end
                self.command(message)
        except ProtocolError as error:
            if error.code not in mp.CORRECTABLE:
                raise
            self.refuse(error)

    def command(self, command):
        """An owner's status, lock or revoke."""
        if "lock" in command:
            self.gate.end_lease("lease_ended")
            if self.gate.closing:
                return self.say({"closing": self.gate.closing})
        if "revoke" in command:
            with self.gate.lock:
                self.gate.account.revoke(command["revoke"])
        self.say(self.gate.ready())

    def answer(self, request):
        """Step 5: a cell of ids a tick, then the final record, whose every field the gate fills."""
        gate, ticks, began = self.gate, 0, time.monotonic_ns()
        reply = gate.open_reply(request, self.user)
        try:
            while reply.ids or not reply.ending:
                time.sleep((gate.tick - time.monotonic_ns() % gate.tick) / mp.NANOSECOND)
                self.check()
                ticks = gate.pass_ticks(began, ticks)
                if is_readable(self.connection, 0):  # a cancel is all that may be said now
                    mp.parse_message(self.read(FRAME_SECONDS), mp.CANCEL)
                    gate.cancel(reply)
                if (ids := self.next_ids(reply)) or reply.lease["policy"]["shape"] == "constant":
                    self.say(reply.table.pack(ids), mp.IDS_RECORD)
        finally:
            gate.cancel(reply)
            self.heads = gate.chain(reply, reply.ending)
            ticks = gate.pass_ticks(began, ticks)
        if reply.ending not in mp.ENDINGS:
            limit = gate.context if reply.ending in mp.REFUSALS[1:] else None
            raise ProtocolError(reply.ending, limit=limit)
        counts = (reply.prompt_tokens, len(reply.sent), reply.prompt_tokens + len(reply.sent))
        final = {"usage": dict(zip(mp.USAGE, counts, strict=True)), "restarts": gate.restarts}
        final |= {"finish_reason": reply.ending, "heads": self.heads}
        final |= {"elapsed_ms": ticks * gate.tick // 10**6, "budget_left": gate.account.bits // 8}
        self.say(final)

    def next_ids(self, reply):
        """Ids for one cell, charged to the budget, if they fill it or have waited long enough."""
        gate, room = self.gate, reply.table.room
        with gate.lock:
            is_due = reply.ending or time.monotonic_ns() >= reply.due
            if not reply.ids or (len(reply.ids) < room and not is_due):
                return []
            ids = [reply.ids.popleft() for _ in range(min(room, len(reply.ids)))]
            gate.charge(reply.table.cost(len(ids)))
            reply.sent += ids
            return ids


def gate_main(settings, control):
    """The gate process, from its first file to its last record."""
    try:
        gate = Gate(settings, control)
        family, bind, port = socket.AF_INET, settings["ENCLAVE_BIND"], int(settings["ENCLAVE_PORT"])
        if bind == "vsock":
            family, bind = socket.AF_VSOCK, socket.VMADDR_CID_ANY
        listener = socket.create_server((bind, port), family=family, backlog=256)
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        mp.warm_up()
        drop_privileges("gate", settings["ENCLAVE_CONFINEMENT"])
        confine("g")
    except Exception as error:  # noqa: BLE001  whatever it is, init says it in one line
        control.send(b"e" + (str(error).partition("\n")[0] or repr(error)).encode()[:500])
        return 1
    gate.log("listening", listener.getsockname()[1])
    gate.log("locked")
    welcome(gate, listener)
    listener.close()
    control.close()  # from now on init waits for our end, so many seconds
    while gate.sessions:
        time.sleep(PAUSE / 10)


def welcome(gate, listener, rate=20, burst=40):
    """Take connections until the lease has ended, each into a thread: so many a second and at once,
    since a flood of key agreements may have a part of the processor only.

    When all places are taken, the oldest peer that has proved nothing makes room.
    """
    arrivals = mp.Meter(rate, burst, -2 * mp.NANOSECOND)
    while gate.code is None:
        if time.monotonic_ns() >= gate.account.expires:
            gate.end_lease("lease_ended")
        if not is_readable(listener, PAUSE):
            continue
        while not arrivals.take(1, time.monotonic_ns()):
            time.sleep(arrivals.wait(1, time.monotonic_ns()) / mp.NANOSECOND)
        try:
            session = Session(gate, listener.accept()[0])
        except OSError:
            continue  # it has gone again, or there are too many
        with gate.lock:
            gate.sessions[session] = None
            if len(gate.sessions) > gate.limit:
                leaves = next(s for s in gate.sessions if not s.is_known)
                del gate.sessions[leaves]
                with contextlib.suppress(OSError):  # it has left already
                    leaves.connection.shutdown(socket.SHUT_RDWR)
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
    confine("l")
    container = mp.Container(mp.read_frame(gate, mp.HEADER_LIMIT))
    cipher = mp.aead(container.chunk_key(mp.read_frame(gate, 32)))
    try:
        vocabulary = unseal(disk, container, cipher, arena, gate)
    except (InvalidTag, KeyError):
        gate.sendall(mp.frame(b"c"))
        return 1
    fcntl.fcntl(arena, fcntl.F_ADD_SEALS, 0b1111)  # F_SEAL_SEAL, _SHRINK, _GROW and _WRITE
    gate.sendall(mp.frame(b"v" + vocabulary))
    table = mp.encode_json({"length": container.length, "files": container.files})
    for _ in range(int(settings["ENCLAVE_RANKS"])):
        socket.send_fds(engine, [table], [arena])


def unseal(disk, container, cipher, arena, gate):
    """Fill the arena, all chunks in parallel; return the vocabulary table in it.

    The kernel need not clear new pages that are written, as it would if they were mapped. The last
    chunk is the first: in a file that has its size, pages are huge where the kernel makes such.
    Raises InvalidTag for a chunk that fails authentication, as one that is cut off does.
    """
    workers = min(len(os.sched_getaffinity(0)), container.chunks)

    def work(first):
        for index in reversed(range(first, container.chunks, workers)):
            offset, start, size, nonce = container.chunk(index)
            sealed = os.pread(disk, size + mp.TAG, offset)  # once: the host can change a disk
            if os.pwrite(arena, cipher.decrypt(nonce, sealed, None), start) != size:
                raise MemoryError("no room for the arena")
            if first == 0 and index * 10 % container.chunks < 10 * workers:  # a tenth more
                gate.sendall(mp.frame(b"p" + bytes([10 - index * 10 // container.chunks])))

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    start, size = container.files[mp.VOCABULARY_FILE]
    return os.pread(arena, size, start)


# ==== engine
# Nothing below is trusted with anything but answers. It has the arena and its pipe to the gate.

CHUNK = 256  # prompt tokens between two steps of the running streams: none of them starves
ENGINE_FILES = ("config.json", "model.json", "prompts.json")
CACHE_SHARE = 7 / 8  # of the memory that is free: passes need some too
COLDEST = 1e-5  # a temperature below is greedy: logits divided by it could overflow
# Of a config: within these, all is attended to by its position.
WINDOWS = ("max_position_embeddings", "sliding_window", "attention_chunk_size")
# Opened by warm_up: once confined, nothing can be.
memory_file = functools.cache(lambda: os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC))
WARM_CONFIG = """{"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size":
    256, "num_attention_heads": 16, "num_key_value_heads": 8, "pad_token_id": 0}"""
WARM_PROMPTS = """{"tokenizer": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}},
    "masks": {}, "names": {}, "pattern": "c", "ids": [], "special": [], "prefix": [], "variables":
    {}, "template": "{% macro f(x) %}{{ x | trim | tojson }}{% endmacro %}{{ f('ab') }}"}"""


def engine_main(settings, gate, loader):
    """Import, warm up, confine; only then take the arena; build the model, serve until killed.

    All of its ranks do, a process each; only the first serves the gate, the others may say that
    they have failed.
    """
    device, ranks = settings["ENCLAVE_DEVICE"], int(settings["ENCLAVE_RANKS"])
    try:
        model_type = mp.read_frame(gate, mp.HANDSHAKE_FRAME).decode()
        meeting = socket.create_server(("127.0.0.1", 0)) if ranks > 1 else None
        rank = next((number for number in range(1, ranks) if os.fork() == 0), 0)
        drop_privileges("engine", settings["ENCLAVE_CONFINEMENT"])
        place = join_ranks(rank, ranks, meeting) if meeting else find_place(device)
        warm_up(model_type, settings, place)
        confine("e" if device == "cpu" else "ev")
        with loader:
            files = map_arena(loader)
        fields, facts, prompts = (json.loads(bytes(files[name])) for name in ENGINE_FILES)
        model = build_model(fields, read_state(files, facts["tensors"]), place)
        decoder = Decoder(model, facts, Prompter(prompts), settings, None if rank else gate)
    except Exception as error:  # noqa: BLE001  a broken model may raise anything
        gate.sendall(mp.PIPE.pack(mp.FAILED, 0, mp.failure(error)))
        return 1
    decoder.out += mp.PIPE.pack(mp.LOADED, 0, decoder.context)
    decoder.serve()


def find_place(device):
    """Where from_pretrained puts the model: on a device; for "auto", layer by layer on all GPUs,
    of whose memory a fifth is left for the cache.
    """
    if device != "auto":
        return {"device_map": device}
    import torch

    room = {n: torch.cuda.mem_get_info(n)[0] * 4 // 5 for n in range(torch.cuda.device_count())}
    return {"device_map": device, "max_memory": room}


def join_ranks(rank, ranks, meeting):
    """Connect all ranks, which can't be done later. Returns how from_pretrained shares the model.

    meeting: where the first one listens. transformers would connect them anew for every model: it
    gets one mesh for all.
    """
    os.environ |= {"LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    from torch import distributed
    from transformers.distributed import DistributedConfig, mixin

    address, listens = meeting.getsockname(), {"master_listen_fd": meeting.detach()}
    store = distributed.TCPStore(*address, ranks, rank == 0, **listens)
    distributed.init_process_group(store=store, rank=rank, world_size=ranks)
    config = DistributedConfig(tp_size=ranks)
    mesh = mixin.initialize_distributed_mesh(config)
    mixin.initialize_distributed_mesh = lambda _: mesh
    return {"distributed_config": config}


def share(value):
    """What the first rank has, in all of them: they must take the same steps."""
    from torch import distributed

    values = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(values)
    return values[0]


def map_arena(loader):
    """Receive the sealed arena; map it to be read, locked where so much may be, so that it never
    goes to swap. Returns {file name: memoryview}.
    """
    table, (descriptor,), _, _ = socket.recv_fds(loader, mp.HEADER_LIMIT, 1)
    table = json.loads(table)
    flags, length = mmap.MAP_PRIVATE | mmap.MAP_POPULATE, table["length"]
    try:
        memory = mmap.mmap(descriptor, length, flags | 0x2000, mmap.PROT_READ)  # MAP_LOCKED
    except OSError:  # more than this process may lock
        memory = mmap.mmap(descriptor, length, flags, mmap.PROT_READ)
    memory.madvise(mmap.MADV_DONTDUMP)
    os.close(descriptor)
    arena = memoryview(memory)
    return {name: arena[start : start + size] for name, (start, size) in table["files"].items()}


# -- the model


def read_state(files, tensors):
    """{name: tensor}, views into the arena; tensors: as in model.json (tools/weights.py)."""
    import torch
    from transformers.modeling_utils import str_to_torch_dtype

    state = {}
    for name, dtype, shape, file, start, size in tensors:
        dtype, data = str_to_torch_dtype[dtype], files[file][start : start + size]
        flat = torch.frombuffer(data, dtype=dtype) if size else torch.empty(0, dtype=dtype)
        state[name] = flat.reshape(shape)
    return state


def build_model(fields, state, place):
    """transformers' own class for the config, filled from memory; no path, no remote code.

    fields: config.json. state: {name: tensor}. place: of find_place or join_ranks. Raises
    MemoryError if it does not fit there: transformers would have layers on a disk, and refuses.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    dtype = config.dtype or next(iter(state.values())).dtype
    room, size = place.get("max_memory"), sum(tensor.nbytes for tensor in state.values())
    if room is not None and size > sum(room.values()):
        raise MemoryError
    options = {"config": config, "state_dict": state, "dtype": dtype} | place
    options |= {"output_loading_info": True, "generation_config": GenerationConfig()}
    model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(None, **options)
    if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ValueError("the tensors are not this config's")
    return model.eval()


def warm_up(model_type, settings, place):
    """Import and run what the real model will use, on a tiny one: later nothing can be opened."""
    import jinja2.debug  # noqa: F401  for a template that is wrong
    import torch
    import transformers

    torch.set_num_threads(int(settings["ENCLAVE_THREADS"]) or torch.get_num_threads())
    if settings["ENCLAVE_DEVICE"] == "cpu":
        spare = torch.empty(0 if torch.cpu._is_avx512_bf16_supported() else 1 << 19)
        torch.nn.functional.linear = functools.partial(multiply, torch.nn.functional.linear, spare)
    config = transformers.CONFIG_MAPPING[model_type](**json.loads(WARM_CONFIG))
    tiny = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(torch.bfloat16)
    facts = {"context": 16, "ends": [], "sampling": dict.fromkeys([*mp.NEUTRAL, "temperature"], 2)}
    for part in [{"device_map": gpu} for gpu in place.get("max_memory", ())] or [place]:
        model = build_model(config.to_dict(), tiny.state_dict(), part)
        decoder = Decoder(model, facts, Prompter(json.loads(WARM_PROMPTS)), settings, None)
        decoder.take({"messages": [{"role": "user", "content": "a"}], "slot": 0, "seed": 1})
        while decoder.streams:
            decoder.step()


def multiply(linear, spare, values, weight, bias=None):
    """A matrix product on a CPU; in bfloat16, for which PyTorch's own (linear) is slow.

    If the CPU has bfloat16, the weight is the first factor: oneDNN then reads it as it lies, and
    does not rearrange it every time; that pays for more than 128 rows only. If not: in float32, for
    any number from 4, as much at once as a cache holds, in spare, which is empty otherwise; new
    memory costs more than the sums.
    """
    import torch

    rows = values.reshape(-1, values.shape[-1])
    if values.dtype != torch.bfloat16 or not min(4, len(spare)) <= len(rows) <= 128 + len(spare):
        return linear(values, weight, bias)
    if len(spare):
        wide, parts = values.float(), weight.split(len(spare) // weight.shape[1])
        parts = (spare[: part.numel()].view(part.shape).copy_(part) for part in parts)
        product = torch.cat([linear(wide, part) for part in parts], -1).to(values.dtype)
    else:  # one row is a vector
        product = (weight @ rows.squeeze(0).t()).t().contiguous().view(*values.shape[:-1], -1)
    return product if bias is None else product + bias


# -- prompts


class Prompter:
    """Turns requests into ids; text from outside never becomes a special token.

    fields: what tools/prompting.py has made of the model's tokenizer, and explains.
    """

    def __init__(self, fields):
        from tokenizers import Tokenizer
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self.tokenizer = Tokenizer.from_str(json.dumps(fields["tokenizer"]))
        self.masks, self.names = fields["masks"], fields["names"]
        self.unmask = {ord(mask): text for text, mask in self.masks.items()}
        self.private = {*self.masks.values(), *self.names.values()}
        self.pattern = re.compile(fields["pattern"])
        self.ids, self.special = dict(fields["ids"]), set(fields["special"])
        self.prefix, self.variables = fields["prefix"], fields["variables"]
        self.template = _compile_jinja_template(fields["template"])
        self.template.environment.globals.pop("strftime_now", None)  # a template gets no clock

    def encode(self, request):
        """The prompt's ids. Raises ValueError, or what a template raises."""
        if "prompt" in request:
            return self.prefix + self.to_ids(self.mask(request["prompt"]))
        chat = [dict(role=m["role"], content=self.mask(m["content"])) for m in request["messages"]]
        values = self.variables | {"messages": chat}
        if "date" in request:
            values["date_string"] = self.mask(request["date"])
        text = self.template.render(values)
        return self.to_ids(self.pattern.sub(lambda found: self.names[found[0]], text))

    def mask(self, text):
        """User text in which no added token's text is left. Raises ValueError."""
        if not self.private.isdisjoint(text):
            raise ValueError("the text holds a character that stands for an added token")
        return self.pattern.sub(lambda found: self.masks[found[0]], text)

    def to_ids(self, text):
        """Ids of text with masks and names. ValueError if plain text would be a special token."""
        ids = self.tokenizer.encode(text.translate(self.unmask), add_special_tokens=False).ids
        if not self.special.isdisjoint(ids):
            raise ValueError("the text would become a special token")
        return [self.ids.get(token, token) for token in ids]


# -- decoding


class SlotCache:
    """Keys and values of all streams, a row each with its own positions; transformers' cache.

    The decoder says before each pass which places are written, by their `index`, and what is looked
    at: the rows of a `view`, as many positions as the `span`.
    """

    def __init__(self, count, context):
        self.count, self.context = count, context
        self.layers, self.stores = {}, []  # what each layer has; all of it

    def update(self, keys, values, layer, *_, **__):
        """Store (rows, heads, tokens, size) at the positions; return all that is attended to."""
        if layer not in self.layers:
            size = (self.count, keys.shape[1], self.context)
            self.layers[layer] = [new.new_zeros(*size, new.shape[3]) for new in (keys, values)]
            self.stores += self.layers[layer]
        rows, places = (part.to(keys.device) for part in self.index)
        for store, new in zip(self.layers[layer], (keys, values)):
            store[rows, :, places] = new.transpose(1, 2)
        return tuple(store[self.view, :, : self.span] for store in self.layers[layer])

    def get_seq_length(self, *_):
        """Tokens cached; positions are always given, so it only has to be a number."""
        return self.span


class Decoder:
    """A batch with a row for each stream; requests join and leave it between two tokens.

    A stream: its request over the model's defaults; row (None while it waits for one), ids (the
    prompt, `start` of them, then the answer), limit of these, cached (how many of them are).
    """

    def __init__(self, model, facts, prompter, settings, gate):
        self.model, self.prompter, self.gate = model, prompter, gate
        self.ends, self.defaults = facts["ends"], {"score": None, "user": None} | facts["sampling"]
        room = self.measure_room(int(settings["ENCLAVE_RANKS"]))
        limits = [getattr(model.config, name, None) for name in WINDOWS] + [facts["context"], room]
        self.context = min(filter(None, [*limits, int(settings["ENCLAVE_CONTEXT"])]))
        count = min(room // self.context, int(settings["ENCLAVE_SLOTS"]))
        self.cache = SlotCache(count, self.context)
        self.streams = []  # in the order in which they came
        self.last = [None] * count  # of each row, the stream that is or was in it
        self.out = bytearray()
        self.check()

    def measure_room(self, ranks):
        """How many tokens fit into the memory that is free now. Of several GPUs, the least free one
        counts, and the most needed. Raises MemoryError for none.
        """
        import torch

        self.cache = SlotCache(1, 1)
        self.forward([0], [[1]], [0])
        kib = re.search(rb"MemAvailable: +(\d+)", os.pread(memory_file(), 4096, 0))[1]
        places = {store.device for store in self.cache.stores}
        size = max(sum(s.nbytes for s in self.cache.stores if s.device == one) for one in places)
        is_gpu = self.model.device.type == "cuda"
        free = min(map(torch.cuda.mem_get_info, places))[0] if is_gpu else int(kib) * 1024 // ranks
        room = share(int(free * CACHE_SHARE) // size)
        if not room:
            raise MemoryError
        return room

    def check(self):
        """Raise ValueError unless the model, taken in parts beside other rows, gives the logits of
        one pass of its own: not every architecture keeps to a cache and positions that are given.
        """
        import torch

        ids, rtol = list(range(1, 7)), torch.finfo(self.model.dtype).eps
        *others, row = rows = list(range(self.cache.count))
        self.forward([row], [ids[:2]], [0])
        self.forward([row], [ids[2:5]], [2])
        parts = self.forward(rows, [ids[5:]] * len(rows), [6] * len(others) + [5])[row:]
        with torch.no_grad():
            tokens = torch.tensor([ids], device=self.model.device)
            whole = self.model(tokens, use_cache=False).logits[:, -1].float()
        if not (parts - whole).abs().max() <= whole.abs().max() * rtol**0.5:
            raise ValueError("the model does not work in a batch")

    def serve(self):
        """Take messages and make tokens; EOFError or OSError end it when the gate is gone.

        While nothing runs, requests that come within 10 ms of one another begin together: no more
        than the gate has slots for.
        """
        while True:
            if self.gate:
                self.gate.sendall(self.out)
            self.out.clear()
            wait, heard = 0 if self.streams else PAUSE, []
            while self.gate and is_readable(self.gate, wait / 50 if heard else wait):
                heard.append(mp.read_frame(self.gate, mp.MESSAGE_LIMIT))
            for message in share(heard):
                self.take(json.loads(message))
            self.step()

    def take(self, message):
        """A request or a cancel from the gate."""
        if "cancel" in message:
            for stream in [s for s in self.streams if s.slot == message["cancel"]]:
                self.end(stream, "cancelled")
            return
        ids, most = [], self.model.config.vocab_size
        with contextlib.suppress(Exception):  # templates raise what they like
            ids = self.prompter.encode(message)
        size = len(ids)
        limit = size + message.get("max_new_tokens", self.context - size)
        refusals = (max(ids, default=most) >= most, size >= self.context, limit > self.context)
        if any(refusals):  # the first that is true, as in mp.REFUSALS
            self.out += mp.PIPE.pack(mp.REFUSED, message["slot"], refusals.index(True))
            return
        self.out += mp.PIPE.pack(mp.LENGTH, message["slot"], size)
        facts = {"row": None, "ids": ids, "cached": 0, "start": size, "limit": limit}
        self.streams.append(types.SimpleNamespace(**self.defaults | message | facts))

    def end(self, stream, reason):
        """The stream is over; its row is free."""
        self.out += mp.PIPE.pack(mp.END, stream.slot, mp.ENDINGS.index(reason))
        self.streams.remove(stream)

    def step(self):
        """CHUNK tokens of prompts, then one token for every stream whose prompt is in the cache.

        Four times as many while nobody waits for the latter. A pass takes as many prompts as fit,
        filled up to the longest of them.
        """
        self.admit()
        active = [stream for stream in self.streams if stream.row is not None]
        running = [stream for stream in active if stream.cached + 1 == len(stream.ids)]
        prompts = [stream for stream in active if stream not in running]
        longest = itertools.accumulate((len(stream.ids) - stream.cached for stream in prompts), max)
        room = CHUNK if running else 4 * CHUNK
        fitting = sum(size * number <= room for number, size in enumerate(longest, 1))
        self.advance(prompts[: max(fitting, 1)])
        self.advance(sorted(running, key=lambda stream: stream.row))

    def admit(self):
        """Give free rows to streams that wait, to users with the fewest, the oldest first.

        The lowest rows come first: those that lie side by side are read without a copy.
        """
        taken = {stream.row: stream.user for stream in self.streams if stream.row is not None}
        for row in sorted(set(range(self.cache.count)) - taken.keys()):
            waiting = [stream for stream in self.streams if stream.row is None]
            if waiting:
                stream = min(waiting, key=lambda one: list(taken.values()).count(one.user))
                self.reuse(stream, row)
                stream.row, self.last[row], taken[row] = row, stream, stream.user

    def reuse(self, stream, row):
        """Begin a row with the whole chunks of the prompt that another holds for the same user."""
        for other in [other for other in self.last if other and other.user == stream.user]:
            alike = os.path.commonprefix([stream.ids[:-1], other.ids[: other.cached]])
            size = len(alike) // CHUNK * CHUNK
            if size > stream.cached:
                stream.cached = size
                for store in self.cache.stores:
                    store[row, :, :size] = store[other.row, :, :size]

    def advance(self, streams):
        """A pass over the next chunk of each; a token for those that are all in the cache."""
        if streams:
            chunks = [stream.ids[stream.cached :][:CHUNK] for stream in streams]
            logits = self.forward([s.row for s in streams], chunks, [s.cached for s in streams])
            for stream, chunk in zip(streams, chunks):
                stream.cached += len(chunk)
            done = [stream.cached == len(stream.ids) for stream in streams]
            self.emit([*itertools.compress(streams, done)], logits if all(done) else logits[done])

    def forward(self, rows, chunks, starts):
        """Logits (rows, vocabulary) after each row's chunk of tokens, whose positions begin there.

        rows: of the cache. A chunk that is shorter is filled with its last token, in its place.
        """
        import torch

        width, device, dtype = max(map(len, chunks)), self.model.device, self.model.dtype
        places = [[min(at, len(chunk) - 1) for at in range(width)] for chunk in chunks]
        tokens = [[chunk[at] for at in place] for chunk, place in zip(chunks, places)]
        is_block = rows == list(range(rows[0], rows[0] + len(rows)))  # of which no copy is made
        self.cache.view = slice(rows[0], rows[0] + len(rows)) if is_block else rows
        self.cache.span = width + max(starts)
        put = functools.partial(torch.tensor, device=device)
        with torch.no_grad():
            positions = put(places) + put(starts)[:, None]
            self.cache.index = put(rows)[:, None], positions
            span = torch.arange(self.cache.span, device=device)
            mask = (span > positions[:, None, :, None]).to(dtype) * torch.finfo(dtype).min
            facts = {"position_ids": positions, "attention_mask": mask, "cache": self.cache}
            output = self.model(put(tokens), **facts, use_cache=True, logits_to_keep=1)
            return output.logits[:, -1].float()

    def emit(self, streams, logits):
        """Choose a token for each stream and tell the gate; end those that are done."""
        scores = score(streams, logits)
        for stream, row, token in zip(streams, scores, scores.argmax(-1).tolist()):
            token = self.judge(stream, row) if stream.score else token
            stream.ids.append(token)
            is_end = token in self.ends
            if not (is_end or stream.score):
                self.out += mp.PIPE.pack(mp.ID, stream.slot, token)
            if is_end or len(stream.ids) >= stream.limit:
                self.end(stream, "stop" if is_end else "length")

    def judge(self, stream, scores):
        """Tell how the next token of an answer that is given scores, after the last one an end of
        it: as mp.SCORED says, the margin in eighths of an octave, 0 for none. Returns the token.
        """
        at, score = len(stream.ids) - stream.start, stream.score
        tokens = score["ids"][at : at + 1] or self.ends
        margins = scores.max() - scores
        near = int((margins <= score["tolerance"]).sum())
        for value in (mp.margin_code(float(margins[tokens].min())), min(near, 255)):
            self.out += mp.PIPE.pack(mp.ID, stream.slot, value)
        return tokens[0]


def score(streams, logits):
    """What each stream's next token is the highest of: Gumbel-max with seeded noise.

    logits, and what is returned: (streams, vocabulary). argmax(logit / T + g) draws from
    softmax(logit / T) if g is Gumbel noise (Maddison, Tarlow, Minka 2014). The noise depends on
    seed, position and token only, so an answer can be scored again.
    """
    import torch

    for stream, row in zip(streams, logits):
        if stream.repetition_penalty != 1:  # Keskar et al. 2019 (CTRL), 4.1
            seen = torch.tensor(stream.ids, device=row.device).unique()
            penalty = float(stream.repetition_penalty)
            row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    drawn = [n for n, stream in enumerate(streams) if stream.temperature >= COLDEST]
    if drawn:
        streams = [streams[n] for n in drawn]
        scores = logits[drawn] / logits.new_tensor([[s.temperature] for s in streams])
        if any(stream.top_k or stream.top_p < 1 for stream in streams):
            scores = cut(streams, scores)
        logits[drawn] = scores + gumbel(streams, logits.shape[1], logits.device)
    return logits


def cut(streams, scores):
    """Scores with what is beyond each stream's top_k, and then top_p, at minus infinity."""
    import torch

    count, none = scores.shape[1], -torch.inf
    most = scores.new_tensor([[min(s.top_k or count, count)] for s in streams]).long()
    share = scores.new_tensor([[s.top_p if s.top_p < 1 else 2] for s in streams])
    ranked = scores.sort(descending=True).values
    ranked = ranked.masked_fill(torch.arange(count, device=scores.device) >= most, none)
    chances = ranked.softmax(-1)
    kept = (chances.cumsum(-1) - chances < share).sum(-1, keepdim=True)
    return scores.masked_fill(scores < ranked.gather(-1, kept.minimum(most) - 1), none)


def gumbel(streams, size, device):
    """Gumbel noise (streams, size): a function of seed, position and token id, in integers.

    The hash is "lowbias32" (C. Wellons, hash-prospector). Its first bit chooses a tail, the others
    how far down that; between two quantiles of the table lies a line.
    """
    import torch

    numbers = [s.seed.to_bytes(8, "big") + len(s.ids).to_bytes(8, "big") for s in streams]
    keys = [struct.unpack(">ii", hashlib.sha256(number).digest()[:8]) for number in numbers]
    words = torch.arange(size, dtype=torch.int32, device=device).repeat(len(streams), 1)
    spare = torch.empty_like(words)  # memory that is new each time costs more than the arithmetic
    for key in torch.tensor(keys, dtype=torch.int32, device=device).split(1, 1):
        words ^= key
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, 1)):
            torch.bitwise_right_shift(words, shift, out=spare)
            words ^= spare.bitwise_and_(0xFFFFFFFF >> shift)
            words *= factor
    tail = words >> 31  # -1 for the upper one
    chance = (words ^ tail).double() * 2 + 1  # of what is farther out, times 2^33
    bits = chance.view(torch.int64)  # an exponent, which is the octave, and a place in that
    table, slope = quantiles(device)
    at = (bits >> 46) - (1022 << 6) - tail * (len(table) // 2)
    rest = (bits >> 21 & 0x1FFFFFF) * slope[at] >> 25
    return (table[at] + rest).float() / 2**18


@functools.cache
def quantiles(device):
    """The tables of mp.gumbel_quantiles, one behind the other; how far it is to the next entry."""
    import torch

    table = torch.tensor(mp.gumbel_quantiles(), device=device).flatten()
    return table, table.roll(-1) - table


# ==== command line


def main():
    """`python -m muenclave`; also each of its processes. Returns the exit status, None for 0."""
    role, *numbers = sys.argv[1:] or [""]
    if role not in ROLES:
        sys.exit("muenclave: error: settings are in the environment; tools/enclave.py takes flags")
    sockets = [socket.socket(fileno=int(number)) for number in numbers]
    return ROLES[role](DEFAULTS | os.environ, *sockets)


ROLES = {"": init_main, "--init": guest_main, "--gate": gate_main, "--loader": loader_main}
ROLES["--engine"] = engine_main

if __name__ == "__main__":
    sys.exit(main())
