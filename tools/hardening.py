"""What the guest's kernel and programs are hardened by, against tools/hardening.json: a ratchet.

    python3 tools/hardening.py --config build/kernel.config [--variant tcp]
    python3 tools/hardening.py --root DIR

hardening.json names kernel options and the value that is wanted of each, after what the Kernel Self
Protection Project recommends and kernel-hardening-checker 0.6.17 asks for, as far as Linux 6.1 or
6.12 has it; and where the guest does without, in which kernels or variants, and why. It also names
what each ELF file of the root lacks. Worse than that file is an error; so is better, which has to
be written down, lest it be lost again. Exit status: 0 if all is as the file says.
"""

import argparse
import json
import os
import pathlib
import re
import stat
import sys

import kernel
import rootfs
from environment import ROOT, ToolError

RECORD = ROOT / "tools" / "hardening.json"
CHECKS_OF_LIBC = {"stack protector": r"__stack_chk_fail", "fortify": r"__\w+_chk"}


def read_record():
    """{"options": [{"option", "wanted", …}], "elf": {what is lacking: [paths]}}."""
    return json.loads(RECORD.read_text("utf-8"))


# ---------------------------------------------------------------- kernel


def is_held(rule, options):
    """Whether a kernel's options ({name: value}) are what a rule of the record wants.

    or: another name of the same. only_with: the option without which the rule says nothing.
    """
    if "only_with" in rule and options.get(rule["only_with"], "n") == "n":
        return True
    names = [rule["option"], rule.get("or", rule["option"])]
    return rule["wanted"] in [options.get(name, "n") for name in names]


def kernel_changes(text, variant, rules):
    """Where a resolved .config (its text) is not what the record says, one line each. ToolError."""
    options, series = kernel.read_options(text), kernel.series(text)
    lines = []
    for rule in rules:
        is_expected = not {series, variant} & set(rule.get("missing", ()))
        if is_held(rule, options) != is_expected:
            found = options.get(rule["option"], "nothing")
            what = "worse" if is_expected else "better than recorded"
            lines.append(f"{what}: CONFIG_{rule['option']}: wanted {rule['wanted']}, got {found}")
    return lines


# ---------------------------------------------------------------- root file system


def elf_lacks(path):
    """What hardens an ELF file and this one lacks: a set of names, as in the record. ToolError.

    Stack protector and fortify show by calls of the C library's checks only: what has nothing to
    check, or is that library, shows none.
    """
    text = rootfs.run("readelf", "-hlWd", path, failure=f"can't read {path}")
    symbols = rootfs.run("readelf", "-W", "--dyn-syms", path, failure=f"can't read {path}")
    segments = re.findall(r"^  (\w+) +0x.*? ([R ][W ][E ]) (?:0|0x\w+)$", text, re.MULTILINE)
    holds = {
        "position independence": re.search(r"Type: +DYN", text),
        "read-only relocations": any(kind == "GNU_RELRO" for kind, _ in segments),
        "binding at start": re.search(r"\(FLAGS.*\bNOW\b|BIND_NOW", text),
        "stack without code": ("GNU_STACK", "RW ") in segments,
        "code that is not writable": not any(flags[1:] == "WE" for _, flags in segments),
        "fixed code": "TEXTREL" not in text,
        "system's libraries only": not re.search(r"\(R(?:UN)?PATH\)", text),
    }
    for name, pattern in CHECKS_OF_LIBC.items():
        holds[name] = re.search(rf" UND {pattern}(?:@|$)", symbols, re.MULTILINE)
    return {name for name, value in holds.items() if not value}


def elf_changes(root, recorded):
    """Where the ELF files below root are not what the record says, one line each. ToolError."""
    found = {}
    for path in regular_files(root):
        for name in elf_lacks(path) if rootfs.is_elf(path) else ():
            found.setdefault(name, set()).add(path.relative_to(root).as_posix())
    lines = []
    for name in sorted(found.keys() | recorded.keys()):
        lacking, known = found.get(name, set()), set(recorded.get(name, ()))
        lines += [f"worse: {path} lacks {name}" for path in sorted(lacking - known)]
        lines += [f"better than recorded: {path} has {name}" for path in sorted(known - lacking)]
    return lines


def mode_faults(root):
    """What in root gives rights that nothing of the guest needs, one line each.

    Set-user-ID, set-group-ID, sticky; writable by others than the owner; capabilities and any other
    extended attribute; anything but files, folders and links.
    """
    lines = []
    for path in sorted((root, *root.rglob("*"))):
        mode = path.lstat().st_mode
        name = path.relative_to(root).as_posix()
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
            lines.append(f"{name}: neither file, folder nor link")
        elif not stat.S_ISLNK(mode) and stat.S_IMODE(mode) & 0o7022:
            lines.append(f"{name}: mode {stat.S_IMODE(mode):04o}")
        attributes = os.listxattr(path, follow_symlinks=False)
        if attributes:
            lines.append(f"{name}: extended attributes {' '.join(sorted(attributes))}")
    return lines


def regular_files(root):
    """The regular files below root, sorted."""
    return sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())


# ---------------------------------------------------------------- command line


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="hardening.py", description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=pathlib.Path, metavar="FILE", help="of a kernel, resolved")
    parser.add_argument("--variant", choices=kernel.VARIANTS, default="tcp", help="of that kernel")
    parser.add_argument("--root", type=pathlib.Path, metavar="DIR", help="a guest's root")
    flags = parser.parse_args(argv)
    if not flags.config and not flags.root:
        parser.error("name what to look at: --config, --root or both")
    changes = []
    try:
        record = read_record()
        if flags.config:
            text = flags.config.read_text("utf-8")
            changes += kernel_changes(text, flags.variant, record["options"])
            options = kernel.read_options(text)
            held = sum(is_held(rule, options) for rule in record["options"])
            print(f"hardening: {held} of {len(record['options'])} recommended options held")
        if flags.root:
            if not flags.root.is_dir():
                raise ToolError(f"{flags.root} is no directory")
            changes += elf_changes(flags.root, record["elf"]) + mode_faults(flags.root)
            files = regular_files(flags.root)
            print(f"hardening: {len(files)} files, {sum(map(rootfs.is_elf, files))} of them ELF")
    except (ToolError, UnicodeDecodeError) as error:
        changes = [str(error)]
    except OSError as error:
        changes = [f"{error.filename}: {error.strerror}"]
    for line in changes:
        print(f"hardening: error: {line}", file=sys.stderr)
    return int(bool(changes))


if __name__ == "__main__":
    sys.exit(main())
