"""Sealed weights in memory: how much of it loader and engine take, what is locked, what is refused.

The processes are the real ones, each started as init starts it; what the gate says, the test says.
"""

import contextlib
import json
import os
import pathlib
import re
import resource
import shutil
import socket
import tempfile
import unittest
import warnings

import torch
import transformers

import muenclave
import muprotocol as mp
from tests import support

import weights  # isort: skip  (from tools/, which tests.support has put on the path)

CHUNKS = 4 << 20  # bytes: what two workers hold at a time, sealed and plain
# Layers of the two models, alike otherwise, whose difference in memory is what the weights take.
SMALL, LARGE = 1, 9
SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 64}
SHAPE |= {"num_attention_heads": 8, "num_key_value_heads": 4}
NO_MORE_LOCKED = (4096, 4096)


def setUpModule():
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    warnings.filterwarnings("ignore", message="The given buffer is not writable")


def sealed_model(folder, layers, dtype=torch.float32):
    """A sealed model of random weights beside the demo's tokenizer, as support.Sealed."""
    source, plain = support.demo_model(), folder / f"plain-{layers}"
    config = transformers.LlamaConfig.from_pretrained(source)
    for name, value in (SHAPE | {"num_hidden_layers": layers}).items():
        setattr(config, name, value)
    config.dtype = dtype
    torch.manual_seed(layers)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(plain, max_shard_size="40MB")
    for path in source.iterdir():
        if not (plain / path.name).exists() and path.suffix != ".safetensors":
            shutil.copy(path, plain)
    model, key = folder / f"{layers}.mus", folder / f"{layers}.key"
    support.seal(plain, model, "--key", key, "--asset", "test").check()
    return support.Sealed(plain, model, key, pathlib.Path(f"{model}.vocab"))


class Loader:
    """The real loader of a sealed model, run to its end: `engine` is the socket with the arena.

    peak: the most memory that it had, bytes.
    """

    def __init__(self, sealed):
        header = mp.read_header(str(sealed.model))
        key = support.owner.read_key_file(sealed.key, None)[1]
        gate, for_gate = socket.socketpair()
        self.engine, for_engine = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = os.environ | muenclave.DEFAULTS | {"MODEL_PATH": str(sealed.model)}
        process = muenclave.spawn("loader", settings, for_gate, for_engine)
        self.told = []
        with gate:
            gate.sendall(mp.frame(header) + mp.frame(key))
            while (message := mp.read_frame(gate, mp.MESSAGE_LIMIT, support.SECONDS))[:1] == b"p":
                self.told.append(message[1])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        self.peak = usage.ru_maxrss << 10


@contextlib.contextmanager
def engine_of(sealed):
    """The real engine process, ready with the model, and the pipe to it."""
    loader = Loader(sealed)
    gate, for_gate = socket.socketpair()
    settings = os.environ | muenclave.DEFAULTS | {"ENCLAVE_THREADS": "1"}
    settings |= {"ENCLAVE_SLOTS": "1", "ENCLAVE_CONTEXT": "16"}  # a cache of next to nothing
    process = muenclave.spawn("engine", settings, for_gate, loader.engine)
    try:
        with gate:
            gate.settimeout(support.SECONDS)
            gate.sendall(mp.frame(b"llama"))
            kind, _, _ = mp.PIPE.unpack(mp.read_exactly(gate, mp.PIPE.size))
            assert kind == mp.LOADED
            yield process
    finally:
        process.kill()
        process.wait()


def memory(process, name):
    """A field of /proc/PID/status, bytes."""
    lines = pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def span(view):
    """The addresses of a memory, a range."""
    flat = torch.frombuffer(view, dtype=torch.uint8)
    return range(flat.data_ptr(), flat.data_ptr() + len(flat))


def build(files):
    """(model, facts) of files in the arena."""
    fields, facts = (json.loads(bytes(files[name])) for name in ("config.json", "model.json"))
    state, place = muenclave.read_state(files, facts["tensors"]), {"device_map": "cpu"}
    model = muenclave.build_model(fields, state, place)
    return model, facts


class Sizes(unittest.TestCase):
    """The weights are in memory once."""

    @classmethod
    def setUpClass(cls):
        folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.sealed = {layers: sealed_model(folder, layers) for layers in (SMALL, LARGE)}
        sizes = {n: sealed.model.stat().st_size for n, sealed in cls.sealed.items()}
        cls.more = sizes[LARGE] - sizes[SMALL]
        assert cls.more > 10 * CHUNKS

    def test_the_loader_holds_a_chunk_a_worker(self):
        peaks = {}
        for layers, sealed in self.sealed.items():
            loader = Loader(sealed)
            loader.engine.close()
            peaks[layers] = loader.peak
            self.assertLessEqual(len(loader.told), 10 + os.cpu_count())
            self.assertEqual(loader.told, sorted(loader.told))
        self.assertLess(peaks[LARGE] - peaks[SMALL], CHUNKS)

    def test_locked_as_far_as_the_limit_allows(self):
        """Within the usual limit of 8 MiB the demo model is locked whoever starts it."""
        locked = []
        for sealed in (support.sealed_demo(), self.sealed[LARGE]):
            with engine_of(sealed) as process:
                size, length = memory(process, "VmLck"), sealed.model.stat().st_size
                limits = pathlib.Path(f"/proc/{process.pid}/limits").read_text()
            limit = re.search(r"Max locked memory +(\S+)", limits)[1]
            locked.append(limit == "unlimited" or int(limit) >= length)
            if locked[-1]:
                self.assertGreater(size, 0.99 * length)
            else:
                self.assertEqual(size, 0)
        self.assertTrue(locked[0], "needs a limit of locked memory that is above 2 MiB")

    def test_the_engine_holds_the_weights_once(self):
        peaks = {}
        for layers, sealed in self.sealed.items():
            with engine_of(sealed) as process:
                peaks[layers] = memory(process, "VmHWM")
        self.assertLess(peaks[LARGE] - peaks[SMALL], 1.1 * self.more)
        self.assertGreater(peaks[LARGE] - peaks[SMALL], 0.9 * self.more)  # so it is all looked at

    if not hasattr(unittest.TestCase, "enterClassContext"):  # before Python 3.11

        @classmethod
        def enterClassContext(cls, manager):
            value = manager.__enter__()
            cls.addClassCleanup(manager.__exit__, None, None, None)
            return value


class Views(unittest.TestCase):
    """The model's tensors are views into the arena, whatever their dtype, in shards or not."""

    def arena(self, sealed):
        with Loader(sealed).engine as engine:
            files = muenclave.map_arena(engine)
        return files, span(next(iter(files.values())).obj)

    def check(self, dtype, shards):
        files, arena = self.arena(support.sealed_demo(dtype, shards))
        model, facts = build(files)
        stored = {entry[0] for entry in facts["tensors"]}
        parameters = dict(model.named_parameters())
        self.assertEqual(parameters.keys(), stored)
        for name, tensor in parameters.items():
            self.assertEqual(tensor.dtype, getattr(torch, dtype), name)
            self.assertIn(tensor.data_ptr(), arena, name)
        return files

    def test_bfloat16(self):
        self.check("bfloat16", 1)

    def test_float16_in_shards(self):
        self.check("float16", 3)

    def test_float32_in_shards(self):
        self.check("float32", 3)

    def test_nothing_can_be_written(self):
        files = self.check("bfloat16", 3)
        self.assertTrue(all(view.readonly for view in files.values()))

    def test_a_limit_of_locked_memory(self):
        """A process that may not lock the arena maps it all the same."""
        with Loader(support.sealed_demo()).engine as engine:
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    resource.setrlimit(resource.RLIMIT_MEMLOCK, NO_MORE_LOCKED)
                    muenclave.set_capabilities(())
                    files = muenclave.map_arena(engine)
                    os._exit(0 if json.loads(bytes(files["config.json"])) else 2)
                os._exit(1)
            self.assertEqual(os.waitpid(child, 0)[1], 0)


class Stored(unittest.TestCase):
    """Tensors that would have to grow are not sealed."""

    def test_as_they_are(self):
        for said in ({}, {"dtype": "bfloat16"}, {"torch_dtype": "float16"}, {"dtype": "new"}):
            weights.check_types([["a", "BF16"], ["b", "F32"], ["c", "U8"]], said)
        weights.check_types([["a", "F32"], ["b", "F32"]], {"dtype": "bfloat16"})

    def test_refused(self):
        for said, tensors in (
            ({}, [["a", "BF16"], ["b", "F8_E4M3"]]),
            ({"dtype": "float32"}, [["a", "F32"], ["b", "BF16"]]),
            ({"torch_dtype": "bfloat16"}, [["b", "F8_E5M2"], ["a", "BF16"]]),
        ):
            with self.assertRaisesRegex(ValueError, "^b: it would not stay as it is stored"):
                weights.check_types(tensors, said)

    def test_sealing(self):
        """A model whose config asks for more than its file holds."""
        with tempfile.TemporaryDirectory() as folder:
            model = pathlib.Path(folder, "model")
            shutil.copytree(support.demo_model(), model)
            config = json.loads((model / "config.json").read_text())
            wide = {"dtype": "float64", "torch_dtype": "float64"}
            (model / "config.json").write_text(json.dumps(config | wide))
            done = support.seal(model, f"{folder}/m.mus", "--key", f"{folder}/m.key")
            self.assertEqual((done.status, done.out), (1, ""))
            self.assertRegex(done.err, r"\Aseal: error: .*stay as it is stored.*\n\Z")
            self.assertEqual(list(pathlib.Path(folder).iterdir()), [model])


if __name__ == "__main__":
    unittest.main()
