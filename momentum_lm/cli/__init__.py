"""Command-line programs. Each module's ``main(argv)`` parses arguments and calls the library, which it imports when it
needs it.
"""

import fairseq_compat  # noqa: F401  (puts the fairseq hook in place where no .pth file was read: PYTHONPATH, pip --target)
