"""tools/eventlog.py: logs written here, replayed by it, by a real TPM and by tpm2-tools."""

import contextlib
import hashlib
import io
import json
import pathlib
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest

import muprotocol as mp
from tests import support
from tests.test_tpm2 import SoftwareTpm, needs_programs

sys.path.insert(0, str(support.TOOLS))

import eventlog  # noqa: E402

SHA1, SHA256 = 0x0004, mp.TPM_ALG_SHA256
SPEC_ID = eventlog.SIGNATURE + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, 2)
SPEC_ID += struct.pack("<HHHHB", SHA1, 20, SHA256, 32, 0)
HEADER = struct.pack("<II20sI", 0, 3, bytes(20), len(SPEC_ID)) + SPEC_ID
GUID = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c")
BOOT_ORDER = GUID + struct.pack("<QQ", 9, 2) + "BootOrder".encode("utf-16-le") + b"\0\0"
CALLING = b"Calling EFI Application from Boot Option"
BOOT = [  # (PCR, type, data) of a small measured boot
    (0, 0x08, "1.2".encode("utf-16-le")),
    (0, 0x80000008, bytes(16)),
    (7, 0x80000001, GUID + struct.pack("<QQ", 10, 1) + "SecureBoot".encode("utf-16-le") + b"\0"),
    (1, 0x80000002, BOOT_ORDER),
    (4, 0x80000007, CALLING),
    *((pcr, 0x04, bytes(4)) for pcr in range(8)),
    (4, 0x80000003, b"the image" + bytes(23)),
]


def event(pcr, kind, data):
    """A TCG_PCR_EVENT2 whose digests are of its data."""
    digests = struct.pack("<IH", 2, SHA1) + hashlib.sha1(data).digest()
    digests += struct.pack("<H", SHA256) + hashlib.sha256(data).digest()
    return struct.pack("<II", pcr, kind) + digests + struct.pack("<I", len(data)) + data


def log(events):
    """A whole log."""
    return HEADER + b"".join(event(*fields) for fields in events)


def replaced(old, new):
    """BOOT with one event's data replaced."""
    return [(pcr, kind, new if data == old else data) for pcr, kind, data in BOOT]


class EventLog(unittest.TestCase):
    """Reading, replaying and comparing."""

    def test_parse(self):
        events = eventlog.parse(log(BOOT))
        self.assertEqual([(e.pcr, e.type, e.data) for e in events], BOOT)
        self.assertEqual(events[0].digest, hashlib.sha256(BOOT[0][2]).digest())
        for padding in (bytes(100), b"\xff" * 100):
            self.assertEqual(eventlog.parse(log(BOOT) + padding), events)

    @needs_programs
    def test_a_tpm_comes_to_the_same(self):
        events = eventlog.parse(log(BOOT))
        with tempfile.TemporaryDirectory() as folder:
            tpm = SoftwareTpm(folder)
            with contextlib.closing(tpm):
                for entry in events:
                    tpm.extend(entry.pcr, entry.digest)
                _, reference = tpm.evidence()
        pcrs = eventlog.replay(events)
        self.assertEqual(reference["pcrs"], {str(pcr): pcrs[pcr].hex() for pcr in mp.PCRS})

    @unittest.skipIf(shutil.which("tpm2_eventlog") is None, "not installed: tpm2_eventlog")
    def test_tpm2_tools_come_to_the_same(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "log")
            path.write_bytes(log(BOOT))
            done = subprocess.run(["tpm2_eventlog", path], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        pcrs = done.stdout.partition("\npcrs:")[2].partition("sha256:")[2]
        for pcr, value in eventlog.replay(eventlog.parse(log(BOOT))).items():
            if pcr < 8:
                self.assertRegex(pcrs, rf"(?m)^ *{pcr} *: 0x{value.hex()}$")

    def test_locality(self):
        """A TPM that was started by hardware at locality 3 begins PCR 0 with that."""
        start = [(0, 3, eventlog.LOCALITY + b"\3")]
        pcrs = eventlog.replay(eventlog.parse(log(start)))
        self.assertEqual(pcrs[0], bytes(31) + b"\3")
        self.assertEqual(pcrs[1], bytes(32))

    def test_damaged(self):
        whole = log(BOOT)
        ends = [len(log(BOOT[:count])) for count in range(len(BOOT) + 1)]
        for size in range(len(whole)):
            end = max((end for end in ends if end <= size), default=None)
            if end is not None and not whole[end:size].strip(b"\0"):
                self.assertEqual(eventlog.parse(whole[:size]), eventlog.parse(whole[:end]))
                continue
            with self.subTest(size=size), self.assertRaises(eventlog.LogError):
                eventlog.parse(whole[:size])
        rng = random.Random(1)
        for _ in range(2000):
            damaged = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            with contextlib.suppress(eventlog.LogError):
                events = eventlog.parse(bytes(damaged))
                eventlog.replay(events)
                self.assertTrue(all("\n" not in eventlog.describe(entry) for entry in events))
        for data in (b"", bytes(100), HEADER[:-1], HEADER.replace(b"Event03", b"Event02")):
            with self.assertRaises(eventlog.LogError):
                eventlog.parse(data)

    def run_tool(self, *arguments):
        """(exit status, output) of the command line, in this process."""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            with contextlib.redirect_stderr(io.StringIO()) as err:
                status = eventlog.main(list(map(str, arguments)))
        return status, out.getvalue() + err.getvalue()

    def files(self, **logs):
        """A folder with these logs."""
        place = tempfile.TemporaryDirectory()
        self.addCleanup(place.cleanup)
        for name, events in logs.items():
            pathlib.Path(place.name, name).write_bytes(log(events))
        return pathlib.Path(place.name)

    def test_difference_is_named(self):
        order = BOOT_ORDER[:-2] + b"\1\0"
        boots = {"good": BOOT, "order": replaced(BOOT_ORDER, order), "longer": BOOT + [BOOT[0]]}
        folder = self.files(**boots)
        self.assertEqual(self.run_tool(folder / "good", "--against", folder / "good"), (0, ""))
        status, text = self.run_tool(folder / "order", "--against", folder / "good")
        kind = "EV_EFI_VARIABLE_BOOT"
        digests = [hashlib.sha256(data).hexdigest() for data in (BOOT_ORDER, order)]
        expected = f"PCR 1: expected {kind} {digests[0]} BootOrder\n"
        expected += f"       got      {kind} {digests[1]} BootOrder\n"
        self.assertEqual((status, text), (1, expected))
        status, text = self.run_tool(folder / "longer", "--against", folder / "good")
        self.assertEqual(status, 1)
        self.assertIn("PCR 0: expected nothing more\n", text)

    def test_reference_values(self):
        folder = self.files(good=BOOT, other=replaced(CALLING, b"Calling something else"))
        pcrs = eventlog.replay(eventlog.parse(log(BOOT)))
        values = {"version": 1, "kind": "tpm2", "root": "fixture", "withdrawn": []}
        values |= {"measurement": "ab" * 32}
        values |= {"pcrs": {str(pcr): pcrs[pcr].hex() for pcr in mp.PCRS}}
        (folder / "reference").write_text(json.dumps(values))
        flags = ("--reference", folder / "reference")
        self.assertEqual(self.run_tool(folder / "good", *flags), (0, ""))
        status, text = self.run_tool(folder / "other", *flags)
        self.assertEqual(status, 1)
        self.assertTrue(text.startswith(f"PCR 4: expected {pcrs[4].hex()}, the log leads to "))
        self.assertIn("Calling something else", text)
        self.assertNotIn("PCR 0", text)

    def test_show_and_mistakes(self):
        folder = self.files(good=BOOT)
        status, text = self.run_tool(folder / "good")
        self.assertEqual(status, 0)
        digest = hashlib.sha256(CALLING).hexdigest()
        self.assertIn(f"PCR 4: EV_EFI_ACTION {digest} {CALLING.decode()}\n", text)
        self.assertEqual(len(text.splitlines()), len(BOOT) + 8)
        (folder / "bad").write_bytes(b"no log")
        for path in (folder / "bad", folder / "absent"):
            status, text = self.run_tool(path)
            self.assertEqual(status, 1)
            self.assertRegex(text, r"\Aeventlog: error: [^\n]+\n\Z")


if __name__ == "__main__":
    unittest.main()
