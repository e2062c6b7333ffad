"""a finished comparison as one HTML file, as Markdown, or as tables in the terminal

Measures nothing, but with --pictures: then every method of the run reads a text, and the page shows what each chose and
where the exact attention lies.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from saccade.cli.console import Bar
from saccade.core.errors import BadOption

EXAMPLE = "saccade report saccade-runs/compare-1a2b3c4d --format markdown"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `report` takes."""
    about = "the folder that `saccade compare` made; or the file of an artefact, whose heads are shown"
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help=about)
    about = "first draw what each method attends to; its maps stay in the folder"
    parser.add_argument("--pictures", action="store_true", help=about)
    parser.add_argument("--model", metavar="MODEL", help="of pictures: where the run's model lies, if it is a file")
    parser.add_argument("--device", metavar="DEVICE", help="of pictures: cpu, cuda, ... (that of the run)")
    parser.add_argument("--format", default="html", metavar="FORMAT", help="html, markdown or terminal (html)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write (into the folder; terminal: stdout)")


def run(args: argparse.Namespace) -> int:
    """Prints the path of what it wrote, or the tables."""
    import saccade

    if args.pictures:
        _draw(args)
    elif args.model or args.device:
        raise BadOption("report --model or --device", "they are of pictures", "Add --pictures, or leave them away.")
    print(saccade.report(args.run_dir, out=args.out, format=args.format))
    return 0


def _draw(args: argparse.Namespace) -> None:
    from saccade.measure.pictures import pictures

    with Bar(args.quiet) as bar:
        pictures(args.run_dir, args.model, args.device, bar.event)
