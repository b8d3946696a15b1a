"""Both meters, over real sockets and by a clock of our own: in every window of time no more leaves
than the rate and one burst allow, and when there is something to send the rate is used.

The threads of a gate run one at a time, and time passes when all of them sleep. So the load of the
machine decides nothing; threads that wake up late are part of what is tried.
"""

import contextlib
import heapq
import itertools
import pathlib
import random
import socket
import tempfile
import threading
import unittest
from unittest import mock

from hypothesis import example, given, settings
from hypothesis import strategies as st

import muenclave
import muprotocol as mp
import muproxy
from tests import support

SECOND = mp.NANOSECOND
USE = 0.98  # of the allowed rate, at least, when there is something to send
LATE = 0.25  # seconds by which a thread wakes up too late, at most
PROPERTY = settings(derandomize=True, database=None, deadline=None, max_examples=40)
site = None


def setUpModule():
    global site
    holder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(holder.cleanup)
    site = support.make_site(pathlib.Path(holder.name))


class Clock:
    """What muenclave takes from `time`: time passes when every thread sleeps, and only then.

    chance: draws how late each sleeper wakes, up to `late` seconds, every other time.
    """

    def __init__(self, chance, late):
        self.now, self.chance, self.late = 10**15, chance, late
        self.sleepers, self.order, self.failures = [], itertools.count(), []
        self.passes = lambda: None  # called before time passes

    def monotonic_ns(self):
        return self.now

    def monotonic(self):
        return self.now / SECOND

    def sleep(self, seconds):
        """Let the others run; come back so many seconds later, or later than that."""
        is_late = seconds > 0 and self.chance.random() < 0.5
        seconds += self.chance.uniform(0, self.late) if is_late else 0
        self._wait(self.now + max(0, round(seconds * SECOND)))

    def is_readable(self, connection, seconds, *events):
        """muprotocol.is_readable, by this clock."""
        if not mp.is_readable(connection, 0, *events) and seconds:
            self.sleep(seconds)
        return mp.is_readable(connection, 0, *events)

    def _wait(self, until):
        event = threading.Event()
        heapq.heappush(self.sleepers, (until, next(self.order), event))
        self._wake()
        event.wait()

    def _wake(self):
        """Have the next one run, if there is one."""
        if self.sleepers:
            until, _, event = heapq.heappop(self.sleepers)
            if until > self.now:
                self.passes()
            self.now = max(self.now, until)
            event.set()

    def run(self, *workers):
        """Run these functions, a thread each, to their ends; raise the first that one raises."""
        events = [threading.Event() for _ in workers]
        self.sleepers = [(self.now, next(self.order), event) for event in events]
        threads = [threading.Thread(target=self._work, args=a) for a in zip(workers, events)]
        for thread in threads:
            thread.start()
        self._wake()
        for thread in threads:
            thread.join()
        self.passes()
        for failure in self.failures:
            raise failure

    def _work(self, worker, event):
        event.wait()
        try:
            worker()
        except Exception as error:  # noqa: BLE001  for the main thread
            self.failures.append(error)
        self._wake()


def most_over(events, rate):
    """Bytes that the fullest window has beyond rate x its length. events: (ns, bytes), in order."""
    level = most = before = 0
    for now, count in events:
        level = max(0, level - (now - before) * rate) + count * SECOND
        most, before = max(most, level), now
    return -(-most // SECOND)


class Gate:
    """A gate of the product, its sessions at one end of real sockets; we are at the other one."""

    def __init__(self, rate, burst, seed=0, late=LATE):
        self.rate, self.burst = rate, burst
        self.clock = Clock(random.Random(seed), late)
        self.clock.passes = self.drain
        self.sinks, self.events = [], []
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        self.stack.enter_context(mock.patch.object(muenclave, "time", self.clock))
        readable = self.clock.is_readable
        self.stack.enter_context(mock.patch.object(muenclave, "is_readable", readable))
        ours = {"MODEL_PATH": site.model, "ENCLAVE_MEASUREMENT": "ab" * 32}
        ours |= {"ENCLAVE_OWNER_PSK": site.owner_psk, "ENCLAVE_USER_PSK": site.user_psk}
        ours |= {"ENCLAVE_RATE": self.rate, "ENCLAVE_BURST": self.burst}
        values = {name: str(value) for name, value in ours.items()}
        control = self.pair(socket.SOCK_SEQPACKET)[0]
        self.gate = muenclave.Gate(muenclave.DEFAULTS | values, control)
        return self

    def __exit__(self, *failure):
        self.stack.close()

    def unlock(self):
        """As after an unlock: an engine is ready, on a pipe that nobody reads."""
        gate, users = self.gate, [mp.token_hash("a" * 16)]
        lease = support.unlock_token(site, budget=1 << 40, users=users)["lease"]
        gate.account.add(lease, self.clock.now, bytes(32))
        gate.vocabulary = muproxy.read_vocabulary(site.vocabulary)
        gate.state, gate.context, gate.engine = "ready", 1 << 40, self.pair()[0]

    def pair(self, kind=socket.SOCK_STREAM):
        """Two ends of a connection."""
        return [self.stack.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, kind)]

    def session(self, is_known=True):
        """A session that has proved itself, or a stranger's."""
        ours, other = self.pair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        other.setblocking(False)
        self.sinks.append(other)
        session = muenclave.Session(self.gate, ours)
        if is_known:
            session.meter, session.is_known = self.gate.cells, True
            session.sealer = mp.Sealer(bytes(32), mp.CELL)
        return session

    def drain(self):
        """Take what has come; it came now."""
        for sink in self.sinks:
            with contextlib.suppress(BlockingIOError):
                while data := sink.recv(1 << 20):
                    self.events.append((self.clock.now, len(data)))

    def bytes(self):
        """All that has come."""
        return sum(count for _, count in self.events)


# What somebody wants sent: (seconds since the last time, bytes) each.
DEMAND = st.lists(st.tuples(st.floats(0, 60), st.integers(1, 8000)), max_size=8)
RATES = st.sampled_from((700, mp.DEFAULT_RATE, 20_000, 1 << 20))
BURSTS = st.sampled_from((16 << 10, mp.DEFAULT_BURST, 1 << 20))


class Windows(unittest.TestCase):
    """Whatever is asked for, and however late threads wake: rate x T + burst, exactly."""

    def send(self, gate, demand, is_known, meter=None):
        """A peer's thread, which sends what is wanted."""
        session = gate.session(is_known)
        session.meter = meter or session.meter

        def work():
            for pause, size in demand:
                gate.clock.sleep(pause)
                with contextlib.suppress(TimeoutError):  # there was no credit in time
                    if is_known:
                        session.say(bytes(size), mp.IDS_RECORD)
                    else:
                        session.write(bytes(size))

        return work

    @PROPERTY
    @given(
        RATES,
        BURSTS,
        st.lists(DEMAND, min_size=1, max_size=4),
        st.lists(DEMAND, max_size=3),
        st.sampled_from((0, 0.01, LATE, 2)),
        st.integers(0, 1 << 32),
    )
    @example(
        mp.DEFAULT_RATE,
        16 << 10,
        [[(60, 8000)] + [(0, 8000)] * 3] * 3,
        [[(60, 8000)] * 3] * 3,
        LATE,
        1,
    )
    def test_gate(self, rate, burst, known, strangers, late, seed):
        with Gate(rate, burst, seed, late) as gate:
            peers = [self.send(gate, demand, True) for demand in known]
            peers += [self.send(gate, demand, False) for demand in strangers]
            # And one who reads the log of the boot, which nobody's turns hold back.
            peers.append(self.send(gate, known[0], False, gate.gate.cells))
            gate.clock.run(*peers)
            self.assertLessEqual(most_over(gate.events, rate), burst)

    @PROPERTY
    @given(RATES, BURSTS, DEMAND, DEMAND, st.sampled_from((0, LATE, 2)), st.integers(0, 1 << 32))
    @example(20_000, 16 << 10, [(60, 8000)] + [(0, 8000)] * 9, [(60, 8000)], 0, 1)
    def test_inlet(self, rate, burst, one, other, late, seed):
        """The proxy's: two connections through one inlet, read in turn."""
        clock = Clock(random.Random(seed), late)
        inlet, events = muproxy.Inlet(rate, burst, clock), []
        work = sorted([(pause, size, 0) for pause, size in one] + [(*d, 1) for d in other])
        pairs = [socket.socketpair() for _ in range(2)]

        def read():
            for pause, size, which in work:
                clock.sleep(pause)
                pairs[which][0].sendall(bytes(size))
                while mp.is_readable(pairs[which][1], 0):
                    data = inlet.receive(pairs[which][1], size, 10**6)
                    events.append((clock.now, len(data)))

        with contextlib.ExitStack() as stack:
            for end in itertools.chain(*pairs):
                stack.enter_context(end)
            clock.run(read)
        self.assertEqual(inlet.received, sum(size for _, size, _ in work))
        self.assertLessEqual(most_over(events, rate), burst)


class Use(unittest.TestCase):
    """With something to send there is no slot that nobody takes, but for the first ones."""

    SECONDS = 40

    def used(self, gate, rate):
        """The share of a rate that was used, of all that could be."""
        first, last = gate.events[0][0], gate.events[-1][0]
        self.assertGreater(last - first, self.SECONDS * SECOND // 2)
        return (gate.bytes() - gate.events[0][1]) * SECOND / (last - first) / rate

    def test_sessions(self):
        """One that always has something to send, and several; threads that wake up late.

        By up to so many ticks, which are 100 ms at the default rate.
        """
        for rate, count, late in itertools.product((mp.DEFAULT_RATE, 20_000), (1, 5), (0, 2.5)):
            with self.subTest(rate=rate, count=count, late=late):
                share = rate - rate // muenclave.HANDSHAKE_SHARE
                size = self.SECONDS * share // mp.CELL // count * mp.CELL_ROOM
                with Gate(rate, mp.DEFAULT_BURST, rate + count, late * mp.CELL / share) as gate:
                    gate.clock.run(*[self.say(gate, size) for _ in range(count)])
                    self.assertGreaterEqual(self.used(gate, share), USE)
                    self.assertLessEqual(most_over(gate.events, share), gate.burst // 2)

    def test_answers(self):
        """Answers whose ids are always there: each takes a cell a tick, all together the rate.

        Who wakes up a whole tick too late has lost that tick.
        """
        for rate, count, late in itertools.product((mp.DEFAULT_RATE, 20_000), (1, 3), (0, 0.9)):
            with self.subTest(rate=rate, count=count, late=late):
                share = rate - rate // muenclave.HANDSHAKE_SHARE
                with Gate(rate, mp.DEFAULT_BURST, rate + count, late * mp.CELL / share) as gate:
                    gate.unlock()
                    sessions = [gate.session() for _ in range(count)]
                    answers = [lambda s=s: s.answer({"prompt": "a"}) for s in sessions]
                    gate.clock.run(*answers, self.feeder(gate))
                    self.assertGreaterEqual(self.used(gate, share), USE)
                    self.assertLessEqual(most_over(gate.events, share), gate.burst // 2)

    def feeder(self, gate):
        """The engine's thread: there are always more ids than a cell takes, until the end."""
        gate, clock = gate.gate, gate.clock
        until = clock.now + self.SECONDS * SECOND

        def feed():
            while clock.now < until:
                clock.sleep(gate.tick / SECOND / 2)
                for slot, reply in list(gate.replies.items()):
                    for _ in range(500 - len(reply.ids)):
                        gate.take_message(mp.ID, slot, 0)
            for slot in list(gate.replies):
                gate.take_message(mp.END, slot, 0)

        return feed

    def test_handshakes(self):
        """Strangers, whose meter is full at the start, get their share besides."""
        rate, size, seconds = mp.DEFAULT_RATE, 1500, 600
        with Gate(rate, mp.DEFAULT_BURST) as gate:
            share, end = rate // muenclave.HANDSHAKE_SHARE, gate.clock.now + seconds * SECOND

            def ask():
                session = gate.session(is_known=False)
                while gate.clock.now < end:
                    with contextlib.suppress(TimeoutError):  # another one comes in its place
                        session.write(bytes(size))

            gate.clock.run(*[ask] * 3)
            least = gate.burst // 2 - size + USE * share * seconds
            self.assertGreaterEqual(gate.bytes(), least)
            self.assertLessEqual(most_over(gate.events, share), gate.burst // 2)

    def test_inlet(self):
        """The proxy's meter, which starts empty; its thread wakes up late."""
        clock, rate, count = Clock(random.Random(1), LATE), mp.DEFAULT_RATE, 1000
        inlet, start = muproxy.Inlet(rate, mp.DEFAULT_BURST, clock), clock.now
        ours, other = socket.socketpair()

        def read():
            for _ in range(count):
                ours.sendall(bytes(mp.CELL))
                inlet.receive(other, mp.CELL, 10**6)

        with ours, other:
            clock.run(read)
        self.assertEqual(inlet.received, count * mp.CELL)
        allowed = rate * (clock.now - start) / SECOND  # it has no credit from before
        self.assertGreaterEqual(inlet.received, USE * allowed)
        self.assertLessEqual(inlet.received, allowed)

    def say(self, gate, size):
        """A thread of a session that sends so many bytes."""
        session = gate.session()
        return lambda: session.say(bytes(size), mp.IDS_RECORD)


if __name__ == "__main__":
    unittest.main()
