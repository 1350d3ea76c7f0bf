"""`python -m llm_variator.analyze neurons|merge`: what plugins do inside a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llm_variator import old_cli as cli
from llm_variator.analyze import merge, neurons


def build_parser() -> cli.Parser:
    """Every sub-command and its flags."""
    parser = cli.Parser(prog="python -m llm_variator.analyze", description="See what plugins do.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    neurons.add_flags(
        commands.add_parser(
            "neurons",
            help="activated neurons by layer and ratio, and the sets C, I, U (the paper's Figure 5 and Table 5)",
            description="Share of activated neurons by layer and compression ratio, and how the neurons that a merged "
            "vector activates relate to those of the vectors it stands for.",
        )
    )
    merge.add_flags(
        commands.add_parser(
            "merge",
            help="learned merge weights, reconstruction, sensitivity of layers, tokens that suffer most",
            description="What a trained plugin has learned: merge weights by position in the group, how well each "
            "layer's output is restored, which layers are sensitive, and which tokens after the prompt suffer.",
        )
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run one analysis, print its table and store its figures."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = cli.parse(build_parser(), argv)
    (neurons if args.command == "neurons" else merge).run(args, argv)


if __name__ == "__main__":
    cli.run(main)
