"""br_external/: what it names exists, and Buildroot takes it as it is.

Some checks need a Buildroot source tree: BUILDROOT_DIR names it, outside this repository.
"""

import difflib
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest

import muenclave
import muprotocol as mp
from tests import guest, support

EXTERNAL = support.ROOT / "br_external"
BOARD = EXTERNAL / "board" / "muenclave"
sys.path.insert(0, str(BOARD))

import environment  # noqa: E402
import image  # noqa: E402
import kernel  # noqa: E402
import kernel_config  # noqa: E402
import measure  # noqa: E402
import post_image  # noqa: E402
import rootfs  # noqa: E402

BUILDROOT = os.environ.get("BUILDROOT_DIR")
VARIANTS = {"muenclave": "tcp", "muenclave_gpu": "gpu"}  # defconfig: variant of the kernel
FILES = """
Config.in README.md external.desc external.mk configs/muenclave_defconfig
configs/muenclave_gpu_defconfig package/muenclave/Config.in package/muenclave/muenclave.hash
package/muenclave/muenclave.mk package/nvidia-open/Config.in package/nvidia-open/nvidia-open.hash
package/nvidia-open/nvidia-open.mk
"""
BOARD_FILES = """
cmdline device_table.txt kernel_config.py post_fakeroot.py post_image.py sitecustomize.py
kernel/base.fragment kernel/gpu.fragment kernel/hardening.fragment kernel/tcp.fragment
kernel/unified.fragment kernel/vsock.fragment patches/linux/linux.hash
patches/linux-headers/linux-headers.hash rootfs_overlay/etc/muenclave.conf
rootfs_overlay_gpu/etc/muenclave.conf
"""
SCRIPTS = ("kernel_config.py", "post_fakeroot.py", "post_image.py")
# What is not in a defconfig because it is Buildroot's default, and has to stay so.
DEFAULTS = """BR2_TOOLCHAIN_USES_GLIBC BR2_KERNEL_HEADERS_AS_KERNEL BR2_SSP_STRONG BR2_RELRO_FULL
BR2_PIC_PIE BR2_STRIP_strip BR2_PACKAGE_PYTHON3_UNICODEDATA BR2_PACKAGE_PYTHON_CRYPTOGRAPHY
BR2_TARGET_ROOTFS_CPIO BR2_TARGET_ROOTFS_CPIO_FULL BR2_LINUX_KERNEL_BZIMAGE
BR2_PACKAGE_SKELETON_INIT_NONE""".split()
# Everything that Buildroot installs into the target folder, before post_fakeroot.py chooses.
PACKAGES = """bzip2 gcc-final glibc libffi libopenssl libzlib linux linux-headers mpdecimal
muenclave openssl python-cffi python-cryptography python-pycparser python3 skeleton
skeleton-init-common skeleton-init-none toolchain toolchain-buildroot xz zlib""".split()
SECONDS = 600
RELEASE = "6.12.92-muenclave"
NEEDED = f"not installed: {' '.join(guest.MISSING)}"


def run(*command, **options):
    """A finished process with its output as text."""
    quiet = {"capture_output": True, "text": True, "timeout": SECONDS}
    return subprocess.run(list(map(str, command)), **(quiet | options))


def defconfig(name):
    """The text of a defconfig."""
    return (EXTERNAL / "configs" / f"{name}_defconfig").read_text("ascii")


def setting(text, name):
    """The value of a Buildroot option in a defconfig's text, without quotes."""
    return re.search(rf'^{name}="?(.*?)"?$', text, re.MULTILINE)[1]


def difference(one, other):
    """A unified difference of two texts, empty if they are equal."""
    return "\n".join(difflib.unified_diff(one.splitlines(), other.splitlines(), lineterm=""))


class Tree(unittest.TestCase):
    """What needs no Buildroot tree."""

    def texts(self):
        """(path, text) of every file."""
        for path in sorted(EXTERNAL.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(EXTERNAL).as_posix(), path.read_text("utf-8")

    def test_every_file_is_accounted_for(self):
        board = [f"board/muenclave/{name}" for name in BOARD_FILES.split()]
        self.assertEqual({name for name, _ in self.texts()}, {*FILES.split(), *board})

    def test_every_path_that_is_named_exists(self):
        pattern = r"\$\(?BR2_EXTERNAL_MUENCLAVE_PATH\)?/([\w./-]+)"
        pattern += r"|\$\(MUENCLAVE_BOARD\)/([\w./-]+)"
        found = 0
        for name, text in self.texts():
            for path, board in re.findall(pattern, text):
                found += 1
                place = EXTERNAL / path if path else BOARD / board
                self.assertTrue(place.exists(), f"{name}: {path or board}")
        self.assertGreater(found, 20)

    def test_packages_are_whole_and_sourced(self):
        sourced = re.findall(
            r"PATH/package/([\w-]+)/Config.in", (EXTERNAL / "Config.in").read_text()
        )
        folders = sorted(path.name for path in (EXTERNAL / "package").iterdir())
        self.assertEqual(sorted(sourced), folders)
        for name in folders:
            symbol = f"config BR2_PACKAGE_{name.upper().replace('-', '_')}\n"
            self.assertIn(symbol, (EXTERNAL / "package" / name / "Config.in").read_text())
        self.assertIn("name: MUENCLAVE\n", (EXTERNAL / "external.desc").read_text())

    def test_kernel_fragments_are_those_of_the_other_build(self):
        for name, variant in VARIANTS.items():
            text = defconfig(name)
            named = setting(text, "BR2_LINUX_KERNEL_CUSTOM_CONFIG_FILE")
            named += " " + setting(text, "BR2_LINUX_KERNEL_CONFIG_FRAGMENT_FILES")
            fragments = tuple(pathlib.PurePath(path).stem for path in named.split())
            self.assertEqual(fragments, kernel.VARIANTS[variant])

    def test_the_gpu_only_adds(self):
        plain, gpu = (set(defconfig(name).splitlines()) for name in VARIANTS)
        changed = {"BR2_LINUX_KERNEL_CONFIG_FRAGMENT_FILES", "BR2_ROOTFS_OVERLAY"}
        self.assertEqual({line.partition("=")[0] for line in plain - gpu}, changed)
        added = {line.partition("=")[0] for line in gpu - plain}
        expected = {"BR2_LINUX_KERNEL_NEEDS_HOST_OPENSSL", "BR2_PACKAGE_NVIDIA_OPEN"}
        self.assertEqual(added, changed | expected)

    def test_the_gpu_s_settings(self):
        plain, gpu = (BOARD / name for name in ("rootfs_overlay", "rootfs_overlay_gpu"))
        plain, gpu = (muenclave.read_config(part / "etc/muenclave.conf") for part in (plain, gpu))
        self.assertEqual(gpu, plain | {"ENCLAVE_DEVICE": "cuda"})

    def test_hashes(self):
        paths = sorted(EXTERNAL.rglob("*.hash"))
        self.assertEqual(len(paths), 4)
        pins = {}
        for path in paths:
            for line in path.read_text("ascii").splitlines():
                if not line.startswith("#"):
                    self.assertRegex(line, r"\Asha256  [0-9a-f]{64}  \S+\Z", path.name)
                    pins.setdefault(path.name, {})[line.split()[2]] = line.split()[1]
        self.assertEqual(pins["linux.hash"], pins["linux-headers.hash"])
        for name in VARIANTS:
            version = setting(defconfig(name), "BR2_LINUX_KERNEL_CUSTOM_VERSION_VALUE")
            self.assertIn(f"linux-{version}.tar.xz", pins["linux.hash"])
        recipe = (EXTERNAL / "package/nvidia-open/nvidia-open.mk").read_text()
        version = re.search(r"^NVIDIA_OPEN_VERSION = (.*)$", recipe, re.MULTILINE)[1]
        self.assertIn(f"NVIDIA-Linux-x86_64-{version}.run", pins["nvidia-open.hash"])
        licence = hashlib.sha256((support.ROOT / "LICENSE").read_bytes()).hexdigest()
        self.assertEqual(pins["muenclave.hash"], {"LICENSE": licence})

    def test_scripts_can_be_executed(self):
        for name in SCRIPTS:
            path = BOARD / name
            self.assertTrue(path.stat().st_mode & stat.S_IXUSR, name)
            self.assertEqual(path.read_text().splitlines()[0], "#!/usr/bin/env python3")

    def test_device_table_is_the_mount_points(self):
        rows = [row.split() for row in (BOARD / "device_table.txt").read_text().splitlines()]
        rows = [row for row in rows if row[0] != "#"]
        self.assertEqual(sorted(row[0].strip("/") for row in rows), sorted(measure.MOUNT_POINTS))
        for row in rows:
            self.assertEqual(row[1:5], ["d", "755", "0", "0"], row[0])

    def test_no_shell_no_login(self):
        for name in VARIANTS:
            lines = defconfig(name).splitlines()
            for line in ("BR2_INIT_NONE=y", "BR2_SYSTEM_BIN_SH_NONE=y", "BR2_REPRODUCIBLE=y"):
                self.assertIn(line, lines)
            for option in ("TARGET_ENABLE_ROOT_LOGIN", "TARGET_GENERIC_GETTY", "PACKAGE_BUSYBOX"):
                self.assertIn(f"# BR2_{option} is not set", lines)


def temporary_folder(case):
    """A folder that goes when the test case, or its class, is done."""
    folder = tempfile.TemporaryDirectory()
    add = case.addClassCleanup if isinstance(case, type) else case.addCleanup
    add(folder.cleanup)
    return pathlib.Path(folder.name)


@unittest.skipIf(guest.MISSING, NEEDED)
class KernelConfig(unittest.TestCase):
    """kernel_config.py, with the Kconfig of a kernel of the series that Buildroot builds."""

    @classmethod
    def setUpClass(cls):
        cls.folder = temporary_folder(cls)
        cls.source = image.kernel_source(image.read_lock(), "compared", image.COMPARED_SOURCE)
        cls.known = {}

    def program(self, *arguments):
        """Run kernel_config.py to its end."""
        return run(sys.executable, "-B", BOARD / "kernel_config.py", *arguments)

    def make(self, build, *arguments):
        """Run the kernel's make, for the architecture's name that Buildroot gives."""
        done = run("make", "-C", self.source, f"O={build}", "ARCH=x86_64", *arguments)
        self.assertEqual(done.returncode, 0, done.stderr)

    def resolve(self, variant, **changes):
        """(wanted, final): paths of a variant's options, as a Buildroot build makes them."""
        if not changes and variant in self.known:
            return self.known[variant]
        build = pathlib.Path(tempfile.mkdtemp(dir=self.folder))
        wanted, final, change = build / "muenclave.config", build / ".config", build / "change"
        change.write_text(kernel.write_options(changes), "ascii")
        fragments = [kernel.FRAGMENTS / f"{name}.fragment" for name in kernel.VARIANTS[variant]]
        arguments = ("wanted", "--output", wanted, "--command-line", BOARD / "cmdline")
        done = self.program(*arguments, "--fragments", *fragments, change)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.make(build, f"KCONFIG_ALLCONFIG={wanted}", "allnoconfig")
        return self.known.setdefault((variant, *changes) if changes else variant, (wanted, final))

    def test_buildroots_kernel_gives_what_is_wanted(self):
        for variant in kernel.VARIANTS:
            with self.subTest(variant=variant):
                wanted, final = self.resolve(variant)
                done = self.program("compare", wanted, final)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                resolved = final.read_text()
                self.make(final.parent, "olddefconfig")  # Buildroot's last step
                self.assertEqual(difference(resolved, final.read_text()), "")

    def test_no_mitigation_is_off(self):
        """Whatever a new kernel asks about its processors' faults is to be answered by yes."""
        options = kernel.read_options(self.resolve("tcp")[1].read_text())
        names = [name for name in options if name.startswith("MITIGATION_")]
        self.assertGreater(len(names), 20)
        off = {name for name in names if options[name] != "y"}
        self.assertEqual(off, {"MITIGATION_CALL_DEPTH_TRACKING"})  # instead of IBRS, on Skylake

    def test_what_vanishes_is_an_error(self):
        changes = {"RETPOLINE_OF_TOMORROW": "y", "PERF_EVENTS": "n", "NR_CPUS": "0"}
        done = self.program("compare", *self.resolve("tcp", **changes))
        self.assertEqual(done.returncode, 1)
        lines = {f"kernel_config: error: CONFIG_{name}" for name in changes}
        self.assertEqual({line.split(": wanted")[0] for line in done.stderr.splitlines()}, lines)

    def test_renamed_options_count_under_either_name(self):
        wanted, final = self.resolve("tcp")
        spoilt = self.folder / "spoilt"
        spoilt.write_text(final.read_text().replace("CONFIG_MITIGATION_SLS=y\n", ""))
        done = self.program("compare", wanted, spoilt)
        self.assertEqual(len(re.findall(r"CONFIG_(?:MITIGATION_)?SLS: wanted y", done.stderr)), 2)

    def test_command_line(self):
        extras = self.folder / "extras"
        extras.write_text('dm-mod.create="extras,,,ro,0 8 verity 1"\n')
        lines = (extras, BOARD / "cmdline")
        options = kernel_config.wanted([kernel.FRAGMENTS / "tcp.fragment"], lines, "/key.pem")
        text = kernel_config.unquoted(options["CMDLINE"])
        self.assertTrue(text.startswith('dm-mod.create="extras,,,ro,0 8 verity 1" loglevel=0 '))
        self.assertIn(" noinitrd ", text)
        self.assertEqual(options["MODULE_SIG_KEY"], '"/key.pem"')
        for bad in ("", "two\nlines", "x" * kernel.COMMAND_LINE_SIZE):
            extras.write_text(bad)
            with self.assertRaises(ValueError):
                kernel_config.wanted([], [extras], "")

    def test_mistakes_are_one_line(self):
        wanted = self.folder / "empty"
        wanted.write_text("")
        for arguments in (
            ("compare", wanted, wanted),
            ("compare", self.folder / "absent", wanted),
            ("wanted", "--output", wanted, "--command-line", wanted, "--fragments", wanted),
            ("wanted", "--output", "/", "--command-line", BOARD / "cmdline", "--fragments", wanted),
        ):
            done = self.program(*arguments)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertRegex(done.stderr, r"\Akernel_config: error: [^\n]+\n\Z")


def make_target(root):
    """A target folder as Buildroot leaves it: this machine's Python, and what a guest must not get.

    Returns the folder of the standard library in it.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    program = pathlib.Path(sys.executable).resolve()
    library = root / "usr" / "lib" / version
    ignored = shutil.ignore_patterns("test", "tests", "__pycache__", "site-packages", "config-*")
    shutil.copytree(os.path.dirname(os.__file__), library, ignore=ignored, symlinks=True)
    for folder in ("usr/bin", "usr/sbin", "usr/lib/muenclave", "etc", "root"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in ("proc", "sys", "run", "dev", "tmp", "usr/lib/muenclave/extras"):
        (root / name).mkdir()
    for link, target in {"lib": "usr/lib", "lib64": "lib", "usr/lib64": "lib"}.items():
        (root / link).symlink_to(target)
    (root / "bin").symlink_to("usr/bin")
    shutil.copy(program, root / "usr/bin" / version)
    (root / "usr/bin/python3").symlink_to(version)
    needs = set()
    for path in (program, *library.glob("lib-dynload/*.so")):
        needs.update(re.findall(r"(\S+) => (/\S+)", run("ldd", path).stdout))
    loader = re.search(r"(/\S*/ld-linux-x86-64\.so\.2)", run("ldd", program).stdout)[1]
    for name, path in needs | {("ld-linux-x86-64.so.2", loader)}:
        shutil.copy(path, root / "usr/lib" / name)
    packages = library / "site-packages"
    (packages / "cryptography").mkdir(parents=True)
    (packages / "cryptography" / "__init__.py").write_text("")
    (packages / "pycparser").mkdir()
    (packages / "pycparser" / "__init__.py").write_text("")
    shutil.copy(BOARD / "sitecustomize.py", packages)
    for name in rootfs.MODULES:
        shutil.copy(support.ROOT / name, root / "usr/lib/muenclave")
    shutil.copy(BOARD / "rootfs_overlay/etc/muenclave.conf", root / "etc")
    shutil.copy("/bin/sh", root / "usr/bin/busybox")
    (root / "usr/bin/busybox").chmod(0o4755)
    (root / "usr/bin/sh").symlink_to("busybox")
    (root / "etc/shadow").write_text("root:*:::::::")
    (root / "usr/lib/libstranger.so.1").write_bytes(b"\x7fELF")
    (root / "usr/lib/muenclave/backdoor.py").write_text("")
    (root / "usr/sbin/tool").write_text("#!/bin/sh\n")
    modules = root / "usr/lib/modules" / RELEASE / "updates"
    modules.mkdir(parents=True)
    for name in ("nvidia", "nvidia-uvm", "nvidia-drm"):
        (modules / f"{name}.ko").write_bytes(name.encode() + post_image.SIGNED)
    return library


def make_images(folder, command_line='loglevel=0 name="a b"', **options):
    """The folder of Buildroot's images as the kernel's package leaves it."""
    options = {"CMDLINE": kernel.quoted(command_line)} | options
    (folder / "kernel.config").write_text(kernel.write_options(options))
    (folder / "kernel.release").write_text(f"{RELEASE}\n")
    return folder


def post_fakeroot(root, images):
    """Run post_fakeroot.py as Buildroot does."""
    environment = os.environ | {"BINARIES_DIR": str(images)}
    return run(sys.executable, "-B", BOARD / "post_fakeroot.py", root, env=environment)


class Root(unittest.TestCase):
    """post_fakeroot.py: the guest gets what it needs, and runs."""

    @classmethod
    def setUpClass(cls):
        cls.root = temporary_folder(cls) / "target"
        cls.library = make_target(cls.root)
        cls.names = {path.relative_to(cls.root).as_posix() for path in cls.root.rglob("*")}
        done = post_fakeroot(cls.root, make_images(temporary_folder(cls), MODULES="y"))
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        cls.kept = {path.relative_to(cls.root).as_posix() for path in cls.root.rglob("*")}

    def test_what_it_must_not_get_is_gone(self):
        gone = """usr/bin/busybox usr/bin/sh etc/shadow usr/lib/libstranger.so.1 usr/sbin root bin
        usr/lib/muenclave/backdoor.py""".split()
        library = self.library.relative_to(self.root).as_posix()
        gone += [f"{library}/{name}" for name in ("pydoc.py", "sqlite3", "site-packages/pycparser")]
        self.assertLessEqual(set(gone), self.names)
        self.assertEqual(set(gone) & self.kept, set())

    def test_what_stays(self):
        stays = {*measure.MOUNT_POINTS, "etc/muenclave.conf", "usr/bin/python3", "lib", "lib64"}
        stays |= {f"usr/lib/muenclave/{name}" for name in rootfs.MODULES}
        library = self.library.relative_to(self.root).as_posix()
        stays |= {f"{library}/{name}" for name in ("json", "unittest", "cProfile.py", "ssl.py")}
        stays |= {
            f"{library}/site-packages/{name}" for name in ("cryptography", "sitecustomize.py")
        }
        self.assertLessEqual(stays, self.kept)

    def test_manifest_says_what_is_there(self):
        text = (self.root / measure.MANIFEST).read_bytes()
        found = measure.root_manifest(self.root, RELEASE, 'loglevel=0 name="a b"')
        self.assertEqual(text, mp.encode_json(found))
        paths = {path for path, _, _ in found["files"]}
        self.assertLessEqual({"etc/muenclave.conf", "usr/lib/muenclave/muenclave.py"}, paths)
        self.assertNotIn(measure.MANIFEST, paths)
        self.assertEqual((self.root / measure.MANIFEST).stat().st_mode, 0o100644)

    def test_kernel_modules_lie_in_the_order_of_their_needs(self):
        """Where PID 1 loads all that it finds, in the order of the names."""
        folder = self.root / muenclave.MODULES[1:]
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
        contents = [found[name].removesuffix(post_image.SIGNED) for name in sorted(found)]
        self.assertEqual(contents, [b"nvidia", b"nvidia-uvm"])

    def test_a_kernel_without_modules_gets_none(self):
        root = temporary_folder(self) / "target"
        make_target(root)
        done = post_fakeroot(root, make_images(temporary_folder(self), MODULES="n"))
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertFalse((root / "usr/lib/modules").exists())

    def test_the_archive_has_no_faults(self):
        stream = io.BytesIO()
        rootfs.write_cpio(self.root, stream)
        stream.seek(0)
        self.assertEqual(post_image.faults(post_image.read_cpio(stream)), [])

    def test_its_python_runs_from_it_alone(self):
        """By the guest's own loader and libraries; compiled modules serve without their sources."""
        code = "import sys, json, ctypes, muenclave; print(muenclave.__cached__, ctypes.__file__)"
        libraries = self.root / "usr/lib"
        loader = libraries / "ld-linux-x86-64.so.2"
        program = self.root / "usr/bin" / self.library.name
        environment = {"PYTHONHOME": str(self.root / "usr")}
        environment["PYTHONPATH"] = str(self.root / "usr/lib/muenclave")
        command = (loader, "--library-path", libraries, program, "-B", "-c", code)
        done = run(*command, env=environment, cwd=self.root)
        self.assertEqual(done.stderr, "")
        compiled, ctypes = done.stdout.split()
        self.assertTrue(pathlib.Path(compiled).is_relative_to(self.root))
        self.assertTrue(pathlib.Path(ctypes).is_relative_to(self.library))
        self.assertTrue(pathlib.Path(compiled).exists())

    def test_compiled_modules_carry_no_time(self):
        compiled = list(self.root.rglob("*.pyc"))
        self.assertGreater(len(compiled), 300)
        for path in compiled:  # PEP 552: hash-based, source is not checked
            self.assertEqual(path.read_bytes()[4:8], b"\x01\0\0\0", path.name)

    def test_mistakes_are_one_line(self):
        empty = temporary_folder(self)
        partial = temporary_folder(self)
        (partial / "usr/lib/python3.99/lib-dynload").mkdir(parents=True)
        (partial / "usr/lib/python3.99/site-packages").mkdir()
        images = make_images(temporary_folder(self))
        gpu = make_images(temporary_folder(self), MODULES="y")
        cases = [(folder, images) for folder in (empty, partial, empty / "absent")]
        cases += [(empty, empty), (empty, gpu)]
        for case in cases:
            done = post_fakeroot(*case)
            self.assertEqual(done.returncode, 1)
            self.assertRegex(done.stderr, r"\Apost_fakeroot: error: [^\n]+\n\Z")
        self.assertIn("one nvidia.ko was expected", done.stderr)
        bare = {name: value for name, value in os.environ.items() if name != "BINARIES_DIR"}
        for arguments in ((), (empty,)):
            done = run(sys.executable, "-B", BOARD / "post_fakeroot.py", *arguments, env=bare)
            self.assertEqual(done.returncode, 2)
            self.assertRegex(done.stderr, r"\Apost_fakeroot: error: [^\n]+\n\Z")


@unittest.skipIf(guest.MISSING, NEEDED)
class Archive(unittest.TestCase):
    """post_image.py: what it refuses, and that it measures what the guest unpacks."""

    def archive(self, root):
        """The entries of an archive that cpio, as Buildroot calls it, makes of a folder."""
        command = "find . | LC_ALL=C sort | cpio --quiet --reproducible --owner=0:0 -o -H newc"
        data = subprocess.run(["sh", "-c", command], cwd=root, check=True, capture_output=True)
        return list(post_image.read_cpio(io.BytesIO(data.stdout)))

    def make(self):
        """A small root with a file, a program, a link and a folder."""
        root = temporary_folder(self)
        for name in ("etc", "usr/bin", "dev"):
            (root / name).mkdir(parents=True)
        (root / "etc/muenclave.conf").write_text("ENCLAVE_PORT=9000\n")
        (root / "usr/bin/python3.14").write_text("program")
        (root / "usr/bin/python3.14").chmod(0o755)
        (root / "usr/bin/python3").symlink_to("python3.14")
        return root

    def test_unpacks_to_the_same_measurement(self):
        root, copy = self.make(), temporary_folder(self) / "copy"
        entries = self.archive(root)
        self.assertEqual(post_image.faults(entries), [])
        post_image.unpack(entries, copy)
        manifests = [measure.root_manifest(path, "6.12", "x") for path in (root, copy)]
        self.assertEqual(*manifests)
        self.assertEqual(len(manifests[0]["files"]), 3)
        self.assertTrue((copy / "dev").is_dir())

    def test_faults(self):
        def change(name, mode):
            return lambda root: (root / name).chmod(mode)

        def device(root):
            os.mkfifo(root / "dev/initctl")

        def module(root):
            (root / "signed.ko").write_bytes(b"code" + post_image.SIGNED)
            (root / "nvidia.ko").write_bytes(b"code")

        def shell(root):
            (root / "usr/bin/sh").write_text("shell")
            (root / "usr/bin/sh").chmod(0o755)

        cases = {
            "usr/bin/python3.14: mode 4755": change("usr/bin/python3.14", 0o4755),
            "etc/muenclave.conf: mode 0666": change("etc/muenclave.conf", 0o666),
            "dev: mode 1777": change("dev", 0o1777),
            "etc/muenclave.conf: can be executed": change("etc/muenclave.conf", 0o755),
            "dev/initctl: neither file, folder nor link": device,
            "usr/bin/sh: can be executed": shell,
            "nvidia.ko: not signed": module,
        }
        for fault, spoil in cases.items():
            with self.subTest(fault=fault):
                root = self.make()
                spoil(root)
                self.assertEqual(post_image.faults(self.archive(root)), [fault])

    def test_foreign_owner(self):
        (name, mode, _, _, content) = self.archive(self.make())[1]
        wrong = post_image.faults([(name, mode, 1000, 0, content)])
        self.assertEqual(wrong, [f"{name}: owner 1000:0, not 0:0"])

    def test_bad_archives(self):
        stream = io.BytesIO()
        rootfs.write_cpio(self.make(), stream)
        data = stream.getvalue()
        at = data.index(b"ENCLAVE_PORT")
        cut = "etc/muenclave.conf is cut off"
        cases = {b"": "near 0", data[:50]: "no entry", data[: at + 4]: cut, data[:at]: cut}
        for bad, fault in (cases | {b"070702" + data[6:]: "no entry"}).items():
            with self.assertRaisesRegex(environment.ToolError, rf"\Arootfs\.cpio: [^\n]*{fault}"):
                list(post_image.read_cpio(io.BytesIO(bad)))

    def test_names_that_lead_out(self):
        for name in ("../x", "a/../../x", "/x"):
            with self.assertRaisesRegex(environment.ToolError, "leads out"):
                entry = (name, stat.S_IFREG | 0o644, 0, 0, b"")
                post_image.unpack([entry], temporary_folder(self) / "root")

    def test_mistakes_are_one_line(self):
        root, bare = self.make(), self.make()
        (root / measure.MANIFEST).write_text("{}")
        broken = temporary_folder(self) / "rootfs.cpio"
        broken.write_bytes(b"no archive")
        cases = {
            "rootfs.cpio: No such file": lambda _: None,
            "no entry where one should begin": lambda images: shutil.copy(broken, images),
            "muenclave.manifest: No such file": lambda images: pack(bare, images),
            "muenclave.manifest does not say what is there": lambda images: pack(root, images),
        }
        for fault, prepare in cases.items():
            with self.subTest(fault=fault):
                images = make_images(temporary_folder(self))
                prepare(images)
                done = run(sys.executable, "-B", BOARD / "post_image.py", images)
                self.assertEqual(done.returncode, 1)
                self.assertRegex(done.stderr, rf"\Apost_image: error: [^\n]*{fault}[^\n]*\n\Z")
                self.assertFalse((images / "reference.json").exists())


def pack(root, images):
    """Write a folder as the archive in the folder of Buildroot's images."""
    with open(images / "rootfs.cpio", "wb") as file:
        rootfs.write_cpio(root, file)


@unittest.skipIf(guest.MISSING, NEEDED)
class Product(unittest.TestCase):
    """post_image.py, given the other build's kernel and root, finds what that build found."""

    def test_reference_values_agree(self):
        output, images = temporary_folder(self), temporary_folder(self)
        lock = image.read_lock()
        image.build_image("tcp", None, None, output, lock)
        expected = json.loads((output / "reference.json").read_text())
        shutil.copy(output / "muenclave.efi", images / "bzImage")
        shutil.copy(output / "kernel.config", images)
        (images / "kernel.release").write_text(expected["image"]["kernel"] + "\n")
        root = temporary_folder(self) / "root"
        shutil.copytree(image.build_rootfs(None, lock) / "root", root, symlinks=True)
        rootfs.put(root / measure.MANIFEST, (output / "manifest.json").read_bytes())
        pack(root, images)
        kept = {"root": "ek:of-this-tpm", "attestation_key": {"n": "00"}}
        kept |= {"withdrawn": ["ab" * 32], "pcrs": {"0": "cd" * 32}}
        (images / "reference.json").write_text(json.dumps(kept))
        done = run(sys.executable, "-B", BOARD / "post_image.py", images)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        found = json.loads((images / "reference.json").read_text())
        for name in ("measurement", "kind", "version"):
            self.assertEqual(found[name], expected[name])
        for name in (
            "root",
            "attestation_key",
            "withdrawn",
        ):  # an owner's: a new image does not lose them
            self.assertEqual(found[name], kept[name])
        self.assertEqual(found["pcrs"], kept["pcrs"] | expected["pcrs"])
        for name in ("esp.img", "muenclave.efi", "manifest.json"):
            self.assertEqual((images / name).read_bytes(), (output / name).read_bytes(), name)
        line = (images / "command-line").read_text()
        self.assertEqual(line, (BOARD / "cmdline").read_text().strip() + "\n")
        self.check_measure(images, expected["image"]["kernel"], line.strip())
        self.check_vm(images)

    def check_measure(self, images, release, line):
        """tools/measure.py finds the same in the root that was unpacked."""
        command = (sys.executable, "-B", support.TOOLS / "measure.py", "--root", images / "root")
        told = run(*command, "--kernel", release, "--command-line", line)
        found = json.loads((images / "reference.json").read_text())
        self.assertEqual(json.loads(told.stdout)["measurement"], found["measurement"])

    def check_vm(self, images):
        """tools/vm.py takes the folder as it is."""
        weights = images / "model.mus"
        weights.write_bytes(bytes(4096))
        command = (sys.executable, "-B", support.TOOLS / "vm.py", "run", "--dry-run")
        done = run(*command, "--image", images, "--weights", weights)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        for path in (images / "esp.img", weights):
            self.assertIn(str(path), done.stdout)


@unittest.skipUnless(BUILDROOT, "needs BUILDROOT_DIR")
class Buildroot(unittest.TestCase):
    """A Buildroot tree takes both defconfigs whole. Nothing is downloaded or compiled."""

    @classmethod
    def setUpClass(cls):
        cls.folder = temporary_folder(cls)
        for name in VARIANTS:
            done = cls.make(name, f"BR2_EXTERNAL={EXTERNAL}", f"{name}_defconfig")
            assert done.returncode == 0, done.stderr
        cls.known = {}

    @classmethod
    def make(cls, name, *arguments, **environment):
        """Run Buildroot's make in the output folder of a defconfig."""
        foreign = ("BR2_", "SOURCE_DATE_EPOCH")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        clean |= {"BR2_DL_DIR": str(cls.folder / "dl")} | environment
        command = ("make", "-s", "--no-print-directory", "-C", BUILDROOT, f"O={cls.folder / name}")
        return run(*command, *arguments, env=clean)

    def output(self, name, *arguments, **environment):
        """The standard output of Buildroot's make, which has to succeed."""
        done = self.make(name, *arguments, **environment)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def info(self, name):
        """What Buildroot says of every package that a defconfig has it build."""
        if name not in self.known:
            self.known[name] = json.loads(self.output(name, "show-info"))
        return self.known[name].values()

    def variables(self, name, *names, **environment):
        """{name: value} of make's variables, as Buildroot prints them."""
        told = self.output(name, "printvars", f"VARS={' '.join(names)}", **environment)
        return dict(line.split("=", 1) for line in told.splitlines() if "=" in line)

    def check_symbols(self, name, path):
        """Run Buildroot's check that a defconfig's symbols arrived."""
        script = pathlib.Path(BUILDROOT, "support/scripts/check-dotconfig.py")
        return run(sys.executable, script, self.folder / name / ".config", path, cwd=BUILDROOT)

    def test_every_symbol_exists(self):
        for name in VARIANTS:
            path = EXTERNAL / "configs" / f"{name}_defconfig"
            done = self.check_symbols(name, path)
            self.assertEqual((done.returncode, done.stdout), (0, ""))
            bad = self.folder / "bad_defconfig"
            bad.write_text(path.read_text() + "BR2_PACKAGE_PYTHON3_PIP=y\n")
            done = self.check_symbols(name, bad)
            self.assertEqual(done.returncode, 1)
            self.assertIn("BR2_PACKAGE_PYTHON3_PIP", done.stdout + done.stderr)

    def test_savedefconfig_round_trips(self):
        for name in VARIANTS:
            saved = self.folder / "saved_defconfig"
            self.output(name, "savedefconfig", f"BR2_DEFCONFIG={saved}")
            self.assertEqual(difference(defconfig(name), saved.read_text()), "")

    def test_defaults_that_we_rest_on(self):
        for name in VARIANTS:
            lines = (self.folder / name / ".config").read_text().splitlines()
            self.assertLessEqual({f"{option}=y" for option in DEFAULTS}, set(lines))
            shells = [line for line in lines if re.match("BR2_PACKAGE_(BUSYBOX|BASH|DASH)=", line)]
            self.assertEqual(shells, [])

    def test_check_package_is_silent(self):
        needed = temporary_folder(self)
        packages = ("flake8", "python-magic")
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--target", needed, *packages)
        self.assertEqual(run(*pip).returncode, 0)
        paths = [EXTERNAL / name for name in FILES.split()]
        paths += [BOARD / name for name in BOARD_FILES.split()]
        check = (sys.executable, pathlib.Path(BUILDROOT, "utils/check-package"), "--br2-external")
        environment = os.environ | {"PYTHONPATH": str(needed)}
        done = run(*check, *paths, cwd=BUILDROOT, env=environment)
        self.assertEqual((done.returncode, done.stdout), (0, ""), done.stderr)
        self.assertRegex(done.stderr, r"\n0 warnings generated")
        bad = needed / "external.hash"
        bad.write_text("md5 00 x\n\n\n")
        self.assertNotEqual(run(*check, bad, cwd=BUILDROOT, env=environment).returncode, 0)

    def test_target_packages(self):
        for name in VARIANTS:
            packages = [p for p in self.info(name) if p["type"] == "target"]
            installed = {p["name"] for p in packages if p["install_target"]}
            expected = {*PACKAGES, *(["nvidia-open"] if name == "muenclave_gpu" else [])}
            self.assertEqual(installed, expected)

    def test_every_download_is_pinned(self):
        """Every archive of the build machine and the guest has a hash in one of the two trees."""
        pinned = set()
        for tree in (pathlib.Path(BUILDROOT), EXTERNAL):
            for path in tree.rglob("*.hash"):
                rows = (row.split() for row in path.read_text("utf-8").splitlines())
                pinned.update(row[2] for row in rows if len(row) == 3 and row[0][:3] == "sha")
        for name in VARIANTS:
            sources = {d["source"] for p in self.info(name) for d in p.get("downloads", ())}
            self.assertGreater(len(sources), 30)
            self.assertEqual(sources - pinned, set())

    def test_sbom(self):
        folder = self.folder / "dl" / "cyclonedx"
        folder.mkdir(parents=True, exist_ok=True)
        for version in ("1.6", "1.7"):  # else it is fetched; it only maps names of licences
            (folder / f"spdx-{version}.schema.json").write_text('{"enum": ["Apache-2.0"]}')
        self.output("muenclave", "muenclave-sbom")
        sbom = json.loads((self.folder / "muenclave/images/sbom.cdx.json").read_text())
        self.assertEqual(sbom["bomFormat"], "CycloneDX")
        found = {component["name"]: component for component in sbom["components"]}
        self.assertLessEqual({"muenclave", "linux", "python3", "libopenssl"}, set(found))
        licences = found["muenclave"]["licenses"]
        self.assertEqual(licences, [{"license": {"id": "Apache-2.0"}}])

    def test_times_are_fixed(self):
        names = ("SOURCE_DATE_EPOCH", "LINUX_MAKE_ENV")
        values = self.variables("muenclave", *names)
        self.assertEqual(values["SOURCE_DATE_EPOCH"], str(rootfs.EPOCH))
        self.assertIn('KBUILD_BUILD_TIMESTAMP="Thu Jan  1 00:00:00 UTC 2026"', values[names[1]])
        values = self.variables("muenclave", *names, SOURCE_DATE_EPOCH="1800000000")
        self.assertIn('KBUILD_BUILD_TIMESTAMP="Fri Jan 15 08:00:00 UTC 2027"', values[names[1]])

    def test_kernel_goes_through_our_steps(self):
        names = "LINUX_PRE_BUILD_HOOKS LINUX_POST_INSTALL_IMAGES_HOOKS ROOTFS_CPIO_PRE_GEN_HOOKS"
        names += " PACKAGES_LINUX_CONFIG_FIXUPS LINUX_KCONFIG_FIXUP_CMDS LINUX_SOURCE"
        values = self.variables("muenclave", *names.split())
        self.assertIn("MUENCLAVE_CHECK_KERNEL", values["LINUX_PRE_BUILD_HOOKS"])
        self.assertIn("MUENCLAVE_INSTALL_KERNEL", values["LINUX_POST_INSTALL_IMAGES_HOOKS"])
        self.assertNotIn("ADD_INIT", values["ROOTFS_CPIO_PRE_GEN_HOOKS"])
        version = setting(defconfig("muenclave"), "BR2_LINUX_KERNEL_CUSTOM_VERSION_VALUE")
        self.assertEqual(values["LINUX_SOURCE"], f"linux-{version}.tar.xz")

    def test_package_takes_the_guests_files_and_no_others(self):
        self.output("muenclave", "muenclave-extract")
        folder = self.folder / "muenclave" / "build" / "muenclave"
        files = sorted(path.name for path in folder.rglob("*") if path.name[0] != ".")
        self.assertEqual(files, ["LICENSE", "muenclave.py", "muprotocol.py"])
        for name in files:
            self.assertEqual((folder / name).read_bytes(), (support.ROOT / name).read_bytes())

    def test_buildroots_make_configures_our_kernel(self):
        """Through all of its own steps; the compiler is this machine's, the source Debian's."""
        source = image.kernel_source(image.read_lock(), "compared", image.COMPARED_SOURCE)
        output = self.folder / "muenclave"
        programs = output / "host" / "bin"
        programs.mkdir(parents=True, exist_ok=True)
        for name in ("gcc", "ld", "ar", "nm", "objcopy", "objdump", "strip", "readelf", "as"):
            (programs / f"x86_64-buildroot-linux-gnu-{name}").symlink_to(shutil.which(name))
        build = output / "build" / "linux-custom"
        alone = [f"LINUX_{kind}DEPENDENCIES=" for kind in ("", "KCONFIG_", "EXTRACT_", "PATCH_")]
        source = f"LINUX_OVERRIDE_SRCDIR={source}"
        self.output("muenclave", source, *alone, build / ".stamp_kconfig_fixup_done")
        compare = (sys.executable, "-B", BOARD / "kernel_config.py", "compare")
        done = run(*compare, build / "muenclave.config", build / ".config")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        options = kernel.read_options((build / ".config").read_text())
        line = (BOARD / "cmdline").read_text().strip()
        self.assertEqual(kernel_config.unquoted(options["CMDLINE"]), line)
        self.assertEqual(options["INITRAMFS_SOURCE"], kernel_config.INITRAMFS)

    @unittest.skipUnless(shutil.which("fakeroot"), "needs fakeroot")
    def test_buildroots_make_packs_our_root(self):
        """By its own steps, twice, from a target folder that holds this machine's Python."""
        output = self.folder / "muenclave_gpu"
        programs = output / "host" / "bin"
        programs.mkdir(parents=True, exist_ok=True)
        (programs / "fakeroot").symlink_to(shutil.which("fakeroot"))
        source = pathlib.Path(BUILDROOT, "package/makedevs/makedevs.c")
        self.assertEqual(run("gcc", "-w", source, "-o", programs / "makedevs").returncode, 0)
        (output / "target").mkdir()
        make_target(output / "target")
        (output / "images").mkdir(exist_ok=True)
        make_images(output / "images", MODULES="y")
        archive = output / "images" / "rootfs.cpio"
        packed = []
        for _ in range(2):
            archive.unlink(missing_ok=True)
            needs = ("ROOTFS_COMMON_DEPENDENCIES=", "ROOTFS_CPIO_DEPENDENCIES=rootfs-common")
            self.output("muenclave_gpu", "-o", "target-finalize", *needs, archive)
            packed.append(archive.read_bytes())
        self.assertEqual(*packed)
        entries = list(post_image.read_cpio(io.BytesIO(packed[0])))
        self.assertEqual(post_image.faults(entries), [])
        post_image.unpack(entries, self.folder / "unpacked")
        manifest = measure.root_manifest(self.folder / "unpacked", RELEASE, 'loglevel=0 name="a b"')
        found = {name: content for name, _, _, _, content in entries}
        self.assertEqual(found[measure.MANIFEST], mp.encode_json(manifest))
        self.assertIn("usr/lib/modules/1-nvidia-uvm.ko", found)


if __name__ == "__main__":
    unittest.main()
