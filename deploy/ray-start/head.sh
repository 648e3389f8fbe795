#!/usr/bin/env bash
# Starts Ray's head node on this machine. Options of `ray start` may follow, such as --block or --node-ip-address.
#
#   deploy/ray-start/head.sh [OPTION...]
#
# It makes ~/.ray/auth_token if there is none. The other machines, and those that submit jobs, need a copy of that file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export PATH="$PWD/.venv/bin:$PATH"  # `python` of every job is the one that is found here
export RAY_AUTH_MODE=token
ulimit -n "$(ulimit -Hn)"
ulimit -l "$(ulimit -Hl)"  # InfiniBand registers memory
(umask 077 && ray get-auth-token --generate >/dev/null)  # a password: for this user's eyes only

exec ray start --head --disable-usage-stats "$@"
