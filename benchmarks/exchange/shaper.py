"""The rate of a link between two namespaces, and what was lost on it.

Packets wait and are not dropped, so that a slow step is not TCP's patience: a lost tail
is sent again after 200 ms at least. What is lost all the same is counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import Any

_QUEUE = 1 << 30  # bytes that may wait: more than TCP lets be on their way
_BURST = 1 << 17  # bytes that may pass at once at least: two of the largest packets
_BURST_TIME = 2.5e-4  # s of the rate that may pass at once: small batches pay it too
_NARROW = (
    1 << 32
) - 1  # bytes a second; faster ones stand in an attribute of their own
_WIDE = "TCA_TBF_RATE64"
_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
# BBR sends next to nothing for 200 ms, every ten seconds, to see how fast a link is
# when nobody uses it. Reno is in every kernel, and slows down for losses alone.
_WANTED = "reno"


def shape(inside: Any, index: int, gbit: float) -> None:
    """Let no more than that leave an interface; ``inside`` is its `NetNS`."""
    rate = int(gbit * 1e9 / 8)  # bytes a second
    burst = max(int(rate * _BURST_TIME), _BURST)
    _know_wide_rates()
    inside.tc("add", "tbf", index, 0x10000, rate=rate, burst=burst, limit=_QUEUE)


def _know_wide_rates() -> None:
    """Teach pyroute2 rates of tbf beyond 34 Gbit/s, as ``tc`` writes them."""
    from pyroute2.netlink.rtnl.tcmsg import sched_tbf

    if (_WIDE, "uint64") in sched_tbf.options.nla_map:
        return
    narrow = sched_tbf.get_parameters

    def get_parameters(asked: dict[str, Any]) -> dict[str, Any]:
        # The burst is told as the time that it takes: it must not be of the cut rate.
        rate, cut = asked["rate"], min(asked["rate"], _NARROW)
        made = narrow(asked | {"rate": cut, "burst": asked["burst"] * cut // rate})
        made["attrs"].append([_WIDE, rate])
        return made

    sched_tbf.options.nla_map = (*sched_tbf.options.nla_map, (_WIDE, "uint64"))
    sched_tbf.get_parameters = get_parameters


def calm_down() -> None:
    """TCP in this thread's namespace slows down for losses alone, where that may be."""
    try:
        _CONTROL.write_text(_WANTED)
    except OSError:
        return  # results name what it is


def congestion_control() -> str:
    """Of TCP in this thread's namespace."""
    return _CONTROL.read_text().strip()


class Lost(NamedTuple):
    """So far, in this thread's namespace."""

    dropped: int
    """Packets, by the shaper or by the interface."""
    sent_again: int
    """Segments of TCP."""
    timeouts: int
    """Of TCP: the sender heard nothing for 200 ms or more."""


def lost(interface: str) -> Lost:
    """For a thread of the interface's own namespace."""
    from pyroute2 import IPRoute

    with IPRoute() as here:
        index = here.link_lookup(ifname=interface)[0]
        shapers = here.get_qdiscs(index)
        (link,) = here.get_links(index)
    dropped = sum(shaper.get_attr("TCA_STATS")["drop"] for shaper in shapers)
    counted = link.get_attr("IFLA_STATS64")
    tcp = _tcp_counters()
    return Lost(
        dropped=dropped + counted["tx_dropped"] + counted["rx_dropped"],
        sent_again=tcp["RetransSegs"],
        timeouts=tcp["TCPTimeouts"],
    )


def _tcp_counters() -> dict[str, int]:
    """The kernel writes a line of names, then a line of numbers."""
    found = {}
    for file in ("snmp", "netstat"):
        lines = Path(f"/proc/thread-self/net/{file}").read_text().splitlines()
        for names, numbers in zip(lines[::2], lines[1::2], strict=True):
            found |= dict(zip(names.split(), numbers.split(), strict=True))
    return {name: int(value) for name, value in found.items() if value.isdigit()}
