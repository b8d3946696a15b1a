"""Runs inside each process of an enclave, as its sitecustomize module, and tries what a filter is
to refuse: raw system calls from the main thread, from a thread that was there before the filter
came, and from one that was started after it.

A socket named probe.sock lies beside the copy of this file. What is said there, a line of JSON
each: first {"role", "pid"}; then the outcomes of the main thread, on SIGUSR1; then, after a byte
from the other side, those of the older and of the younger thread. An outcome is [what the call
returned, errno], 0 for the first if it succeeded.
"""

import ctypes
import json
import os
import pathlib
import signal
import socket
import sys
import threading

PID, BAD = object(), 1  # our own process id; an address that is not mapped
PAGE = object()  # the address of a page of our own
MSG_FASTOPEN, CLONE_SIGHAND, PTRACE_ATTACH, PR_GET_NO_NEW_PRIVS = 0x20000000, 0x800, 16, 39
HERE = -100  # AT_FDCWD
NOBODY = 0x3FFFFFFF  # no process has this id
# Call and arguments, by x86-64's numbers. Every one of them, without a filter, does no harm and
# ends with success or with another error than EPERM, also in a process without privileges.
CALLS = {
    "socket": (41, 2, 1, 0),
    "socketpair": (53, 1, 1, 0, BAD),
    "connect": (42, -1, 0, 0),
    "bind": (49, -1, 0, 0),
    "listen": (50, -1, 1),
    "connect by sendto": (44, -1, 0, 0, MSG_FASTOPEN, 0, 0),
    "execve": (59, b"/proc/nonexistent", 0, 0),
    "execveat": (322, -1, b"nonexistent", 0, 0, 0),
    "open": (2, b"/dev/null", os.O_RDONLY),
    "open to write": (2, b"/dev/null", os.O_WRONLY),
    "openat": (257, HERE, b"/dev/null", os.O_RDONLY),
    "openat to write": (257, HERE, b"/dev/null", os.O_RDWR),
    "openat to create": (257, HERE, b"/proc/nonexistent/x", os.O_CREAT | os.O_WRONLY, 0o600),
    "openat2": (437, HERE, b"/dev/null", BAD, 24),
    "creat": (85, b"/proc/nonexistent/x", 0o600),
    "kill": (62, PID, 0),
    "tkill": (200, PID, 0),
    "tgkill": (234, PID, PID, 0),
    "rt_sigqueueinfo": (129, PID, 0, BAD),
    "pidfd_open": (434, PID, 0),
    "pidfd_send_signal": (424, -1, 0, 0, 0),
    "pidfd_getfd": (438, -1, 0, 0),
    "ptrace": (101, PTRACE_ATTACH, NOBODY, 0, 0),
    "process_vm_readv": (310, PID, 0, 0, 0, 0, 0),
    "process_vm_writev": (311, PID, 0, 0, 0, 0, 0),
    "mount": (165, BAD, BAD, BAD, 0, BAD),
    "umount2": (166, BAD, 0),
    "chroot": (161, BAD),
    "unshare": (272, 0),
    "setns": (308, -1, 0),
    "memfd_create": (319, b"x", 0),
    "clone": (56, CLONE_SIGHAND, 0, 0, 0, 0),
    "fork": (57,),
    "prctl": (157, PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0),
    "capset": (126, BAD, BAD),
    "setresuid": (117, -1, -1, -1),
    "personality": (135, 0xFFFFFFFF),
    "prlimit64": (302, 0, 7, 0, 0),
    "io_uring_setup": (425, 0, BAD),
    "shmget": (29, 0, 0, 0),
    "pkey_mprotect": (329, PAGE, 4096, 1, -1),
    "truncate": (76, BAD, 0),
    "unlink": (87, BAD),
    "rename": (82, BAD, BAD),
    "link": (86, BAD, BAD),
    "symlink": (88, BAD, BAD),
    "mkdir": (83, BAD, 0),
    "chmod": (90, BAD, 0),
    "sendfile": (40, -1, -1, 0, 0),
    "splice": (275, -1, 0, -1, 0, 1, 0),
    "preadv2": (327, -1, 0, 0, 0, 0, 0),
    "ftruncate": (77, -1, 0),
    "dup": (32, -1),
    "getdents64": (217, -1, 0, 0),
    "readlink": (89, BAD, BAD, 1),
    "ioctl TIOCSTI": (16, -1, 0x5412, 0),
    "fcntl F_SETOWN": (72, -1, 8, 0),
    "fcntl F_SETSIG": (72, -1, 10, 0),
}
# What one process may do and another may not; those of the last four are always allowed.
PARTLY = {
    "mmap executable": (9, 0, 4096, 7, 0x22, -1, 0),
    "mprotect executable": (10, PAGE, 4096, 7),
    "accept": (288, -1, 0, 0, 0),
    "shutdown": (48, -1, 2),
    "setsockopt SO_SNDTIMEO": (54, -1, 1, 21, 0, 0),
    "setsockopt another": (54, -1, 1, 15, 0, 0),
    "sendmsg": (46, -1, BAD, 0),
    "recvmsg": (47, -1, BAD, 0),
    "fcntl F_ADD_SEALS": (72, -1, 1033, 0),
    "pwrite64": (18, -1, 0, 0, 0),
    "pread64": (17, -1, 0, 0, 0),
    "writev": (20, -1, 0, 0),
    "epoll_wait": (232, -1, BAD, 1, 0),
    "clone3": (435, 0, 0),
    "read": (0, -1, BAD, 1),
    "write": (1, -1, BAD, 1),
    "sendto": (44, -1, 0, 0, 0, 0, 0),
}


class Probe:
    """The probe in one process of an enclave."""

    def __init__(self, role):
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(str(pathlib.Path(__file__).with_name("probe.sock")))
        self.library = ctypes.CDLL(None, use_errno=True)
        self.holder = ctypes.PyDLL(None, use_errno=True)  # holds the interpreter's lock in a fork
        for library in (self.library, self.holder):
            library.syscall.restype = ctypes.c_long
        self.page = ctypes.create_string_buffer(2 * 4096)
        self.address = (ctypes.addressof(self.page) + 4095) & ~4095
        self.is_started = False
        self.say({"role": role, "pid": os.getpid()})
        signal.signal(signal.SIGUSR1, lambda *_: self.say(self.outcomes()))
        sys.addaudithook(self.listen)

    def say(self, value):
        """A line of JSON to the other side."""
        self.connection.sendall(json.dumps(value).encode() + b"\n")

    def listen(self, event, arguments):
        """Start the older thread once privileges are dropped, which is per thread: as the process
        looks up the call that installs its filter."""
        if event == "ctypes.dlsym" and arguments[1] == "syscall" and not self.is_started:
            if self.library.prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1:
                self.is_started = True
                threading.Thread(target=self.run).start()

    def run(self):
        """The older thread: wait for a byte, try; have a younger one try."""
        self.connection.recv(1)
        self.say(self.outcomes())
        threading.Thread(target=lambda: self.say(self.outcomes())).start()

    def outcomes(self):
        """{name of a call: its outcome} in this thread."""
        return {name: self.call(name, *call) for name, call in (CALLS | PARTLY).items()}

    def call(self, name, *call):
        """Make one system call."""
        known = {PID: os.getpid(), PAGE: self.address}
        values = [known.get(value, value) for value in call]
        library = self.holder if name == "fork" else self.library
        plain = [v if isinstance(v, bytes) else ctypes.c_long(v) for v in values]
        ctypes.set_errno(0)
        result = library.syscall(*plain)
        if name == "fork" and result == 0:
            os._exit(0)
        return [min(result, 0), ctypes.get_errno()]


def main():
    """Start the probe, if this process is one of an enclave's that are to be confined."""
    for role in ("gate", "loader", "engine"):
        if f"--{role}" in sys.orig_argv:
            Probe(role)


if __name__ == "sitecustomize":
    main()
