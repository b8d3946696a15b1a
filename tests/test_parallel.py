"""A model over several processes: whole enclaves whose engine has two ranks, confined."""

import contextlib
import logging
import os
import pathlib
import re
import signal
import tempfile
import threading
import time
import unittest
import warnings

import torch
import transformers

import muprotocol as mp
import muproxy
from tests import support
from tests.test_loading import sealed_model

RANKS = 2
REQUESTS = (
    {"prompt": "Beautiful is", "temperature": 0, "max_new_tokens": 24},
    {"messages": [{"role": "user", "content": "Hello?"}], "temperature": 0, "max_new_tokens": 24},
    {"prompt": "The assert " * 90, "temperature": 0, "max_new_tokens": 12},
    {"prompt": "zen", "temperature": 0.8, "seed": 5, "top_p": 0.9, "max_new_tokens": 24},
)


def setUpModule():
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    logging.getLogger("accelerate").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="Current model requires")


def engines(enclave):
    """The process ids of an enclave's engine, its first rank first, which starts the others."""
    parents = {}
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"--engine" in (process / "cmdline").read_bytes().split(b"\0"):
                words = (process / "stat").read_text().rpartition(")")[2].split()
                parents[int(process.name)] = int(words[1])
    (first,) = [pid for pid, parent in parents.items() if parent == enclave.process.pid]
    return [first, *sorted(pid for pid, parent in parents.items() if parent == first)]


def ask(enclave, request):
    """The ids of an answer."""
    with enclave.ready() as session:
        table = muproxy.read_vocabulary(enclave.site.vocabulary)
        return [token for ids in session.exchange(request, table) for token in ids]


def ask_all(enclave):
    """The ids of all answers, asked for at once."""
    found = {}

    def work(number):
        found[number] = ask(enclave, REQUESTS[number])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(REQUESTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(support.SECONDS)
    return [found.get(number) for number in range(len(REQUESTS))]


def processor_seconds(pid):
    """What a process has used of the processors."""
    words = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


class Ranks(unittest.TestCase):
    """Two ranks by gloo, confined by seccomp."""

    @classmethod
    def setUpClass(cls):
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cls.site = support.make_site(folder, sealed_model(folder, 2, torch.float32))
        flags = ("--threads", "1", "--context", "512")
        with support.Enclave(cls.site, *flags) as one:
            one.unlock()
            cls.wanted = ask_all(one)
        ranks = ("--ranks", str(RANKS))
        cls.enclave = stack.enter_context(support.Enclave(cls.site, *flags, *ranks))
        cls.enclave.unlock()

    def test_the_tokens_are_those_of_one_process(self):
        self.assertEqual(len(engines(self.enclave)), RANKS)
        for request, ids in zip(REQUESTS, self.wanted):
            self.assertTrue(0 < len(ids) <= request["max_new_tokens"])
        self.assertEqual(ask_all(self.enclave), self.wanted)

    def test_every_rank_is_confined_and_has_the_same_arena(self):
        arenas = set()
        for pid in engines(self.enclave):
            for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
                self.assertIn("\nSeccomp:\t2\n", (task / "status").read_text())
            maps = pathlib.Path(f"/proc/{pid}/maps").read_text()
            (line,) = [line for line in maps.splitlines() if "/memfd:arena" in line]
            self.assertTrue(line.split()[1] == "r--p", line)
            arenas.add(line.split()[4])
        self.assertEqual(len(arenas), 1)

    def test_where_ranks_meet_is_this_machine_s_own(self):
        sockets = set()
        for pid in engines(self.enclave):
            links = (os.readlink(path) for path in pathlib.Path(f"/proc/{pid}/fd").iterdir())
            sockets |= {
                found[1] for found in map(re.compile(r"socket:\[(\d+)").match, links) if found
            }
        addresses = []
        for name in ("tcp", "tcp6"):
            lines = pathlib.Path("/proc/net", name).read_text().splitlines()[1:]
            words = [line.split() for line in lines]
            addresses += [line[1].split(":")[0] for line in words if line[9] in sockets]
        self.assertGreater(len(addresses), 2)  # so they are found
        mapped = "0000000000000000FFFF0000"  # an address of IPv4 in one of IPv6
        self.assertEqual({text.removeprefix(mapped) for text in addresses}, {"0100007F"})

    def test_idle_ranks_sleep(self):
        pids = engines(self.enclave)
        before = [processor_seconds(pid) for pid in pids]
        time.sleep(3)
        for pid, seconds in zip(pids, before, strict=True):
            self.assertLess(processor_seconds(pid) - seconds, 1)

    def test_the_death_of_any_is_the_engine_s(self):
        for rank in range(RANKS):
            with self.subTest(rank=rank):
                said, before = len(self.enclave.lines), engines(self.enclave)
                os.kill(before[rank], signal.SIGKILL)
                self.enclave.wait_for("engine lost", said)
                self.enclave.wait_for("ready", said)
                self.assertFalse({*before} & {*engines(self.enclave)})
                self.assertEqual(ask(self.enclave, REQUESTS[0]), self.wanted[0])

    def test_a_rank_that_dies_while_it_answers(self):
        said = len(self.enclave.lines)
        with self.enclave.ready() as session:
            table = muproxy.read_vocabulary(self.site.vocabulary)
            stream = session.generate({"prompt": "a", "temperature": 1.9, "seed": 1}, table)
            next(stream)
            os.kill(engines(self.enclave)[1], signal.SIGKILL)
            with self.assertRaises(mp.ProtocolError) as caught:
                for _ in stream:
                    pass
            self.assertEqual(caught.exception.code, "engine_lost")
        self.enclave.wait_for("ready", said)
        self.assertEqual(ask(self.enclave, REQUESTS[0]), self.wanted[0])


if __name__ == "__main__":
    unittest.main()
