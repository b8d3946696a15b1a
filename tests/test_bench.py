"""tools/bench.py: the figures that the README quotes are printed by it, and are of what runs."""

import contextlib
import io
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
import types
import unittest
from unittest import mock

import muenclave
import muprotocol as mp
from tests import guest, support

sys.path.insert(0, str(support.TOOLS))

import bench  # noqa: E402
import bench_meter  # noqa: E402
import report  # noqa: E402

BENCH = [sys.executable, str(support.TOOLS / "bench.py")]


@unittest.skipIf(guest.MISSING, f"not installed: {' '.join(guest.MISSING)}")
class Boot(unittest.TestCase):
    """One round: the three kernels all lead to a handshake, ours to the image that was built."""

    @classmethod
    def setUpClass(cls):
        flags = ["boot", "--rounds", "1", "--json", "-", "--weights", support.sealed_demo().model]
        done = subprocess.run([*BENCH, *flags], capture_output=True, text=True)
        cls.figures = json.loads(done.stdout)["boot"] if done.returncode == 0 else None
        cls.told = done.stderr

    def setUp(self):
        self.assertIsNotNone(self.figures, self.told)

    def test_times(self):
        seconds = self.figures["seconds"]
        self.assertEqual(set(seconds), set(bench.CONTENDERS))
        for name, rounds in seconds.items():
            self.assertEqual(len(rounds), 1, name)
            self.assertTrue(0 < rounds[0] < bench.BOOT_SECONDS, name)

    def test_sizes(self):
        ours, debian = self.figures["ours"], self.figures["debian"]
        self.assertLess(ours["bytes"], debian["bytes"] + debian["initramfs_bytes"])
        self.assertLess(ours["initramfs_bytes"], ours["bytes"])
        self.assertLess(ours["bytes"], ours["disk_bytes"])
        self.assertEqual(ours["options"]["m"], 0)
        self.assertLess(2 * ours["options"]["y"], debian["options"]["y"])
        self.assertGreater(debian["module_files"], 1000)
        self.assertGreater(ours["compiled"]["lines"], 500_000)

    def test_what_is_printed(self):
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            bench.show_boot(self.figures)
        for name in bench.CONTENDERS.values():
            self.assertIn(name, text.getvalue())
        self.assertIn(f"{self.figures['ours']['compiled']['lines']:,} lines", text.getvalue())


class Meter(unittest.TestCase):
    """Each form carries every token, and no more bytes than it is said to."""

    TABLE = [b"%d " % number for number in range(300)]
    IDS = [(7 * number) % 300 for number in range(1000)]
    RATE = 10**5

    def test_cells(self):
        """Through the gate's own process: the ids, in the text's order, in full cells."""
        with contextlib.closing(bench_meter.cells(self.IDS, self.TABLE, self.RATE)) as messages:
            room = mp.CELL_ROOM * 8 // mp.id_bits(300)
            found = [count for count, _ in itertools.islice(messages, 20)]
        self.assertEqual(set(found[1:]), {room})
        self.assertTrue(0 < found[0] <= room)

    def test_cells_that_are_wrong(self):
        """The ids are compared: an engine that says others is found out."""
        with mock.patch.object(bench_meter.Stand, "play_engine", wrong_engine):
            messages = bench_meter.cells(self.IDS, self.TABLE, self.RATE)
            with self.assertRaisesRegex(bench_meter.ToolError, "other ids came"):
                next(messages)

    def test_a_gate_that_does_not_start(self):
        with mock.patch.dict(muenclave.DEFAULTS, ENCLAVE_EVIDENCE="none"):
            with self.assertRaisesRegex(bench_meter.ToolError, "the gate: "):
                next(bench_meter.cells(self.IDS, self.TABLE, self.RATE))

    def test_bytes_of_the_others(self):
        """What a token takes on the wire, by hand: a frame, a tag and JSON; or an event."""
        plain = [len(b'{"done":false,"token":"%d "}' % token) for token in self.IDS[:50]]
        with contextlib.closing(bench_meter.objects(self.IDS, self.TABLE, self.RATE)) as messages:
            found = list(itertools.islice(messages, 50))
        self.assertEqual(found, [(1, 4 + 16 + size) for size in plain])
        with contextlib.closing(bench_meter.events(self.IDS, self.TABLE, self.RATE)) as messages:
            found = list(itertools.islice(messages, 50))
        sizes = [size - len(b"%d " % token) for (_, size), token in zip(found, self.IDS)]
        self.assertEqual(len(set(sizes)), 1)
        frame = b'data: {"id":"","object":"","created":,"model":"","choices":[{"index":0,"delta":'
        frame += b'{"content":""},"finish_reason":null}]}\n\n'
        words = ("chatcmpl-" + 24 * "0", "chat.completion.chunk", 10 * "1", "text")
        self.assertEqual(sizes[0], len(frame) + sum(map(len, words)))

    def test_ceiling(self):
        """At the default rate: 10 cells a second of 214 ids, less than 5,120 bytes of 17 bits."""
        room = mp.CELL_ROOM * 8 // 17
        share = mp.DEFAULT_RATE - mp.DEFAULT_RATE // muenclave.HANDSHAKE_SHARE
        self.assertEqual((room, share / mp.CELL), (214, 10))
        ids = [131_071] * room
        vocabulary = mp.Vocabulary(mp.encode_vocabulary([b""] * 131_072))
        self.assertLessEqual(len(vocabulary.pack(ids)), mp.CELL_ROOM)
        self.assertGreater(len(vocabulary.pack([*ids, 0])), mp.CELL_ROOM)
        self.assertGreaterEqual(room * share // mp.CELL, 2000)
        self.assertLess(room * share // mp.CELL, mp.DEFAULT_RATE * 8 // 17)

    def test_take(self):
        """The rate is of what came after the first message, by the time that it took."""
        clock = iter([10, 11, 12, 14])
        with mock.patch.object(bench_meter.time, "monotonic", lambda: next(clock)):
            messages = (message for message in [(9, 9), (100, 20), (200, 40), (100, 20), (5, 5)])
            self.assertEqual(bench_meter.take(messages, 3), (100, 20))
        with self.assertRaises(bench_meter.ToolError):
            bench_meter.take(iter_of([(1, 1), (1, 1)]), 1000)

    def test_what_is_printed(self):
        """From a run of figures to the text, the README's table and the page."""
        flags = types.SimpleNamespace(peers=None, rate=5120, seconds=1, rounds=2)
        rates = {"cells": iter([2100, 2000]), "json": iter([100, 102]), "sse": iter([25, 27])}
        forms = {name: lambda *_, name=name: name for name in rates}
        taken = lambda name, _: (next(rates[name]), 5000)  # noqa: E731
        with mock.patch.object(bench_meter, "tokenise", lambda *_: ([1, 2], self.TABLE, "1")):
            with mock.patch.object(bench_meter, "MESSAGES", forms):
                with mock.patch.object(bench_meter, "take", taken):
                    figures = bench_meter.run_meter(flags, lambda _: None)
        with contextlib.redirect_stdout(io.StringIO()) as text:
            bench_meter.show_meter(figures)
        for told in ("transport alone, 5,120 bytes/s", "2,050.0 tokens/s (2,000.0 to 2,100.0"):
            self.assertIn(told, text.getvalue())
        self.assertIn("ours is 78.8 times as much", text.getvalue())
        document = {"bench meter": {"meter": figures}}
        self.assertIn("| 2,050 (2,000 to 2,100) | 2.44 | 1.0× |", report.readme_transport(document))
        self.assertIn("tokens a second", report.transport(document["bench meter"])[1])


def wrong_engine(_, gate):
    """An engine that gives every answer other ids than it should."""
    with gate, contextlib.suppress(OSError, EOFError):
        mp.read_frame(gate, mp.HANDSHAKE_FRAME)
        gate.sendall(mp.PIPE.pack(mp.LOADED, 0, 1000))
        slot = json.loads(mp.read_frame(gate, mp.MESSAGE_LIMIT))["slot"]
        gate.sendall(mp.PIPE.pack(mp.ID, slot, 299) * 999)
        mp.read_frame(gate, mp.MESSAGE_LIMIT)


def iter_of(values):
    """A generator of these."""
    yield from values


class Mistakes(unittest.TestCase):
    """One line says what is wrong."""

    def test_no_tokenizer(self):
        done = subprocess.run([*BENCH, "meter"], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        told = r"\Abench: error: no tokenizer: --peers DIR [^\n]+ mistral-common==[^\n]+\n\Z"
        self.assertRegex(done.stderr, told)

    def test_no_virtual_environment(self):
        with tempfile.TemporaryDirectory() as folder:
            command = [*BENCH, "meter", "--peers", folder]
            done = subprocess.run(command, capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertRegex(done.stderr, r"\Abench: error: [^\n]*no virtual environment[^\n]*\n\Z")
            pathlib.Path(folder, "bin").mkdir()
            pathlib.Path(folder, "bin", "python").symlink_to(sys.executable)
            done = subprocess.run(command, capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            told = r"\Abench: error: [^\n]*mistral_common[^\n]*it takes mistral-common==[^\n]+\n\Z"
            self.assertRegex(done.stderr, told)

    def test_no_weights(self):
        command = [*BENCH, "boot", "--weights", "/nowhere"]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        line = "bench: error: there is no /nowhere: name a sealed model by --weights\n"
        self.assertEqual(done.stderr, line)

    def test_no_rounds(self):
        done = subprocess.run([*BENCH, "boot", "--rounds", "0"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 2)


if __name__ == "__main__":
    unittest.main()
