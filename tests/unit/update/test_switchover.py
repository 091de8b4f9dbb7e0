"""Epochs that agree, tables that name only who serves, the near first and suspects last."""

from dataclasses import replace

from coeld.ids import Lot, ModelHash, NodeId
from coeld.messages import Record
from coeld.routes import Leg
from coeld.update.switchover import Switchover
from coeld.view import ModelDemand

MODEL = ModelHash("5e" * 32)
DEMAND = ModelDemand(MODEL, "m", 2, 2, 100, 100)
A, B, C = (NodeId(letter * 16) for letter in "abc")
L0, L1 = Lot(0, 0), Lot(0, 1)


def record(
    node: NodeId, *serving: Lot, epoch: int = 0, fingerprint: str = "", model: ModelHash = MODEL
) -> Record:
    return Record(
        node,
        1,
        1,
        model=model,
        data_host=f"{node}.local",
        data_port=1,
        serving=serving,
        epoch=epoch,
        fingerprint=fingerprint,
    )


def test_oneself_is_first_then_the_auctions_owner_and_suspects_are_last() -> None:
    switch = Switchover(C)
    records = [record(A, L0, L1), record(B, L0, L1), record(C, L1)]
    table = switch.update(DEMAND, records, set(), {L0: B, L1: B}, 0)
    assert table is not None
    assert table.owners == {L0: (B, A), L1: (C, B, A)}
    table = switch.update(DEMAND, records, {B}, {L0: B, L1: B}, 0)
    assert table is not None
    assert table.owners == {L0: (A, B), L1: (C, A, B)}
    assert table.epoch == 1, "suspicion changes an order, not who owns what"


def test_devices_with_another_model_or_impossible_lots_are_not_routed_to() -> None:
    switch = Switchover(A)
    records = [record(A), record(B, L0, model=ModelHash("00" * 32)), record(C, Lot(7, 0))]
    table = switch.update(DEMAND, records, set(), {}, 0)
    assert table is not None
    assert table.owners == {}
    assert set(table.addresses) == {A, C}, "whoever has the model may call"


def test_nothing_changed_means_no_swap_unless_the_engine_is_new() -> None:
    switch = Switchover(A)
    records = [record(A, L0)]
    first = switch.update(DEMAND, records, set(), {}, 0)
    assert switch.update(DEMAND, records, set(), {}, 0) is None
    switch.forget()
    assert switch.update(DEMAND, records, set(), {}, 0) == first


def test_new_content_goes_beyond_every_known_epoch() -> None:
    switch = Switchover(A)
    table = switch.update(DEMAND, [record(A, L0), record(B, epoch=41)], set(), {}, 0)
    assert table is not None
    assert table.epoch == 42


def test_equal_content_takes_over_the_later_epoch() -> None:
    one, two = Switchover(A), Switchover(B)
    records = [record(A, L0), record(B, L1)]
    ahead = record(C, epoch=9)
    assert one.update(DEMAND, [*records, ahead], set(), {}, 0) is not None
    assert two.update(DEMAND, [*records, record(C)], set(), {}, 0) is not None
    assert (one.epoch, two.epoch) == (10, 1)
    told = record(A, L0, epoch=one.epoch, fingerprint=one.fingerprint)
    table = two.agree(DEMAND, [told, records[1], record(C)])
    assert table is not None
    assert table.epoch == 10
    assert one.agree(DEMAND, [record(B, epoch=10, fingerprint=two.fingerprint)]) is None


def test_spans_of_others_count_as_announced_and_own_ones_as_closed() -> None:
    """What is announced is the same for all; when single calls end here is this device's own."""
    near, far = Switchover(A), Switchover(B)
    lots = [Lot(layer, expert) for layer in range(2) for expert in range(2)]
    spanned = replace(record(A, *lots), spans=((0, 2),))
    records = [spanned, record(B)]
    mine, theirs = (s.update(DEMAND, records, set(), {}, 0) for s in (near, far))
    assert mine is not None
    assert theirs is not None
    assert (mine.spans, theirs.spans) == ((), (Leg(A, 0, 2),))
    assert near.fingerprint == far.fingerprint
    assert not near.agreed(records)
    told = replace(record(B), epoch=far.epoch, fingerprint=far.fingerprint)
    assert near.agreed([spanned, told])
    closed = near.update(DEMAND, [spanned, told], set(), {}, 0, [(0, 2)])
    assert closed is not None
    assert closed.spans == (Leg(A, 0, 2),)
    assert closed.epoch == mine.epoch, "whether they are closed is nobody else's business"


def test_a_span_of_layers_that_are_not_all_served_is_not_believed() -> None:
    switch = Switchover(B)
    lying = replace(record(A, Lot(0, 0), Lot(0, 1), Lot(1, 0)), spans=((0, 1), (1, 2)))
    table = switch.update(DEMAND, [lying, record(B)], set(), {}, 0)
    assert table is not None
    assert table.spans == (Leg(A, 0, 1),)


def test_own_legs_change_the_table_and_neither_epoch_nor_fingerprint() -> None:
    switch = Switchover(B)
    lots = [Lot(layer, expert) for layer in range(2) for expert in range(2)]
    records = [replace(record(A, *lots), spans=((0, 2),)), record(B)]
    switch.update(DEMAND, records, set(), {}, 0)
    epoch, fingerprint = switch.epoch, switch.fingerprint
    legs = (Leg(A, 0, 2),)
    table = switch.update(DEMAND, records, set(), {}, 0, (), lambda spans: legs)
    assert table is not None
    assert table.legs == legs
    assert (table.epoch, switch.fingerprint) == (epoch, fingerprint)
