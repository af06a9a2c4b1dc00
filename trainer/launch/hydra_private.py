"""What Hydra 1.3 gives no public name; nothing else in this project imports from ``hydra._internal``.

BasicSweeper       its ``split_arguments`` makes overrides into jobs; a plugin's public interface only runs them
get_args_parser    the options of ``hydra.main``, which it parses only when it acts on them
"""

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser

__all__ = ["BasicSweeper", "get_args_parser"]
