"""Look after a reference store: `python launch/store.py list|inspect|verify|compact|export|import STORE ...`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dpo_scale.errors import ConfigError, StoreError
from dpo_scale.reference.store import Book, ReferenceStore
from dpo_scale.reference.store_manifest import BookKey
from dpo_scale.reference.store_shard import DamagedError
from dpo_scale.reference.store_upkeep import compact_book, verify_book
from dpo_scale.run.cli import run
from dpo_scale.settings.tree import Config, load_config


def main() -> None:
    parser = _parser()
    # Overrides are what is left over: argparse can't take a variable number of them behind STORE and options.
    arguments, arguments.overrides = parser.parse_known_args()
    strange = [text for text in arguments.overrides if text[0] == "-" or "=" not in text or "config" not in arguments]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    folder = Path(arguments.store).expanduser()
    if arguments.action is not import_values and not folder.is_dir():
        raise StoreError(f"{folder}: no such folder; expected a reference store")
    arguments.action(arguments, ReferenceStore(folder))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Look after a store of reference log-probs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, action: Any, description: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=description, description=description)
        sub.set_defaults(action=action)
        sub.add_argument("store", metavar="STORE", help="the store's folder (reference.store)")
        if action is not import_values:
            sub.add_argument("--book", metavar="ID", help="one of its books, by the first digits (default: all)")
        return sub

    def with_config(sub: argparse.ArgumentParser, meaning: str, *, required: bool = False) -> None:
        sub.add_argument(
            "--config", metavar="FILE", required=required, help=f"{meaning}; section.key=value behind it override it"
        )

    command("list", list_books, "One line a book: rows, size, model, numerics.")
    sub = command("inspect", inspect, "All about the books, and how many of a config's pairs they hold.")
    with_config(sub, "a run whose data is looked up")
    sub = command("verify", verify, "Check every byte; with a config, also compute some rows again.")
    with_config(sub, "a run whose reference computes rows of its data again")
    sub.add_argument("--rows", type=int, default=32, help="rows to compute again (default 32)")
    sub = command("compact", compact, "Merge small shards into few large ones, each row once; remove left-overs.")
    sub.add_argument("--drop-damaged", action="store_true", help="set damaged and foreign files aside, keep the rest")
    sub.add_argument(
        "--grace-hours",
        type=float,
        default=0.0,
        help="keep replaced files that long, for jobs on other machines that read the store over NFS",
    )
    sub = command("export", export, "Write a book to a parquet file.")
    sub.add_argument("output", metavar="FILE.parquet")
    with_config(sub, "a run whose pairs are written, with their texts, instead of the whole book")
    sub = command("import", import_values, "Take the columns ref_chosen_logps, ref_rejected_logps of a config's data.")
    with_config(sub, "a run whose data.train and data.eval have these columns", required=True)
    sub.add_argument("--note", default="", help="where the values come from, for the manifest")
    return parser


def list_books(arguments: argparse.Namespace, store: ReferenceStore) -> None:
    line = "{:<12}  {:>11}  {:>6}  {:>9}  {:<8}  {:<8}  {:<20}  {}".format
    print(line("book", "rows", "shards", "size", "source", "dtype", "updated", "model"))
    for folder in _folders(arguments, store):
        try:
            book = Book(folder)
        except StoreError as error:
            print(f"{folder.name[:12]}  {error}")
            continue
        manifest, key = book.manifest, book.manifest.key
        counts = f"{book.num_rows:,}", len(book.shards), _size(book.nbytes)
        about = key.source, key.numerics.get("dtype", ""), manifest.updated[:19], manifest.model.get("path", "")
        print(line(key.id[:12], *counts, *about))


def inspect(arguments: argparse.Namespace, store: ReferenceStore) -> None:
    datasets = _pairs(_config(arguments))[0] if _names_config(arguments) else {}
    for folder in _folders(arguments, store):
        book = Book(folder)
        manifest = book.manifest
        with_tokens = sum(len(shard) for shard in book.shards if shard.has_tokens)
        lines = {
            "book": manifest.key.id,
            **{f"model {name}": value for name, value in manifest.model.items()},
            "fingerprint": manifest.key.fingerprint,
            **{f"numerics {name}": value for name, value in manifest.key.numerics.items()},
            "source": manifest.key.source,
            "rows": f"{book.num_rows:,} in {len(book.shards)} shards, {with_tokens:,} with per-token values",
            "size": _size(book.nbytes),
            "created": manifest.created,
            "updated": manifest.updated,
        }
        for split, data in datasets.items():
            found = int(book.lookup(data.pair_keys).found.sum())
            lines[f"data.{split}"] = f"{found:,} of {len(data):,} pairs are here ({found / len(data):.1%})"
        width = max(map(len, lines))
        print("\n".join(f"{name:<{width}}  {value}" for name, value in lines.items() if value), end="\n\n")


def verify(arguments: argparse.Namespace, store: ReferenceStore) -> None:
    damaged = []
    for folder in _folders(arguments, store):
        findings = verify_book(folder)
        print(
            f"{folder.name[:12]}: {findings.shards} shards, {_size(findings.nbytes)}, all bytes read; "
            f"{findings.rows:,} rows, {findings.rows_with_tokens:,} with per-token values; {findings.copies:,} further "
            f"copies, {findings.differing:,} of them different"
            + (f" (a sum by {findings.largest_difference:.3g} at most)" if findings.differing else "")
            + (f"; {findings.temporary} files of writers that are gone" if findings.temporary else "")
        )
        for path, reason in findings.damaged:
            print(f"  damaged: {path.name}: {reason}")
            damaged.append(DamagedError(path, reason))
    if damaged:
        raise damaged[0]
    if _names_config(arguments):
        _verify_against_model(arguments)


def _verify_against_model(arguments: argparse.Namespace) -> None:
    """Compute rows of the config's book again with the config's reference."""
    import numpy as np

    from dpo_scale.distributed import ranks
    from dpo_scale.distributed.join import join
    from dpo_scale.models.load import load_reference
    from dpo_scale.reference.compute import verify as compute_again
    from dpo_scale.reference.from_store import StoredReference
    from dpo_scale.reference.modes import open_book

    config = _config(arguments)
    join(config.deepspeed.timeout_minutes, config.deepspeed.start_timeout_minutes)
    ranks.quiet_libraries()
    config.reference.store = arguments.store
    book = open_book(config)
    datasets, tokenizer = _pairs(config)
    for split, data in datasets.items():
        covered = np.flatnonzero(book.lookup(data.pair_keys).found)
        print(f"data.{split}: {len(covered):,} of {len(data):,} pairs are in book {book.manifest.key.id[:12]}")
        datasets[split] = data.select(covered)
    if not any(map(len, datasets.values())):
        raise StoreError(f"{book.folder}: has none of the config's pairs, so nothing can be computed again")
    reference = load_reference(config)
    settings = {"dtype": config.model.dtype, "seed": config.train.seed, "pad_token_id": tokenizer.pad_token_id}
    for data in filter(len, datasets.values()):
        compute_again(StoredReference(book), reference, data, arguments.rows, **settings)


def compact(arguments: argparse.Namespace, store: ReferenceStore) -> None:
    for folder in _folders(arguments, store):
        done = compact_book(folder, drop_damaged=arguments.drop_damaged, grace_hours=arguments.grace_hours)
        print(
            f"{folder.name[:12]}: {done.shards_before} shards ({_size(done.bytes_before)}) to {done.shards} "
            f"({_size(done.nbytes)}); {done.rows:,} rows, {done.copies:,} copies removed"
            + (f", {done.temporary} left-over files removed" if done.temporary else "")
        )
        for path in done.set_aside:
            print(f"  set aside: {path}")


def export(arguments: argparse.Namespace, store: ReferenceStore) -> None:
    from dpo_scale.reference.store_exchange import export_parquet

    folders = _folders(arguments, store)
    if len(folders) != 1:
        raise StoreError(f"{store.folder}: has {len(folders)} books; choose one with --book (see `list`)")
    settings: dict[str, Any] = {}
    if _names_config(arguments):
        datasets, tokenizer = _pairs(_config(arguments))
        settings = {"pairs": list(datasets.values()), "decode": lambda ids: tokenizer.decode(ids.tolist())}
    rows = export_parquet(Book(folders[0]), Path(arguments.output), **settings)
    print(f"{arguments.output}: {rows:,} rows")


def import_values(arguments: argparse.Namespace, store: ReferenceStore) -> None:
    from dpo_scale.data.tokenize import PairTokenizer
    from dpo_scale.models.load import load_tokenizers, reference_source
    from dpo_scale.reference.fingerprint import weights_fingerprint
    from dpo_scale.reference.numerics import IMPORTED
    from dpo_scale.reference.store_exchange import column_rows

    config = _config(arguments)
    source = reference_source(config)
    trusted = config.model.trust_remote_code
    fingerprint = weights_fingerprint(
        source.path, revision=source.revision, adapter=source.adapter, trust_remote_code=trusted
    )
    key = BookKey(fingerprint, IMPORTED, source="imported")
    described = {name: value for name, value in asdict(source).items() if value is not None}
    book = store.book(key, {**described, "note": arguments.note})
    tokenizer, _ = load_tokenizers(config)
    encoder = PairTokenizer(tokenizer, config.data)
    count = 0
    with book.writer() as writer:
        for rows in column_rows([*config.data.train, *config.data.eval], config.data, encoder, _say):
            writer.add(rows.keys, rows.sums, rows.counts)
            count += len(rows)
    print(f"{book.folder}: {count:,} pairs imported")


def _names_config(arguments: argparse.Namespace) -> bool:
    return arguments.config is not None or bool(arguments.overrides)


def _config(arguments: argparse.Namespace) -> Config:
    return load_config(arguments.config, arguments.overrides, for_training=False)


def _pairs(config: Config) -> tuple[dict[str, Any], Any]:
    """A config's data sets by split, and its tokenizer."""
    from dpo_scale.data.dataset import load_pairs
    from dpo_scale.models.load import load_tokenizers

    settings = config.data
    if not settings.train:
        if not settings.eval:
            raise ConfigError("data.train: names no data, and data.eval neither; expected the pairs to look up")
        settings = replace(settings, train=settings.eval, eval=[], eval_fraction=0.0)
    tokenizer, _ = load_tokenizers(config)
    data = load_pairs(settings, tokenizer, seed=config.train.seed, log=_say)
    return {"train": data.train, **({"eval": data.eval} if data.eval is not None else {})}, tokenizer


def _folders(arguments: argparse.Namespace, store: ReferenceStore) -> list[Path]:
    folders = [folder for folder in store.book_folders() if folder.name.startswith(arguments.book or "")]
    if arguments.book and len(folders) != 1:
        found = f"{len(folders)} books begin like this" if folders else "no book begins like this"
        raise StoreError(f"--book {arguments.book}: {found} in {store.folder}")
    return folders


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
