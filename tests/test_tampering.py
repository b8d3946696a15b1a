"""What a host can change about a guest, on real boots: each is refused, and by its own checks.

One image, one TPM and one shape of VM are enrolled; then the same is booted with one thing changed.
The guests of a pair boot side by side, since each takes a while.
"""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import types
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import muprotocol as mp
import muproxy
from tests import guest, support
from tests.guest import image, vm

import kernel  # noqa: E402  isort: skip
import rootfs  # noqa: E402  isort: skip

ALWAYS = set()
SIDE_BY_SIDE = 2  # guests
MEMORY, CPUS = 1024, 1  # of the shape that is enrolled
OTHER_FIRMWARE = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd"
site = base = folder = pool = None


def setUpModule():
    """Build the image and the changed ones; boot and enrol the first; start to boot the others."""
    global site, base, folder, pool
    if guest.MISSING:
        raise unittest.SkipTest(f"not installed: {' '.join(guest.MISSING)}")
    holder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(holder.cleanup)
    folder = pathlib.Path(holder.name)
    site = support.make_site(folder)
    pool = ThreadPoolExecutor(SIDE_BY_SIDE)
    unittest.addModuleCleanup(pool.shutdown, cancel_futures=True)
    guest.build(folder / "image", "--no-extras")
    site.reference = folder / "tpm2.json"
    shutil.copy(folder / "image" / "reference.json", site.reference)
    enrol_key(folder / "tpm", site.reference)
    base = Host(folder / "image")
    unittest.addModuleCleanup(base.end)
    base.start()
    enrol_pcrs(base.port, site.reference)


def run_enroll(reference, *arguments):
    """Run tools/enroll.py on a file of reference values."""
    command = [sys.executable, support.TOOLS / "enroll.py", reference, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def enrol_key(state, reference):
    """Make a TPM, whose state stays in a folder, and enrol its attestation key."""
    state.mkdir()
    port, control = vm.free_port(), vm.free_port()
    command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}"]
    command += ["--server", f"type=tcp,port={port},disconnect"]
    command += ["--ctrl", f"type=tcp,port={control}", "--flags", "not-need-init,startup-clear"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as tpm:
        try:
            assert guest.wait_until(lambda: is_open(control))
            run_enroll(reference, "--tpm", f"127.0.0.1:{port}")
        finally:
            tpm.terminate()


def is_open(port):
    """Whether somebody listens on a port of 127.0.0.1."""
    with pathlib.Path("/proc/net/tcp").open() as table:
        return any(line.split()[1] == f"0100007F:{port:04X}" for line in table)


def enrol_pcrs(port, reference):
    """Enrol the PCRs of a guest that runs."""
    run_enroll(reference, "--enclave", f"127.0.0.1:{port}")


class Host:
    """A host that boots what it likes: our image and TPM, with one change; ends all of it.

    change: gets QEMU's command line, a list of words, and returns another one.
    """

    def __init__(self, built, change=lambda command: command, **flags):
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=folder))
        self.state = self.folder / "state"
        shutil.copytree(folder / "tpm", self.state)
        facts = {"weights": site.model, "extras": None, "boot": built / "esp.img", "gpu": []}
        facts |= {"firmware": vm.FIRMWARE, "memory": MEMORY, "cpus": CPUS, "vsock": None}
        facts |= {"microvm": False, "accelerator": "tcg", "kernel": None}
        self.flags, self.change = types.SimpleNamespace(**facts | flags), change
        self.processes, self.lines, self.port = [], [], vm.free_port()

    def start(self):
        """Boot it, and wait until its gate listens."""
        self.processes.append(vm.start_tpm(self.state, self.folder))
        command = self.change(vm.command_line(self.flags, self.port, self.folder))
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
        streams |= {"stderr": subprocess.STDOUT, "errors": "replace"}
        self.processes.append(vm.start(list(map(str, command)), **streams))
        stuck = threading.Timer(guest.SECONDS, self.end)
        stuck.start()
        with contextlib.closing(self.processes[-1].stdout) as lines:
            for line in lines:
                self.lines.append(line.strip())
                if "muenclave: locked" in line:
                    break
            else:
                raise AssertionError(f"the guest did not start: {self.lines}")
            stuck.cancel()
            threading.Thread(
                target=self._drain, args=(os.dup(lines.fileno()),), daemon=True
            ).start()
        return self

    def _drain(self, descriptor):
        with open(descriptor, errors="replace") as lines:
            self.lines += [line.strip() for line in lines]

    def end(self):
        """End QEMU and the TPM."""
        vm.end(*reversed(self.processes))


# ---------------------------------------------------------------- what a host may change


def replaced(command, old, new):
    """A command line with a piece of text replaced, wherever it stands. AssertionError."""
    changed = [str(word).replace(str(old), str(new)) for word in command]
    assert changed != list(map(str, command)), f"no {old} in {command}"
    return changed


def evil_archive():
    """An initramfs that would break the guest if it took effect: its gate would not start."""
    root = folder / "evil"
    rootfs.put(root / rootfs.ENCLAVE / "muprotocol.py", b"raise SystemExit('evil')\n")
    path = folder / "evil.cpio"
    with open(path, "wb") as file:
        rootfs.write_cpio(root, file)
    return path


def one_byte_of_the_image():
    """A byte that nothing depends on: of the text for machines that can't boot it."""
    changed = folder / "one byte"
    changed.mkdir()
    program = bytearray((folder / "image" / "muenclave.efi").read_bytes())
    at = program.index(b"Use a boot loader")
    program[at] ^= 1
    (changed / "muenclave.efi").write_bytes(program)
    image.write_esp(changed / "muenclave.efi", changed / "esp.img")
    return Host(changed)


def built_otherwise(name, **patches):
    """An image that image.py builds with something of its own replaced: {name: value}."""
    changed = folder / name
    with contextlib.ExitStack() as stack:
        for patch, value in patches.items():
            module, _, attribute = patch.partition("__")
            stack.enter_context(mock.patch.object(globals()[module], attribute, value))
        image.build_image("tcp", None, None, changed, image.read_lock())
    return Host(changed)


def another_command_line():
    """Memory that is not initialised: a hardening option less."""
    path = folder / "cmdline"
    path.write_text("init_on_alloc=0 " + image.COMMAND_LINE.read_text("ascii"))
    return built_otherwise("another command line", image__COMMAND_LINE=path)


def another_kernel():
    """The same code with another option, so that only the kernel differs."""
    asked = kernel.wanted("tcp") | {"LOCALVERSION": '"-other"'}
    objects = image.build_kernel("tcp", image.read_lock())
    with mock.patch.object(image, "build_kernel", lambda *_: objects):
        return built_otherwise("another kernel", kernel__wanted=lambda _: dict(asked))


def an_initrd_beside():
    """-kernel and -initrd: the firmware starts the same unified image, with an initrd of ours."""
    program, archive = folder / "image" / "muenclave.efi", evil_archive()
    return Host(folder / "image", lambda c: [*c, "-kernel", program, "-initrd", archive])


def an_initrd_by_a_boot_variable():
    """A boot variable whose load options name an initrd that lies beside the image on its disk."""
    from virt.firmware.efi import devpath, ucs16
    from virt.firmware.varstore import edk2

    disk, variables = folder / "evil.img", folder / "variables"
    shutil.copy(folder / "image" / "esp.img", disk)
    evil = ["mcopy", "-i", disk, evil_archive(), "::evil.cpio"]
    subprocess.run(list(map(str, evil)), check=True, env=os.environ | {"MTOOLS_SKIP_CHECK": "1"})
    store = edk2.Edk2VarStore(vm.VARIABLES)
    known, path = store.get_varlist(), devpath.DevicePath.filepath(r"\EFI\BOOT\BOOTX64.EFI")
    known.set_boot_entry(0x99, "evil", path, bytes(ucs16.from_string(r"initrd=\evil.cpio")))
    known.set_boot_next(0x99)
    store.write_varstore(str(variables), known)
    change = lambda command: replaced(command, vm.VARIABLES, variables)  # noqa: E731
    return Host(folder / "image", change, boot=disk)


def an_option_rom():
    """Code of the network device's own, which the firmware would run."""
    rom = "virtio-net-pci,netdev=net"
    return Host(
        folder / "image", lambda c: [w.removesuffix(",romfile=") if rom in w else w for w in c]
    )


def another_firmware():
    """Another build of the same firmware."""
    return Host(folder / "image", firmware=OTHER_FIRMWARE)


def another_shape():
    """A machine with another amount of memory."""
    return Host(folder / "image", memory=MEMORY + 512)


CHANGES = {  # what differs: what it makes fail, beside what follows from it in every boot
    one_byte_of_the_image: set(),
    another_command_line: set(),
    another_kernel: set(),
    an_initrd_beside: set(),
    an_initrd_by_a_boot_variable: set(),
    an_option_rom: set(),
    another_firmware: set(),
    another_shape: set(),
}


def attest(port, reference=None):
    """(names of the checks that failed, exit status) of muproxy attest."""
    flags = ["--port", port, "--reference", reference or site.reference, "--json"]
    done = support.proxy("attest", *flags, "--role", "owner")
    checks = json.loads(done.stdout)["checks"]
    return {check["name"] for check in checks if not check["ok"]}, done.returncode


def outcome(change):
    """What muproxy says of a boot with one change."""
    host = change()
    try:
        host.start()
        return attest(host.port)
    finally:
        host.end()


class Boots(unittest.TestCase):
    """Every change to what boots fails the checks that are its own; none is let through."""

    @classmethod
    def setUpClass(cls):
        cls.outcomes = {change: pool.submit(outcome, change) for change in CHANGES}

    def test_unchanged(self):
        self.assertEqual(attest(base.port), (set(), 0))

    def test_each_change(self):
        for change, expected in CHANGES.items():
            with self.subTest(change.__name__):
                failed, status = self.outcomes[change].result()
                self.assertEqual((failed, status), (expected, 1))


if __name__ == "__main__":
    unittest.main()
