"""Watch every video of a bucket once, and ask anything of what was kept.

Every import of `longvlm.pipeline...` runs this file, so it imports next to nothing.
"""

from pkgutil import extend_path

# In a checkout the rooms lie beside this folder and not in it. Where that is found before an installation or before
# `.links` (`PYTHONPATH=.links python -m benchmarks...`), their `longvlm` has the rooms.
__path__ = extend_path(__path__, __name__)
