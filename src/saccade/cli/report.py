"""a finished comparison as one HTML file, as Markdown, or as tables in the terminal; measures nothing"""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = "saccade report saccade-runs/compare-1a2b3c4d --format markdown"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `report` takes."""
    about = "the folder that `saccade compare` made; or the file of an artefact, whose heads are shown"
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help=about)
    parser.add_argument("--format", default="html", metavar="FORMAT", help="html, markdown or terminal (html)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write (into the folder; terminal: stdout)")


def run(args: argparse.Namespace) -> int:
    """Prints the path of what it wrote, or the tables."""
    import saccade

    print(saccade.report(args.run_dir, out=args.out, format=args.format))
    return 0
