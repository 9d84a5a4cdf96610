#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Downloads commands ($2, ...: kustomize, promtool, docker-compose) into the folder $1, without installing them. Debian
# and Ubuntu only. The commands of Debian 13 run on older systems too; promtool is in Debian 12's package only.
set -eu
mkdir -p "$1"
cd "$1"
shift
here=$(pwd)
mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/debian.sources 2>/dev/null | head -1)
keys=/usr/share/keyrings/debian-archive-keyring.gpg
fetch() {  # release, package, path of the command in it
  mkdir -p "$1/lists/partial" "$1/cache/archives/partial"
  echo "deb [signed-by=$keys] ${mirror:-http://deb.debian.org/debian} $1 main" > "$1/sources.list"
  options="-o Dir::Etc::sourcelist=$here/$1/sources.list -o Dir::Etc::sourceparts=- -o Dir::State::lists=$here/$1/lists"
  options="$options -o Dir::Cache=$here/$1/cache -o APT::Sandbox::User=root"
  # shellcheck disable=SC2086  # several words
  apt-get $options -qq update
  # shellcheck disable=SC2086
  (cd "$1" && apt-get $options -qq download "$2")
  dpkg-deb -x "$1/$2"_*.deb "$1/$2"
  cp "$1/$2/$3" "${3##*/}"
  rm -r "$1"
}
for command in "$@"; do
  case $command in
    kustomize) fetch trixie kustomize usr/bin/kustomize ;;
    promtool) fetch bookworm prometheus usr/bin/promtool ;;
    docker-compose) fetch trixie docker-compose usr/libexec/docker/cli-plugins/docker-compose ;;
    *) echo "tools.sh: got $command, expected kustomize, promtool or docker-compose" >&2 && exit 2 ;;
  esac
done
