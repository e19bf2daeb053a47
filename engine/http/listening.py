"""Where a server listens: the sockets that several front processes inherit, and how an address is told to people.

Each front has a socket of its own on the one port (SO_REUSEPORT), among which the kernel spreads connections. They are
made before the fronts and stay open in who makes them, so a connection that waits for a front that dies waits for the
next one. Left out: one front alone, whose socket the event loop makes.
"""

import errno
import socket

from engine.errors import ConfigError
from engine.options.listening import ListenOptions

BACKLOG = 2048  # connections that the kernel holds until they are accepted


def bound(options: ListenOptions, fronts: int) -> list[list[socket.socket]]:
    """Sockets that listen at the host and port of `options`, for each of so many fronts.

    Raises ConfigError if that cannot be."""
    try:
        return _bound(options.host, options.port, fronts)
    except OSError as error:
        raise cannot_listen(options, error) from error


def _bound(host: str, port: int, fronts: int) -> list[list[socket.socket]]:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[list[socket.socket]] = [[] for _ in range(fronts)]
    try:
        for index, (family, _, _, _, address) in enumerate(dict.fromkeys(found)):
            try:
                places = _shared(family, (address[0], port, *address[2:]), fronts)
            except OSError as error:
                missing = error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
                if missing and family == socket.AF_INET6 and (index or len(found) > 1):
                    continue  # a host of both kinds, on a machine of one
                raise
            port = places[0].getsockname()[1]  # if it was 0
            for own, place in zip(sockets, places, strict=True):
                own.append(place)
        if not sockets[0]:
            raise OSError(errno.EADDRNOTAVAIL, "no address of this machine is meant")
        return sockets
    except BaseException:
        for place in {each for own in sockets for each in own}:
            place.close()
        raise


def _shared(family: int, address: tuple[object, ...], fronts: int) -> list[socket.socket]:
    """A socket for each front at one address; the same one for all where the system has no SO_REUSEPORT."""
    alone = _socket(family, address, shared=False)  # another server's port is taken, even if that would share it
    if not hasattr(socket, "SO_REUSEPORT"):
        alone.listen(BACKLOG)
        return [alone] * fronts
    taken = alone.getsockname()
    alone.close()
    made: list[socket.socket] = []
    try:
        for _ in range(fronts):
            made.append(_socket(family, taken, shared=True))
        for each in made:
            each.listen(BACKLOG)
    except BaseException:
        for each in made:
            each.close()
        raise
    return made


def _socket(family: int, address: tuple[object, ...], *, shared: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def url_of(host: str, port: int) -> str:
    """Where a client on this machine reaches the server."""
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def cannot_listen(options: ListenOptions, error: OSError) -> ConfigError:
    """The error that says so, for people."""
    where = f"{options.host}:{options.port}"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"cannot listen on {where}: {error.strerror}; give an address of this machine with --host")
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"cannot listen on {where}: the port is taken; choose another with --port (0: any free one)")
    return ConfigError(f"cannot listen on {where}: {error.strerror}; choose another port with --port")
