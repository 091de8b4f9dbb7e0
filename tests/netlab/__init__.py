"""A lab for networks: devices on one Linux machine, joined by links that behave as told.

Each device is a network namespace with a TUN interface and control groups for CPU and memory. One
process, the switch, reads every packet from the TUN of its sender and writes it to that of its
receiver: later, slower, or never. Programs run in it unchanged; only the network differs.

    python -m tests.netlab --devices 4 --profile wifi -- COMMAND     (root; see __main__.py)

    with Lab(["a", "b"], PROFILES["wifi"]) as lab:
        lab.start("a", ["coeld", "up"])
        lab.link("a", "b", loss=0.3)        # one direction
        lab.partition(["a"], ["b"])
        lab.heal()

Why not `tc netem`: many kernels lack it; a TUN needs nothing but /dev/net/tun. IPv4 only.
Nothing outlives the lab: namespaces and TUNs belong to the switch's process, which ends with the
lab and then kills what is left in the control groups; the next lab sweeps what a kill of both left.
"""

from tests.netlab.lab import Lab, missing
from tests.netlab.links import PROFILES, Link, Profile

__all__ = ["PROFILES", "Lab", "Link", "Profile", "missing"]
