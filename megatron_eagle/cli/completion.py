"""``megatron-eagle completion``: a script that lets a shell complete verbs, options and files.

Written by shtab from the parsers, so that it never says anything else than they do.
"""

import argparse
import sys

from megatron_eagle.cli.common import Verbs, verb

SHELLS = ("bash", "zsh", "tcsh")


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "completion",
        "print a script that completes this command in a shell",
        "Verbs, options, values that are a choice of some, and files. Put it where the shell looks for such scripts.",
        "  megatron-eagle completion bash > ~/.local/share/bash-completion/completions/megatron-eagle\n",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell it is for")
    parser.set_defaults(run=_print_script)


def _print_script(options: argparse.Namespace) -> None:
    import shtab

    from megatron_eagle.cli import command_line

    sys.stdout.write(shtab.complete(command_line(), options.shell) + "\n")
