"""The arguments of every command: what `squeezejax COMMAND --help` explains."""

import argparse
import itertools
import shutil
import textwrap

from squeezejax.command_line.kinds import at_least, count_or_none, fraction, fractions, mesh, not_negative, positive
from squeezejax.config import SqueezeConfig

_DEFAULTS = SqueezeConfig()
DEMO_TOKENS = 4096  # a length at which the embedded model answers nearly everything right with dense attention


class Help(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal, up to 110: paragraphs are filled, indented lines stay; one column for all options."""

    def __init__(self, prog):
        width = min(110, max(20, shutil.get_terminal_size((100, 24)).columns - 2))
        super().__init__(prog, max_help_position=min(30, width // 2), width=width)

    def _fill_text(self, text, width, indent):
        blocks = itertools.groupby(text.splitlines(), key=lambda line: not line or line[0].isspace())
        lines = (group if as_it_is else textwrap.wrap(" ".join(group), width) for as_it_is, group in blocks)
        return "\n".join(indent + line for block in lines for line in block)


def _command(commands, name: str, summary: str, description: str, run):
    command = commands.add_parser(name, help=summary, description=description, formatter_class=Help)
    command.set_defaults(run=run)
    return command


def _add_demo(commands):
    command = _command(
        commands,
        "demo",
        "a small built-in model answers questions about a long text: start here",
        """\
A small Llama that comes with squeezejax reads a made-up chronicle in which facts are hidden, and
is asked for some of them: with dense attention, which reads every key of the text, and with the
squeezed cache, which reads only the keys that matter to the question. Nothing is downloaded.

  squeezejax demo
  squeezejax demo --sparsity 0.95 --questions 12""",
        _run("squeezejax.command_line.demo", "demo"),
    )
    command.add_argument("--sparsity", type=fraction, metavar="X", default=_DEFAULTS.sparsity, help=_SPARSITY)
    command.add_argument(
        "--tokens",
        type=at_least(200),
        default=DEMO_TOKENS,
        metavar="N",
        help=f"length of the text in tokens (default: {DEMO_TOKENS})",
    )
    command.add_argument("--questions", type=at_least(1), default=6, metavar="N", help="how many to ask (default: 6)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="another number, another text (default: 0)")
    command.add_argument(
        "--out",
        metavar="TREE",
        help="keep the squeezed text in this file, for `ask` and `info`, and the text in TREE.txt",
    )
    command.add_argument("--force", action="store_true", help="replace TREE and TREE.txt if they exist")
    return command


def _add_build(commands):
    command = _command(
        commands,
        "build",
        "squeeze a text file once, for any number of questions",
        """\
Reads a text with the model, clusters the keys of every layer and head, and writes all that
answering questions needs, besides the model, to one file. This takes as long as the model takes
to read the text, and some more for the clusters; no question has to wait for that again.

  squeezejax build --model ~/models/Llama-3.2-1B-Instruct --context book.txt --out book.tree

The text becomes the beginning of the user's message in the model's chat template; white space
at its ends is dropped. Memory: the model, and keys and values of the whole text.

Finished layers are kept in the folder TREE.unfinished while it runs: after an interruption the
same command goes on from there.""",
        _run("squeezejax.command_line.building", "build"),
    )
    required = command.add_argument_group("required")
    required.add_argument("--model", required=True, metavar="DIR", help=_MODEL)
    required.add_argument("--context", required=True, metavar="FILE", help="the text, UTF-8")
    required.add_argument("--out", required=True, metavar="TREE", help="file to write")
    _add_work(command)
    command.add_argument(
        "--no-checkpoint", action="store_true", help="keep nothing on the disk while it runs; start anew if interrupted"
    )
    command.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of weights, keys and values (default: float32 on a CPU, elsewhere the checkpoint's)",
    )
    config = command.add_argument_group("how to squeeze")
    _add_index(config)
    _add_field(
        config,
        "sparsity",
        fraction,
        "X",
        f"fraction of keys to drop unless `ask` says otherwise, 0 to 1 (default: {_DEFAULTS.sparsity:g})",
    )
    _add_field(
        config,
        "coarse_loss",
        fraction,
        "X",
        "share of what should be kept that each coarser level may lose (default: {})",
    )
    _add_field(
        config,
        "coarse_margin",
        float,
        "X",
        "with --score mean, the coarsest level keeps X times the keys wanted in the end (default: {})",
    )
    _add_field(
        config,
        "query_block",
        count_or_none,
        "TOKENS",
        "tokens of a question that share one selection, or `none` for all of them (default: {})",
    )
    _add_field(
        config,
        "cluster_segment",
        count_or_none,
        "TOKENS",
        "keys are clustered in runs of about so many tokens, or `none` for all at once (default: {})",
    )
    _add_field(config, "kmeans_iterations", at_least(0), "N", "rounds of clustering (default: {})")
    _add_field(
        config, "kmeans_tolerance", float, "X", "relative gain below which iterations stop early (default: {:g})"
    )
    _add_field(
        config,
        "kmeans_swap_rounds",
        at_least(0),
        "N",
        "how many of the rounds also move clusters to where they gain more (default: {})",
    )
    _add_field(
        config,
        "cluster_granule",
        at_least(1),
        "ROWS",
        "clusters of whole granules of so many keys (default: 8 for 16-bit keys, which GPU kernels read, else 1)",
    )
    _add_field(config, "cluster_cap", float, "X", "no cluster larger than X times the mean (default: any size)")
    return command


def _add_work(command):
    """The options of making a tree that say nothing about it."""
    command.add_argument("--force", action="store_true", help="replace TREE if it exists")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the clustering's random start (default: 0)"
    )


def _add_field(group, field: str, kind, metavar: str | None, text: str, *, option: str | None = None, **options):
    """One option of a configuration; left out, the default is that of `SqueezeConfig`, or of its paper's method."""
    option = option or f"--{field.replace('_', '-')}"
    names = {} if metavar is None else {"metavar": metavar}
    text = text.format(getattr(_DEFAULTS, field))
    group.add_argument(option, dest=field, type=kind, default=argparse.SUPPRESS, help=text, **names, **options)


def _add_index(group):
    """The options on which a tree's size depends."""
    group.add_argument(
        "--paper", action="store_true", help="start from the method of the paper instead of the defaults below"
    )
    _add_field(
        group,
        "cluster_fractions",
        fractions,
        "F,F",
        "clusters per key, coarse to fine; one number for a single level (default: "
        f"{','.join(f'{f:g}' for f in _DEFAULTS.cluster_fractions)})",
    )
    _add_field(
        group,
        "observation_window",
        at_least(0),
        "TOKENS",
        "last tokens of the text: always read, never clustered, and the measure of what matters (default: {})",
        option="--window",
    )
    _add_field(
        group, "sinks", at_least(0), "TOKENS", "first tokens of the text: always read, never clustered (default: {})"
    )
    _add_field(
        group, "index_bits", int, None, "of each number of a cluster's mean (default: {})", choices=(32, 16, 8, 4)
    )
    _add_field(
        group,
        "key_bits",
        int,
        None,
        "of each number of a single key's code; 0: clusters are kept whole (default: {})",
        choices=(0, 1, 2, 4),
    )
    _add_field(
        group,
        "cache_bits",
        int,
        None,
        "of each number of keys and values, sinks and window apart; 16: as the model gives them (default: {})",
        choices=(16, 8),
    )
    _add_field(
        group,
        "cluster_metric",
        str,
        None,
        "what is near: `slow` where RoPE turns little, `cosine` as in the paper (default: {})",
        choices=("slow", "cosine"),
    )
    _add_field(
        group,
        "score",
        str,
        None,
        "of a cluster: with a term for its spread, or its mean's alone, as in the paper (default: {})",
        choices=("variance", "mean"),
    )


def _add_append(commands):
    command = _command(
        commands,
        "append",
        "add a text to a squeezed one: a further chapter, a finished conversation",
        """\
Reads a text that follows a squeezed one, with the model and all that came before, and writes a
tree of both. Only the new keys are clustered, so it takes as long as the new text is long.

  squeezejax append --tree book.tree --context chapter9.txt --out longer.tree

The new text follows the old one after an empty line.""",
        _run("squeezejax.command_line.building", "append"),
    )
    required = command.add_argument_group("required")
    required.add_argument("--tree", required=True, metavar="OLD", help="what `build` or `append` wrote")
    required.add_argument("--context", required=True, metavar="FILE", help="the text to add, UTF-8")
    required.add_argument("--out", required=True, metavar="TREE", help="file to write; with --force also OLD")
    command.add_argument(
        "--model", metavar="DIR", help="checkpoint directory (default: the one that OLD names, if you built it)"
    )
    _add_work(command)
    return command


def _add_ask(commands):
    command = _command(
        commands,
        "ask",
        "ask questions of a squeezed text, or chat about it",
        """\
Answers appear as they are generated. Several questions are answered one by one, each from the
text alone; --chat goes on as one conversation, in which every turn sees the earlier ones.

  squeezejax ask --tree book.tree "Who tells the story?" "How does it end?"
  squeezejax ask --tree book.tree --sparsity 0.95 --stats "Who tells the story?"
  squeezejax ask --tree book.tree --explain page.html "Who tells the story?"
  squeezejax ask --tree book.tree --chat""",
        _run("squeezejax.command_line.commands", "ask"),
    )
    command.add_argument("questions", nargs="*", metavar="QUESTION", help="in quotes")
    command.add_argument("--tree", required=True, metavar="TREE", help="what `build` wrote (required)")
    command.add_argument(
        "--model", metavar="DIR", help="checkpoint directory (default: the one that TREE names, if you built it)"
    )
    command.add_argument(
        "--chat", action="store_true", help="read further turns from the terminal; an empty line ends the chat"
    )
    command.add_argument("--sparsity", type=fraction, metavar="X", help=_SPARSITY.replace("0.9", "as built"))
    command.add_argument(
        "--dense", action="store_true", help="read every key of the text instead: the answer to compare with"
    )
    command.add_argument(
        "--implementation",
        choices=("xla", "wide", "mosaic"),
        help="choose keys by this one, even where reading all would be faster (default: the best, and every key where "
        "choosing does not pay)",
    )
    command.add_argument("--stats", action="store_true", help="after each answer, keys kept and tokens per second")
    command.add_argument(
        "--max-new-tokens", type=at_least(1), default=256, metavar="N", help="longest answer (default: 256)"
    )
    command.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end an answer before this text; may be given several times",
    )
    explained = command.add_argument_group("what was read for an answer")
    explained.add_argument(
        "--explain",
        metavar="PAGE",
        help="write an HTML page that shows which parts of the text were kept, attended and missed; for one question",
    )
    explained.add_argument(
        "--context",
        action="append",
        metavar="FILE",
        help="the squeezed text, and again for each that was appended (default: the files that TREE names)",
    )
    explained.add_argument("--force", action="store_true", help="replace PAGE if it exists")
    sampling = command.add_argument_group("random answers")
    sampling.add_argument(
        "--temperature", type=not_negative, default=0.0, metavar="X", help="0 = always the likeliest token (default)"
    )
    sampling.add_argument("--top-k", type=at_least(1), metavar="N", help="draw from the N likeliest tokens only")
    sampling.add_argument(
        "--top-p", type=fraction, metavar="P", help="draw from the fewest tokens that have probability P together"
    )
    sampling.add_argument(
        "--seed", type=int, default=0, metavar="N", help="another number, another answer (default: 0)"
    )
    command.add_argument(
        "--repetition-penalty",
        type=positive,
        metavar="X",
        help="above 1, words of the question and of the answer so far are less likely to come again (default: 1)",
    )
    return command


def _add_info(commands):
    command = _command(
        commands,
        "info",
        "what a squeezed file holds; without one, what runs on this machine",
        """\
Sizes, clusters, thresholds and notes of a file that `build` wrote; the model is not needed.
A cluster's keys are read where the logarithm of its score for a question exceeds log T, which
was measured so that about the fraction `sparsity` of all keys is dropped.

Without a file: the devices, and which implementation answers questions on them and why.

  squeezejax info book.tree
  squeezejax info --json book.tree
  squeezejax info""",
        _run("squeezejax.command_line.info", "info"),
    )
    command.add_argument("tree", metavar="TREE", nargs="?", help="what `build` wrote (default: this machine)")
    command.add_argument("--json", action="store_true", help="for programs")
    return command


def _add_plan(commands):
    command = _command(
        commands,
        "plan",
        "what a model and a context will take, before anything is loaded",
        """\
Memory on each device, and what a decode step reads and sends, for a model, a length of context
and a mesh of devices. Of the model only config.json is read. The sizes are those of the arrays
that the library would make; temporaries of a build are estimated.

  squeezejax plan --model ~/models/Llama-3.1-8B --context-tokens 131072
  squeezejax plan --model ~/models/Llama-3.3-70B --context-tokens 1000000 --mesh model=8 \\
                  --device-memory 141 --bandwidth 4800

Exit code 1: it cannot fit in --device-memory.""",
        _run("squeezejax.command_line.plan_table", "plan_command"),
    )
    required = command.add_argument_group("required")
    required.add_argument("--model", required=True, metavar="DIR", help=_MODEL)
    required.add_argument("--context-tokens", required=True, type=at_least(1), metavar="N", help="length of the text")
    command.add_argument(
        "--mesh",
        type=mesh,
        default=(("model", 1),),
        metavar="AXIS=N,…",
        help="devices that split users (data), heads and weights (model), the text (context), as in "
        "data=1,model=4,context=2 (default: one device)",
    )
    command.add_argument("--users", type=at_least(1), default=1, metavar="N", help="questions at a time (default: 1)")
    command.add_argument(
        "--question-tokens", type=at_least(1), default=128, metavar="N", help="of each user (default: 128)"
    )
    command.add_argument("--new-tokens", type=at_least(1), default=128, metavar="N", help="of answer (default: 128)")
    _add_field(command, "sparsity", fraction, "X", _SPARSITY)
    command.add_argument("--dtype", choices=_DTYPES, help="of weights, keys and values (default: the checkpoint's)")
    command.add_argument("--device-memory", type=positive, metavar="GB", help="of each device: does it fit?")
    command.add_argument(
        "--bandwidth", type=positive, metavar="GB/S", help="of each device's memory: how long a step takes at least"
    )
    _add_index(command)
    command.add_argument("--json", action="store_true", help="for programs")
    return command


_DTYPES = ("float32", "bfloat16", "float16")
_MODEL = (
    "checkpoint directory in Hugging Face layout (config.json, *.safetensors, tokenizer), or `embedded` for the "
    "demo's model"
)
_SPARSITY = "fraction of keys to drop, 0 to 1 (default: 0.9)"


def _run(module: str, name: str):
    """A command's function, imported only when it runs: help should not wait for JAX."""

    def run(arguments):
        import importlib

        return getattr(importlib.import_module(module), name)(arguments)

    return run


COMMANDS = (_add_demo, _add_build, _add_append, _add_ask, _add_info, _add_plan)
