"""The guest in its VM, under QEMU: what it proves, serves, and what it keeps in; tools/vm.py."""

import argparse
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import unittest

import muenclave
import muprotocol as mp
import muproxy
from tests import guest, support

sys.path.insert(0, str(support.TOOLS))

import gpu  # noqa: E402
import image  # noqa: E402
import pcr  # noqa: E402
import vm  # noqa: E402

NEEDED = f"not installed: {' '.join(guest.MISSING)}"
PAGES = "kernel/mm/hugepages/hugepages-1048576kB"


def flags(**changes):
    """What tools/vm.py's command line gives, with changes."""
    values = {"accelerator": "tcg", "memory": 1024, "cpus": 2, "microvm": False, "vsock": None}
    values |= {"firmware": pathlib.Path("/code"), "boot": pathlib.Path("/esp"), "gpu": []}
    values |= {"weights": pathlib.Path("/w,eights"), "extras": None, "kernel": None}
    return argparse.Namespace(**values | changes)


class CommandLine(unittest.TestCase):
    """QEMU gets what is named, and nothing else."""

    def line(self, **changes):
        return vm.command_line(flags(**changes), 1234, pathlib.Path("/run"))

    def devices(self, command):
        return [command[at + 1] for at, word in enumerate(command) if word == "-device"]

    def test_devices(self):
        names = [device.split(",")[0] for device in self.devices(self.line())]
        expected = ["tpm-crb", "virtio-rng-pci", "virtio-blk-pci", "virtio-blk-pci"]
        self.assertEqual(names, [*expected, "virtio-net-pci"])
        self.assertIn("-nodefaults", self.line())
        self.assertIn("-no-user-config", self.line())

    def test_no_device_brings_an_option_rom(self):
        for device in self.devices(self.line(gpu=["0000:01:00.0"], extras=pathlib.Path("/x"))):
            if "pci" in device:
                self.assertIn("romfile=", device.split(","), device)

    def test_disks_are_read_only_and_in_order(self):
        command = self.line(extras=pathlib.Path("/x"))
        drives = [word for word in command if word.startswith("if=none")]
        self.assertEqual([d.split(",")[1] for d in drives], ["id=weights", "id=extras", "id=boot"])
        self.assertTrue(all("readonly=on" in drive.split(",") for drive in drives))
        self.assertIn("file=/w,,eights", drives[0])
        places = [d.split("addr=")[1][:4] for d in self.devices(command) if "blk" in d]
        self.assertEqual(places, sorted(places))

    def test_network(self):
        (net,) = (word for word in self.line() if word.startswith("user,"))
        self.assertIn("restrict=on", net.split(","))
        self.assertEqual(net.count("hostfwd="), 1)
        self.assertIn("hostfwd=tcp:127.0.0.1:1234-", net)
        self.assertNotIn("hostfwd", " ".join(self.line(vsock=7)))
        self.assertIn("guest-cid=7", " ".join(self.line(vsock=7)))

    def test_microvm_has_no_pci_and_no_tpm(self):
        with tempfile.TemporaryDirectory() as folder:
            kernel = pathlib.Path(folder, "microvm.bin")
            kernel.with_suffix(".cmdline").write_text("acpi=off x\n")
            command = self.line(microvm=True, kernel=kernel)
            self.assertIn(str(kernel), command)
        self.assertNotRegex(" ".join(command), r"-pci|tpm|pflash|id=boot")
        self.assertIn("acpi=off x", command)
        buses = re.findall(r"virtio-mmio-bus\.\d", " ".join(command))
        self.assertEqual(len(buses), len(set(buses)))


class Mistakes(unittest.TestCase):
    """One line says what is wrong."""

    def vm(self, *arguments):
        command = [sys.executable, support.TOOLS / "vm.py", "run", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    @unittest.skipIf(guest.MISSING, NEEDED)
    def test_lines(self):
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "esp.img").touch()
            here = ("--image", folder, "--weights", __file__)
            for arguments, told in (
                (("--image", "/nowhere", "--weights", __file__), "tools/image.py all"),
                (("--image", folder, "--weights", "/nowhere"), "there is no /nowhere"),
                ((*here, "--gpu", "65:00.0"), "is no PCI address"),
                ((*here, "--gpu", "ffff:1f:1f.7"), "there is no device"),
                ((*here, "--microvm"), "microvm.bin"),
            ):
                done = self.vm(*arguments)
                self.assertEqual((done.returncode, done.stdout), (1, ""), arguments)
                self.assertTrue(done.stderr.startswith("vm: error: "), done.stderr)
                self.assertIn(told, done.stderr)
            if not os.path.exists("/dev/vhost-vsock"):
                self.assertIn("no vsock", self.vm(*here, "--vsock", 7).stderr)
            for arguments in (("--memory", "1"), ("--port", "x"), ("--cpus", "0")):
                self.assertEqual(self.vm(*here, *arguments).returncode, 2)


class Accelerator(unittest.TestCase):
    """KVM only where a guest really runs."""

    def system(self, folder, words, kvm=True, pvm=False):
        for path in ("proc", "dev", "sys/module"):
            pathlib.Path(folder, path).mkdir(parents=True)
        pathlib.Path(folder, "proc/cpuinfo").write_text(f"flags : fpu {words}\n")
        if kvm:
            pathlib.Path(folder, "dev/kvm").touch()
        if pvm:
            pathlib.Path(folder, "sys/module/kvm_pvm").mkdir()
        return pathlib.Path(folder)

    def test_not_without_extensions_or_in_software(self):
        for words, options in (("sse", {}), ("vmx", {"pvm": True}), ("svm", {"kvm": False})):
            with tempfile.TemporaryDirectory() as folder:
                system = self.system(folder, words, **options)
                self.assertEqual(vm.accelerator(system), "tcg", words)

    @unittest.skipIf(guest.MISSING, NEEDED)
    def test_the_probe_itself_runs(self):
        self.assertTrue(vm.runs("tcg"))
        self.assertFalse(vm.runs("no-such-accelerator"))


class Gpu(unittest.TestCase):
    """The checks before a GPU is given away, on sysfs trees as real hosts have them."""

    def sysfs(self, devices, groups, pages=(8, 8)):
        """devices: {bdf: (vendor, class, driver)}; groups: {number: [bdf]}; pages: total, free."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        root = pathlib.Path(folder.name)
        for bdf, (vendor, kind, driver) in devices.items():
            device = root / "bus/pci/devices" / bdf
            device.mkdir(parents=True)
            (device / "vendor").write_text(f"{vendor}\n")
            (device / "class").write_text(f"{kind}\n")
            if driver:
                (root / "bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
                (device / "driver").symlink_to(root / "bus/pci/drivers" / driver)
        for number, members in groups.items():
            group = root / f"kernel/iommu_groups/{number}"
            (group / "devices").mkdir(parents=True)
            for bdf in members:
                (group / "devices" / bdf).symlink_to(root / "bus/pci/devices" / bdf)
                (root / "bus/pci/devices" / bdf / "iommu_group").symlink_to(group)
        if pages:
            (root / PAGES).mkdir(parents=True)
            for name, count in zip(("nr_hugepages", "free_hugepages"), pages):
                (root / PAGES / name).write_text(f"{count}\n")
        return root

    CARD, SOUND, BRIDGE = "0000:65:00.0", "0000:65:00.1", "0000:64:00.0"
    H100 = ("0x10de", "0x030200", "vfio-pci")

    def test_a_card_that_is_ready(self):
        devices = {self.CARD: self.H100, self.BRIDGE: ("0x8086", "0x060400", "pcieport")}
        root = self.sysfs(devices, {12: [self.CARD, self.BRIDGE]})
        self.assertEqual(gpu.problems([self.CARD], 4096, root), [])
        self.assertEqual(gpu.problems([], 4096, root / "nowhere"), [])

    def test_driver_of_the_card_and_of_its_group(self):
        devices = {self.CARD: ("0x10de", "0x030000", "nvidia")}
        devices[self.SOUND] = ("0x10de", "0x040300", None)
        lines = gpu.problems([self.CARD], 1024, self.sysfs(devices, {1: list(devices)}))
        self.assertEqual(len(lines), 2)
        self.assertRegex(lines[0], f"^{self.CARD} is bound to nvidia, .*driver/unbind; ")
        self.assertRegex(lines[1], f"^{self.SOUND}, in the IOMMU group of .*bound to no driver")
        self.assertNotIn("unbind", lines[1])

    def test_no_iommu(self):
        lines = gpu.problems([self.CARD], 1024, self.sysfs({self.CARD: self.H100}, {}))
        self.assertEqual(len(lines), 1)
        self.assertIn("intel_iommu=on", lines[0])

    def test_not_a_gpu(self):
        devices = {
            self.CARD: ("0x8086", "0x030000", "vfio-pci"),
            self.SOUND: ("0x10de", "0x040300"),
        }
        devices[self.SOUND] += ("vfio-pci",)
        root = self.sysfs(devices, {1: [self.CARD], 2: [self.SOUND]})
        for bdf in devices:
            self.assertIn("is no NVIDIA GPU", gpu.problems([bdf], 1024, root)[0])

    def test_addresses(self):
        root = self.sysfs({self.CARD: self.H100}, {1: [self.CARD]})
        for bdf in ("65:00.0", "0000:65:00.8", "0000:65:00.0/..", "0000:ZZ:00.0", ""):
            self.assertIn("is no PCI address", gpu.problems([bdf], 1024, root)[0])
        self.assertIn("there is no device", gpu.problems(["0000:66:00.0"], 1024, root)[0])
        self.assertIn("named twice", gpu.problems([self.CARD] * 2, 1024, root)[0])

    def test_huge_pages(self):
        devices, groups = {self.CARD: self.H100}, {1: [self.CARD]}
        lines = gpu.problems([self.CARD], 4097, self.sysfs(devices, groups, (6, 2)))
        self.assertEqual(len(lines), 1)
        self.assertIn(f"the guest takes 5: echo 9 > /sys/{PAGES}/nr_hugepages", lines[0])
        lines = gpu.problems([self.CARD], 4096, self.sysfs(devices, groups, None))
        self.assertIn("hugepagesz=1G", lines[0])

    def test_arguments(self):
        command = gpu.arguments([self.CARD, "0000:b3:00.0"])
        joined = " ".join(command)
        self.assertEqual(joined.count("vfio-pci,host="), 2)
        self.assertIn(f"vfio-pci,host={self.CARD},bus=gpu0,rombar=0,romfile=", command)
        self.assertIn("-mem-prealloc", command)
        self.assertEqual(gpu.arguments([]), [])


@unittest.skipIf(guest.MISSING, NEEDED)
class Boot(unittest.TestCase):
    """A test build of the guest, with evidence psk: the real init, and probes beside it."""

    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(guest.enter(cls, tempfile.TemporaryDirectory()))
        cls.site = support.make_site(cls.folder)
        cls.listener = guest.enter(cls, socket.create_server(("127.0.0.1", 0)))
        cls.listener.setblocking(False)
        cls.datagrams = guest.enter(cls, socket.socket(type=socket.SOCK_DGRAM))
        port = cls.listener.getsockname()[1]
        cls.datagrams.bind(("127.0.0.1", port))
        cls.datagrams.setblocking(False)
        files = {
            "muenclave__py": (support.ROOT / "tests" / "guest_probe.py").read_bytes(),
            "real__py": (support.ROOT / "muenclave.py").read_bytes(),
            "probe_port": str(port).encode(),
        }
        overlay = guest.overlay(cls.folder / "overlay", cls.site, **files)
        cls.image = guest.build(cls.folder / "image", *guest.PRODUCT, "--overlay", overlay)
        cls.values = json.loads((cls.image / "reference.json").read_text())
        changed = {key: value for key, value in cls.values.items() if key != "pcrs"}
        cls.site.reference = cls.folder / "psk.json"
        changed |= {"kind": "psk", "root": "psk"}
        cls.site.reference.write_text(json.dumps(changed))
        cls.disks = [cls.image / "esp.img", cls.site.model, pathlib.Path(vm.FIRMWARE)]
        cls.disks.append(pathlib.Path(vm.VARIABLES))
        cls.before = [image.sha256(path) for path in cls.disks]
        cls.vm = guest.enter(cls, guest.Guest(cls.image, cls.site.model))
        cls.port = cls.vm.listen()
        line = cls.vm.wait_for("probe: ")
        cls.found = json.loads(line.removeprefix("probe: "))

    def session(self, role):
        inlet = muproxy.Inlet(support.FREE_RATE, 1 << 30)
        reference = muproxy.read_reference(self.site.reference)
        secret = muproxy.read_secret(getattr(self.site, f"{role}_psk"))
        return muproxy.Session(("127.0.0.1", self.port), reference, secret, role, inlet)

    def proxy(self, verb, *arguments):
        where = ["--port", self.port, "--reference", self.site.reference]
        return support.proxy(verb, *where, "--psk", self.site.user_psk, *arguments)

    def test_it_measures_what_was_built(self):
        done = self.proxy("attest", "--json")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn(self.values["measurement"], done.stdout)

    def test_another_measurement_is_refused(self):
        wrong = self.folder / "wrong.json"
        values = json.loads(self.site.reference.read_text()) | {"measurement": "ab" * 32}
        wrong.write_text(json.dumps(values))
        done = self.proxy("attest", "--reference", wrong)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("ab" * 32, done.stdout + done.stderr)

    def test_the_tpm_has_what_was_predicted(self):
        predicted = pcr.predict((self.image / "muenclave.efi").read_bytes())
        self.assertEqual(self.found["pcrs"], {str(i): v.hex() for i, v in predicted.items()})
        self.assertEqual(self.found["pcrs"]["4"], self.values["pcrs"]["4"])
        self.assertEqual(self.found["command_line"], self.values["image"]["command_line"])

    def test_nothing_can_be_written(self):
        refused = ("EROFS", "EPERM", "EACCES", "ENOENT")
        for place, result in self.found["write"].items():
            self.assertIn(result, refused, place)
        self.assertEqual(self.found["write"]["/"], "EROFS")
        mounts = {place: options.split(",") for _, place, _, options in self.found["mounts"]}
        read_only = ("/", "/sys", "/sys/kernel/security", "/dev")
        self.assertEqual(set(mounts), {"/proc", *read_only})
        for place in read_only:
            self.assertIn("ro", mounts[place], place)

    def test_no_way_out(self):
        found = self.found["out"]
        self.assertEqual(found["tcp to elsewhere"], "ENETUNREACH")
        self.assertEqual(found["udp to elsewhere"], "ENETUNREACH")
        for name in ("ipv6", "packets"):
            self.assertEqual(found[name], "EAFNOSUPPORT", name)
        self.assertEqual(found["netlink to audit"], "EPROTONOSUPPORT")
        self.assertIn(found["vsock"], ("ENODEV", "ENETUNREACH"))
        self.assertNotEqual(found["tcp to the host"], "done")
        for listener in (self.listener.accept, lambda: self.datagrams.recv(16)):
            with self.assertRaises(BlockingIOError):
                listener()

    def test_one_port(self):
        self.assertEqual(self.found["listening"], ["tcp 9000"])

    def test_devices(self):
        named = {"vda", "vdb", "tpm0", "tpmrm0", "ttyS0", "hwrng"}  # what tools/vm.py gives it
        kernel = {"console", "full", "kmsg", "mapper", "null", "random", "tty", "urandom", "zero"}
        self.assertEqual(set(self.found["devices"]), named | kernel | {"vsock"})

    def test_system_calls(self):
        for name, result in self.found["calls"].items():
            self.assertNotEqual(result, "done", name)
        for name in "init_module bpf io_uring_setup userfaultfd process_vm_readv swapon".split():
            self.assertEqual(self.found["calls"][name], "ENOSYS", name)
        self.assertEqual(self.found["ptrace"], "EPERM")
        self.assertIn(self.found["memory"], ("EPERM", "EACCES"))

    def test_capabilities(self):
        names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
        kept = f"{sum(1 << number for number in muenclave.INIT_CAPABILITIES):016x}"
        init = {name: "0" * 16 if name in ("CapInh", "CapAmb") else kept for name in names}
        self.assertEqual(self.found["capabilities"]["init"], init)
        self.assertEqual(self.found["capabilities"]["gate"], dict.fromkeys(names, "0" * 16))

    def test_files(self):
        self.assertEqual([path for path, there in self.found["files"].items() if there], [])
        expected = ["/usr/bin/python3.11 100755", "/usr/lib64/ld-linux-x86-64.so.2 100755"]
        self.assertEqual(self.found["executables"], expected)

    def test_the_serial_port_whatever_the_engine_does(self):
        """It is started, takes all memory or faults, and dies, twice; the guest says no more."""
        with contextlib.closing(self.session("owner")) as session:
            session.prove(support.unlock_token(self.site))
        table = muproxy.read_vocabulary(self.site.vocabulary)
        with contextlib.closing(self.session("user")) as session:
            session.prove({"token": muproxy.read_token(self.site.token)})
            for number, prompt in enumerate(("fault", "memory"), 1):
                with self.assertRaises(mp.ProtocolError) as caught:
                    list(session.generate({"prompt": prompt}, table))
                self.assertEqual(caught.exception.code, "engine_lost")
                ready = self.vm.count_for("muenclave: ready", number + 1)
                self.assertTrue(ready, self.vm.lines)
        said = [line for line in self.vm.lines if not line.startswith(("vm: ", "probe: "))]
        for line in said:
            self.assertRegex(line, guest.CONSOLE)
        self.assertEqual(said.count("muenclave: engine lost"), 2)

    def test_a_microvm_measures_nothing_and_nobody_says_that_it_does(self):
        with guest.Guest(self.image, self.site.model, "--microvm") as running:
            port = running.listen()
            self.assertIn("vm: nothing is measured in a microvm", "\n".join(running.lines))
            self.assertEqual(set(running.children()), {"qemu-system-x86"})
            where = ["--port", port, "--psk", self.site.user_psk, "--reference"]
            done = support.proxy("attest", *where, self.site.reference)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            self.assertIn("root: psk (a shared secret: it says who answers, not", done.stdout)
            done = support.proxy("attest", *where, self.image / "reference.json")
            self.assertEqual(done.returncode, 3, done.stdout)  # it does not speak of a TPM
            self.assertIn("the connection ended", done.stderr)

    def test_no_disk_has_changed(self):
        self.assertEqual([image.sha256(path) for path in self.disks], self.before)


@unittest.skipIf(guest.MISSING, NEEDED)
class Vsock(unittest.TestCase):
    """A guest without an IP stack."""

    @unittest.skipUnless(os.path.exists("/dev/vhost-vsock"), "needs vsock")
    def test_handshake(self):
        with tempfile.TemporaryDirectory() as folder:
            image = guest.build(pathlib.Path(folder), "--no-extras", "--variant", "vsock")
            with guest.Guest(image, support.sealed_demo().model, "--vsock", "7") as running:
                running.wait_for("muenclave: locked")
                with socket.socket(socket.AF_VSOCK) as connection:
                    connection.connect((7, 9000))
                    share, facts = mp.KeyShare(), {"version": mp.VERSION, "role": "owner"}
                    facts |= {"nonce": "00" * 32, "share": share.public.hex(), "evidence": "tpm2"}
                    connection.sendall(mp.frame(mp.encode_json(facts)))
                    answer = mp.read_frame(connection, mp.HANDSHAKE_FRAME, support.SECONDS)
                    mp.parse_message(answer, mp.MEASUREMENT)


@unittest.skipIf(guest.MISSING, NEEDED)
class Ending(unittest.TestCase):
    """Whatever ends, all of it ends."""

    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(guest.enter(cls, tempfile.TemporaryDirectory()))
        cls.image = guest.build(cls.folder / "image", *guest.PRODUCT)

    def start(self):
        running = guest.Guest(self.image, support.sealed_demo().model)
        self.addCleanup(running.__exit__)
        # By name: a child that has not become its program yet has the tool's.
        programs = {"qemu-system-x86", "swtpm"}
        self.assertTrue(guest.wait_until(lambda: set(running.children()) == programs))
        return running, running.children()

    def check_ended(self, running, children):
        running.process.wait(20)
        for name, number in children.items():
            gone = guest.wait_until(lambda number=number: not os.path.exists(f"/proc/{number}"))
            self.assertTrue(gone, name)

    def test_ctrl_c(self):
        running, children = self.start()
        running.process.send_signal(signal.SIGINT)
        self.check_ended(running, children)
        self.assertEqual(running.process.returncode, 0)

    def test_kill(self):
        for victim in ("swtpm", "qemu-system-x86"):  # without its TPM, QEMU may be the first to say
            running, children = self.start()
            os.kill(children[victim], signal.SIGKILL)
            self.check_ended(running, children)
            self.assertEqual(running.process.returncode, 1)
            pattern = r"vm: error: (?:QEMU failed: |swtpm has ended)"
            said = lambda r=running, p=pattern: re.search(p, "\n".join(r.lines))  # noqa: E731
            self.assertTrue(guest.wait_until(said), running.lines)

    def test_kill_of_the_tool_itself(self):
        running, children = self.start()
        running.process.kill()
        self.check_ended(running, children)

    def test_a_microvm_can_t_prove_what_the_product_has_to(self):
        with guest.Guest(self.image, support.sealed_demo().model, "--microvm") as running:
            self.assertIn("/dev/tpmrm0", running.wait_for("muenclave: error:"))
            running.process.wait(guest.SECONDS)
            self.assertEqual(running.process.returncode, 0)

    def test_a_broken_image_ends_the_guest(self):
        """Weights that are no sealed model: the gate says so and the guest ends by itself."""
        weights = self.folder / "zeros"
        weights.write_bytes(bytes(1 << 20))
        with guest.Guest(self.image, weights) as running:
            self.assertIn("not a sealed model", running.wait_for("muenclave: error:"))
            running.process.wait(guest.SECONDS)
            self.assertEqual(running.process.returncode, 0)


if __name__ == "__main__":
    unittest.main()
