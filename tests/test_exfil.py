"""tools/exfil_timing.py and tools/tap.py: numbers by hand and by brute force; verdicts on real
enclaves and proxies, two of them with a meter that was broken on purpose.
"""

import collections
import contextlib
import io
import json
import math
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import xml.etree.ElementTree as ElementTree

import muprotocol as mp
import muproxy
from tests import support

sys.path.insert(0, str(support.TOOLS))

import exfil_timing as exfil  # noqa: E402
import tap  # noqa: E402
import vm  # noqa: E402

TOOL = [sys.executable, "-B", str(support.TOOLS / "exfil_timing.py")]
SECOND = mp.NANOSECOND
LIMIT = str(support.SECONDS)
site = folder = None


def setUpModule():
    global site, folder
    holder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(holder.cleanup)
    folder = pathlib.Path(holder.name)
    site = support.make_site(folder)


def run(*arguments, python=()):
    """Run the tool to its end. Returns the finished process."""
    command = [TOOL[0], *python, *TOOL[1:], *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * support.SECONDS)


def call(*arguments):
    """Run the tool here, which is quicker. Returns what a finished process has."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                status = exfil.main(list(map(str, arguments)))
            except SystemExit as error:
                status = error.code
    return types.SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def times_of(*arguments):
    """{compression: entry} of the only model at the only rate, and the whole document."""
    done = call("analyze", *arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (model,) = document["models"]
    return {entry["compression"]: entry for entry in model["times"]}, document


class Mistake(unittest.TestCase):
    """Helper: a mistake is told in one line."""

    def assertMistake(self, done, text):
        self.assertEqual((done.returncode, done.stdout), (2, ""), done.stderr)
        told = r"\A(exfil_timing: reading[^\n]+\n)?exfil_timing: error: [^\n]+\n\Z"
        self.assertRegex(done.stderr, told)
        self.assertIn(text, done.stderr)


class Analyze(Mistake):
    """Times against a calculation by hand."""

    def test_6_gb_at_5_kb_a_second(self):
        """6 GB at 5 KB/s: 1,200,000 s, which are 13.9 days; 100 times smaller, 3 h 20 min."""
        times, document = times_of("--model", "m=6000000000", "--rate", "5000")
        self.assertEqual([times[factor]["raw"] for factor in (1, 16, 100)], [1.2e6, 75e3, 12e3])
        seed = {"bytes": 6 * 10**9, "rate": 5000, "seconds": 1.2e6}
        seed["compressed"] = {"16": 75e3, "100": 12e3}
        self.assertEqual(document["seed"], seed)
        told = call("analyze", "--model", "3B", "--rate", "5000").stdout
        row = next(line for line in told.splitlines() if line.startswith("3B"))
        for text in ("6,000,000,000", "13.9 days", "20.8 hours", "3.3 hours"):
            self.assertIn(text, row)
        self.assertIn(
            "6 GB at 5 KB/s: 13.9 days; compressed 16x: 20.8 hours, 100x: 3.3 hours", told
        )

    def test_columns(self):
        """8 MB at 1,000 bytes/s: 8,000 s; 4 enclaves, audit that leaves 2 %, budget 8,000 bytes."""
        flags = ("--model", "m=8000000", "--rate", "1000", "--enclaves", "4", "--residue", "0.02")
        times, document = times_of(*flags, "--compression", "100")
        entry = times[100]
        self.assertEqual((entry["raw"], entry["enclaves"], entry["audited"]), (80, 20, 4000))
        within = {"seconds": 8, "share": 0.1, "is_enough": False}
        self.assertEqual(entry["budget"], within)
        self.assertEqual(document["models"][0]["budget"], 8000)
        self.assertEqual(document["audit"], {"residue": 0.02, "source": "given"})
        told = call("analyze", *flags).stdout
        self.assertIn("never: it ends at 8,000 bytes, 10.00% of that copy", told)
        for name in exfil.ASSUMPTIONS:
            self.assertIn(f"\n{name}: ", told)

    def test_a_budget_that_is_enough(self):
        times, _ = times_of("--model", "m=8000000", "--rate", "1000", "--compression", "2000")
        self.assertEqual(times[2000]["budget"], {"seconds": 4, "share": 1, "is_enough": True})
        times, _ = times_of("--model", "m=8000000", "--budget", "80000", "--rate", "1000")
        self.assertEqual([times[n]["budget"]["is_enough"] for n in (1, 16, 100)], [0, 0, 1])

    def test_without_a_residue(self):
        times, document = times_of("--model", "3B", "--residue", "0")
        self.assertEqual({entry["audited"] for entry in times.values()}, {None})
        self.assertEqual(document["audit"], {"residue": None, "source": "no residue given"})
        told = call("analyze", "--model", "3B", "--residue", "0").stdout
        self.assertIn("not computed: no residue given", told)

    def test_a_sealed_file(self):
        done = call("analyze", "--model", site.model, "--json", "-")
        (model,) = json.loads(done.stdout)["models"]
        self.assertEqual(model["name"], "demo")
        self.assertEqual(model["bytes"], site.model.stat().st_size)

    def test_document(self):
        path = folder / "analysis.json"
        done = run("analyze", "--rate", "5120", "--rate", "1000000", "--json", path)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        document = json.loads(path.read_text())
        facts = {"tool": "exfil_timing", "version": 1, "verb": "analyze"}
        self.assertEqual({name: document[name] for name in facts}, facts)
        self.assertEqual([model["name"] for model in document["models"]], list(exfil.MODELS))
        self.assertEqual({len(model["times"]) for model in document["models"]}, {6})
        self.assertIn("at 1,000,000 bytes a second", done.stdout)

    def test_chart(self):
        for name in ("chart.svg", "chart.png"):
            done = call("analyze", "--rate", "5120", "--rate", "65536", "--plot", folder / name)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual((folder / "chart.png").read_bytes()[:8], b"\x89PNG\r\n\x1a\n")
        root = ElementTree.parse(folder / "chart.svg").getroot()
        self.assertTrue(root.tag.endswith("}svg"))
        told = " ".join("".join(node.itertext()) for node in root.iter() if "}text" in node.tag)
        wanted = ["How long a model's weights take to leave", "at 65,536 bytes a second"]
        wanted += ["time until all of it is out (logarithmic)", "1 day", "10 years", "70B, 140 GB"]
        wanted += ["raw", "compressed 16x", "compressed 100x", "audit leaves 0.5%", "budget ends"]
        for text in wanted:
            self.assertIn(text, told)
        first = (folder / "chart.svg").read_bytes()
        call("analyze", "--rate", "5120", "--rate", "65536", "--plot", folder / "chart.svg")
        self.assertEqual((folder / "chart.svg").read_bytes(), first)

    def test_mistakes(self):
        for flags, text in (
            (("--model", "nothing"), "no such file; known are 3B, 8B"),
            (("--model", "m=many"), "NAME=BYTES"),
            (("--model", "m=0"), "NAME=BYTES"),
            (("--model", site.key), "not a sealed model"),
            (("--plot", folder / "chart.gif"), "ends in .svg or .png"),
            (("--plot", folder / "absent" / "chart.svg"), "No such file"),
        ):
            self.assertMistake(call("analyze", *flags), text)
        for path, text in ((folder / "absent" / "a.json", "No such file"), ("/dev/full", "space")):
            done = call("analyze", "--json", path)
            self.assertEqual(done.returncode, 2)
            self.assertRegex(done.stderr, rf"\Aexfil_timing: error: [^\n]*{text}[^\n]*\n\Z")
            self.assertIn("13.6 days", done.stdout)  # nothing is lost
        for flags in (("--rate", "0"), ("--compression", "0.5"), ("--residue", "nan")):
            self.assertEqual(call("analyze", *flags).returncode, 2, flags)

    def test_no_matplotlib(self):
        done = run("analyze", "--plot", folder / "none.svg", python=["-S"])
        self.assertMistake(done, "pip install 'muenclave[tools]'")
        self.assertFalse((folder / "none.svg").exists())


def at(*rows):
    """[Passed] from (after, before, bytes) in seconds."""
    return [tap.Passed(int(a * SECOND), int(b * SECOND), count) for a, b, count in rows]


def metered(rate, burst, seconds, forgotten=0.0, late=0.0, seed=1):
    """[Passed] of a reader that always asks mp.Meter for a cell, on a virtual clock.

    forgotten: share of the bytes that the meter does not charge. late: the reader wakes up to so
    many seconds late, and then counts all that has come.
    """
    rng, now, events, waiting, empty = random.Random(seed), 0, [], 0, 0
    meter = mp.Meter(rate, burst, -burst * SECOND)
    wakes = int(rng.uniform(0, late) * SECOND)
    while now < seconds * SECOND:
        charged = mp.CELL - (rng.random() < forgotten) * mp.CELL
        while not meter.take(charged, now):
            now += max(1, meter.wait(charged, now))
        waiting += mp.CELL
        if now >= wakes:
            events.append(tap.Passed(empty, now, waiting))
            empty, waiting, wakes = now, 0, now + int(rng.uniform(0, late) * SECOND)
    return events


class Counting(unittest.TestCase):
    """What is claimed about windows, against brute force."""

    def random_events(self, rng):
        moments = sorted(rng.randrange(10 * SECOND) for _ in range(rng.randrange(1, 40)))
        befores = sorted(moment + rng.randrange(SECOND) for moment in moments)
        return [tap.Passed(a, b, rng.randrange(1, 5000)) for a, b in zip(moments, befores)]

    def windows(self, events):
        """(length in ns, bytes) of every window from one event to another."""
        for first, event in enumerate(events):
            total = 0
            for last in events[first:]:
                total += last.count
                yield last.before - event.after, total

    def test_every_window(self):
        rng = random.Random(4)
        for _ in range(300):
            events, rate = self.random_events(rng), rng.choice([1, 300, 5120])
            over = max(total - rate * length / SECOND for length, total in self.windows(events))
            self.assertAlmostEqual(tap.most_over(events, rate), max(0, over), places=5)
            for seconds in tap.WINDOWS:
                fit = [total for n, total in self.windows(events) if n <= seconds * SECOND]
                self.assertEqual(tap.most_in(events, seconds), max(fit, default=0))

    def test_by_hand(self):
        events = at((0, 1, 100), (5, 6, 300), (6, 7, 300))
        self.assertEqual(tap.most_over(events, 100), 400)  # 600 bytes between 5 and 7
        self.assertEqual(tap.most_over(events, 1000), 0)
        self.assertEqual([tap.most_in(events, n) for n in (0.5, 1, 2, 10)], [0, 300, 600, 700])
        self.assertEqual(tap.judge([], 100, 100)["verdict"], "not decided")

    def test_least_leak(self):
        """A leak of a twentieth passes 20 bytes for 19, so that 19 times the slack are needed."""
        slack = 1000 + tap.UNASKED_BYTES + 100 * tap.UNASKED_SECONDS
        self.assertAlmostEqual(tap.needed_seconds(100, 1000), 19 * slack / 100)
        self.assertAlmostEqual(tap.least_leak(19 * slack / 100, 1, 100, 1000), 0.05)
        self.assertAlmostEqual(tap.least_leak(10**9, 0.99, 100, 1000), 0.01, places=5)
        self.assertEqual(tap.least_leak(0, 1, 100, 1000), 1)

    def test_a_burst_is_no_saturation(self):
        """1,000 at once and then 90 a second is not 100 a second, however it adds up."""
        events = at((0, 0, 1000), *((n, n + 1, 90) for n in range(100)))
        over = tap.most_over(events, 100)
        self.assertEqual(over, 1000)
        self.assertEqual(tap.saturation(events, 100, over), (0, 0.9))
        steady = at((0, 0, 1000), *((n, n + 1, 100) for n in range(100)))
        self.assertEqual(tap.saturation(steady, 100, 1000), (100, 1))

    def test_trace_holds_every_byte(self):
        events = metered(5120, 8192, 100)
        traced = tap.trace(events)
        self.assertLessEqual(len(traced["bytes"]), tap.TRACE)
        self.assertEqual(sum(traced["bytes"]), sum(event.count for event in events))

    def test_verdicts_on_the_product_s_meter(self):
        """However late the reader wakes: no right meter is accused, none that leaks 5 % passes."""
        rate, burst = 5120, 16384
        enough = 2 * tap.needed_seconds(rate, burst)
        for late in (0.0, 0.01, 0.5, 3.0):
            for seed in range(5):
                options = {"late": late, "seed": seed}
                right = tap.judge(metered(rate, burst, enough, **options), rate, burst)
                self.assertEqual(right["verdict"], "holds", options)
                self.assertLessEqual(right["burst_seen"], burst)
                leaking = metered(rate, burst, enough, forgotten=tap.LEAK, **options)
                leaking = tap.judge(leaking, rate, burst)
                self.assertEqual(leaking["verdict"], "exceeds", options)

    def test_too_short_is_not_decided(self):
        events = metered(5120, 16384, 10)
        few = tap.judge(events[20:], 5120, 32768)
        self.assertEqual(few["verdict"], "not decided")
        self.assertGreater(few["least_leak"], tap.LEAK)

    def test_a_reader_that_is_slow_decides_nothing(self):
        half = [event for number, event in enumerate(metered(5120, 16384, 900)) if number % 2]
        self.assertEqual(tap.judge(half, 5120, 16384)["verdict"], "not decided")

    def test_a_leak_that_is_half_used_is_not_passed(self):
        """A gate too busy to let out more than 102 % of its rate: the burst hides that a while."""
        events = metered(5222, mp.CELL, 100)
        found = tap.decide(events, 5120, 16384)
        self.assertGreater(found["pace"], 2 - tap.SATURATED)
        self.assertEqual(found["verdict"], "not decided")

    def test_what_kernels_hold_is_allowed_once(self):
        events = at((0, 0.01, 30000), (10, 10.01, 1000))
        self.assertEqual(tap.judge(events, 100, 20000)["verdict"], "exceeds")
        self.assertNotEqual(tap.judge(events, 100, 20000, 11000)["verdict"], "exceeds")


class Relay(unittest.TestCase):
    """The tap between real sockets."""

    def connect(self, is_paced, buffer=0):
        """(tap, client, server) of one connection through a tap."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        relay = tap.Tap(listener.getsockname(), is_paced=is_paced)
        relay.start()
        self.addCleanup(relay.close)
        address = relay.address
        client = muproxy.connect(address, buffer or tap.LARGE_BUFFER, support.SECONDS)
        self.addCleanup(client.close)
        server = listener.accept()[0]
        self.addCleanup(server.close)
        return relay, client, server

    def test_nothing_is_changed_and_every_byte_counted(self):
        rng = random.Random(7)
        for is_paced in (False, True):
            relay, client, server = self.connect(is_paced)
            sizes = [rng.choice([0, 1, 508, 5000]) for _ in range(200)]
            data = b"".join(mp.frame(rng.randbytes(size)) for size in sizes)
            client.sendall(data)
            self.assertEqual(mp.read_exactly(server, len(data)), data)
            begin = time.monotonic_ns()
            sender = threading.Thread(target=server.sendall, args=(data,))
            sender.start()
            self.assertEqual(mp.read_exactly(client, len(data)), data)
            sender.join()
            server.close()
            self.assertEqual(client.recv(1), b"")
            relay.close()
            self.assertEqual(sum(event.count for event in relay.events), len(data))
            self.assertEqual([size for _, size in relay.flows[0].frames], sizes)
            moments = [(event.after, event.before) for event in relay.events]
            self.assertEqual(sorted(moments), moments)
            self.assertEqual(sorted(before for _, before in moments), [b for _, b in moments])
            self.assertGreaterEqual(moments[0][1], begin)
            self.assertLessEqual(moments[-1][1], time.monotonic_ns())

    def test_a_paced_tap_takes_what_its_client_takes(self):
        """A client that reads nothing is charged with no more than a proxy is allowed."""
        inlet = muproxy.Inlet(mp.DEFAULT_RATE)
        relay, client, server = self.connect(True, inlet.buffer)
        server.settimeout(1)
        with self.assertRaises(TimeoutError):
            server.sendall(bytes(1 << 24))
        count = sum(event.count for event in list(relay.events))
        self.assertGreater(count, 0)
        self.assertLessEqual(count, exfil.held_by_kernels(relay, mp.DEFAULT_RATE))
        self.assertGreater(len(mp.read_exactly(client, 4 * count)), count)

    def test_who_ended_with_something_unread(self):
        for is_clean in (True, False):
            relay, client, server = self.connect(True)
            server.sendall(bytes(1000))
            mp.read_exactly(client, 1000 if is_clean else 10)
            client.close()
            with contextlib.suppress(ConnectionResetError):
                self.assertEqual(server.recv(1), b"")
            relay.close()
            self.assertEqual((relay.most_open, relay.lost), (1, not is_clean))


class Entropy(unittest.TestCase):
    """The estimators, against sources whose entropy is known."""

    N = 20_000

    def check(self, values, expected):
        found, order = tap.entropy_rate(values)
        self.assertAlmostEqual(found, expected, delta=0.02)
        return order

    def test_constant(self):
        self.assertEqual(tap.entropy([1] * 50), 0)
        self.assertEqual(tap.entropy_rate([1] * 500)[0], 0)
        self.assertEqual((tap.entropy([]), tap.entropy_rate([])[0]), (0, 0))

    def test_dice(self):
        rng = random.Random(1)
        values = [rng.randrange(8) for _ in range(self.N)]
        self.assertAlmostEqual(tap.entropy(values), 3, delta=0.01)
        self.check(values, 3)

    def test_miller_madow_by_hand(self):
        """2, 1, 1 of four: 1.5 bits and (3 - 1) / (2 x 4) nats."""
        self.assertAlmostEqual(tap.entropy("aabc"), 1.5 + 0.25 / math.log(2))

    def test_the_correction_helps(self):
        rng, plain, corrected = random.Random(2), [], []
        for _ in range(400):
            values = [rng.randrange(16) for _ in range(60)]
            counts = collections.Counter(values).values()
            plain.append(sum(count / 60 * math.log2(60 / count) for count in counts))
            corrected.append(tap.entropy(values))
        biases = [abs(sum(found) / len(found) - 4) for found in (corrected, plain)]
        self.assertLess(biases[0], biases[1] / 3)

    def test_markov(self):
        """A bit that stays with 0.9: 0.469 bits a step, though each alone looks like 1 bit."""
        rng, bit, values = random.Random(3), 0, []
        for _ in range(self.N):
            bit ^= rng.random() < 0.1
            values.append(bit)
        self.assertAlmostEqual(tap.entropy(values), 1, delta=0.02)
        expected = -0.9 * math.log2(0.9) - 0.1 * math.log2(0.1)
        self.assertGreater(self.check(values, expected), 0)

    def test_ticks(self):
        """Each tick has a cell with p: H(p) bits a tick, whether it is seen in ticks or in gaps."""
        rng, rate = random.Random(5), 5120
        tick = tap.tick_of(rate)
        for p in (0.5, 0.2):
            busy = [n for n in range(self.N) if rng.random() < p]
            frames = [(n * tick + rng.randrange(tick // 4), mp.CELL - 4) for n in busy]
            found = tap.probe(frames, rate, 10)
            expected = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) * SECOND / tick
            self.assertAlmostEqual(found["bits_per_second"] / expected, 1, delta=0.03)
            self.assertEqual(found["lengths"], {"480": len(busy)})
            self.assertEqual(found["length_bits_per_cell"], 0)
            self.assertLess(found["bits_per_second"], found["bound_bits_per_second"]["moments"])

    def test_clockwork_tells_nothing(self):
        tick = tap.tick_of(5120)
        found = tap.probe([(n * tick, 508) for n in range(200)], 5120, 10)
        self.assertEqual(found["bits_per_second"], 0)
        self.assertEqual(found["within_tick_bits_per_cell"], 0)
        self.assertIsNone(tap.probe([], 5120, 10)["bits_per_second"])

    def test_lengths_that_vary_are_seen(self):
        rng, tick = random.Random(6), tap.tick_of(5120)
        frames = [(n * tick, rng.choice([100, 200, 300, 400])) for n in range(4000)]
        found = tap.probe(frames, 5120, 10)
        self.assertAlmostEqual(found["bits_per_second"] * tick / SECOND, 2, delta=0.02)
        self.assertEqual(set(found["lengths"]), {"104", "204", "304", "404"})

    def test_bound(self):
        """A tick of 20 ms, 364 ids of 10 bits in a cell: 50 and 50 log2(364) bits/s."""
        bound = tap.probe([], 10**6, 10)["bound_bits_per_second"]
        self.assertAlmostEqual(bound["moments"], 50)
        self.assertAlmostEqual(bound["fill"], 50 * math.log2(364))


def patched(*changes):
    """A folder with the product's modules, changed: (name, old text, new text), each once."""
    place = pathlib.Path(tempfile.mkdtemp(dir=folder))
    for module in ("muprotocol.py", "muenclave.py", "muproxy.py"):
        shutil.copy(support.ROOT / module, place)
    for name, old, new in changes:
        text = (place / name).read_text("utf-8")
        assert text.count(old) == 1, f"{name} has changed: {old!r}"
        (place / name).write_text(text.replace(old, new), "utf-8")
    return place


def reference_of(code):
    """A file of reference values for the enclave whose modules lie there."""
    manifest = support.measure.local_manifest(sys.executable, code)
    values = muproxy.read_reference(site.reference)
    values["measurement"] = mp.manifest_digest(manifest)
    path = code / "reference.json"
    path.write_text(json.dumps(values))
    return path


OWNER = ("--key", "key", "--model", "model", "--owner-psk", "owner_psk", "--psk", "user_psk")
USER = ("--token-file", "token", "--vocabulary", "vocabulary")


def files(flags):
    """Flags whose values are names of a site's files."""
    return [flag if flag[:2] == "--" else getattr(site, flag) for flag in flags]


def measure(enclave, *flags, reference=None, tool=run):
    """Run `measure`; the finished process, and its document."""
    where = ("--enclave", f"127.0.0.1:{enclave.port}", "--reference", reference or site.reference)
    done = tool("measure", *where, "--development", "--limit", LIMIT, "--json", "-", *flags)
    return done, json.loads(done.stdout) if done.stdout else done.stderr


class Mistakes(Mistake):
    """What can't be measured is told in one line."""

    @classmethod
    def setUpClass(cls):
        cls.enclave = support.Enclave(site)
        cls.addClassCleanup(cls.enclave.end)

    def test_flags(self):
        flags = {
            ("--token-file", site.token): "both --token-file and --vocabulary",
            (): "nothing to ask for",
            ("--key", site.key, "--model", site.model): "--psk FILE",
            ("--key", site.key): "--model FILE --key FILE",
            ("--psk", site.token): "not a provisioning secret",
            ("--token-file", "/nowhere"): "/nowhere: No such file",
            ("--proxy", "http://127.0.0.1:1"): "--proxy needs --listen",
            ("--proxy", "file:///etc"): "http://HOST:PORT is wanted",
        }
        for given, text in flags.items():
            done, _ = measure(self.enclave, *given, tool=call)
            self.assertMistake(done, text)
        done = call("measure", "--enclave", "127.0.0.1:1", *files(OWNER + USER))
        self.assertMistake(done, "--reference FILE")
        done = call("measure", "--enclave", "nowhere:port")
        self.assertEqual(done.returncode, 2)

    def test_no_key_for_weak_evidence(self):
        where = ("--enclave", f"127.0.0.1:{self.enclave.port}", "--reference", site.reference)
        self.assertMistake(call("measure", *where, *files(OWNER)), "--development")

    def test_an_enclave_that_refuses(self):
        done, _ = measure(self.enclave, *files(USER), "--psk", site.user_psk, tool=call)
        self.assertMistake(done, "locked")
        done, _ = measure(self.enclave, *files(USER), "--psk", site.owner_psk, tool=call)
        self.assertMistake(done, "does not match the reference values")

    def test_nobody_there(self):
        nobody = types.SimpleNamespace(port=vm.free_port())
        done, _ = measure(nobody, *files(USER), "--psk", site.user_psk, tool=call)
        self.assertMistake(done, "Connection refused")
        flags = ("--proxy", f"http://127.0.0.1:{nobody.port}", "--listen", "127.0.0.1:0")
        done, _ = measure(self.enclave, *flags, *files(USER[:2]), "--limit", "1", tool=call)
        self.assertMistake(done, "Connection refused")

    def test_a_port_in_use(self):
        flags = ("--proxy", "http://127.0.0.1:1", "--listen", f"127.0.0.1:{self.enclave.port}")
        done, _ = measure(self.enclave, *flags, *files(USER[:2]), tool=call)
        self.assertMistake(done, "Address already in use")


class BrokenMeter(unittest.TestCase):
    """A locked enclave, asked by strangers for handshakes and by its owner for its status."""

    RATE, BURST = 24576, 16384

    def test_leaks_5_percent(self):
        """Every byte costs 95 hundredths, in credit and in time."""
        old = "        if count * NANOSECOND > self._credit:\n"
        credit = ("muprotocol.py", old, f"        count = count * 95 // 100\n{old}")
        old = "self.cell_time = mp.CELL * mp.NANOSECOND // (rate - share)"
        code = patched(credit, ("muenclave.py", old, f"{old} * 95 // 100"))
        flags = ("--rate", str(self.RATE), "--burst", str(self.BURST))
        with support.Enclave(site, *flags, code=code) as enclave:
            reference = reference_of(code)
            done, found = measure(enclave, *flags, *files(OWNER), reference=reference)
        self.assertIsInstance(found, dict, found)
        self.assertEqual((done.returncode, found["verdict"]), (1, "exceeds"), found)


class Answers(unittest.TestCase):
    """An enclave with its engine and the demo model, and proxies before it."""

    RATE, BURST = 24576, 16384
    PROXY_RATE = 8192

    @classmethod
    def setUpClass(cls):
        cls.enclave = support.Enclave(site, environment={"ENCLAVE_THREADS": "1"})
        cls.addClassCleanup(cls.enclave.end)

    def test_answers_keep_to_the_lease_s_rate(self):
        self.enclave.unlock(rate=self.RATE, burst=self.BURST)
        flags = ("--rate", self.RATE, "--burst", self.BURST, "--probe-seconds", "3")
        done, found = measure(self.enclave, *flags, *files(OWNER + USER))
        self.assertIsInstance(found, dict, found)
        self.assertEqual((done.returncode, found["verdict"]), (0, "holds"), found)
        self.assertEqual((found["tool"], found["target"]), ("exfil_timing", "enclave"))
        self.assertLessEqual(found["burst_seen"], self.BURST)
        self.assertGreater(found["use"], tap.SATURATED)
        self.assertEqual(sum(found["trace"]["bytes"]), found["bytes"])
        self.assertEqual([window["seconds"] for window in found["windows"]][:3], [0.1, 1, 10])
        for window in found["windows"]:
            self.assertLessEqual(window["bytes"], window["allowed"])
        probe = found["probe"]
        self.assertEqual(list(probe["lengths"]), [str(mp.CELL)])
        self.assertEqual(probe["length_bits_per_cell"], 0)
        self.assertGreater(probe["cells"], 10)
        self.assertEqual(sum(probe["gaps"].values()), probe["cells"] - 1)
        self.assertLess(probe["bits_per_second"], sum(probe["bound_bits_per_second"].values()))

    def measure_proxy(self, code, limit):
        """Serve by the muproxy of a folder, behind the tool's tap, and measure it."""
        self.enclave.unlock()
        inlet, api = vm.free_port(), vm.free_port()
        command = [sys.executable, "-B", "-m", "muproxy", "serve", "--port", inlet, "--psk"]
        command += [site.user_psk, "--reference", site.reference, "--vocabulary", site.vocabulary]
        command += ["--listen", f"127.0.0.1:{api}", "--rate-kb", self.PROXY_RATE // 1024]
        proxy = subprocess.Popen(list(map(str, command)), cwd=code, stderr=subprocess.DEVNULL)
        self.addCleanup(proxy.wait)
        self.addCleanup(proxy.terminate)
        flags = ["--proxy", f"http://127.0.0.1:{api}", "--listen", f"127.0.0.1:{inlet}"]
        flags += ["--rate", self.PROXY_RATE, "--sessions", "8", "--limit", limit]
        done, found = measure(self.enclave, *flags, *files(USER[:2]))
        self.assertIsInstance(found, dict, found)
        self.assertEqual((found["target"], found["burst"]), ("proxy", mp.DEFAULT_BURST))
        return done.returncode, found

    def test_the_proxy_s_meter(self):
        """Six seconds can't decide that it holds; what the next test finds takes less."""
        status, found = self.measure_proxy(support.ROOT, 6)
        self.assertEqual((status, found["verdict"]), (3, "not decided"), found)
        self.assertLessEqual(found["burst_seen"], found["burst"] + found["held"])

    def test_a_proxy_that_throttles_only_its_printing(self):
        """It takes an answer as fast as it comes, and then meters what it prints."""
        free = (
            "muproxy.py",
            "while not self.meter.take(count, self._clock.monotonic_ns()):",
            "while False:",
        )
        old = '            first = next(pieces, "")\n'
        ahead = ("muproxy.py", old, f"            pieces = iter(list(pieces))\n{old}")
        old = '        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\\n\\n")\n'
        line = "        while not self.server.inlet.meter.take(512, time.monotonic_ns()):\n"
        slow = ("muproxy.py", old, f"{line}            time.sleep(0.01)\n{old}")
        status, found = self.measure_proxy(patched(free, ahead, slow), LIMIT)
        self.assertEqual((status, found["verdict"]), (1, "exceeds"), found)


if __name__ == "__main__":
    unittest.main()
