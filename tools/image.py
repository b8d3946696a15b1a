"""Build the guest from Debian packages and wheels: python3 tools/image.py all

    kernel   compile the kernel's objects (the first time: minutes; then cached)
    rootfs   the root file system, as a directory and as the initramfs that goes into the kernel
    extras   torch and what it needs, as a read-only squashfs under dm-verity
    image    one EFI program of kernel, initramfs and command line; its disk; its reference values
    all      all of these
    lock     take the versions that the archives offer now into tools/image.lock
    clean    remove what was built, and the caches of it

Every package is named in tools/image.lock with its version and SHA-256. What is made from the same
lock file is the same, bit for bit, wherever it is built; it lies in build/, and in the user's
cache under names drawn from what it is made of. Needs no root. Exit status: 0 if all is built.
"""

import argparse
import configparser
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import demo_model
import environment
import kernel
import measure
import pcr
import rootfs
from environment import ROOT, ToolError

sys.path.insert(0, str(ROOT))
import muprotocol as mp  # noqa: E402

LOCK = ROOT / "tools" / "image.lock"
OUTPUT = ROOT / "build"
COMMAND_LINE = rootfs.BOARD / "cmdline"
SETTINGS = "etc/muenclave.conf"  # in the guest's root
KERNEL_SOURCE = "linux-source-6.1"
COMPARED_SOURCE = "linux-source-6.12"  # of the series that Buildroot builds: only its options count
COMPARED_KERNEL = "linux-image-cloud-amd64"  # names the package of the kernel that bench.py boots
EXTRAS_DEBIAN = ("libstdc++6", "libssl3", "libbz2-1.0", "liblzma5")
PYTHON_VERSION = "3.11"  # the guest's
PLATFORMS = ("manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux_2_17_x86_64")
PLATFORMS += ("manylinux2014_x86_64", "manylinux_2_5_x86_64", "manylinux1_x86_64")
PROGRAMS = {  # that building needs: the Debian package that has it
    "gcc": "gcc",
    "make": "make",
    "bc": "bc",
    "flex": "flex",
    "bison": "bison",
    "readelf": "binutils",
    "zstd": "zstd",
    "xz": "xz-utils",
    "cpio": "cpio",
    "dpkg-deb": "dpkg",
    "mkfs.vfat": "dosfstools",
    "mcopy": "mtools",
    "mksquashfs": "squashfs-tools",
    "veritysetup": "cryptsetup-bin",
    "/usr/include/libelf.h": "libelf-dev",
    "/usr/include/stdio.h": "libc6-dev",
}
SECTOR = 512
ESP_ID, ESP_NAME = "4d554531", "MUENCLAVE"
ESP_SLACK = 1 << 20  # bytes of a FAT file system that no file gets
SMALLEST_FAT32 = 34 << 20
BOOT_FILE = "EFI/BOOT/BOOTX64.EFI"  # UEFI, section 3.5.1.1: what a disk without boot entries runs
# The microvm finds no bus: its devices are where QEMU 7.2's hw/i386/microvm.c has them.
MICROVM_DEVICES = [f"virtio_mmio.device=512@{0xFEB00000 + 512 * n:#x}:{5 + n}" for n in range(4)]
MICROVM_OPTIONS = ["acpi=off", "reboot=t", *MICROVM_DEVICES]
VERITY_BLOCK = 4096
EXTRAS_DISK = "/dev/vdb"
SALT = hashlib.sha256(b"muenclave extras").hexdigest()  # fixed: the root hash names the content


def show(text):
    """Progress: over itself on a terminal, a line now and then elsewhere."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - len("image: ") - 1
        print(f"\rimage: {text[:width]}\x1b[K", end="", file=sys.stderr, flush=True)
    elif re.search(r"^\w+: \d*00 steps", text) or " steps" not in text:
        print(f"image: {text}", file=sys.stderr, flush=True)


def done(text):
    """A line that stays."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{clear}image: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- packages


def read_lock():
    """The lock file: {"debian": {package: ...}, "wheels": {...} ...}. ToolError."""
    try:
        return json.loads(LOCK.read_text("utf-8"))
    except (OSError, ValueError):
        raise ToolError(f"{LOCK} is no lock file; make one with tools/image.py lock") from None


def package(kind, name, lock):
    """The path of a pinned package in the cache; fetched and checked if it is not there yet."""
    pin = lock[kind].get(name)
    if pin is None:
        raise ToolError(f"tools/image.lock has no {name}; run tools/image.py lock")
    place = demo_model.cache_folder() / "packages" / pin["sha256"]
    found = list(place.glob("*"))
    if found:
        return found[0]
    show(f"fetching {name} {pin['version']}")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        folder = pathlib.Path(folder, "new")
        folder.mkdir()
        fetch = fetch_wheel if kind in ("wheels", "extras") else fetch_debian
        fetch(name, pin["version"], folder)
        (path,) = folder.iterdir()
        got = sha256(path)
        if got != pin["sha256"]:
            raise ToolError(
                f"{path.name} is not what tools/image.lock pins: wanted {pin['sha256']}, got {got}"
            )
        if not place.exists():
            os.rename(folder, place)
    return place / path.name


def fetch_debian(name, version, folder):
    """Download a Debian package in this version, as any user. ToolError."""
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", f"{name}={version}"]
    if subprocess.run(command, cwd=folder, capture_output=True).returncode:
        offered = candidate(name) or "nothing (try apt-get update)"
        raise ToolError(
            f"the archive has moved: {name} is pinned at {version}, it offers {offered}; "
            "take that by tools/image.py lock"
        )


def candidate(name):
    """The version of a package that the archive offers, None if it offers none."""
    told = subprocess.run(["apt-cache", "policy", name], capture_output=True, text=True).stdout
    found = re.search(r"Candidate: (\S+)", told)
    return found[1] if found and found[1] != "(none)" else None


def dependency(name):
    """The package that a package is there to name: the first that it depends on. ToolError."""
    told = subprocess.run(["apt-cache", "show", name], capture_output=True, text=True).stdout
    found = re.search(r"^Depends: (\S+)", told, re.MULTILINE)
    if found is None:
        raise ToolError(f"the archive has no {name}; try apt-get update")
    return found[1]


def pip():
    """The command of a pip: of this Python, or of the project's. ToolError."""
    for python in (sys.executable, environment.VENV / "bin" / "python"):
        command = [str(python), "-m", "pip", "--disable-pip-version-check"]
        if (
            os.path.exists(python)
            and not subprocess.run([*command, "--version"], capture_output=True).returncode
        ):
            return command
    raise ToolError("pip is needed: apt-get install python3-pip, or run tools/test.py once")


def target():
    """pip's flags for the guest's Python instead of this one."""
    flags = ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON_VERSION}"]
    flags += [f"--platform={name}" for name in (*PLATFORMS, "any")]
    return flags + [f"--abi={abi}" for abi in ("cp311", "abi3", "none")]


def fetch_wheel(name, version, folder):
    """Download a wheel in this version for the guest. ToolError."""
    command = [*pip(), "download", "--quiet", "--no-deps", *target(), "--dest", folder]
    hint = "" if "+" not in version else " (an index that has it: see PIP_EXTRA_INDEX_URL)"
    rootfs.run(*command, f"{name}=={version}", failure=f"can't fetch {name} {version}{hint}")


def wanted_extras():
    """What the engine needs, as pip reads it: the package's own extra."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", "utf-8")
    return setup["options.extras_require"]["inference"].split()


def write_lock():
    """Pin what the archives offer now, with the hashes of what was fetched."""
    pins = {"debian": {}, "compared": {}, "wheels": {}, "extras": {}}
    names = dict.fromkeys((KERNEL_SOURCE, *rootfs.DEBIAN, *EXTRAS_DEBIAN), "debian")
    names |= dict.fromkeys((COMPARED_SOURCE, dependency(COMPARED_KERNEL)), "compared")
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in names.items():
            version = candidate(name)
            if version is None:
                raise ToolError(f"the archive has no {name}; try apt-get update")
            show(f"pinning {name} {version}")
            place = pathlib.Path(folder, name)
            place.mkdir()
            fetch_debian(name, version, place)
            (path,) = place.iterdir()
            pins[kind][name] = {"version": version, "sha256": sha256(path)}
        for kind, wanted in (("wheels", rootfs.WHEELS), ("extras", wanted_extras())):
            show(f"pinning {' '.join(wanted)}")
            place = pathlib.Path(folder, kind)
            command = [*pip(), "download", "--quiet", *target(), "--dest", place, *wanted]
            rootfs.run(*command, failure="can't fetch the wheels")
            for path in sorted(place.iterdir()):
                name, version = path.name.split("-")[:2]
                name = name.lower().replace("_", "-")
                pins[kind][name] = {"version": version, "sha256": sha256(path)}
    pins["wheels"] = {name: pins["wheels"][name] for name in rootfs.WHEELS}
    measure.write(LOCK, json.dumps(pins, indent=1, sort_keys=True) + "\n")
    done(f"{sum(map(len, pins.values()))} packages pinned in {LOCK}")


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def key(*parts):
    """16 hexadecimal digits drawn from what something is made of."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def code(*modules):
    """The source of these modules: what they make depends on it."""
    return "\0".join(pathlib.Path(module.__file__).read_text("utf-8") for module in modules)


# ---------------------------------------------------------------- kernel


def compiler():
    """The compiler and the linker that are here, in words; the kernel's bits depend on them."""
    words = []
    for program in ("gcc", "ld"):
        told = rootfs.run(program, "--version", failure=f"{program} does not run")
        words.append(told.splitlines()[0])
    return "; ".join(words)


def kernel_source(lock, kind="debian", name=KERNEL_SOURCE):
    """The unpacked source of a kernel: the guest's, or the one to compare with."""
    pin = lock[kind][name]

    def make(folder):
        archive = package(kind, name, lock)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            rootfs.run("dpkg-deb", "-x", archive, place, failure="can't unpack the kernel")
            (packed,) = pathlib.Path(place).rglob("linux-source-*.tar.xz")
            show(f"unpacking {packed.name}")
            folder.mkdir()
            command = (
                "tar",
                "-xf",
                packed,
                "-C",
                folder,
                "--strip-components=1",
                "--no-same-owner",
            )
            rootfs.run(*command, failure="can't unpack the kernel")

    return demo_model.cached(f"linux-{pin['sha256'][:16]}", make)


def build_kernel(variant, lock):
    """The folder of a variant's compiled objects."""
    source = kernel_source(lock)
    name = key(kernel.write_options(kernel.wanted(variant)), source.name, compiler())

    def make(folder):
        done(f"kernel: compiling {lock['debian'][KERNEL_SOURCE]['version']} ({variant}), once")
        kernel.compile_objects(source, folder, variant, show)

    objects = demo_model.cached(f"kernel-{variant}-{name}", make)
    done(f"kernel: {objects}")
    return objects


# ---------------------------------------------------------------- root file system


def build_rootfs(overlay, lock, variant="tcp"):
    """The folder that holds `root`: the root file system, but for the manifest of an image."""
    debian = [package("debian", name, lock) for name in rootfs.DEBIAN]
    wheels = [package("wheels", name, lock) for name in rootfs.WHEELS]
    own = [ROOT / name for name in rootfs.MODULES]
    added = [file for file in (rootfs.BOARD, overlay) if file is not None]
    own += sorted(path for folder in added for path in folder.rglob("*") if path.is_file())
    hashes = [f"{path.name} {sha256(path)}" for path in (*debian, *wheels, *own)]
    settings = "ENCLAVE_BIND=vsock\n" if variant == "vsock" else ""

    def make(folder):
        show("rootfs: unpacking")
        folder.mkdir()
        unpacked, root = folder / "unpacked", folder / "root"
        rootfs.unpack(debian, wheels, unpacked)
        rootfs.fill(unpacked, root, measure.MOUNT_POINTS)
        for path in sorted(overlay.rglob("*")) if overlay else ():
            if path.is_file():
                rootfs.put(root / path.relative_to(overlay), path.read_bytes())
        with open(root / SETTINGS, "a", encoding="utf-8") as file:
            file.write(settings)
        rootfs.compile_python(unpacked, root)
        shutil.rmtree(unpacked)

    folder = demo_model.cached(f"rootfs-{key(code(rootfs), settings, *hashes)}", make)
    facts = rootfs.facts(folder / "root")
    done(f"rootfs: {facts['files']} files, {facts['elf']} of them ELF, {facts['bytes']:,} bytes")
    return folder


# ---------------------------------------------------------------- extras


def build_extras(lock):
    """The folder with `extras.squashfs`, and `verity`: its size in blocks and its root hash."""
    debian = [package("debian", name, lock) for name in EXTRAS_DEBIAN]
    base = [package("debian", name, lock) for name in rootfs.DEBIAN]
    wheels = [package("extras", name, lock) for name in sorted(lock["extras"])]
    hashes = [f"{path.name} {sha256(path)}" for path in (*base, *debian, *wheels)]

    def make(folder):
        folder.mkdir()
        unpacked, root = folder / "unpacked", folder / "root"
        show(f"extras: unpacking {len(wheels)} wheels")
        rootfs.unpack([*base, *debian], wheels, unpacked)
        rootfs.fill_extras(unpacked, root)
        show("extras: compiling Python modules")
        rootfs.compile_python(unpacked, root, f"/{rootfs.EXTRAS}", is_strict=False)
        shutil.rmtree(unpacked)
        show("extras: squashfs")
        image = folder / "extras.squashfs"
        command = ["mksquashfs", root, image, "-noappend", "-all-root", "-no-xattrs", "-no-exports"]
        command += ["-comp", "zstd", "-Xcompression-level", "9"]
        command += ["-mkfs-time", rootfs.EPOCH, "-all-time", rootfs.EPOCH, "-no-progress"]
        rootfs.run(*command, failure="can't make the squashfs")
        shutil.rmtree(root)
        (folder / "verity").write_text(json.dumps(add_verity(image)), "ascii")

    folder = demo_model.cached(f"extras-{key(code(rootfs), EXTRAS_DEBIAN, *hashes)}", make)
    image = folder / "extras.squashfs"
    done(f"extras: {len(wheels)} wheels, {image.stat().st_size:,} bytes")
    return folder


def add_verity(image):
    """Append a dm-verity hash tree to a file; {"blocks", "root_hash"} of what it covers."""
    size = image.stat().st_size
    blocks = -(-size // VERITY_BLOCK)
    os.truncate(image, blocks * VERITY_BLOCK)
    command = ["veritysetup", "format", "--no-superblock", f"--salt={SALT}"]
    command += [f"--data-blocks={blocks}", f"--hash-offset={blocks * VERITY_BLOCK}"]
    told = rootfs.run(*command, image, image, failure="veritysetup failed")
    return {"blocks": blocks, "root_hash": re.search(r"Root hash:\s+([0-9a-f]{64})", told)[1]}


def command_line(extras):
    """The kernel's command line, with the extras' dm-verity device if there are extras."""
    text = COMMAND_LINE.read_text("ascii").strip()
    if extras is not None:
        verity = json.loads((extras / "verity").read_text("ascii"))
        blocks, disk = verity["blocks"], EXTRAS_DISK
        sectors = blocks * VERITY_BLOCK // SECTOR
        table = f"0 {sectors} verity 1 {disk} {disk} {VERITY_BLOCK} {VERITY_BLOCK} {blocks} "
        table += f"{blocks} sha256 {verity['root_hash']} {SALT}"
        text = f'dm-mod.create="extras,,,ro,{table}" {text}'
    if len(text) >= kernel.COMMAND_LINE_SIZE:
        raise ToolError("the command line is too long for the kernel")
    return text


# ---------------------------------------------------------------- image


def build_image(variant, overlay, extras, output, lock, with_microvm=False):
    """Link, write the disk and the reference values into the output folder."""
    objects, files = build_kernel(variant, lock), build_rootfs(overlay, lock, variant)
    text, source = command_line(extras), kernel_source(lock)
    programs = code(kernel, measure, pcr, rootfs, sys.modules[__name__])
    options = kernel.wanted(variant) | {"CMDLINE": kernel.quoted(text)}
    options |= {"INITRAMFS_SOURCE": kernel.quoted("../rootfs.cpio.zst")}
    linked = kernel.write_options(options)
    name = key(objects.name, files.name, linked, programs, with_microvm)

    def make(folder):
        folder.mkdir()
        release = kernel.release(objects)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            build, root = pathlib.Path(place, "build"), pathlib.Path(place, "root")
            archive = pathlib.Path(place, "rootfs.cpio.zst")
            shutil.copytree(files / "root", root, symlinks=True)
            manifest = mp.encode_json(measure.root_manifest(root, release, text))
            rootfs.put(root / measure.MANIFEST, manifest)
            show("image: compressing the root file system")
            rootfs.write_initramfs(root, archive)
            program = kernel.link(source, objects, build, options, show)
            shutil.copy(program, folder / "muenclave.efi")
            shutil.copy(build / ".config", folder / "kernel.config")
            lines = kernel.compiled_lines(source, build)
            if with_microvm:
                small = kernel.relink(source, build, options, show)
                shutil.copy(small, folder / "microvm.bin")
                (folder / "microvm.cmdline").write_text(" ".join([*MICROVM_OPTIONS, text]) + "\n")
            facts = {"root": rootfs.facts(root), "initramfs_bytes": archive.stat().st_size}
        write_esp(folder / "muenclave.efi", folder / "esp.img")
        (folder / "manifest.json").write_bytes(manifest)
        pcrs = pcr.predict((folder / "muenclave.efi").read_bytes())
        facts |= {"kernel": release, "variant": variant, "compiler": compiler(), "compiled": lines}
        facts |= {"bytes": (folder / "muenclave.efi").stat().st_size, "command_line": text}
        if extras is not None:
            facts["extras_bytes"] = (extras / "extras.squashfs").stat().st_size
        facts["packages"] = {
            kind: {name: pin["version"] for name, pin in sorted(pins.items())}
            for kind, pins in lock.items()
            if kind in ("debian", "wheels") or kind == "extras" and extras is not None
        }
        values = {"version": 1, "kind": "tpm2", "root": "fixture", "withdrawn": []}
        values |= {"measurement": hashlib.sha256(manifest).hexdigest(), "image": facts}
        values["pcrs"] = {str(index): value.hex() for index, value in sorted(pcrs.items())}
        write_json(folder / "reference.json", values)

    folder = demo_model.cached(f"image-{variant}-{name}", make)
    output.mkdir(parents=True, exist_ok=True)
    values = with_enrolment(json.loads((folder / "reference.json").read_text("utf-8")), output)
    for path in sorted(folder.iterdir()):
        if path.name == "reference.json":
            write_json(output / path.name, values)
        else:
            replace(path, output / path.name)
    if extras is not None:
        replace(extras / "extras.squashfs", output / "extras.squashfs")
    size = (output / "muenclave.efi").stat().st_size
    done(f"image: {output / 'muenclave.efi'}, {size:,} bytes; {output / 'reference.json'}")
    return output


def with_enrolment(values, output):
    """An image's reference values with what an owner has added to those that are in the folder.

    The TPM's key and the shape's PCRs are not the image's, and what was withdrawn stays withdrawn.
    An event log is of a boot of one image.
    """
    withdrawn = measure.read_withdrawn(output / "reference.json")
    if not (output / "reference.json").exists():
        return values
    old = json.loads((output / "reference.json").read_text("utf-8"))
    pcrs = old.get("pcrs", {}) | values["pcrs"]
    kept = {"pcrs": pcrs, "withdrawn": withdrawn}
    if {"root", "attestation_key"} <= old.keys():
        kept |= {"root": old["root"], "attestation_key": old["attestation_key"]}
    if "event_log" in old and pcrs == old["pcrs"]:
        kept["event_log"] = old["event_log"]
    return values | kept


def write_json(path, value):
    """A file of JSON that is the same for the same value."""
    measure.write(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def replace(source, path):
    """Put a copy of a file in place, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        os.replace(shutil.copy(source, folder), path)


def write_esp(program, path):
    """A FAT disk, without partitions, that boots one EFI program; the same bits each time."""
    size = max(SMALLEST_FAT32, program.stat().st_size * 102 // 100 + ESP_SLACK)
    with open(path, "wb") as file:
        file.truncate(size // SECTOR * SECTOR)
    fixed = {"PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin", "TZ": "UTC"}
    fixed |= {"SOURCE_DATE_EPOCH": str(rootfs.EPOCH), "MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C"}
    format_it = ("mkfs.vfat", "--invariant", "-F", "32", "-s", "1", "-i", ESP_ID, "-n", ESP_NAME)
    rootfs.run(*format_it, path, failure="can't make the disk", env=fixed)
    folders = [parent for parent in reversed(pathlib.PurePath(BOOT_FILE).parents) if parent.name]
    for folder in folders:
        rootfs.run("mmd", "-i", path, f"::{folder}", failure="can't fill the disk", env=fixed)
    os.utime(program, (rootfs.EPOCH, rootfs.EPOCH))
    copy = ("mcopy", "-m", "-i", path, program, f"::{BOOT_FILE}")
    rootfs.run(*copy, failure="can't fill the disk", env=fixed)


# ---------------------------------------------------------------- command line


def clean(output):
    """Remove what was built and its caches; fetched packages stay."""
    names = "linux-* kernel-* rootfs-* extras-* image-*".split()
    for pattern in names:
        for path in demo_model.cache_folder().glob(pattern):
            if path.is_dir():
                show(f"removing {path}")
                shutil.rmtree(path)
            else:
                path.unlink()
    if output.exists():
        shutil.rmtree(output)
    done("clean")


def prepare():
    """Have what building needs on this machine, or say what is missing. ToolError."""
    os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    environment.install_system(PROGRAMS, done)
    missing = environment.missing_packages(PROGRAMS)
    if missing:
        raise ToolError(f"not installed, and needed: apt-get install {' '.join(missing)}")


def main(argv=None):
    """The command line. Returns the exit status."""
    words = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="image.py", description=words, epilog="See its source.")
    steps = ("kernel", "rootfs", "extras", "image", "all", "lock", "clean")
    parser.add_argument("step", choices=steps)
    parser.add_argument("--variant", choices=kernel.VARIANTS, default="tcp", help="of the kernel")
    parser.add_argument("--overlay", type=pathlib.Path, metavar="DIR", help="added to the root")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, metavar="DIR")
    parser.add_argument("--microvm", action="store_true", help="image: also a kernel for -kernel")
    parser.add_argument("--no-extras", action="store_true", help="image: without a disk for torch")
    flags = parser.parse_args(argv)
    began = time.monotonic()
    try:
        if flags.overlay is not None and not flags.overlay.is_dir():
            raise ToolError(f"--overlay: {flags.overlay} is no directory")
        if flags.step == "clean":
            clean(flags.output)
            return 0
        prepare()
        if flags.step == "lock":
            write_lock()
            return 0
        lock = read_lock()
        if flags.step == "kernel":
            build_kernel(flags.variant, lock)
        elif flags.step == "rootfs":
            build_rootfs(flags.overlay, lock, flags.variant)
        elif flags.step == "extras":
            build_extras(lock)
        else:
            extras = None if flags.no_extras else build_extras(lock)
            where = (flags.output, lock, flags.microvm)
            build_image(flags.variant, flags.overlay, extras, *where)
    except (ToolError, pcr.PcrError, measure.MeasureError) as error:
        print(f"image: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"image: error: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nimage: ended", file=sys.stderr)
        return 130
    done(f"{time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
