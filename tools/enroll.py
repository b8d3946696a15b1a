"""Complete reference values for evidence of kind tpm2: the attestation key, then the PCRs.

    enroll.py reference.json --tpm TPM [--issuer FILE ...]    whose key signs: ask the TPM itself
    enroll.py reference.json --enclave HOST:PORT              what booted: ask a locked enclave

TPM is a device (/dev/tpm0), or a socket or HOST:PORT where a TPM takes commands. With --issuer,
certificates (PEM) of whom the owner trusts to have made the TPM, the key becomes worth that: the
TPM's endorsement key (EK) needs a certificate that leads to one of them, and the TPM has to prove
that it holds both keys (TPM2_ActivateCredential). Nothing between here and the TPM is trusted with
that. Without --issuer, and for a software TPM, the root is "fixture": good for development only.

The PCRs are taken from a quote by the key that was enrolled; those that the file has already, say
as predicted from the image, must agree. Enroll PCRs from a boot that you trust. Its event log is
kept beside them, so that `muproxy attest --log` can name the entry by which another boot differs.
"""

import argparse
import contextlib
import hashlib
import hmac
import json
import os
import pathlib
import secrets
import socket
import stat
import struct
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import eventlog  # noqa: E402
import measure  # noqa: E402

import muprotocol as mp  # noqa: E402
import muproxy  # noqa: E402

CONNECT_SECONDS = 10
TPM_SECONDS = 120  # to make a key
MODULUS = 256  # bytes of an RSA-2048 key

# TCG TPM 2.0 Library, Part 2 (Structures) and Part 3 (Commands).
TPM_CC_SELF_TEST, TPM_CC_NV_READ, TPM_CC_NV_READ_PUBLIC = 0x143, 0x14E, 0x169
TPM_CC_ACTIVATE_CREDENTIAL, TPM_CC_POLICY_SECRET = 0x147, 0x151
TPM_CC_START_AUTH_SESSION = 0x176
TPM_RH_OWNER, TPM_RH_NULL = bytes.fromhex("40000001"), bytes.fromhex("40000007")
TPM_ALG_AES, TPM_ALG_CFB, TPM_SE_POLICY = 0x0006, 0x0043, 0x01
NV_CHUNK = 512  # bytes that every TPM reads at once

# TCG EK Credential Profile: the certificate's NV index, the default template L-1 (B.3.3) and its
# policy (B.6.2), what the certificate has to be for (3.2.16), and where it names the model (3.2.9).
EK_CERTIFICATE = 0x01C00002
EK_POLICY = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
EK_ATTRIBUTES = 0x000300B2
EK_TEMPLATE = struct.pack(">HHI", mp.TPM_ALG_RSA, mp.TPM_ALG_SHA256, EK_ATTRIBUTES)
EK_TEMPLATE += mp.tpm2b(EK_POLICY)
EK_TEMPLATE += struct.pack(">HHHHHI", TPM_ALG_AES, 128, TPM_ALG_CFB, mp.TPM_ALG_NULL, 2048, 0)
EK_PURPOSE, TPM_MODEL = "2.23.133.8.1", "2.23.133.2.2"


class EnrollError(Exception):
    """It can't be enrolled; the text is one line that says why and what to do."""


# ---------------------------------------------------------------- the TPM


class Tpm:
    """A TPM's command channel: of a device, a socket, or HOST:PORT. Ends with its `with` block.

    Raises EnrollError if it can't be reached. Every method raises OSError for another response code
    than success, and for what is no response.
    """

    def __init__(self, place):
        try:
            self._channel = open_channel(place)
        except (OSError, ValueError) as error:
            text = getattr(error, "strerror", None) or error
            raise EnrollError(f"can't reach a TPM at {place}: {text}") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._channel)

    def command(self, code, handles=b"", parameters=b"", authorization=b""):
        """What follows the header of the response to a command."""
        return self.ask(mp.tpm_command(code, handles, parameters, authorization))

    def ask(self, command):
        """The same of a command that is made already."""
        return mp.tpm_ask(self._channel, command, TPM_SECONDS)

    @contextlib.contextmanager
    def primary(self, public):
        """(handle, TPMT_PUBLIC) of a key of the endorsement hierarchy, until the block ends."""
        handle, made = mp.tpm_created(self.ask(mp.tpm_create_primary(public)))
        try:
            yield handle, made
        finally:
            self.flush(handle)

    def flush(self, handle):
        """TPM2_FlushContext of an object or a session."""
        self.command(mp.TPM_CC_FLUSH, b"", handle)


def open_channel(place):
    """A descriptor of a device or a socket. Raises OSError, ValueError."""
    if "/" not in place:
        connection = socket.create_connection(muproxy.address_of(place), CONNECT_SECONDS)
    elif stat.S_ISSOCK(os.stat(place).st_mode):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(place)
    else:
        return os.open(place, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
    connection.settimeout(None)
    return connection.detach()


@contextlib.contextmanager
def attestation_key(tpm):
    """(handle, TPMT_PUBLIC) of the key that an enclave on this TPM quotes with. EnrollError."""
    with tpm.primary(mp.ATTESTATION_KEY + bytes(2)) as (handle, public):
        if public[:-MODULUS] != mp.ATTESTATION_KEY + MODULUS.to_bytes(2, "big"):
            raise EnrollError(f"the TPM made another key than it was told to: {public.hex()}")
        yield handle, public


def read_certificate(tpm):
    """The DER of the RSA-2048 EK's certificate, None if the TPM has none. EnrollError, OSError."""
    index = EK_CERTIFICATE.to_bytes(4, "big")
    try:
        public = tpm.command(TPM_CC_NV_READ_PUBLIC, index)
    except OSError:
        return None
    size = int.from_bytes(public[2:][: int.from_bytes(public[:2], "big")][-2:], "big")
    data = b""
    while len(data) < size:
        where = struct.pack(">HH", min(NV_CHUNK, size - len(data)), len(data))
        owner = TPM_RH_OWNER + index
        body = tpm.command(TPM_CC_NV_READ, owner, where, mp.EMPTY_PASSWORD)
        block = body[6:][: int.from_bytes(body[4:6], "big")]
        if not block:
            raise EnrollError("the TPM's EK certificate can't be read")
        data += block
    return cut_der(data)


def cut_der(data):
    """The first DER element of the data: an NV index may be longer than what it holds."""
    length = data[1] if len(data) > 1 else 0
    if length < 0x80:
        return data[: 2 + length]
    end = 2 + (length & 0x7F)
    return data[: end + int.from_bytes(data[2:end], "big")]


def make_credential(modulus, name, secret):
    """TPM2_MakeCredential in software, for an RSA-2048 EK of template L-1. (Part 1, 24)

    modulus: 256 bytes. name: of the object that the secret is for. Returns the parameters of
    TPM2_ActivateCredential: TPM2B_ID_OBJECT, TPM2B_ENCRYPTED_SECRET.
    """
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding, rsa
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    try:
        from cryptography.hazmat.decrepit.ciphers.modes import CFB
    except ImportError:
        from cryptography.hazmat.primitives.ciphers.modes import CFB

    seed = secrets.token_bytes(32)
    key = rsa.RSAPublicNumbers(65537, int.from_bytes(modulus, "big")).public_key()
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), b"IDENTITY\0")
    cipher = Cipher(algorithms.AES(kdfa(seed, b"STORAGE", name, 128)), CFB(bytes(16))).encryptor()
    identity = cipher.update(mp.tpm2b(secret)) + cipher.finalize()
    integrity = hmac.digest(kdfa(seed, b"INTEGRITY", b"", 256), identity + name, "sha256")
    return mp.tpm2b(mp.tpm2b(integrity) + identity) + mp.tpm2b(key.encrypt(seed, oaep))


def kdfa(key, label, context, bits):
    """KDFa with SHA-256, at most 256 bits. (Part 1, 11.4.10.2)"""
    data = struct.pack(">I", 1) + label + b"\0" + context + struct.pack(">I", bits)
    return hmac.digest(key, data, "sha256")[: bits // 8]


def activate_credential(tpm, attestation, endorsement, parameters):
    """TPM2_ActivateCredential: the secret, from a TPM that holds both keys. Raises OSError."""
    nonce, salt = mp.tpm2b(secrets.token_bytes(32)), bytes(2)
    kind = struct.pack(">BHH", TPM_SE_POLICY, mp.TPM_ALG_NULL, mp.TPM_ALG_SHA256)
    handles = TPM_RH_NULL + TPM_RH_NULL
    session = tpm.command(TPM_CC_START_AUTH_SESSION, handles, nonce + salt + kind)[:4]
    try:
        nothing = bytes(2 + 2 + 2 + 4)  # no nonce, cpHash, policyRef or expiration
        handles = mp.TPM_RH_ENDORSEMENT + session
        tpm.command(TPM_CC_POLICY_SECRET, handles, nothing, mp.EMPTY_PASSWORD)
        both = mp.EMPTY_PASSWORD + session + bytes(5)
        handles = attestation + endorsement
        body = tpm.command(TPM_CC_ACTIVATE_CREDENTIAL, handles, parameters, both)
    except OSError:
        tpm.flush(session)  # a command that succeeds has ended it
        raise
    return body[6:][: int.from_bytes(body[4:6], "big")]


# ---------------------------------------------------------------- the EK's certificate


def check_certificate(der, modulus, issuers):
    """The root that this certificate gives an EK: "ek:ISSUER", or "fixture". Raises EnrollError.

    modulus: the EK's, 256 bytes. issuers: files of certificates in PEM; the self-signed ones among
    them are trusted, the others may lead there.
    """
    from cryptography import x509

    try:
        certificate = x509.load_der_x509_certificate(der)
        numbers = certificate.public_key().public_numbers()
        certified = (numbers.n, numbers.e)
        extensions = certificate.extensions
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, AttributeError, x509.ExtensionNotFound) as error:
        raise EnrollError(f"the TPM's EK certificate is not one: {error}") from None
    if certified != (int.from_bytes(modulus, "big"), 65537):
        raise EnrollError("the TPM's EK certificate is for another key than its EK")
    if x509.ObjectIdentifier(EK_PURPOSE) not in purposes:
        raise EnrollError("the TPM's EK certificate is not for an endorsement key")
    check_chain(der, issuers)
    model = x509.ObjectIdentifier(TPM_MODEL)
    directory = names.get_values_for_type(x509.DirectoryName)
    models = [found.value for name in directory for found in name.get_attributes_for_oid(model)]
    if "swtpm" in models:
        return "fixture"
    issuer = " ".join(certificate.issuer.rfc4514_string().split())
    return f"ek:{issuer[:200]}"


def check_chain(der, issuers):
    """Have OpenSSL verify a certificate up to one of the issuers that signs itself. EnrollError."""
    with tempfile.TemporaryDirectory() as folder:
        bundle, leaf = pathlib.Path(folder, "issuers.pem"), pathlib.Path(folder, "ek.der")
        try:
            bundle.write_bytes(b"\n".join(pathlib.Path(path).read_bytes() for path in issuers))
        except OSError as error:
            raise EnrollError(f"{error.filename}: {error.strerror}") from None
        leaf.write_bytes(der)
        command = ["openssl", "verify", "-no-CApath", "-no-CAstore", "-CAfile", bundle, leaf]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError:
            raise EnrollError("openssl is needed to verify a certificate: install it") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith(("error", "Could"))]
        text = (lines or done.stderr.splitlines() or ["refused"])[0].replace(f"{folder}/", "")
        raise EnrollError(f"the TPM's EK certificate does not lead to an issuer given: {text}")


# ---------------------------------------------------------------- enrolling


def enroll_key(reference, place, issuers):
    """Reference values with the attestation key of a TPM, and the root. EnrollError."""
    try:
        with Tpm(place) as tpm:
            tpm.command(TPM_CC_SELF_TEST, b"", b"\x01")
            with attestation_key(tpm) as (key, public):
                root = endorse(tpm, key, public, issuers) if issuers else "fixture"
    except OSError as error:
        raise EnrollError(f"{place}: {error}") from None
    known = reference.get("attestation_key", public.hex())
    if known != public.hex():
        text = "the file holds another TPM's attestation_key; take it out first, and its pcrs"
        raise EnrollError(f"{text}, if this TPM is to be expected instead")
    return reference | {"kind": "tpm2", "root": root, "attestation_key": public.hex()}


def endorse(tpm, key, public, issuers):
    """The root of an attestation key in a TPM whose EK is certified. EnrollError, OSError."""
    der = read_certificate(tpm)
    if der is None:
        raise EnrollError("the TPM holds no certificate of an RSA-2048 EK; leave out --issuer")
    with tpm.primary(EK_TEMPLATE + mp.tpm2b(bytes(MODULUS))) as (endorsement, ek_public):
        root = check_certificate(der, ek_public[-MODULUS:], issuers)
        secret, name = secrets.token_bytes(32), muproxy.tpm_name(public)
        credential = make_credential(ek_public[-MODULUS:], name, secret)
        answer = activate_credential(tpm, key, endorsement, credential)
    if not hmac.compare_digest(answer, secret):
        raise EnrollError("the TPM does not hold both the EK and the attestation key")
    return root


def enroll_pcrs(reference, place):
    """Reference values with the PCRs and the event log of a locked enclave. Raises EnrollError.

    Its quote must be as expected, but for the PCRs that the reference values have not.
    """
    if reference["kind"] != "tpm2" or "attestation_key" not in reference:
        raise EnrollError("the file has no attestation key yet: --tpm comes first")
    pcrs = dict(reference.get("pcrs", {}))
    new = {f"PCR {pcr}": str(pcr) for pcr in mp.PCRS if str(pcr) not in pcrs}
    try:
        facts = {"role": "owner", "excused": new}
        session = muproxy.Session(muproxy.address_of(place), reference, **facts)
        with contextlib.closing(session):
            log = session.read_log()
    except muproxy.Refusal as refusal:
        wrong = (c for c in refusal.checks if not c.ok and c.name not in new)
        text = "; ".join(f"{c.name}: expected {c.expected}, got {c.got}" for c in wrong)
        raise EnrollError(f"{place} is not what the file says: {text}") from None
    except (ValueError, mp.ProtocolError) as error:
        raise EnrollError(f"{place}: {muproxy.text_of(error)}") from None
    pcrs |= {new[check.name]: check.got for check in session.checks if check.name in new}
    reference = {name: value for name, value in reference.items() if name != "event_log"}
    return reference | {"pcrs": pcrs} | ({"event_log": log.hex()} if leads_to(log, pcrs) else {})


def leads_to(log, pcrs):
    """Whether an event log leads to these PCRs: else it can't explain them."""
    try:
        found = eventlog.replay(eventlog.parse(log))
    except eventlog.LogError:
        return False
    return all(found[int(pcr)].hex() == value for pcr, value in pcrs.items())


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="enroll.py", description=__doc__.split("\n")[0])
    parser.add_argument("reference", metavar="FILE", help="reference values, which it completes")
    parser.add_argument("--tpm", help="device, or HOST:PORT of a TPM's command channel")
    parser.add_argument("--issuer", action="append", default=[], metavar="FILE", help="PEM")
    parser.add_argument("--enclave", metavar="HOST:PORT", help="an enclave that runs on that TPM")
    flags = parser.parse_args(argv)
    if not (flags.tpm or flags.enclave) or (flags.issuer and not flags.tpm):
        parser.error("say --tpm, with --issuer or without, or --enclave")
    try:
        reference = muproxy.read_reference(flags.reference)
        if flags.tpm:
            reference = enroll_key(reference, flags.tpm, flags.issuer)
        if flags.enclave:
            reference = enroll_pcrs(reference, flags.enclave)
        text = json.dumps(reference, indent=2, sort_keys=True) + "\n"
        measure.write(pathlib.Path(flags.reference), text)
    except (EnrollError, measure.MeasureError, muproxy.Failure) as error:
        print(f"enroll: error: {error}", file=sys.stderr)
        return 1
    digest = hashlib.sha256(bytes.fromhex(reference["attestation_key"])).hexdigest()
    missing = [str(pcr) for pcr in mp.PCRS if str(pcr) not in reference.get("pcrs", {})]
    print(f"attestation key {digest}")
    print(f"root: {reference['root']} ({muproxy.ROOTS[reference['root'].partition(':')[0]]})")
    print(f"PCRs not enrolled yet: {' '.join(missing) or 'none'}")
    if flags.enclave and "event_log" not in reference:
        print("no event log: the enclave has none that leads to these PCRs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
