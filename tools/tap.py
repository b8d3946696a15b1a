"""A relay before an enclave that counts, with moments, what comes out of it; what its counts say of
a meter; and what the moments could tell an observer. For tools/exfil_timing.py and who else reads.
"""

import collections
import contextlib
import fcntl
import math
import select
import socket
import sys
import termios
import threading
import time

from environment import ROOT

sys.path.insert(0, str(ROOT))
import muenclave  # noqa: E402
import muprotocol as mp  # noqa: E402
import muproxy  # noqa: E402

# ---------------------------------------------------------------- what is counted
# Every count stands between two moments: the bytes passed after the first and before the second.
# What is claimed rests on these alone, so that a reader who wakes up late accuses nobody.

LEAK = 0.05  # share of the bytes: a meter that forgets so many must be found out
SATURATED = 0.99  # share of the rate that a reader must get before it can say that the meter holds
UNASKED_BYTES = 2048  # a handshake and a cell, whose readers have not come round yet
UNASKED_SECONDS = 0.1  # for readers to wake up and ask again
WINDOWS = (0.1, 1, 10, 60)  # seconds
TRACE = 200  # points of the meter trace

Passed = collections.namedtuple("Passed", "after before count")  # ns, ns, bytes


def most_over(events, rate):
    """The most by which bytes certainly passed in a window exceed rate x its length. Bytes, >= 0.

    events: [Passed], both moments in order. Over all pairs of events, exact, in one pass: the
    window from event i to j holds S(j) - S(i - 1) in before(j) - after(i), where S sums the counts,
    so that the greatest excess ending at j needs only the least of S(i - 1) - rate x after(i).
    """
    total, least, most = 0, 0, 0  # times NANOSECOND
    for number, (after, before, count) in enumerate(events):
        start = total * mp.NANOSECOND - rate * after
        least = start if number == 0 else min(least, start)
        total += count
        most = max(most, total * mp.NANOSECOND - rate * before - least)
    return most / mp.NANOSECOND


def most_in(events, seconds):
    """The most bytes that certainly passed within any window of so many seconds."""
    length, first, held, most = int(seconds * mp.NANOSECOND), 0, 0, 0
    for event in events:
        held += event.count
        while first < len(events) and event.before - events[first].after > length:
            held -= events[first].count
            first += 1
        most = max(most, held)
    return most


def saturation(events, rate, over):
    """(seconds, use) of the longest window, up to the last event, in which the rate was got.

    use: (bytes - over) / (rate x seconds), where `over` is what came beyond the rate, a burst: it
    must not pass for a reader that kept up. Without such a window: (0, use of the whole).
    """
    total, seconds, use, whole = 0, 0.0, 0.0, 0.0
    for event in reversed(events):
        total += event.count
        length = (events[-1].before - event.after) / mp.NANOSECOND
        whole = (total - over) / (rate * length) if length else 0.0
        if whole >= SATURATED:
            seconds, use = length, whole
    return (seconds, use) if seconds else (0.0, max(0.0, whole))


def pace(events, rate, seconds):
    """bytes / (rate x T) of the last half of a window of so many seconds: no burst is left in it.

    More than 1 for long is a leak, though what passed may still be within the burst that is
    allowed.
    """
    total, found = 0, 0.0
    for event in reversed(events):
        length = (events[-1].before - event.after) / mp.NANOSECOND
        if length > seconds / 2:
            break
        total += event.count
        found = total / (rate * length) if length else 0.0
    return found


def least_leak(seconds, use, rate, allowed):
    """The least share of the bytes that a meter may forget and be found out for certain.

    One that forgets a share s passes at least rate x T / (1 - s) to who always asks for more, less
    what nobody has asked for yet at the end; that must be more than rate x T + allowed.
    """
    asked = min(use, 1) * rate * seconds
    return 1 - asked / (rate * seconds + allowed + unasked(rate))


def unasked(rate):
    """Bytes of credit that may lie at the meter when a run ends, though readers always ask."""
    return UNASKED_BYTES + rate * UNASKED_SECONDS


def needed_seconds(rate, allowed):
    """How long a reader must get the rate to be certain of a LEAK."""
    return (allowed + unasked(rate)) * (1 - LEAK) / (LEAK * rate)


def decide(events, rate, allowed):
    """The verdict on a run, and what it rests on, by the names of the module's docstring.

    exceeds: in some window more passed for certain than rate x T + allowed. holds: it did not, a
    LEAK would have been found out by who can take so much more than the rate, and the pace shows
    none. not decided: neither; the run was too short, or too slow.
    """
    over = most_over(events, rate)
    seconds, use = saturation(events, rate, over)
    leak = least_leak(seconds, use, rate, allowed)
    last = pace(events, rate, seconds)
    holds = leak <= LEAK and SATURATED <= last <= 2 - SATURATED
    verdict = "exceeds" if over > allowed else "holds" if holds else "not decided"
    figures = {"verdict": verdict, "use": use, "saturated_seconds": seconds, "pace": last}
    return figures | {"burst_seen": over, "least_leak": leak}


def judge(events, rate, burst, held=0):
    """All figures of a run. held: bytes that kernels may hold before who is measured takes them."""
    allowed, seconds = burst + held, 0
    if events:
        seconds = (events[-1].before - events[0].after) / mp.NANOSECOND
    figures = {"rate": rate, "burst": burst, "held": held, "seconds": seconds}
    figures |= {"bytes": sum(event.count for event in events)}
    figures |= decide(events, rate, allowed)
    windows = [
        {"seconds": length, "bytes": most_in(events, length), "allowed": rate * length + allowed}
        for length in WINDOWS
        if length <= seconds
    ]
    needed = needed_seconds(rate, allowed)
    return figures | {"needed_seconds": needed, "windows": windows, "trace": trace(events)}


def trace(events):
    """{"step": seconds, "bytes": [...]}: what passed in each of up to TRACE equal steps."""
    if not events:
        return {"step": 0, "bytes": []}
    begin = events[0].after
    step = max(1, -(-(events[-1].before - begin) // TRACE))
    counts = collections.Counter()
    for event in events:
        counts[min((event.before - begin) // step, TRACE - 1)] += event.count
    return {"step": step / mp.NANOSECOND, "bytes": [counts[n] for n in range(max(counts) + 1)]}


# ---------------------------------------------------------------- the tap

POLL_SECONDS = 0.002  # the longest time between two looks: it widens what a count stands between
LARGE_BUFFER = 1 << 20  # bytes: nothing waits on the enclave's side for a reader to wake up
SMALL_BUFFER = 4 << 10


class Flow:
    """One connection through a tap. frames: [(ns, payload bytes)] from the enclave, whole ones."""

    def __init__(self, client, enclave):
        self.client, self.enclave = client, enclave
        self.to_client, self.to_enclave = bytearray(), bytearray()
        self.is_ended = False  # by the enclave: what it said is still passed on
        self.frames, self._head, self._left = [], b"", 0

    def split(self, data, now):
        """Follow the frames in what the enclave says."""
        while data:
            if not self._left:
                missing = mp.FRAME_HEADER - len(self._head)
                self._head, data = self._head + data[:missing], data[missing:]
                if len(self._head) < mp.FRAME_HEADER:
                    return
                self._left, self._size = [int.from_bytes(self._head, "big")] * 2
                self._head = b""
            taken = min(self._left, len(data))
            self._left, data = self._left - taken, data[taken:]
            if not self._left:
                self.frames.append((now, self._size))


def unacknowledged(connection):
    """Bytes sent that the peer's kernel has not acknowledged."""
    return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


class Tap(threading.Thread):
    """A TCP relay before an enclave that counts, with moments, what comes out of it.

    is_paced False: it takes all that the enclave gives, at once; an event lies between the last
    moment at which nothing was there and that at which all was read. is_paced True: it takes only
    what its client takes, in small pieces; an event lies around the call that handed it over.
    events: [Passed]. flows: every Flow so far. most_open: of them at once. lost: how many ended
    with something that their client may not have read. problem: why no connection could be made.
    """

    def __init__(self, target, listen=("127.0.0.1", 0), is_paced=False):
        super().__init__(daemon=True)
        self.target, self.is_paced = target, is_paced
        self.events, self.flows, self.open, self.problem = [], [], [], None
        self.most_open = self.lost = 0
        self.listener = socket.create_server(listen, backlog=128)
        if is_paced:
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
        self.listener.setblocking(False)
        self.address = self.listener.getsockname()
        self._is_over = False

    def run(self):
        """Relay until `close`."""
        nothing_since = time.monotonic_ns()  # at this moment nothing was there to be read
        while not self._is_over:
            began = time.monotonic_ns()
            self.wait()
            count = sum(map(self.serve, list(self.open)))
            if not self.is_paced and count:
                self.events.append(Passed(nothing_since, time.monotonic_ns(), count))
            nothing_since = began
            self.accept()
        for flow in list(self.open):
            self.end(flow)

    def wait(self):
        """Until a connection has something to do, or for a moment."""
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        for flow in self.open:
            give = select.POLLOUT if flow.to_client else 0
            poll.register(flow.client, select.POLLIN | give)
            take = 0 if flow.is_ended or (self.is_paced and flow.to_client) else select.POLLIN
            wanted = take | (select.POLLOUT if flow.to_enclave else 0)
            if wanted:  # else its end, which can wait, would wake us again and again
                poll.register(flow.enclave, wanted)
        poll.poll(POLL_SECONDS * 1000)

    def accept(self):
        """Take new connections, and make each its own to the enclave."""
        with contextlib.suppress(BlockingIOError):
            while True:
                client = self.listener.accept()[0]
                buffer = SMALL_BUFFER if self.is_paced else LARGE_BUFFER
                try:
                    enclave = muproxy.connect(self.target, buffer, muproxy.CONNECT_SECONDS)
                except OSError as error:
                    self.problem = error.strerror or str(error)
                    client.close()
                    continue
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for connection in (client, enclave):
                    connection.setblocking(False)
                self.open.append(Flow(client, enclave))
                self.flows.append(self.open[-1])
                self.most_open = max(self.most_open, len(self.open))

    def serve(self, flow):
        """Pass on what there is, both ways. Returns how many bytes the enclave gave."""
        count = 0
        try:
            if not self.hear(flow):
                self.end(flow, is_clean=not flow.to_client and not unacknowledged(flow.client))
                return 0
            with contextlib.suppress(BlockingIOError):
                while not flow.is_ended and not (self.is_paced and flow.to_client):
                    data = flow.enclave.recv(mp.CELL if self.is_paced else LARGE_BUFFER)
                    flow.is_ended = not data
                    count += len(data)
                    flow.split(data, time.monotonic_ns())
                    flow.to_client += data
        except OSError:
            flow.is_ended = True
        self.give(flow)
        return count

    def hear(self, flow):
        """Pass on what the client says; False when it has ended. Raises OSError."""
        with contextlib.suppress(BlockingIOError):
            data = flow.client.recv(LARGE_BUFFER)
            if not data:
                return False
            flow.to_enclave += data
        with contextlib.suppress(BlockingIOError):
            del flow.to_enclave[: flow.enclave.send(flow.to_enclave)]
        return True

    def give(self, flow):
        """Hand on to the client what it takes; end what has ended."""
        try:
            began = time.monotonic_ns()
            sent = flow.client.send(flow.to_client) if flow.to_client else 0
            if self.is_paced and sent:
                self.events.append(Passed(began, time.monotonic_ns(), sent))
            del flow.to_client[:sent]
        except BlockingIOError:
            pass
        except OSError:
            return self.end(flow)
        if flow.is_ended and not flow.to_client:
            self.end(flow)

    def end(self, flow, is_clean=False):
        """Close both sides of a connection. is_clean: its client has read all that it was sent.

        Linux resets a connection that is closed with something unread, and else ends it.
        """
        self.lost += not is_clean
        for connection in (flow.client, flow.enclave):
            connection.close()
        if flow in self.open:
            self.open.remove(flow)

    def close(self):
        """End all connections, and the thread."""
        self._is_over = True
        if self.is_alive():
            self.join()
        self.listener.close()


# ---------------------------------------------------------------- the timing probe
# What an engine could tell an observer of the line who can't read the cells, by their lengths and
# moments. Lengths are constant by construction; moments are ticks of the gate's clock, of which a
# cell leaves or does not. The estimate is of the entropy in what was seen: what it could have told
# if every variation had been a signal and none had been noise. An engine that wants to tell may do
# more, up to the bound by construction: a bit for each tick of an open reply, and for who reads the
# cells log2 of the number of ids that one may hold. The moment within a tick is no part of that
# bound: meter and scheduler set it, and an engine reaches it by load alone; its entropy is told
# where there are enough cells. On channels whose sender chooses moments and whose noise is a queue:
# Anantharam and Verdu, "Bits through queues", IEEE Transactions on Information Theory 42(1), 1996.

MOST_ORDER = 4
SAMPLES = 30  # for each value that occurs, before an estimate rests on it
RESOLUTION = 1_000_000  # ns: of a moment within its tick
PROBE_SOURCE = (
    "entropy of the gaps between cells in ticks, given as many gaps before as the samples allow; "
    "plug-in with the Miller-Madow correction (Miller 1955)"
)


def entropy(values):
    """Entropy of what the values are drawn from, bits a value, from the values (hashable).

    Plug-in estimate with the correction of Miller and Madow, (m - 1) / 2n nats for m of n values
    distinct (Miller, "Note on the bias of information estimates", 1955). Too low where n is not
    much greater than the number of values that can occur.
    """
    counts, n = collections.Counter(values), len(values)
    if n == 0:
        return 0.0
    plain = sum(count / n * math.log2(n / count) for count in counts.values())
    return plain + (len(counts) - 1) / (2 * n * math.log(2))


def entropy_rate(values):
    """(bits a value given the `order` values before it, order), for a stationary source.

    H(order + 1 values) - H(order values), never less than 0, with the highest order up to
    MOST_ORDER for which there are SAMPLES of each block that occurs. It falls to the entropy rate
    as the order grows (Cover and Thomas, Elements of Information Theory, 4.2).
    """
    blocks = [list(zip(*(values[n:] for n in range(size)))) for size in range(1, MOST_ORDER + 2)]
    enough = [len(block) >= SAMPLES * len(set(block)) for block in blocks]
    order = max(0, enough.index(False) - 1 if False in enough else MOST_ORDER)
    before = entropy(blocks[order - 1]) if order else 0.0
    return max(0.0, entropy(blocks[order]) - before), order


def tick_of(rate):
    """The gate's tick under a lease of this rate, ns."""
    share = rate - rate // muenclave.HANDSHAKE_SHARE
    return max(muenclave.SHORTEST_TICK, mp.CELL * mp.NANOSECOND // share)


def probe(frames, rate, id_bits):
    """The figures of a timing probe from one answer's cells, as in the module's docstring.

    frames: [(ns, payload bytes)]. rate: of the lease. id_bits: of the model's ids, 0 if unknown.
    """
    tick, moments = tick_of(rate), [when for when, _ in frames]
    lengths = collections.Counter(size + mp.FRAME_HEADER for _, size in frames)
    gaps = [round((b - a) / tick) for a, b in zip(moments, moments[1:])]
    seconds = (moments[-1] - moments[0]) / mp.NANOSECOND if gaps else 0
    by_moment, order = entropy_rate(gaps)
    by_length = entropy([size for _, size in frames])
    within = [when % tick // RESOLUTION for when in moments]
    is_enough = len(within) >= SAMPLES * len(set(within))
    fills = mp.CELL_ROOM * 8 // id_bits if id_bits else 0
    bound = {"moments": mp.NANOSECOND / tick}
    bound["fill"] = math.log2(max(1, fills)) * bound["moments"]
    return {
        "source": PROBE_SOURCE,
        "cells": len(frames),
        "seconds": seconds,
        "tick_seconds": tick / mp.NANOSECOND,
        "lengths": {str(size): count for size, count in sorted(lengths.items())},
        "gaps": {str(gap): count for gap, count in sorted(collections.Counter(gaps).items())},
        "order": order,
        "length_bits_per_cell": by_length,
        "gap_bits_per_cell": by_moment,
        "bits_per_second": (by_length + by_moment) * len(gaps) / seconds if seconds else None,
        "within_tick_bits_per_cell": entropy(within) if is_enough and within else None,
        "bound_bits_per_second": bound,
    }
