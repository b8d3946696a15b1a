"""The models of tools/bench.py: random weights of a known shape, with a real tokenizer.

They answer nonsense, at the price of a model of their shape. No answer ends before its limit: the
rows of the special tokens are zero, so that greedy sampling never takes one. Made once, from a
fixed seed, in the user's cache (tools/demo_model.py); so are the sealed and the GGUF copies.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import random

import demo_model
from demo_model import PACKAGES, SPECIAL, cached
from environment import ROOT, ToolError, run

TOOLS = ROOT / "tools"
LAYERS = ("hidden_size", "intermediate_size", "num_hidden_layers")
HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
SHAPES = {  # LAYERS, then HEADS; the embeddings are tied
    "145m": (1024, 2816, 10, 16, 4, 64, 32_000),
    "1b": (2048, 8192, 16, 32, 8, 64, 32_000),  # 2 GB
    "3b": (3072, 8192, 28, 24, 8, 128, 128_256),
    "tiny": (64, 128, 2, 4, 2, 16, 1_000),
}
LARGEST_VOCABULARY = 32_000  # of the tokenizer; a model of more has ids that no text becomes
TEXT_BYTES = 6 << 20  # of Python's library, that the tokenizer is trained on
SHARD = 500_000_000
CONTEXT = 4096
SEALERS = ("tools/seal.py", "tools/prompting.py", "tools/weights.py", "muprotocol.py")


def digest(*parts):
    """16 hexadecimal digits of texts and bytes."""
    data = b"\0".join(part if isinstance(part, bytes) else part.encode() for part in parts)
    return hashlib.sha256(data).hexdigest()[:16]


def read_texts():
    """The sources of Python's library, up to TEXT_BYTES: text that every Python has."""
    texts, left = [], TEXT_BYTES
    for path in sorted(pathlib.Path(os.__file__).parent.rglob("*.py")):
        if left > 0 and "site-packages" not in path.parts:
            texts.append(path.read_text("utf-8", errors="replace")[:left])
            left -= len(texts[-1])
    return texts


def make_tokenizer(size):
    """A byte-level BPE tokenizer of so many ids, with special tokens and a template. ToolError."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(read_texts(), BpeTrainer(vocab_size=size, **options))
    if tokenizer.get_vocab_size() != size:
        raise ToolError(f"Python's library gives {tokenizer.get_vocab_size()} tokens, not {size}")
    start = (demo_model.BOS, tokenizer.token_to_id(demo_model.BOS))
    tokenizer.post_processor = processors.TemplateProcessing(f"{demo_model.BOS} $A", None, [start])
    names = {"bos_token": demo_model.BOS, "eos_token": demo_model.EOT}
    names |= {"pad_token": demo_model.PAD}
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    whole.chat_template = demo_model.TEMPLATE
    return whole


def make_model(shape, dtype, folder):
    """Write a model of this shape to a folder, as save_pretrained does."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    fields = dict(zip((*LAYERS, *HEADS), SHAPES[shape], strict=True))
    tokenizer = make_tokenizer(min(fields["vocab_size"], LARGEST_VOCABULARY))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ends["pad_token_id"] = tokenizer.pad_token_id
    fields |= {"tie_word_embeddings": True, "max_position_embeddings": CONTEXT}
    scale = fields["hidden_size"] ** -0.5  # so large, the layers outweigh the last token's own row
    config = LlamaConfig(**fields, initializer_range=scale, **ends)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # whatever dtype is stored: the same numbers
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[: len(SPECIAL)] = 0
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)


def model_folder(shape, dtype="bfloat16"):
    """The cached model's directory."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    code = (TOOLS / "bench_model.py").read_bytes()
    name = digest(code, demo_model.TEMPLATE, platform.python_version(), *versions)
    return cached(f"bench-{shape}-{dtype}-{name}", lambda place: make_model(shape, dtype, place))


def sealed_folder(source, python):
    """The folder with the model sealed: model.mus, model.mus.vocab, model.key. ToolError."""
    code = b"".join((ROOT / name).read_bytes() for name in SEALERS)

    def make(folder):
        folder.mkdir()
        words = [source, folder / "model.mus", "--key", folder / "model.key", "--asset", "bench"]
        command = [python, "-B", TOOLS / "seal.py", *words]
        run(list(map(str, command)), "can't seal the benchmark's model")

    return cached(f"sealed-{digest(code)}-{source.name}", make)


def gguf_file(source, python):
    """The model as a GGUF file for llama.cpp; python: one that has gguf. ToolError."""
    converter = TOOLS / "bench_gguf.py"

    def make(folder):
        folder.mkdir()
        command = [python, "-B", converter, source, folder / "model.gguf"]
        run(list(map(str, command)), "can't convert the benchmark's model to GGUF")

    return cached(f"gguf-{digest(converter.read_bytes())}-{source.name}", make) / "model.gguf"


def make_prompts(shape, count, length, seed=0):
    """So many prompts of so many ids, none of them special, no two alike in their first."""
    size = min(SHAPES[shape][-1], LARGEST_VOCABULARY)
    draw = random.Random(seed)
    firsts = draw.sample(range(len(SPECIAL), size), count)
    rest = range(length - 1)
    return [[first, *(draw.randrange(len(SPECIAL), size) for _ in rest)] for first in firsts]
