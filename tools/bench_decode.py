"""How fast the engine makes tokens, without processes around it: for tools/bench.py decode.

The same prompts go to the engine's decoder, to transformers' generate (one by one, and as one
static batch), to transformers' continuous batching, and to llama.cpp, each in a process of its own
that loads the same weights once (tools/bench_contender.py). Beside them stands the limit: memory is
read at some rate, and a step reads all weights once.
"""

import contextlib
import statistics
import subprocess
import sys

import bench_model
import bench_shared as shared
from bench_contender import CONTEXT, ROWS
from environment import ROOT, ToolError

CONTENDER = ROOT / "tools" / "bench_contender.py"
TRANSFORMERS = ("torch==2.13.0", "transformers[serving]==5.24.0", "accelerate==1.15.0")
LLAMA = ("llama-cpp-python[server]==0.3.36", "gguf==0.19.0", "numpy==2.3.5")
CONTENDERS = {
    "muenclave": "ours: the engine's decoder",
    "generate": "generate, one by one",
    "static": "generate, one static batch",
    "continuous": "transformers' continuous batching",
    "llama": "llama.cpp",
}
PACKAGES = dict.fromkeys(("generate", "static", "continuous"), TRANSFORMERS) | {"llama": LLAMA}
STREAMS = (1, 8, 32)
SMALL = ("145m", "tiny")  # shapes that are checked in fp32; the first, in place of larger ones
CHECKED = 8  # prompts of the check in fp32, and tokens of each
WARM = 4  # tokens of the round that does not count


# ---------------------------------------------------------------- what a round says


def measure_round(result):
    """The figures of one round: tokens a second, and seconds to the first token."""
    times = result["times"]
    firsts, last = [stream[0] for stream in times], max(stream[-1] for stream in times)
    count, late = sum(map(len, times)), max(firsts)
    figures = {"whole": count / last}
    figures |= {"first_median": statistics.median(firsts), "first_worst": late}
    after = sum(time > late for stream in times for time in stream)
    if after:  # once every stream has its first token
        figures["steady"] = after / (last - late)
    return figures | {"cpu_per_token": result["cpu"] / count}


def add_round(figures, found):
    """Add a round's figures to lists of them."""
    for name, value in found.items():
        figures.setdefault(name, []).append(round(value, 6))


def agreement(ours, theirs):
    """{"first", "all": [equal, compared]} of two rounds' ids, up to where they differ."""
    pairs = list(zip(ours, theirs, strict=True))
    firsts = sum(our[0] == their[0] for our, their in pairs)
    same = sum(equal_prefix(our, their) for our, their in pairs)
    return {"first": [firsts, len(pairs)], "all": [same, sum(len(our) for our in ours)]}


def equal_prefix(left, right):
    """How many tokens two answers have in common before they differ."""
    return next((n for n, pair in enumerate(zip(left, right)) if pair[0] != pair[1]), len(left))


def compare(streams):
    """Ratios of ours to every other contender: {streams: {name: {figure: ratio}}}."""
    ratios = {}
    for count, found in streams.items():
        ours, ratios[count] = found["muenclave"], {}
        for name in found.keys() - {"muenclave"}:
            theirs = found[name]
            rows = {k: shared.ratio(ours.get(k), theirs.get(k)) for k in ("whole", "steady")}
            rows["first_worst"] = shared.ratio(theirs["first_worst"], ours["first_worst"])
            ratios[count][name] = rows
    return ratios


# ---------------------------------------------------------------- contenders


def need_gpu(device):
    """Refuse a GPU that is not there. Raises ToolError."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if device == "cuda" and subprocess.run([sys.executable, "-c", code]).returncode:
        raise ToolError("--device cuda: PyTorch finds no GPU here")


class Field:
    """The contenders that run; those that can't are in left_out, with the reason."""

    def __init__(self, flags, say, stack):
        self.flags, self.say, self.stack = flags, say, stack
        self.workers, self.left_out = {}, {}

    def start(self, name, python, model):
        """Start a contender. Raises ToolError."""
        flags = self.flags
        command = [python, "-B", CONTENDER, name, model, flags.threads, flags.device]
        threads = {"OMP_NUM_THREADS": str(flags.threads)}
        worker = shared.Worker(CONTENDERS.get(name, name), command, threads)
        self.workers[name] = self.stack.enter_context(worker)

    def start_peers(self, folder):
        """Start every peer that can be had here."""
        for name in PACKAGES:
            if self.flags.peers is None:
                self.left_out[name] = "no peers: --peers DIR makes a virtual environment for them"
                continue
            with self.leaving_out(name):
                python = shared.peers_python(self.flags.peers, PACKAGES[name], self.say)
                model = folder
                if name == "llama":
                    model = bench_model.gguf_file(folder, python)
                self.start(name, python, model)

    def leaving_out(self, name):
        """A context in which a peer may fail."""
        return shared.leaving_out(
            name, self.left_out, self.say, lambda: self.workers.pop(name, None)
        )

    def round(self, name, prompts, tokens):
        """A contender's round; None if it has failed. Raises ToolError if that is ours."""
        with self.leaving_out(name):
            result = self.workers[name].ask(prompts=prompts, tokens=tokens)
            if [len(ids) for ids in result["ids"]] != [tokens] * len(prompts):
                raise ToolError(f"{CONTENDERS[name]}: an answer has another number of tokens")
            return result


# ---------------------------------------------------------------- the run


def check_float32(flags, say):
    """{"shape", "equal", "compared", "tokens"}: answers of ours that equal generate's, in fp32.

    None if there are no peers. Raises ToolError.
    """
    if flags.peers is None:
        return None
    say("the same model: greedy tokens in fp32")
    shape = flags.shape if flags.shape in SMALL else SMALL[0]
    folder = bench_model.model_folder(shape, "float32")
    prompts = bench_model.make_prompts(shape, CHECKED, flags.prompt_tokens, seed=-1)
    with contextlib.ExitStack() as stack:
        field = Field(flags, say, stack)
        field.start("muenclave", sys.executable, folder)
        python = shared.peers_python(flags.peers, TRANSFORMERS, say)
        field.start("generate", python, folder)
        ours, theirs = (
            field.workers[name].ask(prompts=prompts, tokens=CHECKED)["ids"]
            for name in ("muenclave", "generate")
        )
    equal = sum(our == their for our, their in zip(ours, theirs, strict=True))
    return {"shape": shape, "equal": equal, "compared": len(prompts), "tokens": CHECKED}


def run_decode(flags, say):
    """The figures of `decode`, a dict. ToolError."""
    shared.need_modules("torch", "transformers")
    need_gpu(flags.device)
    if flags.prompt_tokens + flags.tokens > CONTEXT or max(flags.streams) > ROWS:
        raise ToolError(f"at most {CONTEXT} tokens a stream, prompt included, of {ROWS} streams")
    say(f"the model: {flags.shape}")
    folder = bench_model.model_folder(flags.shape)
    names = ("shape", "device", "threads", "prompt_tokens", "tokens", "rounds")
    figures = {name: getattr(flags, name) for name in names}
    streams = {str(count): {} for count in flags.streams}
    agree, peak, bandwidth = {}, {}, []
    with shared.as_in_guest(flags.huge_pages), contextlib.ExitStack() as stack:
        figures["huge_pages"] = shared.huge_pages()
        field = Field(flags, say, stack)
        field.start("muenclave", sys.executable, folder)
        field.start("bandwidth", sys.executable, folder)
        limit = field.workers.pop("bandwidth")
        field.start_peers(folder)
        versions = {name: worker.facts["versions"] for name, worker in field.workers.items()}
        weights = field.workers["muenclave"].facts["weights"]
        for count in flags.streams:
            prompts = bench_model.make_prompts(flags.shape, count, flags.prompt_tokens, seed=-2)
            for name in list(field.workers):
                say(f"warming up: {count} streams, {CONTENDERS[name]}")
                field.round(name, prompts, min(WARM, flags.tokens))
        for number in range(flags.rounds):
            bandwidth.append(round(limit.ask(prompts=[], tokens=0)["rate"]))
            for count in flags.streams:
                options = (flags.shape, count, flags.prompt_tokens)
                prompts, ids = bench_model.make_prompts(*options, seed=number), {}
                for name in list(field.workers):
                    if name == "static" and count == 1:
                        continue  # it would be generate, one by one
                    told = f"round {number + 1} of {flags.rounds}, {count} streams"
                    say(f"{told}: {CONTENDERS[name]}")
                    if (result := field.round(name, prompts, flags.tokens)) is None:
                        continue
                    peak[name], ids[name] = result["peak_kib"], result["ids"]
                    add_round(streams[str(count)].setdefault(name, {}), measure_round(result))
                for name in ids.keys() - {"muenclave"}:
                    found = agreement(ids["muenclave"], ids[name])
                    for kind, pair in found.items():
                        total = agree.setdefault(name, {}).setdefault(kind, [0, 0])
                        total[:] = [old + new for old, new in zip(total, pair)]
    for found in (*streams.values(), peak, agree, versions):  # nothing of one that failed later
        for name in found.keys() & field.left_out.keys():
            del found[name]
    figures |= {"weights_bytes": weights, "bandwidth": bandwidth, "streams": streams}
    figures |= {"ratios": compare(streams), "peak_kib": peak, "versions": versions}
    figures |= {"left_out": field.left_out, "agreement": agree}
    return figures | {"float32": check_float32(flags, say)}


def step_limits(figures):
    """Steps a second that reading the weights allows, in each round."""
    return [rate / figures["weights_bytes"] for rate in figures["bandwidth"]]


def show_decode(figures):
    """Print the figures of `decode`."""
    shared.show_machine(figures)
    print(f"engine alone, {figures['shape']}, bf16, {figures['device']}, ", end="")
    print(f"{figures['threads']} threads; {figures['prompt_tokens']} tokens in, ", end="")
    print(f"{figures['tokens']} out, greedy; median (least to most)")
    steps = step_limits(figures)
    gigabytes = [rate / 1e9 for rate in figures["bandwidth"]]
    print(f"limit: {shared.tell_values(gigabytes, '.1f', ' GB/s')} read, of ", end="")
    print(f"{figures['weights_bytes']:,} bytes a step: {shared.tell_values(steps)} steps/s")
    for count, found in figures["streams"].items():
        print(
            f"{count} streams: tokens/s whole; once all have a first; first token, s: median, worst"
        )
        for name, rounds in found.items():
            cells = [shared.tell_values(rounds.get(key)) for key in ("whole", "steady")]
            firsts = [
                shared.tell_values(rounds[f"first_{key}"], ".3f") for key in ("median", "worst")
            ]
            print(f"  {CONTENDERS[name]:34}", *(f"{cell:26}" for cell in cells + firsts))
            share = shared.ratio(rounds["whole"], [int(count) * step for step in steps])
            print(f"  {'':34} of the limit: {shared.tell_ratio(share)}")
            for key, ratio in figures["ratios"][count].get(name, {}).items():
                print(f"  {'':34} ours, {key}: {shared.tell_ratio(ratio)}")
    for name, size in figures["peak_kib"].items():
        where = "" if figures["device"] == "cpu" else " of the GPU"
        print(f"peak memory{where}: {CONTENDERS[name]}: {size / 1024:,.0f} MiB")
    show_agreement(figures)
    for name, reason in figures["left_out"].items():
        print(f"left out: {CONTENDERS[name]}: {reason}")


def show_agreement(figures):
    """Print what says that all computed the same model."""
    for name, found in figures["agreement"].items():
        words = [f"{kind} {equal:,} of {total:,}" for kind, (equal, total) in found.items()]
        print(f"tokens equal to ours before they differ: {CONTENDERS[name]}: {', '.join(words)}")
    check = figures["float32"]
    if check is None:
        print("in fp32: not checked without peers")
        return
    print(
        f"in fp32: {check['equal']} of {check['compared']} answers of ours equal generate's", end=""
    )
    print(f", {check['tokens']} tokens each, {check['shape']}")


def decode_targets(figures):
    """Lines of the table of targets; figures: of `decode`, or None."""
    ratios = (figures or {}).get("ratios", {})
    is_ours = figures is not None and (figures["shape"], figures["device"]) == ("145m", "cpu")

    def found(count, name, key="whole"):
        return ratios.get(count, {}).get(name, {}).get(key) if is_ours else None

    lines = [
        shared.target("1 stream, engine: generate", found("1", "generate"), at_least=1.15),
        shared.target("1 stream, engine: llama.cpp", found("1", "llama"), at_least=0.85),
    ]
    for name in ("static", "continuous", "llama"):
        text = f"32 streams, engine: {CONTENDERS[name]}"
        lines.append(shared.target(text, found("32", name), at_least=1))
    return lines + gpu_targets(figures)


def gpu_targets(figures):
    """Those of a 3B model on a GPU."""
    share = rate = None
    if figures is not None and (figures["shape"], figures["device"]) == ("3b", "cuda"):
        streams = figures["streams"]
        if "1" in streams:
            share = shared.ratio(streams["1"]["muenclave"]["steady"], step_limits(figures))
        if "32" in streams:
            rate = statistics.median(streams["32"]["muenclave"]["whole"])
    return [
        shared.target("3B on a GPU, 1 stream: of the bandwidth's limit", share, at_least=0.7),
        shared.target("3B on a GPU, 32 streams", rate, at_least=2000, unit=" tok/s"),
    ]
