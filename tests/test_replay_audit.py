"""tools/replay_audit.py: logs made by hand and by real enclaves, honest and not."""

import contextlib
import fractions
import itertools
import json
import math
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

import muprotocol as mp
from tests import support

sys.path.insert(0, str(support.TOOLS))

import demo_model as demo  # noqa: E402
import replay_audit as audit  # noqa: E402
import replay_measure as measurement  # noqa: E402
import replay_statistics as stats  # noqa: E402

TOOL = [sys.executable, "-B", str(support.TOOLS / "replay_audit.py")]
LEASE = "ab" * 16


def run(*arguments):
    """Run the tool to its end. Returns the finished process."""
    command = [*TOOL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * support.SECONDS)


# ---------------------------------------------------------------- statistics


class Rates(unittest.TestCase):
    """Exact tests of rates, against fractions, published values and their own definition."""

    def tail(self, count, tries, rate):
        """binomial_tail in fractions."""
        rate = fractions.Fraction(rate)
        terms = (
            math.comb(tries, n) * rate**n * (1 - rate) ** (tries - n)
            for n in range(max(count, 0), tries + 1)
        )
        return float(sum(terms))

    def test_binomial_tail(self):
        for tries in (1, 7, 40):
            for rate in (0.0, 1e-6, 0.125, 0.5, 0.9375, 1.0):
                for count in range(-1, tries + 2):
                    wanted = self.tail(count, tries, rate)
                    found = stats.binomial_tail(count, tries, rate)
                    self.assertTrue(math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-15))

    def test_many_tries(self):
        """With a million tries and a mean of one it is Poisson's: 1 - 2/e of 2 or more."""
        found = stats.binomial_tail(2, 10**6, 1e-6)
        self.assertAlmostEqual(found, 1 - 2 / math.e, places=6)

    def test_interval_of_clopper_and_pearson(self):
        """10 of 100: 4.9005 % to 17.6223 %, as in the tables; none of 300 in closed form."""
        low, high = stats.rate_interval(10, 100, 0.95)
        self.assertAlmostEqual(low, 0.0490047, places=6)
        self.assertAlmostEqual(high, 0.1762226, places=6)
        self.assertAlmostEqual(stats.upper_rate(0, 300, 0.95), 1 - 0.05 ** (1 / 300), places=9)
        self.assertEqual(stats.rate_interval(0, 50, 0.95)[0], 0)
        self.assertEqual(stats.rate_interval(50, 50, 0.95)[1], 1)
        self.assertEqual(stats.rate_interval(0, 0, 0.95), (0, 1))

    def test_interval_covers(self):
        """For every rate, the outcomes whose interval holds it have a probability of 90 % or more.

        Half of that interval does not: the test can fail.
        """
        tries = 30
        intervals = [stats.rate_interval(n, tries, 0.9) for n in range(tries + 1)]
        halves = [stats.rate_interval(n, tries, 0.5) for n in range(tries + 1)]

        def coverage(rate, intervals):
            chances = (
                self.tail(n, tries, rate) - self.tail(n + 1, tries, rate)
                for n, (low, high) in enumerate(intervals)
                if low <= rate <= high
            )
            return sum(chances)

        rates = [n / 64 for n in range(1, 64)]
        self.assertGreaterEqual(min(coverage(rate, intervals) for rate in rates), 0.9)
        self.assertLess(min(coverage(rate, halves) for rate in rates), 0.9)

    def test_alarms_are_as_rare_as_was_asked_for(self):
        for tries, rate, chance in (
            (200, 1 / 1024, 5e-5),
            (400, 1 / 64, 0.005),
            (50, 0.3125, 0.01),
        ):
            least = stats.least_surprising(tries, rate, chance)
            self.assertLessEqual(self.tail(least, tries, rate), chance)
            self.assertGreater(self.tail(least - 1, tries, rate), chance)
        self.assertEqual(stats.least_surprising(1000, 0, 0.01), 1)  # any at all


class Means(unittest.TestCase):
    """The empirical Bernstein bound."""

    def test_by_hand(self):
        """100 values, a fourth of them 1: variance 0.25 * 0.75 * 100 / 99."""
        mean, low, high = stats.mean_interval([1.0] * 25 + [0.0] * 75, 1, 0.9)
        weight = math.log(2 / 0.05)
        beside = math.sqrt(2 * 18.75 / 99 * weight / 100) + 7 * weight / (3 * 99)
        self.assertAlmostEqual(mean, 0.25)
        self.assertAlmostEqual(high, 0.25 + beside)
        self.assertAlmostEqual(low, 0.25 - beside)

    def test_all_zero_is_not_certain(self):
        mean, low, high = stats.mean_interval([0.0] * 1000, 10, 0.95)
        self.assertEqual((mean, low), (0, 0))
        self.assertTrue(0 < high < 0.2)
        self.assertEqual(stats.mean_interval([], 10, 0.95), (0, 0, 10))

    def test_covers(self):
        """Of 200 samples of a skewed distribution at least 190 intervals hold its mean."""
        draw, held = random.Random(8), 0
        for _ in range(200):
            values = [10.0 * (draw.random() < 0.02) for _ in range(500)]
            _, low, high = stats.mean_interval(values, 10, 0.95)
            held += low <= 0.2 <= high
        self.assertGreaterEqual(held, 190)


class Tolerance(unittest.TestCase):
    """Codes of margins, and the tolerance that honest ones give."""

    def code(self, margin):
        """As the protocol has it: floor(8 log2(margin) + 128), from 1 to 255."""
        return min(max(math.floor(8 * math.log2(margin) + 128), 1), 255)

    def test_codes(self):
        for margin in (1e-6, 0.01, 0.3, 1, 1.5, 1000):
            code = self.code(margin)
            self.assertLess(margin, stats.margin_below(code))
            if code > 1:
                self.assertGreaterEqual(margin, stats.margin_below(code - 1))
        for code in range(1, 255):
            self.assertEqual(stats.code_within(stats.margin_below(code)), code)
        self.assertEqual((stats.code_within(0), stats.margin_below(0)), (0, 0))
        self.assertEqual(stats.code_within(1e9), 254)

    def test_chosen_by_rank(self):
        """Of 10,000 margins 1 to 10,000 at most 1 % are refused, with 95 % confidence."""
        margins = list(range(1, 10001))
        random.Random(1).shuffle(margins)
        tolerance, refused = stats.choose_tolerance(margins, 0.01, 0.95)
        self.assertEqual(refused, 10000 - tolerance)
        self.assertLessEqual(stats.upper_rate(refused, 10000, 0.95), 0.01)
        self.assertGreater(stats.upper_rate(refused + 1, 10000, 0.95), 0.01)

    def test_too_few(self):
        needed = stats.tokens_needed(0.01, 0.95)
        self.assertEqual(needed, 299)
        self.assertEqual(stats.choose_tolerance([0] * 298 + [2], 0.01, 0.95), (2, 0))
        with self.assertRaisesRegex(ValueError, "298 tokens are too few: 299 or more"):
            stats.choose_tolerance([0] * 298, 0.01, 0.95)

    def test_hidden_bits(self):
        self.assertEqual(stats.admissible_bits([1, 2, 4, 0, 255], 1 << 17), [0, 1, 2, 0, 17])
        self.assertEqual(stats.refused_bits(0, 256), 0)
        self.assertAlmostEqual(stats.refused_bits(0.25, 256), 2 + 0.8112781, places=6)
        self.assertEqual(stats.refused_bits(0.7, 256), 8)

    def test_hidden_bits_count_every_sequence(self):
        """So many sequences of 12 tokens, of 4, differ from a given one in up to 3 places."""
        sequences = sum(math.comb(12, n) * 3**n for n in range(4))
        self.assertLessEqual(math.log2(sequences), 12 * stats.refused_bits(3 / 12, 4))

    def test_until_drawn(self):
        mean, most = stats.until_drawn(0.1, 0.95)
        self.assertEqual(mean, 10)
        self.assertLessEqual(0.9**most, 0.05)
        self.assertGreater(0.9 ** (most - 1), 0.05)
        self.assertEqual(stats.until_drawn(1, 0.95), (1, 1))


# ---------------------------------------------------------------- the chain


def exchange(before, number, **fields):
    """An entry of the log, as a dict, whose heads follow from a head."""
    entry = {"lease": LEASE, "request": {"prompt": f"p{number}", "seed": number}}
    entry |= {"ids": [number, 7], "ending": "stop"} | fields
    asked = entry["request"] | entry.pop("policy", {})
    chained = (entry.pop("newer", entry["lease"]), asked, entry["ids"], entry["ending"])
    return entry | {"heads": [before, mp.chain(bytes.fromhex(before), *chained).hex()]}


def exchanges(count, before=audit.BEGINNING, **fields):
    """So many entries, each after the one before."""
    made = []
    for number in range(count):
        made.append(exchange(made[-1]["heads"][1] if made else before, number, **fields))
    return made


class Chains(unittest.TestCase):
    """What leads to the owner's head is verified, and nothing else."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.log = pathlib.Path(folder.name, "log")

    def write(self, entries):
        self.log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    def check(self, entries, head, *flags):
        """The status of `check`, and its document."""
        self.write(entries)
        done = run("check", "--log", self.log, "--head", head, "--json", "-", *flags)
        self.assertEqual(done.stderr, "")
        return done.returncode, json.loads(done.stdout)

    def assertAlarm(self, entries, head, pattern):
        status, document = self.check(entries, head)
        self.assertEqual(status, 1)
        self.assertRegex("\n".join(document["alarms"]), pattern)
        return document["chain"]

    def test_whole(self):
        entries = exchanges(5)
        status, document = self.check(entries, entries[-1]["heads"][1])
        self.assertEqual((status, document["alarms"]), (0, []))
        self.assertEqual(document["chain"]["verified"], 5)
        self.assertEqual((document["tool"], document["version"]), ("replay_audit", 1))
        (head,) = document["chain"]["heads"]
        self.assertEqual((head["exchanges"], head["is_whole"]), (5, True))

    def test_lines_in_another_order(self):
        """Sessions write when their answers end, so the log's order is not the chain's."""
        entries = exchanges(5)
        status, _ = self.check(random.Random(3).sample(entries, 5), entries[-1]["heads"][1])
        self.assertEqual(status, 0)

    def test_nothing_was_said(self):
        self.assertEqual(self.check([], audit.BEGINNING)[0], 0)

    def test_a_verified_lease_and_one_that_was_added(self):
        entries = exchanges(2, policy=mp.NEUTRAL)
        later = exchange(entries[-1]["heads"][1], 9, newer="cd" * 16)
        status, document = self.check([*entries, later], later["heads"][1], "--lease", "cd" * 16)
        self.assertEqual((status, document["chain"]["verified"]), (0, 3))

    def test_an_error_that_ended_the_session(self):
        """As of a user who was struck: the chain has a cancel, whatever the session heard."""
        entry = exchange(audit.BEGINNING, 1, ending="cancelled")
        status, document = self.check([entry | {"ending": "token_refused"}], entry["heads"][1])
        self.assertEqual((status, document["chain"]["verified"]), (0, 1))
        entry |= {"ending": "stop"}
        self.assertAlarm([entry], entry["heads"][1], ".")

    def test_changed(self):
        changes = {"ids": [5, 7], "ending": "length"}
        changes |= {"request": {"prompt": "p2", "seed": 3}}
        for name, value in changes.items():
            entries = exchanges(5)
            head = entries[-1]["heads"][1]
            entries[2] |= {name: value}
            facts = self.assertAlarm(entries, head, "line 3: not what the enclave said")
            self.assertEqual((facts["verified"], facts["changed"]), (2, [3]))
            # Its hash set right: then it is the next one that does not follow.
            entries[2]["heads"][1] = exchange(entries[2]["heads"][0], 2, **{name: value})["heads"][
                1
            ]
            facts = self.assertAlarm(entries, head, "2 exchanges lead to its head, and not back")
            self.assertEqual(facts["changed"], [])

    def test_dropped(self):
        whole = exchanges(5)
        head = whole[-1]["heads"][1]
        for missing, verified in ((0, 4), (2, 2), (4, 0)):
            entries = [entry for number, entry in enumerate(whole) if number != missing]
            facts = self.assertAlarm(entries, head, f"{verified} exchanges lead to its head, and")
            self.assertEqual(facts["verified"], verified)

    def test_swapped(self):
        """Two exchanges in another order, all hashes made anew: another head."""
        whole = exchanges(5)
        entries = whole[:2]
        for number in (3, 2, 4):
            entries.append(exchange(entries[-1]["heads"][1], number))
        self.assertAlarm(entries, whole[-1]["heads"][1], "0 exchanges lead to its head")

    def test_added(self):
        """What follows the owner's head is not verified, and what is beside the chain neither."""
        entries = exchanges(5)
        head = entries[2]["heads"][1]
        status, document = self.check([*entries, exchange("11" * 32, 8)], head)
        self.assertEqual((status, document["chain"]["unlinked"]), (0, 3))

    def test_several_heads(self):
        """A head that was seen on the way verifies what lies before a gap, if it is after none."""
        entries = [audit.Entry(n, **entry) for n, entry in enumerate(exchanges(6))]
        heads = [audit.Head(LEASE, entries[5].heads[1], 100)]
        heads.append(audit.Head(LEASE, entries[2].heads[1], None))
        for missing, verified, gaps in ((None, 6, 0), (3, 5, 1), (1, 4, 2)):
            chain = audit.Chain([entry for entry in entries if entry.line != missing], heads)
            alarms = "\n".join(chain.alarms())
            self.assertEqual(len(chain.verified), verified)
            self.assertEqual(alarms.count("not back to the beginning"), gaps)
            self.assertEqual(
                "of the 100 bytes spent, what that took is unknown" in alarms, gaps > 0
            )

    def test_beside_a_closed_chain(self):
        """Once a lease is closed, no exchange of it can be missing from its chain."""
        entries = exchanges(3)
        beside = exchange("11" * 32, 8)
        made = [audit.Entry(n, **entry) for n, entry in enumerate([*entries, beside])]
        closed = audit.Head(LEASE, entries[2]["heads"][1], 100)
        (alarm,) = audit.Chain(made, [closed]).alarms()
        self.assertIn("1 exchanges of closed leases lead to no head of the owner's: lines 3", alarm)
        self.assertEqual(audit.Chain(made, [closed._replace(spent=None)]).alarms(), [])

    def test_cut_off(self):
        whole = exchanges(5)
        entries = [
            entry | {"ending": None, "heads": None} if entry is whole[1] else entry
            for entry in whole
        ]
        busy = whole[0] | {"ids": [], "ending": "busy", "heads": None}
        head = whole[-1]["heads"][1]
        facts = self.assertAlarm([*entries, busy], head, "3 exchanges lead to its head")
        self.assertEqual((facts["cut"], facts["refused"], facts["unlinked"]), (1, 1, 1))

    def test_torn_and_foreign_lines(self):
        entries = exchanges(3)
        self.write(entries)
        text = self.log.read_text()
        for torn in (text[:-9], text + "{}\n", text + "no JSON\n", text + "\xff\n"):
            self.log.write_bytes(torn.encode("latin-1"))
            done = run("check", "--log", self.log, "--head", entries[1]["heads"][1])
            self.assertEqual(done.returncode, 1)
            self.assertRegex(done.stdout, r"ALARM not an exchange, or cut short: lines [34]\n")

    def test_a_loop_of_heads_ends(self):
        """Heads that say they follow from each other are no hashes of anything."""
        entries = exchanges(2)
        entries[0]["heads"][0] = entries[1]["heads"][1]
        self.assertAlarm(entries, entries[1]["heads"][1], "line 1: not what the enclave said")

    def test_mistakes(self):
        self.write(exchanges(1))
        for flags, status, text in (
            ((), 2, "--log FILE"),
            (("--log", self.log), 2, "--ledger FILE or --head HEX"),
            (("--log", self.log, "--head", "12"), 2, "64 hexadecimal digits"),
            (("--log", "/nowhere", "--head", "00" * 32), 2, "/nowhere: No such file"),
            (("--log", self.log, "--ledger", "/nowhere"), 2, "/nowhere: No such file"),
        ):
            done = run("check", *flags)
            self.assertEqual((done.returncode, done.stdout), (status, ""), done.stderr)
            self.assertRegex(done.stderr, rf"\Areplay_audit: error: [^\n]*{text}[^\n]*\n\Z")


# ---------------------------------------------------------------- the verdict

VOCABULARY = mp.Vocabulary(mp.encode_vocabulary([bytes([n % 256]) for n in range(1024)]))
RULE = audit.Rule(1.0, 0.01, 0.01, 0.95)  # a margin of 1, which code 127 ends with
CONTEXT = 100
LONG = {"prompt": "p", "seed": 1, "max_new_tokens": 1000}
EQUAL, NEAR, FAR = (0, 1), (120, 4), (128, 2)  # codes: of the margin, of how many were within


def scored(line, codes, refusal=None, prompt_tokens=10, **fields):
    """An exchange whose ids and end have these codes."""
    ids = [7] * (len(codes) - (fields.get("ending", "stop") == "stop"))
    entry = {"lease": LEASE, "request": {"prompt": "p", "seed": 1}, "ending": "stop"} | fields
    entry = audit.Entry(line, ids=ids, heads=None, **entry)
    margins, counts = [code[0] for code in codes], [code[1] for code in codes]
    return audit.Scored(entry, margins, counts, prompt_tokens, refusal)


def judge(*sample, rule=RULE):
    """The verdict on a sample, of a log of ten times as many exchanges."""
    chain = audit.Chain([], [])
    chain.verified = [one.entry for one in sample] * 10
    return audit.Verdict(list(sample), chain, rule, VOCABULARY, CONTEXT)


class Verdicts(unittest.TestCase):
    """What scores mean."""

    def test_equal(self):
        verdict = judge(*(scored(n, [EQUAL] * 20) for n in range(10)))
        self.assertEqual(verdict.alarms, [])
        tokens = verdict.figures["tokens"]
        self.assertEqual((tokens["all"], tokens["equal"], tokens["refused"]), (200, 200, 0))
        self.assertEqual(verdict.figures["unnoticed"]["within"], 0)

    def test_within_and_refused(self):
        verdict = judge(
            *(scored(n, [NEAR, *[EQUAL] * 19]) for n in range(10)), scored(10, [FAR] * 3)
        )
        tokens = verdict.figures["tokens"]
        self.assertEqual((tokens["equal"], tokens["within"], tokens["refused"]), (190, 10, 3))
        bits = 10 * 2 + 3 * 1  # four tokens were within, and two
        self.assertAlmostEqual(verdict.figures["unnoticed"]["within"], bits / 203)
        self.assertLessEqual(verdict.figures["margins"][1], 1)
        self.assertEqual(verdict.alarms, ["line 10: 3 of 3 tokens refused; 2 are an alarm"])

    def test_a_few_refused_in_each_are_an_alarm_together(self):
        honest = judge(*(scored(n, [EQUAL] * 50 + [FAR] * (n == 3)) for n in range(40)))
        self.assertEqual(honest.alarms, [])
        many = judge(*(scored(n, [EQUAL] * 49 + [FAR]) for n in range(80)))
        self.assertEqual(len(many.alarms), 1)
        self.assertIn("80 of 4,000 tokens refused, over the whole sample", many.alarms[0])

    def test_the_least_that_is_an_alarm(self):
        """Over a whole sample: one refused token less is none."""
        least = stats.least_surprising(4000, RULE.share, RULE.false_alarm / 2)
        for count, alarms in ((least - 1, 0), (least, 1)):
            sample = (scored(n, [EQUAL] * 49 + [FAR if n < count else EQUAL]) for n in range(80))
            self.assertEqual(len(judge(*sample).alarms), alarms)

    def test_false_alarms_are_rare(self):
        """Of 300 honest samples at the allowed rate 3 are to be an alarm; 12 would be many."""
        draw, alarms = random.Random(5), 0
        for _ in range(300):
            sample = (
                scored(n, [FAR if draw.random() < 0.01 else EQUAL for _ in range(30)])
                for n in range(20)
            )
            alarms += bool(judge(*sample).alarms)
        self.assertLess(alarms, 12)

    def test_exact(self):
        rule = RULE._replace(tolerance=0, share=0)
        self.assertEqual(judge(scored(1, [EQUAL] * 9), rule=rule).alarms, [])
        told = judge(scored(1, [EQUAL] * 900 + [(1, 1)], request=LONG), rule=rule).alarms
        self.assertEqual(told[0], "line 1: 1 of 901 tokens refused; 1 are an alarm")

    def test_tolerance_is_in_logits(self):
        """At a temperature of 0.5 a score's rounding errors are twice the logit's."""
        request = {"prompt": "p", "seed": 1}
        codes = [(128, 1)] * 9  # margins from 1 to 1.09
        cold = scored(1, codes, request=request | {"temperature": 0.5})
        self.assertEqual(judge(cold).figures["tokens"]["refused"], 0)
        warm = scored(1, codes, request=request | {"temperature": 2})
        self.assertEqual(judge(warm).figures["tokens"]["refused"], 9)
        greedy = scored(1, codes, request=request | {"temperature": 0})
        self.assertEqual(judge(greedy).figures["tokens"]["refused"], 9)

    def test_endings(self):
        limited = {"prompt": "p", "seed": 1, "max_new_tokens": 5}
        good = (
            scored(1, [EQUAL] * 5, ending="length", request=limited),
            scored(2, [EQUAL] * 90, ending="length"),  # to the end of the context
            scored(3, [EQUAL] * 5, request=limited),
            scored(4, [], refusal="prompt_invalid", ending="prompt_invalid"),
            scored(5, [EQUAL] * 3, ending="cancelled"),
            scored(6, [EQUAL] * 3, ending="engine_lost"),
        )
        verdict = judge(*good)
        self.assertEqual(verdict.alarms, [])
        self.assertEqual(verdict.figures["endings"]["length"], 2)
        bits = verdict.figures["unnoticed"]["unaudited_endings"]
        self.assertEqual(bits, 2 * 10 * mp.ENDING_BITS)
        for wrong, text in (
            (scored(1, [EQUAL] * 4, ending="length", request=limited), "after 4 tokens"),
            (scored(1, [EQUAL] * 6, ending="length", request=limited), "after 6 tokens"),
            (scored(1, [EQUAL] * 89, ending="length"), "its limit is 90"),
            (scored(1, [EQUAL] * 6, request=limited), "ended as stop after 5 tokens"),
            (scored(1, [EQUAL] * 6, ending="cancelled", request=limited), "its limit is 5"),
            (scored(1, [EQUAL], ending="prompt_invalid"), "here it is answered"),
            (scored(1, [], refusal="prompt_invalid", ending="cancelled"), "refused as prompt_inv"),
            (scored(1, [], refusal="prompt_invalid", ending="prompt_too_long"), "refused as"),
        ):
            self.assertRegex("\n".join(judge(wrong).alarms), f"line 1: .*{text}")

    def test_an_end_among_the_ids(self):
        one = scored(1, [EQUAL] * 5, ending="cancelled")
        short = one._replace(margins=[0, 0], counts=[1, 1])
        self.assertEqual(judge(short).alarms, ["line 1: its token 2 is an end, and it went on"])

    def test_an_end_that_does_not_follow(self):
        """The end is a token like others: far from what the engine had chosen, it is refused."""
        sample = [scored(n, [EQUAL] * 9 + [FAR]) for n in range(10)]
        self.assertEqual(judge(*sample).figures["tokens"]["refused"], 10)
        self.assertNotEqual(judge(*sample).alarms, [])

    def test_an_end_is_a_token_if_the_engine_chose_it(self):
        for ending, count in (("stop", 3), ("length", 2), ("cancelled", 2)):
            one = scored(1, [EQUAL] * 3, ending=ending)
            one = one._replace(entry=one.entry._replace(ids=[7, 7]))
            self.assertEqual(judge(one).figures["tokens"]["all"], count)

    def test_worst_case(self):
        """Accepted tokens' bits, and those of the rate that is found with 95 %."""
        verdict = judge(*(scored(n, [EQUAL] * 50) for n in range(40)))
        hidden, allowed = verdict.figures["unnoticed"], verdict.figures["tokens"]["allowed"]
        rate = stats.upper_rate(allowed, 2000, 0.95)
        self.assertAlmostEqual(hidden["refused"], rate * 10 + stats.entropy(rate))
        self.assertAlmostEqual(hidden["most"], hidden["within_interval"][1] + hidden["refused"])
        self.assertAlmostEqual(hidden["log"], hidden["most"] * 400 * 50)
        found = verdict.figures["detection"]
        self.assertEqual(found["exchange_bits"], 500)
        self.assertEqual(found["exchanges"], stats.until_drawn(0.1, 0.95))

    def test_the_draw(self):
        chain = audit.Chain([], [])
        chain.verified = [scored(n, [EQUAL]).entry for n in range(95)]
        picked = {audit.draw(chain, 0.1)[0].line for _ in range(60)}
        self.assertEqual(len(audit.draw(chain, 0.1)), 10)
        self.assertEqual(len(audit.draw(chain, 1)), 95)
        self.assertGreater(len(picked), 3)  # another one each time


class Rows(unittest.TestCase):
    """What `measure` makes of a verdict."""

    def test_how_many_tokens_find_it(self):
        """All tokens of 7 answers in 20 are refused: a sample finds one with 95 %."""
        sample = [scored(n, [FAR if n % 3 == 1 else EQUAL] * 10) for n in range(20)]
        row = measurement.attack_row(judge(*sample))
        self.assertEqual((row["tokens"], row["refused"], row["alone"]), (200, 70, 7))
        missed = (
            math.comb(13, count) / math.comb(20, count) for count in itertools.count(1)
        )  # probability that no such answer is in a sample of so many
        least = 1 + next(number for number, chance in enumerate(missed) if chance <= 0.05)
        self.assertLessEqual(abs(row["needed"]["exchanges"] - least), 1)
        self.assertEqual(row["needed"]["tokens"], 10 * row["needed"]["exchanges"])

    def test_what_is_not_found(self):
        row = measurement.attack_row(judge(*[scored(1, [EQUAL] * 20)] * 5))
        self.assertEqual((row["alone"], row["needed"]), (0, None))

    def test_honest(self):
        verdict = judge(*(scored(n, [NEAR, *[EQUAL] * 19]) for n in range(20)))
        row = measurement.honest_row(verdict)
        self.assertEqual((row["tokens"], row["equal"], row["refused"]), (400, 380, 0))
        self.assertEqual((row["false_alarms"], row["audits"]), (0, measurement.AUDITS))
        verdict = judge(*(scored(n, [FAR] * 20) for n in range(20)))
        row = measurement.honest_row(verdict)
        self.assertEqual(row["false_alarms"], measurement.AUDITS)

    def test_rounding_to_8_bits(self):
        """254 steps in each row, from its own largest; vectors stay."""
        import torch

        matrix = torch.tensor([[1.0, -2.54, 0.013], [100.0, 0.3, 0.5]])
        found = measurement.rounded_to_int8(matrix)
        wanted = torch.tensor([[1.0, -2.54, 0.02], [100.0, 0.0, 100 / 127]])
        self.assertTrue(torch.allclose(found, wanted, atol=1e-6))
        self.assertTrue(torch.equal(measurement.rounded_to_int8(matrix[0]), matrix[0]))


# ---------------------------------------------------------------- real enclaves

NEAR_ENOUGH = audit.Rule(0.25, 0.001, 0.01, 0.95)  # more than an honest engine needs
PATIENCE = ("--rate-kb", "100000")  # no outer meter to wait for
QUESTION = {"messages": [{"role": "user", "content": "Tell me about zen."}], "temperature": 0.8}


def swapped_layers(source, folder):
    """Another model: the same weights, with the two layers in each other's place."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    (path,) = folder.glob("*.safetensors")
    state = load_file(path)
    swap = {".0.": ".1.", ".1.": ".0."}
    pattern = re.compile(r"\.[01]\.")
    state = {pattern.sub(lambda found: swap[found[0]], name): state[name] for name in state}
    save_file(state, path, {"format": "pt"})
    return folder


class Live(unittest.TestCase):
    """A log of a real enclave, whose lease is closed, and another one that scores it."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = pathlib.Path(folder.name)
        cls.source = support.demo_model()
        cls.scorer = measurement.Enclave(cls.folder, cls.source, 1)
        cls.addClassCleanup(cls.scorer.end)
        with measurement.Enclave(cls.folder, cls.source, 8, is_verified=True) as enclave:
            cls.talk(enclave)
            measurement.answers(enclave, 8, 250, 3, cls.entries)
            cls.chat(enclave)
            done = support.own("lock", *enclave.flags(), "--ledger", enclave.ledger)
            assert done.returncode == 0, done.stderr
        cls.ledger = enclave.ledger
        cls.log = cls.folder / "audit.log"
        cls.log.write_text("".join(json.dumps(entry) + "\n" for entry in cls.entries))

    @classmethod
    def talk(cls, enclave):
        """One exchange for each way in which it can end."""
        cls.entries = []
        with enclave.session("user") as session:
            for fields in (
                QUESTION,
                QUESTION | {"max_new_tokens": 5},
                {"prompt": "The", "temperature": 0, "max_new_tokens": 40},
                {"prompt": "The " * 2000},
                QUESTION | {"max_new_tokens": 1 << 20},
                {"prompt": ""},
                {"prompt": "The", "temperature": 10},  # in cancelling
            ):
                asked = session.exchange({"seed": len(cls.entries)} | fields, enclave.vocabulary())
                with contextlib.suppress(mp.ProtocolError):
                    for _ in asked:
                        if fields.get("temperature") == 10:
                            session.cancel()
                cls.entries.append(dict(session.entry))
        endings = [entry["ending"] for entry in cls.entries]
        wanted = ["stop", "length", "length", "prompt_too_long", "too_many_tokens"]
        assert endings[:5] == wanted and endings[6] == "cancelled", endings

    @classmethod
    def chat(cls, enclave):
        """Some more by muproxy, whose log says what it was."""
        log, prompts = cls.folder / "chat.log", cls.folder / "prompts"
        prompts.write_text("Tell me about zen.\nWhat is class?\n")
        flags = ["--port", enclave.address[1], "--reference", enclave.reference, *PATIENCE]
        flags += ["--psk", enclave.user_psk, "--token-file", enclave.token]
        flags += ["--vocabulary", f"{enclave.model}.vocab", "--temperature", "1.2"]
        done = support.proxy("chat", *flags, "--prompts-file", prompts, "--audit-log", log)
        assert done.returncode == 0, done.stderr
        lines = log.read_text().splitlines()
        assert len(lines) == 2, lines
        cls.entries += map(json.loads, lines)

    def audit(self, verb, *flags, log=None):
        """A run of the tool with the second enclave."""
        where = [*self.scorer.flags(), *PATIENCE, "--ledger", self.ledger]
        where += ["--vocabulary", f"{self.scorer.model}.vocab", "--log", log or self.log]
        return run(verb, *where, *flags)

    def document(self, done, status):
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        return json.loads(done.stdout)

    def test_an_honest_log_passes(self):
        path = self.folder / "calibration.json"
        done = self.audit("calibrate", "--sample", "1", "--refused", "0.01", "--output", path)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        done = self.audit("audit", "--sample", "0.5", "--calibration", path)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn("\nno alarm\n", done.stdout)
        done = self.audit("audit", "--sample", "1", "--calibration", path, "--json", "-")
        document = self.document(done, 0)
        self.assertEqual(document["chain"]["verified"], len(self.entries))
        self.assertEqual(document["sample"]["exchanges"], len(self.entries))
        tokens = document["tokens"]
        self.assertGreater(tokens["all"], 400)
        self.assertGreaterEqual(tokens["equal"], 0.98 * tokens["all"])
        for ending in ("stop", "length", "cancelled", "prompt_too_long", "too_many_tokens"):
            self.assertIn(ending, document["endings"])

    def test_exact(self):
        """Alone in its batch, the same code gives the same tokens."""
        entries = [entry for entry in self.entries[:7] if entry["heads"]]
        log = self.folder / "alone.log"
        log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        flags = ("--exact", "--sample", "1", "--json", "-", "--head", entries[-1]["heads"][1])
        where = [*self.scorer.flags(), *PATIENCE, "--log", log]
        where += ["--vocabulary", f"{self.scorer.model}.vocab"]
        document = self.document(run("audit", *where, *flags), 0)
        self.assertEqual(document["tokens"]["equal"], document["tokens"]["all"])

    def test_tampered_logs(self):
        """What the ledger's closing statement says is not what these logs lead to."""

        def check(entries):
            log = self.folder / "tampered.log"
            log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
            done = run("check", "--log", log, "--ledger", self.ledger, "--json", "-")
            return done.returncode, "\n".join(json.loads(done.stdout)["alarms"])

        self.assertEqual(check(self.entries), (0, ""))
        last = self.entries[-1]
        ids = [last["ids"][0] ^ 1, *last["ids"][1:]]
        for change in ({"ids": ids}, {"ending": "length"}, {"request": QUESTION | {"seed": 5}}):
            status, alarms = check([*self.entries[:-1], last | change])
            self.assertEqual(status, 1)
            self.assertIn("not what the enclave said", alarms)
        for number in (0, 3, len(self.entries) - 1):
            status, alarms = check(self.entries[:number] + self.entries[number + 1 :])
            self.assertEqual(status, 1)
            self.assertRegex(alarms, "not back to the beginning.*bytes spent, what that took is")
        # Two in another order, with hashes that fit.
        made, head = [], audit.BEGINNING
        for entry in (self.entries[1], self.entries[0], *self.entries[2:]):
            facts = (entry["lease"], entry["request"], entry["ids"], entry["ending"])
            after = mp.chain(bytes.fromhex(head), *facts).hex()
            made.append(entry | {"heads": [head, after]})
            head = after
        status, alarms = check(made)
        self.assertEqual(status, 1)
        self.assertIn("0 exchanges lead to its head", alarms)

    def attack(self, source, code=support.ROOT, slots=8, rule=NEAR_ENOUGH, tokens=150):
        """The verdict on what such an enclave says; its chain is whole."""
        with measurement.Enclave(self.folder, source, slots, code) as enclave:
            chain = measurement.answers(enclave, slots, tokens, 4)
        self.assertEqual(chain.alarms(), [])
        return measurement.judge(self.scorer, chain, chain.verified, rule)

    def test_another_model(self):
        verdict = self.attack(swapped_layers(self.source, self.folder / "swapped"))
        self.assertGreater(verdict.figures["tokens"]["refused_rate"], 0.2)
        self.assertNotEqual(verdict.alarms, [])

    def test_8_bit_weights(self):
        """So close that many tokens are needed; alone in the batch no token may differ at all."""
        model = measurement.quantised_model(self.source)
        verdict = self.attack(model, slots=1, rule=measurement.EXACT, tokens=700)
        self.assertGreater(verdict.figures["tokens"]["refused"], 0)
        self.assertNotEqual(verdict.alarms, [])

    def test_a_bit_hidden_in_each_token(self):
        verdict = self.attack(self.source, measurement.hiding_code(self.folder))
        self.assertGreater(verdict.figures["tokens"]["refused_rate"], 0.2)
        self.assertNotEqual(verdict.alarms, [])

    def test_ends_that_are_made_up(self):
        """Answers cut short, and one that went on after its end: the second enclave knows."""
        whole = audit.Entry(1, **self.entries[0])
        self.assertEqual(whole.ending, "stop")
        end = demo.SPECIAL.index(demo.EOT)
        cases = {"honest": whole, "short": whole._replace(ids=whole.ids[:-3])}
        cases["on"] = whole._replace(ids=[*whole.ids[:3], end, *whole.ids[3:]])
        with self.scorer.session("owner") as session:
            found = {name: audit.score(session, entry, 0.1) for name, entry in cases.items()}
        refused = {name: judge(one).figures["tokens"]["refused"] for name, one in found.items()}
        self.assertEqual((refused["honest"], refused["short"]), (0, 1))
        self.assertEqual(audit.ending_problem(found["honest"], 1024), None)
        told = audit.ending_problem(found["on"], 1024)
        self.assertEqual(told, "its token 4 is an end, and it went on")

    def test_mistakes(self):
        exact = ("--exact", "--sample", "0.1")
        for verb in ("audit", "calibrate"):
            done = run(verb, *self.scorer.flags(), "--log", self.log, "--ledger", self.ledger)
            self.assertEqual(done.returncode, 2, done.stdout + done.stderr)
            self.assertRegex(done.stderr, r"\Areplay_audit: error: --vocabulary FILE: [^\n]*\n\Z")
        for flags, status, text in (
            (("--sample", "0.1"), 2, "--calibration FILE"),
            (("--exact", "--sample", "0"), 2, "--sample: above 0"),
            (("--exact", "--false-alarm", "1"), 2, "--false-alarm: above 0 and below 1"),
            ((*exact, "--vocabulary", self.scorer.model), 2, "not a vocabulary table"),
            ((*exact, "--port", "1"), 3, "Connection refused"),
            (("--calibration", self.log), 2, "not a calibration"),
        ):
            done = self.audit("audit", *flags)
            self.assertEqual(done.returncode, status, done.stdout + done.stderr)
            self.assertRegex(done.stderr, rf"\Areplay_audit: error: [^\n]*{text}[^\n]*\n\Z")
        few = self.audit("calibrate", "--refused", "0.0001", "--output", self.folder / "few")
        self.assertEqual(few.returncode, 1)
        self.assertRegex(few.stderr, "tokens are too few: 29,956 or more are needed")
        self.assertFalse((self.folder / "few").exists())

    def test_an_enclave_can_not_audit_itself(self):
        with self.scorer.session("user") as session:
            for _ in session.exchange(
                {"prompt": "The", "max_new_tokens": 3}, self.scorer.vocabulary()
            ):
                pass
            entry = dict(session.entry)
        log = self.folder / "own.log"
        log.write_text(json.dumps(entry) + "\n")
        done = self.audit("audit", "--exact", "--head", entry["heads"][1], log=log)
        self.assertEqual(done.returncode, 1)
        self.assertIn("is the one that answered", done.stderr)


if __name__ == "__main__":
    unittest.main()
