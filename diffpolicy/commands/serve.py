"""A policy behind a socket.

usage: diffpolicy serve checkpoint=RUN [key=value] ...

Serves a policy over a WebSocket until Ctrl-C or SIGTERM: clients send observations and get actions.
The server keeps the memory of every client's episode; requests that wait at the same time are
answered by one call of the policy. Prints one line with the address when clients can connect.

    host=127.0.0.1       address to listen on; any but loopback needs token_file
    port=5555            TCP port; 0 takes a free one, which is printed
    token_file=FILE      file with a shared secret, one line of at least 8 characters
    max_clients=16       most clients at a time; further ones are refused
    max_batch=64         most clients in one call of the policy
    batch_window_ms=1    how long a request waits for others; 0 never waits
    idle_timeout_s=600   hang up on a client that asked nothing for so many seconds; null waits
    reclaim_after_s=30   when all places are taken, a new client gets that of one that asked nothing
                         for so many seconds; null refuses it
    deterministic=false  fixed noise: the same observations give the same actions
    solver= num_steps=   replace the checkpoint's sampler
    n_action_steps=      replace the actions executed per plan
    device=auto          cpu, cuda or auto
    threads=             CPU threads of the network

The connection is not encrypted; between machines prefer a tunnel to loopback (ssh -L). The messages
(msgpack) are documented in diffpolicy/runtime/wire_format.py, for clients in other languages. Both
ends need `pip install "diffpolicy[serve]"`. In Python:

    from diffpolicy.runtime.client import PolicyClient

    with PolicyClient(port=5555) as client:
        client.reset(seed=0)
        action = client.act(observation)

For example:

    diffpolicy serve checkpoint=runs/demo
    diffpolicy serve checkpoint=runs/demo port=0 num_steps=4 threads=1
    diffpolicy serve checkpoint=runs/demo host=0.0.0.0 token_file=token.txt
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.commands.options import given, parse
from diffpolicy.commands.preflight import pick_device
from diffpolicy.settings import ConfigError, from_values

if TYPE_CHECKING:
    from diffpolicy.runtime.serve import PolicyServer

_SETTINGS = {
    "host": "127.0.0.1",
    "port": 5555,
    "max_clients": 16,
    "max_batch": 64,
    "batch_window_ms": 1.0,
    "idle_timeout_s": 600,
    "reclaim_after_s": 30,
    "deterministic": False,
}
DEFAULTS: dict[str, Any] = {
    **_SETTINGS,
    "token_file": None,
    "solver": None,
    "num_steps": None,
    "n_action_steps": None,
    "device": "auto",
    "threads": None,
}


def help_text() -> str:
    """The text of `diffpolicy serve --help`: this module's own."""
    return str(__doc__)


def run(arguments: Sequence[str]) -> int:
    """Load the policy and serve it until told to stop."""
    options = parse(arguments, ["checkpoint"], DEFAULTS)

    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.runtime.serve import ServeConfig, serve

    # Before the policy is loaded: a wrong address should be refused at once.
    settings = {name: options[name] for name in _SETTINGS}
    settings |= {"token": _token(options["token_file"]), "host": str(options["host"])}
    config = from_values(ServeConfig, settings)
    policy = DiffusionPolicy.from_pretrained(
        options["checkpoint"],
        device=pick_device(options["device"], options["threads"]),
        sampler=given(options, "solver", "num_steps"),
        **given(options, "n_action_steps"),
    )
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)

    def ready(server: PolicyServer) -> None:
        host = f"[{server.host}]" if ":" in server.host else server.host
        print(f"serving {options['checkpoint']} on {host}:{server.port}", flush=True)

    serve(policy, config, ready=ready)
    print("stopped", flush=True)
    return 0


def _token(file: Any) -> str | None:
    if file is None:
        return None
    token = Path(str(file)).read_text(encoding="utf-8").strip()
    if len(token.splitlines()) != 1:
        raise ConfigError(f"token_file={file} must hold one line with the token")
    return token
