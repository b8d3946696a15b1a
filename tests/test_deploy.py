"""tools/deploy/: what programs say of its files, and a real fleet behind Debian's HAProxy."""

import concurrent.futures
import contextlib
import csv
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import openai

import muproxy
from tests.support import (
    ROOT,
    SECONDS,
    TOOLS,
    Enclave,
    Sealed,
    demo_model,
    make_site,
    own,
    proxy,
    seal,
)

try:
    import kubernetes_validate
    import yaml
except ImportError:
    kubernetes_validate = None

HERE = TOOLS / "deploy"
HAPROXY, UNITS = HERE / "haproxy.cfg", HERE / "systemd"
MANIFESTS, KUBERNETES = HERE / "kubernetes" / "muenclave.yaml", "1.30"
HADOLINT = pathlib.Path(sys.executable).parent / "hadolint"
EXPOSURE = 2.0  # of systemd's ten, at most
needs_haproxy = unittest.skipUnless(shutil.which("haproxy"), "not installed: haproxy")
needs_kubernetes_validate = unittest.skipUnless(
    kubernetes_validate, "not installed: kubernetes-validate"
)

LIFETIME, GRANT = 300_000, 100_000  # bytes: three leases, and nothing is left
# A cell a second, so that an answer of three or more can be stopped between them.
RATE, BURST = 512, 1 << 22  # the burst is for handshakes, whose share of this rate is tiny
LONG = {"temperature": 1, "seed": 1, "max_tokens": 900}
SHORT = {"temperature": 0, "max_tokens": 4}
MESSAGES = [{"role": "user", "content": "Tell me about zen."}]


def run(*command, **options):
    """A program that has ended; options go to subprocess.run."""
    options |= {"capture_output": True, "text": True, "timeout": SECONDS}
    return subprocess.run(list(map(str, command)), **options)


def check_haproxy(text, folder):
    """What HAProxy says of a configuration, and its exit status."""
    path = pathlib.Path(folder, "haproxy.cfg")
    path.write_text(text)
    done = run("haproxy", "-c", "-f", path)
    return done.returncode, done.stdout + done.stderr


class Files(unittest.TestCase):
    """Each file, by the program that reads it or by one that knows its rules."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    @needs_haproxy
    def test_haproxy(self):
        text = HAPROXY.read_text()
        self.assertEqual(
            check_haproxy(text, self.folder), (0, "Configuration file is valid\n"), text
        )
        status, told = check_haproxy(text.replace("timeout check", "timeout cheque"), self.folder)
        self.assertEqual(status, 1)
        self.assertIn("cheque", told)

    @unittest.skipUnless(shutil.which("systemd-analyze"), "not installed: systemd-analyze")
    def test_systemd(self):
        for source in UNITS.glob("*.service"):
            unit = self.folder / source.name.replace("@", "@enclave1")
            text = source.read_text().replace("/opt/muenclave/.venv/bin/python", sys.executable)
            unit.write_text(text)
            done = run("systemd-analyze", "verify", "--man=no", unit)
            self.assertEqual((done.returncode, done.stdout + done.stderr), (0, ""))
            done = run("systemd-analyze", "security", "--offline=true", "--no-pager", unit)
            exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)[1]
            self.assertLessEqual(float(exposure), EXPOSURE, source.name)
            unit.write_text(text.replace("UMask", "UMusk"))
            done = run("systemd-analyze", "verify", "--man=no", unit)
            self.assertRegex(done.stderr, "Unknown key (name )?'UMusk'")

    def test_systemd_environment(self):
        given = set(re.findall(r"(?m)^(\w+)=", (UNITS / "enclave.env").read_text()))
        used = set()
        for source in UNITS.glob("*.service"):
            used |= set(re.findall(r"\$\{?(\w+)", source.read_text()))
        self.assertEqual(used, given)

    @needs_kubernetes_validate
    def test_kubernetes_schema(self):
        documents = self.documents()
        kinds = {"Namespace", "ConfigMap", "DaemonSet", "Service", "NetworkPolicy"}
        self.assertEqual({document["kind"] for document in documents}, kinds)
        for document in documents:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        pod = self.pod(documents)
        pod["containers"][0]["volumeMount"] = []
        with self.assertRaisesRegex(kubernetes_validate.ValidationError, "volumeMount"):
            kubernetes_validate.validate(self.daemon_set(documents), KUBERNETES, strict=True)

    @needs_kubernetes_validate
    def test_kubernetes_names_agree(self):
        """What a schema does not see: mounts and volumes, labels, variables, memory."""
        documents = self.documents()
        pod, (settings, tls) = self.pod(documents), self.of_kind(documents, "ConfigMap")
        mounts = {m["name"] for c in pod["containers"] for m in c["volumeMounts"]}
        self.assertEqual(mounts, {volume["name"] for volume in pod["volumes"]})
        labels = self.daemon_set(documents)["spec"]["template"]["metadata"]["labels"]
        (service,) = self.of_kind(documents, "Service")
        (policy,) = self.of_kind(documents, "NetworkPolicy")
        self.assertEqual(service["spec"]["selector"], labels)
        self.assertEqual(policy["spec"]["podSelector"]["matchLabels"], labels)
        self.assertEqual(policy["spec"]["egress"], [])
        used = set(re.findall(r"\$\((\w+)\)", MANIFESTS.read_text()))
        self.assertEqual(used, set(settings["data"]))
        pages = pod["containers"][0]["resources"]["limits"]["hugepages-1Gi"]
        self.assertEqual(pages, f"{int(settings['data']['MEMORY']) // 1024}Gi")
        self.assertEqual(tls["metadata"]["name"], pod["volumes"][-2]["configMap"]["name"])
        for container in pod["containers"]:
            self.assertNotIn("@sha256", container["image"])
            is_privileged = container["securityContext"].get("privileged", False)
            self.assertEqual(is_privileged, container["name"] == "vm")

    @needs_haproxy
    @needs_kubernetes_validate
    def test_kubernetes_tls(self):
        """The pod's TLS front, with a certificate as the Secret holds one."""
        text = self.of_kind(self.documents(), "ConfigMap")[1]["data"]["haproxy.cfg"]
        self.assertIn("/tls/", text)
        text = text.replace("/tls/", f"{self.folder}/")
        self.assertEqual(check_haproxy(text, self.folder)[0], 1)
        crt, key = self.folder / "tls.crt", self.folder / "tls.crt.key"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=a"]
        done = run(*command, "-keyout", key, "-out", crt)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(check_haproxy(text, self.folder)[0], 0)

    @needs_kubernetes_validate
    def test_flags_exist(self):
        """Of the tools that units and pods start."""
        vm = run(sys.executable, "-B", TOOLS / "vm.py", "run", "--help").stdout
        helps = {"vm.py": vm, "muproxy": proxy("serve", "--help").stdout}
        gpus = re.search("GPUS=(.*)", (UNITS / "enclave.env").read_text())[1]
        commands = []
        for path in UNITS.glob("*.service"):
            command = re.search("ExecStart=(.*)", path.read_text())[1]
            commands.append(command.replace("$GPUS", gpus))
        for container in self.pod(self.documents())["containers"][:2]:
            commands.append(" ".join(container["command"] + container["args"]))
        for command in commands:
            known = helps["vm.py" if "vm.py" in command else "muproxy"]
            flags = re.findall(r"--[a-z-]+", command)
            self.assertGreater(len(flags), 4)
            for flag in flags:
                self.assertRegex(known, rf"{flag}\b", command)

    @unittest.skipUnless(HADOLINT.exists(), "not installed: hadolint")
    def test_dockerfile(self):
        path = HERE / "Dockerfile"
        done = run(HADOLINT, path)
        self.assertEqual((done.returncode, done.stdout), (0, ""))
        for names, place in re.findall(r"(?m)^COPY (.*) (\S+)$", path.read_text()):
            for name in names.split():
                (self.folder / place).mkdir(exist_ok=True)
                shutil.copy(ROOT / name, self.folder / place)
        for command in (["tools/vm.py", "run"], ["-m", "muproxy", "serve"]):
            done = run(sys.executable, "-SEB", *command, "--help", cwd=self.folder)
            self.assertEqual((done.returncode, done.stderr), (0, ""))

    def documents(self):
        """The manifests, objects."""
        return list(yaml.safe_load_all(MANIFESTS.read_text()))

    def of_kind(self, documents, kind):
        return [document for document in documents if document["kind"] == kind]

    def daemon_set(self, documents):
        return self.of_kind(documents, "DaemonSet")[0]

    def pod(self, documents):
        return self.daemon_set(documents)["spec"]["template"]["spec"]


def endless_demo(folder):
    """The demo model, sealed with an end token that it never says, so that no answer ends early."""
    source = folder / "demo"
    shutil.copytree(demo_model(), source)
    path = source / "generation_config.json"
    facts = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(facts | {"eos_token_id": facts["pad_token_id"]}))
    model, key = source.with_suffix(".mus"), source.with_suffix(".key")
    seal(source, model, "--key", key, "--asset", "demo").check()
    return Sealed(source, model, key, source.with_suffix(".mus.vocab"))


class Stream(threading.Thread):
    """A client's stream, read to its end: text, reason (of the ending), error."""

    def __init__(self, client):
        super().__init__(daemon=True)
        self.client, self.text, self.reason, self.error = client, "", None, None

    def run(self):
        try:
            options = {"model": "demo", "messages": MESSAGES, "stream": True} | LONG
            for chunk in self.client.chat.completions.create(**options):
                self.text += chunk.choices[0].delta.content or ""
                self.reason = chunk.choices[0].finish_reason or self.reason
        except openai.APIError as error:
            self.error = error


class Member:
    """An enclave of the fleet, and the proxy before it."""

    def __init__(self, site, stack):
        flags = ["--threads", "1", "--burst", BURST]
        self.enclave = stack.enter_context(Enclave(site, *flags))
        self.stack = stack

    def unlock(self, *flags):
        """Unlock it as the owner does, by a lease of its own. Returns what has ended."""
        lease = ["--token-file", self.enclave.site.token, "--rate", RATE, "--burst", BURST]
        return own("unlock", *self.enclave.flags("owner"), *lease, "--budget", GRANT, *flags)

    def serve(self):
        """Start its proxy; `place` is HOST:PORT."""
        command = [sys.executable, "-B", "-m", "muproxy", "serve", *self.enclave.flags()]
        command += ["--vocabulary", self.enclave.site.vocabulary, "--listen", "127.0.0.1:0"]
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        self.stack.callback(process.communicate)
        self.stack.callback(process.terminate)
        line = ""
        while not re.search(r" on [\d.]+:\d+$", line):
            line = process.stderr.readline()
            assert line, "muproxy serve has ended"
        self.place = line.split()[-1]

    def requests(self, state):
        """How many requests are in a state: running (all under way), waiting (for a first id)."""
        connection = http.client.HTTPConnection(self.place, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        return int(re.search(rf"(?m)^muproxy_requests_{state} (\d+)$", text)[1])

    def send(self, number):
        """Send its gate a signal."""
        os.kill(self.enclave.pids()["gate"], number)

    def go_on(self):
        """Let a stopped gate go on, if it is still there."""
        if "gate" in self.enclave.pids():
            self.send(signal.SIGCONT)

    def kill(self):
        """What a power cut does, to all of its processes."""
        for pid in self.enclave.pids().values():
            os.kill(pid, signal.SIGKILL)
        self.enclave.process.wait()


@needs_haproxy
class Fleet(unittest.TestCase):
    """Three enclaves with leases from one ledger, three proxies, one HAProxy with our file."""

    def setUp(self):
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.site = make_site(self.folder, endless_demo(self.folder))
        self.members = [Member(self.site, stack) for _ in range(3)]
        first, *others = self.members
        with concurrent.futures.ThreadPoolExecutor() as pool:
            done = [first.unlock("--new-ledger", "--lifetime-budget", LIFETIME)]
            done += pool.map(Member.unlock, others)
        for one in done:
            self.assertEqual((one.returncode, one.stderr), (0, ""))
        for member in self.members:
            member.serve()
        self.start_haproxy(stack)
        token = muproxy.read_token(self.site.token)
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key=token,
            max_retries=0,
            timeout=SECONDS,
        )
        self.addCleanup(self.client.close)

    def start_haproxy(self, stack):
        """Run Debian's HAProxy with the file as it is, but for addresses and paths."""
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.port, self.admin = listener.getsockname()[1], self.folder / "admin.sock"
        places = {
            "127.0.0.1:8080": f"fd@{listener.fileno()}",
            "/run/haproxy/admin.sock": self.admin,
        }
        for number, member in enumerate(self.members, 1):
            places[f"192.0.2.1{number}:8080"] = member.place
        if os.getuid() != 0:  # then it runs as whoever runs the tests
            places |= {"    chroot /var/lib/haproxy\n": ""}
            places |= {f"    {what} haproxy\n": "" for what in ("user", "group")}
        text = HAPROXY.read_text()
        for shipped, ours in places.items():
            self.assertEqual(text.count(shipped), 1, shipped)
            text = text.replace(shipped, str(ours))
        path = self.folder / "haproxy.cfg"
        path.write_text(text)
        process = subprocess.Popen(
            ["haproxy", "-db", "-f", path],
            pass_fds=[listener.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        self.wait_for(lambda: self.admin.exists() and process.poll() is None)
        self.wait_for(lambda: {row["check_status"] for row in self.servers()} == {"L7OK"})

    def servers(self):
        """What HAProxy says of each server: its row of `show stat`, a dict."""
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.connect(str(self.admin))
            connection.sendall(b"show stat\n")
            with connection.makefile() as answer:
                rows = csv.DictReader(answer.read().removeprefix("# ").splitlines())
                return [row for row in rows if row["svname"].startswith("enclave")]

    def wait_for(self, condition):
        """Wait until it holds; the deadline guards against hanging alone."""
        until = time.monotonic() + SECONDS
        while not condition():
            self.assertLess(time.monotonic(), until, "it did not come true")
            time.sleep(0.05)

    def open_streams(self):
        """A stream on each enclave, held between two of its cells by stopping its gate."""
        streams = []
        for member in self.members:
            member.send(signal.SIGSTOP)
            self.addCleanup(member.go_on)
        for _ in self.members:
            streams.append(Stream(self.client))
            streams[-1].start()
            self.wait_for(lambda: sum(self.requests("waiting")) == len(streams))
        self.assertEqual(self.requests("waiting"), [1, 1, 1])
        for member in self.members:
            member.go_on()
        rest = list(self.members)
        while rest:
            for member in [member for member in rest if member.requests("waiting") == 0]:
                member.send(signal.SIGSTOP)
                rest.remove(member)
            time.sleep(0.05)
        said = [(stream.text, stream.error) for stream in streams]
        self.assertEqual(self.requests("running"), [1, 1, 1], said)
        return streams

    def requests(self, state):
        """How many requests are in a state, at each proxy."""
        return [member.requests(state) for member in self.members]

    def test_one_is_killed(self):
        streams = self.open_streams()
        self.kept = [self.connect() for _ in self.members]
        victim, *others = self.members
        victim.kill()
        self.wait_for(lambda: not all(stream.is_alive() for stream in streams))
        self.assertEqual(self.requests("running"), [0, 1, 1])
        for member in others:
            member.go_on()
        for stream in streams:
            stream.join(SECONDS)
        with self.subTest("its stream ends by an error, the others are whole"):
            endings = sorted((str(stream.reason), stream.error is None) for stream in streams)
            self.assertEqual(endings, [("None", False), ("length", True), ("length", True)])
            cut, one, other = sorted(streams, key=lambda stream: stream.error is None)
            self.assertEqual(cut.error.code, "connection_lost")
            self.assertEqual(one.text, other.text)
            self.assertTrue(one.text.startswith(cut.text))
            self.assertLess(0, len(cut.text))
            self.assertLess(len(cut.text), len(one.text))
        with self.subTest("HAProxy takes it out, and cuts off the client that stuck to it alone"):
            self.wait_for(self.is_out)
            states = [row["status"] for row in self.servers()]
            self.assertEqual(states, ["DOWN", "UP", "UP"])
            self.assertEqual(len(self.kept), 2)
            with concurrent.futures.ThreadPoolExecutor() as pool:
                answers = list(pool.map(lambda _: self.ask(), range(6)))
            self.assertEqual([answer.usage.completion_tokens for answer in answers], [4] * 6)
        with self.subTest("no lease is exceeded, nor the lifetime budget"):
            done = others[0].unlock("--budget", 1)
            self.assertEqual(done.returncode, 1)
            self.assertIn("1 bytes exceed the 0 that are left", done.stderr)
            for member in others:
                done = own("lock", *member.enclave.flags("owner"))
                self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.check_ledger()

    def ask(self):
        """A short answer through HAProxy."""
        return self.client.chat.completions.create(model="demo", messages=MESSAGES, **SHORT)

    def connect(self):
        """A connection that a client keeps: the third of them is to a third proxy."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        self.addCleanup(connection.close)
        connection.auto_open = False
        connection.connect()
        self.assertTrue(self.is_kept(connection))
        return connection

    def is_kept(self, connection):
        """Whether there is still a proxy at its end, asked for what needs no enclave."""
        try:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().startswith(b"# TYPE")
        except (OSError, http.client.HTTPException):
            return False

    def is_out(self):
        """Whether HAProxy has taken one out; clients go on asking meanwhile, as they do."""
        self.kept = [connection for connection in self.kept if self.is_kept(connection)]
        return self.servers()[0]["status"] == "DOWN" and len(self.kept) < 3

    def check_ledger(self):
        """Three grants, all of the lifetime budget; two closing statements within theirs."""
        tool = [sys.executable, "-B", TOOLS / "ledger.py", "history", self.site.ledger]
        facts = json.loads(run(*tool, "--json", "-").stdout)
        grants = {e["lease"]: e["bytes"] for e in facts["events"] if e["event"] == "grant"}
        self.assertEqual(list(grants.values()), [GRANT] * 3)
        spent = {e["lease"]: e["spent"] for e in facts["events"] if e["event"] == "close"}
        self.assertEqual(len(spent), 2)
        for lease, count in spent.items():
            self.assertLess(0, count)
            self.assertLessEqual(count, grants[lease])
        (asset,) = facts["assets"].values()
        self.assertEqual((asset["granted"], asset["left"]), (LIFETIME, 0))


if __name__ == "__main__":
    unittest.main()
