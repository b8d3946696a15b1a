"""Run the guest: python3 tools/vm.py run --weights FILE.mus

QEMU with nothing but what is named here: the boot disk, the sealed weights, the extras, all
read-only; entropy; a TPM (swtpm); one forwarded port and no way out. KVM where it really works,
else TCG, which is slow. Ctrl-C ends all of it. Standard library only.

swtpm runs on the host that nobody trusts: it stands for a TPM, and is no root of trust.
Exit status: 0 if the guest ended by itself or by Ctrl-C, 1 for an error.
"""

import argparse
import contextlib
import ctypes
import os
import pathlib
import platform
import pty
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tty

import environment
import gpu
from demo_model import cache_folder
from environment import ROOT, ToolError

PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "swtpm": "swtpm",
    "/usr/share/OVMF/OVMF_CODE_4M.fd": "ovmf",
}
FIRMWARE, VARIABLES = (f"/usr/share/OVMF/OVMF_{part}_4M.fd" for part in ("CODE", "VARS"))
IMAGE = ROOT / "build"
GUEST_ADDRESS, GUEST_PORT = "10.0.2.15", 9000
# Emulated AVX makes torch's matrices 20 to 35 times slower than emulated SSE.
PROCESSORS = {"tcg": "Nehalem", "kvm": "host"}
# The order in which the guest finds the disks: /dev/vda, vdb, vdc.
DISKS = (("weights", "0x10"), ("extras", "0x11"), ("boot", "0x12"))
LISTENING = "muenclave: listening"
PROBE_SECONDS, ENDING_SECONDS = 5, 5
# A firmware of five bytes at the reset vector: mov al, 0x10; out 0xf4, al; hlt. QEMU's exit device
# answers with the status (0x10 << 1) | 1.
PROBE = bytes(0xFFF0) + bytes.fromhex("b010e6f4f4") + bytes(11)
PROBE_STATUS = 33
PR_SET_PDEATHSIG = 1


def say(text):
    """A line about what happens."""
    print(f"vm: {text}", flush=True)


# ---------------------------------------------------------------- acceleration


def accelerator(system=pathlib.Path("/")):
    """What a guest really runs under: "kvm" or "tcg". system: the root that /proc lies under."""
    words = (system / "proc/cpuinfo").read_text().split()
    has_extensions = "vmx" in words or "svm" in words
    is_software = (system / "sys/module/kvm_pvm").exists()  # opens, but guests crawl
    if not has_extensions or is_software or not os.access(system / "dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    note = cache_folder() / f"kvm-{platform.node()}-{platform.release()}"
    if not note.exists():
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("kvm" if runs("kvm") else "tcg", "ascii")
    return note.read_text("ascii")


def runs(name):
    """Whether a guest of five bytes ends as it should under this accelerator."""
    with tempfile.TemporaryDirectory() as folder:
        firmware = pathlib.Path(folder, "probe")
        firmware.write_bytes(PROBE)
        command = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-machine", "q35"]
        command += ["-accel", name, "-bios", firmware, "-device", "isa-debug-exit,iobase=0xf4"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS)
        except (subprocess.TimeoutExpired, OSError):
            return False
    return done.returncode == PROBE_STATUS


# ---------------------------------------------------------------- QEMU's command line


def command_line(flags, port, folder):
    """QEMU's command line. port: of 127.0.0.1, forwarded to the guest's. folder: for sockets."""
    accel = flags.accelerator
    command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"]
    command += ["-name", "muenclave", "-display", "none", "-accel", accel]
    command += ["-cpu", PROCESSORS[accel], "-m", str(flags.memory), "-smp", str(flags.cpus)]
    command += ["-chardev", "stdio,id=log,signal=off", "-serial", "chardev:log"]
    command += ["-object", "rng-random,id=entropy,filename=/dev/urandom"]
    if flags.microvm:
        command += microvm(flags)
        bus, options = "device", {}
    else:
        command += measured(flags, folder)
        bus, options = "pci", {"romfile": ""}
    slot = {"bus": "virtio-mmio-bus.0"} if flags.microvm else {}
    command += device(f"virtio-rng-{bus}", rng="entropy", **slot, **options)
    for number, (name, place) in enumerate(DISKS, 1):
        path = getattr(flags, name)
        if path is None or (flags.microvm and name == "boot"):
            continue
        drive = f"if=none,id={name},format=raw,readonly=on,file={escaped(path)}"
        command += ["-drive", drive]
        slot = {"bus": f"virtio-mmio-bus.{number}"} if flags.microvm else {"addr": place}
        if name == "boot":
            slot["bootindex"] = "0"
        command += device(f"virtio-blk-{bus}", drive=name, **slot, **options)
    slot = {"bus": "virtio-mmio-bus.3"} if flags.microvm else {}
    if flags.vsock is not None:
        cid = {"guest-cid": str(flags.vsock)}
        command += device(f"vhost-vsock-{bus}", **cid, **slot, **options)
    else:
        forward = f"hostfwd=tcp:127.0.0.1:{port}-{GUEST_ADDRESS}:{GUEST_PORT}"
        command += ["-netdev", f"user,id=net,restrict=on,ipv6=off,{forward}"]
        command += device(f"virtio-net-{bus}", netdev="net", **slot, **options)
    return command + gpu.arguments(flags.gpu)


def device(name, **options):
    """A device of the command line."""
    return ["-device", ",".join([name, *(f"{key}={value}" for key, value in options.items())])]


def escaped(path):
    """A path as a value in one of QEMU's options, where a comma ends it."""
    return str(path).replace(",", ",,")


def measured(flags, folder):
    """The machine that measures what it boots: q35, OVMF, TPM. Boot variables are not kept."""
    command = ["-machine", "q35,usb=off,vmport=off,smbus=off,sata=off,i8042=off,hpet=off"]
    code = f"if=pflash,unit=0,format=raw,readonly=on,file={escaped(flags.firmware)}"
    variables = f"if=pflash,unit=1,format=raw,snapshot=on,file={VARIABLES}"
    command += ["-drive", code, "-drive", variables]
    command += ["-chardev", f"socket,id=tpm,path={escaped(folder / 'tpm')}"]
    return command + ["-tpmdev", "emulator,id=tpm0,chardev=tpm", *device("tpm-crb", tpmdev="tpm0")]


def microvm(flags):
    """The small machine: no firmware, no PCI, no TPM, so nothing is measured."""
    options = (
        "acpi=off,rtc=on,pit=on,pic=on,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=off"
    )
    command = ["-machine", f"microvm,{options}", "-kernel", str(flags.kernel)]
    return command + ["-append", flags.kernel.with_suffix(".cmdline").read_text("ascii").strip()]


# ---------------------------------------------------------------- running it


def end_with_us():
    """In a child, before it becomes a program: have the kernel end it when this program is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def start(command, **options):
    """Start a program in a session of its own: Ctrl-C is ours, we end it."""
    return subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_us, **options)


def start_tpm(state, folder):
    """Start swtpm with its state in a folder; returns the process. ToolError."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    command = ["swtpm", "socket", "--tpm2", "--terminate", "--tpmstate", f"dir={state}"]
    control = folder / "tpm"
    process = start(
        [*command, "--ctrl", f"type=unixio,path={control}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + ENDING_SECONDS
    while not control.exists():
        if process.poll() is not None or time.monotonic() > until:
            end(process)
            raise ToolError(f"swtpm does not start: {process.stderr.read().strip()}")
        time.sleep(0.01)
    return process


@contextlib.contextmanager
def tpm_device(state):
    """The TPM whose state is in a folder, while no guest runs on it: yields a device's path."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    master, device = pty.openpty()
    tty.setraw(device)
    command = ["swtpm", "chardev", "--tpm2", "--tpmstate", f"dir={state}"]
    command += ["--fd", str(master), "--flags", "startup-clear"]
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    process = start(command, pass_fds=[master], **quiet)
    try:
        yield os.ttyname(device)
    finally:
        end(process)
        os.close(master)
        os.close(device)


def end(*processes):
    """Ask programs to end, then make them."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def follow(console, port, is_shown):
    """Read the guest's serial port to its end; say when it listens, and what it reports."""
    is_known = False
    for line in console:
        text = line.strip()
        if is_shown:
            print(text, flush=True)
        elif text.startswith("muenclave: error:"):
            say(f"the guest says: {text}")
        if not is_known and LISTENING in text:
            is_known = True
            say(f"the guest listens on 127.0.0.1:{port}" if port else "the guest listens")


def run(flags):
    """Run the guest to its end. Returns the exit status. ToolError."""
    port = None if flags.vsock is not None else flags.port or free_port()
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="muenclave-")))
        command = command_line(flags, port, folder)
        if flags.dry_run:
            print(shlex.join(command))
            return 0
        processes = []
        stack.callback(lambda: end(*reversed(processes)))
        if not flags.microvm:
            processes.append(start_tpm(flags.tpm_state or folder / "state", folder))
        if flags.microvm:
            say("nothing is measured in a microvm: it has no TPM, so its evidence can't be tpm2")
        say(f"starting the guest ({flags.accelerator}, {flags.memory} MiB, {flags.cpus} CPUs)")
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "errors": "replace"}
        guest = start(command, stdin=subprocess.DEVNULL, text=True, **options)
        processes.append(guest)
        reader = threading.Thread(
            target=follow, args=(guest.stdout, port, flags.print_console), daemon=True
        )
        reader.start()
        while guest.poll() is None:
            if any(process.poll() is not None for process in processes[:-1]) and wait(guest):
                raise ToolError("swtpm has ended, so the guest is ended")
            with contextlib.suppress(subprocess.TimeoutExpired):
                guest.wait(0.5)
        reader.join(ENDING_SECONDS)
        if guest.returncode:
            told = guest.stderr.read().strip().splitlines() or [f"status {guest.returncode}"]
            raise ToolError(f"QEMU failed: {told[-1]}")
    say("the guest has ended")
    return 0


def wait(guest):
    """Whether the guest is still there a moment after its TPM has gone (they end together)."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        guest.wait(1)
    return guest.poll() is None


def free_port():
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


# ---------------------------------------------------------------- command line


def check(flags):
    """Fill in what was left out; refuse what can't work. ToolError."""
    environment.install_system(PROGRAMS, say)
    missing = environment.missing_packages(PROGRAMS)
    if missing:
        raise ToolError(f"not installed, and needed: apt-get install {' '.join(missing)}")
    flags.kernel = flags.image / "microvm.bin"
    flags.boot = flags.image / "esp.img"
    extras = flags.image / "extras.squashfs"
    if flags.extras is None and extras.exists():
        flags.extras = extras
    for path in (flags.kernel if flags.microvm else flags.boot, flags.weights, flags.extras):
        if path is not None and not path.exists():
            step = "image --microvm" if path == flags.kernel else "all"
            raise ToolError(f"there is no {path}; the image is built by tools/image.py {step}")
    if flags.vsock is not None and not os.path.exists("/dev/vhost-vsock"):
        raise ToolError("this host has no vsock: modprobe vhost_vsock")
    if flags.gpu and flags.microvm:
        raise ToolError("a GPU needs PCI, which the microvm has not: leave out --microvm")
    problems = gpu.problems(flags.gpu, flags.memory, flags.sysfs)
    if problems:
        raise ToolError("the GPU can't be given to the guest:\n  " + "\n  ".join(problems))
    flags.accelerator = flags.accelerator or accelerator()


def whole(least, most):
    """A parser of whole numbers from least to most."""

    def parse(text):
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
        return int(text)

    return parse


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="vm.py", description=__doc__.split("\n")[0])
    runner = parser.add_subparsers(dest="verb", required=True).add_parser("run", help="run it")
    file = {"type": pathlib.Path, "metavar": "FILE"}
    runner.add_argument("--image", type=pathlib.Path, default=IMAGE, metavar="DIR", help="built")
    runner.add_argument("--weights", required=True, help="the sealed model (.mus)", **file)
    runner.add_argument("--extras", help="default: the image's, if it has any", **file)
    runner.add_argument("--firmware", default=FIRMWARE, help="OVMF's code", **file)
    runner.add_argument("--port", type=whole(1, 65535), help="of 127.0.0.1; default: a free one")
    runner.add_argument("--memory", type=whole(256, 1 << 24), default=2048, metavar="MIB")
    runner.add_argument("--cpus", type=whole(1, 64), default=2)
    runner.add_argument("--tpm-state", type=pathlib.Path, metavar="DIR", help="kept; default: new")
    runner.add_argument("--accelerator", choices=PROCESSORS, help="default: what works")
    runner.add_argument("--gpu", action="append", default=[], metavar="BDF", help="repeatable")
    runner.add_argument("--sysfs", default="/sys", help=argparse.SUPPRESS, **file)
    runner.add_argument("--vsock", type=whole(3, 2**32 - 2), metavar="CID", help="instead of TCP")
    runner.add_argument("--microvm", action="store_true", help="small, fast, and not measured")
    runner.add_argument("--print-console", action="store_true", help="show the serial port")
    runner.add_argument("--dry-run", action="store_true", help="print QEMU's command line")
    flags = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        check(flags)
        return run(flags)
    except ToolError as error:
        print(f"vm: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"vm: error: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nvm: ended", file=sys.stderr)
        return 0


if __name__ == "__main__":
    sys.exit(main())
