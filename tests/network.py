"""The other end of a guest's cable: Ethernet frames, made and read by hand.

QEMU passes frames as datagrams (-netdev dgram). Formats: RFC 826, 791, 9293, 768, 792.
"""

import contextlib
import socket
import struct

GUEST, GUEST_MAC = "10.0.2.15", bytes.fromhex("525400123456")  # QEMU's default
OURS, OUR_MAC = "10.0.2.2", bytes.fromhex("020000000002")
IP, ARP = 0x0800, 0x0806
ICMP, TCP, UDP = 1, 6, 17
SYN, RST, ACK = 2, 4, 16
OUR_PORT = 40000
WINDOW = 128  # frames in flight, as many as the guest's card takes at once


class Cable:
    """A network card's other end. `options`: of QEMU. seen: (EtherType, IP protocol) that came."""

    def __init__(self):
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", 0))
            self.peer = other.getsockname()
        ends = {"local": self.peer, "remote": self.socket.getsockname()}
        self.options = "dgram,id=net" + "".join(
            f",{name}.type=inet,{name}.host={host},{name}.port={port}"
            for name, (host, port) in ends.items()
        )
        self.seen = set()

    def send(self, protocol, segment):
        """Send an IP packet to the guest."""
        header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0, 64, protocol, 0)
        header += socket.inet_aton(OURS) + socket.inet_aton(GUEST)
        header = header[:10] + checksum(header) + header[12:]
        self.socket.sendto(frame(IP, header + segment), self.peer)

    def receive(self, seconds):
        """The next IP packet of the guest: (protocol, segment); None if there is none in time."""
        self.socket.settimeout(seconds)
        with contextlib.suppress(TimeoutError):
            while True:
                data = self.socket.recv(65536)
                kind, packet = int.from_bytes(data[12:14], "big"), data[14:]
                self.seen.add((kind, packet[9] if kind == IP else None))
                if kind == ARP and packet[6:8] == b"\0\1":
                    reply = packet[:6] + b"\0\2" + OUR_MAC + packet[24:28] + packet[8:18]
                    self.socket.sendto(frame(ARP, reply), self.peer)
                elif kind == IP:
                    return packet[9], packet[20 : int.from_bytes(packet[2:4], "big")]

    def knock(self, port):
        """Send a SYN to a port of the guest."""
        segment = struct.pack(">HHIIBBHHH", OUR_PORT, port, 1, 0, 5 << 4, SYN, 65535, 0, 0)
        addresses = socket.inet_aton(OURS) + socket.inet_aton(GUEST)
        pseudo = addresses + struct.pack(">BBH", 0, TCP, len(segment))
        self.send(TCP, segment[:16] + checksum(pseudo + segment) + segment[18:])

    def scan(self, rounds=40):
        """{port: TCP flags of its answer}, of all ports; those that never answer are missing."""
        answers = {}
        for _ in range(rounds):
            waiting = [port for port in range(1, 65536) if port not in answers]
            for first in range(0, len(waiting), WINDOW):
                asked = waiting[first : first + WINDOW]
                for port in asked:
                    self.knock(port)
                while not answers.keys() >= set(asked) and (packet := self.receive(0.5)):
                    if packet[0] == TCP:
                        answers[int.from_bytes(packet[1][:2], "big")] = packet[1][13]
            if len(answers) == 65535:
                break
        return answers

    def close(self):
        """Pull it out."""
        self.socket.close()


def frame(kind, payload):
    """An Ethernet frame to the guest."""
    return GUEST_MAC + OUR_MAC + kind.to_bytes(2, "big") + payload.ljust(46, b"\0")


def checksum(data):
    """The Internet checksum (RFC 1071), 2 bytes."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return (~(total + (total >> 16)) & 0xFFFF).to_bytes(2, "big")
