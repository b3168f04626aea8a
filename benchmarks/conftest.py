"""Set-up of every benchmark: what our commands set, before torch is loaded.

`recis` lets OpenMP's idle workers sleep (recis/cli.py says why). Peers run in the same process and so under the same
setting; on a quiet machine FBGEMM's and torch's figures do not depend on it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
