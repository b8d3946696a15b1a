"""tools/bench.py: the figures that the README quotes are printed by it, and are of what runs."""

import contextlib
import io
import itertools
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import types
import unittest
from unittest import mock

import torch

import muenclave
import muprotocol as mp
from tests import guest, support

sys.path.insert(0, str(support.TOOLS))

import bench  # noqa: E402
import bench_boot  # noqa: E402
import bench_contender  # noqa: E402
import bench_decode  # noqa: E402
import bench_handshake  # noqa: E402
import bench_http  # noqa: E402
import bench_meter  # noqa: E402
import bench_model  # noqa: E402
import bench_shared as shared  # noqa: E402
import bench_unseal  # noqa: E402
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
        self.assertEqual(set(seconds), set(bench_boot.CONTENDERS))
        for name, rounds in seconds.items():
            self.assertEqual(len(rounds), 1, name)
            self.assertTrue(0 < rounds[0] < bench_boot.BOOT_SECONDS, name)

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
            bench_boot.show_boot(self.figures)
        for name in bench_boot.CONTENDERS.values():
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


class Honesty(unittest.TestCase):
    """A ratio is told only where rounds agree on it, and a target's verdict is never a guess."""

    def test_rounds_that_agree(self):
        found = shared.ratio([10, 11, 10.5], [5, 5.5, 5])
        self.assertEqual((found["ratio"], found["least"], found["most"]), (2, 2, 2.1))
        self.assertEqual(shared.tell_ratio(found), "2× (2 to 2.1)")

    def test_what_weighs_on_both_is_no_disagreement(self):
        self.assertEqual(shared.ratio([10, 20, 60], [5, 10, 30])["ratio"], 2)

    def test_rounds_that_disagree(self):
        for ours in ([10, 10, 13], [7, 10, 10], [1, 10, 100]):
            found = shared.ratio(ours, [10, 10, 10])
            self.assertIsNone(found["ratio"], ours)
            least, most = min(ours) / 10, max(ours) / 10
            self.assertEqual((found["least"], found["most"]), (least, most))
            told = shared.tell_ratio(found)
            self.assertEqual(told, f"rounds disagree ({least:.3g} to {most:.3g}): no ratio")
            line = shared.target("a", found, at_least=0.1)
            self.assertEqual((line["figure"], line["verdict"]), (None, told))

    def test_the_stated_spread_is_the_limit(self):
        self.assertIsNotNone(shared.ratio([4, 4, 5], [4, 4, 4])["ratio"])
        self.assertIsNone(shared.ratio([4, 4, 5.01], [4, 4, 4])["ratio"])
        self.assertEqual(shared.SPREAD, 0.25)

    def test_few_rounds_can_t_disagree(self):
        for count in range(1, shared.LEAST_ROUNDS):
            found = shared.ratio([1] * count, [1] * count)
            self.assertIsNone(found["ratio"])
            self.assertIn("no ratio of fewer than 3 rounds", shared.tell_ratio(found))

    def test_what_was_not_measured(self):
        self.assertIsNone(shared.ratio([], [1]))
        self.assertIsNone(shared.ratio([1], None))
        self.assertEqual(shared.tell_ratio(None), "not measured")
        self.assertEqual(shared.tell_values([]), "not measured")
        lines = [line for targets in bench.TARGETS.values() for line in targets(None)]
        self.assertGreater(len(lines), 15)
        for line in lines:
            self.assertEqual((line["figure"], line["verdict"]), (None, "not measured"))

    def test_verdicts(self):
        at_least = [shared.target("a", n, at_least=2)["verdict"] for n in (2, 1.5, 3)]
        self.assertEqual(at_least, ["met", "missed by 25%", "met"])
        at_most = [shared.target("a", n, at_most=2, unit=" ms")["verdict"] for n in (2, 3, 1)]
        self.assertEqual(at_most, ["met", "missed by 50%", "met"])
        self.assertEqual(shared.target("a", 3, at_most=2, unit=" ms")["limit"], "<= 2 ms")
        self.assertEqual(shared.target("a", shared.ratio([3] * 3, [1] * 3), 2)["verdict"], "met")

    def test_a_small_model_meets_no_target(self):
        """The table is of the shapes that it names: what a tiny model does is no figure in it."""
        rounds = {"whole": [9] * 3, "steady": [9] * 3, "first_worst": [1] * 3}
        figures = {"shape": "tiny", "device": "cpu", "ratios": {"1": {"generate": rounds}}}
        for line in bench_decode.decode_targets(figures):
            self.assertEqual(line["verdict"], "not measured")
        ratios = {name: shared.ratio([1] * 3, [1] * 3) for name in ("memmove", "age")}
        figures = {"bytes": 1000, "weights": 1000, "peak": 1000, "ratios": ratios}
        for line in bench_unseal.unseal_targets(figures):
            self.assertEqual(line["verdict"], "not measured")

    def test_a_round_s_figures(self):
        """Two streams of three tokens; both have a first from second 2 on, then 2 tokens come."""
        result = {"times": [[1, 2, 3], [2, 3, 4]], "cpu": 3}
        found = bench_decode.measure_round(result)
        expected = {"whole": 1.5, "steady": 1.5, "first_median": 1.5, "first_worst": 2}
        self.assertEqual(found, expected | {"cpu_per_token": 0.5})
        self.assertNotIn("steady", bench_decode.measure_round({"times": [[1], [1]], "cpu": 1}))
        found = bench_decode.agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 9], [8, 5, 6]])
        self.assertEqual(found, {"first": [1, 2], "all": [2, 6]})

    def test_the_best_peer_is_the_earliest(self):
        rounds = {"whole": [1] * 3, "first_worst": [4] * 3}
        streams = {"8": {"muenclave": rounds | {"first_worst": [2] * 3}, "serve": rounds}}
        streams["8"]["llama"] = rounds | {"first_worst": [1] * 3}
        best = bench_http.compare(streams)["8"]["best"]
        self.assertEqual((best["earliest"], best["first_worst"]["ratio"]), ("llama", 0.5))

    def test_an_answer_that_is_not_whole_is_no_round(self):
        good = {"times": [[1]], "finish": ["length"], "usage": [{"in": 1, "out": 4}]}
        bench_http.check_round("a", good, 4)
        bench_http.check_round("a", good | {"usage": [None]}, 4)
        for wrong in ({"times": [[]]}, {"finish": ["stop"]}, {"usage": [{"in": 1, "out": 3}]}):
            with self.assertRaisesRegex(shared.ToolError, "a: an answer ended before its time"):
                bench_http.check_round("a", good | wrong, 4)
        with self.assertRaisesRegex(shared.ToolError, "a: refused"):
            bench_http.check_round("a", {"error": "refused"}, 4)


def run_bench(*words, **options):
    """(document, what was said) of a run that writes its JSON to standard output."""
    command = [*BENCH, *map(str, words), "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def printed(show, figures):
    """What a verb prints of its figures."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        show(figures)
    return text.getvalue()


class Unseal(unittest.TestCase):
    """The product's loader, beside the others, on a tiny model."""

    def test_a_round(self):
        document, _ = run_bench("unseal", "--weights-shape", "tiny", "--rounds", 1)
        figures = document["unseal"]
        installed = [name for name in bench_unseal.PROGRAMS if shutil.which(name)]
        self.assertEqual(set(figures["left_out"]), set(bench_unseal.PROGRAMS) - set(installed))
        ways = {"muenclave", "plain", "memmove", "memmove_all", *installed}
        self.assertEqual(set(figures["seconds"]), ways)
        for seconds in figures["seconds"].values():
            self.assertEqual(len(seconds), 1)
        self.assertGreater(figures["checked"], 10)
        self.assertGreaterEqual(figures["peak"], figures["weights"])
        self.assertLess(figures["weights"], figures["bytes"])
        self.assertEqual({line["figure"] for line in document["targets"]}, {None})
        text = printed(bench_unseal.show_unseal, figures)
        for name in ways:
            self.assertIn(bench_unseal.WAYS[name], text)
        self.assertIn("no ratio of fewer than 3 rounds", text)

    def test_other_tensors_are_found_out(self):
        from safetensors.torch import load_file, save_file

        plain = bench_model.model_folder("tiny")
        sealed = bench_model.sealed_folder(plain, sys.executable)
        state = load_file(plain / "model.safetensors")
        changed = state["model.norm.weight"].clone()
        changed[-1] += 1
        with tempfile.TemporaryDirectory() as folder:
            state["model.norm.weight"] = changed
            save_file(state, pathlib.Path(folder, "model.safetensors"))
            command = bench_unseal.command(pathlib.Path(folder), sealed)
            with shared.Worker("the loader", command) as worker:
                with self.assertRaisesRegex(shared.ToolError, "another model.norm.weight"):
                    worker.ask(way="check")

    def test_a_program_that_is_not_installed(self):
        plain = bench_model.model_folder("tiny")
        with tempfile.TemporaryDirectory() as folder:
            with mock.patch.object(bench_unseal.shutil, "which", lambda _: None):
                found = bench_unseal.start_programs(plain, pathlib.Path(folder), None)
        left_out = {"age": "not installed: apt-get install age"}
        left_out |= {"gpg": "not installed: apt-get install gnupg"}
        self.assertEqual(found, ({}, left_out))


class Decode(unittest.TestCase):
    """Contenders that can run here are measured on a tiny model; they are the same model."""

    @classmethod
    def setUpClass(cls):
        names = {"shape": "tiny", "device": "cpu", "threads": 1, "prompt_tokens": 5, "tokens": 4}
        flags = types.SimpleNamespace(
            **names, rounds=1, huge_pages=False, streams=[1, 3], peers="here"
        )
        cls.said = []
        ours = lambda *_: pathlib.Path(sys.executable)  # noqa: E731  it has transformers
        with mock.patch.object(shared, "peers_python", ours):
            cls.figures = bench_decode.run_decode(flags, cls.said.append)
        cls.figures["machine"] = shared.describe_processor()

    def test_figures(self):
        streams = self.figures["streams"]
        self.assertEqual(set(streams["1"]), {"muenclave", "generate", "continuous"})
        self.assertEqual(set(streams["3"]), {"muenclave", "generate", "continuous", "static"})
        for found in streams.values():
            for rounds in found.values():
                self.assertEqual(len(rounds["whole"]), 1)
                self.assertGreater(rounds["whole"][0], 0)
                self.assertLessEqual(rounds["first_median"][0], rounds["first_worst"][0])
        self.assertEqual(len(self.figures["bandwidth"]), 1)
        self.assertGreater(self.figures["weights_bytes"], 100_000)

    def test_the_same_model(self):
        check = self.figures["float32"]
        self.assertEqual((check["equal"], check["compared"]), (bench_decode.CHECKED,) * 2)
        for name, found in self.figures["agreement"].items():
            total = 3 if name == "static" else 4
            self.assertEqual(found["first"][1], total, name)

    def test_a_peer_that_fails_is_left_out(self):
        self.assertRegex(self.figures["left_out"]["llama"], "gguf|llama_cpp")
        self.assertNotIn("llama", self.figures["peak_kib"])

    def test_what_is_printed(self):
        text = printed(bench_decode.show_decode, self.figures)
        for name in bench_decode.CONTENDERS.values():
            self.assertIn(name, text)
        self.assertIn("8 of 8 answers of ours equal generate's", text)
        self.assertIn("left out: llama.cpp: ", text)
        self.assertIn("no ratio of fewer than 3 rounds", text)

    def test_without_peers(self):
        flags = types.SimpleNamespace(peers=None)
        field = bench_decode.Field(flags, None, None)
        field.start_peers(None)
        self.assertEqual(set(field.left_out), set(bench_decode.PACKAGES))
        for reason in field.left_out.values():
            self.assertIn("--peers DIR", reason)

    def test_a_worker_that_dies(self):
        dies = (
            "import json; print(json.dumps({}), flush=True); input(); raise SystemExit('it broke')"
        )
        with shared.Worker("a peer", [sys.executable, "-c", dies]) as worker:
            with self.assertRaisesRegex(shared.ToolError, "^a peer: it broke$"):
                worker.ask(prompts=[])
        with self.assertRaisesRegex(shared.ToolError, "^a peer: no output$"):
            shared.Worker("a peer", [sys.executable, "-c", ""])


class Http(unittest.TestCase):
    """The whole path on a tiny model, by OpenAI's client."""

    def test_a_round(self):
        small = ["--shape", "tiny", "--rounds", 1, "--streams", "2", "--tokens", 6]
        document, _ = run_bench("http", *small, "--prompt-tokens", 16)
        figures = document["http"]
        self.assertEqual(set(figures["streams"]["2"]), {"muenclave"})
        rounds = figures["streams"]["2"]["muenclave"]
        self.assertGreater(rounds["whole"][0], 0)
        self.assertLessEqual(rounds["first_median"][0], rounds["first_worst"][0])
        self.assertLessEqual(rounds["first_worst"][0], rounds["seconds"][0])
        self.assertEqual(len(figures["added"]["2"]["wall"]), 1)
        self.assertGreater(figures["prompt_tokens"], bench_http.TEMPLATE)
        self.assertGreater(figures["peak_kib"]["muenclave"], 100_000)
        for reason in figures["left_out"].values():
            self.assertIn("--peers DIR", reason)
        text = printed(bench_http.show_http, figures)
        self.assertIn("our meter raised to 1,000,000,000 bytes/s", text)
        self.assertIn(bench_http.CONTENDERS["muenclave"], text)


class Handshake(unittest.TestCase):
    """Sessions with the product's gate."""

    def test_a_round(self):
        flags = types.SimpleNamespace(rounds=1, sessions=4)
        with mock.patch.object(bench_handshake, "HANDSHAKES", 2):
            figures = bench_handshake.run_handshake(flags, lambda _: None)
        self.assertLess(0, figures["verified_ms"][0])
        self.assertLess(figures["verified_ms"][0], figures["ready_ms"][0])
        self.assertLess(0, figures["many_s"][0])
        lines = bench_handshake.handshake_targets(figures)
        self.assertIsNotNone(lines[0]["figure"])
        self.assertEqual(lines[1]["verdict"], "not measured")  # 4 sessions are not 200
        figures["machine"] = shared.describe_processor()
        text = printed(bench_handshake.show_handshake, figures)
        self.assertIn("4 sessions opened", text)

    def test_more_sessions_than_places(self):
        with bench_handshake.Stand(3) as stand:
            with self.assertRaises(mp.ProtocolError):
                bench_handshake.time_many(stand, 5)


class All(unittest.TestCase):
    """Every verb; one that can't be measured does not stop the others."""

    def test_one_fails(self):
        class Wrong:
            @staticmethod
            def run(flags, say):
                raise shared.ToolError("no such thing here")

        figures = {"verified_ms": [60.0] * 3, "sessions": 200, "many_s": [8.0] * 3}
        verbs = {"unseal": (Wrong.run, None), "handshake": (lambda *_: figures, lambda _: None)}
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(bench, "VERBS", verbs):
            path = pathlib.Path(folder, "all.json")
            errors, text = io.StringIO(), io.StringIO()
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(text):
                status = bench.main(["all", "--json", str(path)])
            document = json.loads(path.read_text())
        self.assertEqual(status, 1)
        self.assertIn("bench: error: unseal: no such thing here\n", errors.getvalue())
        self.assertEqual(document["not_measured"], {"unseal": "no such thing here"})
        self.assertEqual(document["handshake"]["many_s"], [8.0] * 3)
        verdicts = {line["target"]: line["verdict"] for line in document["targets"]}
        self.assertEqual(verdicts["200 sessions opened"], "met")
        self.assertEqual(verdicts["handshake + psk evidence, median"], "missed by 100%")
        self.assertEqual(verdicts["unseal 2 GB: age -d"], "not measured")
        for line in document["targets"]:
            self.assertIn(line["target"], text.getvalue())


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
            done = subprocess.run(command, capture_output=True, text=True)  # that Python is no venv
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertRegex(done.stderr, r"\Abench: error: [^\n]*no virtual environment[^\n]*\n\Z")

    def test_no_gpu(self):
        if torch.cuda.is_available():
            self.skipTest("there is a GPU")
        command = [*BENCH, "decode", "--shape", "tiny", "--device", "cuda"]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        line = "bench: error: --device cuda: PyTorch finds no GPU here\n"
        self.assertEqual(done.stderr, line)

    def test_too_many_tokens(self):
        for verb in ("decode", "http"):
            command = [*BENCH, verb, "--shape", "tiny", "--tokens", str(bench_contender.CONTEXT)]
            done = subprocess.run(command, capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertRegex(done.stderr, r"\Abench: error: at most \d+ tokens a stream[^\n]+\n\Z")

    def test_no_packages(self):
        told = "^this Python has no no_such_package: pip install 'muenclave"
        with self.assertRaisesRegex(shared.ToolError, told):
            shared.need_modules("json", "no_such_package")

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
