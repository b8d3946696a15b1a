"""PID 1 of a test build of the guest: the real one, and beside it probes of what root can do there.

tests/test_vm.py puts this file in the place of muenclave.py, and the real one beside it as real.py.
The result goes to the serial port as one line of JSON. The engine is one that does harm when its
prompt says so, confined as the real one is.
"""

import ctypes
import errno
import json
import os
import socket
import struct
import sys
import threading
import time

import real

import muprotocol as mp

HOST, ELSEWHERE = "10.0.2.2", "192.0.2.1"  # the host, as QEMU's network shows it; RFC 5737
PORT_FILE = "/usr/lib/muenclave/probe_port"  # of the host, on which the test listens
SYSCALLS = {  # x86-64
    "init_module": 175,
    "finit_module": 313,
    "kexec_load": 246,
    "kexec_file_load": 320,
    "bpf": 321,
    "io_uring_setup": 425,
    "userfaultfd": 323,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "add_key": 248,
    "swapon": 167,
    "open_by_handle_at": 304,
    "perf_event_open": 298,
    "iopl": 172,
    "modify_ldt": 154,
}
PTRACE_ATTACH, CLONE_NEWUSER = 16, 0x10000000
FILTERED = "2"  # SECCOMP_MODE_FILTER, as /proc shows it
TPM_ST_NO_SESSIONS, TPM_CC_PCR_READ, TPM_ALG_SHA256 = 0x8001, 0x17E, 0x0B


def outcome(action, *arguments):
    """What came of an action: "done", or the name of its error."""
    try:
        action(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, type(error).__name__)
    return "done"


def call(number, *arguments):
    """The name of the error of a system call, "done" if there was none."""
    library = ctypes.CDLL(None, use_errno=True)
    result = library.syscall(number, *arguments)
    return errno.errorcode[ctypes.get_errno()] if result < 0 else "done"


def write_in(folder):
    """Make a file."""
    with open(os.path.join(folder, "probe"), "w") as file:
        file.write("x")


def write_to(device):
    """Write to a disk."""
    disk = os.open(device, os.O_WRONLY)
    try:
        os.pwrite(disk, bytes(512), 0)
        os.fsync(disk)
    finally:
        os.close(disk)


def connect(family, kind, address):
    """Send something out."""
    with socket.socket(family, kind) as connection:
        connection.settimeout(3)
        connection.connect(address)
        connection.send(b"probe")


def pcr(index):
    """A PCR of the SHA-256 bank (TPM 2.0 Part 3, TPM2_PCR_Read)."""
    select = struct.pack(">IHB3s", 1, TPM_ALG_SHA256, 3, (1 << index).to_bytes(3, "little"))
    header = struct.pack(">HII", TPM_ST_NO_SESSIONS, 10 + len(select), TPM_CC_PCR_READ)
    device = os.open("/dev/tpm0", os.O_RDWR)
    os.write(device, header + select)
    answer = os.read(device, 4096)
    os.close(device)
    return answer[-32:].hex()


def listening():
    """The local ports on which anything listens or receives, by protocol."""
    ports = []
    for name in ("tcp", "udp", "raw", "udplite", "tcp6", "udp6", "packet"):
        path = f"/proc/net/{name}"
        if os.path.exists(path):
            with open(path) as file:
                rows = [line.split() for line in file.readlines()[1:]]
            found = [row for row in rows if name != "tcp" or row[3] == "0A"]
            ports += [f"{name} {int(row[1].split(':')[1], 16)}" for row in found]
    return sorted(ports)


def executables():
    """The files of the root that may be executed, or are set-user-ID, or that others may write."""
    found = []
    for folder, folders, names in os.walk("/"):
        if folder == "/":
            folders[:] = sorted(set(folders) - {"proc", "sys", "dev"})
        for name in names:
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            if not os.path.islink(path) and mode & 0o7133:
                found.append(f"{path} {mode:o}")
    return sorted(found)


def gate():
    """The process id of the gate."""
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with open(f"/proc/{name}/cmdline", "rb") as file:
            if b"--gate" in file.read().split(b"\0"):
                return int(name)


def capabilities(pid):
    """The sets of capabilities of a process's main thread: {name: hexadecimal}."""
    return {name: value for name, value in status(pid).items() if name.startswith("Cap")}


def status(pid):
    """What the kernel tells of a process's main thread: {name: text}."""
    with open(f"/proc/{pid}/task/{pid}/status") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def probe():
    """All of it, once the gate listens and, some moments later, is confined."""
    while not listening() or status(gate())["Seccomp"] != FILTERED:
        time.sleep(0.2)
    with open(PORT_FILE) as file:
        port = int(file.read())
    other, stream, datagram = gate(), socket.SOCK_STREAM, socket.SOCK_DGRAM
    with open("/proc/mounts") as file:
        mounts = [line.split()[:4] for line in file]
    found = {"mounts": mounts, "devices": sorted(os.listdir("/dev")), "listening": listening()}
    found["write"] = {
        folder: outcome(write_in, folder)
        for folder in ("/", "/tmp", "/run", "/dev", "/dev/shm", "/etc", "/usr/lib/muenclave")
    }
    found["write"] |= {disk: outcome(write_to, disk) for disk in ("/dev/vda", "/dev/vdb")}
    found["out"] = {
        "tcp to the host": outcome(connect, socket.AF_INET, stream, (HOST, port)),
        "tcp to elsewhere": outcome(connect, socket.AF_INET, stream, (ELSEWHERE, 80)),
        "udp to elsewhere": outcome(connect, socket.AF_INET, datagram, (ELSEWHERE, 53)),
        "ipv6": outcome(connect, socket.AF_INET6, stream, ("::1", port)),
        "vsock": outcome(connect, socket.AF_VSOCK, stream, (2, port)),
        "packets": outcome(socket.socket, socket.AF_PACKET, socket.SOCK_RAW),
        "netlink to audit": outcome(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, 9),
    }
    outcome(connect, socket.AF_INET, datagram, (HOST, port))
    found["calls"] = {name: call(number, 0, 0, 0, 0, 0) for name, number in SYSCALLS.items()}
    found["calls"]["unshare"] = call(272, CLONE_NEWUSER)
    found["ptrace"] = call(101, PTRACE_ATTACH, other, 0, 0)
    found["memory"] = outcome(os.open, f"/proc/{other}/mem", os.O_RDONLY)
    found["files"] = {
        path: os.path.exists(path)
        for path in ("/dev/mem", "/dev/port", "/dev/ptmx", "/proc/kcore", "/proc/kallsyms")
    }
    found["files"] |= {path: os.path.exists(path) for path in ("/bin/sh", "/usr/bin/sh")}
    found["executables"] = executables()
    found["capabilities"] = {"init": capabilities(1), "gate": capabilities(other)}
    found["pcrs"] = {index: pcr(index) for index in (4, 9)}
    with open("/proc/cmdline") as file:
        found["command_line"] = file.read().strip()
    print("probe: " + json.dumps(found), file=sys.stderr, flush=True)


def engine(settings, gate, loader):
    """Take the arena as the real engine does, then do what a prompt says: "memory", "fault"."""
    mp.read_frame(gate, mp.HANDSHAKE_FRAME)  # the model's type
    real.drop_privileges("engine", settings["ENCLAVE_CONFINEMENT"])
    real.confine("e")
    with loader:
        real.map_arena(loader)
    gate.sendall(mp.PIPE.pack(mp.LOADED, 0, 1024))
    request = json.loads(mp.read_frame(gate, mp.MESSAGE_LIMIT))
    if request["prompt"] == "fault":
        ctypes.string_at(0)
    hoard = []
    while request["prompt"] == "memory":
        hoard.append(b"x" * (1 << 24))


def main():
    """Its roles are the real ones but for the engine; as PID 1, probe beside it."""
    real.__file__ = __file__  # what init starts again
    real.ROLES["--engine"] = engine
    if sys.argv[1:] == ["--init"]:
        threading.Thread(target=probe, daemon=True).start()
    return real.main()


if __name__ == "__main__":
    sys.exit(main())
