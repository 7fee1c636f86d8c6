#!/usr/bin/env bash
# Sourced by the other scripts: sets workdir to what --workdir of "$@" names, '' without.
# shellcheck disable=SC2034 # used by those scripts
workdir=
for ((i = 1; i <= $#; i++)); do
  next=$((i + 1))
  case ${!i} in
    --workdir=*) workdir=${!i#*=} ;;
    --workdir) workdir=${!next} ;;
  esac
done
