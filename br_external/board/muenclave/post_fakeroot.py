#!/usr/bin/env python3
"""Leave in the guest's root what it needs, nothing else, and its manifest: post_fakeroot.py ROOT

Buildroot runs this on a copy of its target folder, just before it writes the archive: builds that
follow find their target folder whole. Python modules are compiled here, by the Python that
Buildroot has made for the build machine, which is of the guest's version. BINARIES_DIR, which
Buildroot sets, names the folder with the facts of the kernel, which the manifest says too.
"""

import fnmatch
import os
import pathlib
import shutil
import subprocess
import sys

CHECKOUT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(CHECKOUT))
sys.path.insert(0, str(CHECKOUT / "tools"))

import kernel_config  # noqa: E402
import measure  # noqa: E402
import rootfs  # noqa: E402
from environment import ToolError  # noqa: E402

import muprotocol as mp  # noqa: E402

ENCLAVE = "usr/lib/muenclave"
PROGRAM_LOADER = "ld-linux-x86-64.so.2"
LINKS = ("lib", "lib64", "usr/lib64")
# Torch has most of the rest of the standard library imported: it stays, but for this.
UNWANTED_MODULES = """__phello__ antigravity.py config-* curses dbm ensurepip idlelib lib2to3
pydoc.py pydoc_data sitecustomize.py sqlite3 test this.py tkinter turtle.py turtledemo venv
wsgiref xmlrpc""".split()
UNWANTED_EXTENSIONS = """_ctypes_test* _curses* _dbm* _gdbm* _sqlite3* _test* _tkinter* _xx* nis*
readline* xx*""".split()
PACKAGES = ("cryptography", "_cffi_backend*.so", "sitecustomize.py")
# What torch's wheels need of a system beside the closure of Python's own needs.
ENGINE_LIBRARIES = """libc.so.6 libdl.so.2 libgcc_s.so.1 libm.so.6 libpthread.so.0 librt.so.1
libstdc++.so.6 libutil.so.1""".split()
GPU = ("usr/lib/libcuda.so*", "usr/lib/libnvidia-*.so*", "usr/lib/firmware/nvidia/*/*.bin")
KERNEL_MODULES = ("nvidia.ko", "nvidia-uvm.ko")  # each needs those before it


def matches(name, patterns):
    """Whether a file's name fits one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def choose(root):
    """The paths below root (a pathlib.Path) that stay, links and their targets both. ToolError."""
    pythons = sorted(root.glob("usr/lib/python3.*"))
    if len(pythons) != 1:
        raise ToolError(f"{root}: one Python was expected, found {len(pythons)}")
    (library,) = pythons
    kept = {root / "usr/bin" / library.name, root / "usr/bin/python3"}
    for path in library.iterdir():
        if path.name not in ("site-packages", "lib-dynload", "__pycache__"):
            if not matches(path.name, UNWANTED_MODULES):
                kept.update(rootfs.walk(path) if path.is_dir() else [path])
    for path in (library / "lib-dynload").iterdir():
        if not matches(path.name, UNWANTED_EXTENSIONS):
            kept.add(path)
    for path in (library / "site-packages").iterdir():
        if matches(path.name, PACKAGES):
            kept.update(rootfs.walk(path) if path.is_dir() else [path])
    kept.update(root / ENCLAVE / name for name in rootfs.MODULES)
    kept.add(root / "etc/muenclave.conf")
    kept.update(path for pattern in GPU for path in root.glob(pattern))
    kept.update(root.glob("usr/lib/modules/*.ko"))
    for path in kept:
        if not path.exists():
            raise ToolError(f"{path.relative_to(root)} is missing from the root")
    return kept | libraries(root, kept)


def place_modules(root):
    """Put the kernel's modules where PID 1 loads them, in the order of their names. ToolError."""
    for number, name in enumerate(KERNEL_MODULES):
        found = list(root.glob(f"usr/lib/modules/*/updates/{name}"))
        if len(found) != 1:
            raise ToolError(f"{root}: one {name} was expected in updates/, found {len(found)}")
        os.replace(found[0], root / "usr/lib/modules" / f"{number}-{name}")


def libraries(root, kept):
    """The shared objects that the chosen files need, and those that need them. ToolError."""
    found = {root / "usr/lib" / PROGRAM_LOADER}
    for name in ENGINE_LIBRARIES:
        path = root / "usr/lib" / name
        if path.exists():  # some are part of libc now
            found.add(path)
    waiting = [path for path in kept if path.is_file() and rootfs.is_elf(path)] + sorted(found)
    while waiting:
        path = waiting.pop()
        if path.is_symlink():
            found.add(path.parent / os.readlink(path))
        for name in rootfs.needed(path):
            library = root / "usr/lib" / name
            if library in found or (path.parent / name).exists() and path.parent / name in kept:
                continue
            if not library.exists():
                raise ToolError(f"{path.relative_to(root)} needs {name}, which is not there")
            found.add(library)
            waiting.append(library)
    return found


def prune(root, kept):
    """Remove all but the kept paths, the links that merge /usr, and the mount points."""
    stays = kept | {root / name for name in LINKS}
    mount_points = {root / name for name in measure.MOUNT_POINTS}
    for folder, folders, names in os.walk(root, topdown=False):
        folder = pathlib.Path(folder)
        for path in (folder / name for name in (*names, *folders)):
            if path.is_symlink() or not path.is_dir():
                if path not in stays:
                    path.unlink()
            elif path not in mount_points and not any(path.iterdir()):
                path.rmdir()


def compile_modules(root):
    """Compile the guest's Python modules; no times and no hashes in them. ToolError."""
    (library,) = root.glob("usr/lib/python3.*")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if library.name != version:
        raise ToolError(f"the guest has {library.name}, this is {version}: it can't compile for it")
    command = [sys.executable, "-m", "compileall", "-q", "-f", "-s", root, "-p", "/"]
    command += ["--invalidation-mode", "unchecked-hash", library, root / ENCLAVE]
    done = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "0"})
    if done.returncode:
        raise ToolError("the guest's Python modules can't be compiled")


def set_modes(root):
    """Folders and programs 0755, everything else 0644."""
    for path in (root, *root.rglob("*")):
        if path.is_symlink():
            continue
        is_program = path.name == PROGRAM_LOADER or path.parent == root / "usr/bin"
        path.chmod(0o755 if path.is_dir() or is_program else 0o644)


def main(arguments):
    """The command line. Returns the exit status."""
    if not arguments:
        print("post_fakeroot: error: which root? post_fakeroot.py ROOT", file=sys.stderr)
        return 2
    if "BINARIES_DIR" not in os.environ:
        print("post_fakeroot: error: BINARIES_DIR is not set, as Buildroot does", file=sys.stderr)
        return 2
    root, images = pathlib.Path(arguments[0]), pathlib.Path(os.environ["BINARIES_DIR"])
    try:
        release, command_line, options = kernel_config.read_facts(images)
        for path in list(root.rglob("__pycache__")):
            shutil.rmtree(path)
        if options.get("MODULES") == "y":
            place_modules(root)
        prune(root, choose(root))
        compile_modules(root)
        set_modes(root)
        manifest = measure.root_manifest(root, release, command_line)
        rootfs.put(root / measure.MANIFEST, mp.encode_json(manifest))
    except (ToolError, measure.MeasureError) as error:
        print(f"post_fakeroot: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"post_fakeroot: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
