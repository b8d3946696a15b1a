"""Read the event log of a measured boot, and say which entry a PCR's other value comes from.

    eventlog.py LOG                    every event, and the PCRs that they lead to
    eventlog.py LOG --against LOG      the first entry of each PCR that differs from another boot's
    eventlog.py LOG --reference FILE   the same against the boot that was enrolled in that file
    eventlog.py LOG --attested FILE    the same for the PCRs that a quote proved: `muproxy attest`

LOG is the firmware's: the guest's /sys/kernel/security/tpm0/binary_bios_measurements, which
`muproxy attest --log FILE` fetches. It proves nothing by itself: it only explains PCRs that a quote
has proved, and only as far as it leads to them. Source: TCG PC Client Platform Firmware Profile
1.05, section 10 (event logging). Standard library only. Exit status: 0 if nothing differs, 1 if
something does or the log is malformed.
"""

import argparse
import collections
import hashlib
import itertools
import json
import pathlib
import struct
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import muprotocol as mp  # noqa: E402
import muproxy  # noqa: E402

Event = collections.namedtuple("Event", "pcr type digest data")  # digest: SHA-256, 32 bytes

EV_NO_ACTION = 3
SIGNATURE = b"Spec ID Event03\0"  # of TCG_EfiSpecIDEvent, 10.4.5.1
LOCALITY = b"StartupLocality\0"  # 10.4.5.3
SIZE_LIMIT = 1 << 20  # bytes
PCR_COUNT = 24
SHOWN = 60  # characters of an event's data
TYPES = {  # 10.4.1
    0x00000001: "EV_POST_CODE",
    0x00000003: "EV_NO_ACTION",
    0x00000004: "EV_SEPARATOR",
    0x00000005: "EV_ACTION",
    0x00000006: "EV_EVENT_TAG",
    0x00000007: "EV_S_CRTM_CONTENTS",
    0x00000008: "EV_S_CRTM_VERSION",
    0x0000000A: "EV_PLATFORM_CONFIG_FLAGS",
    0x0000000D: "EV_IPL",
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    0x80000002: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
    0x80000006: "EV_EFI_GPT_EVENT",
    0x80000007: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2",
    0x8000000C: "EV_EFI_VARIABLE_BOOT2",
    0x800000E0: "EV_EFI_VARIABLE_AUTHORITY",
}
VARIABLES = (0x80000001, 0x80000002, 0x8000000C, 0x800000E0)
FIRMWARE_BLOB = 0x80000008


class LogError(Exception):
    """A log that can't be read; the text is one line that says why."""


class Reader:
    """Takes little-endian integers and bytes from the front of data. Raises LogError."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, size):
        """The next `size` bytes."""
        end = self.at + size
        if end > len(self.data):
            raise LogError(f"the log ends within an event, at byte {self.at}")
        taken, self.at = self.data[self.at : end], end
        return taken

    def integer(self, size):
        """The next integer of `size` bytes."""
        return int.from_bytes(self.take(size), "little")


def parse(data):
    """The events of a crypto-agile log (TCG_PCR_EVENT2), in order. [Event] Raises LogError.

    A log that goes on with zeros or ff, as a firmware's buffer does, ends there.
    """
    if not data:
        raise LogError("there is no event log: nothing was measured")
    reader = Reader(data)
    _, kind, _, size = (reader.integer(4), reader.integer(4), reader.take(20), reader.integer(4))
    header = reader.take(size)
    if kind != EV_NO_ACTION or header[:16] != SIGNATURE:
        raise LogError("not a crypto-agile event log")
    sizes = digest_sizes(Reader(header[24:]))
    events = []
    while reader.at < len(data):
        if not data[reader.at :].strip(b"\0") or not data[reader.at :].strip(b"\xff"):
            break
        pcr, kind, count = (reader.integer(4) for _ in range(3))
        digests = {}
        for _ in range(count):
            algorithm = reader.integer(2)
            if algorithm not in sizes or algorithm in digests:
                raise LogError(f"an event has a digest of unknown kind {algorithm:#x}")
            digests[algorithm] = reader.take(sizes[algorithm])
        if mp.TPM_ALG_SHA256 not in digests or pcr >= PCR_COUNT:
            raise LogError(f"event {len(events)} has no SHA-256 digest, or no PCR")
        content = reader.take(reader.integer(4))
        events.append(Event(pcr, kind, digests[mp.TPM_ALG_SHA256], content))
    return events


def digest_sizes(reader):
    """{TPM_ALG_ID: size} from the rest of a TCG_EfiSpecIDEvent. Raises LogError."""
    count = reader.integer(4)
    sizes = {reader.integer(2): reader.integer(2) for _ in range(min(count, 16))}
    if sizes.get(mp.TPM_ALG_SHA256) != 32 or len(sizes) != count:
        raise LogError("the log has no SHA-256 digests")
    return sizes


def replay(events):
    """{PCR: value of 32 bytes} that these events lead to, from the power on."""
    pcrs = {pcr: bytes(32) for pcr in range(PCR_COUNT)}
    for event in events:
        if event.type != EV_NO_ACTION:
            pcrs[event.pcr] = hashlib.sha256(pcrs[event.pcr] + event.digest).digest()
        elif event.data[:16] == LOCALITY and len(event.data) == 17:
            pcrs[0] = bytes(31) + event.data[16:]
    return pcrs


def describe(event):
    """An event in one line: type, digest, and what can be read of its data."""
    kind = TYPES.get(event.type, f"{event.type:#010x}")
    return f"{kind} {event.digest.hex()} {text_of(event)}".rstrip()


def text_of(event):
    """What a reader can make of an event's data: a variable's name, a place in memory, or text."""
    data = event.data
    if event.type in VARIABLES and len(data) >= 32:
        (letters,) = struct.unpack_from("<Q", data, 16)
        name = data[32:][: 2 * min(letters, 256)].decode("utf-16-le", "replace")
        return "".join(letter if letter.isprintable() else "." for letter in name)[:SHOWN]
    if event.type == FIRMWARE_BLOB and len(data) == 16:  # UEFI_PLATFORM_FIRMWARE_BLOB, 10.2.5
        base, length = struct.unpack("<QQ", data)
        return f"at {base:#x}, {length} bytes"
    text = data.decode("utf-16-le" if b"\0" in data[1:2] else "latin-1", "replace").rstrip("\0")
    return text[:SHOWN] if text.isascii() and text.isprintable() else ""


def differences(events, others):
    """{PCR: (entry, event, other)}: the first of each PCR that differs; None where there is none.

    entry: counted from 1, among those that the PCR was extended by.
    """
    found = {}
    for pcr in range(PCR_COUNT):
        ours, theirs = (
            [event for event in log if event.pcr == pcr and event.type != EV_NO_ACTION]
            for log in (events, others)
        )
        for entry, pair in enumerate(itertools.zip_longest(ours, theirs), 1):
            if pair[0] is None or pair[1] is None or pair[0].digest != pair[1].digest:
                found[pcr] = (entry, *pair)
                break
    return found


def explain(events, others, pcrs):
    """Lines that name the entries by which PCRs differ from what was expected.

    others: events of the boot that was as expected, or none. pcrs: {PCR: (expected, got)} in
    hexadecimal. What either log says counts only for PCRs that it leads to.
    """
    ours, theirs, first = replay(events), replay(others), differences(events, others)
    for pcr, (expected, got) in pcrs.items():
        if expected == got:
            continue
        yield f"PCR {pcr}: expected {expected}, got {got}"
        if ours[pcr].hex() != got:
            yield f"    the log leads to {ours[pcr].hex()}: it is another boot's, or was changed"
        elif theirs[pcr].hex() != expected:
            yield "    no log is known that leads to what was expected; the entries of this boot:"
            entries = [e for e in events if e.pcr == pcr and e.type != EV_NO_ACTION]
            yield from (f"    {at}: {describe(event)}" for at, event in enumerate(entries, 1))
        elif pcr in first:
            entry, event, other = first[pcr]
            yield f"    entry {entry}: expected {describe(other) if other else 'nothing more'}"
            yield f"    entry {entry}: got      {describe(event) if event else 'nothing more'}"
        else:
            yield "    the entries are the same: the locality that the boot began at differs"


def read(path):
    """The events of a log file. Raises LogError."""
    try:
        with open(path, "rb") as file:
            return parse(file.read(SIZE_LIMIT))
    except OSError as error:
        raise LogError(f"{path}: {error.strerror}") from None
    except LogError as error:
        raise LogError(f"{path}: {error}") from None


def show(events):
    """Print every event, and the PCRs."""
    for event in events:
        print(f"PCR {event.pcr}: {describe(event)}")
    for pcr, value in replay(events).items():
        if value != bytes(32):
            print(f"PCR {pcr} = {value.hex()}")
    return 0


def attested(path):
    """(PCRs for `explain`, hexadecimal log of the enrolled boot) from a file of attest's JSON."""
    try:
        facts = json.loads(pathlib.Path(path).read_text("utf-8"))
        checks = [check for check in facts["checks"] if check["name"].startswith("PCR ")]
        pcrs = {int(c["name"].removeprefix("PCR ")): (c["expected"], c["got"]) for c in checks}
        return pcrs, facts.get("event_log", "")
    except OSError as error:
        raise LogError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LogError(f"{path}: not what `muproxy attest --json` prints") from None


def compare(events, flags):
    """Print how a log differs from what the flags name. Returns the exit status."""
    ours, log = replay(events), ""
    if flags.attested:
        pcrs, log = attested(flags.attested)
    elif flags.reference:
        reference = muproxy.read_reference(flags.reference)
        expected, log = reference.get("pcrs", {}), reference.get("event_log", "")
        pcrs = {int(pcr): (value, ours[int(pcr)].hex()) for pcr, value in expected.items()}
    others = read(flags.against) if flags.against else parse(bytes.fromhex(log)) if log else []
    if flags.against:
        pcrs = {pcr: (value.hex(), ours[pcr].hex()) for pcr, value in replay(others).items()}
    lines = list(explain(events, others, pcrs))
    print(*lines, sep="\n", end="\n" if lines else "")
    return int(bool(lines))


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="eventlog.py", description=__doc__.split("\n")[0])
    parser.add_argument("log", metavar="LOG")
    expected = parser.add_mutually_exclusive_group()
    expected.add_argument("--against", metavar="LOG", help="of a boot that was as expected")
    expected.add_argument("--reference", metavar="FILE", help="reference values")
    expected.add_argument("--attested", metavar="FILE", help="what `muproxy attest --json` printed")
    flags = parser.parse_args(argv)
    try:
        events = read(flags.log)
        is_compared = flags.against or flags.reference or flags.attested
        return compare(events, flags) if is_compared else show(events)
    except (LogError, muproxy.Failure) as error:
        print(f"eventlog: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
