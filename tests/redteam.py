"""An engine that has the weights and wants them out: it runs in place of the real one, under the
real init, gate, loader and confinement, and says on its pipe whatever a prompt has it say.

tests/test_redteam.py puts this file in the place of muenclave.py, the real one beside it as
real.py, and bent.py. A prompt is JSON: {"attack": a method of Double, ...}. What it is to move, a
number of random bits, comes with the prompt; the decoder on the other side is the test.

While it answers, the gate's clock (bent.py) stands, and goes on from tick to tick when this engine
says so. Then it knows exactly in which tick a cell leaves, as no engine does.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import re
import socket
import stat
import sys
import time

import bent
import real

import muprotocol as mp

VOCABULARY = 768  # ids that the demo model knows
CONTEXT = 1 << 20  # tokens
FSTAT = 5  # x86-64
DESCRIPTORS = 256  # how many it looks at
BLOCK = 1 << 20  # bytes of memory that it reads at a time
LONGEST = 64  # bytes of the longest needle


def digits(number, base, count):
    """The digits of a number, the lowest first."""
    found = []
    for _ in range(count):
        number, digit = divmod(number, base)
        found.append(digit)
    return found


class Double:
    """The engine once it is loaded."""

    def __init__(self, gate, clock, hoard):
        self.gate, self.clock, self.hoard = gate, clock, hoard
        self.sent, self.before, self.slot = 0, clock["taken"], 0
        self.library = ctypes.CDLL(None)
        self.kept = []  # slots of answers that it has not ended

    def serve(self):
        """Do what prompts say."""
        while True:
            request = json.loads(mp.read_frame(self.gate, mp.MESSAGE_LIMIT))
            if "cancel" in request:
                continue
            self.slot = request["slot"]
            orders = json.loads(request["prompt"])
            getattr(self, orders.pop("attack"))(**orders)

    def say(self, *messages):
        """Send messages, (kind, value) each, about the request in hand, in one piece."""
        self.sent += len(messages)
        pack = mp.PIPE.pack
        self.gate.sendall(b"".join(pack(kind, self.slot, value) for kind, value in messages))

    def settle(self):
        """Wait until the gate has taken all that was said."""
        while self.clock["taken"] - self.before < self.sent:
            time.sleep(0.0005)

    def tick(self, cells):
        """Let one tick pass, by whose end so many cells of this answer are on the other side."""
        self.settle()
        self.await_gate()
        self.clock["held"] = self.clock["wake"]
        self.await_gate()
        while self.clock["read"] < cells:
            time.sleep(0.0005)

    def await_gate(self):
        """Wait until the gate's session sleeps, until its next tick."""
        while self.clock["wake"] <= self.clock["held"]:
            time.sleep(0.0005)

    def finish(self, kind=mp.END, value=0):
        """End the answer in the next tick. Returns that tick's moment."""
        self.await_gate()
        self.say((kind, value))
        self.settle()
        self.clock["held"] = now = self.clock["wake"]
        return now

    def let_go(self):
        """End the answer, however many ticks it takes until all of it has left."""
        self.say((mp.END, 0))
        self.clock.release()

    def follow(self, begin, ticks):
        """Wait for so many ticks from a moment on, and have the other side know that we see each.

        The last one is not acknowledged; what is done then is seen.
        """
        end = begin + ticks * real.SHORTEST_TICK
        while (now := self.clock["held"]) < end:
            self.clock["heard"] = now
            time.sleep(0.0002)

    # ---- attacks

    def tokens(self, message, base, count):
        """Choose ids."""
        self.say(*((mp.ID, token) for token in digits(int(message, 16), base, count)))
        self.let_go()

    def cell_counts(self, message, base, count):
        """Choose how many ids are in each cell; they are all the same."""
        for cells, digit in enumerate(digits(int(message, 16), base, count), 1):
            self.say(*[(mp.ID, 0)] * (digit + 1))
            self.tick(cells)
        self.finish()

    def ticks(self, message, count, covers=False):
        """Choose the ticks in which ids leave; the first one tells where they begin.

        covers: whether a cell leaves in every tick, as the lease's policy has it.
        """
        cells = 0
        for number, bit in enumerate([1, *digits(int(message, 16), 2, count)], 1):
            self.say(*[(mp.ID, 0)] * bit)
            cells += bit
            self.tick(number if covers else cells)
        self.finish()

    def endings(self, kind, value):
        """Choose how an answer ends."""
        self.finish(kind, value)

    def lengths(self, value):
        """Choose what the gate is told about the prompt's length."""
        self.say((mp.LENGTH, value))
        self.finish()

    def stalls(self, ticks):
        """Choose when the next request, which is more than a pipe holds, is read."""
        self.follow(self.finish(), ticks)

    def read(self, padding):
        """End the answer to such a request."""
        self.finish()

    def deaf(self, ticks):
        """Choose when all that waits in the full pipe is read: what was cancelled meanwhile."""
        self.kept.append(self.slot)
        self.follow(self.clock["held"], ticks)

    def ignored(self, padding):
        """Take the request that has filled the pipe."""
        self.kept.append(self.slot)

    def forget(self):
        """End all of these, and the answer."""
        kept, slot, self.kept = self.kept, self.slot, []
        for self.slot in [*kept, slot]:
            self.say((mp.END, 0))
        self.clock.release()

    def late(self, ticks):
        """Choose when an answer ends that its user has cancelled."""
        self.follow(self.clock["held"], ticks)
        self.say((mp.END, 0))
        self.settle()
        self.clock["heard"] = self.clock["held"]

    def loads(self):
        """Die, once the answer has ended; the next engine chooses what it says first."""
        self.endings(mp.END, 0)
        os._exit(1)

    def everything(self, message, size, most):
        """Choose all of that at once, until a message of so many bits has left.

        Its digits, the lowest first: of the length; then for each tick whether a cell leaves, as
        one does in the first, and if so how many ids (up to `most`) are in it, and which; last, of
        the ending.
        """
        left, capacity, cells = int(message, 16), 1, 0

        def draw(base):
            nonlocal left, capacity
            capacity *= base
            left, digit = divmod(left, base)
            return digit

        self.say((mp.LENGTH, 1 + draw(CONTEXT)))
        while capacity < 1 << size:
            if cells == 0 or draw(2):
                cells += 1
                self.say(*[(mp.ID, draw(VOCABULARY)) for _ in range(1 + draw(most))])
            self.tick(cells)
        self.finish(mp.END, draw(len(mp.ENDINGS)))

    def lie(self, messages):
        """Say what an engine may not say: (kind, slot, value) each; the slot is added to ours."""
        self.clock.release()
        said = (mp.PIPE.pack(kind, self.slot + other, v) for kind, other, v in messages)
        self.gate.sendall(b"".join(said))

    def weights(self, name, start, count):
        """Move a piece of the weights: an id of each byte."""
        data = bytes(self.hoard[name][start : start + count])
        self.say(*((mp.ID, byte) for byte in data))
        self.let_go()

    def search(self, needles):
        """Look for values in all that it can read; say how often each was found.

        needles: (the first bytes, SHA-256 of the whole, size) each, in hexadecimal: so it can
        recognise a value without holding it.
        """
        wanted = [(bytes.fromhex(first), bytes.fromhex(h), size) for first, h, size in needles]
        hits = [0] * len(wanted)
        for data in self.readable():
            for number, (first, digest, size) in enumerate(wanted):
                for found in re.finditer(re.escape(first), data):
                    whole = data[found.start() : found.start() + size]
                    hits[number] += hashlib.sha256(whole).digest() == digest
        self.say(*((mp.ID, min(count, 255)) for count in hits))
        self.let_go()

    def readable(self):
        """Its memory, and what its descriptors give, as bytes."""
        maps, memory = self.hoard["maps"], self.hoard["memory"]
        os.lseek(maps, 0, os.SEEK_SET)
        table = b""
        while block := os.read(maps, BLOCK):
            table += block
        for start, end in re.findall(rb"^([0-9a-f]+)-([0-9a-f]+) r", table, re.MULTILINE):
            yield from self.read_file(memory, int(start, 16), int(end, 16))
        for descriptor, mode in self.descriptors().items():
            if stat.S_ISREG(mode):
                size = os.lseek(descriptor, 0, os.SEEK_END)
                yield from self.read_file(descriptor, 0, size)
            elif descriptor == self.gate.fileno():
                with contextlib.suppress(BlockingIOError):
                    yield self.gate.recv(BLOCK, socket.MSG_PEEK | socket.MSG_DONTWAIT)

    def read_file(self, descriptor, start, end):
        """What can be read between two offsets, in pieces that overlap."""
        for offset in range(start, end, BLOCK):
            try:
                os.lseek(descriptor, offset, os.SEEK_SET)
                yield os.read(descriptor, min(BLOCK + LONGEST, end - offset))
            except (OSError, OverflowError):
                pass  # the kernel's own page

    def descriptors(self):
        """{number: mode} of all that are open, but for the two that it has opened itself.

        By the call that a filter lets through: the C library's fstat makes another one.
        """
        found, facts = {}, ctypes.create_string_buffer(144)  # struct stat: st_mode is at byte 24
        for descriptor in range(DESCRIPTORS):
            if self.library.syscall(FSTAT, descriptor, facts) == 0:
                found[descriptor] = int.from_bytes(facts.raw[24:28], sys.byteorder)
        own = (self.hoard["maps"], self.hoard["memory"])
        return {number: mode for number, mode in found.items() if number not in own}

    def descriptor_kinds(self):
        """Say what they are: 1 for each character device, 2 for a socket, 3 for anything else."""
        kinds = (
            1 if stat.S_ISCHR(m) else 2 if stat.S_ISSOCK(m) else 3
            for m in self.descriptors().values()
        )
        self.say(*((mp.ID, kind) for kind in kinds))
        self.let_go()


def engine(clock, settings, gate, loader):
    """Take the arena as the real engine does, then serve; it keeps all that it is told.

    Its first message is a word of the page: the number that it says, or what has failed, below 0;
    it dies without one if there are no such failures.
    """
    hoard = {"type": mp.read_frame(gate, mp.HANDSHAKE_FRAME)}
    hoard["maps"] = os.open("/proc/self/maps", os.O_RDONLY)
    hoard["memory"] = os.open("/proc/self/mem", os.O_RDONLY)
    real.drop_privileges("engine", settings["ENCLAVE_CONFINEMENT"])
    real.confine("e")
    with loader:
        hoard |= real.map_arena(loader)
    word = clock["word"]
    if word < -len(mp.FAILURES):
        return 1
    if word < 0:
        gate.sendall(mp.PIPE.pack(mp.FAILED, 0, -word - 1))
        return 1
    gate.sendall(mp.PIPE.pack(mp.LOADED, 0, word))
    Double(gate, clock, hoard).serve()


def counted(take, clock):
    """Gate.take_message, which counts what it has taken."""

    def take_message(gate, *message):
        take(gate, *message)
        clock["taken"] += 1

    return take_message


def main():
    """The real enclave, but for its engine and its clock."""
    clock = bent.bend(real)
    real.Gate.take_message = counted(real.Gate.take_message, clock)
    real.ROLES["--engine"] = functools.partial(engine, clock)
    return real.main()


if __name__ == "__main__":
    sys.exit(main())
