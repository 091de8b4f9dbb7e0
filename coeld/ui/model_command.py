"""`coeld model`: add, list and remove the models of this device."""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from coeld.errors import ModelError
from coeld.model.catalogue import catalogue, find
from coeld.model.manifest import Manifest
from coeld.model.store import Store, default_store
from coeld.ui import precision_command

if TYPE_CHECKING:
    from coeld.model.importer import Progress

INTERRUPTED: Final = 130
"""Exit status after Ctrl-C, as shells use it."""


def add_parser(subparsers: Any) -> None:
    """Adds `model` to an argparse subparsers object; `args.run(args)` gives the exit status."""
    model = subparsers.add_parser("model", help="add, list and remove models")
    commands = model.add_subparsers(required=True, metavar="COMMAND")
    store = argparse.ArgumentParser(add_help=False)
    store.add_argument(
        "--store", type=Path, metavar="DIR", help=f"where models are kept ({default_store()})"
    )
    add = commands.add_parser("add", parents=[store], help="install a model")
    add.add_argument(
        "model",
        metavar="NAME|SOURCE",
        help="a known model, a GGUF file, a Hugging Face folder, or hf:ORG/NAME[@REVISION]",
    )
    add.add_argument("--name", help="what to call it (default: after the file, or as it is known)")
    add.add_argument(
        "--bits",
        type=int,
        choices=(8, 4, 3, 2, 32),
        help="per weight of experts (8); 32 for float32",
    )
    add.add_argument(
        "--trunk-bits", type=int, choices=(8, 4, 32), help="per weight of attention (8)"
    )
    add.add_argument(
        "--update", action="store_true",
        help="make it the next version of the model of that name; running devices go over to it",
    )  # fmt: skip
    precision_command.add_arguments(add)
    add.set_defaults(run=_add)
    listing = commands.add_parser("list", parents=[store], help="show installed and known models")
    listing.add_argument("--json", action="store_true", help="for programs")
    listing.set_defaults(run=_list)
    remove = commands.add_parser("rm", parents=[store], help="remove a model")
    remove.add_argument("name", metavar="NAME")
    remove.set_defaults(run=_remove)


def _store(args: argparse.Namespace) -> Store:
    return Store(args.store or default_store())


def _add(args: argparse.Namespace) -> int:
    precision_command.check(args)
    store = _store(args)
    start = time.monotonic()
    try:
        with _progress() as progress:
            if _is_source(args.model):
                manifest = _add_source(store, args, progress)
            else:
                manifest = _add_known(store, args, progress)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to continue", file=sys.stderr)
        return INTERRUPTED
    _report(store, manifest, time.monotonic() - start)
    return 0


def _is_source(text: str) -> bool:
    """Whether it names a file, a folder or a repository on the hub, not a known model."""
    return text.startswith("hf:") or "/" in text or text.endswith(".gguf") or Path(text).is_dir()


def _name_after(source: str) -> str:
    """Its last part, in the characters that names may have."""
    last = source.rstrip("/").rpartition("/")[2].partition("@")[0].removesuffix(".gguf")
    return re.sub(r"[^a-z0-9._-]", "-", last.lower())


def _add_source(store: Store, args: argparse.Namespace, progress: "Progress") -> Manifest:
    # Half a second: numpy, onnx, tokenizers.
    from coeld.model.importer import import_checkpoint, require_new
    from coeld.model.open_checkpoint import open_checkpoint

    name = args.name or _name_after(args.model)
    require_new(store, name, args.update)
    with open_checkpoint(args.model, progress) as checkpoint:
        precision = precision_command.choose(args, checkpoint, name, progress)
        return import_checkpoint(
            store, checkpoint, name, progress, precision=precision, update=args.update
        )


def _add_known(store: Store, args: argparse.Namespace, progress: "Progress") -> Manifest:
    entry = find(args.model)
    name = args.name or entry.name
    plain = args.name is None and not args.update and not precision_command.is_given(args)
    if plain and name in store.names():
        return store.manifest(name)
    from coeld.model.fetch import fetched
    from coeld.model.importer import Origin, import_checkpoint, require_new
    from coeld.model.open_checkpoint import open_checkpoint

    require_new(store, name, args.update)
    origin = Origin(entry.pip.source, entry.licence)
    with (
        store.lock(),
        fetched(store, entry, progress) as path,
        open_checkpoint(path) as checkpoint,
    ):
        precision = precision_command.choose(args, checkpoint, name, progress)
        return import_checkpoint(
            store,
            checkpoint,
            name,
            progress,
            origin=origin,
            precision=precision,
            update=args.update,
        )


def _report(store: Store, manifest: Manifest, seconds: float) -> None:
    shape = manifest.shape
    if manifest.version > 1:
        print(f"version {manifest.version}: running devices go over to it, see coeld status")
    print(
        f"{manifest.name}: {_megabytes(_stored_bytes(manifest))} in {store.root}, "
        f"{shape.layers} layers of {shape.experts} experts, {seconds:.1f} s\n"
        f"try: coeld bench {manifest.name}"
    )


def _list(args: argparse.Namespace) -> int:
    store = _store(args)
    names = store.names()
    installed = [_describe(store, name) for name in names]
    known = [
        {
            "name": entry.name,
            "description": entry.description,
            "licence": entry.licence,
            "download_bytes": entry.pip.download_bytes,
        }
        for entry in catalogue()
        if entry.name not in names
    ]
    if args.json:
        print(json.dumps({"installed": installed, "available": known}, indent=1))
        return 0
    _print_table(store, installed, known)
    return 0


def _describe(store: Store, name: str) -> dict[str, Any]:
    """One installed model. A damaged one is listed with its error, so that it can be removed."""
    try:
        manifest = store.manifest(name)
    except ModelError as exc:
        return {"name": name, "error": str(exc)}
    return {
        "name": name,
        "hash": manifest.hash,
        "version": manifest.version,
        "bytes": _stored_bytes(manifest),
        "layers": manifest.shape.layers,
        "experts": manifest.shape.experts,
        "context_tokens": manifest.shape.context_max,
        "source": manifest.source,
        "licence": manifest.licence,
    }


def _print_table(
    store: Store, installed: list[dict[str, Any]], known: list[dict[str, Any]]
) -> None:
    print(f"installed in {store.root}:" if installed else f"nothing installed in {store.root}")
    for model in installed:
        if "error" in model:
            print(f"  {model['name']}  DAMAGED: {model['error']}")
        else:
            print(
                f"  {model['name']}  {_megabytes(model['bytes'])}, {model['layers']} layers of "
                f"{model['experts']} experts, {model['licence']}, from {model['source']}"
            )
    if known:
        print("available (coeld model add NAME):")
    for model in known:
        print(
            f"  {model['name']}  {_megabytes(model['download_bytes'])} to download, "
            f"{model['licence']}: {model['description']}"
        )


def _remove(args: argparse.Namespace) -> int:
    store = _store(args)
    store.remove(args.name)
    print(f"removed {args.name} from {store.root}")
    return 0


def _stored_bytes(manifest: Manifest) -> int:
    return sum(ref.bytes for ref in manifest.blobs())


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


@contextmanager
def _progress() -> Iterator["Progress"]:
    """A bar for each stage on a terminal; elsewhere a line whenever a stage is 10 % further."""
    if not sys.stderr.isatty():
        yield _Lines().show
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(done: int, total: int, what: str) -> None:
            stage = _stage(what)
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def _stage(what: str) -> str:
    return what if what in ("downloading", "unpacking", "measuring") else "importing"


class _Lines:
    """Progress for logs."""

    def __init__(self) -> None:
        self._shown = ("", -1)

    def show(self, done: int, total: int, what: str) -> None:
        now = (_stage(what), done * 10 // max(total, 1))
        if now != self._shown:
            self._shown = now
            print(f"{now[0]} {now[1] * 10} % of {_megabytes(total)}", file=sys.stderr, flush=True)
