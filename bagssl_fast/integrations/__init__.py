"""Our ops in other people's training code: see docs/swap-in.md.

Each `apply_to_*` replaces pieces of one codebase by ours, with the same arguments, shapes, values
and gradients, logs what it replaced, and returns a `Handle` that restores everything. Nothing
happens at import. The same pieces are classes and functions by name in `integrations.lightly`,
`.solo_learn`, `.vicreg` and `.emp_ssl`.
"""

from bagssl_fast.integrations._patching import Handle
from bagssl_fast.integrations.emp_ssl import apply_to_emp_ssl
from bagssl_fast.integrations.lightly import apply_to_lightly
from bagssl_fast.integrations.solo_learn import apply_to_solo_learn
from bagssl_fast.integrations.vicreg import apply_to_vicreg

__all__ = [
    "Handle",
    "apply_to_emp_ssl",
    "apply_to_lightly",
    "apply_to_solo_learn",
    "apply_to_vicreg",
]
