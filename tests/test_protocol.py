"""muprotocol against published vectors, its own vectors (tests/vectors), and its stated limits."""

import contextlib
import functools
import hashlib
import hmac
import json
import pathlib
import random
import socket
import struct
import unittest

from hypothesis import example, given, settings
from hypothesis import strategies as st

import muprotocol as mp

VECTORS = pathlib.Path(__file__).parent / "vectors"
RECORD_LIMIT = 8192
KEY = bytes(range(32))
GENERATED = settings(derandomize=True, database=None, deadline=None, max_examples=150)


def read_vector(path):
    """(header fields, body) of a vector file."""
    head, _, body = path.read_bytes().partition(b"\n\n")
    return dict(line.split(": ", 1) for line in head.decode().splitlines()), body


def outcome(action):
    """ "ok", or the code of the ProtocolError that an action raises."""
    try:
        action()
    except mp.ProtocolError as error:
        return error.code
    return "ok"


class Vectors(unittest.TestCase):
    """Each file of tests/vectors has the outcome that its header names."""

    def check(self, folder, least, action):
        paths = sorted((VECTORS / folder).iterdir())
        self.assertGreaterEqual(len(paths), least)
        for path in paths:
            fields, body = read_vector(path)
            with self.subTest(vector=f"{folder}/{path.name}"):
                self.assertIn(fields["expect"], ("ok", *mp.ERRORS))
                case = functools.partial(action, fields, body)
                self.assertEqual(outcome(case), fields["expect"])

    def test_json(self):
        self.check("json", 50, lambda fields, body: mp.parse_json(body))

    def test_message(self):
        self.check("message", 40, lambda f, body: mp.parse_message(body, getattr(mp, f["schema"])))

    def test_record(self):
        def read(fields, body):
            opener = mp.Opener(bytes.fromhex(fields["key"]), RECORD_LIMIT)
            frames = [bytes.fromhex(line) for line in body.decode().split()]
            messages = [opener.open(data[mp.FRAME_HEADER :]) for data in frames]
            self.assertIsNotNone(messages[-1])

        self.check("record", 20, read)

    def test_ids(self):
        def read(fields, body):
            make_vocabulary(int(fields["count"])).unpack(bytes.fromhex(body.decode()))

        self.check("ids", 10, read)

    def test_share(self):
        def read(fields, body):
            mp.KeyShare().agree(bytes.fromhex(body.decode()))

        self.check("share", 10, read)


def make_vocabulary(count):
    """A table of `count` different tokens."""
    return mp.Vocabulary(mp.encode_vocabulary([str(i).encode() for i in range(count)]))


class StrictJson(unittest.TestCase):
    """What canonical encoding and strict parsing promise each other."""

    VALUES = st.recursive(
        st.none() | st.booleans() | st.integers(-(1 << 64), 1 << 64) | st.text(max_size=8)
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4),
        max_leaves=12,
    )  # fmt: skip

    @GENERATED
    @given(st.dictionaries(st.text(max_size=8), VALUES, max_size=5))
    def test_round_trip(self, value):
        data = mp.encode_json(value)
        self.assertEqual(mp.parse_json(data), value)
        self.assertEqual(mp.encode_json(mp.parse_json(data)), data)

    @GENERATED
    @given(st.binary(max_size=40))
    def test_any_bytes_give_an_object_or_the_code(self, data):
        self.assertIn(outcome(lambda: mp.parse_json(data)), ("ok", "bad_json"))

    def test_canonical_form(self):
        self.assertEqual(mp.encode_json({"b": "\u00e9", "a": [1]}), b'{"a":[1],"b":"\\u00e9"}')
        with self.assertRaises(ValueError):
            mp.encode_json({"a": float("nan")})


# One valid message for each schema; every edit of it must be refused.
HASH = "ab" * 32
POLICY = {"verified": False, "latency_ms": 100, "shape": "plain"}
LEASE = {"id": "cd" * 16, "sequence": 7, "rate": 5120, "burst": 32768, "budget": 1000}
LEASE |= {"expiry": 60, "users": [HASH], "policy": POLICY}
POSTURE = {"confinement": "full", "debug": False}
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
COUNTS = {"budget_left": 5, "restarts": 0}
OPTIONS = {"temperature": 0.5, "top_p": 1, "top_k": 4, "seed": 1, "repetition_penalty": 1.1}
OPTIONS |= {"max_new_tokens": 9, "date": "today"}
CLOSING = {"lease": "cd" * 16, "spent": 9, "head": HASH, "mac": HASH}
MESSAGES = {
    "CHALLENGE": {"version": 1, "role": "user", "nonce": HASH, "share": "ab" * 384}
    | {"evidence": "psk"},
    "MEASUREMENT": {"measurement": HASH, "nonce": HASH, "share": "ab" * 384, "model": HASH}
    | {"status": "ready", "posture": POSTURE},
    "POSTURE": POSTURE,
    "LEASE": LEASE,
    "POLICY": LEASE["policy"],
    "UNLOCK": {"key": HASH, "model": HASH, "lease": LEASE},
    "ACCESS": {"token": "mu-" + HASH},
    "PROGRESS": {"status": "loading", "progress": 10},
    "READY": {"status": "ready", "lease": "cd" * 16, "sequence": 7, "model": HASH}
    | {"asset": "demo", "vocabulary": HASH, "context": 512, "budget": 9, "head": HASH}
    | COUNTS,
    "ERROR": {"error": "busy", "limit": 3, "heads": [HASH, HASH]},
    "CHAT": {"role": "user", "content": "hello"},
    "GENERATE": OPTIONS | {"prompt": "hello"},
    "GENERATE_CHAT": OPTIONS | {"messages": [{"role": "user", "content": "hello"}]},
    "CANCEL": {"cancel": True},
    "LOG": {"log": True},
    "LOGGED": {"log": "00ff"},
    "USAGE": USAGE,
    "FINAL": {"elapsed_ms": 5, "finish_reason": "stop", "usage": USAGE}
    | {"heads": [HASH, HASH]}
    | COUNTS,
    "CLOSING": CLOSING,
    "CLOSED": {"closing": CLOSING},
    "FILE_ENTRY": {"path": "config.json", "offset": 0, "size": 2},
}
WRONG = (None, [], {}, -1, 1 << 70, 1.5e300, "", "\n", [None], {"x": 1}, "x" * (9 << 20))


class Schemas(unittest.TestCase):
    """Every field of every message: needed or known, of its type, within its range."""

    def accepts(self, name, value):
        return outcome(lambda: mp.parse_message(mp.encode_json(value), getattr(mp, name))) == "ok"

    def test_example_of_each_schema_is_accepted(self):
        for name, message in MESSAGES.items():
            known = {field.rstrip("?") for field in getattr(mp, name)}
            self.assertEqual(known, set(message), name)
            self.assertTrue(self.accepts(name, message), name)

    def test_each_field_is_checked(self):
        loose = {("CHAT", "content"), ("GENERATE", "prompt")}
        may_be_empty = {("READY", "lease"), ("LOGGED", "log"), *loose}
        for name, message in MESSAGES.items():
            for field in message:
                for wrong in WRONG:
                    is_fine = (wrong == "" and (name, field) in may_be_empty) or (
                        (wrong == "\n" and (name, field) in loose)
                        or (wrong == "\n" and field == "date")
                        or (wrong == [] and field == "users")
                    )
                    with self.subTest(schema=name, field=field, wrong=str(wrong)[:20]):
                        self.assertEqual(self.accepts(name, message | {field: wrong}), is_fine)

    def test_bool_and_number_do_not_mix(self):
        for name, message in MESSAGES.items():
            for field, value in message.items():
                other = int(value) if isinstance(value, bool) else True
                if isinstance(value, bool | int | float):
                    self.assertFalse(self.accepts(name, message | {field: other}), (name, field))

    def test_each_field_is_needed_or_optional_by_its_mark(self):
        for name, message in MESSAGES.items():
            for field in message:
                rest = {key: value for key, value in message.items() if key != field}
                is_optional = f"{field}?" in getattr(mp, name)
                self.assertEqual(self.accepts(name, rest), is_optional, (name, field))

    def test_unknown_field_is_refused(self):
        for name, message in MESSAGES.items():
            for extra in ("x", "", "x?", *(f"{field}?" for field in message)):
                self.assertFalse(self.accepts(name, message | {extra: 1}), (name, extra))

    def test_owner_requests_do_not_combine(self):
        requests = ({"status": True}, {"lock": True}, {"revoke": HASH})
        for request in requests:
            self.assertEqual(mp.parse_message(mp.encode_json(request), *mp.OWNER), request)
        for pair in ({"status": True, "lock": True}, {"lock": True, "revoke": HASH}, {}):
            code = outcome(lambda pair=pair: mp.parse_message(mp.encode_json(pair), *mp.OWNER))
            self.assertEqual(code, "bad_message")

    def test_names_have_no_path_parts(self):
        for name in ("a", "model-00001-of-00002.safetensors", "x" * 128):
            self.assertTrue(mp.is_name(name), name)
        bad = (
            "",
            ".",
            "..",
            ".hidden",
            "a/b",
            "/a",
            "a\\b",
            "a\0",
            "a\n",
            "a b",
            "\u00e9",
            "x" * 129,
        )
        for name in (*bad, None, 1, b"a"):
            self.assertFalse(mp.is_name(name), name)


class Frames(unittest.TestCase):
    """Frames over a real socket pair."""

    def setUp(self):
        self.ours, self.theirs = socket.socketpair()
        self.addCleanup(self.ours.close)
        self.addCleanup(self.theirs.close)

    def test_split_feeds(self):
        sent = mp.frame(b"") + mp.frame(b"one") + mp.frame(b"x" * 300)
        for size in (1, 2, 3, 5, 7, len(sent)):
            feed = [sent[at : at + size] for at in range(0, len(sent), size)]
            reader = Script(feed)
            got = [mp.read_frame(reader, 300) for _ in range(3)]
            self.assertEqual(got, [b"", b"one", b"x" * 300])

    def test_limit_is_checked_before_the_payload_arrives(self):
        for length in (301, 1 << 31, (1 << 32) - 1):
            self.theirs.sendall(length.to_bytes(4, "big"))
            with self.assertRaises(mp.ProtocolError) as caught:
                mp.read_frame(self.ours, 300, seconds=5)
            self.assertEqual(caught.exception.code, "bad_frame")

    def test_exactly_the_limit(self):
        self.theirs.sendall(mp.frame(b"x" * 300))
        self.assertEqual(mp.read_frame(self.ours, 300, seconds=5), b"x" * 300)

    def test_end_within_a_frame(self):
        whole = mp.frame(b"abc")
        for size in range(len(whole)):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                theirs.sendall(whole[:size])
                theirs.close()
                with self.assertRaises(EOFError):
                    mp.read_frame(ours, 300, seconds=5)

    def test_deadline_is_for_the_whole_frame(self):
        peer = Drip()
        with self.assertRaises(TimeoutError):
            mp.read_frame(peer, 1 << 30, seconds=6.5, clock=lambda: peer.now)
        self.assertLessEqual(peer.now, 6.6)

    def test_silence_ends_at_the_deadline(self):
        with self.assertRaises(TimeoutError):
            mp.read_frame(self.ours, 300, seconds=0.05)


class Script:
    """A socket's reading end that hands out these pieces, however much is asked for."""

    def __init__(self, pieces):
        self.pieces = iter(pieces)
        self.rest = b""

    def settimeout(self, seconds):
        """As a socket's; the script never waits."""

    def recv(self, size):
        """At most `size` bytes of the next piece."""
        piece = self.rest or next(self.pieces, b"")
        self.rest = piece[size:]
        return piece[:size]


class Drip:
    """A socket's reading end whose peer sends a byte a second, on a clock of its own."""

    now = 0.0

    def settimeout(self, seconds):
        """As a socket's."""
        self.timeout = seconds

    def recv(self, size):
        """One byte, a second later, or TimeoutError."""
        self.now += min(1.0, self.timeout)
        if self.timeout < 1.0:
            raise TimeoutError
        return b"\1"


class KeyAgreement(unittest.TestCase):
    """ffdhe3072 and HKDF against what their RFCs say."""

    def test_prime_as_published(self):
        """Appendix A.2 of RFC 7919."""
        digits = (
            "ffffffffffffffffadf85458a2bb4a9aafdc5620273d3cf1d8b9c583ce2d3695a9e13641146433fb"
            "cc939dce249b3ef97d2fe363630c75d8f681b202aec4617ad3df1ed5d5fd65612433f51f5f066ed0"
            "856365553ded1af3b557135e7f57c935984f0c70e0e68b77e2a689daf3efe8721df158a136ade735"
            "30acca4f483a797abc0ab182b324fb61d108a94bb2c8e3fbb96adab760d7f4681d4f42a3de394df4"
            "ae56ede76372bb190b07a7c8ee0a6d709e02fce1cdf7e2ecc03404cd28342f619172fe9ce98583ff"
            "8e4f1232eef28183c3fe3b1b4c6fad733bb5fcbc2ec22005c58ef1837d1683b2c6f34a26c1b2effa"
            "886b4238611fcfdcde355b3b6519035bbc34f4def99c023861b46fc9d6e6c9077ad91d2691f7f7ee"
            "598cb0fac186d91caefe130985139270b4130c93bc437944f4fd4452e2d74dd364f2e21e71f54bff"
            "5cae82ab9c9df69ee86d2bc522363a0dabc521979b0deada1dbf9a42d5c4484e0abcd06bfa53ddef"
            "3c1b20ee3fd59d7c25e41d2b66c62e37ffffffffffffffff"
        )
        self.assertEqual(mp.PRIME, int(digits, 16))

    def test_prime_is_safe_and_two_generates_its_large_subgroup(self):
        half = mp.PRIME >> 1
        for base in (2, 3, 5):
            self.assertEqual(pow(base, mp.PRIME - 1, mp.PRIME), 1)
            self.assertEqual(pow(base, half - 1, half), 1)
        self.assertEqual(pow(2, half, mp.PRIME), 1)

    def test_both_sides_agree(self):
        ours, theirs, other = mp.KeyShare(), mp.KeyShare(), mp.KeyShare()
        publics = {share.public for share in (ours, theirs, other)}
        self.assertEqual({len(public) for public in publics}, {384})
        self.assertEqual(len(publics), 3)
        secret = ours.agree(theirs.public)
        self.assertEqual(secret, theirs.agree(ours.public))
        self.assertEqual(len(secret), 384)
        self.assertNotEqual(secret, other.agree(mp.KeyShare().public))

    def test_exponent_has_275_bits_and_serves_once(self):
        share = mp.KeyShare()
        self.assertEqual(share._exponent.bit_length(), 275)
        self.assertEqual(pow(2, share._exponent, mp.PRIME), int.from_bytes(share.public, "big"))
        share.agree(mp.KeyShare().public)
        with self.assertRaises(TypeError):
            share.agree(mp.KeyShare().public)

    def test_hkdf_rfc5869(self):
        cases = (  # A.1, A.2, A.3: IKM, salt, info, OKM
            (
                b"\x0b" * 22,
                bytes(range(13)),
                bytes(range(0xF0, 0xFA)),
                "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b88718"
                "5865",
            ),
            (
                bytes(range(0x50)),
                bytes(range(0x60, 0xB0)),
                bytes(range(0xB0, 0x100)),
                "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac78272"
                "71cb41c65e590e09da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f"
                "1d87",
            ),
            (
                b"\x0b" * 22,
                b"",
                b"",
                "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a"
                "96c8",
            ),
        )
        for secret, salt, info, expected in cases:
            self.assertEqual(mp.hkdf(secret, salt, info).hex(), expected[:64])  # the first block

    def test_transcript_binds_both_frames_and_their_border(self):
        th = mp.transcript_hash(b"ab", b"c")
        frames = b"\0\0\0\2ab\0\0\0\1c"
        self.assertEqual(th, hashlib.sha256(frames).digest())
        self.assertNotEqual(th, mp.transcript_hash(b"a", b"bc"))

    def test_keys_and_report_data_are_apart(self):
        keys = mp.session_keys(b"z" * 384, b"t" * 32)
        self.assertEqual(sorted(keys), ["close", "e2h", "h2e"])
        data = [mp.report_data(kind, b"t" * 32) for kind in mp.EVIDENCE_KINDS]
        self.assertEqual(len({*keys.values(), *data}), 6)
        expected = hashlib.sha256(b"muenclave evidence v1psk\0" + b"t" * 32).digest()
        self.assertEqual(mp.report_data("psk", b"t" * 32), expected)

    def test_secret_files(self):
        self.assertEqual(mp.parse_secret("ab" * 32 + "\n"), b"\xab" * 32)
        for text in ("", "ab" * 31, "AB" * 32, "ab" * 33, "g" * 64, "ab " * 32):
            with self.assertRaises(ValueError):
                mp.parse_secret(text)


class Tpm(unittest.TestCase):
    """Commands and responses of a TPM 2.0 as its Library, Part 3, lays them out."""

    def test_commands(self):
        read = mp.tpm_command(mp.TPM_CC_PCR_READ, b"", mp.pcr_selection(0, 9))
        self.assertEqual(read.hex(), "8001000000140000017e00000001000b03010200")
        flush = mp.tpm_command(mp.TPM_CC_FLUSH, bytes.fromhex("80000001"))
        self.assertEqual(flush.hex(), "80010000000e0000016580000001")
        key, data = bytes.fromhex("80000000"), bytes(range(32))
        password = "00000009400000090000000000"
        expected = f"8002 00000049 00000158 80000000 {password} 0020 {data.hex()}"
        expected += "0010 00000001 000b 03 ff0200"
        self.assertEqual(mp.tpm_quote(key, data), bytes.fromhex(expected))
        create = mp.tpm_create_primary(mp.ATTESTATION_KEY + bytes(2))
        expected = f"8002 00000041 00000131 4000000b {password} 0004 0000 0000"
        expected += "0018 0001 000b 00050472 0000 0010 0014 000b 0800 00000000 0000"
        expected += "0000 00000000"
        self.assertEqual(create, bytes.fromhex(expected))

    def test_key_created(self):
        body = bytes.fromhex("80000003 00000009 0003 010203 ffff ffff")
        self.assertEqual(mp.tpm_created(body), (bytes.fromhex("80000003"), b"\1\2\3"))

    def test_responses(self):
        header = struct.Struct(">HII")
        for response, body in (
            (header.pack(0x8001, 10, 0), b""),
            (header.pack(0x8002, 14, 0) + b"abcd", b"abcd"),
            (header.pack(0x8001, mp.TPM_BUFFER, 0) + bytes(4086), bytes(4086)),
        ):
            self.assertEqual(mp.tpm_response(response), body)
            for size in range(len(response)):
                self.assertIsNone(mp.tpm_response(response[:size]), size)
        for response in (
            header.pack(0x8001, 10, 0x101),  # TPM_RC_FAILURE
            header.pack(0x8001, 10, 1 << 31),
            header.pack(0x8001, 9, 0),
            header.pack(0x8001, 0, 0),
            header.pack(0x8001, 10, 0) + b"\0",
            header.pack(0x8001, 0xFFFFFFFF, 0) + bytes(mp.TPM_BUFFER - 10),
        ):
            with self.subTest(response=response[:12].hex()), self.assertRaises(OSError) as caught:
                mp.tpm_response(response)
            self.assertEqual(str(caught.exception), f"the TPM answers {response[:10].hex()}")


class Shares(unittest.TestCase):
    """What a challenge may hold as a key share; nothing is said to one that holds another."""

    def test_range(self):
        for value in (2, 3, mp.PRIME - 2):
            self.assertTrue(mp.is_share(f"{value:0768x}"))
        for value in (0, 1, mp.PRIME - 1, mp.PRIME, mp.PRIME + 1, (1 << 3072) - 1):
            self.assertFalse(mp.is_share(f"{value:0768x}"))
        for text in ("", "02", "0" * 767 + "2 ", "0" * 769 + "2", 2, None, ["0" * 767 + "2"]):
            self.assertFalse(mp.is_share(text))


class Failures(unittest.TestCase):
    """What an engine calls that by which it was ended."""

    def test_numbers(self):
        memory = type("OutOfMemoryError", (RuntimeError,), {})  # as PyTorch's is called
        for error, code in (
            (MemoryError(), "out_of_memory"),
            (memory(), "out_of_memory"),
            (ModuleNotFoundError(), "no_engine"),
            (PermissionError(), "no_engine"),
            (ValueError(), "model_invalid"),
            (RuntimeError(), "model_invalid"),
        ):
            self.assertEqual(mp.FAILURES[mp.failure(error)], code)


class AesGcm(unittest.TestCase):
    """The cipher that `cryptography` gives us, on published vectors.

    Source: McGrew and Viega, The Galois/Counter Mode of Operation, test cases 13 to 16.
    """

    ZEROS = ("00" * 32, "00" * 12)
    FEED = ("feffe9928665731c6d6a8f9467308308" * 2, "cafebabefacedbaddecaf888")
    PLAIN = (
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255"
    )
    CIPHER = (
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad"
    )
    MORE = "feedfacedeadbeeffeedfacedeadbeefabaddad2"
    TAG_14 = "d0d1c8a799996bf0265b98b5d48ab919"
    CASES = (  # key and nonce, plaintext, additional data, ciphertext, tag
        (ZEROS, "", "", "", "530f8afbc74536b9a963b4f1c4cb738b"),
        (ZEROS, "00" * 16, "", "cea7403d4d606b6e074ec5d3baf39d18", TAG_14),
        (FEED, PLAIN, "", CIPHER, "b094dac5d93471bdec1a502270e3cc6c"),
        (FEED, PLAIN[:120], MORE, CIPHER[:120], "76fc6ece0f4e1768cddf8853bb2d551b"),
    )  # fmt: skip

    def test_published_vectors(self):
        for (key, nonce), *rest, tag in self.CASES:
            plain, more, cipher = (bytes.fromhex(text) for text in rest)
            aead, nonce = mp.aead(bytes.fromhex(key)), bytes.fromhex(nonce)
            sealed = cipher + bytes.fromhex(tag)
            self.assertEqual(aead.encrypt(nonce, plain, more), sealed)
            self.assertEqual(aead.decrypt(nonce, sealed, more), plain)


def open_all(frames, limit=mp.MESSAGE_LIMIT):
    """The messages in frames, read by a fresh Opener. Raises ProtocolError."""
    opener = mp.Opener(KEY, limit)
    opened = [opener.open(data[mp.FRAME_HEADER :]) for data in frames]
    return [message for message in opened if message is not None]


class Records(unittest.TestCase):
    """Records on the wire: sizes, and that nothing but the sender's own sequence is read."""

    def refuse(self, frames):
        self.assertEqual(outcome(lambda: open_all(frames)), "bad_record")

    def test_every_bit_flipped(self):
        (cell,) = mp.Sealer(KEY, mp.CELL).seal_json({"status": "loading", "progress": 3})
        for bit in range(8 * mp.FRAME_HEADER, 8 * len(cell)):
            broken = bytearray(cell)
            broken[bit // 8] ^= 1 << bit % 8
            self.refuse([broken])

    def test_every_bit_of_the_header_flipped(self):
        (cell,) = mp.Sealer(KEY, mp.CELL).seal_json({"status": "loading", "progress": 3})
        for bit in range(8 * mp.FRAME_HEADER):
            broken = bytearray(cell)
            broken[bit // 8] ^= 1 << bit % 8
            reader = Script([bytes(broken)])
            with contextlib.suppress(EOFError):
                self.assertIn(
                    outcome(lambda reader=reader: self.read_one(reader)),
                    ("bad_frame", "bad_record"),
                )

    def read_one(self, reader):
        opened = mp.Opener(KEY, RECORD_LIMIT).open(mp.read_frame(reader, mp.RESPONSE_FRAME))
        self.fail(f"opened {opened}")

    def test_every_length_cut_or_grown(self):
        (record,) = mp.Sealer(KEY).seal_json({"cancel": True})
        for size in range(mp.FRAME_HEADER, len(record)):
            self.refuse([record[:size]])
        self.refuse([record + b"\0"])

    def test_drop_repeat_and_swap(self):
        sealer = mp.Sealer(KEY, mp.CELL)
        frames = [cell for i in range(6) for cell in sealer.seal(mp.IDS_RECORD, bytes([i]))]
        self.assertEqual([body for _, body in open_all(frames)], [bytes([i]) for i in range(6)])
        for at in range(5):
            self.refuse(frames[:at] + frames[at + 1 :])
            self.refuse(frames[: at + 1] + frames[at:])
            swapped = list(frames)
            swapped[at], swapped[at + 1] = swapped[at + 1], swapped[at]
            self.refuse(swapped)

    def test_other_direction_and_other_session(self):
        keys = mp.session_keys(b"z" * 384, b"t" * 32)
        (record,) = mp.Sealer(keys["h2e"]).seal_json({"cancel": True})
        for other in (keys["e2h"], keys["close"], mp.session_keys(b"z" * 384, b"u" * 32)["h2e"]):
            opener = mp.Opener(other, RECORD_LIMIT)
            self.assertEqual(outcome(lambda o=opener: o.open(record[4:])), "bad_record")

    def test_every_cell_has_the_same_size(self):
        for size in (0, 1, mp.CELL_ROOM - 1, mp.CELL_ROOM, mp.CELL_ROOM + 1, 5 * mp.CELL_ROOM):
            body = bytes(i % 251 for i in range(size))
            cells = mp.Sealer(KEY, mp.CELL).seal(mp.IDS_RECORD, body)
            self.assertEqual({len(cell) for cell in cells}, {mp.CELL})
            self.assertEqual(len(cells), max(1, -(-size // mp.CELL_ROOM)))
            self.assertEqual(open_all(cells), [(mp.IDS_RECORD, body)])

    def test_limit_of_a_message(self):
        limit = 3 * mp.CELL_ROOM
        cells = mp.Sealer(KEY, mp.CELL).seal(mp.IDS_RECORD, bytes(limit))
        self.assertEqual(open_all(cells, limit), [(mp.IDS_RECORD, bytes(limit))])
        cells = mp.Sealer(KEY, mp.CELL).seal(mp.IDS_RECORD, bytes(limit + 1))
        self.assertEqual(outcome(lambda: open_all(cells[:1], limit)), "bad_record")

    @GENERATED
    @given(st.lists(st.tuples(st.sampled_from((0, 1)), st.binary(max_size=1600)), max_size=5))
    def test_round_trip(self, messages):
        for cell in (None, mp.CELL):
            sealer = mp.Sealer(KEY, cell)
            frames = [data for kind, body in messages for data in sealer.seal(kind, body)]
            self.assertEqual(open_all(frames), messages)


def seal_container(plain, chunk_size=4096, key=KEY, salt="5a" * 32, **changes):
    """A sealed container of one file, as bytes, from the protocol's own arithmetic."""
    fields = {"version": 1, "asset": "demo", "model_type": "llama", "chunk_size": chunk_size}
    fields |= {"chunks": -(-len(plain) // chunk_size), "length": len(plain), "salt": salt}
    fields |= {"commitment": mp.key_commitment(key, salt).hex(), "vocabulary": "00" * 32}
    fields |= {"files": [{"path": "config.json", "offset": 0, "size": len(plain)}]}
    header = mp.encode_json(fields | changes)
    container = mp.Container(header)
    cipher = mp.aead(container.chunk_key(key))
    sealed = mp.MAGIC + len(header).to_bytes(4, "big") + header
    for index in range(container.chunks):
        _, start, size, nonce = container.chunk(index)
        sealed += cipher.encrypt(nonce, plain[start : start + size], None)
    return sealed.ljust(container.sealed_size(), b"\0")


def open_container(sealed, key=KEY):
    """(digest, plaintext) of a sealed container; any fault raises ProtocolError."""
    from cryptography.exceptions import InvalidTag

    length = mp.header_length(sealed[: mp.PREFIX])
    container = mp.Container(sealed[mp.PREFIX : mp.PREFIX + length])
    if not container.is_key(key):
        raise mp.ProtocolError("wrong_key")
    cipher, plain = mp.aead(container.chunk_key(key)), b""
    for index in range(container.chunks):
        offset, _, size, nonce = container.chunk(index)
        try:
            plain += cipher.decrypt(nonce, sealed[offset : offset + size + mp.TAG], None)
        except InvalidTag:
            raise mp.ProtocolError("container_corrupt") from None
    return container.digest, plain


class SealedContainer(unittest.TestCase):
    """The container's header and chunks: any change is found."""

    PLAIN = bytes(i * 7 % 256 for i in range(3 * 4096 + 100))

    def setUp(self):
        self.sealed = seal_container(self.PLAIN)
        self.start = mp.PREFIX + mp.header_length(self.sealed[: mp.PREFIX])
        self.digest = hashlib.sha256(self.sealed[mp.PREFIX : self.start]).hexdigest()

    def refuse(self, sealed, *codes):
        self.assertIn(outcome(lambda: open_container(bytes(sealed))), codes)

    def test_round_trip(self):
        self.assertEqual(open_container(self.sealed), (self.digest, self.PLAIN))
        self.assertEqual(len(self.sealed) % mp.ALIGNMENT, 0)
        device = self.sealed + b"\xff" * 5000  # a block device may be longer
        self.assertEqual(open_container(device)[1], self.PLAIN)

    def test_every_byte_of_the_header_flipped(self):
        for at in range(self.start):
            for flip in (1, 0x80):
                broken = bytearray(self.sealed)
                broken[at] ^= flip
                self.refuse(broken, "container_corrupt", "wrong_key")

    def test_every_byte_of_the_chunks_flipped(self):
        end = self.start + len(self.PLAIN) + 4 * mp.TAG
        for at in range(self.start, end, 5):
            broken = bytearray(self.sealed)
            broken[at] ^= 1
            self.refuse(broken, "container_corrupt")

    def test_chunks_dropped_moved_and_spliced(self):
        size = 4096 + mp.TAG
        head, *chunks = (self.sealed[: self.start],) + tuple(
            self.sealed[at : at + size] for at in range(self.start, self.start + 4 * size, size)
        )
        other = seal_container(self.PLAIN, salt="a5" * 32)[self.start :]
        self.refuse(head + b"".join([chunks[1], chunks[0], *chunks[2:]]), "container_corrupt")
        self.refuse(head + b"".join([chunks[0], chunks[0], *chunks[2:]]), "container_corrupt")
        self.refuse(head + b"".join([*chunks[:2], *chunks[3:]]), "container_corrupt")
        self.refuse(head + b"".join(chunks[:3]), "container_corrupt")
        self.refuse(head + other[:size] + b"".join(chunks[1:]), "container_corrupt")

    def test_shortened_header_does_not_open_fewer_chunks(self):
        fields = mp.parse_json(self.sealed[mp.PREFIX : self.start])
        fields |= {"chunks": 3, "length": 3 * 4096}
        fields["files"] = [{"path": "config.json", "offset": 0, "size": 3 * 4096}]
        header = mp.encode_json(fields)
        prefix = mp.MAGIC + len(header).to_bytes(4, "big")
        self.refuse(prefix + header + self.sealed[self.start :], "container_corrupt")

    def test_wrong_key(self):
        self.assertEqual(outcome(lambda: open_container(self.sealed, bytes(32))), "wrong_key")

    def test_headers_share_no_chunk_key(self):
        keys = set()
        for asset in ("a", "b"):
            sealed = seal_container(self.PLAIN, asset=asset)
            length = mp.header_length(sealed[: mp.PREFIX])
            keys.add(mp.Container(sealed[mp.PREFIX : mp.PREFIX + length]).chunk_key(KEY))
        self.assertEqual(len(keys), 2)

    def test_nonces_tell_index_and_end_apart(self):
        nonces = {mp.chunk_nonce(index, last) for index in range(300) for last in (False, True)}
        self.assertEqual(len(nonces), 600)
        self.assertEqual({len(nonce) for nonce in nonces}, {12})

    def test_places_of_the_chunks(self):
        container = mp.Container(self.sealed[mp.PREFIX : self.start])
        ends = [b"\0" * 10 + bytes([index, index == 3]) for index in range(4)]
        places = [(self.start + i * 4112, i * 4096, 4096 if i < 3 else 100) for i in range(4)]
        expected = [(*place, end) for place, end in zip(places, ends)]
        self.assertEqual([container.chunk(index) for index in range(4)], expected)

    def test_header_that_contradicts_itself(self):
        entry = {"path": "a", "offset": 0, "size": 10}
        wrong = (
            {"chunks": 5},
            {"chunks": 3},
            {"length": len(self.PLAIN) + 4096},
            {"files": [entry, entry]},
            {"files": [entry, entry | {"offset": 10}]},
            {"files": [entry, entry | {"path": "b", "offset": 9}]},
            {"files": [entry | {"offset": len(self.PLAIN) - 9}]},
            {"files": [entry | {"path": "../a"}]},
            {"files": []},
            {"version": 2},
            {"chunk_size": 1},
            {"more": 1},
        )
        for changes in wrong:
            code = outcome(lambda changes=changes: seal_container(self.PLAIN, **changes))
            self.assertEqual(code, "container_corrupt", changes)

    def test_header_must_be_canonical(self):
        header = self.sealed[mp.PREFIX : self.start]
        for other in (
            header.replace(b":", b": ", 1),
            header + b"\n",
            header.replace(b"d", b"\\u0064", 1),
        ):
            self.assertEqual(outcome(lambda o=other: mp.Container(o)), "container_corrupt")

    def test_prefix(self):
        good = self.sealed[: mp.PREFIX]
        for size in range(mp.PREFIX):
            code = outcome(lambda size=size: mp.header_length(good[:size]))
            self.assertEqual(code, "container_corrupt")
        for length in (0, 1, mp.HEADER_LIMIT + 1, (1 << 32) - 1):
            prefix = mp.MAGIC + length.to_bytes(4, "big")
            code = outcome(lambda prefix=prefix: mp.header_length(prefix))
            self.assertEqual(code, "container_corrupt")
        largest = mp.MAGIC + mp.HEADER_LIMIT.to_bytes(4, "big")
        self.assertEqual(mp.header_length(largest), mp.HEADER_LIMIT)


class TokenIds(unittest.TestCase):
    """Packed ids: one form for each list of ids, and no room for anything else."""

    def test_round_trip(self):
        randomness = random.Random(1)
        for count in (2, 255, 256, 257, 768, 32000, 128256):
            vocabulary = make_vocabulary(count)
            self.assertEqual(vocabulary.bits, max(8, (count - 1).bit_length()))
            for length in range(20):
                ids = [randomness.randrange(count) for _ in range(length)] or [count - 1]
                data = vocabulary.pack(ids)
                self.assertEqual(len(data), -(-len(ids) * vocabulary.bits // 8))
                self.assertEqual(vocabulary.unpack(data), ids)

    def test_canonical_exhaustively(self):
        vocabulary = make_vocabulary(300)
        accepted = []
        for value in range(1 << 16):
            data = value.to_bytes(2, "big")
            if outcome(lambda data=data: vocabulary.unpack(data)) == "ok":
                accepted.append(vocabulary.unpack(data)[0])
        self.assertEqual(accepted, list(range(300)))

    def test_table_form(self):
        table = [b"", b"a", bytes(range(256)), b"x" * 65535]
        data = mp.encode_vocabulary(table)
        vocabulary = mp.Vocabulary(data)
        self.assertEqual(vocabulary.table, table)
        self.assertEqual(vocabulary.digest, hashlib.sha256(data).hexdigest())
        broken = [data[:size] for size in range(0, len(data), 61)] + [data + b"\0"]
        broken += [b"\xff" * 4 + data[4:], (3).to_bytes(4, "big") + data[4:]]
        broken += [mp.encode_vocabulary([b"a"]), mp.encode_vocabulary([])]
        for other in broken:
            self.assertEqual(outcome(lambda o=other: mp.Vocabulary(o)), "model_invalid")


def cut_text(text, stops):
    """Where a text ends: before the stop string that is complete first; the longest of those."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


class Text(unittest.TestCase):
    """Ids become text at characters and stop strings, however the ids arrive."""

    PIECES = [b"a", b"b", b"ab", b"ba", b"c", b"abc", b" ", b"\n"]
    PIECES += ["\u00e9".encode()[:1], "\u00e9".encode()[1:], "\U0001f600".encode()[:2]]
    PIECES += ["\U0001f600".encode()[2:], b"\xff", "\u4e2d".encode(), b""]
    VOCABULARY = mp.Vocabulary(mp.encode_vocabulary(PIECES))
    IDS = st.lists(st.integers(0, len(PIECES) - 1), max_size=30)
    STOPS = st.lists(st.text("abc \n\u00e9\u4e2d", min_size=1, max_size=4), max_size=4)

    @settings(GENERATED, max_examples=500)
    @given(IDS, STOPS, st.lists(st.integers(0, 5), max_size=30))
    @example([5, 1], ["abcb", "bc"], [])
    @example([5, 1], ["abcb", "bc"], [1, 1])
    def test_against_a_straightforward_reference(self, ids, stops, sizes):
        cutter, text, left = mp.TextCutter(self.VOCABULARY, stops), "", ids
        whole = b"".join(self.PIECES[token] for token in ids).decode("utf-8", "replace")
        expected = cut_text(whole, stops)
        for size in sizes:
            text += cutter.feed(left[:size])
            left = left[size:]
            self.assertTrue(expected.startswith(text))
        text += cutter.feed(left, last=True)
        self.assertEqual(text, expected)
        self.assertEqual(cutter.stopped, expected != whole or any(s in whole for s in stops))

    def test_text_is_not_held_back_without_need(self):
        cutter = mp.TextCutter(self.VOCABULARY, ["abd"])
        self.assertEqual(cutter.feed([4]), "c")
        self.assertEqual(cutter.feed([2]), "")  # "ab" may begin the stop string
        self.assertEqual(cutter.feed([4]), "abc")  # and did not
        self.assertEqual(cutter.feed([8]), "")  # half a character
        self.assertEqual(cutter.feed([9]), "\u00e9")

    def test_nothing_comes_after_a_stop(self):
        cutter = mp.TextCutter(self.VOCABULARY, ["b"])
        self.assertEqual(cutter.feed([0, 1, 4]), "a")
        self.assertTrue(cutter.stopped)
        self.assertEqual(cutter.feed([4], last=True), "")


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.integers(-(10**10), 10**10)),
        st.tuples(st.just("wait"), st.integers(0, 10**8)),
        st.tuples(st.just("take"), st.integers(0, 3000)),
        st.tuples(st.just("pull"), st.integers(1, 600)),
        st.tuples(st.just("change"), st.tuples(st.integers(64, 9999), st.integers(1, 4000))),
    ),
    max_size=40,
)


def check_meter(make, events, test):
    """Run events on a meter; hold every window between two of them to rate * T + burst.

    `paid` is the bytes times nanoseconds that the rate has earned so far; time that runs backwards
    earns nothing, and is earned again by nobody.
    """
    now = latest = 10**12
    rate, burst = 1000, 2000
    meter = make(rate, burst, now)
    paid, taken = 0, 0
    starts = [(0, 0, 0)]  # (paid, taken, credit that a window beginning here may have) so far
    for kind, value in events:
        if kind == "wait":
            now += value
            continue
        steps = (0, meter.wait(value, now)) if kind == "pull" else (0,)
        for elapsed in steps:  # a time that the meter is not told of earns nothing yet
            now += elapsed
            paid += max(0, now - latest) * rate
            latest = max(now, latest)
        if kind == "change":
            meter.change(*value, now)
            rate, burst = value
        else:
            starts.append((paid, taken, burst * mp.NANOSECOND))
            taken += value if meter.take(value, now) else 0
        test.assertTrue(0 <= meter._credit <= meter.burst * mp.NANOSECOND)
        for paid_then, taken_then, credit in starts:
            left = (taken - taken_then) * mp.NANOSECOND
            test.assertLessEqual(left, paid - paid_then + credit)


class GenerousStart(mp.Meter):
    """A bug: it starts full, so that a restart earns a burst."""

    def __init__(self, rate, burst, now):
        super().__init__(rate, burst, now)
        self._credit = burst * mp.NANOSECOND


class ChangeRefills(mp.Meter):
    """A bug: other limits come with fresh credit."""

    def change(self, rate, burst, now):
        super().change(rate, burst, now)
        self._credit = burst * mp.NANOSECOND


class LateChange(mp.Meter):
    """A bug: the new rate is paid for the time before it."""

    def change(self, rate, burst, now):
        self.rate, self.burst = rate, burst
        super().change(rate, burst, now)


class KeepsCredit(mp.Meter):
    """A bug: idle time earns without an end."""

    def _refill(self, now):
        self._credit += max(0, now - self._last) * self.rate
        self._last = max(now, self._last)


class TrustsClock(mp.Meter):
    """A bug: a clock that is set back earns the same time again."""

    def _refill(self, now):
        self._last = min(now, self._last)
        super()._refill(now)


class TakesTooMuch(mp.Meter):
    """A bug: the last bytes may overdraw the account."""

    def take(self, count, now):
        self._refill(now)
        if self._credit <= 0:
            return False
        self._credit -= count * mp.NANOSECOND
        return True


class FivePercent(mp.Meter):
    """A bug: a little more than the rate."""

    def _refill(self, now):
        elapsed = max(0, now - self._last)
        super()._refill(now)
        self._credit = min(self.burst * mp.NANOSECOND, self._credit + elapsed * self.rate // 20)


MUTANTS = (
    GenerousStart,
    ChangeRefills,
    LateChange,
    KeepsCredit,
    TrustsClock,
    TakesTooMuch,
    FivePercent,
)


class Meter(unittest.TestCase):
    """The token bucket on a virtual clock."""

    @settings(GENERATED, max_examples=600)
    @given(EVENTS)
    def test_every_window(self, events):
        check_meter(mp.Meter, events, self)

    def test_the_property_finds_bugs(self):
        for mutant in MUTANTS:
            check = given(st.just(mutant), EVENTS, st.just(self))(check_meter)
            with self.subTest(mutant=mutant.__name__), self.assertRaises(AssertionError):
                settings(GENERATED, max_examples=600)(check)()

    @GENERATED
    @given(st.integers(64, 1 << 40), st.integers(512, 1 << 30), st.integers(0, 10**12))
    def test_wait_is_exact(self, rate, burst, idle):
        meter, now = mp.Meter(rate, burst, 0), idle
        while meter.take(burst, now):
            now += 1
        wait = meter.wait(512, now)
        if wait:
            self.assertFalse(meter.take(512, now + wait - 1))
        self.assertTrue(meter.take(512, now + wait))

    def test_credit_is_exact_to_the_nanosecond(self):
        meter = mp.Meter(1, 10, 0)
        self.assertFalse(meter.take(1, mp.NANOSECOND - 1))
        self.assertTrue(meter.take(1, mp.NANOSECOND))
        self.assertFalse(meter.take(1, mp.NANOSECOND))

    def test_full_use_of_the_rate(self):
        meter, now, taken = mp.Meter(5120, 32768, 0), 0, 0
        while now < 100 * mp.NANOSECOND:
            now += meter.wait(512, now)
            taken += 512 * meter.take(512, now)
        self.assertGreaterEqual(taken, 5120 * 100)
        self.assertLessEqual(taken, 5120 * 100 + 512)


class Chain(unittest.TestCase):
    """The chain of exchanges: every part of each counts."""

    def test_known_answer(self):
        exchange = {"lease": "ab" * 16, "request": {"prompt": "\u00e9", "seed": 1}}
        exchange |= {"ids": [3, 1], "ending": "stop"}
        text = json.dumps(exchange, sort_keys=True, separators=(",", ":")).encode("ascii")
        expected = hashlib.sha256(bytes(32) + text).digest()
        self.assertEqual(mp.chain(bytes(32), *exchange.values()), expected)

    def test_every_part_counts(self):
        parts = [bytes(32), "ab" * 16, {"prompt": "a", "seed": 1}, [3, 1], "stop"]
        others = [bytes(31) + b"x", "ac" * 16, {"prompt": "a", "seed": 2}, [1, 3], "length"]
        heads = {mp.chain(*parts)}
        for at, other in enumerate(others):
            heads.add(mp.chain(*parts[:at], other, *parts[at + 1 :]))
        self.assertEqual(len(heads), 6)


class Account(unittest.TestCase):
    """Leases add up, never come back, and end."""

    def lease(self, number, **changes):
        return LEASE | {"id": f"{number:032x}", "sequence": number, "budget": 100} | changes

    def test_bytes_add_and_the_rest_is_replaced(self):
        account = mp.Account()
        account.add(self.lease(1, users=[mp.token_hash("old")]), 0, KEY)
        account.charge(8 * 30)
        account.add(self.lease(2, users=[mp.token_hash("new")], expiry=5), 7, KEY)
        self.assertEqual(account.bits, 8 * 170)
        self.assertEqual(account.expires, 7 + 5 * mp.NANOSECOND)
        self.assertEqual(account.user("new"), mp.token_hash("new"))
        with self.assertRaises(mp.ProtocolError):
            account.user("old")

    def test_seen_and_older_leases_are_refused(self):
        account = mp.Account()
        account.add(self.lease(5), 0, KEY)
        for lease in (self.lease(5), self.lease(4), self.lease(5, id="f" * 32)):
            self.assertEqual(outcome(lambda le=lease: account.add(le, 0, KEY)), "lease_refused")
        seen = self.lease(6, id=self.lease(5)["id"])
        self.assertEqual(outcome(lambda: account.add(seen, 0, KEY)), "lease_refused")
        self.assertEqual((account.bits, account.lease["sequence"]), (800, 5))

    def test_charge_to_the_last_bit(self):
        account = mp.Account()
        account.add(self.lease(1), 0, KEY)
        account.charge(799)
        self.assertEqual(outcome(lambda: account.charge(2)), "lease_ended")
        self.assertEqual(account.bits, 1)
        account.charge(1)
        self.assertEqual(outcome(lambda: account.charge(1)), "lease_ended")

    def test_what_ready_can_say(self):
        """Leases count as far as READY can say, and the statement says no more than was spent."""
        account = mp.Account()
        for number in range(1, 11):
            account.add(self.lease(number, budget=1 << 50), 0, KEY)
        self.assertEqual(account.bits, 8 << 53)
        account.charge(8 * 5)
        self.assertEqual(account.facts()["budget"], 1 << 53)
        self.assertEqual(account.facts()["budget_left"], (1 << 53) - 5)
        self.assertEqual(account.close()["spent"], 5)

    def test_chain(self):
        account = mp.Account()
        self.assertEqual(account.facts()["head"], "00" * 32)
        exchanges = [("ab" * 16, {"prompt": "a", "seed": n}, [n, 1], "stop") for n in range(3)]
        before = bytes(32)
        for exchange in exchanges:
            after = mp.chain(before, *exchange)
            self.assertEqual(account.chain(*exchange), [before.hex(), after.hex()])
            before = after
        self.assertEqual(account.facts()["head"], before.hex())

    def test_closing_statement(self):
        account = mp.Account()
        self.assertIsNone(account.close())
        account.chain("ab" * 16, {"prompt": "a", "seed": 1}, [1], "stop")
        head = account.head
        account.add(self.lease(1), 0, bytes(32))
        account.add(self.lease(2), 0, KEY)
        account.charge(9)
        told = account.close()
        facts = {"lease": self.lease(2)["id"], "spent": 2, "head": head.hex()}
        text = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
        mac = hmac.new(KEY, text, hashlib.sha256).hexdigest()
        self.assertEqual(told, facts | {"mac": mac})

    def test_verified_policy(self):
        account = mp.Account()
        policy = POLICY | {"verified": True}
        account.add(self.lease(1, policy=policy), 0, KEY)
        good = {"prompt": "a", "seed": 1, "temperature": 0.5}
        neutral = {"top_p": 1, "top_k": 0, "repetition_penalty": 1}
        self.assertEqual(account.admit(good), good | neutral)
        for name, value in neutral.items():
            self.assertEqual(
                outcome(lambda new={name: value}: account.admit(good | new)), "policy_refused"
            )
        self.assertEqual(outcome(lambda: account.admit({"prompt": "a"})), "policy_refused")
        account.add(self.lease(2), 0, KEY)
        self.assertEqual(account.admit({"prompt": "a", "top_k": 9}), {"prompt": "a", "top_k": 9})

    def test_users(self):
        account = mp.Account()
        self.assertEqual(outcome(lambda: account.user("a")), "locked")
        users = [mp.token_hash(token) for token in ("a", "b")]
        account.add(self.lease(1, users=users), 0, KEY)
        self.assertEqual(account.user("b"), users[1])
        account.revoke(users[1])
        self.assertEqual(outcome(lambda: account.user("b")), "token_refused")
        self.assertEqual(account.user("a"), users[0])


if __name__ == "__main__":
    unittest.main()
