"""Runs an enclave by a clock that a test bends, as the host of a VM can bend its guest's.

A test puts this file in the place of muenclave.py and the real one beside it as real.py; muenclave
then asks this clock what it asks the machine's, in all of its processes. The test maps the same
page of numbers, a file beside it, and writes there what the clock is to do: to stand, to run 1,000
times too fast. A clock that nobody touches is the machine's.

A clock that stands makes moments exact on a machine as slow as it likes: time passes when whoever
holds it says so, once all that was to happen has happened.
"""

import mmap
import os
import sys
import time

from muprotocol import NANOSECOND, is_readable

NAMES = (
    "held",  # ns: the time at which the clock stands; 0 while it runs
    "offset",  # ns by which it differs from the machine's clock, because it stood
    "fast",  # ns of the machine's clock since which it runs FAST times too fast; 0 if it does not
    "wake",  # ns: until when the last sleeper sleeps
    "sleeps",  # how often somebody went to sleep
    "taken",  # messages of the engine that the gate has taken
    "read",  # cells that have reached the other side
    "word",  # what a test tells an engine before there is a prompt
    "heard",  # ns: the time that an engine has seen last
)
FAST = 1000
STEP = 0.002  # seconds between two looks at the page


class Clock:
    """What muenclave takes from the module time; and the page, by name."""

    def __init__(self, path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(descriptor, mmap.PAGESIZE)
        self._page = memoryview(mmap.mmap(descriptor, mmap.PAGESIZE)).cast("q")
        os.close(descriptor)

    def __getitem__(self, name):
        return self._page[NAMES.index(name)]

    def __setitem__(self, name, value):
        self._page[NAMES.index(name)] = value

    def monotonic_ns(self):
        """The time that it shows, in nanoseconds."""
        if held := self["held"]:
            return held
        now = time.monotonic_ns()
        ahead = (now - self["fast"]) * (FAST - 1) if self["fast"] else 0
        return now + self["offset"] + ahead

    def monotonic(self):
        """The time that it shows, in seconds."""
        return self.monotonic_ns() / NANOSECOND

    def sleep(self, seconds):
        """Sleep until it shows so many seconds more."""
        wake = self.monotonic_ns() + round(seconds * NANOSECOND)
        self["sleeps"] += 1
        while (left := wake - self.monotonic_ns()) > 0:
            self["wake"] = wake
            time.sleep(self.real(left / NANOSECOND))

    def real(self, seconds):
        """How long to wait for that, by the machine's clock, before the next look at the page."""
        return min(STEP, seconds / FAST if self["fast"] else seconds)

    def is_readable(self, connection, seconds, *events):
        """muprotocol.is_readable, by this clock."""
        end = self.monotonic_ns() + round((seconds or 0) * NANOSECOND)
        while not (found := is_readable(connection, 0, *events)):
            left = end - self.monotonic_ns()
            if seconds is not None and left <= 0:
                break
            step = STEP if seconds is None else self.real(left / NANOSECOND)
            if is_readable(connection, step, *events):
                return True
        return found

    def hold(self):
        """Have it stand."""
        self["held"] = self.monotonic_ns()

    def release(self):
        """Have it run on from where it stands, if it does."""
        if self["held"]:
            self["offset"] = self["held"] - time.monotonic_ns()
            self["held"] = 0


def bend(real):
    """Have the real module, which lies beside this one, look at the clock; returns that."""
    clock = Clock(os.path.join(os.path.dirname(os.path.abspath(__file__)), "clock"))
    real.time, real.is_readable = clock, clock.is_readable
    real.__file__ = os.path.join(os.path.dirname(__file__), "muenclave.py")  # what init starts
    return clock


if __name__ == "__main__":
    import real

    bend(real)
    sys.exit(real.main())
