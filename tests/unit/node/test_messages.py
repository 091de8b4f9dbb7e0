"""The edge of the control plane: what is accepted, and that nothing else gets in."""

import json
from dataclasses import replace
from random import Random

import pytest

from coeld.asked import LEVELS, POPULARITY_CHARS_MAX, Asked, Rates
from coeld.errors import FrameError
from coeld.ids import Lot, ModelHash, NodeId
from coeld.lot_sets import LOTS_PER_RECORD_MAX
from coeld.measured import LINKS_MAX, MB_PER_S_MAX, RTT_US_MAX, MeasuredLink
from coeld.messages import (
    BID_MAX,
    MESSAGE_BYTES_MAX,
    Ask,
    Beat,
    Claim,
    Delta,
    Digest,
    Entry,
    Message,
    Record,
    Status,
    decode,
    encode,
)
from coeld.perception.gossip import parcels
from coeld.releases import Phase, Progress, Release, Versions

A, B = NodeId("a" * 16), NodeId("b" * 16)
RECORD = Record(
    origin=A,
    incarnation=3,
    seq=7,
    name="pi ünter",
    mqtt_host="fe80::1%eth0",
    mqtt_port=1883,
    memory_budget_bytes=10**9,
    cpu_load_percent=40,
    kernel_mb_per_s=3325,
    row_mb_per_s=25251,
    cut_us=900,
    sparing=True,
    stays_wide=True,
    context_tokens=8192,
    narrow=((0, 1), (4, 7)),
    links=(MeasuredLink(A, 450, 900, 110), MeasuredLink(B, 6000, 6000, 7)),
    probed=True,
    model=ModelHash("5e" * 32),
    data_host="192.168.1.7",
    data_port=9000,
    claims=(Claim(Lot(0, 1), 0, 9), Claim(Lot(0, 2), 0, 9), Claim(Lot(0, 3), 1, 9)),
    serving=(Lot(0, 1), Lot(0, 2), Lot(4, 0)),
    epoch=12,
    fingerprint="0123456789abcdef",
    blob_host="192.168.1.7",
    blob_port=9001,
    versions=Versions(
        "smollm2", 3, Phase.DRAINING, Release(4, ModelHash("7a" * 32)), Progress.READY
    ),
    asked=Asked(Rates(64, 2048, 4096), (b"", bytes([4, 7, 0, 3, 5]), bytes([0, 1, 2, 3, 4]))),
)
DELTA = Delta("home", A, 3, (RECORD, Record(B, 1, 1)))
ENTRIES = (Entry(A, 3, 7, 99, Status.SUSPECT, B), Entry(B, 1, 0, 0, Status.LEFT))
BEAT = Beat("home", A, 3, 7, 1234, "0123456789abcdef", ENTRIES)
DIGEST = Digest("home", A, 3, ENTRIES, 4, (0, 3))
ASK = Ask("home", A, 3, (0, 2**32 - 1), (A, B))
KINDS: list[Message] = [DELTA, DIGEST, BEAT, ASK]


@pytest.mark.parametrize(
    "message",
    [*KINDS, replace(BEAT, news=()), Ask("home", A, 3), Digest("home", A, 3, ())],
)
def test_what_is_encoded_is_what_is_decoded(message: Message) -> None:
    assert decode(encode(message)) == message


def test_a_beat_at_rest_is_smaller_than_a_single_packet_by_far() -> None:
    assert len(encode(replace(BEAT, swarm="coeld", heartbeat=10**6, news=()))) <= 128


def test_neighbouring_lots_travel_as_one_run() -> None:
    value = json.loads(encode(DELTA))["records"][0]
    assert value["claims"] == [[0, 1, 2, 0, 9], [0, 3, 1, 1, 9]]
    assert value["serving"] == [[0, 1, 2], [4, 0, 1]]


def test_the_largest_record_fits_into_a_message() -> None:
    """All of a model of 64 layers with 512 experts; bids of a layer differ by copy, and by what is
    held (coeld.deployment.pricing)."""
    lots = [Lot(layer, expert) for layer in range(64) for expert in range(512)]
    assert len(lots) == LOTS_PER_RECORD_MAX
    claims = tuple(Claim(lot, i % 2, 2**62 - i % 3 - lot.layer) for i, lot in enumerate(lots))
    serving = tuple(Lot(layer, expert * 2) for layer in range(64) for expert in range(512))
    nodes = [NodeId(f"{i:016x}") for i in range(LINKS_MAX)]
    links = tuple(MeasuredLink(node, RTT_US_MAX, RTT_US_MAX, MB_PER_S_MAX) for node in nodes)
    model = ModelHash("5e" * 32)
    record = Record(A, 1, 1, model=model, claims=claims, serving=serving, links=links)
    assert decode(encode(Delta("home", A, 1, (record,)))) == Delta("home", A, 1, (record,))


def test_how_often_the_experts_of_a_large_model_are_used_fits_into_three_kilobytes() -> None:
    rng = Random(1)
    rows = tuple(bytes(rng.choices(range(LEVELS), k=128)) for _ in range(48))
    record = Record(A, 1, 1, asked=Asked(Rates(1, 2, 3), rows))
    delta = Delta("home", A, 1, (record,))
    assert decode(encode(delta)) == delta
    assert len(encode(delta)) - len(encode(Delta("home", A, 1, (Record(A, 1, 1),)))) < 3200


def crowded(lots: int, number: int) -> Record:
    serving = tuple(Lot(lot // 4096, lot % 4096) for lot in range(lots))
    return Record(NodeId(f"{number:016x}"), 1, 1, model=ModelHash("5e" * 32), serving=serving)


def test_records_that_name_many_lots_in_few_bytes_travel_one_by_one() -> None:
    records = [crowded(LOTS_PER_RECORD_MAX, number) for number in range(5)]
    groups = parcels(records)
    assert [len(group) for group in groups] == [2, 2, 1]
    for group in groups:
        assert decode(encode(Delta("home", A, 1, group))) == Delta("home", A, 1, group)
    with pytest.raises(FrameError, match="more than"):
        decode(encode(Delta("home", A, 1, tuple(records[:3]))))


def test_a_record_that_is_longer_than_a_message_is_not_passed_on() -> None:
    """Nobody writes one; what a few rows of bits name could come out so."""
    lots = [Lot(layer, expert) for layer in range(5) for expert in range(4096)]
    claims = tuple(Claim(lot, 0, BID_MAX - number) for number, lot in enumerate(lots))
    endless = replace(crowded(0, 3), claims=claims)
    assert len(endless.to_json()) > MESSAGE_BYTES_MAX
    assert parcels([crowded(1, 1), endless, crowded(1, 2)]) == [(crowded(1, 1), crowded(1, 2))]


def change(path: list[str | int], to: object, message: Message = DELTA) -> bytes:
    """A message, the delta, with one value replaced."""
    value = json.loads(encode(message))
    place = value
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return json.dumps(value).encode()


BAD = {
    "no json": b"{",
    "not utf-8": b"\xff\xfe{}",
    "a list": b"[]",
    "NaN": b'{"v": NaN}',
    "deep": b"[" * 100_000,
    "a number too long to read": b'{"v": ' + b"9" * 5000 + b"}",
    "too large": b" " * (MESSAGE_BYTES_MAX + 1),
    "another version": change(["v"], 1),
    "unknown kind": change(["kind"], 77),
    "kind of the wrong type": change(["kind"], [1]),
    "sender upper case": change(["from"], "A" * 16),
    "sender with newline": change(["from"], "a" * 16 + "\n"),
    "incarnation negative": change(["inc"], -1),
    "incarnation true": change(["inc"], True),
    "incarnation float": change(["inc"], 1.0),
    "incarnation huge": change(["inc"], 2**60),
    "name too long": change(["records", 0, "name"], "x" * 65),
    "name with escape codes": change(["records", 0, "name"], "\x1b[31m"),
    "name with half a surrogate": change(["records", 0, "name"], "\ud800"),
    "host with a space": change(["records", 0, "mqtt"], ["a b", 1]),
    "port too large": change(["records", 0, "mqtt"], ["a", 65536]),
    "model not a hash": change(["records", 0, "model"], "smollm2"),
    "load above 100": change(["records", 0, "load"], 101),
    "link of three": change(["records", 0, "links"], [[B, 1, 1]]),
    "link to nobody": change(["records", 0, "links"], [["pi", 1, 1, 1]]),
    "link without a round trip": change(["records", 0, "links"], [[B, 0, 1, 1]]),
    "link with a percentile below the median": change(["records", 0, "links"], [[B, 9, 8, 1]]),
    "link of more than a minute": change(["records", 0, "links"], [[B, 1, 60_000_001, 1]]),
    "link without bandwidth": change(["records", 0, "links"], [[B, 1, 1, 0]]),
    "link with a fraction": change(["records", 0, "links"], [[B, 1.5, 2, 1]]),
    "links descending": change(["records", 0, "links"], [[B, 1, 1, 1], [A, 1, 1, 1]]),
    "links twice": change(["records", 0, "links"], [[B, 1, 1, 1], [B, 1, 1, 1]]),
    "too many links": change(["records", 0, "links"], [[f"{i:016x}", 1, 1, 1] for i in range(65)]),
    "records not a list": change(["records"], {}),
    "record not an object": change(["records", 0], 5),
    "too many records": change(["records"], [{}] * 65),
    "run too short": change(["records", 0, "serving"], [[0, 1]]),
    "run of zero": change(["records", 0, "serving"], [[0, 1, 0]]),
    "run beyond the last expert": change(["records", 0, "serving"], [[0, 4000, 4000]]),
    "more lots than allowed": change(["records", 0, "serving"], [[n, 0, 4096] for n in range(9)]),
    "versions not a list": change(["records", 0, "versions"], {}),
    "versions too short": change(["records", 0, "versions"], ["smollm2", 1]),
    "versions too long": change(
        ["records", 0, "versions"], ["smollm2", 1, 0, [2, "5e" * 32, 0], 1]
    ),
    "model name with a slash": change(["records", 0, "versions", 0], "../smollm2"),
    "version negative": change(["records", 0, "versions", 1], -1),
    "version huge": change(["records", 0, "versions", 1], 2**31),
    "unknown phase": change(["records", 0, "versions", 2], 3),
    "next version not a triple": change(["records", 0, "versions", 3], [4, "7a" * 32]),
    "next version not a hash": change(["records", 0, "versions", 3, 1], "newest"),
    "unknown progress": change(["records", 0, "versions", 3, 2], 3),
    "layer too large": change(["records", 0, "serving"], [[1024, 0, 1]]),
    "lots overlapping": change(["records", 0, "serving"], [[0, 0, 2], [0, 1, 1]]),
    "copy too large": change(["records", 0, "claims"], [[0, 0, 1, 8, 1]]),
    "bid too large": change(["records", 0, "claims"], [[0, 0, 1, 0, 2**63]]),
    "narrow layers that are no runs": change(["records", 0, "narrow"], [3]),
    "narrow layers that overlap": change(["records", 0, "narrow"], [[0, 2], [1, 3]]),
    "a narrow layer too large": change(["records", 0, "narrow"], [[1023, 1025]]),
    "too many narrow runs": change(
        ["records", 0, "narrow"], [[2 * i, 2 * i + 1] for i in range(513)]
    ),
    "forbidden more than once": change(["records", 0, "wide"], 2),
    "asked for by nobody knows": change(["records", 0, "asked"], []),
    "rates of two kinds": change(["records", 0, "asked", "rates"], [1, 2]),
    "a negative rate": change(["records", 0, "asked", "rates"], [1, 2, -3]),
    "a rate beyond all": change(["records", 0, "asked", "rates"], [1, 2, 2**60]),
    "a rate that is true": change(["records", 0, "asked", "rates"], [1, 2, True]),
    "uses of no experts": change(["records", 0, "asked", "uses"], [0, "aa"]),
    "uses of too many experts": change(["records", 0, "asked", "uses"], [9999, "a" * 5000]),
    "uses without a text": change(["records", 0, "asked", "uses"], [2, ["a"]]),
    "uses of nothing": change(["records", 0, "asked", "uses"], [2, ""]),
    "uses of unknown layers only": change(["records", 0, "asked", "uses"], [2, ".."]),
    "uses cut short": change(["records", 0, "asked", "uses"], [4, "abc"]),
    "uses with a hole": change(["records", 0, "asked", "uses"], [4, "a.bc"]),
    "uses in other characters": change(["records", 0, "asked", "uses"], [2, "ä"]),
    "uses of too many layers": change(["records", 0, "asked", "uses"], [1, "1" * 1025]),
    "uses too long": change(
        ["records", 0, "asked", "uses"], [64, "1" * 32 * (POPULARITY_CHARS_MAX // 32 + 1)]
    ),
    "view not hexadecimal": change(["view"], "x" * 16, BEAT),
    "heartbeat negative": change(["beat"], -1, BEAT),
    "entry too long": change(["news", 0], [A, 1, 1, 1, 1, B, 1], BEAT),
    "status unknown": change(["news", 0], [A, 1, 1, 1, 4], BEAT),
    "accuser of somebody alive": change(["news", 0], [A, 1, 1, 1, 0, B], BEAT),
    "accuser not a node": change(["news", 0, 5], "me", BEAT),
    "too much news": change(["news"], [[A, 1, 1, 1, 0]] * 1025, BEAT),
    "sums of three parts": change(["sums"], "0" * 24, ASK),
    "sums not whole": change(["sums"], "0" * 9, ASK),
    "sums of too many parts": change(["sums"], "0" * 8 * 512, ASK),
    "wanted twice": change(["wanted"], [A, A], ASK),
    "too much wanted": change(["wanted"], [f"{i:016x}" for i in range(257)], ASK),
    "parts not a power of two": change(["parts"], 3, DIGEST),
    "parts of nothing": change(["parts"], 0, DIGEST),
    "a part that is none": change(["differing"], [4], DIGEST),
    "parts descending": change(["differing"], [1, 0], DIGEST),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_malformed_messages_are_refused_with_a_frame_error(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode(data)


def test_a_digest_that_names_a_device_twice_is_refused() -> None:
    entry = Entry(A, 1, 1, 1, Status.ALIVE)
    with pytest.raises(FrameError):
        decode(encode(Digest("home", A, 1, (entry, entry))))


def test_fields_of_a_newer_version_are_ignored() -> None:
    assert decode(change(["records", 0, "gpu"], {"vram": 1})) == DELTA


def test_ten_thousand_damaged_messages_raise_frame_errors_and_nothing_else() -> None:
    rng = Random(1)
    originals = [encode(message) for message in KINDS]
    for _ in range(10_000):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        try:
            message = decode(bytes(data))
        except FrameError:
            continue
        assert decode(encode(message)) == message
