"""Which addresses images and video may be fetched from: what is between a client's URL and the server's network.

    URL ── host ── resolved once ── each address checked ──> the connection, to one of the checked addresses

A name is looked up once, and the connection goes to the addresses that were checked. So a name that means another
address a moment later gains nothing. `--media-hosts` holds names (a.example.com, *.example.com) and networks
(10.0.0.0/8, 127.0.0.1):

- where it is empty, any host with a public address is fetched from;
- where it has names, only those hosts are, if their address is public;
- an address in one of its networks is fetched from whatever the host is called;
- `*` stands for all names, beside networks;
- `none` stands for no host at all.

Left out: ports, and what the fetched bytes are (sources.py).
"""

import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path

from engine.errors import ConfigError, RequestError
from engine.options.media import MediaOptions

NONE = "none"
ODD_NUMBER = re.compile(r"(?:^|\.)(?:[0-9]+|0[xX][0-9a-fA-F]*)\.?$|:")  # the end of what is no name
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address in its last 32 bits
ASSIGNED = ipaddress.ip_network("2000::/3")  # RFC 4291: all public IPv6 addresses are of it; fec0::1 was private
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Hosts:
    """What `--media-hosts` says. Raises ConfigError for an entry that is neither a name nor a network."""

    def __init__(self, entries: Sequence[str]) -> None:
        self.nothing = NONE in entries
        self._names: set[str] = set()
        self._below: list[str] = []
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        if self.nothing and len(entries) > 1:
            raise ConfigError(f"--media-hosts is {','.join(entries)}; {NONE} stands alone: leave it or the others out")
        for entry in entries:
            self._add(entry.lower().rstrip("."))

    def _add(self, entry: str) -> None:
        try:
            self._networks.append(ipaddress.ip_network(entry.strip("[]"), strict=False))
            return
        except ValueError:
            pass
        if entry == "*":
            self._below.append("")
            return
        if not entry or any(mark in entry for mark in "/:@?# ") or "*" in entry.removeprefix("*."):
            raise ConfigError(
                f"--media-hosts has {entry!r}; it takes names (cdn.example.com, *.example.com) and networks "
                "(10.0.0.0/8, 127.0.0.1)"
            )
        if entry.startswith("*."):
            self._below.append(entry[1:])
        else:
            self._names.add(entry)

    def allows(self, host: str, address: str) -> bool:
        """Whether `host` may be fetched from at `address`."""
        if self.nothing:
            return False
        found = _plain(ipaddress.ip_address(address.partition("%")[0]))
        if any(found in network for network in self._networks if network.version == found.version):
            return True
        listed = self._names or self._below or self._networks
        return _is_public(found) and (not listed or self._names_it(host.lower().rstrip(".")))

    def _names_it(self, host: str) -> bool:
        return host in self._names or any(host.endswith(end) for end in self._below)


def _plain(address: Address) -> Address:
    """`address`, or the IPv4 address that is reached through it."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or (address.teredo or (0, None))[1] or address
    return address


def _is_public(address: Address) -> bool:
    unusual = address.is_multicast or address.is_reserved or address.is_unspecified or address.is_link_local
    return address.is_global and not unusual and (address.version == 4 or address in ASSIGNED)


def check_sources(options: MediaOptions) -> Hosts:
    """The hosts of `options`. Raises ConfigError where they, or the root of files, cannot work."""
    if options.media_root is not None and not Path(options.media_root).is_dir():
        raise ConfigError(f"--media-root is {options.media_root}, which is no directory; name one that is there")
    return Hosts(options.media_hosts)


def check_literal(hosts: Hosts, host: str) -> None:
    """Raises RequestError where `host` is an address, and not an allowed one.

    Other spellings of addresses (127.1, 0x7f.1, 2130706433) are refused: connectors take them for addresses, as the
    system does, and no two agree on all of them."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        if hosts.nothing or ODD_NUMBER.search(host):
            raise not_allowed(host) from None
        return
    if not hosts.allows(host, host):
        raise not_allowed(host)


def not_allowed(host: str) -> RequestError:
    """The error of a host that is not fetched from."""
    return RequestError(
        f"is at the host {host[:200]!r}, which this server does not fetch from (--media-hosts); send it as a data: URL",
        code="media_not_allowed",
    )
