"""`pretrain serve`: a checkpoint behind OpenAI's protocol."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pretrain.core.bounds import Count, Ge, Le, Positive
from pretrain.core.errors import PretrainError, warn
from pretrain.core.folders import newest_checkpoint
from pretrain.core.foreign.code import TRUST, consenting_to
from pretrain.core.quick.imports import uncollected
from pretrain.core.quick.quantities import short

if TYPE_CHECKING:
    from pretrain.inference.serving.front import Front, Settings

Port = Annotated[int, Ge(0), Le(65535)]
KEY = "PRETRAIN_API_KEY"
CONTEXT = 2048  # tokens of each answer's cache, where --cache-tokens does not say
UNKNOWN = 4096  # positions of a model that has no limit
BACKLOG = 1024  # connections that the system holds until they are taken
CONNECTIONS = 2048  # at once


def serve(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a stage that wrote one, or a run.")],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is on all networks.")] = "127.0.0.1",
    port: Annotated[Port, typer.Option(help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in requests; its folder's by default.")] = None,
    api_key: Annotated[
        str, typer.Option(envvar=KEY, help="What requests must bring; better by the variable, which no list shows.")
    ] = "",
    rows: Annotated[Count, typer.Option(help="Answers that are written at once.")] = 16,
    cache_tokens: Annotated[
        Count | None,
        typer.Option(help=f"Tokens of all their prompts and answers together; {CONTEXT:,} for each by default."),
    ] = None,
    queue: Annotated[Count, typer.Option(help="Answers that wait; beyond it HTTP 429.")] = 128,
    max_tokens: Annotated[Count, typer.Option(help="Tokens of an answer at most.")] = 1024,
    max_body: Annotated[Count, typer.Option(help="Bytes of a request at most.")] = 1 << 20,
    pooling: Annotated[Literal["mean", "cls", "last"], typer.Option(help="Of embeddings.")] = "mean",
    grace: Annotated[Positive, typer.Option(help="Seconds that running answers have to end after a signal.")] = 30.0,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)] = False,
) -> None:
    """Serve a checkpoint by OpenAI's protocol: chat, completions, embeddings, and a page to try it on.

    Many requests are answered at once. Needs the extra `serve`.
    """
    import starlette  # noqa: F401 - what is missing is said before the model is read
    import uvicorn

    place = newest_checkpoint(checkpoint)
    listening = _listen(host, port)
    if not api_key and not _local(host):
        warn(f"--host {host} without --api-key: whoever reaches this machine may ask the model")
    with listening:
        with uncollected(), consenting_to(place, trust_remote_code):
            from pretrain.inference.serving.app import application
            from pretrain.inference.serving.front import Settings

            settings = Settings(name or _name(checkpoint), max_tokens, api_key, max_body, pooling)
            front = _opened(place, settings, rows, cache_tokens, queue)
        config = uvicorn.Config(
            application(front), log_level="warning", access_log=False, server_header=False, backlog=BACKLOG,
            limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=max(1, round(grace)), lifespan="on",
        )  # fmt: skip
        _say(front, listening)
        with suppress(KeyboardInterrupt, SystemExit):  # uvicorn sends the signal on, once all is done
            uvicorn.Server(config).run(sockets=[listening])
    typer.echo("stopped", err=True)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything large is imported."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(kind, socket.SOCK_STREAM)
        with suppress(AttributeError, OSError):  # so that the port is free again at once
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        raise PretrainError(
            f"--host {host} --port {port}: {error.strerror or error}; accepted: an address of this machine, and a port "
            "that is free (0: any)"
        ) from error
    return listening


def _local(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _name(checkpoint: Path) -> str:
    """The name of a folder that has one of its own."""
    path = checkpoint.resolve()
    return path.parent.name if path.name == "checkpoint" else path.name


def _opened(place: Path, settings: Settings, rows: int, cache_tokens: int | None, queue: int) -> Front:
    """The model, and what answers with it."""
    from pretrain.core.models.families import positions_of
    from pretrain.inference.serving.engine import Engine, Limits
    from pretrain.inference.serving.front import Front
    from pretrain.stages.evaluate import load_text

    model, tokenizer = load_text(place)
    positions = positions_of(model) or UNKNOWN
    tokens = cache_tokens or rows * min(positions, CONTEXT)
    limits = Limits(rows, tokens, queue, min(positions, tokens))
    return Front(model, tokenizer, Engine(model, tokenizer, limits), settings)


def _say(front: Front, listening: socket.socket) -> None:
    """Where the model is served, and how much at once."""
    host, port, *_ = listening.getsockname()
    address, limits, engine = f"[{host}]:{port}" if ":" in host else f"{host}:{port}", front.engine.limits, front.engine
    if not front.writes:
        way = "embeddings alone"
    elif engine.packed is None:
        way = f"one answer after another ({engine.why_not})"
    else:
        size = short(engine.packed.token_bytes * limits.cache_tokens, "B")
        way = f"{limits.rows} answers at once, {limits.cache_tokens:,} tokens in their caches ({size} at most)"
    typer.echo(f"serving {front.settings.name} at http://{address}/v1 (a page: http://{address}/): {way}", err=True)
