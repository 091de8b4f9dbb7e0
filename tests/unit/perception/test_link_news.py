"""Which links are told of, and when again."""

from random import Random

import pytest

from coeld.ids import NodeId
from coeld.measured import LINKS_MAX, MB_PER_S_MAX, RTT_US_MAX, MeasuredLink
from coeld.perception.link_news import RTT_US_MIN, LinkNews
from coeld.perception.resources import SPEED_STEP

A, B = NodeId("a" * 16), NodeId("b" * 16)


def link(rtt_us: int, mb_per_s: int = 0, node: NodeId = A) -> MeasuredLink:
    return MeasuredLink(node, rtt_us, 2 * rtt_us, mb_per_s)


def test_a_link_like_the_one_that_is_assumed_is_never_told() -> None:
    news = LinkNews(300, 110)
    news.probed = True
    assert not news.measured([link(300), link(420, 90, B)], [A, B])
    assert news.told == ()


def test_that_all_links_have_been_measured_is_told_once() -> None:
    me, news = NodeId("e" * 16), LinkNews(300, 110)
    assert not news.measured([link(300)], [A, B, me])
    assert not news.probed
    assert news.measured([link(300), link(420, 90, B)], [A, B, me])
    assert news.probed
    assert news.told == ()
    late = NodeId("f" * 16)
    assert not news.measured([link(300), link(420, 90, B)], [A, B, me, late])
    assert news.probed, "who comes later measures its own"
    alone = LinkNews(300, 110)
    assert not alone.measured([], [me])
    assert not alone.probed


def test_a_link_that_gets_twenty_times_worse_is_told_and_told_again_when_it_recovers() -> None:
    news = LinkNews(300, 110)
    assert news.measured([link(6000, 5)], [A])
    (told,) = news.told
    assert 6000 / SPEED_STEP < told.rtt_us < 6000 * SPEED_STEP
    assert 5 / SPEED_STEP < told.mb_per_s < 5 * SPEED_STEP
    assert told.rtt_p99_us >= told.rtt_us
    assert news.measured([link(300, 110)], [A])
    assert 200 < news.told[0].rtt_us < 450


@pytest.mark.parametrize("seed", range(20))
def test_noise_of_ten_percent_is_told_once(seed: int) -> None:
    rng = Random(seed)
    rtt_us, mb_per_s = rng.choice([80, 2000, 7000, 40_000]), rng.choice([2, 12, 30, 400])
    news = LinkNews(300, 110)
    tellings = 0
    for _ in range(500):
        tellings += news.measured(
            [
                link(
                    int(rtt_us * rng.uniform(0.9, 1.1)),
                    max(1, round(mb_per_s * rng.uniform(0.9, 1.1))),
                )
            ],
            [A],
        )
    assert tellings <= 1, f"seed={seed}"


def test_a_slower_99th_percentile_alone_is_no_news() -> None:
    news = LinkNews(300, 110)
    assert news.measured([MeasuredLink(A, 6000, 7000, 110)], [A])
    assert not news.measured([MeasuredLink(A, 6000, 70_000, 110)], [A])


def test_very_short_round_trips_are_all_alike() -> None:
    news = LinkNews(300, 110)
    assert not news.measured([link(60)], [A])
    assert news.measured([link(2000)], [A])
    assert news.measured([link(RTT_US_MIN)], [A])
    assert not news.measured([link(5)], [A])


def test_a_link_stays_told_while_its_other_end_is_there_and_no_longer() -> None:
    news = LinkNews(300, 110)
    assert news.measured([link(6000), link(9000, node=B)], [A, B])
    assert [told.node for told in news.told] == [A, B]
    assert not news.measured([], [A, B])
    assert news.measured([link(6000)], [A])
    assert [told.node for told in news.told] == [A]
    assert not news.measured([link(9000, node=B)], [A]), "nobody knows it"


def test_what_is_told_fits_a_record_whatever_is_measured() -> None:
    nodes = [NodeId(f"{i:016x}") for i in range(LINKS_MAX + 10)]
    news = LinkNews(300, 110)
    assert news.measured([MeasuredLink(node, 10**12, 10**15, 10**9) for node in nodes], nodes)
    assert len(news.told) == LINKS_MAX
    for told in news.told:
        assert told.rtt_us <= told.rtt_p99_us <= RTT_US_MAX
        assert told.mb_per_s <= MB_PER_S_MAX
