"""Plans: sizes as an import has them, mistakes named, predictions that follow the figures."""

import json
from dataclasses import replace

import pytest

from coeld.deployment.cost import Link
from coeld.errors import CoeldError, ConfigError, ModelError
from coeld.model.store import Store
from coeld.planning.fleet import LINKS, link_between, parse_fleet, profiles, read_fleet
from coeld.planning.forecast import changes, choose_width, forecast, lacking, limit
from coeld.planning.shape import Shape, find_demand, from_config, parse_shape, shipped
from coeld.ui.cli import main
from coeld.ui.plan_command import swarm_machines

PI5 = "raspberry-pi-5"
SMALL = """
name = "small"
layers = 4
hidden = 256
heads = 4
kv_heads = 2
head_dim = 64
experts = 8
top_k = 2
expert_width = 128
vocab = 1000
tied = true
"""


def shape(name: str) -> Shape:
    return parse_shape(shipped()[name], name)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("Qwen3-30B-A3B", 30.5, 3.3),
        ("OLMoE-1B-7B", 6.9, 1.3),
        ("Granite-3-1B-A400M", 1.33, 0.43),
        ("Mixtral-8x7B", 46.7, 12.9),
        ("SmolLM2-135M", 0.1345, 0.1345),
    ],
)
def test_shipped_shapes_have_the_sizes_their_makers_say(
    name: str, total: float, active: float
) -> None:
    """In billions of parameters, from the model cards."""
    known = shape(name)
    demand = known.demand(8, 8)
    per_layer = 3 * known.hidden * known.expert_width
    q, kv = known.heads * known.head_dim, known.kv_heads * known.head_dim
    attention = known.hidden * (2 * q + 2 * kv)
    ends = known.vocab * known.hidden * (1 if known.tied else 2)
    all_ = known.layers * (known.experts * per_layer + attention) + ends
    used = known.layers * (known.top_k * per_layer + attention) + ends
    assert all_ / 1e9 == pytest.approx(total, rel=0.02)
    assert used / 1e9 == pytest.approx(active, rel=0.1)
    stored = demand.trunk_bytes + demand.layers * demand.experts * demand.lot_bytes
    assert 1.0 < stored / all_ < 1.2, "8 bits and scales"
    assert known.demand(4).lot_bytes < 0.56 * demand.lot_bytes


def test_a_dense_model_is_planned_in_slices_as_it_is_imported() -> None:
    demand = shape("SmolLM2-135M").demand(8)
    assert (demand.layers, demand.experts, demand.used) == (30, 8, 8)


def test_a_config_json_gives_the_shipped_shape() -> None:
    config = {
        "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "vocab_size": 151936,
        "tie_word_embeddings": False, "norm_topk_prob": True, "intermediate_size": 6144,
    }  # fmt: skip
    found = from_config(config, "hf:Qwen/Qwen3-30B-A3B@main")
    assert found == replace(shape("Qwen3-30B-A3B"), published=())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("layers = 4", "layers = 0"), "layers = 0, expected a whole number of 1 to 1024"),
        (("layers = 4", 'layers = "4"'), "layers = '4'"),
        (("layers = 4", ""), "lacks the key 'layers'"),
        (("top_k = 2", "top_k = 9"), "at most experts = 8"),
        (("tied = true", "tied = 1"), "tied = 1, expected true or false"),
        (("vocab = 1000", "vocab = 1000\nvocabulary = 3"), "unknown key 'vocabulary'"),
        (("vocab = 1000", "vocab = = 3"), "is not TOML"),
        (("vocab = 1000", "vocab = 1000\npublished = 3"), "published = 3"),
    ],
)
def test_mistakes_in_a_shape_are_named(change: tuple[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=r"shape\.toml") as caught:
        parse_shape(SMALL.replace(*change), "shape.toml")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names 0 devices"),
        ("[[device]]", "lacks the key 'profile'"),
        ('[[device]]\nprofile = "pi9"', "expected one of"),
        (f'[[device]]\nprofile = "{PI5}"\ncount = 65', "count = 65, expected a whole number of 1"),
        (f'[[device]]\nprofile = "{PI5}"\nmemory_gb = -1', "memory_gb = -1"),
        (f'[[device]]\nprofile = "{PI5}"\nmemory_gb = nan', "memory_gb = nan"),
        (f'[[device]]\nprofile = "{PI5}"\nlink = "carrier pigeon"', "expected one of ethernet"),
        (f'[[device]]\nprofile = "{PI5}"\nasks = false', "no device asks"),
        (f'[[device]]\nprofile = "{PI5}"\nwifi = true', "unknown key 'wifi'"),
        ("device = 3", "device = 3"),
    ],
)
def test_mistakes_in_a_fleet_are_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_fleet(text, "fleet.toml")
    assert said in str(caught.value)


def test_a_line_names_devices_and_what_it_does_not_know() -> None:
    machines = read_fleet("2xraspberry-pi-5,n100")
    assert [machine.name for machine in machines] == [f"{PI5}-1", f"{PI5}-2", "n100"]
    with pytest.raises(ConfigError, match="names no devices"):
        read_fleet("3xtoaster")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_fleet("/nowhere/fleet.toml")


def test_every_profile_has_a_source_and_says_whether_its_speed_was_measured() -> None:
    known = profiles()
    assert {"raspberry-pi-4", PI5, "cm5", "jetson-orin-nano", "jetson-orin-nx", "n100"} <= {*known}
    for profile in known.values():
        assert len(profile.source) > 30
        assert profile.row_mb_per_s > profile.kernel_mb_per_s


def test_what_does_not_fit_says_how_much_is_missing_and_the_width_follows_the_memory() -> None:
    known = shape("OLMoE-1B-7B")
    few, many = read_fleet("1xraspberry-pi-5"), read_fleet("4xraspberry-pi-5")
    assert choose_width(known, many, 512, 8) == 8
    assert choose_width(known, few, 512, 8) == 4
    stays_wide = replace(known.demand(8), narrow_lot_bytes=0)
    found = forecast(stays_wide, few, 128, 512, False)
    assert found.missing_bytes == lacking(stays_wide, few, 512) > 10**9
    assert changes(found, 128, 512, False)[0][1].missing_bytes < found.missing_bytes


def test_parts_add_up_and_the_largest_one_is_the_limit() -> None:
    known = shape("OLMoE-1B-7B").demand(4)
    for fleet in ("3xraspberry-pi-5", "2xn100,raspberry-pi-4"):
        found = forecast(known, read_fleet(fleet), 128, 512, False)
        assert abs(sum(part.us for part in found.parts) - found.token_us) < 20
        assert found.legs[-1].stop == known.layers
        assert limit(found)


def test_wifi_costs_a_hop_for_each_device_and_the_plan_says_what_cables_would_bring() -> None:
    text = f'[[device]]\nprofile = "{PI5}"\ncount = 3\nmemory_gb = 4\nlink = "wifi"'
    machines = parse_fleet(text, "t")
    found = forecast(shape("OLMoE-1B-7B").demand(4), machines, 128, 512, False)
    hops = len(found.legs) - 1
    assert hops >= 1
    wired = dict(changes(found, 128, 512, False))["cables instead of Wi-Fi"]
    slower_us = LINKS["wifi"].rtt_us - LINKS["ethernet"].rtt_us
    same_way_us = found.token_us - hops * slower_us
    assert wired.token_us < min(found.token_us, 1.05 * same_way_us)  # 5 %: for more devices


def test_splitting_pays_where_computing_is_slow_and_calls_are_quick() -> None:
    demand = shape("Qwen3-30B-A3B").demand(4, 4)
    machines = [replace(m, budget_bytes=6_500_000_000) for m in read_fleet("4xraspberry-pi-5")]
    whole, parts = (forecast(demand, machines, 128, 2048, split) for split in (False, True))
    assert whole.whole
    assert not parts.whole
    assert 4 < parts.tokens_per_s < whole.tokens_per_s < 13.04, "attention is not split"
    quick = [replace(machine, cut_us=150) for machine in machines]
    found = forecast(demand, quick, 128, 2048, False)
    assert not found.whole
    assert found.token_us < 0.9 * whole.token_us


def test_the_running_swarm_is_planned_with_what_its_devices_told() -> None:
    member = {
        "status": "alive", "engine": True, "name": "kitchen", "node": "a" * 16,
        "memory_budget_bytes": 10**9, "kernel_mb_per_s": 9000,
    }  # fmt: skip
    dead = member | {"status": "dead"}
    machines = swarm_machines({"node": {"members": [member, dead]}})
    assert [(m.name, m.budget_bytes, m.kernel_mb_per_s) for m in machines] == [
        ("kitchen", 10**9, 9000)
    ]
    with pytest.raises(ConfigError, match="0 devices"):
        swarm_machines({"node": {"members": [dead]}})


def test_a_plan_for_a_running_swarm_uses_the_links_that_devices_measured() -> None:
    member = {
        "status": "alive", "engine": True, "memory_budget_bytes": 4 * 10**9,
        "kernel_mb_per_s": 9000,
    }  # fmt: skip
    a, b, c = (member | {"name": x, "node": x * 16} for x in "abc")
    a["links"] = [["b" * 16, 5000, 9000, 10], ["c" * 16, 6000, 9000, 10]]
    one, two, three = swarm_machines({"node": {"members": [a, b, c]}})
    assert link_between(one, two) == link_between(two, one) == Link(5000, 10)
    assert link_between(two, three) == LINKS["ethernet"]
    b["links"] = [["c" * 16, 4000, 9000, 10]]
    machines = swarm_machines({"node": {"members": [a, b, c]}})
    demand = shape("OLMoE-1B-7B").demand(8)
    plan = forecast(demand, machines, 128, 2048, False)
    (wired,) = [other for what, other in changes(plan, 128, 2048, False) if "Ethernet" in what]
    assert wired.token_us < plan.token_us
    assert "network" not in limit(plan)
    for member in (a, b):
        member["links"] = [[link[0], 300_000, 400_000, 10] for link in member["links"]]
    plan = forecast(demand, swarm_machines({"node": {"members": [a, b, c]}}), 128, 2048, False)
    assert "network" in limit(plan)


def test_where_spans_are_switched_off_every_layer_elsewhere_is_a_call() -> None:
    machines, demand = read_fleet("2xraspberry-pi-5"), shape("OLMoE-1B-7B").demand(8)
    with_spans, without = (
        forecast(demand, machines, 128, 512, False, spans) for spans in (True, False)
    )
    assert len(without.legs) == 1 < len(with_spans.legs)
    assert without.token_us > with_spans.token_us


def test_models_are_found_by_name_file_and_folder(tmp_path) -> None:
    store = Store(tmp_path / "store")
    assert find_demand("olmoe-1b-7b", store) == shape("OLMoE-1B-7B")
    (tmp_path / "mine.toml").write_text(SMALL)
    assert find_demand(str(tmp_path / "mine.toml"), store) == parse_shape(SMALL, "mine")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    for bad in ("no-such-model", str(tmp_path), "hf:../x", str(tmp_path / "gone.toml")):
        with pytest.raises(CoeldError) as caught:
            find_demand(bad, store)
        assert isinstance(caught.value, ModelError | ConfigError)


def test_the_command_prints_tables_or_json_and_says_by_its_status_whether_it_fits(
    capsys, tmp_path
) -> None:
    command = ["plan", "--model", "OLMoE-1B-7B", "--store", str(tmp_path), "--devices"]
    assert main([*command, "4xraspberry-pi-5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"]
    assert told["tokens_per_s"] > 1
    assert sum(device["lots"] for device in told["devices"]) == 16 * 64
    assert main([*command, "4xraspberry-pi-5"]) == 0
    assert "tok/s" in capsys.readouterr().out
    assert main([*command, "raspberry-pi-4"]) == 3
    assert "missing" in capsys.readouterr().out
    assert main(["plan", "--model", "OLMoE-1B-7B"]) == 1
    assert main(["plan", "--list"]) == 0
    assert "Qwen3-30B-A3B" in capsys.readouterr().out


def test_what_fits_only_with_narrow_layers_says_how_many(tmp_path, capsys) -> None:
    path = tmp_path / "larger.toml"
    path.write_text(
        SMALL.replace("hidden = 256", "hidden = 1024").replace("width = 128", "width = 512")
    )
    known = parse_shape(path.read_text(), "larger")
    demand = known.demand(8)
    layer = demand.experts * demand.lot_bytes
    assert demand.narrow_lot_bytes == known.demand(4).lot_bytes
    cache = demand.kv_bytes_per_token * 64
    (machine,) = read_fleet(PI5)
    room = demand.trunk_bytes + cache + int(3.7 * layer)
    tight = (replace(machine, budget_bytes=room),)
    plan = forecast(demand, tight, 16, 64, split=False)
    assert plan.missing_bytes == 0
    assert len(plan.narrow) == 1
    assert forecast(replace(demand, narrow_lot_bytes=0), tight, 16, 64, split=False).missing_bytes
    whole = (replace(machine, budget_bytes=room + layer),)
    assert not forecast(demand, whole, 16, 64, split=False).narrow
    none = (replace(machine, budget_bytes=room - 2 * layer),)
    assert forecast(demand, none, 16, 64, split=False).missing_bytes

    fleet = tmp_path / "fleet.toml"
    mb = -(-room // 10**6)
    assert mb * 10**6 < room + 0.3 * layer, "else all of it fits"
    fleet.write_text(f'[[device]]\nprofile = "{PI5}"\nbudget_mb = {mb}\n')
    words = ["plan", "--model", str(path), "--devices", str(fleet), "--bits", "8"]
    assert main([*words, "--context-tokens", "64"]) == 0
    assert "Fits with 8 of 32 experts in 4 bits" in capsys.readouterr().out
