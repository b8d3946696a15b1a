"""Train a small real Llama on text that every Python carries, as a Hugging Face directory.

    python3 tools/demo_model.py OUT_DIR

It knows the Zen of Python and how the language reference's topics begin, as chat ("Tell me about
zen.") and as plain completion. One thread makes it the same on every run. It is trained once
and kept in the user's cache ($XDG_CACHE_HOME/muenclave), under a name drawn from this file, the
text and the packages.
"""

import argparse
import codecs
import contextlib
import fcntl
import filecmp
import hashlib
import importlib.metadata
import io
import math
import os
import pathlib
import random
import re
import shutil
import sys
import tempfile
import time

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
VOCABULARY = 768
BOS, EOT, START, END, PAD = (
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|pad|>",
)
SPECIAL = [BOS, EOT, START, END, PAD]
MARKS = ["<think>", "</think>"]  # added tokens that are text, as larger models have them
TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
TOPIC_CHARACTERS = 240  # of each topic: what the model can learn in the time
ANSWER_CHARACTERS = 160  # of each topic as an answer
QUESTIONS = ("Tell me about {}.", "Tell me about {}.", "What is {}?")
STEPS = 560
ROWS, WIDTH = 3, 384  # of a batch, in tokens
WARM_STEPS = 20
RATE = 4e-3


class DemoError(Exception):
    """The model can't be made; the text is one line that says why."""


# ---------------------------------------------------------------- text


def zen():
    """The Zen of Python."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


def corpus():
    """(texts, answers): plain texts, and {what it is about: answer}. Every Python has them."""
    from pydoc_data.topics import topics

    texts, answers = [zen()], {"zen": zen(), "the Zen of Python": zen()}
    for name, text in sorted(topics.items()):
        words = prose(text)
        texts.append(cut(words, TOPIC_CHARACTERS))
        answers[name.lower().replace("-", " ")] = cut(words, ANSWER_CHARACTERS)
    return texts, answers


def prose(text):
    """A topic's paragraphs on a line each, without headings, grammar and indented examples."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    is_prose = re.compile(r"(?!.*::=)[\"“\w][^\n]* [^\n]*(\n[^\s*=~^-][^\n]*)*[.:]", re.DOTALL)
    return "\n".join(" ".join(p.split()) for p in paragraphs if is_prose.fullmatch(p))


def cut(text, limit):
    """The text up to its last whole sentence within the limit, or else its last whole word."""
    short = text[:limit]
    sentence = re.match(r".*[.:](?=\s|$)", short, re.DOTALL)
    return text if short == text else sentence[0] if sentence else short.rsplit(None, 1)[0]


# ---------------------------------------------------------------- tokenizer


def make_tokenizer(texts):
    """A byte-level BPE tokenizer as transformers' class, with special tokens and a template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    trainer = BpeTrainer(vocab_size=VOCABULARY - len(MARKS), **options)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    start = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", None, [start])
    names = {"bos_token": BOS, "eos_token": EOT, "pad_token": PAD}
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    whole.chat_template = TEMPLATE
    return whole


# ---------------------------------------------------------------- training


def samples(tokenizer, texts, answers, draw):
    """Every text and every answer once, each a list of ids, in an order that is drawn."""
    rows = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts]
    for subject, answer in answers.items():
        question = draw.choice(QUESTIONS).format(subject)
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(tokenizer.apply_chat_template(chat, return_dict=False))
    draw.shuffle(rows)
    return rows


def batches(tokenizer, texts, answers, steps):
    """So many batches of ROWS rows; a row is whole samples one after another, at most WIDTH ids."""
    draw, rows = random.Random(0), []
    for _ in range(steps):
        while len(rows) <= ROWS:
            for ids in samples(tokenizer, texts, answers, draw):
                if rows and len(rows[-1]) + len(ids) <= WIDTH:
                    rows[-1] += ids
                else:
                    rows.append(ids)
        yield rows[:ROWS]
        del rows[:ROWS]


def train(say, steps=STEPS):
    """(model in float32, tokenizer); with other steps it is another model, of the same text."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # two would add in another order from run to run
    torch.manual_seed(0)
    texts, answers = corpus()
    tokenizer = make_tokenizer(texts + list(answers.values()))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ends["pad_token_id"] = tokenizer.pad_token_id
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE, **ends))
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    began = time.monotonic()
    for step, rows in enumerate(batches(tokenizer, texts, answers, steps), 1):
        warm, left = step / WARM_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(warm, left)
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        loss = model(ids, labels=ids.masked_fill(ids == tokenizer.pad_token_id, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps:
            seconds = time.monotonic() - began
            say(f"step {step} of {steps}, loss {loss.item():.2f}, {seconds:.0f} s")
    return model.eval(), tokenizer


# ---------------------------------------------------------------- files


def cache_folder():
    """Where this user's caches lie, for this project."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base, "muenclave")


def recipe():
    """What the model is a function of, as 16 hexadecimal digits. Raises DemoError."""
    try:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    except importlib.metadata.PackageNotFoundError as error:
        raise DemoError(
            f"{error.name} is not installed: pip install 'muenclave[inference]'"
        ) from None
    parts = [pathlib.Path(__file__).read_text("utf-8"), repr(corpus()), *versions]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def cached(name, make):
    """The cache's folder of this name; make(folder) fills it if it is not there yet."""
    place = cache_folder() / name
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.parent / f"{name}.lock", "w") as lock:  # one process makes it, others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=place.parent) as folder:
                make(pathlib.Path(folder, name))
                os.rename(pathlib.Path(folder, name), place)
    return place


def demo_model(dtype="bfloat16", shards=1, say=lambda text: None, steps=STEPS):
    """The cached model's directory, in about so many files of weights. Trained if it has to be."""
    name = f"demo-{recipe()}" + ("" if steps == STEPS else f"-{steps}")

    def make_trained(folder):
        model, tokenizer = train(say, steps)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def make_variant(folder):
        import torch
        from transformers import AutoTokenizer, LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        model = LlamaForCausalLM.from_pretrained(trained, dtype=getattr(torch, dtype))
        size = sum(tensor.nbytes for tensor in model.parameters())
        model.save_pretrained(folder, max_shard_size=-(-size // shards) + 1)
        AutoTokenizer.from_pretrained(trained).save_pretrained(folder)

    trained = cached(f"{name}-trained", make_trained)
    return cached(f"{name}-{dtype}-{shards}", make_variant)


def copy(source, folder):
    """Make a folder hold the source's files; files that are the same already stay untouched."""
    folder.mkdir(parents=True, exist_ok=True)
    stale = set(os.listdir(folder)) - set(os.listdir(source))
    if stale:
        first = sorted(stale)[0]
        raise DemoError(f"{folder} holds {first}, not of this demo model: name another directory")
    for file in source.iterdir():
        target = folder / file.name
        if not target.exists() or not filecmp.cmp(file, target, shallow=False):
            shutil.copyfile(file, target)


def show(text):
    """Progress: over itself on a terminal, a line now and then elsewhere."""
    if sys.stderr.isatty():
        print(f"\rdemo_model: {text}\x1b[K", end="", file=sys.stderr, flush=True)
    elif text.split()[1].endswith("00"):
        print(f"demo_model: {text}", file=sys.stderr, flush=True)


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="demo_model.py", description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=pathlib.Path, metavar="OUT_DIR")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--shards", type=int, default=1, help="files of weights, about so many")
    flags = parser.parse_args(argv)
    if flags.shards < 1:
        parser.error("--shards is 1 or more")
    try:
        source = demo_model(flags.dtype, flags.shards, show)
        copy(source, flags.out_dir)
    except ImportError as error:
        print(f"demo_model: error: {error}; pip install 'muenclave[inference]'", file=sys.stderr)
        return 1
    except (DemoError, OSError) as error:
        print(f"demo_model: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
