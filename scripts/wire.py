"""What a quality budget buys on slow links: three real devices in the lab, exact and not.

Every device holds a third of SmolLM2's experts and the whole trunk, so two thirds of the rows cross
the network twice. Each prompt is asked in turn in every mode (so that what else the machine does
meets all alike); medians are printed: prefill and decode in tokens per second, bytes of rows per
prompt token, the divergence that was estimated, and how many answers are the text of exact mode.
`--budgets` are in nats per token; 1e-5 allows half precision and nothing coarser. Needs root.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import closing
from importlib.resources import files
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import demo

from tests.harness.lab_swarm import swarm_in_lab

PROMPT_CHARS = 990


def ask(path: Path, prompt: str, budget: float, tokens: int) -> dict[str, Any]:
    body = {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "x_coeld": {"kl_budget": budget},
    }
    with closing(demo.UnixConnection(path)) as connection:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
    if "usage" not in answer:
        raise SystemExit(f"no answer: {answer}")
    return answer


def measure(profile: str, prompts: list[str], budgets: list[float], tokens: int) -> None:
    found: dict[float, list[dict[str, Any]]] = {budget: [] for budget in budgets}
    with tempfile.TemporaryDirectory() as folder:
        thirds = [demo.budget_mb(4)] * 3
        with swarm_in_lab(Path(folder), thirds, profile) as devices:
            demo.wait_settled(devices, 3, time.monotonic())
            asked = devices[0].socket
            ask(asked, prompts[0][:40], budgets[0], 2)  # connections, caches
            for prompt in prompts:
                for budget in budgets:
                    found[budget].append(ask(asked, prompt, budget, tokens))
    exact = [answer["choices"][0]["text"] for answer in found[budgets[0]]]
    for budget, answers in found.items():
        usages = [answer["usage"] for answer in answers]
        ours = [usage["x_coeld"] for usage in usages]
        prefill = statistics.median(
            usage["prompt_tokens"] / usage["x_coeld"]["prefill_s"] for usage in usages
        )
        decode = statistics.median(each["decode_tokens_per_s"] for each in ours)
        size = statistics.median(
            usage["x_coeld"]["wire"]["rows_bytes"] / usage["total_tokens"] for usage in usages
        )
        kl = statistics.mean(each["wire"]["kl_estimate"] for each in ours)
        texts = [answer["choices"][0]["text"] for answer in answers]
        same = sum(a == b for a, b in zip(texts, exact, strict=True))
        print(
            f"| {profile} | {budget:g} | {prefill:.1f} | {decode:.1f} | {size / 1000:.1f} | "
            f"{kl:.5f} | {same} of {len(texts)} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profiles", nargs="+", default=["far", "wifi"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.0, 1e-5, 0.02])
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--text", type=Path, help="default: the text that calibrates imports")
    arguments = parser.parse_args()
    source = arguments.text or files("coeld.model").joinpath("calibration.txt")
    text = source.read_text("utf-8")
    starts = range(0, arguments.prompts * PROMPT_CHARS, PROMPT_CHARS)
    prompts = [text[start : start + PROMPT_CHARS] for start in starts]
    print("| link | kl_budget | prefill tok/s | decode tok/s | KB per token | KL | same text |")
    print("|---|---|---|---|---|---|---|")
    for profile in arguments.profiles:
        measure(
            profile, [prompt for prompt in prompts if prompt], arguments.budgets, arguments.tokens
        )


if __name__ == "__main__":
    main()
