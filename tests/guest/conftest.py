"""The guest's build is a script beside the packages: let the tests import its parts as `guest`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
