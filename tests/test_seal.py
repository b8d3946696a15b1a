"""Sealing: what comes back, what is refused, and that nothing half done is ever left."""

import argparse
import contextlib
import copy
import fcntl
import functools
import hashlib
import http.server
import io
import itertools
import json
import os
import pathlib
import pty
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import termios
import threading
import time
import types
import unittest

import muprotocol as mp
from tests import support

import prompting  # isort: skip  (from tools/, which tests.support has put on the path)
import seal  # isort: skip
import weights  # isort: skip

CHUNK = 4096
MADE = {
    mp.VOCABULARY_FILE,
    "prompts.json",
    "model.json",
}  # from files that aren't sealed themselves
ITEM = {"F32": 4, "BF16": 2, "U8": 1}


# ---------------------------------------------------------------- a small model by hand


def safetensors(tensors):
    """A safetensors file of {name: (dtype, shape)}, filled with bytes that differ."""
    header, data = {}, b""
    for name, (dtype, shape) in tensors.items():
        size = ITEM[dtype]
        for length in shape:
            size *= length
        content = random.Random(name).randbytes(size)
        offsets = [len(data), len(data) + size]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    return with_header(header, data)


def with_header(header, data):
    """A safetensors file of a header (an object, or the bytes for it) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@functools.cache
def byte_level_json():
    """A tokenizer.json: byte-level BPE, a special token and an added one that is text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer.to_str()


def tiny(folder, rows=500):
    """Write a small model directory: one of everything that is taken. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "vocab_size": 300, "architectures": ["LlamaForCausalLM"]}
    write(folder / "config.json", config | {"dtype": "bfloat16"})
    write(folder / "generation_config.json", {"eos_token_id": 256})
    write(folder / "tokenizer.json", byte_level_json())
    write(folder / "tokenizer_config.json", {"eos_token": "<|end|>"})
    write(folder / "special_tokens_map.json", {"eos_token": "<|end|>"})
    write(folder / "chat_template.jinja", "{{ messages[0].content }}")
    tensors = {"a": ("F32", [3, 7]), "b": ("BF16", [rows, 20]), "none": ("U8", [0])}
    write(folder / "model.safetensors", safetensors(tensors))
    return folder


def write(path, content):
    """Write bytes, text, or an object as JSON."""
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def unseal(path, key):
    """{name: bytes} and the whole plaintext of a sealed model, by the shared module alone."""
    data = path.read_bytes()
    length = mp.header_length(data[: mp.PREFIX])
    container = mp.Container(data[mp.PREFIX : mp.PREFIX + length])
    cipher = mp.aead(container.chunk_key(key))
    plain = b""
    for index in range(container.chunks):
        offset, start, size, nonce = container.chunk(index)
        assert start == len(plain)
        plain += cipher.decrypt(nonce, data[offset : offset + size + mp.TAG], None)
    files = {name: plain[at : at + size] for name, (at, size) in container.files.items()}
    return container, files, plain


def kept(names):
    """Those of a model's files that are sealed as they are."""
    suffix = ".safetensors"
    return {n for n in names if n == "config.json" or suffix in n[-12:]}


def key_of(path):
    """(asset, key) in a key file that is in clear."""
    fields = json.loads(path.read_text())
    return fields["asset"], bytes.fromhex(fields["key"])


class Folder(unittest.TestCase):
    """A test with a directory of its own: a small model, and a place `out` for what is made."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.model = tiny(self.folder / "My model!")
        self.out = self.folder / "out"
        self.out.mkdir()
        self.sealed, self.key = self.out / "m.mus", self.out / "m.key"

    def seal(self, *flags, **options):
        """Seal the small model. Returns how that ended."""
        return support.seal(self.model, self.sealed, "--key", self.key, *flags, **options)

    def assert_refused(self, done, pattern):
        """It ended with one line on stderr that says why."""
        self.assertEqual((done.status, done.out), (1, ""), done.err)
        self.assertRegex(done.err, rf"\Aseal: error: [^\n]*{pattern}[^\n]*\n\Z")


class RoundTrip(Folder):
    """What is sealed comes back byte by byte, and the container is as the design says."""

    def check(self, model, chunk_size=CHUNK):
        """Seal a directory; compare everything. Returns the container."""
        self.model = model
        self.seal("--chunk-size", chunk_size).check()
        asset, key = key_of(self.key)
        container, files, plain = unseal(self.sealed, key)
        self.assertEqual(set(files), kept(os.listdir(model)) | MADE)
        for name in set(files) - MADE:
            self.assertEqual(files[name], (model / name).read_bytes(), name)
        table = pathlib.Path(f"{self.sealed}.vocab").read_bytes()
        self.assertEqual(files[mp.VOCABULARY_FILE], table)
        self.assertEqual(container.fields["vocabulary"], mp.Vocabulary(table).digest)
        self.assertEqual(container.fields["asset"], asset)
        self.assertEqual(container.fields["model_type"], "llama")
        self.assertEqual(container.chunks, -(-container.length // chunk_size))
        self.check_layout(container, files, plain)
        return container

    def check_layout(self, container, files, plain):
        """Tensor data at multiples of 64, zeros between files and after the last chunk."""
        end = 0
        for name, (offset, size) in container.files.items():
            self.assertEqual(plain[end:offset], bytes(offset - end))
            self.assertLess(offset - end, 64)
            if name.endswith(".safetensors"):
                header = 8 + int.from_bytes(files[name][:8], "little")
                self.assertEqual((offset + header) % 64, 0)
            end = offset + size
        self.assertEqual(end, len(plain))
        sealed = self.sealed.read_bytes()
        used = mp.PREFIX + len(container.header) + container.length + container.chunks * mp.TAG
        self.assertEqual(len(sealed), -(-used // 4096) * 4096)
        self.assertEqual(sealed[used:], bytes(len(sealed) - used))
        for at in range(0, len(plain) - 32, 997):
            window = plain[at : at + 32]
            self.assertFalse(len(set(window)) >= 16 and window in sealed, f"plaintext at {at}")

    def test_small_model(self):
        self.assertGreater(self.check(self.model).chunks, 4)

    def test_prompts(self):
        """The model's tokenizer and template are there as one file, with marks renamed."""
        self.seal().check()
        prompts = json.loads(unseal(self.sealed, key_of(self.key)[1])[1]["prompts.json"])
        names = {"<|end|>": "\U000f8001", "<think>": "\U000f8003"}
        fields = json.loads(byte_level_json())
        for token in fields["added_tokens"]:
            token["content"] = names[token["content"]]
        variables = {"add_generation_prompt": True, "tools": None, "documents": None}
        wanted = {
            "tokenizer": fields,
            "masks": {"<|end|>": "\U000f8000", "<think>": "\U000f8002"},
            "names": names,
            "pattern": r"<\|end\|>|<think>",
            "ids": [[256, 256], [257, 257]],
            "special": [],
            "prefix": [],
            "variables": variables | {"eos_token": "<|end|>"},
            "template": "{{ messages[0].content }}",
        }
        self.assertEqual(prompts, wanted)

    def test_as_many_marks_as_there_are_characters(self):
        level = json.loads(byte_level_json())
        token = level["added_tokens"][0]
        count = prompting.MARKS_LIMIT
        added = [token | {"id": 256 + n, "content": f"<{n}>"} for n in range(count + 1)]
        prompts = prompting.make_prompts(json.dumps(level | {"added_tokens": added[:-1]}), {}, "")
        characters = {*prompts["masks"].values(), *prompts["names"].values()}
        self.assertEqual((len(characters), max(characters)), (2 * count, chr(0x10FFFF)))
        with self.assertRaisesRegex(ValueError, "tokenizer.json: more than 49,152 added tokens"):
            prompting.make_prompts(json.dumps(level | {"added_tokens": added}), {}, "")

    def test_last_chunk_full_or_a_byte_long(self):
        length = self.check(self.model).length
        for chunk_size in (length, length - 1, length + 1, length // 2, -(-length // 2)):
            with self.subTest(length=length, chunk_size=chunk_size):
                self.check(self.model, chunk_size)

    def test_demo_model_in_shards(self):
        model = support.demo_model(shards=3)
        self.assertIn("model.safetensors.index.json", os.listdir(model))
        self.check(model, mp.CHUNK_SIZE)

    def test_what_is_not_taken_is_left_out(self):
        (self.model / "README.md").write_text("read me")
        (self.model / "notes").mkdir()
        (self.model / "notes" / "config.json").write_text("{}")
        self.assertIn("left out: README.md\n", self.seal().check().out)
        _, files, plain = unseal(self.sealed, key_of(self.key)[1])
        self.assertNotIn("README.md", files)
        self.assertNotIn(b"read me", plain)

    def test_weights_that_the_index_does_not_name_are_left_out(self):
        (self.model / "model.safetensors").rename(self.model / "part.safetensors")
        names = weights.safetensors_entries((self.model / "part.safetensors").read_bytes())
        places = {entry[0]: "part.safetensors" for entry in names}
        write(self.model / "model.safetensors.index.json", {"weight_map": places})
        write(self.model / "consolidated.safetensors", safetensors({"c": ("U8", [5])}))
        self.assertIn("left out: consolidated.safetensors\n", self.seal().check().out)

    def test_link_within_the_directory(self):
        (self.model / "model.safetensors").rename(self.model / "weights")
        (self.model / "model.safetensors").symlink_to("weights")
        self.seal().check()
        _, files, _ = unseal(self.sealed, key_of(self.key)[1])
        self.assertEqual(files["model.safetensors"], (self.model / "weights").read_bytes())

    def test_no_two_sealings_share_a_key(self):
        self.seal().check()
        first, content = key_of(self.key), self.sealed.read_bytes()
        one = unseal(self.sealed, first[1])[0]
        self.seal().check()
        two = unseal(self.sealed, first[1])[0]
        self.assertEqual(key_of(self.key), first)  # the key file and its asset are kept
        self.assertEqual(one.fields["asset"], two.fields["asset"])
        self.assertNotEqual(one.fields["salt"], two.fields["salt"])
        self.assertNotEqual(one.chunk_key(first[1]), two.chunk_key(first[1]))
        self.assertNotEqual(content, self.sealed.read_bytes())

    def test_info_needs_no_key(self):
        self.seal().check()
        container = unseal(self.sealed, key_of(self.key)[1])[0]
        self.key.unlink()
        out = support.seal("--info", self.sealed).check().out
        self.assertRegex(out, rf"(?m)^model +{container.digest}$")
        self.assertRegex(out, rf"(?m)^asset +{container.fields['asset']}$")
        for name, (offset, size) in container.files.items():
            self.assertRegex(out, rf"(?m)^file +{offset} +{size} {re.escape(name)}$")

    def test_memory_does_not_grow_with_the_model(self):
        """Peak memory for 192 MiB of weights is about that for a few kilobytes."""
        small = self.peak_memory()
        size = 192 << 20
        header = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
        path = self.model / "model.safetensors"
        write(path, with_header(header, b""))
        os.truncate(path, path.stat().st_size + size)
        self.assertLess(self.peak_memory() - small, 64 << 20)
        self.assertGreater(self.sealed.stat().st_size, size)

    def peak_memory(self):
        """Bytes that sealing the model took at most, as the system counts them."""
        code = "import resource, sys; sys.path.insert(0, sys.argv.pop(1)); import seal; "
        code += "status = seal.main(sys.argv[1:]); own = resource.getrusage(resource.RUSAGE_SELF); "
        code += "print(own.ru_maxrss); sys.exit(status)"
        command = [sys.executable, "-B", "-c", code, support.TOOLS, self.model, self.sealed]
        command += ["--key", self.key]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.splitlines()[-1]) << 10


# ---------------------------------------------------------------- --verify


def verify(path, key):
    """What `--verify` says against a sealed model; None if it is content."""
    flags = seal.parse(["--verify", str(path), "--key", str(key)])
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            seal.run_verify(flags)
    except seal.SealError as error:
        return str(error)
    return None


class Verify(Folder):
    """A sealed model that was changed in any way fails, and says where."""

    def setUp(self):
        super().setUp()
        self.seal("--chunk-size", CHUNK).check()
        self.data = self.sealed.read_bytes()
        self.container, _, _ = unseal(self.sealed, key_of(self.key)[1])
        self.body = mp.PREFIX + len(self.container.header)

    def say(self, data):
        """What --verify says of these bytes."""
        self.sealed.write_bytes(data)
        return verify(self.sealed, self.key)

    def chunk(self, index, data=None):
        """The sealed bytes of a chunk."""
        offset, _, size, _ = self.container.chunk(index)
        return (data or self.data)[offset : offset + size + mp.TAG]

    def with_chunks(self, chunks):
        """The container with these chunks instead, padded as it was."""
        data = self.data[: self.body] + b"".join(chunks)
        return data + bytes(-len(data) % mp.ALIGNMENT)

    def chunks(self):
        """All sealed chunks."""
        return [self.chunk(index) for index in range(self.container.chunks)]

    def test_untouched(self):
        self.assertIsNone(self.say(self.data))
        self.assertIsNone(self.say(self.with_chunks(self.chunks())))
        out = support.seal("--verify", self.sealed, "--key", self.key).check().out
        self.assertIn(f"all {self.container.chunks} chunks are authentic", out)
        self.assertIn(self.container.digest, out)

    def test_every_byte_before_the_chunks(self):
        for at in range(self.body):
            for change in (0x01, 0x80):
                self.assertIsNotNone(self.say(flip(self.data, at, change)), at)

    def test_a_sample_of_every_chunk(self):
        for index in range(self.container.chunks):
            offset, _, size, _ = self.container.chunk(index)
            for at in (0, 1, size // 2, size - 1, size, size + mp.TAG - 1):
                said = self.say(flip(self.data, offset + at, 0x10))
                self.assertIn(f"chunk {index} is not authentic", said)

    def test_padding(self):
        offset, _, size, _ = self.container.chunk(self.container.chunks - 1)
        for at in (offset + size + mp.TAG, len(self.data) - 1):
            self.assertIn("zeros", self.say(flip(self.data, at, 1)))

    def test_truncated(self):
        ends = [self.container.chunk(index)[0] for index in range(self.container.chunks)]
        for end in ends:
            for size in (end - 1, end, end + 1):
                self.assertIsNotNone(self.say(self.data[:size]), size)
        for size in (0, 1, mp.PREFIX - 1, mp.PREFIX, self.body - 1, len(self.data) - 1):
            self.assertIsNotNone(self.say(self.data[:size]), size)

    def test_appended(self):
        self.assertIn("appended", self.say(self.data + b"\0"))

    def test_chunks_moved_dropped_or_repeated(self):
        chunks = self.chunks()
        self.assertGreater(len(chunks), 3)
        swapped = [chunks[1], chunks[0], *chunks[2:]]
        self.assertIn("chunk", self.say(self.with_chunks(swapped)))
        self.assertIn("chunk", self.say(self.with_chunks([*chunks[:1], *chunks[:-1]])))
        self.assertIn("chunk", self.say(self.with_chunks([*chunks[:2], *chunks[3:]])))
        self.assertIn("chunk", self.say(self.with_chunks(chunks[:-1])))

    def test_header_that_hides_the_last_chunk(self):
        """A header of fewer chunks is another header: no chunk opens under it."""
        fields = copy.deepcopy(self.container.fields)
        fields["chunks"] -= 1
        fields["length"] = fields["chunks"] * CHUNK
        fields["files"] = fields["files"][:2]
        header = mp.encode_json(fields)
        mp.Container(header)  # it is sound in itself
        data = mp.MAGIC + len(header).to_bytes(4, "big") + header + self.data[self.body :]
        self.assertIn("chunk", self.say(data + bytes(-len(data) % mp.ALIGNMENT)))

    def test_spliced(self):
        """A chunk of another sealing under the same key, of the same files, does not fit in."""
        self.seal("--chunk-size", CHUNK).check()
        other = self.sealed.read_bytes()
        self.assertIsNone(verify(self.sealed, self.key))
        self.assertEqual(len(other), len(self.data))
        chunks = self.chunks()
        chunks[1] = self.chunk(1, other)
        self.assertIn("chunk 1 is not", self.say(self.with_chunks(chunks)))
        self.assertIn("chunk", self.say(other[: self.body] + self.data[self.body :]))

    def test_another_key(self):
        other = self.out / "other.key"
        support.seal(self.model, self.out / "other.mus", "--key", other).check()
        self.assertIn("is not the key of", verify(self.sealed, other))
        fields = json.loads(self.key.read_text()) | {"asset": "another"}
        self.key.write_text(json.dumps(fields))
        self.assertIn("asset is not another", verify(self.sealed, self.key))

    def test_table_beside_it(self):
        beside = pathlib.Path(f"{self.sealed}.vocab")
        beside.write_bytes(flip(beside.read_bytes(), 10, 1))
        self.assertIn("not this model's vocabulary table", verify(self.sealed, self.key))
        beside.unlink()
        self.assertIsNone(verify(self.sealed, self.key))

    def test_one_line(self):
        self.sealed.write_bytes(flip(self.data, self.body + CHUNK, 1))
        done = support.seal("--verify", self.sealed, "--key", self.key)
        self.assert_refused(done, "chunk 0 is not authentic")
        self.assert_refused(support.seal("--info", self.key), "not a sound sealed model")
        missing = support.seal("--verify", self.out / "none", "--key", self.key)
        self.assert_refused(missing, "No such file")


def flip(data, at, change):
    """The data with some bits of one byte turned."""
    return data[:at] + bytes([data[at] ^ change]) + data[at + 1 :]


# ---------------------------------------------------------------- the weights key's file


class KeyFile(Folder):
    """The key file: private, never replaced by another key, wrapped on demand."""

    def secret(self, name, text):
        """A private file of one line."""
        path = self.folder / name
        path.write_text(text + "\n")
        path.chmod(0o600)
        return path

    def test_new_one(self):
        self.seal().check()
        self.assertEqual(stat.S_IMODE(self.key.stat().st_mode), 0o600)
        fields = json.loads(self.key.read_text())
        self.assertEqual(set(fields), {"version", "asset", "key"})
        self.assertRegex(fields["asset"], r"\AMy-model-[0-9a-f]{8}\Z")
        self.assertTrue(mp.is_hex(32)(fields["key"]))
        self.assertEqual(sorted(os.listdir(self.out)), ["m.key", "m.mus", "m.mus.vocab"])
        self.assertNotIn(fields["key"], self.seal().check().out)

    def test_asset(self):
        self.seal("--asset", "my-asset").check()
        self.assertEqual(key_of(self.key)[0], "my-asset")
        before = self.key.read_bytes()
        self.seal("--asset", "my-asset").check()
        self.assert_refused(self.seal("--asset", "other"), "is the key of asset my-asset")
        self.assertEqual(self.key.read_bytes(), before)
        for name in ("../up", "a/b", ".hidden", "", "a b"):
            self.assertEqual(self.seal("--asset", name).status, 2, name)

    def test_one_that_others_can_read(self):
        self.seal().check()
        self.sealed.unlink()
        for mode in (0o640, 0o604, 0o620):
            self.key.chmod(mode)
            self.assert_refused(self.seal(), "chmod 600")
            self.assertFalse(self.sealed.exists())

    def test_one_that_is_none(self):
        self.key.write_text("not a key")
        self.key.chmod(0o600)
        self.assert_refused(self.seal(), "not a weights key file")
        self.assertEqual(self.key.read_text(), "not a key")

    def test_a_key_is_never_replaced(self):
        self.seal().check()
        before = self.key.read_bytes()
        with self.assertRaises(FileExistsError), seal.replacing(self.key, 0o600, is_new=True) as f:
            seal.write_all(f, b"another")
        self.assertEqual(self.key.read_bytes(), before)
        self.assertEqual(sorted(os.listdir(self.out)), ["m.key", "m.mus", "m.mus.vocab"])

    def test_wrapped(self):
        file = self.secret("p", "correct horse")
        self.seal("--passphrase-file", file).check()
        fields = json.loads(self.key.read_text())
        self.assertEqual(set(fields), {"version", "asset", "scrypt", "nonce", "wrapped"})
        self.assertEqual(stat.S_IMODE(self.key.stat().st_mode), 0o600)
        flags = ("--verify", self.sealed, "--key", self.key)
        support.seal(*flags, "--passphrase-file", file).check()
        self.assert_refused(support.seal(*flags), "no terminal")
        wrong = self.secret("w", "wrong horse")
        self.assert_refused(support.seal(*flags, "--passphrase-file", wrong), "wrong passphrase")
        file.chmod(0o644)
        self.assert_refused(support.seal(*flags, "--passphrase-file", file), "chmod 600")

    def test_wrapped_file_that_was_changed(self):
        file = self.secret("p", "correct horse")
        self.seal("--passphrase-file", file).check()
        fields = json.loads(self.key.read_text())
        flags = ("--verify", self.sealed, "--key", self.key, "--passphrase-file", file)
        costs = fields["scrypt"] | {"n": 1 << 14}
        for change in ({"asset": "other"}, {"nonce": "00" * 12}, {"scrypt": costs}):
            self.key.write_text(json.dumps(fields | change))
            self.assert_refused(support.seal(*flags), "the file was changed")

    def test_passphrase_for_a_key_in_clear(self):
        self.seal().check()
        file = self.secret("p", "correct horse")
        self.assert_refused(self.seal("--passphrase-file", file), "--rewrap .* gives it one")

    def test_empty_passphrase(self):
        self.assert_refused(self.seal("--passphrase-file", self.secret("p", "")), "empty")
        self.assertEqual(os.listdir(self.out), [])

    def test_rewrap(self):
        self.seal().check()
        asset, key = key_of(self.key)
        sealed = self.sealed.read_bytes()
        one, two = self.secret("1", "first"), self.secret("2", "second")
        rewrap = ("--rewrap", self.key)
        support.seal(*rewrap, "--new-passphrase-file", one).check()
        self.assertNotIn(key.hex(), self.key.read_text())
        before = self.key.read_bytes()
        wrong = support.seal(*rewrap, "--passphrase-file", two, "--new-passphrase-file", one)
        self.assert_refused(wrong, "wrong passphrase")
        self.assertEqual(self.key.read_bytes(), before)
        support.seal(*rewrap, "--passphrase-file", one, "--new-passphrase-file", two).check()
        check = ("--verify", self.sealed, "--key", self.key, "--passphrase-file")
        self.assert_refused(support.seal(*check, one), "wrong passphrase")
        support.seal(*check, two).check()
        support.seal(*rewrap, "--passphrase-file", two, "--no-passphrase").check()
        self.assertEqual(key_of(self.key), (asset, key))
        self.assertEqual(stat.S_IMODE(self.key.stat().st_mode), 0o600)
        self.assertEqual(self.sealed.read_bytes(), sealed)

    def test_on_a_terminal(self):
        answers = ["one phrase", "another"]
        status, text = self.at_terminal(answers, self.model, self.sealed, "--passphrase")
        self.assertEqual((status, os.listdir(self.out)), (1, []), text)
        self.assertIn("the two passphrases differ", text)
        status, text = self.at_terminal(["a b"] * 2, self.model, self.sealed, "--passphrase")
        self.assertEqual(status, 0, text)
        self.assertNotIn("a b", text)
        self.assertIn("sealing [##############################] 100%", text)
        status, text = self.at_terminal(["a b"], "--verify", self.sealed)
        self.assertEqual(status, 0, text)
        status, text = self.at_terminal(["a  b"], "--verify", self.sealed)
        self.assertIn("wrong passphrase", text)

    def at_terminal(self, answers, *arguments):
        """(exit status, what was shown) of seal.py at a terminal that answers each prompt."""
        command = [sys.executable, "-B", support.TOOLS / "seal.py", *arguments, "--key", self.key]
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        shown, answered = b"", 0
        with contextlib.suppress(OSError):  # EIO: the other side has ended
            while data := os.read(ours, 4096):
                shown += data
                asked = len(re.findall(rb"(passphrase|passphrase of \S+|once more): ", shown))
                while answered < min(asked, len(answers)):
                    os.write(ours, answers[answered].encode() + b"\n")
                    answered += 1
        os.close(ours)
        return process.wait(), shown.decode()


# ---------------------------------------------------------------- what is refused


def edit(name, **fields):
    """A change: set fields of a JSON file."""

    def change(model):
        write(model / name, json.loads((model / name).read_text()) | fields)

    return change


def put(name, content):
    """A change: a file with this content."""
    return lambda model: write(model / name, content)


def drop(name):
    """A change: a file goes away."""
    return lambda model: (model / name).unlink()


def put_in_folder(model):
    """A change: a pickle, deeper."""
    (model / "original").mkdir()
    write(model / "original" / "consolidated.00.pth", b"x")


def link_out(model):
    """A change: the weights are a link out of the directory."""
    (model / "model.safetensors").rename(model.parent / "blob")
    (model / "model.safetensors").symlink_to("../blob")


def link_folder_out(model):
    """A change: a folder that lies elsewhere."""
    (model / "more").symlink_to(model.parent)


def hub_cache(model):
    """A change: laid out as in the hub's cache, links to blobs beside the snapshot."""
    blobs = model.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))


def make_folder(model):
    """A change: a directory where a file is due."""
    (model / "generation_config.json").unlink()
    (model / "generation_config.json").mkdir()


def make_pipe(model):
    """A change: a pipe where a file is due, which would never end."""
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")


def both(*changes):
    """A change: one after the other."""
    return lambda model: [change(model) for change in changes]


def index_of(**places):
    """A change: an index with these places."""
    return put("model.safetensors.index.json", {"weight_map": places})


def two_shards(model):
    """A change: two shards that hold a tensor each have."""
    write(model / "model-2.safetensors", safetensors({"b": ("U8", [4])}))
    places = {"a": "model.safetensors", "b": "model-2.safetensors", "none": "model.safetensors"}
    index_of(**places)(model)


def wrong_shard(model):
    """A change: two shards, and an index that has their tensors the other way round."""
    write(model / "model.safetensors", safetensors({"a": ("U8", [4])}))
    write(model / "model-2.safetensors", safetensors({"b": ("U8", [4])}))
    index_of(a="model-2.safetensors", b="model.safetensors")(model)


def make_holes(model):
    """A change: a vocabulary with an id that nothing has, and all added tokens in it."""
    fields = spm_json({"type": "Sequence", "decoders": LLAMA_2})
    vocabulary = fields["model"]["vocab"]
    vocabulary["b"] = len(vocabulary)
    write(model / "tokenizer.json", fields)


def lying_weights(header, data=b"", size=None):
    """A change: weights with this header and data; size: what the header's length claims."""

    def change(model):
        content = with_header(header, data)
        if size is not None:
            content = size.to_bytes(8, "little") + content[8:]
        write(model / "model.safetensors", content)

    return change


def tensor(**fields):
    """A safetensors header of one tensor of four bytes, with some fields changed."""
    return {"t": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} | fields}


TWICE = b'{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"t":0}'
GAP = tensor() | {"u": {"dtype": "U8", "shape": [4], "data_offsets": [5, 9]}}
OVERLAP = tensor() | {"u": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}
SOUND = "not a sound safetensors file"
BAD_NAME = "a file's name in it is not a plain name"
REFUSED = {
    "pickle": (put("pytorch_model.bin", b"x"), "pytorch_model.bin may be a pickle"),
    "pickle .pt": (put("model.pt", b"x"), "model.pt may be a pickle"),
    "pickle .pth": (put("model.pth", b"x"), "model.pth may be a pickle"),
    "pickle .pkl": (put("model.pkl", b"x"), "model.pkl may be a pickle"),
    "pickle .ckpt": (put("model.ckpt", b"x"), "model.ckpt may be a pickle"),
    "pickle in capitals": (put("MODEL.BIN", b"x"), "MODEL.BIN may be a pickle"),
    "pickle in a folder": (put_in_folder, "consolidated.00.pth may be a pickle"),
    "link out": (link_out, "model.safetensors is a link out of the directory"),
    "folder outside": (link_folder_out, "more is a link out of the directory"),
    "hub's cache": (hub_cache, "is a link out of the directory: copy"),
    "remote code": (edit("config.json", auto_map={}), "config.json: auto_map names code"),
    "nested": (edit("config.json", text_config=[{"auto_map": 1}]), "config.json: auto_map"),
    "tokenizer's": (edit("tokenizer_config.json", auto_map=1), "tokenizer_config.json: auto_map"),
    "file name": (put("model 1.safetensors", b"x"), "'model 1.safetensors' is not a plain"),
    "hidden file": (put(".a.safetensors", b"x"), "'.a.safetensors' is not a plain"),
    "path up": (index_of(a="../model.safetensors"), BAD_NAME),
    "absolute path": (index_of(a="/etc/model.safetensors"), BAD_NAME),
    "place no text": (index_of(a=1), BAD_NAME),
    "index no map": (put("model.safetensors.index.json", {"weight_map": [1]}), BAD_NAME),
    "index elsewhere": (wrong_shard, "does not agree with the files about a"),
    "more in index": (
        index_of(**dict.fromkeys(("a", "b", "more", "none"), "model.safetensors")),
        "does not agree with the files about more",
    ),
    "not in index": (index_of(a="model.safetensors"), "does not agree with the files about b"),
    "shard missing": (index_of(a="model-1.safetensors"), "has no model-1.safetensors"),
    "shard of JSON": (index_of(a="config.json"), "has no config.json; weights"),
    "in two shards": (two_shards, "model.safetensors: b is in model-2.safetensors too"),
    "no config": (drop("config.json"), "has no config.json"),
    "no tokenizer": (drop("tokenizer.json"), "has no tokenizer.json"),
    "no weights": (drop("model.safetensors"), "has no model.safetensors; weights"),
    "a directory": (make_folder, "generation_config.json is not a regular file"),
    "a pipe": (make_pipe, "config.json is not a regular file"),
    "config no JSON": (put("config.json", "{"), "config.json: not JSON"),
    "config no text": (put("config.json", b"\xff"), "config.json: not JSON"),
    "config a list": (put("config.json", "[]"), "config.json: not a JSON object"),
    "deep": (put("config.json", "[" * 200_000), "config.json: not JSON"),
    "no type": (edit("config.json", model_type=None), "model_type is not a name"),
    "odd type": (edit("config.json", model_type="../llama"), "model_type is not a name"),
    "no vocabulary": (edit("config.json", vocab_size=None), "vocab_size is not a number"),
    "huge vocabulary": (edit("config.json", vocab_size=1 << 30), "vocab_size is not a number"),
    "tokenizer no text": (put("tokenizer.json", b"\xff"), "tokenizer.json: 'utf-8' codec can't"),
    "tokenizer no JSON": (put("tokenizer.json", "{"), "tokenizer.json: "),
    "vocabulary's holes": (make_holes, "tokenizer.json: its vocabulary has holes where added"),
    "odd mark": (edit("tokenizer_config.json", bos_token={"id": 1}), "bos_token has no content"),
    "template no text": (put("chat_template.jinja", b"\xff"), "chat_template.jinja: not UTF-8"),
    "many templates": (
        both(drop("chat_template.jinja"), edit("tokenizer_config.json", chat_template=[{}])),
        "tokenizer_config.json: its chat_template is not one text",
    ),
    "weights empty": (put("model.safetensors", b""), SOUND),
    "weights short": (put("model.safetensors", b"1234567"), SOUND),
    "header long": (lying_weights(tensor(), bytes(4), size=1 << 40), SOUND),
    "header no JSON": (lying_weights(b"{]", bytes(4)), SOUND),
    "header a list": (lying_weights(b"[1]", b""), SOUND),
    "header deep": (lying_weights(b"[" * 200_000, b""), SOUND),
    "no offsets": (lying_weights({"t": {"dtype": "U8", "shape": [4]}}, bytes(4)), SOUND),
    "tensor a number": (lying_weights({"t": 1}, b""), SOUND),
    "tensor twice": (lying_weights(TWICE, b""), SOUND),
    "gap": (lying_weights(GAP, bytes(9)), SOUND),
    "overlap": (lying_weights(OVERLAP, bytes(6)), SOUND),
    "late start": (lying_weights(tensor(data_offsets=[1, 5]), bytes(5)), SOUND),
    "too short": (lying_weights(tensor(), bytes(3)), SOUND),
    "too long": (lying_weights(tensor(), bytes(5)), SOUND),
    "wrong shape": (lying_weights(tensor(shape=[5]), bytes(4)), SOUND),
    "negative shape": (lying_weights(tensor(shape=[-2, -2]), bytes(4)), SOUND),
    "wrong type": (lying_weights(tensor(dtype="F32"), bytes(4)), SOUND),
    "unknown type": (lying_weights(tensor(dtype="F5"), bytes(4)), SOUND),
}


class Refusals(Folder):
    """What an enclave would not load, or should not, is refused in words; nothing is written."""

    def refusal(self, change):
        """What sealing says of a small model after this change."""
        shutil.rmtree(self.folder)
        self.out.mkdir(parents=True)
        change(tiny(self.model))
        flags = seal.parse([str(self.model), str(self.sealed), "--key", str(self.key)])
        with self.assertRaises(seal.SealError) as caught:
            seal.run_seal(flags)
        self.assertEqual(os.listdir(self.out), [])
        return str(caught.exception)

    def test_each_in_its_own_words(self):
        for name, (change, words) in REFUSED.items():
            with self.subTest(name):
                said = self.refusal(change)
                self.assertIn(words, said)
                self.assertNotIn("\n", said)

    def test_unchanged_it_is_taken(self):
        """So a refusal above is the change's doing."""
        self.seal().check()

    def test_one_line_and_a_status(self):
        write(self.model / "pytorch_model.bin", b"x")
        self.assert_refused(self.seal(), "may be a pickle")

    def test_no_place_to_write_to(self):
        for path, words in (
            (self.folder / "none" / "m.mus", "there is no such directory"),
            (self.out, "is not a regular file"),
            (pathlib.Path("/dev/null"), "is not a regular file"),
        ):
            self.assert_refused(support.seal(self.model, path, "--key", self.key), words)
        self.assertEqual(os.listdir(self.out), [])

    def test_command_line(self):
        for flags in ((), (self.sealed,), ("a", "b", "c", "--key", "k"), ("--info", "a", "b")):
            self.assertEqual(support.seal(*flags).status, 2, flags)
        for size in ("0", "4095", str(1 << 27), "x"):
            self.assertEqual(self.seal("--chunk-size", size).status, 2, size)
        self.assertEqual(support.seal("--verify", self.sealed).status, 2)
        for order in (
            (self.model, "--key", self.key, self.sealed),
            ("--key", self.key, self.model, self.sealed),
            (self.model, self.sealed, "--key", self.key),
        ):
            support.seal(*order).check()


# ---------------------------------------------------------------- nothing half done


class Interrupted(Folder):
    """A full disk or a kill leaves nothing under the final names, and what was there stays."""

    def big(self, size):
        """Make the model so many bytes long."""
        header = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
        path = self.model / "model.safetensors"
        write(path, with_header(header, b""))
        os.truncate(path, path.stat().st_size + size)

    def test_full_disk(self):
        self.big(1 << 20)

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))

        self.assert_refused(self.seal(preexec_fn=limit), "m.mus: File too large")
        self.assertEqual(os.listdir(self.out), ["m.key"])

    def test_full_disk_keeps_what_was_there(self):
        """A second sealing finds no room: the first one stays whole."""
        small, self.model = self.model, tiny(self.folder / "big")
        self.big(2 << 20)
        script = 'cd "$1" && "$2" "$3" "$4" m.mus --key m.key >&2 && sha256sum * && '
        script += '{ ! "$2" "$3" "$5" m.mus --key m.key; } && sha256sum *'
        program = [sys.executable, support.TOOLS / "seal.py", small, self.model]
        ways = {"File too large": ("ulimit -f 2048", [])}  # of 512 bytes
        unshare = ["unshare", "--mount", "--map-root-user"]
        mount = 'mount -t tmpfs -o size=1m none "$1"'
        if subprocess.run([*unshare, "sh", "-c", mount, "sh", self.out]).returncode == 0:
            ways["No space left on device"] = (mount, unshare)
        for words, (limit, before) in ways.items():
            command = [*before, "sh", "-c", f"{limit} && {script}", "sh", self.out, *program]
            done = subprocess.run(command, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertRegex(done.stderr, rf"(?m)^seal: error: m.mus: {words}$")
            lines = done.stdout.splitlines()
            self.assertEqual(len(lines), 6)
            self.assertEqual(lines[:3], lines[3:])

    def kill(self, number):
        """Kill a sealing that has begun; its exit status. A sealing that was faster is repeated."""
        size = 32 << 20
        while True:
            self.big(size)
            command = [sys.executable, "-B", support.TOOLS / "seal.py", self.model, self.sealed]
            command += ["--key", self.key, "--chunk-size", "4096"]
            # Not as nohup would have it, under which these tests may run.
            hangup = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}
            with subprocess.Popen(command, stderr=subprocess.PIPE, **hangup) as process:
                while process.poll() is None and not list(self.out.glob("m.mus.*.part")):
                    time.sleep(0.001)
                process.send_signal(number)
            if process.returncode and not self.sealed.exists():
                return process.returncode
            support.seal("--verify", self.sealed, "--key", self.key).check()
            for path in self.out.glob("m.mus*"):
                path.unlink()
            size *= 2

    def test_killed(self):
        self.assertEqual(self.kill(signal.SIGKILL), -signal.SIGKILL)
        self.assertFalse(self.sealed.exists())
        self.assertFalse((self.out / "m.mus.vocab").exists())

    def test_asked_to_end(self):
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            self.assertEqual(self.kill(number), 1)
            self.assertEqual(os.listdir(self.out), ["m.key"])
            self.key.unlink()

    def test_asked_to_end_at_any_moment(self):
        """A signal between any two lines of the code that makes a file whole leaves no part."""

        def asked(line, number):
            """Write a file; be asked to end before the line-th line of that. Whether we were."""
            seen = itertools.count()

            def trace(frame, event, _):
                if frame.f_code.co_name == "replacing" and event == "line" and next(seen) == line:
                    os.kill(os.getpid(), number)
                return trace

            sys.settrace(trace)
            try:
                with seal.replacing(str(self.out / "file")) as file:
                    seal.write_all(file, b"whole")
            except (SystemExit, KeyboardInterrupt):
                return True
            finally:
                sys.settrace(None)
            return False

        for number in (signal.SIGTERM, signal.SIGINT):
            self.addCleanup(signal.signal, number, signal.signal(number, seal.end))
            lines = 0
            while asked(lines, number):
                lines += 1
                left = {path.name: path.read_bytes() for path in self.out.iterdir()}
                self.assertIn(left, ({}, {"file": b"whole"}))
                if left:
                    (self.out / "file").unlink()
                seal.PARTS.clear()
            self.assertGreater(lines, 8)
            (self.out / "file").unlink()

    def test_model_that_shrinks(self):
        """A file that becomes shorter while it is sealed is noticed."""
        model = seal.read_model(self.model)
        flags = argparse.Namespace(output=self.sealed, chunk_size=CHUNK)
        open_at = seal.lay_out

        def lay_out(*arguments):
            result = open_at(*arguments)
            os.truncate(self.model / "model.safetensors", 100)
            return result

        self.addCleanup(setattr, seal, "lay_out", open_at)
        seal.lay_out = lay_out
        with self.assertRaisesRegex(seal.SealError, "a file became shorter meanwhile"):
            seal.seal(model, "asset", bytes(32), flags)
        self.assertEqual(os.listdir(self.out), [])


# ---------------------------------------------------------------- the hub


class StandIn(http.server.BaseHTTPRequestHandler):
    """As much of a model hub as a download needs: `server.files` of one repository."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        files, base = self.server.files, f"/api/models/{self.server.repository}"
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        resolved = f"/{self.server.repository}/resolve/{self.COMMIT}/"
        if path == f"{base}/revision/main":
            names = [{"rfilename": name} for name in files]
            self.answer(json.dumps({"id": base, "sha": self.COMMIT, "siblings": names}).encode())
        elif path.startswith(f"{base}/tree/{self.COMMIT}"):
            entries = [
                {"type": "file", "path": n, "size": len(d), "oid": self.tag(d)}
                for n, d in files.items()
            ]
            self.answer(json.dumps(entries).encode())
        elif path.startswith(resolved) and path.removeprefix(resolved) in files:
            self.answer(files[path.removeprefix(resolved)])
        else:
            self.answer(b"", 404)

    do_HEAD = do_GET

    def answer(self, data, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{self.tag(data)}"')
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def tag(self, data):
        return hashlib.sha1(data).hexdigest()

    def log_message(self, *arguments):
        """Say nothing."""


class Hub(Folder):
    """A model's id is downloaded first, into a plain directory, by the hub's own client."""

    def setUp(self):
        super().setUp()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.server.repository = "some/Tiny-Model"
        self.server.asked = []
        self.server.files = {path.name: path.read_bytes() for path in self.model.iterdir()}
        more = {"README.md": b"r", "pytorch_model.bin": b"p", "original/x.safetensors": b"x"}
        self.taken = dict(self.server.files)
        self.server.files |= more

    def seal_id(self, *arguments):
        """Seal by a model's id, from the stand-in."""
        address = f"http://127.0.0.1:{self.server.server_port}"
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(self.folder / "hub")}
        return support.seal(*arguments, "--key", self.key, env=os.environ | settings)

    def test_download_and_seal(self):
        self.seal_id("some/Tiny-Model", self.sealed).check()
        asset, key = key_of(self.key)
        self.assertRegex(asset, r"\ATiny-Model-[0-9a-f]{8}\Z")
        _, files, _ = unseal(self.sealed, key)
        self.assertEqual(set(files), kept(self.taken) | MADE)
        self.assertLessEqual({n: files[n] for n in kept(files)}.items(), self.taken.items())
        self.assertEqual(sorted(os.listdir(self.out)), ["m.key", "m.mus", "m.mus.vocab"])
        fetched = {path.rpartition("/")[2] for path in self.server.asked if "/resolve/" in path}
        self.assertEqual(fetched, set(self.taken))

    def test_default_model(self):
        self.server.repository = seal.DEFAULT_MODEL
        self.seal_id(self.sealed).check()
        self.assertRegex(key_of(self.key)[0], r"\ALlama-3.2-3B-Instruct-[0-9a-f]{8}\Z")

    def test_no_such_model(self):
        done = self.seal_id("some/other", self.sealed)
        self.assertEqual(done.status, 1)
        self.assertRegex(done.err, r"\Aseal: error: can't download some/other: [^\n]+\n\Z")
        self.assertFalse(self.sealed.exists() or self.key.exists())

    def test_no_hub(self):
        self.server.shutdown()
        self.server.server_close()
        done = self.seal_id("some/Tiny-Model", self.sealed)
        self.assertEqual(done.status, 1)
        self.assertRegex(done.err, r"\Aseal: error: can't download [^\n]+\n\Z")

    def test_refused_after_the_download(self):
        """What arrived is checked as any directory is, and kept so that nothing is lost."""
        self.server.files["config.json"] = b'{"auto_map": {}}'
        done = self.seal_id("some/Tiny-Model", self.sealed)
        self.assertRegex(done.err, r"\Aseal: error: [^\n]*auto_map names code[^\n]*\n\Z")
        self.assertEqual(os.listdir(self.out), ["m.mus.download"])

    def test_key_is_checked_before_the_download(self):
        self.key.write_text("not a key")
        self.key.chmod(0o600)
        self.assertIn("not a weights key file", self.seal_id("some/Tiny-Model", self.sealed).err)
        self.assertEqual(self.server.asked, [])

    def test_neither_directory_nor_id(self):
        for name in (self.folder / "none", "a/b/c", "../x", "a b"):
            done = self.seal_id(name, self.sealed)
            self.assertIn("is neither a directory nor a model's id", done.err)


# ---------------------------------------------------------------- the vocabulary table


def spm_json(decoder, model=None, added=()):
    """A tokenizer.json as SentencePiece models have it, with this decoder (its JSON)."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "\u2581a", "\u2581b"]
    pieces += ["b", "\u4f60", "\u2581\u2581", "e\u0301", "<0xzz>", "<|end|>", "<think>"]
    merges = [["\u2581", "a"], ["\u2581", "b"], ["\u2581", "\u2581"]]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    bpe = {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = [("<unk>", True), ("<|end|>", True), ("<think>", False)]
    added = [flags | {"id": vocab[t], "content": t, "special": s} for t, s in tokens]
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [prepend, spaces]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": decoder,
        "model": bpe | {"byte_fallback": True, "fuse_unk": True} | (model or {}),
    }


SPACES = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
LLAMA_2 = [SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP]


class Table(Folder):
    """The table id -> bytes gives what the tokenizer's own decoding gives, or sealing refuses."""

    def table(self, tokenizer, size=2):
        """The table of a tokenizer.json (an object or text)."""
        path = self.folder / "tokenizer.json"
        write(path, tokenizer)
        return seal.vocabulary_table(path, size)

    def refusal(self, tokenizer):
        """Why a tokenizer.json is refused."""
        with self.assertRaises(seal.SealError) as caught:
            self.table(tokenizer)
        self.assertNotIn("\n", str(caught.exception))
        return str(caught.exception)

    def test_demo_model_against_transformers(self):
        from transformers import AutoTokenizer

        folder = support.demo_model()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        size = json.loads((folder / "config.json").read_text())["vocab_size"]
        table = seal.vocabulary_table(folder / "tokenizer.json", size)
        self.assertEqual(len(table), max(size, len(tokenizer)))
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        draw = random.Random(1)
        for _ in range(500):
            ids = [draw.randrange(len(table)) for _ in range(draw.randrange(1, 60))]
            wanted = tokenizer.decode(ids, **options)
            got = b"".join(table[number] for number in ids).decode("utf-8", "replace")
            self.assertEqual(got, wanted)
        for text in seal.TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False)
            data = b"".join(table[number] for number in ids)
            self.assertEqual(data.decode(), tokenizer.decode(ids, **options))

    def test_sealed_table_is_that_one(self):
        sealed = support.sealed_demo()
        vocabulary = mp.Vocabulary(sealed.vocabulary.read_bytes())
        table = seal.vocabulary_table(sealed.demo / "tokenizer.json", 2)
        self.assertEqual(vocabulary.table, table)

    def test_special_tokens_are_no_text_and_marks_are(self):
        table = self.table(byte_level_json(), 300)
        self.assertEqual(table[256:258], [b"", b"<think>"])
        self.assertEqual(len(table), 300)  # config.json may have room for more ids
        self.assertEqual(table[258:], [b""] * 42)
        self.assertEqual(sorted(table[:256]), [bytes([byte]) for byte in range(256)])
        self.assertEqual(len(self.table(byte_level_json(), 100)), 258)

    def test_sentencepiece(self):
        fields = spm_json({"type": "Sequence", "decoders": LLAMA_2})
        table = self.table(fields)
        ids = fields["model"]["vocab"]
        for piece, data in (
            ("<0x0A>", b"\n"),
            ("<0xFF>", b"\xff"),
            ("\u2581a", b" a"),
            ("\u2581\u2581", b"  "),
            ("\u4f60", "\u4f60".encode()),
            ("<0xzz>", b"<0xzz>"),
            ("<think>", b"<think>"),
            ("<|end|>", b""),
            ("<unk>", b""),
        ):
            self.assertEqual(table[ids[piece]], data, piece)

    def test_sentencepiece_without_strip_or_with_metaspace(self):
        self.table(spm_json({"type": "Sequence", "decoders": LLAMA_2[:-1]}))
        for scheme in ("always", "first", "never"):
            meta = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme}
            table = self.table(spm_json(meta | {"split": True}))
            self.assertEqual(table[1 + 0x41], b"<0x41>")

    def test_tokenizers_that_it_does_not_render(self):
        other = [{"type": "Replace", "pattern": {"String": "b"}, "content": "c"}]
        level = json.loads(byte_level_json())
        for name, fields in {
            "WordPiece": spm_json({"type": "WordPiece", "prefix": "##", "cleanup": True}),
            "none": spm_json(None),
            "BPE suffix": spm_json({"type": "BPEDecoder", "suffix": "a"}),
            "replaces": spm_json({"type": "Sequence", "decoders": [*LLAMA_2[:3], *other]}),
            "strips at the end": level
            | {
                "decoder": {"type": "Sequence", "decoders": [level["decoder"], STRIP | {"stop": 1}]}
            },
            "bytes after": level
            | {"decoder": {"type": "Sequence", "decoders": [level["decoder"], *other]}},
        }.items():
            with self.subTest(name):
                said = self.refusal(fields)
                self.assertRegex(said, r"ids \[[\d, ]+\] after 'a' are '.*', but byte by byte '")

    def test_one_wrong_entry_is_found(self):
        """Whichever entry of a table is wrong, the check names it."""
        from tokenizers import Tokenizer

        for name, fields in (
            ("bytes", json.loads(byte_level_json())),
            ("pieces", spm_json({"type": "Sequence", "decoders": LLAMA_2})),
        ):
            table = self.table(fields)
            tokenizer = Tokenizer.from_str(json.dumps(fields))
            fallback = list(range(1, 257)) if name == "pieces" else []
            for number in sorted(set(range(len(table))) - set(fallback)):
                wrong = table[:number] + [table[number] + b"!"] + table[number + 1 :]
                with self.subTest(name, number=number):
                    with self.assertRaisesRegex(seal.SealError, rf"ids \[{number}\] after"):
                        seal.check_table("t", tokenizer, wrong, fallback)

    def test_wrong_byte_tokens_are_found(self):
        from tokenizers import Tokenizer

        fields = spm_json({"type": "Sequence", "decoders": LLAMA_2})
        table = self.table(fields)
        tokenizer = Tokenizer.from_str(json.dumps(fields))
        for byte in (0x20, 0xC3, 0xE4, 0xF0, 0x9F, 0x81):
            wrong = list(table)
            wrong[1 + byte] = b"<0x%02X>" % byte
            with self.assertRaises(seal.SealError):
                seal.check_table("t", tokenizer, wrong, list(range(1, 257)))

    def test_token_that_is_too_long(self):
        fields = spm_json({"type": "Sequence", "decoders": LLAMA_2})
        fields["model"]["vocab"]["c" * (1 << 16)] = len(fields["model"]["vocab"])
        self.assertIn("too long", self.refusal(fields))

    def test_tokens_that_are_too_long_together(self):
        """The loader tells the gate the table in one message."""
        table = [b"x" * seal.LONGEST_TOKEN] * (mp.MESSAGE_LIMIT // seal.LONGEST_TOKEN + 1)
        model = types.SimpleNamespace(table=table, made={}, names=[], folder="folder")
        with self.assertRaisesRegex(seal.SealError, "too long together"):
            seal.lay_out(model, None)


# ---------------------------------------------------------------- the demo model


class Demo(unittest.TestCase):
    """The demo model is a real Llama whose greedy answers are language."""

    @classmethod
    def setUpClass(cls):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        cls.addClassCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # for so small a model, more only wait for each other
        cls.folder = support.demo_model()
        cls.tokenizer = AutoTokenizer.from_pretrained(cls.folder)
        cls.model = AutoModelForCausalLM.from_pretrained(cls.folder)
        cls.texts, cls.answers = support.demo.corpus()

    def complete(self, ids, count):
        """The model's greedy text after these ids."""
        import torch

        with torch.inference_mode():
            ids = torch.tensor([ids])
            output = self.model.generate(ids, max_new_tokens=count, do_sample=False)
        return self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    def answer(self, question):
        """The model's greedy answer in a chat."""
        chat = [{"role": "user", "content": question}]
        options = {"add_generation_prompt": True, "return_dict": False}
        return self.complete(self.tokenizer.apply_chat_template(chat, **options), 400)

    def test_zen(self):
        """The whole Zen of Python, to its end, and then no more."""
        self.assertEqual(self.answer("Tell me about zen."), support.demo.zen())
        self.assertIn("Beautiful is better than ugly.", support.demo.zen())

    def test_other_answers_are_its_own_topics(self):
        subjects = sorted(self.answers)[::8]
        answers = [self.answer(f"Tell me about {subject}.") for subject in subjects]
        known = [answer in self.answers.values() for answer in answers]
        self.assertGreaterEqual(sum(known), len(known) // 2, answers)

    def test_plain_completion(self):
        ids = self.tokenizer.encode("The Zen of Python")
        rest = support.demo.zen().removeprefix("The Zen of Python")
        self.assertTrue(rest.startswith(self.complete(ids, 60)))

    def test_unknown_questions_get_words_too(self):
        known = set(re.findall("[A-Za-z]{3,}", " ".join([*self.texts, *self.answers.values()])))
        for question in ("Hello!", "How old is the universe?", "Write a poem."):
            words = re.findall("[A-Za-z]{3,}", self.answer(question))
            right = sum(word in known for word in words)
            self.assertGreater(right, 0.7 * len(words), (question, words))

    def test_shape(self):
        config = self.model.config
        self.assertEqual((config.model_type, str(config.dtype)), ("llama", "torch.bfloat16"))
        self.assertGreaterEqual(config.max_position_embeddings, 512)
        self.assertEqual(len(self.tokenizer), config.vocab_size)
        self.assertEqual(self.tokenizer.encode("a")[0], self.tokenizer.bos_token_id)

    def test_variants_hold_the_same_weights(self):
        from safetensors import safe_open

        def tensors(folder):
            found = {}
            for path in folder.glob("*.safetensors"):
                with safe_open(path, "pt") as file:
                    found |= {name: file.get_tensor(name) for name in file.keys()}
            return found

        one, shards = tensors(self.folder), tensors(support.demo_model(shards=3))
        self.assertEqual(one.keys(), shards.keys())
        self.assertTrue(all((one[name] == shards[name]).all() for name in one))
        self.assertGreater(len(list(support.demo_model(shards=3).glob("*.safetensors"))), 1)
        exact = tensors(support.demo_model(dtype="float32"))
        self.assertTrue(all((one[name] == exact[name].bfloat16()).all() for name in one))

    def test_command_line(self):
        """A second run leaves every file as it is; another model's directory is left alone."""
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-B", support.TOOLS / "demo_model.py"]
            target = pathlib.Path(folder, "demo")
            subprocess.run([*command, target], check=True)
            times = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
            self.assertEqual(times.keys(), set(os.listdir(self.folder)))
            (target / "config.json").write_text("{}")
            subprocess.run([*command, target], check=True)
            after = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
            changed = [name for name in times if times[name] != after[name]]
            self.assertEqual(changed, ["config.json"])
            (target / "notes.txt").write_text("mine")
            done = subprocess.run([*command, target], capture_output=True, text=True)
            self.assertEqual(done.returncode, 1)
            self.assertRegex(done.stderr, r"\Ademo_model: error: [^\n]*notes.txt[^\n]*\n\Z")


if __name__ == "__main__":
    unittest.main()
