"""Lines of code: our own as the project's size limits count them, and a kernel's.

Which files a kernel compiles, Kbuild's own makefiles say for a configuration, without compiling:
they are read folder by folder as a build does, and asked for their objects. Used by
tools/attack_surface.py and tests/test_project.py.
"""

import ast
import functools
import io
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import tokenize

import kernel
from environment import ROOT, ToolError

PRODUCT = ("muprotocol.py", "muenclave.py", "muproxy.py")
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
NO_CODE += (tokenize.ENDMARKER,)
# Read beside the kernel's Makefile, which prepares what the makefiles of the folders need.
TOP = """
.PHONY: walk
walk:
	@$(MAKE) -s -f $(walker) obj=. walk
"""
# Read in the place of a folder's scripts/Makefile.build, which it reads first.
WALKER = """
include $(srctree)/scripts/Makefile.build
named := $(real-obj-y) $(real-obj-m) $(lib-y) $(lib-m) $(extra-y)
.PHONY: walk
walk:
	@printf '%s\\n' $(patsubst %,source:%,$(filter %.o,$(named)))
	@$(foreach folder,$(sort $(subdir-ym)),$(MAKE) -s -f $(walker) obj=$(folder) walk &&) true
"""
NAMED = "files that Kbuild's makefiles name for its options, without boot, real mode and vDSO"


def code_lines(text):
    """The numbers of the lines that hold code: no comment, no docstring, nothing empty."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        is_documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, is_documented) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def engine_lines(text):
    """The numbers of the lines of the engine's section: from its heading to the next one."""
    rows = text.splitlines()
    (start,) = (at for at, row in enumerate(rows, 1) if row.startswith("# ==== engine"))
    ends = (at for at, row in enumerate(rows, 1) if at > start and row.startswith("# ===="))
    return set(range(start, next(ends, len(rows) + 1)))


def trusted_lines():
    """How many code lines run beside the key: the protocol, and the guest but for the engine."""
    guest = (ROOT / "muenclave.py").read_text("utf-8")
    protocol = (ROOT / "muprotocol.py").read_text("utf-8")
    return len(code_lines(guest) - engine_lines(guest)) + len(code_lines(protocol))


def own_lines():
    """{metric: measure} of the product's modules, in code lines."""
    facts = {}
    for name in PRODUCT:
        facts[name] = {"count": len(code_lines((ROOT / name).read_text("utf-8")))}
    facts["beside the key"] = {"count": trusted_lines()}
    return facts


# ---------------------------------------------------------------- kernels


def named_sources(source, config):
    """(paths of the .c and .S files that a kernel's makefiles name, how many options of its
    configuration Kconfig resolves otherwise here). config: its text. ToolError.
    """
    source = pathlib.Path(source).resolve()
    with tempfile.TemporaryDirectory(prefix="muenclave-") as folder:
        folder = pathlib.Path(folder)
        build = folder / "build"
        build.mkdir()
        (build / ".config").write_text(config, "utf-8")
        kernel.make(source, build, "olddefconfig")
        asked = kernel.read_options(config)
        final = kernel.read_options((build / ".config").read_text("utf-8"))
        changed = sum(final.get(name, "n") != value for name, value in asked.items())
        (folder / "top.mk").write_text(TOP)
        (folder / "walker.mk").write_text(WALKER)
        facts = {"srctree": source, "abs_srctree": source, "abs_objtree": build}
        facts |= {"sub_make_done": 1, "walker": folder / "walker.mk"}
        command = ["make", "-rRs", "-f", source / "Makefile", "-f", folder / "top.mk"]
        command += [*(f"{name}={value}" for name, value in facts.items()), "walk"]
        path = {"PATH": os.environ.get("PATH", os.defpath)}
        done = subprocess.run(
            list(map(str, command)),
            cwd=build,
            env=path | kernel.REPRODUCIBLE,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no output"]
        raise ToolError(f"the kernel's makefiles can't be read: {said[-1]}")
    rows = [row.removeprefix("source:") for row in done.stdout.splitlines() if row[:7] == "source:"]
    places = [source / os.path.normpath(row[:-2]) for row in rows if row]
    found = (place.with_name(place.name + kind) for place in places for kind in (".c", ".S"))
    return sorted({path for path in found if path.is_file()}), changed


def all_lines(paths):
    """How many lines files have, blank ones and comments too."""
    lines = 0
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                lines += block.count(b"\n")
    return lines


def cloc_lines(paths):
    """The code lines of files as cloc counts them: a measure."""
    if not shutil.which("cloc"):
        return {"not_measured": "cloc is not installed: apt-get install cloc"}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{path}\n" for path in paths)
        file.flush()
        command = ["cloc", "--quiet", "--json", "--skip-uniqueness", f"--list-file={file.name}"]
        done = subprocess.run(command, capture_output=True, text=True)
    try:
        return {"count": json.loads(done.stdout)["SUM"]["code"], "how": "cloc"}
    except (ValueError, KeyError):
        return {"not_measured": "cloc failed"}


@functools.lru_cache
def tree_lines(source):
    """The lines of all .c and .S files of a kernel's source."""
    paths = []
    for folder, _, names in os.walk(source):
        paths += [os.path.join(folder, name) for name in names if name.endswith((".c", ".S"))]
    return all_lines(paths)


def kernel_lines(source, config):
    """{metric: measure} of the code that a kernel's configuration (its text) takes. ToolError."""
    paths, changed = named_sources(source, config)
    how = NAMED + (f"; {changed} options are resolved otherwise here" if changed else "")
    whole = "all .c and .S files of the source"
    return {
        "kernel_files": {"count": len(paths), "how": how},
        "kernel_lines": {"count": all_lines(paths), "how": how},
        "kernel_code_lines": cloc_lines(paths),
        "kernel_tree_lines": {"count": tree_lines(source), "how": whole},
    }
