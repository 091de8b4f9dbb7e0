"""`python -m coeld.engine`: started by the agent, never by hand."""

import os
import signal
import socket
import sys

from coeld.engine.link import Link
from coeld.engine.process import Engine
from coeld.engine.protocol import EngineOptions
from coeld.engine.sessions import sweep_files


def main() -> int:
    fd, options = EngineOptions.parse()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent, which says quit
    sys.setswitchinterval(0.0005)  # a peer's thread must not wait 5 ms for the decoder's Python
    link = Link(socket.socket(fileno=fd))
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
    sweep_files(own=True)
    sys.stderr.flush()
    os._exit(0)  # threads may be inside ONNX Runtime, which must not be taken apart around them


if __name__ == "__main__":
    sys.exit(main())
