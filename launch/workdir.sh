#!/usr/bin/env bash
# Sourced by the other scripts: sets workdir to what --workdir of "$@" names, '' without, and tells
# whether the run there is finished, which writes its report last.
# shellcheck disable=SC2034 # used by those scripts
workdir=
for ((i = 1; i <= $#; i++)); do
  next=$((i + 1))
  case ${!i} in
    --workdir=*) workdir=${!i#*=} ;;
    --workdir) workdir=${!next} ;;
  esac
done
home=~
workdir=${workdir/#\~\//$home/} # a shell leaves it in --workdir=~/RUN

# finished PYTHON: whether that run is done. Python looks, for a shell does not see files of a bucket.
finished() {
  "$1" -c 'import sys
from cgs_jax.runtime.files import folder
sys.exit(not (folder(sys.argv[1]) / "report.html").exists())' "$workdir"
}
