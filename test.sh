#!/usr/bin/env bash
# One command on a fresh machine: set up .venv, then run the linters and every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=study/setup.sh
source study/setup.sh
set_up requirements.txt requirements-serving.txt requirements-scale.txt tests/requirements.txt

ruff check .
ruff format --check .
shellcheck ./*.sh study/*.sh demo/*.sh benchmarks/*.sh serving/*.sh results/study/*.sh .ci/run
# Each file in one process, which has its own fixtures; three on two cores, since some tests wait.
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
