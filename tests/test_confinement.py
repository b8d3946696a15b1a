"""What each process of an enclave may do, what its memory holds and what it leaves behind: the
real processes, asked from inside and looked at from outside."""

import collections
import contextlib
import errno
import fcntl
import json
import mmap
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
import types
import unittest

import numpy

import muenclave
import muprotocol as mp
import muproxy
from tests import probe
from tests.support import ROOT, SECONDS, Enclave, make_site, owner, sealed_demo, starter, until

import weights  # isort: skip  (from tools/, which tests.support has put on the path)

CONFINED = ("gate", "loader", "engine")
NULL = "/dev/null"
QUESTION = {"messages": [{"role": "user", "content": "Tell me about zen."}], "temperature": 0}
ZEN = "The Zen of Python, by Tim Peters"


class Folder(unittest.TestCase):
    """A folder and the files of an owner, a host and users in it, for a class of tests."""

    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.site = make_site(cls.folder)

    if not hasattr(unittest.TestCase, "enterClassContext"):  # before Python 3.11

        @classmethod
        def enterClassContext(cls, manager):
            value = manager.__enter__()
            cls.addClassCleanup(manager.__exit__, None, None, None)
            return value


def ask(enclave, **request):
    """The text of an answer."""
    with enclave.ready() as session:
        vocabulary = muproxy.read_vocabulary(enclave.site.vocabulary)
        return "".join(session.generate(QUESTION | request, vocabulary))


def lock(enclave):
    """Have the owner lock an enclave; wait until another gate is there."""
    said = len(enclave.lines)
    with contextlib.closing(enclave.session("owner")) as session:
        session.prove(enclave.unlock_token())
        session.command({"lock": True})
    enclave.port = int(enclave.wait_for("listening", said).split()[-1])
    enclave.address = ("127.0.0.1", enclave.port)
    enclave.wait_for("locked", said)


def threads(pid):
    """[{field: value}] of /proc/PID/task/*/status."""
    paths = pathlib.Path(f"/proc/{pid}/task").glob("*/status")
    return [dict(re.findall(r"^(\w+):\t(.*)$", path.read_text(), re.M)) for path in paths]


def descriptors(pid):
    """What the descriptors of a process are, sorted: paths, "socket", "memfd:name"…"""
    folder, found = pathlib.Path(f"/proc/{pid}/fd"), []
    for link in folder.iterdir():
        target = os.readlink(link)
        found.append(target if target == NULL else target.split(":[")[0].removeprefix("/"))
    return sorted(found)


def await_gate_at_rest(gate):
    """Wait until a gate with an engine holds no more than it needs: sessions end in their time."""
    held = [*[NULL] * 3, *["socket"] * 3]  # the listener, the pipes to init and to the engine
    until(lambda: descriptors(gate) == held, "a gate that holds no more than it needs")


def await_end(pids):
    """Wait until none of these processes is left."""
    until(lambda: not any(map(is_alive, pids)), "the end of all processes")


def state(pid):
    """The letter for what a process does, Z if it is gone."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def is_alive(pid):
    """Whether a process runs (a zombie does not)."""
    return state(pid) != "Z"


# ---------------------------------------------------------------- from inside


class Probes:
    """The other side of tests/probe.py, for the processes of one enclave."""

    def __init__(self, folder):
        self.environment = {"PYTHONPATH": str(folder)}
        shutil.copy(probe.__file__, folder / "sitecustomize.py")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "probe.sock"))
        self.listener.listen()
        self.listener.settimeout(SECONDS)
        self.pids, self.streams = {}, {}

    def meet(self, *roles):
        """Wait until these processes are there."""
        while not set(roles) <= self.streams.keys():
            connection = self.listener.accept()[0]
            connection.settimeout(SECONDS)
            stream = connection.makefile("rwb", buffering=0)
            hello = json.loads(stream.readline())
            self.pids[hello["role"]], self.streams[hello["role"]] = hello["pid"], stream
            connection.close()  # the stream keeps it open

    def outcomes(self, role):
        """{thread: {call: outcome}} in a process: its main thread, an older and a younger one."""
        stream = self.streams[role]
        os.kill(self.pids[role], signal.SIGUSR1)
        found = {"main": json.loads(stream.readline())}
        stream.write(b"g")
        return found | {name: json.loads(stream.readline()) for name in ("older", "younger")}

    def close(self):
        for stream in (*self.streams.values(), self.listener):
            stream.close()


REFUSED, GOOD = [-1, errno.EPERM], [0, 0]
NO_FILE, FAULT = [-1, errno.EBADF], [-1, errno.EFAULT]
# Of the calls that not every process is refused, what a process gets that may make them.
GRANTED = {
    "mmap executable": GOOD,
    "mprotect executable": GOOD,
    "clone3": [-1, errno.ENOSYS],
} | dict.fromkeys(
    (
        "accept",
        "shutdown",
        "setsockopt SO_SNDTIMEO",
        "sendmsg",
        "recvmsg",
        "fcntl F_ADD_SEALS",
        "pwrite64",
        "pread64",
        "writev",
        "epoll_wait",
        "read",
        "write",
        "sendto",
    ),
    NO_FILE,
)
ALL_MAY = ("clone3", "read", "write", "sendto")
MAY = {
    "gate": ("accept", "shutdown", "setsockopt SO_SNDTIMEO", "recvmsg", *ALL_MAY),
    "loader": ("sendmsg", "fcntl F_ADD_SEALS", "pread64", "pwrite64", *ALL_MAY),
    "engine": (
        "mmap executable",
        "mprotect executable",
        "recvmsg",
        "pread64",
        "writev",
        "epoll_wait",
        *ALL_MAY,
    ),
}


def expected(role):
    """The outcome of every call of the probe in a process of this role."""
    refused = dict.fromkeys((*probe.CALLS, *probe.PARTLY), REFUSED)
    return refused | {name: GRANTED[name] for name in MAY[role]}


def code_without_filter(folder, role):
    """A copy of the guest's code in which this process does not install its filter."""
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "muprotocol.py", folder)
    shutil.copy(ROOT / "tools" / "measure.py", folder / "tools")
    pattern = rf'^( +)confine\("{role[0]}".*\)$'
    text = (ROOT / "muenclave.py").read_text()
    text, count = re.subn(pattern, r"\1LIBC.syscall  # the filter is left out", text, flags=re.M)
    assert count == 1, f"{count} calls that confine the {role}"
    (folder / "muenclave.py").write_text(text)


class Inside(Folder):
    """Prove 3: what the confined processes are refused, in every thread, and by what."""

    maxDiff = None

    def test_every_call_in_every_thread(self):
        """The loader waits for the probe's thread before it ends, so that it can be looked at."""
        with tempfile.TemporaryDirectory() as folder:
            probes = Probes(pathlib.Path(folder))
            self.addCleanup(probes.close)
            with Enclave(self.site, environment=probes.environment) as enclave:
                enclave.unlock()
                probes.meet(*CONFINED)
                for role in CONFINED:
                    check_threads(self, probes.pids[role], os.getuid(), os.getgid())
                    for thread, outcomes in probes.outcomes(role).items():
                        with self.subTest(role=role, thread=thread):
                            self.assertEqual(outcomes, expected(role))
                self.assertTrue(ask(enclave).startswith(ZEN))  # and it still works

    def check_without_filter(self, role):
        """The same look at a build that lacks one process's filter finds every call open."""
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            code_without_filter(folder, role)
            reference = folder / "reference.json"
            command = [sys.executable, "-B", folder / "tools" / "measure.py", "--output", reference]
            subprocess.run(command, check=True)
            site = types.SimpleNamespace(**vars(self.site) | {"reference": reference})
            probes = Probes(folder)
            self.addCleanup(probes.close)
            flags = {"code": folder, "environment": probes.environment}
            with Enclave(site, **flags) as enclave:
                if role != "gate":
                    enclave.unlock()
                probes.meet(role)
                for thread, outcomes in probes.outcomes(role).items():
                    refused = {call for call, outcome in outcomes.items() if outcome == REFUSED}
                    self.assertEqual((thread, refused), (thread, set()))
                    self.assertNotEqual(outcomes, expected(role))
                self.assertEqual({task["Seccomp"] for task in threads(probes.pids[role])}, {"0"})

    def test_a_gate_without_its_filter_is_found_out(self):
        self.check_without_filter("gate")

    def test_a_loader_without_its_filter_is_found_out(self):
        self.check_without_filter("loader")

    def test_an_engine_without_its_filter_is_found_out(self):
        self.check_without_filter("engine")


def check_threads(test, pid, uid, gid, groups=None):
    """Every thread of a process has a filter and this identity, and no capability."""
    tasks = threads(pid)
    test.assertTrue(tasks)
    for task in tasks:
        test.assertEqual((task["Seccomp"], task["NoNewPrivs"]), ("2", "1"))
        sets = {name: int(value, 16) for name, value in task.items() if name.startswith("Cap")}
        test.assertEqual(sets, dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0))
        test.assertEqual(task["Uid"].split(), [str(uid)] * 4)
        test.assertEqual(task["Gid"].split(), [str(gid)] * 4)
        if groups is not None:
            test.assertEqual(task["Groups"].split(), groups)
    limits = pathlib.Path(f"/proc/{pid}/limits").read_text()
    test.assertRegex(limits, r"(?m)^Max core file size +0 +0 ")


# ---------------------------------------------------------------- the filter


def answer(program, number, *arguments, audit=0xC000003E):
    """What a classic BPF program answers to a system call, by default one of x86-64."""
    data = struct.pack("=IIQ6Q", number, audit, 0, *(*arguments, *[0] * (6 - len(arguments))))
    at, accumulator = 0, 0
    while True:
        code, if_true, if_false, operand = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == 0x06:  # return
            return operand
        if code == 0x20:  # load a word
            accumulator = int.from_bytes(data[operand : operand + 4], sys.byteorder)
        elif code == 0x54:  # and
            accumulator &= operand
        else:
            assert code == 0x15, f"instruction {code:#x}"  # jump if equal
            at += if_true if accumulator == operand else if_false


ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x50001, 0x50026
# Written down anew, from the kernel's table.
COMMON = """
0 1 3 5 8 11 12 13 14 15 24 25 28 39 45 60 186 202 204 219 228 230 231 273 318 334
"""
COMMON = set(map(int, COMMON.split()))
OWN = {
    "gate": {7, 9, 10, 44, 47, 48, 51, 55, 271, 288},
    "loader": {9, 10, 17, 18, 44, 46},
    "engine": {7, 9, 10, 17, 20, 44, 47, 232, 271},
}
LETTERS = {"g": "gate", "l": "loader", "e": "engine"}
CLONE, CLONE3, IOCTL, AUDIT_ARCH_AARCH64 = 56, 435, 16, 0xC00000B7


class Filter(unittest.TestCase):
    """The filters' programs, run by an interpreter of their own: every number."""

    def programs(self):
        for letter, role in LETTERS.items():
            yield role, muenclave.filter_program(letter)

    def test_every_number(self):
        for role, program in self.programs():
            answers = {n: answer(program, n) for n in range(1024) if n != CLONE3}
            allowed = {number for number, given in answers.items() if given == ALLOW}
            self.assertEqual(allowed, COMMON | OWN[role])
            self.assertEqual(set(answers.values()), {ALLOW, EPERM})
            self.assertEqual(answer(program, CLONE3), ENOSYS)
            self.assertEqual(answer(program, 0x40000000 | 1), EPERM)  # x32's write

    def test_gpu(self):
        """An engine may drive a GPU where it is given one, and by the driver's requests only."""
        cpu, gpu = map(muenclave.filter_program, ("e", "ev"))
        for high in (0, 0xC020, 0x3000, 0x8000):  # direction and size
            for low in range(1 << 16):  # type and number
                request = high << 16 | low
                is_driver_s = low >> 8 == 0x46 or request < 0x100
                expected = ALLOW if is_driver_s else EPERM
                self.assertEqual(answer(gpu, IOCTL, 3, request), expected, hex(request))
        for request in (0xC020462A, 0x1B, termios.FIONBIO):
            self.assertEqual(answer(cpu, IOCTL, 3, request), EPERM, hex(request))
        for number in set(range(1024)) - {IOCTL}:
            self.assertEqual(answer(gpu, number), answer(cpu, number), number)

    def test_another_machine(self):
        for _, program in self.programs():
            self.assertEqual(answer(program, 0), ALLOW)
            self.assertEqual(answer(program, 0, audit=AUDIT_ARCH_AARCH64), EPERM)

    def test_threads_but_no_processes(self):
        for _, program in self.programs():
            thread = 0x3D0F00  # the flags of glibc's pthread_create
            self.assertEqual(answer(program, CLONE, thread), ALLOW)
            for flags in (0, signal.SIGCHLD, 0x4111, thread & ~0x10000):
                self.assertEqual(answer(program, CLONE, flags), EPERM)


# ---------------------------------------------------------------- the arena


class Arena(Folder):
    """The loader's process, given what gate and engine would give it."""

    def run_loader(self, model, key):
        """(frames for the gate, descriptor of the arena or None, its table, exit status)."""
        gate, loader_gate = socket.socketpair()
        engine, loader_engine = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        numbers = [loader_gate.fileno(), loader_engine.fileno()]
        command = [sys.executable, "-B", ROOT / "muenclave.py", "--loader", *map(str, numbers)]
        settings = {"MODEL_PATH": str(model), "ENCLAVE_CONFINEMENT": "seccomp"}
        options = {"env": settings, "pass_fds": numbers, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, **options) as process, gate, engine:
            loader_gate.close()
            loader_engine.close()
            header = mp.read_header(model)
            gate.sendall(mp.frame(header) + mp.frame(key))
            frames, arena = [], None
            with contextlib.suppress(EOFError):
                while True:
                    frames.append(mp.read_frame(gate, mp.MESSAGE_LIMIT, SECONDS))
            table, found, _, _ = socket.recv_fds(engine, mp.HEADER_LIMIT, 1)
            if found:
                (arena,) = found
                self.addCleanup(os.close, arena)
            return frames, arena, table, process.wait(SECONDS)

    def test_nobody_can_change_it(self):
        key = owner.read_key_file(self.site.key, None)[1]
        frames, arena, table, status = self.run_loader(self.site.model, key)
        self.assertEqual((frames[-1][:1], status), (b"v", 0))
        table = json.loads(table)
        length = os.fstat(arena).st_size
        self.assertEqual(length, table["length"])
        with mmap.mmap(arena, length, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as memory:
            for name, (start, size) in table["files"].items():
                if name not in (mp.VOCABULARY_FILE, "prompts.json", "model.json"):
                    plain = (self.site.demo / name).read_bytes()
                    self.assertEqual(memory[start : start + size], plain, name)
        every = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        self.assertEqual(fcntl.fcntl(arena, fcntl.F_GET_SEALS), every)
        shared = {"prot": mmap.PROT_WRITE, "flags": mmap.MAP_SHARED}
        for change in (
            lambda: os.pwrite(arena, b"x", 0),
            lambda: os.ftruncate(arena, length - 1),
            lambda: os.ftruncate(arena, length + 1),
            lambda: mmap.mmap(arena, length, **shared),
            lambda: fcntl.fcntl(arena, fcntl.F_ADD_SEALS, 0x10),
        ):
            with self.assertRaises(PermissionError) as caught:
                change()
            self.assertEqual(caught.exception.errno, errno.EPERM)

    def test_nothing_of_what_fails_authentication(self):
        key = owner.read_key_file(self.site.key, None)[1]
        sealed = bytearray(self.site.model.read_bytes())
        offset, _, size, _ = muproxy.read_container(self.site.model).chunk(0)
        sealed[offset + size // 2] ^= 1
        broken = self.folder / "broken.mus"
        broken.write_bytes(sealed)
        frames, arena, _, status = self.run_loader(broken, key)
        self.assertEqual((frames[-1], arena, status), (b"c", None, 1))
        broken.write_bytes(self.site.model.read_bytes()[: offset + size])
        frames, arena, _, status = self.run_loader(broken, key)
        self.assertEqual((frames[-1], arena, status), (b"c", None, 1))
        frames, arena, _, status = self.run_loader(self.site.model, bytes(32))
        self.assertEqual((frames[-1], arena, status), (b"c", None, 1))

    @unittest.skipUnless(os.getuid() == 0, "needs root")
    def test_block_device(self):
        """Longer than the model, as a disk is; what comes after it is not read."""
        disk = self.folder / "disk"
        disk.write_bytes(self.site.model.read_bytes() + secrets.token_bytes(4096))
        command = ["losetup", "--find", "--show", "--read-only", disk]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        self.addCleanup(subprocess.run, ["losetup", "--detach", found], check=True)
        self.assertTrue(pathlib.Path(found).is_block_device())
        key = owner.read_key_file(self.site.key, None)[1]
        frames, arena, _, status = self.run_loader(pathlib.Path(found), key)
        self.assertEqual((frames[-1][:1], arena is None, status), (b"v", False, 0))

    def test_a_process_whose_init_is_gone_ends(self):
        """Also if it was gone before the process could ask to die with it."""
        numbers = {"gate": 1, "loader": 2, "engine": 2}
        environment = muenclave.DEFAULTS | {"MODEL_PATH": str(self.site.model)}
        environment |= {"ENCLAVE_PORT": "0", "ENCLAVE_OWNER_PSK": str(self.site.owner_psk)}
        environment |= {"ENCLAVE_USER_PSK": str(self.site.user_psk)}
        for role in CONFINED:
            with self.subTest(role=role):
                pairs = [socket.socketpair() for _ in range(numbers[role])]
                given = [theirs.fileno() for _, theirs in pairs]
                command = [sys.executable, "-B", ROOT / "muenclave.py", f"--{role}"]
                command += map(str, given)
                for ours, _ in pairs:
                    ours.close()
                options = {"env": environment, "pass_fds": given, "stderr": subprocess.DEVNULL}
                done = subprocess.run(command, timeout=SECONDS, **options)
                for _, theirs in pairs:
                    theirs.close()
                self.assertEqual(done.returncode, 1)


# ---------------------------------------------------------------- what memory holds

CHUNK = 4 << 20
LONGEST = 128  # of what is looked for
MIXER = numpy.uint64(0x9E3779B97F4A7C15)
WINDOW, DISTINCT = 32, 16


class Windows:
    """Finds 32-byte windows, with at least 16 distinct bytes, of any tensor of a model.

    Complete: such a window holds at least one of a tensor's words of 8 bytes, at a multiple of 8,
    with at least 3 distinct bytes. All of those are looked for at every offset.
    """

    def __init__(self, folder):
        tensors, words, places = [], [], []
        for path in sorted(folder.glob("*.safetensors")):
            data = path.read_bytes()
            for _, _, _, start, size in weights.safetensors_entries(data):
                tensor = data[start : start + size]
                found = numpy.frombuffer(tensor[: size - size % 8], "<u8")
                words.append(found)
                places.append(
                    numpy.arange(len(found), dtype=numpy.int64) * 8 + len(b"".join(tensors))
                )
                tensors.append(tensor + bytes(-size % 8))
        self.data = b"".join(tensors)
        words, places = numpy.concatenate(words), numpy.concatenate(places)
        octets = numpy.sort(words.view(numpy.uint8).reshape(-1, 8), axis=1)
        varied = (numpy.diff(octets, axis=1) != 0).sum(axis=1) >= 2
        order = numpy.argsort(words[varied], kind="stable")
        self.words, self.places = words[varied][order], places[varied][order]
        self.known = numpy.zeros(1 << 24, bool)
        self.known[self.hash(self.words)] = True

    @staticmethod
    def hash(words):
        return (words * MIXER >> numpy.uint64(40)).astype(numpy.int64)

    def are_in(self, data):
        """Whether one of the windows is in the data."""
        for shift in range(min(8, len(data) - 7)):
            words = numpy.frombuffer(data, "<u8", (len(data) - shift) // 8, shift)
            spots = numpy.flatnonzero(self.known[self.hash(words)])
            first = numpy.searchsorted(self.words, words[spots], "left")
            last = numpy.searchsorted(self.words, words[spots], "right")
            for found in numpy.flatnonzero(first < last):
                at = int(spots[found]) * 8 + shift
                places = self.places[first[found] : last[found]]
                if any(self.is_window(data, at, int(place)) for place in places):
                    return True
        return False

    def is_window(self, data, at, place):
        """Whether the equal words at these offsets are part of a window."""
        low, high, floor = 0, 0, min(at, place, WINDOW)
        while low < floor and data[at - low - 1] == self.data[place - low - 1]:
            low += 1
        rest = min(len(data) - at, len(self.data) - place, WINDOW)
        while high < rest and data[at + high] == self.data[place + high]:
            high += 1
        run = data[at - low : at + high]
        return any(
            len(set(run[start : start + WINDOW])) >= DISTINCT
            for start in range(len(run) - WINDOW + 1)
        )


def memory(pid, name=""):
    """The readable memory of a process, whole or the maps of this name, in blocks that overlap."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        for line in pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, access, *_ = line.split()
            start, end = (int(number, 16) for number in place.split("-"))
            if "r" not in access or "[v" in line or name not in line:  # [vvar]: the kernel's
                continue
            while start < end:
                with contextlib.suppress(OSError):  # a page that is not there any more
                    yield os.pread(file.fileno(), min(CHUNK, end - start), start)
                start += CHUNK - LONGEST if end - start > CHUNK else CHUNK


def key_forms(site):
    """The weights key and the key of the chunks, raw and in hexadecimal, by name."""
    key = owner.read_key_file(site.key, None)[1]
    chunks = muproxy.read_container(site.model).chunk_key(key)
    forms = {}
    for name, value in (("weights key", key), ("chunk key", chunks)):
        text = value.hex()
        forms |= {name: value, f"{name}, hex": text.encode(), f"{name}, HEX": text.upper().encode()}
    return forms


def keys_in(pid, forms):
    """Which forms of the keys are in the memory of a process."""
    found, size = set(), 0
    for block in memory(pid):
        size += len(block)
        found |= {name for name, form in forms.items() if form in block}
    assert size > 5_000_000, f"only {size} bytes of memory could be read"
    return found


class Memory(Folder):
    """Prove 2: the weights are in the engine alone, the key is in the gate alone, for a lease."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.forms, cls.windows = key_forms(cls.site), Windows(cls.site.demo)

    def test_the_search_finds_what_is_there(self):
        plain = next(self.site.demo.glob("*.safetensors")).read_bytes()
        _, _, _, start, size = max(weights.safetensors_entries(plain), key=lambda entry: entry[4])
        for offset in range(start + 1000, start + 1000 + 9):
            window = plain[offset : offset + WINDOW]
            self.assertGreaterEqual(len(set(window)), DISTINCT)
            self.assertTrue(self.windows.are_in(b"abc" + window + b"abcdefgh"), offset)
            self.assertFalse(self.windows.are_in(b"abc" + window[1:-1] + b"abcdefgh"), offset)
        self.assertFalse(self.windows.are_in(secrets.token_bytes(1 << 20)))
        self.assertFalse(self.windows.are_in(bytes(1 << 20)))

    def has_weights(self, pid, name=""):
        """Whether a window of a tensor is in the memory of a process."""
        return any(self.windows.are_in(block) for block in memory(pid, name))

    def test_through_a_lease(self):
        with Enclave(self.site) as enclave:
            init, gate = (enclave.pids()[role] for role in ("init", "gate"))
            self.assertEqual(keys_in(gate, self.forms), set())
            enclave.unlock()
            pids = enclave.pids()
            self.assertEqual(pids.keys(), {"init", "gate", "engine"})  # the loader has ended
            self.assertEqual((pids["init"], pids["gate"]), (init, gate))
            self.assertEqual(keys_in(pids["engine"], self.forms), set())
            self.assertTrue(ask(enclave).startswith(ZEN))
            ask(enclave, temperature=1.0, max_new_tokens=8)
            self.assertEqual(keys_in(pids["engine"], self.forms), set())
            self.assertTrue(self.has_weights(pids["engine"], "memfd:arena"))
            in_gate = keys_in(gate, self.forms)
            self.assertIn("weights key", in_gate)
            self.assertLessEqual(in_gate, {"weights key", "weights key, hex"})
            self.assertEqual(keys_in(init, self.forms), set())
            for pid in (init, gate):
                self.assertFalse(self.has_weights(pid))
            lock(enclave)
            await_end([gate, pids["engine"]])
            locked = enclave.pids()
            self.assertEqual(locked.keys(), {"init", "gate"})
            self.assertNotEqual(locked["gate"], gate)
            for pid in (init, locked["gate"]):
                self.assertEqual(keys_in(pid, self.forms), set())
                self.assertFalse(self.has_weights(pid))


# ---------------------------------------------------------------- from outside

OPEN_WAY = """
set -e
closed=$1 stage=$2
shift 2
mount --bind "$closed" "$stage"
mount -t tmpfs -o mode=755 none "$closed"
while [ "$1" != -- ]; do
    mkdir -p "$closed/$1"
    mount --bind "$stage/$1" "$closed/$1"
    shift
done
shift
exec "$@"
"""


def open_way(stage):
    """The start of a command line: it runs the rest where other users can reach this Python.

    A Python in root's home lies behind a folder that nobody else may enter; in a mount namespace
    of its own the enclave gets one that everybody may, with the same Python and models in it.
    """
    base = pathlib.Path(sys.base_prefix).resolve()
    homes, shut = (
        [p for p in path.parents if not p.stat().st_mode & 0o001] for path in (base, ROOT)
    )
    assert set(shut) <= set(homes), f"other users have to reach this checkout: chmod o+x {shut}"
    if not homes:
        return ()
    (home,) = homes
    cache = sealed_demo().model.parent.resolve()
    kept = {path.relative_to(home).parts[0] for path in (base, cache, ROOT) if home in path.parents}
    return ("unshare", "--mount", "sh", "-c", OPEN_WAY, "sh", home, stage, *sorted(kept), "--")


REACH = """
import ctypes, errno, os, sys
def outcome(action):
    try:
        action()
        return 0
    except OSError as error:
        return error.errno
for pid in map(int, sys.argv[1:]):
    print(outcome(lambda: os.kill(pid, 0)), outcome(lambda: open(f"/proc/{pid}/mem")),
          outcome(lambda: os.listdir(f"/proc/{pid}/fd")))
print(outcome(lambda: os.kill(os.getpid(), 0)))
"""


@unittest.skipUnless(os.getuid() == 0, "needs root")
class Full(Folder):
    """Confinement "full": each process under a user of its own."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        stage = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.enclave = cls.enterClassContext(
            Enclave(cls.site, "--confinement", "full", prefix=open_way(stage))
        )
        cls.enclave.unlock()

    def test_it_works_and_says_so(self):
        with self.enclave.ready() as session:
            posture = {"confinement": "full", "debug": False}
            self.assertEqual(session.measurement["posture"], posture)
        self.assertTrue(ask(self.enclave).startswith(ZEN))

    def test_every_thread(self):
        pids = self.enclave.pids()
        for role in ("gate", "engine"):
            with self.subTest(role=role):
                uid = muenclave.UIDS[role]
                check_threads(self, pids[role], uid, uid, [])
                self.assertEqual(os.stat(f"/proc/{pids[role]}").st_uid, uid)
                self.assertEqual(os.stat(f"/proc/{pids[role]}/mem").st_uid, 0)  # not dumpable

    def test_descriptors(self):
        pids = self.enclave.pids()
        null = [NULL] * 3
        arena = "memfd:arena (deleted)"  # sealed, so that it can be read alone
        self.assertEqual(descriptors(pids["engine"]), [*null, arena, "proc/meminfo", "socket"])
        await_gate_at_rest(pids["gate"])

    def test_no_process_reaches_another(self):
        pids = self.enclave.pids()
        for role in ("engine", "loader"):
            uid = muenclave.UIDS[role]
            others = [str(pid) for other, pid in pids.items() if other != role]
            done = subprocess.run(
                ["/usr/bin/env", "python3", "-c", REACH, *others],
                user=uid,
                group=uid,
                extra_groups=[],
                env={"PATH": "/usr/bin:/bin"},
                capture_output=True,
                text=True,
            )
            refused = f"{errno.EPERM} {errno.EACCES} {errno.EACCES}\n" * len(others)
            self.assertEqual((done.stdout, done.stderr), (refused + "0\n", ""))

    def test_stopped_and_continued(self):
        """As a debugger does it, or a machine that is suspended: calls that wait start anew."""
        pids = self.enclave.pids()
        with self.enclave.ready() as session:
            for number in (signal.SIGSTOP, signal.SIGCONT):
                for role in ("gate", "engine"):
                    os.kill(pids[role], number)
                    stopped = number == signal.SIGSTOP
                    until(
                        lambda r=role, s=stopped: (state(pids[r]) == "T") == s, "a change of state"
                    )
            request = QUESTION | {"max_new_tokens": 4}
            table = muproxy.read_vocabulary(self.enclave.site.vocabulary)
            text = "".join(session.generate(request, table))
        self.assertTrue(ZEN.startswith(text), text)
        self.assertEqual(self.enclave.pids(), pids)

    def test_environments(self):
        """Each process knows the settings that it needs, and no path of a secret but the gate."""
        pids = self.enclave.pids()
        for role in ("gate", "engine"):
            words = pathlib.Path(f"/proc/{pids[role]}/environ").read_bytes().split(b"\0")
            names = {word.split(b"=")[0].decode() for word in words if word}
            hidden = {"ENCLAVE_OWNER_PSK", "ENCLAVE_USER_PSK", "MODEL_PATH"}
            self.assertEqual(names & hidden, hidden if role == "gate" else set())
            ours = set(muenclave.DEFAULTS) | set(starter.KEPT)
            ours |= {"HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "TORCHINDUCTOR_CACHE_DIR"}
            self.assertLessEqual(names, ours | {"LC_CTYPE"})


# ---------------------------------------------------------------- nothing at rest

OPENING = ("open", "openat", "openat2", "creat", "open_by_handle_at")
SENDING = ("write", "pwrite64", "writev", "pwritev", "pwritev2", "sendto", "sendmsg", "sendmmsg")
MOVING = ("sendfile", "splice", "vmsplice", "tee", "copy_file_range", "io_uring_setup")
NAMING = ("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "mkdir")
NAMING += ("mkdirat", "mknod", "mknodat", "truncate", "fallocate")
SHARING = ("mmap", "ftruncate", "shmget", "process_vm_writev", "ptrace")
TRACED = (*OPENING, *SENDING, *MOVING, *NAMING, *SHARING)
ARENA = "/memfd:arena"
SEMAPHORE = r"/dev/shm/sem\.\w{6}"  # of tqdm, which transformers imports; it is never filled

Call = collections.namedtuple("Call", "pid name arguments")


def read_trace(path):
    """The calls of a trace by strace, as they were entered."""
    lines = path.read_text("latin-1").splitlines()
    found = (re.match(r"(\d+) +(\w+)\((.*)", line) for line in lines)
    return [Call(*match.groups()) for match in found if match]


def place(arguments):
    """What the first descriptor in the arguments of a call is, as `strace -y` shows it."""
    found = re.search(r"(?:^|[ ,])\d+<([^>]*)>", arguments)
    return found[1].split(":[")[0].removesuffix(" (deleted)") if found else None


def octets(arguments):
    """The bytes of all strings in the arguments of a call."""
    texts = re.findall(r'"((?:[^"\\]|\\.)*)"', arguments)
    return b"".join(t.encode("latin-1").decode("unicode_escape").encode("latin-1") for t in texts)


class AtRest(Folder):
    """Prove 2: from start to end, no plaintext of the model reaches a file."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.windows = Windows(cls.site.demo)
        cls.start, cls.trace = time.time(), cls.folder / "trace"
        assert shutil.which("strace"), "needs strace"
        calls = ",".join(f"?{name}" for name in TRACED)
        strace = ("strace", "-D", "-f", "--seccomp-bpf", "-y", "-x", "-s", "2000000")
        strace += ("-e", f"trace={calls}", "-e", "signal=none", "-o", cls.trace)
        with Enclave(cls.site, prefix=strace) as enclave:
            enclave.unlock()
            cls.text = ask(enclave, max_new_tokens=12)
            (tracer,) = {int(task["TracerPid"]) for task in threads(enclave.process.pid)}
            enclave.process.send_signal(signal.SIGTERM)
            cls.status = enclave.process.wait(SECONDS)
        await_end([tracer])
        cls.calls = read_trace(cls.trace)

    def named(self, *names):
        """The traced calls of these names."""
        return [call for call in self.calls if call.name in names]

    def test_it_was_the_whole_run(self):
        self.assertEqual(self.status, -signal.SIGTERM)
        self.assertTrue(ZEN.startswith(self.text))
        opened = "\n".join(call.arguments for call in self.named(*OPENING))
        for path in (self.site.model, self.site.owner_psk, "libtorch_cpu.so"):
            self.assertIn(str(path), opened)
        self.assertEqual(len({call.pid for call in self.calls}) >= 4, True)

    def test_no_file_is_opened_to_write(self):
        writing = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_TMPFILE")
        paths = {
            re.search(r'"([^"]*)"', call.arguments)[1]
            for call in self.named(*OPENING)
            if call.name == "creat" or writing.search(call.arguments)
        }
        self.assertIn(NULL, paths)
        others = {path for path in paths - {NULL} if not re.fullmatch(SEMAPHORE, path)}
        self.assertEqual(others, set())

    def test_nothing_is_written_but_to_sockets(self):
        places = collections.Counter(place(call.arguments) for call in self.named(*SENDING))
        self.assertGreater(places["socket"], 20)
        places = {name for name in places if not re.fullmatch(SEMAPHORE, name)}
        # A pipe: what init says on standard error, and subprocess about a child that can't start.
        self.assertLessEqual(places, {"socket", "pipe", NULL, ARENA})
        self.assertEqual(self.named(*MOVING), [])
        names = [call for call in self.named(*NAMING) if "/dev/shm/" not in call.arguments]
        # torch makes sure of its cache's folder: one that is there, and in which nothing can be.
        self.assertLessEqual({(c.name, octets(c.arguments)) for c in names}, {("mkdir", b"/proc")})

    def test_nothing_that_is_written_holds_weights(self):
        written = collections.defaultdict(bytes)
        for call in self.named(*SENDING):
            written[call.pid, place(call.arguments)] += octets(call.arguments)
        everything = b"".join(written.values())
        self.assertIn(b'"measurement":', everything)  # so the trace is read as it was written
        places = {place for (_, place), data in written.items() if self.windows.are_in(data)}
        self.assertEqual(places, {ARENA})

    def test_no_memory_is_shared_to_be_written(self):
        shared = [
            call
            for call in self.named("mmap")
            if "MAP_SHARED" in call.arguments and "PROT_WRITE" in call.arguments
        ]
        files = {place(call.arguments) for call in shared} - {None}
        files = {name for name in files if not re.fullmatch(SEMAPHORE, name)}
        self.assertEqual(files, set())
        sharing = ("ftruncate", "shmget", "process_vm_writev", "ptrace")
        self.assertEqual(self.named(*sharing), [])

    def with_weights(self, *folders):
        """The files, changed since the start, that hold a window of a tensor."""
        found = set()
        # os.walk, unlike rglob, goes on where a folder of another process is gone.
        walks = (place for folder in folders for place in os.walk(folder))
        for path in (pathlib.Path(at, name) for at, _, names in walks for name in names):
            with contextlib.suppress(OSError):  # so is a file
                if path.is_file() and path.lstat().st_ctime >= self.start - 1:
                    if self.windows.are_in(path.read_bytes()):
                        found.add(path)
        return found

    def test_no_file_is_left_with_weights(self):
        folders = {str(self.folder), tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"}
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            left = pathlib.Path(folder, "left")
            plain = next(self.site.demo.glob("*.safetensors")).read_bytes()
            left.write_bytes(b"abc" + plain[len(plain) // 2 :][:100])
            self.assertEqual(self.with_weights(self.folder), {left})  # so the search can find
        self.assertEqual(self.with_weights(*folders), set())


# ---------------------------------------------------------------- settings


class Settings(Folder):
    """Where settings come from; a mistake is one line on standard error and a status."""

    def start(self, *flags, conf=None, environment=None, prefix=(), python=(sys.executable,)):
        """Run the enclave until it ends by itself. Returns the finished process."""
        if conf is not None:
            path = self.folder / "muenclave.conf"
            path.write_bytes(conf if isinstance(conf, bytes) else conf.encode())
            flags += ("--conf", path)
        command = [*prefix, *python, "-B", ROOT / "tools" / "enclave.py", *flags]
        options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
        options |= {"env": os.environ | (environment or {}), "timeout": SECONDS}
        return subprocess.run(list(map(str, command)), **options)

    def check_mistake(self, pattern, *flags, **options):
        """A start that must fail, in one line that says this."""
        done = self.start(*flags, **options)
        self.assertEqual((done.returncode, done.stdout), (1, ""), done.stderr)
        ours, guests = (
            r"enclave: error: [^\n]+\n",
            r"muenclave: error: [^\n]+\nmuenclave: stopped\n",
        )
        self.assertRegex(done.stderr, rf"\A(?:{ours}|{guests})\Z")
        self.assertRegex(done.stderr, pattern)

    def flags(self, **others):
        """Flags that are right, but for these."""
        flags = {"model": self.site.model, "owner_psk": self.site.owner_psk, "port": 0}
        flags |= {"user_psk": self.site.user_psk} | others
        return [word for k, v in flags.items() for word in (f"--{k.replace('_', '-')}", v)]

    def test_precedence(self):
        conf = f"# a comment\n  # another\n\nMODEL_PATH = {self.folder}/of-file\n"
        rest = self.flags()[2:]
        environment = {"MODEL_PATH": f"{self.folder}/of-environment"}
        self.check_mistake("of-file", *rest, conf=conf)
        self.check_mistake("of-environment", *rest, conf=conf, environment=environment)
        flag = ("--model", f"{self.folder}/of-flag")
        self.check_mistake("of-flag", *rest, *flag, conf=conf, environment=environment)

    def test_from_file_alone(self):
        conf = self.folder / "whole.conf"
        settings = {"MODEL_PATH": self.site.model, "ENCLAVE_OWNER_PSK": self.site.owner_psk}
        settings |= {"ENCLAVE_USER_PSK": self.site.user_psk, "ENCLAVE_PORT": "0"}
        conf.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        command = [sys.executable, "-B", ROOT / "tools" / "enclave.py", "--conf", conf]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            port = int(re.fullmatch(r"muenclave: listening (\d+)\n", process.stderr.readline())[1])
            with socket.create_connection(("127.0.0.1", port)):
                pass
            with self.assertRaises(ConnectionRefusedError):  # bound to one address
                socket.create_connection(("127.0.0.2", port))
            self.assertEqual(process.stderr.readline(), "muenclave: locked\n")
            process.send_signal(signal.SIGTERM)
            said = process.stderr.read()
        self.assertEqual((process.returncode, said), (-signal.SIGTERM, ""))

    def test_wrong_values(self):
        for pattern, wrong in (
            ("ENCLAVE_PORT: 'x' is not a number", {"port": "x"}),
            ("ENCLAVE_PORT: '-1' is not a number", {"port": "-1"}),
            ("ENCLAVE_PORT: '٣' is not a number", {"port": "٣"}),
            ("port must be 0-65535", {"port": "65536"}),
            ("ENCLAVE_RATE: '63' is not a number from 64 up", {"rate": "63"}),
            ("ENCLAVE_BURST: '1' is not a number from 16384 up", {"burst": "1"}),
            ("ENCLAVE_SESSIONS: '1' is not a number from 2 up", {"sessions": "1"}),
            ("ENCLAVE_SLOTS: '0' is not a number from 1 up", {"slots": "0"}),
            ("ENCLAVE_CONFINEMENT must be one of full, seccomp", {"confinement": "none"}),
            ("ENCLAVE_EVIDENCE must be one of psk", {"evidence": "tea"}),
            ("ENCLAVE_DEVICE must be cpu, cuda, cuda:NUMBER or auto", {"device": "tpu"}),
            *[(f"ENCLAVE_DEVICE={name} needs a GPU", {"device": name}) for name in self.absent()],
            ("no model; set MODEL_PATH", {"model": ""}),
            ("absent: .*No such file", {"model": f"{self.folder}/absent"}),
            ("not a sealed model", {"model": self.site.token}),
            ("Is a directory", {"model": self.folder}),
            ("ENCLAVE_OWNER_PSK: no secret in", {"owner_psk": f"{self.folder}/absent"}),
            ("ENCLAVE_USER_PSK: no secret in", {"user_psk": self.site.model}),
        ):
            with self.subTest(**wrong):
                self.check_mistake(pattern, *self.flags(**wrong))

    def absent(self):
        """The devices that this machine does not have."""
        return () if os.path.exists("/dev/nvidiactl") else ("cuda", "cuda:1", "auto")

    def test_wrong_file(self):
        for pattern, conf in (
            ("unknown setting 'ENCLAVE_PRT'", "ENCLAVE_PRT=1\n"),
            ("must hold KEY=value lines", "MODEL_PATH\n"),
            ("MODEL_PATH: a zero byte", "MODEL_PATH=a\0b\n"),
            ("must hold KEY=value lines", b"MODEL_PATH=\xff\n"),
        ):
            with self.subTest(conf=conf):
                self.check_mistake(pattern, conf=conf)
        self.check_mistake("must hold KEY=value lines", "--conf", f"{self.folder}/absent")

    def test_port_in_use(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            self.check_mistake("Address already in use", *self.flags(port=port))

    def test_there_is_no_insecure_plaintext(self):
        done = self.start(*self.flags(), "--insecure-plaintext")
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        last = "enclave: error: unrecognized arguments: --insecure-plaintext"
        self.assertEqual(done.stderr.splitlines()[-1], last)

    def test_packages_that_are_missing(self):
        with tempfile.TemporaryDirectory() as folder:
            python = (sys.executable, "-S")  # no packages but those on PYTHONPATH
            options = {"environment": {"PYTHONPATH": folder}, "python": python}
            for name in ("cryptography", "torch", "transformers"):
                self.check_mistake(f"{name} is not installed; pip", *self.flags(), **options)
                pathlib.Path(folder, name).mkdir()
                pathlib.Path(folder, name, "__init__.py").touch()

    @unittest.skipUnless(os.getuid() == 0, "needs root")
    def test_full_confinement_needs_root(self):
        prefix = ("unshare", "--user")
        flags = self.flags(confinement="full")
        self.check_mistake("full needs root", *flags, prefix=prefix)


# ---------------------------------------------------------------- init


class Init(Folder):
    """Init ends with the gate, and everything ends with init."""

    def begin(self, enclave):
        """Unlock an enclave; return {role: process id} while it loads."""
        said = len(enclave.lines)
        session = enclave.session("owner")
        self.addCleanup(session.close)
        session._send(enclave.unlock_token())
        enclave.wait_for("loading", said)
        return until(lambda: (pids := enclave.pids()).get("engine") and pids, "an engine")

    def test_engine_then_gate_killed(self):
        with Enclave(self.site) as enclave:
            enclave.unlock()
            first = enclave.pids()
            held = descriptors(first["init"])
            said = len(enclave.lines)
            os.kill(first["engine"], signal.SIGKILL)
            enclave.wait_for("engine lost", said)
            enclave.wait_for("ready", said)
            second = enclave.pids()
            self.assertEqual((first["gate"], first["init"]), (second["gate"], second["init"]))
            self.assertNotEqual(first["engine"], second["engine"])
            self.assertEqual(descriptors(second["init"]), held)
            await_gate_at_rest(second["gate"])
            os.kill(second["gate"], signal.SIGKILL)
            self.assertEqual(enclave.process.wait(SECONDS), 1)
            await_end(second.values())
            self.assertNotIn("Traceback", " ".join(enclave.lines))

    def test_gate_killed_while_loading(self):
        with Enclave(self.site) as enclave:
            pids = self.begin(enclave)
            os.kill(pids["gate"], signal.SIGKILL)
            self.assertEqual(enclave.process.wait(SECONDS), 1)
            await_end(pids.values())
            enclave.wait_for("stopped")
            self.assertNotIn("Traceback", " ".join(enclave.lines))

    def test_init_killed_while_loading(self):
        with Enclave(self.site) as enclave:
            pids = self.begin(enclave)
            enclave.process.kill()
            self.assertEqual(enclave.process.wait(SECONDS), -signal.SIGKILL)
            await_end(pids.values())

    def test_both_signals_end_it(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number), Enclave(self.site) as enclave:
                pids = enclave.pids()
                enclave.process.send_signal(number)
                self.assertEqual(enclave.process.wait(SECONDS), -number)
                await_end(pids.values())

    def test_gates_started_afresh_leave_nothing_open(self):
        with Enclave(self.site) as enclave:
            first = enclave.pids()
            held = descriptors(first["init"])
            for _ in range(3):
                said = len(enclave.lines)
                pids = self.begin(enclave)
                os.kill(pids["engine"], signal.SIGKILL)
                enclave.port = int(enclave.wait_for("listening", said).split()[-1])
                enclave.address = ("127.0.0.1", enclave.port)
                await_end([pids["gate"]])
                self.assertEqual(enclave.pids().keys(), {"init", "gate"})
                self.assertEqual(descriptors(first["init"]), held)
