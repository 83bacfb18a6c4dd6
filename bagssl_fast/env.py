"""What a bug report needs: `python -m bagssl_fast.env`. Every run keeps it as env.json."""

from __future__ import annotations

import json
import sys

from bagssl_fast import machine

if __name__ == "__main__":
    sys.stdout.write(json.dumps(machine.report(), indent=2) + "\n")
