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

import muenclave
import muprotocol as mp
import muproxy
from tests import support
from tests.test_tpm2 import SoftwareTpm, entered, forge, needs_programs, run_enroll

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
    (0, 0x80000008, struct.pack("<QQ", 0x820000, 917504)),
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


OTHER_BOOT_ORDER = BOOT_ORDER[:-2] + b"\1\0"


def replaced(old, new):
    """BOOT with one event's data replaced."""
    return [(pcr, kind, new if data == old else data) for pcr, kind, data in BOOT]


OTHER_ORDER = replaced(BOOT_ORDER, OTHER_BOOT_ORDER)


def difference(pcr, entry, expected, got):
    """How it is told that BOOT and OTHER_ORDER differ."""
    kind, boots = "EV_EFI_VARIABLE_BOOT", (BOOT, OTHER_ORDER)
    values = [eventlog.replay(eventlog.parse(log(boot)))[pcr].hex() for boot in boots]
    lines = [f"PCR {pcr}: expected {values[0]}, got {values[1]}"]
    for word, data in (("expected", expected), ("got     ", got)):
        digest = hashlib.sha256(data).hexdigest()
        lines.append(f"    entry {entry}: {word} {kind} {digest} BootOrder")
    return "\n".join(lines) + "\n"


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
        boots = {"good": BOOT, "order": OTHER_ORDER, "longer": BOOT + [BOOT[0]]}
        folder = self.files(**boots)
        self.assertEqual(self.run_tool(folder / "good", "--against", folder / "good"), (0, ""))
        status, text = self.run_tool(folder / "order", "--against", folder / "good")
        self.assertEqual((status, text), (1, difference(1, 1, BOOT_ORDER, OTHER_BOOT_ORDER)))
        status, text = self.run_tool(folder / "longer", "--against", folder / "good")
        self.assertEqual(status, 1)
        self.assertIn("    entry 4: expected nothing more\n    entry 4: got      EV_S_CRTM", text)
        status, text = self.run_tool(folder / "good", "--against", folder / "longer")
        self.assertEqual(status, 1)
        self.assertIn(" 1.2\n    entry 4: got      nothing more\n", text)

    def reference(self, **values):
        """Reference values of BOOT."""
        pcrs = eventlog.replay(eventlog.parse(log(BOOT)))
        facts = {"version": 1, "kind": "tpm2", "root": "fixture", "withdrawn": []}
        facts |= {"measurement": "ab" * 32, "event_log": log(BOOT).hex()}
        facts |= {"pcrs": {str(pcr): pcrs[pcr].hex() for pcr in mp.PCRS}}
        return {k: v for k, v in (facts | values).items() if v is not None}

    def test_reference_values(self):
        folder = self.files(good=BOOT, other=OTHER_ORDER)
        for values, expected in (
            ({}, difference(1, 1, BOOT_ORDER, OTHER_BOOT_ORDER)),
            ({"event_log": None}, "no log is known that leads to what was expected"),
            ({"event_log": log(OTHER_ORDER).hex()}, "no log is known"),
        ):
            (folder / "reference").write_text(json.dumps(self.reference(**values)))
            flags = ("--reference", folder / "reference")
            self.assertEqual(self.run_tool(folder / "good", *flags), (0, ""))
            status, text = self.run_tool(folder / "other", *flags)
            self.assertEqual(status, 1)
            self.assertIn(expected, text)
            self.assertNotIn("PCR 0", text)
        self.assertIn("\n    1: EV_EFI_VARIABLE_BOOT ", text)
        self.assertEqual(len(text.splitlines()), 2 + 2)  # the order, then the separator

    def test_attested(self):
        """What a quote proved decides: a log that does not lead there explains nothing."""
        folder = self.files(good=BOOT, other=OTHER_ORDER)
        pcrs = eventlog.replay(eventlog.parse(log(BOOT)))
        other = eventlog.replay(eventlog.parse(log(OTHER_ORDER)))
        checks = [{"name": "PCRs at zero", "expected": "9", "got": "9", "ok": True}]
        for pcr in mp.PCRS:
            check = {"expected": pcrs[pcr].hex(), "got": other[pcr].hex()}
            checks.append(check | {"name": f"PCR {pcr}", "ok": pcrs[pcr] == other[pcr]})
        facts = {"verified": False, "checks": checks, "event_log": log(BOOT).hex()}
        (folder / "facts").write_text(json.dumps(facts))
        flags = ("--attested", folder / "facts")
        named = difference(1, 1, BOOT_ORDER, OTHER_BOOT_ORDER)
        self.assertEqual(self.run_tool(folder / "other", *flags), (1, named))
        status, text = self.run_tool(folder / "good", *flags)
        self.assertEqual(status, 1)
        self.assertEqual(len(text.splitlines()), 2)
        self.assertIn(f"the log leads to {pcrs[1].hex()}: it is another boot's, or was", text)
        for bad in ("{", "[]", '{"checks": [{}]}', '{"checks": 1}', '{"checks": [1]}'):
            (folder / "facts").write_text(bad)
            status, text = self.run_tool(folder / "good", *flags)
            self.assertEqual(status, 1)
            self.assertRegex(text, r"\Aeventlog: error: [^\n]+ not what [^\n]+ prints\n\Z")

    def test_show_and_mistakes(self):
        folder = self.files(good=BOOT)
        status, text = self.run_tool(folder / "good")
        self.assertEqual(status, 0)
        digest = hashlib.sha256(CALLING).hexdigest()
        self.assertIn(f"PCR 4: EV_EFI_ACTION {digest} {CALLING.decode()}\n", text)
        self.assertRegex(
            text, "PCR 0: EV_EFI_PLATFORM_FIRMWARE_BLOB .{64} at 0x820000, 917504 bytes\n"
        )
        self.assertEqual(len(text.splitlines()), len(BOOT) + 8)
        (folder / "bad").write_bytes(b"no log")
        for path in (folder / "bad", folder / "absent"):
            status, text = self.run_tool(path)
            self.assertEqual(status, 1)
            self.assertRegex(text, r"\Aeventlog: error: [^\n]+\n\Z")


@needs_programs
class Attest(unittest.TestCase):
    """`muproxy attest --log`: from a gate whose TPM was extended as its event log says."""

    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(entered(tempfile.TemporaryDirectory(), cls.addClassCleanup))
        (cls.folder / "tpm").mkdir()
        cls.site = support.make_site(cls.folder)
        cls.code, cls.log = cls.folder / "code", cls.folder / "firmware.log"
        cls.code.mkdir()
        for name in support.measure.MODULES:
            text = (support.ROOT / name).read_text()
            text = text.replace(f'"{muenclave.EVENT_LOG}"', repr(str(cls.log)))
            (cls.code / name).write_text(text)
        manifest = support.measure.local_manifest(sys.executable, cls.code)
        values = json.loads(cls.site.reference.read_text())
        values["measurement"] = mp.manifest_digest(manifest)
        cls.site.reference.write_text(json.dumps(values))
        cls.tpm = SoftwareTpm(cls.folder / "tpm")
        cls.addClassCleanup(cls.tpm.close)
        run_enroll(cls.site.reference, "--tpm", cls.tpm.path)
        with cls.boot(BOOT) as enclave:
            done = run_enroll(cls.site.reference, "--enclave", f"127.0.0.1:{enclave.port}")
        assert "no event log" not in done.stdout, done.stdout
        cls.reference = json.loads(cls.site.reference.read_text())

    @classmethod
    def boot(cls, events, told=None):
        """A locked enclave, after a boot whose log is this; or whose log is told to be another."""
        cls.tpm.kill()
        cls.tpm.start()
        for entry in eventlog.parse(log(events)):
            cls.tpm.extend(entry.pcr, entry.digest)
        cls.log.write_bytes(log(told or events))
        flags = ("--evidence", "tpm2", "--tpm", cls.tpm.path)
        return support.Enclave(cls.site, *flags, code=cls.code)

    def attest(self, enclave, *flags, reference=None):
        """`muproxy attest --log`, and the file that it wrote, or None."""
        path = self.folder / "fetched.log"
        path.unlink(missing_ok=True)
        known = ["--port", enclave.port, "--reference", reference or self.site.reference]
        done = support.proxy("attest", *known, "--log", path, "--rate-kb", 10**6, *flags)
        return done, path.read_bytes() if path.exists() else None

    def test_enrolled(self):
        self.assertEqual(self.reference["event_log"], log(BOOT).hex())
        pcrs = eventlog.replay(eventlog.parse(log(BOOT)))
        self.assertEqual(self.reference["pcrs"], {str(n): pcrs[n].hex() for n in mp.PCRS})

    def test_as_enrolled(self):
        with self.boot(BOOT) as enclave:
            done, fetched = self.attest(enclave)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertTrue(done.stdout.endswith("\nverified\n"))
            self.assertNotIn("entry", done.stdout)
            self.assertEqual(fetched, log(BOOT))
            self.unlock(enclave)
            done, fetched = self.attest(enclave)
            self.assertEqual((done.returncode, done.stdout, fetched), (1, "", None))
            self.assertRegex(done.stderr, r"\Amuproxy: error: [^\n]+while it is locked\)\n\Z")

    def unlock(self, enclave):
        with contextlib.closing(enclave.session("owner")) as session:
            session.prove(enclave.unlock_token())

    def test_another_boot(self):
        """Each PCR that differs is explained by its entry; the session was never trusted."""
        with self.boot(OTHER_ORDER) as enclave:
            done, fetched = self.attest(enclave)
            self.assertEqual((done.returncode, done.stderr), (1, ""))
            self.assertEqual(done.stdout.count("FAILED"), 1)
            named = difference(1, 1, BOOT_ORDER, OTHER_BOOT_ORDER)
            self.assertTrue(done.stdout.endswith(f"\n{named}refused\n"), done.stdout)
            self.assertEqual(fetched, log(OTHER_ORDER))
            facts = json.loads(self.attest(enclave, "--json")[0].stdout)
            self.assertEqual((facts["verified"], facts["log"]), (False, named.splitlines()))
            with self.assertRaises(muproxy.Refusal):
                enclave.session("owner")
            path = self.folder / "other.json"
            path.write_text(json.dumps(self.reference | {"measurement": "00" * 32}))
            done, fetched = self.attest(enclave, reference=path)
            self.assertEqual((done.returncode, fetched), (1, log(OTHER_ORDER)))
            self.assertEqual(done.stdout.count("FAILED"), 2)

    def test_a_log_of_another_boot(self):
        with self.boot(OTHER_ORDER, told=BOOT) as enclave:
            done, fetched = self.attest(enclave)
            self.assertEqual((done.returncode, fetched), (1, log(BOOT)))
            self.assertIn(": it is another boot's, or was changed\nrefused\n", done.stdout)
            path = self.folder / "another.json"
            values = {k: v for k, v in self.reference.items() if k not in ("pcrs", "event_log")}
            path.write_text(json.dumps(values))
            done = run_enroll(path, "--enclave", f"127.0.0.1:{enclave.port}")
            self.assertIn("\nno event log: ", done.stdout)
            values = json.loads(path.read_text())
            self.assertNotIn("event_log", values)
            pcrs = eventlog.replay(eventlog.parse(log(OTHER_ORDER)))
            self.assertEqual(values["pcrs"]["1"], pcrs[1].hex())

    def test_no_session_without_the_enrolled_key(self):
        """Nothing is asked of a peer whose quote is not this session's, by that key."""
        path = self.folder / "foreign.json"
        path.write_text(
            json.dumps(self.reference | {"attestation_key": forge()[1]["attestation_key"]})
        )
        with self.boot(BOOT) as enclave:
            done, fetched = self.attest(enclave, reference=path)
        self.assertEqual((done.returncode, done.stderr, fetched), (1, "", None))
        wrong = [line.split(":")[0] for line in done.stdout.splitlines() if "FAILED" in line]
        self.assertEqual(wrong, ["FAILED qualifiedSigner", "FAILED signature"])
        self.assertTrue(done.stdout.endswith("\nrefused\n"))
        for name in ("magic", "type", "extraData", "pcrSelect", "pcrDigest", "sigAlg", "proof"):
            self.assertNotIn(name, muproxy.EXPLAINED)
        for name in ("attestation key", "qualifiedSigner", "signature", "confinement", "debug"):
            self.assertNotIn(name, muproxy.EXPLAINED)

    def test_no_log(self):
        """Evidence that says nothing of a boot."""
        with support.Enclave(self.site, code=self.code) as enclave:
            path = self.folder / "psk.json"
            path.write_text(json.dumps(self.reference | {"kind": "psk", "root": "psk"}))
            flags = ("--psk", self.site.owner_psk)
            done, fetched = self.attest(enclave, *flags, reference=path)
            self.assertEqual((done.returncode, fetched), (0, b""))
            self.assertIn("there is no event log: nothing was measured\nverified\n", done.stdout)

    def test_a_file_that_cannot_be_written(self):
        with self.boot(BOOT) as enclave:
            for path, text in (("/dev/full", "No space left"), ("/no/such", "/no/such: No such")):
                done, _ = self.attest(enclave, "--log", path)
                self.assertEqual((done.returncode, done.stdout), (2, ""))
                self.assertRegex(done.stderr, rf"\Amuproxy: error: {text}[^\n]*\n\Z")


if __name__ == "__main__":
    unittest.main()
