"""Evidence of kind tpm2, against a real TPM 2.0 in software (swtpm).

swtpm serves a pseudo-terminal, so that the enclave opens a character device as it does in a VM.
What no TPM would sign is signed by a key in software: so each check is shown to refuse alone.
"""

import contextlib
import datetime
import functools
import hashlib
import json
import os
import pathlib
import pty
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import tty
import unittest
from unittest import mock

import muenclave
import muprotocol as mp
import muproxy
from tests import support

sys.path.insert(0, str(support.TOOLS))

import enroll  # noqa: E402

PROGRAMS = ("swtpm", "swtpm_setup", "tpm2_checkquote", "openssl")
MISSING = " ".join(name for name in PROGRAMS if shutil.which(name) is None)
needs_programs = unittest.skipIf(MISSING, f"not installed: {MISSING}")
DATA = hashlib.sha256(b"a transcript").digest()
OTHER = hashlib.sha256(b"another transcript").digest()
PASSWORD = mp.EMPTY_PASSWORD
TPM_CC_PCR_EXTEND, TPM_CC_CERTIFY, TPM_CC_GET_TIME = 0x182, 0x148, 0x14C
TPM_CC_NV_DEFINE_SPACE, TPM_CC_NV_WRITE, TPM_CC_NV_CERTIFY = 0x12A, 0x137, 0x184
TPM_ALG_SHA1 = 0x0004
NULL = mp.TPM_ALG_NULL.to_bytes(2, "big")
ENDORSEMENT, OWNER = mp.TPM_RH_ENDORSEMENT, enroll.TPM_RH_OWNER
BIT = {"fixedTPM": 1, "fixedParent": 4, "sensitiveDataOrigin": 5, "userWithAuth": 6}
BIT |= {"noDA": 10, "restricted": 16, "decrypt": 17, "sign": 18}


class SoftwareTpm:
    """A swtpm behind a pseudo-terminal. path: its device; channel: ours to it."""

    def __init__(self, folder):
        self.folder = folder
        self.master, self.device = pty.openpty()
        tty.setraw(self.device)
        self.path = os.ttyname(self.device)
        self.channel = enroll.Tpm(self.path)
        self.process = None
        self.start()

    def start(self):
        """Power on. The self test is what firmware has done before a guest runs."""
        command = ["swtpm", "chardev", "--tpm2", "--fd", str(self.master)]
        command += ["--tpmstate", f"dir={self.folder}", "--flags", "startup-clear"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=[self.master], **quiet)
        self.command(enroll.TPM_CC_SELF_TEST, b"", b"\x01")

    def command(self, *arguments):
        """What follows the header of a command's response."""
        return self.channel.command(*arguments)

    def extend(self, pcr, digest):
        """TPM2_PCR_Extend of the SHA-256 bank."""
        digests = struct.pack(">IH", 1, mp.TPM_ALG_SHA256) + digest
        self.command(TPM_CC_PCR_EXTEND, pcr.to_bytes(4, "big"), digests, PASSWORD)

    def boot(self, image=b"an image"):
        """Extend the PCRs as a measured boot does: 0 to 7, 4 by the image; 9 by nothing."""
        for pcr in range(8):
            self.extend(pcr, hashlib.sha256(image if pcr == 4 else b"%d" % pcr).digest())

    def evidence(self):
        """The guest's class on this TPM, and the reference values that fit it."""
        self.forget()
        values = self.values()
        pcrs = {str(pcr): values[32 * at :][:32].hex() for at, pcr in enumerate(mp.PCRS)}
        tpm = muenclave.Tpm2({"ENCLAVE_TPM": self.path})
        return tpm, {"attestation_key": self.public().hex(), "pcrs": pcrs}

    def forget(self):
        """Drop the keys of what used it before, as a kernel's resource manager does."""
        for handle in range(0x80000000, 0x80000003):
            with contextlib.suppress(OSError):
                self.channel.flush(handle.to_bytes(4, "big"))

    def public(self):
        """The attestation key's TPMT_PUBLIC."""
        with enroll.attestation_key(self.channel) as (_, public):
            return public

    def values(self):
        """The values of PCRS, one behind the other."""
        reads = [(mp.TPM_CC_PCR_READ, b"", mp.pcr_selection(pcr)) for pcr in mp.PCRS]
        return b"".join(self.command(*read)[-32:] for read in reads)

    def kill(self):
        """Power off."""
        self.process.kill()
        self.process.wait()

    def close(self):
        """Power off, and take the device away."""
        self.kill()
        self.channel.__exit__()
        os.close(self.device)
        os.close(self.master)


def attest(tpm, code, handles, parameters, authorization=PASSWORD):
    """The response parameters of an attestation command: TPM2B_ATTEST, TPMT_SIGNATURE."""
    body = tpm.command(code, handles, parameters, authorization)
    return body[4:][: int.from_bytes(body[:4], "big")]


def quote(tpm, key, selection, data=DATA, scheme=NULL):
    """A quote of another selection, with the values of PCRS behind it."""
    parameters = mp.tpm2b(data) + scheme + selection
    return attest(tpm, mp.TPM_CC_QUOTE, key, parameters) + tpm.values()


def serialized(values):
    """PCR values in tpm2-tools' own form: TPML_PCR_SELECTION and TPML_DIGESTs as C lays them out.

    (Its simpler form fails for more than 8 PCRs: in 5.4 it refuses what tpm2_quote itself wrote.)
    """
    selection = struct.pack("<IHB3s", 1, mp.TPM_ALG_SHA256, 3, mp.pcr_selection(*mp.PCRS)[-3:])
    digests = [struct.pack("<H64s", 32, values[at : at + 32]) for at in range(0, len(values), 32)]
    lists = [digests[:8], digests[8:]]
    data = (struct.pack("<I", len(some)) + b"".join(some).ljust(8 * 66, b"\0") for some in lists)
    return selection.ljust(4 + 16 * 8, b"\0") + struct.pack("<I", len(lists)) + b"".join(data)


def entered(context, add_cleanup):
    """What a context manager gives, until the test, or its class, ends."""
    value = context.__enter__()
    add_cleanup(context.__exit__, None, None, None)
    return value


def verify(proof, reference, data=DATA):
    """The checks of a proof."""
    return muproxy.verify_tpm2(None, data, proof, reference)


def failed(*arguments):
    """The names of the checks that fail."""
    return [check.name for check in verify(*arguments) if not check.ok]


# ---------------------------------------------------------------- a key in software


@functools.cache
def software_key(exponent=65537):
    """(modulus, private exponent) of an RSA-2048 key."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    numbers = rsa.generate_private_key(exponent, 2048).private_numbers()
    return numbers.public_numbers.n, numbers.d


def public_area(modulus, attributes=mp.SIGNING_KEY):
    """A TPMT_PUBLIC as our attestation key's, but for its attributes."""
    form = bytearray(mp.ATTESTATION_KEY)
    form[4:8] = attributes.to_bytes(4, "big")
    return bytes(form) + mp.tpm2b(modulus.to_bytes(256, "big"))


def encode(message, info=muproxy.DIGEST_INFO, hashed=hashlib.sha256):
    """EMSA-PKCS1-v1_5 (RFC 8017, 9.2), written down apart from the verifier."""
    end = info + hashed(message).digest()
    return b"\x00\x01" + b"\xff" * (256 - 3 - len(end)) + b"\x00" + end


VALUES = b"".join(hashlib.sha256(b"%d" % pcr).digest() for pcr in range(8)) + bytes(32)


def forge(values=VALUES, public=None, encoding=encode, **fields):
    """(proof, reference) that a key in software signed; fields replace those of a good quote."""
    modulus, private = software_key()
    public = public or public_area(modulus)
    name = b"\x00\x0b" + hashlib.sha256(public).digest()
    qualified = b"\x00\x0b" + hashlib.sha256(bytes.fromhex("4000000b") + name).digest()
    good = {
        "magic": b"\xffTCG",
        "type": b"\x80\x18",
        "qualifiedSigner": b"\x00\x22" + qualified,
        "extraData": b"\x00\x20" + DATA,
        "clockInfo": bytes(17),
        "firmwareVersion": bytes(8),
        "pcrSelect": bytes.fromhex("00000001 000b 03 ff0200"),
        "pcrDigest": b"\x00\x20" + hashlib.sha256(values).digest(),
        "size": b"\x00\x91",
        "sigAlg": b"\x00\x14\x00\x0b\x01\x00",
    } | fields
    message = b"".join(list(good.values())[:8])
    signature = pow(int.from_bytes(encoding(message), "big"), private, modulus)
    signature = fields.get("signature", signature.to_bytes(256, "big"))
    proof = good["size"] + message + good["sigAlg"] + signature + values
    pcrs = {str(pcr): values[32 * at :][:32].hex() for at, pcr in enumerate(mp.PCRS)}
    return proof, {"attestation_key": public.hex(), "pcrs": pcrs}


def zeroed(at):
    """VALUES with the value at this place zero."""
    return VALUES[: 32 * at] + bytes(32) + VALUES[32 * at + 32 :]


def without(pcr):
    """(proof, reference) where the reference lacks a PCR."""
    proof, reference = forge()
    del reference["pcrs"][pcr]
    return proof, reference


def refused_alone():
    """[(the one check that refuses, what was done, proof, reference)]: all else is in order."""
    modulus, _ = software_key()
    cases = []

    def add(name, what, proof, reference):
        cases.append((name, what, proof, reference))

    for name, bit in BIT.items():
        public = public_area(modulus, mp.SIGNING_KEY ^ 1 << bit)
        add("attestation key", f"{name} changed", *forge(public=public))
    for bit in set(range(32)) - set(BIT.values()):
        public = public_area(modulus, mp.SIGNING_KEY | 1 << bit)
        add("attestation key", f"attribute {bit} set", *forge(public=public))
    good = public_area(modulus)
    for at in (*range(4), *range(8, len(good) - 256)):
        public = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        add("attestation key", f"octet {at} of TPMT_PUBLIC", *forge(public=public))
    add("attestation key", "a trailing octet", *forge(public=good[:-256] + b"\0" + good[-256:]))
    for size in (0, 0x90, 0x92, 0xFFFF):
        add("size", size, *forge(size=size.to_bytes(2, "big")))
    add("magic", "not made by a TPM", *forge(magic=b"\xffTCH"))
    for kind in range(0x8014, 0x801E):
        if kind != 0x8018:
            add("type", f"{kind:#x}", *forge(type=kind.to_bytes(2, "big")))
    public_name = b"\x00\x0b" + hashlib.sha256(good).digest()
    owner = hashlib.sha256(bytes.fromhex("40000001") + public_name).digest()
    add("qualifiedSigner", "the owner's hierarchy", *forge(qualifiedSigner=b"\0\x22\0\x0b" + owner))
    add("extraData", "another transcript", *forge(extraData=b"\0\x20" + OTHER))
    add("extraData", "a shorter one", *forge(extraData=b"\0\x1f" + DATA))
    for selection in (
        "00000001 000b 03 ff0000",  # fewer
        "00000001 000b 03 ff0300",  # more
        "00000001 000b 03 00ff02",  # others
        "00000001 0004 03 ff0200",  # the SHA-1 bank
        "00000001 000c 03 ff0200",  # the SHA-384 bank
        "00000000 000b 03 ff0200",
        "00000002 000b 03 ff0200",
        "00000001 000b 02 ff0200",
    ):
        add("pcrSelect", selection, *forge(pcrSelect=bytes.fromhex(selection)))
    digest = hashlib.sha256(VALUES)
    add("pcrDigest", "of other values", *forge(pcrDigest=b"\0\x20" + hashlib.sha256(b"").digest()))
    add("pcrDigest", "shorter", *forge(pcrDigest=b"\0\x1f" + digest.digest()))
    for algorithms in ("0016000b0100", "001400040100", "0014000c0100", "0014000b00ff"):
        add("sigAlg", algorithms, *forge(sigAlg=bytes.fromhex(algorithms)))
    for what, encoding in BAD_ENCODINGS.items():
        add("signature", what, *forge(encoding=encoding))
    proof, reference = forge()
    signature = int.from_bytes(proof[153:409], "big")
    for what, value in (
        ("zero", 0),
        ("one", 1),
        ("the modulus", modulus),
        ("minus one", modulus - 1),
        ("negated", modulus - signature),
    ):
        add("signature", what, *forge(signature=value.to_bytes(256, "big")))
    while signature + modulus >= 1 << 2048:  # until one fits that is too large by the modulus
        proof, reference = forge(firmwareVersion=os.urandom(8))
        signature = int.from_bytes(proof[153:409], "big")
    large = (signature + modulus).to_bytes(256, "big")
    add("signature", "plus the modulus", proof[:153] + large + proof[409:], reference)
    for pcr in map(str, mp.PCRS):
        proof, reference = forge()
        reference["pcrs"][pcr] = "ab" * 32
        add(f"PCR {pcr}", "another reference value", proof, reference)
        add(f"PCR {pcr}", "no reference value", *without(pcr))
    for at in range(8):
        add("PCRs at zero", f"PCR {at}", *forge(values=zeroed(at)))
    add("PCRs at zero", "PCR 9 extended", *forge(values=VALUES[:-32] + b"\x01" * 32))
    add("PCRs at zero", "all", *forge(values=bytes(288)))
    proof, reference = forge()
    for size in (*range(0, len(proof), 7), *range(len(proof) - 9, len(proof))):
        add("proof", f"cut to {size}", proof[:size], reference)
    add("proof", "a trailing octet", proof + b"\0", reference)
    add("proof", "twice", proof + proof, reference)
    return cases


def short_padding(message):
    """Bleichenbacher's 2006 form: little padding, the hash, then anything."""
    end = muproxy.DIGEST_INFO + hashlib.sha256(message).digest()
    head = b"\x00\x01" + b"\xff" * 8 + b"\x00" + end
    return head + random.Random(1).randbytes(256 - len(head))


SHA1_INFO = bytes.fromhex("3021300906052b0e03021a05000414")
NO_PARAMETERS = bytes.fromhex("302f300b0609608648016503040201") + b"\x04\x20"
LONG_FORM = bytes.fromhex("308131300d060960864801650304020105000420")
BAD_ENCODINGS = {
    "short padding, garbage behind the hash": short_padding,
    "block type 2": lambda m: b"\x00\x02" + encode(m)[2:],
    "block type 0": lambda m: b"\x00\x00" + encode(m)[2:],
    "an octet of padding that is not ff": lambda m: encode(m)[:90] + b"\xfe" + encode(m)[91:],
    "no zero behind the padding": lambda m: encode(m).replace(b"\xff\x00\x30", b"\xff\xff\x30"),
    "no DigestInfo": lambda m: encode(m, b""),
    "DigestInfo without parameters": lambda m: encode(m, NO_PARAMETERS),
    "DigestInfo with a length in long form": lambda m: encode(m, LONG_FORM),
    "SHA-1": lambda m: encode(m, SHA1_INFO, hashlib.sha1),
    "SHA-256 named, SHA-1 inside": lambda m: encode(m, hashed=hashlib.sha1),
    "SHA-512": lambda m: encode(m, bytes.fromhex("3051300d060960864801650304020305000440"))[:],
    "of another message": lambda m: encode(m + b"\0"),
}


class Verifier(unittest.TestCase):
    """muproxy.verify_tpm2 alone: quotes that a key in software signed."""

    def test_good(self):
        proof, reference = forge()
        checks = verify(proof, reference)
        self.assertEqual([check.name for check in checks if not check.ok], [])
        self.assertEqual(len(checks), 20)

    def test_clock_and_firmware_version_may_be_any(self):
        proof, reference = forge(clockInfo=os.urandom(17), firmwareVersion=os.urandom(8))
        self.assertEqual(failed(proof, reference), [])

    def test_each_check_refuses_alone(self):
        cases = refused_alone()
        for name, what, proof, reference in cases:
            with self.subTest(check=name, case=what):
                self.assertEqual(failed(proof, reference), [name])
        names = {check.name for check in verify(*forge())}
        self.assertEqual({case[0] for case in cases}, names | {"proof"})

    def test_every_mismatch_is_listed(self):
        proof, reference = forge()
        pcrs = {"0": "ab" * 32, "4": "cd" * 32, "9": "00" * 32}
        checks = verify(proof, reference | {"pcrs": pcrs}, OTHER)
        text = str(muproxy.Refusal(checks))
        got = {pcr: VALUES[32 * at :][:32].hex() for at, pcr in enumerate(mp.PCRS)}
        for pcr in mp.PCRS[:8]:
            expected = pcrs.get(str(pcr), "a reference value")
            self.assertIn(f"PCR {pcr}: expected {expected}, got {got[pcr]}", text)
        self.assertIn(f"extraData: expected 0020{OTHER.hex()}, got 0020{DATA.hex()}", text)
        self.assertNotIn("PCR 9", text)
        self.assertNotIn("\n", text)

    def test_reference_without_a_key_or_pcrs(self):
        proof, reference = forge()
        wrong = failed(proof, {"pcrs": reference["pcrs"]})
        self.assertEqual(wrong, ["attestation key", "qualifiedSigner", "signature"])
        wrong = failed(proof, {"attestation_key": reference["attestation_key"]})
        self.assertEqual(wrong, [f"PCR {pcr}" for pcr in mp.PCRS])
        for key in ("", "00", "00" * 280, reference["attestation_key"][:-2]):
            self.assertIn("attestation key", failed(proof, reference | {"attestation_key": key}))

    def test_exponent_3(self):
        """A key with a low exponent is refused by its form, whatever it signed."""
        modulus, _ = software_key()
        form = mp.ATTESTATION_KEY[:-4] + (3).to_bytes(4, "big")
        proof, reference = forge(public=form + mp.tpm2b(modulus.to_bytes(256, "big")))
        self.assertEqual(failed(proof, reference), ["attestation key"])

    def test_zeros_are_named(self):
        for values, text in ((VALUES[:-32] + b"\x01" * 32, "none"), (zeroed(3), "3 9")):
            (check,) = (c for c in verify(*forge(values)) if not c.ok)
            self.assertEqual(check, ("PCRs at zero", "9", text, False))

    def test_random_proofs(self):
        rng = random.Random(5)
        _, reference = forge()
        for _ in range(300):
            size = rng.choice((0, 1, 146, 697, 697, 697, 698, 4096))
            self.assertTrue(failed(rng.randbytes(size), reference))

    def test_schema_of_reference_values(self):
        _, values = forge()
        facts = {"version": 1, "kind": "tpm2", "root": "fixture", "withdrawn": []}
        good = facts | values | {"measurement": "ab" * 32}
        mp.parse_message(mp.encode_json(good), muproxy.REFERENCE)
        for wrong in (
            {"attestation_key": values["attestation_key"][2:]},
            {"attestation_key": values["attestation_key"].upper()},
            {"pcrs": {"8": "ab" * 32}},
            {"pcrs": {"0": "ab" * 31}},
            {"pcrs": []},
        ):
            with self.assertRaises(mp.ProtocolError):
                mp.parse_message(mp.encode_json(good | wrong), muproxy.REFERENCE)


@needs_programs
class Quotes(unittest.TestCase):
    """The guest's evidence of a real TPM, and the proxy's checks of it."""

    @classmethod
    def setUpClass(cls):
        cls.folder = entered(tempfile.TemporaryDirectory(), cls.addClassCleanup)
        cls.tpm = SoftwareTpm(cls.folder)
        cls.addClassCleanup(cls.tpm.close)
        cls.tpm.boot()
        cls.guest, cls.reference = cls.tpm.evidence()
        key = enroll.attestation_key(cls.tpm.channel)
        cls.key, _ = entered(key, cls.addClassCleanup)

    def test_good(self):
        for data in (DATA, OTHER):
            proof = self.guest.produce("user", data)
            self.assertEqual(failed(proof, self.reference, data), [])
        self.assertLess(len(proof), mp.HANDSHAKE_FRAME)

    def test_replayed(self):
        proof = self.guest.produce("user", DATA)
        self.assertEqual(failed(proof, self.reference, OTHER), ["extraData"])

    def test_every_bit(self):
        proof = self.guest.produce("user", DATA)
        for at in range(8 * len(proof)):
            flipped = bytearray(proof)
            flipped[at // 8] ^= 1 << at % 8
            self.assertTrue(failed(bytes(flipped), self.reference), at)

    def test_every_length(self):
        proof = self.guest.produce("user", DATA)
        for size in range(len(proof)):
            self.assertEqual(failed(proof[:size], self.reference), ["proof"])
            inner = proof[:size] + proof[size + 1 :]
            self.assertEqual(failed(inner, self.reference), ["proof"])
            if inner + b"\0" != proof:
                self.assertTrue(failed(inner + b"\0", self.reference))
        self.assertEqual(failed(proof + b"\0", self.reference), ["proof"])

    def test_other_selections(self):
        sha256 = mp.pcr_selection(*mp.PCRS)
        sha1 = sha256[:4] + TPM_ALG_SHA1.to_bytes(2, "big") + sha256[6:]
        self.assertEqual(failed(quote(self.tpm, self.key, sha256), self.reference), [])
        for selection in (mp.pcr_selection(*range(8)), mp.pcr_selection(*mp.PCRS, 10), sha1):
            proof = quote(self.tpm, self.key, selection)
            self.assertEqual(failed(proof, self.reference), ["pcrSelect", "pcrDigest"])
        split = [mp.pcr_selection(*pcrs)[4:] for pcrs in (range(4, 8), (0, 1, 2, 3, 9))]
        for parts in (split, [sha256[4:], sha1[4:]], [sha1[4:], sha256[4:]]):
            selection = len(parts).to_bytes(4, "big") + b"".join(parts)
            proof = quote(self.tpm, self.key, selection)
            self.assertEqual(failed(proof, self.reference), ["proof"])

    def test_other_keys_of_this_tpm(self):
        """Their quotes are refused by the reference's key, and as the reference's own key."""
        cases = {
            "unrestricted": mp.SIGNING_KEY & ~(1 << BIT["restricted"]),
            "can be duplicated": mp.SIGNING_KEY & ~(1 << BIT["fixedTPM"] | 1 << BIT["fixedParent"]),
        }
        decrypt = mp.SIGNING_KEY & ~(1 << BIT["restricted"]) | 1 << BIT["decrypt"]
        for what, attributes in (*cases.items(), ("decrypts", decrypt)):
            form = bytearray(mp.ATTESTATION_KEY)
            form[4:8] = attributes.to_bytes(4, "big")
            scheme = NULL
            if what == "decrypts":  # such a key has no scheme of its own
                form[12:16] = NULL
                scheme = struct.pack(">HH", mp.TPM_ALG_RSASSA, mp.TPM_ALG_SHA256)
            with self.subTest(key=what), self.primary(bytes(form)) as (handle, public):
                proof = quote(self.tpm, handle, mp.pcr_selection(*mp.PCRS), scheme=scheme)
                own = self.reference | {"attestation_key": public.hex()}
                wrong = failed(proof, own)
                self.assertIn("attestation key", wrong)
                self.assertLessEqual(
                    set(wrong), {"attestation key", "qualifiedSigner", "signature"}
                )
                wrong = failed(proof, self.reference)
                self.assertEqual(wrong, ["qualifiedSigner", "signature"])

    def primary(self, form):
        """Another primary key, for a while: a TPM has few places."""
        return self.tpm.channel.primary(form + bytes(2))

    def test_other_attestations(self):
        """What the same key signs that is no quote."""
        values = self.tpm.values()
        twice = PASSWORD + PASSWORD
        request = mp.tpm2b(DATA) + NULL
        time = attest(self.tpm, TPM_CC_GET_TIME, ENDORSEMENT + self.key, request, twice)
        certified = attest(self.tpm, TPM_CC_CERTIFY, self.key + self.key, request, twice)
        for proof in (time, certified):
            self.assertEqual(failed(proof + values, self.reference), ["proof"])
            self.assertTrue(failed((proof + bytes(500))[:409] + values, self.reference))
        index = bytes.fromhex("01500000")
        attributes = bytes.fromhex("02040004")  # TPMA_NV: AUTHWRITE, AUTHREAD, NO_DA
        public = index + mp.TPM_ALG_SHA256.to_bytes(2, "big") + attributes + bytes(2) + b"\0\4"
        self.tpm.command(TPM_CC_NV_DEFINE_SPACE, OWNER, bytes(2) + mp.tpm2b(public), PASSWORD)
        self.tpm.command(TPM_CC_NV_WRITE, index + index, mp.tpm2b(b"abcd") + bytes(2), PASSWORD)
        request += struct.pack(">HH", 4, 0)
        handles = self.key + index + index
        nv = attest(self.tpm, TPM_CC_NV_CERTIFY, handles, request, twice)
        wrong = failed(nv + values, self.reference)
        self.assertEqual(wrong, ["type", "pcrSelect", "pcrDigest"])

    def test_another_tpm(self):
        with tempfile.TemporaryDirectory() as folder:
            other = SoftwareTpm(folder)
            with contextlib.closing(other):
                other.boot()
                guest, reference = other.evidence()
                proof = guest.produce("user", DATA)
        self.assertEqual(failed(proof, reference), [])
        self.assertEqual(failed(proof, self.reference), ["qualifiedSigner", "signature"])

    def test_boots(self):
        """The same key at every boot; another image gives another PCR 4; no boot gives zeros."""
        with tempfile.TemporaryDirectory() as folder:
            tpm = SoftwareTpm(folder)
            with contextlib.closing(tpm):
                guest, unbooted = tpm.evidence()
                self.assertEqual(failed(guest.produce("user", DATA), unbooted), ["PCRs at zero"])
                tpm.boot()
                guest, reference = tpm.evidence()
                tpm.kill()
                tpm.start()
                tpm.boot()
                guest, _ = tpm.evidence()
                self.assertEqual(failed(guest.produce("user", DATA), reference), [])
                tpm.kill()
                tpm.start()
                with self.assertRaises(OSError):  # the key went with the power
                    guest.produce("user", DATA)
                tpm.boot(b"another image")
                guest, _ = tpm.evidence()
                self.assertEqual(failed(guest.produce("user", DATA), reference), ["PCR 4"])
                tpm.extend(9, bytes(32))
                guest, _ = tpm.evidence()
                wrong = failed(guest.produce("user", DATA), reference)
                self.assertEqual(wrong, ["PCR 4", "PCR 9", "PCRs at zero"])

    def test_extended_after_start(self):
        """A PCR that changes under a running gate: the quote no longer fits what it says."""
        with tempfile.TemporaryDirectory() as folder:
            tpm = SoftwareTpm(folder)
            with contextlib.closing(tpm):
                tpm.boot()
                guest, reference = tpm.evidence()
                tpm.extend(7, bytes(32))
                self.assertEqual(failed(guest.produce("user", DATA), reference), ["pcrDigest"])

    def files(self):
        """Quote, signature and public key in files, as other programs read them."""
        folder = pathlib.Path(entered(tempfile.TemporaryDirectory(), self.addCleanup))
        proof = self.guest.produce("user", DATA)
        (folder / "quote").write_bytes(proof[2:147])
        (folder / "tss").write_bytes(proof[147:409])
        (folder / "plain").write_bytes(proof[153:409])
        (folder / "pcrs").write_bytes(serialized(proof[409:]))
        public = bytes.fromhex(self.reference["attestation_key"])
        (folder / "public.tss").write_bytes(mp.tpm2b(public))
        command = ["tpm2_print", "-t", "TPM2B_PUBLIC", "-f", "pem", folder / "public.tss"]
        pem = subprocess.run(command, capture_output=True, check=True).stdout
        (folder / "public.pem").write_bytes(pem)
        return folder

    def check_quote(self, folder, nonce):
        """Whether tpm2-tools accept it."""
        command = ["tpm2_checkquote", "-u", "public.pem", "-m", "quote", "-s", "tss"]
        command += ["-f", "pcrs", "-q", nonce.hex()]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    def test_tpm2_tools_agree(self):
        folder = self.files()
        done = self.check_quote(folder, DATA)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertNotEqual(self.check_quote(folder, OTHER).returncode, 0)
        (folder / "pcrs").write_bytes(serialized(bytes(288)))
        self.assertNotEqual(self.check_quote(folder, DATA).returncode, 0)

    def test_openssl_agrees(self):
        folder = self.files()
        command = ["openssl", "dgst", "-sha256", "-verify", "public.pem", "-signature", "plain"]
        for ending, status in ((b"", 0), (b"\0", 1)):
            quoted = (folder / "quote").read_bytes() + ending
            (folder / "message").write_bytes(quoted)
            done = subprocess.run([*command, "message"], cwd=folder, capture_output=True)
            self.assertEqual(done.returncode, status, done.stderr)

    def test_quote_by_tpm2_tools(self):
        """Another program makes the key and the quote; our verifier takes them."""
        folder = pathlib.Path(entered(tempfile.TemporaryDirectory(), self.addCleanup))
        tpm = SoftwareTpm(entered(tempfile.TemporaryDirectory(), self.addCleanup))
        self.addCleanup(tpm.close)
        tpm.boot()
        environment = os.environ | {"TPM2TOOLS_TCTI": f"device:{tpm.path}"}
        attributes = "restricted|sign|fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda"
        create = ["tpm2_createprimary", "-C", "e", "-G", "rsa2048:rsassa-sha256:null"]
        create += ["-a", attributes, "-c", "key"]
        public = ["tpm2_readpublic", "-c", "key", "-o", "public"]
        select = "sha256:" + ",".join(map(str, mp.PCRS))
        make = ["tpm2_quote", "-c", "key", "-l", select, "-q", DATA.hex(), "-m", "q", "-s", "s"]
        for command in (create, public, make):
            options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
            done = subprocess.run(command, **options)
            self.assertEqual(done.returncode, 0, done.stderr)
        _, reference = tpm.evidence()
        reference["attestation_key"] = (folder / "public").read_bytes()[2:].hex()
        values = bytes.fromhex("".join(reference["pcrs"].values()))
        proof = mp.tpm2b((folder / "q").read_bytes()) + (folder / "s").read_bytes() + values
        self.assertEqual(failed(proof, reference), [])
        self.assertEqual(failed(proof, reference, OTHER), ["extraData"])


class FakeTpm:
    """A pseudo-terminal behind which `answer` (command -> bytes) takes a TPM's place."""

    def __init__(self, answer):
        self.answer, self.is_open = answer, True
        self.master, self.device = pty.openpty()
        tty.setraw(self.device)
        self.path = os.ttyname(self.device)
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        """Answer until it is closed."""
        while self.is_open:
            if mp.is_readable(self.master, 0.02):
                os.write(self.master, self.answer(os.read(self.master, 4096)))

    def close(self):
        """Take the device away."""
        self.is_open = False
        self.thread.join()
        os.close(self.device)
        os.close(self.master)


class Garbage(unittest.TestCase):
    """Before a TPM that answers anything: one kind of error, or refused bytes."""

    def fake(self, answer):
        """The path of a FakeTpm."""
        tpm = FakeTpm(answer)
        self.addCleanup(tpm.close)
        return tpm.path

    def pair(self):
        """A channel of tools/enroll.py, and the end where a TPM would be."""
        folder = entered(tempfile.TemporaryDirectory(), self.addCleanup)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/tpm")
            listener.listen()
            channel = entered(enroll.Tpm(f"{folder}/tpm"), self.addCleanup)
            theirs = listener.accept()[0]
        self.addCleanup(theirs.close)
        return channel, theirs

    def test_a_response_in_pieces(self):
        channel, theirs = self.pair()
        response = struct.pack(">HII", 0x8001, 30, 0) + bytes(range(20))

        def send():
            for at in range(0, 30, 7):
                theirs.send(response[at : at + 7])

        thread = threading.Thread(target=send)
        thread.start()
        self.assertEqual(channel.command(0x17B), bytes(range(20)))
        thread.join()
        self.assertEqual(theirs.recv(100), struct.pack(">HII", 0x8001, 10, 0x17B))

    def test_an_end_is_an_error(self):
        channel, theirs = self.pair()
        theirs.send(b"\x80\x01\0\0")
        theirs.shutdown(socket.SHUT_WR)
        with self.assertRaisesRegex(OSError, "does not answer"):
            channel.command(0x17B)

    @mock.patch.object(enroll, "TPM_SECONDS", 0.05)
    def test_never_answers(self):
        channel, _ = self.pair()
        with self.assertRaisesRegex(OSError, "does not answer"):
            channel.command(0x17B)

    def test_random_answers(self):
        rng = random.Random(3)
        started = 0
        for number in range(60):

            def answer(command, kind=number % 3):
                body = rng.randbytes(rng.choice((0, 1, 8, 100, 600)))
                size = 10 + len(body) - (kind == 1) * rng.randrange(1, 6)
                status = (kind == 2) * rng.getrandbits(1)
                return struct.pack(">HII", 0x8002, size, status) + body

            with contextlib.suppress(OSError):
                guest = muenclave.Tpm2({"ENCLAVE_TPM": self.fake(answer)})
                started += 1
                for _ in range(3):
                    proof = guest.produce("user", DATA)
                    self.assertTrue(failed(proof, forge()[1]))
        self.assertGreater(started, 10)

    def test_no_tpm(self):
        for path in ("/nonexistent/tpm0", "/dev/null", "/", "/dev/zero"):
            with self.assertRaises(OSError):
                muenclave.Tpm2({"ENCLAVE_TPM": path})


@needs_programs
class Enclave(unittest.TestCase):
    """The whole way: a gate with a TPM, reference values by tools/enroll.py, our command line."""

    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(entered(tempfile.TemporaryDirectory(), cls.addClassCleanup))
        (cls.folder / "tpm").mkdir()
        cls.tpm = SoftwareTpm(cls.folder / "tpm")
        cls.addClassCleanup(cls.tpm.close)
        cls.tpm.boot()
        cls.site = support.make_site(cls.folder)
        run_enroll(cls.site.reference, "--tpm", cls.tpm.path)
        cls.enclave = entered(cls.start(), cls.addClassCleanup)
        port = f"127.0.0.1:{cls.enclave.port}"
        cls.enrolled = run_enroll(cls.site.reference, "--enclave", port)
        cls.reference = json.loads(cls.site.reference.read_text())

    @classmethod
    def start(cls, *flags):
        """An enclave on this TPM."""
        flags = ("--evidence", "tpm2", "--tpm", cls.tpm.path, *flags)
        return support.Enclave(cls.site, *flags)

    def flags(self, **values):
        """Flags of the command line, with reference values that differ in these."""
        path = self.folder / "other.json"
        path.write_text(json.dumps(self.reference | values))
        return ["--port", self.enclave.port, "--reference", path]

    def test_what_was_predicted_must_agree(self):
        """PCRs that the file has already are compared; the rest are recorded once more."""
        port = f"127.0.0.1:{self.enclave.port}"
        path = self.folder / "predicted.json"
        pcrs = self.reference["pcrs"]
        some = {pcr: pcrs[pcr] for pcr in ("4", "9")}
        path.write_text(json.dumps(self.reference | {"pcrs": some}))
        run_enroll(path, "--enclave", port)
        self.assertEqual(json.loads(path.read_text()), self.reference)
        for values in (
            {"pcrs": some | {"4": "ab" * 32}},
            {"pcrs": some, "measurement": "00" * 32},
            {"attestation_key": public_area(software_key()[0]).hex()},
        ):
            text = json.dumps(self.reference | values)
            path.write_text(text)
            done = enroll_command(path, "--enclave", port)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertRegex(done.stderr, r"\Aenroll: error: [^\n]+ is not what the file says: ")
            self.assertEqual(path.read_text(), text)

    def test_enrolled(self):
        self.assertEqual((self.reference["kind"], self.reference["root"]), ("tpm2", "fixture"))
        self.assertEqual(set(self.reference["pcrs"]), set(map(str, mp.PCRS)))
        self.assertEqual(self.reference["pcrs"]["9"], "00" * 32)
        self.assertIn("\nPCRs not enrolled yet: none\n", self.enrolled.stdout)

    def test_attest(self):
        done = support.proxy("attest", *self.flags(), "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        facts = json.loads(done.stdout)
        self.assertEqual((facts["verified"], facts["kind"]), (True, "tpm2"))
        names = {check["name"] for check in facts["checks"]}
        self.assertLessEqual({"signature", "PCR 4", "measurement", "withdrawn"}, names)

    def test_every_mismatch(self):
        pcrs = self.reference["pcrs"] | {"4": "ab" * 32, "7": "cd" * 32}
        measurement = self.reference["measurement"]
        wrong = {"pcrs": pcrs, "measurement": "00" * 32, "withdrawn": [measurement]}
        done = support.proxy("attest", *self.flags(**wrong))
        self.assertEqual(done.returncode, 1)
        lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        got = self.reference["pcrs"]
        self.assertEqual(
            lines,
            [
                f"FAILED PCR 4: expected {'ab' * 32}, got {got['4']}",
                f"FAILED PCR 7: expected {'cd' * 32}, got {got['7']}",
                f"FAILED measurement: expected {'00' * 32}, got {measurement}",
                "FAILED withdrawn: expected no, got yes",
            ],
        )

    def test_rollback(self):
        """An old image: refused by the new values, by its PCR 4, whatever it says of itself; and by
        its own, once they name themselves as withdrawn.
        """
        old, got = self.reference["measurement"], self.reference["pcrs"]["4"]
        pcrs = self.reference["pcrs"] | {"4": "ab" * 32}
        for values, wrong in (
            ({"pcrs": pcrs, "measurement": "00" * 32, "withdrawn": [old]}, "withdrawn"),
            ({"pcrs": pcrs}, f"PCR 4: expected {'ab' * 32}, got {got}"),  # it says what is wanted
            ({"withdrawn": [old]}, "withdrawn: expected no, got yes"),
        ):
            with self.assertRaises(muproxy.Refusal) as caught:
                self.enclave.session("owner", reference=self.reference | values)
            self.assertIn(wrong, str(caught.exception))
        own = ["--key", self.site.key, "--model", self.site.model, "--token-file", self.site.token]
        own += ["--ledger", self.site.ledger, "--new-ledger"]
        done = support.own("unlock", *self.flags(withdrawn=[old]), *own, "--development")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("withdrawn: expected no, got yes", done.stderr)
        with contextlib.closing(self.enclave.session()) as session:
            self.assertEqual(session.measurement["status"], "locked")

    def test_refused_by_the_library(self):
        public = public_area(software_key()[0]).hex()
        missing = {pcr: value for pcr, value in self.reference["pcrs"].items() if pcr != "2"}
        for values, names in (
            ({"attestation_key": public}, {"qualifiedSigner", "signature"}),
            ({"pcrs": missing}, {"PCR 2"}),
            ({"pcrs": {}}, {f"PCR {pcr}" for pcr in mp.PCRS}),
        ):
            with self.assertRaises(muproxy.Refusal) as caught:
                self.enclave.session(reference=self.reference | values)
            wrong = {check.name for check in caught.exception.checks if not check.ok}
            self.assertEqual(wrong, names)

    def test_other_kinds(self):
        for kind in ("psk", "tsm"):
            error = muproxy.Failure if kind == "tsm" else mp.ProtocolError
            with self.assertRaises(error):
                self.enclave.session(reference=self.reference | {"kind": kind})

    def test_unlock_and_answer(self):
        own = ["--key", self.site.key, "--model", self.site.model, "--token-file", self.site.token]
        own += ["--ledger", self.site.ledger, "--new-ledger"]
        own += ["--budget", 10**6, "--lifetime-budget", 10**6]
        done = support.own("unlock", *self.flags(), *own)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("a software TPM in a real one's place", done.stderr)
        with self.start() as enclave:
            flags = ["--port", enclave.port, "--reference", self.site.reference, "--development"]
            done = support.own("unlock", *flags, *own)
            self.assertEqual(done.returncode, 0, done.stderr)
            with enclave.ready() as session:
                request = {"prompt": "The Zen", "max_new_tokens": 4, "temperature": 0}
                table = muproxy.read_vocabulary(self.site.vocabulary)
                text = "".join(session.generate(request, table))
            self.assertTrue(text)
            before = len(enclave.lines)
            with contextlib.closing(enclave.session("owner")) as session:
                session.prove({k: v for k, v in enclave.unlock_token().items() if k != "lease"})
                session.command({"lock": True})
            port = enclave.wait_for("listening", before).split()[-1]
            enclave.address = ("127.0.0.1", int(port))
            enclave.session().close()  # another gate, with the same key

    def test_tpm_that_goes_away(self):
        """No evidence, no session; the enclave outlives it, and a key that was lost stays lost."""
        with tempfile.TemporaryDirectory() as folder:
            tpm = SoftwareTpm(folder)
            self.addCleanup(tpm.close)
            tpm.boot()
            flags = ("--evidence", "tpm2", "--tpm", tpm.path)
            _, reference = tpm.evidence()
            reference = self.reference | reference
            with support.Enclave(self.site, *flags) as enclave:
                enclave.session(reference=reference).close()
                tpm.kill()
                for answer in (b"\0" * 10, b"\x80\x01\0\0\0\x0a\0\0\0\0", bytes(600)):
                    thread = threading.Thread(target=self.answer_once, args=(tpm, answer))
                    thread.start()
                    with self.assertRaises(mp.ProtocolError):
                        enclave.session(reference=reference)
                    thread.join()
                tpm.start()
                tpm.boot()
                with self.assertRaises(mp.ProtocolError) as caught:
                    enclave.session(reference=reference)
                self.assertEqual(caught.exception.code, "connection_lost")
                self.assertIsNone(enclave.process.poll())
                self.assertEqual(enclave.lines[2:], [])

    def answer_once(self, tpm, answer):
        """Take the TPM's place for one command."""
        os.read(tpm.master, 4096)
        os.write(tpm.master, answer)

    def test_start_without_a_tpm(self):
        command = [sys.executable, "-B", support.TOOLS / "enclave.py", "--port", "0"]
        command += ["--evidence", "tpm2", "--model", self.site.model]
        for path, said in (
            ("/nonexistent/tpm0", "enclave: error: ENCLAVE_TPM: no TPM at /nonexistent/tpm0\n"),
            ("/dev/null", "muenclave: error: the TPM does not answer\nmuenclave: stopped\n"),
        ):
            done = subprocess.run([*command, "--tpm", path], capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout, done.stderr), (1, "", said))


def run_enroll(*arguments):
    """tools/enroll.py, which has to succeed."""
    done = enroll_command(*arguments)
    assert done.returncode == 0, done.stderr
    return done


def enroll_command(*arguments):
    """tools/enroll.py as an owner runs it."""
    command = [sys.executable, "-B", support.TOOLS / "enroll.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


class Authority:
    """A maker of TPMs: a root, under it an issuer, and certificates of endorsement keys."""

    def __init__(self, folder, name="ACME"):
        from cryptography.hazmat.primitives.asymmetric import ec

        self.folder, self.name = folder, name
        self.root_key, self.key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        self.root = self.certify(f"{name} root", self.root_key.public_key(), True, None)
        self.issuer = self.certify(f"{name} TPM CA", self.key.public_key(), True, self.root)

    def certify(self, subject, public, is_authority, issuer, days=(-1, 365), extensions=()):
        """A certificate of a public key."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes

        def name(text):
            named = [x509.NameAttribute(x509.NameOID.COMMON_NAME, text)] if text else []
            return x509.Name(named)

        now = datetime.datetime.now(datetime.timezone.utc)
        builder = x509.CertificateBuilder().subject_name(name(subject)).public_key(public)
        builder = builder.issuer_name(issuer.subject if issuer else name(subject))
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now + datetime.timedelta(days[0]))
        builder = builder.not_valid_after(now + datetime.timedelta(days[1]))
        basic = x509.BasicConstraints(is_authority, None)
        for extension, critical in ((basic, True), *extensions):
            builder = builder.add_extension(extension, critical)
        key = self.key if subject is None else self.root_key
        return builder.sign(key, hashes.SHA256())

    def endorse(self, modulus, model="A1", purpose=enroll.EK_PURPOSE, **options):
        """The DER of a certificate of an RSA-2048 EK, as the EK Credential Profile has it."""
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import rsa
        from cryptography.hazmat.primitives.serialization import Encoding

        named = x509.NameAttribute(x509.ObjectIdentifier(enroll.TPM_MODEL), model)
        names = x509.SubjectAlternativeName([x509.DirectoryName(x509.Name([named]))])
        purposes = x509.ExtendedKeyUsage([x509.ObjectIdentifier(purpose)])
        public = rsa.RSAPublicNumbers(65537, int.from_bytes(modulus, "big")).public_key()
        extensions = ((names, True), (purposes, False))
        options |= {"extensions": extensions}
        return self.certify(None, public, False, self.issuer, **options).public_bytes(Encoding.DER)

    def file(self, *certificates):
        """A file of certificates in PEM."""
        from cryptography.hazmat.primitives.serialization import Encoding

        path = self.folder / f"{self.name}.pem"
        path.write_bytes(b"".join(c.public_bytes(Encoding.PEM) for c in certificates))
        return path


@needs_programs
class Enroll(unittest.TestCase):
    """tools/enroll.py and a TPM whose EK is certified."""

    def setUp(self):
        self.folder = pathlib.Path(entered(tempfile.TemporaryDirectory(), self.addCleanup))
        (self.folder / "tpm").mkdir()
        self.tpm = SoftwareTpm(self.folder / "tpm")
        self.addCleanup(self.tpm.close)
        self.tpm.boot()
        self.authority = Authority(self.folder)
        self.file = self.folder / "reference.json"
        facts = {"version": 1, "kind": "psk", "root": "psk", "withdrawn": ["cd" * 32]}
        self.write(facts | {"measurement": "ab" * 32})
        with self.endorsement() as (_, public):
            self.modulus = public[-256:]

    def endorsement(self):
        """(handle, TPMT_PUBLIC) of the EK, for a while."""
        return self.tpm.channel.primary(enroll.EK_TEMPLATE + mp.tpm2b(bytes(256)))

    def write(self, reference):
        self.file.write_text(json.dumps(reference))

    def store(self, der, padding=0):
        """Write an EK certificate where a TPM's maker puts it; the index may be longer."""
        index = enroll.EK_CERTIFICATE.to_bytes(4, "big")
        attributes = bytes.fromhex("02060006")  # TPMA_NV: OWNER and AUTH, READ and WRITE; NO_DA
        size = struct.pack(">H", len(der) + padding)
        public = index + mp.TPM_ALG_SHA256.to_bytes(2, "big") + attributes + bytes(2) + size
        self.tpm.command(TPM_CC_NV_DEFINE_SPACE, OWNER, bytes(2) + mp.tpm2b(public), PASSWORD)
        data = der + bytes(padding)
        for at in range(0, len(data), 512):
            block = mp.tpm2b(data[at : at + 512]) + at.to_bytes(2, "big")
            self.tpm.command(TPM_CC_NV_WRITE, OWNER + index, block, PASSWORD)

    def enroll(self, *flags):
        return enroll_command(self.file, "--tpm", self.tpm.path, *flags)

    def assertRefused(self, words, *flags):
        """One line that holds the words; the file is as it was."""
        before = self.file.read_bytes()
        done = self.enroll(*flags)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, r"\Aenroll: error: [^\n]+\n\Z")
        self.assertIn(words, done.stderr)
        self.assertEqual(self.file.read_bytes(), before)

    def test_without_issuer(self):
        done = self.enroll()
        self.assertEqual(done.returncode, 0, done.stderr)
        values = json.loads(self.file.read_text())
        self.assertEqual((values["kind"], values["root"]), ("tpm2", "fixture"))
        self.assertEqual((values["measurement"], values["withdrawn"]), ("ab" * 32, ["cd" * 32]))
        self.assertEqual(values["attestation_key"], self.tpm.public().hex())
        self.assertIn("root: fixture (a software TPM", done.stdout)
        self.assertIn("PCRs not enrolled yet: 0 1 2 3 4 5 6 7 9\n", done.stdout)

    def test_with_issuer(self):
        for padding in (0, 300):
            self.store(self.authority.endorse(self.modulus), padding)
            issuers = self.authority.file(self.authority.root, self.authority.issuer)
            done = self.enroll("--issuer", issuers)
            self.assertEqual(done.returncode, 0, done.stderr)
            root = json.loads(self.file.read_text())["root"]
            self.assertEqual(root, "ek:CN=ACME TPM CA")
            self.assertFalse(muproxy.is_for_development({"kind": "tpm2", "root": root}))
            self.undefine()

    def undefine(self):
        handles = OWNER + enroll.EK_CERTIFICATE.to_bytes(4, "big")
        self.tpm.command(0x122, handles, b"", PASSWORD)  # TPM2_NV_UndefineSpace

    def test_certificates(self):
        other = Authority(self.folder, "OTHER")
        root, issuer = self.authority.root, self.authority.issuer
        modulus = bytearray(self.modulus)
        modulus[5] ^= 1
        good = self.authority.endorse(self.modulus)
        for what, der, certificates, words in (
            ("none", None, (root, issuer), "no certificate"),
            ("garbage", b"\x30\x03\x02\x01\x01", (root, issuer), "is not one"),
            ("empty", b"\0", (root, issuer), "is not one"),
            ("cut", good[:-5], (root, issuer), "is not one"),
            ("another key's", self.authority.endorse(modulus), (root, issuer), "another key"),
            (
                "for a web server",
                self.authority.endorse(self.modulus, purpose="1.3.6.1.5.5.7.3.1"),
                (root, issuer),
                "not for an endorsement key",
            ),
            ("another maker's", other.endorse(self.modulus), (root, issuer), "does not lead"),
            ("without the root", good, (issuer,), "does not lead"),
            ("without the issuer", good, (root,), "does not lead"),
            (
                "expired",
                self.authority.endorse(self.modulus, days=(-9, -2)),
                (root, issuer),
                "does not lead",
            ),
            ("changed", good[:-1] + bytes([good[-1] ^ 1]), (root, issuer), "does not lead"),
        ):
            with self.subTest(certificate=what):
                if der is not None:
                    self.store(der)
                self.assertRefused(words, "--issuer", self.authority.file(*certificates))
                if der is not None:
                    self.undefine()
        self.store(good)
        self.assertRefused("No such file", "--issuer", self.folder / "absent")

    def test_software_tpm_stays_a_fixture(self):
        """swtpm's own certificates lead to a root, and say that they are swtpm's."""
        folder = self.folder / "setup"
        (folder / "ca").mkdir(parents=True)
        (folder / "state").mkdir()
        authority = {"statedir": "", "signingkey": "key.pem", "issuercert": "issuer.pem"}
        authority |= {"certserial": "serial"}
        lines = [f"{name} = {folder / 'ca' / file}" for name, file in authority.items()]
        (folder / "ca.conf").write_text("\n".join(lines) + "\n")
        (folder / "ca.options").write_text("--platform-manufacturer m --platform-model m\n")
        lines = [f"create_certs_tool = {shutil.which('swtpm_localca')}"]
        lines += [f"create_certs_tool_config = {folder / 'ca.conf'}"]
        lines += [f"create_certs_tool_options = {folder / 'ca.options'}"]
        (folder / "setup.conf").write_text("\n".join([*lines, "active_pcr_banks = sha256"]) + "\n")
        command = ["swtpm_setup", "--tpm2", "--tpmstate", folder / "state", "--create-ek-cert"]
        command += ["--config", folder / "setup.conf"]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        flags = []
        for name in ("issuer.pem", "swtpm-localca-rootca-cert.pem"):
            flags += ["--issuer", folder / "ca" / name]
        tpm = SoftwareTpm(folder / "state")
        with contextlib.closing(tpm):
            done = enroll_command(self.file, "--tpm", tpm.path, *flags)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(json.loads(self.file.read_text())["root"], "fixture")

    def test_credential_for_another_key(self):
        """A TPM opens a credential for a key that it holds, and for no other."""
        secret, modulus = os.urandom(32), software_key()[0].to_bytes(256, "big")
        other = muproxy.tpm_name(public_area(software_key()[0]))
        with enroll.attestation_key(self.tpm.channel) as (key, public):
            with self.endorsement() as (endorsement, _):
                name, facts = muproxy.tpm_name(public), (self.tpm.channel, key, endorsement)
                good = enroll.make_credential(self.modulus, name, secret)
                self.assertEqual(enroll.activate_credential(*facts, good), secret)
                for _ in range(5):  # and no session is left behind
                    for what, bad in (
                        ("another key", enroll.make_credential(self.modulus, other, secret)),
                        ("another EK", enroll.make_credential(modulus, name, secret)),
                        ("changed", good[:40] + bytes([good[40] ^ 1]) + good[41:]),
                    ):
                        with self.subTest(what), self.assertRaises(OSError):
                            enroll.activate_credential(*facts, bad)

    def test_over_sockets(self):
        """A command channel from elsewhere, as the owner's station would use it."""
        public = self.tpm.public().hex()
        self.tpm.kill()
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        path, control = self.folder / "socket", f"type=unixio,path={self.folder / 'control'}"
        for place, server in (
            (f"127.0.0.1:{port}", f"type=tcp,port={port}"),
            (path, f"type=unixio,path={path}"),
        ):
            command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.tpm.folder}"]
            command += ["--flags", "startup-clear", "--server", server, "--ctrl", control]
            with self.subTest(place=place), subprocess.Popen(command) as process:
                try:
                    for _ in range(100):
                        done = enroll_command(self.file, "--tpm", place)
                        if "can't reach" not in done.stderr:
                            break
                finally:
                    process.kill()
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertEqual(json.loads(self.file.read_text())["attestation_key"], public)

    def test_measuring_does_not_undo_it(self):
        self.assertEqual(self.enroll().returncode, 0)
        before = self.file.read_bytes()
        for more in ((), ("--manifest",)):
            command = [sys.executable, "-B", support.TOOLS / "measure.py", "--output", self.file]
            done = subprocess.run([*command, *more], capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            line = r"\Ameasure: error: [^\n]+ of kind tpm2, [^\n]+: give another --output\n\Z"
            self.assertRegex(done.stderr, line)
            self.assertEqual(self.file.read_bytes(), before)

    def test_another_tpm(self):
        values = json.loads(self.file.read_text())
        self.write(values | {"attestation_key": public_area(software_key()[0]).hex()})
        self.assertRefused("another TPM's attestation_key")
        self.assertEqual(self.enroll("--issuer").returncode, 2)

    def test_mistakes(self):
        unused = socket.create_server(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        unused.close()
        for flags, words in (
            (("--tpm", "/nonexistent/tpm0"), "can't reach a TPM"),
            (("--tpm", f"127.0.0.1:{port}"), "can't reach a TPM"),
            (("--tpm", "nowhere"), "can't reach a TPM"),
            (("--tpm", "/dev/null"), "the TPM does not answer"),
            (("--tpm", "/dev/zero"), "the TPM answers 0000"),
            (("--enclave", f"127.0.0.1:{port}"), "--tpm comes first"),
        ):
            done = enroll_command(self.file, *flags)
            self.assertEqual((done.returncode, done.stdout), (1, ""), flags)
            self.assertRegex(done.stderr, r"\Aenroll: error: [^\n]+\n\Z")
            self.assertIn(words, done.stderr)
        self.assertEqual(self.enroll().returncode, 0)
        done = enroll_command(self.file, "--enclave", f"127.0.0.1:{port}")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"\Aenroll: error: [^\n]+\n\Z")
        self.assertEqual(enroll_command(self.file).returncode, 2)
        self.assertEqual(enroll_command(self.folder / "absent", "--tpm", "/dev/null").returncode, 1)
