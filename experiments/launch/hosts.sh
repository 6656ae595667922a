#!/usr/bin/env bash
# Trains on a plain list of hosts, over ssh, one process on each:
#
#     experiments/launch/hosts.sh HOSTS experiments/wsd.yaml --run.directory=/shared/runs/wsd --mesh.fsdp=-1
#
# HOSTS is a file with a line for each, as ssh takes it (name, or user@name); the first one coordinates the others and
# must be reachable from all by that name, on port PORT (12355). The working directory, python (or what PYTHON says) and
# the run directory are the same on every host; a key lets ssh in without a question. A host with several GPUs has one
# line: one process takes all of them.
#
# SIGTERM or Ctrl-C saves on all hosts and exits with 75, as it does on a single one; otherwise the exit code is that of
# the first host.
set -uo pipefail

mapfile -t hosts < <(sed 's/#.*//; s/[[:space:]]//g; /^$/d' "${1:?expected a file of hosts}")
shift
port=${PORT:-12355}
pid="\${TMPDIR:-/tmp}/cpmjax-$port.pid" # on the first host
trap 'ssh -n "${hosts[0]}" "kill -TERM \$(cat $pid)"' TERM INT # one host tells the others

jobs=()
for number in "${!hosts[@]}"; do
    variables="JAX_COORDINATOR_ADDRESS=${hosts[0]##*@}:$port JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$number"
    remember=$([ "$number" = 0 ] && echo "echo \$\$ > $pid &&")
    command="exec env $variables ${PYTHON:-python} -m cpmjax.train$(printf ' %q' "$@")"
    ssh -n "${hosts[number]}" "cd $(printf %q "$PWD") && $remember $command" &
    jobs+=($!)
done

codes=()
for job in "${jobs[@]}"; do
    # A signal ends a wait, and not yet what is waited for.
    while wait "$job"; code=$?; [ "$code" -gt 128 ] && kill -0 "$job" 2> /dev/null; do :; done
    codes+=("$code")
done
exit "${codes[0]}"
