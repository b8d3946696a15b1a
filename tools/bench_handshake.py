"""How long it takes to a verified session, for tools/bench.py handshake.

The product's gate is a process of its own, and the proxy's session verifies it (evidence psk); a
stand-in says what an engine would, which a handshake does not ask. The limit: a session takes two
modular exponentiations on either side.
"""

import contextlib
import statistics
import threading
import time

import bench_meter
import bench_shared as shared

import muprotocol as mp

FREE_RATE = 10**9  # bytes a second: a meter that is effectively off
HANDSHAKES = 20  # of a round, one after the other
REST = 3  # seconds, until the gate takes as many at once again: in a flood they wait their turn
OPENERS = 16  # threads that open many sessions at once
TABLE = [b"%d " % number for number in range(300)]


class Stand(bench_meter.Stand):
    """A gate with so many places."""

    def __init__(self, places):
        super().__init__([0], TABLE, FREE_RATE)
        self.places = places

    def settings(self, folder):
        """What the gate is started with."""
        more = {"ENCLAVE_SESSIONS": self.places, "ENCLAVE_RATE": FREE_RATE}
        return super().settings(folder) | {name: str(value) for name, value in more.items()}


def time_handshake(stand):
    """(seconds to a verified session, seconds to READY), from connecting."""
    began = time.perf_counter()
    with stand.session("user") as session:
        verified = time.perf_counter() - began
        session.prove({"token": stand.token})
        return verified, time.perf_counter() - began


def time_many(stand, count):
    """Seconds until so many sessions are open and ready, all at the same time."""
    with contextlib.ExitStack() as stack:
        lock, left, failed = threading.Lock(), [None] * count, []

        def work():
            try:
                while True:
                    with lock:
                        if not left:
                            return
                        left.pop()
                    session = stand.session("user")
                    with lock:
                        opened = stack.enter_context(session)
                    opened.prove({"token": stand.token})
            except Exception as error:  # noqa: BLE001  told by the thread that asked
                failed.append(error)

        began = time.perf_counter()
        threads = [threading.Thread(target=work) for _ in range(OPENERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = time.perf_counter() - began
        if failed:
            raise failed[0]
        return taken


def time_exponentiations():
    """Seconds of the two that a session costs a side: its own share, then the agreement."""
    peer = mp.KeyShare().public
    began = time.perf_counter()
    mp.KeyShare().agree(peer)
    return time.perf_counter() - began


def run_handshake(flags, say):
    """The figures of `handshake`, a dict. ToolError, Failure, ProtocolError."""
    names = ("verified_ms", "ready_ms", "exponentiations_ms", "many_s")
    figures = {name: [] for name in names}
    with Stand(flags.sessions + 2) as stand:
        time_handshake(stand)
        for number in range(flags.rounds):
            say(f"round {number + 1} of {flags.rounds}: {HANDSHAKES} handshakes")
            time.sleep(REST)
            times = [time_handshake(stand) for _ in range(HANDSHAKES)]
            limits = [time_exponentiations() for _ in range(HANDSHAKES)]
            for name, values in zip(names, (*zip(*times, strict=True), limits)):
                figures[name].append(round(statistics.median(values) * 1000, 3))
            say(f"round {number + 1} of {flags.rounds}: {flags.sessions} sessions")
            figures["many_s"].append(round(time_many(stand, flags.sessions), 3))
    facts = {"rounds": flags.rounds, "sessions": flags.sessions, "in_a_round": HANDSHAKES}
    return facts | figures | {"openers": OPENERS, "meter": FREE_RATE}


def show_handshake(figures):
    """Print the figures of `handshake`."""
    shared.show_machine(figures)
    print(f"evidence psk, the meter raised to {figures['meter']:,} bytes/s; ", end="")
    print(f"each round the median of {figures['in_a_round']}; median (least to most) of rounds")
    told = {
        "verified_ms": "from connecting to a verified session",
        "ready_ms": "to READY, with the access token",
        "exponentiations_ms": "the limit: two exponentiations, one side",
    }
    for name, text in told.items():
        print(f"  {text:42} {shared.tell_values(figures[name], '.1f', ' ms')}")
    text = f"{figures['sessions']} sessions opened, {figures['openers']} at a time"
    print(f"  {text:42} {shared.tell_values(figures['many_s'], '.1f', ' s')}")


def handshake_targets(figures):
    """Lines of the table of targets; figures: of `handshake`, or None."""
    middle = many = None
    if figures is not None:
        middle = statistics.median(figures["verified_ms"])
        if figures["sessions"] == 200:
            many = statistics.median(figures["many_s"])
    return [
        shared.target("handshake + psk evidence, median", middle, at_most=30, unit=" ms"),
        shared.target("200 sessions opened", many, at_most=10, unit=" s"),
    ]
