"""The guest's root file system: chosen files of pinned packages, no shell, no package manager.

Needs no root and runs no package's scripts: packages are unpacked, what is named is taken, and a
cpio archive is written with fixed owners, times and order. Used by tools/image.py.
"""

import os
import re
import shutil
import stat
import subprocess
import zipfile

from environment import ROOT, ToolError

BOARD = ROOT / "br_external" / "board" / "muenclave"
EPOCH = 1767225600  # seconds: the time of every file, 2026-01-01
LIBRARIES = "usr/lib/x86_64-linux-gnu"
PYTHON = "usr/lib/python3.11"
PACKAGES = "usr/lib/python3/dist-packages"
ENCLAVE = "usr/lib/muenclave"
EXTRAS = f"{ENCLAVE}/extras"
MODULES = ("muenclave.py", "muprotocol.py")
DEBIAN = """libc6 zlib1g libexpat1 libffi8 libgcc-s1 python3.11-minimal libpython3.11-minimal
libpython3.11-stdlib""".split()
WHEELS = ("cryptography", "cffi")
# What init, gate and loader import, and what that imports. All else is left out: what the engine
# needs beside it comes with the extras. Packages are whole, for the engine's sake.
STANDARD_LIBRARY = """
__future__ _collections_abc _compression _sitebuiltins _weakrefset abc argparse ast base64 bisect
calendar codecs collections concurrent contextlib contextvars copy copyreg csv ctypes dataclasses
datetime dis email encodings enum fnmatch functools genericpath gettext hashlib heapq hmac
importlib inspect io ipaddress json keyword linecache locale logging ntpath numbers opcode
operator os pathlib pkgutil platform posixpath queue quopri random re reprlib secrets selectors
shutil signal site socket stat string stringprep struct subprocess tempfile textwrap threading
token tokenize traceback types typing urllib warnings weakref zipfile zipimport
""".split()
EXTENSIONS = "_contextvars _ctypes _json _queue _typing mmap resource termios".split()
UNWANTED = {"__pycache__", "test", "tests"}  # folders
NO_CODE = (".pyi", ".typed", ".h", ".hpp", ".cuh", ".rst", ".a", ".cmake", ".c", ".cpp")
# Of the standard library, what not even the extras get: programs, databases, old formats.
LEFT_OUT = """
ensurepip idlelib lib2to3 tkinter turtledemo turtle pydoc_data venv wsgiref xmlrpc curses dbm
sqlite3 antigravity this config-3.11-x86_64-linux-gnu sitecustomize __phello__ __hello__
""".split()
LEFT_OUT_EXTENSIONS = r"_?(?:test|curses|dbm|sqlite|tkinter|xx|nis|readline|ossaudio|crypt|uuid)"
EXTRAS_LIBRARIES = "libstdc++.so.6 libcrypto.so.3 libssl.so.3 libbz2.so.1.0 liblzma.so.5".split()
# glibc's own, empty since 2.34, which the engine's libraries still name.
STUBS = ("libdl.so.2", "librt.so.1", "libutil.so.1")
LINKS = {"lib": "usr/lib", "lib64": "usr/lib64", "usr/bin/python3": "python3.11"}
# The engine's libraries lie on the extras' disk, where the dynamic loader would not look.
LINKS |= {f"{LIBRARIES}/{name}": f"/{EXTRAS}/lib/{name}" for name in EXTRAS_LIBRARIES}


def run(*command, failure, **options):
    """Standard output of a program. Raises ToolError with the failure and its last line."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise ToolError(f"{failure}: {lines[-1]}")
    return done.stdout


def unpack(packages, wheels, folder):
    """Unpack Debian packages (paths) and wheels (paths) into a folder, merged as Debian does it."""
    folder.mkdir(parents=True)
    for path in packages:
        run("dpkg-deb", "-x", path, folder, failure=f"can't unpack {path.name}")
    for name in ("lib", "lib64"):
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            shutil.copytree(folder / name, folder / "usr" / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(folder / name)
        (folder / name).symlink_to(f"usr/{name}")
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(folder / PACKAGES)


def is_elf(path):
    """Whether a file is an ELF object."""
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"


def needed(path):
    """The names of the shared objects that an ELF file needs (DT_NEEDED)."""
    text = run("readelf", "-d", path, failure=f"can't read {path}")
    return re.findall(r"\(NEEDED\).*\[(.+?)\]", text)


def choose(unpacked):
    """The paths, from the root, of the files that the guest gets; sorted. ToolError."""
    chosen = {"usr/bin/python3.11", "usr/lib64/ld-linux-x86-64.so.2"}
    chosen.update(f"{LIBRARIES}/{name}" for name in STUBS)
    for name in STANDARD_LIBRARY:
        file, folder = unpacked / PYTHON / f"{name}.py", unpacked / PYTHON / name
        found = [file] if file.exists() else walk(folder)
        if not found:
            raise ToolError(f"the guest's Python has no module {name}")
        chosen.update(path.relative_to(unpacked).as_posix() for path in found)
    for name in EXTENSIONS:
        path = f"{PYTHON}/lib-dynload/{name}.cpython-311-x86_64-linux-gnu.so"
        if not (unpacked / path).exists():
            raise ToolError(f"the guest's Python has no extension {name}")
        chosen.add(path)
    chosen.update(
        path.relative_to(unpacked).as_posix() for path in walk(unpacked / PACKAGES / "cryptography")
    )
    chosen.update(
        path.relative_to(unpacked).as_posix() for path in (unpacked / PACKAGES).glob("_cffi*.so")
    )
    waiting = sorted(path for path in chosen if is_elf(unpacked / path))
    while waiting:
        for name in needed(unpacked / waiting.pop()):
            path = f"{LIBRARIES}/{name}"
            if name == "ld-linux-x86-64.so.2" or path in chosen:
                continue
            if not (unpacked / path).exists():
                raise ToolError(f"no package of the lock file holds {name}")
            chosen.add(path)
            waiting.append(path)
    return sorted(chosen)


def walk(folder):
    """The files under a folder that are code."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - UNWANTED)
        found += [folder / place / name for name in names if not name.endswith(NO_CODE)]
    return found


def fill(unpacked, root, mount_points):
    """Make the root file system in a folder: chosen files, our own, links, mount points."""
    for path in choose(unpacked):
        put(root / path, (unpacked / path).resolve().read_bytes())
    for name in MODULES:
        put(root / ENCLAVE / name, (ROOT / name).read_bytes())
    put(root / PACKAGES / "sitecustomize.py", (BOARD / "sitecustomize.py").read_bytes())
    overlay = BOARD / "rootfs_overlay"
    for path in sorted(file for file in overlay.rglob("*") if file.is_file()):
        put(root / path.relative_to(overlay), path.read_bytes())
    for path, target in LINKS.items():
        (root / path).symlink_to(target)
    for name in mount_points:
        (root / name).mkdir(parents=True)


def fill_extras(unpacked, root):
    """Make the extras in a folder: the wheels, the rest of the standard library, `lib`.

    All of it lies on the engine's path only, behind what the root file system holds.
    """
    for path in walk(unpacked / PACKAGES):
        name = path.relative_to(unpacked / PACKAGES)
        if name.parts[:2] != ("torch", "bin") or name.name == "torch_shm_manager":  # else tests
            put(root / name, path.read_bytes())
    for entry in sorted((unpacked / PYTHON).iterdir()):
        if entry.stem in (*STANDARD_LIBRARY, *LEFT_OUT, "lib-dynload", *UNWANTED):
            continue
        for path in walk(entry) if entry.is_dir() else [entry] if entry.suffix == ".py" else []:
            put(root / path.relative_to(unpacked / PYTHON), path.read_bytes())
    for path in sorted((unpacked / PYTHON / "lib-dynload").iterdir()):
        name = path.name.partition(".")[0]
        if name not in EXTENSIONS and not re.match(LEFT_OUT_EXTENSIONS, name):
            put(root / path.name, path.read_bytes())
    for name in EXTRAS_LIBRARIES:
        put(root / "lib" / name, (unpacked / LIBRARIES / name).resolve().read_bytes())


def put(path, data):
    """Write a file with its folders; programs and the dynamic loader may be executed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    is_program = data[:4] == b"\x7fELF" and (".so" not in path.name or path.name[:3] == "ld-")
    path.chmod(0o755 if is_program else 0o644)


def compile_python(unpacked, root, folder="/", is_strict=True):
    """Compile every module in root with the guest's own Python, as it will lie under `folder`.

    The compiled files carry no time and no hash to check: the measurement covers them. Some wheels
    hold templates that are no Python yet; is_strict=False leaves those as they are.
    """
    libraries = unpacked / LIBRARIES
    loader = (unpacked / "usr/lib64/ld-linux-x86-64.so.2").resolve()
    if not loader.exists():  # an absolute link, made for the package's own root
        loader = libraries / "ld-linux-x86-64.so.2"
    python = (loader, "--library-path", libraries, unpacked / "usr/bin/python3.11", "-S", "-B")
    flags = ("-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash")
    environment = {"PYTHONHOME": str(unpacked / "usr"), "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
    command = [str(word) for word in (*python, *flags, "-s", root, "-p", folder, root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode and (is_strict or done.stderr):
        said = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise ToolError(f"can't compile the guest's Python modules: {said[-1]}")
    for path in root.rglob("*.pyc"):
        path.chmod(0o644)
    for path in (root, *root.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


def write_initramfs(root, path):
    """Write a folder as the compressed initramfs that the kernel unpacks; path ends in .zst."""
    archive = path.with_suffix("")
    with open(archive, "wb") as file:
        write_cpio(root, file)
    command = ("zstd", "-19", "-T1", "--quiet", "--rm", archive, "-o", path)
    run(*command, failure="can't compress the initramfs")


def write_cpio(root, file):
    """Write a folder as a newc cpio archive: sorted, owned by root, without times of its own.

    Format: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
    for number, name in enumerate(paths, 1):
        path = root / name
        mode = path.lstat().st_mode
        data = b""
        if stat.S_ISLNK(mode):
            mode, data = stat.S_IFLNK | 0o777, os.fsencode(os.readlink(path))
        elif stat.S_ISREG(mode):
            data = path.read_bytes()
        write_entry(file, number, mode, name, data)
    write_entry(file, 0, 0, "TRAILER!!!", b"")
    file.write(bytes(-file.tell() % 512))


def write_entry(file, inode, mode, name, data):
    """One entry of a cpio archive."""
    links = 2 if stat.S_ISDIR(mode) else 1
    mtime = EPOCH if inode else 0
    encoded = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, links, mtime, len(data), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    file.write(header + encoded)
    file.write(bytes(-(len(header) + len(encoded)) % 4))
    file.write(data + bytes(-len(data) % 4))


def facts(root):
    """{"files", "elf", "bytes"} of a root file system; links do not count."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    sizes = (path.stat().st_size for path in files)
    return {"files": len(files), "elf": sum(map(is_elf, files)), "bytes": sum(sizes)}
