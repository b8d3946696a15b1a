"""Measure what the project claims in numbers: python3 tools/bench.py VERB

    unseal      sealed weights in the page cache to tensors in the engine, by the product's loader;
                beside memmove, plaintext safetensors, age and gpg
    decode      tokens a second of the engine alone: 1, 8, 32 streams; beside transformers and
                llama.cpp, and what reading the weights allows
    http        the same over HTTP, through gate and proxy, by OpenAI's client; beside transformers'
                and llama.cpp's servers
    handshake   from connecting to a verified session, and 200 of them
    meter       tokens a second over the same cap of bytes a second, transport alone, with real text
                that was tokenised before: our cells, sealed JSON, OpenAI's events
    boot        the image's size, and the time from power-on to the handshake, beside Debian's
                cloud kernel
    all         each of them

A figure is the median of the rounds, with the least and the most; contenders take turns in every
round. A ratio of rounds that disagree is not told, nor is a figure that this machine can't give:
both are said. --peers DIR makes a virtual environment for the peers (and the tokenizer of meter),
apart from the project's; without it they are left out. --json FILE (-: standard output) writes all
figures: {"tool", "version", "verb", VERB: figures, "targets"}; boot alone {"tool", "version",
"boot"}. Exit status: 0 if all was measured.
"""

import argparse
import pathlib
import sys

import bench_boot
import bench_decode
import bench_handshake
import bench_http
import bench_meter
import bench_model
import bench_shared as shared
import bench_unseal
import environment
import measure
import pcr
import vm
from environment import ROOT, ToolError

sys.path.insert(0, str(ROOT))
import muprotocol as mp  # noqa: E402
import muproxy  # noqa: E402

VERBS = {  # verb: what measures, what prints
    "unseal": (bench_unseal.run_unseal, bench_unseal.show_unseal),
    "decode": (bench_decode.run_decode, bench_decode.show_decode),
    "http": (bench_http.run_http, bench_http.show_http),
    "handshake": (bench_handshake.run_handshake, bench_handshake.show_handshake),
    "meter": (bench_meter.run_meter, bench_meter.show_meter),
    "boot": (bench_boot.run_boot, bench_boot.show_boot),
}
TARGETS = {
    "unseal": bench_unseal.unseal_targets,
    "decode": bench_decode.decode_targets,
    "http": bench_http.http_targets,
    "handshake": bench_handshake.handshake_targets,
}
ERRORS = (ToolError, pcr.PcrError, measure.MeasureError, muproxy.Failure, mp.ProtocolError, OSError)


def say(text):
    """Progress."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def text_of(error):
    """What an error tells a user, in a line."""
    if isinstance(error, OSError):
        return f"{error.filename or ''}: {error.strerror}"
    return muproxy.text_of(error)


def measure_verb(verb, flags):
    """The figures of a verb, printed unless JSON is. Raises ERRORS."""
    run, show = VERBS[verb]
    figures = {"machine": shared.describe_processor()} | run(flags, say)
    if flags.json != "-":
        show(figures)
    return figures


def measure_one(flags):
    """A verb and its targets. Raises ERRORS."""
    verb = flags.verb
    document = {verb: measure_verb(verb, flags)}
    if verb != "boot":
        document = {"verb": verb} | document
    if verb in TARGETS:
        document["targets"] = TARGETS[verb](document[verb])
        finish(flags, document)
    environment.write_document(flags.json, "bench", document)
    return 0


def measure_all(flags):
    """Every verb: one that can't be measured here is said, and the others go on."""
    document = {"verb": "all", "not_measured": {}}
    for verb in VERBS:
        say(f"{verb}:")
        try:
            document[verb] = measure_verb(verb, flags)
        except ERRORS as error:
            document["not_measured"][verb] = text_of(error)
            print(f"bench: error: {verb}: {text_of(error)}", file=sys.stderr)
    document["targets"] = []
    for verb, targets in TARGETS.items():
        document["targets"] += targets(document.get(verb))
    finish(flags, document)
    environment.write_document(flags.json, "bench", document)
    return 1 if document["not_measured"] else 0


def finish(flags, document):
    """Print the table of targets."""
    if flags.json != "-":
        shared.show_targets(document["targets"])


# ---------------------------------------------------------------- command line


def streams(text):
    """Numbers of streams, as 1,8,32; for argparse."""
    return [vm.whole(1, 1000)(word) for word in text.split(",")]


def add_engine(add):
    """Flags of what computes."""
    text = "a virtual environment for the peers; it is made if it is not there"
    add("--peers", type=pathlib.Path, metavar="DIR", help=text)
    add("--threads", type=vm.whole(1, 1024), default=1, help="of every engine (1)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of decode")
    add("--shape", choices=tuple(bench_model.SHAPES), default="145m", help="of the model (145m)")
    add("--streams", type=streams, default=[1, 8, 32], help="at once (1,8,32)")
    add("--prompt-tokens", type=vm.whole(1, 4096), default=32, help="(32)")
    add("--tokens", type=vm.whole(2, 4096), default=48, help="of each answer (48)")


def add_huge_pages(add):
    """The flag of all that have an arena."""
    text = "as root: the arena's pages huge while it runs, as in the guest"
    add("--huge-pages", action="store_true", help=text)


def add_unseal(add):
    """Flags of unseal."""
    add("--weights-shape", choices=tuple(bench_model.SHAPES), default="1b", help="unsealed (1b)")


def add_handshake(add):
    """Flags of handshake."""
    text = "opened at once, for how long that takes (200)"
    add("--sessions", type=vm.whole(2, 4000), default=200, help=text)


def add_meter(add):
    """Flags of meter."""
    text = f"the cap, bytes a second ({mp.DEFAULT_RATE})"
    add("--rate", type=vm.whole(64, 1 << 40), default=mp.DEFAULT_RATE, help=text)
    text = "of each form in a round (30)"
    add("--seconds", type=vm.whole(1, bench_meter.LONGEST), default=30, help=text)


def add_peers(add):
    """The flag of meter alone."""
    text = "a virtual environment for the tokenizer; it is made if it is not there"
    add("--peers", type=pathlib.Path, metavar="DIR", help=text)


def add_boot(add):
    """Flags of boot."""
    add("--weights", type=pathlib.Path, default=bench_boot.WEIGHTS, metavar="FILE")


def make_parser():
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    every = (add_engine, add_huge_pages, add_unseal, add_handshake, add_meter, add_boot)
    table = {  # verb: help, flags, rounds
        "unseal": ("sealed weights to tensors", (add_huge_pages, add_unseal), 5),
        "decode": ("tokens a second of the engine alone", (add_engine, add_huge_pages), 5),
        "http": ("tokens a second over HTTP", (add_engine, add_huge_pages), 5),
        "handshake": ("the time to a verified session", (add_handshake,), 5),
        "meter": ("tokens a second over the same cap, in three forms", (add_meter, add_peers), 3),
        "boot": ("image size, time to the handshake, kernel lines", (add_boot,), 3),
        "all": ("each of them", every, 5),
    }
    for name, (text, adders, rounds) in table.items():
        verb = verbs.add_parser(name, help=text)
        verb.set_defaults(run=measure_all if name == "all" else measure_one)
        for adder in adders:
            adder(verb.add_argument)
        verb.add_argument("--rounds", type=vm.whole(1, 1000), default=rounds)
        verb.add_argument("--json", metavar="FILE", help="write all figures there; - prints them")
    return parser


def main(argv=None):
    """The command line. Returns the exit status."""
    flags = make_parser().parse_args(argv)
    try:
        return flags.run(flags)
    except ERRORS as error:
        print(f"bench: error: {text_of(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbench: ended", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
