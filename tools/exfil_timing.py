"""How long a model's weights take to leave, and what a meter lets out: tools/exfil_timing.py VERB

    analyze  time to take models out at given rates: raw, compressed, from several enclaves at once,
             past a replay audit, and within the asset's lifetime budget
    measure  what a running enclave, or a proxy before it, lets out, seen from outside
    bound    how many bits an engine can tell at most, by channel, from the configuration alone, and
             how long a model takes to leave by them

--json FILE (- for standard output) writes {"tool": "exfil_timing", "version": 1, "verb": ...}; and

    analyze: "assumptions": {column: text}, "enclaves", "audit": {"residue", "source"},
             "seed": {"bytes", "rate", "seconds", "compressed": {"16": seconds, ...}},
             "models": [{"name", "bytes", "source", "budget": bytes, "times": [{"rate",
             "compression", "bytes", "raw", "enclaves", "audited": seconds; "budget": {"seconds",
             "share", "is_enough"}}]}]: seconds until all of it is out, or until the budget is
             spent, which then was that share of it

    measure: "target": "enclave" or "proxy", "verdict": "holds", "exceeds" or "not decided", "rate",
             "burst": as stated, "held": bytes that kernels may hold before a proxy takes them,
             "seconds", "bytes": of the run, "use": share of the rate that the reader got, in the
             last "saturated_seconds", "pace": that in their last half, burst and all,
             "burst_seen": the most beyond the rate in any window,
             "least_leak": share of the bytes that a meter could not have forgotten unnoticed,
             "needed_seconds": to find out one that forgets 5 %, "windows": [{"seconds", "bytes",
             "allowed"}], "trace": {"step": seconds, "bytes": [...]}, "problem": of a reader, text
             or null, "probe": null or {"source", "cells", "seconds", "tick_seconds", "lengths":
             {bytes: cells}, "gaps": {ticks: how often}, "order", "length_bits_per_cell",
             "gap_bits_per_cell", "within_tick_bits_per_cell" (null: too few cells),
             "bits_per_second" (null: too few), "bound_bits_per_second": {"moments", "fill"}}

    bound: "configuration": {name: value}, "channels": [{"name", "charge": text, "day", "lease",
             "outside_day", with an audit "audited_day": bits}], "sum": bits, by the same names,
             "uncovered": bits that no charge covers, of an "answer", a "look" at what is left of
             the budget, a "load" of the engine, and of a "day",
             "seen_without_keys": text, "not_counted": {what: why}, "malicious_host": text, "audit":
             null or {"bits_per_token", "source"}, "models": [{"name", "bytes", "source",
             "lifetime": bytes, "lease": {"budget", "by_clock", "bytes": the less of both,
             "seconds": until the budget is spent}, "times": [{"compression", "bytes", "rate",
             "audited": seconds (null: no audit), "lifetime": {"seconds" (null: never), "share",
             "is_enough"}}]}]. outside: seen by who has no session's keys

measure puts a counting relay before the enclave, and readers behind it who ask for as much as they
can get: handshakes, with an access token answers, with the weights key the status. Run it beside
the enclave: a network between them that holds bytes back and lets them go at once looks like a
burst. For a proxy, start it with --port PORT of --listen here; what counts is what it takes, not
what it prints. Either way the lease pays for what is read.

    python3 tools/exfil_timing.py measure --enclave HOST:PORT --reference FILE --psk FILE
        --token-file FILE --vocabulary FILE --rate N --burst N
    python3 tools/exfil_timing.py measure --enclave HOST:PORT --proxy URL --listen PORT
        --token-file FILE --rate N
    python3 tools/exfil_timing.py bound --vocabulary 131072 --shape constant --audit AUDIT.json

Exit status: 0 done, or the meter holds; 1 it exceeds; 2 a mistake, told in one line; 3 not decided;
130 interrupted.
"""

import argparse
import collections
import contextlib
import http.client
import json
import math
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

import bound
import ledger
import owner
import tap
from environment import ROOT, ToolError

sys.path.insert(0, str(ROOT))
import muenclave  # noqa: E402
import muprotocol as mp  # noqa: E402
import muproxy  # noqa: E402

VERSION = 1


# ---------------------------------------------------------------- analyze

BFLOAT16 = 2  # bytes a parameter
PARAMETERS = {"3B": 3e9, "8B": 8e9, "70B": 70e9, "405B": 405e9, "1T": 1e12}
MODELS = {name: int(count) * BFLOAT16 for name, count in PARAMETERS.items()}  # bytes
NOMINAL = "as many parameters as its name says, 2 bytes each (bfloat16)"
COMPRESSIONS = (1, 16, 100)
SEED = {"bytes": 6 * 10**9, "rate": 5000}  # "6 GB at 5 KB/s"
RESIDUE = 0.005
RESIDUE_SOURCE = "arXiv 2511.02620, abstract: under 0.5 % on a 30B mixture of experts; not ours"
ASSUMPTIONS = {
    "raw": "every byte that the meter lets out is the model's: no handshakes, padding or tags",
    "compressed": "16 to 100 times, which arXiv 2601.01296 reports for theft, where the thief may "
    "spend on decompression; done inside, at no cost",
    "enclaves": "so many enclaves hold the model, each with a rate of its own, and the thief reads "
    "all; sessions of one enclave share its meter and add nothing",
    "audited": "of what leaves, only the residue can be chosen without being found in the replay "
    "audit, and all of it is audited",
    "budget": "one ledger for the asset: restarts, leases and enclaves share its lifetime budget, "
    "by default a thousandth of the sealed size",
}
UNITS = (("years", 365.25 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60))


def parse_model(text):
    """(name, bytes, source) of a --model: a known name, NAME=BYTES, or a sealed file. ToolError."""
    name, is_given, size = text.partition("=")
    if text in MODELS:
        return text, MODELS[text], NOMINAL
    if is_given:
        if not name or not size.isdecimal() or not 0 < int(size) <= 1 << 60:
            raise ToolError(f"--model {text}: NAME=BYTES is wanted, with a number of bytes")
        return name, int(size), "given"
    if not os.path.exists(text):
        known = ", ".join(MODELS)
        raise ToolError(f"--model {text}: no such file; known are {known}, or say NAME=BYTES")
    container = muproxy.read_container(text)
    return container.fields["asset"], container.sealed_size(), "the sealed file's size"


def analyze(models, rates, compressions, enclaves, residue, budget=None):
    """The figures of `analyze`, an object as in the module's docstring.

    models: [(name, bytes, source)]. rates: bytes a second. residue: the share of what leaves that
    survives an audit, None for no audit. budget: bytes, None for each model's own.
    """
    found = []
    for name, size, source in models:
        granted = size // ledger.LIFETIME_DIVISOR if budget is None else budget
        times = [
            take_out(size / compression, rate, enclaves, residue, granted)
            | {"rate": rate, "compression": compression}
            for rate in rates
            for compression in compressions
        ]
        facts = {"name": name, "bytes": size, "source": source, "budget": granted}
        found.append(facts | {"times": times})
    source = RESIDUE_SOURCE if residue == RESIDUE else "given" if residue else "no residue given"
    smaller = {str(c): SEED["bytes"] / c / SEED["rate"] for c in COMPRESSIONS[1:]}
    seed = SEED | {"seconds": SEED["bytes"] / SEED["rate"], "compressed": smaller}
    return {
        **header("analyze"),
        "assumptions": ASSUMPTIONS,
        "enclaves": enclaves,
        "audit": {"residue": residue, "source": source},
        "seed": seed,
        "models": found,
    }


def header(verb):
    """What every JSON document of this tool begins with."""
    return {"tool": "exfil_timing", "version": VERSION, "verb": verb}


def take_out(size, rate, enclaves, residue, budget):
    """Seconds until `size` bytes are out, by column of the table; see `analyze`."""
    raw = size / rate
    is_enough = budget >= size
    within = {"seconds": min(size, budget) / rate, "share": min(1, budget / size)}
    return {
        "bytes": size,
        "raw": raw,
        "enclaves": raw / enclaves,
        "audited": raw / residue if residue else None,
        "budget": within | {"is_enough": is_enough},
    }


def show_time(seconds):
    """A time for readers, in the largest unit of which there is at least one."""
    for unit, size in UNITS:
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def show_analysis(figures):
    """Print the figures of `analyze`: a table for each rate, then what its columns assume."""
    strongest = max(entry["compression"] for entry in figures["models"][0]["times"])
    for rate in dict.fromkeys(entry["rate"] for entry in figures["models"][0]["times"]):
        print(f"time until a model is out, at {rate:,} bytes a second")
        rows = [row_titles(figures, strongest)]
        rows += [row_of(model, rate, strongest) for model in figures["models"]]
        print_table(rows)
        print()
    for name, text in figures["assumptions"].items():
        print(f"{name}: {text}")
    print(f"audit: {figures['audit']['source']}")
    seed = figures["seed"]
    several = (f"{factor}x: {show_time(time)}" for factor, time in seed["compressed"].items())
    print(f"6 GB at 5 KB/s: {show_time(seed['seconds'])}; compressed {', '.join(several)}")


def row_titles(figures, strongest):
    """The table's first row."""
    factors = {entry["compression"]: None for entry in figures["models"][0]["times"]}
    titles = ["raw" if factor == 1 else f"{factor:g}x" for factor in factors]
    best = [f"{strongest:g}x, {figures['enclaves']} enclaves", f"{strongest:g}x, audited"]
    return ["model", "bytes", *titles, *best, f"{strongest:g}x, within the budget"]


def row_of(model, rate, strongest):
    """A model's row of the table at one rate."""
    times = {entry["compression"]: entry for entry in model["times"] if entry["rate"] == rate}
    best, budget = times[strongest], times[strongest]["budget"]
    audited = best["audited"]
    ends = f"never: it ends at {model['budget']:,} bytes, {budget['share']:.2%} of that copy"
    return [
        model["name"],
        f"{model['bytes']:,}",
        *(show_time(entry["raw"]) for entry in times.values()),
        show_time(best["enclaves"]),
        show_time(audited) if audited else "not computed: no residue given",
        show_time(budget["seconds"]) if budget["is_enough"] else ends,
    ]


def print_table(rows):
    """Print rows of text in columns: first and last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *middle, last in rows:
        cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells, last]))


# ---------------------------------------------------------------- the chart of `analyze`

MARKERS = ("o", "s", "D", "^", "v")
COLOURS = ("#1b4f72", "#2980b9", "#c0392b", "#7d6608", "#6c3483")
BUDGET_COLOUR, AUDIT_COLOUR = "#1e8449", "#7f8c8d"
TICKS = {"1 s": 1, "1 min": 60, "1 h": 3600, "1 day": 86400, "1 month": 30 * 86400}
TICKS |= {f"{n} year{'s'[: n > 1]}": n * 365.25 * 86400 for n in (1, 10, 100, 1000, 10**4)}


def draw_analysis(figures, path):
    """Draw the times as a chart, a panel for each rate. Raises ToolError, OSError."""
    plt = import_pyplot()
    rates = list(dict.fromkeys(entry["rate"] for entry in figures["models"][0]["times"]))
    height = len(rates) * (1.6 + 0.42 * len(figures["models"])) + 1
    chart, panels = plt.subplots(len(rates), 1, figsize=(10, height), squeeze=False, sharex=True)
    for panel, rate in zip(panels[:, 0], rates):
        draw_panel(panel, figures, rate)
    panels[-1, 0].set_xlabel("time until all of it is out (logarithmic)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    chart.suptitle("How long a model's weights take to leave", fontweight="bold")
    chart.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    chart.tight_layout(rect=(0, 0.9 / height, 1, 1))
    save(plt, chart, path)


def draw_panel(panel, figures, rate):
    """A row for each model: its times by compression, with audit, and where the budget ends."""
    models = figures["models"]
    for row, model in enumerate(models):
        times = [entry for entry in model["times"] if entry["rate"] == rate]
        best, label = times[-1], (lambda text, first=row == 0: text if first else None)
        places = [entry["raw"] for entry in times]
        ends = [place for place in (*places, best["audited"]) if place]
        panel.plot([min(ends), max(ends)], [row, row], color="#d5d8dc", zorder=1)
        for number, entry in enumerate(times):
            name = "raw" if entry["compression"] == 1 else f"compressed {entry['compression']:g}x"
            style = {"marker": MARKERS[number % 5], "color": COLOURS[number % 5], "zorder": 3}
            panel.scatter(entry["raw"], row, s=46, label=label(name), **style)
        if best["audited"]:
            name = f"compressed {best['compression']:g}x, audit leaves "
            name += f"{figures['audit']['residue']:.1%}"
            style = {"marker": "P", "color": AUDIT_COLOUR, "zorder": 3, "s": 60}
            panel.scatter(best["audited"], row, label=label(name), **style)
        if not best["budget"]["is_enough"]:
            style = {"marker": "|", "color": BUDGET_COLOUR, "zorder": 2, "s": 260, "linewidths": 3}
            name = "the budget ends: nothing leaves after it"
            panel.scatter(best["budget"]["seconds"], row, label=label(name), **style)
    panel.set_title(f"at {rate:,} bytes a second", loc="left", fontsize=10)
    panel.set_yticks(range(len(models)), [show_size(model) for model in models])
    panel.set_ylim(len(models) - 0.5, -0.5)
    panel.set_xscale("log")
    low, high = panel.get_xlim()
    ticks = {name: place for name, place in TICKS.items() if low <= place <= high}
    panel.set_xticks(list(ticks.values()), list(ticks))
    panel.minorticks_off()
    panel.grid(axis="x", color="#ebedef")
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def show_size(model):
    """A model's name and size, for the chart."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if model["bytes"] >= size:
            return f"{model['name']}, {model['bytes'] / size:.3g} {unit}"
    return f"{model['name']}, {model['bytes']} bytes"


def import_pyplot():
    """matplotlib's pyplot, drawing to files alone. Raises ToolError."""
    try:
        import matplotlib
    except ImportError:
        raise ToolError("the chart needs matplotlib: pip install 'muenclave[tools]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "muenclave", "svg.fonttype": "none"}
    import matplotlib.pyplot as plt

    return plt


def save(plt, chart, path):
    """Write a chart to a file, whose ending says the format. Raises ToolError, OSError."""
    kind = pathlib.Path(path).suffix[1:].lower()
    if kind not in ("svg", "png"):
        raise ToolError(f"--plot {path}: a name that ends in .svg or .png is wanted")
    chart.savefig(path, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    plt.close(chart)


# ---------------------------------------------------------------- measure: who reads
# Each works until `over` is set; what fails for a while is tried again, what fails for good ends
# the run.

LONG = {"temperature": 10}  # all but noise, by a seed of each answer's own: some end late
PROMPT = "The"
FREE = 1 << 40  # bytes a second, and at once: no meter on the reader's side
STRANGERS, OWNERS = 3, 8
PASSING = ("busy", "timeout", "connection_lost", "engine_lost")
RETRY_SECONDS = 0.2
HTTP_SECONDS = 120
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # none but the one we name


class Load:
    """Readers, a thread each. over: set when they are to end. failure: what ended the run."""

    def __init__(self):
        self.over, self.failure, self.last = threading.Event(), None, None

    def start(self, work, count=1):
        """Let so many threads do `work(over)` again and again."""
        for _ in range(count):
            threading.Thread(target=self.repeat, args=(work,), daemon=True).start()

    def repeat(self, work):
        """A reader's thread."""
        while not self.over.is_set():
            try:
                work(self.over)
            except (OSError, EOFError, http.client.HTTPException) as error:
                self.last = getattr(error, "strerror", None) or str(error)
            except (mp.ProtocolError, muproxy.Failure, ToolError) as error:
                self.last = muproxy.text_of(error)
                if getattr(error, "code", None) not in PASSING and not self.over.is_set():
                    self.failure = self.failure or self.last
                    self.over.set()
            self.over.wait(RETRY_SECONDS)


def open_session(address, flags, role):
    """A verified session through the tap, without a meter of its own. ProtocolError, Failure."""
    psk = flags.owner_psk if role == "owner" else flags.psk
    return muproxy.Session(address, flags.reference, psk, role, muproxy.Inlet(FREE, FREE))


def answers(address, flags, on_start=lambda: None):
    """Work: a user who wants an answer that does not end, and then the next one."""

    def work(over):
        with contextlib.closing(open_session(address, flags, "user")) as session:
            session.prove({"token": flags.token_file})
            on_start()
            request = LONG | {"prompt": PROMPT}
            while not over.is_set():
                collections.deque(session.generate(request, flags.vocabulary), 0)

    return work


def status_polls(address, flags):
    """Work: an owner who asks for the status all the time."""

    def work(over):
        with contextlib.closing(open_session(address, flags, "owner")) as session:
            session.prove(flags.unlock)
            while not over.is_set():
                session.command({"status": True})

    return work


def handshakes(address, flags):
    """Work: a stranger who shakes hands, and does no more."""
    share = mp.KeyShare().public.hex()
    facts = {"version": mp.VERSION, "role": "user", "evidence": flags.reference["kind"]}

    def work(over):
        challenge = facts | {"nonce": secrets.token_hex(32), "share": share}
        with socket.create_connection(address, muproxy.CONNECT_SECONDS) as connection:
            connection.sendall(mp.frame(mp.encode_json(challenge)))
            for _ in range(2):
                mp.read_frame(connection, mp.HANDSHAKE_FRAME, muproxy.HANDSHAKE_SECONDS)

    return work


def http_answers(flags):
    """Work: a client of the proxy's HTTP API who streams an answer that does not end."""

    def work(over):
        with ask(flags, "/v1/models") as reply:
            model = read_model(reply)
        body = LONG | {"model": model, "stream": True}
        body |= {"prompt": PROMPT, "max_tokens": flags.max_tokens}
        with ask(flags, "/v1/completions", body) as reply:
            while not over.is_set() and reply.readline():
                pass

    return work


def read_model(reply):
    """The name of the only model, from the list of models. Raises ToolError."""
    try:
        return json.load(reply)["data"][0]["id"]
    except (ValueError, LookupError, TypeError):
        raise ToolError("--proxy: what answers there is no OpenAI-compatible API") from None


def ask(flags, path, body=None):
    """The response of the proxy's HTTP API. Raises OSError, ToolError for a request it refuses."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {flags.token_file}", "Content-Type": "application/json"}
    request = urllib.request.Request(flags.proxy.rstrip("/") + path, data, headers)
    try:
        return OPENER.open(request, timeout=HTTP_SECONDS)
    except urllib.error.HTTPError as error:
        with error, contextlib.suppress(ValueError, KeyError, TypeError):
            error.reason = json.load(error)["error"]["message"]
        told = f"the proxy answers {error.code}: {str(error.reason)[:200]}"
        raise (ToolError if error.code in (400, 401, 404) else OSError)(told) from None
    except (urllib.error.URLError, http.client.HTTPException) as error:
        raise OSError(f"the proxy at {flags.proxy}: {getattr(error, 'reason', error)}") from None


# ---------------------------------------------------------------- measure: the run

SILENCE_SECONDS = 60  # after so long without a byte there will be none
LOOK_SECONDS = 0.5  # between two looks at whether it is decided
STATUSES = {"holds": 0, "exceeds": 1, "not decided": 3}


def say(text):
    """Progress."""
    print(f"exfil_timing: {text}", file=sys.stderr, flush=True)


def saturate(relay, works, flags, held):
    """Read as fast as the meter allows until it is decided; the figures of `judge`. ToolError.

    works: [(work, threads)]. held: how many bytes the kernels may hold, a function.
    """
    load, began, events, verdict = Load(), time.monotonic(), [], None
    needed = tap.needed_seconds(flags.rate, flags.burst + held())
    say(f"reading; whether it holds takes {needed:.0f} s or more, and at most {flags.limit:g} s")
    relay.start()
    for work, count in works:
        load.start(work, count)
    try:
        while not load.over.wait(LOOK_SECONDS):
            seconds, events, limit = time.monotonic() - began, list(relay.events), held()
            verdict = tap.decide(events, flags.rate, flags.burst + limit)["verdict"]
            is_enough = verdict == "holds" and seconds >= flags.seconds
            last = events[-1].before / mp.NANOSECOND if events else began
            is_silent = time.monotonic() - last > SILENCE_SECONDS
            if verdict == "exceeds" or is_enough or is_silent or seconds >= flags.limit:
                break
    finally:
        load.over.set()
        relay.close()
    if load.failure and verdict != "exceeds":
        raise ToolError(f"after {time.monotonic() - began:.0f} s: {load.failure}")
    if not events:
        why = relay.problem or load.last or "nobody asked it for anything"
        raise ToolError(f"nothing came from the enclave: {why}")
    figures = tap.judge(events, flags.rate, flags.burst, limit)
    return figures | {"problem": relay.problem or load.last}


def measure_enclave(flags):
    """The figures of `measure` for an enclave. Raises ToolError, Failure, ProtocolError."""
    role = "user" if flags.token_file else "owner"
    open_session(flags.enclave, flags, role).close()
    with contextlib.closing(tap.Tap(flags.enclave)) as relay:
        works = [(handshakes(relay.address, flags), STRANGERS)]
        if flags.token_file:
            works.append((answers(relay.address, flags), flags.sessions))
        if flags.unlock:
            works.append((status_polls(relay.address, flags), OWNERS))
        figures = saturate(relay, works, flags, lambda: 0)
    figures["probe"] = None
    if flags.token_file and flags.probe_seconds and figures["verdict"] != "exceeds":
        figures["probe"] = run_probe(flags)
    return figures


def run_probe(flags):
    """The figures of a timing probe: one answer alone, for a while. ToolError."""
    load, started = Load(), []
    with contextlib.closing(tap.Tap(flags.enclave)) as relay:
        relay.start()
        begin = lambda: started.append(time.monotonic_ns())  # noqa: E731
        load.start(answers(relay.address, flags, begin))
        load.over.wait(flags.probe_seconds)
        load.over.set()
    if load.failure or not started:
        raise ToolError(f"the timing probe got no answer: {load.failure or load.last}")
    frames = [frame for flow in relay.flows for frame in flow.frames if frame[0] >= started[0]]
    return tap.probe(frames, flags.rate, flags.vocabulary.bits)


def measure_proxy(flags):
    """The figures of `measure` for a proxy whose enclave is our tap. ToolError."""
    with contextlib.closing(tap.Tap(flags.enclave, flags.listen, is_paced=True)) as relay:
        works = [(http_answers(flags), flags.sessions)]
        figures = saturate(relay, works, flags, lambda: held_by_kernels(relay, flags.rate))
    return figures | {"probe": None}


def held_by_kernels(relay, rate):
    """Bytes that a paced tap may have counted although the proxy has not taken them.

    For each connection what waits on our side, and in the receive buffer that muproxy asks for,
    which Linux doubles.
    """
    sent = relay.listener.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    each = sent + 2 * muproxy.Inlet(rate).buffer
    return (relay.most_open + relay.lost) * each


def show_measure(figures):
    """Print the figures of `measure`."""
    allowed = figures["burst"] + figures["held"]
    held = f" + {figures['held']:,} held by kernels" if figures["held"] else ""
    print(f"stated: in any T seconds {figures['rate']:,} T + {figures['burst']:,}{held} bytes")
    print(f"passed: {figures['bytes']:,} bytes in {figures['seconds']:.1f} s; ", end="")
    print(f"at most {figures['burst_seen']:,.0f} over the rate, of {allowed:,} allowed")
    for window in figures["windows"]:
        print(f"  in {window['seconds']:g} s at most {window['bytes']:,} bytes, ", end="")
        print(f"of {window['allowed']:,.0f} allowed")
    if figures["probe"]:
        show_probe(figures["probe"])
    print(f"verdict: {figures['verdict']}", end="")
    if figures["verdict"] == "holds":
        print(f"; a meter that forgets {figures['least_leak']:.1%} would have been found out")
    elif figures["verdict"] == "not decided":
        print(f": the reader got {figures['use']:.1%} of the rate, for ", end="")
        print(f"{figures['saturated_seconds']:.0f} s, at last {figures['pace']:.1%}; ", end="")
        print(f"{tap.SATURATED:.0%} is wanted, for {figures['needed_seconds']:.0f} s: ", end="")
        print("more --sessions, or a longer --limit")
        print(f"the readers' last trouble: {figures['problem'] or 'none'}")
    else:
        print()


def show_probe(figures):
    """Print the figures of a timing probe."""
    lengths, bound = ", ".join(figures["lengths"]) or "none", figures["bound_bits_per_second"]
    print(f"timing of one answer: {figures['cells']} cells in {figures['seconds']:.1f} s, ", end="")
    print(f"ticks of {1000 * figures['tick_seconds']:.0f} ms, bytes of a cell: {lengths}")
    seen = figures["bits_per_second"]
    seen = "not computed: too few cells" if seen is None else f"about {seen:.2f} bits/s"
    print(f"  seen: {seen}, had every variation been a signal ({figures['source']})")
    print(f"  bound: {bound['moments']:.1f} bits/s by which ticks have a cell, ", end="")
    print(f"{bound['fill']:.1f} by how many ids it holds, for each open reply")


# ---------------------------------------------------------------- bound

BOUND_MODELS = ("3B", "70B", "1T")
VOCABULARY = 131_072  # entries: 17 bits an id
COLUMNS = {  # of the channels' table: what is said of it
    "day": "bits a day",
    "lease": "of a lease",
    "audited_day": "a day, audited",
    "outside_day": "a day, no keys",
}


def read_audit(path, id_bits):
    """(bits a token, source) of what tools/replay_audit.py wrote. Raises ToolError, OSError.

    Of `audit` what got past it at most; one that raised an alarm bounds nothing. Of `measure` the
    most that got past an audit of the demo model, in proportion to the bits of an id: no measure of
    another model.
    """
    try:
        document = json.loads(pathlib.Path(path).read_text("utf-8"))
        if document["tool"] != "replay_audit":
            raise ValueError
        alarms = document["alarms"] if document["verb"] == "audit" else []
        if document["verb"] == "audit":
            bits = document["unnoticed"]["most"]
            source = f"an audit of {document['sample']['tokens']:,} tokens"
        else:
            bits = max(row["unnoticed_bits"] for row in document["honest"])
            bits *= id_bits / math.log2(document["model"]["vocabulary"])
            source = f"in proportion to the demo model's, the most of {len(document['honest'])} "
            source += "audits; no audit of this model"
        if not mp.is_number(0, 64)(bits) or not isinstance(alarms, list):
            raise ValueError
    except (ValueError, LookupError, TypeError):
        told = "is not what tools/replay_audit.py audit or measure writes as JSON"
        raise ToolError(f"--audit {path}: {told}") from None
    if alarms:
        raise ToolError(f"--audit {path}: this audit raised an alarm, so it bounds nothing")
    return bits, source


def show_bound(figures):
    """Print the figures of `bound`: the channels, then the models, then what they rest on."""
    facts = figures["configuration"]
    print(
        f"{facts['rate']:,} bytes/s and {facts['burst']:,} at once, cells of {facts['cell']} ",
        end="",
    )
    print(f"bytes with {facts['ids_per_cell']} ids of {facts['bits']} bits, ticks of ", end="")
    print(f"{1000 * facts['tick_seconds']:.0f} ms, {facts['sessions']} sessions, ", end="")
    print(f"leases of {facts['expiry']:,} s, shape {facts['shape']}")
    print()
    columns = [name for name in COLUMNS if name in figures["sum"]]
    rows = [["channel", *(COLUMNS[name] for name in columns), "charged"]]
    for one in figures["channels"]:
        rows.append([one["name"], *(f"{one[name]:,}" for name in columns), one["charge"]])
    sums = [f"{figures['sum'][name]:,}" for name in columns]
    print_table([*rows, ["sum", *sums, "over: not all channels can be full at once"]])
    print()
    print_table(bound_rows(figures))
    print()
    by_clock = figures["sum"]["lease"] // 8
    print(f"a lease: by the clock at most {by_clock:,} bytes, by its budget at most that: ", end="")
    print("the less of both")
    beyond, audit = figures["uncovered"], figures["audit"]
    print(f"beyond what is charged: {beyond['answer']:.2g} bits an answer, ", end="")
    print(f"{beyond['look']:.2g} a look at the budget, {beyond['load']:.2g} a load: ", end="")
    print(f"at most {beyond['day']:,} bits a day")
    print(f"latency: {facts['latency_ms']} ms changes nothing, since a cell that is full ", end="")
    print("does not wait")
    print(f"seen without a session's keys: {figures['seen_without_keys']}")
    print(f"malicious host: {figures['malicious_host']}")
    for name, text in figures["not_counted"].items():
        print(f"not counted: {name}: {text}")
    told = f"{audit['bits_per_token']:g} bits a token, {audit['source']}" if audit else "none given"
    print(f"audit: {told}; it lessens what tokens can tell, nothing else")


def bound_rows(figures):
    """The rows of the models' table: sizes, budgets, times."""
    factors = [entry["compression"] for entry in figures["models"][0]["times"]]
    titles = ["raw" if factor == 1 else f"{factor:g}x" for factor in factors]
    titles += [f"{title}, audited" for title in titles] if figures["audit"] else []
    rows = [["model", "bytes", *titles, "lease", "spent in", "within the lifetime budget"]]
    for model in figures["models"]:
        times = [show_time(entry["rate"]) for entry in model["times"]]
        if figures["audit"]:
            times += [show_time(entry["audited"]) for entry in model["times"]]
        lease = [f"{model['lease']['budget']:,}", show_time(model["lease"]["seconds"])]
        rows.append([model["name"], f"{model['bytes']:,}", *times, *lease, show_within(model)])
    return rows


def show_within(model):
    """What of each form leaves within the lifetime budget: all of it, or only so large a share."""
    parts = []
    for entry in model["times"]:
        within = entry["lifetime"]
        if within["is_enough"]:
            parts.append(f"all in {show_time(within['seconds'])}")
        else:
            parts.append(f"never, {within['share']:.1%}")
    return f"{model['lifetime']:,} bytes: {'; '.join(parts)}"


# ---------------------------------------------------------------- command line


def number(kind, least, most):
    """A parser of numbers of a kind (int, float) from least to most, for argparse."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
        return value

    return parse


def run_analyze(flags):
    """`analyze`. Returns the exit status. Raises ToolError, OSError."""
    models = [parse_model(text) for text in flags.model or MODELS]
    residue = None if flags.residue == 0 else flags.residue
    compressions = sorted(set(flags.compression or COMPRESSIONS))
    rates = flags.rate or [mp.DEFAULT_RATE]
    figures = analyze(models, rates, compressions, flags.enclaves, residue, flags.budget)
    if flags.plot:
        draw_analysis(figures, flags.plot)
    write(figures, flags.json, show_analysis)
    return 0


def run_bound(flags):
    """`bound`. Returns the exit status. Raises ToolError, OSError."""
    models = [parse_model(text) for text in flags.model or BOUND_MODELS]
    bits, source = (
        read_audit(flags.audit, mp.id_bits(flags.vocabulary)) if flags.audit else (None, None)
    )
    facts = {
        name: getattr(flags, name) for name in bound.Configuration._fields if name != "audited"
    }
    config = bound.Configuration(audited=bits, **facts)
    compressions = sorted(set(flags.compression or COMPRESSIONS))
    figures = bound.bound(config, models, compressions, flags.budget, flags.lifetime_budget, source)
    write({**header("bound"), **figures}, flags.json, show_bound)
    return 0


FILES = {
    "reference": "reference values of the enclave",
    "psk": "a user's provisioning secret, for kind psk",
    "token-file": "an access token of the lease: ask for answers",
    "vocabulary": "token table (.vocab), with an access token",
    "model": "the sealed model, with the weights key",
    "key": "the weights key: ask for the status as its owner, too",
    "passphrase-file": "of a wrapped key",
}


def run_measure(flags):
    """`measure`. Returns the exit status. Raises ToolError, Failure, ProtocolError, OSError."""
    if flags.proxy:
        if not flags.proxy.startswith(("http://", "https://")):
            raise ToolError(f"--proxy {flags.proxy}: http://HOST:PORT is wanted")
        if not flags.listen or not flags.token_file:
            raise ToolError("--proxy needs --listen, where it looks for its enclave, --token-file")
        figures = measure_proxy(flags)
    else:
        if not flags.reference:
            raise ToolError("nothing to verify the enclave against: --reference FILE")
        if bool(flags.token_file) != bool(flags.vocabulary):
            raise ToolError("answers need both --token-file and --vocabulary")
        if not flags.token_file and not flags.key:
            raise ToolError("nothing to ask for: --token-file and --vocabulary, --key, or both")
        flags.unlock = owner.read_owner(flags) if flags.key else None
        figures = measure_enclave(flags)
    target = "proxy" if flags.proxy else "enclave"
    write({**header("measure"), "target": target, **figures}, flags.json, show_measure)
    return STATUSES[figures["verdict"]]


def write(figures, path, show):
    """Write JSON to standard output, or else show the figures and write it to a file. OSError."""
    text = json.dumps(figures, indent=1) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    show(figures)
    if path:
        pathlib.Path(path).write_text(text, "ascii")


def make_parser():
    """The command line."""
    parser = argparse.ArgumentParser(prog="exfil_timing.py", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("analyze", help="time to take models out", allow_abbrev=False)
    verb.set_defaults(run=run_analyze)
    text = f"repeatable: NAME=BYTES, a sealed file, or one of {', '.join(MODELS)} (all of these)"
    verb.add_argument("--model", action="append", help=text)
    text = f"bytes a second; repeatable ({mp.DEFAULT_RATE})"
    verb.add_argument("--rate", action="append", type=number(int, 1, 1 << 50), help=text)
    text = "how many times smaller the thief makes it; repeatable (1, 16, 100)"
    verb.add_argument("--compression", action="append", type=number(float, 1, 1e9), help=text)
    text = "that the thief reads at once (8)"
    verb.add_argument("--enclaves", type=number(int, 1, 10**6), default=8, help=text)
    text = f"share of what leaves that an audit does not find, 0 for not given ({RESIDUE}, "
    text += "as arXiv 2511.02620 reports for its own)"
    verb.add_argument("--residue", type=number(float, 0, 1), default=RESIDUE, help=text)
    text = "lifetime budget in bytes (a thousandth of the model)"
    verb.add_argument("--budget", type=number(int, 0, 1 << 60), help=text)
    verb.add_argument("--plot", metavar="FILE", help="draw a chart, .svg or .png")
    verb.add_argument("--json", metavar="FILE", help="write the figures, - to standard output")
    add_measure(verbs)
    add_bound(verbs)
    return parser


def add_bound(verbs):
    """The flags of `bound`: what a lease says, and what an enclave is started with."""
    about = "bits that an engine can tell at most, from the configuration"
    verb = verbs.add_parser("bound", help=about, description=about, allow_abbrev=False)
    verb.set_defaults(run=run_bound)
    text = "repeatable: NAME=BYTES, a sealed file, or one of "
    text += f"{', '.join(MODELS)} ({', '.join(BOUND_MODELS)})"
    verb.add_argument("--model", action="append", help=text)
    settings = muenclave.DEFAULTS
    options = {  # flag: default, least, most, help
        "rate": (mp.DEFAULT_RATE, 64, 1 << 40, "bytes a second"),
        "burst": (mp.DEFAULT_BURST, 16 << 10, 1 << 40, "bytes at once"),
        "expiry": (owner.FLAGS["expiry"][1], 1, 10 * 366 * 86400, "of a lease, seconds"),
        "vocabulary": (VOCABULARY, 2, 1 << 24, "entries of the table of ids"),
        "sessions": (int(settings["ENCLAVE_SESSIONS"]), 1, 1 << 16, "at once"),
        "context": (int(settings["ENCLAVE_CONTEXT"]), 1, 1 << 32, "tokens"),
        "latency-ms": (0, 0, 10_000, "of the lease's policy"),
    }
    for name, (value, least, most, text) in options.items():
        kind = number(int, least, most)
        verb.add_argument(f"--{name}", type=kind, default=value, help=f"{text} ({value})")
    text = "of the lease's policy"
    verb.add_argument("--shape", choices=bound.SHAPES, default="plain", help=text)
    text = "bytes of a lease (a tenth of the lifetime budget)"
    verb.add_argument("--budget", type=number(int, 1, 1 << 50), help=text)
    text = "bytes of an asset (a thousandth of the model)"
    verb.add_argument("--lifetime-budget", type=number(int, 1, 1 << 50), help=text)
    text = "how many times smaller the thief makes it; repeatable (1, 16, 100)"
    verb.add_argument("--compression", action="append", type=number(float, 1, 1e9), help=text)
    text = "JSON of tools/replay_audit.py audit or measure: what is left to tokens"
    verb.add_argument("--audit", metavar="FILE", help=text)
    verb.add_argument("--json", metavar="FILE", help="write the figures, - to standard output")


def add_measure(verbs):
    """The flags of `measure`; files that can't be read end in muproxy's own words."""
    about = "what an enclave or a proxy lets out, from outside; it spends the lease's budget"
    verb = verbs.add_parser("measure", help=about, description=about, allow_abbrev=False)
    verb.set_defaults(run=run_measure)
    address = {"type": muproxy.address_of, "metavar": "HOST:PORT"}
    verb.add_argument("--enclave", required=True, help="where it listens", **address)
    text = "measure this proxy, URL of its HTTP API, which must reach the enclave by --listen"
    verb.add_argument("--proxy", metavar="URL", help=text)
    verb.add_argument("--listen", help="where the counting relay listens for the proxy", **address)
    files = {name: owner.FLAGS[name][0] for name in FILES}
    for name, text in FILES.items():
        verb.add_argument(f"--{name}", type=files[name], metavar="FILE", help=text)
    verb.add_argument("--owner-psk", type=muproxy.read_secret, metavar="FILE", help="the owner's")
    text = "send the weights key to an enclave whose evidence says too little"
    verb.add_argument("--development", action="store_true", help=text)
    text = f"stated bytes a second ({mp.DEFAULT_RATE})"
    verb.add_argument("--rate", type=number(int, 64, 1 << 40), default=mp.DEFAULT_RATE, help=text)
    text = f"stated bytes at once ({mp.DEFAULT_BURST})"
    verb.add_argument("--burst", type=number(int, 1, 1 << 40), default=mp.DEFAULT_BURST, help=text)
    text = "answers at once (4)"
    verb.add_argument("--sessions", type=number(int, 1, 64), default=4, help=text)
    text = "of an answer, with --proxy (1000)"
    verb.add_argument("--max-tokens", type=number(int, 1, 1 << 24), default=1000, help=text)
    text = "measure at least so long (until it is decided)"
    verb.add_argument("--seconds", type=number(float, 0, 1e6), default=0, help=text)
    text = "give up undecided after so many seconds (600)"
    verb.add_argument("--limit", type=number(float, 1, 1e6), default=600, help=text)
    text = "of the timing probe, 0 for none (20)"
    verb.add_argument("--probe-seconds", type=number(float, 0, 1e6), default=20, help=text)
    verb.add_argument("--json", metavar="FILE", help="write the figures, - to standard output")


def main(argv=None):
    """The command line. Returns the exit status."""
    try:
        flags = make_parser().parse_args(argv)
        return flags.run(flags)
    except (ToolError, muproxy.Failure, mp.ProtocolError) as error:
        text = muproxy.text_of(error)
    except OSError as error:
        text = f"{error.filename or ''}: {error.strerror}".removeprefix(": ")
    except (OverflowError, UnicodeError) as error:  # of an address
        text = str(error)
    except KeyboardInterrupt:
        print("\nexfil_timing: ended", file=sys.stderr)
        return 130
    print(f"exfil_timing: error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
