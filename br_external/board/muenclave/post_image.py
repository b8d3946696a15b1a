#!/usr/bin/env python3
"""Check what Buildroot made, and write what a boot and an owner need: post_image.py IMAGES

From rootfs.cpio, bzImage, kernel.config and kernel.release in that folder: root/ (what
tools/measure.py measures, with command-line), muenclave.efi, esp.img, manifest.json and
reference.json (what tools/vm.py runs and verifiers expect), named as tools/image.py names them.
The root is measured once more, as it was packed: its manifest has to say the same.
"""

import hashlib
import os
import pathlib
import shutil
import stat
import struct
import sys

CHECKOUT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(CHECKOUT))
sys.path.insert(0, str(CHECKOUT / "tools"))

import image  # noqa: E402
import kernel_config  # noqa: E402
import measure  # noqa: E402
import pcr  # noqa: E402
import rootfs  # noqa: E402
from environment import ToolError  # noqa: E402

import muprotocol as mp  # noqa: E402

MAGIC, FIELDS = b"070701", 13
KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
SIGNED = b"~Module signature appended~\n"  # Documentation/admin-guide/module-signing.rst
LOADERS = tuple(f"{folder}/ld-linux-x86-64.so.2" for folder in ("usr/lib", "usr/lib64"))
PROGRAMS = ("usr/bin/python3.", *LOADERS)  # what may be executed


def read_cpio(file):
    """Yield (name, mode, uid, gid, content) of a newc archive's entries. ToolError.

    Format: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    while True:
        magic, numbers = file.read(len(MAGIC)), file.read(8 * FIELDS)
        if magic != MAGIC or len(numbers) < 8 * FIELDS:
            raise ToolError(f"rootfs.cpio: no entry where one should begin, near {file.tell()}")
        words = struct.unpack("8s" * FIELDS, numbers)
        _, mode, uid, gid, _, _, size, _, _, _, _, length, _ = (int(word, 16) for word in words)
        name = file.read(length).rstrip(b"\0").decode()
        file.read(-file.tell() % 4)
        if name == "TRAILER!!!":
            return
        content = file.read(size)
        if len(content) < size:
            raise ToolError(f"rootfs.cpio: {name} is cut off")
        file.read(-size % 4)
        yield name.removeprefix("./"), mode, uid, gid, content


def faults(entries):
    """What an archive (entries of read_cpio) holds that no guest may have, one line each."""
    wrong = []
    for name, mode, uid, gid, content in entries:
        if stat.S_IFMT(mode) not in KINDS:
            wrong.append(f"{name}: neither file, folder nor link")
        elif (uid, gid) != (0, 0):
            wrong.append(f"{name}: owner {uid}:{gid}, not 0:0")
        elif stat.S_ISLNK(mode):
            continue
        elif mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IWGRP | stat.S_IWOTH):
            wrong.append(f"{name}: mode {stat.S_IMODE(mode):04o}")
        elif stat.S_ISREG(mode) and mode & 0o111 and not name.startswith(PROGRAMS):
            wrong.append(f"{name}: can be executed")
        elif name.endswith(".ko") and not content.endswith(SIGNED):
            wrong.append(f"{name}: not signed")
    return wrong


def unpack(entries, root):
    """Write the archive's entries below a new folder, with their modes. ToolError."""
    for name, mode, _, _, content in entries:
        path = root / name
        if ".." in path.parts or path.is_absolute() and root not in (path, *path.parents):
            raise ToolError(f"rootfs.cpio: the name {name} leads out")
        if stat.S_ISDIR(mode):
            path.mkdir(parents=True, exist_ok=True)
        elif stat.S_ISLNK(mode):
            path.symlink_to(os.fsdecode(content))
            continue
        else:
            path.write_bytes(content)
        path.chmod(stat.S_IMODE(mode))


def write_product(images):
    """Write the files named above into the images folder (a pathlib.Path). ToolError, OSError."""
    archive = images / "rootfs.cpio"
    with open(archive, "rb") as file:
        entries = list(read_cpio(file))
    wrong = faults(entries)
    if wrong:
        raise ToolError(f"rootfs.cpio: {'; '.join(wrong)}")
    root = images / "root"
    if root.exists():
        shutil.rmtree(root)
    unpack(entries, root)
    release, command_line, _ = kernel_config.read_facts(images)
    manifest = mp.encode_json(measure.root_manifest(root, release, command_line))
    if (root / measure.MANIFEST).read_bytes() != manifest:
        raise ToolError(f"rootfs.cpio: {measure.MANIFEST} does not say what is there; build anew")
    shutil.copy(images / "bzImage", images / "muenclave.efi")
    program = (images / "muenclave.efi").read_bytes()
    pcrs = pcr.predict(program)
    image.write_esp(images / "muenclave.efi", images / "esp.img")
    facts = {"kernel": release, "command_line": command_line, "bytes": len(program)}
    facts |= {"root": rootfs.facts(root), "initramfs_bytes": archive.stat().st_size}
    facts["packages"] = {"buildroot": os.environ.get("BR2_VERSION", "unknown")}
    values = {"version": 1, "kind": "tpm2", "root": "fixture", "withdrawn": [], "image": facts}
    values["measurement"] = hashlib.sha256(manifest).hexdigest()
    values["pcrs"] = {str(index): value.hex() for index, value in sorted(pcrs.items())}
    measure.write(images / "command-line", command_line + "\n")
    measure.write(images / "manifest.json", manifest.decode())
    image.write_json(images / "reference.json", image.with_enrolment(values, images))


def main(arguments):
    """The command line. Returns the exit status."""
    if not arguments:
        print("post_image: error: which folder? post_image.py IMAGES", file=sys.stderr)
        return 2
    try:
        write_product(pathlib.Path(arguments[0]))
    except (ToolError, pcr.PcrError, measure.MeasureError) as error:
        print(f"post_image: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"post_image: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
