"""Giving a host's GPU to the guest by VFIO: what has to hold, and QEMU's arguments for it.

Sources: Linux, Documentation/driver-api/vfio.rst (groups, binding) and
Documentation/ABI/testing/sysfs-bus-pci (driver_override). Used by tools/vm.py.
"""

import pathlib
import re

BDF = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")  # domain:bus:device.function
NVIDIA = "0x10de"
DISPLAY, BRIDGE = "0x03", "0x06"  # PCI base classes
DRIVER = "vfio-pci"
HUGE_PAGE = 1 << 10  # MiB
HUGE_PAGES = "kernel/mm/hugepages/hugepages-1048576kB"
MMIO_WINDOW = 1 << 19  # MiB of address space for the GPUs' memory; OVMF's own is too small


def problems(devices, memory, sysfs="/sys"):
    """What keeps these GPUs (BDF each) from a guest with so many MiB, and what mends it: lines."""
    sysfs = pathlib.Path(sysfs)
    if not devices:
        return []
    found = [line for bdf in devices for line in device_problems(bdf, devices, sysfs)]
    for bdf in sorted({bdf for bdf in devices if devices.count(bdf) > 1}):
        found.append(f"{bdf} is named twice: name it once")
    return found + memory_problems(memory, sysfs)


def device_problems(bdf, devices, sysfs):
    """The same for one of them."""
    if not BDF.fullmatch(bdf):
        return [f"{bdf} is no PCI address: write it as in 0000:65:00.0 (lspci -D shows them)"]
    device = sysfs / "bus/pci/devices" / bdf
    if not device.exists():
        return [f"there is no device {bdf}: lspci -D shows those that there are"]
    if read(device / "vendor") != NVIDIA or not read(device / "class").startswith(DISPLAY):
        return [f"{bdf} is no NVIDIA GPU: lspci -D -d 10de: shows them"]
    group = device / "iommu_group"
    if not group.exists():
        return [
            f"{bdf} is in no IOMMU group: switch on VT-d or AMD-Vi in the firmware, and boot the "
            "host with intel_iommu=on iommu=pt (Intel) or iommu=pt (AMD)"
        ]
    lines = []
    for member in sorted(path.name for path in (group / "devices").iterdir()):
        other = sysfs / "bus/pci/devices" / member
        if read(other / "class").startswith(BRIDGE):
            continue  # bridges of a group stay with the host
        driver = (other / "driver").resolve().name if (other / "driver").exists() else None
        if driver != DRIVER:
            whose = "" if member == bdf else f", in the IOMMU group of {bdf},"
            state = f"bound to {driver}" if driver else "bound to no driver"
            lines.append(f"{member}{whose} is {state}, not to {DRIVER}: {bind(member, driver)}")
    return lines


def bind(bdf, driver):
    """The commands, as root, that bind a device to vfio-pci."""
    device = f"/sys/bus/pci/devices/{bdf}"
    commands = [f"modprobe {DRIVER}", f"echo {DRIVER} > {device}/driver_override"]
    if driver:
        commands.append(f"echo {bdf} > {device}/driver/unbind")
    return "; ".join([*commands, f"echo {bdf} > /sys/bus/pci/drivers_probe"])


def memory_problems(memory, sysfs):
    """Whether the host has free huge pages of 1 GiB for the guest's memory (MiB)."""
    wanted = -(-memory // HUGE_PAGE)
    free, total = (read(sysfs / HUGE_PAGES / name) for name in ("free_hugepages", "nr_hugepages"))
    if not free:
        return ["the host's kernel has no huge pages of 1 GiB: boot it with hugepagesz=1G"]
    if int(free) >= wanted:
        return []
    needed = int(total) + wanted - int(free)
    mend = f"echo {needed} > /sys/{HUGE_PAGES}/nr_hugepages"
    return [
        f"{free} huge pages of 1 GiB are free, the guest takes {wanted}: {mend} "
        f"(or, if memory is fragmented, boot with hugepagesz=1G hugepages={needed})"
    ]


def read(path):
    """A file of sysfs without its end of line, "" if there is none."""
    try:
        return path.read_text("ascii").strip()
    except OSError:
        return ""


def arguments(devices):
    """QEMU's arguments: each GPU behind a root port of its own, its option ROM not run."""
    if not devices:
        return []
    window = f"name=opt/ovmf/X-PciMmio64Mb,string={MMIO_WINDOW}"
    command = ["-fw_cfg", window, "-mem-path", "/dev/hugepages", "-mem-prealloc"]
    for number, bdf in enumerate(devices):
        port = f"pcie-root-port,id=gpu{number},chassis={number + 1},romfile="
        card = f"vfio-pci,host={bdf},bus=gpu{number},rombar=0,romfile="
        command += ["-device", port, "-device", card]
    return command
