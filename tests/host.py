"""A host that does with a guest what it likes: QEMU and swtpm as tests start them."""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import types

from tests import guest, support
from tests.guest import vm


def run_enroll(reference, *arguments):
    """Run tools/enroll.py on a file of reference values."""
    command = [sys.executable, support.TOOLS / "enroll.py", reference, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def enrol_key(state, reference):
    """Make a TPM, whose state stays in a folder, and enrol its attestation key."""
    with vm.tpm_device(state) as device:
        run_enroll(reference, "--tpm", device)


def is_listening(port):
    """Whether somebody listens on a port of 127.0.0.1."""
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table]
    return any(row[1] == f"0100007F:{port:04X}" and row[3] == "0A" for row in rows)


def enrol_pcrs(port, reference):
    """Enrol the PCRs of a guest that runs."""
    run_enroll(reference, "--enclave", f"127.0.0.1:{port}")


def attest(port, reference):
    """(checks that failed, by name; exit status) of muproxy attest."""
    flags = ["--port", port, "--reference", reference, "--json", "--role", "owner"]
    done = support.proxy("attest", *flags)
    assert done.stdout, done.stderr
    checks = json.loads(done.stdout)["checks"]
    return {check["name"]: check for check in checks if not check["ok"]}, done.returncode


class Host:
    """A guest under QEMU, with a TPM whose state is copied from a folder; `end` ends both.

    built: the folder of an image. change: gets QEMU's command line, a list, and returns another
    one. flags: of tools/vm.py, where they differ. lines: of the serial port, and QEMU's own.
    """

    def __init__(self, built, weights, tpm, change=lambda command: command, **flags):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="host-"))
        shutil.copytree(tpm, self.folder / "state")
        facts = {"weights": weights, "extras": None, "boot": built / "esp.img", "gpu": []}
        facts |= {"firmware": vm.FIRMWARE, "memory": 1024, "cpus": 1, "vsock": None}
        facts |= {"microvm": False, "accelerator": "tcg", "kernel": None}
        self.flags, self.change = types.SimpleNamespace(**facts | flags), change
        self.processes, self.lines, self.news = [], [], threading.Condition()
        self.has_ended = False
        self.port = vm.free_port()

    def start(self):
        """Power on."""
        self.has_ended = False
        self.processes = [vm.start_tpm(self.folder / "state", self.folder)]
        command = self.change(vm.command_line(self.flags, self.port, self.folder))
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
        streams |= {"stderr": subprocess.STDOUT, "errors": "replace"}
        self.processes.append(vm.start(list(map(str, command)), **streams))
        self.reader = threading.Thread(target=self._read, args=self.processes[-1:], daemon=True)
        self.reader.start()

    def _read(self, process):
        with process.stdout as lines:
            for line in lines:
                with self.news:
                    self.lines.append(line.strip())
                    self.news.notify_all()
        with self.news:
            self.has_ended = True
            self.news.notify_all()

    def wait_for(self, word, after=0):
        """The first line, from number `after` on, that holds a word. AssertionError."""

        def find():
            return next((line for line in self.lines[after:] if word in line), None)

        with self.news:
            self.news.wait_for(lambda: find() or self.has_ended, guest.SECONDS)
            assert find(), f"no {word!r}: it said {self.lines}"
            return find()

    def wait_end(self):
        """Wait until QEMU has ended by itself. AssertionError."""
        self.reader.join(guest.SECONDS)
        assert self.has_ended, f"it has not ended: it said {self.lines}"

    def kill(self):
        """Pull the plug."""
        for process in reversed(self.processes):
            process.kill()
            process.wait()
        self.reader.join()
        self.processes[0].stderr.close()  # the TPM's, which nobody has read

    def end(self):
        """End QEMU and the TPM, and forget them."""
        if self.processes:
            vm.end(*reversed(self.processes))
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.end()
