"""`format` of JSON Schema, as expressions in Rust's syntax that match whole strings and only valid ones.

The expressions follow the RFCs that JSON Schema names. Left out, so that no reply contains them: leap seconds, quoted
names and IPv6 literals in mail addresses, and encoded host names (`xn--...`), which no expression can check. Other
formats are annotations, as in JSON Schema (`regex`, `idn-email`, `idn-hostname`, and a client's own names).
"""

from collections.abc import Mapping
from types import MappingProxyType

LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
DATE = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{LEAP_YEAR}-02-29)"
)
CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
TIME = rf"{CLOCK}:[0-5][0-9](?:\.[0-9]+)?(?:[Zz]|[+-]{CLOCK})"
DAYS = "(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
HOURS = "T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"

# At most 63 characters, of which the third and fourth are not both a hyphen: RFC 5891 keeps those for encoded names.
LABEL = (
    "(?:[0-9A-Za-z]|[0-9A-Za-z][0-9A-Za-z-]{0,2}[0-9A-Za-z]"
    "|[0-9A-Za-z][0-9A-Za-z-](?:[0-9A-Za-z][0-9A-Za-z-]|-[0-9A-Za-z])[0-9A-Za-z-]{0,58}[0-9A-Za-z])"
)
HOST_NAME = rf"{LABEL}(?:\.{LABEL})*"
ATOM = "[0-9A-Za-z!#$%&'*+/=?^_`{|}~-]+"

BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
IPV4 = rf"{BYTE}(?:\.{BYTE}){{3}}"
PAIR = "[0-9A-Fa-f]{1,4}"
TAIL = f"(?:{PAIR}:{PAIR}|{IPV4})"
IPV6 = "|".join([
    f"(?:{PAIR}:){{6}}{TAIL}", f"::(?:{PAIR}:){{5}}{TAIL}", f"(?:{PAIR})?::(?:{PAIR}:){{4}}{TAIL}",
    f"(?:(?:{PAIR}:){{0,1}}{PAIR})?::(?:{PAIR}:){{3}}{TAIL}", f"(?:(?:{PAIR}:){{0,2}}{PAIR})?::(?:{PAIR}:){{2}}{TAIL}",
    f"(?:(?:{PAIR}:){{0,3}}{PAIR})?::{PAIR}:{TAIL}", f"(?:(?:{PAIR}:){{0,4}}{PAIR})?::{TAIL}",
    f"(?:(?:{PAIR}:){{0,5}}{PAIR})?::{PAIR}", f"(?:(?:{PAIR}:){{0,6}}{PAIR})?::",
])  # fmt: skip

ENCODED = "%[0-9A-Fa-f]{2}"
BEYOND_ASCII = r"\x{a0}-\x{d7ff}\x{f900}-\x{fdcf}\x{fdf0}-\x{ffef}" + "".join(
    rf"\x{{{plane:x}0000}}-\x{{{plane:x}fffd}}" for plane in range(1, 15)
).replace("e0000", "e1000")
PRIVATE = r"\x{e000}-\x{f8ff}\x{f0000}-\x{ffffd}\x{100000}-\x{10fffd}"


def uri(more: str = "", private: str = "") -> str:
    """RFC 3986's absolute form, with a fragment; RFC 3987's, with the characters `more`, and `private` in queries."""
    return rf"[A-Za-z][0-9A-Za-z+.-]*:(?:{_authority(more)}|{_rooted(more)}|{_path(more)})?{_behind(more, private)}"


def reference(more: str = "", private: str = "") -> str:
    """A URI, or a reference relative to one, whose first segment has no colon."""
    first = rf"(?:[0-9A-Za-z._~!$&'()*+,;=@{more}-]|{ENCODED})+(?:/{_segment(more)}*)*"
    relative = f"(?:{_authority(more)}|{_rooted(more)}|{first})?{_behind(more, private)}"
    return f"{uri(more, private)}|{relative}"


def _segment(more: str) -> str:
    return rf"(?:[0-9A-Za-z._~!$&'()*+,;=:@{more}-]|{ENCODED})"


def _path(more: str) -> str:
    return f"{_segment(more)}+(?:/{_segment(more)}*)*"


def _rooted(more: str) -> str:
    return f"/(?:{_path(more)})?"


def _authority(more: str) -> str:
    user = rf"(?:(?:[0-9A-Za-z._~!$&'()*+,;=:{more}-]|{ENCODED})*@)?"
    literal = rf"\[(?:{IPV6}|[Vv][0-9A-Fa-f]+\.[0-9A-Za-z._~!$&'()*+,;=:-]+)\]"
    name = rf"(?:[0-9A-Za-z._~!$&'()*+,;={more}-]|{ENCODED})*"
    return f"//{user}(?:{literal}|{name})(?::[0-9]*)?(?:/{_segment(more)}*)*"


def _behind(more: str, private: str) -> str:
    query = rf"(?:[0-9A-Za-z._~!$&'()*+,;=:@/?{more}{private}-]|{ENCODED})*"
    fragment = rf"(?:[0-9A-Za-z._~!$&'()*+,;=:@/?{more}-]|{ENCODED})*"
    return rf"(?:\?{query})?(?:#{fragment})?"


POINTER = "(?:/(?:[^~/]|~[01])*)*"
VARIABLE = rf"(?:[0-9A-Za-z_]|{ENCODED})(?:\.?(?:[0-9A-Za-z_]|{ENCODED}))*(?::[1-9][0-9]{{0,3}}|\*)?"
PLAIN = rf"[\x21\x23\x24\x26\x28-\x3b\x3d\x3f-\x5b\x5d\x5f\x61-\x7a\x7e{BEYOND_ASCII}{PRIVATE}]"

# By name: expressions that a string must all match, and the most characters that it may have.
FORMATS: Mapping[str, tuple[tuple[str, ...], int | None]] = MappingProxyType(
    {
        "date": ((DATE,), None),
        "time": ((TIME,), None),
        "date-time": ((f"{DATE}[Tt]{TIME}",), None),
        "duration": ((f"P(?:[0-9]+W|{DAYS}(?:{HOURS})?|{HOURS})",), None),
        "email": ((rf"{ATOM}(?:\.{ATOM})*@(?:{HOST_NAME}|\[{IPV4}\])", "[^@]{1,64}@.*"), 254),
        "hostname": ((HOST_NAME,), 253),
        "ipv4": ((IPV4,), None),
        "ipv6": ((IPV6,), None),
        "uri": ((uri(),), None),
        "uri-reference": ((reference(),), None),
        "iri": ((uri(BEYOND_ASCII, PRIVATE),), None),
        "iri-reference": ((reference(BEYOND_ASCII, PRIVATE),), None),
        "uuid": (("[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",), None),
        "json-pointer": ((POINTER,), None),
        "relative-json-pointer": ((f"(?:0|[1-9][0-9]*)(?:#|{POINTER})",), None),
        "uri-template": ((rf"(?:{PLAIN}|{ENCODED}|\{{[+#./;?&=,!@|]?{VARIABLE}(?:,{VARIABLE})*\}})*",), None),
    }
)
