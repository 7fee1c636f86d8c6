#!/usr/bin/env bash
# All tests, from a fresh machine. CGS_TEST_DATA=FOLDER adds those on real data.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh --editable '.[test]'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Two at a time: compilation runs on one core. A file's tests share what they train.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
