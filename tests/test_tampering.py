"""What a host can change about a guest, on real boots: each is refused, and by its own checks.

One image, one TPM and one shape of VM are enrolled; then the same is booted with one thing changed.
The guests of a pair boot side by side, since each takes a while.
"""

import contextlib
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from tests import guest, host, network, support
from tests.guest import image, vm

import kernel  # noqa: E402  isort: skip
import rootfs  # noqa: E402  isort: skip

SIDE_BY_SIDE = 2  # guests
OTHER_FIRMWARE = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd"
site = base = folder = pool = None


def setUpModule():
    """Build the image; boot and enrol it."""
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
    host.enrol_key(folder / "tpm", site.reference)
    base = booted(folder / "image")
    unittest.addModuleCleanup(base.end)
    base.start()
    base.wait_for("muenclave: locked")
    host.enrol_pcrs(base.port, site.reference)


def booted(built, *change, tpm=None, **flags):
    """A host of an image, our weights and our TPM, with one change."""
    return host.Host(built, site.model, tpm or folder / "tpm", *change, **flags)


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
    return booted(changed)


def built_otherwise(name, **patches):
    """An image that image.py builds with something of its own replaced: {name: value}."""
    changed = folder / name
    with contextlib.ExitStack() as stack:
        for patch, value in patches.items():
            module, _, attribute = patch.partition("__")
            stack.enter_context(mock.patch.object(globals()[module], attribute, value))
        image.build_image("tcp", None, None, changed, image.read_lock())
    return booted(changed)


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
    return booted(folder / "image", lambda c: [*c, "-kernel", program, "-initrd", archive])


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
    return booted(folder / "image", change, boot=disk)


def an_option_rom():
    """Code of the network device's own, which the firmware would run."""
    rom = "virtio-net-pci,netdev=net"
    return booted(
        folder / "image", lambda c: [w.removesuffix(",romfile=") if rom in w else w for w in c]
    )


def another_firmware():
    """Another build of the same firmware."""
    return booted(folder / "image", firmware=OTHER_FIRMWARE)


def another_shape():
    """A machine with another amount of memory."""
    return booted(folder / "image", memory=1536)


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


def outcome(change):
    """What muproxy says of a boot with one change: (names of the checks that fail, exit status)."""
    with change() as changed:
        changed.wait_for("muenclave: locked")
        failed, status = host.attest(changed.port, site.reference)
        return set(failed), status


class Boots(unittest.TestCase):
    """Every change to what boots fails the checks that are its own; none is let through."""

    @classmethod
    def setUpClass(cls):
        cls.outcomes = {change: pool.submit(outcome, change) for change in CHANGES}

    def test_unchanged(self):
        self.assertEqual(host.attest(base.port, site.reference), ({}, 0))

    def test_each_change(self):
        for change, expected in CHANGES.items():
            with self.subTest(change.__name__):
                failed, status = self.outcomes[change].result()
                self.assertEqual((failed, status), (expected, 1))


class Outside(unittest.TestCase):
    """What the network sees of the guest, all of its cable in our hands."""

    @classmethod
    def setUpClass(cls):
        cls.cable = network.Cable()
        cls.addClassCleanup(cls.cable.close)
        cls.host = booted(folder / "image", cls.plugged_in)
        cls.addClassCleanup(cls.host.end)
        cls.host.start()
        cls.host.wait_for("muenclave: locked")

    @classmethod
    def plugged_in(cls, command):
        """QEMU's command line, with our cable in the place of its own network."""
        return [cls.cable.options if "user,id=net" in word else word for word in command]

    def test_one_port_answers(self):
        self.assertIsNone(self.cable.receive(2))  # it says nothing before it is asked
        answers = self.cable.scan()
        self.assertEqual(len(answers), 65535)
        opened = {port: flags for port, flags in answers.items() if not flags & network.RST}
        self.assertEqual(opened, {9000: network.SYN | network.ACK})
        kinds = {(network.ARP, None), (network.IP, network.TCP)}
        self.assertEqual(self.cable.seen, kinds)


if __name__ == "__main__":
    unittest.main()
