"""What a replay audit finds, measured on the demo model: `replay_audit.py measure`.

An enclave answers, another one scores what it said, in fp32 and in bf16. Honest answers come first:
they say how many tokens are reproduced and how often an audit is a false alarm. From an engine with
one slot every token has to be equal; where seven other answers ran beside, a tolerance is chosen
first, by answers of their own. Then three that are not honest answer: (a) a model that was trained
for half as long, (b) the model with its weights rounded to 8 bits, (c) an engine that hides a bit
in each token, by taking the better or the second-best one. All of them are enclaves of the
product's code, as processes without a VM; (c) alone runs a changed copy.

The document: {"tool": "replay_audit", "version": 1, "verb": "measure", "model": {"parameters",
"vocabulary", "text"}, "rule": {"share" (with a tolerance), "false_alarm", "confidence"}, "honest":
[{"dtype", "batch", "mode": "exact" or "tolerance", "tolerance", "calibrated_by", "tokens", "equal",
"refused", "within_bits", "within_most", "unnoticed_bits", "audits", "false_alarms"}], "attacks":
[{"dtype", "batch", "mode", "tolerance", "attack", "tokens", "equal", "refused", "refused_interval",
"exchanges", "alone": exchanges that are an alarm by themselves, "needed": {"exchanges", "tokens"}
of a sample that finds it with the rule's confidence, null if all exchanges are too few}]}.
"""

import contextlib
import itertools
import json
import math
import os
import pathlib
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading

import demo_model as demo
import measure
import owner
import replay_audit as audit
import replay_statistics as stats

import muprotocol as mp
import muproxy
from muproxy import REFUSED, Failure

DTYPES = ("float32", "bfloat16")
BATCHES = (1, 8)  # slots of the engine; with one of them an audit is exact
SHORTER = 2  # times fewer steps of training: another model
LENGTH = 160  # tokens of an answer, at most
TEMPERATURES = (0, 0.7, 1.0, 1.5)
SHARE = 0.001  # of honest tokens: at most so many are refused
EXACT = audit.Rule(0, 0, 0.01, 0.95)
AUDITS = 200  # drawn again and again from the scores of one log
SAMPLE = 0.25  # share of the exchanges in such an audit of an honest log
FREE = 1 << 30  # bytes a second, and at once: meters that are effectively off
BUDGET = 1 << 28  # bytes
CALIBRATION = 0.4  # of the tokens: so many more to calibrate by
ATTACK_SHARE = 0.2  # of the tokens, for each attack
SECRETS = {"owner.psk": "psk", "user.psk": "psk", "token": "token"}
MODULES = ("muprotocol.py", "muenclave.py", "muproxy.py")
# (old text, new text) in muenclave.py: the secret's bits are the parities of what was said before.
SECOND = "[int(r.topk(2).indices[sum(s.ids) % 2]) for s, r in zip(streams, scores)]"
HIDING = (("scores.argmax(-1).tolist()", SECOND),)


def say(text):
    """Progress."""
    print(f"replay_audit: {text}", file=sys.stderr, flush=True)


def run(options):
    """The whole measurement. Returns the exit status. Raises Failure, ProtocolError, OSError."""
    least = math.ceil(stats.tokens_needed(SHARE, EXACT.confidence) / CALIBRATION)
    if options.tokens < least:
        raise Failure(f"--tokens: {least:,} or more are needed")
    honest, attacks = [], []
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = pathlib.Path(folder)
            for dtype in DTYPES:
                found = measure_type(place, dtype, options.tokens)
                honest += found[0]
                attacks += found[1]
    except demo.DemoError as error:
        raise Failure(str(error)) from None
    facts = {"tool": "replay_audit", "version": audit.VERSION, "verb": "measure"}
    facts |= {"model": describe(), "honest": honest, "attacks": attacks}
    rule = {"share": SHARE, "false_alarm": EXACT.false_alarm, "confidence": EXACT.confidence}
    show(options, facts | {"rule": rule})
    return muproxy.DONE


def describe():
    """The demo model's size."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(demo.demo_model("float32"))
    facts = {"parameters": model.num_parameters(), "vocabulary": model.config.vocab_size}
    return facts | {"text": "what Python's own documentation says, learned by heart"}


# ---------------------------------------------------------------- models


def other_model(dtype):
    """The folder of (a): the demo model's recipe, with a part of its steps."""
    return demo.demo_model(dtype, steps=demo.STEPS // SHORTER)


def quantised_model(source):
    """The folder of (b): a model whose matrices are rounded to int8 in each row, and back."""

    def make(folder):
        from safetensors.torch import load_file, save_file

        shutil.copytree(source, folder)
        for path in folder.glob("*.safetensors"):
            state = load_file(path)
            rounded = {name: rounded_to_int8(tensor) for name, tensor in state.items()}
            save_file(rounded, path, {"format": "pt"})

    return demo.cached(f"{source.name}-int8", make)


def rounded_to_int8(tensor):
    """A matrix as 127 steps to both sides in each row, as its own type; other tensors as is."""
    if tensor.dim() < 2:
        return tensor
    step = tensor.float().abs().amax(dim=1, keepdim=True) / 127
    return ((tensor.float() / step).round() * step).to(tensor.dtype)


# ---------------------------------------------------------------- enclaves


class Enclave:
    """An enclave of a model's folder, as a process without a VM, unlocked; a context manager.

    place: the folder for all its files; sealed models and secrets there are used again. code: the
    folder of the modules that it runs. slots: of its engine. is_verified: its lease's policy.
    """

    def __init__(self, place, source, slots, code=audit.ROOT, is_verified=False):
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=place))
        self.ledger, self.process = self.folder / "ledger", None
        self.model, self.key = (place / f"{source.name}.{kind}" for kind in ("mus", "key"))
        self.owner_psk, self.user_psk, self.token = (place / name for name in SECRETS)
        if not self.model.exists():
            self.tool("seal.py", source, self.model, "--key", self.key, "--asset", "demo")
        for name, kind in SECRETS.items():
            if not (place / name).exists():
                self.tool("owner.py", "keygen", kind, place / name)
        self.reference = self.folder / "reference.json"
        measured = mp.manifest_digest(measure.local_manifest(sys.executable, code))
        values = {"version": 1, "kind": "psk", "root": "psk", "withdrawn": []}
        self.reference.write_text(json.dumps(values | {"measurement": measured}), "ascii")
        self.address = self.start(slots, code)
        try:
            self.unlock(["--verified"] if is_verified else [])
        except BaseException:
            self.end()
            raise

    def tool(self, name, *arguments):
        """Run one of the project's tools. Raises Failure with its last line."""
        command = [sys.executable, "-B", audit.ROOT / "tools" / name, *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise Failure((done.stderr.strip() or name).splitlines()[-1], REFUSED)

    def start(self, slots, code):
        """Start it; its address. Raises Failure."""
        flags = ["--model", self.model, "--port", "0", "--rate", FREE, "--burst", FREE]
        flags += ["--slots", slots, "--threads", "1", "--code", code]
        flags += ["--owner-psk", self.owner_psk, "--user-psk", self.user_psk]
        command = [sys.executable, "-B", audit.ROOT / "tools" / "enclave.py", *flags]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("ENCLAVE_", "MODEL_"))}
        self.process = subprocess.Popen(
            list(map(str, command)), env=clean, stderr=subprocess.PIPE, text=True
        )
        line = ""
        for line in self.process.stderr:  # the few lines after it may stay in the pipe
            if "listening" in line:
                return "127.0.0.1", int(line.split()[-1])
        self.end()
        raise Failure(f"an enclave did not start: {line.strip()}")

    def unlock(self, policy):
        """As its owner does. policy: flags."""
        lease = ["--new-ledger", "--lifetime-budget", BUDGET, "--budget", BUDGET, *policy]
        lease += ["--rate", FREE, "--burst", FREE, "--token-file", self.token]
        self.tool("owner.py", "unlock", *self.flags(), "--ledger", self.ledger, *lease)

    def flags(self):
        """How the owner's tools reach and verify it, and release its key."""
        flags = ["--host", self.address[0], "--port", self.address[1], "--development"]
        flags += ["--reference", self.reference, "--psk", self.owner_psk]
        return [*flags, "--key", self.key, "--model", self.model]

    def session(self, role):
        """A session that has proved itself; a context manager."""
        psk = muproxy.read_secret(self.owner_psk if role == "owner" else self.user_psk)
        reference, inlet = muproxy.read_reference(self.reference), muproxy.Inlet(FREE, FREE)
        session = muproxy.Session(self.address, reference, psk, role, inlet)
        digest = muproxy.read_container(self.model).digest
        key = owner.read_key_file(self.key, None)[1].hex()
        token = {"token": muproxy.read_token(self.token)}
        session.prove({"key": key, "model": digest} if role == "owner" else token)
        return contextlib.closing(session)

    def vocabulary(self):
        """The token table of its model."""
        return muproxy.read_vocabulary(f"{self.model}.vocab")

    def end(self):
        """Make it end."""
        for ask in (self.process.terminate, self.process.terminate, self.process.kill):
            ask()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
                break
        self.process.stderr.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()


# ---------------------------------------------------------------- answers and their scores


def requests(seed):
    """Requests without an end, drawn by a seed: questions, and beginnings of texts."""
    draw = random.Random(seed)
    texts, answers = demo.corpus()
    for number in itertools.count():
        request = {"max_new_tokens": LENGTH, "seed": draw.getrandbits(63)}
        request["temperature"] = TEMPERATURES[number % len(TEMPERATURES)]
        if draw.random() < 0.5:
            question = draw.choice(demo.QUESTIONS).format(draw.choice(sorted(answers)))
            yield request | {"messages": [{"role": "user", "content": question}]}
        else:
            yield request | {"prompt": draw.choice(texts)[: draw.randrange(10, 60)]}


def answers(enclave, batch, tokens, seed, entries=None):
    """A Chain of so many tokens' answers or a bit more, `batch` of them at a time.

    It is verified against the chain's head, as an owner's is. entries: a list of what the enclave
    said before, as in the log, to which it is appended. Raises Failure if it is an alarm.
    """
    made, failures = requests(seed), queue.SimpleQueue()
    entries = [] if entries is None else entries
    lock, vocabulary = threading.Lock(), enclave.vocabulary()
    tokens += sum(len(entry["ids"]) for entry in entries)

    def work():
        try:
            with enclave.session("user") as session:
                while sum(len(entry["ids"]) for entry in entries) < tokens:
                    with lock:
                        request = next(made)
                    for _ in session.exchange(request, vocabulary):
                        pass
                    entries.append(dict(session.entry))
        except (mp.ProtocolError, Failure, OSError) as error:
            failures.put(error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(batch)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if not failures.empty():
        raise failures.get()
    with enclave.session("owner") as session:
        head = audit.Head("", session.ready["head"], None)
    numbered = [audit.Entry(number, **entry) for number, entry in enumerate(entries, 1)]
    chain = audit.Chain(numbered, [head])
    if chain.alarms() or len(chain.verified) != len(entries):
        raise Failure(f"the log of an honest proxy is an alarm: {chain.alarms()}", REFUSED)
    return chain


def score_all(scorer, entries, tolerance):
    """([Scored] of these exchanges, the context of the model in tokens)."""
    with scorer.session("owner") as session:
        scored = [audit.score(session, entry, tolerance) for entry in entries]
        return scored, session.ready["context"]


def judge(scorer, chain, entries, rule):
    """The Verdict on these exchanges of a chain, by a rule."""
    sample, context = score_all(scorer, entries, rule.tolerance)
    return audit.Verdict(sample, chain, rule, scorer.vocabulary(), context)


def measure_type(place, dtype, tokens):
    """(honest, attacks): the document's rows of one type of numbers."""
    source = demo.demo_model(dtype)
    honest, attacks = [], []
    with Enclave(place, source, 1) as scorer:
        for batch in BATCHES:
            say(f"{dtype}, {batch} at a time: {tokens:,} honest tokens")
            row, rule = measure_honest(place, scorer, source, batch, tokens)
            mode = "exact" if rule == EXACT else "tolerance"
            facts = {"dtype": dtype, "batch": batch, "mode": mode, "tolerance": rule.tolerance}
            honest.append(facts | row)
            for name, model, code in attack_models(place, source, dtype):
                say(f"{dtype}, {batch} at a time: {name}")
                with Enclave(place, model, batch, code, is_verified=True) as enclave:
                    chain = answers(enclave, batch, round(tokens * ATTACK_SHARE), 7)
                verdict = judge(scorer, chain, chain.verified, rule)
                attacks.append(facts | {"attack": name} | attack_row(verdict))
    return honest, attacks


def measure_honest(place, scorer, source, batch, tokens):
    """(what a row has of honest answers, the rule that they gave)."""
    before = 0 if batch == 1 else round(CALIBRATION * tokens)
    with Enclave(place, source, batch, is_verified=True) as enclave:
        chain = answers(enclave, batch, before + tokens + LENGTH, batch)
    first, others = split(chain.verified, before)
    rule = EXACT
    if first:
        sample, _ = score_all(scorer, first, 0)
        known = audit.calibrate(sample, SHARE, EXACT.confidence)
        rule = EXACT._replace(tolerance=known["tolerance"], share=SHARE)
    facts = {"calibrated_by": sum(len(entry.ids) for entry in first)}
    return facts | honest_row(judge(scorer, chain, others, rule)), rule


def split(entries, tokens):
    """(the first of these exchanges, of so many tokens or a bit more, all others)."""
    count = total = 0
    while total < tokens:
        total += len(entries[count].ids)
        count += 1
    return entries[:count], entries[count:]


def attack_models(place, source, dtype):
    """(name, folder of the model, folder of the code) of what is not honest."""
    yield "a model trained half as long", other_model(dtype), audit.ROOT
    yield "8-bit weights", quantised_model(source), audit.ROOT
    yield "a bit hidden in each token", source, hiding_code(place)


def hiding_code(place):
    """A folder with the product's modules, whose engine hides a bit in each token."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=place))
    for module in MODULES:
        shutil.copy(audit.ROOT / module, folder)
    text = (folder / "muenclave.py").read_text("utf-8")
    for old, new in HIDING:
        if text.count(old) != 1:
            raise Failure(f"muenclave.py has changed: {old!r}")
        text = text.replace(old, new)
    (folder / "muenclave.py").write_text(text, "utf-8")
    return folder


# ---------------------------------------------------------------- rows


def honest_row(verdict):
    """What honest answers gave."""
    tokens, hidden = verdict.figures["tokens"], verdict.figures["unnoticed"]
    row = {"tokens": tokens["all"], "equal": tokens["equal"], "refused": tokens["refused"]}
    row |= {"within_bits": hidden["within"], "within_most": hidden["within_interval"][1]}
    count = max(1, round(SAMPLE * len(verdict.sample)))
    row |= {"unnoticed_bits": hidden["most"], "audits": AUDITS}
    return row | {"false_alarms": sum(alarms(verdict, count))}


def attack_row(verdict):
    """What an attack gave, and how large a sample finds it."""
    tokens = verdict.figures["tokens"]
    row = {"tokens": tokens["all"], "equal": tokens["equal"], "refused": tokens["refused"]}
    row |= {"refused_interval": tokens["refused_interval"], "exchanges": len(verdict.sample)}
    row["alone"] = sum(is_alarm(verdict, [number]) for number in range(row["exchanges"]))
    row["needed"] = None
    for count in range(1, row["exchanges"] + 1):
        if sum(alarms(verdict, count)) >= EXACT.confidence * AUDITS:
            mean = tokens["all"] / row["exchanges"]
            row["needed"] = {"exchanges": count, "tokens": round(count * mean)}
            break
    return row


def alarms(verdict, count):
    """Whether each of AUDITS samples of so many exchanges is an alarm."""
    draw = random.Random(count)
    for _ in range(AUDITS):
        picked = draw.sample(range(len(verdict.sample)), count)
        yield is_alarm(verdict, picked)


def is_alarm(verdict, picked):
    """Whether an audit of these exchanges alone, by their number, is one."""
    return bool(verdict.judge(picked))


def show(options, facts):
    """Tell the figures, write the document."""
    for row in facts["honest"]:
        text = f"{row['equal'] / row['tokens']:.2%} of {row['tokens']:,} tokens equal,"
        text += f" {row['refused']:,} refused beyond {row['tolerance']:.3g} logits; at most"
        text += f" {row['unnoticed_bits']:.4f} bits a token unnoticed; {row['false_alarms']} of"
        audit.say(options, f"{title(row)}: {text} {row['audits']} audits a false alarm")
    for row in facts["attacks"]:
        needed = row["needed"]
        found = f"found in {needed['tokens']:,} tokens" if needed else "not found"
        text = f"{row['refused'] / row['tokens']:.2%} of {row['tokens']:,} tokens refused;"
        text += f" {row['alone']} of {row['exchanges']} answers are an alarm alone; {found}"
        audit.say(options, f"{title(row)}, {row['attack']}: {text}")
    audit.write(options.json, facts)


def title(row):
    """What a row is of."""
    return f"{row['dtype']}, {row['batch']} at a time, {row['mode']}"
