"""Run the suite: `python -m tests` takes what `python -m unittest` takes.

Without names of tests it runs them all, in two processes side by side: those that wait for guests
in their VMs, and the others. What the former say comes after what the latter say. With CI=true a
skipped test is a failure, unless its reason is in MAY_SKIP. Each part says at its end which classes
took longest, and how much of the processor. The last line of the output is `N passed, N failed, N
skipped`.
"""

import collections
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest

GUESTS = (
    "image",
    "comparison",
    "vm",
    "tampering",
    "serving",
    "bench",
    "quickstart",
)  # that run guests
MAY_SKIP = ("needs a GPU", "needs vsock", "needs KVM", "needs BUILDROOT_DIR")
MAY_SKIP += ("needs MUENCLAVE_IMAGES",)  # builds of container images that take long
SLOWEST = 12  # classes that are named, if they took a second


class Result(unittest.TextTestResult):
    """Counts tests by their outcome; a test whose subtests fail is one failed test.

    seconds: of each class, with what it sets up; work: of the processor, with programs that ended.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.started, self.failed, self.skips = set(), set(), set()
        self.seconds, self.work = collections.Counter(), collections.Counter()
        self.before = time.monotonic(), processor_time()

    def startTest(self, test):
        super().startTest(test)
        self.started.add(test.id())

    def stopTest(self, test):
        super().stopTest(test)
        name, now = test.id().rpartition(".")[0], (time.monotonic(), processor_time())
        for total, then, before in zip((self.seconds, self.work), now, self.before):
            total[name] += then - before
        self.before = now

    def addSkip(self, test, reason):
        if os.environ.get("CI") == "true" and reason not in MAY_SKIP:
            error = AssertionError(f"skipped, though CI is to run it: {reason}")
            self.addFailure(test, (AssertionError, error, None))
        else:
            super().addSkip(test, reason)
            self.skips.add(whole(test))

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.failed.add(whole(test))

    def addError(self, test, err):
        super().addError(test, err)
        self.failed.add(whole(test))

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is not None:
            self.failed.add(test.id())

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self.failed.add(whole(test))

    def slowest(self):
        """A line for each of the classes that took longest."""
        for name, seconds in self.seconds.most_common(SLOWEST):
            if seconds >= 1:
                yield f"{seconds:5.0f} s, {self.work[name]:5.0f} s of a processor: {name}"

    def summary(self):
        """The last line of the output."""
        skips = self.skips - self.failed
        passed = self.started - self.failed - skips
        return f"{len(passed)} passed, {len(self.failed)} failed, {len(skips)} skipped"


class Runner(unittest.TextTestRunner):
    """unittest's runner with our result and its summary."""

    resultclass = Result

    def run(self, test):
        """Run, and end with the summary on a line of its own."""
        result = super().run(test)
        self.stream.flush()
        print(*result.slowest(), result.summary(), sep="\n", flush=True)
        return result


def processor_time():
    """Seconds that this process and those that it has waited for have computed."""
    return sum(os.times()[:4])


def whole(test):
    """The id of a test, also of one that a subtest belongs to."""
    return getattr(test, "test_case", test).id()


def run_all(flags):
    """Run every module of tests in two processes; the exit status."""
    found = sorted(path.stem for path in pathlib.Path(__file__).parent.glob("test_*.py"))
    guests = [f"test_{name}" for name in GUESTS]
    others = [name for name in found if name not in guests]
    with tempfile.TemporaryFile("w+") as later:
        streams = {"stdout": later, "stderr": subprocess.STDOUT}
        polite = ["nice", *command(flags, guests)]  # no guest is in a hurry; some others are
        beside = subprocess.Popen(polite, **streams)
        try:
            first = subprocess.run(command(flags, others), stdout=subprocess.PIPE, text=True)
            beside.wait()
        finally:
            beside.kill()
        later.seek(0)
        second = later.read()
    print(first.stdout, second, sep="\n", flush=True)
    summary = r"^(\d+) passed, (\d+) failed, (\d+) skipped$"
    counts = [re.findall(summary, text, re.MULTILINE) for text in (first.stdout, second)]
    if not all(counts):
        print("a part of the suite ended without its summary")
        return 1
    passed, failed, skipped = (sum(int(part[-1][n]) for part in counts) for n in range(3))
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return first.returncode or beside.returncode


def command(flags, modules):
    """The command that runs these modules of tests."""
    return [sys.executable, "-m", "tests", *flags, *(f"tests.{name}" for name in modules)]


if __name__ == "__main__":
    # A shell without job control has what runs in its background ignore Ctrl-C, which tests send.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if all(argument.startswith("-") for argument in sys.argv[1:]):
        sys.exit(run_all(sys.argv[1:]))
    program = unittest.main(module=None, testRunner=Runner, exit=False)
    sys.exit(not (program.result.wasSuccessful() and program.result.testsRun))
