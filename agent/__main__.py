"""`python3 -I -S <directory>/agent`: the program in the guest, possibly as process 1.

Only the way to the modules is here, so that little is compiled at each start; `agent.main` has the rest.
"""

from __future__ import annotations

import sys

if not __package__:  # run as a directory or file: what is beside it is not a package yet
    directory = __file__.rpartition("/")[0] or "."
    sys.path[:] = [f"{directory}/..", *(path for path in sys.path if path != directory)]

from agent import lighttyping

lighttyping.install()

from agent.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
