"""`coeld up --config FILE`, with the fake engine: python -m tests.fakes.run_agent FILE."""

import sys
from pathlib import Path

from coeld.agent import up
from coeld.config import load
from coeld.errors import CoeldError

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")


def main() -> int:
    try:
        up(load(Path(sys.argv[1])), (sys.executable, str(FAKE_ENGINE)))
    except CoeldError as exc:
        print(f"coeld: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
