"""How fast sealed weights become tensors, for tools/bench.py unseal.

The product's own loader, a process of its own, unseals a model that lies in the page cache, and the
engine's functions make tensors of it; from the key to a byte read of every page. Its start, imports
and warm-up, is told apart: it comes before the key. In the same rounds: memmove of the same bytes
to fresh memory, safetensors' load_file of the plaintext, and what age and gpg take to decrypt the
same bytes to a file in memory; each of them right after so much memory was in use (bench_loading).
"""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import bench_model
import bench_shared as shared
from environment import ROOT, ToolError

LOADING = ROOT / "tools" / "bench_loading.py"
MEMORY = "/dev/shm"
WARM = 2  # rounds that don't count: the machine's memory has to be there
NEEDED = 6  # copies in memory at once: page cache, what programs read and write, ours
PROGRAMS = {"age": "age", "gpg": "gnupg"}  # program: Debian's package
WAYS = {
    "muenclave": "ours: the loader, to tensors",
    "memmove": "memmove to fresh memory, one thread",
    "memmove_all": "memmove to fresh memory, all threads",
    "plain": "plaintext safetensors, loaded and touched",
    "age": "age -d to a file in memory",
    "gpg": "gpg -d (AES-256) to a file in memory",
}


def encrypt_age(paths, folder):
    """Encrypt the files, one after another, by age; the command that decrypts. ToolError."""
    key, target = folder / "key", folder / "weights.age"
    pipe_through(["age-keygen", "-o", key], [])
    recipient = pipe_through(["age-keygen", "-y", key], []).decode().strip()
    pipe_through(["age", "-r", recipient, "-o", target], paths)
    return ["age", "-d", "-i", key], target


def encrypt_gpg(paths, folder):
    """Encrypt the files, one after another, by gpg; the command that decrypts. ToolError."""
    target, home = folder / "weights.gpg", folder / "home"
    home.mkdir(mode=0o700)
    (folder / "passphrase").write_text("benchmark")
    base = ["gpg", "--homedir", home, "--batch", "--quiet", "--pinentry-mode", "loopback"]
    base += ["--passphrase-file", folder / "passphrase", "--no-symkey-cache"]
    options = ["--cipher-algo", "AES256", "--compress-algo", "none", "--s2k-count", "65536"]
    pipe_through([*base, *options, "-o", target, "-c"], paths)
    return [*base, "-d"], target


ENCRYPT = {"age": encrypt_age, "gpg": encrypt_gpg}


def pipe_through(command, paths):
    """Give files to a program, one after another; what it writes. Raises ToolError."""
    words = list(map(str, command))
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(words, **(pipes | {"stderr": errors}))
        with contextlib.suppress(BrokenPipeError), process.stdin as entry:
            for path in paths:
                with open(path, "rb") as file:
                    shutil.copyfileobj(file, entry, 1 << 20)
        written = process.stdout.read()
        process.stdout.close()
        if process.wait():
            raise ToolError(f"{words[0]}: {shared.last_line(errors)}")
    return written


def start_programs(plain, folder, say):
    """({name: request of a round}, {name: why it is left out}) of age and gpg. ToolError."""
    requests, left_out = {}, {}
    for name, package in PROGRAMS.items():
        if shutil.which(name) is None:
            left_out[name] = f"not installed: apt-get install {package}"
            continue
        say(f"encrypting by {name}")
        (folder / name).mkdir()
        command, source = ENCRYPT[name](sorted(plain.glob("*.safetensors")), folder / name)
        output = folder / f"{name}.out"
        words = [*command[:-1], "-o", output, command[-1]] if name == "gpg" else None
        words = words or [*command, "-o", output]
        requests[name] = {"command": list(map(str, [*words, source])), "output": str(output)}
    return requests, left_out


@contextlib.contextmanager
def scratch():
    """A folder in memory for what is encrypted and decrypted; gpg's agent ends with it."""
    base = MEMORY if os.path.isdir(MEMORY) else None
    with tempfile.TemporaryDirectory(prefix="muenclave-", dir=base) as name:
        folder = pathlib.Path(name)
        try:
            yield folder
        finally:
            home = folder / "gpg" / "home"
            if home.exists():
                end = ["gpgconf", "--homedir", str(home), "--kill", "all"]
                subprocess.run(end, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run_unseal(flags, say):
    """The figures of `unseal`, a dict. ToolError."""
    shared.need_modules("torch", "safetensors")
    say(f"the model: {flags.weights_shape}")
    plain = bench_model.model_folder(flags.weights_shape)
    check_memory(sum(path.stat().st_size for path in plain.glob("*.safetensors")))
    sealed = bench_model.sealed_folder(plain, sys.executable)
    cores = len(os.sched_getaffinity(0))
    with (
        shared.as_in_guest(flags.huge_pages),
        scratch() as folder,
        shared.Worker("the loader", command(plain, sealed)) as worker,
    ):
        figures = {"huge_pages": shared.huge_pages()}
        programs, left_out = start_programs(plain, folder, say)
        requests = {"muenclave": {"way": "muenclave"}, "plain": {"way": "plain"}}
        requests["memmove"] = {"way": "memmove", "threads": 1}
        requests["memmove_all"] = {"way": "memmove", "threads": cores}
        requests |= {name: {"way": "program"} | facts for name, facts in programs.items()}
        say("checking what comes out")
        checked = worker.ask(way="check")["tensors"]
        for facts in programs.values():
            worker.ask(way="check_program", **facts)
        seconds, start = {name: [] for name in requests}, []
        for number in range(-WARM, flags.rounds):
            for name, request in requests.items():
                told = f"round {number + 1} of {flags.rounds}" if number >= 0 else "warming up"
                say(f"{told}: {WAYS[name]}")
                found = worker.ask(**request)
                if number < 0:
                    continue
                seconds[name].append(round(found["seconds"], 4))
                if name == "muenclave":
                    start.append(round(found["start"], 3))
        say("peak memory")
        peak = worker.ask(way="memory")["peak"]
    figures |= {"shape": flags.weights_shape, "rounds": flags.rounds, "seconds": seconds}
    figures |= {"start": start, "peak": peak, "left_out": left_out, "checked": checked}
    figures |= worker.facts | {"cores": cores}
    return figures | {"ratios": compare(seconds)}


def check_memory(size):
    """Refuse where so many bytes don't fit NEEDED times. Raises ToolError."""
    text = pathlib.Path("/proc/meminfo").read_text("ascii")
    free = int(re.search(r"^MemAvailable:\s+(\d+) kB", text, re.M)[1]) * 1024
    if free < NEEDED * size:
        wanted = NEEDED * size / 2**30
        raise ToolError(
            f"unseal needs {wanted:.1f} GiB of free memory, there are {free / 2**30:.1f}"
        )


def command(plain, sealed):
    """The words that start the process that loads."""
    return [sys.executable, "-B", LOADING, plain, sealed]


def compare(seconds):
    """How many times as fast as each other way ours is; its time by the plaintext's."""
    ours = seconds["muenclave"]
    ratios = {name: shared.ratio(seconds[name], ours) for name in seconds if name != "muenclave"}
    return ratios | {"time_of_plain": shared.ratio(ours, seconds["plain"])}


def show_unseal(figures):
    """Print the figures of `unseal`."""
    shared.show_machine(figures)
    gigabytes = figures["bytes"] / 1e9
    print(f"{gigabytes:.2f} GB in the page cache, {figures['cores']} cores, ", end="")
    print("seconds, GB/s: median (least to most); how many times as fast ours is")
    for name, seconds in figures["seconds"].items():
        rates = [gigabytes / value for value in seconds]
        ratio = figures["ratios"].get(name)
        told = f"ours: {shared.tell_ratio(ratio)}" if ratio else ""
        cells = (shared.tell_values(seconds, ".3f"), shared.tell_values(rates, ".2f"))
        print(f"  {WAYS[name]:42}", *(f"{cell:26}" for cell in cells), told)
    print(f"loader's start, before the key: {shared.tell_values(figures['start'], '.2f', ' s')}")
    over = figures["peak"] / figures["weights"] - 1
    print(f"peak memory of loader and engine: {figures['peak']:,} bytes, ", end="")
    print(f"the tensors and {over:.1%} of them; {figures['checked']} tensors equal the plaintext's")
    for name, reason in figures["left_out"].items():
        print(f"left out: {WAYS[name]}: {reason}")


def unseal_targets(figures):
    """Lines of the table of targets; figures: of `unseal`, or None."""
    is_whole = figures is not None and figures["bytes"] >= 1.9e9
    ratios = figures["ratios"] if is_whole else {}
    peak = figures["peak"] / figures["weights"] if is_whole else None
    return [
        shared.target("unseal 2 GB: memmove's speed", ratios.get("memmove"), at_least=0.6),
        shared.target("unseal 2 GB: age -d", ratios.get("age"), at_least=8),
        shared.target("unseal 2 GB: gpg -d", ratios.get("gpg"), at_least=8),
        shared.target("unseal 2 GB: plaintext's time", ratios.get("time_of_plain"), at_most=2.5),
        shared.target("unseal 2 GB: peak memory, of the weights", peak, at_most=1.1),
    ]
