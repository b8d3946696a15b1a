"""The kernel and the image that were really built: their lines, their files, their comparison."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

from tests import guest, support, test_attack_surface

sys.path.insert(0, str(support.TOOLS))

import image  # noqa: E402
import kernel  # noqa: E402
import loc  # noqa: E402
import trees  # noqa: E402

MISSING = [*guest.MISSING, *test_attack_surface.MISSING]
# What a build compiles beside the files that Kbuild's makefiles name as the kernel's objects: what
# starts it, what it gives to processes, what runs on the machine that builds, what it generates.
BESIDE = ("arch/x86/boot/", "arch/x86/realmode/rm/", "arch/x86/entry/vdso/", "arch/x86/tools/")
BESIDE += ("init/version-timestamp.c",)


@unittest.skipIf(guest.MISSING, f"not installed: {' '.join(guest.MISSING)}")
class Lines(unittest.TestCase):
    """The files that the makefiles name are those that were compiled."""

    @classmethod
    def setUpClass(cls):
        lock = image.read_lock()
        cls.objects, cls.source = image.build_kernel("tcp", lock), image.kernel_source(lock)
        cls.config = (cls.objects / ".config").read_text("utf-8")
        paths, cls.changed = loc.named_sources(cls.source, cls.config)
        cls.named = {path.relative_to(cls.source.resolve()).as_posix() for path in paths}

    def compiled(self):
        """{path from the source, or absolute if it was generated} of what .cmd files name."""
        found = set()
        for path in self.objects.rglob(".*.o.cmd"):
            if not path.relative_to(self.objects).as_posix().startswith(kernel.HOST_FOLDERS):
                text = path.read_text("utf-8", "replace")
                for name in re.findall(r"^source_\S+ := (\S+\.[cS])$", text, re.MULTILINE):
                    place = os.path.normpath(self.objects / name)
                    found.add(os.path.relpath(place, self.source.resolve()))
        return found

    def test_every_named_file_was_compiled(self):
        self.assertEqual(self.changed, 0)
        self.assertGreater(len(self.named), 1000)
        self.assertEqual(self.named - self.compiled(), set())

    def test_every_compiled_file_was_named(self):
        left = self.compiled() - self.named
        unknown = {name for name in left if not name.startswith((*BESIDE, ".."))}
        self.assertEqual(unknown, set())
        self.assertTrue(any(name.startswith(BESIDE[0]) for name in left))

    def test_modules_count(self):
        more = kernel.read_options(self.config) | {"MODULES": "y", "DUMMY": "m"}
        found, _ = loc.named_sources(self.source, kernel.write_options(more))
        added = {path.relative_to(self.source.resolve()).as_posix() for path in found} - self.named
        self.assertIn("drivers/net/dummy.c", added)


@unittest.skipIf(guest.MISSING, f"not installed: {' '.join(guest.MISSING)}")
class Program(unittest.TestCase):
    """The root file system is read out of the EFI program, file by file as it was measured."""

    def test_its_files(self):
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            output = pathlib.Path(folder)
            built = image.build_image("tcp", None, None, output, image.read_lock())
            manifest = json.loads((built / "manifest.json").read_text("utf-8"))
            tree = trees.read_tree(str(built / "muenclave.efi"), stack)
        found = []
        for path, entry in tree.items():
            kinds = {trees.FILE: 0o100000, trees.LINK: 0o120000}
            if entry.kind in kinds and path != image.measure.MANIFEST:
                data = os.fsencode(entry.target) if entry.target else entry.open().read()
                mode = f"{kinds[entry.kind] | entry.mode:o}"
                found.append([path, mode, hashlib.sha256(data).hexdigest()])
        self.assertEqual(sorted(found), manifest["files"])


@unittest.skipIf(MISSING, f"not installed: {' '.join(MISSING)}")
class Comparison(unittest.TestCase):
    """`attack_surface.py compare`, from what is cached."""

    @classmethod
    def setUpClass(cls):
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder, "out.json")
            flags = ["compare", "--baseline", pathlib.Path(folder, "baseline"), "--json", out]
            command = [sys.executable, "-B", support.TOOLS / "attack_surface.py", *flags]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            cls.told = done.stderr
            cls.document = json.loads(out.read_text()) if done.returncode == 0 else None

    def setUp(self):
        self.assertIsNotNone(self.document, self.told)
        rows = self.document["targets"] + self.document["kernels"]
        self.enclave, self.baseline, self.kernel, self.debian = (row["metrics"] for row in rows)

    def test_the_enclave_has_none_of(self):
        names = "package_managers shells setuid capabilities world_writable services applets"
        for metric in (*names.split(), "other_elf"):
            self.assertEqual(self.enclave[metric]["count"], 0, metric)

    def test_the_baseline_has(self):
        services = set(self.baseline["services"]["names"])
        self.assertLessEqual({"ssh", "nginx", "inference", "prometheus-node-exporter"}, services)
        self.assertLessEqual({"usr/bin/bash"}, set(self.baseline["shells"]["names"]))
        self.assertLessEqual({"usr/bin/apt"}, set(self.baseline["package_managers"]["names"]))

    def test_less_of(self):
        for metric in ("packages", "executables", "libraries", "bytes", "modules", "components"):
            counts = [target[metric]["count"] for target in (self.enclave, self.baseline)]
            self.assertLess(*counts, metric)

    def test_both_run_the_same_torch(self):
        for target in (self.enclave, self.baseline):
            found = [name for name in target["distributions"]["names"] if name[:6] == "torch "]
            self.assertEqual(len(found), 1, found)
            self.assertEqual(found[0].partition("+")[0], "torch 2.13.0")

    def test_kernels(self):
        for metric in (
            "options_built_in",
            "options_as_modules",
            "kernel_lines",
            "kernel_code_lines",
        ):
            self.assertLess(self.kernel[metric]["count"], self.debian[metric]["count"], metric)
        self.assertGreater(
            self.kernel["options_held"]["count"], self.debian["options_held"]["count"]
        )
        named, built = (self.kernel[f"kernel_{kind}lines"]["count"] for kind in ("", "compiled_"))
        self.assertTrue(0.95 * built < named < built)


if __name__ == "__main__":
    unittest.main()
