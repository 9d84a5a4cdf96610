#!/bin/sh
# Downloads NVIDIA's perf_analyzer and a recent enough C library into the folder $1; the command is $1/perf_analyzer.
# Debian and Ubuntu only. Installs nothing system-wide.
set -eu
version=2.60.0
mkdir -p "$1/lists/partial" "$1/cache/archives/partial" "$1/root"
cd "$1"
here=$(pwd)
mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/debian.sources 2>/dev/null | head -1)
keys=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keys] ${mirror:-http://deb.debian.org/debian} trixie main" > sources.list
set -- -o "Dir::Etc::sourcelist=$here/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$here/lists" \
  -o "Dir::Cache=$here/cache" -o APT::Sandbox::User=root
apt-get "$@" -qq update
apt-get "$@" -qq download libc6 libstdc++6
for package in *.deb; do dpkg-deb -x "$package" root; done
"${PYTHON:-python3}" -m pip download -q --no-deps --only-binary=:all: --platform manylinux_2_38_x86_64 \
  --python-version 3.11 "perf_analyzer==$version"
"${PYTHON:-python3}" -m zipfile -e "perf_analyzer-$version"-*.whl wheel
chmod +x wheel/perf_analyzer/bin/perf_analyzer
cat > perf_analyzer <<END
#!/bin/sh
exec "$here/root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$here/root/usr/lib/x86_64-linux-gnu" \\
  "$here/wheel/perf_analyzer/bin/perf_analyzer" "\$@"
END
chmod +x perf_analyzer
