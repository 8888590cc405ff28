"""The command line: the arguments of `ghl`'s sub-commands, and how their errors are told.

What a sub-command does is in `ghl.recipes`, `ghl.bench` and `ghl.doctor`, imported when it is
called.
"""

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = ("ghl", "torch.")  # packages without which nothing works


@dataclass(frozen=True)
class Command:
    """A sub-command: its name, its line of help, its arguments, and what runs it."""

    name: str
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def absolute(text: str) -> str:
    """A path that still holds when the run is resumed from another directory."""
    return str(Path(text).resolve())


class WithDefaults(argparse.HelpFormatter):
    """Tells what each option of `ghl train` is when none is given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        from ghl.recipes.config import Config

        value = vars(Config.resolve({})).get(action.dest)
        told = isinstance(value, int | float | str) and not isinstance(value, bool)
        return f"{action.help} ({value})" if told else action.help


class Version(argparse.Action):
    """Looked up when it is asked for: a checkout that was not installed has none."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        try:
            parser.exit(message=f"ghl {importlib.metadata.version('ghl-kernels')}\n")
        except importlib.metadata.PackageNotFoundError:
            parser.error("ghl-kernels is not installed: its version is in pyproject.toml")


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ghl train`; those not given are left to the defaults of arch and rule."""
    parser.formatter_class = WithDefaults
    parser.epilog = "In brackets: without any option. Networks and rules have rates of their own."
    add = parser.add_argument
    add("--rule", nargs="+", metavar="RULE", help="ghl, hebb, sign, bp; several are compared")
    add(
        "--arch",
        help="deephebb, fasthebb (also -imagenet), resnet20 to resnet1202, torchvision's",
    )
    add("--width", type=float, help="multiplier on the channels, 0.25 for a narrow network")
    add("--layers", help="that the rule trains: conv2d, linear or all")
    names = "but not those of these names, or inside: heads, '*attn*'"
    add("--exclude", nargs="+", action="extend", metavar="PATTERN", help=names)
    add("--tau", type=float, help="softmax temperature of every swapped layer")
    add("--normalize", help="absmax, mean or none")
    add("--data", help="digits, fashion-mnist, cifar10, cifar100, imagefolder, imagenet or fake")
    add("--root", type=absolute, help="directory of the data; imagenet: of folders or tar shards")
    add("--download", action="store_true", default=None, help="fetch the data into --root")
    add("--size", type=int, help="side of the images in pixels")
    add("--limit-train", type=int, metavar="N", help="train on a fixed subset of N images")
    add("--limit-test", type=int, metavar="N", help="test on a fixed subset of N images")
    add("--epochs", type=int, help="passes over the training images")
    add("--batch-size", type=int, help="images of a step: of all processes and micro-batches")
    add("--lr", type=float, help="learning rate of everything but the swapped layers")
    add("--lr-hebb", type=float, help="learning rate of the swapped layers' weights")
    add("--wd", type=float, help="weight decay of everything but the swapped layers")
    add("--wd-hebb", type=float, help="weight decay of the swapped layers' weights")
    add("--schedule", help="cosine or constant")
    add("--seed", type=int, help="of weights, order and crops")
    add("--device", help="cpu, cuda, cuda:1; by default a GPU where there is one")
    add("--workers", type=int, help="processes that load data")
    add(
        "--align-every", type=int, metavar="N", help="record alignment every N steps: see ghl align"
    )
    add("--align-neurons", action="store_true", default=None, help="and that of every neuron")
    large_arguments(parser)
    add("--out", type=Path, metavar="DIR", help="by default runs/DATA-ARCH-RULE")
    add("--resume", action="store_true", help="continue the run in DIR from its checkpoint")


def large_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ghl train` that large networks and data sets call for."""
    group = parser.add_argument_group("at full size (under torchrun: data parallel)")
    add = group.add_argument
    switch: dict[str, Any] = {"action": "store_true", "default": None}
    add("--optimizer", help="sgd, or adamw, which has learning rates and decays of its own")
    add("--momentum", type=float, help="of SGD, for every parameter")
    add("--warmup", type=int, metavar="EPOCHS", help="over which learning rates rise linearly")
    add("--label-smoothing", type=float, metavar="SHARE", help="of the target, over all classes")
    add("--ema", type=float, metavar="DECAY", help="evaluate with averaged parameters; 0.9999, say")
    add("--resize-from", type=int, metavar="SIZE", help="side of the first epoch's photographs")
    add("--amp", help="none, bf16 or fp16 (with a GradScaler)")
    add("--channels-last", **switch, help="images, and weights but for --fsdp's, in that order")
    add("--compile", **switch, help="the network by torch.compile")
    add("--fused", **switch, help="the optimizer's step as one kernel")
    add("--accumulate", type=int, metavar="N", help="cut a process's part of a step into N")
    add("--fsdp", **switch, help="shard the network over the processes, instead of copies (DDP)")
    add("--decode", help="photographs: workers, device (nvJPEG), or auto: device where it can")
    add("--damaged-share", type=float, metavar="SHARE", help="of images that may be unreadable")
    add("--checkpoint-every", type=int, metavar="STEPS", help="also within an epoch")
    add("--world-change", help="refuse or rescale, when a run resumes on more or fewer processes")


def train(args: argparse.Namespace) -> int:
    """Run `ghl train`, in this process or as one of those that torchrun started."""
    from ghl.recipes.distributed import joined, restarted
    from ghl.recipes.interrupts import heard

    with heard(), joined(args.device):
        train_here(args, resume=args.resume or restarted())
    return 0


def train_here(args: argparse.Namespace, *, resume: bool) -> None:
    """Train what the arguments say, one rule or several after another."""
    from ghl.recipes.config import DEFAULTS
    from ghl.recipes.distributed import World, restarted
    from ghl.recipes.train import compare, holds_a_run, open_run
    from ghl.recipes.train import train as train_one

    given = given_settings(args, exclude=("rule", "out", "resume"))
    rules = list(dict.fromkeys(args.rule or ()))
    name = "-".join(given.get(field, DEFAULTS[field]) for field in ("data", "arch"))
    if len(rules) > 1:
        out = args.out or Path("runs") / name
        runs = [open_run(out / rule, {**given, "rule": rule}, resume=resume) for rule in rules]
    else:
        given |= {"rule": rules[0]} if rules else {}
        out = args.out or Path("runs") / f"{name}-{given.get('rule', DEFAULTS['rule'])}"
        runs = [open_run(out, given, resume=resume)]
    if args.resume and not restarted() and not any(holds_a_run(run.out) for run in runs):
        raise FileNotFoundError(f"--resume: expected a run in {out}, found none")
    World.current().gather(None)  # nobody writes before all have looked
    if len(rules) > 1:
        compare(runs, out)
    else:
        train_one(runs[0])


def eval_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ghl eval`."""
    parser.add_argument("dir", type=Path, metavar="DIR", help="directory of a run")
    parser.add_argument("--root", type=absolute, help="directory of the data, if it moved")
    parser.add_argument("--device", help="where to compute, if not where it was trained")
    parser.add_argument("--workers", type=int, help="processes that load data")


def evaluate(args: argparse.Namespace) -> int:
    """Run `ghl eval`."""
    from ghl.recipes.train import evaluate as evaluate_run

    epoch, loss, accuracy = evaluate_run(args.dir, given_settings(args, exclude=("dir",)))
    print(f"epoch {epoch}: test accuracy {accuracy:.2f} %, test loss {loss:.4f}")
    return 0


def no_arguments(parser: argparse.ArgumentParser) -> None:
    """For a sub-command without options."""


def align_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ghl align`."""
    parser.add_argument("dir", type=Path, metavar="DIR", help="directory with an alignment.csv")


def align(args: argparse.Namespace) -> int:
    """Run `ghl align`."""
    from ghl.recipes.align import align as draw

    return draw(args)


def reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ghl reproduce`."""
    from ghl.recipes.reproduce.options import arguments

    arguments(parser)


def reproduce(args: argparse.Namespace) -> int:
    """Run `ghl reproduce`."""
    from ghl.recipes.reproduce.command import reproduce as reproduce_all

    return reproduce_all(args)


def doctor(args: argparse.Namespace) -> int:
    """Run `ghl doctor`."""
    from ghl.doctor import main as doctor_main

    return doctor_main()


# what is measured by default, fitting into five minutes on a large GPU
WORKLOADS = ("resnet50_b256", "vgg16_b256", "vit_b16_b256", "deephebb_b64", "deephebb_b1024")


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ghl bench`."""
    what = parser.add_subparsers(metavar="WHAT", dest="what", required=True)
    layers = what.add_parser("layers", help="time every layer of a model against PyTorch's own")
    tune = what.add_parser("tune", help="choose tiles for the GPU at hand by measuring")
    for chosen in (layers, tune):
        add = chosen.add_argument
        add("workloads", nargs="*", metavar="MODEL_bBATCH", default=WORKLOADS,
            help=f"by default {' '.join(WORKLOADS)}")  # fmt: skip
        add(
            "--modes",
            nargs="+",
            metavar="MODE",
            help="bfloat16, tf32, and to time float32; by default bfloat16, all for deephebb",
        )
    add = layers.add_argument
    add("--device", default="cuda", help="cuda by default; cpu")
    add("--seconds", type=float, default=300,
        help="begin no further layer after these, %(default)s")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="write all figures there as JSON")
    add("--resume", action="store_true",
        help="go on with FILE if it is of this GPU, these versions and sources")  # fmt: skip
    add = tune.add_argument
    add("--budget", type=float, default=300, metavar="SECONDS", help="to spend, %(default)s")
    add("--strategies", nargs="+", metavar="NAME",
        help="try only these beside what a layer takes now, as `ghl_kernels.force` names them; "
        "those of compiled kernels wait for no compiler")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="by default the user's table for this GPU")
    add("--log", type=Path, metavar="FILE", help="write every attempt there as JSON")


def bench(args: argparse.Namespace) -> int:
    """Run `ghl bench`."""
    from ghl.bench import command

    return command.layers(args) if args.what == "layers" else command.tune(args)


COMMANDS = (
    Command("train", "train a network under a learning rule", train_arguments, train),
    Command("eval", "test accuracy of a run's checkpoint", eval_arguments, evaluate),
    Command("bench", "time layers, tune tiles", bench_arguments, bench),
    Command("align", "figures of a run's recorded alignment", align_arguments, align),
    Command("reproduce", "experiments on Hebbian alignment", reproduce_arguments, reproduce),
    Command("doctor", "what is installed, compiled and used here", no_arguments, doctor),
)


def given_settings(args: argparse.Namespace, exclude: Sequence[str]) -> dict[str, Any]:
    """The options that were given, by name of the setting."""
    skipped = {"command", *exclude}
    return {
        name: value
        for name, value in vars(args).items()
        if name not in skipped and value is not None
    }


def parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands; `command` in its result is the chosen Command."""
    top = argparse.ArgumentParser(
        prog="ghl", description="Global-guided Hebbian learning: train, evaluate, inspect."
    )
    top.add_argument("--version", action=Version, nargs=0, help="show it and exit")
    chosen = top.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = chosen.add_parser(command.name, help=command.help, description=command.help)
        command.arguments(sub)
        sub.set_defaults(command=command)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 after one line on stderr about what was wrong in the input."""
    try:
        args = parser().parse_args(argv)
        return args.command.run(args)
    except BrokenPipeError:  # of `| head`: what is still to be printed has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"ghl: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if str(error.name).startswith(OURS):
            raise
        print(f"ghl: error: {error}: pip install 'ghl-kernels[train]' brings it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ghl: interrupted", file=sys.stderr)
        return 130
