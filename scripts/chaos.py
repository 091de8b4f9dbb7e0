"""Random faults in a swarm of real devices on an emulated network, and what must never happen.

One swarm lives through many schedules, one after the other (tests/harness/disasters.py says what is
in them). Meanwhile two readers ask through two devices, one short greedy answer after the other.
After each schedule everything is mended, and the swarm must

- have lost no answer: each one is complete, but for those whose own device's agent or engine was
  killed; these end with an error at once, and another device gives the same answer;
- have given no wrong token: every text is the one of the undisturbed swarm;
- be whole again: everybody sees everybody, every expert has an owner, all agree on the routes;
- have leaked nothing: two processes per device, files, threads and memory of a process near what
  they were when it was first seen at rest, nothing left in /dev/shm.

A seed gives the same schedule again (not the same timing). Exit status 1 if a promise was broken.
"""

import argparse
import math
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import demo
from demo import Failed

from tests.harness.disasters import Disaster, Havoc, schedule
from tests.harness.lab_swarm import ALWAYS, Heard, LabDevice, Size, Stalls, listen, swarm_in_lab
from tests.netlab import missing

PROMPTS = ("Why is the sky blue?", "Name three colours.", "A")
FORMING_S_MAX = 90.0
"""From the first start; the machine may be busy with other things."""
WHOLE_S_MAX = 30.0
"""From the end of the last disaster."""
ERROR_S_MAX = 2.0
"""From the death of a decoder's process to the end of its answer."""
PAUSE_S = 0.2
LOADING_S_MAX = 10.0
"""What an engine needs only while it loads is gone within this."""
FILES_MAX, THREADS_MAX, GROWTH_BYTES_MAX = 32, 16, 64 << 20
"""What a process may have more of than when it was first seen at rest."""
STALL_S = 1.0
"""This program woke so late that the machine itself stood still: being late is no verdict then."""


@dataclass
class Outcome:
    """What one schedule came to."""

    broken: list[str] = field(default_factory=list)
    """Promises."""
    answers: int = 0
    lost: int = 0
    """Answers whose decoder was killed."""
    refused: int = 0
    silence_s: float = 0.0
    whole_s: float = 0.0
    stalls: Stalls = field(default_factory=Stalls)


class Chaos:
    """One swarm and what is known of it."""

    def __init__(self, devices: Sequence[LabDevice], tokens: int) -> None:
        self.devices, self.tokens = devices, tokens
        self.names = [device.name for device in devices]
        self.engines: set[str] = set()
        """Process ids of all that were seen."""
        self.first_sizes: dict[int, Size] = {}
        self.times: list[list[float]] = []
        """When each disaster of the schedule really began and ended."""
        demo.wait_settled(list(devices), len(devices), time.monotonic())
        self.texts = {prompt: self._undisturbed(prompt) for prompt in PROMPTS}
        self.shm = self._shm()

    def _undisturbed(self, prompt: str) -> str:
        heard = listen(self.devices[0], prompt, self.tokens)
        if not heard.reason:
            raise Failed(f"the undisturbed swarm did not answer: {heard.error}")
        return heard.text

    def run(self, disasters: Sequence[Disaster]) -> Outcome:
        outcome, lock = Outcome(), threading.Lock()
        self.times = [[math.inf, math.inf] for _ in disasters]
        over = threading.Event()
        started = time.monotonic()
        readers = [
            threading.Thread(
                target=self._read,
                args=(number, disasters, started, over, outcome, lock),
                daemon=True,  # Ctrl-C does not wait for answers of a swarm that is taken down
            )
            for number in (0, 1)
        ]
        with Stalls() as outcome.stalls:
            for reader in readers:
                reader.start()
            self._havoc(disasters, started)
            self._whole(outcome)
            over.set()
            for reader in readers:
                reader.join()
        self._look(outcome)
        return outcome

    def _havoc(self, disasters: Sequence[Disaster], started: float) -> None:
        havoc = Havoc(self.devices)
        moments = [(d.at_s, 1, n) for n, d in enumerate(disasters)]
        moments += [(d.end_s, 0, n) for n, d in enumerate(disasters)]
        for at_s, begins, n in sorted(moments):
            due = started + at_s
            time.sleep(max(0.0, due - time.monotonic()))
            self.times[n][1 - begins] = time.monotonic()
            self._shm()  # sees what is about to die
            (havoc.begin if begins else havoc.end)(disasters[n])

    def _read(
        self,
        number: int,
        disasters: Sequence[Disaster],
        started: float,
        over: threading.Event,
        outcome: Outcome,
        lock: threading.Lock,
    ) -> None:
        """Ask through one device until the schedule is over; when that one fails through others."""
        turn, count = number, 0
        while True:
            last = over.is_set()
            prompt = PROMPTS[count % len(PROMPTS)]
            device = self.devices[turn % len(self.devices)]
            heard = listen(device, prompt, self.tokens)
            with lock:
                outcome.answers += 1
                self._judge(heard, prompt, device, disasters, started, outcome)
            if heard.reason:
                count, turn = count + 1, number
                if last:
                    return
            else:
                turn += 1
                allowed_s = disasters[-1].end_s + WHOLE_S_MAX + outcome.stalls.longest_s
                if time.monotonic() - started > allowed_s:
                    with lock:
                        outcome.broken.append(f"no device answered any more: {heard.error}")
                    return
                time.sleep(PAUSE_S)

    def _judge(
        self,
        heard: Heard,
        prompt: str,
        device: LabDevice,
        disasters: Sequence[Disaster],
        started: float,
        outcome: Outcome,
    ) -> None:
        outcome.silence_s = max(outcome.silence_s, heard.silence_s())
        when = f"asked {device.name} at {heard.began_s - started:.2f} s, "
        when += f"ended {heard.ended_s - started:.2f} s"
        if heard.reason:
            if heard.text != self.texts[prompt]:
                pairs = zip(heard.text, self.texts[prompt], strict=False)
                same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                outcome.broken.append(
                    f"a wrong token after {same} of {len(self.texts[prompt])} characters ({when})"
                )
            return
        if not self.texts[prompt].startswith(heard.text):
            outcome.broken.append(f"a wrong token in a broken answer ({when})")
        if heard.refused:
            outcome.refused += 1
            return
        deaths = [
            began
            for (began, ended), disaster in zip(self.times, disasters, strict=True)
            if disaster.kills(device.name) and began <= heard.ended_s and ended >= heard.began_s
        ]
        if not deaths:
            outcome.broken.append(f"a lost answer: {heard.error} ({when})")
        elif heard.ended_s - max(heard.began_s, *deaths) > ERROR_S_MAX + outcome.stalls.longest_s:
            outcome.broken.append(f"a dead decoder's answer ended late: {heard.error} ({when})")
        else:
            outcome.lost += 1

    def _whole(self, outcome: Outcome) -> None:
        devices, since = list(self.devices), time.monotonic()
        while not demo.settled(devices, len(devices)):
            outcome.whole_s = time.monotonic() - since
            if outcome.whole_s > WHOLE_S_MAX + outcome.stalls.longest_s:
                outcome.broken.append(f"not whole again {outcome.whole_s:.0f} s later")
                return
            time.sleep(0.05)

    def _look(self, outcome: Outcome) -> None:
        """Does every device answer again, and was nothing left behind?"""
        for device in self.devices:
            heard = listen(device, PROMPTS[0], self.tokens)
            outcome.answers += 1
            if heard.text != self.texts[PROMPTS[0]]:
                outcome.broken.append(
                    f"{device.name} answers otherwise: {heard.text or heard.error}"
                )
        self._leaks(outcome)

    def _leaks(self, outcome: Outcome) -> None:
        """A process too many or too few; what is too much and stays so, for an engine that loads
        has files open for a while."""
        for device in self.devices:
            if len(engines := device.pids()["engine"]) != 1:
                outcome.broken.append(f"{device.name} has engines {engines}")
        since = time.monotonic()
        while (found := self._too_much()) and time.monotonic() - since < LOADING_S_MAX:
            time.sleep(0.1)
        outcome.broken += found

    def _too_much(self) -> list[str]:
        found = []
        parts = [
            (d, part, pid) for d in self.devices for part, ps in d.pids().items() for pid in ps
        ]
        for device, part, pid in parts:
            now = Size.of(pid)
            first = self.first_sizes.setdefault(pid, now)
            grown = (
                now.files - first.files > FILES_MAX
                or now.threads - first.threads > THREADS_MAX
                or now.rss_bytes - first.rss_bytes > GROWTH_BYTES_MAX
            )
            if grown:
                found.append(f"{device.name}'s {part} grew from {first} to {now}")
        if left := self._shm() - self.shm:
            found.append(f"left in /dev/shm: {sorted(left)}")
        return found

    def _shm(self) -> set[str]:
        """Files of engines seen in this lab; other programs of this machine have their own."""
        self.engines |= {str(pid) for device in self.devices for pid in device.pids()["engine"]}
        names = [path.name for path in Path("/dev/shm").glob("coeld-weights-*")]
        return {name for name in names if name.split("-")[2] in self.engines}


def line(seed: int, disasters: Sequence[Disaster], outcome: Outcome) -> str:
    what = "; ".join(map(str, disasters))
    return (
        f"{seed:6d}  {outcome.answers:3d} answers, {outcome.lost} lost with their decoder, "
        f"{outcome.refused} refused, longest silence {outcome.silence_s:.2f} s, "
        f"whole {outcome.whole_s:.1f} s later  [{what}]"
    )


def torment(
    folder: Path,
    seeds: Sequence[int],
    model: str,
    count: int,
    tokens: int,
    pace: float = 1.0,
    **sections: str,
) -> list[tuple[int, Outcome]]:
    """Live through the schedules of these seeds; what each came to, printed as it happens.

    `pace`: of their times; `sections`: lines of the devices' agent.toml.
    """
    outcomes = []
    budgets = [demo.budget_mb(count, model)] * count
    with swarm_in_lab(folder, budgets, model=model, **sections) as devices:
        chaos = Chaos(devices, tokens)
        for seed in seeds:
            disasters = schedule(Random(seed), chaos.names, pace)
            outcome = chaos.run(disasters)
            outcomes.append((seed, outcome))
            print(line(seed, disasters, outcome), flush=True)
            if outcome.stalls.longest_s > STALL_S:
                print(
                    f"        the machine stood still for {outcome.stalls.longest_s:.1f} s",
                    flush=True,
                )
            for promise in outcome.broken:
                print(f"        BROKEN: {promise}", flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--schedules", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule")
    parser.add_argument("--model", default=demo.MODEL)
    parser.add_argument("--devices", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=30, help="of an answer")
    parser.add_argument("--keep", type=Path, help="a folder for logs that stays")
    parser.add_argument("--cuts", action="store_true", help="with swarm.spans = false")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"{reason}.", file=sys.stderr)
        return 2
    demo.ORGANISE_S_MAX = FORMING_S_MAX
    if arguments.cuts:
        ALWAYS["swarm"] = "spans = false"
    seeds = range(arguments.seed, arguments.seed + arguments.schedules)
    with tempfile.TemporaryDirectory(prefix="coeld-chaos-") as temporary:
        folder = arguments.keep or Path(temporary)
        outcomes = torment(folder, seeds, arguments.model, arguments.devices, arguments.tokens)
    broken = [seed for seed, outcome in outcomes if outcome.broken]
    answers = sum(outcome.answers for _seed, outcome in outcomes)
    lost = sum(outcome.lost for _seed, outcome in outcomes)
    print(
        f"{len(outcomes)} schedules, {answers} answers, {lost} lost with their decoder; "
        f"longest silence {max(o.silence_s for _s, o in outcomes):.2f} s; "
        f"promises broken in {len(broken)}: seeds {broken}"
    )
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
