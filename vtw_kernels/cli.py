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
    commands.add_parser("info", help="what was built, and which backend each op uses on each device")

    options = parser.parse_args(arguments)
    try:
        if options.command == "info":
            from vtw_kernels.ops import backend_info

            print_info(backend_info())
        else:
            from vtw_kernels.demo.run import run

            run(options.output)
    except ImportError as error:
        print(f"vtw-kernels: {error}", file=sys.stderr)
        return 1
    return 0


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
