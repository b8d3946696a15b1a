"""Build the baseline server as a root file system, without Docker.

    python3 tools/baseline/rootfs.py --output DIR [--json FILE]

Debian 12 with the packages of `packages.txt`, by mmdebstrap, then `setup.sh` in it: what
`tools/docker/Dockerfile.baseline` does. As root DIR/root is as such a server's disk: owners, modes,
capabilities. As another user mmdebstrap works in a user namespace, and what is copied to DIR/root
is the user's own.

DIR/packages.json, which --json writes elsewhere too, says what is in it:

    {"tool": "baseline", "version": 1, "suite": "bookworm", "input": name in the cache,
     "debian": {package: version}, "python": {distribution: version}}

The versions are those that the archives offer on the day. The result is kept in the user's cache
under a name drawn from the files of this folder; --fresh builds it anew. Downloads come by apt's
and pip's own settings: the CPU build of PyTorch by PIP_EXTRA_INDEX_URL. Exit status: 0 if built.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import demo_model  # noqa: E402
import environment  # noqa: E402
import image  # noqa: E402
import measure  # noqa: E402
import rootfs  # noqa: E402  of the guest
from environment import ToolError  # noqa: E402

SUITE = "bookworm"
INPUTS = ("packages.txt", "requirements.txt", "setup.sh", "start.sh", "server.py", "nginx.conf")
INPUTS += ("sshd.conf", "inference.service")
PLACE = "tmp/baseline"  # in the root, while it is built
SITE = "opt/inference/venv/lib/python3.11/site-packages"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
PROGRAMS = {"mmdebstrap": "mmdebstrap", KEYRING: "debian-archive-keyring"}
PROGRAMS_OF_USERS = PROGRAMS | {"newuidmap": "uidmap"}
ERRORS = ("E: ", "ERROR", "error")  # how apt, pip and mmdebstrap begin what went wrong
CHROOT = "env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8"


def say(text):
    """Progress."""
    print(f"baseline: {text}", file=sys.stderr, flush=True)


def names(path):
    """The lines of a list, without its comments."""
    lines = (line.strip() for line in path.read_text("utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def run(*command, failure):
    """Run a program. Raises ToolError with the failure and the first error that it wrote."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(list(map(str, command)), errors="replace", **quiet)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(ERRORS)] or lines[-1:] or ["no output"]
        raise ToolError(f"{failure}: {errors[0]}")


def prepare():
    """Have mmdebstrap on this machine, or say what is missing. ToolError."""
    if not shutil.which("apt-get"):
        raise ToolError("this needs mmdebstrap and apt: run it on Debian or Ubuntu")
    programs = PROGRAMS if os.geteuid() == 0 else PROGRAMS_OF_USERS
    environment.install_system(programs, say)
    missing = environment.missing_packages(programs)
    if missing:
        raise ToolError(f"not installed, and needed: apt-get install {' '.join(missing)}")


# ---------------------------------------------------------------- build


def fetch_wheels():
    """The folder of the wheels that requirements.txt asks for, for the root's Python. ToolError."""
    wanted = HERE / "requirements.txt"

    def make(folder):
        say("fetching the wheels")
        command = [*image.pip(), "download", "--quiet", "--progress-bar=off", *image.target()]
        failure = "can't fetch the wheels (for PyTorch's CPU build see PIP_EXTRA_INDEX_URL)"
        run(*command, "--dest", folder, "--requirement", wanted, failure=failure)

    return demo_model.cached(f"baseline-wheels-{image.key(image.sha256(wanted))}", make)


def cache_name():
    """The name of the root in the cache, drawn from all that it is made of but the archives."""
    hashes = [image.sha256(HERE / name) for name in (*INPUTS, "rootfs.py")]
    owner = "root" if os.geteuid() == 0 else "user"
    return f"baseline-root-{image.key(SUITE, owner, *hashes)}"


def build():
    """The cache's folder with `root` and `packages.json`; built if it is not there. ToolError."""

    def make(folder):
        folder.mkdir()
        wheels = fetch_wheels()
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            stage = pathlib.Path(place, pathlib.PurePath(PLACE).name)
            stage.mkdir()
            for name in INPUTS:
                shutil.copy(HERE / name, stage)
            shutil.copytree(wheels, stage / "wheels", copy_function=os.link)
            say(f"building Debian {SUITE} with {len(names(HERE / 'packages.txt'))} named packages")
            bootstrap(stage, folder / "root")
        write_facts(folder)

    return demo_model.cached(cache_name(), make)


def bootstrap(stage, root):
    """Make the root with mmdebstrap and setup.sh, whose files lie in the stage. ToolError."""
    pip = f"PIP_NO_INDEX=1 PIP_FIND_LINKS=/{PLACE}/wheels"
    hooks = (
        f"copy-in {shlex.quote(str(stage))} /{pathlib.PurePath(PLACE).parent}",
        f'chroot "$1" {CHROOT} {pip} sh /{PLACE}/setup.sh /{PLACE}',
        f'rm -r "$1/{PLACE}"',
        'rm -f "$1/etc/resolv.conf" && echo baseline > "$1/etc/hostname"',  # they were the host's
    )
    command = ["mmdebstrap", "--variant=minbase"]
    command += [f"--include={','.join(names(HERE / 'packages.txt'))}"]
    command += [f"--customize-hook={hook}" for hook in hooks]
    failure = "can't build the root file system"
    if os.geteuid() == 0:
        run(*command, "--format=directory", SUITE, root, failure=failure)
        return
    archive = stage / "root.tar"  # of a user namespace: a folder of it could not even be removed
    run(*command, "--mode=unshare", "--format=tar", SUITE, archive, failure=failure)
    root.mkdir()
    unpack = ["tar", "-xpf", archive, "-C", root, "--no-same-owner", "--exclude=./dev/*"]
    run(*unpack, failure="can't unpack the root file system")


def read_packages(root):
    """The versions of what is installed in a root: {"debian", "python"}, dicts. ToolError."""
    query = ["dpkg-query", f"--admindir={root / 'var/lib/dpkg'}", "--show"]
    told = rootfs.run(*query, "--showformat=${Package} ${Version}\n", failure="no dpkg database")
    found = importlib.metadata.distributions(path=[str(root / SITE)])
    python = {distribution.name: distribution.version for distribution in found}
    return {"debian": dict(line.split() for line in told.splitlines()), "python": python}


def write_facts(folder):
    """Write packages.json of the root in a folder."""
    facts = {"tool": "baseline", "version": 1, "suite": SUITE, "input": cache_name()}
    text = json.dumps(facts | read_packages(folder / "root"), indent=2, sort_keys=True) + "\n"
    (folder / "packages.json").write_text(text, "utf-8")


# ---------------------------------------------------------------- output


def check(output):
    """Have the output folder; a `root` in it that is not of this tool is left alone. ToolError."""
    output.mkdir(parents=True, exist_ok=True)
    root = output / "root"
    if root.exists() and not (output / "packages.json").exists():
        raise ToolError(f"{root} is there already, and not of this tool: name another folder")


def put(folder, output):
    """Have a copy of what was built in the output folder, if it is not there already. ToolError."""
    check(output)
    facts, root = output / "packages.json", output / "root"
    wanted = (folder / "packages.json").read_text("utf-8")
    if root.exists():
        if facts.read_text("utf-8") == wanted:
            return
        run("rm", "-r", "--one-file-system", root, failure=f"can't remove the old {root}")
        facts.unlink()
    with tempfile.TemporaryDirectory(dir=output) as place:
        copy = ["cp", "--archive", "--reflink=auto", folder / "root", place]
        run(*copy, failure=f"can't write {root}")
        os.rename(pathlib.Path(place, "root"), root)
    facts.write_text(wanted, "utf-8")


def clean():
    """Remove the roots and wheels that the cache holds."""
    for path in sorted(demo_model.cache_folder().glob("baseline-*")):
        if path.is_dir():
            say(f"removing {path}")
            run("rm", "-r", "--one-file-system", path, failure=f"can't remove {path}")
        else:
            path.unlink()


def main(argv=None):
    """The command line. Returns the exit status."""
    words = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="rootfs.py", description=words, epilog="See its source.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=pathlib.Path, metavar="DIR", help="for root, packages.json")
    what.add_argument("--clean", action="store_true", help="empty the cache of the baseline")
    parser.add_argument("--fresh", action="store_true", help="build it anew, with today's versions")
    parser.add_argument(
        "--json", metavar="FILE", help="packages.json to this file, or - for stdout"
    )
    flags = parser.parse_args(argv)
    began = time.monotonic()
    try:
        if flags.clean or flags.fresh:
            clean()
        if flags.clean:
            return 0
        check(flags.output)
        prepare()
        folder = build()
        put(folder, flags.output)
        text = (folder / "packages.json").read_text("utf-8")
        if flags.json == "-":
            print(text, end="")
        elif flags.json:
            measure.write(pathlib.Path(flags.json), text)
    except (ToolError, measure.MeasureError) as error:
        print(f"baseline: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"baseline: error: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbaseline: ended", file=sys.stderr)
        return 130
    facts = json.loads(text)
    counts = f"{len(facts['debian'])} Debian packages, {len(facts['python'])} Python distributions"
    say(f"{flags.output / 'root'}: {counts}; {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
