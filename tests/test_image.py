"""The guest's image: kernel options, root file system, prediction, reproducibility."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import unittest

from tests import guest, support

sys.path.insert(0, str(support.TOOLS))

import image  # noqa: E402
import kernel  # noqa: E402
import pcr  # noqa: E402
import rootfs  # noqa: E402

NEEDED = f"not installed: {' '.join(guest.MISSING)}"
IMAGE = [sys.executable, str(support.TOOLS / "image.py")]


@unittest.skipIf(guest.MISSING, NEEDED)
class Kernel(unittest.TestCase):
    """Fragments against what Kconfig makes of them, on the real source."""

    @classmethod
    def setUpClass(cls):
        cls.source = image.kernel_source(image.read_lock())

    def resolve(self, options):
        with tempfile.TemporaryDirectory() as folder:
            source = {"INITRAMFS_SOURCE": kernel.quoted(folder), "CMDLINE": '"noinitrd"'}
            return kernel.resolve(self.source, pathlib.Path(folder), options | source)

    def test_every_variant_is_what_was_asked_for(self):
        for variant in kernel.VARIANTS:
            with self.subTest(variant=variant):
                final = self.resolve(kernel.wanted(variant))
                has_modules = "m" in final.values() or final.get("MODULES") == "y"
                self.assertEqual(has_modules, variant == "gpu")
                self.assertEqual(final.get("INET", "n"), "n" if variant == "vsock" else "y")

    def test_what_has_no_place_in_the_guest(self):
        final = self.resolve(kernel.wanted("tcp"))
        for name in """MODULES KALLSYMS BPF_SYSCALL IO_URING USER_NS NAMESPACES SWAP USB_SUPPORT VT
            SERIAL_8250_CONSOLE DEVMEM IPV6 PACKET NETFILTER KEXEC DEBUG_FS BINFMT_SCRIPT
            SUNRPC WIRELESS VIRTIO_CONSOLE ETHERNET INPUT HIBERNATION X86_MSR FTRACE IP_PNP_DHCP
            IP_PNP_BOOTP IP_PNP_RARP""".split():
            self.assertEqual(final.get(name, "n"), "n", name)
        for name in """LOCK_DOWN_KERNEL_FORCE_CONFIDENTIALITY SECURITY_YAMA STRICT_KERNEL_RWX
            PAGE_TABLE_ISOLATION RETPOLINE INIT_ON_FREE_DEFAULT_ON CMDLINE_OVERRIDE""".split():
            self.assertEqual(final[name], "y", name)

    def test_an_option_that_vanishes_is_an_error(self):
        for option in ("NO_SUCH_OPTION", "MODULE_SIG", "KGDB_KDB"):
            with self.assertRaisesRegex(kernel.ToolError, f"CONFIG_{option}: wanted y"):
                self.resolve(kernel.wanted("tcp") | {option: "y"})

    def test_an_option_that_another_one_selects_is_an_error(self):
        with self.assertRaisesRegex(kernel.ToolError, "CONFIG_CRYPTO: wanted n, got y"):
            self.resolve(kernel.wanted("tcp") | {"CRYPTO": "n"})


class Options(unittest.TestCase):
    """Reading and comparing options."""

    def test_read(self):
        text = '# a comment\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C="x=y # z"\n#CONFIG_D=y\n'
        expected = {"A": "y", "B": "n", "C": '"x=y # z"'}
        self.assertEqual(kernel.read_options(text), expected)
        self.assertEqual(kernel.read_options(kernel.write_options(expected)), expected)

    def test_differences(self):
        asked = {"A": "y", "B": "n", "RETPOLINE": "y", "MITIGATION_RETPOLINE": "y", "C": "64"}
        for final in ({"RETPOLINE": "y"}, {"MITIGATION_RETPOLINE": "y"}):
            self.assertEqual(kernel.differences(asked, {"A": "y", "C": "64"} | final), [])
        wrong = kernel.differences(asked, {"B": "y", "C": "8"})
        self.assertEqual([line.split(":")[0] for line in wrong], [f"CONFIG_{n}" for n in asked])

    def test_quoted(self):
        self.assertEqual(kernel.quoted('a "b c" \\'), '"a \\"b c\\" \\\\"')

    def test_fragments_say_nothing_twice_that_differs(self):
        for path in kernel.FRAGMENTS.glob("*.fragment"):
            names = re.findall(r"^(?:# )?CONFIG_(\w+)[ =]", path.read_text("utf-8"), re.MULTILINE)
            self.assertEqual(len(names), len(set(names)), path.name)


@unittest.skipIf(guest.MISSING, NEEDED)
class Root(unittest.TestCase):
    """The root file system, as it goes into the kernel."""

    @classmethod
    def setUpClass(cls):
        subprocess.run([*IMAGE, "rootfs"], check=True, capture_output=True)
        cls.folder = image.build_rootfs(None, image.read_lock())
        place = tempfile.TemporaryDirectory()
        cls.addClassCleanup(place.cleanup)
        archive = pathlib.Path(place.name, "rootfs.cpio.zst")
        rootfs.write_initramfs(cls.folder / "root", archive)
        cls.archive = subprocess.run(
            ["zstd", "-dc", archive], check=True, capture_output=True
        ).stdout
        listing = subprocess.run(
            ["cpio", "--list", "--verbose", "--numeric-uid-gid", "--quiet"],
            input=cls.archive,
            check=True,
            capture_output=True,
        )
        rows = [row.split(None, 8) for row in listing.stdout.decode().splitlines()]
        cls.entries = {row[8].split(" -> ")[0]: row for row in rows}
        cls.files = [path for path in cls.folder.rglob("root/**/*") if path.is_file()]

    def test_cpio_reads_what_we_wrote(self):
        root = self.folder / "root"
        paths = {path.relative_to(root).as_posix() for path in root.rglob("*")}
        self.assertEqual(set(self.entries), paths)
        self.assertEqual(list(self.entries), sorted(paths))
        self.assertEqual({(row[2], row[3]) for row in self.entries.values()}, {("0", "0")})

    def test_modes(self):
        allowed = {"drwxr-xr-x", "-rw-r--r--", "-rwxr-xr-x", "lrwxrwxrwx"}
        self.assertLessEqual({row[0] for row in self.entries.values()}, allowed)
        programs = {name for name, row in self.entries.items() if row[0] == "-rwxr-xr-x"}
        self.assertEqual(programs, {"usr/bin/python3.11", "usr/lib64/ld-linux-x86-64.so.2"})

    def test_no_shell_and_no_package_manager(self):
        names = {pathlib.PurePath(name).name for name in self.entries}
        tools = "sh bash dash ash busybox env login getty sshd apt dpkg pip mount ip".split()
        self.assertEqual(names & set(tools), set())
        scripts = [path for path in self.files if path.read_bytes()[:2] == b"#!"]
        self.assertEqual([path for path in scripts if path.stat().st_mode & 0o111], [])

    def test_only_the_engine_sees_the_extras(self):
        root = self.folder / "root"
        command = [root / "usr/lib64/ld-linux-x86-64.so.2", "--library-path"]
        command += [root / rootfs.LIBRARIES, root / "usr/bin/python3.11", "-B"]
        command += ["-c", "import sys, ctypes, cryptography; print(sys.path)"]
        for role, is_seen in (("--init", False), ("--gate", False), ("--engine", True)):
            home = {"PYTHONHOME": str(root / "usr")}
            done = subprocess.run([*command, role], env=home, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(f"/{rootfs.EXTRAS}'" in done.stdout, is_seen, role)

    def test_cpio_of_a_small_tree(self):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder, "root")
            (root / "b").mkdir(parents=True)
            (root / "b/x").write_bytes(b"abc")
            (root / "a").symlink_to("b/x")
            with open(f"{folder}/cpio", "w+b") as file:
                rootfs.write_cpio(root, file)
                file.seek(0)
                data = file.read()
            other = pathlib.Path(folder, "other")
            other.mkdir()
            command = ["cpio", "--extract", "--quiet", "--no-preserve-owner"]
            subprocess.run(command, input=data, cwd=other, check=True, capture_output=True)
            self.assertEqual((other / "a").read_bytes(), b"abc")
            self.assertTrue((other / "a").is_symlink())
            self.assertTrue(stat.S_ISDIR((other / "b").stat().st_mode))


class Lock(unittest.TestCase):
    """Packages are what the lock file says, or nothing is built."""

    def image(self, lock, *arguments):
        with tempfile.TemporaryDirectory() as folder:
            tools = pathlib.Path(folder, "tools")
            shutil.copytree(support.TOOLS, tools)
            shutil.copytree(support.ROOT / "br_external", pathlib.Path(folder, "br_external"))
            for name in ("muenclave.py", "muprotocol.py"):
                shutil.copy(support.ROOT / name, folder)
            (tools / "image.lock").write_text(lock)
            with guest.another_cache() as environment:
                done = subprocess.run(
                    [sys.executable, tools / "image.py", *arguments],
                    env=environment,
                    capture_output=True,
                    text=True,
                )
        self.assertRegex(done.stderr.splitlines()[-1], r"^image: error: ")
        self.assertNotIn("Traceback", done.stderr)
        self.assertEqual(done.returncode, 1)
        return done.stderr

    @unittest.skipIf(guest.MISSING, NEEDED)
    def test_another_hash_and_a_version_that_is_gone(self):
        lock = image.read_lock()
        lock["debian"]["libc6"]["sha256"] = "00" * 32
        self.assertIn("is not what tools/image.lock pins", self.image(json.dumps(lock), "rootfs"))
        lock["debian"]["libc6"]["version"] = "1.0"
        self.assertIn("the archive has moved: libc6", self.image(json.dumps(lock), "rootfs"))
        del lock["debian"]["libc6"]
        self.assertIn("has no libc6", self.image(json.dumps(lock), "rootfs"))

    @unittest.skipIf(guest.MISSING, NEEDED)
    def test_no_lock_file(self):
        self.assertIn("is no lock file", self.image("{", "rootfs"))

    def test_every_pin_is_whole(self):
        for kind, pins in image.read_lock().items():
            for name, pin in pins.items():
                self.assertRegex(pin["sha256"], "^[0-9a-f]{64}$", f"{kind} {name}")
                self.assertTrue(pin["version"])


def small_program(text=b"\xc3", certificates=b""):
    """An EFI program of one section, with what the digest leaves out set to ones."""
    headers = bytearray(0x400)
    headers[:2], headers[0x3C:0x40] = b"MZ", struct.pack("<I", 0x80)
    struct.pack_into("<4sHHIIIHH", headers, 0x80, b"PE\0\0", 0x8664, 1, 0, 0, 0, 240, 0x22)
    optional = 0x98
    struct.pack_into("<H", headers, optional, pcr.PE32_PLUS)
    struct.pack_into("<II", headers, optional + 32, 0x1000, 0x200)
    struct.pack_into("<II", headers, optional + 56, 0x2000, 0x400)
    struct.pack_into("<I", headers, optional + pcr.CHECKSUM, 0xFFFFFFFF)
    struct.pack_into("<I", headers, optional + pcr.DIRECTORIES - 4, 16)
    code = text.ljust(0x200, b"\0")
    if certificates:
        place = (0x400 + len(code), len(certificates))
        struct.pack_into("<II", headers, optional + pcr.CERTIFICATES, *place)
    section = struct.pack("<8sIIII", b".text", len(text), 0x1000, len(code), 0x400)
    headers[optional + 240 : optional + 240 + len(section)] = section
    return bytes(headers) + code + certificates


class Prediction(unittest.TestCase):
    """PCR 4 from the file."""

    # By `pesign --hash` of pesign 0.112.
    KNOWN = "41b4a7bb34d40d95be6160ef5c248c65d513a719e9b657784e912292cc804dea"

    def test_known_answer(self):
        self.assertEqual(pcr.authenticode(small_program()).hex(), self.KNOWN)

    def test_checksum_and_certificates_do_not_count(self):
        signed = small_program(certificates=bytes(range(64)))
        self.assertEqual(pcr.authenticode(signed).hex(), self.KNOWN)
        self.assertNotEqual(pcr.authenticode(small_program(b"\x90\xc3")).hex(), self.KNOWN)

    @unittest.skipUnless(shutil.which("pesign"), "not installed: pesign")
    def test_pesign_agrees(self):
        for data in (small_program(), small_program(b"abc")):
            with tempfile.NamedTemporaryFile() as file:
                file.write(data)
                file.flush()
                command = ["pesign", "--hash", "--in", file.name]
                told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            self.assertIn(pcr.authenticode(data).hex(), told)

    def test_every_byte_but_those(self):
        program = small_program()
        optional = 0x98
        outside = {optional + pcr.CHECKSUM + n for n in range(4)}
        outside |= {optional + pcr.CERTIFICATES + n for n in range(8)}
        for offset in range(0x200, len(program), 7):
            changed = bytearray(program)
            changed[offset] ^= 1
            self.assertNotEqual(pcr.authenticode(bytes(changed)).hex(), self.KNOWN, offset)
        changed = bytearray(program)
        for offset in sorted(outside)[:8]:  # the last four give the certificates' size
            changed[offset] ^= 1
        self.assertEqual(pcr.authenticode(bytes(changed)).hex(), self.KNOWN)

    def test_extend(self):
        one = hashlib.sha256(bytes(32) + b"a" * 32).digest()
        self.assertEqual(pcr.extended(b"a" * 32), one)
        two = hashlib.sha256(one + b"b" * 32).digest()
        self.assertEqual(pcr.extended(b"a" * 32, b"b" * 32), two)
        self.assertEqual(pcr.predict(small_program())[9], bytes(32))

    def test_no_program(self):
        for data in (b"", b"MZ", bytes(4096), small_program()[:0x90], b"\x7fELF" + bytes(4096)):
            with self.assertRaisesRegex(pcr.PcrError, "no EFI program"):
                pcr.predict(data)


@unittest.skipIf(guest.MISSING, NEEDED)
class Reproducible(unittest.TestCase):
    """Two builds, in two places, are the same bits."""

    def test_image(self):
        flags = ["image", *guest.PRODUCT, "--output"]
        with tempfile.TemporaryDirectory() as folder:
            one, two = pathlib.Path(folder, "one"), pathlib.Path(folder, "a/longer/path")
            done = subprocess.run([*IMAGE, *flags, one], capture_output=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            with guest.another_cache("packages", "linux-*", "kernel-*") as environment:
                done = subprocess.run([*IMAGE, *flags, two], env=environment, capture_output=True)
                self.assertEqual(done.returncode, 0, done.stderr)
            for name in sorted(path.name for path in one.iterdir()):
                self.assertEqual(image.sha256(one / name), image.sha256(two / name), name)
            self.assertEqual(sorted(os.listdir(one)), sorted(os.listdir(two)))
            self.check(one)

    def check(self, folder):
        """What the reference values say, and that the disk holds the program."""
        values = json.loads((folder / "reference.json").read_text())
        program = (folder / "muenclave.efi").read_bytes()
        self.assertEqual(values["pcrs"]["4"], pcr.predict(program)[4].hex())
        self.assertEqual(values["pcrs"]["9"], "00" * 32)
        self.assertEqual(values["image"]["bytes"], len(program))
        manifest = (folder / "manifest.json").read_bytes()
        self.assertEqual(values["measurement"], hashlib.sha256(manifest).hexdigest())
        self.assertEqual(json.loads(manifest)["command_line"], values["image"]["command_line"])
        self.assertGreater(values["image"]["compiled"]["lines"], 500_000)
        command = ["mcopy", "-i", folder / "esp.img", f"::{image.BOOT_FILE}", "-"]
        on_disk = subprocess.run(command, check=True, capture_output=True).stdout
        self.assertEqual(hashlib.sha256(on_disk).digest(), hashlib.sha256(program).digest())
        final = kernel.read_options((folder / "kernel.config").read_text())
        self.assertEqual(final["CMDLINE"], kernel.quoted(values["image"]["command_line"]))
        self.assertIn(" noinitrd ", final["CMDLINE"])


class Enrolment(unittest.TestCase):
    """What an owner has added to the reference values outlives the next build."""

    NEW = {"kind": "tpm2", "root": "fixture", "pcrs": {"4": "44", "9": "00"}, "withdrawn": []}

    def after(self, old):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            if old is not None:
                (folder / "reference.json").write_text(json.dumps(old))
            return image.with_enrolment(self.NEW, folder)

    def test_first_build(self):
        self.assertEqual(self.after(None), self.NEW)
        self.assertEqual(self.after(self.NEW), self.NEW)

    def test_same_image(self):
        old = self.NEW | {"root": "ek:CN=x", "attestation_key": "ab", "event_log": "cd"}
        old |= {"withdrawn": ["ee"], "pcrs": self.NEW["pcrs"] | {"0": "11"}}
        self.assertEqual(self.after(old), old)

    def test_another_image(self):
        old = {"root": "ek:CN=x", "attestation_key": "ab", "event_log": "cd", "withdrawn": ["ee"]}
        old |= {"kind": "tpm2", "pcrs": {"0": "11", "4": "old", "9": "00"}}
        kept = {"root": "ek:CN=x", "attestation_key": "ab", "withdrawn": ["ee"]}
        expected = self.NEW | kept | {"pcrs": {"0": "11", "4": "44", "9": "00"}}
        self.assertEqual(self.after(old), expected)

    def test_a_file_that_is_something_else(self):
        with self.assertRaisesRegex(image.measure.MeasureError, "holds no reference values"):
            self.after([])


if __name__ == "__main__":
    unittest.main()
