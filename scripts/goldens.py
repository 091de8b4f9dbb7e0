"""The golden logits of tests/golden/families: what transformers computes from the tiny checkpoints.

float32, eager attention, experts one by one: the plainest path of transformers. Every tensor of the
checkpoint must be used, none may be missing. With --check nothing is written; the stored logits are
compared with new ones, and the checkpoint is saved once more by transformers, in small shards, and
read back through coeld's own reader.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers

from tests.harness.tiny_checkpoints import FAMILIES, digest, golden_tokens, write_folder

FOLDER = Path(__file__).parent.parent / "tests/golden/families"
TOLERANCE = 1e-4
"""Largest difference, relative to the largest logit: versions of torch sum in different orders."""


def load(folder: Path) -> transformers.PreTrainedModel:
    """The checkpoint in transformers. SystemExit when a tensor is missing or left over."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    if wrong := {what: names for what, names in report.items() if names}:
        sys.exit(f"{folder.name}: transformers and the checkpoint disagree: {wrong}")
    return model.eval()


def logits(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens), use_cache=False).logits.numpy()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    worst = 0.0
    for name in args.families:
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_folder(Path(scratch) / name, name)
            model, tokens = load(folder), golden_tokens(name)
            found, path = logits(model, tokens), FOLDER / f"{name}.npz"
            if args.check:
                golden = np.load(path)
                if digest(folder) != str(golden["digest"]):
                    sys.exit(f"{name}: this machine makes another checkpoint than the golden one")
                error = np.abs(found - golden["logits"]).max() / np.abs(golden["logits"]).max()
                worst = max(worst, float(error))
                resaved(model, folder, Path(scratch) / "saved")
                print(f"{name}: relative difference {error:.1e}; saved again and read back")
            else:
                FOLDER.mkdir(exist_ok=True)
                np.savez_compressed(
                    path, tokens=tokens.astype(np.int32), logits=found, digest=digest(folder)
                )
                print(f"{name}: {path.stat().st_size} bytes")
    if worst > TOLERANCE:
        sys.exit(f"the logits differ by {worst:.1e}, allowed are {TOLERANCE:.0e}")
    return 0


def resaved(model: transformers.PreTrainedModel, folder: Path, target: Path) -> None:
    """What transformers writes is read as what was written. SystemExit when it is not."""
    from coeld.model.families import blueprint
    from coeld.model.hf_folder import HfFolder

    model.save_pretrained(target, max_shard_size="400KB")
    with HfFolder(folder) as ours, HfFolder(target) as theirs:
        if blueprint(ours).shape != blueprint(theirs).shape:
            sys.exit(f"{folder.name}: another shape after saving")
        if set(ours.names()) != set(theirs.names()):
            sys.exit(f"{folder.name}: other names after saving")
        for name in ours.names():
            if not np.array_equal(ours.read(name), theirs.read(name)):
                sys.exit(f"{folder.name}: {name} differs after saving")


if __name__ == "__main__":
    sys.exit(main())
