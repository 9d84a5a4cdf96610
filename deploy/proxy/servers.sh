#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Writes the list of servers for haproxy.cfg into the file $1: the pods longlive-0 to longlive-($SERVERS - 1) of the
# namespace $NAMESPACE. A pod without an address gets no requests.
set -eu
: "${SERVERS:?}" "${NAMESPACE:?}" "${CLUSTER_DOMAIN:=cluster.local}"
{
  echo "resolvers cluster"
  echo "  parse-resolv-conf"
  echo "  timeout resolve 5s  # between queries for one name"
  echo "  hold valid 5s"
  echo "  hold nx 1s          # a terminating pod gets no new requests; its streams continue"
  echo "backend servers"
  echo "  stick on hdr(x-session-id) table sticky"
  pod=0
  while [ "$pod" -lt "$SERVERS" ]; do
    echo "  server longlive-$pod longlive-$pod.longlive.$NAMESPACE.svc.$CLUSTER_DOMAIN:8001 check port 8000" \
      "resolvers cluster resolve-prefer ipv4 init-addr none"
    pod=$((pod + 1))
  done
} > "$1"
