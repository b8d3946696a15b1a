"""tools/attack_surface.py: every counter against trees whose true numbers are known."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import unittest
import unittest.mock

from tests import support

sys.path.insert(0, str(support.TOOLS))

import attack_surface  # noqa: E402
import hardening  # noqa: E402
import loc  # noqa: E402
import rootfs  # noqa: E402
import sbom  # noqa: E402
import surface  # noqa: E402
import trees  # noqa: E402

TOOL = support.TOOLS / "attack_surface.py"
PROGRAMS = "gcc mksquashfs sqfs2tar cpio zstd lz4 xz tar skopeo mmdebstrap busybox".split()
PROGRAMS += "getcap dpkg-query readelf find cloc".split()
os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
MISSING = [name for name in PROGRAMS if not shutil.which(name)]
NET_RAW = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)  # capabilities(7): revision 2, effective
SUITE = "bookworm"
INCLUDED = "iputils-ping,libcap2-bin,python3-minimal,python3-pkg-resources"
C = """#ifdef INIT
int INIT(void) { return 0; }
#endif
#ifdef START
void _start(void) { for (;;); }
#endif
#ifdef MAIN
int main(void) { return NUMBER; }
#endif
"""
STATUS = """Package: one
Status: install ok installed
Version: 1:1.0-1
Architecture: amd64
Description: first
 Package: not-one

Package: two
Status: deinstall ok config-files
Version: 2
Architecture: all

Package: three
Status: hold ok installed
Version: 3~rc1+b1
Architecture: all
"""
INITTAB = "id:3:initdefault:\n# off::respawn:/bin/no\ntty1::respawn:/sbin/getty 38400 tty1\n"
TRUE = {  # of the tree that make_tree makes
    "packages": 2,
    "distributions": 1,
    "executables": 10,
    "libraries": 5,
    "other_elf": 2,
    "scripts": 3,
    "applets": 0,
    "package_managers": 2,
    "shells": 1,
    "interpreters": 2,
    "setuid": 2,
    "capabilities": int(os.geteuid() == 0),
    "world_writable": 2,
    "services": 3,
    "files": 35,
    "modules": 6,
    "top_level_modules": 4,
    "python_lines": 6,
}


def compile_c(path, *flags):
    """A small ELF file of its own content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = int(hashlib.sha256(path.name.encode()).hexdigest()[:4], 16)
    command = ["gcc", "-xc", "-", f"-DNUMBER={number}", "-Wl,--build-id=none", "-o", path, *flags]
    subprocess.run(list(map(str, command)), input=C, text=True, check=True)
    path.chmod(0o755)


def write(path, data, mode=0o644):
    """A file with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    path.chmod(mode)


def make_tree(root):
    """A root file system in small, with what is hidden in real ones; TRUE says what it holds."""
    programs = "usr/bin/hello usr/bin/dash usr/bin/su usr/bin/ping usr/bin/apt opt/py/bin/python3.9"
    for name in (*programs.split(), "usr/bin/python3.11", "usr/share/doc/picture.png"):
        compile_c(root / name, "-DMAIN")
    compile_c(root / "usr/sbin/fixed", "-DSTART", "-nostdlib", "-static", "-no-pie")
    compile_c(root / "usr/sbin/movable", "-DSTART", "-nostdlib", "-static-pie")
    compile_c(root / "usr/lib/libone.so.1", "-shared", "-Wl,-soname,libone.so.1", "-DINIT=one")
    compile_c(root / "usr/lib/libtwo.so", "-shared", "-nostdlib", "-DINIT=two")
    compile_c(root / "usr/lib/program.so", "-DMAIN", "-Wl,-soname,program.so")  # as libc.so.6 is
    compile_c(root / "usr/lib/thing.o", "-c", "-DINIT=thing")
    write(root / "usr/lib/damaged", b"\x7fELF\x02\x01")
    (root / "usr/share/doc/picture.png").chmod(0o644)
    (root / "usr/bin/su").chmod(0o4755)
    (root / "usr/bin/hello").chmod(0o2755)
    write(root / "usr/bin/tool", "#!/bin/sh\n", 0o755)
    for name in ("pip", "pip3"):
        write(root / "usr/bin" / name, "#!/usr/bin/python3\nimport pip\n", 0o755)
    write(root / "etc/cron.daily/apt", "not a program", 0o755)
    write(root / "etc/open.conf", "anyone", 0o666)
    (root / "var/spool/drop").mkdir(parents=True)
    (root / "var/spool/drop").chmod(0o1777)
    write(root / "var/lib/dpkg/status", STATUS)
    write(root / "etc/os-release", 'NAME="Debian"\nID=debian\n')
    packages = root / "usr/lib/python3/dist-packages"
    write(packages / "one.py", "import two\n\n\n")
    write(packages / "two/__init__.py", "#\n")
    write(packages / "two/__pycache__/__init__.cpython-311.pyc", b"\0" * 16)
    write(packages / "two/deep.py", "\n\n")
    write(packages / "two/not-a-module.py", "\n")
    write(packages / "one-1.0.dist-info/METADATA", "Name: One_More\nVersion: 1.0\n\nVersion: 2\n")
    shared = ("-shared", "-nostdlib")
    compile_c(packages / "three.cpython-311-x86_64-linux-gnu.so", *shared, "-DINIT=PyInit_three")
    compile_c(packages / "four.so", *shared, "-DINIT=PyInit_four")
    write(root / "usr/lib/muenclave/alone.pyc", b"\0" * 16)
    system = root / "etc/systemd/system"
    (system / "multi-user.target.wants").mkdir(parents=True)
    for name in ("ssh.service", "masked.service", "data.mount"):
        (system / "multi-user.target.wants" / name).symlink_to(f"/lib/systemd/system/{name}")
    (system / "masked.service").symlink_to("/dev/null")
    units = root / "usr/lib/systemd/system"
    write(units / "ssh.service", "[Service]\n")
    (units / "sshd.service").symlink_to("ssh.service")
    (units / "clock.service").symlink_to("/dev/null")
    for name in ("sockets.target.wants/ssh.socket", "initrd.target.wants/early.service"):
        write(units / name, "[Unit]\n")
    (root / "etc/rc3.d").mkdir()
    for name in ("S01sshd", "S02cron", "S03clock", "K01off"):
        (root / "etc/rc3.d" / name).symlink_to(f"../init.d/{name[3:]}")
    write(root / "etc/inittab", INITTAB)
    links = {"bin": "usr/bin", "usr/bin/sh": "dash", "usr/bin/python3": "python3.11"}
    links |= {"opt/sh": "../bin/sh", "usr/lib/libone.so": "libone.so.1", "usr/bin/loop": "loop"}
    links |= {"usr/bin/zsh": "nowhere", "usr/bin/bash": "/etc/os-release"}
    for name, place in links.items():
        (root / name).symlink_to(place)
    if os.geteuid() == 0:
        os.setxattr(root / "usr/bin/ping", "security.capability", NET_RAW)


def full_survey(what):
    """({metric: measure}, packages) of what one part of a target holds."""
    with contextlib.ExitStack() as stack:
        return surface.survey(trees.read_tree(str(what), stack))


def survey(what):
    """{metric: count} of what one part of a target holds."""
    return {metric: one.get("count") for metric, one in full_survey(what)[0].items()}


def names(what, metric):
    """The names that one metric of one part gives."""
    return full_survey(what)[0][metric]["names"]


def pack(root, path, *flags):
    """A tar archive of a directory, with extended attributes."""
    command = ["tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", *flags, "-C", root]
    subprocess.run([*map(str, command), "-cf", path, "."], check=True)
    return path


def write_image(path, layers, damage=None, kinds=None):
    """An OCI archive of layers (bytes), after the OCI image specification."""
    blobs = {}

    def blob(data, kind):
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data if damage is None else damage(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    config = {"architecture": "amd64", "os": "linux", "config": {}}
    diffs = [f"sha256:{hashlib.sha256(unpacked(data)).hexdigest()}" for data in layers]
    config["rootfs"] = {"type": "layers", "diff_ids": diffs}
    prefix = "application/vnd.oci.image."
    manifest = {"schemaVersion": 2, "mediaType": prefix + "manifest.v1+json"}
    manifest["config"] = blob(json.dumps(config).encode(), prefix + "config.v1+json")
    manifest["layers"] = [blob(data, prefix + "layer.v1.tar" + suffix(data)) for data in layers]
    entry = blob(json.dumps(manifest).encode(), prefix + "manifest.v1+json")
    index = {"schemaVersion": 2, "manifests": kinds(entry) if kinds else [entry]}
    files = {
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps(index).encode(),
    }
    with tarfile.open(path, "w") as archive:
        for name, data in (files | blobs).items():
            add(archive, name, data)
    return path


def suffix(data):
    """How a layer's media type ends."""
    return "+gzip" if data[:2] == b"\x1f\x8b" else ""


def unpacked(data):
    """A layer without its compression."""
    return gzip.decompress(data) if suffix(data) else data


def add(archive, name, data=b"", **facts):
    """Add a file, or what `facts` make of it, to a tar archive."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in facts.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(data))


def layer(*entries):
    """A layer as bytes; an entry is a name (a folder's ends with /), or that and more facts."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for entry in entries:
            name, facts = (entry, {}) if isinstance(entry, str) else entry
            kind = {"type": tarfile.DIRTYPE} if name.endswith("/") else {}
            data = b"" if kind or "type" in facts else facts.get("data", name.encode())
            more = {field: value for field, value in facts.items() if field != "data"}
            add(archive, name.rstrip("/"), data, **(kind | more))
    return file.getvalue()


def run(*arguments, **options):
    """The tool's command line, to its end."""
    command = [sys.executable, "-B", TOOL, *arguments]
    quiet = {"capture_output": True, "text": True, "cwd": "/", "stdin": subprocess.DEVNULL}
    return subprocess.run(list(map(str, command)), **(quiet | options))


class Folder(unittest.TestCase):
    """A class of tests with a folder."""

    @classmethod
    def setUpClass(cls):
        place = tempfile.TemporaryDirectory()
        cls.addClassCleanup(place.cleanup)
        cls.folder = pathlib.Path(place.name)


@unittest.skipIf(MISSING, f"not installed: {' '.join(MISSING)}")
class Counters(Folder):
    """One tree, in every form that it can have."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.root = cls.folder / "root"
        cls.root.mkdir()
        make_tree(cls.root)
        cls.plain = cls.folder / "plain.cpio"  # before it has hard links, which it would not keep
        with open(cls.plain, "wb") as file:
            rootfs.write_cpio(cls.root, file)
        cls.before = survey(cls.root)
        os.link(cls.root / "usr/bin/hello", cls.root / "usr/bin/again")
        cls.found = survey(cls.root)

    def test_true_numbers(self):
        self.assertEqual({metric: self.found[metric] for metric in TRUE}, TRUE)
        listed = ["find", self.root, "-type", "f", "-printf", "%i %s\\n"]
        told = subprocess.run(list(map(str, listed)), capture_output=True, text=True, check=True)
        sizes = dict(row.split() for row in told.stdout.splitlines())
        self.assertEqual(self.found["bytes"], sum(map(int, sizes.values())))

    def test_a_hard_link_changes_nothing(self):
        self.assertEqual(self.found, self.before)

    def test_which(self):
        expected = {
            "shells": ["usr/bin/dash"],
            "interpreters": ["opt/py/bin/python3.9", "usr/bin/python3.11"],
            "package_managers": ["usr/bin/apt", "usr/bin/pip"],
            "setuid": ["usr/bin/again", "usr/bin/su"],
            "capabilities": ["usr/bin/ping"] * TRUE["capabilities"],
            "world_writable": ["etc/open.conf", "var/spool/drop"],
            "services": ["cron", "inittab: /sbin/getty 38400 tty1", "ssh"],
            "packages": ["one 1:1.0-1", "three 3~rc1+b1"],
            "distributions": ["one-more 1.0"],
        }
        for metric, listed in expected.items():
            self.assertEqual(names(self.root, metric), listed, metric)

    def test_squashfs(self):
        path = self.folder / "root.squashfs"
        subprocess.run(["mksquashfs", self.root, path, "-quiet", "-no-progress"], check=True)
        self.assertEqual(survey(path), self.found)

    def test_tar(self):
        path = pack(self.root, self.folder / "root.tar")
        self.assertEqual(survey(path), self.found)
        for program in ("gzip", "xz", "zstd", "lz4", "bzip2"):
            packed = self.folder / f"root.tar.{program}"
            if program == "bzip2":
                import bz2

                packed.write_bytes(bz2.compress(path.read_bytes()))
            else:
                with open(path, "rb") as file, open(packed, "wb") as out:
                    subprocess.run([program, "-1", "-c"], stdin=file, stdout=out, check=True)
            self.assertEqual(survey(packed), self.found, program)

    def test_cpio(self):
        without = self.found | {"capabilities": 0}  # the format has none
        self.assertEqual(survey(self.plain), without)
        packed = self.folder / "early.cpio"  # as an initrd with microcode: an archive, and another
        with open(packed, "wb") as file:
            rootfs.write_entry(file, 1, 0o100644, "early", b"first")
            rootfs.write_entry(file, 0, 0, "TRAILER!!!", b"")
            file.write(bytes(-file.tell() % 512) + gzip.compress(self.plain.read_bytes()))
        self.assertEqual(survey(packed)["files"], TRUE["files"] + 1)
        linked = self.folder / "linked.cpio"
        listed = "\n".join(str(path.relative_to(self.root)) for path in self.root.rglob("*"))
        with open(linked, "wb") as out:
            command = ["cpio", "--quiet", "-o", "-H", "newc"]
            subprocess.run(command, input=listed.encode(), stdout=out, cwd=self.root, check=True)
        self.assertEqual(survey(linked), without)

    def test_images(self):
        whole = pack(self.root, self.folder / "layer.tar").read_bytes()
        base = layer("usr/", "usr/bin/", "usr/bin/gone", "old/", "old/file", ("bin/", {}), "bin/a")
        cover = layer("usr/bin/.wh.gone", ".wh.old")
        path = write_image(self.folder / "image.tar", [base, gzip.compress(cover), whole])
        self.assertEqual(survey(path), self.found)
        layout = self.folder / "layout"
        command = ["skopeo", "--insecure-policy", "copy", "--quiet"]
        for target in (f"oci:{layout}:tag", f"docker-archive:{self.folder / 'saved.tar'}"):
            subprocess.run([*command, f"oci-archive:{path}", target], check=True)
        self.assertEqual(survey(layout), self.found)
        self.assertEqual(survey(self.folder / "saved.tar"), self.found)
        self.assertEqual(survey(f"oci:{layout}:tag"), self.found)  # a name, fetched by skopeo

    def test_parts_are_summed(self):
        target = attack_surface.parse_target(f"twice={self.root}+{self.plain}")
        facts, _ = attack_surface.measure_target(target, None)
        for metric in ("executables", "files", "bytes", "modules", "setuid"):
            self.assertEqual(facts[metric]["count"], 2 * self.found[metric], metric)
        self.assertEqual(facts["packages"]["count"], TRUE["packages"])  # the same two

    def test_what_a_list_names_too_is_there_once(self):
        path = self.folder / "reference.json"
        kinds = {"debian": {"libc6": "2"}, "extras": {"one.more": "1.0", "other": "1"}}
        path.write_text(json.dumps({"image": {"packages": kinds}}))
        target = attack_surface.parse_target(f"{self.root}+{path}")
        facts, found = attack_surface.measure_target(target, None)
        self.assertEqual(facts["distributions"]["names"], ["one-more 1.0", "other 1"])
        self.assertEqual(facts["packages"]["count"], TRUE["packages"] + 1)
        bill = json.loads(sbom.document("a", found))
        self.assertEqual(facts["components"]["count"], len(bill["components"]))


class Damaged(Folder):
    """Whoever made what is looked at may have meant to stop it."""

    @unittest.skipIf(MISSING, f"not installed: {' '.join(MISSING)}")
    def test_elf(self):
        compile_c(self.folder / "whole", "-DMAIN")
        whole = (self.folder / "whole").read_bytes()
        self.assertEqual(surface.elf_kind(io.BytesIO(whole)), "executable")
        kinds = set()
        for at in range(4, 1024):
            for value in (0, 255):
                data = whole[:at] + bytes([value]) + whole[at + 1 :]
                kinds.add(surface.elf_kind(io.BytesIO(data)))
            kinds.add(surface.elf_kind(io.BytesIO(whole[:at])))
        self.assertEqual(kinds, {"executable", "library", "other"})

    def test_descriptions_of_images(self):
        for index in (
            "[]",
            "{}",
            '{"manifests": 1}',
            '{"manifests": [1]}',
            '{"manifests": [{}]}',
            "x",
        ):
            path = self.folder / "image.tar"
            with tarfile.open(path, "w") as archive:
                add(archive, "oci-layout")
                add(archive, "index.json", index.encode())
            with self.assertRaises(trees.ToolError, msg=index):
                survey(path)
        for text in ("[]", "{}", "[1]", '[{"Layers": 1}]', '[{"Layers": ["gone"]}]'):
            with tarfile.open(path, "w") as archive:
                add(archive, "manifest.json", text.encode())
            with self.assertRaises(trees.ToolError, msg=text):
                survey(path)

    def test_archives(self):
        root = self.folder / "root"
        write(root / "a/b", "content")
        file = io.BytesIO()
        rootfs.write_cpio(root, file)
        whole = {"cpio": file.getvalue(), "tar": layer("a/", "a/b")}
        for name, data in whole.items():
            for size in range(300, len(data.rstrip(b"\0"))):
                (self.folder / name).write_bytes(data[:size])
                with self.assertRaises(trees.ToolError, msg=f"{name} {size}"):
                    survey(self.folder / name)

    def test_paths_that_never_end(self):
        root = self.folder / "loops"
        root.mkdir()
        for name, place in {"a": "b", "b": "a", "c": "c/c", "sh": "a/../../sh"}.items():
            (root / name).symlink_to(place)
        self.assertEqual(survey(root)["shells"], 0)


class Layers(Folder):
    """Layers of an image hide what lies below them."""

    def paths(self, *layers):
        path = write_image(self.folder / "image.tar", layers)
        with contextlib.ExitStack() as stack:
            tree = trees.read_tree(str(path), stack)
        return {path for path, entry in tree.items() if entry.kind != trees.FOLDER}

    def test_whiteouts(self):
        below = layer("a/", "a/x", "a/y", "b/", "b/z", "b/s/", "b/s/t", "c", "d/", "d/e", "dd")
        above = layer("a/.wh.x", "b/new", "b/.wh..wh..opq", ".wh.d", "c/", "c/f")
        self.assertEqual(self.paths(below, above), {"a/y", "b/new", "c/f", "dd"})

    def test_a_whiteout_hides_nothing_of_its_own_layer(self):
        self.assertEqual(self.paths(layer("a/", "a/x"), layer("a/x", "a/.wh.x")), {"a/x"})

    def test_a_file_in_the_place_of_a_folder(self):
        self.assertEqual(self.paths(layer("a/", "a/x"), layer("a")), {"a"})

    def test_an_opaque_root(self):
        self.assertEqual(self.paths(layer("a/", "a/x", "b"), layer(".wh..wh..opq", "c")), {"c"})

    def test_folders_that_are_not_named(self):
        link = ("bin", {"type": tarfile.SYMTYPE, "linkname": "/usr/bin"})
        shells = [(name, {"data": f"#!{name}".encode()}) for name in ("usr/bin/dash", "bin/zsh")]
        layers = [layer(link, *shells), layer("bin/.wh.gone", "bin/new")]
        self.assertEqual(self.paths(*layers), {"usr/bin/dash", "bin", "usr/bin/zsh", "usr/bin/new"})
        found = names(self.folder / "image.tar", "shells")
        self.assertEqual(found, ["usr/bin/dash", "usr/bin/zsh"])

    def test_names_that_lead_out(self):
        self.assertEqual(self.paths(layer("../a", "/b", "./c")), {"a", "b", "c"})

    def test_hard_links_are_one_file(self):
        link = ("b", {"type": tarfile.LNKTYPE, "linkname": "a"})
        path = write_image(self.folder / "image.tar", [layer("a", link)])
        self.assertEqual(survey(path)["files"], 1)
        dangling = ("b", {"type": tarfile.LNKTYPE, "linkname": "c"})
        with self.assertRaisesRegex(trees.ToolError, "links to c, which is missing"):
            self.paths(layer("a", dangling))

    def test_capabilities(self):
        facts = {"pax_headers": {"SCHILY.xattr.security.capability": "\1\0\0\2"}}
        path = write_image(self.folder / "image.tar", [layer("a", ("b", facts))])
        self.assertEqual(names(path, "capabilities"), ["b"])

    def test_the_one_for_linux_on_amd64(self):
        def kinds(entry):
            other = entry | {"digest": "sha256:" + "0" * 64}
            arm = {"platform": {"os": "linux", "architecture": "arm64"}}
            return [other | arm, entry | {"platform": {"os": "linux", "architecture": "amd64"}}]

        path = write_image(self.folder / "image.tar", [layer("a")], kinds=kinds)
        self.assertEqual(survey(path)["files"], 1)

    def test_damaged(self):
        def damage(data):
            return data + b" "

        path = write_image(self.folder / "image.tar", [layer("a")], damage=damage)
        with self.assertRaisesRegex(trees.ToolError, "is damaged"):
            survey(path)


class Packages(Folder):
    """Databases of packages, and lists of them."""

    def found(self, files):
        root = pathlib.Path(tempfile.mkdtemp(dir=self.folder))
        for name, text in files.items():
            write(root / name, text)
        with contextlib.ExitStack() as stack:
            return surface.survey(trees.read_tree(str(root), stack))[0]["packages"]

    def test_databases(self):
        opkg = "Package: a\nVersion: 1\nStatus: install user installed\nArchitecture: x\n"
        apk = "C:Q1\nP:musl\nV:1.2.5-r0\nA:x86_64\n\nP:zlib\nV:1.3-r1\n"
        for files, expected in (
            ({"usr/lib/opkg/status": opkg}, ["a 1"]),
            ({"var/lib/opkg/status": opkg}, ["a 1"]),
            ({"lib/apk/db/installed": apk}, ["musl 1.2.5-r0", "zlib 1.3-r1"]),
            ({"var/lib/dpkg/status.d/one": "Package: one\nVersion: 1\n"}, ["one 1"]),
            ({"var/lib/dpkg/status": ""}, []),
        ):
            self.assertEqual(self.found(files)["names"], expected)

    def test_none_or_unread(self):
        self.assertIn("no database", self.found({"a": ""})["not_measured"])
        self.assertIn("rpmdb.sqlite", self.found({"var/lib/rpm/rpmdb.sqlite": ""})["not_measured"])

    def test_lists(self):
        kinds = {"debian": {"libc6": "2"}, "wheels": {"cffi": "1"}, "extras": {"torch": "3"}}
        lists = {
            "reference.json": json.dumps({"image": {"packages": kinds}}),
            "manifest.csv": '"PACKAGE","VERSION","LICENSE"\n"busybox","1.37.0","GPL-2.0"\n',
            "packages-file-list.txt": "zlib,./usr/lib/libz.so\nzlib,./usr/lib/libz.so.1\n",
        }
        expected = {"libc6": "dpkg", "cffi": "pypi", "torch": "pypi", "busybox": "buildroot"}
        found = {}
        for name, text in lists.items():
            write(self.folder / name, text)
            rows = attack_surface.read_list(str(self.folder / name))
            found |= {row.name: row.kind for row in rows}
        self.assertEqual(found, expected | {"zlib": "buildroot"})


@unittest.skipIf(MISSING, f"not installed: {' '.join(MISSING)}")
class Debian(Folder):
    """A real root file system, against the system's own programs."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        flags = ["--variant=minbase", f"--include={INCLUDED}", SUITE]

        def make(folder):
            folder.mkdir()
            done = subprocess.run(["mmdebstrap", *flags, folder], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr

        name = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:16]
        cls.root = support.demo.cached(f"rootfs-debian-{name}", make)
        cls.facts, cls.packages = full_survey(cls.root)
        cls.found = {metric: one.get("count") for metric, one in cls.facts.items()}

    def lines(self, *command):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        return [row for row in done.stdout.splitlines() if row]

    def test_packages(self):
        listed = self.lines("dpkg-query", "--admindir", self.root / "var/lib/dpkg", "-W")
        self.assertGreater(len(listed), 80)
        self.assertEqual(self.found["packages"], len(listed))

    def test_rights(self):
        setuid = self.lines("find", self.root, "-xdev", "-type", "f", "-perm", "/6000")
        self.assertGreater(len(setuid), 5)
        self.assertEqual(self.found["setuid"], len(setuid))
        capable = self.lines("getcap", "-r", self.root)
        self.assertEqual(self.found["capabilities"], len(capable))
        writable = ("-xdev", "-perm", "-2", "(", "-type", "f", "-o", "-type", "d", ")")
        self.assertEqual(
            self.found["world_writable"], len(self.lines("find", self.root, *writable))
        )

    def test_files(self):
        files = self.lines("find", self.root, "-xdev", "-type", "f", "-printf", "%i %s\\n")
        sizes = dict(row.split() for row in files)
        self.assertEqual(self.found["files"], len(sizes))
        self.assertEqual(self.found["bytes"], sum(map(int, sizes.values())))

    def test_elf(self):
        with contextlib.ExitStack() as stack:
            files = surface.Files(trees.read_tree(str(self.root), stack))
        self.assertGreater(len(files.elf), 500)
        told = self.lines("readelf", "-hld", *(self.root / path for path in sorted(files.elf)))
        kinds = [row.split()[1] for row in told if row.strip().startswith("Type:  ")]
        self.assertEqual(len(kinds), len(files.elf))
        named = [path for path, kind in files.elf.items() if kind == "executable"]
        self.assertEqual([path for path in named if ".so." in path], [])  # libc.so.6 can be run
        self.assertIn("usr/bin/perl", named)

    def test_programs(self):
        self.assertEqual(self.facts["shells"]["names"], ["usr/bin/bash", "usr/bin/dash"])
        managers = ["usr/bin/apt", "usr/bin/apt-get", "usr/bin/cpan", "usr/bin/dpkg"]
        self.assertEqual(self.facts["package_managers"]["names"], managers)
        interpreters = self.facts["interpreters"]["names"]
        self.assertEqual(
            [name for name in interpreters if "python" in name], ["usr/bin/python3.11"]
        )

    def test_python(self):
        code = "import importlib.metadata as m; print(*(d.version for d in m.distributions()))"
        python = ("usr/bin/python3", "-c", code)
        if os.geteuid() == 0:
            (row,) = self.lines("chroot", self.root, *python) or [""]
            self.assertEqual(self.found["distributions"], len(row.split()))
        self.assertGreater(self.found["top_level_modules"], 100)

    def test_a_bill_of_it(self):
        text = sbom.document("debian", self.packages)
        self.assertEqual(faults(text), None)
        self.assertEqual(len(json.loads(text)["components"]), len(set(self.packages)))
        self.assertIn("pkg:deb/debian/apt@", text)


def faults(text):
    """What is wrong with a bill of materials, by CycloneDX's own schema; None if nothing is."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)


class Bills(unittest.TestCase):
    """CycloneDX, and package URLs."""

    def test_valid_and_the_same_each_time(self):
        found = [surface.Package("dpkg", "libstdc++6", "1:12+b1", "amd64", "debian")]
        found += [surface.package("pypi", "Foo_Bar", "1.0")]
        found += [surface.Package("buildroot", "x", "", "", ""), found[0]]
        text = sbom.document("a", found)
        self.assertIsNone(faults(text))
        self.assertEqual(text, sbom.document("a", found[::-1]))
        urls = [component["purl"] for component in json.loads(text)["components"]]
        expected = ["pkg:generic/x", "pkg:deb/debian/libstdc%2B%2B6@1%3A12%2Bb1?arch=amd64"]
        self.assertEqual(sorted(urls), sorted([*expected, "pkg:pypi/foo-bar@1.0"]))
        self.assertNotEqual(
            json.loads(text)["serialNumber"], json.loads(sbom.document("b", found))["serialNumber"]
        )

    def test_the_schema_refuses(self):
        bill = json.loads(sbom.document("a", []))
        self.assertIsNotNone(faults(json.dumps(bill | {"surprise": 1})))


class Busybox(Folder):
    """What a busybox can be called as."""

    def setUp(self):
        self.root = pathlib.Path(tempfile.mkdtemp(dir=self.folder))
        (self.root / "bin").mkdir()

    @unittest.skipIf(MISSING, f"not installed: {' '.join(MISSING)}")
    def test_its_own_table(self):
        shutil.copy(shutil.which("busybox"), self.root / "bin/busybox")
        (self.root / "bin/sh").symlink_to("busybox")
        listed = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True)
        self.assertEqual(names(self.root, "applets"), sorted(listed.stdout.split()))
        self.assertEqual(names(self.root, "shells"), ["bin/busybox"])

    def test_links_where_there_is_no_table(self):
        write(self.root / "bin/busybox", b"\x7fELF", 0o755)
        (self.root / "bin/ls").symlink_to("busybox")
        (self.root / "sbin").symlink_to("bin")
        os.link(self.root / "bin/busybox", self.root / "bin/cat")
        self.assertEqual(names(self.root, "applets"), ["cat", "ls"])


class Ports(unittest.TestCase):
    """Ports, seen from outside and from inside."""

    def setUp(self):
        self.open = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        self.ports = sorted(one.getsockname()[1] for one in self.open)
        for one in self.open:
            self.addCleanup(one.close)

    def test_from_outside(self):
        first, last = self.ports
        between = range(first, last + 1)
        wanted = between if len(between) < 2000 else range(first, first + 2)
        found = set(attack_surface.scan("127.0.0.1", first, wanted)["names"])
        expected = {f"tcp/{port}" for port in self.ports if port in wanted}
        self.assertEqual(found & {f"tcp/{port}" for port in self.ports}, expected)
        self.open[1].close()
        self.open[0].close()
        with socket.create_server(("127.0.0.1", 0)) as only:
            port = only.getsockname()[1]
            found = attack_surface.scan("127.0.0.1", port, range(port, port + 1))
        self.assertEqual(found["names"], [f"tcp/{port}"])

    def test_nothing_there(self):
        port = self.open[0].getsockname()[1]
        self.open[0].close()
        with self.assertRaisesRegex(trees.ToolError, f"nothing listens at 127.0.0.1:{port}"):
            attack_surface.scan("127.0.0.1", port, range(port, port + 1))

    def test_from_inside(self):
        found = surface.listening_ports()["names"]
        self.assertLessEqual({f"tcp/{port}" for port in self.ports}, set(found))

    def test_where_a_process_has_its_network(self):
        code = "import socket as s, sys\na = s.create_server(('', 22))\n"
        code += "b = s.socket(type=s.SOCK_DGRAM)\nb.bind(('', 53))\nc = s.socket()\n"
        code += "c.bind(('', 80))\nprint(flush=True)\nsys.stdin.read()"
        command = ["unshare", "--net", sys.executable, "-c", code]
        if os.geteuid():
            command.insert(1, "--map-root-user")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, **pipes) as process:
            process.stdout.readline()
            facts, _ = attack_surface.measure_part(f"pid:{process.pid}", None)
            process.stdin.close()
        self.assertEqual(facts["ports"]["names"], ["tcp/22", "udp/53"])  # what listens, alone


class Kernels(Folder):
    """Options of kernels, and lines; what is compiled is in tests.test_comparison."""

    def test_options(self):
        rules = hardening.read_record()["options"]
        options = {rule["option"]: rule["wanted"] for rule in rules}
        path = self.folder / "config"

        def counts():
            path.write_text(attack_surface.kernel.write_options(options))
            facts = attack_surface.measure_kernel(path, None, True)
            self.assertIn("--kernel-source", facts["kernel_lines"]["not_measured"])
            keys = ("options_held", "options_built_in", "options_as_modules")
            return [facts[key]["count"] for key in keys]

        built_in = list(options.values()).count("y")
        self.assertEqual(counts(), [len(rules), built_in, 0])
        options["STACKPROTECTOR"] = "n"
        options["E1000"] = "m"
        self.assertEqual(counts(), [len(rules) - 1, built_in - 1, 1])

    @unittest.skipIf(MISSING, f"not installed: {' '.join(MISSING)}")
    def test_code_lines(self):
        paths = [self.folder / "a.c", self.folder / "b.S"]
        paths[0].write_text("/* one\n   two */\n\nint a; // three\nint b;\n")
        paths[1].write_text("# one\n\tnop\n")
        self.assertEqual(loc.cloc_lines(paths)["count"], 3)
        self.assertEqual(loc.all_lines(paths), 7)

    def test_own_lines(self):
        facts = loc.own_lines()
        for name in loc.PRODUCT:
            text = (support.ROOT / name).read_text("utf-8")
            self.assertEqual(facts[name]["count"], len(loc.code_lines(text)))
        self.assertLess(
            facts["beside the key"]["count"], sum(facts[name]["count"] for name in loc.PRODUCT)
        )


class CommandLine(Folder):
    """What it writes, and how it fails."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        for name in ("one", "two"):
            write(cls.folder / name / "bin/\x1b<i>", b"#!\n", 0o4755)
        write(cls.folder / "two/bin/more", "#!\n", 0o4755)
        out = cls.folder / "out.json"
        flags = ["--names", "--json", out, "--html", cls.folder / "out.html"]
        flags += ["--sbom", cls.folder / "bills"]
        cls.done = run("all", f"a={cls.folder / 'one'}", f"b c={cls.folder / 'two'}", *flags)
        cls.document = json.loads(out.read_text()) if out.exists() else None

    def test_json(self):
        self.assertEqual(self.done.returncode, 0, self.done.stderr)
        document = self.document
        self.assertEqual((document["tool"], document["version"]), ("attack_surface", 1))
        self.assertEqual([row["name"] for row in document["targets"]], ["a", "b c"])
        counts = [row["metrics"]["setuid"]["count"] for row in document["targets"]]
        self.assertEqual(counts, [1, 2])
        self.assertNotIn(str(self.folder), json.dumps(document))

    def test_table(self):
        text = self.done.stdout
        self.assertRegex(text, r"(?m)^set-user-ID and set-group-ID files +1 +2 +2\.0$")
        self.assertRegex(text, r"(?m)^packages of the system +not measured +not measured$")
        self.assertIn("not measured: no database of packages is in it", text)
        self.assertIn(r"bin/\x1b<i>", text)
        self.assertNotIn("\x1b", text)

    def test_page(self):
        text = (self.folder / "out.html").read_text()
        self.assertIn("<td>set-user-ID and set-group-ID files<td>1<td>2<td>2.0", text)
        for word in ("<i>", "http", "src=", "href=", str(self.folder)):
            self.assertNotIn(word, text)

    def test_bills(self):
        bills = self.folder / "bills"
        self.assertEqual(sorted(os.listdir(bills)), ["a.cdx.json", "b_c.cdx.json"])
        for path in bills.iterdir():
            self.assertIsNone(faults(path.read_text()))

    def test_every_metric_is_counted_or_says_why_not(self):
        own = self.document["own"]["metrics"]
        kernels = {*attack_surface.HARDENING, *attack_surface.KERNEL_LOC}
        for row in self.document["targets"]:
            metrics = row["metrics"] | own
            self.assertEqual({*metrics}, {*self.document["labels"]} - kernels)
            for metric, one in metrics.items():
                self.assertEqual(("count" in one) + ("not_measured" in one), 1, metric)

    def test_programs_that_are_missing(self):
        quiet = {"env": {"PATH": "/nowhere"}}
        command = [
            sys.executable,
            "-S",
            "-B",
            TOOL,
            "all",
            self.folder / "one",
            "--json",
            "-",
        ]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **quiet)
        self.assertEqual(done.returncode, 0, done.stderr)
        document = json.loads(done.stdout)
        metrics = document["targets"][0]["metrics"] | document["own"]["metrics"]
        for metric, hint in (
            ("compressed_bytes", "apt-get install zstd"),
            ("vulnerabilities", "trivy is not installed"),
            ("bandit_high", "pip install bandit"),
        ):
            self.assertIn(hint, metrics[metric]["not_measured"])
        squashed = self.folder / "a.squashfs"
        squashed.write_bytes(b"hsqs" + bytes(100))
        done = run("attack", squashed, **quiet)
        self.assertIn("sqfs2tar is not installed: apt-get install squashfs-tools-ng", done.stderr)

    def test_trivy(self):
        """A stand-in writes what trivy does: its database can't be had on every machine."""
        program = self.folder / "programs" / "trivy"
        target = attack_surface.parse_target(str(self.folder / "one"))
        row = {"VulnerabilityID": "CVE-1", "PkgName": "a", "Severity": "HIGH"}
        found = [row, row, row | {"PkgName": "b"}]
        result = {"Results": [{"Target": "a"}, {"Vulnerabilities": found}]}
        path = f"{program.parent}:{os.environ['PATH']}"
        write(program, f"#!/bin/sh\necho '{json.dumps(result)}'\n", 0o755)
        with unittest.mock.patch.dict(os.environ, {"PATH": path}):
            found = attack_surface.vulnerabilities(target, "bill")
            self.assertEqual(found, {"count": 2, "how": "trivy rootfs: 2 high"})
            image = write_image(self.folder / "image.tar", [layer("a")])
            for part, verb in ((image, "image"), (self.folder / "out.json", "sbom")):
                target = attack_surface.parse_target(str(part))
                found = attack_surface.vulnerabilities(target, "bill")
                self.assertEqual(found["how"], f"trivy {verb}: 2 high")
            write(program, "#!/bin/sh\necho 'FATAL no database' >&2; exit 1\n", 0o755)
            found = attack_surface.vulnerabilities(target, "bill")
            self.assertEqual(found, {"not_measured": "trivy: FATAL no database"})

    def test_bandit(self):
        root = self.folder / "project"
        for name in loc.PRODUCT:
            write(root / name, "import hashlib\n")
        write(root / "tools/x.py", "import subprocess\nsubprocess.call('ls *', shell=True)\n")
        write(root / "muproxy.py", "import hashlib\nhashlib.md5(b'')\n")
        with unittest.mock.patch.object(attack_surface, "ROOT", root):
            found = attack_surface.bandit()
        self.assertEqual(
            [found[name].get("count") for name in attack_surface.OWN_SECURITY], [1, 0, 3]
        )

    def test_mistakes_are_one_line(self):
        write(self.folder / "text", "nothing that anyone knows")
        write(self.folder / "cut.cpio", b"070701" + b"0" * 50)
        write(self.folder / "cut.gz", gzip.compress(os.urandom(5000))[:3000])
        write(self.folder / "cut.sqfs", b"hsqs" + bytes(5000))
        write(self.folder / "cut.tar", layer("a", "b")[:1100])
        write(self.folder / "list.json", "{}")
        os.mkfifo(self.folder / "pipe")
        for words, said in (
            (["/nowhere/at/all"], "there is no /nowhere/at/all"),
            ([self.folder / "text"], "is nothing that can be looked into"),
            ([self.folder / "cut.cpio"], "at byte 0 there is no entry of a cpio archive"),
            ([self.folder / "cut.gz"], "gzip"),
            ([self.folder / "cut.sqfs"], "sqfs2tar"),
            ([self.folder / "cut.tar"], "tar: the archive is damaged, or ends too early"),
            ([self.folder / "list.json"], "is no list of packages"),
            ([self.folder / "pipe"], "neither a file nor a directory"),
            (["127.0.0.1:1"], "nothing listens at 127.0.0.1:1"),
            (["127.0.0.1:99999"], "there is no such port"),
            (["pid:4194305"], "there is no process 4194305"),
            (["--kernel", f"a={self.folder / 'text'}"], "is no resolved kernel configuration"),
            (["--kernel", f"a={self.folder / 'none'}"], "No such file or directory"),
            ([self.folder / "one", "--json", "/nowhere/a.json"], "can't write /nowhere/a.json"),
            ([self.folder / "one", "--sbom", self.folder / "text"], "File exists"),
        ):
            done = run("attack", *words)
            self.assertEqual((done.returncode, done.stdout), (1, ""), (words, done.stderr))
            last = done.stderr.splitlines()[-1]
            self.assertTrue(last.startswith("attack_surface: error: "), last)
            self.assertIn(said, last)
            self.assertNotIn("Traceback", done.stderr)

    def test_wrong_flags(self):
        one = self.folder / "one"
        for words in (
            ["attack"],
            ["attack", f"a={one}", f"a={one}"],
            ["attack", "a=b++c"],
            ["attack", one, "--ports", "9-1"],
            ["attack", one, "--kernel", "x"],
            ["compare", one],
        ):
            done = run(*words)
            self.assertEqual((done.returncode, done.stdout), (2, ""), words)


if __name__ == "__main__":
    unittest.main()
