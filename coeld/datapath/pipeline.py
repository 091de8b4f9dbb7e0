"""A long prompt through several devices at once: while one runs a chunk, those before it on the way
run the next ones (pipeline parallelism over micro-batches: Huang et al., GPipe, 2019).

A *wave* is one step of the pipeline: each stage runs its next chunk, if that has come out of the
stage before, those elsewhere in threads of their own. Between waves others have their turn; stages
of a journey may be unlike far, so whatever happens in between, the next pass goes on from there.
Chunks are those of a prompt that goes its way alone, in the same order at every stage: so are the
bits.
"""

import threading
import time
from dataclasses import dataclass

from coeld.datapath.journey import Journey, Stage
from coeld.datapath.ports import Rows
from coeld.datapath.quality import Quality
from coeld.datapath.request import PREFILL_CHUNK_TOKENS, LegLost, Request
from coeld.datapath.walker import NOTHING, Apart, Errand, Walker
from coeld.ids import NodeId


@dataclass(slots=True)
class Job:
    """A stage's part of a wave."""

    stage: Stage
    at: int
    """Tokens that its rows follow."""
    x: Rows
    rows: tuple[int, ...] = ()
    """Whose logits are wanted, of the last stage."""
    out: Rows | None = None
    lost: LegLost | None = None


def worthwhile(journey: Journey, request: Request) -> bool:
    """Is there more than one chunk of the prompt to go, and more than one device on the way? Each
    stage must know all that came out of the one before."""
    left = len(request.prompt) - journey.length
    known = all(
        stage.kept.length >= before.length
        for before, stage in zip(journey.stages, journey.stages[1:], strict=False)
    )
    ahead = any(stage.length > journey.length for stage in journey.stages)
    return left > 0 and (left > PREFILL_CHUNK_TOKENS or ahead) and known and len(journey.way) > 1


def wave(walker: Walker, journey: Journey, request: Request, errand: Errand) -> Rows:
    """One step. The logits (1, V) of the prompt's last token, when that has come all the way.

    Raises what `Walker.forward` does, when every stage is done.
    """
    jobs = _jobs(walker, journey, request)
    mine = [job for job in jobs if job.stage.cache is not None]
    lines: dict[tuple[NodeId, int], list[Job]] = {}
    for job in jobs:
        if job.stage.cache is None:
            lines.setdefault((job.stage.leg.node, job.stage.line), []).append(job)
    entering = len(jobs[0].x) if jobs[0].stage is journey.stages[0] else 0
    walker.begin(journey, entering, errand.quality)
    parts, threads = [], []
    started_s = time.monotonic()
    for line in lines.values():
        part = Apart(errand.check, Quality(errand.quality.kl_budget))
        walker.begin(journey, 0, part.quality)
        thread = threading.Thread(
            target=_elsewhere, args=(walker, journey, line, part), name="wave", daemon=True
        )
        thread.start()
        parts.append(part)
        threads.append(thread)
    try:
        for job in mine:
            job.out = walker.here(job.stage, job.at, job.x, job.rows, errand)
    finally:
        here_s = time.monotonic() - started_s
        for thread in threads:
            thread.join()
        _count(errand, parts, time.monotonic() - started_s - here_s, here_s)
        _arrive(journey, jobs)
    for job in jobs:
        if job.lost is not None:
            raise job.lost
        assert job.out is not None, "a wave's thread has broken"
    last = jobs[-1]
    if not last.rows:
        return NOTHING
    assert last.out is not None
    if last.stage.cache is not None:
        return last.out
    return walker.head(last.out, len(last.x), last.rows, errand)


def _jobs(walker: Walker, journey: Journey, request: Request) -> list[Job]:
    """By stage, first to last; at least one."""
    jobs, known = [], len(request.prompt)
    for index, stage in enumerate(journey.stages):
        at = stage.length
        tokens = request.next_tokens(at, None, exact=True) if at < len(request.prompt) else []
        stop = at + len(tokens)
        if at < stop <= known:
            x = stage.kept.get(at, stop - at) if index else walker.lane.embed(tokens)
            ends = index == len(journey.stages) - 1 and stop == len(request.prompt)
            jobs.append(Job(stage, at, x, (len(tokens) - 1,) if ends else ()))
        known = min(at, len(request.prompt))
    return jobs


def _elsewhere(walker: Walker, journey: Journey, jobs: list[Job], part: Apart) -> None:
    """The jobs of one line, one after the other. In a thread."""
    for job in jobs:
        try:
            keep = walker.keep(job.stage, len(job.x), job.rows)
            job.out = walker.elsewhere(journey, job.stage, job.at, job.x, keep, part)
        except LegLost as lost:
            job.lost = lost
            return


def _arrive(journey: Journey, jobs: list[Job]) -> None:
    """Stages are as far as they have come, and the next ones know it."""
    following = {id(s): after for s, after in zip(journey.stages, journey.stages[1:], strict=False)}
    for job in jobs:
        if job.out is None:
            continue
        job.stage.length = job.at + len(job.x)
        if (after := following.get(id(job.stage))) is not None:
            after.kept.add(job.at, job.out)
    journey.advance()


def _count(errand: Errand, parts: list[Apart], waited_s: float, here_s: float) -> None:
    """What was called beside what ran here: only the time that this device waited counts."""
    computed_s = max((part.split.wait_s for part in parts), default=0.0)
    errand.split.away(waited_s, computed_s - here_s)
    for part in parts:
        errand.split.sent_bytes += part.split.sent_bytes
        errand.split.received_bytes += part.split.received_bytes
        errand.quality.also(part.quality)
