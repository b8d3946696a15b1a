"""The image's size, and the time from power-on to the handshake, for tools/bench.py boot: ours from
its disk, our kernel by QEMU's -kernel, and Debian's cloud kernel by -kernel with the same root file
system, drivers added, as -initrd; all on the same machine, in turns.
"""

import contextlib
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types

import bench_shared as shared
import environment
import image
import kernel
import measure
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


def run_boot(flags, say):
    """The figures of `boot`, a dict. ToolError, PcrError, MeasureError, Failure, ProtocolError."""
    if not flags.weights.exists():
        raise ToolError(f"there is no {flags.weights}: name a sealed model by --weights")
    image.prepare()
    environment.install_system(vm.PROGRAMS, say)
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
    facts |= shared.describe_processor()
    return facts | {"guest": {"memory_mib": machine.memory, "cpus": machine.cpus}}


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
