"""Write the reference values that an owner expects an enclave to prove.

    python3 tools/measure.py --output reference.json                 a run of this checkout
    python3 tools/measure.py --root DIR --kernel RELEASE --command-line TEXT   a guest's root

The measurement is the SHA-256 of a manifest (muprotocol.manifest_digest); --manifest prints that
manifest instead, so that two can be compared. A local run counts the packages of the Python that
runs it: name that one by --python.
"""

import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MOUNT_POINTS = ("dev", "proc", "sys", "tmp", "run", "usr/lib/muenclave/extras")
MANIFEST = "etc/muenclave.manifest"  # in a guest's root: what was measured, but for itself
MODULES = ("muenclave.py", "muprotocol.py")
PYTHON = """
import importlib.metadata, json, platform
found = importlib.metadata.distributions()
packages = {str(d.metadata["Name"]).lower(): d.version for d in found}
print(json.dumps({"python": platform.python_version(), "packages": packages}))
"""


class MeasureError(Exception):
    """It can't be measured; the text is one line that says why."""


def local_manifest(python, code=ROOT):
    """The manifest of a run outside a VM: both guest modules, Python, every installed package.

    python: path of the one that runs it. code: the folder of the modules. Raises MeasureError. It
    says which code a development enclave claims to run; only a measured boot proves it.
    """
    try:
        files = {name: content_hash(os.path.join(code, name)) for name in MODULES}
        command = [python, "-B", "-c", PYTHON]
        done = subprocess.run(command, cwd=code, capture_output=True, text=True, check=True)
    except OSError as error:
        raise MeasureError(f"can't run {error.filename}: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        raise MeasureError(
            f"{python}: {(error.stderr.strip() or 'failed').splitlines()[-1]}"
        ) from None
    return {"kind": "local", "files": files} | json.loads(done.stdout)


def root_manifest(root, kernel, command_line):
    """The manifest of a guest: (path, mode, SHA-256) of its root file system, kernel, command line.

    What is mounted at run time is left out by name, and so is the manifest that a root may hold.
    Raises MeasureError.
    """
    files = []
    try:
        if not os.listdir(root):
            raise MeasureError(f"{root} is empty: that is no root file system")
        for folder, folders, names in os.walk(root):
            if os.path.relpath(folder, root) in MOUNT_POINTS:
                folders.clear()
                continue
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            for path in (os.path.join(folder, name) for name in names + links):
                name, mode = os.path.relpath(path, root), f"{os.lstat(path).st_mode:o}"
                if name != MANIFEST:
                    files.append([name, mode, content_hash(path)])
    except OSError as error:
        raise MeasureError(f"can't read {error.filename}: {error.strerror}") from None
    files.sort()
    return {"kind": "root", "files": files, "kernel": kernel, "command_line": command_line}


def content_hash(path):
    """SHA-256 of a file, or of what a symbolic link points to, in hexadecimal."""
    if os.path.islink(path):
        return hashlib.sha256(os.fsencode(os.readlink(path))).hexdigest()
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def reference(manifest, withdrawn):
    """Reference values of kind psk for what this manifest describes."""
    sys.path.insert(0, str(ROOT))
    import muprotocol

    measurement = muprotocol.manifest_digest(manifest)
    values = {"version": 1, "kind": "psk", "root": "psk", "measurement": measurement}
    return values | {"withdrawn": withdrawn}


def read_withdrawn(path):
    """The values that an earlier file withdrew: measuring anew must not bring them back."""
    try:
        return json.loads(path.read_text("utf-8"))["withdrawn"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        raise MeasureError(f"{path}: there is a file that holds no reference values") from None


def check_output(path):
    """Refuse to replace values that prove more than psk, and what was enrolled. MeasureError."""
    try:
        kind = json.loads(path.read_text("utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if kind in ("tpm2", "tsm"):
        text = f"{path} holds reference values of kind {kind}, which measuring would make psk"
        raise MeasureError(f"{text}: give another --output")


def write(path, text):
    """Replace a file whole or not at all."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            file = pathlib.Path(folder, path.name)
            file.write_text(text, "utf-8")
            os.replace(file, path)
    except OSError as error:
        raise MeasureError(f"can't write {path}: {error.strerror}") from None


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="measure.py", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="default: print them")
    parser.add_argument("--manifest", action="store_true", help="print the manifest instead")
    parser.add_argument("--python", default=sys.executable, help="that runs the enclave")
    parser.add_argument("--root", metavar="DIR", help="measure a guest's root file system")
    parser.add_argument("--kernel", metavar="RELEASE", help="of that guest, as uname -r says it")
    parser.add_argument("--command-line", metavar="TEXT", help="of that guest's kernel")
    flags = parser.parse_args(argv)
    if flags.root and (flags.kernel is None or flags.command_line is None):
        parser.error("--root needs --kernel and --command-line")
    if not flags.root and (flags.kernel is not None or flags.command_line is not None):
        parser.error("--kernel and --command-line need --root")
    try:
        if flags.output:
            check_output(flags.output)
        if flags.root:
            manifest = root_manifest(flags.root, flags.kernel, flags.command_line)
        else:
            manifest = local_manifest(flags.python)
        values = manifest
        if not flags.manifest:
            values = reference(manifest, read_withdrawn(flags.output) if flags.output else [])
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        if flags.output:
            write(flags.output, text)
        else:
            print(text, end="")
    except MeasureError as error:
        print(f"measure: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
