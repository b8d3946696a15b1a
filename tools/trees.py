"""The files of a target, whatever holds them, read without unpacking or running anything.

A tree is {path from its root: Entry}, of a directory, a squashfs, a cpio archive (also the one that
is built into a Linux kernel), a tar archive, or the image of a container: its layers, one over the
other, with their whiteouts. Used by tools/attack_surface.py.
"""

import bz2
import collections
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import pathlib
import posixpath
import re
import shutil
import stat
import struct
import subprocess
import tarfile
import tempfile
import zlib

from environment import ToolError

# kind: one of KINDS. mode: permission bits. target: of a symbolic link. node: hashable, the same
# for all hard links of a file. capability: whether it has file capabilities. open: a function that
# gives a seekable binary file.
Entry = collections.namedtuple("Entry", "kind mode size target node capability open")
KINDS = FILE, FOLDER, LINK, OTHER = "file", "folder", "link", "other"
CAPABILITY = "security.capability"  # extended attribute, capabilities(7)
MAGICS = {
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x02\x21\x4c\x18": "lz4",
}
PROGRAMS = {"zstd": "zstd", "lz4": "lz4", "sqfs2tar": "squashfs-tools-ng", "skopeo": "skopeo"}
CPIO = (b"070701", b"070702")
CPIO_HEADER = 110  # bytes
WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"  # OCI image specification, layer.md
LAYOUT, SAVED = {"oci-layout", "index.json"}, "manifest.json"  # what tells an image
TRANSPORTS = ("docker://", "docker-daemon:", "containers-storage:", "oci:", "oci-archive:")
LINKS = 40  # that Linux follows in one path
HEAD = 1 << 10  # bytes that tell what a file is
TAKEN = "a directory, a squashfs, a cpio or tar archive, a kernel with an initramfs, the archive"
TAKEN += " or name of a container's image, HOST:PORT, or a list of packages"


def read_tree(what, stack):
    """The tree of a path or of an image's name; what it opens ends with `stack`. ToolError."""
    path = pathlib.Path(what)
    if what.startswith(TRANSPORTS) or not os.path.lexists(path):
        return read_named_image(what, stack)
    if path.is_dir():
        if all((path / name).is_file() for name in LAYOUT):
            return read_image(what, read_layout, folder_blob(path), stack)
        return read_folder(path)
    if not path.is_file():
        raise ToolError(f"{what} is neither a file nor a directory")
    return read_file(what, path, stack)


def read_file(what, path, stack):
    """The tree of a file, by what it begins with. ToolError."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if compression(head):
        path = decompressed(what, path, stack)
        with open(path, "rb") as file:
            head = file.read(HEAD)
    if head.startswith(b"hsqs"):
        return read_squashfs(what, path, stack)
    if head.startswith(CPIO):
        return read_cpio(what, path.read_bytes())
    if head[:2] == b"MZ" and head[0x202:0x206] == b"HdrS":
        return read_kernel(what, path.read_bytes())
    if head[257:262] == b"ustar":
        return read_tar(what, path, stack)
    raise ToolError(f"{what} is nothing that can be looked into: name {TAKEN}")


def resolve(tree, path):
    """The path that a path of a tree leads to, whether or not it is there; None if it never ends.

    Folders that an archive does not name are folders all the same.
    """
    parts, place, followed = path.split("/")[::-1], "", 0
    while parts:
        part = parts.pop()
        if part == "..":
            place = posixpath.dirname(place)
        elif part not in ("", "."):
            here = posixpath.join(place, part)
            entry = tree.get(here)
            if entry is None or entry.kind != LINK:
                place = here
                continue
            followed += 1
            if followed > LINKS:
                return None
            if entry.target.startswith("/"):
                place = ""
            parts += entry.target.split("/")[::-1]
    return place


def unpacked(tree, path):
    """Where a path of an archive would be unpacked in a tree: through the links to its folder."""
    folder, base = posixpath.split(normal(path))
    return posixpath.join(resolve(tree, folder) or folder, base) if folder else base


def find_program(name):
    """The path of a program. ToolError says how to get it."""
    path = shutil.which(name)
    if path is None:
        raise ToolError(f"{name} is not installed: apt-get install {PROGRAMS[name]}")
    return path


def temporary(stack):
    """A folder that goes with `stack`."""
    return pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="muenclave-")))


# ---------------------------------------------------------------- directories


def read_folder(root):
    """The tree of a directory; what is mounted below it does not belong to it. OSError.

    What goes while it is read, as on a running system, is left out, or empty.
    """
    tree, device = {}, root.stat().st_dev

    def fail(error):
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, folders, names in os.walk(root, onerror=fail):
        kept = []
        for name in sorted(folders + names):
            place = os.path.join(folder, name)
            with contextlib.suppress(FileNotFoundError):
                facts = os.lstat(place)
                if facts.st_dev == device:
                    tree[os.path.relpath(place, root)] = folder_entry(place, facts)
                    if stat.S_ISDIR(facts.st_mode):
                        kept.append(name)
        folders[:] = kept
    return tree


def folder_entry(place, facts):
    """The entry of what lies at a place of this machine."""
    kind = kind_of(facts.st_mode)
    target = os.readlink(place) if kind == LINK else None
    capability = kind == FILE and CAPABILITY in os.listxattr(place, follow_symlinks=False)
    node = (facts.st_dev, facts.st_ino)
    mode = stat.S_IMODE(facts.st_mode)

    def opened():
        try:
            return open(place, "rb")
        except FileNotFoundError:
            return io.BytesIO()

    return Entry(kind, mode, facts.st_size, target, node, capability, opened)


def kind_of(mode):
    """The kind of what has this st_mode."""
    kinds = {stat.S_IFREG: FILE, stat.S_IFDIR: FOLDER, stat.S_IFLNK: LINK}
    return kinds.get(stat.S_IFMT(mode), OTHER)


# ---------------------------------------------------------------- compression


def compression(head):
    """How a file that begins with these bytes is compressed; None if it is not."""
    return next((name for magic, name in MAGICS.items() if head.startswith(magic)), None)


def decompressed(what, path, stack):
    """The path of a temporary copy of a file, decompressed. ToolError."""
    copy = temporary(stack) / "data"
    with open(path, "rb", buffering=0) as file, open(copy, "wb") as out:
        name = compression(file.read(HEAD))
        file.seek(0)
        if name in ("zstd", "lz4"):
            command = [find_program(name), "-dcq"]
            done = subprocess.run(command, stdin=file, stdout=out, stderr=subprocess.PIPE)
            if done.returncode:
                said = done.stderr.decode(errors="replace").strip().splitlines() or ["failed"]
                raise ToolError(f"{what}: {name}: {said[-1]}")
        else:
            opened = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}[name](file)
            try:
                shutil.copyfileobj(opened, out, 1 << 20)
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, ValueError) as error:
                raise ToolError(f"{what}: {name}: {error}") from None
    return copy


def decompressed_bytes(data):
    """What compressed bytes hold, whatever comes after them; empty if they are broken. ToolError"""
    name = compression(data)
    if name in ("zstd", "lz4"):
        command = [find_program(name), "-dcq"]
        return subprocess.run(command, input=data, capture_output=True).stdout
    makers = {"gzip": lambda: zlib.decompressobj(31), "xz": lzma.LZMADecompressor}
    try:
        return makers.get(name, bz2.BZ2Decompressor)().decompress(data)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        return b""


# ---------------------------------------------------------------- squashfs, tar


def read_squashfs(what, path, stack):
    """The tree of a squashfs; its files lie in a temporary tar archive as long as `stack` does."""
    program, copy = find_program("sqfs2tar"), temporary(stack) / "data"
    with open(copy, "wb") as out:
        done = subprocess.run([program, str(path)], stdout=out, stderr=subprocess.PIPE)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["failed"]
        raise ToolError(f"{what}: sqfs2tar: {said[-1]}")
    return add_layer(what, {}, copy, stack)


def read_tar(what, path, stack):
    """The tree of a tar archive: of the image in it, if it is one of a container. ToolError."""
    archive = open_tar(what, path, stack)
    names = {normal(member.name): member for member in members(what, archive)}

    def blob(name):
        member = names.get(normal(name))
        while member is not None and (member.issym() or member.islnk()):
            folder = posixpath.dirname(member.name) if member.issym() else ""
            member = names.get(normal(posixpath.join(folder, member.linkname)))
        file = archive.extractfile(member) if member and member.isfile() else None
        if file is None:
            raise ToolError(f"{what}: {name} is missing in this image")
        return file

    if LAYOUT <= names.keys():
        return read_image(what, read_layout, blob, stack)
    if SAVED in names:
        return read_image(what, read_saved, blob, stack)
    return add_layer(what, {}, path, stack)


def open_tar(what, path, stack):
    """A tar archive, open. ToolError."""
    try:
        return stack.enter_context(tarfile.open(path, "r:", errors="surrogateescape"))
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ToolError(f"{what}: tar: {error}") from None


def members(what, archive):
    """All that a tar archive holds, to its end, which tarfile does not insist on. ToolError."""
    try:
        found = archive.getmembers()
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ToolError(f"{what}: tar: {error}") from None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise ToolError(f"{what}: tar: the archive is damaged, or ends too early")
    return found


def normal(name):
    """A path of an archive, from its root."""
    return posixpath.normpath("/" + name).lstrip("/")


def add_layer(what, tree, path, stack):
    """A tree with a tar archive laid over it. ToolError."""
    archive = open_tar(what, path, stack)
    found = [(normal(member.name), member) for member in members(what, archive)]
    for name, _ in found:  # they hide what is below, wherever in the layer they stand
        folder, base = posixpath.split(unpacked(tree, name))
        if base == OPAQUE:
            remove(tree, folder, itself=False)
        elif base.startswith(WHITEOUT):
            remove(tree, posixpath.join(folder, base[len(WHITEOUT) :]))
    for name, member in found:
        if not name or posixpath.basename(name).startswith(WHITEOUT):
            continue
        name = unpacked(tree, name)
        entry = tar_entry(archive, member)
        if member.islnk():
            entry = tree.get(unpacked(tree, member.linkname))
            if entry is None:
                raise ToolError(f"{what}: {name} links to {member.linkname}, which is missing")
        if entry.kind != FOLDER:
            remove(tree, name)
        tree[name] = entry
    return tree


def remove(tree, path, itself=True):
    """Take a path out of a tree, with all below it."""
    entry = tree.get(path)
    if path == "" or entry is not None and entry.kind == FOLDER:
        inside = f"{path}/" if path else ""
        for name in [name for name in tree if name.startswith(inside)]:
            del tree[name]
    if itself:
        tree.pop(path, None)


def tar_entry(archive, member):
    """The entry of a member of a tar archive."""
    kind = OTHER
    if member.isfile():
        kind = FILE
    elif member.isdir():
        kind = FOLDER
    elif member.issym():
        kind = LINK
    capability = f"SCHILY.xattr.{CAPABILITY}" in member.pax_headers
    node, size = (id(archive), member.offset), member.size if kind == FILE else 0
    target = member.linkname if kind == LINK else None

    def opened():
        return archive.extractfile(member)

    return Entry(kind, member.mode & 0o7777, size, target, node, capability, opened)


# ---------------------------------------------------------------- images of containers


def read_named_image(what, stack):
    """The tree of an image that an engine or a registry has. ToolError."""
    if what.startswith(("/", ".")):
        raise ToolError(f"there is no {what}")
    copy = temporary(stack) / "image.tar"
    names = [what] if what.startswith(TRANSPORTS) else [f"docker-daemon:{what}", f"docker://{what}"]
    if not shutil.which("skopeo"):
        hint = "to fetch an image by its name: apt-get install skopeo"
        raise ToolError(f"there is no {what}, and skopeo is not installed: {hint}")
    said = []
    for name in names:
        done = subprocess.run(
            ["skopeo", "--insecure-policy", "copy", "--quiet", name, f"docker-archive:{copy}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return read_tar(what, copy, stack)
        said.append(reason(done.stderr))
    raise ToolError(f"there is no file {what}, and no image: {'; '.join(said)}")


def reason(text):
    """What skopeo says went wrong, in a line."""
    found = re.search(r'msg="((?:[^"\\]|\\.)*)"', text)
    return " ".join((found[1] if found else text.strip() or "skopeo failed").split())


def is_image(path):
    """Whether a file is a tar archive of a container's image."""
    try:
        with tarfile.open(path, "r:") as archive:
            names = {normal(name) for name in archive.getnames()}
    except (OSError, tarfile.TarError, ValueError):
        return False
    return SAVED in names or names >= LAYOUT


def read_image(what, read, blob, stack):
    """The tree of an image by the function that reads its kind. ToolError."""
    try:
        return read(what, blob, stack)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ToolError(f"{what}: the image's own description is not whole: {error!r}") from None


def folder_blob(path):
    """The function that opens a file of an image's directory."""

    def blob(name):
        try:
            return open(path / normal(name), "rb")
        except OSError:
            raise ToolError(f"{path}: {name} is missing in this image") from None

    return blob


def read_layout(what, blob, stack):
    """The tree of an OCI image layout (image-layout.md); of several images, Linux on amd64's."""
    index = read_json(what, blob, "index.json")
    for _ in range(8):  # an index may name another
        chosen = choose_manifest(what, index)
        index = read_json(what, blob, blob_name(what, chosen), chosen)
        if "manifests" not in index:
            break
    tree = {}
    for layer in index.get("layers", ()):
        path = copy_blob(what, blob, blob_name(what, layer), stack, layer["digest"])
        add_layer(what, tree, path, stack)
    return tree


def choose_manifest(what, index):
    """The entry of an index that is meant. ToolError."""
    found = index.get("manifests") or []
    platforms = [entry.get("platform", {}) for entry in found]
    wanted = [
        entry
        for entry, platform in zip(found, platforms)
        if (platform.get("os", "linux"), platform.get("architecture", "amd64"))
        == ("linux", "amd64")
    ]
    if len(found) != 1 and len(wanted) != 1:
        raise ToolError(f"{what} holds {len(wanted)} images for Linux on amd64: name one of them")
    return (wanted or found)[0]


def blob_name(what, entry):
    """Where a layout keeps what an entry names by its digest. ToolError."""
    digest = str(entry.get("digest"))
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise ToolError(f"{what}: {digest} is no SHA-256 digest")
    return "blobs/" + digest.replace(":", "/")


def read_saved(what, blob, stack):
    """The tree of what `docker save` writes: manifest.json with one image. ToolError."""
    images = read_json(what, blob, SAVED)
    if not isinstance(images, list) or len(images) != 1:
        raise ToolError(f"{what} is to hold one image: save one")
    tree = {}
    for name in images[0].get("Layers", ()):
        add_layer(what, tree, copy_blob(what, blob, name, stack), stack)
    return tree


def read_json(what, blob, name, entry=None):
    """A JSON file of an image, checked against the digest in the entry that names it. ToolError."""
    with blob(name) as file:
        data = file.read()
    if entry is not None:
        check_digest(what, name, hashlib.sha256(data).hexdigest(), entry["digest"])
    try:
        return json.loads(data)
    except ValueError:
        raise ToolError(f"{what}: {name} is no JSON") from None


def copy_blob(what, blob, name, stack, digest=None):
    """The path of a temporary copy of a layer, checked and decompressed. ToolError."""
    copy, seen = temporary(stack) / "layer", hashlib.sha256()
    with blob(name) as file, open(copy, "wb") as out:
        while block := file.read(1 << 20):
            seen.update(block)
            out.write(block)
    if digest is not None:
        check_digest(what, name, seen.hexdigest(), digest)
    with open(copy, "rb") as file:
        head = file.read(HEAD)
    return decompressed(f"{what}: {name}", copy, stack) if compression(head) else copy


def check_digest(what, name, got, wanted):
    """Refuse a part of an image that is not what names it says. ToolError."""
    if wanted != f"sha256:{got}":
        raise ToolError(f"{what}: {name} is damaged: its SHA-256 is {got}")


# ---------------------------------------------------------------- cpio, kernels


def read_cpio(what, data):
    """The tree of an initramfs: cpio archives, one after the other, of which any is compressed.

    Format: Linux, Documentation/driver-api/early-userspace/buffer-format.rst. ToolError.
    """
    tree, at = {}, 0
    while at < len(data):
        if data[at] == 0:
            at += 1
        elif data[at : at + 6] in CPIO:
            at = add_archive(what, tree, data, at)
        elif compression(data[at : at + 8]):
            inner = decompressed_bytes(data[at:])
            if not inner.startswith(CPIO):
                raise ToolError(f"{what}: at byte {at} it is compressed, but not a cpio archive")
            return tree | read_cpio(what, inner)
        else:
            raise ToolError(f"{what}: at byte {at} it is no cpio archive")
    return tree


def add_archive(what, tree, data, at):
    """Add a cpio archive that begins at a byte of data to a tree; where it ends. ToolError."""
    start, linked = at, {}
    while True:
        header = data[at : at + CPIO_HEADER]
        try:
            fields = [int(header[n : n + 8], 16) for n in range(6, CPIO_HEADER, 8)]
        except ValueError:
            fields = []
        if header[:6] not in CPIO or len(fields) != 13:
            raise ToolError(f"{what}: at byte {at} there is no entry of a cpio archive")
        inode, mode, _, _, links, _, size, major, minor, _, _, name_size, _ = fields
        name = os.fsdecode(data[at + CPIO_HEADER : at + CPIO_HEADER + name_size - 1])
        begin = at + -(-(CPIO_HEADER + name_size) // 4) * 4
        at = begin + -(-size // 4) * 4
        if begin + size > len(data) or name_size < 1:
            raise ToolError(f"{what}: the cpio archive ends too early")
        if name == "TRAILER!!!":
            return at
        name = unpacked(tree, name)
        if not name:
            continue
        node = (start, major, minor, inode) if links > 1 else (start, begin)
        entry = cpio_entry(mode, node, data[begin : begin + size])
        if links > 1 and entry.kind == FILE:
            names = linked.setdefault(node, [])
            names.append(name)
            entry = entry if size else tree.get(names[0], entry)  # one of them has the content
            tree |= dict.fromkeys(names, entry)
        tree[name] = entry


def cpio_entry(mode, node, content):
    """The entry of what a cpio archive holds; extended attributes it can't hold."""
    kind = kind_of(mode)
    target = os.fsdecode(content) if kind == LINK else None
    size = len(content) if kind == FILE else 0

    def opened():
        return io.BytesIO(content)

    return Entry(kind, stat.S_IMODE(mode), size, target, node, False, opened)


def read_kernel(what, data):
    """The tree of the initramfs that is built into a Linux kernel for x86 (bzImage). ToolError.

    Its compressed part is where the boot protocol says (Documentation/arch/x86/boot.rst, 2.08).
    """
    if len(data) < 0x250:
        raise ToolError(f"{what}: the kernel ends too early")
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (data[0x1F1] + 1) * 512 + offset
    program = decompressed_bytes(data[start : start + length])
    best = {}
    for magic in (*CPIO[:1], *MAGICS):
        for found in re.finditer(re.escape(magic), program):
            inner = program[found.start() :]
            if magic not in CPIO:
                inner = decompressed_bytes(inner)
            tree = {}
            try:
                if inner.startswith(CPIO):
                    add_archive(what, tree, inner, 0)
            except ToolError:
                continue
            best = max(best, tree, key=len)
    if not best:
        raise ToolError(f"{what}: no initramfs is built into this kernel")
    return best
