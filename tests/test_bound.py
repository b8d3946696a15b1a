"""tools/bound.py: the bound is of the product's own constants and of every charge of its gate, and
comes out as by other ways of counting."""

import ast
import contextlib
import io
import json
import math
import pathlib
import sys
import tempfile
import threading
import time
import types
import unittest
from collections import deque
from unittest import mock

import muenclave
import muprotocol as mp
from tests import support

sys.path.insert(0, str(support.TOOLS))

import bench_meter  # noqa: E402
import bound  # noqa: E402
import exfil_timing as exfil  # noqa: E402
import ledger  # noqa: E402
import report  # noqa: E402
import tap  # noqa: E402

DAY = 86400
# The quickstart's: the default lease and the demo model's table.
DEMO = bound.Configuration(5120, 32768, DAY, 768, 64, 4096, 0, "plain", None)
LARGE = DEMO._replace(vocabulary=131_072)


def call(*arguments):
    """Run the tool here. Returns (status, standard output, standard error)."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                status = exfil.main(["bound", *map(str, arguments)])
            except SystemExit as error:
                status = error.code
    return status, out.getvalue(), err.getvalue()


def document(*arguments):
    """The JSON of a run."""
    status, text, told = call(*arguments, "--json", "-")
    assert status == 0, told
    return json.loads(text)


def charges(source):
    """[(function, what is charged)] of every call of a method `charge` but Gate's own."""
    found = []
    for kind in ast.parse(source).body:
        for function in getattr(kind, "body", []):
            if not isinstance(function, ast.FunctionDef) or function.name == "charge":
                continue
            for node in ast.walk(function):
                name = getattr(getattr(node, "func", None), "attr", None)
                if name == "charge":
                    text = ast.unparse(node.args[0])
                    found.append((f"{kind.name}.{function.name}", text))
    return sorted(found)


class Charges(unittest.TestCase):
    """Nothing that the gate charges is left out, and nothing else is in."""

    def setUp(self):
        self.source = (support.ROOT / "muenclave.py").read_text("utf-8")
        self.known = sorted((where, what) for where, what, _ in bound.CHARGES)

    def test_every_charge_of_the_gate(self):
        self.assertEqual(charges(self.source), self.known)
        names = [name for _, _, channels in bound.CHARGES for name in channels]
        self.assertEqual(set(names) | {"handshakes", "errors"}, set(bound.amounts(DEMO, DAY)))
        self.assertEqual(len(set(names)), len(names))

    def test_the_check_itself(self):
        for where, what, _ in bound.CHARGES:
            call = f"charge({what})"
            changed = self.source.replace(call, f"charge({what} // 2)")
            for text in (changed, self.source.replace(call, "check()")):
                self.assertNotEqual(text, self.source, where)
                self.assertNotEqual(charges(text), self.known, where)

    def test_what_the_gate_charges_for_a_cell(self):
        """The gate's own arithmetic, for every number of ids that a cell can have."""
        for size in (256, 768, 131_072):
            table = bound.table_of(DEMO._replace(vocabulary=size))
            bits, room = mp.id_bits(size), (480 - 4 - 5 - 16) * 8 // mp.id_bits(size)
            for count in (1, 2, 3, 7, 8, room - 1, room):
                paid = []
                gate = types.SimpleNamespace(lock=threading.Lock(), charge=paid.append)
                reply = types.SimpleNamespace(ids=deque([0] * count), ending="stop", table=table)
                reply.sent = []
                session = types.SimpleNamespace(gate=gate)
                self.assertEqual(len(muenclave.Session.next_ids(session, reply)), count)
                packed = 8 * math.ceil(count * bits / 8)
                self.assertEqual(paid, [packed + len(f"{room:b}")], (size, count))


class ByOtherWays(unittest.TestCase):
    """The same numbers, counted otherwise."""

    def test_demo_by_hand(self):
        """5,120 bytes/s less a 16th, 16,384 bytes at once, cells of 480 with 364 ids of 10 bits.

        A day has 864,034 cells and 864,000 ticks of 100 ms for each of 64 sessions.
        """
        cells, ticks = 864_034, 64 * 864_000
        free = ticks - cells
        which = cells * math.log2(ticks / cells) + free * math.log2(ticks / free)
        expected = {"tokens": cells * 3640, "cell counts": cells * 9, "ticks": math.ceil(which)}
        expected |= {"endings": (cells + 128) * 32, "lengths": (cells + 128) * 32}
        expected |= {"loads": 9 * 64, "handshakes": 0, "errors": 0}
        self.assertEqual(bound.amounts(DEMO, DAY), expected)
        figures = document("--vocabulary", 768)
        self.assertEqual(figures["sum"]["day"], sum(expected.values()))
        self.assertEqual(figures["sum"]["lease"], sum(expected.values()))

    def test_cells_against_the_meter(self):
        """As many as a reader gets who always asks, after the gate has been idle."""
        for rate, burst, seconds in ((5120, 32768, 300), (24_576, 16_384, 60), (64, 16_384, 4000)):
            config = DEMO._replace(rate=rate, burst=burst)
            share = rate - rate // muenclave.HANDSHAKE_SHARE
            end, now, cells = seconds * mp.NANOSECOND, 0, 0
            meter = mp.Meter(share, burst // 2, -(10**9) * mp.NANOSECOND)
            while now <= end:
                if meter.take(mp.CELL, now):
                    cells += 1
                else:
                    now += max(1, meter.wait(mp.CELL, now))
            self.assertEqual(bound.supply(config, seconds)["cells"], cells)

    def test_ticks_against_the_number_of_ways(self):
        for ticks, most in ((20, 3), (64, 1), (300, 40), (1000, 499)):
            ways = math.log2(sum(math.comb(ticks, n) for n in range(most + 1)))
            told = bound.placed(most, ticks)
            self.assertGreaterEqual(told, ways)
            self.assertLessEqual(told, ways + math.log2(ticks + 1))
        self.assertEqual([bound.placed(n, 10) for n in (0, 5, 10, 50)], [0, 10, 10, 10])

    def test_uncovered_by_enumeration(self):
        """Every answer of up to 3 ticks in cells of 2 ids of 9 bits (V = 512): one by one."""
        with mock.patch.object(mp, "CELL_ROOM", 3):
            config = DEMO._replace(vocabulary=512, context=3)
            table = bound.table_of(config)
            self.assertEqual((table.room, table.bits), (2, 9))
            told = bound.uncovered(config)
            # A tick without a cell; or with one or two ids, of 16 or 24 bits and 2 for how many.
            a_tick = [1 + 0, *[1 + 16 + 2] * 512, *[1 + 24 + 2] * 512**2]
            self.assertEqual(len(a_tick), 1 + 512 + 512**2)
        of_tick = sum(2.0**-bits for bits in a_tick)
        ends = [32] * 6 + [32 + 32] * 6 * 3  # with a prompt's length of 1 to 3, or none
        of_end = sum(2.0**-bits for bits in ends)
        total = sum(of_end * of_tick**n for n in range(200))
        self.assertAlmostEqual(told["answer"], max(0, math.log2(total)))
        looks = sum(2.0 ** (-32 * n) for n in range(50))
        self.assertAlmostEqual(told["look"], math.log2(looks))
        # A death and a load at any of 864,000 ticks of a day, and one of 3 numbers, for 64 bits.
        self.assertLess(math.log2(864_000**2 * 3), 64)
        self.assertEqual(told["load"], 0)
        events = {"answer": 864_034 + 128, "look": 864_034, "load": 9}
        beyond = sum(told[name] * number for name, number in events.items())
        self.assertEqual(bound.beyond_charges(config, DAY), math.ceil(beyond))

    def test_uncovered_where_ids_pack_without_a_rest(self):
        """Of 65,536 ids each bit is a choice, so that an end is to be charged more than 4 bits."""
        self.assertEqual(bound.uncovered(LARGE)["answer"], 0)
        config = DEMO._replace(vocabulary=65_536)
        with mock.patch.object(mp, "ENDING_BITS", 4):
            self.assertGreater(bound.uncovered(config)["answer"], 2)
        with mock.patch.object(mp, "ENDING_BITS", 32):
            self.assertEqual(bound.uncovered(config)["answer"], 0)
            self.assertLess(bound.uncovered(config)["look"], 1e-9)
        with mock.patch.object(bound, "TICK_BITS", 0):
            self.assertEqual(bound.uncovered(config)["answer"], math.inf)


class Follows(unittest.TestCase):
    """Each constant of the product moves the channels that it is of, and no others."""

    def moved(self, module, name, value, config=DEMO):
        """{channel: (before, after)} of those that another value of a constant changes."""
        before = bound.amounts(config, DAY)
        with mock.patch.object(module, name, value):
            after = bound.amounts(config, DAY)
        pairs = {channel: (before[channel], after[channel]) for channel in before}
        return {channel: pair for channel, pair in pairs.items() if pair[0] != pair[1]}

    def test_endings(self):
        found = self.moved(mp, "ENDING_BITS", 2 * mp.ENDING_BITS)
        self.assertEqual(set(found), {"endings"})
        self.assertEqual(found["endings"][1], 2 * found["endings"][0])

    def test_lengths(self):
        found = self.moved(mp, "LENGTH_BITS", 2 * mp.LENGTH_BITS)
        self.assertEqual(set(found), {"lengths", "loads"})
        self.assertEqual(found["lengths"][1], 2 * found["lengths"][0])

    def test_respawns(self):
        found = self.moved(muenclave, "RESPAWNS", 1)
        self.assertEqual(set(found), {"loads"})
        self.assertEqual(found["loads"][1], 2 * 2 * mp.LENGTH_BITS)

    def test_ticks(self):
        self.assertEqual(set(self.moved(bound, "TICK_BITS", 2)), {"ticks"})
        free = DEMO._replace(rate=10**6)
        found = self.moved(muenclave, "SHORTEST_TICK", 10 * muenclave.SHORTEST_TICK, free)
        self.assertEqual(set(found), {"ticks"})

    def test_cell(self):
        by_cell = {"tokens", "cell counts", "ticks", "endings", "lengths"}
        self.assertEqual(set(self.moved(mp, "CELL", 2 * mp.CELL)), by_cell)
        found = self.moved(mp, "CELL_ROOM", 2 * mp.CELL_ROOM)
        self.assertEqual(set(found), {"tokens", "cell counts"})
        self.assertAlmostEqual(found["tokens"][1] / found["tokens"][0], 2, places=2)
        self.assertEqual(set(self.moved(muenclave, "HANDSHAKE_SHARE", 2)), by_cell)

    def test_configuration(self):
        before = bound.amounts(DEMO, DAY)
        cases = {
            "rate": (10_240, {"tokens", "cell counts", "ticks", "endings", "lengths"}),
            "burst": (65_536, {"tokens", "cell counts", "ticks", "endings", "lengths"}),
            "expiry": (3600, {"loads"}),
            "vocabulary": (131_072, {"tokens", "cell counts"}),
            "sessions": (8, {"ticks", "endings", "lengths"}),
            "latency_ms": (1000, set()),
            "shape": ("constant", set()),
            "audited": (0.25, {"tokens"}),
        }
        for name, (value, wanted) in cases.items():
            after = bound.amounts(DEMO._replace(**{name: value}), DAY)
            found = {channel for channel in before if before[channel] != after[channel]}
            self.assertLessEqual(found, wanted, name)
            self.assertEqual(bool(found), bool(wanted), name)

    def test_tick_of_the_gate(self):
        gate = types.SimpleNamespace(handshakes=mock.Mock(), cells=mock.Mock())
        for rate in (64, 5120, 24_576, 10**9):
            muenclave.Gate.set_rate(gate, rate, 32_768)
            self.assertEqual(gate.tick, tap.tick_of(rate))


class Stall(bench_meter.Stand):
    """A gate whose engine lets a request wait in its pipe before it reads it."""

    SECONDS = 2
    REQUEST = {"prompt": "a" * 1_000_000, "seed": 1}  # more than a pipe holds

    def play_engine(self, gate):
        with gate, contextlib.suppress(OSError, EOFError):
            mp.read_frame(gate, mp.HANDSHAKE_FRAME)
            gate.sendall(mp.PIPE.pack(mp.LOADED, 0, 1000))
            mp.is_readable(gate, None)
            time.sleep(self.SECONDS)
            slot = json.loads(mp.read_frame(gate, mp.MESSAGE_LIMIT))["slot"]
            gate.sendall(mp.PIPE.pack(mp.END, slot, 0))
            mp.is_readable(gate, None)


class Stalls(unittest.TestCase):
    """How long an engine lets a request wait is its choice, so that each tick of it is charged."""

    def test_every_tick(self):
        with Stall([0], [b"a"] * 300, 10**6) as stand, stand.session("user") as session:
            left = session.prove({"token": stand.token})["budget_left"]
            deque(session.generate(stand.REQUEST, stand.vocabulary), 0)
            spent = left - session.final["budget_left"]
        ticks = stand.SECONDS * mp.NANOSECOND // muenclave.SHORTEST_TICK
        self.assertGreaterEqual(8 * (spent + 1), ticks)


class Figures(unittest.TestCase):
    """What the tool says of models, audits and shapes."""

    def test_times_and_budgets(self):
        figures = document("--model", "m=8000000", "--compression", 1, "--compression", 100)
        (model,) = figures["models"]
        self.assertEqual(model["lifetime"], 8000)
        self.assertEqual(model["lease"]["budget"], 800)
        self.assertEqual(model["lease"]["bytes"], 800)
        raw, small = model["times"]
        slope = 10 * (3640 + 8 + mp.ENDING_BITS + mp.LENGTH_BITS)
        slope += bound.placed(10 * 10**6, 640 * 10**6) / 10**6
        self.assertAlmostEqual(raw["rate"] / (8 * 8_000_000 / slope), 1, places=3)
        self.assertAlmostEqual(raw["rate"] / small["rate"], 100)
        self.assertEqual(raw["lifetime"], {"seconds": None, "share": 0.001, "is_enough": False})
        self.assertAlmostEqual(small["lifetime"]["share"], 0.1)
        figures = document("--model", "m=8000000", "--lifetime-budget", 80_000, "--budget", 10**12)
        (model,) = figures["models"]
        self.assertEqual([entry["lifetime"]["is_enough"] for entry in model["times"]], [0, 0, 1])
        self.assertEqual(model["times"][2]["lifetime"]["seconds"], model["times"][2]["rate"])
        self.assertEqual(model["lease"]["bytes"], model["lease"]["by_clock"])
        self.assertEqual(model["lease"]["by_clock"], figures["sum"]["lease"] // 8)

    def test_the_ledger_s_divisors(self):
        for name in ("LIFETIME_DIVISOR", "GRANT_DIVISOR"):
            before = document("--model", "3B")["models"][0]["lease"]["budget"]
            with mock.patch.object(ledger, name, 2 * getattr(ledger, name)):
                after = document("--model", "3B")["models"][0]["lease"]["budget"]
            self.assertEqual(before, 2 * after, name)

    def test_shapes(self):
        """Who has no keys sees of a constant shape which cell of an answer is its last one."""
        by_shape = {}
        for shape in bound.SHAPES:
            self.assertTrue(mp.POLICY["shape"](shape))
            figures = document("--shape", shape)
            by_shape[shape] = {one["name"]: one["outside_day"] for one in figures["channels"]}
            self.assertEqual(by_shape[shape]["tokens"], 0)
        cells = bound.supply(LARGE, DAY)["cells"]
        self.assertEqual(by_shape["constant"]["ticks"], cells)
        self.assertEqual(by_shape["plain"]["ticks"], bound.amounts(LARGE, DAY)["ticks"])

    def test_audit(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "audit.json")
            audit = {"tool": "replay_audit", "version": 1, "verb": "audit", "alarms": []}
            audit |= {"unnoticed": {"most": 0.5}, "sample": {"tokens": 1000}}
            path.write_text(json.dumps(audit))
            figures = document("--audit", path, "--model", "3B")
            cells = bound.supply(LARGE, DAY)["cells"]
            tokens = figures["channels"][0]
            room = bound.table_of(LARGE).room
            self.assertEqual(tokens["audited_day"], cells * room // 2)
            saved = figures["sum"]["day"] - figures["sum"]["audited_day"]
            self.assertEqual(saved, tokens["day"] - tokens["audited_day"])
            for entry in figures["models"][0]["times"]:
                self.assertGreater(entry["audited"], 10 * entry["rate"])
            self.assertEqual(figures["audit"]["source"], "an audit of 1,000 tokens")
            self.assertIn("raw, audited", call("--audit", path)[1])
            self.assertIn("0.5 bits a token are left", report.bound(figures)[1])
            measured = {"tool": "replay_audit", "version": 1, "verb": "measure"}
            measured |= {"honest": [{"unnoticed_bits": bits} for bits in (0.25, 0.5, 0.125)]}
            measured |= {"model": {"vocabulary": 1 << 17}}
            path.write_text(json.dumps(measured))
            again = document("--audit", path, "--model", "3B")
            self.assertEqual(again["channels"], figures["channels"])
            self.assertIn("the demo model's, the most of 3 audits", again["audit"]["source"])
            measured |= {"model": {"vocabulary": 1 << 8}}  # an id of this one could tell 8 bits
            path.write_text(json.dumps(measured))
            again = document("--audit", path, "--model", "3B")
            self.assertEqual(again["audit"]["bits_per_token"], 0.5 * 17 / 8)
            for wrong in (audit | {"alarms": ["a"]}, audit | {"verb": "check"}, {}, [], 7):
                path.write_text(json.dumps(wrong))
                status, out, told = call("--audit", path)
                self.assertEqual((status, out), (2, ""), wrong)
                self.assertRegex(told, r"\Aexfil_timing: error: --audit [^\n]+\n\Z")
            status, out, told = call("--audit", pathlib.Path(folder, "absent"))
            self.assertEqual((status, out), (2, ""))
            self.assertIn("No such file", told)

    def test_what_is_printed(self):
        status, out, told = call()
        self.assertEqual((status, told), (0, ""))
        figures = document()
        for one in figures["channels"]:
            self.assertRegex(out, rf"(?m)^{one['name']} +{one['day']:,} ")
        for text in (
            "3B",
            "70B",
            "1T",
            "6,000,000 bytes: never, 0.1%; never, 1.6%; never, 10.0%",
            "malicious host: ",
        ):
            self.assertIn(text, out)
        self.assertIn("session's keys: which ticks have a cell", out)
        for name in figures["not_counted"]:
            self.assertIn(f"not counted: {name}: ", out)
        self.assertIn(f"{figures['sum']['lease'] // 8:,} bytes, by its budget", out)

    def test_mistakes(self):
        for flags in (("--rate", 0), ("--shape", "round"), ("--vocabulary", 1), ("--budget", 0)):
            self.assertEqual(call(*flags)[0], 2, flags)
        status, out, told = call("--model", "nothing")
        self.assertEqual((status, out), (2, ""))
        self.assertIn("no such file", told)

    def test_tables(self):
        """The README's, of what is measured and after an audit."""
        figures = document()
        channels, models = (report.rows_of(*one) for one in report.bound_tables(figures))
        self.assertEqual(len(channels.splitlines()), 2 + len(figures["channels"]) + 1)
        self.assertIn(f"| sum |  | {figures['sum']['day']:,} |", channels)
        self.assertEqual(len(models.splitlines()), 2 + 3)
        self.assertIn("600,000 bytes, 2.2 minutes", models)
        self.assertIn("never: 6,000,000 bytes are 0.1%, 1.6%, 10.0%", models)
        figures = document("--lifetime-budget", 10**9)
        _, models = (report.rows_of(*one) for one in report.bound_tables(figures))
        self.assertIn("not all of them: 1,000,000,000 bytes are 16.7%, 100.0%, 100.0%", models)
        self.assertIn("never, 16.7%; all in", call("--lifetime-budget", 10**9)[1])
        title, page = report.bound(figures)
        self.assertIn("tokens", page)


if __name__ == "__main__":
    unittest.main()
