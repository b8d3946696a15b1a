"""What hardens the guest: its kernel's options, its programs, its files, its processes' mappings.

tools/hardening.json says how it is; here it is shown that it is so, and that no change goes unseen.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

from tests import guest, support
from tests import test_confinement as confinement

sys.path.insert(0, str(support.TOOLS))

import hardening  # noqa: E402
import image  # noqa: E402
import kernel  # noqa: E402
import rootfs  # noqa: E402

NEEDED = f"not installed: {' '.join(guest.MISSING)}"
PROGRAM = [sys.executable, "-B", support.TOOLS / "hardening.py"]
# Series: its source in tools/image.lock, the variants that are built of it, and how many of the 241
# recommended options a kernel with TCP holds at least. kernel-hardening-checker counts 216 and 236
# of 259: it also asks for names that neither series has.
KERNELS = {
    "6.1": ("debian", image.KERNEL_SOURCE, "tcp vsock gpu", 208),
    "6.12": ("compared", image.COMPARED_SOURCE, "tcp gpu", 219),
}
RWX = """
import mmap, sys
both = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
print("there", flush=True)
sys.stdin.read()
"""


def temporary_folder(case):
    """A folder that goes when the test case, or its class, is done."""
    folder = tempfile.TemporaryDirectory()
    add = case.addClassCleanup if isinstance(case, type) else case.addCleanup
    add(folder.cleanup)
    return pathlib.Path(folder.name)


@unittest.skipIf(guest.MISSING, NEEDED)
class Options(unittest.TestCase):
    """The kernel's options, as Kconfig resolves them, of every variant and both series."""

    @classmethod
    def setUpClass(cls):
        cls.rules = hardening.read_record()["options"]
        cls.folder, cls.sources, cls.paths = temporary_folder(cls), {}, {}
        lock = image.read_lock()
        for series, (kind, name, variants, _) in KERNELS.items():
            cls.sources[series] = image.kernel_source(lock, kind, name)
            for variant in variants.split():
                build = cls.folder / f"{series}-{variant}"
                options = {"CMDLINE": '"x"', "INITRAMFS_SOURCE": kernel.quoted(str(cls.folder))}
                kernel.resolve(cls.sources[series], build, kernel.wanted(variant) | options)
                cls.paths[series, variant] = build / ".config"

    def test_no_option_got_worse(self):
        for (series, variant), path in self.paths.items():
            with self.subTest(series=series, variant=variant):
                changes = hardening.kernel_changes(path.read_text(), variant, self.rules)
                self.assertEqual(changes, [])

    def test_as_many_as_ever_are_held(self):
        """The record itself can't get worse."""
        for series, (*_, least) in KERNELS.items():
            options = kernel.read_options(self.paths[series, "tcp"].read_text())
            held = sum(hardening.is_held(rule, options) for rule in self.rules)
            self.assertGreaterEqual(held, least, series)

    def test_every_change_is_found(self):
        """Each rule, turned round in a configuration, is a line of its own."""
        text = self.paths["6.1", "tcp"].read_text()
        options = kernel.read_options(text)
        for rule in self.rules:
            names = {rule["option"], rule.get("or", rule["option"])}
            is_held = hardening.is_held(rule, options)
            spoilt = options | dict.fromkeys(names, "m" if is_held else rule["wanted"])
            if "only_with" in rule:
                spoilt[rule["only_with"]] = "y"
            spoilt = f"# Linux/x86 6.1.0 Kernel\n{kernel.write_options(spoilt)}"
            found = hardening.kernel_changes(spoilt, "tcp", self.rules)
            start = "worse" if is_held else "better than recorded"
            lines = [
                line for line in found if line.startswith(f"{start}: CONFIG_{rule['option']}:")
            ]
            self.assertEqual(len(lines), 1, rule["option"])

    def test_every_option_exists(self):
        """A name that no kernel has would be held for ever if it is to be off."""
        known = set()
        for source in self.sources.values():
            for path in source.rglob("Kconfig*"):
                text = path.read_text("utf-8", "replace")
                known.update(re.findall(r"^\s*(?:menu)?config (\w+)", text, re.MULTILINE))
        names = {
            rule[key] for rule in self.rules for key in ("option", "or", "only_with") if key in rule
        }
        self.assertEqual(names - known, set())

    def test_record_is_whole(self):
        names = [rule["option"] for rule in self.rules]
        self.assertEqual(len(names), len(set(names)))
        for rule in self.rules:
            self.assertLessEqual(
                rule.keys() - {"or", "only_with", "missing", "why"}, {"option", "wanted"}
            )
            self.assertEqual("missing" in rule, bool(rule.get("why")), rule["option"])
            self.assertLessEqual(set(rule.get("missing", ())), {*KERNELS, *kernel.VARIANTS})

    def test_program(self):
        good = self.paths["6.1", "gpu"]
        bad = self.folder / "bad"
        bad.write_text(good.read_text().replace("CONFIG_MODULE_SIG_FORCE=y\n", ""))
        done = subprocess.run([*PROGRAM, "--config", good, "--variant", "gpu"], capture_output=True)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertRegex(done.stdout, rb"\Ahardening: \d+ of \d+ recommended options held\n\Z")
        done = subprocess.run([*PROGRAM, "--config", bad, "--variant", "gpu"], capture_output=True)
        line = b"hardening: error: worse: CONFIG_MODULE_SIG_FORCE: wanted y, got nothing\n"
        self.assertEqual((done.returncode, done.stderr), (1, line))

    def test_mistakes_are_one_line(self):
        empty = self.folder / "empty"
        empty.write_bytes(b"")
        for arguments in (
            ("--config", empty),
            ("--config", self.folder / "absent"),
            ("--config", sys.executable),
            ("--root", empty),
            ("--root", self.folder / "absent"),
        ):
            done = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout), (1, ""), arguments)
            self.assertRegex(done.stderr, r"\Ahardening: error: [^\n]+\n\Z")


@unittest.skipIf(guest.MISSING, NEEDED)
class Files(unittest.TestCase):
    """Every file of the guest's root."""

    @classmethod
    def setUpClass(cls):
        cls.recorded = hardening.read_record()["elf"]
        cls.root = image.build_rootfs(None, image.read_lock()) / "root"

    def build(self, *flags, code="int f(void) { return 0; }", is_program=False):
        """A folder with a.so, as the compiler makes it: with all protection but for these flags."""
        folder = temporary_folder(self)
        strict = "-O2 -fPIC -Wl,-z,relro,-z,now,-z,noexecstack -D_FORTIFY_SOURCE=2 -w"
        kind = () if is_program else ("-shared",)
        command = ["gcc", *strict.split(), "-fstack-protector-all", *kind, *flags, "-x", "c", "-"]
        command += ["-o", folder / "a.so"]
        subprocess.run(command, input=code.encode(), check=True, capture_output=True)
        return folder

    def test_every_program_is_as_recorded(self):
        self.assertEqual(hardening.elf_changes(self.root, self.recorded), [])

    def test_what_no_program_may_lack(self):
        """What is recorded are Debian's habits, and files that have nothing to check."""
        known = {"binding at start", "fortify", "stack protector", "position independence"}
        self.assertEqual(self.recorded.keys(), known)
        self.assertEqual(self.recorded["position independence"], ["usr/bin/python3.11"])

    def test_each_lack_is_found(self):
        checked = "#include <string.h>\nvoid f(char *s) { char b[9]; strcpy(b, s); g(b); }"
        self.assertEqual(hardening.elf_lacks(self.build(code=checked) / "a.so"), set())
        program = f"{checked} int main(void) {{ return 0; }} void g(char *s) {{}}"
        relocated = f"{checked} static int x; int *h(void) {{ return &x; }}"
        cases = {
            "position independence": (("-fno-pic", "-no-pie"), program),
            "read-only relocations": (("-Wl,-z,norelro",), checked),
            "binding at start": (("-Wl,-z,lazy",), checked),
            "stack without code": (("-Wl,-z,execstack",), checked),
            "code that is not writable": (("-nostdlib", "-Wl,-N"), checked),
            "fixed code": (("-fno-pic", "-mcmodel=large", "-Wl,-z,notext"), relocated),
            "system's libraries only": (("-Wl,-rpath,/tmp",), checked),
            "stack protector": (("-fno-stack-protector",), checked),
            "fortify": (("-U_FORTIFY_SOURCE",), checked),
        }
        for name, (flags, code) in cases.items():
            with self.subTest(lacks=name):
                folder = self.build(*flags, code=code, is_program=code == program)
                lacks = hardening.elf_lacks(folder / "a.so")
                self.assertIn(name, lacks)
                changes = [f"worse: a.so lacks {lack}" for lack in sorted(lacks)]
                self.assertEqual(hardening.elf_changes(folder, {}), changes)

    def test_better_is_to_be_recorded(self):
        folder = self.build()
        found = hardening.elf_changes(folder, {"fixed code": ["a.so", "gone.so"]})
        better = [f"better than recorded: {name} has fixed code" for name in ("a.so", "gone.so")]
        self.assertEqual([line for line in found if "fixed" in line], better)

    def test_no_file_gives_rights(self):
        self.assertEqual(hardening.mode_faults(self.root), [])

    def test_each_right_is_found(self):
        def mode(number):
            return lambda path: path.chmod(number)

        def attribute(path):
            os.setxattr(path, "user.note", b"x")

        def device(path):
            path.unlink()
            os.mkfifo(path)

        cases = {
            "x: mode 4755": mode(0o4755),
            "x: mode 2755": mode(0o2755),
            "x: mode 1644": mode(0o1644),
            "x: mode 0664": mode(0o664),
            "x: mode 0646": mode(0o646),
            "x: extended attributes user.note": attribute,
            "x: neither file, folder nor link": device,
        }
        for fault, spoil in cases.items():
            with self.subTest(fault=fault):
                root = temporary_folder(self) / "root"
                root.mkdir()
                (root / "x").write_text("x")
                (root / "x").chmod(0o644)
                self.assertEqual(hardening.mode_faults(root), [])
                spoil(root / "x")
                self.assertEqual(hardening.mode_faults(root), [fault])

    def test_program(self):
        done = subprocess.run([*PROGRAM, "--root", self.root], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertRegex(done.stdout, r"\Ahardening: \d+ files, \d+ of them ELF\n\Z")
        folder = self.build("-Wl,-z,execstack")
        done = subprocess.run([*PROGRAM, "--root", folder], capture_output=True, text=True)
        self.assertEqual(done.returncode, 1)
        self.assertIn("hardening: error: worse: a.so lacks stack without code\n", done.stderr)


@unittest.skipIf(guest.MISSING, NEEDED)
class Extras(unittest.TestCase):
    """Every file of the disk with torch, which only the engine sees."""

    @classmethod
    def setUpClass(cls):
        packed = image.build_extras(image.read_lock()) / "extras.squashfs"
        cls.root = temporary_folder(cls) / "root"
        command = ["unsquashfs", "-no-progress", "-d", cls.root, packed]
        subprocess.run(command, check=True, capture_output=True)
        paths = [path for path in hardening.regular_files(cls.root) if rootfs.is_elf(path)]
        cls.lacks = {path: hardening.elf_lacks(path) for path in paths}

    def test_what_no_library_lacks(self):
        """The one of torch's programs that is needed does not run at random addresses."""
        self.assertGreater(len(self.lacks), 50)
        may_lack = {"binding at start", "fortify", "stack protector", "system's libraries only"}
        for path, lacks in self.lacks.items():
            program = path == self.root / "torch/bin/torch_shm_manager"
            own = {"position independence"} if program else set()
            self.assertLessEqual(lacks, may_lack | own, path)

    def test_libraries_are_sought_beside_those_that_need_them(self):
        folders = set()
        for path in self.lacks:
            text = subprocess.run(["readelf", "-dW", path], check=True, capture_output=True).stdout
            for found in re.findall(rb"\(R(?:UN)?PATH\).*\[(.*)\]", text):
                folders.update(found.decode().split(":"))
        own = {folder for folder in folders if re.match(r"\$ORIGIN(?:/|$)", folder)}
        self.assertEqual((folders - own, bool(own)), (set(), True))

    def test_no_file_gives_rights(self):
        self.assertEqual(hardening.mode_faults(self.root), [])


def mappings(pid):
    """[(permissions, what is mapped)] of a process."""
    rows = pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines()
    fields = [row.split(maxsplit=5) for row in rows]
    return [(row[1], row[5] if len(row) > 5 else "") for row in fields]


def code_mappings(pid):
    """(those that can be executed and written, those that can be executed and are no file's)."""
    code = [(flags, name) for flags, name in mappings(pid) if "x" in flags]
    of_files = re.compile(r"/(?!memfd:)(?!.* \(deleted\)$)|\[vdso\]$|\[vsyscall\]$")
    writable = [row for row in code if "w" in row[0]]
    return writable, [row for row in code if not of_files.match(row[1])]


class Mappings(confinement.Folder):
    """Gate and loader hold no code but their files'; test_confinement: nor can they make any."""

    def test_gate_and_loader(self):
        with tempfile.TemporaryDirectory() as folder:
            probes = confinement.Probes(pathlib.Path(folder))
            self.addCleanup(probes.close)
            with support.Enclave(self.site, environment=probes.environment) as enclave:
                enclave.unlock()
                probes.meet("gate", "loader")  # the loader waits, so that it can be looked at
                for role in ("gate", "loader"):
                    pid = probes.pids[role]
                    self.assertGreater(len(mappings(pid)), 20, role)
                    self.assertEqual(code_mappings(pid), ([], []), role)

    def test_the_look_finds_what_is_there(self):
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", RWX], **options) as process:
            process.stdout.readline()
            writable, foreign = code_mappings(process.pid)
            self.assertEqual(len(writable), 1)
            self.assertIn(writable[0], foreign)


if __name__ == "__main__":
    unittest.main()
