"""coeld: the small computers you own, as one machine that runs a language model.

Nothing here reports to anybody. ONNX Runtime's wheels do by default since 1.29 (an identifier on
disk, events about the process and its models, uploads); it looks for this variable once, when it is
first loaded, so it is set before any other module of coeld can do that.
"""

import os

__version__ = "0.1.0"

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
