#!/usr/bin/env python3
"""The kernel's options in a Buildroot build: what is wanted, and whether the kernel got it.

    kernel_config.py wanted --output FILE --fragments FILE... --command-line FILE...
    kernel_config.py compare WANTED FINAL

Rules and names are those of tools/kernel.py, so that both builds make the same kernel.
"""

import argparse
import pathlib
import sys

CHECKOUT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(CHECKOUT / "tools"))

import kernel  # noqa: E402

# Buildroot puts the archive there and expands the name when it makes the kernel.
INITRAMFS = '"${BR_BINARIES_DIR}/rootfs.cpio"'


def wanted(fragments, command_line, module_key):
    """{option: value} of fragments (paths), the joined lines of command_line (paths), a key (path).

    Raises OSError, and ValueError if the command line is not one the kernel can have.
    """
    options = {}
    for path in fragments:
        options |= kernel.read_options(path.read_text("utf-8"))
    text = " ".join(path.read_text("ascii").strip() for path in command_line)
    if "\n" in text or not 0 < len(text) < kernel.COMMAND_LINE_SIZE:
        raise ValueError(f"the command line is not one line below {kernel.COMMAND_LINE_SIZE} bytes")
    options |= {"CMDLINE": kernel.quoted(text), "INITRAMFS_SOURCE": INITRAMFS}
    if module_key:
        options["MODULE_SIG_KEY"] = kernel.quoted(module_key)
    return options


def read_facts(images):
    """(release, command line, options) of the kernel, from the folder of Buildroot's images.

    Raises OSError, and ToolError if that is no kernel of ours.
    """
    options = kernel.read_options((images / "kernel.config").read_text("utf-8"))
    if "CMDLINE" not in options:
        raise kernel.ToolError(f"{images}/kernel.config: no command line is built in")
    release = (images / "kernel.release").read_text("ascii").strip()
    return release, unquoted(options["CMDLINE"]), options


def unquoted(value):
    """The text of an option that is a string."""
    return value[1:-1].replace('\\"', '"').replace("\\\\", "\\")


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="kernel_config.py", description=__doc__.split("\n")[0])
    steps = parser.add_subparsers(dest="step", required=True)
    write = steps.add_parser("wanted", help="write what the kernel is to have")
    for name in ("--fragments", "--command-line"):
        write.add_argument(name, nargs="+", type=pathlib.Path, metavar="FILE", required=True)
    write.add_argument("--module-key", default="", metavar="PEM")
    write.add_argument("--output", type=pathlib.Path, metavar="FILE", required=True)
    compare = steps.add_parser("compare", help="fail where the kernel has something else")
    compare.add_argument("wanted", type=pathlib.Path)
    compare.add_argument("final", type=pathlib.Path)
    flags = parser.parse_args(argv)
    try:
        if flags.step == "wanted":
            options = wanted(flags.fragments, flags.command_line, flags.module_key)
            flags.output.write_text(kernel.write_options(options), "utf-8")
            return 0
        asked = kernel.read_options(flags.wanted.read_text("utf-8"))
        text = flags.final.read_text("utf-8")
        unknown = kernel.unknown_options(text)
        wrong = kernel.differences(asked, kernel.read_options(text), unknown)
    except OSError as error:
        wrong = [f"{error.filename}: {error.strerror}"]
    except (ValueError, kernel.ToolError) as error:
        wrong = [str(error)]
    for line in wrong:
        print(f"kernel_config: error: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
