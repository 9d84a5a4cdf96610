#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Creates the certificates for mutual TLS between proxies and servers in the folder $1: pod/ and proxy/, each with
# tls.crt, tls.key and ca.crt as in a Secret, valid for $DAYS (825). The first run also creates the authority, ca.crt
# and ca.key; later runs renew the certificates with it. Keep ca.key away from the cluster.
set -eu
umask 077
mkdir -p "$1"
cd "$1"
key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1"; }
if ! test -e ca.key; then
  key ca.key
  openssl req -x509 -new -key ca.key -subj "/CN=longlive authority" -days 3650 -out ca.crt
fi
for who in pod proxy; do
  case $who in
    pod) names=DNS:longlive,IP:127.0.0.1 use=serverAuth,clientAuth ;;  # its probes are clients
    proxy) names=DNS:longlive-proxy use=clientAuth ;;
  esac
  mkdir -p "$who"
  key "$who/tls.key"
  cp ca.crt "$who/ca.crt"
  printf 'subjectAltName=%s\nextendedKeyUsage=%s\nbasicConstraints=critical,CA:FALSE\n' "$names" "$use" > "$who/extensions"
  openssl req -new -key "$who/tls.key" -subj "/CN=longlive-$who" -out "$who/request"
  openssl x509 -req -in "$who/request" -CA ca.crt -CAkey ca.key -set_serial "0x$(openssl rand -hex 16)" \
    -days "${DAYS:-825}" -extfile "$who/extensions" -out "$who/tls.crt"
  rm "$who/extensions" "$who/request"
done
