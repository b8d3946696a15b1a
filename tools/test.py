"""Run the tests: python3 tools/test.py [--release] [what `python -m unittest` takes].

Makes .venv with the test extra, installs the system's packages that some tests need (as root on
Debian or Ubuntu; otherwise it names them, and those tests are skipped), and runs the suite there.
With --release the soak (tests.test_soak) lasts thirty minutes instead of three, no stream may stand
still for two seconds, and tools/measured/soak.json is written: where no tests are named, by itself
after the suite, since what runs beside it slows it down.
Standard library only. Exit status: 0 if no test failed. With CI=true a skip is a failure.
"""

import os
import subprocess
import sys

import environment
import image
import vm

PROGRAMS = {  # that tests run: package
    "strace": "strace",
    "curl": "curl",
    "openssl": "openssl",
    "swtpm": "swtpm",
    "swtpm_setup": "swtpm-tools",
    "tpm2_checkquote": "tpm2-tools",
    "pesign": "pesign",
    "chromium": "chromium",
    "chromedriver": "chromium-driver",
    "sqfs2tar": "squashfs-tools-ng",
    "skopeo": "skopeo",
    "mmdebstrap": "mmdebstrap",
    "busybox": "busybox",
    "cloc": "cloc",
    "lz4": "lz4",
    "getcap": "libcap2-bin",
    "unshare": "util-linux",
    "buildah": "buildah",
    "haproxy": "haproxy",
    "systemd-analyze": "systemd",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
}
PROGRAMS |= image.PROGRAMS | vm.PROGRAMS
RELEASE = "--release"


def say(text):
    """One line of progress, before the suite's own."""
    print(f"test: {text}", flush=True)


def main():
    """Prepare, then become the suite."""
    environment.install_system(PROGRAMS, say)
    try:
        python = environment.make_venv("test", say)
    except environment.ToolError as error:
        sys.exit(f"test: error: {error}")
    os.chdir(environment.ROOT)
    suite, flags = [python, "-m", "tests"], sys.argv[1:]
    if RELEASE in flags:
        flags.remove(RELEASE)
        if all(flag.startswith("-") for flag in flags):  # as tests/__main__.py tells
            status = subprocess.run([*suite, *flags]).returncode
            if status:
                sys.exit(status)
            flags.append("tests.test_soak")
        os.environ["MUENCLAVE_RELEASE"] = "1"
    os.execv(python, [*suite, *flags])


if __name__ == "__main__":
    main()
