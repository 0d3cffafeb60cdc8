"""Every kernel compiles for the GPUs it is meant for, with the arguments it is launched with; this needs no
GPU.

The interpreter that other tests run the kernels with takes what the compiler refuses, e.g. a variable that
changes its type in a loop.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("triton")


@pytest.mark.parametrize("capability", [86, 90], ids=["A10G", "H100"])
def test_every_kernel_compiles(capability, tmp_path):
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, Path(__file__).with_name("compile_cases.py"), str(capability)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    sources = [(ROOT / "study" / f"{name}.py").read_text() for name in ("kernels", "nf4", "cache")]
    kernels = {
        name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)
    }
    found = json.loads(done.stdout.splitlines()[-1])
    shared = found["shared"]
    assert set(shared) == kernels
    assert found["narrow"] == {}
    assert max(shared.values()) <= {86: 99, 90: 227}[capability] * 1024  # what a block can take, in bytes
