# What every node of a cluster has in its environment before Ray starts there: `. node.sh [aws|azure|site]`.
#
# Only processes with the cluster's token may join (~/.ray/auth_token), and Ray's own traffic is encrypted with a
# certificate that this makes once for the node, signed by the cluster's authority (~/.ray/tls/ca.pem and ca.key).
# `aws` and `azure` also ask the cloud for the node's zone, `site` reads it in /etc/ray-moe/zone (a rack, a room, where
# machines have it). Ray makes it the label ray.io/availability-zone: the failure domain of balance.domain_label.
# docs/deploy.md makes token and authority.

export PATH="$HOME/ray-moe/venv/bin:$PATH"

# As `ray-moe serve` has it for a Ray of its own (RAY_ENVIRONMENT): repairs are noticed at once and do not slow down.
export RAY_worker_niceness=0
export RAY_timeout_ms_task_wait_for_death_info=20
export RAY_core_worker_internal_heartbeat_ms=100
export RAY_kill_worker_timeout_milliseconds=500

export RAY_AUTH_MODE=token
export RAY_USE_TLS=1
export RAY_TLS_CA_CERT="$HOME/.ray/tls/ca.pem"
export RAY_TLS_SERVER_CERT="$HOME/.ray/tls/node.pem"
export RAY_TLS_SERVER_KEY="$HOME/.ray/tls/node.key"

# Ray's peers know each other by address, so the certificate names all addresses of this node. (Joined by &&: bash
# passes over `set -e` in a function whose result is looked at.)
_node_certificate() (
    umask 077 && cd "$HOME/.ray/tls" &&
        addresses=$(hostname -I | xargs -n 1 printf ',IP:%s') &&
        openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$(hostname)" \
            -keyout node.key -out node.csr &&
        openssl x509 -req -in node.csr -CA ca.pem -CAkey ca.key -set_serial "0x$(openssl rand -hex 16)" -days 825 \
            -extfile <(printf '%s\n' "subjectAltName=DNS:localhost,IP:127.0.0.1$addresses" \
                'extendedKeyUsage=serverAuth,clientAuth' 'basicConstraints=critical,CA:FALSE') -out node.pem &&
        rm node.csr
)

_node_zone() {
    local metadata=http://169.254.169.254 get="curl --silent --fail --max-time 5"
    case "$1" in
        aws)
            local token
            token=$($get --request PUT --header 'X-aws-ec2-metadata-token-ttl-seconds: 60' $metadata/latest/api/token)
            $get --header "X-aws-ec2-metadata-token: $token" $metadata/latest/meta-data/placement/availability-zone
            ;;
        site)
            [ ! -e /etc/ray-moe/zone ] || cat /etc/ray-moe/zone
            ;;
        azure)
            local query='api-version=2021-02-01&format=text' zone
            zone=$($get --header 'Metadata: true' "$metadata/metadata/instance/compute/zone?$query")
            # Empty where the region has no zones, or the machine is in none.
            [ -z "$zone" ] || echo "$($get --header 'Metadata: true' \
                "$metadata/metadata/instance/compute/location?$query")-$zone"
            ;;
    esac
}

# Not that of another authority or of another machine (an image that was made of one).
_node_is_certified() {
    openssl verify -CAfile "$RAY_TLS_CA_CERT" "$RAY_TLS_SERVER_CERT" >/dev/null 2>&1 &&
        openssl x509 -in "$RAY_TLS_SERVER_CERT" -noout -checkip "$(hostname -I | cut -d ' ' -f 1)" |
        grep --quiet 'does match'
}

_node_is_certified || _node_log=$(_node_certificate 2>&1) || {
    echo "node.sh: cannot make this node's certificate; are ca.pem and ca.key in ~/.ray/tls?" >&2
    echo "$_node_log" >&2
    return 1
}
[ -z "${1:-}" ] || export RAY_NODE_ZONE="$(_node_zone "$1")"
