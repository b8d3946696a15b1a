"""What several tests share: the demo model and its sealed copy, made once for this user.

Both lie in the cache that tools/demo_model.py keeps, under names drawn from what they are made of.
"""

import collections
import hashlib
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))

import demo_model as demo  # noqa: E402

SEALERS = ("tools/seal.py", "muprotocol.py")  # what decides how a sealed copy looks

# demo: the plaintext directory; model: the .mus file; key: its key file; vocabulary: the table.
Sealed = collections.namedtuple("Sealed", "demo model key vocabulary")


def demo_model(dtype="bfloat16", shards=1):
    """The directory of the demo model, read-only by convention; trained on the first call."""
    return demo.demo_model(dtype, shards)


def sealed_demo(dtype="bfloat16", shards=1):
    """A sealed copy of the demo model and what belongs to it; read-only by convention."""
    source = demo_model(dtype, shards)
    code = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in SEALERS)).hexdigest()

    def make(folder):
        folder.mkdir()
        seal(source, folder / "demo.mus", "--key", folder / "demo.key", "--asset", "demo").check()

    folder = demo.cached(f"sealed-{code[:16]}-{source.name}", make)
    files = [folder / name for name in ("demo.mus", "demo.key", "demo.mus.vocab")]
    return Sealed(source, *files)


class Done:
    """How a program ended: status, out and err (str)."""

    def __init__(self, process):
        self.status = process.returncode
        self.out, self.err = process.stdout, process.stderr

    def check(self):
        """Self, if it ended well. AssertionError."""
        if self.status:
            raise AssertionError(f"exit status {self.status}: {self.err}")
        return self


def seal(*arguments, **options):
    """Run tools/seal.py as an owner does; options go to subprocess.run. Returns Done."""
    command = [sys.executable, "-B", TOOLS / "seal.py", *arguments]
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "cwd": "/"}
    return Done(subprocess.run(list(map(str, command)), **(quiet | options)))
