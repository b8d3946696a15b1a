"""The guest's kernel: fragments of options, resolved, compared, built, linked with its initramfs.

Every option that no fragment names is off (`allnoconfig`). What a fragment wants and Kconfig does
not give is an error: a mitigation must not vanish in silence. Used by tools/image.py.
"""

import os
import re
import shutil
import subprocess
import time

from environment import ROOT, ToolError

FRAGMENTS = ROOT / "br_external" / "board" / "muenclave" / "kernel"
VARIANTS = {
    "tcp": ("base", "hardening", "tcp", "unified"),
    "vsock": ("base", "hardening", "vsock", "unified"),
    "gpu": ("base", "hardening", "tcp", "gpu", "unified"),
}
# Names in 6.1 and in 6.12: of such a pair, one has to hold.
RENAMED = {
    "PAGE_TABLE_ISOLATION": "MITIGATION_PAGE_TABLE_ISOLATION",
    "RETPOLINE": "MITIGATION_RETPOLINE",
    "RETHUNK": "MITIGATION_RETHUNK",
    "CPU_UNRET_ENTRY": "MITIGATION_UNRET_ENTRY",
    "CPU_IBPB_ENTRY": "MITIGATION_IBPB_ENTRY",
    "CPU_IBRS_ENTRY": "MITIGATION_IBRS_ENTRY",
    "CPU_SRSO": "MITIGATION_SRSO",
    "SLS": "MITIGATION_SLS",
    "SQUASHFS_DECOMP_MULTI_PERCPU": "SQUASHFS_COMPILE_DECOMP_MULTI_PERCPU",
}
# What 6.12 does not ask any more: removed with what it switched, or always on.
GONE = "EMBEDDED RANDOM_TRUST_CPU DEBUG_CREDENTIALS UBSAN_SANITIZE_ALL MICROCODE".split()
# What 6.1 does not ask yet: a switch for what was always on, or a protection that came later.
NEW = """MITIGATION_GDS MITIGATION_MDS MITIGATION_TAA MITIGATION_MMIO_STALE_DATA MITIGATION_L1TF
MITIGATION_RETBLEED MITIGATION_SPECTRE_V1 MITIGATION_SPECTRE_V2 MITIGATION_SRBDS MITIGATION_SSB
RANDOM_KMALLOC_CACHES SLAB_BUCKETS""".split()
# Two builds, on two paths and days, are the same bits only with these fixed.
REPRODUCIBLE = {
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 2026",
    "KBUILD_BUILD_USER": "muenclave",
    "KBUILD_BUILD_HOST": "muenclave",
    "KBUILD_BUILD_VERSION": "1",
    "LC_ALL": "C",
    "TZ": "UTC",
}
COMMAND_LINE_SIZE = 2048  # arch/x86/include/asm/setup.h
# Where the Makefiles keep what they build to run on this machine, not in the guest.
HOST_FOLDERS = ("scripts/", "tools/", "usr/gen_init")


def read_options(text):
    """{option without CONFIG_: value}, "n" for one that is not set."""
    pattern = r"^(?:CONFIG_(\w+)=(.*)|# CONFIG_(\w+) is not set)$"
    rows = re.finditer(pattern, text, re.MULTILINE)
    return {row[1] or row[3]: row[2] if row[1] else "n" for row in rows}


def write_options(options):
    """The text that Kconfig reads for {option: value}."""
    lines = []
    for name, value in options.items():
        lines.append(f"# CONFIG_{name} is not set" if value == "n" else f"CONFIG_{name}={value}")
    return "\n".join(lines) + "\n"


def quoted(text):
    """A text as the value of an option that is a string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def wanted(variant):
    """The options that a variant's fragments ask for; a later fragment overrides an earlier one."""
    options = {}
    for name in VARIANTS[variant]:
        options |= read_options((FRAGMENTS / f"{name}.fragment").read_text("utf-8"))
    return options


def series(text):
    """The series, such as "6.1", of the kernel that resolved a .config (its text). ToolError.

    The heading names ARCH as it was given: x86, or x86_64 as Buildroot does.
    """
    found = re.search(r"^# Linux/x86(?:_64)? (\d+\.\d+)\.", text, re.MULTILINE)
    if found is None:
        raise ToolError("that is no resolved kernel configuration: no version in its heading")
    return found[1]


def unknown_options(text):
    """What the kernel of a resolved .config (its text, with its heading) can't know. ToolError."""
    return GONE if tuple(map(int, series(text).split("."))) >= (6, 12) else NEW


def differences(asked, final, unknown=()):
    """Where final options are not what was asked for, one line each; unknown ones don't count."""
    older = {new: old for old, new in RENAMED.items()}
    lines = []
    for name, value in asked.items():
        other = RENAMED.get(name) or older.get(name)
        values = {final.get(one, "n") for one in (name, other) if one}
        if value not in values and name not in unknown:
            lines.append(f"CONFIG_{name}: wanted {value}, got {final.get(name, 'nothing')}")
    return lines


def make(source, build, *arguments, watch=None):
    """Run the kernel's make. watch(line) is called for each line of its output. ToolError."""
    path = {"PATH": os.environ.get("PATH", os.defpath)}
    command = ["make", "-C", str(source), f"O={build}", f"-j{os.cpu_count()}", *arguments]
    process = subprocess.Popen(
        command,
        env=path | REPRODUCIBLE,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines = []
    with process:
        for line in process.stdout:
            lines.append(line.strip())
            if watch:
                watch(line.strip())
    if process.returncode:
        faults = [line for line in lines if "error" in line.lower()] or lines[-1:] or ["no output"]
        raise ToolError(f"the kernel's make failed: {faults[0]}")


def resolve(source, build, options):
    """Have Kconfig resolve the options into build/.config. Returns the final ones. ToolError."""
    build.mkdir(parents=True, exist_ok=True)
    asked = build / "wanted.config"
    asked.write_text(write_options(options), "utf-8")
    make(source, build, f"KCONFIG_ALLCONFIG={asked}", "allnoconfig")
    text = (build / ".config").read_text("utf-8")
    final = read_options(text)
    wrong = differences(options, final, unknown_options(text))
    if wrong:
        raise ToolError(f"the kernel's options are not what was asked for: {'; '.join(wrong)}")
    return final


def compile_objects(source, build, variant, show):
    """Build everything but the final image, so that an image is only a link away. ToolError."""
    options = wanted(variant)
    for name in ("INITRAMFS_ROOT_UID", "INITRAMFS_ROOT_GID"):  # exist only with an initramfs
        options.pop(name)
    resolve(source, build, options | {"CMDLINE": quoted("noinitrd")})
    watch_make(source, build, show, "kernel")


def link(source, objects, build, options, show):
    """Copy compiled objects and make the bzImage with these options. Returns its path."""
    shutil.copytree(objects, build, symlinks=True)
    resolve(source, build, options)
    watch_make(source, build, show, "image")
    return build / "arch" / "x86" / "boot" / "bzImage"


def release(objects):
    """What uname -r says in the kernel that these objects make."""
    return (objects / "include" / "config" / "kernel.release").read_text("ascii").strip()


def relink(source, build, options, show):
    """Make it once more without a command line of its own: whoever boots it gives one. Path."""
    kept = {name: value for name, value in options.items() if not name.startswith("CMDLINE")}
    resolve(source, build, kept | {"CMDLINE_BOOL": "n"})
    watch_make(source, build, show, "microvm")
    return build / "arch" / "x86" / "boot" / "bzImage"


def watch_make(source, build, show, what):
    """Make the bzImage, showing how far it is."""
    began, steps = time.monotonic(), [0]

    def watch(line):
        if re.match(r"[A-Z]{2,}\s", line):
            steps[0] += 1
            show(f"{what}: {steps[0]} steps, {time.monotonic() - began:.0f} s: {line}")

    make(source, build, "bzImage", watch=watch)


def compiled_lines(source, build):
    """{"files", "lines", "counted"}: the .c and .S files that were compiled, and all their lines.

    By the .cmd files that Kbuild leaves beside every object; headers are not among them.
    """
    sources = set()
    for folder, _, names in os.walk(build):
        inside = os.path.relpath(folder, build) + "/"
        for name in names:
            if not name.endswith(".o.cmd") or inside.startswith(HOST_FOLDERS):
                continue
            with open(os.path.join(folder, name), errors="replace") as file:
                text = file.read()
            found = re.search(r"^source_\S+ := (\S+\.[cS])$", text, re.MULTILINE)
            is_host = re.match(r"(?:saved)?cmd_\S+ := gcc (?!.*-D__KERNEL__)", text)
            if found and not (is_host and not inside.startswith("arch/x86/")):
                sources.add(os.path.normpath(os.path.join(build, found[1])))
    lines = 0
    for path in sources:
        with open(path, "rb") as file:
            lines += file.read().count(b"\n")
    counted = "all lines of the .c and .S files that Kbuild's .cmd files name, each file once"
    return {"files": len(sources), "lines": lines, "counted": counted}
