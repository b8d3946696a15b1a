"""How fast tokens come over HTTP, for tools/bench.py http.

Ours is the whole path: an enclave (without a VM), unlocked by the owner's tool, its gate, its
engine, the proxy; the meter is raised so far that it takes no part. The peers are `transformers
serve`, with and without continuous batching, and llama.cpp's server. All have the same weights and
the same client, OpenAI's, which streams (tools/bench_client.py). The engine alone runs in the same
rounds: what gate, proxy and HTTP add to it.
"""

import contextlib
import json
import pathlib
import random
import statistics
import sys
import tempfile

import bench_decode
import bench_model
import bench_servers
import bench_shared as shared
from bench_contender import CONTEXT, ROWS
from bench_decode import LLAMA, TRANSFORMERS
from environment import ROOT, ToolError

CLIENT = ROOT / "tools" / "bench_client.py"
CONTENDERS = {
    "muenclave": "ours: enclave and proxy",
    "serve": "transformers serve",
    "continuous": "transformers serve --continuous-batching",
    "llama": "llama.cpp's server",
}
PACKAGES = {"serve": TRANSFORMERS, "continuous": TRANSFORMERS, "llama": LLAMA}
TEMPLATE = 11  # tokens that the chat template adds
WARM = 4  # tokens of the round that does not count


def make_texts(tokenizer, count, length, seed):
    """So many prompts, each of so many words that are a token of their own; no two begin alike."""
    vocabulary = json.loads(pathlib.Path(tokenizer).read_text("utf-8"))["model"]["vocab"]
    words = sorted(word[1:] for word in vocabulary if word[0] == "\u0120" and word[1:].isalpha())
    words = [word for word in words if word.isascii()]
    draw = random.Random(seed)
    firsts = draw.sample(words, count)
    return [" ".join([first, *draw.choices(words, k=length - 1)]) for first in firsts]


def check_round(name, result, tokens):
    """Refuse a round in which an answer was not whole. Raises ToolError."""
    if "error" in result:
        raise ToolError(f"{name}: {result['error']}")
    counts = {usage["out"] for usage in result["usage"] if usage}
    if set(result["finish"]) != {"length"} or not counts <= {tokens} or not all(result["times"]):
        raise ToolError(f"{name}: an answer ended before its time")


def measure_round(result, tokens):
    """The figures of one round: tokens a second, and seconds to the first piece of text."""
    firsts = [times[0] for times in result["times"]]
    figures = {"whole": tokens * len(firsts) / result["seconds"], "seconds": result["seconds"]}
    return figures | {"first_median": statistics.median(firsts), "first_worst": max(firsts)}


class Run:
    """The servers that run, their client, and the engine alone."""

    def __init__(self, flags, say, stack):
        self.flags, self.say, self.stack = flags, say, stack
        self.servers, self.left_out, self.streams = {}, {}, {}
        self.folder = bench_model.model_folder(flags.shape)
        client = [sys.executable, "-B", CLIENT]
        self.client = stack.enter_context(shared.Worker("the client", client))
        self.field = bench_decode.Field(flags, say, stack)
        self.field.start("muenclave", sys.executable, self.folder)
        self.prompt_tokens = None

    def start(self):
        """Start every server that can be had here, each stopped until its turn."""
        sealed = bench_model.sealed_folder(self.folder, sys.executable)
        place = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="muenclave-"))
        folder, threads = pathlib.Path(place), self.flags.threads
        makers = {"muenclave": lambda: bench_servers.Ours(sealed, threads, folder)}
        for peer in PACKAGES:
            makers[peer] = lambda peer=peer: self.start_peer(peer)
        for name, make in makers.items():
            self.say(f"starting {CONTENDERS[name]}")
            with self.leaving_out(name):
                server = make()
                self.stack.callback(server.end)
                self.servers[name] = server
                self.ask(name, 1, WARM, seed=-1)
                server.pause()

    def start_peer(self, name):
        """A peer's server. Raises ToolError."""
        if self.flags.peers is None:
            raise ToolError("no peers: --peers DIR makes a virtual environment for them")
        python, threads = self.python(name), self.flags.threads
        if name == "llama":
            path = bench_model.gguf_file(self.folder, python)
            return bench_servers.Llama(python, path, threads)
        return bench_servers.Transformers(python, self.folder, threads, name == "continuous")

    def python(self, name):
        """The peers' Python with what a peer needs. Raises ToolError."""
        return shared.peers_python(self.flags.peers, PACKAGES[name], self.say)

    def leaving_out(self, name):
        """A context in which a peer may fail."""
        return shared.leaving_out(name, self.left_out, self.say, lambda: self.drop(name))

    def drop(self, name):
        """Stop a server for good."""
        server = self.servers.pop(name, None)
        if server is not None:
            server.pause()

    def ask(self, name, count, tokens, seed):
        """A round of the client's with a server. Raises ToolError."""
        server, length = self.servers[name], self.flags.prompt_tokens - TEMPLATE
        prompts = make_texts(self.folder / "tokenizer.json", count, length, seed)
        facts = {"base": server.base, "key": server.key, "model": server.model}
        result = self.client.ask(prompts=prompts, tokens=tokens, **facts)
        check_round(CONTENDERS[name], result, tokens)
        if name == "muenclave":
            self.prompt_tokens = round(statistics.median(u["in"] for u in result["usage"]))
        return result

    def turn(self, name, count, tokens, seed):
        """A round with a server that is stopped before and after: figures, CPU seconds by role."""
        server = self.servers[name]
        server.resume()
        before = server.cpu()
        result = self.ask(name, count, tokens, seed)
        spent = {role: value - before.get(role, 0) for role, value in server.cpu().items()}
        server.pause()
        return measure_round(result, tokens), spent

    def engine_round(self, count, tokens, seed):
        """Seconds, and CPU seconds, of the engine alone for as many tokens."""
        options = (self.flags.shape, count, self.prompt_tokens)
        result = self.field.round("muenclave", bench_model.make_prompts(*options, seed), tokens)
        return max(times[-1] for times in result["times"]), result["cpu"]


def run_http(flags, say):
    """The figures of `http`, a dict. ToolError."""
    shared.need_modules("torch", "transformers", "openai")
    if flags.device != "cpu":
        raise ToolError("http runs on the processor; --device cuda is for decode")
    if flags.prompt_tokens + flags.tokens > CONTEXT or max(flags.streams) > ROWS:
        raise ToolError(f"at most {CONTEXT} tokens a stream, prompt included, of {ROWS} streams")
    if flags.prompt_tokens <= TEMPLATE:
        raise ToolError(f"--prompt-tokens: more than the {TEMPLATE} of the chat template")
    names = ("shape", "threads", "tokens", "rounds")
    figures = {name: getattr(flags, name) for name in names}
    streams = {str(count): {} for count in flags.streams}
    added = {str(count): {"wall": [], "cpu": []} for count in flags.streams}
    peak = {}
    with shared.as_in_guest(flags.huge_pages), contextlib.ExitStack() as stack:
        figures["huge_pages"] = shared.huge_pages()
        run = Run(flags, say, stack)
        run.start()
        for count in flags.streams:
            for name in list(run.servers):
                say(f"warming up: {count} streams, {CONTENDERS[name]}")
                with run.leaving_out(name):
                    run.turn(name, count, WARM, seed=-2)
            run.engine_round(count, WARM, seed=-2)
        for number in range(flags.rounds):
            for count in flags.streams:
                say(f"round {number + 1} of {flags.rounds}, {count} streams: the engine alone")
                alone, cpu = run.engine_round(count, flags.tokens, number)
                for name in list(run.servers):
                    told = f"round {number + 1} of {flags.rounds}, {count} streams"
                    say(f"{told}: {CONTENDERS[name]}")
                    with run.leaving_out(name):
                        found, spent = run.turn(name, count, flags.tokens, number)
                        rounds = streams[str(count)].setdefault(name, {})
                        bench_decode.add_round(rounds, found)
                        if name == "muenclave":
                            add_costs(added[str(count)], found["seconds"] / alone, spent, cpu)
        for name, server in run.servers.items():
            peak[name] = server.peak_kib()
        for found in streams.values():  # nothing of one that failed later
            for name in found.keys() & run.left_out.keys():
                del found[name]
        figures |= {"prompt_tokens": run.prompt_tokens, "left_out": run.left_out}
        figures |= run.client.facts
    figures |= {"streams": streams, "added": added, "peak_kib": peak}
    return figures | {"ratios": compare(streams), "rate": bench_servers.FREE_RATE}


def add_costs(added, wall, spent, engine):
    """Add a round's costs: time over HTTP by the engine's alone; gate's and proxy's CPU by it."""
    added["wall"].append(round(wall, 4))
    added["cpu"].append(round((spent["gate"] + spent["proxy"]) / engine, 4))


def compare(streams):
    """Ratios of ours to every peer, and of the earliest peer's worst first token to ours."""
    ratios = {}
    for count, found in streams.items():
        ours, ratios[count] = found["muenclave"], {}
        peers = {name: rounds for name, rounds in found.items() if name != "muenclave"}
        for name, theirs in peers.items():
            ratios[count][name] = {
                "whole": shared.ratio(ours["whole"], theirs["whole"]),
                "first_worst": shared.ratio(theirs["first_worst"], ours["first_worst"]),
            }
        worst = {name: statistics.median(peers[name]["first_worst"]) for name in peers}
        if worst:
            best = min(worst, key=worst.get)
            facts = {"earliest": best, "first_worst": ratios[count][best]["first_worst"]}
            ratios[count]["best"] = facts
    return ratios


def show_http(figures):
    """Print the figures of `http`."""
    shared.show_machine(figures)
    print(f"over HTTP, {figures['shape']}, bf16, {figures['threads']} threads an engine; ", end="")
    print(f"{figures['prompt_tokens']} tokens in, {figures['tokens']} out, greedy; ", end="")
    print(f"our meter raised to {figures['rate']:,} bytes/s; median (least to most)")
    for count, found in figures["streams"].items():
        print(f"{count} streams: tokens/s; first token, s: median, worst; ours to it")
        for name, rounds in found.items():
            firsts = [
                shared.tell_values(rounds[f"first_{key}"], ".3f") for key in ("median", "worst")
            ]
            cells = [shared.tell_values(rounds["whole"]), *firsts]
            print(f"  {CONTENDERS[name]:42}", *(f"{cell:26}" for cell in cells))
            for key, ratio in figures["ratios"][count].get(name, {}).items():
                print(f"  {'':42} ours, {key}: {shared.tell_ratio(ratio)}")
        costs = figures["added"][count]
        print(
            f"  time by the engine's alone: {shared.tell_values(costs['wall'], '.3f', '×')}; ",
            end="",
        )
        print(f"CPU of gate and proxy by the engine's: {shared.tell_values(costs['cpu'], '.3f')}")
    for name, size in figures["peak_kib"].items():
        print(f"peak memory, sum of the processes: {CONTENDERS[name]}: {size / 1024:,.0f} MiB")
    for name, reason in figures["left_out"].items():
        print(f"left out: {CONTENDERS[name]}: {reason}")


def added_ratio(figures, count):
    """The time over HTTP by the engine's alone, told as a ratio of its rounds."""
    wall = figures["added"].get(count, {}).get("wall", [])
    return shared.ratio(wall, [1] * len(wall))


def http_targets(figures):
    """Lines of the table of targets; figures: of `http`, or None."""
    is_ours = figures is not None and figures["shape"] == "145m"
    ratios = figures["ratios"] if is_ours else {}

    def found(count, name, key="whole"):
        return ratios.get(count, {}).get(name, {}).get(key)

    rows = [("8", "serve", 6), ("8", "continuous", 1.15), ("8", "llama", 1.3)]
    rows += [("32", name, 1) for name in PACKAGES]
    lines = []
    for count, name, limit in rows:
        text = f"{count} streams, HTTP: {CONTENDERS[name]}"
        if name == "serve" and count == "8":
            text += " (generate, one by one)"
        lines.append(shared.target(text, found(count, name), at_least=limit))
    text = "8 streams, HTTP, worst first token: the earliest peer's"
    lines.append(shared.target(text, found("8", "best", "first_worst"), at_least=1))
    added = added_ratio(figures, "8") if is_ours else None
    text = "8 streams: time by the engine's alone, unmetered"
    return [*lines, shared.target(text, added, at_most=1.05)]
