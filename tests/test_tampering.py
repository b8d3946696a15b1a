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
import tempfile
import threading
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from tests import guest, host, network, support, test_proxy
from tests.guest import image, vm

import kernel  # noqa: E402  isort: skip
import rootfs  # noqa: E402  isort: skip

SIDE_BY_SIDE = 2  # guests
OTHER_FIRMWARE = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd"
patching = threading.Lock()  # what is replaced for one image is not for the other
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
    """A byte that nothing depends on: of the text that tells the kernel's version."""
    changed = folder / "one byte"
    changed.mkdir()
    program = bytearray((folder / "image" / "muenclave.efi").read_bytes())
    program[program.index(b" (muenclave@muenclave) ") + 2] ^= 1
    (changed / "muenclave.efi").write_bytes(program)
    image.write_esp(changed / "muenclave.efi", changed / "esp.img")
    return booted(changed)


def built_otherwise(name, **patches):
    """An image that image.py builds with something of its own replaced: {name: value}."""
    changed = folder / name
    with patching, contextlib.ExitStack() as stack:
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
    """With another option, and the same files in it: only the kernel differs."""
    with patching:
        asked = kernel.wanted("tcp") | {"LOG_BUF_SHIFT": "13"}
        objects = image.build_kernel("tcp", image.read_lock())
    patches = {"kernel__wanted": lambda _: dict(asked), "image__build_kernel": lambda *_: objects}
    return built_otherwise("another kernel", **patches)


def an_initrd_beside():
    """-kernel and -initrd: the firmware starts the same unified image, with an initrd of ours."""
    beside = ["-kernel", folder / "image" / "muenclave.efi", "-initrd", evil_archive()]
    return booted(
        folder / "image", lambda command: [*replaced(command, ",bootindex=0", ""), *beside]
    )


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


def another_tpm():
    """The same image on a machine of the host's own."""
    place = pathlib.Path(tempfile.mkdtemp(dir=folder))
    shutil.copy(folder / "image" / "reference.json", place)
    host.enrol_key(place / "tpm", place / "reference.json")
    return booted(folder / "image", tpm=place / "tpm")


OTHER_IMAGE = {"PCR 4", "measurement"}
CHANGES = {  # one change to a boot: the checks that fail
    one_byte_of_the_image: {"PCR 4"},
    another_command_line: OTHER_IMAGE,
    another_kernel: {"PCR 4"},
    an_initrd_beside: {"PCR 1", "PCR 4", "PCR 9", "PCRs at zero"},
    an_initrd_by_a_boot_variable: {"PCR 9", "PCRs at zero"},
    an_option_rom: {"PCR 2"},
    another_firmware: {"PCR 0"},
    another_shape: {"PCR 0"},
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

    def test_without_the_extras_it_is_verified_and_refuses_to_serve(self):
        flags = ["--port", base.port, "--reference", site.reference, "--development"]
        files = ["--key", site.key, "--model", site.model, "--token-file", site.token]
        files += ["--ledger", site.ledger, "--new-ledger"]
        budget = ["--budget", 10_000, "--lifetime-budget", 10_000]
        known = len(base.lines)
        done = support.own("unlock", *flags, *files, *budget, timeout=guest.SECONDS)
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn("the inference engine is not installed in this enclave", done.stderr)
        base.wait_for("muenclave: locked", known)

    def test_unchanged(self):
        self.assertEqual(host.attest(base.port, site.reference), ({}, 0))

    def test_each_change(self):
        for change, expected in CHANGES.items():
            with self.subTest(change.__name__):
                failed, status = self.outcomes[change].result()
                self.assertEqual((failed, status), (expected, 1))


class Quotes(unittest.TestCase):
    """A genuine quote counts for its own session, its own machine and the present image alone."""

    def failed(self, port, **changes):
        """The names of the checks that fail, by reference values with these changes."""
        path = folder / "changed.json"
        path.write_text(json.dumps(json.loads(site.reference.read_text()) | changes))
        failed, status = host.attest(port, path)
        self.assertEqual(status, 1)
        return set(failed)

    def test_replayed(self):
        """What the enclave said in one session, said again in another."""
        said = []

        def edit(side, number, payload):
            if side == "h":
                return [payload]
            said.append(payload)
            return [said[number]]

        for expected in (set(), {"extraData"}):
            with test_proxy.Middle(edit, ("127.0.0.1", base.port)) as middle:
                failed, _ = host.attest(middle.address[1], site.reference)
                self.assertEqual(set(failed), expected)

    def test_relayed_to_another_machine(self):
        """Both machines are real and run our image; the proof of one does not do for the other."""
        with another_tpm() as other:
            other.wait_for("muenclave: locked")
            with test_proxy.Middle(target=("127.0.0.1", other.port)) as middle:
                expected = {"qualifiedSigner", "signature"}
                self.assertEqual(self.failed(middle.address[1]), expected)

    def test_an_old_image(self):
        """Its own values are withdrawn; those of the image that took its place are others."""
        values = json.loads(site.reference.read_text())
        self.assertEqual(self.failed(base.port, withdrawn=[values["measurement"]]), {"withdrawn"})
        later = json.loads((folder / "another command line" / "reference.json").read_text())
        pcrs = values["pcrs"] | {"4": later["pcrs"]["4"]}
        changes = {"measurement": later["measurement"], "pcrs": pcrs}
        self.assertEqual(self.failed(base.port, **changes), OTHER_IMAGE)


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
