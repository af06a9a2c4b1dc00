"""Every rule of the package, found instead of listed: a new file in optim/ is tested without a change to any test."""

import importlib
import pkgutil

import optim
from optim import MatrixOptimizer


def find_rules(base=MatrixOptimizer):
    """The classes of optim/ that derive from ``base``, by name."""
    for module in pkgutil.iter_modules(optim.__path__):
        importlib.import_module(f"optim.{module.name}")
    found, seen = [base], {}
    while found:
        subclasses = found.pop().__subclasses__()
        seen |= {cls.__name__: cls for cls in subclasses if cls.__module__.startswith("optim.")}
        found += subclasses
    return [seen[name] for name in sorted(seen)]


def with_all_rules(cases, base=MatrixOptimizer):
    """``cases`` (name -> (class, settings)), and the rules that have no case, at their defaults."""
    covered = {cls for cls, _ in cases.values()}
    return cases | {cls.__name__.lower(): (cls, {}) for cls in find_rules(base) if cls not in covered}
