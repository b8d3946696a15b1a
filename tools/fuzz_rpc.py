"""Fuzz the enclave's protocol: python3 tools/fuzz_rpc.py --in-process --seconds 60

It knows the handshake, so it fuzzes before, during and after it: frames, JSON, tokens, requests,
commands, records, sequences. What it says and what comes back is judged by an oracle of its own
(fuzz_oracle.py): what the protocol has to refuse must be refused, with its code; what it allows
must be taken; every reply must be one of the protocol's, in cells, with canonical ids.

    --in-process       the product's Gate and Session in this process, and its parsers one by one,
                       the proxy's among them; init, loader and engine are doubles
    --target ADDRESS   an enclave at HOST:PORT; what it has proved with: --reference, --psk (a
                       user's), --owner-psk, --token-file, --key
    --replay FILE      a case that was saved, against one of these
    --atheris          the parsers, guided by coverage (pip install atheris)

Without --case all named cases come first, then random ones until there were --count messages, or
--seconds have passed; --random leaves the named ones out. The same seed gives the same cases. A
case that fails is made smaller, shown, and with --save written to a file. An enclave whose meter
leaves strangers some room (--rate of tools/enclave.py) is fuzzed faster; one that others use should
not be fuzzed, since it has places for so many only.

--json FILE ("-": standard output) writes {"tool": "fuzz_rpc", "version": 1, "mode", "target",
"seed", "messages": all, "by_kind": {kind of message: number}, "replies", "seconds",
"messages_per_second", "cases": {name: episodes}, "memory": {"first", "last", "bound"} in bytes of
the resident set or null, with --atheris "coverage" (places in the code), "findings": [{"verdict",
"text", "case", "actions", "file"}]}. A verdict is crash, hang, growth, reply (one that is not in
the protocol), accepted (what has to be refused) or refused (what has to be taken, or with another
code).

Exit status: 0 nothing found; 1 something found; 2 it could not run; 130 interrupted.
"""

import argparse
import contextlib
import importlib.util
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time
import types

import fuzz_cases as cases
import fuzz_gate as gate
import fuzz_oracle as oracle
import fuzz_targets as targets
import owner
from environment import ToolError
from fuzz_targets import Finding

import muprotocol as mp
import muproxy

SEED = 1
COUNT = 20_000  # messages, if neither --count nor --seconds is given
PARSERS = 6  # whose turn comes between two sessions
CHECK_EVERY = 300  # random episodes between two looks at whether good clients are served
GROWTH = 48 << 20  # bytes by which the resident memory may grow once the first cases are done
SHRINK_RUNS, SHRINK_SECONDS = 400, 60  # at most, to make a case smaller
VERSION = 1


def say(text):
    """Progress, and what was found."""
    print(f"fuzz: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- making a case smaller


def shrink(actions, fails, seconds=SHRINK_SECONDS, runs=SHRINK_RUNS):
    """The least actions found for which fails(actions) still holds: fewer, then with less data.

    By delta debugging (Zeller, Hildebrandt 2002), over the actions and then over each one's bytes.
    """
    until, left = time.monotonic() + seconds, [runs]

    def is_over():
        return left[0] <= 0 or time.monotonic() >= until

    def still(tried):
        left[0] -= 1
        return fails(tried)

    actions = minimum(actions, still, is_over)
    for at, action in enumerate(actions):
        if "data" in action and not is_over():
            data = [*gate.data_of(action)]
            data = minimum(data, lambda b, n=at, all=actions: still(with_data(all, n, b)), is_over)
            actions = with_data(actions, at, data)
    return actions


def with_data(actions, at, data):
    """Actions, one of them with other data: a list of bytes."""
    changed = actions[at] | {"data": gate.as_data(bytes(data))}
    return [*actions[:at], changed, *actions[at + 1 :]]


def minimum(items, fails, is_over=lambda: False):
    """A list with parts left out such that fails() holds, and that no single one more can be."""
    parts = 2
    while len(items) > 1 and parts < 2 * len(items):
        size = -(-len(items) // parts)
        for at in range(0, len(items), size):
            if is_over():
                return items
            fewer = items[:at] + items[at + size :]
            if fails(fewer):
                items, parts = fewer, max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts *= 2
    return items


# ---------------------------------------------------------------- a run


def in_turn(names):
    """The streams in the order of a round: between a few parsers comes the gate again."""
    for number, name in enumerate(names):
        if "sessions" in names and number % PARSERS == 0:
            yield "sessions"
        if name != "sessions":
            yield name


class Run:
    """One run of the fuzzer against a stand. findings: [(Finding, name of the case, actions)]."""

    def __init__(self, stand, flags):
        self.stand, self.flags = stand, flags
        self.player = gate.Player(stand)
        self.findings, self.cases = [], {}
        self.memory = {"first": None, "last": None, "bound": GROWTH}
        self.began = time.monotonic()

    def messages(self):
        """Messages sent so far."""
        return sum(self.player.counts.values())

    def is_done(self):
        """Whether it has found enough, or has gone on for long enough."""
        flags, count = self.flags, self.flags.count
        if len(self.findings) >= flags.findings:
            return True
        if flags.seconds is not None and time.monotonic() - self.began >= flags.seconds:
            return True
        if count is None and flags.seconds is None:
            count = COUNT
        return count is not None and self.messages() >= count

    def play(self, name, episode):
        """Play an episode of a case, and keep what is found."""
        self.cases[name] = self.cases.get(name, 0) + 1
        if found := self.player.play(episode):
            self.keep(found, name, episode)

    def keep(self, found, name, episode):
        """Make a case that failed smaller, tell it, and save it."""
        say(f"{found.verdict} in {name}: {found.text}")
        counts, self.player.counts = self.player.counts, {}
        seconds, verdict = self.flags.shrink, found.verdict
        smaller = shrink(episode, lambda actions: self.fails(actions, verdict), seconds)
        if seconds:
            found = self.again(smaller) or found
        self.player.counts = counts
        self.findings.append((found, name, smaller))

    def again(self, actions):
        """The Finding of actions played on a stand of their own."""
        if not self.stand.is_live and actions and actions[0]["do"] != "parse":
            self.stand.stop()
        return self.player.play(actions)

    def fails(self, actions, verdict):
        """Whether actions still lead to this verdict."""
        found = self.again(actions)
        return found is not None and found.verdict == verdict

    def look(self):
        """Whether good clients are served, and whether memory has grown."""
        if found := self.player.is_served():
            self.findings.append((found, "good clients", []))
        pid = self.stand.pid if self.stand.is_live else "self"
        now = gate.memory(pid) if pid else None
        self.memory["last"] = now
        first = self.memory["first"]
        if now and first and now - first > GROWTH:
            found = Finding("growth", f"{(now - first) >> 20} MiB of resident memory")
            self.findings.append((found, "memory", []))

    def named(self, names):
        """All episodes of named cases."""
        for name in names:
            chance = random.Random(f"{self.flags.seed} {name}")
            for episode in cases.CASES[name](chance):
                self.play(name, episode)
                if len(self.findings) >= self.flags.findings:
                    return
            self.look()
            self.memory["first"] = self.memory["last"]

    def streams(self, names):
        """Random cases in turn, until it is done."""
        made = {n: cases.STREAMS[n](random.Random(f"{self.flags.seed} {n}")) for n in names}
        number = 0
        while made and not self.is_done():
            for name in in_turn(names):
                if self.is_done():
                    break
                self.play(name, next(made[name]))
                number += 1
                if number % CHECK_EVERY == 0:
                    self.look()
                    self.memory["first"] = self.memory["first"] or self.memory["last"]

    def report(self, mode, target):
        """The document of --json."""
        seconds = time.monotonic() - self.began
        number = self.messages()
        return {
            "tool": "fuzz_rpc",
            "version": VERSION,
            "mode": mode,
            "target": target,
            "seed": self.flags.seed,
            "messages": number,
            "by_kind": dict(sorted(self.player.counts.items())),
            "replies": self.player.replies,
            "seconds": round(seconds, 2),
            "messages_per_second": round(number / seconds, 1),
            "cases": self.cases,
            "memory": self.memory,
            "findings": [
                saved(self.flags, number, told) for number, told in enumerate(self.told())
            ],
        }

    def told(self):
        """The findings, as dicts."""
        for found, name, actions in self.findings:
            told = {"verdict": found.verdict, "text": found.text}
            yield told | {"case": name.replace(" ", "-"), "actions": actions}


def saved(flags, number, told):
    """A finding as the report has it, with the file that it was written to if that is wanted."""
    path = None
    if flags.save:
        path = flags.save / f"{told['verdict']}-{told['case']}-{flags.seed}-{number}.json"
        text = json.dumps({"tool": "fuzz_rpc", "version": VERSION} | told, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
    return told | {"file": path and str(path)}


# ---------------------------------------------------------------- coverage-guided


def run_atheris(flags):
    """The document of the parsers under libFuzzer, in a process of its own. Raises ToolError."""
    if importlib.util.find_spec("atheris") is None:
        raise ToolError("--atheris needs the package: pip install atheris")
    with tempfile.TemporaryDirectory(prefix="muenclave-") as folder:
        limits = [f"-runs={flags.count or COUNT}"] if flags.seconds is None else []
        limits += [f"-max_total_time={int(flags.seconds)}"] if flags.seconds is not None else []
        limits += [f"-seed={flags.seed}", f"-artifact_prefix={folder}/", "-max_len=4096"]
        command = [sys.executable, "-B", __file__, "--atheris-child", folder, *limits]
        names = [name.removeprefix("parser-") for name in flags.case or () if name in cases.STREAMS]
        began = time.monotonic()
        process = subprocess.run([*command, *names], capture_output=True, errors="replace")
        seconds = time.monotonic() - began
        told = pathlib.Path(folder, "finding.json")
        counts = json.loads(pathlib.Path(folder, "counts.json").read_text())
        findings = [json.loads(told.read_text())] if told.exists() else []
        findings = [saved(flags, number, told) for number, told in enumerate(findings)]
    if process.returncode and not findings:
        last = (process.stderr.strip().splitlines() or ["no output"])[-1]
        raise ToolError(f"atheris has ended with status {process.returncode}: {last}")
    coverage = [line for line in process.stderr.splitlines() if " cov: " in line]
    number = sum(counts.values())
    return {
        "tool": "fuzz_rpc",
        "version": VERSION,
        "mode": "atheris",
        "target": "in-process",
        "seed": flags.seed,
        "messages": number,
        "by_kind": counts,
        "replies": 0,
        "seconds": round(seconds, 2),
        "messages_per_second": round(number / seconds, 1),
        "cases": {},
        "memory": {"first": None, "last": None, "bound": None},
        "coverage": int(coverage[-1].split(" cov: ")[1].split()[0]) if coverage else None,
        "findings": findings,
    }


def functions(*modules):
    """The functions and methods that modules define."""
    for module in modules:
        ours = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]
        held = [value for kind in ours if isinstance(kind, type) for value in vars(kind).values()]
        yield from (value for value in [*ours, *held] if isinstance(value, types.FunctionType))


def atheris_child(folder, *arguments):
    """What runs under libFuzzer; its counts and its finding are left in the folder."""
    import atheris

    names = [name for name in arguments if name in targets.TARGETS] or list(targets.TARGETS)
    options = [name for name in arguments if name not in targets.TARGETS]
    limits = [int(word.partition("=")[2]) for word in options if word.startswith("-runs=")]
    limit = limits[0] if limits else 0
    folder, counts, chance = pathlib.Path(folder), dict.fromkeys(names, 0), random.Random(SEED)
    seeds = folder / "seeds"
    seeds.mkdir()
    for number in range(50 * len(names)):
        which = number % len(names)
        data = bytes([which]) + targets.TARGETS[names[which]].make(chance)
        (seeds / str(number)).write_bytes(data)

    def test(data):
        name = names[(data[0] if data else 0) % len(names)]
        counts[name] += 1
        if (number := sum(counts.values())) % 1000 == 0 or number == limit:
            (folder / "counts.json").write_text(json.dumps(counts))
        if found := targets.TARGETS[name].check(data[1:]):
            action = {"do": "parse", "target": name, "data": gate.as_data(data[1:])}
            told = {"verdict": found.verdict, "text": found.text, "case": f"parser-{name}"}
            told |= {"actions": [action]}
            (folder / "counts.json").write_text(json.dumps(counts))
            (folder / "finding.json").write_text(json.dumps(told))
            raise AssertionError(found.text)

    (folder / "counts.json").write_text(json.dumps(counts))
    for function in functions(mp, muproxy, targets.eventlog, targets.me):
        atheris.instrument_func(function)
    atheris.Setup([sys.argv[0], *options, str(seeds)], test)
    atheris.Fuzz()


# ---------------------------------------------------------------- command line


def make_stand(flags):
    """What is fuzzed. Raises ToolError, muproxy.Failure."""
    if flags.in_process:
        return gate.Local()
    host, port = flags.target
    psk = {
        role: secret for role, secret in (("user", flags.psk), ("owner", flags.owner_psk)) if secret
    }
    key = owner.read_key_file(flags.key, lambda: "")[1] if flags.key else None
    table = flags.vocabulary.table if flags.vocabulary else None
    return gate.Live((host, port), psk, flags.token_file, key, table, flags.pid)


def begin(stand, flags):
    """Find the enclave there. Raises ToolError."""
    try:
        if flags.reference:
            secret = flags.psk if flags.reference["kind"] == "psk" else None
            muproxy.Session(stand.address, flags.reference, secret).close()
        stand.start()
    except (OSError, gate.Lost, oracle.Refused) as error:
        raise ToolError(f"the enclave does not answer as one: {error}") from None
    except mp.ProtocolError as error:
        raise ToolError(
            f"the enclave is not that of --reference: {muproxy.text_of(error)}"
        ) from None


def run(flags):
    """The document of a run. Raises ToolError, muproxy.Failure."""
    if flags.atheris:
        return run_atheris(flags)
    stand = make_stand(flags)
    stand.patience = flags.patience or stand.patience
    with contextlib.closing(stand):
        if stand.is_live:
            begin(stand, flags)
        work = Run(stand, flags)
        mode = "in-process" if flags.in_process else "live"
        try:
            if flags.replay:
                mode = "replay"
                for path in flags.replay:
                    replay(work, path)
            else:
                known = [name for name in cases.STREAMS if not stand.is_live or name == "sessions"]
                named = () if flags.random else cases.CASES
                work.named([name for name in flags.case or named if name in cases.CASES])
                work.streams([name for name in flags.case or known if name in known])
                if len(work.findings) < flags.findings:
                    work.look()
        except KeyboardInterrupt:
            flags.was_interrupted = True
        where = "in-process" if flags.in_process else "{}:{}".format(*flags.target)
        return work.report(mode, where)


def replay(work, path):
    """Play a saved case once, on an enclave of its own if that can be had. Raises ToolError."""
    actions = read_case(path)["actions"]
    work.cases[path.stem] = 1
    if found := work.again(actions):
        work.findings.append((found, path.stem, actions))


def read_case(path):
    """A saved case. Raises ToolError."""
    try:
        saved = json.loads(path.read_text("utf-8"))
        for action in saved["actions"]:
            gate.data_of(action)
            if action["do"] == "parse" and action["target"] not in targets.TARGETS:
                raise ValueError(f"no such parser: {action['target']}")
        return saved
    except OSError as error:
        raise ToolError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ToolError(f"{path}: not a saved case: {error}") from None


def show(report):
    """Print a report for people."""
    number, seconds = report["messages"], report["seconds"]
    print(
        f"{report['mode']}, {report['target']}, seed {report['seed']}: {number:,} messages ", end=""
    )
    print(f"in {seconds:.1f} s ({report['messages_per_second']:,.0f} a second), ", end="")
    print(f"{report['replies']:,} replies, {sum(report['cases'].values()):,} episodes")
    for finding in report["findings"]:
        print(f"{finding['verdict']} ({finding['case']}): {finding['text']}")
        for action in finding["actions"][:20]:
            print(f"    {json.dumps(action)[:160]}")
    print("nothing found" if not report["findings"] else f"{len(report['findings'])} found")


def show_list():
    """Print the cases."""
    for name, function in [*cases.CASES.items(), *cases.STREAMS.items()]:
        print(f"{name:28} {' '.join(function.__doc__.split())}")


def whole(text):
    """A number of at least 1, for argparse."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def make_parser():
    """The command line."""
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="fuzz_rpc", description=about, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--in-process", action="store_true", help="the gate and parsers, here")
    what.add_argument("--target", type=muproxy.address_of, metavar="HOST:PORT", help="an enclave")
    what.add_argument("--atheris", action="store_true", help="the parsers, guided by coverage")
    what.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this; repeatable")
    parser.add_argument("--random", action="store_true", help="only random cases, no named ones")
    parser.add_argument(
        "--replay", type=pathlib.Path, nargs="+", metavar="FILE", help="saved cases"
    )
    parser.add_argument("--seed", type=int, default=SEED, help=f"({SEED})")
    parser.add_argument("--count", type=whole, help=f"messages ({COUNT:,} without --seconds)")
    parser.add_argument("--seconds", type=float)
    parser.add_argument(
        "--patience", type=float, help="seconds that an answer, or an end, may take"
    )
    parser.add_argument("--shrink", type=float, default=SHRINK_SECONDS, metavar="SECONDS")
    parser.add_argument("--findings", type=whole, default=1, help="end after so many (1)")
    parser.add_argument("--save", type=pathlib.Path, metavar="DIR", help="where cases go that fail")
    parser.add_argument("--json", metavar="FILE", help="write the report; - for standard output")
    parser.add_argument("--reference", type=muproxy.read_reference, metavar="FILE")
    parser.add_argument("--psk", type=muproxy.read_secret, metavar="FILE", help="a user's secret")
    parser.add_argument("--owner-psk", type=muproxy.read_secret, metavar="FILE")
    parser.add_argument("--token-file", type=muproxy.read_token, metavar="FILE")
    parser.add_argument("--key", metavar="FILE", help="the weights key, for the owner's cases")
    parser.add_argument("--vocabulary", type=muproxy.read_vocabulary, metavar="FILE")
    parser.add_argument("--pid", type=int, help="of the enclave's gate, to watch its memory")
    return parser


def main(argv=None):
    """The command line. Returns the exit status."""
    try:
        flags = make_parser().parse_args(argv)
        flags.was_interrupted = False
        if flags.list:
            show_list()
            return 0
        for name in flags.case or ():
            if name not in cases.CASES and name not in cases.STREAMS:
                raise ToolError(f"no such case: {name}; --list names them")
        if (
            flags.json not in (None, "-")
            and not pathlib.Path(flags.json).absolute().parent.is_dir()
        ):
            raise ToolError(f"--json: there is no folder for {flags.json}")
        if flags.save:
            flags.save.mkdir(parents=True, exist_ok=True)
        report = run(flags)
        text = json.dumps(report, indent=1, sort_keys=False)
        if flags.json not in (None, "-"):
            pathlib.Path(flags.json).write_text(text + "\n", encoding="utf-8")
        print(text) if flags.json == "-" else show(report)
    except (ToolError, muproxy.Failure) as error:
        print(f"fuzz_rpc: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fuzz_rpc: error: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfuzz_rpc: interrupted", file=sys.stderr)
        return 130
    return 130 if flags.was_interrupted else int(bool(report["findings"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--atheris-child"]:
        atheris_child(*sys.argv[2:])
    sys.exit(main())
