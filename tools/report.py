"""One page, and the README's tables, of what the tools measured.

    python3 tools/report.py [FILE.json ...] --output report.html
    python3 tools/report.py --readme [--check]

The files are what `--json` of attack_surface.py, exfil_timing.py, fuzz_rpc.py, replay_audit.py and
bench.py gave, and what the soak wrote (tests/test_soak.py); without any, those in tools/measured,
which the README is made of. The page is one file that loads nothing. --readme writes the README's
tables anew, between their marks; --check only says whether they are as the files have them. Exit
status: 0 if all was read and, with --check, is the same.
"""

import argparse
import datetime
import html
import json
import math
import pathlib
import re
import statistics
import sys

import bench_decode
import bench_http
import bench_shared
import bench_unseal
import measure
from environment import ROOT, ToolError

MEASURED = ROOT / "tools" / "measured"
CONTROLS = ROOT / "tools" / "controls.json"
README = ROOT / "README.md"
VERSION = 1  # of the documents
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
UNITS = (("years", 365.25 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60))
CONTENDERS = {  # of bench.py boot
    "image": "ours, measured boot from its disk",
    "kernel": "our kernel by `-kernel`",
    "debian": "Debian's cloud kernel by `-kernel`",
}
FORMATS = {  # of bench.py meter
    "cells": "ours: packed ids in sealed cells, through gate and proxy",
    "json": "a framed, sealed JSON object a token",
    "sse": "OpenAI's server-sent events, a chunk a token",
}
KINDS = {  # tool: fields that tell its kinds of documents apart
    "attack_surface": ("verb",),
    "bench": ("verb",),
    "exfil_timing": ("verb", "target"),
    "fuzz_rpc": ("mode",),
    "replay_audit": ("verb",),
}
CHARTED = "packages executables libraries scripts setuid services files python_lines".split()
PROTOTYPE = "Implements these controls in software, as a prototype."
STYLE = """
:root { color-scheme: light dark; --ink: #1a1c1e; --soft: #5b636b; --paper: #fff; --line: #d8dde2;
  --ours: #0b6bcb; --theirs: #b4553b; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #9aa4ad; --paper: #15181b;
  --line: #343a40; --ours: #6cb2ff; --theirs: #f0997d; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem } p, small { color: var(--soft) }
nav a { margin-right: 1rem } a { color: var(--ours) }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { padding: .35rem .6rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line) }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.bars { margin: 1rem 0 } .bars dt { margin-top: .7rem }
.bars dd { margin: .15rem 0; display: flex; align-items: center; gap: .5rem; font-size: .85rem }
.bar { display: block; height: .8rem; border-radius: 2px;
  min-width: 2px; background: var(--ours) } .bar.last { background: var(--theirs) }
.track { flex: 1 1 auto } .bars span.what { flex: 0 0 11rem; color: var(--soft) }
.bars span.value { flex: 0 0 9rem; text-align: right; font-variant-numeric: tabular-nums }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft); font-size: 13px }
.axis { stroke: var(--line) } .seen { stroke: var(--ours); fill: none; stroke-width: 2 }
.bound { stroke: var(--theirs); fill: none; stroke-width: 2; stroke-dasharray: 6 4 }
.bad { color: var(--bad) } code { font-size: .85em }
@media (max-width: 40rem) { .bars dd { flex-wrap: wrap } .bars span.what { flex-basis: 100% }
  .bars span.value { flex-basis: 6rem } thead { display: none }
  tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--line) }
  td, td.number { display: flex; gap: .6rem; border: 0; padding: .1rem 0; text-align: left;
    white-space: normal }
  td span { min-width: 0 }
  td::before { content: attr(data-label); flex: 0 0 6.5rem; color: var(--soft) } }
"""


def read_document(path):
    """A tool's document, {"tool", "version", …}. Raises ToolError."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None
    except ValueError as error:
        raise ToolError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or kind_of(document) not in SECTIONS:
        raise ToolError(f"{path} is of none of these: {', '.join(SECTIONS)}")
    if document.get("version") != VERSION:
        raise ToolError(
            f"{path} has version {document.get('version')}, not {VERSION}: make it anew"
        )
    return document


def kind_of(document):
    """The key in SECTIONS: a tool, and what tells apart the kinds of documents that it has."""
    names = ("tool", *KINDS.get(document.get("tool"), ()))
    return " ".join(str(document[name]) for name in names if name in document)


def read_documents(paths):
    """{kind: document}; a later file of a kind replaces an earlier one. ToolError."""
    documents = [read_document(path) for path in paths]
    return {kind_of(document): document for document in documents}


# ---------------------------------------------------------------- what the project says of itself


def claims(text):
    """The rows of the claims table in a Markdown text, as lists of cells without marks."""
    rows = re.findall(r"^\|\s*(C\d+)\s*\|(.*)\|\s*$", text, re.MULTILINE)
    return [[number, *(cell.strip() for cell in rest.split("|"))] for number, rest in rows]


def controls():
    """{"sources": {short: name}, "controls": [{"source", "control", "title", …}]}."""
    return json.loads(CONTROLS.read_text("utf-8"))


# ---------------------------------------------------------------- HTML


def text_of(value):
    """A value as a reader sees it: numbers grouped, what was not measured with its reason."""
    if isinstance(value, dict):
        return f"not measured: {value['not_measured']}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3g}" if isinstance(value, float) else str(value)


def element(name, content, **attributes):
    """An element with content that is HTML already; class_ stands for class, a_b for a-b."""
    pairs = [(name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items()]
    words = "".join(f' {name}="{html.escape(str(value))}"' for name, value in pairs)
    return f"<{name}{words}>{content}</{name}>"


def table(head, rows):
    """A table; a number stands to the right, and a cell that begins with < is HTML."""
    names = "".join(element("th", html.escape(name), scope="col") for name in head)
    body = ""
    for row in rows:
        body += element("tr", "".join(map(cell, head, row)))
    return element("table", element("thead", element("tr", names)) + element("tbody", body))


def cell(label, value):
    """One cell of a table; narrow screens show its label beside it."""
    is_html = isinstance(value, str) and value.startswith("<")
    text = value if is_html else html.escape(text_of(value))
    kind = {"class_": "number"} if is_number(value) else {}
    return element("td", element("span", text), **kind, data_label=label)


def is_number(value):
    """Whether it is a measured number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def bars(groups):
    """Bars of [(label, [(name, number, text)])], each group on a scale of its own, from zero."""
    parts = []
    for label, row in groups:
        most = max((number for _, number, _ in row), default=0) or 1
        parts.append(element("dt", html.escape(label)))
        for at, (name, number, text) in enumerate(row):
            class_ = "bar last" if at else "bar"
            width = f"width: {100 * number / most:.2f}%"
            bar = element("span", element("span", "", class_=class_, style=width), class_="track")
            words = element("span", html.escape(name), class_="what")
            value = element("span", html.escape(text), class_="value")
            parts.append(element("dd", words + bar + value))
    return element("dl", "".join(parts), class_="bars")


def chart(series, width=720, height=300):
    """Lines over time as SVG: [(class, label, [(seconds, bytes)])], axes from zero."""
    left, bottom, top = 70, 40, 24
    most_x = max((x for _, _, points in series for x, _ in points), default=0) or 1
    most_y = max((y for _, _, points in series for _, y in points), default=0) or 1

    def place(x, y):
        across = left + (width - left - 10) * x / most_x
        return f"{across:.1f},{height - bottom - (height - bottom - top) * y / most_y:.1f}"

    parts = []
    for part in range(5):
        x, y = most_x * part / 4, most_y * part / 4
        (across, _), (_, up) = (place(*at).split(",") for at in ((x, 0), (0, y)))
        line = f'<line class="axis" x1="{left}" x2="{width - 10}" y1="{up}" y2="{up}"/>'
        parts.append(line + svg_text(left - 6, float(up) + 4, f"{y / 1000:,.0f}", "end"))
        parts.append(svg_text(float(across), height - bottom + 18, f"{x:.0f}", "middle"))
    parts.append(svg_text(left - 6, top - 8, "kB", "end"))
    parts.append(svg_text(width - 10, height - 6, "seconds", "end"))
    for class_, _, points in series:
        path = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline class="{class_}" points="{path}"/>')
    label = "; ".join(name for _, name, _ in series)
    box = f"0 0 {width} {height}"
    return element("svg", "".join(parts), viewBox=box, role="img", aria_label=label)


def svg_text(x, y, text, anchor):
    """A label in a chart."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


# ---------------------------------------------------------------- sections of the page
# Each takes the document of its kind and returns (title, HTML).


def duration(seconds):
    """Seconds in the largest unit that gives at least one."""
    for name, size in UNITS:
        if seconds >= size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:,.0f} seconds"


def exfiltration(document):
    """How long each model takes to leave, at the first rate, and what the budget leaves of it."""
    rows, groups = [], []
    for model in document["models"]:
        rate = model["times"][0]["rate"]
        times = [time for time in model["times"] if time["rate"] == rate]
        worst = times[-1]
        columns = [duration(time["raw"]) for time in times]
        rows.append([model["name"], size_of(model), *columns, budget_text(model, worst)])
        bar = [
            (f"{time['compression']}× compressed", decades(time["raw"]), text)
            for time, text in zip(times, columns, strict=True)
        ]
        groups.append((f"{model['name']}, {size_of(model)}", bar))
    heads = [f"{time['compression']}×" if time["compression"] > 1 else "raw" for time in times]
    seed = document["seed"]
    compressed = seed["compressed"]["100"]
    intro = f"At {rate:,} bytes a second. {seed['bytes'] / 1e9:.0f} GB at {seed['rate']:,} bytes a "
    intro += f"second are {duration(seed['seconds'])}; compressed 100×, {duration(compressed)}."
    notes = [[name, text] for name, text in document["assumptions"].items()]
    parts = [
        element("p", html.escape(intro)),
        table(["model", "size", *heads, "within its budget"], rows),
    ]
    parts += [
        element("p", "Bars are on a logarithmic scale that begins at a minute."),
        bars(groups),
    ]
    parts.append(table(["column", "what it assumes"], notes))
    return "How long a model takes to leave", "".join(parts)


def size_of(model):
    """A model's size as text."""
    return f"{model['bytes'] / 1e9:,.4g} GB"


def decades(seconds):
    """A length for a bar: decades above a minute."""
    return math.log10(max(seconds / 60, 1.01))


def budget_text(model, worst):
    """What the lifetime budget leaves a thief of the smallest form."""
    budget = worst["budget"]
    if budget["is_enough"]:
        return f"all of it, in {duration(budget['seconds'])}"
    return f"never: {model['budget']:,} bytes are {budget['share']:.0%} of its smallest form"


BOUND_COLUMNS = {  # of the table of channels
    "day": "bits a day at most",
    "audited_day": "after the audit",
    "outside_day": "seen without the session's keys",
}


def bound_tables(document):
    """[(head, rows)] of `exfil_timing.py bound`: of channels, of models."""
    columns = [name for name in BOUND_COLUMNS if name in document["sum"]]
    channels = [
        [one["name"], one["charge"], *(one[name] for name in columns)]
        for one in document["channels"]
    ]
    channels.append(["sum", "", *(document["sum"][name] for name in columns)])
    heads = ["channel", "charged", *(BOUND_COLUMNS[name] for name in columns)]
    factors = [time["compression"] for time in document["models"][0]["times"]]
    titles = [f"{factor}×" if factor > 1 else "raw" for factor in factors]
    audited = [f"{title}, audited" for title in titles] if document["audit"] else []
    models = []
    for model in document["models"]:
        times = [duration(time["rate"]) for time in model["times"]]
        times += [duration(time["audited"]) for time in model["times"]] if audited else []
        models.append([model["name"], size_of(model), *times, lease_text(model)])
        models[-1].append(lifetime_text(model))
    more = ["a lease, and when it is spent", "within the lifetime budget"]
    return [(heads, channels), (["model", "size", *titles, *audited, *more], models)]


def lease_text(model):
    """A lease's bytes, and how soon an engine can have spent them."""
    return f"{model['lease']['budget']:,} bytes, {duration(model['lease']['seconds'])}"


def lifetime_text(model):
    """What of each form of a model leaves within the lifetime budget, which nothing refills."""
    shares = ", ".join(f"{time['lifetime']['share']:.1%}" for time in model["times"])
    is_enough = any(time["lifetime"]["is_enough"] for time in model["times"])
    when = "not all of them" if is_enough else "never"
    return f"{when}: {model['lifetime']:,} bytes are {shares}"


def bound(document):
    """What an engine can tell at most, from the configuration alone."""
    facts, beyond = document["configuration"], document["uncovered"]
    text = f"{facts['rate']:,} bytes a second, cells of {facts['cell']} bytes with "
    text += f"{facts['ids_per_cell']} ids of {facts['bits']} bits, {facts['sessions']} sessions. "
    text += f"A lease: by the clock at most {document['sum']['lease'] // 8:,} bytes, and never "
    text += f"more than its budget. Malicious host: {document['malicious_host']}. Beyond what is "
    text += f"charged: at most {beyond['day']:,} bits a day. Seen without a session's keys: "
    text += f"{document['seen_without_keys']}."
    if document["audit"]:
        text += f" Audit: {document['audit']['bits_per_token']:.3g} bits a token are left, "
        text += f"{document['audit']['source']}."
    parts = [element("p", html.escape(text))]
    parts += [table(head, rows) for head, rows in bound_tables(document)]
    rows = [[what, why] for what, why in document["not_counted"].items()]
    parts.append(table(["not counted", "why"], rows))
    return "Exfiltration bound", "".join(parts)


def measure_text(measure):
    """A measure of attack_surface.py as text."""
    if measure is None:
        return ""
    return text_of(measure["count"]) if "count" in measure else text_of(measure)


def compared(labels, columns):
    """Rows of {metric: measure} columns: label, a text each, how many times the last is the first.

    A ratio is only of what was measured in both. Metrics that no column has are left out.
    """
    rows = []
    for metric, label in labels.items():
        measures = [column.get(metric) for column in columns]
        if any(measures):
            first, last = ((one or {}).get("count") for one in (measures[0], measures[-1]))
            ratio = f"{last / first:,.3g}×" if first and last is not None else ""
            rows.append([label, *map(measure_text, measures), ratio])
    return rows


def comparisons(document):
    """[(title, head, rows)] of `attack_surface.py compare`: of targets, of kernels, of our code."""
    labels, parts = document["labels"], []
    for title, key in (("system", "targets"), ("kernel", "kernels")):
        names = [one["name"] for one in document[key]]
        columns = [one["metrics"] for one in document[key]]
        parts.append((title, [title, *names, "ratio"], compared(labels, columns)))
    own = [row[:2] for row in compared(labels, [document["own"]["metrics"]])]
    return [*parts, ("our code", ["our code", ""], own)]


def attack_surface(document):
    """Enclave and baseline side by side."""
    targets = document["targets"]
    groups = []
    for metric in CHARTED:
        counts = [(one["name"], one["metrics"][metric].get("count")) for one in targets]
        if all(count is not None for _, count in counts):
            row = [(name, count, text_of(count)) for name, count in counts]
            groups.append((document["labels"][metric], row))
    tables = [table(head, rows) for _, head, rows in comparisons(document)]
    return "Attack surface", bars(groups) + "".join(tables)


def meter(document):
    """What a reader got of a meter over time, below what it may let out."""
    step, rate, burst = document["trace"]["step"], document["rate"], document["burst"]
    total, seen = 0, [(0, 0)]
    for number, count in enumerate(document["trace"]["bytes"], 1):
        total += count
        seen.append((number * step, total))
    end = seen[-1][0]
    lines = [("seen", "bytes that left", seen)]
    lines.append(("bound", "bytes that may leave", [(0, burst), (end, burst + rate * end)]))
    text = (
        f"{rate:,} bytes a second and {burst:,} at once are allowed. In {document['seconds']:.0f} "
    )
    text += f"seconds {document['bytes']:,} bytes left; the most beyond the rate in any window was "
    text += f"{document['burst_seen']:,} bytes; the reader got {document['use']:.1%} of the rate."
    rows = [[one["seconds"], one["bytes"], one["allowed"]] for one in document["windows"]]
    parts = [element("p", html.escape(text)), chart(lines)]
    parts.append(table(["window, seconds", "most bytes in it", "allowed"], rows))
    title = f"Meter of the {document['target']}: it {document['verdict']}"
    probe = document.get("probe")
    if probe:
        bits = probe["bits_per_second"]
        told = "too few cells to say" if bits is None else f"{bits:.2f} bits a second"
        bound = sum(probe["bound_bits_per_second"].values())
        told = f"What lengths and moments of cells could signal: {told}; bound by construction "
        parts.append(element("p", html.escape(f"{told}{bound:.2f}. {probe['source']}")))
    return title, "".join(parts)


def fuzzing(document):
    """How much was tried, and what was found."""
    rows = [[kind, count] for kind, count in sorted(document["by_kind"].items())]
    text = f"{document['messages']:,} messages in {duration(document['seconds'])}, seed "
    text += f"{document['seed']}: {len(document['findings'])} findings."
    found = [[one["verdict"], one["case"], one["text"]] for one in document["findings"]]
    parts = [element("p", html.escape(text)), table(["kind of message", "messages"], rows)]
    parts += [table(["verdict", "case", "what"], found)] if found else []
    return f"Fuzzing, {document['mode']}", "".join(parts)


def replay(document):
    """What a replay audit finds."""
    model, rule = document["model"], document["rule"]
    text = f"A model of {model['parameters']:,} parameters and {model['vocabulary']:,} ids, which "
    text += f"knows {model['text']}. Where answers ran beside each other, at most "
    text += f"{rule['share']:.1%} of honest tokens may be refused. At most "
    text += f"{rule['false_alarm']:.0%} of honest audits may be an alarm; confidence "
    text += f"{rule['confidence']:.0%}."
    tables = [table(head, rows) for head, rows in replay_rows(document)]
    return "Replay audit", element("p", html.escape(text)) + "".join(tables)


def replay_rows(document):
    """[(head, rows)] of honest answers, and of those that are not."""
    honest, attacks = [], []
    for row in document["honest"]:
        cells = [row["dtype"], row["batch"], audit_mode(row), row["tokens"]]
        cells += [f"{row['equal'] / row['tokens']:.2%}", row["refused"]]
        cells += [f"{row['unnoticed_bits']:.3f}", f"{row['false_alarms']} of {row['audits']}"]
        honest.append(cells)
    for row in document["attacks"]:
        cells = [row["attack"], row["dtype"], row["batch"], audit_mode(row), row["tokens"]]
        cells += [f"{row['refused'] / row['tokens']:.2%}", f"{row['alone']} of {row['exchanges']}"]
        found = row["needed"]["tokens"] if row["needed"] else f"not in {row['tokens']:,}"
        attacks.append([*cells, found])
    head = ["honest answers", "at a time", "accepted", "tokens", "equal", "refused"]
    tables = [([*head, "bits a token unnoticed, at most", "false alarms"], honest)]
    head = ["what answers", "type", "at a time", "accepted", "tokens", "refused"]
    return [*tables, ([*head, "answers that are an alarm alone", "found in tokens"], attacks)]


def audit_mode(row):
    """What a replay audit takes for equal."""
    return "equal" if row["mode"] == "exact" else f"within {row['tolerance']:.2g} logits"


def boot(document):
    """Time to the handshake, sizes."""
    figures = document["boot"]
    machine, ours, debian = figures["machine"], figures["ours"], figures["debian"]
    bar = []
    for name, label in CONTENDERS.items():
        seconds = figures["seconds"][name]
        text = f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
        bar.append((label.replace("`", ""), statistics.median(seconds), text))
    where = f"{machine['processor']}, {machine['cpus']} CPUs, {machine['accelerator']}"
    rows = [
        ["kernel and initramfs, bytes", ours["bytes"], debian["bytes"] + debian["initramfs_bytes"]],
        ["kernel options built in", ours["options"]["y"], debian["options"]["y"]],
        ["kernel options as modules", ours["options"]["m"], debian["options"]["m"]],
    ]
    parts = [element("p", html.escape(where)), bars([("power-on to handshake", bar)])]
    parts.append(table(["", "muenclave", "Debian's cloud kernel"], rows))
    return "Boot", "".join(parts)


def transport(document):
    """Tokens a second over one cap, in each form."""
    figures = document["meter"]
    groups = []
    for name, label in FORMATS.items():
        tokens = figures["formats"][name]["tokens"]
        groups.append((label, statistics.median(tokens), spread_of(tokens, ".0f")))
    text = f"Transport alone at {figures['cap']:,} bytes a second: {figures['text']['source']}, "
    text += f"{figures['text']['tokens']:,} tokens of {figures['vocabulary']['name']}. "
    text += f"{figures['vocabulary']['bits']} bits an id allow {figures['ceiling']:,.0f}."
    parts = [element("p", html.escape(text)), bars([("tokens a second", groups)])]
    notes = [[FORMATS[name], told] for name, told in figures["descriptions"].items()]
    return "Transport under the cap", "".join(parts) + table(["form", "what it is"], notes)


def soak(document):
    """What processes had at the beginning and at the end of a long load."""
    return "Soak", element("p", html.escape(soak_text(document))) + table(*soak_rows(document))


def soak_text(document):
    """What was done, and how soon pieces of streams came."""
    counts, first = document["counts"], document["first_seconds"]
    text = f"{document['machine']['processor']}, {document['machine']['cpus']} CPUs: "
    text += f"{duration(document['seconds'])} of {document['clients']} clients at "
    text += f"{document['slots']} slots, {document['requests_running']} requests at a time. "
    text += f"{counts['streams']:,} streams read to their end and {counts['whole']:,} answers in "
    text += f"one piece, all as they are alone; {counts['cancelled']:,} streams left in their "
    text += f"middle, {counts['hung_up']:,} before; {counts['mistakes']:,} mistakes. First token "
    text += f"after {first['median']:.2f} s (median) and {first['worst']:.2f} s (worst); longest "
    text += f"pause in a stream {document['worst_gap_seconds']:.2f} s"
    if "machine_pause_seconds" in document:
        text += f", of the machine itself {document['machine_pause_seconds']:.2f} s"
    return f"{text}."


def soak_rows(document):
    """What each process has: medians of the first and of the last fifth of the samples."""
    rows = []
    for role, found in document["processes"].items():
        cells = [role]
        for what, unit in (("rss", 1e6), ("threads", 1), ("descriptors", 1)):
            ends = found[what] or {}  # who is not root can't count descriptors
            ends = [f"{ends[end] / unit:,.0f}" for end in ("first", "last") if end in ends]
            cells.append(" → ".join(ends) or "–")
        rows.append(cells)
    return ["process", "memory, MB", "threads", "descriptors"], rows


def speed(document):
    """What one of bench.py's other verbs has measured, beside its targets."""
    verb = document["verb"]
    machine = document[verb]["machine"]
    where = f"{machine['processor']}, {machine['cpus']} CPUs, {document[verb]['rounds']} rounds"
    head, rows = SPEEDS[verb](document[verb])
    parts = [element("p", html.escape(where)), table(head, rows)]
    parts.append(table(TARGET_HEAD, target_rows(document)))
    return f"Speed: {verb}", "".join(parts)


def unseal_rows(figures):
    """Each way from sealed or plain weights to tensors."""
    rows = []
    for name, seconds in figures["seconds"].items():
        rates = [figures["bytes"] / 1e9 / value for value in seconds]
        cells = [spread_of(seconds, ".2f"), spread_of(rates, ".2f")]
        ratio = figures["ratios"].get(name)
        rows.append(
            [bench_unseal.WAYS[name], *cells, bench_shared.tell_ratio(ratio) if ratio else ""]
        )
    return ["unseal", "seconds", "GB a second", "ours"], rows


def serving_rows(figures, contenders, head):
    """Tokens a second of each contender, for each number of streams."""
    rows = []
    for count, found in figures["streams"].items():
        for name, rounds in found.items():
            cells = [spread_of(rounds["whole"], ".1f")]
            cells += [spread_of(rounds[f"first_{key}"], ".2f") for key in ("median", "worst")]
            ratio = figures["ratios"][count].get(name, {}).get("whole")
            rows.append(
                [count, contenders[name], *cells, bench_shared.tell_ratio(ratio) if ratio else ""]
            )
    labels = ["tokens a second", "first token, s: median", "worst", "ours, tokens a second"]
    return ["streams", head, *labels], rows


def decode_rows(figures):
    """The engine alone."""
    return serving_rows(figures, bench_decode.CONTENDERS, "engine alone")


def http_rows(figures):
    """Over HTTP."""
    return serving_rows(figures, bench_http.CONTENDERS, "over HTTP")


def handshake_rows(figures):
    """Sessions."""
    many = f"{figures['sessions']} sessions opened, {figures['openers']} at a time"
    rows = [
        ["from connecting to a verified session", f"{spread_of(figures['verified_ms'], '.1f')} ms"],
        ["to READY, with the access token", f"{spread_of(figures['ready_ms'], '.1f')} ms"],
        [many, f"{spread_of(figures['many_s'], '.1f')} s"],
    ]
    return ["handshake", ""], rows


def target_rows(document):
    """What was to be reached, and whether it was."""
    figures = ("" if t["figure"] is None else f"{t['figure']:.3g}" for t in document["targets"])
    return [
        [t["target"], t["limit"], f, t["verdict"]] for t, f in zip(document["targets"], figures)
    ]


SPEEDS = {
    "unseal": unseal_rows,
    "decode": decode_rows,
    "http": http_rows,
    "handshake": handshake_rows,
}
TARGET_HEAD = ["target", "at least, at most", "figure", "verdict"]


def spread_of(values, form):
    """The median with the least and the most."""
    least, most = min(values), max(values)
    return f"{statistics.median(values):,{form}} ({least:,{form}} to {most:,{form}})"


def claims_section(rows):
    """The README's claims, and how many are held."""
    held = sum(row[-1] == "held" for row in rows)
    intro = f"{held} of {len(rows)} are held by a test that would fail if they were false."
    cells = [[row[0], row[1], markdown(row[3]), row[4]] for row in rows]
    body = table(["#", "claim", "tests", "status"], cells)
    return "Claims", element("p", html.escape(intro)) + body


def controls_section(values):
    """The map of controls."""
    cells = [
        [
            f"{row['source']} {row['control']}",
            row["title"],
            row["mechanism"] or "–",
            markdown("<br>".join(f"`{name}`" for name in row["tests"])),
            gap(row),
        ]
        for row in values["controls"]
    ]
    sources = "; ".join(f"{short}: {name}" for short, name in values["sources"].items())
    head = ["control", "title", "what stands here", "tests", "missing"]
    intro = element("p", html.escape(f"{PROTOTYPE} {sources}."))
    return "Controls", intro + table(head, cells)


def gap(row):
    """What is missing of a control, and whose it is."""
    return f"{row['missing']} ({row['kind']})" if row["missing"] else "–"


def markdown(text):
    """A cell of the README as HTML: line breaks, and code spans that may break at points."""
    lines = []
    for line in text.split("<br>"):
        parts = html.escape(line).split("`")
        codes = [element("code", re.sub(r"([._])", r"\1<wbr>", part)) for part in parts[1::2]]
        parts[1::2] = codes
        lines.append("".join(parts))
    return element("span", "<br>".join(lines))


SECTIONS = {  # kind of document: what makes its part of the page
    "attack_surface compare": attack_surface,
    "exfil_timing analyze": exfiltration,
    "exfil_timing bound": bound,
    "exfil_timing measure enclave": meter,
    "exfil_timing measure proxy": meter,
    "fuzz_rpc in-process": fuzzing,
    "fuzz_rpc live": fuzzing,
    "replay_audit measure": replay,
    "bench": boot,
    "bench meter": transport,
    "soak": soak,
} | {f"bench {verb}": speed for verb in SPEEDS}


def section(kind, document):
    """(title, HTML) of a document. ToolError if it lacks what its kind has."""
    try:
        return SECTIONS[kind](document)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ToolError(f"the document of {kind} is not whole: {error!r}") from None


def page(documents, readme):
    """The whole page."""
    parts = [section(kind, documents[kind]) for kind in SECTIONS if kind in documents]
    parts += [controls_section(controls()), claims_section(claims(readme))]
    links, body = [], []
    for number, (title, content) in enumerate(parts):
        links.append(element("a", html.escape(title), href=f"#part{number}"))
        heading = element("h2", html.escape(title), id=f"part{number}")
        body.append(element("section", heading + content))
    made = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    missing = [kind for kind in SECTIONS if kind not in documents]
    note = f"Made {made} of what the tools measured."
    note += f" Not given: {', '.join(missing)}." if missing else ""
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<link rel="icon" href="data:,"><title>muenclave: report</title><style>{STYLE}</style>'
    main = element("h1", "muenclave: report") + element("p", html.escape(note))
    main += element("nav", "".join(links)) + "".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{main}</body></html>\n'


# ---------------------------------------------------------------- the README's tables


def rows_of(head, rows):
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(text_of, line)) + " |" for line in lines)


def readme_comparison(documents):
    """The tables of `attack_surface.py compare`."""
    document = documents["attack_surface compare"]
    return "\n\n".join(rows_of(head, rows) for _, head, rows in comparisons(document))


def readme_exfiltration(documents):
    """The table of `exfil_timing.py analyze`."""
    document = documents["exfil_timing analyze"]
    rows = []
    for model in document["models"]:
        times = [t for t in model["times"] if t["rate"] == model["times"][0]["rate"]]
        columns = [duration(time["raw"]) for time in times]
        rows.append([model["name"], size_of(model), *columns, budget_text(model, times[-1])])
    heads = [f"{time['compression']}×" if time["compression"] > 1 else "raw" for time in times]
    return rows_of(["model", "size", *heads, "within its lifetime budget"], rows)


def readme_bound(documents):
    """The tables of `exfil_timing.py bound`."""
    return "\n\n".join(rows_of(*one) for one in bound_tables(documents["exfil_timing bound"]))


def readme_meters(documents):
    """The verdicts of `exfil_timing.py measure`."""
    rows = []
    for target in ("enclave", "proxy"):
        one = documents[f"exfil_timing measure {target}"]
        beyond = f"{one['burst_seen']:,.0f} of {one['burst'] + one['held']:,}"
        use, seconds = f"{one['use']:.1%}", f"{one['seconds']:.0f}"
        rows.append([target, one["verdict"], one["rate"], seconds, one["bytes"], use, beyond])
    head = ["meter", "verdict", "bytes a second", "seconds", "bytes", "of the rate"]
    return rows_of([*head, "most beyond the rate in any window"], rows)


def readme_fuzzing(documents):
    """How much `fuzz_rpc.py` has tried, and what it found."""
    rows = []
    for mode in ("in-process", "live"):
        one = documents[f"fuzz_rpc {mode}"]
        rows.append([mode, str(one["seed"]), one["messages"], duration(one["seconds"])])
        rows[-1] += [one["replies"], sum(one["cases"].values()), len(one["findings"])]
    return rows_of(["mode", "seed", "messages", "time", "replies", "episodes", "findings"], rows)


def readme_replay(documents):
    """The tables of `replay_audit.py measure`."""
    parts = replay_rows(documents["replay_audit measure"])
    return "\n\n".join(rows_of(head, rows) for head, rows in parts)


def readme_boot(documents):
    """The table of `bench.py boot`."""
    figures = documents["bench"]["boot"]
    ours, debian = figures["ours"], figures["debian"]
    times = [
        f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
        for seconds in (figures["seconds"][name] for name in CONTENDERS)
    ]
    sizes = [
        f"{n / 1e6:.1f} MB" for n in (ours["bytes"], debian["bytes"], debian["initramfs_bytes"])
    ]
    options = [f"{o['y']:,}, {o['m']:,}" for o in (ours["options"], debian["options"])]
    rows = [
        ["power-on to handshake", *times],
        ["kernel and initramfs", f"{sizes[0]}, one file", "", f"{sizes[1]} and {sizes[2]}"],
        ["kernel options, as modules", options[0], "", options[1]],
    ]
    return rows_of(["", *CONTENDERS.values()], rows)


def readme_transport(documents):
    """The table of `bench.py meter`."""
    figures = documents["bench meter"]["meter"]
    medians = {name: statistics.median(one["tokens"]) for name, one in figures["formats"].items()}
    rows = []
    for name, label in FORMATS.items():
        one = figures["formats"][name]
        a_token = statistics.median(one["bytes"]) / medians[name]
        ratio = f"{medians['cells'] / medians[name]:.1f}×"
        form = ".0f" if medians[name] >= 100 else ".1f"
        rows.append([label, spread_of(one["tokens"], form), f"{a_token:.2f}", ratio])
    return rows_of(["over the same cap", "tokens a second", "bytes a token", "ours"], rows)


def readme_soak(documents):
    """What the soak found, and its table."""
    document = documents["soak"]
    return f"{soak_text(document)}\n\n{rows_of(*soak_rows(document))}"


def readme_speed(documents):
    """What bench.py's other verbs have measured, a table each."""
    parts = []
    for verb, rows in SPEEDS.items():
        parts.append(rows_of(*rows(documents[f"bench {verb}"][verb])))
    return "\n\n".join(parts)


def readme_targets(documents):
    """The targets of all verbs."""
    rows = [row for verb in SPEEDS for row in target_rows(documents[f"bench {verb}"])]
    return rows_of(TARGET_HEAD, rows)


def readme_controls(_):
    """The map of controls, with the claims' short way of naming tests."""
    rows = []
    for row in controls()["controls"]:
        tests = "<br>".join(f"`{name}`" for name in row["tests"])
        name = f"{row['source']} {row['control']}"
        rows.append([name, row["title"], row["mechanism"], tests, gap(row)])
    return rows_of(["control", "title", "what stands here", "test", "missing"], rows)


TABLES = {  # mark in the README: what makes the text under it
    "comparison": readme_comparison,
    "exfiltration": readme_exfiltration,
    "bound": readme_bound,
    "meters": readme_meters,
    "fuzzing": readme_fuzzing,
    "replay": readme_replay,
    "controls": readme_controls,
    "boot": readme_boot,
    "transport": readme_transport,
    "soak": readme_soak,
    "speed": readme_speed,
    "targets": readme_targets,
}
MARK = "<!-- {} -->"
END = "<!-- end -->"


def render(text, documents):
    """The README with every table made anew. ToolError if a mark or a document is missing."""
    for name, make in TABLES.items():
        start, found, rest = text.partition(MARK.format(f"table: {name}") + "\n")
        _, ended, after = rest.partition(END)
        if not found or not ended:
            raise ToolError(
                f"README.md has no {MARK.format(f'table: {name}')} or no {END} after it"
            )
        try:
            made = make(documents)
        except KeyError as error:
            raise ToolError(f"{MEASURED} has no document of {error}") from None
        text = f"{start}{found}\n{made}\n\n{END}{after}"
    return text


# ---------------------------------------------------------------- command line


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=pathlib.Path, metavar="FILE.json")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="write the page there")
    parser.add_argument("--readme", action="store_true", help="write the README's tables anew")
    parser.add_argument("--check", action="store_true", help="only say whether they are the same")
    flags = parser.parse_args(argv)
    if (flags.output is None) == (not flags.readme) or flags.readme and flags.files:
        parser.error("--output FILE, or --readme, which takes the files of tools/measured")
    try:
        documents = read_documents(flags.files or sorted(MEASURED.glob("*.json")))
        text = README.read_text("utf-8")
        if flags.output:
            measure.write(flags.output, page(documents, text))
            return 0
        made = render(text, documents)
        if flags.check:
            return say_whether(made == text)
        measure.write(README, made)
    except (ToolError, measure.MeasureError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 1
    return 0


def say_whether(same):
    """The exit status of --check."""
    if not same:
        print("report: README.md is not as tools/measured has it: --readme", file=sys.stderr)
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
