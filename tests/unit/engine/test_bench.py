"""`coeld bench` on a tiny model, as a process of its own: it may have one thread pool only."""

import json
import subprocess
import sys


def bench(store, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coeld", "bench", "tiny", "--store", str(store.root), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_every_figure_is_there(tiny, tiny_store) -> None:
    words = ("--prompt-tokens", "16", "--gen-tokens", "8", "--threads", "1", "--repeats", "1")
    speed = json.loads(bench(tiny_store, *words, "--json").stdout)
    assert speed["prefill_tokens_per_s"] > 0
    assert speed["decode_tokens_per_s"] > 0
    assert speed["weights_bytes"] == tiny.weights_bytes
    assert sum(part["bytes"] for part in speed["parts"]) == tiny.weights_bytes
    assert 0 < speed["token_bytes"] <= tiny.weights_bytes + speed["kv_bytes"]
    assert speed["memory_mb_per_s"] > 100
    assert 0 < speed["bandwidth_share"] < 10
    assert 0 < speed["kv_bytes"] < speed["resident_bytes"]
    assert "16 tokens" in bench(tiny_store, *words).stdout


def test_more_tokens_than_the_model_was_trained_for_are_refused(tiny, tiny_store) -> None:
    done = bench(tiny_store, "--prompt-tokens", str(tiny.shape.context_max))
    assert done.returncode == 1
    assert f"do not fit the context of {tiny.shape.context_max}" in done.stderr
    assert "Traceback" not in done.stderr
