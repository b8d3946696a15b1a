"""Python runs this before anything else. Of the enclave's processes only the engine sees torch and
what comes with it: gate, loader and init stand on the standard library and cryptography."""

import sys

if "--engine" in sys.orig_argv:
    sys.path.append("/usr/lib/muenclave/extras")
