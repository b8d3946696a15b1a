"""PID 1 of the guest on Debian's cloud kernel, whose drivers are modules: they are loaded here.

tools/bench.py adds this file and the modules to the guest's root. Then it is muenclave.py's turn.
"""

import ctypes
import fcntl
import os
import socket
import struct
import sys

import muenclave

FOLDER = os.path.dirname(os.path.abspath(__file__))
ADDRESS, MASK = "10.0.2.15", "255.255.255.0"
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, IFF_UP = 0x8914, 0x8916, 0x891C, 1
FINIT_MODULE = 313  # x86-64


def load_modules():
    """Load the kernel modules beside this file, in the order of their names. Raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    for name in sorted(name for name in os.listdir(FOLDER) if name.endswith(".ko")):
        with open(os.path.join(FOLDER, name), "rb") as file:
            if library.syscall(FINIT_MODULE, file.fileno(), b"", 0):
                raise OSError(ctypes.get_errno(), f"can't load {name}")


def set_address():
    """Give eth0 its address, as our kernel does by its command line. Raises OSError."""
    request = struct.Struct("=16sHxx4s16x")
    with socket.socket() as any_socket:
        for number, address in ((SIOCSIFADDR, ADDRESS), (SIOCSIFNETMASK, MASK)):
            value = request.pack(b"eth0", socket.AF_INET, socket.inet_aton(address))
            fcntl.ioctl(any_socket, number, value)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("=16sH22x", b"eth0", IFF_UP))


if __name__ == "__main__":
    load_modules()
    set_address()
    del sys.argv[2:]  # QEMU adds a word about the initramfs
    sys.exit(muenclave.main())
