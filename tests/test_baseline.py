"""tools/baseline/: the root file system is what its lists say, and its services really serve.

The root is built once for this user (about two minutes), and run in namespaces of its own: what it
writes goes to memory, its ports are no ports of this machine. That needs root and Debian's apt.
"""

import configparser
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import unittest

from tests import support

HERE = support.TOOLS / "baseline"
PROGRAM = HERE / "rootfs.py"

import measure  # noqa: E402, F401  tools/ is on the path before the baseline's own modules are

_spec = importlib.util.spec_from_file_location("baseline_rootfs", PROGRAM)
baseline = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(baseline)

# $1: the root; $2: the model; the rest: a command in it. What it writes goes to memory.
ENTER = """set -e
mount -t tmpfs none /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay -o "lowerdir=$1,upperdir=/mnt/upper,workdir=/mnt/work" none /mnt/root
mount -t proc proc /mnt/root/proc
mount --rbind /dev /mnt/root/dev
cp -r "$2/." /mnt/root/srv/model
chmod -R a+rX /mnt/root/srv/model
shift 2
exec chroot /mnt/root env -i PATH=/usr/sbin:/usr/bin HOME=/root LC_ALL=C.UTF-8 "$@"
"""
NAMESPACES = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
SERVICES = {"cron", "inference", "networking", "nginx", "prometheus-node-exporter", "ssh"}
# Runs in the network of the baseline; prints what it was told, as JSON.
CLIENT = """
import json, socket, urllib.error, urllib.request
import openai

BASE = "http://127.0.0.1"


def call(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(BASE + path, data, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def part_of_stream(count):
    body = {"model": "model", "prompt": "The", "max_tokens": 900, "stream": True, "temperature": 0}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\\r\\nHost: a\\r\\nContent-Length: {len(data)}\\r\\n"
    with socket.create_connection(("127.0.0.1", 80)) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\\r\\n\\r\\n" + data)
        got = b""
        while got.count(b"data:") < count:
            got += connection.recv(4096)


client = openai.OpenAI(base_url=BASE + "/v1", api_key="none")
zen = [{"role": "user", "content": "Tell me about zen."}]
chat = {"model": "model", "messages": zen, "temperature": 0, "max_tokens": 24}
text = {"model": "model", "prompt": "Beautiful is", "temperature": 0, "max_tokens": 24}
told = {"health": call("/health"), "info": call("/info")}
told["models"] = [model.id for model in client.models.list()]
told["chat"] = client.chat.completions.create(**chat).model_dump()
usage = {"stream_options": {"include_usage": True}}
stream = client.chat.completions.create(**chat, **usage, stream=True)
told["chat_stream"] = [chunk.model_dump() for chunk in stream]
told["text"] = client.completions.create(**text).model_dump()
told["text_stream"] = [c.model_dump() for c in client.completions.create(**text, stream=True)]
stop = told["text"]["choices"][0]["text"][4:8]
told["stop"] = client.completions.create(**text, stop=stop).model_dump()
told["stop_stream"] = [
    c.model_dump() for c in client.completions.create(**text, stop=stop, stream=True)
]
seeded = {"prompt": "The", "max_new_tokens": 12, "seed": 5}
told["seeded"] = [json.loads(call("/generate", seeded)[1])["completion"] for _ in range(2)]
told["lines"] = call("/generate", {**seeded, "stream": True})[1].splitlines()
part_of_stream(3)
told["after"] = call("/generate", {"prompt": "The", "max_new_tokens": 2})
wrong = {
    "no JSON": ("/generate", None),
    "no prompt": ("/generate", {}),
    "empty prompt": ("/v1/completions", {"prompt": ""}),
    "too hot": ("/v1/completions", {"prompt": "a", "temperature": 3}),
    "too long": ("/generate", {"prompt": "word " * 3000}),
    "no messages": ("/v1/chat/completions", {"messages": []}),
    "two answers": ("/v1/chat/completions", {"messages": zen, "n": 2}),
    "other model": ("/v1/chat/completions", {"messages": zen, "model": "other"}),
    "other path": ("/v2/chat", {}),
}
told["wrong"] = {name: call(*request)[0] for name, request in wrong.items()}
with socket.create_connection(("127.0.0.1", 22)) as connection:
    told["ssh"] = connection.recv(64).decode()
BASE = "http://127.0.0.1:9100"
told["metrics"] = call("/metrics")[1]
print(json.dumps(told))
"""


def enter(root, model, *command, **options):
    """A process that runs a command in a root, in namespaces of its own."""
    words = [*NAMESPACES, "sh", "-c", ENTER, "sh", root, model, *command]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(list(map(str, words)), text=True, **(quiet | options))


def rootfs(*arguments, **options):
    """Run tools/baseline/rootfs.py to its end."""
    command = [sys.executable, "-B", PROGRAM, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


class Lists(unittest.TestCase):
    """The lists that both builds take, and the tool's refusals."""

    def test_the_model_code_is_the_projects_own(self):
        wanted = dict(line.split("==") for line in baseline.names(HERE / "requirements.txt"))
        setup = configparser.ConfigParser()
        setup.read(support.ROOT / "setup.cfg", "utf-8")
        lock = json.loads((support.TOOLS / "image.lock").read_text("utf-8"))["extras"]
        for line in setup["options.extras_require"]["inference"].split():
            name = re.match(r"[a-z]+", line)[0]
            self.assertEqual(wanted[name], lock[name]["version"].partition("+")[0])

    def test_every_file_is_used(self):
        found = {path.name for path in HERE.iterdir() if path.is_file()}
        self.assertEqual(found - {"rootfs.py", "compose.yml"}, set(baseline.INPUTS))

    def test_mistakes_are_one_line(self):
        with tempfile.TemporaryDirectory() as folder:
            taken = pathlib.Path(folder, "taken", "root")
            taken.mkdir(parents=True)
            (taken / "mine").write_text("")
            file = pathlib.Path(folder, "file")
            file.write_text("")
            nowhere = {"PATH": "/nowhere", "HOME": folder}
            cases = (
                (("--output", pathlib.Path(folder, "new")), {"env": nowhere}, 1, "mmdebstrap"),
                (("--output", taken.parent), {}, 1, "not of this tool"),
                (("--output", file), {}, 1, "File exists"),
                ((), {}, 2, "--output"),
            )
            for arguments, options, status, word in cases:
                done = rootfs(*arguments, **options)
                self.assertEqual((done.returncode, done.stdout), (status, ""), done.stderr)
                self.assertIn(word, done.stderr.splitlines()[-1])
                self.assertNotIn("Traceback", done.stderr)
            self.assertTrue((taken / "mine").exists())


@unittest.skipIf(os.geteuid(), "this is not root")
class Root(unittest.TestCase):
    """The root file system, built for real."""

    @classmethod
    def setUpClass(cls):
        baseline.prepare()
        cls.folder = baseline.build()
        cls.root = cls.folder / "root"
        cls.facts = json.loads((cls.folder / "packages.json").read_text("utf-8"))

    def inside(self, *command):
        """(exit status, output) of a command in the root."""
        process = enter(self.root, support.demo_model(), *command)
        out, _ = process.communicate()
        return process.returncode, out

    def test_it_holds_what_the_lists_name(self):
        named = baseline.names(HERE / "packages.txt")
        self.assertEqual([name for name in named if name not in self.facts["debian"]], [])
        status, told = self.inside("dpkg-query", "-W", "-f", "${Package} ${Version}\\n")
        self.assertEqual(
            (status, dict(map(str.split, told.splitlines()))), (0, self.facts["debian"])
        )
        frozen = self.inside("/opt/inference/venv/bin/pip", "list", "--format=json")[1]
        found = {item["name"]: item["version"] for item in json.loads(frozen.splitlines()[0])}
        self.assertEqual(found, self.facts["python"])
        for line in baseline.names(HERE / "requirements.txt"):
            name, version = line.split("==")
            self.assertEqual(found[name].partition("+")[0], version)

    def test_services_are_whole_and_enabled(self):
        status, told = self.inside("nginx", "-t")
        self.assertEqual(status, 0, told)
        check = "ssh-keygen -A >/dev/null && mkdir -p /run/sshd && sshd -T"
        status, told = self.inside("sh", "-c", check)
        self.assertEqual(status, 0, told)
        self.assertIn("passwordauthentication no\n", told)
        status, told = self.inside("systemd-analyze", "verify", "inference.service")
        self.assertEqual((status, told), (0, ""))
        listed = self.inside("systemctl", "list-unit-files", "--state=enabled", "--no-legend")[1]
        enabled = {line.split()[0].removesuffix(".service") for line in listed.splitlines()}
        self.assertLessEqual(SERVICES, enabled)

    def test_nothing_of_this_machine_is_in_it(self):
        self.assertEqual((self.root / "etc/hostname").read_text(), "baseline\n")
        self.assertFalse((self.root / "etc/resolv.conf").exists())
        self.assertEqual(list((self.root / "etc/ssh").glob("ssh_host_*")), [])
        self.assertFalse((self.root / baseline.PLACE).exists())

    def test_output(self):
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as place:
            small = pathlib.Path(place, "small")
            (small / "root").mkdir(parents=True)
            (small / "root" / "a").write_text("")
            (small / "packages.json").write_text("1")
            output = pathlib.Path(place, "output")
            baseline.put(small, output)
            (output / "root" / "mark").write_text("")
            baseline.put(small, output)
            self.assertTrue((output / "root" / "mark").exists())
            (small / "packages.json").write_text("2")
            baseline.put(small, output)
            self.assertEqual(os.listdir(output / "root"), ["a"])
            self.assertEqual((output / "packages.json").read_text(), "2")
            (output / "packages.json").unlink()
            with self.assertRaisesRegex(baseline.ToolError, "not of this tool"):
                baseline.put(small, output)
            self.assertEqual(os.listdir(output / "root"), ["a"])


@unittest.skipIf(os.geteuid(), "this is not root")
class Service(unittest.TestCase):
    """All its services, started as its container starts them, and asked by their clients."""

    @classmethod
    def build(cls):
        """The root file system that is run."""
        baseline.prepare()
        return baseline.build() / "root"

    @classmethod
    def setUpClass(cls):
        root = cls.build()
        start = "ip link set lo up && exec /opt/inference/start.sh"
        cls.lines, cls.news = [], threading.Condition()
        cls.process = enter(root, support.demo_model(), "sh", "-c", start)
        cls.addClassCleanup(cls.end)
        threading.Thread(target=cls.read, daemon=True).start()
        with cls.news:
            cls.news.wait_for(cls.is_decided, support.SECONDS)
        if "Application startup complete" not in "".join(cls.lines):
            raise AssertionError("it does not start: " + "".join(cls.lines))
        network = f"--net=/proc/{cls.process.pid}/ns/net"
        command = ["nsenter", network, sys.executable, "-c", CLIENT]
        clean = {key: value for key, value in os.environ.items() if not key.endswith("_proxy")}
        done = subprocess.run(
            command, capture_output=True, text=True, env=clean, timeout=support.SECONDS
        )
        if done.returncode:
            raise AssertionError(done.stderr + "".join(cls.lines))
        cls.told = json.loads(done.stdout)

    @classmethod
    def read(cls):
        for line in cls.process.stdout:
            with cls.news:
                cls.lines.append(line)
                cls.news.notify_all()
        with cls.news:
            cls.lines.append("(it has ended)")
            cls.news.notify_all()

    @classmethod
    def is_decided(cls):
        ends = ("startup complete", "(it has ended)")
        return any(word in line for line in cls.lines for word in ends)

    @classmethod
    def end(cls):
        cls.process.kill()
        cls.process.wait()

    def test_chat(self):
        (choice,) = self.told["chat"]["choices"]
        self.assertIn("Zen of Python", choice["message"]["content"])
        self.assertEqual(choice["finish_reason"], "length")
        usage = self.told["chat"]["usage"]
        self.assertEqual(usage["completion_tokens"], 24)
        self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + 24)

    def test_a_stream_is_the_answer_in_pieces(self):
        *chunks, last = self.told["chat_stream"]
        self.assertGreater(len(chunks), 4)
        pieces = [chunk["choices"][0]["delta"]["content"] or "" for chunk in chunks]
        whole = self.told["chat"]["choices"][0]["message"]["content"]
        self.assertEqual("".join(pieces), whole)
        self.assertEqual(chunks[-1]["choices"][0]["finish_reason"], "length")
        self.assertEqual((last["choices"], last["usage"]["completion_tokens"]), ([], 24))
        pieces = [chunk["choices"][0]["text"] for chunk in self.told["text_stream"]]
        self.assertEqual("".join(pieces), self.told["text"]["choices"][0]["text"])

    def test_stop(self):
        whole = self.told["text"]["choices"][0]["text"]
        (choice,) = self.told["stop"]["choices"]
        kept = whole[: whole.index(whole[4:8])]
        self.assertEqual((choice["text"], choice["finish_reason"]), (kept, "stop"))
        pieces = [chunk["choices"][0]["text"] for chunk in self.told["stop_stream"]]
        self.assertEqual("".join(pieces), kept)

    def test_generate(self):
        one, other = self.told["seeded"]
        self.assertEqual(one, other)
        *parts, last = map(json.loads, self.told["lines"])
        self.assertEqual("".join(part["text"] for part in parts), one)
        self.assertEqual(last["completion"], one)
        self.assertEqual(set(last), {"completion", "elapsed_ms", "finish_reason", "usage"})

    def test_info_health_models(self):
        self.assertEqual(self.told["health"][0], 200)
        info = json.loads(self.told["info"][1])
        self.assertEqual((info["model"], info["dtype"]), ("model", "bfloat16"))
        self.assertEqual(self.told["models"], ["model"])

    def test_a_lost_reader_does_not_stop_it(self):
        self.assertEqual(self.told["after"][0], 200, self.told["after"][1])

    def test_wrong_requests(self):
        expected = {name: 422 for name in self.told["wrong"]}
        expected |= {"no JSON": 405, "too long": 400, "other model": 404, "other path": 404}
        self.assertEqual(self.told["wrong"], expected)

    def test_what_stands_beside_it(self):
        self.assertRegex(self.told["ssh"], r"\ASSH-2\.0-OpenSSH")
        self.assertIn("node_cpu_seconds_total", self.told["metrics"])


if __name__ == "__main__":
    unittest.main()
