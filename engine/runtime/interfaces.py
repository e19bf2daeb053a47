"""Network interfaces of this host, by name or by address, as hosts that work together need them.

Left out: addresses of IPv6, and systems other than Linux, which have no ioctl of this number.
"""

import ipaddress
import socket
import struct
import sys

from engine.errors import ConfigError

SIOCGIFADDR = 0x8915  # ioctl: the IPv4 address of an interface


def addresses() -> dict[str, str]:
    """The IPv4 address of each interface that has one, by the interface's name."""
    if sys.platform != "linux":
        raise ConfigError(f"several hosts need Linux on each, and this one is {sys.platform}")
    from fcntl import ioctl

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                said = ioctl(sock, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            found[name] = socket.inet_ntoa(said[20:24])
    return found


def interface(said: str) -> tuple[str, str]:
    """Name and address of the interface that `said` names, or whose address it is. Raises ConfigError for neither."""
    known = addresses()
    for name, address in known.items():
        if said in (name, address):
            return name, address
    loopback = next((name for name, address in known.items() if address.startswith("127.")), "")
    if loopback and _is_loopback(said):  # all of 127.0.0.0/8 is this machine
        return loopback, said
    listed = ", ".join(f"{name} ({address})" for name, address in known.items())
    raise ConfigError(f"no interface of this host is, or has, {said}; there are {listed}: say --dist-interface")


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.IPv4Address(address).is_loopback
    except ValueError:
        return False


def resolved(host: str) -> str:
    """The IPv4 address of `host`. Raises ConfigError where it has none."""
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"--rendezvous {host} has no IPv4 address: {error}") from None
    return str(found[0][4][0])


def watched(sock: socket.socket, seconds: float) -> None:
    """Have the system end a connection whose peer has not answered for `seconds`, and send small frames at once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        for option, value in (
            (socket.TCP_KEEPIDLE, 2),
            (socket.TCP_KEEPINTVL, 2),
            (socket.TCP_KEEPCNT, 4),
            (socket.TCP_USER_TIMEOUT, round(seconds * 1000)),
        ):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
