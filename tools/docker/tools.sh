#!/bin/sh
# tools/attack_surface.py in its container: VERB [TARGET ...]. Without targets it measures what is
# built in build/.
set -eu
if [ "$#" = 1 ]; then
    case $1 in
    attack | loc | security | all)
        if [ -e build/muenclave.efi ]; then
            set -- "$@" "enclave=build/muenclave.efi+build/extras.squashfs+build/reference.json"
        fi
        if [ -e build/baseline/root ]; then
            set -- "$@" baseline=build/baseline/root
        fi
        if [ "$#" = 1 ]; then
            echo "tools: error: build/ is empty: build with tools/image.py all and" \
                "tools/baseline/rootfs.py --output build/baseline, or name a target" >&2
            exit 1
        fi
        ;;
    esac
fi
exec /opt/tools/bin/python -B tools/attack_surface.py "$@"
