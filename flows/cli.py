"""The command `unmask`. Imports wait for the command that needs them, so that help answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flows import workspace


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; the user's faults end with a message and exit code 1, never with a traceback."""
    parsed = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int | None] = parsed.command
    try:
        workspace.root()
        sys.exit(command(parsed) or 0)
    except workspace.UserError as error:
        sys.exit(f"unmask: {error}")
    except PermissionError as error:
        sys.exit(
            f"unmask: {error.filename}: no permission ({error.strerror}); give yourself access with chmod or chown"
        )
    except KeyboardInterrupt:
        sys.exit("unmask: interrupted; the same command goes on from the last checkpoint")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unmask", description="Masked image modelling on your own images.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    add("demo", _demo, "run the whole pipeline on the embedded dataset and show what came out")
    add("doctor", _doctor, "check versions, ports, disk, device, params and data, and say how to mend each")
    add("up", _up, "start the Prefect and MLflow servers on 127.0.0.1")
    add("down", _down, "stop them")
    ui = add("ui", _ui, "print and open the servers' addresses")
    ui.add_argument("--no-open", action="store_true", help="print the addresses only")
    add("sync", _sync, "send MLflow what its server could not take, and put its ids into what was published")
    add("check", _check, "check every row of params/")
    add("report", _report, "build the report of all published results")
    for stage, text in (
        ("ablate", "run an ablation of params/ablations.yaml, and print its table"),
        ("search", "run a search of params/search.yaml, and print what it found"),
    ):
        sub = add(stage, _laboratory, text)
        sub.add_argument("name", metavar="NAME")
        sub.set_defaults(stage=stage)
    recipe = add(
        "recipe", _recipe, "list the papers' full-size recipes, or print one as a row for params/pretrain.yaml"
    )
    recipe.add_argument("name", nargs="?", metavar="NAME")
    recipe.add_argument("--data", metavar="DATASET", help="the dataset to put into the row")
    bring = add("import", _import, "turn published weights into those of a run: an encoder, a model or a tokenizer")
    bring.add_argument("file", type=Path, metavar="FILE", help="safetensors, or what torch.save wrote")
    bring.add_argument("-o", "--out", type=Path, metavar="OUT", help="folder to write to; FILE_imported if left out")
    bring.add_argument("--decoder", type=Path, metavar="FILE", help="second file of a tokenizer in two halves")
    bring.add_argument(
        "--size", type=_size, metavar="H[xW]", help="size of its images in px, where they are not square"
    )
    for name, whose in (("--heads", "the encoder"), ("--decoder-heads", "the decoder")):
        bring.add_argument(name, type=int, metavar="N", help=f"attention heads of {whose}, where they are not as usual")
    give = add(
        "export", _export, "write a row's encoder as a file that timm loads, and prove that the features are equal"
    )
    give.add_argument("row", metavar="ROW", help="a pretrain, baseline or downstream row that has run")
    give.add_argument("-o", "--out", type=Path, metavar="OUT", help="folder to write to; exports/ROW if left out")
    ask = add("predict", _predict, "let a downstream row's model answer of images: classes, maps or boxes")
    ask.add_argument("row", metavar="ROW", help="a downstream row that has run")
    ask.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders with all below them, or globs")
    ask.add_argument("-o", "--out", type=Path, metavar="TABLE", help="a .parquet, .csv or .jsonl file to write")
    ask.add_argument("--draw", type=Path, metavar="DIR", help="draw maps or boxes over the images, into this folder")
    turn = add("embed", _embed, "write the mean patch feature of each image, by a row's encoder")
    turn.add_argument("row", metavar="ROW", help="a pretrain or downstream row that has run")
    turn.add_argument("images", nargs="+", metavar="FOLDER", help="folders with all below them, files, or globs")
    turn.add_argument("-o", "--out", type=Path, metavar="TABLE", required=True, help="a .parquet file to write")
    for one in (ask, turn):
        one.add_argument("--replace", action="store_true", help="replace the table of this name")
    data = commands.add_parser("data", help="bring datasets in and verify them").add_subparsers(
        metavar="ACTION", required=True
    )
    restore = data.add_parser("restore", help="fill data/ on a fresh clone and verify it against data.dvc")
    restore.set_defaults(command=_restore)
    new = data.add_parser("add", help="bring in images: a folder, flat or by class, or a published format")
    new.add_argument("folder", type=Path, metavar="FOLDER_OR_ARCHIVE", help="a folder, or a .zip, .tar or .tar.gz")
    new.add_argument("--name", required=True, help="the dataset's name in params/ and data/")
    new.add_argument(
        "--size", type=_size, metavar="H[xW]", help="size in px that images get; guessed from them if left out"
    )
    new.add_argument(
        "--format",
        metavar="FORMAT",
        help="folder, csv, coco, voc, ade20k, inaturalist, cifar10, cifar100 or stl10; seen from the files if left out",
    )
    new.add_argument("--replace", action="store_true", help="replace the dataset of this name")
    new.set_defaults(command=_add)
    return parser


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not height.isdigit() or not (width or height).isdigit() or not int(height) or not int(width or height):
        raise argparse.ArgumentTypeError(f"found '{text}'; give px as 64 or 64x96 (height x width)")
    return int(height), int(width or height)


def _demo(_: argparse.Namespace) -> None:
    from rich.console import Console

    from flows.demo import demo

    demo(Console())


def _laboratory(parsed: argparse.Namespace) -> None:
    from rich.console import Console

    from flows.laboratory import run

    run(Console(), parsed.stage, parsed.name)


def _doctor(_: argparse.Namespace) -> int:
    from rich.console import Console

    from flows.demo import diagnose

    return min(1, diagnose(Console()))


def _up(_: argparse.Namespace) -> None:
    from flows import servers

    servers.up()


def _down(_: argparse.Namespace) -> None:
    from flows import servers

    servers.down()


def _ui(parsed: argparse.Namespace) -> None:
    from flows import servers

    ports = servers.running()
    if not ports:
        raise workspace.UserError("no server is running; start them with `unmask up`")
    for name in ports:
        print(f"{name:8} {servers.address(name, ports)}")
        if not parsed.no_open:
            import webbrowser

            webbrowser.open(servers.address(name, ports))


def _sync(_: argparse.Namespace) -> None:
    from flows import sync

    sync.sync()


def _check(_: argparse.Namespace) -> None:
    from flows import rows

    for section, named in rows.load().items():
        print(f"{section:16} {', '.join(named)}")


def _report(_: argparse.Namespace) -> None:
    from flows.report import report

    report()
    print(workspace.report_folder() / "index.html")


def _recipe(parsed: argparse.Namespace) -> None:
    from flows import recipes

    if parsed.name:
        print(recipes.recipe(parsed.name, parsed.data), end="")
    else:
        print("\n".join(recipes.listing()))


def _import(parsed: argparse.Namespace) -> None:
    from flows import exchange

    hints = {"size": parsed.size, "heads": parsed.heads, "decoder_heads": parsed.decoder_heads}
    print("\n".join(exchange.bring(parsed.file, parsed.out, decoder=parsed.decoder, **hints)))


def _export(parsed: argparse.Namespace) -> None:
    from flows import exchange

    print("\n".join(exchange.give(parsed.row, parsed.out)))


def _predict(parsed: argparse.Namespace) -> None:
    from rich.console import Console

    from flows.predict import predict

    console = Console()
    for line in predict(parsed.row, parsed.images, parsed.out, parsed.draw, parsed.replace):
        console.print(line, markup=False, highlight=False, soft_wrap=isinstance(line, str))


def _embed(parsed: argparse.Namespace) -> None:
    from flows.predict import embed

    print("\n".join(embed(parsed.row, parsed.images, parsed.out, parsed.replace)))


def _restore(_: argparse.Namespace) -> None:
    from flows import data

    data.restore()


def _add(parsed: argparse.Namespace) -> None:
    from flows import data

    data.add(parsed.folder, parsed.name, parsed.size, form=parsed.format, replace=parsed.replace)


if __name__ == "__main__":
    main()
