"""What to do about news of oneself: nothing, object, or rise above an earlier life. Pure.

An accusation is refuted with an early heartbeat. News that this life did not write come from an
earlier life, whose state others still remember, or from a twin: a copy of the state directory on
another device. Both raise the incarnation above them, at a bounded rate, so that neither failing
calls nor two devices with one identity can drive anyone wild. Twins are reported now and then.
"""

from enum import Enum

from coeld.effects import Report
from coeld.ids import NodeId
from coeld.messages import COUNTER_MAX, Beat, Entry, Message, Record, Status
from coeld.node_config import NodeConfig

REPORT_TWIN_S = 60.0


def first_record(node: NodeId, incarnation: int, config: NodeConfig) -> Record:
    """What this device says of itself before anything has happened."""
    return Record(
        node,
        incarnation,
        1,
        config.name,
        config.mqtt_host,
        config.mqtt_port or 0,
        blob_host=config.blob_host,
        blob_port=config.blob_port,
        stays_wide=not config.narrow,
        context_tokens=config.context_tokens,
    )


class Reaction(Enum):
    NONE = "none"
    OBJECT = "object"
    RISE = "rise"


class Oneself:
    """One life of one device, as others tell it."""

    def __init__(self, me: NodeId, heartbeat_s: float, grown_up_s: float) -> None:
        self.twins = 0
        """Signs of another device with this identity."""
        self._me = me
        self._heartbeat_s = heartbeat_s
        self._grown_up_s = grown_up_s
        """From this age on nobody tells of an earlier life any more."""
        self._born_at: float | None = None
        self._rose_at = self._reported_at = float("-inf")
        self._reports: list[Report] = []

    def lives(self, now: float) -> None:
        if self._born_at is None:
            self._born_at = now

    def hear(self, entry: Entry, me: Record, heartbeat: int, now: float) -> Reaction:
        """What somebody knows of us, against what we know ourselves."""
        if entry.incarnation < me.incarnation or entry.incarnation >= COUNTER_MAX:
            return Reaction.NONE
        foreign = (
            entry.incarnation > me.incarnation or entry.heartbeat > heartbeat or entry.seq > me.seq
        )
        if not foreign:
            return Reaction.OBJECT if entry.status > Status.ALIVE else Reaction.NONE
        if entry.status < Status.DEAD and now - (self._born_at or now) > self._grown_up_s:
            self.twin(now)
        if now - self._rose_at < self._heartbeat_s:
            return Reaction.NONE
        self._rose_at = now
        return Reaction.RISE

    def hear_myself(self, message: Message, me: Record, heartbeat: int, now: float) -> None:
        """A message with our own name on it: an echo, or a twin."""
        if message.incarnation > me.incarnation or (
            message.incarnation == me.incarnation
            and isinstance(message, Beat)
            and message.heartbeat > heartbeat
        ):
            self.twin(now)

    def twin(self, now: float) -> None:
        self.twins += 1
        if now - self._reported_at >= REPORT_TWIN_S:
            self._reported_at = now
            self._reports.append(
                Report(
                    f"another device uses the identity {self._me} of this one: both will"
                    " misbehave; delete the state directory of the copy and restart it"
                )
            )

    def reports(self) -> list[Report]:
        """What people should be told, once."""
        reports, self._reports = self._reports, []
        return reports
