"""Seal a model: a Hugging Face directory becomes one encrypted file that only its key opens.

    seal.py MODEL_DIR OUT.mus --key FILE.key       seal a directory, or a model of the hub by its id
    seal.py OUT.mus --key FILE.key                 seal the default model of the hub
    seal.py --info FILE.mus                        what its header says; needs no key
    seal.py --verify FILE.mus --key FILE.key       decrypt and authenticate every chunk
    seal.py --rewrap FILE.key                      change the key file's passphrase, nothing else

For the owner's station: the weights and their key are in clear here, and nowhere else. The key
file is made if it is missing, otherwise its key and asset are used again. Beside OUT.mus lies
OUT.mus.vocab, the public table of token ids that proxies need. Either both files come out whole,
or none does.
"""

import argparse
import collections
import contextlib
import fnmatch
import getpass
import hashlib
import json
import mmap
import os
import pathlib
import random
import re
import secrets
import shutil
import signal
import stat
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import owner  # noqa: E402
import prompting  # noqa: E402
import weights  # noqa: E402

import muprotocol as mp  # noqa: E402
import muproxy  # noqa: E402

DEFAULT_MODEL = "unsloth/Llama-3.2-3B-Instruct"
INDEX = "model.safetensors.index.json"
NEEDED = ("config.json", "tokenizer.json")
PROMPTS, FACTS = "prompts.json", "model.json"  # what is made of files, beside the table
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    INDEX,
)
TAKEN = (*SETTINGS, "tokenizer.json", "chat_template.jinja", "*.safetensors")
SEALED = ("config.json", "*.safetensors")  # others are checked and read
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")  # loading one runs its code
TENSOR_ALIGNMENT = 64  # of tensor data in the plaintext: engines map it and compute in place
SCRYPT = {"n": 1 << 17, "r": 8, "p": 1}  # half a second and 128 MiB a guess
SCRYPT_MEMORY = 256 << 20
LONGEST_PASSPHRASE = 4096  # bytes, its line's end included
LONGEST_TOKEN = (1 << 16) - 1  # bytes; the table's lengths have two
VOCABULARY_LIMIT = 1 << 24
SHUFFLES = 3  # how often every token id is decoded, each time among others
RUN = 32  # ids decoded at once
TEXTS = (
    "It's the year 2024, isn't it?  Two  spaces; a tab\tand a line:\n\n    indented\r\n",
    "na\u00efve Stra\u00dfe \u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093 \ud55c e\u0301",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f469\u200d\U0001f52c \U0001f1e9\U0001f1ea \u2581 \u0120 <0x41> <s> \ufffd \x00\x7f",
)

Source = collections.namedtuple("Source", "offset size data")  # data: a descriptor, or bytes
# names: of the files that are sealed as they are; made: {PROMPTS and FACTS: bytes}.
Model = collections.namedtuple("Model", "folder names left_out model_type table made")


class SealError(Exception):
    """It can't be sealed, read or verified; the text is one line that says why."""


# ---------------------------------------------------------------- the model's directory


def read_model(folder):
    """The model of a directory, checked: what is taken of it, and its vocabulary table.

    Raises SealError for whatever an enclave would not or should not load.
    """
    check_tree(folder)
    present = sorted(os.listdir(folder))
    names = [name for name in present if is_among(name, TAKEN)]
    for name in names:
        if not mp.is_name(name):
            raise SealError(f"{folder}: {name!r} is not a plain file name")
        if not os.path.isfile(folder / name):
            raise SealError(f"{folder / name} is not a regular file")
    for name in NEEDED:
        if name not in names:
            raise SealError(f"{folder} has no {name}: it is not a model directory")
    settings = {name: read_settings(folder / name) for name in SETTINGS if name in names}
    tensors = check_weights(folder, names, settings.get(INDEX))
    files = sorted({tensor[3] for tensor in tensors})
    names = [name for name in names if not name.endswith(".safetensors")] + files
    model_type, size = (settings["config.json"].get(name) for name in ("model_type", "vocab_size"))
    if not mp.is_name(model_type):
        raise SealError(f"{folder / 'config.json'}: its model_type is not a name")
    if not mp.is_integer(2, VOCABULARY_LIMIT)(size):
        raise SealError(f"{folder / 'config.json'}: its vocab_size is not a number of tokens")
    table = vocabulary_table(folder / "tokenizer.json", size)
    made = {PROMPTS: read_prompts(folder, settings), FACTS: read_facts(folder, tensors, settings)}
    left_out = [name for name in present if name not in names and (folder / name).is_file()]
    names = [name for name in names if is_among(name, SEALED)]
    return Model(folder, names, left_out, model_type, table, made)


def is_among(name, patterns):
    """Whether a file's name fits one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def read_prompts(folder, settings):
    """PROMPTS of a directory, as bytes; settings: {name: object} of its files. SealError."""
    config = settings.get("tokenizer_config.json", {}) | settings.get("special_tokens_map.json", {})
    template = folder / "chat_template.jinja"
    try:
        text = template.read_bytes().decode() if template.exists() else ""
        tokenizer = (folder / "tokenizer.json").read_text("utf-8")
        prompts = prompting.make_prompts(tokenizer, config, text)
    except UnicodeDecodeError:
        raise SealError(f"{template}: not UTF-8") from None
    except ValueError as error:
        raise SealError(f"{folder}: {error}") from None
    return json.dumps(prompts, separators=(",", ":")).encode()


def read_facts(folder, tensors, settings):
    """FACTS of a directory, as bytes; tensors: as check_weights gives them. SealError."""
    generation = settings.get("generation_config.json", {})
    try:
        facts = weights.make_facts(tensors, settings["config.json"], generation)
    except ValueError as error:
        raise SealError(f"{folder}: {error}") from None
    return json.dumps(facts, separators=(",", ":")).encode()


def check_tree(folder):
    """Refuse pickles and links that lead outside, at any depth. Raises SealError."""
    inside = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = os.path.join(place, name)
            target = os.path.realpath(path)
            if os.path.commonpath([inside, target]) != inside:
                raise SealError(f"{path} is a link out of the directory: copy the file there")
        for name in sorted(files):
            if is_among(name.lower(), PICKLES):
                path = os.path.join(place, name)
                raise SealError(f"{path} may be a pickle, which can run code: take it away")


def read_settings(path):
    """A JSON object of the model's. Raises SealError; also if it names code to be loaded."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SealError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise SealError(f"{path}: not a JSON object")
    if path.name != INDEX and has_key(value, "auto_map"):
        raise SealError(f"{path}: auto_map names code to be loaded, which is never done")
    return value


def has_key(value, key):
    """Whether this key occurs at any depth of a JSON value."""
    if isinstance(value, dict):
        return key in value or any(has_key(item, key) for item in value.values())
    return isinstance(value, list) and any(has_key(item, key) for item in value)


def check_weights(folder, names, index):
    """[[name, dtype, shape, file, start, size]] of all tensors; index: its content. SealError.

    Headers are checked, and that each tensor is in one file, the one that the index says.
    """
    files = ["model.safetensors"]
    if index is not None:
        places = index.get("weight_map")
        if not isinstance(places, dict) or not all(map(mp.is_name, places.values())):
            raise SealError(f"{folder / INDEX}: a file's name in it is not a plain name")
        files = sorted(set(places.values()))
    for name in files:
        if name not in names or not name.endswith(".safetensors"):
            raise SealError(f"{folder} has no {name}; weights in safetensors form are needed")
    tensors, found = [], {}
    for file in files:
        for name, dtype, shape, start, size in tensor_entries(folder / file):
            if found.setdefault(name, file) != file:
                raise SealError(f"{folder / file}: {name} is in {found[name]} too")
            tensors.append([name, dtype, shape, file, start, size])
    if index is not None and found != places:
        tensor = sorted(found.items() ^ places.items())[0][0]
        raise SealError(f"{folder / INDEX} does not agree with the files about {tensor}")
    return tensors


def tensor_entries(path):
    """A safetensors file's tensors (weights.safetensors_entries). SealError if it is not sound."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return weights.safetensors_entries(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SealError(f"{path}: not a sound safetensors file: {error}") from None


def tensor_data(path):
    """Where tensor data begin in a file: after the header of a safetensors file, else at 0."""
    if path.suffix != ".safetensors":
        return 0
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


# ---------------------------------------------------------------- the vocabulary table


def vocabulary_table(path, size):
    """The bytes of every token id, as a list of at least `size`; special tokens have none.

    Only for tokenizers that this renders: byte-level ones, and SentencePiece's with byte fallback.
    Proved against the tokenizer's own decoding; SealError names a counterexample.
    """
    from tokenizers import Tokenizer

    try:
        text = path.read_text("utf-8")
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001  the library raises nothing narrower
        raise SealError(f"{path}: {first_line(error)}") from None
    fields = json.loads(text)
    kinds = set(decoder_kinds(fields.get("decoder")))
    special = {token["id"] for token in fields.get("added_tokens") or () if token["special"]}
    ids = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * max(size, 1 + max(ids.values(), default=0))
    for token, number in ids.items():
        if number not in special:
            table[number] = token_bytes(token, kinds)
    if len(table) > VOCABULARY_LIMIT or max(map(len, table)) > LONGEST_TOKEN:
        raise SealError(f"{path}: too many tokens, or one that is too long")
    fallback = [ids.get(f"<0x{byte:02X}>") for byte in range(256)]
    check_table(path, tokenizer, table, fallback if "ByteFallback" in kinds else [])
    return table


def decoder_kinds(value):
    """The types of a decoder and its parts, from its JSON."""
    if isinstance(value, dict):
        yield value.get("type")
        for part in value.get("decoders") or ():
            yield from decoder_kinds(part)


def byte_letters():
    """{letter: byte} of GPT-2's byte-level tokens: bytes that can't be seen have other letters."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(b): b for b in seen} | {chr(256 + n): b for n, b in enumerate(hidden)}


BYTE_LETTERS = byte_letters()


def token_bytes(token, kinds):
    """What a token that isn't special adds to the text, by the kinds of its decoder's parts."""
    if "ByteLevel" in kinds:
        is_mapped = all(letter in BYTE_LETTERS for letter in token)
        return bytes(BYTE_LETTERS[letter] for letter in token) if is_mapped else token.encode()
    if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def check_table(path, tokenizer, table, fallback):
    """Compare the table with the tokenizer's decoding: every id, and samples of text. SealError.

    fallback: ids of the 256 byte tokens, or empty. They are tried as whole characters only: of
    broken UTF-8 that decoder drops more than the bad bytes. Ids are decoded after a letter, as an
    answer follows a prompt: some decoders drop a space at the very start of a text.
    """
    letter = tokenizer.encode("a", add_special_tokens=False).ids
    before = tokenizer.decode(letter).encode()
    draw = random.Random(0)
    runs = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    if None not in fallback:
        runs += [[fallback[byte] for byte in text.encode()] for text in TEXTS if fallback]
    ids = [number for number in range(len(table)) if number not in fallback]
    runs += [[number] for number in ids]
    for _ in range(SHUFFLES):
        draw.shuffle(ids)
        runs += [ids[at : at + RUN] for at in range(0, len(ids), RUN)]

    def texts(ids):
        data = before + b"".join(table[number] for number in ids)
        wanted = tokenizer.decode(letter + ids, skip_special_tokens=True)
        return wanted, data.decode("utf-8", "replace")

    for run in runs:
        wanted, got = texts(run)
        if wanted != got:
            pairs = [run[at : at + n] for n in (1, 2) for at in range(len(run) - n + 1)]
            parts = [part for part in pairs if not set(part) & set(fallback)]
            part = next((part for part in parts if len(set(texts(part))) > 1), run)
            wanted, got = texts(part)
            raise SealError(
                f"{path}: ids {part} after 'a' are {wanted!r}, but byte by byte {got!r}: "
                "this tokenizer's text can't be put together from ids"
            )


# ---------------------------------------------------------------- files that come out whole

PARTS = set()  # paths of files that are not whole yet


@contextlib.contextmanager
def replacing(path, mode=0o666, is_new=False):
    """Descriptor of a file that gets the name `path` when the block ends well, and else vanishes.

    is_new: refuse to take another file's place.
    """
    part = f"{path}.{secrets.token_hex(4)}.part"
    PARTS.add(part)
    file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        yield file
        os.fsync(file)
        if is_new:
            os.link(part, path)
        else:
            os.replace(part, path)
    finally:
        os.close(file)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        PARTS.discard(part)
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def end(number, _):
    """On a signal: unlink what is not whole, wherever the program was; then unwind as usual."""
    for part in PARTS:
        with contextlib.suppress(OSError):
            os.unlink(part)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(1)


def write_all(file, data, offset=0):
    """Write all of the data at this offset."""
    data = memoryview(data)
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def check_output(path):
    """Refuse a place where no sealed model can be written, before any work. Raises SealError."""
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise SealError(f"{path}: there is no such directory")
    if os.path.exists(path) and not os.path.isfile(path):
        raise SealError(f"{path} is there, and is not a regular file")


# ---------------------------------------------------------------- the weights key's file


def encode_key(asset, key, passphrase):
    """A key file's content: the weights key in clear, or wrapped under a passphrase (scrypt)."""
    facts = {"version": 1, "asset": asset}
    if passphrase is None:
        return mp.encode_json(facts | {"key": key.hex()}) + b"\n"
    facts["scrypt"] = SCRYPT | {"salt": secrets.token_hex(16)}
    salt, nonce = bytes.fromhex(facts["scrypt"]["salt"]), secrets.token_bytes(12)
    secret = passphrase.encode()
    wrapping = hashlib.scrypt(secret, salt=salt, maxmem=SCRYPT_MEMORY, dklen=32, **SCRYPT)
    wrapped = mp.aead(wrapping).encrypt(nonce, key, mp.encode_json(facts))
    return mp.encode_json(facts | {"nonce": nonce.hex(), "wrapped": wrapped.hex()}) + b"\n"


def existing_key(flags):
    """(asset, weights key) of the key file, or None if there is none. Raises SealError, Failure."""
    if not os.path.lexists(flags.key):
        return None
    asset, key, is_wrapped = read_key(flags)
    if flags.asset not in (None, asset):
        raise SealError(f"{flags.key} is the key of asset {asset}: another asset needs its own key")
    if (flags.passphrase or flags.passphrase_file) and not is_wrapped:
        raise SealError(f"{flags.key} has no passphrase; --rewrap {flags.key} gives it one")
    return asset, key


def make_key(flags, name):
    """(asset, weights key), both new and in the key file. Raises SealError, Failure.

    name: what the asset is called after, unless the flags name it.
    """
    asset, key = flags.asset or new_asset(name), secrets.token_bytes(32)
    has_passphrase = flags.passphrase or flags.passphrase_file
    passphrase = new_passphrase(flags.passphrase_file) if has_passphrase else None
    with replacing(flags.key, 0o600, is_new=True) as file:
        write_all(file, encode_key(asset, key, passphrase))
    return asset, key


def read_key(flags):
    """(asset, weights key, whether it was wrapped) of a key file. Raises SealError, Failure."""
    asked = []

    def ask():
        asked.append(True)
        return passphrase_of(flags.passphrase_file, f"passphrase of {flags.key}: ")

    return *owner.read_key_file(flags.key, ask), bool(asked)


def new_asset(name):
    """A public name that no other asset has: what it is called after, and 8 random digits."""
    plain = re.sub("[^A-Za-z0-9._-]+", "-", name).strip("-._")[:100] or "model"
    return f"{plain}-{secrets.token_hex(4)}"


def passphrase_of(path, prompt):
    """A passphrase from a private file, or from the terminal. Raises SealError."""
    if path:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise SealError(f"{path}: others can read it; chmod 600 {path}")
            try:
                return file.read(LONGEST_PASSPHRASE).decode().rstrip("\r\n")
            except UnicodeDecodeError:
                raise SealError(f"{path}: not UTF-8") from None
    if not sys.stdin.isatty():
        raise SealError("a passphrase is needed, but there is no terminal: see --passphrase-file")
    return getpass.getpass(prompt)


def new_passphrase(path):
    """A new passphrase; a terminal asks twice. Raises SealError."""
    first = passphrase_of(path, "new passphrase: ")
    if not first:
        raise SealError("an empty passphrase protects nothing")
    if not path and getpass.getpass("once more: ") != first:
        raise SealError("the two passphrases differ; nothing was changed")
    return first


def rewrap(flags):
    """--rewrap: the same key and asset under another passphrase, or none."""
    flags.key = flags.rewrap
    asset, key, _ = read_key(flags)
    passphrase = None if flags.no_passphrase else new_passphrase(flags.new_passphrase_file)
    with replacing(flags.key, 0o600) as file:
        write_all(file, encode_key(asset, key, passphrase))
    print(f"{flags.key}: {'in clear now' if passphrase is None else 'has a new passphrase'}")


# ---------------------------------------------------------------- sealing


def lay_out(model, open_file):
    """(sources, plaintext length): every file's place, tensor data at multiples of the alignment.

    open_file(path) gives a descriptor. What was made comes first.
    """
    sources, end = {}, 0
    vocabulary = mp.encode_vocabulary(model.table)
    if len(vocabulary) >= mp.MESSAGE_LIMIT:  # the loader tells it the gate in one
        raise SealError(f"{model.folder}: the tokens' texts are too long together")
    made = {mp.VOCABULARY_FILE: vocabulary} | model.made
    for name, data in made.items():
        sources[name] = Source(end, len(data), data)
        end += len(data)
    for name in model.names:
        path = model.folder / name
        file = open_file(path)
        offset = end + -(end + tensor_data(path)) % TENSOR_ALIGNMENT
        sources[name] = Source(offset, os.fstat(file).st_size, file)
        end = offset + sources[name].size
    return sources, end


def make_header(model, sources, length, asset, key, chunk_size):
    """The container for this plaintext, with a fresh salt."""
    salt = secrets.token_hex(32)
    header = {
        "version": 1,
        "asset": asset,
        "model_type": model.model_type,
        "chunk_size": chunk_size,
        "chunks": -(-length // chunk_size),
        "length": length,
        "salt": salt,
        "commitment": mp.key_commitment(key, salt).hex(),
        "vocabulary": hashlib.sha256(sources[mp.VOCABULARY_FILE].data).hexdigest(),
        "files": [{"path": n, "offset": s.offset, "size": s.size} for n, s in sources.items()],
    }
    encoded = mp.encode_json(header)
    if len(encoded) > mp.HEADER_LIMIT:
        raise SealError(f"{model.folder}: too many files")
    return mp.Container(encoded)


def write_container(container, key, sources, file, tell):
    """Encrypt every chunk into its place; the rest of the file is zeros."""
    cipher = mp.aead(container.chunk_key(key))
    size = container.sealed_size()
    os.ftruncate(file, size)
    if hasattr(os, "posix_fallocate"):  # a full disk is noticed now
        os.posix_fallocate(file, 0, size)
    prefix = mp.MAGIC + len(container.header).to_bytes(4, "big")
    write_all(file, prefix + container.header)

    def work(index, plain, sealed):
        offset, start, size, nonce = container.chunk(index)
        plain, sealed = plain[:size], sealed[: size + mp.TAG]
        fill(plain, start, sources.values())
        if hasattr(cipher, "encrypt_into"):  # cryptography >= 47: no copy
            cipher.encrypt_into(nonce, plain, None, sealed)
        else:
            sealed[:] = cipher.encrypt(nonce, plain, None)
        write_all(file, sealed, offset)
        tell(size)

    for_chunks(container, work)
    os.fsync(file)


def fill(view, start, sources):
    """Fill memory with the plaintext from `start` on: the sources' bytes, and zeros between."""
    view[:] = bytes(len(view))
    for source in sources:
        low = max(start, source.offset)
        high = min(start + len(view), source.offset + source.size)
        if low >= high:
            continue
        part = view[low - start : high - start]
        if isinstance(source.data, bytes):
            part[:] = source.data[low - source.offset : high - source.offset]
        else:
            read_at(source.data, part, low - source.offset)


def read_at(file, view, offset):
    """Fill memory from a file. Raises EOFError if it ends before."""
    while view:
        count = os.preadv(file, [view], offset)
        if not count:
            raise EOFError
        view, offset = view[count:], offset + count


def for_chunks(container, work):
    """work(index, plain, sealed) for every chunk, on a warm thread a core with its own two buffers.

    So memory is bounded by two chunks a core. The first exception ends all, and is raised.
    """
    workers = min(os.cpu_count() or 1, container.chunks)
    stop = threading.Event()

    def run(first):
        plain = memoryview(bytearray(container.chunk_size))
        sealed = memoryview(bytearray(container.chunk_size + mp.TAG))
        try:
            for index in range(first, container.chunks, workers):
                if stop.is_set():
                    return
                work(index, plain, sealed)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(run, range(workers)))
        finally:
            stop.set()


def seal(model, asset, key, flags):
    """Seal a checked model into its two files. Returns the container."""
    vocabulary = f"{flags.output}.vocab"
    with contextlib.ExitStack() as stack:

        def open_file(path):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, file)
            return file

        sources, length = lay_out(model, open_file)
        container = make_header(model, sources, length, asset, key, flags.chunk_size)
        tell = progress("sealing", length)
        # Left in reverse: the table gets its name first, and the sealed model is there last.
        with replacing(flags.output) as file, replacing(vocabulary) as table:
            write_all(table, sources[mp.VOCABULARY_FILE].data)
            try:
                write_container(container, key, sources, file, tell)
            except EOFError:
                raise SealError(f"{model.folder}: a file became shorter meanwhile") from None
    return container


# ---------------------------------------------------------------- the hub


def download(repository, folder):
    """Download a model's files from the hub into a plain directory. Raises SealError."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub import snapshot_download

    print(f"downloading {repository} into {folder}", flush=True)
    patterns = {"allow_patterns": list(TAKEN), "ignore_patterns": ["*/*"]}
    try:
        snapshot_download(repository, local_dir=folder, **patterns)
    except Exception as error:  # noqa: BLE001  the hub's client raises many kinds
        text = f"can't download {repository}: {first_line(error)}"
        raise SealError(f"{text}; no directory here has that name either") from None


def run_seal(flags):
    """Seal a directory, or a model of the hub through a directory that is removed afterwards."""
    began = time.monotonic()
    check_output(flags.output)
    secret = existing_key(flags)
    folder = pathlib.Path(flags.model)
    is_local = folder.is_dir()
    if not is_local:
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", flags.model) or folder.exists():
            raise SealError(f"{folder} is neither a directory nor a model's id on the hub")
        folder = pathlib.Path(f"{flags.output}.download")  # kept until sealed: a download resumes
        download(flags.model, folder)
    model = read_model(folder)
    if model.left_out:
        print(f"left out: {', '.join(model.left_out)}")
    name = folder.resolve().name if is_local else flags.model.rpartition("/")[2]
    container = seal(model, *(secret or make_key(flags, name)), flags)
    if not is_local:
        shutil.rmtree(folder)
    seconds = time.monotonic() - began
    print(f"sealed {len(model.names)} files, {container.length:,} bytes, in {seconds:.1f} s")
    print(f"asset {container.fields['asset']}, model {container.digest}")
    print(f"wrote {flags.output} and {flags.output}.vocab; their key is {flags.key}")


# ---------------------------------------------------------------- reading


def read_header(path, file):
    """The container of an open sealed model. Raises SealError."""
    prefix = os.pread(file, mp.PREFIX, 0)
    try:
        header = os.pread(file, mp.header_length(prefix), mp.PREFIX)
        return mp.Container(header)
    except mp.ProtocolError as error:
        raise SealError(f"{path}: not a sound sealed model: {error.detail}") from None


def run_info(flags):
    """--info: print what the header says. It is not authentic before --verify has said so."""
    with open(flags.info, "rb") as file:
        container = read_header(flags.info, file.fileno())
    for name in ("asset", "model_type", "length", "chunk_size", "chunks", "vocabulary"):
        print(f"{name:12}{container.fields[name]}")
    print(f"{'model':12}{container.digest}")
    print(f"{'sealed size':12}{container.sealed_size()}")
    for name, (offset, size) in container.files.items():
        print(f"{'file':12}{offset:>14} {size:>14} {name}")


def run_verify(flags):
    """--verify: authenticate every chunk with the key; nothing that is decrypted is kept."""
    asset, key, _ = read_key(flags)
    with open(flags.verify, "rb") as file:
        container = read_header(flags.verify, file.fileno())
        if not container.is_key(key):
            raise SealError(f"{flags.key} is not the key of {flags.verify}")
        if container.fields["asset"] != asset:
            raise SealError(f"{flags.verify}: its asset is not {asset}, whose key this is")
        tell = progress("verifying", container.length)
        table = verify_chunks(flags.verify, file.fileno(), container, key, tell)
        check_padding(flags.verify, file.fileno(), container)
    if hashlib.sha256(table).hexdigest() != container.fields["vocabulary"]:
        raise SealError(
            f"{flags.verify}: its vocabulary table is not the one that its header names"
        )
    beside = f"{flags.verify}.vocab"
    if os.path.exists(beside) and pathlib.Path(beside).read_bytes() != table:
        raise SealError(f"{beside} is not this model's vocabulary table")
    print(f"{flags.verify}: all {container.chunks} chunks are authentic")
    print(f"asset {asset}, model {container.digest}")


def verify_chunks(path, file, container, key, tell):
    """Decrypt all chunks; return the vocabulary table among them. Raises SealError."""
    from cryptography.exceptions import InvalidTag

    cipher = mp.aead(container.chunk_key(key))
    offset, size = container.files.get(mp.VOCABULARY_FILE, (0, 0))
    table = bytearray(size)

    def work(index, plain, sealed):
        place, start, length, nonce = container.chunk(index)
        plain, sealed = plain[:length], sealed[: length + mp.TAG]
        try:
            read_at(file, sealed, place)
            if hasattr(cipher, "decrypt_into"):  # cryptography >= 47: no copy
                cipher.decrypt_into(nonce, sealed, None, plain)
            else:
                plain[:] = cipher.decrypt(nonce, sealed, None)
        except EOFError:
            raise SealError(f"{path}: it ends within chunk {index} of {container.chunks}") from None
        except InvalidTag:
            raise SealError(f"{path}: chunk {index} is not authentic: it was changed") from None
        low, high = max(start, offset), min(start + length, offset + size)
        if low < high:
            table[low - offset : high - offset] = plain[low - start : high - start]
        tell(length)

    for_chunks(container, work)
    return bytes(table)


def check_padding(path, file, container):
    """Refuse anything but zeros after the last chunk; a block device may be longer. SealError."""
    offset, _, size, _ = container.chunk(container.chunks - 1)
    end = offset + size + mp.TAG
    padding = bytes(container.sealed_size() - end)
    if os.pread(file, len(padding), end) != padding:
        raise SealError(f"{path}: it does not end in the zeros that belong there")
    is_file = stat.S_ISREG(os.fstat(file).st_mode)
    if is_file and os.fstat(file).st_size != container.sealed_size():
        raise SealError(f"{path}: something was appended to it")


# ---------------------------------------------------------------- command line


def progress(verb, total):
    """A function that counts bytes, from any thread, and draws a bar if there is a terminal."""
    began, lock = time.monotonic(), threading.Lock()
    done, drawn = 0, 0.0

    def tell(count):
        nonlocal done, drawn
        with lock:
            done += count
            now = time.monotonic()
            if sys.stderr.isatty() and (done == total or now - drawn > 0.1):
                drawn = now
                bar = "#" * (30 * done // total)
                rate = done / max(now - began, 1e-6) / 1e6
                end = "\n" if done == total else ""
                text = f"\r{verb} [{bar:30}] {100 * done // total:3}% {rate:,.0f} MB/s\x1b[K"
                print(text, end=end, file=sys.stderr, flush=True)

    return tell


def first_line(error):
    """The first line of what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parse(argv):
    """The command line's flags; argparse ends the program for wrong ones."""
    parser = argparse.ArgumentParser(
        prog="seal.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument("paths", nargs="*", metavar="[MODEL] OUT.mus", help="what, and where to")
    parser.add_argument("--key", metavar="FILE", help="the weights key's file, mode 0600")
    parser.add_argument("--asset", metavar="NAME", help="a new key's asset; else drawn from MODEL")
    parser.add_argument("--chunk-size", type=int, default=mp.CHUNK_SIZE, metavar="BYTES")
    parser.add_argument("--passphrase", action="store_true", help="wrap a new key: asks for one")
    parser.add_argument("--passphrase-file", metavar="FILE", help="read the key's passphrase here")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--info", metavar="FILE.mus", help="print its header")
    modes.add_argument("--verify", metavar="FILE.mus", help="authenticate all of it")
    modes.add_argument("--rewrap", metavar="FILE.key", help="change a key file's passphrase")
    parser.add_argument("--new-passphrase-file", metavar="FILE", help="for --rewrap")
    parser.add_argument("--no-passphrase", action="store_true", help="--rewrap: leave it in clear")
    flags = parser.parse_intermixed_args(argv)
    if bool(flags.paths) == bool(flags.info or flags.verify or flags.rewrap):
        parser.error("either OUT.mus, or one of --info, --verify, --rewrap")
    if len(flags.paths) > 2:
        parser.error("at most a model and OUT.mus")
    if (flags.paths or flags.verify) and not flags.key:
        parser.error("--key FILE is needed")
    if not mp.HEADER["chunk_size"](flags.chunk_size):
        parser.error("--chunk-size is 4096 to 67108864")
    if flags.asset is not None and not mp.is_name(flags.asset):
        parser.error("--asset is a plain name: letters, digits, dots, dashes")
    flags.model, flags.output = (
        ([DEFAULT_MODEL] + flags.paths)[-2:] if flags.paths else (None, None)
    )
    return flags


def main(argv=None):
    """The command line. Returns the exit status."""
    flags = parse(argv)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, end)
    modes = {"info": run_info, "verify": run_verify, "rewrap": rewrap}
    run = next((run for name, run in modes.items() if getattr(flags, name)), run_seal)
    try:
        run(flags)
    except (SealError, muproxy.Failure, mp.ProtocolError) as error:
        print(f"seal: error: {muproxy.text_of(error)}", file=sys.stderr)
    except OSError as error:
        path = error.filename or flags.output or flags.verify or flags.info
        print(f"seal: error: {path}: {error.strerror or error}", file=sys.stderr)
    except ImportError as error:
        print(f"seal: error: {error}: pip install 'muenclave[inference,tools]'", file=sys.stderr)
    except KeyboardInterrupt:
        print("seal: interrupted; nothing was written", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
