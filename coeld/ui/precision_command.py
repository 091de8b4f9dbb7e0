"""How many bits each expert gets when a model is added: `--bits`, or `--budget` and `--calibrate`.

With a budget, a text says which experts matter (`coeld.model.importance`), and the widths that cost
least are chosen (`coeld.compression.budget`). `--report` shows what was chosen beside uniform
widths, as a table, and draws the curve of expected error over size.
"""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from coeld.errors import BadRequest

if TYPE_CHECKING:
    from coeld.model.allocation import Allocation, Plan
    from coeld.model.checkpoint import Checkpoint
    from coeld.model.importer import Precision, Progress

BITS: Final = 8
"""Where nothing else is asked for."""
WIDTHS: Final = (2, 3, 4, 8)
"""What an expert may have within a budget."""
UNIFORM: Final = (8, 4, 3, 2)
"""What the report compares with."""
TEXT_BYTES_MAX: Final = 16 << 20
"""Of the calibration text; only a sample of it is measured."""

UNITS: Final = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip


def add_arguments(add: argparse.ArgumentParser) -> None:
    group = add.add_argument_group("mixed precision")
    group.add_argument(
        "--budget",
        type=size,
        metavar="SIZE",
        help="bytes of all weights together, as 900MB or 1.5GiB: more bits for what matters more",
    )
    group.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="the text that says what matters"
    )
    group.add_argument(
        "--report",
        type=Path,
        metavar="FILE.svg",
        nargs="?",
        const=Path(),
        help="print a table of sizes and expected errors, and draw it (default: NAME.svg)",
    )


def size(text: str) -> int:
    """Bytes. Raises ArgumentTypeError, which argparse shows."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", text.strip().lower())
    if found is None or found[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 900MB, 1.5GiB or 800000000")
    return int(float(found[1]) * UNITS[found[2]])


def is_given(args: argparse.Namespace) -> bool:
    """Whether anything is said about widths."""
    said = (args.bits, args.trunk_bits, args.budget, args.calibrate, args.report)
    return any(value is not None for value in said)


def check(args: argparse.Namespace) -> None:
    """What can be refused before anything is fetched. Raises BadRequest."""
    if args.budget is None and (args.calibrate or args.report):
        raise BadRequest("--calibrate and --report go with --budget: how large may it be?")
    if args.budget is not None and args.calibrate is None:
        raise BadRequest("--budget needs --calibrate FILE: a text like those the model is for.")
    if args.budget is not None and args.bits is not None:
        raise BadRequest(
            "--bits gives all experts one width, --budget chooses one for each: not both."
        )
    if args.calibrate is not None:
        _read(args.calibrate)


def choose(
    args: argparse.Namespace, checkpoint: "Checkpoint", name: str, progress: "Progress"
) -> "Precision":
    """The widths to import with, of arguments that were checked. Raises BadRequest, BudgetTooSmall,
    and what reading raises."""
    from coeld.model.importer import Precision, widths

    trunk_bits = args.trunk_bits or BITS
    if args.budget is None:
        return Precision(args.bits or BITS, trunk_bits)
    from coeld.model.allocation import Allocation
    from coeld.model.families import blueprint
    from coeld.model.importance import measure, sample

    plan = blueprint(checkpoint)
    vocabulary = checkpoint.vocabulary(plan.shape.vocab)
    if vocabulary is None:
        raise BadRequest(
            "--budget: this model has no tokenizer, so that no text can be measured. Add it with "
            "--bits 8, 4, 3 or 2 instead, or put its tokenizer.json beside the weights."
        )
    tokens = sample(vocabulary.json, _read(args.calibrate))
    statistics = measure(plan, tokens, args.calibrate.name, _in_bytes(progress, checkpoint.bytes))
    possible = [bits for bits in WIDTHS if bits in widths(plan.block)]
    allocation = Allocation(plan, trunk_bits, statistics, possible)
    chosen = allocation.fit(args.budget)
    if args.report is not None:
        path = args.report if args.report.name else Path(f"{name}.svg")
        _report(allocation, chosen, name, path)
    table = chosen.table
    return Precision(lambda layer, expert: table[layer][expert], trunk_bits, statistics)


def _in_bytes(progress: "Progress", total: int) -> "Progress":
    """The same share of the source's bytes, in which a user is told of progress."""
    return lambda done, of, what: progress(total * done // of, total, what)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(TEXT_BYTES_MAX).decode("utf-8", "ignore")
    except OSError as exc:
        raise BadRequest(f"--calibrate: cannot read {path}: {exc.strerror}.") from exc


def _report(allocation: "Allocation", chosen: "Plan", name: str, path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from coeld.ui.precision_picture import draw

    possible = [bits for bits in UNIFORM if bits in allocation.widths]
    uniform = {f"uniform {bits} bits": allocation.uniform(bits) for bits in possible}
    same = {
        f"mixed, as large as {label}": allocation.fit(plan.bytes)
        for label, plan in uniform.items()
        if plan.mean_bits in (4, 3)
    }
    table = Table(title=f"{name}: expected divergence (KL) from exact experts, nats per token")
    for heading in ("experts", "weights", "mean bits", "expected KL", "8 / 4 / 3 / 2 bits"):
        table.add_column(heading, justify="left" if heading == "experts" else "right")
    for label, plan in {**uniform, **same, "mixed, chosen": chosen}.items():
        widths = [bits for row in plan.table for bits in row]
        table.add_row(
            label,
            f"{plan.bytes / 1e6:.1f} MB",
            f"{plan.mean_bits:.2f}",
            f"{plan.error:.4g}",
            " / ".join(str(widths.count(bits)) for bits in UNIFORM),
        )
    Console().print(table)
    path.write_text(draw(name, allocation.curve(), uniform, chosen), "utf-8")
    print(f"picture: {path}")
