"""Start a local enclave, without a VM, for development: python3 tools/enclave.py --model FILE.mus

Flags override the environment, which overrides a file of KEY=value lines (/etc/muenclave.conf).
Checks what can be checked before anything starts, measures the code that it starts, and becomes
muenclave.py. Such an enclave proves who it is (evidence psk), not what: the owner's tools send it
a weights key only with --development. Exit status: the enclave's; 1 for a mistake, told in a line.
"""

import argparse
import importlib.util
import os
import pathlib
import platform
import re
import sys

sys.dont_write_bytecode = True
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import measure  # noqa: E402

import muenclave  # noqa: E402
import muprotocol as mp  # noqa: E402
import muproxy  # noqa: E402

DRIVER = "/dev/nvidiactl"  # NVIDIA's driver is loaded where this is
LEVELS = ("full", "seccomp")  # of confinement; the posture says which
LEAST = {"ENCLAVE_RATE": 64, "ENCLAVE_BURST": 16384, "ENCLAVE_SESSIONS": 2, "ENCLAVE_SLOTS": 1}
LEAST["ENCLAVE_CONTEXT"] = 16  # tokens: what the engine tries a model with
LEAST["ENCLAVE_RANKS"] = 1
# What else of the environment the enclave gets: whatever it inherits, its engine can read.
KEPT = ("PATH", "PYTHONPATH", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


class StartError(Exception):
    """The enclave can't start; the text is one line that says why and what to do."""


def read_config(path):
    """The settings in a file of KEY=value lines; {} if there is none at the usual place."""
    if path == muenclave.CONFIG_FILE and not os.path.exists(path):
        return {}
    try:
        return muenclave.read_config(path)
    except (OSError, ValueError):
        raise StartError(f"can't read {path}: it must hold KEY=value lines") from None


def check_settings(values, source):
    """Refuse an unknown name, a number out of range, another word than those known. StartError."""
    for name, value in values.items():
        default = muenclave.DEFAULTS.get(name)
        if default is None:
            raise StartError(f"{source}: unknown setting {name!r}")
        is_number = re.fullmatch("[0-9]{1,15}", value) is not None
        if default.isdigit() and not (is_number and int(value) >= LEAST.get(name, 0)):
            raise StartError(f"{name}: {value!r} is not a number from {LEAST.get(name, 0)} up")
        if "\0" in value:
            raise StartError(f"{name}: a zero byte can't be in a setting")
    words = (("ENCLAVE_CONFINEMENT", LEVELS), ("ENCLAVE_EVIDENCE", tuple(muenclave.EVIDENCE)))
    for name, known in words:
        if values.get(name, known[0]) not in known:
            raise StartError(f"{name} must be one of {', '.join(known)}")
    if not re.fullmatch("cpu|auto|cuda(:[0-9]+)?", values.get("ENCLAVE_DEVICE", "cpu")):
        raise StartError("ENCLAVE_DEVICE must be cpu, cuda, cuda:NUMBER or auto (all GPUs)")


def check_files(values):
    """Refuse a model or a secret that can't be read. Raises StartError."""
    path = values["MODEL_PATH"]
    if not path:
        raise StartError("no model; set MODEL_PATH or --model to a sealed model (.mus)")
    try:
        with open(path, "rb") as file:
            length = mp.header_length(file.read(mp.PREFIX))
            if len(file.read(length)) < length:
                raise mp.ProtocolError("container_corrupt", "it ends within its header")
    except (OSError, mp.ProtocolError) as error:
        raise StartError(f"can't use the model {path}: {muproxy.text_of(error)}") from None
    if values["ENCLAVE_EVIDENCE"] == "tpm2" and not os.path.exists(values["ENCLAVE_TPM"]):
        raise StartError(f"ENCLAVE_TPM: no TPM at {values['ENCLAVE_TPM']}")
    for name in ("ENCLAVE_OWNER_PSK", "ENCLAVE_USER_PSK"):
        if values["ENCLAVE_EVIDENCE"] == "psk":
            try:
                mp.parse_secret(pathlib.Path(values[name]).read_text("ascii"))
            except (OSError, ValueError) as error:
                raise StartError(f"{name}: no secret in {values[name]!r}: {error}") from None


def check_machine(level, device):
    """Refuse a machine that can't confine, or lacks a package or a GPU. Raises StartError."""
    if platform.machine() != "x86_64":
        raise StartError("this machine has no seccomp filter for us: x86-64 is needed")
    if level == "full" and os.getuid() != 0:
        raise StartError("ENCLAVE_CONFINEMENT=full needs root, to give each process its own uid")
    if device != "cpu" and not os.path.exists(DRIVER):
        raise StartError(f"ENCLAVE_DEVICE={device} needs a GPU; there is no driver at {DRIVER}")
    for name in ("cryptography", "torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise StartError(f"{name} is not installed; pip install 'muenclave[inference]'")


def make_parser():
    """A flag for each setting."""
    parser = argparse.ArgumentParser(prog="enclave", description=__doc__.split("\n")[0])
    for name, default in muenclave.DEFAULTS.items():
        flag = "--" + name.removeprefix("ENCLAVE_").removesuffix("_PATH").lower().replace("_", "-")
        if name != "ENCLAVE_MEASUREMENT":
            text = f"{name} (default: {default or 'none'})"
            parser.add_argument(flag, dest=name, help=text)
    parser.add_argument("--conf", default=muenclave.CONFIG_FILE, help="file of KEY=value lines")
    parser.add_argument("--code", type=pathlib.Path, default=ROOT, metavar="DIR", help="to start")
    return parser


def main(argv=None):
    """Become the enclave, or return the exit status."""
    flags = vars(make_parser().parse_args(argv))
    try:
        found = {name: os.environ[name] for name in muenclave.DEFAULTS if name in os.environ}
        values = read_config(flags["conf"])
        check_settings(values, flags["conf"])
        given = {name: flags.get(name) for name in muenclave.DEFAULTS}
        values |= found | {name: value for name, value in given.items() if value is not None}
        check_settings(values, "the environment")
        values = muenclave.DEFAULTS | values
        check_machine(values["ENCLAVE_CONFINEMENT"], values["ENCLAVE_DEVICE"])
        check_files(values)
        manifest = measure.local_manifest(sys.executable, flags["code"])
    except (StartError, measure.MeasureError) as error:
        print(f"enclave: error: {error}", file=sys.stderr)
        return 1
    values["ENCLAVE_MEASUREMENT"] = mp.manifest_digest(manifest)
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    program = str(flags["code"].resolve() / "muenclave.py")
    os.execve(sys.executable, [sys.executable, "-B", program], kept | values)


if __name__ == "__main__":
    sys.exit(main())
