#!/usr/bin/env bash
# Installs ray_moe on a node: a virtual environment in ~/ray-moe/venv with the wheel in ~/ray-moe/dist, at the versions
# that every commit is tested with. `install.sh [PACKAGE ...]` adds others (the head needs its cloud's SDK). Does
# nothing where that wheel is installed already. Needs Python 3.11 or later: Ubuntu 24.04, Debian 12.
set -euo pipefail
cd "$HOME/ray-moe"

wheel=$(echo dist/ray_moe-*.whl)
[ -f "$wheel" ] || { echo "install.sh: expected one wheel in ~/ray-moe/dist, found: $wheel" >&2; exit 1; }
stamp="venv/.installed-$(basename "$wheel")$(printf -- '-%s' "$@" | tr -c 'A-Za-z0-9.\n-' _)"
[ ! -e "$stamp" ] || exit 0

[ -d venv ] || python3 -m venv venv
build=$(nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
pip() { venv/bin/pip --disable-pip-version-check install --quiet --no-input -c constraints/tested.txt "$@"; }
# First, and alone: which build of torch it is depends on the machine.
pip -r "constraints/$build.txt" || pip torch==2.13.0
pip "$wheel[serve]" "$@"
touch "$stamp"
