#!/usr/bin/env bash
# Sourced by the other scripts: makes .venv in the checkout and installs what "$@" names into it, and
# where there is an NVIDIA GPU JAX's support for it.
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: Python 3.11 or newer is needed; set PYTHON to one" >&2
  exit 1
fi
if [ ! -x .venv/bin/pip ]; then
  "$python" -m venv .venv || { echo "error: venv failed; on Debian: apt install python3-venv" >&2; exit 1; }
fi
packages=("$@")
if nvidia-smi -L >/dev/null 2>&1; then packages+=('jax[cuda12]'); fi
stamp=.venv/installed-$({
  cat requirements.txt pyproject.toml
  echo "${packages[@]}"
} | sha256sum | cut -c1-12)
if [ ! -e "$stamp" ]; then
  echo "installing into .venv ..."
  # Most of what is installed is never imported and needs no bytecode, which takes long to make.
  .venv/bin/pip install --quiet --disable-pip-version-check --no-compile "${packages[@]}"
  PYTHONDONTWRITEBYTECODE="" .venv/bin/python -c "import cgs_jax.main, cgs_jax.sweep"
  touch "$stamp"
fi
