"""The bound against an engine that has the weights and tries all that its pipe allows; and against
a host that bends the clock.

The engine is tests/redteam.py; all else is real: init, gate, loader, confinement, and the session
over which the decoder, this file, gets back the random bits that the engine was given to move. What
it moved is compared with what was charged; builds that forget one charge are found out.
"""

import contextlib
import hashlib
import hmac
import itertools
import json
import math
import pathlib
import random
import shutil
import socket
import sys
import tempfile
import time
import types
import unittest
from concurrent.futures import ThreadPoolExecutor

import muenclave
import muprotocol as mp
import muproxy
from tests import bent, support

import bound  # isort: skip  (from tools/, which tests.support has put on the path)

SEED = 20261130
CONTEXT = 1 << 20  # tokens
VOCABULARY = 768  # ids that the demo model knows
BUDGET = 100_000  # bytes
TICK = muenclave.SHORTEST_TICK  # ns, at a free rate
TICK_MS = TICK // 10**6
PRICE = 2 * mp.LENGTH_BITS // 8  # bytes that loading costs
ROUNDING = 7  # bits: READY says whole bytes
# For each channel, what charges for it (module, old text, new text): without that, an attack by
# this channel alone is to move more than is charged.
CHARGES = {
    "tokens": ("muprotocol.py", "return 8 * -(-count * self.bits // 8) + ", "return "),
    "cell counts": ("muprotocol.py", "// 8) + self.room.bit_length()", "// 8)"),
    "ticks": ("muenclave.py", "self.charge(now - ticks)", "self.charge(0)"),
    "endings": ("muenclave.py", "self.charge(mp.ENDING_BITS)", "self.charge(0)"),
    "lengths": (
        "muenclave.py",
        "self.charge(mp.LENGTH_BITS)\n            reply.",
        "self.charge(0)\n            reply.",
    ),
    "loads": ("muenclave.py", "self.charge(2 * mp.LENGTH_BITS)", "self.charge(0)"),
}
site = folder = vocabulary = shared = None


def setUpModule():
    global site, folder, vocabulary, shared
    holder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(holder.cleanup)
    folder = pathlib.Path(holder.name)
    site = support.make_site(folder)
    vocabulary = muproxy.read_vocabulary(site.vocabulary)
    shared = Enclave()
    unittest.addModuleCleanup(shared.end)


def build(*changes, has_double=True):
    """A folder with an enclave that tests/bent.py starts: its code, and the red team's engine.

    changes: (module, old text, new text), each once.
    """
    place = pathlib.Path(tempfile.mkdtemp(dir=folder))
    for module, name in (("muenclave.py", "real.py"), ("muprotocol.py", "muprotocol.py")):
        text = (support.ROOT / module).read_text("utf-8")
        for changed, old, new in changes:
            if changed == module:
                assert text.count(old) == 1, f"{module} has changed: {old!r}"
                text = text.replace(old, new)
        (place / name).write_text(text, "utf-8")
    shutil.copy(bent.__file__, place)
    program = "redteam.py" if has_double else "bent.py"
    shutil.copy(pathlib.Path(bent.__file__).with_name(program), place / "muenclave.py")
    return place


class Enclave(support.Enclave):
    """An enclave of the red team; `clock` is its clock's page. lease: fields of its leases."""

    def __init__(self, *changes, has_double=True, **lease):
        code = build(*changes, has_double=has_double)
        manifest = support.measure.local_manifest(sys.executable, code)
        values = muproxy.read_reference(site.reference)
        values["measurement"] = mp.manifest_digest(manifest)
        (code / "reference.json").write_text(json.dumps(values))
        files = types.SimpleNamespace(**vars(site) | {"reference": code / "reference.json"})
        self.clock = bent.Clock(code / "clock")
        self.clock["word"] = CONTEXT
        super().__init__(files, "--context", str(CONTEXT), code=code)
        self.lease = {"budget": BUDGET} | lease

    def renew(self, **lease):
        """Unlock it anew, with another lease than it has now."""
        with self.visit() as session:
            is_unlocked = session.ready["lease"] != ""
        if is_unlocked:
            self.stop()
        self.lease, self.clock["word"] = {"budget": BUDGET} | lease, CONTEXT
        self.start()

    def start(self):
        """Unlock it."""
        token = self.unlock_token(**self.lease)
        with contextlib.closing(self.session("owner")) as session:
            session.prove(token)
            self.close_key = session.close_key
        self.known = len(self.lines)

    @contextlib.contextmanager
    def visit(self):
        """A session of the owner, who brings no lease."""
        token = self.unlock_token()
        del token["lease"]
        with contextlib.closing(self.session("owner")) as session:
            session.prove(token)
            yield session

    def left(self):
        """Bits of the budget that are left, as an owner is told: whole bytes of them."""
        with self.visit() as session:
            return 8 * session.ready["budget_left"]

    def restart(self):
        """READY, once an engine that has died is loaded again."""
        self.wait_for("engine lost", self.known)
        self.wait_for("ready", self.known)
        self.known = len(self.lines)
        with self.ready() as session:
            return session.ready

    def stop(self):
        """End the lease, as its owner does. Returns the bits spent, as the closing statement says.

        The enclave is locked again afterwards.
        """
        known = len(self.lines)
        with self.visit() as session:
            closing = session.command({"lock": True})["closing"]
        facts = {name: closing[name] for name in ("lease", "spent", "head")}
        mac = hmac.digest(self.close_key, mp.encode_json(facts), "sha256")
        assert closing["mac"] == mac.hex()
        self.relocked(known)
        return 8 * closing["spent"]

    def relocked(self, known):
        """Wait until its lease has ended, since that line of its log, and it is locked again."""
        self.wait_for("lease ended", known)
        self.port = int(self.wait_for("listening", known).split()[-1])
        self.address = ("127.0.0.1", self.port)


class Answer:
    """What reached the other side of one request's session.

    cells: the ids in each cell, and the moment (ns) at which it came, by the clock that stands in
    between. trace: moment and size of every frame, as anybody sees them. final: FINAL or ERROR.
    """

    def __init__(self, session, clock, orders, **options):
        self.cells, self.trace, self.final = [], [], None
        self.session, self.clock = session, clock
        self.table = mp.CODES if "score" in options else vocabulary
        clock["read"] = 0
        clock.hold()
        self.send({"prompt": json.dumps(orders), "seed": 1} | options)

    def send(self, message):
        """Say something."""
        self.session.link.sendall(self.session.sealer.seal_json(message)[0])

    def finish(self):
        """Self, once all of it has come; the clock then stands."""
        while self.final is None:
            payload = mp.read_frame(self.session.link, mp.CELL, support.SECONDS)
            now, message = self.clock["held"], self.session.opener.open(payload)
            self.trace.append((now, mp.FRAME_HEADER + len(payload)))
            self.clock["read"] = len(self.trace)
            if message is not None and message[0] == mp.JSON_RECORD:
                self.final = mp.parse_json(message[1])
            elif message is not None and message[1]:
                self.cells.append((now, self.table.unpack(message[1])))
        return self

    def ids(self):
        """All ids."""
        return [token for _, ids in self.cells for token in ids]

    def busy(self, count):
        """For so many ticks after that of the first ids: whether ids came in it, 1 or 0."""
        first, *others = (now // TICK for now, _ in self.cells)
        return [int(first + number in others) for number in range(1, count + 1)]

    def ticks(self):
        """Ticks that it took, as the gate says; a refusal here takes these two."""
        return self.final.get("elapsed_ms", 2 * TICK_MS) // TICK_MS

    def prices(self):
        """What the README says that it costs: {channel: bits}."""
        packed = [8 * -(-len(ids) * self.table.bits // 8) for _, ids in self.cells]
        has_length = self.final.get("usage", {}).get("prompt_tokens", 0) > 0
        bits = {"tokens": sum(packed), "cell counts": len(packed) * self.table.room.bit_length()}
        bits |= {"ticks": self.ticks(), "endings": mp.ENDING_BITS}
        return bits | {"lengths": mp.LENGTH_BITS * has_length, "loads": 0}


def ignored(padding):
    """A request that the engine takes and never answers."""
    return {"prompt": json.dumps({"attack": "ignored", "padding": padding}), "seed": 1}


def until(condition):
    """Wait until it holds. AssertionError if it never does."""
    deadline = time.monotonic() + support.SECONDS
    while not condition():
        assert time.monotonic() < deadline, "what was waited for never came"
        time.sleep(0.001)


def await_engine(clock):
    """Wait until the gate's session sleeps, and the engine follows the clock."""
    until(lambda: clock["wake"] > clock["held"] and clock["heard"] == clock["held"])


def pipe_size():
    """Bytes that a pipe holds after which not one more can be sent."""
    ours, other = socket.socketpair()
    with ours, other:
        ours.setblocking(False)
        return ours.send(bytes(1 << 22))


def pass_tick(clock):
    """Have a tick pass; wait until the engine, which follows the clock, has seen it."""
    clock["held"] += TICK
    until(lambda: clock["heard"] == clock["held"])


def pass_ticks(clock, connection):
    """Have ticks pass until something comes that the engine has caused; how many there were."""
    for count in itertools.count(1):
        clock["held"] += TICK
        until(lambda: clock["heard"] == clock["held"] or mp.is_readable(connection, 0))
        if clock["heard"] != clock["held"]:
            return count


def digits(message, base, count):
    """The digits of a number, the lowest first."""
    return [message // base**place % base for place in range(count)]


def number(digits):
    """The number of mixed base with these digits, (digit, base) each, the lowest first."""
    total, place = 0, 1
    for digit, base in digits:
        total += digit * place
        place *= base
    return total


def receive(session):
    """The next message: ids, or an object."""
    message = None
    while message is None:
        message = session.opener.open(mp.read_frame(session.link, mp.CELL, support.SECONDS))
    is_ids = message[0] == mp.IDS_RECORD
    return vocabulary.unpack(message[1]) if is_ids else mp.parse_json(message[1])


class Attack:
    """What is moved over one channel of an unlocked enclave, and what is charged for that."""

    def __init__(self, enclave, covers=False):
        self.enclave, self.covers, self.chance = enclave, covers, random.Random(SEED)
        self.answers = []

    def run(self, channel, way=None):
        """Attack by one channel alone, in some way. Returns (bits moved, bits charged for it)."""
        before, self.answers = self.enclave.left(), []
        with self.enclave.ready() as self.session:
            moved = getattr(self, (way or channel).replace(" ", "_"))()
        self.spent = spent = before - self.enclave.left()
        others = (answer.prices() | {channel: 0} for answer in self.answers)
        charged = spent - sum(sum(prices.values()) for prices in others)
        return moved, charged + ROUNDING

    def message(self, base, count):
        """(random bits that so many digits hold, how many these are), a number and its size."""
        size = int(count * math.log2(base))
        return self.chance.getrandbits(size), size

    def ask(self, **orders):
        """The engine's answer."""
        self.answers.append(Answer(self.session, self.enclave.clock, orders).finish())
        self.enclave.clock.release()
        return self.answers[-1]

    def expect(self, found, message):
        """Fail, unless the decoder has it."""
        assert found == message, (found, message, self.answers[-1].final)

    def everything(self, size=3000, most=64):
        """All channels of an answer at once; as few bits as can be are charged and not used."""
        message = self.chance.getrandbits(size)
        orders = {"message": f"{message:x}", "size": size, "most": most}
        answer = self.ask(attack="everything", **orders)
        tick = first = answer.cells[0][0] // TICK
        cells = {now // TICK: ids for now, ids in answer.cells}
        found = [(answer.final["usage"]["prompt_tokens"] - 1, CONTEXT)]
        while math.prod(base for _, base in found) < 1 << size:
            found += [(int(tick in cells), 2)] * (tick > first)
            ids = cells.get(tick, [])
            found += [(len(ids) - 1, most)] * bool(ids)
            found += [(token, VOCABULARY) for token in ids]
            tick += 1
        found.append((mp.ENDINGS.index(answer.final["finish_reason"]), len(mp.ENDINGS)))
        self.expect(number(found), message)
        return size

    def tokens(self, count=2000):
        message, size = self.message(VOCABULARY, count)
        answer = self.ask(attack="tokens", message=f"{message:x}", base=VOCABULARY, count=count)
        self.expect(number((token, VOCABULARY) for token in answer.ids()), message)
        return size

    def scores(self, count=500):
        """Ids, too: the codes by which an engine judges another one's answer, for its owner."""
        codes = 2 * count + 2
        message, size = self.message(256, codes)
        orders = {"attack": "tokens", "message": f"{message:x}", "base": 256, "count": codes}
        score = {"ids": [0] * count, "tolerance": 0}
        with self.enclave.visit() as owner:
            answer = Answer(owner, self.enclave.clock, orders, score=score).finish()
        self.enclave.clock.release()
        self.answers.append(answer)
        self.expect(number((code, 256) for code in answer.ids()), message)
        return size

    def cell_counts(self, count=101):
        base = vocabulary.room
        message, size = self.message(base, count)
        answer = self.ask(attack="cell_counts", message=f"{message:x}", base=base, count=count)
        self.expect(number((len(ids) - 1, base) for _, ids in answer.cells), message)
        return size

    def ticks(self, count=100):
        message, size = self.message(2, count)
        answer = self.ask(attack="ticks", message=f"{message:x}", count=count, covers=self.covers)
        self.expect(number((bit, 2) for bit in answer.busy(count)), message)
        return size

    def stalls(self, count=3, longest=256):
        """Ticks, too, but of a request that waits in a pipe that the engine does not read."""
        clock, told = self.enclave.clock, []
        message, size = self.message(longest, count)
        for digit in digits(message, longest, count):
            orders = {"attack": "stalls", "ticks": 1 + digit}
            self.answers.append(Answer(self.session, clock, orders).finish())
            orders = {"attack": "read", "padding": "a" * 900_000}  # more than a pipe holds
            self.answers.append(Answer(self.session, clock, orders))
            told.append(pass_ticks(clock, self.session.link.socket) - 1)
            self.answers[-1].finish()
            clock.release()
        self.expect(number((digit, longest) for digit in told), message)
        return size

    def errors(self, count=4, longest=256):
        """Ticks that pass before a peer hears of its own mistake, since a full pipe holds that up.

        The pipe is filled by a request of somebody who then hangs up, and waits for no answer.
        """
        clock, told = self.enclave.clock, []
        message, size = self.message(longest, count)
        for digit in digits(message, longest, count):
            with self.enclave.ready() as other:
                answer = Answer(self.session, clock, {"attack": "deaf", "ticks": 2 + digit})
                await_engine(clock)
                empty = ignored("") | {"slot": 1, "user": "0" * 16}
                missing = pipe_size() - len(mp.frame(mp.encode_json(empty)))
                before = clock["sleeps"]
                other.link.sendall(other.sealer.seal_json(ignored("a" * missing))[0])
                until(lambda b=before: clock["sleeps"] != b)  # it is in the pipe, then
            answer.send({"cancel": False})
            pass_tick(clock)
            told.append(pass_ticks(clock, self.session.link.socket) - 1)
            answer.finish()
            clock.release()
        self.expect(number((digit, longest) for digit in told), message)
        return size

    def endings(self, count=30):
        kinds = [*(("finish_reason", name) for name in mp.ENDINGS)]
        kinds += [*(("error", name) for name in mp.REFUSALS)]
        message, size = self.message(len(kinds), count)
        told = []
        for digit in digits(message, len(kinds), count):
            kind = mp.END if digit < len(mp.ENDINGS) else mp.REFUSED
            answer = self.ask(attack="endings", kind=kind, value=digit % len(mp.ENDINGS))
            name = "error" if "error" in answer.final else "finish_reason"
            told.append(kinds.index((name, answer.final[name])))
        self.expect(number((digit, len(kinds)) for digit in told), message)
        return size

    def late_endings(self, count=2, longest=64):
        """Of answers that their users have cancelled: seen by what is then left of the budget."""
        clock, told = self.enclave.clock, []
        message, size = self.message(longest, count)
        with self.enclave.visit() as other:
            for digit in digits(message, longest, count):
                orders = {"attack": "late", "ticks": 2 + digit}  # the cancel takes the first one
                self.answers.append(Answer(self.session, clock, orders))
                await_engine(clock)
                self.answers[-1].send({"cancel": True})
                pass_tick(clock)
                left = self.answers[-1].finish().final["budget_left"]
                for tick in itertools.count():
                    pass_tick(clock)
                    before, left = left, other.command({"status": True})["budget_left"]
                    if left < before:
                        told.append(tick)
                        break
                clock.release()
        self.expect(number((digit, longest) for digit in told), message)
        return size

    def lengths(self, count=10):
        message, size = self.message(CONTEXT, count)
        told = []
        for digit in digits(message, CONTEXT, count):
            answer = self.ask(attack="lengths", value=1 + digit)
            told.append(answer.final["usage"]["prompt_tokens"] - 1)
        self.expect(number((digit, CONTEXT) for digit in told), message)
        return size

    def loads(self, count=3):
        message, size = self.message(CONTEXT, count)
        told = []
        for digit in digits(message, CONTEXT, count):
            self.enclave.clock["word"] = 1 + digit
            self.ask(attack="loads")
            told.append(self.enclave.restart()["context"] - 1)
        self.enclave.clock["word"] = CONTEXT
        self.expect(number((digit, CONTEXT) for digit in told), message)
        return size


class Channels(unittest.TestCase):
    """Each channel alone: what was put in comes out, and was paid for."""

    def test_they_are_those_of_the_bound(self):
        """An attack for each channel that `tools/exfil_timing.py bound` has a charge for."""
        self.assertEqual(set(CHARGES), {name for *_, names in bound.CHARGES for name in names})

    @classmethod
    def setUpClass(cls):
        shared.renew()

    def test_each_alone(self):
        for channel in CHARGES:
            with self.subTest(channel):
                moved, charged = Attack(shared).run(channel)
                self.assertGreater(moved, 50)
                self.assertLessEqual(moved, charged)

    def test_scores(self):
        moved, charged = Attack(shared).run("tokens", "scores")
        self.assertLessEqual(moved, charged)

    def test_ticks_that_nobody_saw(self):
        """Of a request that the engine lets wait: as dear as those of an answer."""
        moved, charged = Attack(shared).run("ticks", "stalls")
        self.assertLessEqual(moved, charged)

    def test_ticks_before_an_error(self):
        """Nothing else is charged for than ticks."""
        shared.renew()
        moved, charged = Attack(shared).run("ticks", "errors")
        shared.renew()  # its answers have no end
        self.assertLessEqual(moved, charged)

    def test_endings_that_nobody_waited_for(self):
        moved, charged = Attack(shared).run("endings", "late endings")
        self.assertLessEqual(moved, charged)

    def test_all_of_them(self):
        """In one lease, against what its closing statement says; then it is locked again."""
        shared.renew()
        attack = Attack(shared)
        moved, _ = attack.run("everything")
        self.assertLessEqual(moved, attack.spent)
        self.assertGreater(moved, attack.spent * 3 // 4)  # it wastes little
        moved += sum(attack.run(channel)[0] for channel in CHARGES)
        self.assertLessEqual(moved, shared.stop())
        shared.renew()


class Shapes(unittest.TestCase):
    """What somebody sees who has no keys: when frames come, and how long they are."""

    def traces(self, shape):
        """Of three answers that differ in all that an engine chooses but in how long they take."""
        shared.renew(policy={"verified": False, "latency_ms": 0, "shape": shape})
        attack, traces = Attack(shared, covers=shape == "constant"), []
        for channel in ("ticks", "ticks", "cell counts"):
            moved, charged = attack.run(channel)
            self.assertLessEqual(moved, charged)
            frames = attack.answers[0].trace
            first = frames[0][0] // TICK
            traces.append([(now // TICK - first, size) for now, size in frames])
        return traces

    def test_constant(self):
        """The traces are equal: a cell in every tick, up to the ending, which is one more."""
        one, *others = self.traces("constant")
        self.assertEqual([(tick, mp.CELL) for tick in range(len(one) - 1)], one[:-1])
        self.assertGreater(len(one), 100)
        for other in others:
            self.assertEqual(other, one)

    def test_plain(self):
        """Without it they tell the ticks in which there were ids."""
        one, other, third = self.traces("plain")
        self.assertEqual({size for _, size in one + other + third}, {mp.CELL})
        self.assertNotEqual(one, other)
        self.assertNotEqual(one, third)


class Compromised(unittest.TestCase):
    """What it has, what it finds, and what comes of saying what may not be said."""

    @classmethod
    def setUpClass(cls):
        shared.renew()

    def ask(self, enclave=None, **orders):
        """The engine's answer."""
        enclave = enclave or shared
        with enclave.ready() as session:
            answer = Answer(session, enclave.clock, orders).finish()
        enclave.clock.release()
        return answer

    def keys(self):
        """{name: value} of what it is to look for."""
        key = support.owner.read_key_file(site.key, None)[1]
        chunk = muproxy.read_container(site.model).chunk_key(key)
        found = {"weights key": key, "chunk key": chunk}
        for name in ("owner_psk", "user_psk"):
            found[name] = bytes.fromhex(getattr(site, name).read_text().strip())
        found |= {f"{name} in hexadecimal": v.hex().encode() for name, v in found.items()}
        return found | {"access token": muproxy.read_token(site.token).encode()}

    def found(self, values, enclave=None):
        """How often the engine finds each of these in what it can read."""
        needles = [(v[:3].hex(), hashlib.sha256(v).hexdigest(), len(v)) for v in values]
        return self.ask(enclave, attack="search", needles=needles).ids()

    def test_no_key_is_found(self):
        """The values looked for, and one that it has: a piece of the weights."""
        keys = self.keys()
        known = (site.demo / "model.safetensors").read_bytes()[-64:]
        found = self.found([*keys.values(), known])
        self.assertEqual(dict(zip(keys, found)), dict.fromkeys(keys, 0))
        self.assertGreater(found[-1], 0)

    def test_a_key_that_is_there_is_found(self):
        """A build whose gate tells the engine more than the model's type."""
        old = 'self.container.fields["model_type"].encode()'
        with Enclave(("muenclave.py", old, f"{old} + self.key")) as enclave:
            enclave.start()
            keys = self.keys()
            found = dict(zip(keys, self.found(keys.values(), enclave)))
            self.assertGreater(found.pop("weights key"), 0)
            self.assertEqual(found, dict.fromkeys(found, 0))

    def test_descriptors(self):
        """Nothing, three times, and the pipe: no disk, no way to another process.

        And two files that are mapped: the arena, which nobody can write, and the test's clock.
        """
        kinds = self.ask(attack="descriptor_kinds").ids()
        self.assertEqual(sorted(kinds), [1, 1, 1, 2, 3, 3])

    def test_it_has_the_weights(self):
        """All that the bound is about: what it moves are they, and it is the bytes that count."""
        wanted = (site.demo / "model.safetensors").read_bytes()
        before, start = shared.left(), len(wanted) // 2
        orders = {"name": "model.safetensors", "start": start, "count": 1000}
        answer = self.ask(attack="weights", **orders)
        self.assertEqual(bytes(answer.ids()), wanted[start : start + 1000])
        self.assertGreaterEqual(before - shared.left(), 8 * 1000)

    def test_lies(self):
        """What an engine may not say ends it; nothing of that leaves, and the lease pays."""
        lies = {
            "no such message": [[0, 0, 0]],
            "loaded once more": [[mp.LOADED, 0, 1]],
            "an id that there is not": [[mp.ID, 0, VOCABULARY]],
            "an answer that nobody wants": [[mp.ID, 1, 0]],
            "two lengths": [[mp.LENGTH, 0, 1], [mp.LENGTH, 0, 2]],
            "more ids than were asked for": [[mp.ID, 0, 0]] * 3,
            "an ending that there is not": [[mp.END, 0, len(mp.ENDINGS)]],
        }
        self.assertLessEqual(len(lies), muenclave.RESPAWNS)
        for number, (name, messages) in enumerate(lies.items()):
            with self.subTest(name):
                before, limit = shared.left(), {"max_new_tokens": 2}
                with shared.ready() as session:
                    orders = {"attack": "lie", "messages": messages}
                    answer = Answer(session, shared.clock, orders, **limit).finish()
                self.assertEqual(answer.final["error"], "engine_lost")
                self.assertLessEqual(len(answer.ids()), 2)
                self.assertEqual(shared.restart()["restarts"], number + 1)
                self.assertGreaterEqual(before - shared.left(), 8 * PRICE)
        shared.renew()


class Loading(unittest.TestCase):
    """An engine that does not come up has said something, too; it is paid for before it is told."""

    def test_failures(self):
        shared.renew()
        shared.stop()
        told = [*mp.FAILURES, "out_of_memory"]  # the last one of an engine that just dies
        for budget, codes in ((PRICE, told), (PRICE - 1, ["lease_ended"] * len(told))):
            for value, code in enumerate(codes):
                shared.clock["word"] = -1 - value
                shared.lease["budget"], known = budget, len(shared.lines)
                with self.assertRaises(mp.ProtocolError) as caught:
                    shared.start()
                self.assertEqual(caught.exception.code, code)
                shared.relocked(known)


class Clocks(unittest.TestCase):
    """What the guest's clock decides is the host's to decide. The budget is not."""

    RATE, BURST, BUDGET, SESSIONS = mp.DEFAULT_RATE, 16 << 10, 20_000, 2

    def test_a_thousand_times_too_fast(self):
        """Real engine, real gate: more leaves than the rate allows, and exactly the budget."""
        lease = {"rate": self.RATE, "burst": self.BURST, "budget": self.BUDGET}
        lease |= {"expiry": 10 * 365 * 86400}
        # A second would be a quarter of an hour, and a busy machine's peer an idle one.
        patience = ("muenclave.py", "IDLE_SECONDS = 900", "IDLE_SECONDS = 10**6")
        with contextlib.ExitStack() as stack:
            enclave = stack.enter_context(Enclave(patience, has_double=False, **lease))
            enclave.start()
            sessions = [stack.enter_context(enclave.ready()) for _ in range(self.SESSIONS)]
            other = stack.enter_context(enclave.visit())
            enclave.clock["fast"] = begin = time.monotonic_ns()
            with ThreadPoolExecutor() as pool:
                asked = pool.submit(self.ask, other)
                told = list(pool.map(self.read, sessions))
                cells = asked.result()
            seconds = (time.monotonic_ns() - begin) / mp.NANOSECOND
            enclave.wait_for("lease ended", enclave.known)
        more, chosen, last = map(sum, zip(*told))
        self.assertGreater((cells + more) * mp.CELL, self.RATE * seconds + self.BURST)
        bits = 8 * (self.BUDGET - PRICE)  # the engine chose when it had loaded
        self.assertLessEqual(chosen, bits)
        # It does not end before: what else was charged are the ticks of the answers that were cut
        # off, their lengths and endings; the last charge asked for more than there was.
        ticks = last * bent.FAST // (100 * 10**6)
        dearest = max(mp.LENGTH_BITS, vocabulary.cost(vocabulary.room))
        least = bits - ticks - self.SESSIONS * (mp.LENGTH_BITS + mp.ENDING_BITS) - dearest
        self.assertGreaterEqual(chosen, least)

    def ask(self, session):
        """An owner who asks for the status until the lease has ended: how many cells came."""
        cells = 0
        with contextlib.suppress(mp.ProtocolError):
            while session.command({"status": True}):
                cells += 1
        return cells

    def read(self, session):
        """Ask until the lease has ended.

        Returns (cells that came, bits that the engine chose in them, ns since the last request).
        """
        cells, chosen, deadline = 0, 0, time.monotonic() + support.SECONDS
        request, final = {"prompt": "The", "temperature": 10, "max_new_tokens": 32}, {}
        while "error" not in final:
            self.assertLess(time.monotonic(), deadline, "the lease does not end")
            begin = time.monotonic_ns()
            session.link.sendall(session.sealer.seal_json(request)[0])
            while isinstance(said := receive(session), list):
                chosen += vocabulary.cost(len(said))
                cells += 1
            cells, final = cells + 1, said
            if "usage" in final:
                chosen += mp.ENDING_BITS + mp.LENGTH_BITS + final["elapsed_ms"] // 100
        self.assertEqual(final["error"], "lease_ended")
        return cells, chosen, time.monotonic_ns() - begin

    def test_one_that_stands(self):
        """No lease expires by a clock that stands; one that goes on ends it."""
        before = shared.clock.monotonic_ns()
        shared.renew(expiry=60)
        with shared.visit() as session:
            shared.clock["held"] = before + 59_900_000_000
            time.sleep(1)
            self.assertEqual(session.command({"status": True})["status"], "ready")
        shared.clock.release()
        shared.relocked(shared.known)


class Mutants(unittest.TestCase):
    """Builds that do not charge for a channel: what is moved by it is more than is charged."""

    def attack(self, mutant):
        """What such a build moves, and what it still charges for that."""
        channel, way, change = mutant
        with Enclave(change) as enclave:
            enclave.start()
            return Attack(enclave).run(channel, way)

    def test_each_charge_is_needed(self):
        mutants = [(channel, channel, change) for channel, change in CHARGES.items()]
        turns = ("muenclave.py", "(time.monotonic_ns() - began) // self.tick", "0")
        mutants.append(("ticks", "stalls", turns))  # a tick for each look at the clock
        last = "        ticks = gate.pass_ticks(began, ticks)\n        if"
        mutants.append(("ticks", "errors", ("muenclave.py", f"    {last}", last)))
        with ThreadPoolExecutor(3) as pool:
            for mutant, (moved, charged) in zip(mutants, pool.map(self.attack, mutants)):
                with self.subTest(mutant):
                    self.assertGreater(moved, charged)


if __name__ == "__main__":
    unittest.main()
