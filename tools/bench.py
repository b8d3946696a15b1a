"""Measure what the project claims in numbers: python3 tools/bench.py boot | meter

    boot     the image's size, and the time from power-on to the handshake: ours from its disk, our
             kernel by QEMU's -kernel, and Debian's cloud kernel by -kernel with the same root file
             system, drivers added, as -initrd; all on the same machine, in turns
    meter    tokens a second over the same cap of bytes a second, transport alone, with real text
             that was tokenised before: our cells through the gate, a sealed JSON object a token,
             OpenAI's events (tools/bench_meter.py); --peers DIR gets the tokenizer

A time is the median of the rounds, with the least and the most. What a machine can't do is said,
not guessed. --json FILE (-: standard output) writes all figures: {"tool", "version", "boot"}, or
{"tool", "version", "verb": "meter", "meter"}. Exit status: 0 if all was measured.
"""

import argparse
import contextlib
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types

import bench_meter
import environment
import image
import kernel
import measure
import pcr
import rootfs
import vm
from demo_model import cached
from environment import ROOT, ToolError

sys.path.insert(0, str(ROOT))
import muprotocol as mp  # noqa: E402
import muproxy  # noqa: E402

WEIGHTS = ROOT / ".quickstart" / "demo.mus"
GUEST = ROOT / "tools" / "bench_guest.py"
BOOT_SECONDS = 300
MEMORY, CPUS = 1024, 2
# What Debian's cloud kernel needs before it has disks, a network and entropy, in this order.
DRIVERS = """virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk
failover net_failover virtio_net virtio-rng""".split()
CONTENDERS = {
    "image": "our image, from its disk",
    "kernel": "our kernel, by -kernel",
    "debian": "Debian's cloud kernel, by -kernel",
}
PROVED = {"measurement", "PCR 4", "PCR 9"}  # by our image without any enrolment


def say(text):
    """Progress."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- boot


def debian_kernel(lock):
    """Debian's cloud kernel, unpacked: its folder, with vmlinuz and modules. ToolError."""
    name = next((name for name in lock["compared"] if name.endswith("-cloud-amd64")), None)
    if name is None:
        raise ToolError("tools/image.lock has no cloud kernel; run tools/image.py lock")
    archive = image.package("compared", name, lock)

    def make(folder):
        folder.mkdir()
        rootfs.run("dpkg-deb", "-x", archive, folder, failure="can't unpack Debian's kernel")

    return cached(f"linux-{lock['compared'][name]['sha256'][:16]}", make)


def debian_initramfs(files, unpacked):
    """The guest's root (in `files`) with the drivers of Debian's kernel, as initramfs; a path."""
    parts = (files.name, unpacked.name, image.sha256(GUEST), *DRIVERS, image.code(rootfs, measure))

    def make(folder):
        folder.mkdir()
        root = folder / "root"
        shutil.copytree(files / "root", root, symlinks=True)
        rootfs.put(root / rootfs.ENCLAVE / GUEST.name, GUEST.read_bytes())
        for number, name in enumerate(DRIVERS):
            (module,) = unpacked.rglob(f"{name}.ko")
            rootfs.put(root / rootfs.ENCLAVE / f"{number}-{name}.ko", module.read_bytes())
        manifest = measure.root_manifest(root, "Debian's", debian_command_line())
        rootfs.put(root / measure.MANIFEST, mp.encode_json(manifest))
        rootfs.write_initramfs(root, folder / "rootfs.cpio.zst")
        shutil.rmtree(root)

    return cached(f"rootfs-{image.key(*parts)}", make) / "rootfs.cpio.zst"


def debian_command_line():
    """Ours, but that it takes an initramfs, and starts the file that loads the drivers first."""
    ours = image.COMMAND_LINE.read_text("ascii").strip().replace(" noinitrd", "")
    return ours.replace(f"/{rootfs.ENCLAVE}/muenclave.py", f"/{rootfs.ENCLAVE}/{GUEST.name}")


@contextlib.contextmanager
def powered_on(flags, port, more):
    """A guest from its power-on; yields the lines of its serial port. more: words for QEMU.

    One that takes BOOT_SECONDS is ended.
    """
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="muenclave-")))
        tpm = vm.start_tpm(folder / "state", folder)
        stack.callback(vm.end, tpm)
        command = [str(word) for word in (*vm.command_line(flags, port, folder), *more)]
        quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        options = {"stdout": subprocess.PIPE, "text": True, "errors": "replace"}
        guest = vm.start(command, **quiet, **options)
        stack.callback(vm.end, guest)
        limit = threading.Timer(BOOT_SECONDS, guest.kill)
        stack.callback(limit.cancel)
        limit.start()
        yield guest.stdout


def time_boot(flags, more, reference):
    """(seconds from power-on to the handshake, names of the checks that failed). ToolError."""
    port = vm.free_port()
    began = time.monotonic()
    with powered_on(flags, port, more) as lines:
        last = "nothing"
        for line in lines:
            last = line.strip() or last
            if vm.LISTENING in line:  # behind what the firmware cleared the screen with
                break
        else:
            raise ToolError(f"the guest ended before it listened; it said: {last}")
        failed = set()
        try:
            muproxy.Session(("127.0.0.1", port), reference).close()
        except muproxy.Refusal as refusal:
            failed = {check.name for check in refusal.checks if not check.ok}
        return time.monotonic() - began, failed


def run_boot(flags):
    """The figures of `boot`, a dict. ToolError."""
    lock = image.read_lock()
    unpacked = debian_kernel(lock)
    files = image.build_rootfs(None, lock)
    initramfs = debian_initramfs(files, unpacked)
    (program,) = unpacked.glob("boot/vmlinuz-*")
    (config,) = unpacked.glob("boot/config-*")
    with tempfile.TemporaryDirectory() as folder:
        built = image.build_image("tcp", None, None, pathlib.Path(folder), lock)
        reference = muproxy.read_reference(built / "reference.json")
        facts = {"weights": flags.weights, "extras": None, "gpu": [], "vsock": None}
        facts |= {"firmware": vm.FIRMWARE, "memory": MEMORY, "cpus": CPUS}
        facts |= {"microvm": False, "accelerator": vm.accelerator()}
        append = ("-append", debian_command_line())
        more = {"image": (), "kernel": ("-kernel", built / "muenclave.efi")}
        more["debian"] = ("-kernel", program, "-initrd", initramfs, *append)
        seconds = {name: [] for name in CONTENDERS}
        for number in range(flags.rounds):
            for name, words in more.items():
                say(f"round {number + 1} of {flags.rounds}: {CONTENDERS[name]}")
                disk = built / "esp.img" if name == "image" else None
                machine = types.SimpleNamespace(boot=disk, **facts)
                taken, failed = time_boot(machine, words, reference)
                if name == "image" and failed & PROVED:
                    raise ToolError(f"the guest is not the image: {', '.join(sorted(failed))}")
                seconds[name].append(round(taken, 2))
        ours = reference["image"]
        ours["disk_bytes"] = (built / "esp.img").stat().st_size
        ours["options"] = options_of(built / "kernel.config")
    debian = {"release": program.name.partition("-")[2], "bytes": program.stat().st_size}
    debian |= {"initramfs_bytes": initramfs.stat().st_size, "options": options_of(config)}
    debian["module_files"] = sum(1 for _ in unpacked.rglob("*.ko"))
    return {"seconds": seconds, "ours": ours, "debian": debian, "machine": describe(machine)}


def options_of(path):
    """{"y", "m"}: how many of a kernel's options are built in, and are modules."""
    values = list(kernel.read_options(path.read_text("utf-8")).values())
    return {"y": values.count("y"), "m": values.count("m")}


def describe(machine):
    """What the figures were measured on."""
    told = rootfs.run("qemu-system-x86_64", "--version", failure="QEMU does not run")
    facts = {"qemu": told.splitlines()[0], "accelerator": machine.accelerator}
    facts |= describe_processor()
    return facts | {"guest": {"memory_mib": machine.memory, "cpus": machine.cpus}}


def describe_processor():
    """The processor, and how many of it there are."""
    found = re.search(r"^model name\s*: (.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.M)
    return {"processor": found[1] if found else platform.machine(), "cpus": os.cpu_count()}


def show_boot(figures):
    """Print the figures of `boot`."""
    machine, ours, debian = figures["machine"], figures["ours"], figures["debian"]
    print(f"{machine['processor']}, {machine['cpus']} CPUs; {machine['qemu']}, ", end="")
    print(f"{machine['accelerator']}, {machine['guest']['cpus']} CPUs, ", end="")
    print(f"{machine['guest']['memory_mib']} MiB")
    print("from power-on to handshake, seconds: median (least to most)")
    for name, seconds in figures["seconds"].items():
        median = statistics.median(seconds)
        spread = f"({min(seconds):.1f} to {max(seconds):.1f}, {len(seconds)} rounds)"
        print(f"  {CONTENDERS[name]:34} {median:6.1f} {spread}")
    root, compiled = ours["root"], ours["compiled"]
    print(f"image: {ours['bytes']:,} bytes, of which initramfs {ours['initramfs_bytes']:,}")
    print(f"root: {root['files']} files, {root['elf']} of them ELF, {root['bytes']:,} bytes")
    print(f"kernel {ours['kernel']}: {ours['options']['y']} options, no modules; ", end="")
    print(f"{compiled['lines']:,} lines compiled, in {compiled['files']:,} files")
    print(f"Debian's {debian['release']}: {debian['bytes']:,} bytes, ", end="")
    print(f"{debian['options']['y']} options and {debian['options']['m']} as modules, ", end="")
    print(f"of which {debian['module_files']} files")


# ---------------------------------------------------------------- command line


def boot(flags):
    """`boot`. ToolError, PcrError, MeasureError, Failure, ProtocolError, OSError."""
    if not flags.weights.exists():
        raise ToolError(f"there is no {flags.weights}: name a sealed model by --weights")
    image.prepare()
    environment.install_system(vm.PROGRAMS, say)
    figures = run_boot(flags)
    if flags.json != "-":
        show_boot(figures)
    environment.write_document(flags.json, "bench", {"boot": figures})


def meter(flags):
    """`meter`. ToolError, Failure, ProtocolError, OSError."""
    figures = bench_meter.run_meter(flags, say) | {"machine": describe_processor()}
    if flags.json != "-":
        bench_meter.show_meter(figures)
    environment.write_document(flags.json, "bench", {"verb": "meter", "meter": figures})


def make_parser():
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("boot", help="image size, time to the handshake, kernel lines")
    verb.set_defaults(run=boot)
    verb.add_argument("--weights", type=pathlib.Path, default=WEIGHTS, metavar="FILE")
    add_shared(verb)
    verb = verbs.add_parser("meter", help="tokens a second over the same cap, in three forms")
    verb.set_defaults(run=meter)
    text = "a virtual environment for the tokenizer; it is made if it is not there"
    verb.add_argument("--peers", type=pathlib.Path, metavar="DIR", help=text)
    text = f"the cap, bytes a second ({mp.DEFAULT_RATE})"
    verb.add_argument("--rate", type=vm.whole(64, 1 << 40), default=mp.DEFAULT_RATE, help=text)
    text = "of each form in a round (30)"
    verb.add_argument("--seconds", type=vm.whole(1, bench_meter.LONGEST), default=30, help=text)
    add_shared(verb)
    return parser


def add_shared(verb):
    """The flags of every verb."""
    verb.add_argument("--rounds", type=vm.whole(1, 1000), default=3)
    verb.add_argument("--json", metavar="FILE", help="write all figures there; - prints them")


def main(argv=None):
    """The command line. Returns the exit status."""
    flags = make_parser().parse_args(argv)
    try:
        flags.run(flags)
    except (ToolError, pcr.PcrError, measure.MeasureError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 1
    except (muproxy.Failure, mp.ProtocolError) as error:
        print(f"bench: error: {muproxy.text_of(error)}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"bench: error: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbench: ended", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
