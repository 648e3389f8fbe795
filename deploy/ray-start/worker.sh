#!/usr/bin/env bash
# Joins this machine to the Ray cluster of a head node. Options of `ray start` may follow, such as --block.
#
#   deploy/ray-start/worker.sh HEAD[:PORT] [OPTION...]
#
# ~/.ray/auth_token (or the file that RAY_AUTH_TOKEN_PATH names) must be that of the head node.
set -euo pipefail
head=${1:?the address of the head node is missing, such as 10.0.0.1}
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export PATH="$PWD/.venv/bin:$PATH"
export RAY_AUTH_MODE=token
ulimit -n "$(ulimit -Hn)"
ulimit -l "$(ulimit -Hl)"
if ! ray get-auth-token >/dev/null 2>&1; then
  echo "error: no token of the cluster here; copy the head node's ~/.ray/auth_token to ~/.ray/auth_token" >&2
  exit 2
fi
[[ $head == *:* ]] || head=$head:6379

exec ray start --address "$head" --disable-usage-stats "$@"
