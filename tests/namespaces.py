"""Two network namespaces with a cable between them, for one test, without root.

Run as a script: prints, as JSON, which exposures of a runtime's port a neighbour reaches; or
exits with 77 where namespaces are not to be had.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import sys

import anyio

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000

# linux/rtnetlink.h, linux/if_link.h, linux/veth.h
RTM_NEWLINK, NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE = 16, 0x1, 0x4, 0x400
IFLA_IFNAME, IFLA_LINKINFO, IFLA_NET_NS_PID = 3, 18, 19
IFLA_INFO_KIND, IFLA_INFO_DATA, VETH_INFO_PEER = 1, 2, 1
IFINFOMSG = bytes(16)

# linux/sockios.h
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, IFF_UP = 0x8914, 0x8916, 0x891C, 1

OURS, THEIRS = "10.9.8.1", "10.9.8.2"


def unshare(flags: int) -> None:
    if ctypes.CDLL(None).unshare(flags):
        sys.exit(77)


def attribute(kind: int, content: bytes) -> bytes:
    padding = -len(content) % 4
    return struct.pack("=HH", 4 + len(content), kind) + content + bytes(padding)


def lay_cable(pid: int) -> None:
    """Make a pair of interfaces, one end of which belongs to the process."""
    peer = IFINFOMSG + attribute(IFLA_IFNAME, b"theirs\0")
    peer += attribute(IFLA_NET_NS_PID, struct.pack("=I", pid))
    info = attribute(IFLA_INFO_KIND, b"veth\0")
    info += attribute(IFLA_INFO_DATA, attribute(VETH_INFO_PEER, peer))
    body = IFINFOMSG + attribute(IFLA_IFNAME, b"ours\0")
    body += attribute(IFLA_LINKINFO, info)
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | 0x200
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        header = struct.pack("=IHHII", 16 + len(body), RTM_NEWLINK, flags, 1, 0)
        netlink.sendto(header + body, (0, 0))
        (error,) = struct.unpack_from("=i", netlink.recv(4096), 16)
    if error:
        raise OSError(-error, os.strerror(-error))


def set_up(interface: str, address: str | None = None) -> None:
    name = interface.encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:

        def set_address(request: int, value: str) -> None:
            packed = socket.inet_aton(value)
            content = struct.pack("=16sHH4s8x", name, socket.AF_INET, 0, packed)
            fcntl.ioctl(any_socket, request, content)

        if address is not None:
            set_address(SIOCSIFADDR, address)
            set_address(SIOCSIFNETMASK, "255.255.255.0")
        flags = struct.pack("=16sH14x", name, IFF_UP)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, flags)


def neighbour(orders: int, answers: int) -> None:
    """Be in the other namespace, and try the ports that are ordered."""
    unshare(CLONE_NEWNET)
    os.write(answers, b"!")
    os.read(orders, 1)  # the cable is there
    set_up("theirs", THEIRS)
    while order := os.read(orders, 8):
        try:
            socket.create_connection((OURS, int(order)), timeout=5).close()
            os.write(answers, b"y")
        except OSError:
            os.write(answers, b"n")


async def exposures(orders: int, answers: int) -> dict[str, bool]:
    from stepflow_runtime import StepflowRuntime

    reached = {}
    for exposure in ("any", "loopback", "require-loopback"):
        options = {"exposure": exposure}
        async with StepflowRuntime.start(**options) as runtime:  # type: ignore[arg-type]
            assert (await runtime.health()) is not None
            os.write(orders, str(runtime.port).encode())
            reached[exposure] = os.read(answers, 1) == b"y"
    return reached


def main() -> None:
    unshare(CLONE_NEWUSER | CLONE_NEWNET)
    (orders, to_orders), (answers, to_answers) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(to_orders)
        neighbour(orders, to_answers)
        os._exit(0)
    os.close(to_answers)
    if not os.read(answers, 1):
        sys.exit(77)
    set_up("lo")
    lay_cable(pid)
    set_up("ours", OURS)
    os.write(to_orders, b"!")
    json.dump(anyio.run(exposures, to_orders, answers, backend=sys.argv[1]), sys.stdout)
    os.close(to_orders)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
