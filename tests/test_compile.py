"""Every kernel compiles for the GPUs it is meant for, with the arguments it is launched with; this needs no
GPU.

The interpreter that other tests run the kernels with takes what the compiler refuses, e.g. a variable that
changes its type in a loop.
"""

import json
import re
import tempfile

import pytest
from conftest import ROOT, run_program

pytest.importorskip("triton")


CAPABILITIES = {"A10G": 86, "H100": 90}
PROGRAMS = [
    (f"TRITON_CACHE_DIR={tempfile.mkdtemp()}", "tests/compile_cases.py", str(capability))
    for capability in CAPABILITIES.values()
]


@pytest.mark.parametrize("card", CAPABILITIES)
def test_every_kernel_compiles(card):
    capability = CAPABILITIES[card]
    done = run_program(*PROGRAMS[list(CAPABILITIES).index(card)])
    assert done.returncode == 0, done.stderr[-3000:]
    sources = [path.read_text() for path in (ROOT / "study" / "fast").glob("*.py")]
    kernels = {
        name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)
    }
    found = json.loads(done.stdout.splitlines()[-1])
    shared = found["shared"]
    assert set(shared) == kernels
    assert found["narrow"] == {}
    assert max(shared.values()) <= {86: 99, 90: 227}[capability] * 1024  # what a block can take, in bytes
