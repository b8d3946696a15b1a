"""How long a model's weights take to leave, and what a meter lets out: tools/exfil_timing.py VERB

    analyze  time to take models out at given rates: raw, compressed, from several enclaves at once,
             past a replay audit, and within the asset's lifetime budget
    measure  what a running enclave, or a proxy before it, lets out, seen from outside

--json FILE (- for standard output) writes {"tool": "exfil_timing", "version": 1, "verb": ...}; and

    analyze: "assumptions": {column: text}, "enclaves", "audit": {"residue", "source"},
             "seed": {"bytes", "rate", "seconds", "compressed": {"16": seconds, ...}},
             "models": [{"name", "bytes", "source", "budget": bytes, "times": [{"rate",
             "compression", "bytes", "raw", "enclaves", "audited": seconds; "budget": {"seconds",
             "share", "is_enough"}}]}]: seconds until all of it is out, or until the budget is
             spent, which then was that share of it

Exit status of analyze: 0; 1 for a mistake, told in one line.
"""

import argparse
import json
import os
import pathlib
import sys

from environment import ROOT, ToolError

sys.path.insert(0, str(ROOT))
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
BUDGET_DIVISOR = 1000  # of the sealed size: an asset's lifetime budget unless its owner says more
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
        granted = size // BUDGET_DIVISOR if budget is None else budget
        times = [
            take_out(size / compression, rate, enclaves, residue, granted)
            | {"rate": rate, "compression": compression}
            for rate in rates
            for compression in compressions
        ]
        facts = {"name": name, "bytes": size, "source": source, "budget": granted}
        found.append(facts | {"times": times})
    source = RESIDUE_SOURCE if residue == RESIDUE else "given" if residue else "no residue given"
    seed = {str(c): SEED["bytes"] / c / SEED["rate"] for c in COMPRESSIONS[1:]}
    seed = SEED | {"seconds": SEED["bytes"] / SEED["rate"], "compressed": seed}
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
    several = f"{strongest:g}x, {figures['enclaves']} enclaves"
    return ["model", "bytes", *titles, several, f"{strongest:g}x, audited", "within the budget"]


def row_of(model, rate, strongest):
    """A model's row of the table at one rate."""
    times = {entry["compression"]: entry for entry in model["times"] if entry["rate"] == rate}
    best, budget = times[strongest], times[strongest]["budget"]
    audited = best["audited"]
    ends = f"never: it ends at {model['budget']:,} bytes, {budget['share']:.2%} of the smallest"
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


def write(figures, path, show):
    """Write JSON to a file or to standard output; unless that, show the figures. OSError."""
    text = json.dumps(figures, indent=1) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    if path:
        pathlib.Path(path).write_text(text, "ascii")
    show(figures)


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
    return parser


def main(argv=None):
    """The command line. Returns the exit status."""
    flags = make_parser().parse_args(argv)
    try:
        return flags.run(flags)
    except (ToolError, muproxy.Failure, mp.ProtocolError) as error:
        text = str(error)
    except OSError as error:
        text = f"{error.filename or ''}: {error.strerror}".removeprefix(": ")
    except KeyboardInterrupt:
        print("\nexfil_timing: ended", file=sys.stderr)
        return 130
    print(f"exfil_timing: error: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
