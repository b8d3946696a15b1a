"""tools/bench.py: the figures that the README quotes are printed by it, and are of what runs."""

import contextlib
import io
import json
import subprocess
import sys
import unittest

from tests import guest, support

sys.path.insert(0, str(support.TOOLS))

import bench  # noqa: E402

BENCH = [sys.executable, str(support.TOOLS / "bench.py")]


@unittest.skipIf(guest.MISSING, f"not installed: {' '.join(guest.MISSING)}")
class Boot(unittest.TestCase):
    """One round: the three kernels all lead to a handshake, ours to the image that was built."""

    @classmethod
    def setUpClass(cls):
        flags = ["boot", "--rounds", "1", "--json", "-", "--weights", support.sealed_demo().model]
        done = subprocess.run([*BENCH, *flags], capture_output=True, text=True)
        cls.figures = json.loads(done.stdout)["boot"] if done.returncode == 0 else None
        cls.told = done.stderr

    def setUp(self):
        self.assertIsNotNone(self.figures, self.told)

    def test_times(self):
        seconds = self.figures["seconds"]
        self.assertEqual(set(seconds), set(bench.CONTENDERS))
        for name, rounds in seconds.items():
            self.assertEqual(len(rounds), 1, name)
            self.assertTrue(0 < rounds[0] < bench.BOOT_SECONDS, name)

    def test_sizes(self):
        ours, debian = self.figures["ours"], self.figures["debian"]
        self.assertLess(ours["bytes"], debian["bytes"] + debian["initramfs_bytes"])
        self.assertLess(ours["initramfs_bytes"], ours["bytes"])
        self.assertLess(ours["bytes"], ours["disk_bytes"])
        self.assertEqual(ours["options"]["m"], 0)
        self.assertLess(2 * ours["options"]["y"], debian["options"]["y"])
        self.assertGreater(debian["module_files"], 1000)
        self.assertGreater(ours["compiled"]["lines"], 500_000)

    def test_what_is_printed(self):
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            bench.show_boot(self.figures)
        for name in bench.CONTENDERS.values():
            self.assertIn(name, text.getvalue())
        self.assertIn(f"{self.figures['ours']['compiled']['lines']:,} lines", text.getvalue())


class Mistakes(unittest.TestCase):
    """One line says what is wrong."""

    def test_no_weights(self):
        command = [*BENCH, "boot", "--weights", "/nowhere"]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        line = "bench: error: there is no /nowhere: name a sealed model by --weights\n"
        self.assertEqual(done.stderr, line)

    def test_no_rounds(self):
        done = subprocess.run([*BENCH, "boot", "--rounds", "0"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 2)


if __name__ == "__main__":
    unittest.main()
