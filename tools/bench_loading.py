"""Loads weights in different ways, as a process of its own, for tools/bench.py unseal.

    bench_loading.py PLAIN_DIR SEALED_DIR     {"bytes", "weights"}: of files, of tensors
    {"way": NAME, ...}                        loads in this way; {"seconds", ...}

Where a way leaves tensors, a byte of each of their pages is read before the time is taken, so that
all are in memory. What programs decrypt goes to a file in memory (/dev/shm). Before each way, more
memory than it takes is used and freed again: the host of a virtual machine takes back what lies
free, and what it costs to have it again is no way's own.
"""

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import pathlib
import socket
import struct
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

import owner  # noqa: E402

import muenclave  # noqa: E402
import muprotocol as mp  # noqa: E402

SIOCOUTQ = 0x5411  # of a local socket: bytes that its peer has not read
SECONDS = 300  # for the loader to do anything
SAMPLE = 0.002  # seconds between two looks at the memory
BLOCK = 16 << 20  # bytes compared at a time
USED = 4  # times the weights: more than a way takes


def use_memory(size):
    """Have so many bytes of the memory that is free now be really there."""
    with mmap.mmap(-1, size) as memory:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)


def touch(tensors):
    """Read a byte of each page of some tensors."""
    import torch

    for tensor in tensors:
        flat = tensor.reshape(-1).view(torch.uint8)
        flat[:: mmap.PAGESIZE].sum(dtype=torch.int64)


def timed(work, *arguments):
    """(seconds, result) of a call."""
    began = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - began, result


# ---------------------------------------------------------------- ours


class Load:
    """One run of the product's loader; this process plays gate and engine.

    start: seconds of the process's start, before it is given the key; seconds: from the key to
    tensors in memory; state: {name: tensor}.
    """

    def __init__(self, folder, meter=None):
        model = str(folder / "model.mus")
        header = mp.read_header(model)
        _, key = owner.read_key_file(folder / "model.key", None)
        settings = muenclave.DEFAULTS | os.environ | {"MODEL_PATH": model}
        gate, for_gate = socket.socketpair()
        engine, for_engine = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        began = time.perf_counter()
        process = muenclave.spawn("loader", settings, for_gate, for_engine)
        try:
            with gate, engine:
                gate.sendall(mp.frame(header))
                self.wait_read(gate, process)
                self.start = time.perf_counter() - began
                if meter is not None:
                    meter.watch(process.pid)
                self.seconds, self.state = timed(self.load, gate, engine, key)
        finally:
            process.kill()
            process.wait()

    def wait_read(self, gate, process):
        """Wait until the loader has read all: it is warm and confined, and wants the key."""
        while struct.unpack("i", fcntl.ioctl(gate, SIOCOUTQ, bytes(4)))[0]:
            if process.poll() is not None:
                raise RuntimeError("the loader has ended before it had a key")
            time.sleep(0.001)

    def load(self, gate, engine, key):
        """From the key to tensors."""
        gate.sendall(mp.frame(key))
        while (message := mp.read_frame(gate, mp.MESSAGE_LIMIT, SECONDS))[:1] == b"p":
            pass
        if message[:1] != b"v":
            raise RuntimeError("the loader refused the sealed model")
        files = muenclave.map_arena(engine)
        facts = json.loads(bytes(files["model.json"]))
        state = muenclave.read_state(files, facts["tensors"])
        touch(state.values())
        return state


class Memory:
    """The most memory that a loader and this process have at once, without this one's before.

    Pages that both map count once: an arena is counted by its size in memory, the rest is what is
    private to each of them.
    """

    def __init__(self):
        self.pids, self.peak, self.is_over = [os.getpid()], 0, threading.Event()
        self.before = self.look()

    def watch(self, pid):
        """Look from now on, at this process too."""
        self.pids.append(pid)
        self.peak = self.look()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        """Look again and again."""
        while not self.is_over.wait(SAMPLE):
            self.peak = max(self.peak, self.look())

    def look(self):
        """Bytes now."""
        private, shared, arenas = 0, 0, {}
        for pid in self.pids:
            fields = rollup(pid)
            private += fields.get("Pss_Anon", 0)
            shared += fields.get("Pss_Shmem", 0)
            arenas |= arenas_of(pid)
        return private + max(shared, sum(arenas.values()))

    def end(self):
        """Bytes of the peak over what was there before."""
        self.is_over.set()
        self.thread.join()
        return max(self.peak, self.look()) - self.before


def rollup(pid):
    """{field: bytes} of what a process maps; {} once it is gone."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()[1:]
    except (ProcessLookupError, FileNotFoundError):
        return {}
    words = (line.split() for line in lines)
    return {word[0].rstrip(":"): int(word[1]) * 1024 for word in words}


def arenas_of(pid):
    """{inode: bytes in memory} of the files in memory that a process has open."""
    found = {}
    try:
        for entry in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(entry).startswith("/memfd:"):
                facts = entry.stat()
                found[facts.st_ino] = facts.st_blocks * 512
    except (ProcessLookupError, FileNotFoundError):
        pass
    return found


# ---------------------------------------------------------------- the others


class Ways:
    """Each way of loading, by its name: a method that returns a dict with its seconds."""

    def __init__(self, plain, sealed):
        self.paths, self.sealed = sorted(plain.glob("*.safetensors")), sealed
        self.sources = [mapped(path) for path in self.paths]
        self.size = sum(map(len, self.sources))

    def weights(self):
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.read_plain().values())

    def read_plain(self):
        """{name: tensor} of the plaintext files, in memory."""
        from safetensors.torch import load_file

        state = {}
        for path in self.paths:
            state |= load_file(path)
        touch(state.values())
        return state

    def muenclave(self, **_):
        """The product's loader."""
        load = Load(self.sealed)
        return {"seconds": load.seconds, "start": load.start}

    def check(self, **_):
        """The product's loader again, every tensor compared with the plaintext. RuntimeError."""
        import torch

        state, plain = Load(self.sealed).state, self.read_plain()
        if state.keys() != plain.keys():
            raise RuntimeError("the loader gave other tensors than were sealed")
        for name, tensor in plain.items():
            same = state[name].dtype == tensor.dtype and torch.equal(state[name], tensor)
            if not same:
                raise RuntimeError(f"the loader gave another {name} than was sealed")
        return {"tensors": len(plain)}

    def memory(self, **_):
        """The product's loader again, with a look at the memory. PermissionError."""
        meter = Memory()
        load = Load(self.sealed, meter)
        return {"peak": meter.end(), "tensors": len(load.state)}

    def plain(self, **_):
        """safetensors' load_file of the plaintext."""
        return {"seconds": timed(self.read_plain)[0]}

    def memmove(self, threads, **_):
        """The same bytes copied to fresh memory, by so many threads."""
        fresh = [mmap.mmap(-1, len(source)) for source in self.sources]
        seconds, _ = timed(copy_all, self.sources, fresh, threads)
        return {"seconds": seconds}

    def program(self, command, output, **_):
        """A program that decrypts to a file in memory. RuntimeError."""
        seconds, done = timed(run_quietly, command)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no output"]
            raise RuntimeError(f"{command[0]}: {lines[-1]}")
        os.unlink(output)
        return {"seconds": seconds}

    def check_program(self, command, output, **_):
        """The same, its output compared with the plaintext. RuntimeError."""
        done = run_quietly(command)
        with open(output, "rb") as file:
            same = all(is_next(file, source) for source in self.sources) and not file.read(1)
        os.unlink(output)
        if done.returncode or not same:
            raise RuntimeError(f"{command[0]} gave other bytes than were encrypted")
        return {}


def mapped(path):
    """A file's bytes, mapped and in memory; a copy of our own, so that it has an address."""
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    sum(memory[:: mmap.PAGESIZE])
    return memory


def is_next(file, source):
    """Whether a file goes on with these bytes."""
    starts = range(0, len(source), BLOCK)
    return all(file.read(len(part)) == part for part in (source[s : s + BLOCK] for s in starts))


def run_quietly(command):
    """Run a program to its end; what it says is kept."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.run(command, **quiet)


def copy_all(sources, targets, threads):
    """memmove each source to its target, cut among threads."""

    def work(number):
        for source, target in zip(sources, targets):
            size = len(source)
            first, last = size * number // threads, size * (number + 1) // threads
            addresses = (address(buffer) + first for buffer in (target, source))
            ctypes.memmove(*addresses, last - first)  # without the interpreter's lock

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def address(buffer):
    """Where a buffer lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def main():
    """Answer each line."""
    plain, sealed = map(pathlib.Path, sys.argv[1:])
    out, sys.stdout = sys.stdout, sys.stderr
    ways = Ways(plain, sealed)
    facts = {"bytes": ways.size, "weights": ways.weights()}
    print(json.dumps(facts), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        use_memory(USED * ways.size // mmap.PAGESIZE * mmap.PAGESIZE)
        result = getattr(ways, request.pop("way"))(**request)
        print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
