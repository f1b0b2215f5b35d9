"""The engine's own process: `python -m quantlab.server.engine_process FD`, FD one end of a socket pair.

Knows nothing about what is asked of the engine: that is the loop's.
"""

import sys

from quantlab.log import configure
from quantlab.runtime.build import build_engine
from quantlab.server.engine_loop import serve

if __name__ == "__main__":
    configure(debug=False)
    sys.exit(serve(int(sys.argv[1]), build_engine))
