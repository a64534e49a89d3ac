"""The `hybridgen` command. Parses arguments and calls; each command's code is imported when it runs."""

import argparse
import sys
from collections.abc import Callable, Sequence

import hybridgen
from hybridgen.configs.settings import SettingsError, add_arguments, parse_settings

DEFAULT_URL = "http://127.0.0.1:8000"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status. Wrong usage exits with status 2."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hybridgen",
        description="Serve long-context language models over the OpenAI HTTP API.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hybridgen {hybridgen.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        usage="hybridgen serve [MODEL] [OPTION ...]",
        description="Serve MODEL over HTTP; without one, the small model that comes with HybridGen.",
        epilog="Each option is also HYBRIDGEN_<NAME> in the environment and a key of the file of --config.",
        allow_abbrev=False,
    )
    add_arguments(serve)
    serve.set_defaults(run=_serve)

    chat = commands.add_parser("chat", help="talk to a server from the terminal", allow_abbrev=False)
    chat.description = (
        "Talk to a server. With text on standard input, answer it once and end: echo hi | hybridgen chat"
    )
    chat.add_argument("--url", default=DEFAULT_URL, help="the server's address (default: %(default)s)")
    chat.add_argument("--model", help="name of the model (default: the server's first)")
    chat.add_argument("--system", help="system message to begin with")
    chat.add_argument(
        "--api-key", metavar="KEY", help="key to send (default: the first in HYBRIDGEN_API_KEY)"
    )
    chat.add_argument("--max-tokens", type=_positive, metavar="N", help="longest answer, in tokens")
    chat.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    chat.set_defaults(run=_chat)

    topology = commands.add_parser(
        "topology", help="show this machine's memory nodes, measured", allow_abbrev=False
    )
    topology.description = (
        "Show the memory nodes that KV may lie on: what the kernel says, and what was measured."
    )
    topology.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    topology.add_argument("--refresh", action="store_true", help="measure again, whatever was kept")
    topology.add_argument("--no-measure", action="store_true", help="only what the kernel says")
    topology.add_argument(
        "--memory-tiers",
        nargs="+",
        metavar="NODE=TIER",
        help="what nodes are: dram, cxl or none (default: as detected, or HYBRIDGEN_MEMORY_TIERS)",
    )
    topology.set_defaults(run=_topology)

    pages = commands.add_parser("map", help="where a server's KV pages lie, and why", allow_abbrev=False)
    pages.description = "Show what a running server's memory nodes hold, and what a step reads of each."
    pages.add_argument("--url", default=DEFAULT_URL, help="the server's address (default: %(default)s)")
    pages.add_argument(
        "--explain", type=int, metavar="PAGE", help="a host page, counted from 0: where it lies, and why"
    )
    pages.add_argument(
        "--api-key", metavar="KEY", help="key to send (default: the first in HYBRIDGEN_API_KEY)"
    )
    pages.set_defaults(run=_map)

    bench = commands.add_parser("bench", help="measure a server", allow_abbrev=False)
    kinds = bench.add_subparsers(metavar="KIND", required=True)
    load = kinds.add_parser(
        "serve", help="send a server random prompts and time its answers", allow_abbrev=False
    )
    load.add_argument(
        "--base-url", default=DEFAULT_URL, metavar="URL", help="the server (default: %(default)s)"
    )
    load.add_argument("--model", help="name of the model (default: the server's first)")
    load.add_argument(
        "--api-key", metavar="KEY", help="key to send (default: the first in HYBRIDGEN_API_KEY)"
    )
    load.add_argument(
        "--num-prompts", type=_positive, default=100, metavar="N", help="requests (default: %(default)s)"
    )
    load.add_argument(
        "--request-rate",
        type=_positive_float,
        default=float("inf"),
        metavar="R",
        help="requests that arrive per second, at random moments (a Poisson process); inf is all at once "
        "(default: inf)",
    )
    load.add_argument(
        "--max-concurrency", type=_positive, metavar="N", help="most requests at a time (default: no limit)"
    )
    load.add_argument(
        "--random-input-len",
        type=_positive,
        default=1024,
        metavar="N",
        help="tokens in a prompt (default: %(default)s)",
    )
    load.add_argument(
        "--random-output-len",
        type=_positive,
        default=128,
        metavar="N",
        help="tokens to ask for (default: %(default)s)",
    )
    load.add_argument(
        "--random-range-ratio",
        type=_ratio,
        default=0.0,
        metavar="R",
        help="lengths vary evenly by this part of themselves, up and down; 0 to 1 (default: %(default)s)",
    )
    load.add_argument(
        "--random-vocab-size",
        type=_vocabulary,
        default=1000,
        metavar="N",
        help="prompts hold token ids from 16 up to N (default: %(default)s)",
    )
    load.add_argument(
        "--num-warmups",
        type=int,
        default=1,
        metavar="N",
        help="requests sent first and not counted (default: %(default)s)",
    )
    load.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of prompts, lengths and arrivals (default: %(default)s)",
    )
    load.add_argument(
        "--ignore-eos", action="store_true", help="generate all tokens asked for, past end-of-text"
    )
    load.add_argument("--temperature", type=float, default=0.0, metavar="T", help="(default: %(default)s)")
    load.add_argument(
        "--save-result", metavar="FILE", help="write figures, settings and every measurement as JSON"
    )
    load.set_defaults(run=_bench_serve)
    _add_plan(commands)
    return parser


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    plan = commands.add_parser(
        "plan",
        help="predict what a machine does with a model and a load",
        description="Simulate how MODEL would be served: step time, tokens a second, where KV lies, how many "
        "sequences fit, and what limits it; by every policy, and by other systems' ways for comparison.",
        allow_abbrev=False,
    )
    plan.add_argument(
        "model",
        nargs="?",
        default="llama-3.1-8b",
        metavar="MODEL",
        help="preset, folder, or Hugging Face id, of which config.json alone is read (default: %(default)s)",
    )
    plan.add_argument(
        "--machine",
        default="this",
        metavar="NAME",
        help="a description that comes with HybridGen, the path of one (TOML), or `this`, which is measured "
        "(default: %(default)s)",
    )
    plan.add_argument(
        "--cxl", type=int, default=0, metavar="N", help="CXL expanders to add (default: %(default)s)"
    )
    plan.add_argument(
        "--context",
        default="32K",
        metavar="LENGTHS",
        help="of prompts, in tokens: 32K; or several, of which each request draws one: 3*8K,128K "
        "(default: %(default)s)",
    )
    plan.add_argument(
        "--output-len",
        type=_positive,
        default=256,
        metavar="N",
        help="tokens to generate, with --rate (default: %(default)s)",
    )
    load = plan.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency",
        type=_positive,
        default=8,
        metavar="N",
        help="requests at a time (default: %(default)s)",
    )
    load.add_argument(
        "--rate", type=_positive_float, metavar="R", help="requests that arrive per second, at random moments"
    )
    plan.add_argument(
        "--policy",
        default="all",
        metavar="NAMES",
        help="all, ours, or names with commas between them (default: %(default)s)",
    )
    plan.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of lengths and arrivals (default: %(default)s)"
    )
    plan.add_argument("--json", action="store_true", help="print everything as JSON")
    plan.add_argument(
        "--sweep",
        action="store_true",
        help="for contexts of 8K to 128K, or those of --context if several, and 0, 1, 4 and 8 expanders",
    )
    plan.add_argument("--plot", metavar="FILE", help="with --sweep: draw it as PNG")
    plan.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from hybridgen.engine.planning import PlanRequest
    from hybridgen.server.plan import parse_contexts, parse_policies, plan

    if arguments.plot and not arguments.sweep:
        return _refuse("plan", ValueError("--plot draws a sweep: add --sweep"), 2)
    try:
        contexts, systems = parse_contexts(arguments.context), parse_policies(arguments.policy)
    except ValueError as error:
        return _refuse("plan", error, 2)
    request = PlanRequest(
        model=arguments.model,
        machine=arguments.machine,
        contexts=contexts,
        num_cxl=arguments.cxl,
        concurrency=None if arguments.rate else arguments.concurrency,
        rate=arguments.rate,
        output_tokens=arguments.output_len,
        systems=systems,
        seed=arguments.seed,
    )
    plot = Path(arguments.plot) if arguments.plot else None
    return plan(request, as_json=arguments.json, with_sweep=arguments.sweep, plot=plot)


def _serve(arguments: argparse.Namespace) -> int:
    try:
        settings = parse_settings(arguments)
    except SettingsError as error:
        return _refuse("serve", error, 2)

    from hybridgen.server.serve import CannotServe, serve

    try:
        return serve(settings)
    except SettingsError as error:
        return _refuse("serve", error, 2)
    except CannotServe as error:
        return _refuse("serve", error, 1)


def _chat(arguments: argparse.Namespace) -> int:
    from hybridgen.server.chat import chat

    return chat(
        url=arguments.url,
        model=arguments.model,
        system=arguments.system,
        api_key=arguments.api_key,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
    )


def _bench_serve(arguments: argparse.Namespace) -> int:
    from hybridgen.server.bench_serve import Load, bench_serve

    load = Load(
        base_url=arguments.base_url,
        model=arguments.model,
        num_prompts=arguments.num_prompts,
        request_rate=arguments.request_rate,
        max_concurrency=arguments.max_concurrency,
        input_len=arguments.random_input_len,
        output_len=arguments.random_output_len,
        range_ratio=arguments.random_range_ratio,
        vocab_size=arguments.random_vocab_size,
        num_warmups=arguments.num_warmups,
        seed=arguments.seed,
        ignore_eos=arguments.ignore_eos,
        temperature=arguments.temperature,
    )
    return bench_serve(load, api_key=arguments.api_key, save_result=arguments.save_result)


def _map(arguments: argparse.Namespace) -> int:
    from hybridgen.server.placement import placement

    return placement(url=arguments.url, page=arguments.explain, api_key=arguments.api_key)


def _topology(arguments: argparse.Namespace) -> int:
    from hybridgen.server.topology import topology

    return topology(
        as_json=arguments.json,
        refresh=arguments.refresh,
        measured=not arguments.no_measure,
        tiers=arguments.memory_tiers,
    )


def _refuse(command: str, error: Exception, status: int) -> int:
    for line in str(error).splitlines() or [type(error).__name__]:
        print(f"hybridgen {command}: error: {line}", file=sys.stderr)
    return status


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _positive_float(text: str) -> float:
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return number


def _ratio(text: str) -> float:
    if not 0 <= (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be from 0 up to but not 1, got {text}")
    return number


def _vocabulary(text: str) -> int:
    if (number := int(text)) <= 16:
        raise argparse.ArgumentTypeError(f"must be more than 16, got {text}")
    return number
