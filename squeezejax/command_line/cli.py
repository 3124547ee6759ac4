"""The command line, `squeezejax demo | build | append | ask | info | plan`: running them, and errors.

Their arguments are in `grammar`. The work is done in `demo`, `building`, `commands`, `info` and `plan_table`.
"""

import argparse
import os
import sys
import traceback

import squeezejax
from squeezejax.chat.shown import shown_line
from squeezejax.command_line import cache, grammar

BAD_INPUT, FAILED, INTERRUPTED, BROKEN_PIPE = 2, 1, 130, 141  # exit codes; 0 = done
# What a caller can put right by another argument or another file; every other exception is a failure.
_CALLER_IS_WRONG = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)

_INTRODUCTION = """\
Ask many questions of one long, fixed text: squeeze it once, and every question then reads
only the part of it that matters (Squeezed Attention, arXiv 2411.09688), in JAX."""
_FIRST_SESSION = """\
a first session:
  squeezejax demo                                   no download, a minute or two
  squeezejax build --model ~/models/Llama-3.2-1B-Instruct --context book.txt --out book.tree
  squeezejax info book.tree
  squeezejax ask --tree book.tree "Who tells the story?" "How does it end?"
  squeezejax ask --tree book.tree --chat

`squeezejax COMMAND --help` explains a command and each of its options."""


def main(argv=None) -> int:
    """Runs one command and returns the exit code: 0 done, 2 wrong input, 1 failure, 130 interrupted.

    As a program, without argv, it also keeps what JAX compiles for the next time (`cache`).
    """
    _open_standard_streams()
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        if argv is None:
            cache.keep_compiled(arguments.compilation_cache)
        code = arguments.run(arguments)
        sys.stdout.flush()  # a reader that has gone away shows here rather than at exit
        return code or 0
    except KeyboardInterrupt:
        print("\nsqueezejax: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"squeezejax {arguments.command}: {shown_line(describe(error))}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, _CALLER_IS_WRONG) else FAILED


def _open_standard_streams():
    """Puts the null device where a caller has closed a standard stream, which Python then has as None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the program runs


def describe(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    known = isinstance(error, (*_CALLER_IS_WRONG, OSError, RuntimeError))
    return text if known and text else f"{type(error).__name__}: {text} (--debug shows where)"


class _Parser(argparse.ArgumentParser):
    """argparse, but errors take one line."""

    def error(self, message):
        self.exit(BAD_INPUT, f"{self.prog}: {shown_line(message)} (try {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The whole grammar of the command line; after parsing, `arguments.run(arguments)` does the work."""
    parser = _Parser("squeezejax", description=_INTRODUCTION, epilog=_FIRST_SESSION, formatter_class=grammar.Help)
    parser.add_argument("--version", action="version", version=f"squeezejax {squeezejax.__version__}")
    parser.set_defaults(debug=False, compilation_cache=True)
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND", parser_class=_Parser)
    for add in grammar.COMMANDS:
        command = add(commands)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_argument(
            "--no-compilation-cache",
            action="store_false",
            dest="compilation_cache",
            help="keep nothing that JAX compiles for the next time (default: kept in the user's cache folder, or in "
            "$JAX_COMPILATION_CACHE_DIR)",
        )
    return parser
