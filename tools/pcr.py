"""What a measured boot of one EFI program leaves in the TPM, predicted from the file.

Sources: TCG PC Client Platform Firmware Profile, section 3.3.4 (what goes to which PCR); Microsoft,
"Windows Authenticode Portable Executable Signature Format" (the digest); PE format. Standard
library only.
"""

import hashlib
import struct

CALLING = b"Calling EFI Application from Boot Option"  # EV_EFI_ACTION, before the boot program
SEPARATOR = bytes(4)  # EV_SEPARATOR: the firmware's own part is over
PE32_PLUS = 0x20B
CHECKSUM = 64  # offsets in the optional header
SIZE_OF_HEADERS = 60
DIRECTORIES = 112
CERTIFICATES = DIRECTORIES + 4 * 8  # the data directory's entry of the certificate table
SECTION_HEADER = 40


class PcrError(Exception):
    """No prediction; the text is one line that says why."""


def authenticode(program):
    """The SHA-256 Authenticode digest of an EFI program, as bytes of a PE32+ file. PcrError.

    It covers the file but for the checksum and the certificates: what the firmware measures.
    """
    try:
        return _authenticode(program)
    except (struct.error, IndexError):
        raise PcrError("no EFI program: its headers are cut off") from None


def _authenticode(program):
    (start,) = struct.unpack_from("<I", program, 0x3C)
    if program[:2] != b"MZ" or program[start : start + 4] != b"PE\0\0":
        raise PcrError("no EFI program: the PE signature is missing")
    (sections,) = struct.unpack_from("<H", program, start + 6)
    (optional_size,) = struct.unpack_from("<H", program, start + 20)
    optional = start + 24
    (magic,) = struct.unpack_from("<H", program, optional)
    (directories,) = struct.unpack_from("<I", program, optional + DIRECTORIES - 4)
    if magic != PE32_PLUS or directories <= 4:
        raise PcrError("no EFI program for 64-bit machines")
    (headers,) = struct.unpack_from("<I", program, optional + SIZE_OF_HEADERS)
    (certificates,) = struct.unpack_from("<I", program, optional + CERTIFICATES + 4)
    checksum, entry = optional + CHECKSUM, optional + CERTIFICATES
    digest = hashlib.sha256(program[:checksum])
    digest.update(program[checksum + 4 : entry])
    digest.update(program[entry + 8 : headers])
    spans = []
    for number in range(sections):
        header = optional + optional_size + SECTION_HEADER * number
        size, offset = struct.unpack_from("<II", program, header + 16)
        spans.append((offset, size))
    hashed = headers
    for offset, size in sorted(span for span in spans if span[1]):
        digest.update(program[offset : offset + size])
        hashed += size
    digest.update(program[hashed : len(program) - certificates])
    return digest.digest()


def extended(*digests):
    """A PCR of the SHA-256 bank, from zeros, extended by these digests (bytes) in order."""
    value = bytes(32)
    for digest in digests:
        value = hashlib.sha256(value + digest).digest()
    return value


def predict(program):
    """{PCR index: value} of a boot that runs this program and nothing else before it. PcrError.

    4: the boot programs. 9: what the kernel's own loader was given, an initramfs or options: zeros,
    since it was given none.
    """
    actions = (hashlib.sha256(text).digest() for text in (CALLING, SEPARATOR))
    return {4: extended(*actions, authenticode(program)), 9: bytes(32)}
