"""tools/docker/ and the compose files: proved without a Docker engine.

The Dockerfiles are read by hadolint and built by buildah, on a base image that mmdebstrap makes;
the compose files are read by Docker's own `compose`. Wheels come from this machine, since a build
knows nothing of its settings. The tools' image is built always (a minute and a half; its layers are
kept in the cache), the large ones with MUENCLAVE_IMAGES=1: that of the baseline, which then has to
serve as tests.test_baseline asks, and, with BUILDROOT_DIR, that of Buildroot.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

from tests import support, test_baseline
from tests.test_baseline import baseline

HERE = support.TOOLS / "docker"
BASELINE = support.TOOLS / "baseline"
FILES = sorted(HERE.glob("Dockerfile.*"))
COMPOSE = HERE / "compose.yml"
BUILDROOT = os.environ.get("BUILDROOT_DIR")
BASE = "localhost/muenclave-debian"
PIP = "[global]\nno-index = true\nfind-links = /run/wheels\n"
# That pip installed beside this Python.
HADOLINT, DOCKER_COMPOSE = (
    pathlib.Path(sys.executable).parent / name for name in ("hadolint", "docker-compose")
)
MISSING = [path.name for path in (HADOLINT, DOCKER_COMPOSE) if not path.exists()]
NEEDED = f"not installed: {' '.join(MISSING)}"
BAD = "FROM debian:latest\nRUN cd / && apt-get install -y sudo\n"


def run(*command, **options):
    """Standard output of a program. AssertionError with its standard error."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if done.returncode:
        raise AssertionError(f"{command[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def compose(file=COMPOSE, **variables):
    """A compose file as Docker's compose understands it, a dict."""
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = (DOCKER_COMPOSE, "--file", file, "config", "--format", "json")
    return json.loads(run(*command, env=clean | variables))


@unittest.skipIf(MISSING, NEEDED)
class Files(unittest.TestCase):
    """What can be seen without building."""

    def test_hadolint(self):
        self.assertEqual([path.suffix for path in FILES], [".baseline", ".buildroot", ".tools"])
        for path in FILES:
            self.assertEqual(run(HADOLINT, path), "")
        with self.assertRaisesRegex(AssertionError, "ended with 1"):
            run(HADOLINT, "-", input=BAD)

    def test_bases_are_exact(self):
        bases = set()
        for path in FILES:
            text = path.read_text("utf-8")
            bases.add(re.search(r"^ARG BASE=(\S+)$", text, re.MULTILINE)[1])
            stages = re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE)
            for name in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
                self.assertIn(name, {"${BASE}", "scratch", *stages}, path.name)
        for service in compose()["services"].values():
            bases.add(service["build"]["args"]["BASE"])
        (base,) = bases
        self.assertRegex(base, r"\Adebian:bookworm-\d{8}-slim\Z")

    def test_compose(self):
        whole = compose(DEBIAN="debian@sha256:1", MODEL_DIR="/models/one")
        self.assertEqual(set(whole["services"]), {"baseline", "buildroot", "tools"})
        for name, service in whole["services"].items():
            build = service["build"]
            context = pathlib.Path(build["context"])
            self.assertTrue((context / build["dockerfile"]).is_file(), name)
            self.assertEqual(build["args"]["BASE"], "debian@sha256:1")
            for port in service.get("ports", ()):
                self.assertEqual(port["host_ip"], "127.0.0.1")
            for mount in service["volumes"]:
                if mount["type"] == "bind":
                    self.assertTrue(mount["read_only"], mount)
                else:
                    self.assertIn(mount["source"], whole["volumes"])
        self.assertEqual(whole["services"]["baseline"]["volumes"][0]["source"], "/models/one")
        for name in ("buildroot", "tools"):
            sources = [mount["source"] for mount in whole["services"][name]["volumes"]]
            self.assertIn(str(support.ROOT), sources)
            self.assertEqual(whole["services"][name]["cap_drop"], ["ALL"])
        alone = compose(BASELINE / "compose.yml")["services"]
        self.assertEqual(alone, {"baseline": compose()["services"]["baseline"]})

    def test_what_is_copied_is_there(self):
        found = 0
        for path in FILES:
            for name in re.findall(r"^COPY (\w\S+) ", path.read_text("utf-8"), re.MULTILINE):
                found += 1
                self.assertTrue(os.access(HERE / name, os.X_OK), f"{path.name}: {name}")
        self.assertEqual(found, 2)
        self.assertTrue(os.access(BASELINE / "start.sh", os.X_OK))

    def test_tools_without_a_target(self):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                ["sh", HERE / "tools.sh", "attack"], cwd=folder, capture_output=True, text=True
            )
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, r"\Atools: error: [^\n]+\n\Z")


class Store:
    """Images of these tests, in the user's cache."""

    def __init__(self, case):
        baseline.prepare()
        place = baseline.demo_model.cache_folder() / "containers"
        self.command = ["buildah", "--root", place / "root", "--runroot", place / "run"]
        self.command += ["--storage-driver", "overlay"]
        self.case = case
        folder = tempfile.TemporaryDirectory()
        case.addClassCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        (self.folder / "pip.conf").write_text(PIP)
        if not self("images", "--quiet", "--filter", f"reference={BASE}"):
            self.make_base()

    def __call__(self, *arguments):
        """Output of buildah."""
        return run(*self.command, *arguments)

    def make_base(self):
        """An image of a small Debian, by mmdebstrap."""
        archive = self.folder / "base.tar"
        run("mmdebstrap", "--variant=minbase", baseline.SUITE, archive)
        container = self("from", "scratch").strip()
        try:
            self("add", "--quiet", container, archive)
            self("commit", "--quiet", container, BASE)
        finally:
            self("rm", container)

    def build(self, name, context, wheels, *more):
        """Build Dockerfile.NAME; the image's name."""
        volumes = (f"{self.folder}/pip.conf:/etc/pip.conf:ro", f"{wheels}:/run/wheels:ro")
        flags = [flag for volume in volumes for flag in ("--volume", volume)]
        flags += ["--isolation", "chroot", "--layers", "--build-arg", f"BASE={BASE}", *more]
        tag = f"localhost/muenclave-{name}"
        self("bud", *flags, "--tag", tag, "--file", HERE / f"Dockerfile.{name}", context)
        return tag

    def start(self, image):
        """The name of a container of an image; it goes with the test's class."""
        container = self("from", image).strip()
        self.case.addClassCleanup(self, "rm", container)
        return container

    def run(self, container, user, *command, right="CAP_DAC_READ_SEARCH"):
        """Output of a command with one right in a container that has the project, read-only."""
        volume = ("--volume", f"{support.ROOT}:/muenclave:ro")
        flags = ("--isolation", "chroot", "--user", user, "--cap-add", right, *volume)
        only = f"-all,+{right.removeprefix('CAP_').lower()}"  # --cap-drop all takes this one too
        drop = ("setpriv", f"--bounding-set={only}") if user == "root" else ()
        return self("run", *flags, container, "--", *drop, *command)


@unittest.skipIf(os.geteuid(), "this is not root")
class Tools(unittest.TestCase):
    """The tools' image, built and run."""

    @classmethod
    def setUpClass(cls):
        cls.store = Store(cls)
        wheels = cls.store.folder / "wheels"
        (wanted,) = re.findall(r"bandit==[\d.]+", (HERE / "Dockerfile.tools").read_text("utf-8"))
        image = baseline.image
        run(*image.pip(), "download", "--quiet", *image.target(), "--dest", wheels, wanted)
        cls.container = cls.store.start(cls.store.build("tools", HERE, wheels))

    def test_is_not_root(self):
        config = json.loads(self.store("inspect", self.container))["OCIv1"]["config"]
        self.assertEqual((config["User"], config["Entrypoint"]), ("1000:1000", ["tools.sh"]))

    def test_measures_what_only_root_may_read(self):
        plant = "mkdir /planted && cp /bin/true /planted && chown -R 9:9 /planted"
        plant += " && chmod 4700 /planted/true && chmod 700 /planted"
        flags = ("--isolation", "chroot", "--user", "root")
        self.store("run", *flags, self.container, "--", "sh", "-c", plant)
        command = ("tools.sh", "all", "planted=/planted", "--json", "-")
        with self.assertRaises(AssertionError):
            self.store.run(self.container, "1000", *command)
        with self.assertRaises(AssertionError):
            self.store.run(self.container, "root", *command, right="CAP_CHOWN")
        told = json.loads(self.store.run(self.container, "root", *command))
        self.assertEqual(told["tool"], "attack_surface")
        (target,) = told["targets"]
        self.assertEqual(target["metrics"]["setuid"]["count"], 1)
        self.assertIn("count", told["own"]["metrics"]["bandit_high"])


@unittest.skipUnless(os.environ.get("MUENCLAVE_IMAGES"), "needs MUENCLAVE_IMAGES")
@unittest.skipIf(os.geteuid(), "this is not root")
class Baseline(test_baseline.Service):
    """The baseline's image serves as its root file system does."""

    @classmethod
    def build(cls):
        store = Store(cls)
        cls.container = store.start(store.build("baseline", BASELINE, baseline.fetch_wheels()))
        return pathlib.Path(store("mount", cls.container).strip())

    def test_packages_are_those_of_the_root_file_system(self):
        facts = json.loads((baseline.build() / "packages.json").read_text("utf-8"))
        store = Store(type(self))
        found = baseline.read_packages(pathlib.Path(store("mount", self.container).strip()))
        for kind in ("debian", "python"):
            self.assertEqual(set(found[kind]), set(facts[kind]), kind)


@unittest.skipUnless(os.environ.get("MUENCLAVE_IMAGES"), "needs MUENCLAVE_IMAGES")
@unittest.skipUnless(BUILDROOT, "needs BUILDROOT_DIR")
@unittest.skipIf(os.geteuid(), "this is not root")
class Buildroot(unittest.TestCase):
    """Buildroot's image, with the tree that BUILDROOT_DIR names: the configurations resolve."""

    def test_configurations_resolve(self):
        store = Store(type(self))
        tree = ("--build-context", f"buildroot={BUILDROOT}")
        container = store.start(store.build("buildroot", HERE, store.folder, *tree))
        check = "/buildroot/support/scripts/check-dotconfig.py"
        for name in ("muenclave", "muenclave_gpu"):
            wanted = f"/muenclave/br_external/configs/{name}_defconfig"
            told = store.run(container, "1000:1000", "buildroot.sh", name, "show-info")
            self.assertIn('"name": "muenclave"', told)
            store.run(
                container, "1000:1000", "python3", check, "/var/muenclave/out/.config", wanted
            )


if __name__ == "__main__":
    unittest.main()
