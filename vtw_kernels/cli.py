"""The ``vtw-kernels`` command."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vtw-kernels", description="Visual tokens withdrawal for vision-language models."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo", help="search a small real model's withdrawal layer, and show what it costs and saves"
    )
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="where the plot and the JSON go")
    demo.add_argument(
        "--model",
        choices=["digits", "smollm2"],
        default="digits",
        help="a LLaVA of 1.6 M parameters trained from scratch, or one around SmolLM2-135M-Instruct, which needs the extra "
        "'demo' (default: %(default)s)",
    )
    info = commands.add_parser(
        "info",
        help="what was built, and which backend each op uses on each device; or what withdraw would do to a model",
    )
    info.add_argument("--model", help="name or folder of a model of transformers, of which only the config is read")

    options = parser.parse_args(arguments)
    try:
        if options.command == "info" and options.model is not None:
            print_model_info(options.model)
        elif options.command == "info":
            from vtw_kernels.ops import backend_info

            print_info(backend_info())
        else:
            from vtw_kernels.demo.run import run

            run(options.output, options.model)
    except (ImportError, OSError, ValueError) as error:
        print(f"vtw-kernels: {error}", file=sys.stderr)
        return 1
    return 0


def print_model_info(name: str) -> None:
    """Raises OSError for a config that is not there, ValueError for a model that ``withdraw`` refuses."""
    from rich.console import Console
    from rich.table import Table

    from vtw_kernels.integration.families import describe

    table = Table("withdraw", "", title=name)
    for key, value in describe(name).items():
        table.add_row(key, value)
    Console().print(table)


def print_info(info: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    build = Table("build", "", title="vtw_kernels")
    for name, value in info["build"].items():
        shown = ", ".join(value) if isinstance(value, list) else value
        build.add_row(name, str(shown or "none"))
    build.add_row("VTW_KERNELS_BACKEND", info["forced"] or "not set")
    console.print(build)

    backends = Table("backend", "")
    for name, state in info["backends"].items():
        backends.add_row(name, state)
    console.print(backends)

    devices = list(next(iter(info["ops"].values())))
    ops = Table("op", *(f"on {device}" for device in devices))
    for name, backend_of in info["ops"].items():
        ops.add_row(name, *(backend_of[device] or "raises" for device in devices))
    console.print(ops)


if __name__ == "__main__":
    sys.exit(main())
