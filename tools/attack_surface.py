"""Measure what there is to attack: python3 tools/attack_surface.py all NAME=WHAT [NAME=WHAT ...]

    attack     files, programs, rights, services and ports of each target
    loc        lines of code: of Python in each target, of kernels, of our own
    security   the target's bill of materials, vulnerabilities if trivy is there; bandit on our own
    all        all of these
    compare    build the enclave and the baseline (tools/baseline), and measure all of both

A target is a directory, a squashfs, a cpio or tar archive, a kernel with an initramfs built in, a
container's image (an archive, a layout, or a name that an engine or a registry has), HOST:PORT of
what runs, pid:NUMBER for the ports where a process has its network, / for this machine, or a list
of packages: reference.json of an image, Buildroot's manifest.csv or packages-file-list.txt. Several
parts of one target are joined by +, and summed:

    attack_surface.py all ours=build/muenclave.efi+build/extras.squashfs+build/reference.json

--kernel NAME=CONFIG counts a kernel's options; with --kernel-source DIR also the lines they take.
What can't be measured is named with the reason, never estimated. --json writes
    {"tool": "attack_surface", "version": 1, "verb", "labels": {metric: label},
     "targets": [{"name", "parts": [names], "metrics": {metric: measure}}],
     "kernels": [{"name", "metrics"}], "own": {"metrics"}}
where a measure is {"count": N}, with "names" and "how" where they say more, or {"not_measured":
why}. Exit status: 0 if it was measured, 1 if a target can't be read, 2 for wrong flags.
"""

import argparse
import asyncio
import collections
import contextlib
import csv
import html
import importlib.util
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import hardening
import kernel
import loc
import measure
import sbom
import surface
import trees
from environment import ROOT, ToolError
from surface import not_measured

ATTACK = {
    "packages": "packages of the system",
    "distributions": "Python distributions",
    "executables": "ELF executables",
    "libraries": "ELF shared libraries",
    "other_elf": "other ELF files (objects, kernel modules)",
    "scripts": "scripts (#!)",
    "applets": "busybox applets",
    "package_managers": "package managers",
    "shells": "shells",
    "interpreters": "interpreters",
    "setuid": "set-user-ID and set-group-ID files",
    "capabilities": "files with capabilities",
    "world_writable": "files and folders that anyone may write",
    "writable_mounts": "file systems mounted for writing",
    "services": "services started at boot",
    "ports": "listening ports",
    "files": "files",
    "bytes": "bytes of all files",
    "compressed_bytes": "bytes compressed",
    "stored_bytes": "bytes as given",
}
LOC = {
    "modules": "importable Python modules",
    "top_level_modules": "of these at the top level",
    "python_lines": "lines of Python",
    "native_bytes": "bytes of native code beside it",
    "native_lines": "lines of native code beside it",
}
SECURITY = {
    "components": "components in the bill of materials",
    "vulnerabilities": "known vulnerabilities",
}
HARDENING = {
    "options_held": "recommended options held",
    "options_recommended": "options recommended",
    "options_built_in": "options built in",
    "options_as_modules": "options as modules",
}
KERNEL_LOC = {
    "kernel_files": "source files it compiles",
    "kernel_lines": "lines of these",
    "kernel_code_lines": "code lines of these",
    "kernel_compiled_lines": "lines that a build did compile",
    "kernel_tree_lines": "lines of the whole source",
}
OWN_LOC = {name: f"code lines of {name}" for name in loc.PRODUCT}
OWN_LOC |= {"beside the key": "code lines that run beside the key"}
OWN_SECURITY = {
    f"bandit_{level}": f"bandit: findings, {level}" for level in ("high", "medium", "low")
}
TARGETS = {"attack": ATTACK, "loc": LOC, "security": SECURITY}
KERNELS = {"attack": HARDENING, "loc": KERNEL_LOC, "security": {}}
OWN = {"attack": {}, "loc": OWN_LOC, "security": OWN_SECURITY}
ADDRESS = r"(?P<host>[\w.-]+|\[[\da-fA-F:.]+\]):(?P<port>\d{1,5})"
PROCESS = r"pid:\d+"
NEIGHBOURS = 50  # ports below and above the one named, unless --ports names them
AT_ONCE, PATIENCE = 256, 1.0  # connections; seconds until a port counts as one that drops
LISTS = (".json", ".csv", "packages-file-list.txt")
LIST_KINDS = {"debian": "dpkg", "wheels": "pypi", "extras": "pypi"}  # of reference.json
BASELINE = ROOT / "tools" / "baseline" / "rootfs.py"
UNMEASURED = {
    "ports": "only what runs has ports: add HOST:PORT or pid:NUMBER to the target",
    "writable_mounts": "only / shows what is mounted",
    "native_lines": "no source of it is here",
}
NO_SCAN = "trivy is not installed: install it, or give the bill of --sbom DIR to any scanner"
STYLE = """body{font:15px/1.4 sans-serif;margin:1em auto;max-width:60em;padding:0 1em}
div{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{text-align:right;padding:.2em .6em;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}small{color:#555}"""

Target = collections.namedtuple("Target", "name parts")


def say(text):
    """Progress."""
    print(f"attack_surface: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- targets


def parse_target(text):
    """A target of the command line: NAME=WHAT or WHAT, parts joined by +."""
    name, found, what = text.partition("=")
    if not found or os.path.lexists(text) or not re.fullmatch(r"[\w .-]+", name):
        name, what = "", text
    parts = [what] if os.path.lexists(what) else what.split("+")
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text}: a part of it is empty")
    return Target(name or short(parts[0]), parts)


def parse_kernel(text):
    """A kernel of the command line, NAME=PATH: a name and a path."""
    name, found, path = text.partition("=")
    if not (name and found and path):
        raise argparse.ArgumentTypeError(f"{text}: NAME=CONFIG is wanted")
    return name, pathlib.Path(path)


def parse_ports(text):
    """FIRST-LAST or PORT: a range of ports."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last <= 65535:
        raise argparse.ArgumentTypeError(f"{text}: FIRST-LAST of 1 to 65535 is wanted")
    return range(first, last + 1)


def short(what):
    """A part's name without its folders."""
    return what.rstrip("/").rpartition("/")[2] or what


def address(part):
    """(host, port) if a part is one, and no file; else None."""
    found = re.fullmatch(ADDRESS, part)
    if found is None or os.path.lexists(part):
        return None
    return found["host"].strip("[]"), int(found["port"])


def measure_target(target, ports):
    """({metric: measure}, packages and distributions) of a target; ports: to scan. ToolError."""
    parts, found = [], set()
    for part in target.parts:
        say(f"{target.name}: {short(part)}")
        facts, packages = measure_part(part, ports)
        parts.append(facts)
        found.update(packages)
    total = {}
    for metric in (*ATTACK, *LOC):
        known = [facts[metric] for facts in parts if metric in facts]
        why = UNMEASURED.get(metric, "no files of it were given")
        total[metric] = surface.add(known) if known else not_measured(why)
    for metric, is_python in (("packages", False), ("distributions", True)):
        named = [one for one in found if (one.kind == "pypi") == is_python]
        if named:  # with what lists name, and what several parts have once
            total[metric] = surface.measured({f"{one.name} {one.version}".strip() for one in named})
    total["components"] = not_measured("no packages are named in it")
    if found:
        total["components"] = {"count": len(found)}
    return total, found


def measure_part(part, ports):
    """({metric: measure}, packages and distributions) of a part of a target. ToolError."""
    if re.fullmatch(PROCESS, part):
        return {"ports": surface.listening_ports(part.partition(":")[2])}, []
    if address(part):
        return {"ports": scan(*address(part), ports)}, []
    if part.endswith(LISTS) and os.path.isfile(part):
        return {}, read_list(part)
    with contextlib.ExitStack() as stack:
        facts, packages = surface.survey(trees.read_tree(part, stack))
    facts["stored_bytes"] = not_measured("it is no file")
    if os.path.isfile(part):
        facts["stored_bytes"] = {"count": os.path.getsize(part)}
    if os.path.isdir(part) and os.path.samefile(part, "/"):
        facts |= {"ports": surface.listening_ports()}
        facts["writable_mounts"] = surface.own_writable_mounts()
    return facts, packages


def read_list(path):
    """The packages that a list names: reference.json, or one of Buildroot's. ToolError."""
    try:
        text = pathlib.Path(path).read_text("utf-8")
        if path.endswith(".json"):
            kinds = json.loads(text)["image"]["packages"]
            rows = [
                (LIST_KINDS[kind], name, version, "", "debian" if kind == "debian" else "")
                for kind, names in kinds.items()
                for name, version in names.items()
            ]
        elif path.endswith(".csv"):
            table = csv.DictReader(text.splitlines())
            rows = [("buildroot", row["PACKAGE"], row["VERSION"], "", "") for row in table]
        else:
            names = {row.partition(",")[0] for row in text.splitlines() if row.strip()}
            rows = [("buildroot", name, "", "", "") for name in sorted(names)]
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError):
        wanted = "reference.json of an image, manifest.csv or packages-file-list.txt of Buildroot"
        raise ToolError(f"{path} is no list of packages: {wanted} is") from None
    return [surface.package(*row) for row in rows]


# ---------------------------------------------------------------- ports


def scan(host, port, ports=None):
    """The TCP ports of a host that accept a connection: a measure. ToolError if this one does not.

    ports: those to try, by default the one named and its neighbours.
    """
    if not 1 <= port <= 65535:
        raise ToolError(f"{host}:{port}: there is no such port")
    wanted = ports or range(max(1, port - NEIGHBOURS), min(65535, port + NEIGHBOURS) + 1)
    try:
        place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise ToolError(f"{host}:{port}: {error.strerror}") from None
    found = asyncio.run(try_ports(place, {*wanted, port}))
    if not found[port]:
        raise ToolError(f"nothing listens at {host}:{port}: start it, or leave it out")
    tried = f"TCP connections from here to ports {wanted[0]} to {wanted[-1]}"
    return surface.measured((f"tcp/{number}" for number in wanted if found[number]), how=tried)


async def try_ports(place, ports):
    """{port: whether it accepts a connection}."""
    turns, found = asyncio.Semaphore(AT_ONCE), {}

    async def try_one(port):
        async with turns:
            try:
                connecting = asyncio.open_connection(place, port)
                _, writer = await asyncio.wait_for(connecting, PATIENCE)
            except (OSError, asyncio.TimeoutError):
                found[port] = False
            else:
                found[port] = True
                writer.transport.abort()

    await asyncio.gather(*map(try_one, sorted(ports)))
    return found


# ---------------------------------------------------------------- security


def vulnerabilities(target, bill):
    """What trivy finds in a target, or in its bill of materials: a measure."""
    if not shutil.which("trivy"):
        return not_measured(NO_SCAN)
    command = ["trivy", "sbom", str(bill)]
    (part, *more) = target.parts
    if not more and os.path.isdir(part):
        command = ["trivy", "rootfs", part]
    elif not more and trees.is_image(part):
        command = ["trivy", "image", "--input", part]
    flags = ("--quiet", "--format", "json")
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    try:
        rows = [
            row
            for result in json.loads(done.stdout)["Results"]
            for row in result.get("Vulnerabilities", ())
        ]
    except (ValueError, KeyError, TypeError):
        said = done.stderr.strip().splitlines() or ["no result"]
        return not_measured(f"trivy: {said[-1]}")
    found = {(row["VulnerabilityID"], row["PkgName"]): row["Severity"].lower() for row in rows}
    levels = collections.Counter(found.values())
    how = f"trivy {command[1]}: " + ", ".join(f"{n} {level}" for level, n in levels.items())
    return {"count": len(found), "how": how}


def write_bill(name, found, folder):
    """Write a target's bill of materials; its path."""
    path = folder / (re.sub(r"[^\w.-]", "_", name) + ".cdx.json")
    measure.write(path, sbom.document(name, found))
    return path


def bandit():
    """{metric: measure}: what bandit says of our own Python."""
    if importlib.util.find_spec("bandit") is None:
        why = "bandit is not installed: pip install bandit"
        return dict.fromkeys(OWN_SECURITY, not_measured(why))
    files = [*(ROOT / name for name in loc.PRODUCT), *sorted((ROOT / "tools").rglob("*.py"))]
    command = [sys.executable, "-m", "bandit", "--quiet", "--format", "json", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)["results"]
    except (ValueError, KeyError):
        return dict.fromkeys(OWN_SECURITY, not_measured("bandit failed"))
    levels = collections.Counter(f"bandit_{row['issue_severity'].lower()}" for row in found)
    how = "bandit on the product's modules and tools/"
    return {metric: {"count": levels[metric], "how": how} for metric in OWN_SECURITY}


# ---------------------------------------------------------------- kernels


def measure_kernel(path, source, wants_lines):
    """{metric: measure} of a kernel: its .config, or the folder of a build. ToolError."""
    is_build = path.is_dir()
    text = (path / ".config" if is_build else path).read_text("utf-8", "replace")
    options = kernel.read_options(text)
    if len(options) < 100:
        raise ToolError(f"{path} is no resolved kernel configuration")
    rules, values = hardening.read_record()["options"], list(options.values())
    facts = {
        "options_held": {"count": sum(hardening.is_held(rule, options) for rule in rules)},
        "options_recommended": {"count": len(rules), "how": "tools/hardening.json"},
        "options_built_in": {"count": values.count("y")},
        "options_as_modules": {"count": values.count("m")},
    }
    if wants_lines:
        facts |= dict.fromkeys(
            KERNEL_LOC, not_measured("its source was not given: --kernel-source")
        )
        facts["kernel_compiled_lines"] = not_measured("it was not built here")
        if source is not None:
            facts |= loc.kernel_lines(source, text)
        if source is not None and is_build:
            lines = kernel.compiled_lines(source, path)
            facts["kernel_compiled_lines"] = {"count": lines["lines"], "how": lines["counted"]}
    return facts


# ---------------------------------------------------------------- what is printed


def sections(document):
    """The tables of a document: (title, {metric: label}, [(column, {metric: measure})])."""
    own = [("our own", document["own"]["metrics"])]
    kinds = {"target": document["targets"], "kernel": document["kernels"]}
    for title, rows in kinds.items():
        columns = [(one["name"], one["metrics"]) for one in rows]
        if columns:
            yield title, labels_of(document, columns), columns
    if own[0][1]:
        yield "code", labels_of(document, own), own


def labels_of(document, columns):
    """{metric: label} of the metrics that columns have, in the document's order."""
    known = {metric for _, metrics in columns for metric in metrics}
    return {metric: label for metric, label in document["labels"].items() if metric in known}


def ratio(columns, metric):
    """How many times the last column's count is the first's; empty unless both were measured."""
    first, last = (columns[at][1].get(metric, {}).get("count") for at in (0, -1))
    if not first or last is None:
        return ""
    return f"{last / first:,.1f}" if last >= first else f"{last / first:.2g}"


def cells(title, labels, columns):
    """The rows of a table, the heading first, as lists of text."""
    has_ratio = len(columns) > 1
    rows = [[title, *(plain(name) for name, _ in columns)] + ["last : first"] * has_ratio]
    for metric, label in labels.items():
        counts = (metrics.get(metric, {}).get("count") for _, metrics in columns)
        row = [label, *("not measured" if count is None else f"{count:,}" for count in counts)]
        rows.append(row + [ratio(columns, metric)] * has_ratio)
    return rows


def remarks(labels, columns, with_names):
    """Lines under a table: what was not measured and why, how a count is meant, names."""
    seen = {}
    for metric, label in labels.items():
        for name, metrics in columns:
            one = metrics.get(metric, {})
            if "not_measured" in one:
                line = f"not measured: {one['not_measured']}"
                seen.setdefault(line, {}).setdefault(label, []).append(plain(name))
            elif "how" in one:
                seen.setdefault(one["how"], {}).setdefault(label, []).append(plain(name))
            if with_names and one.get("names"):
                listed = " ".join(map(plain, one["names"]))
                seen.setdefault(listed, {}).setdefault(label, []).append(plain(name))
    for line, places in seen.items():
        where = "; ".join(f"{label} ({', '.join(names)})" for label, names in places.items())
        yield f"{where}: {line}"


def plain(text):
    """A name as it may be printed: file systems hold any bytes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def show(document, with_names):
    """Print the tables."""
    for title, labels, columns in sections(document):
        rows = cells(title, labels, columns)
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        for row in rows:
            numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))
            print("  ".join([row[0].ljust(widths[0]), *numbers]).rstrip())
        for line in remarks(labels, columns, with_names):
            print(f"  {line}")
        print()


def page(document):
    """The tables as one HTML page that needs nothing else."""
    parts = ['<!doctype html><html lang="en"><meta charset="utf-8"><title>Attack surface</title>']
    parts.append('<meta name="viewport" content="width=device-width">')
    parts.append(f"<style>{STYLE}</style><h1>Attack surface</h1>")
    for title, labels, columns in sections(document):
        head, *rows = cells(title, labels, columns)
        parts.append("<div><table><tr>" + "".join(f"<th>{html.escape(cell)}" for cell in head))
        parts += ["<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows]
        parts.append("</table></div>")
        lines = map(html.escape, remarks(labels, columns, False))
        parts.append("<p><small>" + "<br>".join(lines) + "</small></p>")
    return "\n".join(parts) + "\n"


# ---------------------------------------------------------------- the comparison


def build_both(flags, stack):
    """Build enclave and baseline; (targets, kernels, kernel source) to measure. ToolError."""
    import bench_boot
    import image

    if not BASELINE.exists():
        raise ToolError(f"there is no {BASELINE.relative_to(ROOT)} to compare with")
    image.prepare()
    lock = image.read_lock()
    output = trees.temporary(stack)
    built = image.build_image("tcp", None, image.build_extras(lock), output, lock)
    say("building the baseline")
    baseline = flags.baseline or ROOT / "build" / "baseline"
    command = [sys.executable, str(BASELINE), "--output", str(baseline)]
    if subprocess.run(command, stdout=sys.stderr, stdin=subprocess.DEVNULL).returncode:
        raise ToolError("the baseline was not built: it says above why")
    names = ("muenclave.efi", "extras.squashfs", "reference.json")
    ours = Target("enclave", [str(built / name) for name in names])
    (config,) = bench_boot.debian_kernel(lock).glob("boot/config-*")
    kernels = [("enclave", image.build_kernel("tcp", lock)), ("Debian cloud", config)]
    return [ours, Target("baseline", [str(baseline / "root")])], kernels, image.kernel_source(lock)


# ---------------------------------------------------------------- command line


def run(flags, stack):
    """Measure what the flags name; the document. ToolError."""
    targets, kernels, source, verb = flags.targets, flags.kernel, flags.kernel_source, flags.verb
    if verb == "compare":
        targets, kernels, source = build_both(flags, stack)
    verbs = list(TARGETS) if verb in ("all", "compare") else [verb]
    labels = {}
    for group in (TARGETS, KERNELS, OWN):
        for one in verbs:
            labels |= group[one]
    bills = flags.sbom or trees.temporary(stack)
    bills.mkdir(parents=True, exist_ok=True)
    rows = []
    for target in targets:
        facts, found = measure_target(target, flags.ports)
        bill = write_bill(target.name, found, bills)
        if "security" in verbs:
            facts["vulnerabilities"] = vulnerabilities(target, bill)
        kept = {metric: one for metric, one in facts.items() if metric in labels}
        rows.append({"name": target.name, "parts": list(map(short, target.parts)), "metrics": kept})
    measured_kernels = []
    for name, path in kernels:
        say(f"kernel {name}")
        facts = measure_kernel(path, source, "loc" in verbs)
        kept = {metric: one for metric, one in facts.items() if metric in labels}
        measured_kernels.append({"name": name, "metrics": kept})
    own = (loc.own_lines() if "loc" in verbs else {}) | (bandit() if "security" in verbs else {})
    document = {"tool": "attack_surface", "version": 1, "verb": verb, "labels": labels}
    return document | {"targets": rows, "kernels": measured_kernels, "own": {"metrics": own}}


def arguments(argv):
    """The flags of the command line."""
    first, _, rest = __doc__.partition("\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "attack_surface.py", formatter_class=layout, description=first, epilog=rest
    )
    parser.add_argument("verb", choices=(*TARGETS, "all", "compare"))
    parser.add_argument("targets", nargs="*", type=parse_target, metavar="NAME=WHAT")
    parser.add_argument(
        "--kernel", action="append", default=[], type=parse_kernel, metavar="NAME=CONFIG"
    )
    parser.add_argument("--kernel-source", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--ports", type=parse_ports, metavar="FIRST-LAST", help="to scan")
    parser.add_argument("--names", action="store_true", help="print what was found, too")
    parser.add_argument("--json", metavar="FILE", help="write all that was measured; - to print it")
    parser.add_argument(
        "--html", type=pathlib.Path, metavar="FILE", help="write the tables as a page"
    )
    parser.add_argument(
        "--sbom", type=pathlib.Path, metavar="DIR", help="write a CycloneDX bill of each"
    )
    parser.add_argument(
        "--baseline", type=pathlib.Path, metavar="DIR", help="compare: where it is built"
    )
    flags = parser.parse_args(argv)
    names = collections.Counter(target.name for target in flags.targets)
    if flags.verb == "attack" and not flags.targets and not flags.kernel:
        parser.error("name a target, or a kernel by --kernel")
    if flags.verb == "compare" and (flags.targets or flags.kernel):
        parser.error("compare takes no targets: it builds them")
    if any(count > 1 for count in names.values()):
        parser.error(f"two targets are called {names.most_common(1)[0][0]}: name them NAME=WHAT")
    return flags


def main(argv=None):
    """The command line. Returns the exit status."""
    flags = arguments(argv)
    try:
        with contextlib.ExitStack() as stack:
            document = run(flags, stack)
        text = json.dumps(document, indent=1) + "\n"
        if flags.json and flags.json != "-":
            measure.write(pathlib.Path(flags.json), text)
        if flags.html:
            measure.write(flags.html, page(document))
        if flags.json == "-":
            print(text, end="")
        else:
            show(document, flags.names)
    except (ToolError, measure.MeasureError) as error:
        print(f"attack_surface: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"attack_surface: error: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nattack_surface: ended", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
