"""The ``vtw-kernels`` command."""

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vtw_kernels import __version__
from vtw_kernels.extras import require


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vtw-kernels", description="Visual tokens withdrawal for vision-language models."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo", help="search a small real model's withdrawal layer, and show what it costs and saves"
    )
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="where the plot and the JSON go")
    demo.add_argument(
        "--model",
        choices=["digits", "smollm2"],
        default="digits",
        help="a LLaVA of 1.6 M parameters trained from scratch, or one around SmolLM2-135M-Instruct, which needs the "
        "extra 'demo' (default: %(default)s)",
    )
    info = commands.add_parser(
        "info",
        help="what was built, what runs here, and which backend each op uses on each device; or what withdraw would do "
        "to a model",
    )
    info.add_argument("--model", help="name or folder of a model of transformers, of which only the config is read")

    add_check(commands)
    add_search(commands)
    add_compare(commands)
    add_train_exit(commands)
    add_skip_attention(commands)
    report = commands.add_parser(
        "report", help="a page of HTML about what search, compare, train-exit or skip-attention found"
    )
    report.add_argument("result", type=Path, help="what one of these, or save, wrote: vtw.json, or skip-adapters")
    report.add_argument("--out", type=Path, help="the page (default: the result's name with .html)")
    add_bench(commands)

    options = parser.parse_args(arguments)
    try:
        command = shlex.join(["vtw-kernels", *(sys.argv[1:] if arguments is None else arguments)])
        if options.command in ("search", "compare", "train-exit"):
            from vtw_kernels.layer_search.jobs import CompareJob, ExitJob, SearchJob
            from vtw_kernels.layer_search.run import run as run_job

            job = {"search": SearchJob, "compare": CompareJob, "train-exit": ExitJob}[options.command](options)
            return run_job(options, command, job)
        if options.command == "skip-attention":
            return skip_attention(options, command)
        if options.command == "info" and options.model is not None:
            print_model_info(options.model)
        elif options.command == "info":
            from vtw_kernels.ops import backend_info

            print_info(backend_info())
        elif options.command == "check":
            require("check", "search")
            from vtw_kernels.check import run as run_check

            return run_check(options)
        elif options.command == "report":
            report_on(options.result, options.out or options.result.with_suffix(".html"))
        elif options.command == "bench":
            return bench(options)
        else:
            from vtw_kernels.demo.run import run

            run(options.output, options.model)
    except (ImportError, OSError, ValueError) as error:
        print(f"vtw-kernels: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resumed = options.command in ("search", "compare", "train-exit", "skip-attention")
        kept = "; what was done is kept, and the same command goes on from there" if resumed else ""
        print(f"vtw-kernels: interrupted{kept}", file=sys.stderr)
        return 130
    return 0


def add_check(commands: argparse._SubParsersAction) -> None:
    check = commands.add_parser(
        "check",
        help="whether the ops, and withdrawal in a model, compute what they should on this machine",
        description="Runs every op on every backend and device that is here against the reference in fp64, and "
        "withdrawal against the same model with hidden keys: in the demo's model, or in yours. Exit status 0: all is "
        "as it should be.",
    )
    check.add_argument("--model", help="name or folder of a model of transformers, with its processor; with --image")
    check.add_argument("--image", type=Path, help="file, shown to that model")
    check.add_argument("--prompt", default="What is in this image?", help="asked about it (default: %(default)s)")
    check.add_argument(
        "--layer", type=int, help="withdrawn before (default: that in the model's config, or half of them)"
    )
    add_loading(check)
    check.set_defaults(tp=False)


def add_loading(parser: argparse._ActionsContainer) -> None:
    """How a model is loaded."""
    parser.add_argument("--dtype", default="auto", help="such as bfloat16 (default: that of its files)")
    parser.add_argument("--attention", help="eager, sdpa, flex_attention or flash_attention_2 (default: the model's)")
    parser.add_argument("--device", help="such as cuda:1 (default: the rank's GPU, or the CPU)")
    parser.add_argument("--device-map", help='"auto" spreads the model over all devices; needs accelerate')
    parser.add_argument(
        "--prompt-template",
        type=lambda text: text.replace("\\n", "\n"),
        help="in place of the chat template, such as 'USER: <image>\\n{question} ASSISTANT:'",
    )


def add_search(commands: argparse._SubParsersAction) -> None:
    search = commands.add_parser(
        "search",
        help="search a model's withdrawal layer on your own data",
        description="Searches the first layer before which a model's visual tokens can be withdrawn. A search that was "
        "stopped goes on when the same command is run again. Under torchrun, or accelerate launch, ranks share the "
        "records.",
    )
    add_records(search, Path("vtw.json"))

    choice = search.add_argument_group("choice of the layer")
    choice.add_argument("--threshold", type=float, default=0.003, help="largest acceptable value (default: 0.003)")
    add_criterion(choice)
    choice.add_argument("--candidates", type=int, nargs="+", metavar="LAYER", help="layers to try (default: all)")
    add_model(search, "don't time a prefill at each layer")


def add_compare(commands: argparse._SubParsersAction) -> None:
    compare = commands.add_parser(
        "compare",
        help="compare policies, who leaves when, on your own data",
        description="Compares policies by how much they change the next tokens, and by what they save. A comparison "
        "that was stopped goes on when the same command is run again. Under torchrun, or accelerate launch, ranks "
        "share the records.",
    )
    compare.add_argument(
        "--policy",
        action="append",
        required=True,
        help="given several times: layer=16, top-attention:LAYER:KEEP or random:LAYER:KEEP[:SEED], where KEEP is a "
        "share with a point, as 0.5, or a number of rows; several of them with + between, which act together; or a "
        "file that withdraw takes, ending in .json or .safetensors",
    )
    add_records(compare, Path("comparison.json"))
    add_criterion(compare.add_argument_group("what is compared"))
    add_model(compare, "don't measure operations, memory and time under each policy")


def add_train_exit(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        "train-exit",
        help="train gates that say, prompt by prompt, before which layer the visual tokens leave",
        description="Trains the gates of dynamic exit (DyVTE) for a model, which stays as it is. What was found out "
        "about the records is kept with the gates: the same command with another threshold, width or number of epochs "
        "trains anew without the model. One that was stopped goes on when it is run again. Under torchrun, or "
        "accelerate launch, ranks share the records.",
    )
    add_records(train, Path("exit.safetensors"))
    gates = train.add_argument_group("gates")
    gates.add_argument(
        "--every", type=int, default=1, metavar="LAYERS", help="a gate before every so many (default: 1)"
    )
    gates.add_argument("--first", type=int, metavar="LAYER", help="with a gate (default: the first that is allowed)")
    gates.add_argument("--last", type=int, metavar="LAYER", help="with a gate (default: the last that is allowed)")
    gates.add_argument(
        "--threshold", type=float, default=0.5, help="a gate fires above this probability (default: 0.5)"
    )
    gates.add_argument(
        "--width", type=int, default=2048, help="of a gate, which has 2 (H + 1) times as many weights (default: 2048)"
    )
    training = train.add_argument_group("training")
    add_positions(training, "answer")
    training.add_argument("--epochs", type=int, default=30, help="(default: 30)")
    training.add_argument("--learning-rate", type=float, default=6e-5, help="of AdamW, at its highest (default: 6e-5)")
    training.add_argument("--warm-up", type=float, default=0.03, help="share of the steps (default: 0.03)")
    training.add_argument(
        "--held-out", type=float, default=0.2, help="share of the records that gates are measured on (default: 0.2)"
    )
    training.add_argument(
        "--training-seed", type=int, default=0, help="of weights, of what is held out, and of the order (default: 0)"
    )
    add_model(train)
    train.set_defaults(metric="kl", statistic="mean", costs=False)


def add_skip_attention(commands: argparse._SubParsersAction) -> None:
    skip = commands.add_parser(
        "skip-attention",
        help="search layers whose attention can be skipped, train adapters in its place, and see what they are worth",
        description="Skips the attention of some decoder layers (Efficient Attention Skipping).",
    )
    actions = skip.add_subparsers(dest="action", required=True)
    search = actions.add_parser(
        "search",
        help="layers whose attention matters least",
        description="Searches layers whose attention can be skipped: by what the next tokens say, one at a time and "
        "greedily, and by the bandit of the paper. A search that was stopped goes on when the same command is run "
        "again. Under torchrun, or accelerate launch, ranks share the records, and the first searches all together.",
    )
    add_records(search, Path("skip.json"))
    choice = search.add_argument_group("choice of the layers")
    choice.add_argument("--skip", type=int, default=12, help="how many (default: 12)")
    choice.add_argument("--candidates", type=int, nargs="+", metavar="LAYER", help="among which (default: all)")
    choice.add_argument("--no-greedy", dest="greedy", action="store_false", help="don't search greedily")
    add_criterion(choice)
    bandit = search.add_argument_group("bandit")
    bandit.add_argument(
        "--bandit", choices=["softmax", "sigmoid", "none"], default="softmax", help="its chances (default: softmax)"
    )
    bandit.add_argument("--steps", type=int, default=300, help="(default: 300)")
    bandit.add_argument("--warm-up", type=float, default=0.2, help="share of the steps (default: 0.2)")
    bandit.add_argument("--every", type=int, default=3, help="so many steps subsets are rated (default: 3)")
    bandit.add_argument("--subsets", type=int, default=5, help="that are rated together (default: 5)")
    bandit.add_argument("--learning-rate", type=float, default=2.0, help="of the scores (default: 2)")
    bandit.add_argument("--bandit-seed", type=int, default=0, help="of its draws (default: 0)")
    add_model(search)
    search.set_defaults(costs=False)

    train = actions.add_parser(
        "train",
        help="train adapters that take the place of attention",
        description="Trains adapters for layers whose attention is skipped, in one process; the model stays as it is. "
        "One that was stopped goes on when it is run again.",
    )
    add_records(train, Path("skip-adapters"))
    chosen = train.add_argument_group("layers")
    chosen.add_argument("--layers", help="whose attention is skipped, as 3,5,8")
    chosen.add_argument("--search", type=Path, help="or what skip-attention search has found")
    training = train.add_argument_group("training")
    add_positions(training, "answer")
    training.add_argument("--dim", type=int, default=8, help="of adapters in front of attention (default: 8)")
    training.add_argument("--skipped-dim", type=int, help="of those in its place (default: 4 times as many)")
    training.add_argument("--dropout", type=float, default=0.1, help="(default: 0.1)")
    training.add_argument("--epochs", type=int, default=3, help="(default: 3)")
    training.add_argument("--accumulate", type=int, default=8, help="records a step (default: 8)")
    training.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW, at its highest (default: 1e-3)")
    training.add_argument("--warm-up", type=float, default=0.03, help="share of the steps (default: 0.03)")
    training.add_argument("--held-out", type=float, default=0.2, help="share of the records (default: 0.2)")
    training.add_argument(
        "--training-seed", type=int, default=0, help="of weights, of what is held out, and of the order (default: 0)"
    )
    add_model(train)

    evaluate = actions.add_parser(
        "evaluate",
        help="compare skipped layers, with adapters and without, and policies of withdrawal",
        description="Compares as vtw-kernels compare does, of which this is a short form, and goes on like it.",
    )
    add_records(evaluate, Path("skip-comparison.json"))
    evaluate.add_argument(
        "--layers", action="append", default=[], help="whose attention is skipped, as 3,5,8; given several times"
    )
    evaluate.add_argument("--adapters", action="append", default=[], metavar="FOLDER", help="given several times")
    evaluate.add_argument("--search", type=Path, help="all choices that skip-attention search has found")
    evaluate.add_argument(
        "--policy", action="append", default=[], help="to compare with, as compare takes it; given several times"
    )
    add_criterion(evaluate.add_argument_group("what is compared"))
    add_model(evaluate, "don't measure operations, memory and time under each of them")


def skip_attention(options: argparse.Namespace, command: str) -> int:
    from vtw_kernels.layer_search.jobs import CompareJob, SkipJob
    from vtw_kernels.layer_search.run import run as run_job

    if options.action == "search":
        return run_job(options, command, SkipJob(options))
    if options.action == "train":
        from vtw_kernels.layer_search.skip_command import run_training

        return run_training(options, command)
    from vtw_kernels.layer_search.skip_search import SkipSearch

    found = SkipSearch.load(options.search).choices.values() if options.search else ()
    layers = dict.fromkeys([*options.layers, *(",".join(map(str, x)) for x in found)])
    options.policy = [f"skip:{x}" for x in (*layers, *options.adapters)] + options.policy
    if not options.policy:
        raise ValueError("layers: expected --layers, --adapters or --search, got none of them")
    return run_job(options, command, CompareJob(options))


def add_records(parser: argparse.ArgumentParser, out: Path) -> None:
    """The model, the records, and where results go: by default to ``out``."""
    parser.add_argument("--model", required=True, help="name or folder of a model of transformers, with its processor")
    parser.add_argument(
        "--data",
        required=True,
        help="JSON file, one object a line or an array of them: question; image or images, or video, or frames of a "
        "video as a list; answer, if you like; group, or task, by which tables and plots are split. In place of "
        "question and answer, messages as OpenAI has them or conversations as LLaVA has them. Or the id of a data "
        "set with such columns, which needs the package datasets",
    )
    parser.add_argument("--images", type=Path, help="folder that images and videos are in (default: that of the data)")
    parser.add_argument("--subset", help="of a data set")
    parser.add_argument("--split", default="train", help="of a data set (default: train)")
    parser.add_argument("--limit", type=int, help="only so many records, the first")
    parser.add_argument("--seed", type=int, help="draw the records of --limit at random, with this seed")
    parser.add_argument("--skip-bad", action="store_true", help="skip records that can't be used, and list them")
    parser.add_argument(
        "--out",
        type=Path,
        default=out,
        help=f"the result (default: {out}); an earlier one of the same kind is taken up, and no other file overwritten",
    )
    parser.add_argument("--report", type=Path, help="a page of HTML about the result, and its figures beside it")
    parser.add_argument(
        "--restart", action="store_true", help="discard what earlier runs have done, and an earlier result"
    )
    parser.add_argument("--quiet", action="store_true", help="print no table and no progress")


def add_criterion(parser: argparse._ActionsContainer) -> None:
    """What is looked at, of which tokens."""
    parser.add_argument("--metric", default="kl", help="kl (default), reverse_kl or disagreement")
    parser.add_argument("--statistic", default="mean", help="mean (default), worst_decile or max, over records")
    add_positions(parser, "last")


def add_positions(parser: argparse._ActionsContainer, default: str) -> None:
    parser.add_argument(
        "--positions",
        type=lambda text: int(text) if text.isdecimal() else text,
        default=default,
        help="last: the next token; a number: so many tokens of the model's own answer; answer: the tokens of the "
        f"record's (default: {default})",
    )


def add_model(parser: argparse.ArgumentParser, no_costs: str = "") -> None:
    """How the model is loaded; and what is said of the option that it is not measured, if that is one."""
    model = parser.add_argument_group("model")
    add_loading(model)
    model.add_argument("--tp", action="store_true", help="under torchrun: one tensor-parallel model over all ranks")
    if no_costs:
        model.add_argument("--no-costs", dest="costs", action="store_false", help=no_costs)


def add_bench(commands) -> None:
    from vtw_kernels.bench import DTYPES, MODELS, OPS

    parser = commands.add_parser(
        "bench",
        help="measures the ops and withdrawal on this machine, or compares two such runs",
        description="Measures this machine's memory bandwidth and matrix product, then every op against what one would "
        "otherwise write: median and spread, GB/s, percent of what the machine allows, launches, memory. "
        "Prints Markdown. Needs pip install 'vtw_kernels[bench]'.",
    )
    several = {"action": "append", "default": []}
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--op", choices=OPS, help="may be given several times; all by default", **several)
    parser.add_argument(
        "--model-shape", choices=list(MODELS), help="may be given several times; some of each by default", **several
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="may be given several times; the usual ones by default", **several
    )
    parser.add_argument(
        "--json", type=Path, metavar="RUN.json", help="saves the run; RUN.md, RUN-roofline.png and RUN-ratio.png too"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A.json", "B.json"),
        help="measures nothing, and says which medians of two saved runs differ by more than their spread, which is "
        "the two interquartile ranges combined, sqrt(IQR_a² + IQR_b²); cases in only one of them are named",
    )
    parser.add_argument(
        "--fail-if-slower",
        type=float,
        nargs="?",
        const=0.0,
        metavar="PERCENT",
        help="with --compare: exit with 3 if a median of vtw_kernels in B is larger by more than the spread, and by "
        "more than so many percent (default: 0)",
    )
    parser.add_argument(
        "pytest_arguments",
        nargs="*",
        metavar="-- ARGUMENT",
        help="goes to pytest: -- -k half --benchmark-max-time 0.1",
    )


def bench(options: argparse.Namespace) -> int:
    from vtw_kernels import bench

    if options.compare:
        print(bench.compare(*options.compare), end="")
        if options.fail_if_slower is None:
            return 0
        slower = bench.slower(*options.compare, options.fail_if_slower)
        for case in slower:
            print(f"slower: {case}", file=sys.stderr)
        return 3 if slower else 0
    if options.fail_if_slower is not None:
        raise ValueError("--fail-if-slower: expected --compare with it, got none")
    chosen = options.op, options.model_shape, options.dtype
    return bench.run_benchmarks(options.device, *chosen, options.json, options.pytest_arguments)


def print_model_info(name: str) -> None:
    """Raises OSError for a config that is not there, ValueError for a model that ``withdraw`` refuses."""
    require("info --model", "transformers")
    from transformers import AutoConfig

    from vtw_kernels.integration.families import describe

    rows = dict(describe(name))
    stored = (getattr(AutoConfig.from_pretrained(name), "vtw", None) or {}).get("layer")
    rows["layer in its config"] = "none: pass one" if stored is None else f"{stored}, taken where none is passed"
    print_table([f"withdraw in {name}", ""], rows.items())


def report_on(result: Path, page: Path) -> None:
    """Raises OSError or ValueError for a result that is none, or a page that would take the place of something else."""
    from vtw_kernels.layer_search.comparison import Comparison
    from vtw_kernels.layer_search.exit_training import ExitTraining
    from vtw_kernels.layer_search.report import check_page
    from vtw_kernels.layer_search.result import LayerSearch
    from vtw_kernels.layer_search.skip_search import SkipSearch
    from vtw_kernels.layer_search.skip_training import SkipTraining

    if result.is_dir():
        kind = SkipTraining
    elif result.suffix == ".safetensors":
        kind = ExitTraining
    else:
        kind = Comparison if Comparison.wrote(result) else SkipSearch if SkipSearch.wrote(result) else LayerSearch
    found = kind.load(result)
    check_page("out", page)
    found.report(page)
    print(f"{found.verdict()}\nwritten: {page}")


def print_info(info: dict) -> None:
    import torch

    build = {
        name: ", ".join(value) if isinstance(value, list) else str(value or "") for name, value in info["build"].items()
    }
    build["VTW_KERNELS_BACKEND"] = info["forced"] or "not set"
    print_table(["build", ""], [(name, value or "none") for name, value in build.items()])

    running = {"vtw_kernels": __version__, "torch": torch.__version__}
    for package in ("triton", "transformers"):
        try:
            running[package] = version(package)
        except PackageNotFoundError:
            running[package] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    running["GPU"] = ", ".join(gpus) or "none that torch finds"
    print_table(["runs here", ""], running.items())
    print_table(["backend", ""], info["backends"].items())

    devices = list(next(iter(info["ops"].values())))
    ops = [(name, *(of[device] or "raises" for device in devices)) for name, of in info["ops"].items()]
    print_table(["op", *(f"on {device}" for device in devices)], ops)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """In plain text: whoever installed the ops alone has nothing that draws tables."""
    rows = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for i, row in enumerate(rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        if i == 0:
            print("  ".join("─" * width for width in widths).rstrip())
    print()


if __name__ == "__main__":
    sys.exit(main())
