#!/usr/bin/env bash
# The text of configs/speedrun-4m.toml: the Collaborative International Dictionary of English 0.48, 40 MB of prose, as
# Debian has it.
#
#   bash benches/speedrun/gcide.sh [FOLDER]      default: data
#
# writes FOLDER/gcide-train.txt and FOLDER/gcide-val.txt. Needs apt-get and dpkg-deb. Entries stay in their order; of
# every 200,000 lines, the first 500 are for validation, so that both texts have words of every letter.
set -euo pipefail
folder=${1:-data}
mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$work" && apt-get download dict-gcide=0.48.5+nmu2 && dpkg-deb -x dict-gcide_*.deb .)
gzip -dc <"$work/usr/share/dictd/gcide.dict.dz" >"$work/gcide.txt"
check() { echo "$2  $1" | sha256sum --check --quiet; }
check "$work/gcide.txt" 802beb667e1fb666203e750f1faea60d5c202ac5430c2083c4180494609f10a7
# A few bytes are not UTF-8; they are left out.
{ iconv -c -f UTF-8 -t UTF-8 "$work/gcide.txt" || true; } |
  awk -v train="$folder/gcide-train.txt" -v val="$folder/gcide-val.txt" \
    '{ print > ((NR - 1) % 200000 < 500 ? val : train) }'
check "$folder/gcide-train.txt" c3d479969ba6882f67c5272aa4a15d0d1ef7fadec8fad69264b3e584341989b4
check "$folder/gcide-val.txt" 36558312c7c1ee0cbf95762694d997dd31f582b2ae913599bbd250e99e24af50
