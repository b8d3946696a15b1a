"""The proxy's audit log: every exchange is in it, and it is the chain that the enclave tells of."""

import collections
import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import unittest

import muprotocol as mp
import muproxy
from tests.support import ROOT, SECONDS, Enclave, make_site, own, proxy, until

import ledger  # isort: skip  of tools, which tests.support has put on the path

FIRST = bytes(32).hex()  # the chain's head before its first exchange
ONE_THREAD = {"ENCLAVE_THREADS": "1"}
ENDLESS = {"prompt": "The", "temperature": 2, "seed": 1, "max_tokens": 900}
site = enclave = folder = None


def setUpModule():
    global site, enclave, folder
    place = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(place.cleanup)
    folder = pathlib.Path(place.name)
    site = make_site(folder)
    enclave = Enclave(site, environment=ONE_THREAD)
    unittest.addModuleCleanup(enclave.end)
    enclave.unlock()


def token():
    return muproxy.read_token(site.token)


def vocabulary():
    return muproxy.read_vocabulary(site.vocabulary)


def entries(path):
    """The exchanges in a log."""
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def head(target=None):
    """The chain's head, as an enclave tells its owner."""
    with contextlib.closing((target or enclave).session("owner")) as session:
        fields = session_token(target or enclave)
        return session.prove(fields)["head"]


def session_token(target):
    """An unlock token without a lease."""
    fields = target.unlock_token()
    return {name: fields[name] for name in ("key", "model")}


@contextlib.contextmanager
def engine_held(target=None):
    """The engine stands still during the block. Gives the function that lets it go on."""
    engine = (target or enclave).pids()["engine"]
    state = pathlib.Path(f"/proc/{engine}/stat")
    os.kill(engine, signal.SIGSTOP)
    try:
        until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
        yield lambda: os.kill(engine, signal.SIGCONT)
    finally:
        os.kill(engine, signal.SIGCONT)


class Case(unittest.TestCase):
    """A log of this test's own; what is in it has to follow."""

    def setUp(self):
        place = tempfile.TemporaryDirectory()
        self.addCleanup(place.cleanup)
        self.log = pathlib.Path(place.name) / "audit.log"

    def check_chain(self, found, before, after, neutral=None):
        """The entries are all exchanges between two heads, each as the enclave has chained it.

        neutral: what a verified lease adds to each request.
        """
        links, cancelled = {}, ("token_refused", "cancelled")
        for entry in found:
            self.assertEqual(set(entry), {"lease", "request", "ids", "ending", "heads"})
            self.assertIn("seed", entry["request"])
            first, last = entry["heads"]
            request = entry["request"] | (neutral or {})
            # Whoever is struck from the lease has the answer cancelled that he was getting.
            ending = entry["ending"] if entry["ending"] not in cancelled else "cancelled"
            facts = (entry["lease"], request, entry["ids"], ending)
            self.assertEqual(mp.chain(bytes.fromhex(first), *facts).hex(), last, entry)
            self.assertNotIn(first, links)
            links[first] = last
        while before in links:
            before = links.pop(before)
        self.assertEqual((before, links), (after, {}))


class File(Case):
    """The file by itself."""

    ENTRY = {"lease": "00" * 16, "request": {"prompt": "\u00e9\n", "seed": 1}, "ids": [1, 2]}

    @contextlib.contextmanager
    def size_limit(self, size):
        """No file may grow beyond so many bytes: as a full disk, but it needs no root."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_private_and_appended_to(self):
        for number in range(3):
            muproxy.AuditLog(self.log).write(self.ENTRY | {"number": number})
        self.assertEqual(self.log.stat().st_mode & 0o777, 0o600)
        found = entries(self.log)
        self.assertEqual(found, [self.ENTRY | {"number": number} for number in range(3)])
        for mode in (0o640, 0o604):
            self.log.chmod(mode)
            with self.assertRaisesRegex(muproxy.Failure, "chmod 600"):
                muproxy.AuditLog(self.log)
        self.assertEqual(entries(self.log), found)

    def test_a_line_that_was_cut_short_spoils_no_other(self):
        muproxy.AuditLog(self.log).write(self.ENTRY)
        with open(self.log, "ab") as file:
            file.write(b'{"lease":"00')
        for _ in range(2):
            muproxy.AuditLog(self.log).write(self.ENTRY)
        lines = self.log.read_text().splitlines()
        self.assertEqual(lines.pop(1), '{"lease":"00')
        self.assertEqual([json.loads(line) for line in lines], [self.ENTRY] * 3)

    def test_threads(self):
        log, count = muproxy.AuditLog(self.log), 40
        rng = random.Random(3)
        made = [self.ENTRY | {"ids": [n] * rng.randrange(3000)} for n in range(count)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(log.write, made))
        order = sorted(entries(self.log), key=lambda entry: made.index(entry))
        self.assertEqual(order, made)

    def test_full_disk(self):
        """Wherever in a line the room ends: nothing is lost, nothing twice, all told each time."""
        log = muproxy.AuditLog(self.log)
        log.write(self.ENTRY)
        length = self.log.stat().st_size
        for room in (0, 1, length - 1):
            before = entries(self.log)
            size = self.log.stat().st_size
            with self.size_limit(size + room):
                for attempt in (self.ENTRY | {"room": room}, None, self.ENTRY | {"room": -room}):
                    with self.assertRaisesRegex(
                        muproxy.Failure, "File too large: an exchange is not logged"
                    ):
                        log.write(attempt)
                self.assertEqual(self.log.stat().st_size, size + room)
            log.write()
            added = [self.ENTRY | {"room": room}, self.ENTRY | {"room": -room}]
            self.assertEqual(entries(self.log), before + added)


class Exchanges(Case):
    """Sessions of ours with the module's enclave."""

    @contextlib.contextmanager
    def session(self, target=None, **wanted):
        """A user's session that logs."""
        record = muproxy.AuditLog(self.log).write
        with contextlib.closing((target or enclave).session(record=record, **wanted)) as session:
            session.prove({"token": token()})
            yield session

    def test_every_way_in_which_an_exchange_ends(self):
        """Length, stop string, cancelled before and after its first ids, refused."""
        before = head()
        with self.session() as session:
            table = vocabulary()
            text = "".join(session.generate({"prompt": "The", "max_new_tokens": 30}, table))
            again = session.entry["request"]
            stop = text[5:8]
            self.assertNotIn(stop, "".join(session.generate(again, table, [stop])))
            self.assertEqual(session.final["finish_reason"], "stop")
            request = {name: ENDLESS[name] for name in ("prompt", "temperature", "seed")}
            pieces = session.generate(request, table)
            next(pieces)
            pieces.close()
            lists = session.exchange(request, table)
            first = next(lists)
            self.assertTrue(mp.is_readable(session.link.socket, SECONDS))  # what nobody will see
            lists.close()
            self.assertEqual(list(session.exchange(request, table, lambda: True)), [])
            for code, wrong in (
                ("prompt_too_long", {"prompt": "word " * 3000}),
                ("too_many_tokens", {"prompt": "a", "max_new_tokens": 1 << 20}),
            ):
                with self.assertRaises(mp.ProtocolError) as caught:
                    list(session.exchange(wrong, table))
                self.assertEqual(caught.exception.code, code)
            with self.assertRaises(mp.ProtocolError) as caught:
                list(session.exchange({"prompt": "a", "temprature": 1}, table))
            self.assertEqual(caught.exception.code, "bad_message")
            with self.assertRaises(mp.ProtocolError) as caught:
                list(session.exchange({"prompt": "a" * mp.REQUEST_FRAME}, table))
        found = entries(self.log)
        wrong = found.pop()
        self.assertEqual((wrong["ending"], wrong["heads"], wrong["ids"]), ("bad_message", None, []))
        endings = ["length", "cancelled", "cancelled", "cancelled", "cancelled"]
        endings += ["prompt_too_long", "too_many_tokens"]
        self.assertEqual([entry["ending"] for entry in found], endings)
        self.assertEqual(len(found[0]["ids"]), 30)
        self.assertEqual(found[3]["ids"][: len(first)], first)
        self.assertGreater(len(found[3]["ids"]), len(first))
        self.assertEqual(found[5]["request"]["prompt"], "word " * 3000)
        self.check_chain(found, before, head())

    def test_a_seed_each(self):
        """Ours, another one each time, unless the user gave one."""
        with self.session() as session:
            for given in ({}, {}, {"seed": 7}):
                request = {"prompt": "The", "max_new_tokens": 2} | given
                list(session.generate(request, vocabulary()))
        first, second, third = (entry["request"]["seed"] for entry in entries(self.log))
        self.assertTrue(mp.SAMPLING["seed?"](first) and mp.SAMPLING["seed?"](second))
        self.assertNotEqual(first, second)
        self.assertEqual(third, 7)

    def test_lost_connection(self):
        """What came is in the log; nobody has told how it ended."""
        with self.session() as session:
            lists = session.exchange({"prompt": "The", "max_new_tokens": 900}, vocabulary())
            came = [next(lists)]
            session.link.shutdown(socket.SHUT_RDWR)
            with self.assertRaises(mp.ProtocolError) as caught:
                came += lists
            self.assertEqual(caught.exception.code, "connection_lost")
        (entry,) = entries(self.log)
        self.assertEqual(entry["ids"][: len(came[0])], came[0])
        self.assertEqual((entry["ending"], entry["heads"]), (None, None))

    def test_engine_that_dies(self):
        before = head()
        said = len(enclave.lines)
        with self.session() as session:
            request = {"prompt": "The", "temperature": 2, "seed": 1}
            lists = session.exchange(request, vocabulary())
            next(lists)
            os.kill(enclave.pids()["engine"], signal.SIGKILL)
            with self.assertRaises(mp.ProtocolError) as caught:
                list(lists)
            self.assertEqual(caught.exception.code, "engine_lost")
        enclave.wait_for("ready", said)
        found = entries(self.log)
        self.assertEqual([entry["ending"] for entry in found], ["engine_lost"])
        self.check_chain(found, before, head())

    def test_user_who_is_struck_from_the_lease(self):
        with Enclave(site, environment=ONE_THREAD) as extra:
            extra.unlock()
            with (
                contextlib.closing(extra.session("owner")) as owner,
                self.session(extra) as session,
            ):
                owner.prove(session_token(extra))
                request = {name: ENDLESS[name] for name in ("prompt", "temperature", "seed")}
                lists = session.exchange(request, vocabulary())
                next(lists)
                owner.command({"revoke": mp.token_hash(token())})
                with self.assertRaises(mp.ProtocolError) as caught:
                    list(lists)
                self.assertEqual(caught.exception.code, "token_refused")
            found = entries(self.log)
            self.assertEqual([entry["ending"] for entry in found], ["token_refused"])
            self.check_chain(found, FIRST, head(extra))

    def test_verified_lease(self):
        """What the lease adds to a request is not in the log, since it is not what was asked."""
        policy = {"verified": True, "latency_ms": 0, "shape": "plain"}
        with Enclave(site, environment=ONE_THREAD) as extra:
            extra.unlock(policy=policy)
            with self.session(extra) as session:
                request = {"prompt": "The", "max_new_tokens": 5, "temperature": 1}
                self.assertTrue("".join(session.generate(request, vocabulary())))
                with self.assertRaises(mp.ProtocolError) as caught:
                    list(session.exchange(request | {"top_k": 5}, vocabulary()))
                self.assertEqual(caught.exception.code, "policy_refused")
            found = entries(self.log)
            refused = found.pop()
            self.assertEqual((refused["ending"], refused["heads"]), ("policy_refused", None))
            self.check_chain(found, FIRST, head(extra), mp.NEUTRAL)

    def test_cells_that_hold_nothing(self):
        """A constant shape sends them while an engine says nothing: no part of an answer."""
        policy = {"verified": False, "latency_ms": 0, "shape": "constant"}
        inlet = muproxy.Inlet(10**9, 1 << 30)
        with Enclave(site, environment=ONE_THREAD) as extra:
            extra.unlock(policy=policy)
            with self.session(extra, inlet=inlet) as session:
                request, before = {"prompt": "The", "max_new_tokens": 5}, inlet.received
                lists = session.exchange(request, vocabulary())
                with engine_held(extra) as go_on, concurrent.futures.ThreadPoolExecutor() as pool:
                    done = pool.submit(list, lists)
                    until(lambda: inlet.received >= before + 5 * mp.CELL)
                    go_on()
                    came = done.result(SECONDS)
            self.assertTrue(all(came))
            (entry,) = found = entries(self.log)
            self.assertEqual(sum(came, []), entry["ids"])
            self.check_chain(found, FIRST, head(extra))

    def test_an_owner_has_an_entry_scored(self):
        """Through the same door: what was answered here follows from its request and seed."""
        with self.session() as session:
            list(session.generate({"prompt": "The", "max_new_tokens": 9}, vocabulary()))
        (entry,) = entries(self.log)
        score = {"ids": entry["ids"], "tolerance": 0.01}
        with contextlib.closing(enclave.session("owner")) as owner:
            owner.prove(session_token(enclave))
            codes = sum(owner.exchange(entry["request"] | {"score": score}, mp.CODES), [])
            self.assertEqual(codes[::2], [0] * (len(codes) // 2))
            self.assertGreaterEqual(len(codes), 2 * len(entry["ids"]))
            score["ids"] = [(score["ids"][0] + 1) % len(vocabulary()), *score["ids"][1:]]
            codes = sum(owner.exchange(entry["request"] | {"score": score}, mp.CODES), [])
            self.assertGreater(codes[0], 0)
            self.assertEqual(owner.entry["heads"], owner.final["heads"])

    def test_end_of_the_lease(self):
        """In the midst of answers: each has its place in the chain, with what was delivered."""
        with Enclave(site, environment=ONE_THREAD) as extra:
            extra.unlock(budget=600)
            with contextlib.ExitStack() as stack:
                sessions = [stack.enter_context(self.session(extra)) for _ in range(3)]
                codes = []

                def use(session):
                    request = {"prompt": "The", "temperature": 2, "seed": 1}
                    with self.assertRaises(mp.ProtocolError) as caught:
                        while True:
                            list(session.exchange(request, vocabulary()))
                    codes.append(caught.exception.code)

                with concurrent.futures.ThreadPoolExecutor(3) as pool:
                    list(pool.map(use, sessions))
        self.assertLessEqual(set(codes), {"lease_ended", "connection_lost"})
        found = [entry for entry in entries(self.log) if entry["heads"]]
        for entry in entries(self.log):  # who asked too late has had no exchange
            self.assertTrue(entry["heads"] or not entry["ids"], entry)
        ended = [entry for entry in found if entry["ending"] == "lease_ended"]
        self.assertTrue(any(entry["ids"] for entry in ended))
        lasts = {entry["heads"][1] for entry in found} - {entry["heads"][0] for entry in found}
        self.assertEqual(len(lasts), 1)
        self.check_chain(found, FIRST, *lasts)


class Programs(Case):
    """`muproxy serve` and `muproxy chat` with the flag, before the module's enclave."""

    def setUp(self):
        super().setUp()
        self.table = ["--vocabulary", site.vocabulary]
        self.flags = [*enclave.flags(), "--audit-log", self.log, "--rate-kb", 10**6]
        self.ledger = self.log.with_name("ledger")
        self.talk = [*self.flags, *self.table, "--token-file", site.token]

    def serve(self):
        """`muproxy serve` in the background; its process, whose address is `self.place`."""
        command = [sys.executable, "-B", "-m", "muproxy", "serve", *self.flags, *self.table]
        command = [*map(str, command), "--listen", "127.0.0.1:0"]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.addCleanup(process.__exit__, None, None, None)
        self.addCleanup(process.kill)
        line = ""
        while not re.search(r" on [\d.]+:\d+$", line):
            line = process.stderr.readline()
            self.assertTrue(line)
        self.place = line.split()[-1]
        return process

    def ask(self, **fields):
        """(status, object) of a completion; of a stream, the last event's."""
        with contextlib.closing(self.request(**fields)) as connection:
            reply = connection.getresponse()
            events = [line for line in reply.read().decode().splitlines() if line]
        events = [event.removeprefix("data: ") for event in events if event != "data: [DONE]"]
        return reply.status, json.loads(events[-1])

    def request(self, **fields):
        """A connection on which a completion was asked for."""
        connection = http.client.HTTPConnection(self.place, timeout=SECONDS)
        names = {"Authorization": f"Bearer {token()}", "Content-Type": "application/json"}
        body = {"model": "demo", "prompt": "The", "max_tokens": 20} | fields
        connection.request("POST", "/v1/completions", json.dumps(body), names)
        return connection

    def is_idle(self):
        """Whether the proxy has no request under way."""
        connection = http.client.HTTPConnection(self.place, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            return b"muproxy_requests_running 0\n" in connection.getresponse().read()

    def test_from_the_first_exchange_to_the_last(self):
        """One log of `serve` and `chat`, from a fresh enclave to its closing statement: whole
        answers, streams, stop strings, clients that hang up, refusals, four at once.
        """
        with Enclave(site, environment=ONE_THREAD) as extra:
            flags = [*extra.flags("owner"), "--ledger", self.ledger]
            lease = ["--token-file", site.token, "--rate", 10**9, "--budget", 10**6]
            done = own("unlock", *flags, *lease, "--new-ledger", "--lifetime-budget", 10**7)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.flags[:2] = ["--port", extra.port]
            self.talk[:2] = ["--port", extra.port]
            server = self.serve()
            status, whole = self.ask(temperature=0, max_tokens=40)
            self.assertEqual(status, 200)
            stop = whole["choices"][0]["text"][20:24]
            for is_stream in (False, True):
                self.assertEqual(self.ask(temperature=0, stream=is_stream)[0], 200)
                answer = self.ask(temperature=0, max_tokens=40, stream=is_stream, stop=stop)[1]
                self.assertEqual(answer["choices"][0]["finish_reason"], "stop")
            self.assertEqual(self.ask(prompt="word " * 3000)[0], 400)
            with contextlib.closing(self.request(**ENDLESS, stream=True)) as connection:
                connection.getresponse().readline()
            until(self.is_idle)
            with engine_held(extra):
                self.request(**ENDLESS).close()
                until(self.is_idle)
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                statuses = list(pool.map(lambda _: self.ask()[0], range(8)))
            self.assertEqual(statuses, [200] * 8)
            prompts = folder / "prompts"
            prompts.write_text(json.dumps(["Tell me about zen.", "word " * 5000, "Hello"]))
            done = proxy(*self.talk, "--prompts-file", prompts, "--max-tokens", 12)
            self.assertEqual(done.returncode, 1, done.stderr)
            self.assertEqual(len(json.loads(done.stdout)), 3)
            done = proxy(*self.talk, "--stop", "e", input="Tell me about zen.\nquit\n")
            self.assertEqual(done.returncode, 0, done.stderr)
            done = own("lock", *flags)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            server.terminate()
            self.assertEqual(server.wait(SECONDS), 0)
        with ledger.Ledger(self.ledger) as book:
            closing = book.events[-1]
        self.assertEqual(closing["event"], "close")
        found = entries(self.log)
        self.check_chain(found, FIRST, closing["head"])
        endings = collections.Counter(entry["ending"] for entry in found)
        self.assertEqual(endings["prompt_too_long"], 2)
        self.assertGreaterEqual(endings["cancelled"], 2)
        self.assertEqual(len(found), 5 + 1 + 2 + 8 + 3 + 1)

    def test_disk_that_is_full_for_a_while(self):
        """Nothing is answered that is not in the log, nothing more is asked for until it is."""
        process, before = self.serve(), head()
        self.assertEqual(self.ask()[0], 200)
        limit = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        size = self.log.stat().st_size + 10
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, limit[1]))
        status, body = self.ask()
        self.assertEqual((status, body["error"]["type"]), (503, "server_error"))
        self.assertNotIn(str(self.log), json.dumps(body))
        seen = head()
        self.assertEqual(self.ask()[0], 503)
        self.assertEqual(self.ask(stream=True)[0], 503)
        self.assertEqual(head(), seen)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit)
        self.assertEqual(self.ask()[0], 200)
        process.terminate()
        self.assertEqual(process.wait(SECONDS), 0)
        said = process.stderr.read()
        lines = re.findall(f"(?m)^muproxy: error: {self.log}: File too large: .*$", said)
        self.assertEqual(len(lines), 3, said)
        self.assertNotIn("Traceback", said)
        self.check_chain(entries(self.log), before, head())

    def test_stream_that_can_not_be_logged_ends_with_the_error(self):
        process = self.serve()
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))
        status, last = self.ask(stream=True)
        self.assertEqual((status, last["error"]["type"]), (200, "server_error"))

    def test_chat_that_can_not_log(self):
        """The answers before stay; one line says why no more come."""
        prompts = folder / "two"
        prompts.write_text("The\nHello\nThe\n")
        done = proxy(*self.talk, "--prompts-file", prompts, "--max-tokens", 4)
        self.assertEqual((done.returncode, len(json.loads(done.stdout))), (0, 3), done.stderr)
        first = len(self.log.read_bytes().splitlines(keepends=True)[0])
        self.log.unlink()

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (first + 50, first + 50))

        flags = [*self.talk, "--prompts-file", prompts, "--max-tokens", 4]
        done = proxy(*flags, preexec_fn=limit)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertEqual([result["prompt"] for result in json.loads(done.stdout)], ["The"])
        self.assertRegex(done.stderr, r"(?m)^muproxy: error: .*audit\.log: File too large: .*$")
        self.assertNotIn("Traceback", done.stderr)

    def test_end_of_the_proxy_waits_for_answers(self):
        process, before = self.serve(), head()
        with engine_held() as go_on, contextlib.closing(self.request()) as connection:
            until(lambda: not self.is_idle())
            process.terminate()
            self.assertIn("stopped", process.stderr.readline())
            go_on()
            reply = connection.getresponse()
            self.assertEqual(reply.status, 200)
            self.assertEqual(json.load(reply)["usage"]["completion_tokens"], 20)
        self.assertEqual(process.wait(SECONDS), 0)
        found = entries(self.log)
        self.assertEqual([entry["ending"] for entry in found], ["length"])
        self.check_chain(found, before, head())

    def test_refusals(self):
        for verb, pattern, flags in (
            ("chat", "--vocabulary FILE: ", ["--token-file", site.token]),
            ("serve", "--vocabulary FILE: ", ["--listen", "127.0.0.1:0"]),
            ("serve", "No such file", ["--audit-log", folder / "no" / "x", *self.table]),
            ("serve", "others can read it; chmod 600", ["--audit-log", "/dev/null", *self.table]),
        ):
            done = proxy(verb, *self.flags, *flags)
            self.assertEqual((done.returncode, done.stdout), (2, ""), done.stderr)
            self.assertRegex(done.stderr, rf"\Amuproxy: error: [^\n]*{pattern}[^\n]*\n\Z")


if __name__ == "__main__":
    unittest.main()
