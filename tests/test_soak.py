"""The soak: an enclave and its proxy under the load of clients that come, leave and misbehave.

Three minutes of load in the suite. `python3 tools/test.py --release` makes it thirty, on a machine
that does nothing else, and writes what was measured to tools/measured/soak.json.
"""

import collections
import contextlib
import http.client
import json
import os
import pathlib
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import openai
import torch
import transformers

import muenclave
import muprotocol as mp
import muproxy
from tests import support
from tests.test_engine import answers, decoder, load, loaded

sys.path.insert(0, str(support.TOOLS))

import bench_shared  # noqa: E402

IS_RELEASE = os.environ.get("MUENCLAVE_RELEASE") == "1"
SECONDS = 1800 if IS_RELEASE else 180  # of load
STALL = 2 if IS_RELEASE else 20  # seconds between two pieces of a stream; 20: it hangs
RESULT = support.TOOLS / "measured" / "soak.json"
CLIENTS, SLOTS = 16, 8
REQUESTS = 16  # different ones, whose answers are known
SAMPLES = 60  # of memory, threads and descriptors, while the load lasts
# What the median of the last fifth of the samples may have more than that of the first.
GROWTH = {"rss": 8 << 20, "threads": 8, "descriptors": 8}
MARGIN = 1e-4  # of each token's score before all others: beside others, rounding differs
BUDGET = 10**9
# What only sleeps, and prints how many seconds too late it woke up: whether the machine stood
# still is told beside a stream's pause, which it does not excuse.
SLEEPER = """
import time
while True:
    due = time.monotonic() + 0.02
    time.sleep(0.02)
    late = time.monotonic() - due
    if late > 0.2:
        print(late, flush=True)
"""
ACTS = {"answer": 6, "whole": 1, "cancel": 3, "hang_up": 1, "mistake": 3, "leave": 1}
TEXT = " ".join(support.demo.corpus()[0])


def setUpModule():
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def chat(text, system=None, **options):
    """A request's body."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    return {"model": "demo", "messages": messages} | options


def candidates():
    """Bodies of requests: short and long prompts, greedy and sampled, short and long answers."""
    draw, subjects = random.Random("soak"), sorted(support.demo.corpus()[1])
    while True:
        question = draw.choice(support.demo.QUESTIONS).format(draw.choice(subjects))
        system = draw.choice((None, None, TEXT[:600], TEXT[:600], TEXT[2000:3000]))
        options = {"max_tokens": draw.choice((8, 30, 80, 160)), "seed": draw.randrange(1 << 32)}
        yield chat(question, system, temperature=draw.choice((0, 0.7, 1.0)), **options)


def long_ones():
    """Bodies of requests whose answers are about the longest text that the model knows."""
    for seed in range(1 << 32):
        yield chat("Tell me about zen.", seed=seed, temperature=0.3, max_tokens=120)


class Alone:
    """The demo model in this process: whether a request's answer is clear, and of what length."""

    def __init__(self, files):
        prompter = muenclave.Prompter(json.loads(bytes(files["prompts.json"])))
        self.decoder = decoder(load(files), prompter, slots=1)

    def is_fit(self, body, ending=None):
        """Whether an answer ends like this (None: in any way), and no other token comes near any
        of its own: then rounding decides nothing.
        """
        request = muproxy.parse_request(body, True)[0]
        ids, ended = answers(self.decoder, [request])[0]
        if ending not in (None, ended):
            return False
        codes, _ = answers(self.decoder, [request | {"score": {"ids": ids, "tolerance": MARGIN}}])[
            0
        ]
        return set(codes[1::2]) == {1}


Piece = collections.namedtuple("Piece", "text reason usage")  # of a stream
Answer = collections.namedtuple("Answer", "text reason tokens")


def mistakes(token, other):
    """(name, bytes of an HTTP request that is wrong, status of the answer to it)."""

    def post(body, key=token, length=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {key}\r\nContent-Length: {length or len(data)}\r\n\r\n"
        return head.encode() + data

    good = chat("Tell me about zen.")
    yield "bad JSON", post(json.dumps(good)[:-1].encode()), 400
    yield "not an object", post([good]), 400
    yield "unknown field", post(good | {"frobnicate": True}), 400
    yield "unsupported field", post(good | {"tools": [{"type": "function"}]}), 400
    yield "wrong value", post(good | {"temperature": "hot"}), 400
    yield "prompt too long", post(chat(TEXT * 4)), 400
    yield "too many tokens", post(good | {"max_tokens": 1 << 20}), 400
    yield "another model", post(good | {"model": "gpt-9"}), 404
    yield "wrong key", post(good, key=other), 401
    yield "no key", post(good, key="short"), 401
    yield "oversized", post(good, length=mp.REQUEST_FRAME + 1), 413
    yield "unknown method", b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", 405


class Soak:
    """A whole enclave, unlocked, and its proxy; what its clients have found so far."""

    def __init__(self, folder, stack):
        self.site = support.make_site(folder, support.sealed_demo("float32"))
        flags = ("--threads", "1", "--slots", SLOTS)
        self.enclave = stack.enter_context(support.Enclave(self.site, *flags))
        self.owner("unlock", "--new-ledger", "--lifetime-budget", BUDGET, "--budget", BUDGET)
        self.start_proxy(stack)
        self.pids = self.enclave.pids() | {"proxy": self.proxy.pid}
        self.pids.pop("loader", None)
        self.token = muproxy.read_token(self.site.token)
        other = muproxy.read_token(self.site.other)
        self.mistakes = list(mistakes(self.token, other))
        self.lock, self.counts, self.failures = threading.Lock(), collections.Counter(), []
        self.gaps, self.firsts, self.samples, self.until = [0.0], [], [], 0
        self.pauses = [0.0]  # of the machine
        self.known = []  # (body, its Answer when nothing else runs)

    def owner(self, verb, *flags):
        """Run the owner's tool. Returns what it printed."""
        flags = [*self.enclave.flags("owner"), *flags]
        if verb == "unlock":
            flags += ["--token-file", self.site.token, "--rate", support.FREE_RATE]
            flags += ["--burst", 1 << 22]
        done = support.own(verb, *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start_proxy(self, stack):
        """Start `muproxy serve` before the enclave; `address` is (host, port)."""
        command = [sys.executable, "-B", "-m", "muproxy", "serve", *self.enclave.flags()]
        command += ["--vocabulary", self.site.vocabulary, "--listen", "127.0.0.1:0"]
        command += ["--rate-kb", 10**6]
        self.proxy = subprocess.Popen(
            list(map(str, command)), cwd=support.ROOT, stderr=subprocess.PIPE, text=True
        )
        stack.callback(self.proxy.communicate)
        stack.callback(self.proxy.terminate)
        line = ""
        while not (found := re.search(r" on ([\d.]+):(\d+)$", line)):
            line = self.proxy.stderr.readline()
            assert line, "muproxy serve has ended"
        self.address = (found[1], int(found[2]))

    def is_over(self):
        """Whether clients are to stop."""
        return time.monotonic() > self.until or bool(self.failures)

    def count(self, **values):
        """Add to what the clients have done."""
        with self.lock:
            self.counts.update(values)

    def metrics(self):
        """The proxy's metrics that have no labels: {name: number}."""
        connection = http.client.HTTPConnection(*self.address, timeout=support.SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        return {name: int(value) for name, value in re.findall(r"(?m)^muproxy_(\w+) (\d+)$", text)}

    def wait_until(self, condition):
        """Wait until it holds; the deadline guards against hanging alone. AssertionError."""
        deadline = time.monotonic() + support.SECONDS
        while not condition():
            assert time.monotonic() < deadline, "it did not come true"
            time.sleep(0.05)

    # -- what the processes have

    def sample(self):
        """Note memory (bytes), threads and descriptors of each process, and requests under way.

        Who is not root can't count the descriptors of gate and engine: None.
        """
        found = {"running": self.metrics()["requests_running"]}
        for role, pid in self.pids.items():
            process = pathlib.Path("/proc", str(pid))
            lines = (process / "status").read_text().splitlines()
            status = dict(line.split(":", 1) for line in lines)
            descriptors = None
            with contextlib.suppress(PermissionError):
                descriptors = len(os.listdir(process / "fd"))
            rss = int(status["VmRSS"].split()[0]) * 1024
            found[role] = {"rss": rss, "threads": int(status["Threads"])}
            found[role] |= {"descriptors": descriptors}
        self.samples.append(found)

    def trend(self, role, what):
        """{"first": median of the first fifth of the samples, "last": of the last fifth, "most"},
        whole numbers; None if it is not known.
        """
        values = [sample[role][what] for sample in self.samples]
        if None in values:
            return None
        fifth = max(1, len(values) // 5)
        medians = (statistics.median_low(part) for part in (values[:fifth], values[-fifth:]))
        return dict(zip(("first", "last", "most"), (*medians, max(values))))

    # -- the load

    def prepare(self):
        """Choose requests whose answers rounding can't change, and ask for each alone."""
        client = Client(0, self)
        with loaded(self.site) as files:
            alone = Alone(files)
        fit = filter(alone.is_fit, candidates())
        self.known = [(body, client.read(body)) for _, body in zip(range(REQUESTS), fit)]
        fit = (body for body in long_ones() if alone.is_fit(body, "length"))
        self.long = [(body, client.read(body)) for _, body in zip(range(SLOTS), fit)]

    def fill_slots(self):
        """Have an answer run in each slot: all begin before any of them ends. AssertionError.

        The engine stands still until all have been asked for.
        """
        said, clients = [], []
        engine = self.enclave.pids()["engine"]
        os.kill(engine, signal.SIGSTOP)
        try:
            for number, (body, wanted) in enumerate(self.long):
                clients.append(Watcher(number, self, body, wanted, said))
                clients[-1].start()
            self.wait_until(lambda: self.metrics()["requests_waiting"] == SLOTS)
        finally:
            os.kill(engine, signal.SIGCONT)
        for client in clients:
            client.join(support.SECONDS)
        assert not self.failures, self.failures
        assert said == ["begins"] * SLOTS + ["ends"] * SLOTS, said

    def run(self):
        """The load, and what the processes have while it lasts."""
        self.until = time.monotonic() + SECONDS
        clients = [Client(number, self) for number in range(CLIENTS)]
        command, options = [sys.executable, "-c", SLEEPER], {"stdout": subprocess.PIPE}
        with subprocess.Popen(command, **options, text=True) as sleeper:
            try:
                self.load(clients)
            finally:
                sleeper.kill()
            self.pauses += map(float, sleeper.stdout)
        stuck = [client.number for client in clients if client.is_alive()]
        assert not stuck, f"clients {stuck} are stuck; {self.failures}"

    def load(self, clients):
        """Start the clients and wait for their end, with samples on the way."""
        for client in clients:
            client.start()
        for number in range(1, SAMPLES + 1):
            pause = self.until - SECONDS * (1 - number / SAMPLES) - time.monotonic()
            time.sleep(max(0, pause))
            if self.failures:
                break
            self.sample()
        for client in clients:
            client.join(support.SECONDS)

    def facts(self):
        """What was measured, for the file."""
        facts = {"tool": "soak", "version": 1, "machine": bench_shared.describe_processor()}
        facts |= {"seconds": SECONDS, "clients": CLIENTS, "slots": SLOTS}
        facts |= {"counts": dict(self.counts), "worst_gap_seconds": round(max(self.gaps), 3)}
        facts["machine_pause_seconds"] = round(max(self.pauses), 3)
        running = statistics.mean(sample["running"] for sample in self.samples)
        firsts = {"median": statistics.median(self.firsts), "worst": max(self.firsts)}
        facts["first_seconds"] = {name: round(value, 3) for name, value in firsts.items()}
        facts["requests_running"] = round(running, 1)
        facts["processes"] = {
            role: {what: self.trend(role, what) for what in GROWTH} for role in self.pids
        }
        return facts


class Client(threading.Thread):
    """One of the clients: what it does next is drawn, by its number's own random numbers."""

    def __init__(self, number, soak):
        super().__init__(daemon=True)
        self.number, self.soak, self.draw = number, soak, random.Random(number)
        self.stream = self.stream_http if number % 2 else self.stream_openai
        self.openai = self.connect()

    def connect(self):
        """The openai package's client."""
        host, port = self.soak.address
        facts = {"base_url": f"http://{host}:{port}/v1", "api_key": self.soak.token}
        return openai.OpenAI(**facts, max_retries=0, timeout=support.SECONDS)

    def run(self):
        try:
            while not self.soak.is_over():
                getattr(self, self.draw.choices(list(ACTS), ACTS.values())[0])()
        except Exception as error:  # noqa: BLE001  any is a failure of the soak
            self.soak.failures.append(f"client {self.number}: {error!r}")
        finally:
            self.openai.close()

    # -- streams

    def stream_openai(self, body):
        """The Pieces of a stream, through the openai package."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        with self.openai.chat.completions.create(**body, **options) as chunks:
            for chunk in chunks:
                usage = chunk.usage and chunk.usage.completion_tokens
                for choice in chunk.choices:
                    yield Piece(choice.delta.content or "", choice.finish_reason, usage)
                if not chunk.choices:
                    yield Piece("", None, usage)

    def stream_http(self, body):
        """The Pieces of a stream, read from the connection up to its end."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        is_done = False
        with contextlib.closing(self.post(body | options)) as response:
            assert response.status == 200, (response.status, response.read())
            for line in filter(None, map(bytes.strip, response)):
                assert line.startswith(b"data: ") and not is_done, line
                if is_done := line == b"data: [DONE]":
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                assert "error" not in event, event
                usage = (event["usage"] or {}).get("completion_tokens")
                for choice in event["choices"]:
                    yield Piece(choice["delta"].get("content", ""), choice["finish_reason"], usage)
                if not event["choices"]:
                    yield Piece("", None, usage)
        assert is_done, "the stream ended without [DONE]"

    def post(self, body):
        """The response to a request on a connection of its own, which closes with it."""
        connection = http.client.HTTPConnection(*self.soak.address, timeout=support.SECONDS)
        headers = {"Authorization": f"Bearer {self.soak.token}", "Connection": "close"}
        headers["Content-Type"] = "application/json"
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        return connection.getresponse()

    def read(self, body, limit=None):
        """The Answer to a request, as a stream; None if it was cut after `limit` pieces of it."""
        text, reason, tokens, before = "", None, None, None
        began = time.monotonic()
        with contextlib.closing(self.stream(body)) as pieces:
            for number, piece in enumerate(pieces, 1):
                now = time.monotonic()
                if before is None:
                    self.soak.firsts.append(now - began)
                else:
                    self.soak.gaps.append(now - before)
                before, text = now, text + piece.text
                reason, tokens = piece.reason or reason, piece.usage or tokens
                if number == limit and reason is None:
                    return None
        return Answer(text, reason, tokens)

    # -- what a client may do

    def answer(self):
        """Read a stream to its end: it is what it was alone."""
        body, wanted = self.draw.choice(self.soak.known)
        got = self.read(body)
        assert got == wanted, (body, got, wanted)
        self.soak.count(streams=1, tokens=got.tokens)

    def whole(self):
        """An answer that is no stream."""
        body, wanted = self.draw.choice(self.soak.known)
        found = self.openai.chat.completions.create(**body)
        (choice,) = found.choices
        got = Answer(choice.message.content, choice.finish_reason, found.usage.completion_tokens)
        assert got == wanted, (body, got, wanted)
        self.soak.count(whole=1, tokens=got.tokens)

    def cancel(self):
        """Go away in the middle of a stream."""
        body, wanted = self.draw.choice(self.soak.known + self.soak.long)
        got = self.read(body, self.draw.randrange(1, 12))
        assert got in (None, wanted), (body, got, wanted)
        self.soak.count(**{"streams" if got else "cancelled": 1})

    def hang_up(self):
        """Go away before an answer begins: in the middle of the request, or right after it."""
        _, data, _ = self.soak.mistakes[0]
        body = json.dumps(self.draw.choice(self.soak.long)[0] | {"stream": True}).encode()
        head = re.sub(rb"(?<=Content-Length: )\d+", b"%d" % len(body), data.split(b"\r\n\r\n")[0])
        request = head + b"\r\n\r\n" + body
        with socket.create_connection(self.soak.address, support.SECONDS) as connection:
            connection.sendall(request[: self.draw.choice((20, len(request) - 5, len(request)))])
            time.sleep(self.draw.random() / 10)
        self.soak.count(hung_up=1)

    def mistake(self):
        """A request that is wrong: it gets the answer that is due."""
        name, data, status = self.draw.choice(self.soak.mistakes)
        with socket.create_connection(self.soak.address, support.SECONDS) as connection:
            connection.sendall(data)
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert response.status == status, (name, response.status, response.read())
            assert "error" in json.loads(response.read()), name
        self.soak.count(**{"mistakes": 1, f"mistake: {name}": 1})

    def leave(self):
        """Leave with all connections; come back as another."""
        self.openai.close()
        time.sleep(self.draw.random() * 2)
        self.openai = self.connect()
        self.soak.count(left=1)


class Watcher(Client):
    """A client of one stream that says when it begins and when it ends."""

    def __init__(self, number, soak, body, wanted, said):
        super().__init__(2 * number + 1, soak)
        self.body, self.wanted, self.said = body, wanted, said

    def run(self):
        try:
            assert self.read(self.body) == self.wanted, self.body
            self.said.append("ends")
        except Exception as error:  # noqa: BLE001  any is a failure of the soak
            self.soak.failures.append(f"watcher {self.number}: {error!r}")

    def stream_http(self, body):
        for number, piece in enumerate(super().stream_http(body)):
            if number == 0:
                self.said.append("begins")
            yield piece


class Load(unittest.TestCase):
    """Sixteen clients at eight slots, as fast as they can."""

    def test_soak(self):
        with contextlib.ExitStack() as stack:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            soak = Soak(folder, stack)
            soak.prepare()
            soak.fill_slots()
            soak.gaps, soak.firsts = [0.0], []
            soak.run()
            self.assertEqual(soak.failures, [])
            facts = soak.facts()
            print(f"soak: {json.dumps(facts)}", file=sys.stderr)
            with self.subTest("all that clients may do was done"):
                kinds = ("streams", "whole", "cancelled", "hung_up", "mistakes", "left")
                for kind in (*kinds, *(f"mistake: {name}" for name, _, _ in soak.mistakes)):
                    self.assertGreater(soak.counts[kind], 0, kind)
            with self.subTest("no stream stands still", machine=facts["machine_pause_seconds"]):
                self.assertLess(facts["worst_gap_seconds"], STALL)
            for role in soak.pids:
                for what, most in GROWTH.items():
                    with self.subTest("nothing grows", process=role, what=what):
                        if found := soak.trend(role, what):
                            self.assertLessEqual(found["last"] - found["first"], most)
            with self.subTest("all slots are free, and the next answer is right"):
                soak.wait_until(lambda: soak.metrics()["requests_running"] == 0)
                soak.fill_slots()
                body, wanted = soak.known[0]
                self.assertEqual(Client(0, soak).read(body), wanted)
            with self.subTest("it is the same engine, and the lease was enough"):
                self.assertEqual(soak.metrics()["engine_restarts"], 0)
                self.assertNotIn("engine lost", " ".join(soak.enclave.lines))
                self.assertEqual(soak.enclave.pids()["engine"], soak.pids["engine"])
                soak.owner("lock")
        if IS_RELEASE:
            RESULT.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    unittest.main()
