"""The engine: weights, prompts and tokens against transformers; then its process, confined.

What runs in this process is the engine's own code; Engine starts the real process on sockets of
ours, and Answers go through a whole enclave.
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import random
import secrets
import socket
import struct
import sys
import tempfile
import threading
import types
import unittest
from unittest import mock

import torch
import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import muenclave
import muprotocol as mp
from tests import support

sys.path.insert(0, str(support.TOOLS))

import prompting  # noqa: E402
import seal  # noqa: E402
import weights  # noqa: E402

SETTINGS = muenclave.DEFAULTS | {"ENCLAVE_THREADS": "1"}
CPU = {"device_map": "cpu"}
SPECIAL = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|pad|>")
MARKS = ("<think>", "</think>")
CHAT = [{"role": "user", "content": "Tell me about zen."}]
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def setUpModule():
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)


def files_of(folder):
    """{file name: bytes} of a model directory."""
    return {path.name: memoryview(bytearray(path.read_bytes())) for path in folder.iterdir()}


def prompts_of(files, template=""):
    """prompts.json, as an object, of {file name: bytes} of a tokenizer, as sealing makes it."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for name, data in (files | {"chat_template.jinja": template.encode()}).items():
            (folder / name).write_bytes(data)
        settings = [name for name in seal.SETTINGS if name in files]
        settings = {name: seal.read_settings(folder / name) for name in settings}
        return json.loads(seal.read_prompts(folder, settings))


@functools.cache
def demo_files(dtype="float32"):
    """The files of the demo model. Not to be changed: `demo_files() | {...}` makes others."""
    return types.MappingProxyType(files_of(support.demo_model(dtype)))


@functools.cache
def demo_tokenizer():
    """transformers' tokenizer of the demo model."""
    return transformers.AutoTokenizer.from_pretrained(support.demo_model())


def reference(folder):
    """The model of a plaintext directory, as transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def greedy(model, ids, count, **options):
    """What transformers' generate answers to a prompt, without the end of the answer."""
    tokens = torch.tensor([ids])
    options |= {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0}
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    found = found[0, len(ids) :].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return found[:-1] if found and found[-1] in ends else found


@contextlib.contextmanager
def loaded(sealed):
    """The files in the arena that the real loader makes of a sealed model."""
    header = mp.read_header(str(sealed.model))
    key = support.owner.read_key_file(sealed.key, None)[1]
    gate, for_gate = socket.socketpair()
    engine, for_engine = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    settings = os.environ | SETTINGS | {"MODEL_PATH": str(sealed.model)}
    process = muenclave.spawn("loader", settings, for_gate, for_engine)
    with gate, engine:
        gate.sendall(mp.frame(header) + mp.frame(key))
        while mp.read_frame(gate, mp.MESSAGE_LIMIT, support.SECONDS)[:1] == b"p":
            pass
        yield muenclave.map_arena(engine)
    assert process.wait(support.SECONDS) == 0


def load(files):
    """The engine's model of files in memory."""
    fields, facts = (json.loads(bytes(files[name])) for name in ("config.json", seal.FACTS))
    model = muenclave.build_model(fields, muenclave.read_state(files, facts["tensors"]), CPU)
    model.facts = facts
    return model


class Ids:
    """In a prompter's place: requests that bring their ids."""

    def encode(self, request):
        """The prompt's ids."""
        return list(request["ids"])


def decoder(model, prompter=None, slots=4, context=4096):
    """A decoder whose messages stay in its `out`."""
    settings = SETTINGS | {"ENCLAVE_SLOTS": str(slots), "ENCLAVE_CONTEXT": str(context)}
    facts = getattr(model, "facts", None) or facts_of(model)
    return muenclave.Decoder(model, facts, prompter or Ids(), settings, None)


def heard(data):
    """{slot: (ids, how it ended)} of the engine's messages."""
    streams = collections.defaultdict(lambda: ([], []))
    for kind, slot, value in mp.PIPE.iter_unpack(bytes(data)):
        if kind == mp.ID:
            streams[slot][0].append(value)
        elif kind == mp.END:
            streams[slot][1].append(mp.ENDINGS[value])
        elif kind == mp.REFUSED:
            streams[slot][1].append(mp.REFUSALS[value])
        else:
            assert kind == mp.LENGTH, kind
    return {slot: (ids, *ended) for slot, (ids, ended) in streams.items()}


def answers(decoder, requests):
    """What a decoder says to requests that come at once, by their order."""
    for slot, request in enumerate(requests):
        decoder.take({"seed": 0, "slot": slot} | request)
    while decoder.streams:
        decoder.step()
    found = heard(decoder.out)
    decoder.out.clear()
    return [found[slot] for slot in range(len(requests))]


def tiny(model_type="llama", seed=0, **fields):
    """A model of an architecture with large random weights, so that nothing in it is negligible."""
    torch.manual_seed(seed)
    config = transformers.CONFIG_MAPPING[model_type](**TINY | fields)
    model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            parameter.data.normal_(0, 0.2)
    return model


def facts_of(model, generation=None):
    """model.json of a model as sealing makes it; with an end of answers that never comes."""
    fields = model.config.to_dict()
    if fields["eos_token_id"] is None:
        fields["eos_token_id"] = 1 << 20
    return weights.make_facts([], fields, generation or {})


def rebuilt(model, generation=None, **fields):
    """The engine's model of the same weights, with what a generation_config.json says."""
    config = model.config.to_dict() | fields
    built = muenclave.build_model(config, model.state_dict(), CPU)
    built.facts = facts_of(built, generation)
    return built


# ---------------------------------------------------------------- weights


class Weights(unittest.TestCase):
    """From the arena come the tensors and tokens that transformers has from the directory."""

    def check_model(self, dtype, shards):
        sealed = support.sealed_demo(dtype, shards)
        expected = reference(sealed.demo)
        with loaded(sealed) as files:
            names = [name for name in files if name.endswith(".safetensors")]
            self.assertEqual(len(names) > 1, shards > 1, names)
            model = load(files)
        self.assertIs(type(model), type(expected))
        for kind in ("named_parameters", "named_buffers"):
            got, wanted = (
                dict(getattr(m, kind)(remove_duplicate=False)) for m in (model, expected)
            )
            self.assertEqual(got.keys(), wanted.keys())
            for name, tensor in wanted.items():
                self.assertEqual(got[name].dtype, tensor.dtype, name)
                self.assertTrue(torch.equal(got[name], tensor), name)
        self.assertNotIn("model.rotary_emb.inv_freq", expected.state_dict())
        self.assertEqual(model.model.rotary_emb.inv_freq.dtype, torch.float32)
        self.assertIs(model.lm_head.weight, model.model.embed_tokens.weight)
        self.assertEqual(next(model.parameters()).dtype, getattr(torch, dtype))
        tokenizer = demo_tokenizer()
        prompts = [tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]]
        prompts += [tokenizer(text)["input_ids"] for text in ("Beautiful is", "A", "x" * 700)]
        for prompt in prompts:  # one at a time, as generate has it
            got = answers(decoder(model), [{"ids": prompt, "max_new_tokens": 24}])
            self.assertEqual(got[0][0], greedy(expected, prompt, 24))

    def test_bfloat16(self):
        self.check_model("bfloat16", 1)

    def test_float32(self):
        self.check_model("float32", 1)

    def test_bfloat16_in_shards(self):
        self.check_model("bfloat16", 3)

    def test_float32_in_shards(self):
        self.check_model("float32", 3)

    def test_each_tensor_is_in_one_shard(self):
        with loaded(support.sealed_demo("bfloat16", 3)) as files:
            files = {name: bytearray(data) for name, data in files.items()}
        load(files)
        facts = json.loads(bytes(files[seal.FACTS]))
        last = max(tensor[3] for tensor in facts["tensors"])
        facts["tensors"] = [tensor for tensor in facts["tensors"] if tensor[3] != last]
        files[seal.FACTS] = json.dumps(facts).encode()
        with self.assertRaisesRegex(ValueError, "not this config's"):
            load(files)

    def test_tensors_that_are_not_the_config_s(self):
        model = tiny(tie_word_embeddings=False)
        state, fields = model.state_dict(), model.config.to_dict()
        muenclave.build_model(fields, state, CPU)
        missing = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
        more = state | {"model.layers.2.mlp.up_proj.weight": torch.zeros(96, 64)}
        other = state | {"lm_head.weight": torch.zeros(128, 65)}
        for bad in (missing, more, other):
            with self.assertRaises((ValueError, RuntimeError)):
                muenclave.build_model(fields, bad, CPU)
        named = fields | {"auto_map": {"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}}
        built = muenclave.build_model(named, state, CPU)  # no code is looked for
        self.assertIs(type(built), type(model))


class Places(unittest.TestCase):
    """A model is where its memory allows it, by layers, and never on a disk."""

    def test_by_layers(self):
        """What spreads a model finds a place for all of it: here the only one, the processor."""
        model = tiny()
        spread = self.build(model, {"cpu": 1 << 30})
        ids = torch.tensor([[1, 2, 3, 4]])
        with torch.no_grad():
            self.assertTrue(torch.equal(spread(ids).logits, rebuilt(model)(ids).logits))
        requests = [{"ids": [1, 2, 3, 4], "max_new_tokens": 8}] * 2
        spread.facts = facts_of(spread)
        apart, whole = (answers(decoder(one), requests) for one in (spread, rebuilt(model)))
        self.assertEqual(apart, whole)

    def test_more_than_there_is(self):
        size = sum(tensor.nbytes for tensor in tiny().state_dict().values())
        for room in ({}, {"cpu": size - 1}):
            with self.assertRaises(MemoryError):
                self.build(tiny(), room)

    def test_a_map_with_a_disk_is_refused(self):
        """Room enough for the tensors, but not for what the model has beside them."""
        size = sum(tensor.nbytes for tensor in tiny().state_dict().values())
        with self.assertRaisesRegex(ValueError, "offload_folder"):
            self.build(tiny(), {"cpu": size})

    def test_no_gpu(self):
        with mock.patch.object(torch.cuda, "device_count", lambda: 0):
            place = muenclave.find_place("auto")
        self.assertEqual(place, {"device_map": "auto", "max_memory": {}})
        self.assertEqual(muenclave.find_place("cuda"), {"device_map": "cuda"})

    def test_each_layer_s_cache_is_where_its_keys_are(self):
        cache = muenclave.SlotCache(2, 8)
        cache.index = torch.tensor([[1]]), torch.tensor([[0, 1, 2]])
        cache.view, cache.span = slice(1, 2), 3
        for layer, device in enumerate(("cpu", "meta")):
            keys = torch.ones(1, 4, 3, 5, device=device)
            found = cache.update(keys, keys, layer)
            self.assertEqual(
                {(part.device.type, part.shape) for part in found}, {(device, keys.shape)}
            )
        self.assertTrue(torch.equal(cache.layers[0][0][1, :, :3], torch.ones(4, 3, 5)))

    def build(self, model, room):
        """It, spread over what has so much room."""
        place = {"device_map": "auto", "max_memory": room}
        return muenclave.build_model(model.config.to_dict(), model.state_dict(), place)


class Architectures(unittest.TestCase):
    """In slots of one cache an architecture answers as transformers does, or not at all."""

    KNOWN = {
        "llama": {"tie_word_embeddings": False},
        "llama, tied": {"tie_word_embeddings": True},
        "llama, biases": {"attention_bias": True, "mlp_bias": True},
        "llama, llama3 rope": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        "llama, yarn": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        "llama, dynamic": {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        },
        "mistral": {"sliding_window": None},
        "qwen2": {},
        "qwen3": {"head_dim": 16},
        "gemma2": {"head_dim": 16},
        "gemma3_text": {"head_dim": 16},
        "gpt2": {},
        "phi3": {},
        "gpt_neox": {},
        "mixtral": {"num_local_experts": 4},
    }
    LIMITED = {  # in these, what lies behind is not attended to, or turns all positions
        "mistral": {"sliding_window": 24},
        "gemma3_text": {"head_dim": 16, "sliding_window": 24},
        "phi3": {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.0] * 8,
                "long_factor": [3.0] * 8,
            },
            "original_max_position_embeddings": 24,
        },
    }
    REFUSED = {
        "mamba": AttributeError,  # a state of another kind than keys and values
        "jamba": AttributeError,
        "bloom": ValueError,  # positions by a mask of its own
        "bert": ValueError,  # looks at what comes later
        "gptj": RuntimeError,
    }
    LENGTHS = (1, 5, 9, 30, 3, 60)
    CHUNK = 16  # so that prompts are taken in parts

    def setUp(self):
        self.addCleanup(setattr, muenclave, "CHUNK", muenclave.CHUNK)
        muenclave.CHUNK = self.CHUNK

    def check_tokens(self, model, lengths, count=12):
        draw = random.Random(1)
        prompts = [[draw.randrange(128) for _ in range(length)] for length in lengths]
        batch = decoder(rebuilt(model))
        requests = [{"ids": ids, "max_new_tokens": count} for ids in prompts]
        for prompt, got in zip(prompts, answers(batch, requests)):
            self.assertEqual(got, (greedy(model, prompt, count), "length"))
        return batch

    def test_known(self):
        for name, fields in self.KNOWN.items():
            with self.subTest(architecture=name):
                batch = self.check_tokens(tiny(name.partition(",")[0], **fields), self.LENGTHS)
                self.assertEqual(batch.context, 128)

    def test_window_and_long_positions_limit_the_context(self):
        for name, fields in self.LIMITED.items():
            with self.subTest(architecture=name):
                batch = self.check_tokens(tiny(name, **fields), (1, 5, 9, 12, 3))
                self.assertEqual(batch.context, 24)
                requests = [{"ids": [1] * 24}, {"ids": [1] * 20, "max_new_tokens": 5}]
                refusals = [([], "prompt_too_long"), ([], "too_many_tokens")]
                self.assertEqual(answers(batch, requests), refusals)

    def test_others_are_refused_before_they_answer(self):
        for name, error in self.REFUSED.items():
            with self.subTest(architecture=name), self.assertRaises(error):
                decoder(rebuilt(tiny(name)))

    def test_a_cache_that_errs_is_found_out(self):
        """What is refused is refused for its numbers too, not only for a method it misses."""
        model = rebuilt(tiny())
        update = muenclave.SlotCache.update
        self.addCleanup(setattr, muenclave.SlotCache, "update", update)
        decoder(model)

        def shifted(cache, *arguments, **options):
            keys, values = update(cache, *arguments, **options)
            return keys, values.roll(1, 2)

        muenclave.SlotCache.update = shifted
        with self.assertRaises(ValueError):
            decoder(model)

    def test_generation_config_that_can_t_be_used(self):
        model = tiny()
        for wrong in ({"temperature": "hot"}, {"top_k": -1}, {"repetition_penalty": 0.0}):
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, "generation_config.json"):
                facts_of(model, {"do_sample": True} | wrong)


class Headers(unittest.TestCase):
    """A safetensors file that lies is an error, whatever the lie."""

    GOOD = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    }
    ERRORS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # the engine's too

    def file(self, header, size=22, length=None):
        data = header if isinstance(header, bytes) else json.dumps(header).encode()
        count = len(data) if length is None else length
        return count.to_bytes(8, "little") + data + bytes(size)

    def changed(self, name, **fields):
        return self.file(self.GOOD | {name: self.GOOD[name] | fields})

    def test_good(self):
        entries = weights.safetensors_entries(self.file(self.GOOD | {"__metadata__": {"x": "y"}}))
        self.assertEqual(
            [entry[:3] for entry in entries], [("a", "F32", [2, 2]), ("b", "BF16", [3])]
        )
        start = entries[0][3]
        self.assertEqual([entry[3:] for entry in entries], [(start, 16), (start + 16, 6)])
        padded = json.dumps(self.GOOD).encode() + b"   "
        self.assertEqual(len(weights.safetensors_entries(self.file(padded))), 2)

    def lies(self):
        """(what it is, a file)."""
        yield "overlap", self.changed("b", data_offsets=[15, 21])
        yield "gap", self.changed("b", data_offsets=[17, 23])
        yield "gap at the start", self.changed("a", data_offsets=[1, 17])
        yield "span too short", self.changed("a", shape=[2, 3])
        yield "span too long", self.changed("a", shape=[2, 1])
        yield "backwards", self.changed("b", data_offsets=[22, 16])
        yield "negative start", self.changed("a", data_offsets=[-1, 15])
        yield "negative shape", self.changed("a", shape=[-2, -2])
        yield "huge shape", self.changed("a", shape=[1 << 62, 4])
        yield "shape beyond any integer", self.changed("a", shape=[10**400])
        yield "shape that wraps around", self.changed("a", shape=[1 << 32, 1 << 32, 4])
        yield "huge offset", self.changed("b", data_offsets=[16, 1 << 60])
        yield "true for one", self.changed("a", shape=[2, 2, True])
        yield "float", self.changed("a", shape=[2.0, 2])
        yield "float offset", self.changed("a", data_offsets=[0.0, 16])
        yield "false for nought", self.changed("a", data_offsets=[False, 16])
        yield "text offset", self.changed("a", data_offsets=["0", "16"])
        yield "shape that is none", self.changed("a", shape=4)
        yield "shape as text", self.changed("a", shape="22")
        yield "shape as object", self.changed("a", shape={"2": 2})
        yield "null shape", self.changed("a", shape=None)
        yield "three offsets", self.changed("a", data_offsets=[0, 16, 16])
        yield "one offset", self.changed("a", data_offsets=[0])
        yield "unknown dtype", self.changed("a", dtype="F33")
        yield "dtype in lower case", self.changed("a", dtype="f32")
        yield "dtype as list", self.changed("a", dtype=["F32"])
        yield "null dtype", self.changed("a", dtype=None)
        for field in self.GOOD["a"]:
            entry = {name: value for name, value in self.GOOD["a"].items() if name != field}
            yield f"no {field}", self.file(self.GOOD | {"a": entry})
        for entry in (None, 1, "x", [], [0, 16], True):
            yield f"entry {entry!r}", self.file(self.GOOD | {"a": entry})
        twice = json.dumps(self.GOOD)[:-1] + "," + json.dumps(self.GOOD)[1:]
        yield "duplicate names", self.file(twice.encode())
        field = json.dumps(self.GOOD).replace('"dtype": "F32"', '"dtype": "U8", "dtype": "F32"')
        yield "duplicate fields", self.file(field.encode())
        yield "trailing bytes", self.file(self.GOOD, 23)
        yield "truncated", self.file(self.GOOD, 21)
        yield "no data", self.file(self.GOOD, 0)
        whole = len(json.dumps(self.GOOD))
        yield "header longer than the file", self.file(self.GOOD, length=whole + 23)
        yield "header of all bytes", self.file(self.GOOD, length=(1 << 64) - 1)
        yield "header too short", self.file(self.GOOD, length=whole - 1)
        yield "header of no bytes", self.file(self.GOOD, length=0)
        yield "no file", b""
        yield "seven bytes", bytes(7)
        yield "deep", self.file(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", 0)
        yield "not JSON", self.file(b"{'a': 1}")
        yield "not UTF-8", self.file(b'{"\xff": 1}')
        yield "UTF-16", self.file(json.dumps(self.GOOD).encode("utf-16"))
        yield "a list", self.file(b"[]", 0)
        yield "a number", self.file(b"12", 0)
        yield "a long number", self.file(b'{"a":' + b"9" * 5000 + b"}", 0)

    def test_lies(self):
        lies = list(self.lies())
        self.assertGreater(len(lies), 50)
        for name, data in lies:
            with self.subTest(lie=name), self.assertRaises(self.ERRORS):
                weights.safetensors_entries(memoryview(data))
            with self.subTest(lie=name, reader="engine"), self.assertRaises(self.ERRORS):
                muenclave.read_state({"model.safetensors": memoryview(bytearray(data))})


# ---------------------------------------------------------------- prompts

LLAMA = """{{- bos_token }}{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" }}{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim }}
{{- '<|eot_id|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"""
MISTRAL = """{%- set ns = namespace(system='', index=0) %}{{- bos_token }}
{%- macro inst(text) %}{{- '[INST] ' ~ text ~ ' [/INST]' }}{%- endmacro %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- set ns.system = message['content'] + '\n\n' %}{%- else %}
{%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{%- endif %}{%- set ns.index = ns.index + 1 %}
{%- if message['role'] == 'user' %}
{{- inst(ns.system + message['content']) }}{%- set ns.system = '' %}
{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endif %}{%- endfor %}"""
GEMMA = """{{ bos_token }}{% for message in messages %}
{{- '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
JSON = (
    """{% for message in messages %}{{ message | tojson }}<sep> <mask>{% endfor %}{{ eos_token }}"""
)
TEMPLATES = (LLAMA, CHATML, MISTRAL, GEMMA, JSON)
CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<start_of_turn>")
CONTROL += ("<end_of_turn>", *SPECIAL)
WORDS = """the of Zen zen is better than never. It's a naïve Straße, 你好 世界 — مرحبا שלום
    👩\u200d🔬 e\u0301 12345 3.14 don't HELLO http://x.y/z?a=b {"k": [1]} {{x}} {%y%} <b> <| |>
    [INST <s >  eot_id ▁ Ġ <0x41> \ufffd \x00 \u200b \u00a0 \u3000""".split(" ")
GAPS = (" ", " ", " ", "  ", "\n", "\n\n", "\n\n\n", "\t", "\r\n", "", "   ")


def trained(kind):
    """A small tokenizer of this kind as the text of its tokenizer.json; all know CONTROL."""
    texts = [*WORDS, "the zen of better things is that they are never worse"] * 3
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    options = {"vocab_size": 900, "special_tokens": special, "show_progress": False}
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trainer = trainers.BpeTrainer(**options)
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    elif kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    elif kind == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend("▁")] if kind == "prepend" else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(texts, trainer)
    add_marks(tokenizer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    if kind == "white":
        spaces = ("\n", "\n\n", "\n\n\n", "\t")
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in spaces])
    start = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [start])
    fields = json.loads(tokenizer.to_str())
    added = [token for token in fields["added_tokens"] if token["content"][:3] != "<0x"]
    return json.dumps(fields | {"added_tokens": added})


def add_marks(tokenizer):
    """Add special tokens, also some that take the white space beside them."""
    tokenizer.add_special_tokens(list(CONTROL))
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.add_special_tokens([AddedToken("<sep>", rstrip=True)])


KINDS = ("bytes", "prepend", "first", "white", "unigram")


@functools.cache
def tokenizer_files(kind):
    """The files of a tokenizer: the demo model's with more tokens, or one of KINDS."""
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    if kind == "demo":
        tokenizer = Tokenizer.from_str(bytes(demo_files()["tokenizer.json"]).decode())
        add_marks(tokenizer)
        text = tokenizer.to_str()
        names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    else:
        text = trained(kind)
    config = json.dumps(names | {"add_bos_token": True}).encode()
    return {"tokenizer.json": text.encode(), "tokenizer_config.json": config}


@functools.cache
def prompter(kind, template=CHATML):
    """The engine's prompter for a tokenizer and a template."""
    return muenclave.Prompter(prompts_of(tokenizer_files(kind), template))


@functools.cache
def known_by_transformers(kind):
    """transformers' tokenizer of the same files."""
    files = tokenizer_files(kind)
    names = json.loads(files["tokenizer_config.json"])
    whole = Tokenizer.from_str(files["tokenizer.json"].decode())
    del names["add_bos_token"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=whole, **names)


def random_text(draw):
    """Text with white space of all kinds, also at its ends, that spells no added token."""
    while True:
        parts = [draw.choice(GAPS)]
        for _ in range(draw.randrange(12)):
            parts += [draw.choice(WORDS), draw.choice(GAPS)]
        text = "".join(parts)
        if not any(mark in text for mark in (*CONTROL, *MARKS, "<unk>", "<mask>", "<sep>")):
            return text


def random_chat(draw):
    """A harmless chat, with a system message or without, that ends with the user."""
    count = 2 * draw.randrange(3) + 1
    chat = [
        {"role": ("user", "assistant")[n % 2], "content": random_text(draw)} for n in range(count)
    ]
    system = [{"role": "system", "content": random_text(draw)}]
    return system + chat if draw.random() < 0.5 else chat


class Prompts(unittest.TestCase):
    """Ids are those of transformers, except that text from outside is never more than text."""

    CHATS = 60  # for each tokenizer and template

    def added(self, kind):
        """{id: text} of a tokenizer's added tokens, without white space and what is unknown."""
        tokens = json.loads(tokenizer_files(kind)["tokenizer.json"])["added_tokens"]
        found = {token["id"]: token["content"] for token in tokens}
        return {n: text for n, text in found.items() if text.strip() and text != "<unk>"}

    def test_harmless_chats(self):
        for kind, template in itertools.product(("demo", *KINDS), TEMPLATES):
            draw = random.Random(f"{kind} {template}")
            ours, theirs = prompter(kind, template), known_by_transformers(kind)
            for _ in range(self.CHATS):
                chat = random_chat(draw)
                wanted = theirs.apply_chat_template(
                    chat, chat_template=template, add_generation_prompt=True, return_dict=False
                )
                self.assertEqual(ours.encode({"messages": chat}), wanted, (kind, template, chat))

    def test_date(self):
        dated = {"messages": CHAT, "date": "1 May 2031"}
        wanted = known_by_transformers("demo").apply_chat_template(
            CHAT,
            chat_template=LLAMA,
            add_generation_prompt=True,
            return_dict=False,
            date_string="1 May 2031",
        )
        ours = prompter("demo", LLAMA)
        self.assertEqual(ours.encode(dated), wanted)
        self.assertNotEqual(ours.encode({"messages": CHAT}), wanted)
        self.assertEqual(
            prompter("demo").encode(dated), prompter("demo").encode({"messages": CHAT})
        )

    def test_harmless_prompts(self):
        for kind in ("demo", *KINDS):
            draw = random.Random(kind)
            for _ in range(self.CHATS):
                text = random_text(draw)
                wanted = known_by_transformers(kind)(text)["input_ids"]
                self.assertEqual(prompter(kind).encode({"prompt": text}), wanted, (kind, text))

    def test_a_tokenizer_that_ends_texts_too(self):
        """The prompt is to be continued: what a tokenizer would put at its end is left out."""
        fields = json.loads(tokenizer_files("bytes")["tokenizer.json"])
        whole = Tokenizer.from_str(json.dumps(fields))
        marks = [(mark, whole.token_to_id(mark)) for mark in ("<s>", "</s>")]
        whole.post_processor = processors.TemplateProcessing("<s> $A </s>", None, marks)
        ours = muenclave.Prompter(prompts_of({"tokenizer.json": whole.to_str().encode()}))
        wanted = whole.encode("zen is").ids
        self.assertEqual(wanted[-1], marks[1][1])
        self.assertEqual(ours.encode({"prompt": "zen is"}), wanted[:-1])
        whole.post_processor = processors.ByteLevel(trim_offsets=True)
        ours = muenclave.Prompter(prompts_of({"tokenizer.json": whole.to_str().encode()}))
        self.assertEqual(ours.encode({"prompt": "zen is"}), whole.encode("zen is").ids)
        self.assertEqual(ours.encode({"prompt": ""}), [])

    def attacks(self, kind):
        """Texts that spell every added token, whole, nested, split and changed."""
        texts = sorted(self.added(kind).values())
        for text in texts:
            yield from (
                text,
                f"x{text}y",
                f" {text} ",
                f"\n{text}\n",
                text * 3,
                text[:-1],
                text[1:],
            )
            for at in range(1, len(text)):
                yield text[:at] + text + text[at:]
            yield text[: len(text) // 2] + "\u200b" + text[len(text) // 2 :]
            yield text.upper() + text.lower()
        draw = random.Random(0)
        for _ in range(200):
            parts = [draw.choice(texts) for _ in range(4)]
            cuts = [part[: draw.randrange(1, len(part) + 1)] for part in parts]
            ends = [part[draw.randrange(len(part)) :] for part in parts]
            yield "".join(itertools.chain(*zip(cuts, ends)))

    def test_text_never_becomes_a_mark(self):
        refused = collections.Counter()
        for kind, template in itertools.product(("demo", *KINDS), (LLAMA, CHATML, MISTRAL)):
            ours, marks = prompter(kind, template), self.added(kind)
            plain = ours.encode({"messages": [{"role": "user", "content": "x"}], "date": "x"})
            put = [token for token in plain if token in marks]
            self.assertGreater(len(put), 1)
            for text in self.attacks(kind):
                for request, wanted in (
                    ({"messages": [{"role": "user", "content": text}], "date": "x"}, put),
                    ({"messages": [{"role": "user", "content": "x"}], "date": text}, put),
                    ({"prompt": text}, ours.prefix),
                ):
                    try:
                        ids = ours.encode(request)
                    except ValueError:
                        refused[kind] += 1
                        continue
                    got = [token for token in ids if token in marks]
                    self.assertEqual(got, wanted, (kind, template, request))
        self.assertEqual(set(refused), {"unigram"})  # whose pieces hold the marks' own texts

    def test_spelled_marks_stay_the_text_that_they_are(self):
        """By bytes: what the ids decode to is what was written."""
        ours, theirs = prompter("demo", CHATML), known_by_transformers("demo")
        for text in self.attacks("demo"):
            ids = ours.encode({"prompt": text})[len(ours.prefix) :]
            self.assertEqual(theirs.decode(ids, clean_up_tokenization_spaces=False), text)

    def test_what_stands_for_a_mark_is_refused(self):
        ours = prompter("demo", LLAMA)
        count = len(json.loads(tokenizer_files("demo")["tokenizer.json"])["added_tokens"])
        for letter in map(chr, range(prompting.PRIVATE, prompting.PRIVATE + 2 * count)):
            for request in (
                {"prompt": f"a{letter}b"},
                {"messages": [{"role": "user", "content": letter}]},
                {"messages": CHAT, "date": letter},
            ):
                with self.assertRaises(ValueError):
                    ours.encode(request)
        for letter in ("\ue000", "\uf8ff", "\U000f0001", "\U0010fffd"):  # others' private ones
            wanted = known_by_transformers("demo")(letter)["input_ids"]
            self.assertEqual(ours.encode({"prompt": letter}), wanted)

    def test_templates_of_tokenizer_config(self):
        base = {name: demo_files()[name] for name in ("tokenizer.json", "tokenizer_config.json")}
        config = json.loads(bytes(base["tokenizer_config.json"]))
        wanted = prompter("demo", LLAMA).encode({"messages": CHAT})
        changed = json.dumps(config | {"chat_template": LLAMA, "unk_token": None}).encode()
        ours = muenclave.Prompter(prompts_of(base | {"tokenizer_config.json": changed}))
        self.assertEqual(ours.encode({"messages": CHAT}), wanted)
        ours = muenclave.Prompter(
            prompts_of(base)
        )  # without any, a chat is refused and a prompt is not
        self.assertEqual(ours.encode({"messages": CHAT}), [])
        self.assertGreater(len(ours.encode({"prompt": "a"})), 1)

    def test_special_tokens_as_objects(self):
        token = {"content": "</s>", "lstrip": False, "__type": "AddedToken"}
        changed = {"special_tokens_map.json": json.dumps({"eos_token": token}).encode()}
        files = tokenizer_files("bytes") | changed
        ours = muenclave.Prompter(prompts_of(files, "{{ eos_token }}"))
        wanted = Tokenizer.from_str(trained("bytes")).token_to_id("</s>")
        self.assertEqual(ours.encode({"messages": CHAT}), [wanted])

    BROKEN = (
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set n = namespace(__class__=1) %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].absent.deeper }}",
        "{{ absent() }}",
        "{{ strftime_now('%Y') }}",
        "{{ 1 // 0 }}",
        "{% for n in range(10 ** 9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'other' %}",
        "{{ '{:10}'.format(1, 2, absent) ~ '%d' | format('x') }}",
        "",
    )

    def test_templates_that_fail(self):
        model = tiny(vocab_size=1200)
        for template in self.BROKEN:
            with self.subTest(template=template):
                batch = decoder(rebuilt(model), prompter("demo", template))
                got = answers(batch, [{"messages": CHAT}, {"prompt": "a", "max_new_tokens": 2}])
                self.assertEqual(got[0], ([], "prompt_invalid"))
                self.assertEqual((len(got[1][0]), got[1][1]), (2, "length"))

    def test_ids_that_the_model_does_not_have(self):
        batch = decoder(rebuilt(tiny(vocab_size=128)), prompter("demo", LLAMA))
        requests = [{"messages": CHAT}, {"prompt": "!", "max_new_tokens": 1}]
        self.assertEqual([end for _, end in answers(batch, requests)], ["prompt_invalid", "length"])


# ---------------------------------------------------------------- generation


def noise_of(seed, position, size):
    """The noise (size,) that is added to a stream's scores."""
    stream = types.SimpleNamespace(seed=seed, ids=[0] * position)
    return muenclave.gumbel([stream], size, "cpu")[0]


class Sampling(unittest.TestCase):
    """Tokens are drawn from the distribution that was asked for, by nothing but the seed."""

    LOGITS = [2.0, 1.5, 1.0, 0.0, -0.5, 0.7, 0.2, -3.0]
    DRAWS = 4000
    WORST = 0.001  # probability of a test statistic as large as any here, were the draws right

    def draw(self, streams):
        logits = torch.tensor([self.LOGITS] * len(streams))
        streams = [types.SimpleNamespace(**weights.NEUTRAL | {"ids": [0]} | s) for s in streams]
        return muenclave.score(streams, logits).argmax(-1).tolist()

    def check_distribution(self, found, weights):
        """Pearson's test of outcomes against weights; its p-value by the regularised gamma."""
        weights = torch.tensor(weights, dtype=torch.double)
        expected = weights / weights.sum() * len(found)
        counts = torch.tensor([found.count(n) for n in range(len(weights))])
        self.assertEqual(int(counts[expected == 0].sum()), 0)
        counts, expected = counts[expected > 0], expected[expected > 0]
        if len(counts) == 1:
            return
        statistic = ((counts - expected) ** 2 / expected).sum() / 2
        freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.double)
        self.assertGreater(float(torch.special.gammaincc(freedom, statistic)), self.WORST)

    def softmax(self, temperature):
        return [math.exp(logit / temperature) for logit in self.LOGITS]

    def test_over_seeds(self):
        for temperature in (0.5, 1.0, 3.0):
            streams = [{"seed": seed, "temperature": temperature} for seed in range(self.DRAWS)]
            self.check_distribution(self.draw(streams), self.softmax(temperature))

    def test_over_positions(self):
        for seed in (0, 1, (1 << 63) - 1):
            streams = [{"seed": seed, "ids": [0] * n} for n in range(self.DRAWS // 4)]
            self.check_distribution(self.draw(streams), self.softmax(1.0))

    def test_neighbours_are_independent(self):
        for step in ("seed", "position"):
            first = [{"seed": seed, "ids": [0] * 9} for seed in range(self.DRAWS)]
            second = [
                {"seed": s["seed"] + (step == "seed"), "ids": [0] * (9 + (step == "position"))}
                for s in first
            ]
            pairs = [a * 8 + b for a, b in zip(self.draw(first), self.draw(second))]
            weights = self.softmax(1.0)
            self.check_distribution(pairs, [a * b for a in weights for b in weights])

    def test_the_test_itself(self):
        streams = [{"seed": seed, "temperature": 1.1} for seed in range(self.DRAWS)]
        with self.assertRaises(AssertionError):
            self.check_distribution(self.draw(streams), self.softmax(1.0))

    def test_top_k_and_top_p(self):
        order = sorted(range(8), key=lambda n: -self.LOGITS[n])
        weights = self.softmax(1.0)
        for options, count in (
            ({"top_k": 1}, 1),
            ({"top_k": 3}, 3),
            ({"top_k": 1 << 20}, 8),
            ({"top_p": 1e-6}, 1),
            ({"top_p": 0.7}, 3),  # 0.38 + 0.23 + 0.14
            ({"top_p": 1}, 8),
            ({"top_k": 2, "top_p": 0.99}, 2),
        ):
            found = self.draw([{"seed": seed} | options for seed in range(self.DRAWS)])
            kept = [weight * (n in order[:count]) for n, weight in enumerate(weights)]
            self.check_distribution(found, kept)

    def test_temperature_of_nought_and_nearly(self):
        for temperature in (0, 0.0, 5e-324, 1e-40, 1e-9, 1e-5, 1e-3):
            streams = [{"seed": seed, "temperature": temperature} for seed in range(50)]
            self.assertEqual(self.draw(streams), [0] * 50, temperature)

    def test_noise_is_a_function_of_seed_position_and_token(self):
        """Fixed numbers: an answer can be re-scored by another build as long as these hold."""
        noise = noise_of(7, 3, 5)
        self.assertTrue(torch.equal(noise, noise_of(7, 3, 9)[:5]))
        u = self.uniforms(7, 3, 5)
        wanted = torch.tensor([-math.log(-math.log(x)) for x in u])
        self.assertTrue(torch.allclose(noise, wanted, atol=5e-5))

    def test_noise_is_integer_arithmetic(self):
        """The same fixed numbers in Python's integers, exactly, also far out in both tails."""
        lower, upper = mp.gumbel_quantiles()
        for seed in range(6):
            noise = noise_of(seed, 9, 5000) * 2**18
            wanted = []
            for word in self.words(seed, 9, 5000):
                table, rest = (upper, 2**32 - 1 - word) if word >> 31 else (lower, word)
                chance = 2 * rest + 1
                octave = chance.bit_length()
                place = chance << (32 - octave)
                at, part = octave * 64 + (place >> 25) - 64, place % 2**25
                wanted.append(table[at] + ((table[at + 1] - table[at]) * part >> 25))
            self.assertEqual(noise.tolist(), wanted)

    def uniforms(self, seed, position, size):
        """The numbers between 0 and 1 that the noise is made of."""
        return [(word + 0.5) / (1 << 32) for word in self.words(seed, position, size)]

    def words(self, seed, position, size):
        """The design's hash, in Python's own integers."""
        digest = hashlib.sha256(struct.pack(">QQ", seed, position)).digest()
        for token in range(size):
            word = token
            for key in struct.unpack(">II", digest[:8]):
                word ^= key
                word = (word ^ word >> 16) * 0x7FEB352D % (1 << 32)
                word = (word ^ word >> 15) * 0x846CA68B % (1 << 32)
                word ^= word >> 16
            yield word


class Generation(unittest.TestCase):
    """Streams share a batch, and nothing else."""

    @classmethod
    def setUpClass(cls):
        cls.model = rebuilt(tiny(seed=3))

    def prompts(self, count, seed=0):
        draw = random.Random(seed)
        return [[draw.randrange(128) for _ in range(draw.randrange(1, 60))] for _ in range(count)]

    def test_a_seed_makes_an_answer_whatever_runs_beside_it(self):
        draw = random.Random(5)
        requests = [
            {
                "ids": ids,
                "seed": draw.randrange(1 << 63),
                "max_new_tokens": draw.randrange(1, 60),
                "temperature": draw.choice((0, 0.7, 1.0, 2.0)),
                "top_p": draw.choice((1, 0.9)),
                "top_k": draw.choice((0, 20)),
                "repetition_penalty": draw.choice((1.0, 1.3)),
            }
            for ids in self.prompts(24)
        ]
        alone = [answers(decoder(self.model, slots=1), [request])[0] for request in requests]
        for slots in (3, 8, 24):
            self.assertEqual(answers(decoder(self.model, slots=slots), requests), alone)
        backwards = answers(decoder(self.model, slots=5), requests[::-1])
        self.assertEqual(backwards[::-1], alone)
        sampled = next(r for r in requests if r["temperature"] and r["max_new_tokens"] > 9)
        again = answers(decoder(self.model), [sampled, sampled | {"seed": 1}])
        self.assertEqual(again[0], alone[requests.index(sampled)])
        self.assertNotEqual(again[1], again[0])

    def test_greedy_with_a_repetition_penalty(self):
        model = tiny(seed=3)
        for ids in self.prompts(6, seed=1):
            request = {"ids": ids, "max_new_tokens": 20, "repetition_penalty": 1.7}
            wanted = greedy(model, ids, 20, repetition_penalty=1.7)
            self.assertEqual(answers(decoder(self.model), [request])[0][0], wanted)

    def test_defaults_are_the_generation_config_s(self):
        given = {"temperature": 0.6, "top_p": 0.9, "top_k": 30, "repetition_penalty": 1.2}
        model = tiny(seed=3)
        sampling = rebuilt(model, {"do_sample": True} | given)
        still = rebuilt(model, {"do_sample": False} | given)
        request = {"ids": [1, 2, 3], "seed": 4, "max_new_tokens": 40}
        explicit = answers(decoder(self.model), [request | given])
        self.assertEqual(answers(decoder(sampling), [request]), explicit)
        self.assertEqual(answers(decoder(still), [request | {"temperature": 0.6}]), explicit)
        cold = answers(decoder(self.model), [request | given | {"temperature": 0}])
        self.assertEqual(answers(decoder(still), [request]), cold)
        self.assertEqual(answers(decoder(sampling), [request | {"temperature": 0}]), cold)
        self.assertNotEqual(cold, explicit)
        for name in given:  # the request's own word counts, for each
            neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
            changed = {name: neutral[name]}
            wanted = answers(decoder(self.model), [request | given | changed])
            self.assertEqual(answers(decoder(sampling), [request | changed]), wanted)

    def judged(self, batch, request, ids, tolerance=0.0):
        """[(margin code, tokens within the tolerance)] for ids and their end, and how it ended."""
        request = request | {"score": {"ids": ids, "tolerance": tolerance}}
        codes, ended = answers(batch, [request])[0]
        return list(zip(codes[::2], codes[1::2], strict=True)), ended

    def test_scores(self):
        """An answer of its own has no margin anywhere; another token has the one that it has."""
        model = tiny(seed=3, eos_token_id=5)
        batch = decoder(rebuilt(model), slots=3)
        request = {"ids": [1, 2, 3], "seed": 4, "temperature": 0.9, "max_new_tokens": 30}
        for options in ({}, {"top_k": 20}, {"top_p": 0.9}, {"temperature": 0}):
            ids, ended = answers(batch, [request | options])[0]
            codes, judged = self.judged(batch, request | options, ids)
            self.assertEqual(codes, [(0, 1)] * len(codes))
            self.assertEqual((len(codes), judged), (len(ids) + (ended == "stop"), ended))
        ids = answers(batch, [request])[0][0]
        logits = model(torch.tensor([[1, 2, 3, *ids[:7]]])).logits[0, -1].detach() / 0.9
        scores = logits + noise_of(4, 10, 128)
        order = scores.argsort(descending=True).tolist()
        self.assertEqual(order[0], ids[7])
        for place in (1, 4, 60, 127):
            margin = float(scores[order[0]] - scores[order[place]])
            changed = [*ids[:7], order[place]]
            codes, judged = self.judged(batch, request, changed, margin * (1 + 1e-5))
            self.assertEqual(codes[:7], [(0, codes[n][1]) for n in range(7)])
            self.assertEqual(codes[7], (mp.margin_code(margin), place + 1))
            self.assertLess(2 ** ((codes[7][0] - 128) / 8), margin * 1.001)
            self.assertGreater(2 ** ((codes[7][0] - 127) / 8), margin * 0.999)
            if order[place] == 5:
                continue
            end = codes[8]  # it would not have ended there
            self.assertEqual((len(codes), judged), (9, "stop"))
            self.assertGreater(end[0], 0)
        filtered = request | {"top_k": 3}
        ids = answers(batch, [filtered])[0][0]
        self.assertEqual(self.judged(batch, filtered, [(ids[0] + 1) % 128])[0][0][0] == 0, False)

    def test_scores_of_an_end(self):
        """What ended by itself ends there again, and what was cut short does not."""
        free = answers(decoder(self.model), [{"ids": [1, 2, 3], "max_new_tokens": 30}])[0][0]
        batch = decoder(rebuilt(tiny(seed=3), {"eos_token_id": [127, free[12]]}))
        request = {"ids": [1, 2, 3], "max_new_tokens": 30}
        ids, ended = answers(batch, [request])[0]
        self.assertEqual(ended, "stop")
        self.assertEqual(self.judged(batch, request, ids), ([(0, 1)] * (len(ids) + 1), "stop"))
        codes, _ = self.judged(batch, request, ids[:-1])
        self.assertEqual(codes[:-1], [(0, 1)] * (len(ids) - 1))
        self.assertGreater(codes[-1][0], 0)
        codes, ended = self.judged(batch, request | {"max_new_tokens": 3}, ids[:3])
        self.assertEqual((len(codes), ended), (3, "length"))
        refused = request | {"ids": []}
        self.assertEqual(self.judged(batch, refused, [])[1], "prompt_invalid")

    def test_ends(self):
        ids = [1, 2, 3]
        free = answers(decoder(self.model), [{"ids": ids, "max_new_tokens": 30}])[0][0]
        model = tiny(seed=3)
        first = free.index(free[12])
        for generation, config in (
            ({"eos_token_id": free[12]}, {}),
            ({"eos_token_id": [127, free[12]]}, {}),
            ({}, {"eos_token_id": free[12]}),
            ({"eos_token_id": free[12]}, {"eos_token_id": free[0]}),
        ):
            built = rebuilt(model, generation, **config)
            got = answers(decoder(built), [{"ids": ids, "max_new_tokens": 30}])[0]
            self.assertEqual(got, (free[:first], "stop"))

    def test_an_end_that_is_token_nought(self):
        request = {"ids": [7], "max_new_tokens": 9}
        first = answers(decoder(self.model), [request])[0][0][0]
        model = tiny(seed=3, eos_token_id=5)
        weights = model.lm_head.weight.data
        weights[0] = 10 * weights[first]  # so that it is the likeliest
        built = rebuilt(model, {"eos_token_id": 0})
        self.assertEqual(answers(decoder(built), [request]), [([], "stop")])

    def test_exact_limits(self):
        batch = decoder(self.model, context=32)
        self.assertEqual(batch.context, 32)
        self.assertEqual(decoder(self.model, context=4096).context, 128)
        requests = [
            {"ids": [1] * 31},
            {"ids": [1] * 31, "max_new_tokens": 1},
            {"ids": [1] * 31, "max_new_tokens": 2},
            {"ids": [1] * 32},
            {"ids": [1] * 32, "max_new_tokens": 1},
            {"ids": [1], "max_new_tokens": 31},
            {"ids": [1], "max_new_tokens": 32},
            {"ids": [1], "max_new_tokens": 1 << 24},
            {"ids": [1]},
            {"ids": []},
            {"ids": [127]},
            {"ids": [128]},
        ]
        got = [(len(ids), end) for ids, end in answers(batch, requests)]
        wanted = [
            (1, "length"),
            (1, "length"),
            (0, "too_many_tokens"),
            (0, "prompt_too_long"),
            (0, "prompt_too_long"),
            (31, "length"),
            (0, "too_many_tokens"),
            (0, "too_many_tokens"),
            (31, "length"),
            (0, "prompt_invalid"),
            (31, "length"),
            (0, "prompt_invalid"),
        ]
        self.assertEqual(got, wanted)

    def test_the_last_token_of_the_context_is_right_too(self):
        model, ids = tiny(seed=3), self.prompts(1)[0]
        full = answers(decoder(self.model, context=100), [{"ids": ids}])[0][0]
        self.assertEqual(full, greedy(model, ids, 100 - len(ids)))

    def test_all_progress_together(self):
        """Each step gives every stream in the batch one token, also while a prompt is taken in."""
        batch = decoder(self.model, slots=4)
        for slot in range(3):
            batch.take({"slot": slot, "seed": 0, "ids": [slot + 1], "max_new_tokens": 100})
        batch.step()
        batch.out.clear()
        for _ in range(10):
            batch.step()
            said = [message[:2] for message in mp.PIPE.iter_unpack(bytes(batch.out))]
            self.assertEqual(said, [(mp.ID, 0), (mp.ID, 1), (mp.ID, 2)])
            batch.out.clear()
        self.addCleanup(setattr, muenclave, "CHUNK", muenclave.CHUNK)
        muenclave.CHUNK = 10
        batch.take({"slot": 3, "seed": 0, "ids": [5] * 45, "max_new_tokens": 10})
        steps = []
        for _ in range(6):
            batch.step()
            steps.append([slot for _, slot, _ in mp.PIPE.iter_unpack(bytes(batch.out))])
            batch.out.clear()
        self.assertEqual(steps[0], [3, 0, 1, 2])  # its length
        self.assertEqual(steps[1:4], [[0, 1, 2]] * 3)
        self.assertEqual(steps[4], [3, 0, 1, 2])  # its first token
        self.assertEqual(steps[5], [0, 1, 2, 3])

    def test_prompts_are_taken_in_in_order(self):
        batch = decoder(self.model, slots=2)
        self.addCleanup(setattr, muenclave, "CHUNK", muenclave.CHUNK)
        muenclave.CHUNK = 10
        batch.take({"slot": 0, "seed": 0, "ids": [1, 2], "max_new_tokens": 1})
        batch.take({"slot": 1, "seed": 0, "ids": [1] * 40, "max_new_tokens": 2})
        batch.take({"slot": 2, "seed": 0, "ids": [2] * 40, "max_new_tokens": 2})
        while batch.streams:
            batch.step()
        ends = [s for kind, s, _ in mp.PIPE.iter_unpack(bytes(batch.out)) if kind == mp.END]
        self.assertEqual(ends, [0, 1, 2])

    def test_more_requests_than_slots(self):
        requests = [{"ids": ids, "max_new_tokens": 7} for ids in self.prompts(11, seed=2)]
        alone = [answers(decoder(self.model, slots=1), [request])[0] for request in requests]
        self.assertEqual(answers(decoder(self.model, slots=2), requests), alone)

    def test_a_cancelled_stream_makes_room_at_the_next_token(self):
        batch = decoder(self.model, slots=1)
        for slot in range(3):
            batch.take({"slot": slot, "seed": 0, "ids": [1], "max_new_tokens": 100})
        for _ in range(4):
            batch.step()
        batch.take({"cancel": 1})  # which waits
        batch.take({"cancel": 0})
        batch.take({"cancel": 0})  # once more: it has ended
        batch.take({"cancel": 9})
        before = heard(batch.out)
        self.assertEqual(before[1], ([], "cancelled"))
        self.assertEqual((len(before[0][0]), before[0][1]), (4, "cancelled"))
        batch.out.clear()
        batch.step()
        self.assertEqual(list(heard(batch.out)), [2])
        while batch.streams:
            batch.step()
        wanted = answers(decoder(self.model), [{"ids": [1], "max_new_tokens": 100}])[0]
        self.assertEqual(heard(batch.out)[2], wanted)  # what was there before it is not seen


class Passes(unittest.TestCase):
    """What goes through the model together, and what does not have to go through it again."""

    @classmethod
    def setUpClass(cls):
        cls.model = rebuilt(tiny(seed=3))

    def setUp(self):
        self.addCleanup(setattr, muenclave, "CHUNK", muenclave.CHUNK)
        muenclave.CHUNK = 16

    def passes(self, batch):
        """The [(rows, widths)] of each pass from now on."""
        found, forward = [], batch.forward

        def recorded(rows, chunks, starts):
            found.append((list(rows), [len(chunk) for chunk in chunks]))
            return forward(rows, chunks, starts)

        batch.forward = recorded
        return found

    def run_all(self, batch):
        while batch.streams:
            batch.step()
        said = heard(batch.out)
        batch.out.clear()
        return said

    PROMPTS = (5, 3, 5, 2, 40, 4)  # tokens

    def test_prompts_share_a_pass_as_far_as_a_chunk_goes(self):
        batch = decoder(self.model, slots=7)
        batch.take({"slot": 6, "seed": 0, "ids": [1], "max_new_tokens": 9})
        batch.step()
        for slot, size in enumerate(self.PROMPTS):
            batch.take({"slot": slot, "seed": 0, "ids": [slot + 1] * size, "max_new_tokens": 1})
        found = self.passes(batch)
        self.run_all(batch)
        wanted = [([1, 2, 3], [5, 3, 5]), ([4], [2]), ([5], [16]), ([5], [16])]
        self.assertEqual([one for one in found if one[0] != [0]], wanted + [([5, 6], [8, 4])])

    def test_four_chunks_in_a_pass_while_nobody_waits_for_it(self):
        batch = decoder(self.model, slots=6)
        for slot, size in enumerate(self.PROMPTS):
            batch.take({"slot": slot, "seed": 0, "ids": [slot + 1] * size, "max_new_tokens": 1})
        found = self.passes(batch)
        self.run_all(batch)
        wanted = [([0, 1, 2, 3], [5, 3, 5, 2]), ([4], [16]), ([4, 5], [16, 4]), ([4], [8])]
        self.assertEqual(found, wanted)

    def test_requests_that_come_one_after_another_begin_together(self):
        """Three, then none for as long as it waits; while they run it waits for nobody."""
        batch, (ours, theirs) = decoder(self.model, slots=3), socket.socketpair()
        batch.gate, found, waits = theirs, self.passes(batch), []
        requests = [{"slot": n, "seed": 0, "ids": [1, 2], "max_new_tokens": 2} for n in range(3)]

        def is_readable(_, wait):
            waits.append(wait)
            if requests:
                ours.sendall(mp.frame(json.dumps(requests.pop()).encode()))
                return True
            if waits.count(muenclave.PAUSE) > 1:  # they have ended
                raise EOFError
            return False

        with ours, theirs, mock.patch.object(muenclave, "is_readable", is_readable):
            with self.assertRaises(EOFError):
                batch.serve()
        more = muenclave.PAUSE / 50
        self.assertEqual(waits, [muenclave.PAUSE, more, more, more, 0, muenclave.PAUSE])
        self.assertEqual(found, [([0, 1, 2], [2, 2, 2]), ([0, 1, 2], [1, 1, 1])])

    def test_a_long_prompt_takes_no_more_than_a_chunk_between_two_tokens(self):
        batch = decoder(self.model, slots=3)
        batch.take({"slot": 0, "seed": 0, "ids": [1], "max_new_tokens": 9})
        batch.step()
        for slot in (1, 2):
            batch.take({"slot": slot, "seed": 0, "ids": [2] * 30, "max_new_tokens": 1})
        found = self.passes(batch)
        self.run_all(batch)
        between = [sum(widths) for rows, widths in found if rows != [0]]
        self.assertEqual(between, [16, 14, 16, 14])
        self.assertEqual(found[1::2][:4], [([0], [1])] * 4)

    def test_a_prefix_that_a_row_holds_is_not_taken_in_again(self):
        shared, draw = [7] * 20 + [9] * 20, random.Random(3)
        requests = [
            {"ids": shared + [draw.randrange(128) for _ in range(n)], "max_new_tokens": 6}
            for n in (9, 1, 30, 3)
        ]
        wanted = [answers(decoder(self.model, slots=1), [one])[0] for one in requests]
        batch = decoder(self.model, slots=2)
        for slot, request in enumerate(requests):
            batch.take({"seed": 0, "slot": slot, "user": 5} | request)
            found = self.passes(batch)
            if slot == 0:
                batch.step()  # the others come while its prompt is being taken in
        said = self.run_all(batch)
        self.assertEqual([said[slot] for slot in range(4)], wanted)
        prompts = sum(sum(widths) for _, widths in found if max(widths) > 1)
        reused = 16 + 16 + 32 + 32  # the first took 16 before; then it held 16, and at its end 32
        self.assertLessEqual(prompts, sum(len(request["ids"]) for request in requests) - reused)
        for user, width in ((5, 16), (6, 16), (6, 1)):  # another's is not looked at, once is enough
            batch = batch if user == 6 else decoder(self.model, slots=2)
            batch.take({"seed": 0, "slot": 0, "user": user} | requests[0])
            found = self.passes(batch)
            self.assertEqual(self.run_all(batch)[0], wanted[0])
            self.assertEqual(max(found[0][1]), width)

    def test_all_of_a_prompt_but_its_last_token_may_be_held(self):
        batch, request = decoder(self.model, slots=2), {"ids": [3] * 32, "max_new_tokens": 4}
        first = answers(batch, [request])
        found = self.passes(batch)
        self.assertEqual(answers(batch, [request]), first)
        self.assertEqual(found[0], ([0], [16]))
        request["ids"] = request["ids"] + [3]
        found.clear()
        wanted = answers(decoder(self.model), [request])
        self.assertEqual(answers(batch, [request]), wanted)
        self.assertEqual(found[0], ([0], [1]))

    def test_rows_go_to_the_user_with_the_fewest(self):
        batch = decoder(self.model, slots=2)
        for slot, user in enumerate((1, 1, 1, 1, 2, 2, 3)):
            batch.take({"slot": slot, "seed": 0, "ids": [1], "user": user, "max_new_tokens": 3})
        order = []
        while batch.streams:
            batch.step()
            order += [s for kind, s, _ in mp.PIPE.iter_unpack(bytes(batch.out)) if kind == mp.END]
            batch.out.clear()
        self.assertEqual(order, [0, 4, 1, 5, 2, 6, 3])


class Products(unittest.TestCase):
    """What stands in for PyTorch's matrix product on a processor, with bfloat16 and without."""

    def product(self, rows, outputs, dtype, bias=None, spare=512 * 64 + 63):
        """(ours, how often PyTorch's own was asked, the exact one) of random values."""
        draw = torch.Generator().manual_seed(rows)
        values, weight = (
            torch.randn(*size, 64, generator=draw) for size in ((1, rows), (outputs,))
        )
        values, weight, asked = values.to(dtype), weight.to(dtype), []

        def linear(*tensors):
            asked.append(tensors)
            return torch.nn.functional.linear(*tensors)

        exact = torch.nn.functional.linear(values.double(), weight.double())
        bias = None if bias is None else torch.full((outputs,), bias, dtype=dtype)
        ours = muenclave.multiply(linear, torch.empty(spare), values, weight, bias)
        return ours, len(asked), exact

    def test_rounded_once(self):
        for rows, outputs in ((4, 1), (5, 512), (8, 1300)):
            ours, asked, exact = self.product(rows, outputs, torch.bfloat16)
            self.assertEqual(asked, -(-outputs // 512))
            self.assertEqual((ours.dtype, ours.shape), (torch.bfloat16, exact.shape))
            # Half a unit in the last of 8 places, and what float32 has lost before.
            self.assertLessEqual(((ours - exact).abs() / exact.abs()).max(), 2**-8 * 1.01)

    def test_the_weight_first(self):
        """Of one row too, which is a vector; the layout is what PyTorch's own has."""
        for rows, outputs in ((1, 1), (1, 300), (2, 300), (80, 7)):
            ours, asked, exact = self.product(rows, outputs, torch.bfloat16, spare=0)
            self.assertEqual((asked, ours.dtype, ours.shape), (0, torch.bfloat16, exact.shape))
            self.assertTrue(ours.is_contiguous())
            self.assertLessEqual((ours - exact).abs().max(), exact.abs().max() * 2**-7)

    def test_a_bias_is_added(self):
        for spare in (0, 9999):
            plain, _, _ = self.product(4, 20, torch.bfloat16, spare=spare)
            more, _, _ = self.product(4, 20, torch.bfloat16, bias=3, spare=spare)
            self.assertTrue(torch.equal(more, plain + 3))

    def test_all_else_is_pytorch_s(self):
        for rows, dtype in ((3, torch.bfloat16), (8, torch.float32), (8, torch.float16)):
            ours, asked, _ = self.product(rows, 700, dtype)
            self.assertEqual((asked, ours.dtype), (1, dtype))
        for dtype in (torch.float32, torch.float16):
            ours, asked, _ = self.product(8, 700, dtype, spare=0)
            self.assertEqual((asked, ours.dtype), (1, dtype))
        for rows, wanted in ((128, 0), (129, 1)):
            self.assertEqual(self.product(rows, 7, torch.bfloat16, spare=0)[1], wanted)


class Memory(unittest.TestCase):
    """The cache takes what is free when the model has been loaded, and no more."""

    @classmethod
    def setUpClass(cls):
        cls.model = rebuilt(tiny(seed=3))
        cls.token = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, size, float32

    def limited(self, tokens):
        """A decoder with room for so many tokens."""
        self.addCleanup(setattr, muenclave, "memory_file", muenclave.memory_file)
        free = -(-tokens * self.token / muenclave.CACHE_SHARE // 1024)
        told = os.memfd_create("meminfo")
        self.addCleanup(os.close, told)
        os.write(told, b"MemFree: 1 kB\nMemAvailable:   %d kB\n" % free)
        muenclave.memory_file = lambda: told
        return decoder(self.model, slots=4)

    def test_fewer_rows(self):
        for tokens, rows in ((4096, 4), (512, 4), (511, 3), (300, 2), (129, 1), (128, 1)):
            batch = self.limited(tokens)
            self.assertEqual((batch.cache.count, batch.context), (rows, 128))
            taken = sum(store.nbytes for store in batch.cache.stores)
            self.assertEqual(taken, rows * 128 * self.token)

    def test_then_a_shorter_context(self):
        batch = self.limited(50)
        self.assertEqual((batch.cache.count, batch.context), (1, 50))
        requests = [{"ids": [1] * 50}, {"ids": [1] * 9, "max_new_tokens": 42}, {"ids": [1] * 40}]
        got = answers(batch, requests)
        self.assertEqual(
            [ended for _, ended in got], ["prompt_too_long", "too_many_tokens", "length"]
        )
        self.assertEqual(len(got[2][0]), 10)

    def test_nothing_is_free(self):
        with self.assertRaises(MemoryError):
            self.limited(0)

    def test_it_does_not_grow(self):
        batch = decoder(self.model, slots=3)
        before = [(store.data_ptr(), store.nbytes) for store in batch.cache.stores]
        answers(batch, [{"ids": [n] * 100, "max_new_tokens": 28} for n in range(9)])
        after = [(store.data_ptr(), store.nbytes) for store in batch.cache.stores]
        self.assertEqual(after, before)


# ---------------------------------------------------------------- the process


def arena_of(files):
    """(descriptor of an arena, its table) of {name: bytes}, as the loader makes them."""
    places, end = {}, 0
    arena = os.memfd_create("arena", os.MFD_CLOEXEC)
    for name, data in files.items():
        places[name] = (end, len(data))
        os.pwrite(arena, data, end)
        end += -(-len(data) // 64) * 64
    os.ftruncate(arena, end)
    return arena, {"length": end, "files": places}


class Engine:
    """The real engine process, confined, on a pipe of ours; ends with its `with` block."""

    def __init__(self, model_type, files, **settings):
        environment = os.environ | SETTINGS | {"ENCLAVE_CONFINEMENT": "seccomp"} | settings
        self.gate, for_gate = socket.socketpair()
        loader, for_loader = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.gate.settimeout(support.SECONDS)
        self.process = muenclave.spawn("engine", environment, for_gate, for_loader)
        arena, table = arena_of(files)
        self.gate.sendall(mp.frame(model_type.encode()))
        socket.send_fds(loader, [mp.encode_json(table)], [arena])
        loader.close()
        os.close(arena)
        self.first = self.hear()

    def say(self, message):
        """Send a message as the gate does."""
        self.gate.sendall(mp.frame(mp.encode_json(message)))

    def hear(self):
        """The next message: (kind, slot, value)."""
        return mp.PIPE.unpack(mp.read_exactly(self.gate, mp.PIPE.size))

    def answers(self, requests):
        """What it says to requests that come at once, by their order."""
        for slot, request in enumerate(requests):
            self.say({"seed": 0, "slot": slot} | request)
        data, left = b"", len(requests)
        while left:
            kind, slot, value = self.hear()
            data += mp.PIPE.pack(kind, slot, value)
            left -= kind in (mp.END, mp.REFUSED)
        found = heard(data)
        return [found[slot] for slot in range(len(requests))]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.gate.close()
        self.process.kill()
        self.process.wait()


def saved(model, kind, template=CHATML):
    """The files of a model with a tokenizer and a template, as the engine has them."""
    prompts = json.dumps(prompts_of(tokenizer_files(kind), template)).encode()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = seal.check_weights(pathlib.Path(folder), os.listdir(folder), None)
        facts = facts_of(model) | {"tensors": tensors}
        made = {seal.PROMPTS: prompts, seal.FACTS: json.dumps(facts).encode()}
        return files_of(pathlib.Path(folder)) | made


def products():
    """A context in which matrix products are an engine's, as its warm-up has them here."""
    linear = torch.nn.functional.linear
    spare = torch.empty(0 if torch.cpu._is_avx512_bf16_supported() else 1 << 19)
    ours = functools.partial(muenclave.multiply, linear, spare)
    return mock.patch.object(torch.nn.functional, "linear", ours)


class Process(unittest.TestCase):
    """Whatever a model brings works where no file can be opened; or is refused in one word."""

    ODD = (  # architecture, its fields, dtype, tokenizer, template
        ("llama", {}, "float32", "unigram", MISTRAL),
        ("qwen2", {"tie_word_embeddings": True}, "bfloat16", "white", CHATML),
        ("gpt2", {}, "float32", "bytes", JSON),
        ("gemma3_text", {"head_dim": 16}, "float16", "first", LLAMA),
    )
    REQUESTS = (
        {"messages": CHAT, "max_new_tokens": 6, "temperature": 0},
        {"prompt": "zen is", "max_new_tokens": 9, "temperature": 0},
        {"messages": [CHAT[0], CHAT[0]], "max_new_tokens": 6, "temperature": 0, "date": "1 May"},
        {"prompt": chr(prompting.PRIVATE)},
        {"prompt": "a", "max_new_tokens": 5, "temperature": 1.5, "top_p": 0.9, "top_k": 9},
        {"prompt": "a", "max_new_tokens": 1 << 20},
    )

    def test_odd_models(self):
        for model_type, fields, dtype, kind, template in self.ODD:
            with self.subTest(model=model_type, tokenizer=kind):
                model = tiny(model_type, vocab_size=1000, **fields).to(getattr(torch, dtype))
                files = saved(model, kind, template)
                with products():
                    wanted = answers(decoder(load(files), prompter(kind, template)), self.REQUESTS)
                self.assertEqual(len(wanted[0][0]), 6)
                self.assertEqual(wanted[3], ([], "prompt_invalid"))
                self.assertEqual(wanted[5], ([], "too_many_tokens"))
                is_strict = wanted[2] == ([], "prompt_invalid")  # two users in a row
                self.assertEqual(is_strict, template is MISTRAL)
                with Engine(model_type, files, ENCLAVE_SLOTS="4") as engine:
                    self.assertEqual(engine.first, (mp.LOADED, 0, 128))
                    self.assertEqual(engine.answers(self.REQUESTS), wanted)
                    self.assertIsNone(engine.process.poll())

    def test_models_that_can_t_be_loaded(self):
        good = saved(tiny(vocab_size=1000), "bytes")
        tensors = bytes(good["model.safetensors"])
        for what, model_type, files in (
            ("truncated", "llama", good | {"model.safetensors": tensors[:-1]}),
            ("no such architecture", "nothing", good),
            ("one that a batch can't do", "mamba", good),
            ("no prompts", "llama", {n: d for n, d in good.items() if n != "prompts.json"}),
            ("no facts", "llama", {n: d for n, d in good.items() if n != "model.json"}),
            ("prompts that are none", "llama", good | {"prompts.json": b"{}"}),
        ):
            with self.subTest(what), Engine(model_type, files) as engine:
                failure = mp.FAILURES.index("model_invalid")
                self.assertEqual(engine.first, (mp.FAILED, 0, failure))
                self.assertEqual(engine.process.wait(support.SECONDS), 1)


# ---------------------------------------------------------------- the enclave


class Recorder(mp.Vocabulary):
    """A vocabulary that keeps the ids that came."""

    ids = ()

    def unpack(self, data):
        found = super().unpack(data)
        self.ids = [*self.ids, *found]
        return found


def sealed_by_hand(folder, files, model_type="llama", size=1000):
    """Seal what tools/seal.py would refuse; a table of `size` ids. Returns support.Sealed."""
    source = folder / "source"
    source.mkdir()
    made = {name: bytes(files[name]) for name in (seal.PROMPTS, seal.FACTS)}
    names = sorted(files.keys() - made.keys())
    for name in names:
        (source / name).write_bytes(files[name])
    table = [b"%d " % number for number in range(size)]
    model = seal.Model(source, names, [], model_type, table, made)
    flags = types.SimpleNamespace(output=str(folder / "odd.mus"), chunk_size=1 << 16)
    key = secrets.token_bytes(32)
    (folder / "odd.key").touch(0o600)
    (folder / "odd.key").write_bytes(seal.encode_key("odd", key, None))
    seal.seal(model, "odd", key, flags)
    return support.Sealed(source, folder / "odd.mus", folder / "odd.key", folder / "odd.mus.vocab")


class Whole(unittest.TestCase):
    """A whole enclave: one for the class, unlocked, of the model that the class names."""

    FLAGS = ("--threads", "1")

    @classmethod
    def setUpClass(cls):
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cls.site = support.make_site(folder, cls.sealed(folder))
        cls.enclave = stack.enter_context(support.Enclave(cls.site, *cls.FLAGS))
        cls.ready = cls.enclave.unlock()

    def table(self):
        """The model's vocabulary, recording."""
        return Recorder(self.site.vocabulary.read_bytes())

    def ask(self, session, request):
        """(ids, final record) of an answer."""
        table = self.table()
        for _ in session.generate(request, table):
            pass
        return list(table.ids), session.final


class Demo(Whole):
    """The demo model's answers are those of transformers on the plaintext directory."""

    @classmethod
    def sealed(cls, folder):
        return support.sealed_demo()

    def test_greedy_answers(self):
        model, tokenizer = reference(self.site.demo), demo_tokenizer()
        chats = [[{"role": "user", "content": text}] for text in ("Tell me about zen.", "Hello?")]
        chats.append([{"role": "system", "content": " Be brief.\n"}, *chats[0]])
        requests = [{"messages": chat} for chat in chats]
        requests += [{"prompt": text} for text in ("Beautiful is better", " The assert", "\n")]
        with self.enclave.ready() as session:
            for request in requests:
                if "prompt" in request:
                    ids = tokenizer(request["prompt"])["input_ids"]
                else:
                    ids = tokenizer.apply_chat_template(
                        request["messages"], add_generation_prompt=True, return_dict=False
                    )
                wanted = greedy(model, ids, 40)
                asked = request | {"temperature": 0, "max_new_tokens": 40}
                got, final = self.ask(session, asked)
                self.assertEqual(got, wanted, request)
                counts = (len(ids), len(wanted), len(ids) + len(wanted))
                self.assertEqual(tuple(final["usage"][name] for name in mp.USAGE), counts)
                ending = "length" if len(wanted) == 40 else "stop"
                self.assertEqual(final["finish_reason"], ending)
                text = "".join(session.generate(asked, self.table()))
                self.assertEqual(text, tokenizer.decode(wanted, skip_special_tokens=True))

    def test_what_the_session_is_told(self):
        self.assertEqual(self.ready["context"], 1024)
        with self.enclave.ready() as session:
            self.assertEqual(session.ready["context"], 1024)

    def test_spelled_marks(self):
        """Through the enclave: as many prompt tokens as text takes, never the mark's one."""
        tokenizer = demo_tokenizer()
        with self.enclave.ready() as session:
            for mark in (*SPECIAL, *MARKS):
                request = {"prompt": mark, "max_new_tokens": 1, "temperature": 0}
                _, final = self.ask(session, request)
                self.assertEqual(len(tokenizer(mark)["input_ids"]), 2)
                self.assertGreater(final["usage"]["prompt_tokens"], 4)


class Streams(Whole):
    """Sessions of an enclave with two slots and a model that never ends by itself."""

    FLAGS = ("--threads", "1", "--slots", "2", "--context", "50000")
    ENDLESS = {"prompt": "zen", "temperature": 1.0, "seed": 1}
    SHORT = {"prompt": "better", "temperature": 1.0, "seed": 2, "max_new_tokens": 5}

    @classmethod
    def sealed(cls, folder):
        model = tiny(vocab_size=1000, max_position_embeddings=1 << 16)
        cls.files = saved(model, "bytes")
        return sealed_by_hand(folder, cls.files)

    def test_limits_and_mistakes_leave_the_session_usable(self):
        with self.enclave.ready() as session:
            for request, code, limit in (
                ({"prompt": "zen " * 50_000}, "prompt_too_long", 50_000),
                ({"prompt": "zen", "max_new_tokens": 50_000}, "too_many_tokens", 50_000),
                ({"prompt": f"a{chr(prompting.PRIVATE)}"}, "prompt_invalid", None),
                # This template does not print the date, but it is refused all the same.
                ({"messages": CHAT, "date": chr(prompting.PRIVATE)}, "prompt_invalid", None),
            ):
                with self.assertRaises(mp.ProtocolError) as caught:
                    self.ask(session, request)
                self.assertEqual((caught.exception.code, caught.exception.limit), (code, limit))
                self.assertEqual(len(self.ask(session, self.SHORT)[0]), 5)

    def test_an_answer_is_the_same_among_others(self):
        batch = decoder(load(self.files), prompter("bytes"), slots=1)
        requests = [self.SHORT | {"seed": seed, "max_new_tokens": 30} for seed in range(7)]
        wanted = [answers(batch, [request])[0][0] for request in requests]
        found = {}

        def work(number):
            with self.enclave.ready() as session:
                found[number] = self.ask(session, requests[number])[0]

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(requests))]
        for thread in threads:  # seven for two slots
            thread.start()
        for thread in threads:
            thread.join(support.SECONDS)
        self.assertEqual([found.get(n) for n in range(len(requests))], wanted)

    def test_sessions_progress_together(self):
        with self.enclave.ready() as first, self.enclave.ready() as second:
            stream = first.generate(self.ENDLESS, self.table())
            next(stream)
            for _ in range(3):
                self.assertEqual(len(self.ask(second, self.SHORT)[0]), 5)
                self.assertIsNone(first.final)
                next(stream)
            stream.close()
            self.assertEqual(first.final["finish_reason"], "cancelled")
            self.assertEqual(len(self.ask(first, self.SHORT)[0]), 5)

    def test_a_closed_session_frees_its_slot(self):
        with contextlib.ExitStack() as stack:
            sessions = [stack.enter_context(self.enclave.ready()) for _ in range(3)]
            streams = [s.generate(self.ENDLESS, self.table()) for s in sessions[:2]]
            for stream in streams:
                next(stream)
            answer = []
            waiting = threading.Thread(
                target=lambda: answer.append(self.ask(sessions[2], self.SHORT)[0])
            )
            waiting.start()
            for _ in range(5):  # the others go on, and it waits
                next(streams[0])
                next(streams[1])
            self.assertEqual(answer, [])
            sessions[0].close()
            waiting.join(support.SECONDS)
            self.assertEqual(len(answer[0]), 5)
            self.assertIsNone(sessions[1].final)
            next(streams[1])


class Invalid(unittest.TestCase):
    """A sealed model that lies is refused by name, and the enclave lives."""

    def test_lies(self):
        good = saved(tiny(vocab_size=1000), "bytes")
        truncated = {"model.safetensors": bytes(good["model.safetensors"])[:-1]}
        facts = json.loads(good[seal.FACTS])
        facts["tensors"][0][2] = [*facts["tensors"][0][2], 2]  # its shape
        for lie in (truncated, {seal.FACTS: json.dumps(facts).encode()}):
            with self.subTest(sorted(lie)), tempfile.TemporaryDirectory() as name:
                folder = pathlib.Path(name)
                sealed = sealed_by_hand(folder, good | lie)
                site = support.make_site(folder, sealed)
                with support.Enclave(site, "--threads", "1") as enclave:
                    for _ in range(2):  # after the first it has started afresh
                        seen = len(enclave.lines)
                        with self.assertRaises(mp.ProtocolError) as caught:
                            enclave.unlock()
                        self.assertEqual(caught.exception.code, "model_invalid")
                        enclave.wait_for("lease ended", after=seen)
                        port = enclave.wait_for("listening", after=seen).split()[-1]
                        enclave.address = ("127.0.0.1", int(port))
                    lines = [" ".join(line.split()[1:3]) for line in enclave.lines]
                    cycle = ["loading", "lease ended"]
                    self.assertEqual([line for line in lines if line in cycle], cycle * 2)
