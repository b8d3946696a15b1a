"""What there is to attack in a tree of files, counted: every file once, however many links it has.

Each counter takes a tree (tools/trees.py) and gives a measure: {"count": N}, with "names" where a
reader would ask which, and "how" where that is a choice; or {"not_measured": why}. Used by
tools/attack_surface.py.
"""

import collections
import hashlib
import pathlib
import posixpath
import re
import shutil
import struct
import subprocess

import trees
from environment import ToolError
from trees import FILE, FOLDER, LINK

# What these names call: machine code wherever it lies, scripts in PROGRAM_FOLDER; a link counts as
# what it leads to.
PACKAGE_MANAGERS = r"""apt|apt-get|aptitude|dpkg|opkg|apk|rpm|dnf|microdnf|yum|zypper|pacman|snap|
flatpak|nix|nix-env|guix|pip[\d.]*|pipx|uv|poetry|conda|mamba|npm|yarn|pnpm|gem|cargo|cpan|
luarocks"""
SHELLS = r"sh|bash|rbash|dash|ash|hush|zsh|ksh|ksh93|mksh|csh|tcsh|fish|xonsh|elvish|nu|pwsh"
INTERPRETERS = r"""python[\d.]*|pypy[\d.]*|perl[\d.]*|ruby[\d.]*|node|nodejs|bun|deno|lua[\d.]*|
luajit[\w.-]*|php[\d.]*|tclsh[\d.]*|wish[\d.]*|guile[\d.-]*|awk|gawk|mawk|nawk|original-awk|java|
Rscript|ocaml|erl|gdb|bpftrace"""
PROGRAM_FOLDER = r"(?:.*/)?s?bin/[^/]+"
ELF = b"\x7fELF"
ET_REL, ET_EXEC, ET_DYN = 1, 2, 3  # System V ABI, ELF header
PT_DYNAMIC, PT_INTERP = 2, 3
LONGEST_DYNAMIC = 1 << 20  # bytes of that section; real ones have a few hundred
DT_SONAME, DT_FLAGS_1, DF_1_PIE = 14, 0x6FFFFFFB, 0x08000000
APPLETS = b"\0[\0[[\0"  # how the table of names in a busybox begins
COMPRESSION = ("zstd", "-3", "-T1", "-q", "-c")
DPKG = r"var/lib/dpkg/(status|status\.d/[^/]+)"
DATABASES = {  # of packages: where they lie
    "dpkg": DPKG,
    "opkg": r"(usr|var)/lib/opkg/status",
    "apk": r"(usr/)?lib/apk/db/installed",
}
UNREAD = r"(var/lib|usr/lib/sysimage)/rpm/.+|var/lib/pacman/local/.+"
UNIT_FOLDERS = [f"{folder}/systemd/system" for folder in ("etc", "run", "usr/lib", "lib")]
UNITS = rf"(?:{'|'.join(UNIT_FOLDERS)})/(?!initrd)[^/]+\.(?:wants|requires)/([^/]+)"
SERVICE = r".+\.(service|socket|timer)"
INIT_SCRIPT = r"etc/(?:rc[S2-5]\.d/|init\.d/)S\d\d(.+)|etc/runlevels/(?:sysinit|boot|default)/(.+)"
LIBRARY_FOLDER = r"(?:.*/)?(?:site-packages|dist-packages|lib-dynload|lib(?:64)?/python\d[\d.]*)"
MODULE = r"(?:(?P<folder>.*)/)?(?P<name>\w+)"
MODULE += r"(?P<suffix>\.(?:cpython|pypy)[\w-]*|\.abi3)?\.(?P<kind>\w+)"
DISTRIBUTION = r"(?:(.*)/)?([^/]+)\.(?:dist|egg)-info(/METADATA|/PKG-INFO|)"

# kind: of the database, "pypi" for Python, or "list". A version may be empty.
Package = collections.namedtuple("Package", "kind name version architecture system")


class Files:
    """A tree, each regular file of it once: {path: entry}, and what was found by reading them.

    heads: {path: first bytes}. elf: {path: "executable", "library" or "other"}.
    """

    def __init__(self, tree):
        self.tree = dict(sorted(tree.items()))
        nodes = {}
        for path, entry in self.tree.items():
            if entry.kind == FILE:
                nodes.setdefault(entry.node, path)
        self.once = {path: self.tree[path] for path in nodes.values()}
        self.first = nodes
        self.heads, self.elf = {}, {}
        for path, entry in self.once.items():
            with entry.open() as file:
                self.heads[path] = file.read(4)
                if self.heads[path] == ELF:
                    self.elf[path] = elf_kind(file)

    def text(self, path):
        """The text of a file."""
        return self.bytes(path).decode("utf-8", "replace")

    def bytes(self, path):
        """The content of a file."""
        with self.tree[path].open() as file:
            return file.read()

    def holds(self, path, words):
        """Whether a file's content has these bytes; it may be larger than memory."""
        rest = b""
        with self.tree[path].open() as file:
            while block := file.read(1 << 20):
                if words in rest + block:
                    return True
                rest = block[-len(words) :]
        return False

    def resolve(self, path):
        """The path of the regular file that a path leads to, its first name; None without one."""
        entry = self.tree.get(trees.resolve(self.tree, path))
        return self.first[entry.node] if entry is not None and entry.kind == FILE else None

    def matching(self, pattern):
        """The regular files that paths lead to which match."""
        found = {self.resolve(path) for path in self.tree if re.fullmatch(pattern, path)}
        return sorted(found - {None})


def measured(names, **more):
    """The measure of things that have names."""
    names = sorted(names)
    return {"count": len(names), "names": names} | more


def not_measured(why):
    """The measure of what could not be measured."""
    return {"not_measured": why}


# ---------------------------------------------------------------- programs


def elf_kind(file):
    """What an ELF file is: "executable"; "library", which has no interpreter, or has a name of its
    own; or "other": an object, a kernel's module, what is damaged. After the System V ABI.
    """
    try:
        file.seek(0)
        head = file.read(64)
        word, order = {1: 4, 2: 8}[head[4]], {1: "<", 2: ">"}[head[5]]
        (kind,) = struct.unpack_from(order + "H", head, 16)
        if kind != ET_DYN:
            return "executable" if kind == ET_EXEC else "other"
        segments = program_headers(file, head, word, order)
        tags = dynamic_tags(file, segments, word, order)
    except (KeyError, IndexError, struct.error, OverflowError, ValueError, OSError):
        return "other"
    is_program = PT_INTERP in segments or tags.get(DT_FLAGS_1, 0) & DF_1_PIE
    return "executable" if is_program and DT_SONAME not in tags else "library"


def program_headers(file, head, word, order):
    """{type of segment: (offset, size)} of an ELF file."""
    begin, (size, count) = (28, (42, 44)) if word == 4 else (32, (54, 56))
    (start,) = struct.unpack_from(order + {4: "I", 8: "Q"}[word], head, begin)
    (size,), (count,) = (struct.unpack_from(order + "H", head, at) for at in (size, count))
    file.seek(start)
    table = file.read(size * count)
    layout = order + {4: "I I 8x I", 8: "I 4x Q 16x Q"}[word]
    rows = [struct.unpack_from(layout, table, size * n) for n in range(count)]
    return {kind: (offset, length) for kind, offset, length in rows}


def dynamic_tags(file, segments, word, order):
    """{tag: value} of an ELF file's dynamic section."""
    offset, size = segments.get(PT_DYNAMIC, (0, 0))
    file.seek(offset)
    table = file.read(min(size, LONGEST_DYNAMIC))
    table = table[: len(table) - len(table) % (2 * word)]
    return dict(struct.iter_unpack(order + {4: "II", 8: "QQ"}[word], table))


def programs(files, pattern):
    """Programs that names matching a pattern call, as a measure. In one folder, files with the same
    content are one: pip, pip3 and pip3.11 are."""
    pattern, found = "".join(pattern.split()), {}
    for path in files.tree:
        if re.fullmatch(pattern, posixpath.basename(path)):
            place = files.resolve(path)
            if place is not None and is_program(files, place):
                found[place] = (posixpath.dirname(place), files.once[place].size)
    kept, seen = [], set()
    for place, facts in sorted(found.items()):
        content = hashlib.sha256(files.bytes(place)).digest() if facts in seen else None
        same = [other for other in kept if found[other] == facts and content is not None]
        if not any(hashlib.sha256(files.bytes(other)).digest() == content for other in same):
            kept.append(place)
        seen.add(facts)
    return measured(kept)


def is_program(files, path):
    """Whether a regular file is a program: machine code, or a script where programs lie."""
    is_script = files.heads[path][:2] == b"#!" and re.fullmatch(PROGRAM_FOLDER, path)
    return bool(is_script) or files.elf.get(path) == "executable"


def applets(files):
    """What the busyboxes in a tree can be called as: their own tables, else the links to them."""
    found = set()
    for path in files.elf:
        if posixpath.basename(path).startswith("busybox"):
            _, table, names = files.bytes(path).partition(APPLETS)
            listed = (table + names).partition(b"\0\0")[0].split(b"\0") if table else ()
            links = [link for link in files.tree if files.resolve(link) == path and link != path]
            called = {posixpath.basename(link) for link in links}
            found |= {name.decode("ascii", "replace") for name in listed if name} or called
    return measured(found)


# ---------------------------------------------------------------- rights


def rights(files):
    """{metric: measure} of what files allow to whoever comes."""
    once, tree = files.once, files.tree
    writable = {
        entry.node: path
        for path, entry in reversed(tree.items())
        if entry.kind in (FILE, FOLDER) and entry.mode & 0o002
    }
    return {
        "setuid": measured(path for path, entry in once.items() if entry.mode & 0o6000),
        "capabilities": measured(path for path, entry in once.items() if entry.capability),
        "world_writable": measured(writable.values()),
    }


# ---------------------------------------------------------------- packages


def package(kind, name, version, architecture="", system=""):
    """A Package; names of Python's distributions that PEP 503 calls the same are the same."""
    if kind == "pypi":
        name = re.sub(r"[-_.]+", "-", name).lower()
    return Package(kind, name, version, architecture, system)


def packages(files):
    """The packages that databases in a tree name as installed, sorted. ToolError for one of a kind
    that is not read."""
    unread = files.matching(UNREAD)
    if unread:
        raise ToolError(f"its packages are in a database that is not read: {unread[0]}")
    system, found = system_name(files), set()
    for kind, pattern in DATABASES.items():
        for path in files.matching(pattern):
            text = files.text(path)
            rows = apk_rows(text) if kind == "apk" else control_rows(text)
            found |= {package(kind, *row, system) for row in rows}
    return sorted(found)


def has_database(files):
    """Whether there is a database of packages, though it may be empty."""
    return any(files.matching(pattern) for pattern in DATABASES.values())


def control_rows(text):
    """(name, version, architecture) of what a dpkg or opkg status file has as installed."""
    for stanza in re.split(r"\n\s*\n", text):
        fields = dict(re.findall(r"^([\w-]+): *(.*)$", stanza, re.MULTILINE))
        state = fields.get("Status", "install ok installed").split()[-1]
        if "Package" in fields and state == "installed":
            yield fields["Package"], fields.get("Version", ""), fields.get("Architecture", "")


def apk_rows(text):
    """(name, version, architecture) of what an apk database has."""
    for stanza in text.split("\n\n"):
        fields = dict(re.findall(r"^([A-Z]):(.*)$", stanza, re.MULTILINE))
        if "P" in fields:
            yield fields["P"], fields.get("V", ""), fields.get("A", "")


def system_name(files):
    """What the tree's os-release calls the system; empty if nothing does."""
    for path in ("etc/os-release", "usr/lib/os-release"):
        place = files.resolve(path)
        if place is not None:
            found = re.search(r"""^ID=["']?([\w.-]+)""", files.text(place), re.MULTILINE)
            return found[1] if found else ""
    return ""


# ---------------------------------------------------------------- Python


def distributions(files):
    """The Python distributions in a tree, as packages, sorted: every dist-info and egg-info."""
    found = {}
    for path in files.once:
        match = re.fullmatch(DISTRIBUTION, path)
        if match:
            folder, stem, _ = match.groups()
            head = files.text(path).partition("\n\n")[0]
            fields = dict(re.findall(r"^(Name|Version): *(.*?)\r?$", head, re.MULTILINE))
            name, _, version = stem.partition("-")
            name, version = (
                fields.get("Name", name),
                fields.get("Version", version.partition("-")[0]),
            )
            found[folder, stem] = package("pypi", name, version)
    return sorted(set(found.values()))


def modules(files):
    """{(folder, name)} of all Python modules in a tree: source, compiled, extensions."""
    found = set()
    for path in files.once:
        match = re.fullmatch(MODULE, path)
        if match and is_module(files, path, match):
            folder = match["folder"] or ""
            if match["kind"] == "pyc" and posixpath.basename(folder) == "__pycache__":
                folder = posixpath.dirname(folder)
            found.add((folder, match["name"]))
    return found


def is_module(files, path, match):
    """Whether a path that looks like a Python module's is one."""
    name, suffix, kind = match["name"], match["suffix"], match["kind"]
    if not name.isidentifier():
        return False
    if kind == "so":  # of plain names only what has the function that Python calls
        is_plain = not suffix and files.elf.get(path) == "library"
        return bool(suffix) or is_plain and files.holds(path, f"PyInit_{name}\0".encode())
    return kind == "pyc" or kind == "py" and not suffix


def import_folders(files):
    """The folders of a tree that Python imports from: by their names, or with distributions."""
    found = {
        path
        for path, entry in files.tree.items()
        if entry.kind == FOLDER and re.fullmatch(LIBRARY_FOLDER, path)
    }
    infos = (re.fullmatch(DISTRIBUTION, path) for path in files.once)
    return found | {info[1] or "" for info in infos if info}


def top_level(files, found):
    """{(folder, name)} of the modules and packages that `import NAME` finds in those folders."""
    folders = import_folders(files)
    direct = {(folder, name) for folder, name in found if folder in folders} - {
        (folder, "__init__") for folder in folders
    }
    nested = {posixpath.split(folder) for folder, name in found if name == "__init__"}
    return direct | {place for place in nested if place[0] in folders and place[1]}


def python_facts(files):
    """{metric: measure}: modules, their lines, and the native libraries beside them."""
    found, folders = modules(files), import_folders(files)
    sources = [
        path
        for path in files.once
        if (match := re.fullmatch(MODULE, path))
        and match["kind"] == "py"
        and is_module(files, path, match)
    ]
    native = [
        entry.size
        for path, entry in files.once.items()
        if files.elf.get(path) == "library" and is_below(path, folders)
    ]
    return {
        "modules": {"count": len(found)},
        "top_level_modules": {"count": len(top_level(files, found))},
        "python_lines": {
            "count": sum(files.bytes(path).count(b"\n") for path in sources),
            "how": "all lines of the .py files of modules",
        },
        "native_bytes": {
            "count": sum(native),
            "how": "bytes of the shared libraries below Python's folders",
        },
    }


def is_below(path, folders):
    """Whether a path lies below one of these folders."""
    above = [path[: at.start()] for at in re.finditer("/", path)]
    return "" in folders or any(folder in folders for folder in above)


# ---------------------------------------------------------------- services, ports


def services(files):
    """What is started at boot: systemd's wanted units, init scripts, inittab; by their names.

    A service that is there as a unit, as its socket or timer, and as a script is one. Not counted
    are masked units, and what is for an initrd.
    """
    found = set()
    for path, entry in files.tree.items():
        unit, script = re.fullmatch(UNITS, path), re.fullmatch(INIT_SCRIPT, path)
        if unit and re.fullmatch(SERVICE, unit[1]):
            found.add(unit_name(files, unit[1]))
        elif script and entry.kind in (FILE, LINK):
            name = (script[1] or script[2]).removesuffix(".sh")
            found.add(unit_name(files, f"{name}.service"))
    place = files.resolve("etc/inittab")
    for row in files.text(place).splitlines() if place is not None else ():
        fields = row.strip().split(":", 3)
        if len(fields) == 4 and not row.strip().startswith("#") and fields[2] != "initdefault":
            found.add(f"inittab: {fields[3].strip()}")
    return measured(found - {None})


def unit_name(files, name):
    """What systemd calls a unit of this name, without its kind; None if it is masked."""
    for folder in UNIT_FOLDERS:
        place = trees.resolve(files.tree, f"{folder}/{name}")
        if place == "dev/null":
            return None
        if place in files.tree:
            name = posixpath.basename(place)
            break
    return name.rpartition(".")[0]


def listening_ports(process="self"):
    """The ports that are listened on where a process (its number) has its network: a measure.

    Raises ToolError.
    """
    found = set()
    for kind, state in (("tcp", "0A"), ("udp", "07")):  # TCP_LISTEN, TCP_CLOSE: net/tcp_states.h
        for name in (kind, f"{kind}6"):
            path = pathlib.Path("/proc", process, "net", name)
            if not path.parent.exists():
                raise ToolError(f"there is no process {process}")
            rows = path.read_text("ascii").splitlines()[1:] if path.exists() else []
            fields = [row.split() for row in rows]
            found |= {f"{kind}/{int(row[1][-4:], 16)}" for row in fields if row[3] == state}
    return measured(found, how="/proc/net, from inside")


def own_writable_mounts():
    """The file systems of this machine that are mounted for writing: a measure."""
    rows = [row.split() for row in pathlib.Path("/proc/self/mounts").read_text().splitlines()]
    writable = {row[1] for row in rows if "rw" in row[3].split(",")}
    return measured(writable, how="/proc/self/mounts")


# ---------------------------------------------------------------- sizes


def sizes(files):
    """{metric: measure}: regular files, their bytes, and these compressed."""
    size = sum(entry.size for entry in files.once.values())
    return {
        "files": {"count": len(files.once)},
        "bytes": {"count": size},
        "compressed_bytes": compressed(files),
    }


def compressed(files):
    """What all files together take, compressed in the order of their paths: a measure."""
    if not shutil.which(COMPRESSION[0]):
        return not_measured("zstd is not installed: apt-get install zstd")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(COMPRESSION, **pipes) as packer:
        counter = subprocess.Popen(["wc", "-c"], stdin=packer.stdout, stdout=subprocess.PIPE)
        with counter:
            packer.stdout.close()
            for entry in files.once.values():
                with entry.open() as file:
                    shutil.copyfileobj(file, packer.stdin, 1 << 20)
            packer.stdin.close()
            count = int(counter.stdout.read())
    if packer.returncode:
        raise ToolError("zstd failed")
    return {"count": count, "how": " ".join(COMPRESSION[:2]) + " over all files by path"}


# ---------------------------------------------------------------- all of it


def survey(tree):
    """({metric: measure}, the packages and distributions) of one tree."""
    files = Files(tree)
    kinds = collections.Counter(files.elf.values())
    facts = {
        "executables": {"count": kinds["executable"]},
        "libraries": {"count": kinds["library"]},
        "other_elf": {"count": kinds["other"]},
        "scripts": {"count": sum(head[:2] == b"#!" for head in files.heads.values())},
        "applets": applets(files),
        "package_managers": programs(files, PACKAGE_MANAGERS),
        "shells": programs(files, SHELLS),
        "interpreters": programs(files, INTERPRETERS),
        "services": services(files),
    }
    found = distributions(files)
    facts["distributions"] = measured(f"{one.name} {one.version}" for one in found)
    facts |= rights(files) | python_facts(files) | sizes(files)
    try:
        installed = packages(files)
        facts["packages"] = measured(f"{one.name} {one.version}" for one in installed)
        if not has_database(files):
            facts["packages"] = not_measured("no database of packages is in it")
    except ToolError as error:
        installed, facts["packages"] = [], not_measured(str(error))
    return facts, installed + found


def add(measures):
    """The sum of the measures of several parts; not measured if one of them is not."""
    for one in measures:
        if "not_measured" in one:
            return one
    total = {"count": sum(one["count"] for one in measures)}
    if "names" in measures[0]:
        total["names"] = sorted(name for one in measures for name in one["names"])
    if "how" in measures[0]:
        total["how"] = measures[0]["how"]
    return total
