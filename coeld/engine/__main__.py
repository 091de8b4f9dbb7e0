"""`python -m coeld.engine`: started by the agent, never by hand."""

import argparse
import signal
import socket
import sys
from pathlib import Path

from coeld.engine.link import Link
from coeld.engine.process import Engine, Options
from coeld.ids import NodeId


def main() -> int:
    parser = argparse.ArgumentParser(prog="coeld.engine", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="the shared socket")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--swarm", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, dest="context_tokens")
    parser.add_argument("--requests-max", type=int, required=True)
    parser.add_argument("--call-deadline-ms", type=int, required=True)
    parser.add_argument("--patience-s", type=float, required=True)
    arguments = vars(parser.parse_args())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent, which says quit
    sys.setswitchinterval(0.0005)  # a peer's thread must not wait 5 ms for the decoder's Python
    link = Link(socket.socket(fileno=arguments.pop("fd")))
    arguments["node"] = NodeId(arguments["node"])
    options = Options(**arguments)
    try:
        engine = Engine(options, link)
    except OSError as exc:
        link.say(
            "failed",
            model="",
            type="StartError",
            message=f"The data port {options.host}:{options.port} cannot be opened "
            f"({exc.strerror or exc}). Choose another network.data_port, or 0 for any free one.",
        )
        return 1
    engine.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
