"""The whole way through a VM: the product's own image, verified by its TPM, unlocked, answering.

The model is in float32, where a guest under TCG computes what this machine computes without its
vector units. The tests go in the order of their numbers: each leaves what the next one needs.
"""

import contextlib
import http.client
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

import muprotocol as mp
import muproxy
from tests import guest, host, support
from tests.guest import image, vm

PROMPT = {"messages": [{"role": "user", "content": "Tell me about zen."}]}
SAMPLED = PROMPT | {"temperature": 0.8, "seed": 7, "max_new_tokens": 40}
LOAD_SECONDS = 900  # an engine's imports and the weights, under TCG on a busy machine
BLOCK = 4096  # of dm-verity


def setUpModule():
    if guest.MISSING:
        raise unittest.SkipTest(f"not installed: {' '.join(guest.MISSING)}")


def flip(path, *offsets):
    """Change a bit of a file's bytes at these offsets, in place, as a host changes a disk."""
    with open(path, "r+b", buffering=0) as file:
        for offset in offsets:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))


class Serving(unittest.TestCase):
    """One guest, from its first boot to the owner's return after a power cut."""

    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(guest.enter(cls, tempfile.TemporaryDirectory()))
        cls.site = support.make_site(cls.folder, support.sealed_demo("float32"))
        cls.local_reference = cls.site.reference
        built = guest.build(cls.folder / "image")
        cls.weights = shutil.copy(cls.site.model, cls.folder / "weights")
        cls.extras = built / "extras.squashfs"
        cls.reference = cls.folder / "tpm2.json"
        shutil.copy(built / "reference.json", cls.reference)
        host.enrol_key(cls.folder / "tpm", cls.reference)
        cls.disks = [cls.weights, cls.extras, built / "esp.img", vm.FIRMWARE, vm.VARIABLES]
        cls.before = [image.sha256(path) for path in cls.disks]
        options = {"extras": cls.extras, "memory": 2048, "cpus": 2}
        cls.host = host.Host(built, cls.weights, cls.folder / "tpm", **options)
        cls.addClassCleanup(cls.host.end)
        cls.host.start()
        cls.host.wait_for("muenclave: locked")
        host.enrol_pcrs(cls.host.port, cls.reference)

    def session(self, role):
        """A verified session with the guest."""
        inlet = muproxy.Inlet(support.FREE_RATE, 1 << 30)
        reference = muproxy.read_reference(self.reference)
        return muproxy.Session(("127.0.0.1", self.host.port), reference, None, role, inlet)

    def unlock(self):
        """Unlock it; READY. Raises ProtocolError."""
        with contextlib.closing(self.session("owner")) as session:
            return session.prove(support.unlock_token(self.site))

    def check_refused(self, code):
        """Unlocking fails with this code; then the guest is locked, and afresh."""
        known = len(self.host.lines)
        with self.assertRaises(mp.ProtocolError) as caught:
            self.unlock()
        self.assertEqual(caught.exception.code, code)
        self.host.wait_for("muenclave: lease ended", known)
        self.host.wait_for("muenclave: locked", known)

    def ids(self, session, request):
        """The ids of an answer, and its last record."""
        table = muproxy.read_vocabulary(self.site.vocabulary)
        found = [token for ids in session.exchange(request, table) for token in ids]
        return found, session.final

    def test_1_it_is_what_was_built(self):
        self.assertEqual(host.attest(self.host.port, self.reference), ({}, 0))

    def test_2_changed_weights(self):
        middle = pathlib.Path(self.weights).stat().st_size // 2
        flip(self.weights, middle)
        for _ in range(4):  # gates, each with a key in the TPM, which has places for three
            self.check_refused("container_corrupt")
        flip(self.weights, middle)

    def test_3_changed_extras(self):
        """A bit of each block from the second on: the first, with the superblock, was read."""
        blocks = range(BLOCK, self.extras.stat().st_size, BLOCK)
        flip(self.extras, *blocks)
        self.check_refused("no_engine")
        flip(self.extras, *blocks)
        self.host.kill()
        self.power_on()  # what its squashfs has once found broken stays so

    def power_on(self):
        """Boot it anew."""
        known = len(self.host.lines)
        self.host.start()
        self.host.wait_for("muenclave: locked", known)

    def test_4_the_answer_is_the_local_enclave_s(self):
        ready = self.unlock()
        self.assertEqual(ready["status"], "ready")
        token = {"token": muproxy.read_token(self.site.token)}
        with contextlib.closing(self.session("user")) as session:
            session.prove(token)
            found, final = self.ids(session, SAMPLED)
        plain = {"ATEN_CPU_CAPABILITY": "default"}
        with support.Enclave(self.site, environment=plain) as enclave:
            enclave.unlock()
            with enclave.ready() as session:
                expected, other = self.ids(session, SAMPLED)
        self.assertEqual(found, expected)
        self.assertGreater(len(found), 8)
        for name in ("finish_reason", "usage"):
            self.assertEqual(final[name], other[name])

    def test_5_power_cut(self):
        """The proxy says so, verifies what comes back, and serves again once the owner unlocks."""
        port = vm.free_port()
        command = [sys.executable, "-B", "-m", "muproxy", "serve", "--port", self.host.port]
        command += ["--reference", self.reference, "--vocabulary", self.site.vocabulary]
        command += ["--listen", f"127.0.0.1:{port}", "--rate-kb", "1000"]
        proxy = subprocess.Popen(list(map(str, command)), cwd=support.ROOT)
        self.addCleanup(proxy.wait)
        self.addCleanup(proxy.terminate)
        self.assertTrue(guest.wait_until(lambda: host.is_listening(port)))
        self.assertEqual(self.ask(port, "GET", "/health")[0], 200)
        endless = {"stream": True, "temperature": 2, "seed": 1, "max_tokens": 900}
        connection = self.connect(port)
        self.post(connection, endless)
        answer = connection.getresponse()
        self.assertEqual(answer.status, 200)
        self.assertTrue(answer.readline().startswith(b"data: "))
        self.host.kill()
        rest = answer.read()
        self.assertNotIn(b"[DONE]", rest)
        self.assertIn(b'"error"', rest)
        is_told = lambda: self.ask(port, "GET", "/health")[0] == 503  # noqa: E731
        self.assertTrue(guest.wait_until(is_told, 4 * muproxy.HEALTH_SECONDS))
        self.power_on()
        status, body = self.ask(port, "POST", "/v1/chat/completions", {"max_tokens": 8})
        self.assertEqual((status, "locked" in body), (503, True), body)
        self.unlock()
        wanted = {"max_tokens": 8, "temperature": 0}
        status, body = self.ask(port, "POST", "/v1/chat/completions", wanted)
        self.assertEqual(status, 200, body)
        self.assertEqual(json.loads(body)["usage"]["completion_tokens"], 8)
        self.assertEqual(self.ask(port, "GET", "/health")[0], 200)

    def connect(self, port):
        """A connection to the proxy's API."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LOAD_SECONDS)
        self.addCleanup(connection.close)
        return connection

    def post(self, connection, options, method="POST", path="/v1/chat/completions"):
        """Send a request."""
        token = muproxy.read_token(self.site.token)
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        body = json.dumps({"model": "demo"} | PROMPT | options) if method == "POST" else None
        connection.request(method, path, body, headers)

    def ask(self, port, method, path, options=None):
        """(status, body) of a request."""
        with contextlib.closing(self.connect(port)) as connection:
            self.post(connection, options or {}, method, path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def test_6_no_disk_has_changed(self):
        self.assertEqual([image.sha256(path) for path in self.disks], self.before)

    def test_7_the_console_kept_to_its_vocabulary(self):
        for line in self.host.lines:
            self.assertRegex(line, guest.CONSOLE)


class Extras(unittest.TestCase):
    """A disk of PyTorch that is not the measured one is not even mounted."""

    def test_a_changed_superblock(self):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            built = guest.build(folder / "image")
            flip(built / "extras.squashfs", 100)
            (folder / "tpm").mkdir()
            weights, extras = support.sealed_demo().model, built / "extras.squashfs"
            with host.Host(built, weights, folder / "tpm", extras=extras) as changed:
                changed.wait_for("muenclave: error: can't mount /usr/lib/muenclave/extras")
                changed.wait_end()


if __name__ == "__main__":
    unittest.main()
