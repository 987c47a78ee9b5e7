#!/bin/sh
# Makes the certificates of the tests anew. They are committed, and valid for a hundred years, because the openssl binary
# is not on every machine. Their keys protect nothing.
set -eu
cd "$(dirname "$0")"
work="$(mktemp -d)"
trap 'rm -r "$work"' EXIT

cat >"$work/config" <<END
[ca]
default_ca = this
[this]
database = $work/database
new_certs_dir = $work
rand_serial = yes
default_md = sha256
policy = policy
[policy]
commonName = supplied
[root]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
[leaf]
basicConstraints = CA:FALSE
subjectAltName = DNS:localhost,IP:127.0.0.1,IP:::1
extendedKeyUsage = serverAuth,clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
END
: >"$work/database"

# NAME, then where its key goes, then the arguments that say who signs it.
make() {
  name="$1" key="$2"
  shift 2
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$key" -subj "/CN=$name" -out "$work/request"
  openssl ca -batch -notext -config "$work/config" -startdate 20200101000000Z -enddate 21200101000000Z \
    -in "$work/request" -out "$name.pem" "$@"
}

authority() { make "$1" "$work/$1.key" -selfsign -keyfile "$work/$1.key" -extensions root; }
certificate() { make "$1" "$1.key" -cert "$2.pem" -keyfile "$work/$2.key" -extensions leaf; }

authority authority
authority stranger_authority
certificate server authority
certificate renewed authority # the server's next one
certificate client authority
certificate stranger stranger_authority
openssl pkey -in server.key -aes256 -passout pass:secret -out encrypted.key
