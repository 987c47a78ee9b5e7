#!/usr/bin/env bash
# Tells Ray that this node is going, so that the service moves away what only it holds, while requests go on.
#
#   spot.sh aws|gcp|azure   waits for the cloud's notice to a spot node, which comes 2 minutes (AWS) or 30 s before
#                           the end; once for a node, however often it is started
#   spot.sh pod             at once, and waits: before a pod on Kubernetes ends (preStop)
#
# SPOT_ADDRESS: of the one cluster that is told, where nodes of several run on this machine.
set -euo pipefail

metadata=${SPOT_METADATA:-http://169.254.169.254}
get() { curl --silent --fail --max-time 5 "$@"; }

# How many seconds are left, once the cloud says that the node is going; fails until then. (Joined by &&: bash passes
# over `set -e` in what a loop looks at.)
seconds_left() {
    local token events='metadata/scheduledevents?api-version=2020-07-01'
    case "$1" in
        aws)
            token=$(get --request PUT --header 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/latest/api/token") &&
                get --header "X-aws-ec2-metadata-token: $token" \
                    "$metadata/latest/meta-data/spot/instance-action" >/dev/null && echo 110
            ;;
        gcp)
            get --header 'Metadata-Flavor: Google' "$metadata/computeMetadata/v1/instance/preempted" |
                grep --quiet TRUE && echo 25
            ;;
        azure) get --header 'Metadata: true' "$metadata/$events" | grep --quiet '"Preempt"' && echo 25 ;;
        pod) echo 60 ;;
    esac
}

# Cluster and id of each of Ray's nodes on this machine, but for a head, as their own processes have them. Ray's command
# would otherwise start a driver to ask for an id, which finds one of several nodes, and the head before all others.
nodes() {
    local process
    for process in "${SPOT_PROC:-/proc}"/[0-9]*/cmdline; do
        { tr '\0' '\n' <"$process" | awk -F= '
            NR == 1 && !/\/raylet$/ { exit }
            $1 == "--gcs-address" { address = $2 }
            $1 == "--node_id" { id = $2 }
            $1 == "--head" { id = ""; exit }
            END { if (id != "") print address, id }'; } 2>/dev/null || true # it may have ended
    done
}

case "${1:-}" in
    aws | gcp | azure) exec 9>"$HOME/ray-moe/spot.lock" && { flock --nonblock 9 || exit 0; } ;;
    pod) ;;
    *) echo "spot.sh: expected aws, gcp, azure or pod, not '${1:-}'" >&2 && exit 2 ;;
esac
until left=$(seconds_left "$1"); do sleep "${SPOT_POLL_S:-5}"; done
ended=1
while read -r address node; do
    [ "${SPOT_ADDRESS:-$address}" = "$address" ] || continue
    ray drain-node --address "$address" --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION \
        --reason-message 'the cloud takes this node back' --deadline-remaining-seconds "$left" </dev/null && ended=0
done < <(nodes)
[ "$ended" = 0 ] || { echo "spot.sh: no node of Ray on this machine could be told" >&2 && exit 1; }
[ "$1" != pod ] || sleep "${SPOT_GRACE_S:-45}"
