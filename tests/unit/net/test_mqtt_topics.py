"""Topics and calling cards: what is understood, and what is refused."""

import json
from random import Random

import pytest

from coeld.errors import FrameError
from coeld.ids import NodeId
from coeld.net.mqtt_topics import CARD_BYTES_MAX, Card, Topics, client_id, node_of_client

ME, OTHER = NodeId("a" * 16), NodeId("b" * 16)
TOPICS = Topics("home")


def test_what_is_written_is_read() -> None:
    assert TOPICS.parse(TOPICS.everybody(OTHER), ME) == ("message", OTHER)
    assert TOPICS.parse(TOPICS.one(ME, OTHER), ME) == ("message", OTHER)
    assert TOPICS.parse(TOPICS.will(OTHER), ME) == ("will", OTHER)
    card = Card(OTHER, 7, "::1", 1884)
    assert Card.decode(card.encode()) == card
    assert node_of_client(client_id(ME, 3)) == ME


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "coeld/1/home",
        "coeld/1/home/",
        "coeld/1/away/all/" + OTHER,
        "coeld/2/home/all/" + OTHER,
        "coeld/1/home/all/",
        "coeld/1/home/all/nobody",
        "coeld/1/home/all/" + OTHER.upper(),
        "coeld/1/home/all/" + OTHER + "/x",
        "coeld/1/home/all/" + OTHER + "\n",
        "coeld/1/home/to/" + OTHER + "/" + ME,
        "coeld/1/home/to/" + ME,
        "coeld/1/home/shout/" + OTHER,
        "all/" + OTHER,
        "$SYS/broker",
    ],
)
def test_other_topics_are_refused(topic: str) -> None:
    with pytest.raises(FrameError):
        TOPICS.parse(topic, ME)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"node": OTHER, "incarnation": 1},
        {"node": "x", "incarnation": 1, "mqtt": ["h", 1]},
        {"node": 5, "incarnation": 1, "mqtt": ["h", 1]},
        {"node": OTHER, "incarnation": -1, "mqtt": ["h", 1]},
        {"node": OTHER, "incarnation": True, "mqtt": ["h", 1]},
        {"node": OTHER, "incarnation": 1, "mqtt": ["h", 65536]},
        {"node": OTHER, "incarnation": 1, "mqtt": ["h h", 1]},
        {"node": OTHER, "incarnation": 1, "mqtt": ["h", 1, 2]},
        {"node": OTHER, "incarnation": 1, "mqtt": 5},
    ],
)
def test_other_cards_are_refused(value: object) -> None:
    with pytest.raises(FrameError):
        Card.decode(json.dumps(value).encode())


def test_random_bytes_are_frame_errors_and_nothing_else() -> None:
    rng = Random(1)
    good = Card(OTHER, 7, "127.0.0.1", 1884).encode()
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            Card.decode(bytes(data))
            TOPICS.parse(data.decode("utf-8", "replace"), ME)
        except FrameError:
            pass
    with pytest.raises(FrameError):
        Card.decode(b" " * CARD_BYTES_MAX + good)


@pytest.mark.parametrize("client", ["", "-", "me", ME, "x" * 16 + "-1", "mosquitto_sub-1"])
def test_other_clients_have_no_node(client: str) -> None:
    assert node_of_client(client) is None
