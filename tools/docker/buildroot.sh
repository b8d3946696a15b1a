#!/bin/sh
# Build the guest with Buildroot in its container: [CONFIG [TARGET ...]]. CONFIG is muenclave (the
# default) or muenclave_gpu; TARGETs are those of Buildroot's make. The path of the output is fixed,
# since Buildroot promises equal output for an equal path only.
set -eu
config=${1:-muenclave}
if [ "$#" -gt 0 ]; then
    shift
fi
out=/var/muenclave/out
make -C /buildroot "O=$out" BR2_EXTERNAL=/muenclave/br_external "${config}_defconfig"
make -C /buildroot "O=$out" "${@:-all}"
