#!/usr/bin/env bash
# Creates benchmarks/.envs/trl, the environment of the peers that the scripts here measure:
# TRL 1.16 and its transformers on torch. It is apart from .venv because the peers exclude each other's versions.
# torch is installed first, so that nothing pulls another build of it in: pass a CPU wheel's
# requirement as TORCH where the plain one brings CUDA.
set -euo pipefail
cd "$(dirname "$0")"

env=.envs/trl
torch=${TORCH:-torch==2.13.0}
stamp="$env/.complete"
[ -e "$stamp" ] && exit 0

"${PYTHON:-python3}" -m venv "$env"
"$env/bin/pip" install -q --disable-pip-version-check "$torch"
"$env/bin/pip" install -q --disable-pip-version-check "trl==1.16.*"
touch "$stamp"
