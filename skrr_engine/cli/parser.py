"""The command line, without ComfyUI: `python -m skrr_engine search | repair | show | discrepancy | encode | apply |
sparsify | verify`.

Exit code 0; 1 for a user's error, told in one line; 130 for Ctrl-C.
"""

import argparse
import os
import sys

from .. import __version__
from ..errors import SkrrError, printable
from ..search import METHODS, QUALITIES
from .commands import run_apply, run_discrepancy, run_encode, run_repair, run_search, run_show, run_verify, spare_inputs
from .sparse import run_sparsify

TUNE = (
    "steps in which a level's stand-ins are tuned together on D, by its gradient through the encoder (default: none;"
    " 150 are enough)"
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        spare_inputs(options)
        options.command(options)
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (SkrrError, OSError) as error:
        print(f"skrr: {printable(' '.join(str(error).split())) or type(error).__name__}", file=sys.stderr)
        return 1


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line and exit code 1, as for every other user's error."""
        self.exit(1, f"skrr: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = Parser(prog="python -m skrr_engine", description="Skip and re-use sub-blocks of text encoders.")
    top.add_argument("--version", action="version", version=f"skrr {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    encoder = argparse.ArgumentParser(add_help=False)
    encoder.add_argument(
        "--encoder", required=True, metavar="PATH", help="transformers folder, or T5/CLIP .safetensors"
    )
    encoder.add_argument("--tokenizer", metavar="FOLDER", help="its tokenizer, where that is not beside the encoder")
    encoder.add_argument("--prompts", metavar="FILE", help="prompts, one a line (default: generated)")
    encoder.add_argument("--count", type=int, metavar="N", help="how many to generate (default 512; with paper 128)")
    encoder.add_argument("--projection", metavar="FILE", help="the denoiser's .safetensors, for its text projection")
    encoder.add_argument(
        "--pad",
        type=int,
        metavar="N",
        help="pad prompts to N tokens, where the denoiser reads padding (default: as ComfyUI does for the --projection"
        " given: FLUX's T5 256, SD3's 77, Wan's 512; CLIP always 77)",
    )
    encoder.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    encoder.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    encoder.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="memory to use, half of it for the weights: a larger encoder is streamed from its files"
        " (default: 1/4 of the free RAM beside the weights, 0.9 of the free VRAM)",
    )
    encoder.add_argument("--name", help="the encoder's name in the plan (default: t5xxl, clip_l, ... by its shape)")

    level = {"type": float, "default": 1.0, "help": "the level at or below it (default: the plan's strongest)"}
    search = commands.add_parser("search", parents=[encoder], help="search a plan", description=run_search.__doc__)
    search.add_argument("--out", required=True, metavar="PLAN", help="file to write the plan to")
    search.add_argument(
        "--quality",
        choices=QUALITIES,
        help="best (the default): sub-blocks narrowed under one budget, with stand-ins; parts: whole sub-blocks, with"
        " stand-ins; paper: as in the paper (beam search, re-use)",
    )
    search.add_argument("--sparsity", type=float, help="fraction of parameters to remove (default 0.42)")
    search.add_argument("--gb", type=float, metavar="G", help="instead: what the encoder's file may then take, in GB")
    search.add_argument(
        "--levels",
        default="",
        metavar="A,B",
        help="further sparsities to have levels for (best: 0.25,0.33,0.42,0.5,0.6; otherwise none), e.g. 0.2,0.3",
    )
    search.add_argument("--beam", type=int, help="paper: width of the beam search (default 3)")
    search.add_argument(
        "--standins",
        metavar="RANK",
        help="rank of the linear stand-ins that repair what is removed (default 16; not with paper), or auto; they go"
        " to a file beside the plan",
    )
    search.add_argument("--tune", type=int, default=0, metavar="STEPS", help=f"best: {TUNE}")
    search.add_argument(
        "--method",
        choices=METHODS,
        help="how sub-blocks are chosen, by name: widths (best), standins (parts), skrr (paper); or, to compare with,"
        " another paper's way (baselines.py)",
    )
    search.add_argument("--seed", type=int, default=0, help="of --method random (default 0)")
    search.add_argument("--no-reuse", action="store_true", help="skip only")
    search.add_argument("--exact", action="store_true", help="the printed algorithm's plan, slower (default: racing)")
    search.add_argument(
        "--delta", type=float, help="racing: about how likely a step loses one of its best (default 0.05)"
    )
    search.add_argument(
        "--resume", metavar="STATE", help="file that keeps the state after each step, and is gone on from if it exists"
    )
    search.add_argument("--quiet", action="store_true", help="no progress on stderr")
    search.set_defaults(command=run_search)

    show = commands.add_parser("show", help="print a plan", description=run_show.__doc__)
    show.add_argument("plan", metavar="PLAN")
    show.set_defaults(command=run_show)

    measure = commands.add_parser(
        "discrepancy", parents=[encoder], help="measure a plan", description=run_discrepancy.__doc__
    )
    measure.add_argument("--plan", required=True, metavar="PLAN")
    measure.add_argument("--sparsity", **level)
    measure.add_argument("--json", action="store_true", help="print one JSON object")
    measure.set_defaults(command=run_discrepancy)

    repair = commands.add_parser(
        "repair", parents=[encoder], help="fit stand-ins to a plan", description=run_repair.__doc__
    )
    repair.add_argument("--plan", required=True, metavar="PLAN")
    repair.add_argument("--out", required=True, metavar="PLAN", help="file to write the repaired plan to")
    repair.add_argument("--widths", action="store_true", help="narrow sub-blocks to the sizes of its levels instead")
    repair.add_argument("--levels", default="", metavar="A,B", help="further sparsities to have levels for, e.g. 0.37")
    repair.add_argument("--standins", default="16", metavar="RANK", help="rank of the stand-ins (default 16)")
    repair.add_argument("--tune", type=int, default=0, metavar="STEPS", help=TUNE)
    repair.add_argument("--quiet", action="store_true", help="no progress on stderr")
    repair.set_defaults(command=run_repair)

    encode = commands.add_parser(
        "encode", parents=[encoder], help="write prompts' embeddings", description=run_encode.__doc__
    )
    encode.add_argument("--plan", metavar="PLAN", help="prune the encoder by this plan (default: dense)")
    encode.add_argument("--sparsity", **level)
    encode.add_argument("--out", required=True, metavar="FILE", help=".safetensors to write")
    encode.set_defaults(command=run_encode)

    apply = commands.add_parser("apply", help="write a pruned encoder file", description=run_apply.__doc__)
    apply.add_argument("--encoder", required=True, metavar="FILE", help="a text encoder's .safetensors")
    apply.add_argument("--plan", required=True, metavar="PLAN")
    apply.add_argument("--out", required=True, metavar="OUT", help="file to write")
    apply.add_argument("--sparsity", **level)
    apply.add_argument("--name", help="the plan's entry for this encoder (default: the one of its shape)")
    apply.set_defaults(command=run_apply)

    sparse = commands.add_parser(
        "sparsify", parents=[encoder], help="take single weights out", description=run_sparsify.__doc__
    )
    sparse.add_argument(
        "--method",
        choices=("magnitude", "wanda", "sparsegpt", "owl"),
        default="magnitude",
        help="which weights go: the smallest (default); the others look at prompts",
    )
    sparse.add_argument("--sparsity", type=float, default=0.475, help="share of the weights (default 0.475)")
    sparse.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="names that stay whole")
    sparse.add_argument("--out", required=True, metavar="OUT", help=".safetensors to write")
    sparse.set_defaults(command=run_sparsify)

    verify = commands.add_parser("verify", help="check a file that Skrr has written", description=run_verify.__doc__)
    verify.add_argument("file", metavar="FILE")
    verify.set_defaults(command=run_verify)
    return top
