#!/bin/sh
# numba uses a cache of compiled kernels only where it can write, and the image is read-only: each container has a copy.
if [ -d /opt/gradstream/kernels ] && [ ! -e "$NUMBA_CACHE_DIR" ]; then
    cp -R /opt/gradstream/kernels "$NUMBA_CACHE_DIR" || true
fi
exec gradstream "$@"
